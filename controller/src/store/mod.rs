//! The state on disk. Each change is one transaction, and is on the disk before anybody hears of it.

use std::path::PathBuf;

use daisy_shared::service::ServiceId;

pub mod embedded;

pub use embedded::Embedded;

/// Why the store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has it.
    #[error("store {0}: another controller uses it")]
    InUse(PathBuf),
    /// Written by a newer program.
    #[error("store {path}: has schema version {found}, this program knows {known}; use the newer program")]
    Newer {
        /// Where it is.
        path: PathBuf,
        /// The version in it.
        found: u64,
        /// The version of this program.
        known: u64,
    },
    /// Not a store of ours, or damaged.
    #[error("store {path}: {place}: {why}")]
    Damaged {
        /// Where it is.
        path: PathBuf,
        /// Which part.
        place: String,
        /// What is wrong with it.
        why: String,
    },
    /// The disk or the file.
    #[error("store {path}: {error}")]
    Disk {
        /// Where it is.
        path: PathBuf,
        /// What it says. Not its source: then it would be said twice.
        error: redb::Error,
    },
}

/// A place in the store, for messages.
fn place(table: &str, key: impl std::fmt::Display) -> String {
    format!("{table} {key}")
}

/// The key of a block of buckets.
fn block_key(service: ServiceId, block: u32) -> u64 {
    u64::from(service.0) << 32 | u64::from(block)
}
