//! What every part of daisy must agree on.
//!
//! Nothing here does I/O, reads a clock or holds a lock: each function takes facts and returns a verdict, so
//! that the same code runs under the NIC, the fuzzer, the model checker and the simulator.
//!
//! | module | what it fixes |
//! |---|---|
//! | [`wire`] | bytes on the underlay: GUE with the walk as private data, and the fast parse of client packets |
//! | [`checksum`] | the Internet checksum, whole and incremental |
//! | [`flow`] | the keyed flow hash that maps a connection to a bucket |
//! | [`bucket`] | bucket words, the mux's table, snapshots and deltas |
//! | [`chain`] | the chain protocol: what an agent does with a packet |
//! | [`service`] | what a service is |
//! | [`control`] | messages between nodes and the controller |
//! | [`drop`] | why a packet was dropped |
#![forbid(unsafe_code)]

pub mod bucket;
pub mod chain;
pub mod checksum;
pub mod control;
pub mod drop;
pub mod flow;
pub mod service;
pub mod wire;
