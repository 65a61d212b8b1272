//! The end-to-end suites: real daemons, servers and clients in network namespaces.
//!
//! | suite | file |
//! |---|---|
//! | 1 steady: HTTP and bulk transfer to every backend, byte-exact | `steady.rs` |
//! | 2 scale-out, scale-in, weights, with live connections | `churn.rs` |
//! | 3 chains deeper than two | `depth.rs` |
//! | 4 muxes killed and added, nodes cut off from the controller | `muxes.rs` |
//! | 5 controller killed, restarted, absent | `control_plane.rs` |
//! | 6 agents killed, restarted, replaced | `upgrade.rs` |
//! | 7 backend killed | `failure.rs` |
//! | 8 the control: without chaining, connections break | `control_group.rs` |
//!
//! They need root. One runs at a time: each is a whole network, and timing is part of what they check.

#![allow(clippy::unwrap_used, reason = "all of this is test code")]

#[macro_use]
mod common;

mod churn;
mod control_group;
mod control_plane;
mod depth;
mod failure;
mod muxes;
mod steady;
mod tools;
mod upgrade;
