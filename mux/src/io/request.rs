//! What is asked of packet I/O, as flags say it.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use clap::ValueEnum;
use daisy_node::interface::Interface;
use daisy_node::xdp::Mode;

use super::netmap::PortName;

/// How packets are moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// The best that the interfaces support.
    Auto,
    /// An XDP program that is the whole mux, in the kernel.
    Xdp,
    /// AF_XDP sockets on receive queues, behind an XDP program.
    AfXdp,
    /// Raw packet sockets.
    AfPacket,
    /// The rings of netmap's ports.
    Netmap,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Auto => "auto",
            Kind::Xdp => "xdp",
            Kind::AfXdp => "af-xdp",
            Kind::AfPacket => "af-packet",
            Kind::Netmap => "netmap",
        })
    }
}

/// Whether frames are copied between the driver and the memory that it shares with the mux.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Copy {
    /// Where the driver cannot do without.
    #[default]
    Auto,
    /// Never; an error where the driver cannot do without.
    Zero,
    /// Always.
    Copy,
}

/// A list of small numbers, such as `0,2-3`: ascending, each once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct List(Vec<u32>);

/// Not a list of numbers.
#[derive(Debug, thiserror::Error)]
pub enum BadList {
    /// It is not written as a list is.
    #[error("{0:?} is not a list of numbers such as 0,2-3")]
    Syntax(String),
    /// A number is too large to mean anything.
    #[error("{0} is above {max}", max = List::MAX)]
    Large(u32),
    /// A number is there more than once.
    #[error("{0} is named twice")]
    Twice(u32),
}

impl List {
    /// The largest number in a list.
    const MAX: u32 = 4095;

    /// The numbers.
    pub fn numbers(&self) -> &[u32] {
        &self.0
    }
}

impl FromStr for List {
    type Err = BadList;

    fn from_str(text: &str) -> Result<List, BadList> {
        let syntax = || BadList::Syntax(text.to_owned());
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            text.parse::<u32>().ok().filter(|_| digits).ok_or_else(syntax)
        };
        let mut numbers = Vec::new();
        for part in text.split(',') {
            let (first, last) = match part.split_once('-') {
                Some((first, last)) => (number(first)?, number(last)?),
                None => (number(part)?, number(part)?),
            };
            if first > last {
                return Err(syntax());
            }
            if last > List::MAX {
                return Err(BadList::Large(last));
            }
            numbers.extend(first..=last);
        }
        numbers.sort_unstable();
        match numbers.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(BadList::Twice(pair[0])),
            None => Ok(List(numbers)),
        }
    }
}

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Request {
    /// How packets are moved.
    pub kind: Kind,
    /// The mux's interfaces, by number.
    pub interfaces: Vec<Interface>,
    /// Those of them whose names are netmap's: all, or none.
    pub ports: Vec<PortName>,
    /// The processors that I/O threads run on, one on each.
    pub cores: Option<List>,
    /// The receive queues that are served, on each interface.
    pub queues: Option<List>,
    /// How long the kernel polls a device for packets instead of waiting for its interrupt.
    pub busy_poll: Option<Duration>,
    /// Whether frames may or must be copied.
    pub copy: Copy,
    /// Where XDP programs run.
    pub xdp_mode: Mode,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read() {
        for (text, numbers) in [("0", &[0][..]), ("0,2-3", &[0, 2, 3]), ("7-7,1", &[1, 7])] {
            assert_eq!(text.parse::<List>().unwrap().numbers(), numbers);
        }
        for (text, reason) in [
            ("", "is not a list"),
            ("a", "is not a list"),
            ("0,", "is not a list"),
            ("+1", "is not a list"),
            ("1-", "is not a list"),
            ("3-2", "is not a list"),
            ("0-4294967295", "4294967295 is above 4095"),
            ("1,0-2", "1 is named twice"),
        ] {
            let error = text.parse::<List>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
