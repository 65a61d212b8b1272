//! What the data path is told of other agents: where they are, and which are dead.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use daisy_node::next_hops::NextHop;
use tracing::{error, warn};

use crate::datapath::{Datapath, Peer};

/// How many peers that no directory names are kept: packets from muxes with newer tables than ours may name such
/// peers before the directory does; there is no reason for many.
const MAX_UNLISTED: usize = 256;

/// All peers. Directory and next hops come from different threads; each change goes to the data path at once.
pub struct Peers {
    datapath: Arc<Mutex<Datapath>>,
    state: Mutex<State>,
}

struct State {
    peers: BTreeMap<Ipv4Addr, Known>,
    /// Peers of an earlier run, as the data path still has them, until next hops are resolved anew: until then an
    /// old next hop is better than none.
    earlier: BTreeSet<Ipv4Addr>,
}

struct Known {
    peer: Peer,
    /// The directory names it.
    listed: bool,
}

impl Peers {
    /// No peers but those that an earlier run has left in the data path.
    pub fn new(datapath: Arc<Mutex<Datapath>>) -> Peers {
        let earlier = lock(&datapath).peers();
        let earlier = earlier.unwrap_or_else(|error| {
            error!(%error, "cannot read the peers of an earlier run");
            Vec::new()
        });
        let state = State { peers: BTreeMap::new(), earlier: earlier.into_iter().collect() };
        Peers { datapath, state: Mutex::new(state) }
    }

    /// Takes over a directory: each peer, and whether it is dead. Returns the addresses whose next hops are wanted
    /// from now on.
    pub fn set_directory(&self, directory: &BTreeMap<Ipv4Addr, bool>) -> BTreeSet<Ipv4Addr> {
        let mut state = lock(&self.state);
        let gone = |(address, known): (&Ipv4Addr, &Known)| {
            (known.listed && !directory.contains_key(address)).then_some(*address)
        };
        let mut gone: BTreeSet<Ipv4Addr> = state.peers.iter().filter_map(gone).collect();
        let unknown =
            |address: &&Ipv4Addr| !directory.contains_key(address) && !state.peers.contains_key(address);
        gone.extend(state.earlier.iter().filter(unknown));
        for address in gone {
            state.peers.remove(&address);
            state.earlier.remove(&address);
            if let Err(error) = lock(&self.datapath).remove_peer(address) {
                error!(peer = %address, %error, "peer not removed from the data path");
            }
        }
        for (&address, &dead) in directory {
            let known = state.peers.entry(address);
            let known = known.or_insert(Known { peer: Peer { next_hop: None, dead }, listed: true });
            known.listed = true;
            known.peer.dead = dead;
            self.write(&state, address);
        }
        state.peers.keys().copied().collect()
    }

    /// Takes over a next hop. Of an address that is no peer it is ignored.
    pub fn set_next_hop(&self, address: Ipv4Addr, next_hop: Option<NextHop>) {
        let mut state = lock(&self.state);
        if let Some(known) = state.peers.get_mut(&address) {
            known.peer.next_hop = next_hop;
            self.write(&state, address);
        }
    }

    /// Takes over an address that the data path has met in a packet. Returns whether its next hop is wanted.
    pub fn meet(&self, address: Ipv4Addr) -> bool {
        let mut state = lock(&self.state);
        if let Some(known) = state.peers.get(&address) {
            return known.peer.next_hop.is_none();
        }
        let unlisted = state.peers.values().filter(|known| !known.listed).count();
        if unlisted == MAX_UNLISTED {
            warn!(%address, "packets name too many peers that the directory does not; this one gets no packets");
            return false;
        }
        warn!(%address, "packets name a peer that the directory does not (yet)");
        let peer = Peer { next_hop: None, dead: false };
        state.peers.insert(address, Known { peer, listed: false });
        true
    }

    /// Next hops are as well known as they can be: what an earlier run knew no longer counts.
    pub fn resolved(&self) {
        let mut state = lock(&self.state);
        for address in std::mem::take(&mut state.earlier) {
            if state.peers.contains_key(&address) {
                self.write(&state, address);
            }
        }
    }

    fn write(&self, state: &State, address: Ipv4Addr) {
        let Some(Known { peer, .. }) = state.peers.get(&address) else { return };
        if peer.next_hop.is_none() && !peer.dead && state.earlier.contains(&address) {
            return;
        }
        if let Err(error) = lock(&self.datapath).set_peer(address, *peer) {
            error!(peer = %address, %error, "peer not set in the data path");
        }
    }
}

/// Locks, also after a panic elsewhere: all that is behind locks here is whole between any two statements.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
