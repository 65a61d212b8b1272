//! Chain bookkeeping under random sequences of commands.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{Step, command, start, steps};
use daisy_controller::core::{self, Command, Context};
use daisy_controller::model::{Bucket, Health, ServiceState, State};
use daisy_controller::planner::{self, Candidate, Chains};
use daisy_controller::publish;
use daisy_shared::bucket::BackendId;
use daisy_shared::chain::{Generation, MAX_CHAIN};
use daisy_shared::service::ServiceId;
use proptest::prelude::*;

/// What an onlooker knows who writes down when each owner of each bucket was last seen as its head.
type LastHead = BTreeMap<(ServiceId, u32, BackendId), Generation>;

fn candidates(state: &State, service: &ServiceState) -> Vec<Candidate> {
    let members = service.record.members.iter();
    members
        .filter(|(id, m)| !m.draining && m.weight > 0 && state.health(**id) == Health::Live)
        .map(|(id, m)| Candidate { id: *id, weight: m.weight })
        .collect()
}

/// What must hold of every state.
fn check_state(state: &State) {
    let mut names = BTreeSet::new();
    for backend in state.backends.values().filter(|backend| backend.retired_at_ms.is_none()) {
        assert!(names.insert(&backend.name));
    }
    for service in state.services.values() {
        for (number, bucket) in service.buckets.iter().enumerate() {
            let owners: BTreeSet<_> = bucket.links.iter().map(|link| link.owner).collect();
            assert_eq!(owners.len(), bucket.links.len(), "bucket {number} names somebody twice");
            assert!(owners.len() <= MAX_CHAIN);
            assert!(!bucket.generation.is_newer_than(service.record.generation));
            for link in &bucket.links {
                assert!(service.record.members.contains_key(&link.owner), "no member owns bucket {number}");
                assert!(!link.since.is_newer_than(bucket.generation));
            }
            let dead = |link: &daisy_controller::model::Link| state.health(link.owner) == Health::Dead;
            assert!(!bucket.links.iter().any(dead) || bucket.links.iter().all(dead), "dead among the living");
        }
        assert_eq!(*service, ServiceState::new(service.record.clone(), service.buckets.clone()));
        let recount = ServiceState::new(service.record.clone(), service.buckets.clone()).figures;
        assert_eq!(recount.depth, service.figures.depth);
        let standings = |figures: &daisy_controller::model::Figures| figures.standings().collect::<Vec<_>>();
        assert_eq!(standings(&recount), standings(&service.figures));
        let candidates = candidates(state, service);
        assert_eq!(planner::plan(Chains::new(&service.buckets, &[]), &candidates), [], "off target");
        if !candidates.is_empty() {
            assert!(service.buckets.iter().all(|bucket| bucket.head().is_some()), "nobody owns a bucket");
        }
    }
}

/// What must hold between two states with one command between them.
fn check_step(before: &State, after: &State, did: &Command, last_head: &LastHead) {
    let directory = |state: &State| (publish::directory(state).backends, publish::directory(state).muxes);
    if directory(before) != directory(after) {
        assert!(after.meta.directory > before.meta.directory, "another directory of the same version");
    }
    for (id, old) in &before.services {
        let Some(new) = after.services.get(id) else { continue };
        let (was, is) = (old.record.generation, new.record.generation);
        assert!(is == was || is.is_newer_than(was));
        assert_eq!(is != was, old.buckets != new.buckets, "a generation for nothing, or none for something");
        for (number, (old, new)) in old.buckets.iter().zip(&new.buckets).enumerate() {
            assert!(old == new || new.generation == is, "a changed bucket has the change's generation");
            check_leavers(after, *id, number as u32, old, new, did, last_head);
        }
    }
}

/// Nobody leaves a chain but by their own word, given in time, or dead, or forced.
fn check_leavers(
    after: &State,
    id: ServiceId,
    number: u32,
    old: &Bucket,
    new: &Bucket,
    did: &Command,
    last_head: &LastHead,
) {
    for link in old.links.iter().filter(|link| new.position(link.owner).is_none()) {
        let owner = link.owner;
        let by_word = match did {
            Command::Reports(reports) => reports.iter().any(|(reporter, report)| {
                let in_time = |known: Generation| {
                    last_head.get(&(id, number, owner)).is_none_or(|last| known.is_newer_than(*last))
                };
                let named = report.buckets.iter().any(|(n, known)| *n == number && in_time(*known));
                *reporter == owner && report.service == id && named && old.head() != Some(owner)
            }),
            _ => false,
        };
        let forced =
            matches!(did, Command::RemoveBackend { force: true, name, .. } if *name == after.name(owner));
        let dead = after.health(owner) == Health::Dead;
        assert!(by_word || forced || dead, "{owner} left bucket {number} of {id} by {did:?}");
    }
}

fn note_heads(state: &State, last_head: &mut LastHead) {
    for (id, service) in &state.services {
        for (number, bucket) in service.buckets.iter().enumerate() {
            if let Some(head) = bucket.head() {
                last_head.insert((*id, number as u32, head), service.record.generation);
            }
        }
    }
}

fn run(script: &[Step]) -> State {
    let (mut state, mut last_head, mut now) = (start(), LastHead::new(), 1);
    for step in script {
        now += 1_000_000;
        let context = Context { now_unix_ms: now, heard: &|name| name < "b3" };
        let Some(command) = command(&state, step) else { continue };
        let Ok((change, answer)) = core::decide(&state, command.clone(), &context) else { continue };
        assert_eq!(core::decide(&state, command.clone(), &context).unwrap().0, change, "decided differently");
        assert_eq!(answer.changed, !change.is_empty());
        let before = state.clone();
        state.apply(&change);
        if !answer.changed {
            assert_eq!(before, state);
        }
        check_state(&state);
        if matches!(command, Command::Rebase { .. }) {
            // Everything counts as if it had happened now.
            last_head.clear();
        }
        check_step(&before, &state, &command, &last_head);
        note_heads(&state, &mut last_head);
    }
    state
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn chains_hold_under_any_sequence_of_commands(script in proptest::collection::vec(steps(), 1..80)) {
        run(&script);
    }
}

fn put(backend: u8) -> Step {
    Step::Put { service: 0, backend, weight: None }
}

fn report_all(backend: u8, behind: u32) -> Step {
    Step::Report { service: 0, backend, buckets: u64::MAX, behind }
}

fn standing(state: &State, backend: u8) -> (u32, u32) {
    let (id, _) = state.backend(&format!("b{backend}")).unwrap();
    let standing = state.service("s0").unwrap().figures.standing(id);
    (standing.head, standing.past)
}

#[test]
fn a_drained_backend_leaves_by_its_own_word_only() {
    let remove = Step::Remove { service: 0, backend: 1, force: false };
    let mut script = vec![put(0), put(1), report_all(0, 0), remove];
    assert_eq!(standing(&run(&script), 1), (0, 8));
    script.push(report_all(1, 1));
    assert_eq!(standing(&run(&script), 1), (0, 8), "its knowledge was from before the move");
    script.push(report_all(0, 0));
    assert_eq!(standing(&run(&script), 1), (0, 8), "another's word does not count");
    script.push(report_all(1, 0));
    let state = run(&script);
    assert!(state.backend("b1").is_none(), "it has left");
    assert_eq!(state.service("s0").unwrap().figures.open_windows(), 0);
}

#[test]
fn a_full_chain_makes_a_drain_wait_until_it_shrinks() {
    let drain = |backend| Step::Patch { service: 0, backend, weight: None, drain: Some(true) };
    let mut script = vec![put(0)];
    for backend in 1..7 {
        script.extend([put(backend), Step::Health { backend, health: Health::Live }, drain(backend - 1)]);
    }
    let state = run(&script);
    assert_eq!(state.service("s0").unwrap().figures.deepest_chain(), MAX_CHAIN);
    let waiting = standing(&state, 5).0;
    assert!(waiting > 0, "full chains keep their head");
    script.push(report_all(0, 0));
    assert_eq!(standing(&run(&script), 5).0, 0, "as soon as there is room they move on");
}

#[test]
fn the_dead_leave_at_once_and_the_suspect_keep_their_place() {
    let script = [put(0), put(1), Step::Health { backend: 1, health: Health::Suspect }];
    assert_eq!(standing(&run(&script), 1), (0, 8));
    let script = [put(0), put(1), Step::Health { backend: 1, health: Health::Dead }];
    assert_eq!(standing(&run(&script), 1), (0, 0));
    let script = [put(0), Step::Health { backend: 0, health: Health::Dead }];
    assert_eq!(standing(&run(&script), 0), (16, 0), "a table is never emptied because of leases");
    let script = [put(0), put(1)]
        .into_iter()
        .chain([0, 1].map(|backend| Step::Health { backend, health: Health::Suspect }));
    let state = run(&script.collect::<Vec<_>>());
    assert_eq!((standing(&state, 0).0, standing(&state, 1).0), (0, 16), "nobody is left to take them");
}

#[test]
fn who_has_not_been_heard_of_waits_where_others_serve() {
    // `run` says that b0 to b2 have been heard of.
    let state = run(&[put(0), put(5)]);
    assert_eq!((standing(&state, 5), state.backend("b5").unwrap().1.health), ((0, 0), Health::Joining));
    let state = run(&[put(0), put(5), Step::Health { backend: 5, health: Health::Live }]);
    assert_eq!(standing(&state, 5), (8, 0));
    assert_eq!(standing(&run(&[put(5), put(6)]), 6), (8, 0), "nobody serves yet");
}

#[test]
fn the_number_of_a_backend_that_left_stays_its_own_for_a_while() {
    let remove = Step::Remove { service: 0, backend: 1, force: true };
    let state = run(&[put(0), put(1), remove.clone(), put(2)]);
    let gone = state.backends.values().find(|backend| backend.name == "b1").unwrap();
    assert!(gone.retired_at_ms.is_some());
    assert_eq!(state.backend("b2").unwrap().0, BackendId(2));
    assert!(publish::directory(&state).backends.iter().any(|entry| entry.name == "b1" && entry.dead));
    // The same backend back again is the same number; and alive.
    let state = run(&[put(0), put(1), remove, put(1)]);
    assert_eq!(state.backend("b1").unwrap().0, BackendId(1));
    assert!(publish::directory(&state).backends.iter().all(|entry| !entry.dead));
}
