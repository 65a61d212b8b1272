//! [`decide`], and what it would be with a rule switched off. A rule is switched off by lying to `decide` about
//! its inputs, or by overruling its output: the function itself has no switches.

use daisy_shared::chain::{Decision, Generation, Kind, Knowledge, Owners, Verdict, Walk, decide};
use daisy_shared::drop::DropReason;

use crate::state::Server;

/// A rule that is switched off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Off {
    /// The table comes first: an agent that is not the head does not look for a connection.
    MatchFirst,
    /// A packet's older word counts as much as newer knowledge.
    NewestWins,
    /// A walk that starts anew keeps the list of those visited.
    NobodyVisited,
    /// Agents forget what packets say.
    PacketsTeach,
    /// The walk ends with the owners that the packet lists.
    KnownOwnersToo,
    /// The head accepts at once.
    AskThePast,
    /// An agent accepts whatever is addressed to it as head.
    OnlyTheHead,
    /// A packet that was sent on this often is answered.
    SpentHopsDrop(u8),
    /// Nothing: a packet that was sent on this often is dropped. Shows that rule 7 is safe at any limit.
    NothingButFewHops(u8),
    /// A previous owner is spliced out by a timer, without its word.
    OwnWord,
    /// A drain report counts whatever generation it names (as if the controller forgot `lost_at`).
    ReportsHaveGenerations,
    /// A dead owner stays in the chain, and nobody skips it.
    DeadAreSpliced,
    /// Knowledge from packets alone is taken for complete.
    RootedInATable,
    /// A dead owner counts as one that has looked.
    SkippedIsNotVisited,
    /// A retransmitted SYN may be sent while an older one is in the network: not a rule but the assumption.
    OneSyn,
}

/// What a packet meets at an agent.
pub struct Facts<'a> {
    pub me: Server,
    /// Whether a local socket fits.
    pub matched: bool,
    /// Whether it is a SYN.
    pub syn: bool,
    pub walk: Option<&'a Walk<Server>>,
    pub knowledge: Option<&'a Knowledge<Server>>,
    /// Servers that this agent skips.
    pub skipped: u8,
}

impl Facts<'_> {
    fn unmatched(&self) -> Kind {
        if self.syn { Kind::New } else { Kind::Orphan }
    }

    fn kind(&self) -> Kind {
        if self.matched { Kind::Matched } else { self.unmatched() }
    }

    fn decide(
        &self,
        kind: Kind,
        walk: Option<&Walk<Server>>,
        known: Option<&Knowledge<Server>>,
    ) -> Decision<Server> {
        decide(self.me, kind, walk, known, |server| self.skipped & (1 << server) != 0)
    }

    /// The protocol's decision.
    fn plain(&self) -> Decision<Server> {
        self.decide(self.kind(), self.walk, self.knowledge)
    }

    /// Whether the agent knows a newer generation than the packet carries.
    fn knows_newer(&self) -> bool {
        match (self.knowledge, self.walk) {
            (Some(known), Some(walk)) => known.generation.is_newer_than(walk.generation),
            (known, _) => known.is_some(),
        }
    }
}

/// The decision, by the protocol or by what is left of it.
pub fn decide_without(off: Option<Off>, facts: &Facts<'_>) -> Decision<Server> {
    match off {
        Some(Off::MatchFirst) => {
            let plain = facts.plain();
            let head = plain.learned.as_ref().or(facts.knowledge).map(|known| known.chain[0]);
            if head == Some(facts.me) {
                plain
            } else {
                facts.decide(facts.unmatched(), facts.walk, facts.knowledge)
            }
        }
        Some(Off::NewestWins) if facts.knows_newer() => {
            let known = facts.knowledge.expect("it is newer");
            match facts.walk {
                Some(walk) => {
                    let known = Knowledge { generation: walk.generation, ..known.clone() };
                    facts.decide(facts.kind(), facts.walk, Some(&known))
                }
                None => {
                    let walk = empty_walk(known.generation);
                    facts.decide(facts.kind(), Some(&walk), facts.knowledge)
                }
            }
        }
        Some(Off::NobodyVisited) if facts.knows_newer() && facts.walk.is_some() => {
            let (known, walk) = (facts.knowledge.expect("it is newer"), facts.walk.expect("just checked"));
            let unvisited = |owner: &Server| *owner != facts.me && !walk.visited.contains(owner);
            let to_visit = known.chain.iter().copied().filter(unvisited).collect();
            let walk = Walk { generation: known.generation, to_visit, ..walk.clone() };
            facts.decide(facts.kind(), Some(&walk), facts.knowledge)
        }
        Some(Off::PacketsTeach) => Decision { learned: None, ..facts.plain() },
        Some(Off::KnownOwnersToo) if facts.walk.is_some() && !facts.knows_newer() => {
            let plain = facts.plain();
            let poor = facts.knowledge.filter(|_| plain.learned.is_none()).map(|known| Knowledge {
                chain: known.chain.iter().copied().take(1).collect(),
                ..known.clone()
            });
            let verdict = facts.decide(facts.kind(), facts.walk, poor.as_ref()).verdict;
            Decision { verdict, learned: plain.learned }
        }
        Some(Off::AskThePast) => {
            let plain = facts.plain();
            let head = plain.learned.as_ref().or(facts.knowledge).map(|known| known.chain[0]);
            if facts.kind() == Kind::New && head == Some(facts.me) {
                Decision { verdict: Verdict::Accept, learned: plain.learned }
            } else {
                plain
            }
        }
        Some(Off::OnlyTheHead) if facts.kind() == Kind::New && facts.knows_newer() => {
            let as_origin =
                facts.walk.is_none_or(|walk| walk.visited.first().is_none_or(|first| *first == facts.me));
            if !as_origin {
                return facts.plain();
            }
            let known = facts.knowledge.expect("it is newer");
            let walk = facts.walk.cloned().unwrap_or_else(|| empty_walk(known.generation));
            let others = known.chain.iter().copied().filter(|owner| *owner != facts.me);
            let chain = [facts.me].into_iter().chain(others).collect();
            let known = Knowledge { generation: walk.generation, chain, from_table: known.from_table };
            facts.decide(Kind::New, Some(&walk), Some(&known))
        }
        Some(Off::SpentHopsDrop(limit) | Off::NothingButFewHops(limit)) => {
            let mut decision = facts.plain();
            if matches!(&decision.verdict, Verdict::Send { walk, .. } if walk.hops > limit) {
                let answered = !facts.syn && matches!(off, Some(Off::SpentHopsDrop(_)));
                decision.verdict =
                    if answered { Verdict::Answer } else { Verdict::Drop(DropReason::HopsSpent) };
            }
            decision
        }
        Some(Off::RootedInATable) => {
            // The decision is made as if a table without any owner had been there.
            let trusting = facts.knowledge.cloned().or_else(|| {
                let generation = Generation(facts.walk?.generation.0.wrapping_sub(1));
                Some(Knowledge { generation, chain: Owners::new(), from_table: true })
            });
            let trusting = trusting.map(|known| Knowledge { from_table: true, ..known });
            facts.decide(facts.kind(), facts.walk, trusting.as_ref())
        }
        Some(Off::SkippedIsNotVisited) => {
            let alive = |owner: &Server| facts.skipped & (1 << owner) == 0;
            let mut decision = facts.plain();
            if let Verdict::Drop(DropReason::DeadOwner) = decision.verdict {
                let known = decision.learned.as_ref().or(facts.knowledge).expect("it lists the dead");
                let others =
                    known.chain.iter().copied().filter(|owner| *owner != facts.me && alive(owner)).collect();
                let walk = Walk { visited: others, ..empty_walk(known.generation) };
                let known =
                    Knowledge { chain: known.chain.iter().copied().filter(alive).collect(), ..known.clone() };
                decision.verdict = facts.decide(facts.kind(), Some(&walk), Some(&known)).verdict;
            }
            decision
        }
        _ => facts.plain(),
    }
}

fn empty_walk(generation: Generation) -> Walk<Server> {
    Walk { generation, hops: 0, returned: false, visited: Owners::new(), to_visit: Owners::new() }
}
