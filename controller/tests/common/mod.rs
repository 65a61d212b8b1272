//! What several suites need: random commands, services, and the world's rules for both.
#![allow(dead_code, reason = "each suite uses its part")]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use daisy_controller::core::Command;
use daisy_controller::model::{Health, State};
use daisy_shared::bucket::BackendId;
use daisy_shared::chain::Generation;
use daisy_shared::control::DrainReport;
use daisy_shared::flow::HashKey;
use daisy_shared::service::{Encapsulation, Protocol, Service, ServiceId};
use proptest::prelude::*;

pub mod daemon;

/// Backends are named `b0` … by this number, and have an address by it.
pub fn address(number: u8) -> IpAddr {
    Ipv4Addr::new(10, 0, 0, 10 + number).into()
}

/// A service with 16 buckets, or more.
pub fn service(number: u8, buckets: u32) -> Service {
    Service {
        id: ServiceId(1000 + u32::from(number)),
        name: format!("s{number}"),
        vip: Ipv4Addr::new(203, 0, 113, number).into(),
        protocol: Protocol::Tcp,
        port: 80,
        buckets,
        hash_key: HashKey([number; 16]),
        encapsulation: Encapsulation::Gue,
    }
}

/// A command before it is known what state it meets.
#[derive(Clone, Debug)]
pub enum Step {
    Put {
        service: u8,
        backend: u8,
        weight: Option<u32>,
    },
    Patch {
        service: u8,
        backend: u8,
        weight: Option<u32>,
        drain: Option<bool>,
    },
    Remove {
        service: u8,
        backend: u8,
        force: bool,
    },
    /// A backend reports some buckets with knowledge that is `behind` generations old.
    Report {
        service: u8,
        backend: u8,
        buckets: u64,
        behind: u32,
    },
    Health {
        backend: u8,
        health: Health,
    },
    Rebase {
        service: u8,
        ahead: u32,
    },
    Mux {
        number: u8,
        present: bool,
    },
    Service {
        number: u8,
        present: bool,
    },
}

pub const BACKENDS: u8 = 9;
pub const SERVICES: u8 = 2;

pub fn steps() -> impl Strategy<Value = Step> {
    let weight = || proptest::option::of(prop_oneof![Just(0u32), 1u32..5, Just(100)]);
    let health = prop_oneof![4 => Just(Health::Live), 1 => Just(Health::Suspect), 1 => Just(Health::Dead)];
    let (s, b) = (0..SERVICES, 0..BACKENDS);
    prop_oneof![
        8 => (s.clone(), b.clone(), weight())
            .prop_map(|(service, backend, weight)| Step::Put { service, backend, weight }),
        6 => (s.clone(), b.clone(), weight(), any::<Option<bool>>())
            .prop_map(|(service, backend, weight, drain)| Step::Patch { service, backend, weight, drain }),
        3 => (s.clone(), b.clone(), prop::bool::weighted(0.3))
            .prop_map(|(service, backend, force)| Step::Remove { service, backend, force }),
        8 => (s.clone(), b.clone(), any::<u64>(), 0u32..3)
            .prop_map(|(service, backend, buckets, behind)| Step::Report { service, backend, buckets, behind }),
        4 => (b, health).prop_map(|(backend, health)| Step::Health { backend, health }),
        1 => (s.clone(), 0u32..3).prop_map(|(service, ahead)| Step::Rebase { service, ahead }),
        1 => (0u8..3, any::<bool>()).prop_map(|(number, present)| Step::Mux { number, present }),
        1 => (s, prop::bool::weighted(0.8)).prop_map(|(number, present)| Step::Service { number, present }),
    ]
}

/// The command that the step is in this state; `None` if it makes no sense.
pub fn command(state: &State, step: &Step) -> Option<Command> {
    let backend_id = |number: u8| state.backend(&format!("b{number}")).map(|(id, _)| id);
    let (service_name, name) = (|s: u8| format!("s{s}"), |b: u8| format!("b{b}"));
    Some(match step.clone() {
        Step::Put { service, backend, weight } => Command::PutBackend {
            service: service_name(service),
            name: name(backend),
            address: address(backend),
            weight,
        },
        Step::Patch { service, backend, weight, drain } => {
            Command::PatchBackend { service: service_name(service), name: name(backend), weight, drain }
        }
        Step::Remove { service, backend, force } => {
            Command::RemoveBackend { service: service_name(service), name: name(backend), force }
        }
        Step::Report { service, backend, buckets, behind } => {
            let table = state.service(&service_name(service))?;
            let known = Generation(table.record.generation.0.wrapping_sub(behind));
            let chosen = (0..table.record.service.buckets).filter(|n| buckets >> (n % 64) & 1 == 1);
            let report = DrainReport { service: table.id(), buckets: chosen.map(|n| (n, known)).collect() };
            Command::Reports(vec![(backend_id(backend)?, report)])
        }
        Step::Health { backend, health } => Command::Health(vec![(backend_id(backend)?, health)]),
        Step::Rebase { service, ahead } => {
            let table = state.service(&service_name(service))?;
            let newer = Generation(table.record.generation.0.wrapping_add(ahead));
            let directory = state.meta.directory + u64::from(ahead / 2);
            Command::Rebase { node: "m0".into(), applied: BTreeMap::from([(table.id(), newer)]), directory }
        }
        Step::Mux { number, present: true } => {
            Command::AddMux { name: format!("m{number}"), address: address(100 + number) }
        }
        Step::Mux { number, present: false } => Command::RemoveMux { name: format!("m{number}") },
        Step::Service { number, present: true } => Command::AddService(service(number, 16)),
        Step::Service { number, present: false } => Command::RemoveService { service: service_name(number) },
    })
}

/// A state with both services, of 16 buckets each, and generations that are about to wrap around.
pub fn start() -> State {
    let mut state = State::default();
    let context = daisy_controller::core::Context { now_unix_ms: 0, heard: &|_| false };
    for number in 0..SERVICES {
        let add = Command::AddService(service(number, 16));
        let (change, _) = daisy_controller::core::decide(&state, add, &context).unwrap();
        state.apply(&change);
    }
    for service in state.services.values_mut() {
        service.record.generation = Generation(u32::MAX - 20);
    }
    for service in state.services.values_mut() {
        service.buckets.iter_mut().for_each(|bucket| bucket.generation = service.record.generation);
    }
    state
}

/// The number of a backend, from its name.
pub fn number_of(state: &State, id: BackendId) -> Option<u8> {
    state.name(id).strip_prefix('b')?.parse().ok()
}
