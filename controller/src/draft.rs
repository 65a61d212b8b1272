//! A change in the making: the state as it was, and what differs so far. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;

use daisy_shared::bucket::BackendId;
use daisy_shared::chain::{Generation, MAX_CHAIN};
use daisy_shared::control::DrainReport;
use daisy_shared::service::ServiceId;

use crate::answer::{Answer, PlanView, ShareView};
use crate::chains;
use crate::events::{Event, Kind};
use crate::model::{
    Backend, Bucket, Change, Figures, Health, ID_QUARANTINE_MS, Mux, ServiceChange, ServiceRecord, Standing,
    State,
};
use crate::planner::{self, Candidate, Chains, Move};
use crate::problem::Problem;

/// A change in the making.
pub struct Draft<'a> {
    /// The state as it was.
    pub state: &'a State,
    now_unix_ms: u64,
    change: Change,
    /// The figures of services whose buckets differ.
    figures: BTreeMap<ServiceId, Figures>,
    directory_differs: bool,
    directory_floor: u64,
}

impl<'a> Draft<'a> {
    /// A change in which nothing differs yet.
    pub fn new(state: &'a State, now_unix_ms: u64) -> Draft<'a> {
        Draft {
            state,
            now_unix_ms,
            change: Change::default(),
            figures: BTreeMap::new(),
            directory_differs: false,
            directory_floor: 0,
        }
    }

    /// The finished change.
    pub fn finish(mut self) -> Change {
        let mut meta = self.change.meta.unwrap_or(self.state.meta);
        if self.directory_differs {
            meta.directory = meta.directory.max(self.directory_floor) + 1;
            for (id, backend) in &self.state.backends {
                let gone = backend.retired_at_ms.is_some_and(|at| at + ID_QUARANTINE_MS <= self.now_unix_ms);
                if gone {
                    self.change.backends.entry(*id).or_insert(None);
                }
            }
        }
        self.change.meta = (meta != self.state.meta).then_some(meta);
        for (id, change) in &self.change.services {
            let (Some(change), moved) = (change, self.moved_buckets(*id)) else { continue };
            if moved > 0 {
                let detail = format!("{moved} buckets in generation {}", change.record.generation);
                let event = Event::new(Kind::BucketsMoved, detail);
                self.change.events.push(event.service(&change.record.service.name));
            }
        }
        self.change
    }

    /// Notes what happens, for people.
    pub fn event(&mut self, event: Event) {
        self.change.events.push(event);
    }

    /// A service's record as it will be.
    ///
    /// # Panics
    /// If there is no such service.
    pub fn record(&self, id: ServiceId) -> &ServiceRecord {
        match self.change.services.get(&id) {
            Some(Some(change)) => &change.record,
            _ => &self.state.services[&id].record,
        }
    }

    /// Gives a service another record.
    pub fn set_record(&mut self, record: ServiceRecord) {
        match self.change.services.entry(record.service.id).or_default() {
            Some(change) => change.record = record,
            none => *none = Some(ServiceChange { record, buckets: Vec::new() }),
        }
    }

    /// Removes a service.
    pub fn remove_service(&mut self, id: ServiceId) {
        self.change.services.insert(id, None);
    }

    /// What will be known of a backend's health.
    pub fn health(&self, id: BackendId) -> Health {
        match self.change.backends.get(&id) {
            Some(Some(backend)) if backend.retired_at_ms.is_none() => backend.health,
            Some(_) => Health::Dead,
            None => self.state.health(id),
        }
    }

    /// Changes what is known of a backend's health.
    pub fn set_health(&mut self, id: BackendId, health: Health) {
        if let Some(backend) = self.state.backends.get(&id) {
            self.directory_differs |= (backend.health == Health::Dead) != (health == Health::Dead);
            self.change.backends.insert(id, Some(Backend { health, ..backend.clone() }));
        }
    }

    /// Gives a mux an address, or forgets it.
    pub fn set_mux(&mut self, name: &str, mux: Option<Mux>) {
        self.change.muxes.insert(name.to_owned(), mux);
        self.directory_differs = true;
    }

    /// Makes the directory's version newer than `version`.
    pub fn raise_directory(&mut self, version: u64) {
        self.directory_differs = true;
        self.directory_floor = version;
    }

    /// The number of the backend of this name and address, which gets one if it has none. Its health changes only
    /// if it is new.
    ///
    /// # Errors
    /// A [`Problem`] if no number is free.
    pub fn enlist(&mut self, name: &str, address: IpAddr, health: Health) -> Result<BackendId, Problem> {
        if let Some((id, _)) = self.state.backend(name) {
            return Ok(id);
        }
        let fresh = Backend { name: name.to_owned(), address, health, retired_at_ms: None };
        // The same backend back again may have its old number: whoever still knows that knows it rightly.
        let same = |(_, old): &(&BackendId, &Backend)| old.name == name && old.address == address;
        let id = match self.state.backends.iter().find(same) {
            Some((id, _)) => *id,
            None => self.free_number(name)?,
        };
        self.change.backends.insert(id, Some(fresh));
        self.directory_differs = true;
        Ok(id)
    }

    fn free_number(&mut self, name: &str) -> Result<BackendId, Problem> {
        let first = self.state.meta.next_backend;
        let after = (first..BackendId::NONE.0).chain(0..first).find(|number| {
            match self.state.backends.get(&BackendId(*number)) {
                None => true,
                Some(backend) => {
                    backend.retired_at_ms.is_some_and(|at| at + ID_QUARANTINE_MS <= self.now_unix_ms)
                }
            }
        });
        let number = after.ok_or_else(|| Problem::conflict("name", name, "all backend numbers are taken"))?;
        let next_backend = if number + 1 == BackendId::NONE.0 { 0 } else { number + 1 };
        self.change.meta = Some(crate::model::Meta { next_backend, ..self.state.meta });
        Ok(BackendId(number))
    }

    /// Retires a backend that serves nothing any more.
    pub fn retire_if_unused(&mut self, id: BackendId) {
        let serves = |service: &ServiceId| match self.change.services.get(service) {
            Some(Some(change)) => change.record.members.contains_key(&id),
            Some(None) => false,
            None => self.state.services[service].record.members.contains_key(&id),
        };
        if self.state.services.keys().any(serves) {
            return;
        }
        if let Some(backend) = self.state.backends.get(&id) {
            let retired_at_ms = Some(self.now_unix_ms);
            self.change.backends.insert(id, Some(Backend { retired_at_ms, ..backend.clone() }));
            self.directory_differs = true;
        }
    }

    /// Who may be head in a service.
    pub fn candidates(&self, id: ServiceId) -> Vec<Candidate> {
        let members = self.record(id).members.iter();
        let able = members.filter(|(id, member)| {
            !member.draining && member.weight > 0 && self.health(**id) == Health::Live
        });
        able.map(|(id, member)| Candidate { id: *id, weight: member.weight }).collect()
    }

    /// In how many buckets a backend will stand.
    pub fn standing(&self, id: ServiceId, backend: BackendId) -> Standing {
        self.figures(id).map(|figures| figures.standing(backend)).unwrap_or_default()
    }

    fn figures(&self, id: ServiceId) -> Option<&Figures> {
        self.figures.get(&id).or_else(|| self.state.services.get(&id).map(|service| &service.figures))
    }

    /// What the change does to a service.
    pub fn answer(&self, id: ServiceId) -> Answer {
        let record = self.record(id);
        let mut plan = PlanView::default();
        if let Some(service) = self.state.services.get(&id) {
            if let Some(Some(change)) = self.change.services.get(&id) {
                let base = &service.buckets;
                let moved =
                    change.buckets.iter().filter(|(n, bucket)| base[*n as usize].head() != bucket.head());
                plan.moved_buckets = moved.count() as u32;
            }
            let known = self.state.backends.keys().chain(self.change.backends.keys());
            for backend in known {
                let before = service.figures.standing(*backend).head;
                let after = self.standing(id, *backend).head;
                if before != after {
                    plan.per_backend.insert(self.name(*backend), ShareView { before, after });
                }
            }
        }
        Answer { generation: record.generation, plan, ..Answer::default() }
    }

    /// How many of a service's buckets get another head.
    fn moved_buckets(&self, id: ServiceId) -> u32 {
        let Some(service) = self.state.services.get(&id) else { return 0 };
        let changed = self.replaced(id).iter();
        changed.filter(|(n, bucket)| service.buckets[*n as usize].head() != bucket.head()).count() as u32
    }

    fn name(&self, id: BackendId) -> String {
        match self.change.backends.get(&id) {
            Some(Some(backend)) => backend.name.clone(),
            _ => self.state.name(id),
        }
    }

    /// The plan that will be carried out once `joining` is heard of.
    pub fn preview(&self, id: ServiceId, joining: BackendId) -> PlanView {
        let (Some(service), Some(member)) =
            (self.state.services.get(&id), self.record(id).members.get(&joining))
        else {
            return PlanView::default();
        };
        let mut candidates = self.candidates(id);
        candidates.push(Candidate { id: joining, weight: member.weight });
        candidates.retain(|candidate| candidate.weight > 0);
        let moves = planner::plan(Chains::new(&service.buckets, self.replaced(id)), &candidates);
        let mut plan = PlanView { moved_buckets: moves.len() as u32, ..PlanView::default() };
        let mut figures: BTreeMap<BackendId, ShareView> = BTreeMap::new();
        for Move { bucket, to } in moves {
            let from = service.buckets[bucket as usize].head();
            for (backend, by) in [(Some(to), 1), (from, -1)] {
                let Some(backend) = backend else { continue };
                let head = self.standing(id, backend).head;
                let share = figures.entry(backend).or_insert(ShareView { before: head, after: head });
                share.after = share.after.wrapping_add_signed(by);
            }
        }
        plan.per_backend = figures.into_iter().map(|(id, share)| (self.name(id), share)).collect();
        plan
    }

    fn replaced(&self, id: ServiceId) -> &[(u32, Bucket)] {
        match self.change.services.get(&id) {
            Some(Some(change)) => &change.buckets,
            _ => &[],
        }
    }

    /// Replaces buckets, in ascending order, and stamps the service with the generation of the change.
    fn replace(&mut self, id: ServiceId, buckets: Vec<(u32, Bucket)>, generation: Generation) {
        if buckets.is_empty() {
            return;
        }
        let Some(service) = self.state.services.get(&id) else { return };
        let mut record = self.record(id).clone();
        record.generation = generation;
        let figures = self.figures.entry(id).or_insert_with(|| service.figures.clone());
        let old = Chains::new(
            &service.buckets,
            match self.change.services.get(&id) {
                Some(Some(change)) => &change.buckets,
                _ => &[],
            },
        );
        for (number, bucket) in &buckets {
            figures.replace(old.get(*number), bucket);
        }
        self.set_record(record);
        if let Some(Some(change)) = self.change.services.get_mut(&id) {
            let older = std::mem::take(&mut change.buckets);
            change.buckets = merge(older, buckets);
        }
    }

    /// Brings a service's table in line with its members, their health and their weights: splices out who is gone,
    /// moves buckets to the target if `replan`, and lets those leave who are drained.
    pub fn settle(&mut self, id: ServiceId, replan: bool) {
        let Some(service) = self.state.services.get(&id) else { return };
        let generation = service.record.generation.next();
        let candidates = self.candidates(id);
        let spliced = self.splice_gone(id, generation, !candidates.is_empty());
        if replan || spliced {
            let chains = Chains::new(&service.buckets, self.replaced(id));
            let moves = planner::plan(chains, &candidates);
            let moved: Vec<(u32, Bucket)> = moves
                .iter()
                .filter_map(|m| Some((m.bucket, chains::moved(chains.get(m.bucket), m.to, generation)?)))
                .collect();
            self.replace(id, moved, generation);
        }
        self.let_leave(id);
    }

    /// Takes out of all chains who is no member any more, or dead. A chain of dead owners only stays as it is
    /// where nobody else could be head: an empty table would serve nobody better. Says whether anybody was.
    fn splice_gone(&mut self, id: ServiceId, generation: Generation, has_candidates: bool) -> bool {
        let service = &self.state.services[&id];
        let members = &self.record(id).members;
        let mut cut = vec![false; 1 << 16];
        let mut dead = cut.clone();
        let mut any = false;
        for (backend, _) in service.figures.standings() {
            let place = usize::from(backend.0);
            cut[place] = !members.contains_key(&backend);
            dead[place] = !cut[place] && self.health(backend) == Health::Dead;
            any |= cut[place] || dead[place];
        }
        if !any {
            return false;
        }
        let chains = Chains::new(&service.buckets, self.replaced(id));
        let is_cut = |owner: BackendId| cut[usize::from(owner.0)];
        let is_gone = |owner: BackendId| cut[usize::from(owner.0)] || dead[usize::from(owner.0)];
        let spliced = |bucket: &Bucket| {
            let survivor = bucket.links.iter().any(|link| !is_gone(link.owner));
            if survivor || has_candidates {
                chains::spliced(bucket, is_gone, generation)
            } else {
                chains::spliced(bucket, is_cut, generation)
            }
        };
        let buckets = chains.iter().filter_map(|(number, bucket)| Some((number, spliced(bucket)?))).collect();
        self.replace(id, buckets, generation);
        true
    }

    /// Ends drains: who is draining and in no chain is drained, and leaves if it was to leave.
    fn let_leave(&mut self, id: ServiceId) {
        let Some(service) = self.state.services.get(&id) else { return };
        let record = self.record(id).clone();
        let name = record.service.name.clone();
        let mut left = Vec::new();
        for (backend, member) in &record.members {
            if !member.draining || self.standing(id, *backend) != Standing::default() {
                continue;
            }
            // It ended in this change if it was not over before.
            let was = service.record.members.get(backend);
            let over = was.is_some_and(|was| was.draining)
                && service.figures.standing(*backend) == Standing::default();
            let subject = self.name(*backend);
            if !over {
                let event = Event::new(Kind::DrainEnded, "is in no chain any more");
                self.event(event.service(&name).subject(&subject));
            }
            if member.leaving {
                self.event(Event::new(Kind::BackendRemoved, "left").service(&name).subject(&subject));
                left.push(*backend);
            }
        }
        if !left.is_empty() {
            let mut record = record;
            record.members.retain(|backend, _| !left.contains(backend));
            self.set_record(record);
            for backend in left {
                self.retire_if_unused(backend);
            }
        }
    }

    /// Splices out the owners whose reports count (rule 8), each service's in one change.
    pub fn take_reports(&mut self, reports: &[(BackendId, DrainReport)]) {
        let state = self.state;
        let mut left: BTreeMap<ServiceId, BTreeMap<u32, Vec<BackendId>>> = BTreeMap::new();
        for (owner, report) in reports {
            let Some(service) = state.services.get(&report.service) else { continue };
            for (number, known) in &report.buckets {
                let Some(bucket) = service.buckets.get(*number as usize) else { continue };
                if chains::accepts_report(bucket, *owner, *known) {
                    left.entry(report.service).or_default().entry(*number).or_default().push(*owner);
                }
            }
        }
        for (id, left) in left {
            let service = &state.services[&id];
            let generation = service.record.generation.next();
            let mut made_room = false;
            let splice = |(number, owners): (u32, Vec<BackendId>)| {
                let bucket = &service.buckets[number as usize];
                made_room |= bucket.links.len() == MAX_CHAIN;
                Some((number, chains::spliced(bucket, |owner| owners.contains(&owner), generation)?))
            };
            let buckets = left.into_iter().filter_map(splice).collect();
            self.replace(id, buckets, generation);
            // Moves that waited for room may go on.
            self.settle(id, made_room);
        }
    }

    /// Stamps all of a service's buckets with a generation.
    pub fn rebase(&mut self, id: ServiceId, generation: Generation) {
        let Some(service) = self.state.services.get(&id) else { return };
        let buckets = service.buckets.iter().enumerate();
        let buckets = buckets.map(|(n, bucket)| (n as u32, chains::rebased(bucket, generation))).collect();
        self.replace(id, buckets, generation);
    }
}

/// Both lists in ascending order; where both have a bucket, `newer` counts.
fn merge(older: Vec<(u32, Bucket)>, newer: Vec<(u32, Bucket)>) -> Vec<(u32, Bucket)> {
    if older.is_empty() {
        return newer;
    }
    let mut merged = Vec::with_capacity(older.len() + newer.len());
    let mut newer = newer.into_iter().peekable();
    for (number, bucket) in older {
        while let Some(entry) = newer.next_if(|(other, _)| *other < number) {
            merged.push(entry);
        }
        merged.push(newer.next_if(|(other, _)| *other == number).unwrap_or((number, bucket)));
    }
    merged.extend(newer);
    merged
}
