//! What the API shows. `daisyctl` reads the same types.

use std::collections::BTreeMap;
use std::net::IpAddr;

use daisy_shared::bucket::BackendId;
use daisy_shared::chain::Generation;
use daisy_shared::control::NodeKind;
use daisy_shared::service::{Encapsulation, Protocol, ServiceId};
use serde::{Deserialize, Serialize};

use crate::hub::{Live, Node, Tables};
use crate::model::{Health, Member, ServiceState, Standing, State};
use crate::planner::{self, Candidate};

/// A service.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServiceView {
    /// Its name.
    pub name: String,
    /// Its number.
    pub id: ServiceId,
    /// The address that clients connect to.
    pub vip: IpAddr,
    /// The port that clients connect to.
    pub port: u16,
    /// The transport protocol.
    pub protocol: Protocol,
    /// How its packets travel in closed windows.
    #[serde(default)]
    pub encapsulation: Encapsulation,
    /// How many buckets it has.
    pub buckets: u32,
    /// The generation of its newest change.
    pub generation: Generation,
    /// How many of its buckets have a previous owner.
    pub open_windows: u32,
    /// The length of the longest chain.
    pub deepest_chain: usize,
    /// Its backends.
    pub backends: Vec<BackendView>,
}

/// A backend's part in a service.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BackendView {
    /// The service.
    pub service: String,
    /// Its name.
    pub name: String,
    /// Its number in tables.
    pub id: BackendId,
    /// Its address.
    pub address: IpAddr,
    /// Its weight.
    pub weight: u32,
    /// active, draining, drained, joining, suspect or down.
    pub state: String,
    /// Buckets whose head it is.
    pub head_buckets: u32,
    /// Buckets in which it is a previous owner.
    pub past_buckets: u32,
    /// Buckets whose head it should be.
    pub target_buckets: u32,
}

/// A mux or an agent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeView {
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: NodeKind,
    /// Its address.
    pub address: IpAddr,
    /// Its software; empty if it was not heard of since the controller started.
    pub version: String,
    /// live or expired.
    pub lease: String,
    /// The directory that it has applied.
    pub directory: u64,
    /// The tables that it has applied.
    pub applied: BTreeMap<ServiceId, Generation>,
    /// Whether it lacks something.
    pub behind: bool,
    /// Its counters.
    pub counters: BTreeMap<String, u64>,
    /// How long ago it was heard of, if it was.
    pub last_seen_ms: Option<u64>,
}

/// A drain that goes on or is over.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DrainView {
    /// The service.
    pub service: String,
    /// The backend.
    pub backend: String,
    /// draining or drained.
    pub state: String,
    /// Buckets whose head it still is.
    pub head_buckets: u32,
    /// Buckets in which it may still hold connections.
    pub past_buckets: u32,
    /// Whether it leaves the service when it is drained.
    pub leaves: bool,
}

/// A service in the status.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// Its name.
    pub name: String,
    /// Its number.
    pub id: ServiceId,
    /// Its generation.
    pub generation: Generation,
    /// The generation that muxes may know.
    pub released: Generation,
    /// How many buckets it has.
    pub buckets: u32,
    /// How many of them have a previous owner.
    pub open_windows: u32,
    /// The length of the longest chain.
    pub deepest_chain: usize,
    /// How many backends it has.
    pub backends: usize,
    /// How many of them may be head.
    pub active_backends: usize,
    /// Live nodes that lack some of its table.
    pub unpublished_nodes: usize,
}

/// Everything at a glance.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StatusView {
    /// The controller's software.
    pub version: String,
    /// Whether this controller decides.
    pub leader: bool,
    /// The address it listens on.
    pub listening: String,
    /// How long a node may be silent.
    pub lease_ms: u64,
    /// The version of the directory.
    pub directory: u64,
    /// The services.
    pub services: Vec<ServiceStatus>,
    /// The nodes.
    pub nodes: Vec<NodeView>,
}

/// A table, or one bucket of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TableView {
    /// The service.
    pub service: String,
    /// Its generation.
    pub generation: Generation,
    /// The buckets.
    pub buckets: Vec<BucketView>,
}

/// A bucket.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BucketView {
    /// Its number.
    pub bucket: u32,
    /// When its chain last changed.
    pub generation: Generation,
    /// The names of its owners, newest first.
    pub chain: Vec<String>,
}

/// A service's open windows.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WindowsView {
    /// The service.
    pub service: String,
    /// Its generation.
    pub generation: Generation,
    /// How many windows are open.
    pub open_windows: u32,
    /// How many buckets have a chain of this length.
    pub depth: BTreeMap<usize, u32>,
    /// The open windows.
    pub windows: Vec<BucketView>,
}

/// A backend's part in a service.
pub fn backends(state: &State, service: &ServiceState) -> Vec<BackendView> {
    let members = &service.record.members;
    let able = |id: &BackendId, member: &Member| {
        !member.draining && member.weight > 0 && state.health(*id) == Health::Live
    };
    let candidates: Vec<Candidate> = members
        .iter()
        .filter(|(id, member)| able(id, member))
        .map(|(id, member)| Candidate { id: *id, weight: member.weight })
        .collect();
    let held = |id| service.figures.standing(id).head;
    let targets = planner::targets(service.record.service.buckets, &candidates, held);
    let target = |id: BackendId| match candidates.iter().position(|candidate| candidate.id == id) {
        Some(i) => targets[i],
        // Without a candidate heads stay as they are.
        None if candidates.is_empty() => held(id),
        None => 0,
    };
    let view = |(id, member): (&BackendId, &Member)| {
        let backend = &state.backends[id];
        let standing = service.figures.standing(*id);
        BackendView {
            service: service.record.service.name.clone(),
            name: backend.name.clone(),
            id: *id,
            address: backend.address,
            weight: member.weight,
            state: member_state(member, backend.health, standing).into(),
            head_buckets: standing.head,
            past_buckets: standing.past,
            target_buckets: target(*id),
        }
    };
    let mut views: Vec<BackendView> = members.iter().map(view).collect();
    views.sort_by(|a, b| a.name.cmp(&b.name));
    views
}

fn member_state(member: &Member, health: Health, standing: Standing) -> &'static str {
    match (health, member.draining) {
        (Health::Dead, _) => "down",
        (_, true) if standing == Standing::default() => "drained",
        (_, true) => "draining",
        (Health::Suspect, false) => "suspect",
        (Health::Joining, false) => "joining",
        (Health::Live, false) => "active",
    }
}

/// A service.
pub fn service(state: &State, service: &ServiceState) -> ServiceView {
    let known = &service.record.service;
    ServiceView {
        name: known.name.clone(),
        id: known.id,
        vip: known.vip,
        port: known.port,
        protocol: known.protocol,
        encapsulation: known.encapsulation,
        buckets: known.buckets,
        generation: service.record.generation,
        open_windows: service.figures.open_windows(),
        deepest_chain: service.figures.deepest_chain(),
        backends: backends(state, service),
    }
}

/// The drains of all services.
pub fn drains(state: &State) -> Vec<DrainView> {
    let mut drains = Vec::new();
    for service in state.services.values() {
        for view in backends(state, service) {
            let member = &service.record.members[&view.id];
            if member.draining {
                drains.push(DrainView {
                    service: view.service,
                    backend: view.name,
                    state: view.state,
                    head_buckets: view.head_buckets,
                    past_buckets: view.past_buckets,
                    leaves: member.leaving,
                });
            }
        }
    }
    drains
}

/// Whether a live node lacks some of a service's table.
fn lacks(tables: &Tables, service: &ServiceState, name: &str, node: &Node) -> bool {
    let applied = node.applied.get(&service.id()).copied();
    match node.kind {
        NodeKind::Mux => applied != Some(service.record.generation),
        NodeKind::Agent => tables.state.backend(name).is_some_and(|(id, _)| {
            service.record.members.contains_key(&id)
                && tables.publisher.for_agent(&tables.state, service.id(), id, applied, false).is_some()
        }),
    }
}

/// The nodes that were heard of, and the muxes that ever joined.
pub fn nodes(tables: &Tables, live: &Live, now_ms: u64) -> Vec<NodeView> {
    let state = &tables.state;
    let view = |(name, node): (&String, &Node)| NodeView {
        name: name.clone(),
        kind: node.kind,
        address: node.address,
        version: node.version.clone(),
        lease: if node.expired { "expired" } else { "live" }.into(),
        directory: node.directory,
        applied: node.applied.clone(),
        behind: node.directory != state.meta.directory
            || state.services.values().any(|service| lacks(tables, service, name, node)),
        counters: node.counters.clone(),
        last_seen_ms: Some(now_ms.saturating_sub(node.last_seen_ms)),
    };
    let mut views: Vec<NodeView> = live.nodes.iter().map(view).collect();
    for (name, mux) in state.muxes.iter().filter(|(name, _)| !live.nodes.contains_key(*name)) {
        views.push(NodeView {
            name: name.clone(),
            kind: NodeKind::Mux,
            address: mux.address,
            version: String::new(),
            lease: "expired".into(),
            directory: 0,
            applied: BTreeMap::new(),
            behind: true,
            counters: BTreeMap::new(),
            last_seen_ms: None,
        });
    }
    views.sort_by(|a, b| a.name.cmp(&b.name));
    views
}

/// The services in the status.
pub fn service_statuses(tables: &Tables, live: &Live) -> Vec<ServiceStatus> {
    let status = |service: &ServiceState| {
        let live = live.nodes.iter().filter(|(_, node)| !node.expired);
        let unpublished = live.filter(|(name, node)| lacks(tables, service, name, node)).count();
        let members = backends(&tables.state, service);
        ServiceStatus {
            name: service.record.service.name.clone(),
            id: service.id(),
            generation: service.record.generation,
            released: tables.publisher.released(service.id()).unwrap_or_default(),
            buckets: service.record.service.buckets,
            open_windows: service.figures.open_windows(),
            deepest_chain: service.figures.deepest_chain(),
            backends: members.len(),
            active_backends: members.iter().filter(|member| member.state == "active").count(),
            unpublished_nodes: unpublished,
        }
    };
    tables.state.services.values().map(status).collect()
}

/// Some buckets of a table.
pub fn buckets(state: &State, service: &ServiceState, numbers: impl Iterator<Item = u32>) -> Vec<BucketView> {
    let view = |number: u32| {
        let bucket = &service.buckets[number as usize];
        let chain = bucket.links.iter().map(|link| state.name(link.owner)).collect();
        BucketView { bucket: number, generation: bucket.generation, chain }
    };
    numbers.map(view).collect()
}

/// At most `limit` of a service's open windows, and how deep its chains are.
pub fn windows(state: &State, service: &ServiceState, limit: usize) -> WindowsView {
    let all = service.buckets.iter().enumerate();
    let open = all.filter(|(_, bucket)| bucket.links.len() > 1).map(|(number, _)| number as u32).take(limit);
    let depth = service.figures.depth.iter().copied().enumerate().filter(|(_, count)| *count > 0);
    WindowsView {
        service: service.record.service.name.clone(),
        generation: service.record.generation,
        open_windows: service.figures.open_windows(),
        depth: depth.collect(),
        windows: buckets(state, service, open),
    }
}
