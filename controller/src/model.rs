//! The state that the controller keeps, and the change from one state to the next.

use std::collections::BTreeMap;
use std::net::IpAddr;

use arrayvec::ArrayVec;
use daisy_shared::bucket::{BackendId, BucketWord, Chain};
use daisy_shared::chain::{Generation, MAX_CHAIN};
use daisy_shared::service::{Service, ServiceId};
use serde::{Deserialize, Serialize};

use crate::events::Event;

/// How long the number of a backend that is gone is not given to another, in milliseconds.
pub const ID_QUARANTINE_MS: u64 = 3_600_000;

/// Everything that survives a restart.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    /// Versions and counters.
    pub meta: Meta,
    /// The services.
    pub services: BTreeMap<ServiceId, ServiceState>,
    /// The backends, and for a while those that are gone.
    pub backends: BTreeMap<BackendId, Backend>,
    /// The muxes that have ever joined, by name.
    pub muxes: BTreeMap<String, Mux>,
}

/// Versions and counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Meta {
    /// The version of the directory; grows with every change of backends, muxes or who is dead.
    pub directory: u64,
    /// Where the search for a free backend number begins.
    pub next_backend: u16,
}

/// Who a backend is, whatever services it serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Backend {
    /// Its name, unique.
    pub name: String,
    /// Its address on the underlay, unique.
    pub address: IpAddr,
    /// What is known of its health.
    pub health: Health,
    /// When it left its last service, in milliseconds of Unix time. Its number stays reserved for
    /// [`ID_QUARANTINE_MS`], because a node may still have a table that names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retired_at_ms: Option<u64>,
}

/// What is known of a backend's health.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// Added while others serve, and its agent has not been heard of yet: takes no bucket.
    Joining,
    /// Its lease is live.
    Live,
    /// Its lease ended, and nobody found it dead: loses headship, keeps its place in chains (rule 9).
    Suspect,
    /// Declared dead: in no chain, and agents skip it (rule 9).
    Dead,
}

/// A mux that has joined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mux {
    /// Its address on the underlay; agents take packets from it.
    pub address: IpAddr,
}

/// A service, its members and its table.
#[derive(Clone, Debug)]
pub struct ServiceState {
    /// All but the buckets.
    pub record: ServiceRecord,
    /// The chains. As many as the service has buckets.
    pub buckets: Vec<Bucket>,
    /// Figures that follow from `buckets`.
    pub figures: Figures,
}

/// A service without its buckets.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceRecord {
    /// What nodes know of it.
    pub service: Service,
    /// The generation of the newest change.
    pub generation: Generation,
    /// The backends that serve it.
    pub members: BTreeMap<BackendId, Member>,
}

/// A backend's part in one service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// Its share of the buckets is `weight` of the sum of all.
    pub weight: u32,
    /// Gives up headship everywhere.
    pub draining: bool,
    /// Leaves the service once it is in no chain.
    pub leaving: bool,
}

/// An owner in a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Who.
    pub owner: BackendId,
    /// The generation in which it lost headship; for the head, the one in which it got it.
    pub since: Generation,
}

/// A bucket: its chain, newest owner first, and when that last changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bucket {
    /// The generation of the chain's last change.
    pub generation: Generation,
    /// The owners, newest first.
    pub links: ArrayVec<Link, MAX_CHAIN>,
}

impl Bucket {
    /// The owner that takes new connections.
    pub fn head(&self) -> Option<BackendId> {
        self.links.first().map(|link| link.owner)
    }

    /// Where in the chain `owner` stands.
    pub fn position(&self, owner: BackendId) -> Option<usize> {
        self.links.iter().position(|link| link.owner == owner)
    }

    /// The owners, newest first.
    pub fn chain(&self) -> Chain {
        self.links.iter().map(|link| link.owner).collect()
    }

    /// What a mux knows of the bucket.
    pub fn word(&self) -> BucketWord {
        let owner = |i: usize| self.links.get(i).map_or(BackendId::NONE, |link| link.owner);
        BucketWord::new(owner(0), owner(1), self.generation)
    }
}

/// In how many buckets a backend stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Buckets whose head it is.
    pub head: u32,
    /// Buckets in which it is a previous owner.
    pub past: u32,
}

/// Figures that follow from a service's buckets, kept up to date with each change.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// By backend number, as far as the largest that was ever in a chain.
    standing: Vec<Standing>,
    /// How many buckets have a chain of this length.
    pub depth: [u32; MAX_CHAIN + 1],
}

impl Figures {
    fn of(buckets: &[Bucket]) -> Figures {
        let mut figures = Figures::default();
        for bucket in buckets {
            figures.count(bucket, 1);
        }
        figures
    }

    fn count(&mut self, bucket: &Bucket, by: i32) {
        let depth = &mut self.depth[bucket.links.len()];
        *depth = depth.wrapping_add_signed(by);
        for (i, link) in bucket.links.iter().enumerate() {
            let owner = usize::from(link.owner.0);
            if self.standing.len() <= owner {
                self.standing.resize(owner + 1, Standing::default());
            }
            let standing = &mut self.standing[owner];
            let figure = if i == 0 { &mut standing.head } else { &mut standing.past };
            *figure = figure.wrapping_add_signed(by);
        }
    }

    /// One bucket becomes another.
    pub fn replace(&mut self, old: &Bucket, new: &Bucket) {
        self.count(old, -1);
        self.count(new, 1);
    }

    /// In how many buckets `backend` stands.
    pub fn standing(&self, backend: BackendId) -> Standing {
        self.standing.get(usize::from(backend.0)).copied().unwrap_or_default()
    }

    /// Every backend that is in a chain.
    pub fn standings(&self) -> impl Iterator<Item = (BackendId, Standing)> {
        let all = self.standing.iter().enumerate();
        all.filter(|(_, standing)| **standing != Standing::default())
            .map(|(id, s)| (BackendId(id as u16), *s))
    }

    /// How many buckets have a previous owner.
    pub fn open_windows(&self) -> u32 {
        self.depth[2..].iter().sum()
    }

    /// The length of the longest chain.
    pub fn deepest_chain(&self) -> usize {
        self.depth.iter().rposition(|count| *count > 0).unwrap_or(0)
    }
}

impl ServiceState {
    /// A service with these buckets.
    pub fn new(record: ServiceRecord, buckets: Vec<Bucket>) -> ServiceState {
        let figures = Figures::of(&buckets);
        ServiceState { record, buckets, figures }
    }

    /// The service's number.
    pub fn id(&self) -> ServiceId {
        self.record.service.id
    }
}

impl PartialEq for ServiceState {
    fn eq(&self, other: &ServiceState) -> bool {
        // The figures follow from the buckets.
        self.record == other.record && self.buckets == other.buckets
    }
}

impl State {
    /// The service of this name.
    pub fn service(&self, name: &str) -> Option<&ServiceState> {
        self.services.values().find(|service| service.record.service.name == name)
    }

    /// The backend of this name that is in use.
    pub fn backend(&self, name: &str) -> Option<(BackendId, &Backend)> {
        let in_use = |(_, backend): &(_, &Backend)| backend.name == name && backend.retired_at_ms.is_none();
        self.backends.iter().map(|(id, backend)| (*id, backend)).find(in_use)
    }

    /// What is known of a backend's health; a backend that is gone counts as dead.
    pub fn health(&self, id: BackendId) -> Health {
        match self.backends.get(&id) {
            Some(backend) if backend.retired_at_ms.is_none() => backend.health,
            _ => Health::Dead,
        }
    }

    /// A backend's name, or its number if it has none any more.
    pub fn name(&self, id: BackendId) -> String {
        self.backends.get(&id).map_or_else(|| format!("#{id}"), |backend| backend.name.clone())
    }

    /// Makes a change. The same change made to the same state gives the same state, here and on disk.
    pub fn apply(&mut self, change: &Change) {
        if let Some(meta) = change.meta {
            self.meta = meta;
        }
        for (id, backend) in &change.backends {
            match backend {
                Some(backend) => self.backends.insert(*id, backend.clone()),
                None => self.backends.remove(id),
            };
        }
        for (name, mux) in &change.muxes {
            match mux {
                Some(mux) => self.muxes.insert(name.clone(), mux.clone()),
                None => self.muxes.remove(name),
            };
        }
        for (id, change) in &change.services {
            match change {
                Some(change) => self.apply_service(*id, change),
                None => drop(self.services.remove(id)),
            }
        }
    }

    fn apply_service(&mut self, id: ServiceId, change: &ServiceChange) {
        let service = self.services.entry(id).or_insert_with(|| {
            let buckets = vec![Bucket::default(); change.record.service.buckets as usize];
            ServiceState::new(change.record.clone(), buckets)
        });
        service.record = change.record.clone();
        for (number, bucket) in &change.buckets {
            let place = &mut service.buckets[*number as usize];
            service.figures.replace(place, bucket);
            place.clone_from(bucket);
        }
    }
}

/// What a command does to the state: the new value of everything that differs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Change {
    /// Versions and counters, if they differ.
    pub meta: Option<Meta>,
    /// Backends that differ; `None` for one that is forgotten.
    pub backends: BTreeMap<BackendId, Option<Backend>>,
    /// Muxes that differ; `None` for one that is forgotten.
    pub muxes: BTreeMap<String, Option<Mux>>,
    /// Services that differ; `None` for one that is gone.
    pub services: BTreeMap<ServiceId, Option<ServiceChange>>,
    /// What to tell the operator. Not stored.
    pub events: Vec<Event>,
}

/// How one service differs.
#[derive(Clone, Debug, PartialEq)]
pub struct ServiceChange {
    /// All but the buckets.
    pub record: ServiceRecord,
    /// The buckets whose chain differs, in ascending order.
    pub buckets: Vec<(u32, Bucket)>,
}

impl Change {
    /// Whether the state stays as it is.
    pub fn is_empty(&self) -> bool {
        self.meta.is_none() && self.backends.is_empty() && self.muxes.is_empty() && self.services.is_empty()
    }
}
