//! Publication under random changes: whoever syncs knows what concerns them, and muxes come after agents.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::collections::BTreeMap;

use common::{Step, command, start, steps};
use daisy_controller::core::{self, Context};
use daisy_controller::model::State;
use daisy_controller::publish::{AGENTS_FIRST_MS, Publisher};
use daisy_shared::bucket::{BackendId, BucketWord, Chain, Entry, Piece};
use daisy_shared::chain::Generation;
use daisy_shared::control::TableUpdate;
use daisy_shared::service::ServiceId;
use proptest::prelude::*;

/// A node that applies what it is told.
#[derive(Default)]
struct Node {
    applied: BTreeMap<ServiceId, Generation>,
    tables: BTreeMap<ServiceId, BTreeMap<u32, Entry>>,
}

impl Node {
    fn apply(&mut self, update: TableUpdate) {
        let TableUpdate { service, piece } = update;
        let piece = Piece::decode(&piece.encode()).expect("a well-formed piece");
        let table = self.tables.entry(service.id).or_default();
        match piece.from {
            None => table.clear(),
            Some(from) => assert_eq!(self.applied.get(&service.id), Some(&from), "a delta from elsewhere"),
        }
        table.extend(piece.entries.into_iter().map(|entry| (entry.bucket, entry)));
        self.applied.insert(service.id, piece.generation);
    }

    fn forget(&mut self, keeps: impl Fn(ServiceId) -> bool) {
        self.applied.retain(|id, _| keeps(*id));
        self.tables.retain(|id, _| keeps(*id));
    }
}

struct World {
    state: State,
    publisher: Publisher,
    now_ms: u64,
    agents: BTreeMap<BackendId, Node>,
    mux: Node,
}

impl World {
    fn new() -> World {
        let state = start();
        let publisher = Publisher::new(&state);
        World { state, publisher, now_ms: 0, agents: BTreeMap::new(), mux: Node::default() }
    }

    fn change(&mut self, step: &Step) {
        let context = Context { now_unix_ms: 1, heard: &|_| true };
        let Some(command) = command(&self.state, step) else { return };
        let Ok((change, _)) = core::decide(&self.state, command, &context) else { return };
        // The agents that this world lets sync are those that are heard of.
        let agents = &self.agents;
        self.publisher.record(&self.state, &change, |id| agents.contains_key(&id), self.now_ms);
        self.state.apply(&change);
        self.publisher.release(self.now_ms);
    }

    fn sync_agent(&mut self, id: BackendId) {
        let node = self.agents.entry(id).or_default();
        self.publisher.acknowledge(id, &node.applied, u64::MAX);
        self.publisher.release(self.now_ms);
        let serves = |service: ServiceId| {
            let service = self.state.services.get(&service);
            service.is_some_and(|service| service.record.members.contains_key(&id))
        };
        node.forget(serves);
        for (service, _) in self.state.services.iter().filter(|(service, _)| serves(**service)) {
            let applied = node.applied.get(service).copied();
            if let Some(update) = self.publisher.for_agent(&self.state, *service, id, applied, false) {
                node.apply(update);
            }
        }
        for (service, table) in &self.state.services {
            for (number, bucket) in table.buckets.iter().enumerate() {
                if bucket.position(id).is_some() {
                    let knows = &node.tables[service][&(number as u32)];
                    assert_eq!((knows.generation, &knows.chain), (bucket.generation, &bucket.chain()));
                }
            }
        }
    }

    fn sync_mux(&mut self) {
        self.mux.forget(|id| self.state.services.contains_key(&id));
        for id in self.state.services.keys() {
            let applied = self.mux.applied.get(id).copied();
            if let Some(update) = self.publisher.for_mux(&self.state, *id, "m", applied) {
                assert!(update.piece.entries.iter().all(|entry| entry.chain.len() <= 2));
                self.mux.apply(update);
            }
            assert_eq!(self.mux.applied.get(id), self.publisher.released(*id).as_ref());
        }
    }

    /// Whether the mux has everything.
    fn check_mux_is_current(&self) {
        for (id, service) in &self.state.services {
            assert_eq!(self.mux.applied[id], service.record.generation);
            for (number, bucket) in service.buckets.iter().enumerate() {
                let empty = Entry { bucket: 0, generation: Generation(0), chain: Chain::new() };
                let entry = self.mux.tables[id].get(&(number as u32)).unwrap_or(&empty);
                assert_eq!(BucketWord::from(entry), bucket.word(), "bucket {number}");
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Happening {
    Change(Step),
    Agent(u16),
    Mux,
    TimePasses(u64),
}

fn happenings() -> impl Strategy<Value = Happening> {
    prop_oneof![
        4 => steps().prop_map(Happening::Change),
        4 => (0u16..10).prop_map(Happening::Agent),
        2 => Just(Happening::Mux),
        1 => (0u64..300).prop_map(Happening::TimePasses),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn whoever_syncs_knows_what_concerns_them(script in proptest::collection::vec(happenings(), 1..80)) {
        let mut world = World::new();
        for happening in script {
            match happening {
                Happening::Change(step) => world.change(&step),
                Happening::Agent(id) => world.sync_agent(BackendId(id)),
                Happening::Mux => world.sync_mux(),
                Happening::TimePasses(ms) => {
                    world.now_ms += ms;
                    world.publisher.release(world.now_ms);
                }
            }
        }
        world.now_ms += AGENTS_FIRST_MS;
        world.publisher.release(world.now_ms);
        prop_assert_eq!(world.publisher.next_release_ms(), None);
        world.sync_mux();
        world.check_mux_is_current();
    }
}

fn put(backend: u8) -> Step {
    Step::Put { service: 0, backend, weight: None }
}

#[test]
fn muxes_wait_for_the_agents_concerned_but_not_for_ever() {
    let mut world = World::new();
    world.change(&put(0));
    world.change(&put(1));
    (0..2).for_each(|id| world.sync_agent(BackendId(id)));
    world.sync_mux();
    world.check_mux_is_current();
    let id = *world.state.services.keys().next().unwrap();
    let released = |world: &World| world.publisher.released(id).unwrap();
    let generation = released(&world);

    world.change(&put(2));
    assert_eq!(released(&world), generation, "both agents are concerned");
    world.sync_agent(BackendId(0));
    world.sync_agent(BackendId(0));
    assert_eq!(released(&world), generation, "one has acknowledged");
    world.sync_agent(BackendId(1));
    world.sync_agent(BackendId(1));
    assert_eq!(released(&world), generation.next(), "both have");

    world.change(&put(3));
    world.now_ms += AGENTS_FIRST_MS - 1;
    assert!(!world.publisher.release(world.now_ms));
    assert_eq!(world.publisher.next_release_ms(), Some(world.now_ms + 1));
    assert!(world.publisher.release(world.now_ms + 1), "long enough");
    assert_eq!(released(&world), generation.next().next());
}

#[test]
fn a_new_mux_gets_no_table_before_the_agents_know_of_it() {
    let mut world = World::new();
    world.change(&put(0));
    world.sync_agent(BackendId(0));
    world.change(&Step::Mux { number: 0, present: true });
    let id = *world.state.services.keys().next().unwrap();
    assert!(world.publisher.for_mux(&world.state, id, "m0", None).is_none());
    assert!(world.publisher.for_mux(&world.state, id, "m9", None).is_some());
    world.publisher.acknowledge(BackendId(0), &BTreeMap::new(), world.state.meta.directory - 1);
    assert!(!world.publisher.release(0));
    world.publisher.acknowledge(BackendId(0), &BTreeMap::new(), world.state.meta.directory);
    assert!(world.publisher.release(0));
    assert!(world.publisher.for_mux(&world.state, id, "m0", None).is_some());
}
