//! Attaching an XDP program to an interface.

use std::fmt;
use std::str::FromStr;

use aya::programs::xdp::{XdpLinkId, XdpMode};
use aya::programs::{ProgramError, Xdp};
use tracing::{info, warn};

use crate::interface::Interface;
use crate::log::causes;

/// How an XDP program is asked to be attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// In the driver where it can, in the kernel's generic path otherwise.
    #[default]
    Auto,
    /// In the driver only.
    Native,
    /// In the kernel's generic path only: works with every driver, and is slower.
    Generic,
}

/// Not an XDP mode.
#[derive(Debug, thiserror::Error)]
#[error("XDP mode {0:?} is none of auto, native, generic")]
pub struct BadMode(String);

impl FromStr for Mode {
    type Err = BadMode;

    fn from_str(text: &str) -> Result<Mode, BadMode> {
        match text {
            "auto" => Ok(Mode::Auto),
            "native" => Ok(Mode::Native),
            "generic" => Ok(Mode::Generic),
            other => Err(BadMode(other.to_owned())),
        }
    }
}

/// How an XDP program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attached {
    /// In the driver.
    Native,
    /// In the kernel's generic path.
    Generic,
}

impl fmt::Display for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Attached::Native => "native",
            Attached::Generic => "generic",
        })
    }
}

/// The program could not be attached.
#[derive(Debug, thiserror::Error)]
#[error("interface {interface}: XDP program not attached in {mode} mode: {}", causes(.error))]
pub struct AttachError {
    interface: String,
    mode: Attached,
    error: ProgramError,
}

/// Attaches a loaded program to an interface. Says in the log how, and, where `Auto` fell back to the generic
/// path, why.
///
/// # Errors
/// If no mode that was asked for works; another program's being attached is the usual cause.
pub fn attach(
    program: &mut Xdp,
    interface: &Interface,
    mode: Mode,
) -> Result<(XdpLinkId, Attached), AttachError> {
    let mut attach_in = |attached| {
        let flag = match attached {
            Attached::Native => XdpMode::Driver,
            Attached::Generic => XdpMode::Skb,
        };
        let error = |error| AttachError { interface: interface.name.clone(), mode: attached, error };
        program.attach_to_if_index(interface.index, flag).map(|link| (link, attached)).map_err(error)
    };
    let attached = match mode {
        Mode::Native => attach_in(Attached::Native)?,
        Mode::Generic => attach_in(Attached::Generic)?,
        Mode::Auto => match attach_in(Attached::Native) {
            Ok(attached) => attached,
            Err(native) => {
                let generic = attach_in(Attached::Generic)?;
                warn!(
                    interface = interface.name,
                    reason = causes(&native.error),
                    "the driver takes no XDP program; using the slower generic path"
                );
                generic
            }
        },
    };
    info!(interface = interface.name, mode = %attached.1, "XDP program attached");
    Ok(attached)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_read() {
        let modes = [("auto", Mode::Auto), ("native", Mode::Native), ("generic", Mode::Generic)];
        for (text, mode) in modes {
            assert_eq!(text.parse::<Mode>().unwrap(), mode);
        }
        assert_eq!(
            "Fast".parse::<Mode>().unwrap_err().to_string(),
            "XDP mode \"Fast\" is none of auto, native, generic"
        );
    }

    #[test]
    fn an_error_is_told_with_its_causes_once() {
        let cause = std::io::Error::other("device busy");
        let error = ProgramError::IOError(cause);
        assert_eq!(causes(&error), "device busy");
    }
}
