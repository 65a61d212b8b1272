//! The Ethernet addresses of next hops: what the kernel knows of routes and neighbours, brought into the tables. Where
//! there is no kernel interface, one next hop that the operator names.

use std::collections::BTreeSet;
use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use daisy_node::interface::{Interface, Mac};
use daisy_node::next_hops::{self, NextHops};

use crate::state::State;
use crate::table::NextHop;

/// How long a new directory may wait for the next hops of its backends, so that their first packets are not lost.
/// A neighbour that is there answers within a millisecond; one that is not must not hold up the rest.
const SETTLE: Duration = Duration::from_millis(500);

/// The next hops of all backends. Follows them until it is dropped.
#[derive(Debug)]
pub struct Neighbours {
    source: Source,
    wanted: BTreeSet<Ipv4Addr>,
}

#[derive(Debug)]
enum Source {
    Kernel(NextHops),
    Fixed { next_hop: NextHop, state: Arc<State> },
}

impl Neighbours {
    /// Starts to follow, behind these interfaces, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// If the kernel gives no netlink sockets or no thread.
    pub fn start(interfaces: &[Interface], state: Arc<State>) -> io::Result<Neighbours> {
        let indices: Vec<u32> = interfaces.iter().map(|interface| interface.index).collect();
        let on_change = move |backend, next_hop: Option<next_hops::NextHop>| {
            let mut control = state.lock();
            let next_hop = next_hop.and_then(|hop| {
                let egress = indices.iter().position(|index| *index == hop.interface)?.try_into().ok()?;
                let Mac(mac) = hop.source;
                control.set_mac(egress, mac);
                Some(NextHop { egress, mac: hop.destination.0 })
            });
            control.tables.set_next_hop(backend, next_hop);
        };
        let source = Source::Kernel(NextHops::start(interfaces, on_change)?);
        Ok(Neighbours { source, wanted: BTreeSet::new() })
    }

    /// Every backend is behind this next hop, for ever.
    pub fn fixed(next_hop: NextHop, state: Arc<State>) -> Neighbours {
        Neighbours { source: Source::Fixed { next_hop, state }, wanted: BTreeSet::new() }
    }

    /// Follows these backends and no others. Where some are new, waits for their next hops, for a short time.
    pub fn want(&mut self, backends: BTreeSet<Ipv4Addr>) {
        match &mut self.source {
            Source::Kernel(next_hops) => {
                let new = !backends.is_subset(&self.wanted);
                next_hops.set_wanted(backends.clone());
                if new {
                    // Those without a next hop are in the resolver's log, and in the counter of what they drop.
                    let _missing = next_hops.settle(SETTLE);
                }
            }
            Source::Fixed { next_hop, state } => {
                let mut control = state.lock();
                for gone in self.wanted.difference(&backends) {
                    control.tables.set_next_hop(*gone, None);
                }
                for new in backends.difference(&self.wanted) {
                    control.tables.set_next_hop(*new, Some(*next_hop));
                }
            }
        }
        self.wanted = backends;
    }
}
