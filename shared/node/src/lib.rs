//! What muxes and agents share, and `daisy-shared` may not do: I/O.
//!
//! | module | what it does |
//! |---|---|
//! | [`sync`] | keeps a node's directory and tables equal to the controller's |
//! | [`store`] | the last good tables, on disk |
//! | [`probe`] | asks a backend's data path for a sign of life |
//! | [`next_hops`] | to which Ethernet address a packet for a peer goes, from the kernel's routes and neighbours |
//! | [`interface`] | looks a network interface up |
//! | [`netlink`] | blocking netlink requests |
//! | [`xdp`] | attaches an XDP program |
//! | [`log`] | log lines, errors at start, token files |
//! | [`stop`] | the flag that ends a daemon |
#![forbid(unsafe_code)]

pub mod interface;
pub mod log;
pub mod netlink;
pub mod next_hops;
pub mod probe;
pub mod stop;
pub mod store;
pub mod sync;
pub mod xdp;
