//! The model checker: all orders of events within its bounds, with [`daisy_shared::chain::decide`] itself at every
//! agent.
//!
//! One bucket. A controller moves it between servers, hears drain reports, splices, restarts, declares a crashed
//! server dead. A client connects, sends SYNs again, sends data, closes, connects again. Tables and the directory
//! reach each agent at any time, and skip generations; a packet enters through a mux that has any table there ever
//! was, so there are as many muxes, as stale or early as one likes. Packets are lost and overtake each other.
//!
//! [`world`] says what may happen, [`properties`] what must hold, [`rules`] how to switch a rule off. Two things
//! keep the space small and leave nothing out: a table arrives when its agent next does something (before that
//! nobody could tell), and servers are named in the order in which they first become head.
//!
//! Covered without an action of their own: a *suspect* server loses headship (a move) and hears nothing (tables
//! need not arrive). A lost report is one that the controller never hears.
//!
//! Not covered: a controller that forgets what it has published (a store restored from an older backup), and
//! a live server that is declared dead. Both may break connections.
//!
//! `cargo test -p daisy-shared --test model -- --ignored --nocapture --test-threads 1` explores
//! larger bounds, and takes 7 GB of memory. States, all of them good: four servers and three moves 7.3 million; four
//! moves 6.1; two moves with two packets and strays 4.9; with everything but a reboot 8.9; with two reboots 2.2;
//! three moves with a crash and a return 48.7; with two SYNs 43.1.

mod breaks;
mod holds;
mod measure;
mod properties;
mod rules;
mod state;
mod world;

use std::sync::Arc;

use measure::Measures;
use world::{Bounds, Start, World};

/// Two moves among three servers, one packet in flight, and nothing else.
const SMALL: Bounds = Bounds {
    servers: 3,
    blank: false,
    moves: 2,
    packets: 1,
    strays: false,
    closes: false,
    restarts: false,
    crash: false,
    revival: false,
    reboots: 0,
    deaf: None,
    start: Start::Newest,
    off: None,
};

/// A world with these bounds, and what it will measure.
fn world(bounds: &Bounds) -> (World, Arc<Measures>) {
    let measures = Arc::new(Measures::default());
    (World { bounds: bounds.clone(), measures: measures.clone() }, measures)
}
