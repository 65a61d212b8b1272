//! What must hold in every state.

use daisy_shared::chain::{MAX_HOPS, Verdict};
use daisy_shared::drop::DropReason;
use stateright::Property;

use crate::rules::{Facts, Off, decide_without};
use crate::state::*;
use crate::world::{Bounds, World};

pub const NO_RESET: &str = "no connection that a live server holds is reset";
pub const RIGHT_SERVER: &str = "no packet of a connection meets another server's socket";
pub const ACCEPTED_ONCE: &str = "no connection is accepted by two servers";
pub const ZERO_STAYS_ZERO: &str = "zero stays zero: only owners in the controller's chain accept and hold";
pub const NO_DROP: &str = "no packet of a live connection is dropped by an agent";
pub const FROZEN_ARRIVES: &str = "whatever the tables, a packet of a live connection arrives";
pub const FROZEN_SYN_ARRIVES: &str = "whatever the tables, a SYN is accepted or meets its half-open socket";
pub const SETTLED_ARRIVES: &str = "once tables have settled, a packet of a live connection arrives";
pub const SETTLED_SYN_ARRIVES: &str =
    "once tables have settled, a SYN is accepted or meets its half-open socket";
pub const NOBODY_WAITS: &str = "all moves are made, and whoever can has left, though one agent hears nothing";

/// All properties.
pub fn all(bounds: &Bounds) -> Vec<Property<World>> {
    fn free_of(state: &State, breach: Breach) -> bool {
        state.breach != Some(breach)
    }
    let mut properties: Vec<Property<World>> = vec![
        Property::always(NO_RESET, |_, state| free_of(state, Breach::Reset)),
        Property::always(RIGHT_SERVER, |_, state| free_of(state, Breach::WrongServer)),
        Property::always(ACCEPTED_ONCE, |_, state| free_of(state, Breach::AcceptedTwice)),
        Property::always(ZERO_STAYS_ZERO, |_, state| {
            free_of(state, Breach::AcceptedOutside)
                && members(state.holders).all(|server| state.chain().contains(server))
        }),
        Property::always(NO_DROP, |_, state| free_of(state, Breach::Dropped)),
        Property::always(FROZEN_ARRIVES, |world, state| arrives_frozen(world, state, Content::Data)),
        Property::always(FROZEN_SYN_ARRIVES, |world, state| arrives_frozen(world, state, Content::Syn)),
        Property::always(SETTLED_ARRIVES, |world, state| arrives_settled(world, state, Content::Data)),
        Property::always(SETTLED_SYN_ARRIVES, |world, state| arrives_settled(world, state, Content::Syn)),
    ];
    if bounds.deaf.is_some() {
        properties.push(Property::sometimes(NOBODY_WAITS, |world: &World, state: &State| {
            let (chain, deaf) = (state.chain(), world.bounds.deaf.expect("one is deaf"));
            let others = chain.iter().skip(1).all(|server| server == deaf);
            let done = state.moves == world.bounds.moves && chain.contains(deaf) && others;
            done && state.holders == bit(chain.head()) && chain.head() != deaf
        }));
    }
    properties
}

/// How a walk through tables that stand still ends.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Arrived { hops: u8 },
    LostAtCasualty,
    Dropped(DropReason),
    Failed,
}

/// The packet that the client would send now. Packets in flight make no difference to how it fares, so it is
/// enough to look at states without any: all knowledge occurs in such a state too, because the network may lose
/// them.
fn next_packet(state: &State) -> Option<Content> {
    match state.client {
        _ if !state.packets.is_empty() => None,
        Client::Connecting => Some(Content::Syn),
        Client::Connected(_) => state.owner().map(|_| Content::Data),
    }
}

/// Through every mux the client's packet arrives, after any number of changes that not everybody has heard of:
/// data at the owner, a SYN at a half-open socket or, if there is none, at a server that accepts. Only the
/// casualty of a crash may swallow it, and an agent may drop what [`World::excuses`] names.
fn arrives_frozen(world: &World, state: &State, content: Content) -> bool {
    if next_packet(state) != Some(content) {
        return true;
    }
    state.ages_from(0).all(|mux| match walk(world, state, content, mux) {
        End::Arrived { hops } => {
            world.measures.walked(content, false, hops);
            true
        }
        End::LostAtCasualty => state.down,
        End::Dropped(reason) => world.excuses(state, reason),
        End::Failed => false,
    })
}

/// Once the newest tables have reached the agents, the client's packet arrives, also through muxes that still have
/// older tables; only those that send to the casualty itself do not count.
fn arrives_settled(world: &World, state: &State, content: Content) -> bool {
    // Before the controller knows of the crash nothing is settled.
    if next_packet(state) != Some(content) || state.down && state.directory == HEALTHY {
        return true;
    }
    let settle = |concerned: u8| {
        let mut settled = state.clone();
        settled.told = [state.directory; MAX_SERVERS];
        for server in members(concerned).filter(|server| !state.is_down(*server)) {
            settled.take_table(server, state.now());
        }
        settled
    };
    // All agents that ever were in the chain; and if nobody has forgotten anything, those that are in it now.
    let all = settle(state.seen());
    let undisturbed = state.casualty.is_none() && state.reboots == 0 && !world.bounds.blank;
    let in_chain =
        undisturbed.then(|| settle(state.chain().iter().fold(0, |bits, server| bits | bit(server))));

    let arrives = |settled: &State, mux: Age| match walk(world, settled, content, mux) {
        End::Arrived { hops } => {
            world.measures.walked(content, true, hops);
            true
        }
        End::LostAtCasualty | End::Dropped(_) | End::Failed => false,
    };
    [all].iter().chain(&in_chain).all(|settled| {
        let muxes = state.ages_from(0).filter(|mux| !state.is_down(state.chain_at(*mux).head()));
        muxes.into_iter().all(|mux| arrives(settled, mux))
    })
}

/// Sends a packet of the client through a mux, and follows it while nothing but the packet itself changes
/// anything.
fn walk(world: &World, state: &State, content: Content, mux: Age) -> End {
    let mut known = state.known;
    let mut packet = Packet::from_mux(content, mux, state.chain_at(mux));
    // One more round than hops, so that only `decide` ends a walk.
    for _ in 0..=MAX_HOPS + 1 {
        let me = packet.at;
        if state.is_down(me) {
            return End::LostAtCasualty;
        }
        let (walk, knowledge) = (packet.walk(), known[usize::from(me)].knowledge());
        let off = world.bounds.off;
        let facts = Facts {
            me,
            matched: state.holders & bit(me) != 0,
            syn: content.is_syn(),
            walk: walk.as_ref(),
            knowledge: knowledge.as_ref(),
            skipped: if off == Some(Off::DeadAreSpliced) { 0 } else { state.skipped_by(me) },
        };
        let decision = decide_without(off, &facts);
        if let Some(learned) = &decision.learned {
            known[usize::from(me)] = Known::of(learned);
        }
        let right = content == Content::Syn || state.client == Client::Connected(me);
        match decision.verdict {
            Verdict::Deliver if right => return End::Arrived { hops: packet.hops },
            Verdict::Accept if state.holders == 0 => return End::Arrived { hops: packet.hops },
            Verdict::Send { to, walk } => packet = Packet::sent(content, to, &walk),
            Verdict::Drop(reason) => return End::Dropped(reason),
            Verdict::Deliver | Verdict::Accept | Verdict::Answer => return End::Failed,
        }
    }
    End::Failed
}
