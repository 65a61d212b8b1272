//! The chain protocol: what an agent does with a packet that reaches it.
//!
//! The promise: a connection that a backend has accepted is never reset by any sequence of table changes, mux
//! changes, stale or early tables at any node, in any order, as long as that backend is alive. No timer, no
//! clock and no order of publication is part of the proof.
//!
//! [`decide`] is the whole of the protocol (rules 1 to 7; rules 8 to 10 bind the controller, see
//! `ARCHITECTURE.md`). The agent's eBPF program implements the same function, a differential test holds the two
//! together, and a model checker runs this one (`shared/tests/model.rs`).
//!
//! 1. **Match first.** A packet with a local connection is delivered, whatever any table says.
//! 2. **Newest knowledge wins.** An agent that knows a newer generation than the packet carries starts the walk
//!    anew at the head it knows, with nobody visited.
//! 3. **Packets teach.** An agent that knows an older generation adopts the packet's, and keeps its own older
//!    chain behind the packet's path.
//! 4. **The walk** visits the owners that the packet lists, then those that only this agent knows.
//! 5. **Ask the past before accepting.** A new flow walks the whole chain first and returns to its origin.
//! 6. **Only the head accepts.**
//! 7. **The end of the chain answers.** An orphan that has visited everyone is given to the local stack, which
//!    resets it. A packet whose hops are spent is dropped, never reset.
//!
//! "Everyone" must be certain, for accepting as well as for answering. It is not where an agent knows of a bucket
//! from packets alone, and not where an owner that has not looked has been declared dead: then a newer table
//! without that owner exists, and perhaps a newer head that this agent has not heard of. Both are dropped
//! (`docs/decisions/0010-no-end-without-certainty.md`).

use core::fmt;

use arrayvec::ArrayVec;
use serde::{Deserialize, Serialize};

use crate::drop::DropReason;

/// The most owners that a walk lists, and that an agent remembers of a bucket.
pub const MAX_OWNERS: usize = 8;

/// The longest chain that a controller makes. Shorter than [`MAX_OWNERS`], because an agent's knowledge may also
/// list owners that have left already.
pub const MAX_CHAIN: usize = 6;

/// How often a packet may be sent on: every owner once, the return, and as many fresh starts (rule 2).
pub const MAX_HOPS: u8 = 16;

/// Owners of a bucket, newest first.
pub type Owners<A> = ArrayVec<A, MAX_OWNERS>;

/// The number of the change in which a bucket's chain last changed. Compared with wrap-around, so that a counter
/// may run for ever (RFC 1982 serial numbers, 32 bits).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub u32);

impl Generation {
    /// Whether this generation is newer than `other`. Two generations exactly half the circle apart are ordered
    /// neither way.
    pub const fn is_newer_than(self, other: Generation) -> bool {
        (self.0.wrapping_sub(other.0) as i32) > 0
    }

    /// The generation of the next change.
    #[must_use]
    pub const fn next(self) -> Generation {
        Generation(self.0.wrapping_add(1))
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a packet says of its way so far. A packet without private data has none, and counts as one of the oldest
/// generation.
///
/// The agent that the packet is addressed to stands in neither list, except that a returned packet is addressed
/// to its origin, the first of `visited`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Walk<A> {
    /// The generation of the newest knowledge consulted on the way.
    pub generation: Generation,
    /// How often agents have sent the packet on.
    pub hops: u8,
    /// The last owner sends a new flow back to its origin with this set.
    pub returned: bool,
    /// Owners that have looked and not found, the origin (the head in `generation`) first. Empty while the packet
    /// is on its way to the origin itself.
    pub visited: Owners<A>,
    /// Owners still to visit, newest first.
    pub to_visit: Owners<A>,
}

/// What an agent knows of a bucket.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Knowledge<A> {
    /// The newest generation seen, in a table or in a packet.
    pub generation: Generation,
    /// The owners, newest first. May list owners that have left already.
    pub chain: Owners<A>,
    /// Whether a table of the controller is at the root of this, of whatever generation: then the chain leads to
    /// every connection. An agent that has only ever learned of the bucket from packets may lack owners, so it
    /// sends packets on, but neither accepts nor answers. One that has lost what it knew takes no packets before
    /// the controller has answered.
    pub from_table: bool,
}

/// What the local TCP stack has for a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A connection, a request socket or a live SYN cookie fits.
    Matched,
    /// The start of a flow that is not known here (TCP: SYN without ACK).
    New,
    /// Anything else.
    Orphan,
}

/// What to do with a packet.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Verdict<A> {
    /// Give it to the local stack, which has the connection.
    Deliver,
    /// Give it to the local stack, which starts a connection.
    Accept,
    /// Give it to the local stack, which answers with a reset: nobody has this connection.
    Answer,
    /// Send it to another owner with this walk.
    Send {
        /// The next owner.
        to: A,
        /// The walk to write into the header.
        walk: Walk<A>,
    },
    /// Drop it and count the reason.
    Drop(DropReason),
}

/// A verdict, and what the agent must remember from now on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Decision<A> {
    /// What to do with the packet.
    pub verdict: Verdict<A>,
    /// The knowledge that replaces the agent's, where the packet taught something (rule 3). It must be in place
    /// before the verdict is carried out.
    pub learned: Option<Knowledge<A>>,
}

/// Decides about one packet.
///
/// `me` is this agent's address, `packet` the walk that the packet carries, `knowledge` what this agent knows of
/// the packet's bucket, and `dead` says which peers the controller has declared dead (rule 9): they are skipped,
/// and stay listed as still to visit.
pub fn decide<A: Copy + Eq>(
    me: A,
    kind: Kind,
    packet: Option<&Walk<A>>,
    knowledge: Option<&Knowledge<A>>,
    dead: impl Fn(A) -> bool,
) -> Decision<A> {
    // Even a packet that is delivered at once teaches.
    let (learned, overflow) = match learn(me, packet, knowledge) {
        Ok(learned) => (learned, None),
        Err(reason) => (None, Some(reason)),
    };
    let verdict = match (kind, overflow, learned.as_ref().or(knowledge)) {
        (Kind::Matched, _, _) => Verdict::Deliver,
        (_, Some(reason), _) => Verdict::Drop(reason),
        (_, None, None) => Verdict::Drop(DropReason::UnknownBucket),
        (_, None, Some(known)) => walk_on(me, kind, packet, known, dead),
    };
    Decision { verdict, learned }
}

/// Rule 3: what the packet teaches, if it is newer than what is known.
fn learn<A: Copy + Eq>(
    me: A,
    packet: Option<&Walk<A>>,
    knowledge: Option<&Knowledge<A>>,
) -> Result<Option<Knowledge<A>>, DropReason> {
    let Some(walk) = packet else { return Ok(None) };
    let (older_chain, from_table) = match knowledge {
        Some(known) if !walk.generation.is_newer_than(known.generation) => return Ok(None),
        Some(known) => (&known.chain[..], known.from_table),
        None => (&[][..], false),
    };
    let mut chain = Owners::new();
    // A packet that has visited nobody is on its way to the head: then `me` comes first.
    let path = walk.visited.iter().chain([&me]).chain(&walk.to_visit);
    for owner in path.chain(older_chain) {
        push_new(&mut chain, *owner).map_err(|Full| DropReason::ChainOverflow)?;
    }
    Ok(Some(Knowledge { generation: walk.generation, chain, from_table }))
}

/// Rules 2 and 4 to 7, for a packet without a local connection that is no newer than `known`.
fn walk_on<A: Copy + Eq>(
    me: A,
    kind: Kind,
    packet: Option<&Walk<A>>,
    known: &Knowledge<A>,
    dead: impl Fn(A) -> bool,
) -> Verdict<A> {
    let Some(&head) = known.chain.first() else { return Verdict::Drop(DropReason::NoBackend) };
    let hops = packet.map_or(0, |walk| walk.hops);
    let current = packet.filter(|walk| !known.generation.is_newer_than(walk.generation));

    let mut visited = Owners::new();
    let mut pending = Owners::new();
    if let Some(walk) = current {
        visited.clone_from(&walk.visited);
        pending.extend(walk.to_visit.iter().copied().filter(|owner| *owner != me));
    } else if head != me {
        // Rule 2: start anew at the head.
        if !dead(head) {
            let to_visit = known.chain[1..].iter().copied().collect();
            let generation = known.generation;
            return send(head, Walk { generation, hops, returned: false, visited, to_visit });
        }
        // A dead head is still the origin, from which others learn who is head; but it has not looked.
        visited.push(head);
        pending.push(head);
    }
    // Rule 4: those that only this agent knows.
    for owner in &known.chain {
        if *owner != me && !visited.contains(owner) && push_new(&mut pending, *owner).is_err() {
            return Verdict::Drop(DropReason::WalkOverflow);
        }
    }

    // Rules 5 and 6.
    if kind == Kind::New && head == me && pending.is_empty() && known.from_table {
        return Verdict::Accept;
    }
    if push_new(&mut visited, me).is_err() || visited.len() + pending.len() > MAX_OWNERS + 1 {
        return Verdict::Drop(DropReason::WalkOverflow);
    }
    let generation = known.generation;
    if let Some(next) = pending.iter().position(|owner| !dead(*owner)) {
        let to = pending.remove(next);
        return send(to, Walk { generation, hops, returned: false, visited, to_visit: pending });
    }
    if !pending.is_empty() {
        return Verdict::Drop(DropReason::DeadOwner);
    }
    if !known.from_table {
        return Verdict::Drop(DropReason::UnknownBucket);
    }
    match kind {
        Kind::New if visited[0] == me => Verdict::Drop(DropReason::WalkContradicts),
        // Rule 5: the last owner sends a new flow back to its origin.
        Kind::New => send(visited[0], Walk { generation, hops, returned: true, visited, to_visit: pending }),
        // Rule 7: everybody has looked.
        Kind::Orphan | Kind::Matched => Verdict::Answer,
    }
}

/// Sends the packet one hop further, if it has one left (rule 7).
fn send<A>(to: A, walk: Walk<A>) -> Verdict<A> {
    if walk.hops >= MAX_HOPS {
        return Verdict::Drop(DropReason::HopsSpent);
    }
    Verdict::Send { to, walk: Walk { hops: walk.hops + 1, ..walk } }
}

/// The list has no room for another owner.
struct Full;

/// Appends an owner, if it is not in the list yet.
fn push_new<A: Copy + Eq>(owners: &mut Owners<A>, owner: A) -> Result<(), Full> {
    if owners.contains(&owner) { Ok(()) } else { owners.try_push(owner).map_err(|_| Full) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owners(list: &[u8]) -> Owners<u8> {
        list.iter().copied().collect()
    }

    fn known(generation: u32, chain: &[u8]) -> Knowledge<u8> {
        Knowledge { generation: Generation(generation), chain: owners(chain), from_table: true }
    }

    fn learned(generation: u32, chain: &[u8]) -> Knowledge<u8> {
        Knowledge { from_table: false, ..known(generation, chain) }
    }

    fn walk(generation: u32, hops: u8, visited: &[u8], to_visit: &[u8]) -> Walk<u8> {
        let (visited, to_visit) = (owners(visited), owners(to_visit));
        Walk { generation: Generation(generation), hops, returned: false, visited, to_visit }
    }

    fn verdict(
        me: u8,
        kind: Kind,
        packet: Option<&Walk<u8>>,
        knowledge: Option<&Knowledge<u8>>,
    ) -> Verdict<u8> {
        decide(me, kind, packet, knowledge, |_| false).verdict
    }

    #[test]
    fn generations_compare_with_wrap_around() {
        assert!(Generation(1).is_newer_than(Generation(0)));
        assert!(Generation(0).is_newer_than(Generation(u32::MAX)));
        assert!(!Generation(u32::MAX).is_newer_than(Generation(0)));
        assert!(!Generation(7).is_newer_than(Generation(7)));
        assert_eq!(Generation(u32::MAX).next(), Generation(0));
    }

    #[test]
    fn rule_1_a_match_is_delivered_whatever_is_known() {
        for knowledge in [None, Some(known(9, &[2, 3]))] {
            assert_eq!(verdict(1, Kind::Matched, None, knowledge.as_ref()), Verdict::Deliver);
        }
    }

    #[test]
    fn rule_2_newer_knowledge_starts_anew_at_the_head() {
        let known = known(5, &[2, 3, 1]);
        let packet = walk(4, 2, &[3], &[4]);
        let expected = Verdict::Send { to: 2, walk: walk(5, 3, &[], &[3, 1]) };
        assert_eq!(verdict(1, Kind::Orphan, Some(&packet), Some(&known)), expected);
        assert_eq!(
            verdict(1, Kind::New, None, Some(&known)),
            Verdict::Send { to: 2, walk: walk(5, 1, &[], &[3, 1]) }
        );
    }

    #[test]
    fn rule_3_a_newer_packet_teaches_and_the_older_chain_stays_behind_it() {
        let packet = walk(6, 1, &[4], &[2]);
        let decision = decide(1, Kind::Orphan, Some(&packet), Some(&known(5, &[1, 3])), |_| false);
        assert_eq!(decision.learned, Some(known(6, &[4, 1, 2, 3])));
        assert_eq!(decision.verdict, Verdict::Send { to: 2, walk: walk(6, 2, &[4, 1], &[3]) });
    }

    #[test]
    fn rule_3_teaches_the_new_head_itself() {
        let packet = walk(6, 0, &[], &[2]);
        let decision = decide(1, Kind::New, Some(&packet), None, |_| false);
        assert_eq!(decision.learned, Some(learned(6, &[1, 2])));
        assert_eq!(decision.verdict, Verdict::Send { to: 2, walk: walk(6, 1, &[1], &[]) });
    }

    #[test]
    fn rule_4_visits_the_listed_owners_then_the_known_ones() {
        let packet = walk(5, 0, &[], &[2]);
        assert_eq!(
            verdict(1, Kind::Orphan, Some(&packet), Some(&known(5, &[1, 2, 3]))),
            Verdict::Send { to: 2, walk: walk(5, 1, &[1], &[3]) }
        );
    }

    #[test]
    fn rule_5_a_new_flow_asks_the_past_and_returns() {
        let last = walk(5, 1, &[1], &[]);
        let back = Walk { returned: true, ..walk(5, 2, &[1, 2], &[]) };
        assert_eq!(
            verdict(2, Kind::New, Some(&last), Some(&known(5, &[1, 2]))),
            Verdict::Send { to: 1, walk: back.clone() }
        );
        assert_eq!(verdict(1, Kind::New, Some(&back), Some(&known(5, &[1, 2]))), Verdict::Accept);
    }

    #[test]
    fn rule_5_the_origin_asks_those_that_only_it_knows() {
        let back = Walk { returned: true, ..walk(5, 2, &[1, 2], &[]) };
        assert_eq!(
            verdict(1, Kind::New, Some(&back), Some(&known(5, &[1, 2, 3]))),
            Verdict::Send { to: 3, walk: walk(5, 3, &[1, 2], &[]) }
        );
    }

    #[test]
    fn rule_6_an_origin_that_is_no_longer_head_sends_to_the_head() {
        let back = Walk { returned: true, ..walk(5, 2, &[1, 2], &[]) };
        assert_eq!(
            verdict(1, Kind::New, Some(&back), Some(&known(6, &[3, 1, 2]))),
            Verdict::Send { to: 3, walk: walk(6, 3, &[], &[1, 2]) }
        );
    }

    #[test]
    fn rule_7_the_end_of_the_chain_answers_and_spent_hops_drop() {
        let end = walk(5, 1, &[1], &[]);
        assert_eq!(verdict(2, Kind::Orphan, Some(&end), Some(&known(5, &[1, 2]))), Verdict::Answer);
        let spent = walk(5, MAX_HOPS, &[], &[2]);
        assert_eq!(
            verdict(1, Kind::Orphan, Some(&spent), Some(&known(5, &[1, 2]))),
            Verdict::Drop(DropReason::HopsSpent)
        );
    }

    #[test]
    fn rule_9_dead_owners_are_skipped_and_stay_to_visit() {
        let is_2 = |owner| owner == 2;
        let decision = decide(1, Kind::Orphan, None, Some(&known(5, &[1, 2, 3])), is_2);
        assert_eq!(decision.verdict, Verdict::Send { to: 3, walk: walk(5, 1, &[1], &[2]) });
        let decision = decide(1, Kind::Orphan, None, Some(&known(5, &[2, 1, 3])), is_2);
        assert_eq!(decision.verdict, Verdict::Send { to: 3, walk: walk(5, 1, &[2, 1], &[2]) });
        let decision = decide(1, Kind::Orphan, None, Some(&known(5, &[3, 2, 1])), is_2);
        assert_eq!(decision.verdict, Verdict::Send { to: 3, walk: walk(5, 1, &[], &[2, 1]) });
    }

    #[test]
    fn a_walk_that_skipped_a_dead_owner_has_no_end() {
        let is_2 = |owner| owner == 2;
        let dropped = Verdict::Drop(DropReason::DeadOwner);
        for kind in [Kind::New, Kind::Orphan] {
            for chain in [&[1, 2][..], &[2, 1]] {
                assert_eq!(decide(1, kind, None, Some(&known(5, chain)), is_2).verdict, dropped);
            }
            let skipped = walk(5, 1, &[2, 1], &[2]);
            assert_eq!(decide(3, kind, Some(&skipped), Some(&known(4, &[3])), is_2).verdict, dropped);
            // One that has not been told so tries.
            let tried = Verdict::Send { to: 2, walk: walk(5, 2, &[2, 1, 3], &[]) };
            assert_eq!(verdict(3, kind, Some(&skipped), Some(&known(4, &[3]))), tried);
        }
    }

    #[test]
    fn who_knows_a_bucket_from_packets_alone_sends_on_but_ends_no_walk() {
        let packet = walk(6, 0, &[], &[2]);
        for kind in [Kind::New, Kind::Orphan] {
            let decision = decide(1, kind, Some(&packet), None, |_| false);
            assert_eq!(decision.learned, Some(learned(6, &[1, 2])));
            assert_eq!(decision.verdict, Verdict::Send { to: 2, walk: walk(6, 1, &[1], &[]) });
            let end = walk(6, 1, &[1], &[]);
            let unknown = Verdict::Drop(DropReason::UnknownBucket);
            assert_eq!(verdict(2, kind, Some(&end), None), unknown);
            assert_eq!(verdict(2, kind, Some(&end), Some(&learned(6, &[1, 2]))), unknown);
            let back = Walk { returned: true, ..walk(6, 2, &[1, 2], &[]) };
            assert_eq!(verdict(1, kind, Some(&back), Some(&learned(6, &[1, 2]))), unknown);
        }
        let decision =
            decide(1, Kind::Orphan, Some(&walk(7, 0, &[], &[2])), Some(&learned(6, &[1, 3])), |_| false);
        assert_eq!(decision.learned, Some(learned(7, &[1, 2, 3])));
    }

    #[test]
    fn what_does_not_fit_is_dropped_and_teaches_nothing() {
        let full: Vec<u8> = (10..18).collect();
        let decision =
            decide(1, Kind::Orphan, Some(&walk(6, 0, &[], &[2])), Some(&known(5, &full)), |_| false);
        assert_eq!(decision, Decision { verdict: Verdict::Drop(DropReason::ChainOverflow), learned: None });
        let decision =
            decide(1, Kind::Matched, Some(&walk(6, 0, &[], &[2])), Some(&known(5, &full)), |_| false);
        assert_eq!(decision, Decision { verdict: Verdict::Deliver, learned: None });
        let packet = walk(5, 0, &[], &[2]);
        assert_eq!(
            verdict(1, Kind::Orphan, Some(&packet), Some(&known(5, &full))),
            Verdict::Drop(DropReason::WalkOverflow)
        );
    }

    #[test]
    fn a_bucket_that_nobody_knows_is_dropped_never_reset() {
        for kind in [Kind::New, Kind::Orphan] {
            assert_eq!(verdict(1, kind, None, None), Verdict::Drop(DropReason::UnknownBucket));
        }
        let nobody = known(5, &[]);
        assert_eq!(verdict(1, Kind::New, None, Some(&nobody)), Verdict::Drop(DropReason::NoBackend));
    }
}
