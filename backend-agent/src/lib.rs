//! The agent, which runs beside a backend: its data path delivers packets to the local service or sends them down
//! the chain; its daemon keeps the data path's maps, the service's addresses, and the drain reports.
//!
//! | module | what it does |
//! |---|---|
//! | [`datapath`] | the eBPF programs, their maps and their attachment |
//! | [`daemon`] | what is started in which order, and what is done every second |
//! | [`sync`] | carries out what the controller says |
//! | [`peers`] | tells the data path where other agents are, and which are dead |
//! | [`vip`] | the services' addresses on this host |
//! | [`drain`] | when a bucket may be reported as drained (rule 8) |
//! | [`sockets`] | which buckets hold connections |

pub mod daemon;
pub mod datapath;
pub mod drain;
pub mod peers;
pub mod sockets;
pub mod sync;
pub mod vip;
