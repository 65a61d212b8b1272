//! What a node is told, and when (rule 10): agents first, muxes when the agents concerned have acknowledged or a
//! short time has passed. No order is needed for safety; this one saves hops. Pure: the time is passed in.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use daisy_shared::bucket::{BackendId, BucketWord, Entry, Piece};
use daisy_shared::chain::Generation;
use daisy_shared::control::{Directory, DirectoryEntry, TableUpdate};
use daisy_shared::service::ServiceId;

use crate::model::{Change, Health, ServiceState, State};

/// Muxes wait for agents no longer than this.
pub const AGENTS_FIRST_MS: u64 = 250;
/// The log of a service holds at least this many changed buckets before it forgets old changes.
const LOG_FLOOR: usize = 1 << 16;

/// What is published of each service, and who has acknowledged it.
#[derive(Debug, Default)]
pub struct Publisher {
    tracks: BTreeMap<ServiceId, Track>,
    /// Muxes that have just joined: they get no table before the agents know of them.
    held: BTreeMap<String, Wait>,
}

/// One service.
#[derive(Debug)]
struct Track {
    /// The table as of `released`: what muxes may know.
    words: Vec<BucketWord>,
    released: Generation,
    /// The last changes, oldest first, without a gap.
    log: VecDeque<Arc<Logged>>,
    logged_buckets: usize,
    /// Changes that muxes must not know yet, oldest first.
    pending: VecDeque<(Arc<Logged>, Wait)>,
}

/// One change of a table.
#[derive(Debug)]
struct Logged {
    from: Generation,
    generation: Generation,
    words: Vec<(u32, BucketWord)>,
    /// For each backend in a chain before or after the change: the changed buckets, in ascending order.
    concerned: HashMap<BackendId, Vec<u32>>,
}

/// Waits for agents, but not for ever.
#[derive(Debug)]
struct Wait {
    agents: BTreeSet<BackendId>,
    /// The directory that is to be acknowledged, where it is one.
    directory: u64,
    until_ms: u64,
}

impl Wait {
    fn is_over(&self, now_ms: u64) -> bool {
        self.agents.is_empty() || self.until_ms <= now_ms
    }
}

impl Publisher {
    /// Everything in the state is published.
    pub fn new(state: &State) -> Publisher {
        let track = |service: &ServiceState| Track {
            words: service.buckets.iter().map(|bucket| bucket.word()).collect(),
            released: service.record.generation,
            log: VecDeque::new(),
            logged_buckets: 0,
            pending: VecDeque::new(),
        };
        let tracks = state.services.iter().map(|(id, service)| (*id, track(service))).collect();
        Publisher { tracks, held: BTreeMap::new() }
    }

    /// Takes note of a change that is about to be made to `before`. `is_heard` says whose lease is live.
    pub fn record(
        &mut self,
        before: &State,
        change: &Change,
        is_heard: impl Fn(BackendId) -> bool,
        now_ms: u64,
    ) {
        let until_ms = now_ms + AGENTS_FIRST_MS;
        for (name, mux) in &change.muxes {
            self.held.remove(name);
            if let (Some(_), Some(meta)) = (mux, change.meta) {
                let agents = before.backends.keys().copied().filter(|id| is_heard(*id)).collect();
                self.held.insert(name.clone(), Wait { agents, directory: meta.directory, until_ms });
            }
        }
        for (id, change) in &change.services {
            let Some(change) = change else {
                self.tracks.remove(id);
                continue;
            };
            let buckets = change.record.service.buckets as usize;
            let track = self.tracks.entry(*id).or_insert_with(|| Track {
                words: vec![BucketWord::EMPTY; buckets],
                released: change.record.generation,
                log: VecDeque::new(),
                logged_buckets: 0,
                pending: VecDeque::new(),
            });
            let Some(before) = before.services.get(id) else { continue };
            if change.buckets.is_empty() {
                continue;
            }
            let mut concerned: HashMap<BackendId, Vec<u32>> = HashMap::new();
            let mut words = Vec::with_capacity(change.buckets.len());
            for (number, bucket) in &change.buckets {
                words.push((*number, bucket.word()));
                let was = &before.buckets[*number as usize];
                let left = was.links.iter().filter(|link| bucket.position(link.owner).is_none());
                for link in bucket.links.iter().chain(left) {
                    concerned.entry(link.owner).or_default().push(*number);
                }
            }
            let agents = concerned.keys().copied().filter(|id| is_heard(*id)).collect();
            let (from, generation) = (before.record.generation, change.record.generation);
            let logged = Arc::new(Logged { from, generation, words, concerned });
            track.append(logged, Wait { agents, directory: 0, until_ms });
        }
    }

    /// Whether [`Publisher::acknowledge`] could do anything.
    pub fn awaits(&self, agent: BackendId) -> bool {
        self.held.values().any(|wait| wait.agents.contains(&agent))
            || self.tracks.values().any(|t| t.pending.iter().any(|(_, wait)| wait.agents.contains(&agent)))
    }

    /// An agent has applied these.
    pub fn acknowledge(
        &mut self,
        agent: BackendId,
        applied: &BTreeMap<ServiceId, Generation>,
        directory: u64,
    ) {
        for wait in self.held.values_mut().filter(|wait| wait.directory <= directory) {
            wait.agents.remove(&agent);
        }
        for (id, track) in &mut self.tracks {
            let Some(applied) = applied.get(id) else { continue };
            for (logged, wait) in &mut track.pending {
                if !logged.generation.is_newer_than(*applied) {
                    wait.agents.remove(&agent);
                }
            }
        }
    }

    /// Lets muxes know what they may know by now; says whether that is anything new.
    pub fn release(&mut self, now_ms: u64) -> bool {
        let held = self.held.len();
        self.held.retain(|_, wait| !wait.is_over(now_ms));
        let mut released = self.held.len() != held;
        for track in self.tracks.values_mut() {
            while track.pending.front().is_some_and(|(_, wait)| wait.is_over(now_ms))
                && let Some((logged, _)) = track.pending.pop_front()
            {
                for (number, word) in &logged.words {
                    track.words[*number as usize] = *word;
                }
                track.released = logged.generation;
                released = true;
            }
        }
        released
    }

    /// When [`Publisher::release`] will have something to do at the latest.
    pub fn next_release_ms(&self) -> Option<u64> {
        let pending = self.tracks.values().filter_map(|track| track.pending.front().map(|(_, wait)| wait));
        pending.chain(self.held.values()).map(|wait| wait.until_ms).min()
    }

    /// The generation that muxes may know.
    pub fn released(&self, id: ServiceId) -> Option<Generation> {
        self.tracks.get(&id).map(|track| track.released)
    }

    /// What a mux that has applied `applied` lacks of a service.
    pub fn for_mux(
        &self,
        state: &State,
        id: ServiceId,
        name: &str,
        applied: Option<Generation>,
    ) -> Option<TableUpdate> {
        let (track, service) = (self.tracks.get(&id)?, state.services.get(&id)?);
        let known = applied.is_some_and(|applied| !track.released.is_newer_than(applied));
        if known || self.held.contains_key(name) {
            return None;
        }
        let delta = applied.and_then(|applied| Some((applied, track.since(applied)?)));
        let entry = |number: u32, word: BucketWord| {
            let chain = [word.head(), word.previous()].into_iter().filter_map(BackendId::some).collect();
            Entry { bucket: number, generation: word.generation(), chain }
        };
        let entries = match &delta {
            Some((_, changes)) => {
                let released = changes.iter().filter(|c| !c.generation.is_newer_than(track.released));
                let numbers = released.flat_map(|change| change.words.iter().map(|(number, _)| *number));
                union(numbers).into_iter().map(|number| entry(number, track.words[number as usize])).collect()
            }
            None => {
                track.words.iter().enumerate().map(|(number, word)| entry(number as u32, *word)).collect()
            }
        };
        Some(update(service, delta.map(|(from, _)| from), track.released, entries))
    }

    /// What an agent that has applied `applied` lacks of a service that it serves: of changes those that concern
    /// it, otherwise the whole table. An update in which nothing concerns it comes only if `even_empty`.
    pub fn for_agent(
        &self,
        state: &State,
        id: ServiceId,
        agent: BackendId,
        applied: Option<Generation>,
        even_empty: bool,
    ) -> Option<TableUpdate> {
        let (track, service) = (self.tracks.get(&id)?, state.services.get(&id)?);
        let generation = service.record.generation;
        if applied == Some(generation) {
            return None;
        }
        let delta = applied.and_then(|applied| Some((applied, track.since(applied)?)));
        let entry = |number: u32| {
            let bucket = &service.buckets[number as usize];
            Entry { bucket: number, generation: bucket.generation, chain: bucket.chain() }
        };
        let entries: Vec<Entry> = match &delta {
            Some((_, changes)) => {
                let numbers = changes.iter().filter_map(|change| change.concerned.get(&agent)).flatten();
                union(numbers.copied()).into_iter().map(entry).collect()
            }
            // Every bucket: an agent that has forgotten one that names others only (a reboot) would take a stale
            // mux's word for it (`docs/decisions/0010-no-end-without-certainty.md`).
            None => (0..service.buckets.len() as u32).map(entry).collect(),
        };
        if delta.is_some() && entries.is_empty() && !even_empty {
            return None;
        }
        Some(update(service, delta.map(|(from, _)| from), generation, entries))
    }
}

impl Track {
    fn append(&mut self, logged: Arc<Logged>, wait: Wait) {
        self.logged_buckets += logged.words.len();
        self.log.push_back(Arc::clone(&logged));
        self.pending.push_back((logged, wait));
        let most = self.words.len().max(LOG_FLOOR);
        while self.logged_buckets > most && self.log.len() > 1 {
            if let Some(oldest) = self.log.pop_front() {
                self.logged_buckets -= oldest.words.len();
            }
        }
    }

    /// The changes after `applied`, if the log reaches that far.
    fn since(&self, applied: Generation) -> Option<Vec<&Arc<Logged>>> {
        let first = self.log.iter().position(|logged| logged.from == applied)?;
        Some(self.log.range(first..).collect())
    }
}

fn union(numbers: impl Iterator<Item = u32>) -> Vec<u32> {
    let mut numbers: Vec<u32> = numbers.collect();
    numbers.sort_unstable();
    numbers.dedup();
    numbers
}

fn update(
    service: &ServiceState,
    from: Option<Generation>,
    generation: Generation,
    entries: Vec<Entry>,
) -> TableUpdate {
    let service = service.record.service.clone();
    let piece = Piece { service: service.id, from, generation, buckets: service.buckets, entries };
    TableUpdate { service, piece }
}

/// The directory of a state. Backends that are gone stay in it, as dead, while a table may still name them, unless
/// another has their name or address.
pub fn directory(state: &State) -> Directory {
    let in_use = state.backends.values().filter(|backend| backend.retired_at_ms.is_none());
    let taken: BTreeSet<_> = in_use.clone().map(|backend| backend.address).collect();
    let names: BTreeSet<_> = in_use.map(|backend| &backend.name).collect();
    let listed = state.backends.iter().filter(|(_, backend)| {
        backend.retired_at_ms.is_none()
            || !(taken.contains(&backend.address) || names.contains(&backend.name))
    });
    let entry = |(id, _): (&BackendId, _)| {
        let backend = &state.backends[id];
        let dead = state.health(*id) == Health::Dead;
        DirectoryEntry { id: *id, name: backend.name.clone(), address: backend.address, dead }
    };
    let muxes: BTreeSet<_> = state.muxes.values().map(|mux| mux.address).collect();
    Directory {
        version: state.meta.directory,
        backends: listed.map(entry).collect(),
        muxes: muxes.into_iter().collect(),
    }
}
