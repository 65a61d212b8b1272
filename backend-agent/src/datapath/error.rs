//! Why the data path could not do what was asked.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};

use daisy_node::interface::InterfaceError;
use daisy_node::log::causes;
use daisy_shared::service::ServiceId;

/// How many characters of an error of the kernel's are shown.
const LONGEST: usize = 600;

/// Why the data path could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// Pins need a bpf filesystem.
    #[error("{} is not a bpf filesystem: mount -t bpf bpf {}", .0.display(), .0.display())]
    NotBpffs(PathBuf),
    /// The interface cannot be used.
    #[error(transparent)]
    Interface(#[from] InterfaceError),
    /// A file or folder under the bpf filesystem.
    #[error("{}: {error}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
    /// The kernel took a program or map not, or refused an operation on it.
    #[error("{what}: {why}")]
    Kernel {
        /// The program or map, and what was to happen.
        what: String,
        /// What the kernel said, on one line.
        why: String,
    },
    /// The map of knowledge has no room for another table.
    #[error(
        "service {service} needs {buckets} buckets, but of {capacity} (--bucket-capacity) at most {free} in one \
         piece are free"
    )]
    Capacity {
        /// The service's name.
        service: String,
        /// How many buckets it has.
        buckets: u32,
        /// The longest free range.
        free: u32,
        /// How many buckets all services together may have.
        capacity: u32,
    },
    /// The data path carries IPv4.
    #[error("service {0}: its address is not IPv4")]
    NotIpv4(String),
    /// Nothing was set under this number.
    #[error("service {0} is not known to the data path")]
    UnknownService(ServiceId),
    /// The service's table is smaller.
    #[error("service {service} has {buckets} buckets, there is no bucket {bucket}")]
    NoSuchBucket {
        /// The service.
        service: ServiceId,
        /// The bucket asked for.
        bucket: u32,
        /// How many there are.
        buckets: u32,
    },
    /// A prefix is longer than an address.
    #[error("{0}/{1} is not a prefix of IPv4 addresses")]
    BadPrefix(std::net::Ipv4Addr, u8),
}

impl DatapathError {
    pub(super) fn io(path: &Path, error: io::Error) -> DatapathError {
        DatapathError::Io { path: path.to_owned(), error }
    }

    /// An error of the kernel's, with its causes, on one line.
    pub(super) fn kernel(what: impl Into<String>, error: &dyn Error) -> DatapathError {
        // Of a verifier's log the end tells what it did not like.
        let mut why = causes(error).replace('\n', " | ");
        if let Some((cut, _)) = why.char_indices().rev().nth(LONGEST) {
            why = format!("…{}", &why[cut..]);
        }
        DatapathError::Kernel { what: what.into(), why }
    }
}
