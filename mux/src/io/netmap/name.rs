//! Names of netmap ports, as they are given with `--interface`.

use std::fmt;

use crate::io::IoError;

/// What a name of netmap's own begins with, but for VALE ports.
const PREFIX: &str = "netmap:";
/// What the name of a VALE port begins with.
const VALE: &str = "vale";

/// What kind of port it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A network interface, which the kernel knows and whose host rings lead to its stack.
    Interface,
    /// A port of a VALE switch.
    Vale,
    /// One end of a pipe. The memory of its rings is the other end's too.
    Pipe,
}

/// The name of a port: `netmap:IF`, `netmap:IF-N`, `valeX:P`, `netmap:X{N` or `netmap:X}N`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortName {
    /// As netmap's requests want it.
    pub(super) port: String,
    /// The only pair of rings to use, if one is named.
    pub(super) ring: Option<u16>,
    pub(super) kind: Kind,
}

impl PortName {
    /// Whether it is for netmap to say what this name means, and not the kernel.
    pub fn is_one(name: &str) -> bool {
        name.starts_with(PREFIX) || (name.starts_with(VALE) && name.contains(':'))
    }

    /// Reads a name.
    ///
    /// # Errors
    /// If it is none, with what is wrong.
    pub fn parse(name: &str) -> Result<PortName, IoError> {
        let wrong =
            |reason: &str| IoError::Unusable { place: format!("port {name}"), reason: reason.to_owned() };
        let plain = |part: &str| {
            !part.is_empty()
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
        };
        if let Some((switch, port)) = name.split_once(':').filter(|(switch, _)| switch.starts_with(VALE)) {
            if !plain(switch) || !plain(port) {
                return Err(wrong("a VALE port is named valeX:P"));
            }
            return Ok(PortName { port: name.to_owned(), ring: None, kind: Kind::Vale });
        }
        let Some(rest) = name.strip_prefix(PREFIX) else {
            return Err(wrong("is none of netmap:IF, netmap:IF-N, netmap:X{N, netmap:X}N and valeX:P"));
        };
        if let Some((parent, id)) = rest.split_once(['{', '}']) {
            if !plain(parent) || !plain(id) {
                return Err(wrong("an end of a pipe is named netmap:X{N or netmap:X}N"));
            }
            return Ok(PortName { port: rest.to_owned(), ring: None, kind: Kind::Pipe });
        }
        if !plain(rest) {
            return Err(wrong("an interface is named netmap:IF, or with one pair of its rings netmap:IF-N"));
        }
        let (interface, ring) = match rest.rsplit_once('-') {
            Some((interface, ring)) if !interface.is_empty() && ring.bytes().all(|b| b.is_ascii_digit()) => {
                (interface, Some(ring.parse().map_err(|_| wrong("that is no number of a ring"))?))
            }
            _ => (rest, None),
        };
        Ok(PortName { port: interface.to_owned(), ring, kind: Kind::Interface })
    }

    /// The kernel's interface behind the port, if there is one: its addresses and neighbours are the port's.
    pub fn interface(&self) -> Option<&str> {
        (self.kind == Kind::Interface).then_some(&self.port)
    }
}

impl fmt::Display for PortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.kind, self.ring) {
            (Kind::Vale, _) => write!(f, "{}", self.port),
            (_, None) => write!(f, "{PREFIX}{}", self.port),
            (_, Some(ring)) => write!(f, "{PREFIX}{}-{ring}", self.port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_shown() {
        for (name, port, ring, kind) in [
            ("netmap:eth0", "eth0", None, Kind::Interface),
            ("netmap:eth0-2", "eth0", Some(2), Kind::Interface),
            ("netmap:br-lan", "br-lan", None, Kind::Interface),
            ("netmap:br-lan-7", "br-lan", Some(7), Kind::Interface),
            ("vale0:p1", "vale0:p1", None, Kind::Vale),
            ("netmap:mux{1", "mux{1", None, Kind::Pipe),
            ("netmap:eth0}in", "eth0}in", None, Kind::Pipe),
        ] {
            let parsed = PortName::parse(name).unwrap();
            assert_eq!(parsed, PortName { port: port.to_owned(), ring, kind });
            assert_eq!(parsed.to_string(), name);
            assert!(PortName::is_one(name));
            assert_eq!(parsed.interface().is_some(), kind == Kind::Interface);
        }
        for name in
            ["eth0", "vale0:", "vale0", "netmap:", "netmap:a{", "netmap:{1", "netmap:eth0^", "netmap:e-99999"]
        {
            let error = PortName::parse(name).unwrap_err().to_string();
            assert!(error.starts_with(&format!("port {name}: ")), "{error}");
        }
        assert!(!PortName::is_one("eth0") && !PortName::is_one("vale0"));
    }
}
