//! The protocol holds in every state within the bounds.

use std::time::Instant;

use daisy_shared::drop::DropReason;
use stateright::{Checker, HasDiscoveries, Model};

use crate::measure::Measures;
use crate::rules::Off;
use crate::state::Content;
use crate::world::{Bounds, Start};
use crate::{SMALL, world};

/// Explores everything within the bounds, and fails with the shortest way to a state that breaks a property.
fn holds(name: &str, bounds: Bounds) -> std::sync::Arc<Measures> {
    let (model, measures) = world(&bounds);
    let start = Instant::now();
    let checker = model.checker().threads(2).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let ((data, syn), (frozen, frozen_syn), (settled, settled_syn)) =
        (measures.moving(), measures.frozen(), measures.settled());
    println!(
        "{name}: {} states, {} steps, longest way {}, {:.1} s\n  most hops of data and of a SYN: {settled} and \
         {settled_syn} with settled tables, {frozen} and {frozen_syn} with any that stand still, {data} and {syn} \
         while they change\n  {} resets for no connection, drops (content, live): {:?}",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth(),
        start.elapsed().as_secs_f32(),
        measures.answers(),
        measures.drops(),
    );
    checker.assert_properties();
    // A SYN may run out of hops while tables change under it at every hop; it is sent again. Nothing overflows, and
    // no walk contradicts itself.
    for (content, live, reason) in measures.drops().into_keys() {
        let explained = match reason {
            DropReason::HopsSpent => !live,
            DropReason::UnknownBucket | DropReason::NoBackend => bounds.blank || bounds.reboots > 0,
            DropReason::DeadOwner => bounds.crash,
            _ => false,
        };
        assert!(explained, "{content:?} (live: {live}) was dropped: {reason}");
    }
    measures
}

#[test]
fn three_moves_one_packet() {
    let bounds = Bounds { moves: 3, strays: true, closes: true, restarts: true, ..SMALL };
    let measures = holds("three moves, one packet", bounds);
    assert_eq!(measures.settled(), (3, 4));
    assert_eq!(measures.frozen(), (4, 8));
}

#[test]
fn two_moves_two_packets() {
    let bounds = Bounds { packets: 2, closes: true, restarts: true, ..SMALL };
    let measures = holds("two moves, two packets", bounds);
    assert_eq!(measures.frozen().0, 3);
    assert!(!measures.drops().keys().any(|(content, ..)| *content == Content::Data));
}

#[test]
fn three_moves_two_packets() {
    holds("three moves, two packets", Bounds { moves: 3, packets: 2, ..SMALL });
}

#[test]
fn a_crash() {
    holds("three moves, a crash", Bounds { moves: 3, crash: true, ..SMALL });
}

#[test]
fn a_crash_and_a_return() {
    holds(
        "two moves, a crash and a return",
        Bounds { crash: true, revival: true, closes: true, restarts: true, ..SMALL },
    );
}

#[test]
fn agents_that_were_never_told() {
    let bounds = Bounds { blank: true, crash: true, closes: true, strays: true, ..SMALL };
    holds("two moves, a crash, agents without tables", bounds);
}

#[test]
fn a_reboot() {
    let bounds = Bounds { reboots: 1, closes: true, strays: true, ..SMALL };
    holds("two moves, a reboot", bounds.clone());
    let bounds = Bounds { start: Start::NewestOrNone, ..bounds };
    holds("two moves, a reboot, and only buckets that name the agent", bounds);
}

/// In all other tests a SYN is gone from the network before it is sent again. It need not be.
#[test]
fn two_syns_in_the_network() {
    holds("two moves, two SYNs", Bounds { packets: 2, off: Some(Off::OneSyn), ..SMALL });
}

/// Rule 10 says that nothing waits. That the order of publication does not matter is shown by all other tests, in
/// which tables reach agents and muxes in free order. This one shows that nothing waits for a node that does not
/// answer: one agent hears nothing and is never heard, and still moves are made, connections accepted, and the
/// other owners leave.
#[test]
fn a_deaf_agent_holds_up_nobody() {
    for deaf in [0, 1] {
        holds(&format!("server {deaf} hears nothing"), Bounds { deaf: Some(deaf), moves: 3, ..SMALL });
    }
}

#[test]
#[ignore = "takes 20 minutes and more: run it when the protocol changes, with --ignored"]
fn larger_bounds() {
    holds("four servers, three moves", Bounds { servers: 4, moves: 3, ..SMALL });
    holds("four moves", Bounds { moves: 4, ..SMALL });
    holds("two moves, two packets and strays", Bounds { packets: 2, closes: true, strays: true, ..SMALL });
    let all = Bounds {
        blank: true,
        crash: true,
        revival: true,
        strays: true,
        closes: true,
        restarts: true,
        ..SMALL
    };
    holds("two moves, everything but a reboot", all);
    holds("two moves, a crash and two packets", Bounds { packets: 2, crash: true, closes: true, ..SMALL });
    holds("two moves, two reboots", Bounds { reboots: 2, blank: true, strays: true, closes: true, ..SMALL });
    holds("three moves, a crash and a return", Bounds { moves: 3, crash: true, revival: true, ..SMALL });
    holds("three moves, two SYNs", Bounds { moves: 3, packets: 2, off: Some(Off::OneSyn), ..SMALL });
}
