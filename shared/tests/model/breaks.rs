//! Every rule is needed: without it there is a way to break a promise, and the checker finds the shortest.

use std::collections::BTreeSet;

use stateright::{Checker, HasDiscoveries, Model};

use crate::properties::{
    ACCEPTED_ONCE, FROZEN_ARRIVES, NO_DROP, NO_RESET, RIGHT_SERVER, SETTLED_ARRIVES, ZERO_STAYS_ZERO,
};
use crate::rules::Off;
use crate::world::{Bounds, Start};
use crate::{SMALL, world};

/// Looks for the shortest way to break a promise, and prints it.
fn breaks(name: &str, promise: &'static str, bounds: Bounds) {
    let path = (2..40).find_map(|depth| {
        let (model, _) = world(&bounds);
        let found = HasDiscoveries::AllOf(BTreeSet::from([promise]));
        // The checker may go on a little and find a longer way; so it must not look further than needed.
        model.checker().target_max_depth(depth).finish_when(found).spawn_bfs().join().discovery(promise)
    });
    let path = path.unwrap_or_else(|| panic!("{name}: the promise holds: {promise}"));
    let steps = path.into_vec();
    println!("{name}, {} steps break: {promise}", steps.len() - 1);
    for (state, action) in steps {
        match action {
            Some(action) => println!("  {action:?}"),
            None => println!("  → {state:?}"),
        }
    }
}

fn without(off: Off) -> Bounds {
    Bounds { off: Some(off), ..SMALL }
}

#[test]
fn rule_1_match_first() {
    breaks("tables before sockets", NO_RESET, without(Off::MatchFirst));
}

#[test]
fn rule_2_newest_knowledge_wins() {
    breaks("an older word counts", NO_RESET, without(Off::NewestWins));
}

#[test]
fn rule_2_nobody_visited() {
    breaks("the list of those visited is kept", NO_RESET, without(Off::NobodyVisited));
}

#[test]
fn rule_3_packets_teach() {
    breaks("packets do not teach", NO_RESET, without(Off::PacketsTeach));
}

#[test]
fn rule_4_those_that_only_the_agent_knows() {
    breaks("only the packet's owners are visited", NO_RESET, without(Off::KnownOwnersToo));
}

#[test]
fn rule_5_ask_the_past() {
    breaks("the head accepts at once", ACCEPTED_ONCE, without(Off::AskThePast));
    breaks("the head accepts at once", RIGHT_SERVER, without(Off::AskThePast));
}

#[test]
fn rule_6_only_the_head_accepts() {
    breaks("whoever is addressed as head accepts", ZERO_STAYS_ZERO, without(Off::OnlyTheHead));
}

#[test]
fn rule_7_spent_hops_drop() {
    breaks("after two hops a packet is answered", NO_RESET, without(Off::SpentHopsDrop(2)));
    // Dropping costs an arrival, but never a reset.
    breaks("after two hops a packet is dropped", NO_DROP, without(Off::NothingButFewHops(2)));
    let (model, _) = world(&without(Off::NothingButFewHops(2)));
    let checker = model.checker().finish_when(HasDiscoveries::AllFailures).spawn_bfs().join();
    for promise in [NO_RESET, RIGHT_SERVER, ACCEPTED_ONCE, ZERO_STAYS_ZERO] {
        checker.assert_no_discovery(promise);
    }
}

#[test]
fn rule_7_certainty_from_a_table() {
    let bounds = Bounds { blank: true, ..without(Off::RootedInATable) };
    breaks("who knows from packets alone answers", NO_RESET, bounds);
}

#[test]
fn rule_7_certainty_without_the_dead() {
    let bounds = Bounds { crash: true, ..without(Off::SkippedIsNotVisited) };
    breaks("a dead owner counts as one that has looked", NO_RESET, bounds);
}

#[test]
fn rule_8_own_word() {
    breaks("a timer splices", NO_RESET, without(Off::OwnWord));
}

#[test]
fn rule_8_reports_have_generations() {
    breaks("a report counts whenever it was made", ZERO_STAYS_ZERO, without(Off::ReportsHaveGenerations));
}

#[test]
fn rule_9_the_dead_are_spliced_and_skipped() {
    let bounds = Bounds { crash: true, ..without(Off::DeadAreSpliced) };
    breaks("the dead stay in the chain", SETTLED_ARRIVES, bounds);
}

#[test]
fn a_reboot_must_not_forget() {
    let reboot = |start| Bounds { reboots: 1, start, ..SMALL };
    breaks("a rebooted agent trusts its disk", NO_RESET, reboot(Start::Disk));
    breaks("a rebooted agent takes its disk for a hint", NO_RESET, reboot(Start::DiskAsHint));
    breaks("a rebooted agent gets only buckets that name it", NO_RESET, reboot(Start::NewestOrBlank));
    breaks("a rebooted agent gets only buckets that name it", FROZEN_ARRIVES, reboot(Start::NewestOrBlank));
}
