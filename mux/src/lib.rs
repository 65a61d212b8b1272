//! The mux: takes packets for services from a network interface, hashes each flow to a bucket, and sends its
//! packets, encapsulated, to the bucket's owner. It keeps no state about connections.
//!
//! | module | what it does |
//! |---|---|
//! | [`pipeline`] | decides about a burst of frames and encapsulates them in place; no I/O |
//! | [`processor`] | vector instructions for the flow hash, and prefetching |
//! | [`table`] | what the pipeline reads, and how it changes under it |
//! | [`io`] | where frames come from and go to |
//! | [`metrics`] | one counter for each way a packet may go |
//! | [`neighbours`] | the Ethernet addresses of next hops, from the kernel |
//! | [`state`] | what the control threads change: tables, and the XDP filter that follows them |
//! | [`sync`] | tables from the controller |

// What tests share names this crate as they do.
#[cfg(test)]
extern crate self as daisy_mux;
#[cfg(test)]
#[path = "../tests/common/mod.rs"]
mod common;

pub mod io;
pub mod metrics;
pub mod neighbours;
pub mod pipeline;
pub mod processor;
pub mod state;
pub mod sync;
pub mod table;
