//! Who is alive, from syncs and probes (rule 9). No clock: the time is passed in, in milliseconds that only grow.

use std::collections::BTreeMap;

use daisy_shared::bucket::BackendId;

use crate::model::{Health, State};

/// The most nodes that probe one backend at a time, of either kind.
const PROBERS: usize = 4;

/// The leases of all backends.
#[derive(Debug)]
pub struct Leases {
    lease_ms: u64,
    last_tick_ms: u64,
    backends: BTreeMap<BackendId, Lease>,
}

/// What is known of one backend.
#[derive(Debug)]
struct Lease {
    renewed_ms: u64,
    /// Who is to probe it; empty while there is no need.
    probers: Vec<String>,
    /// The newest result of each prober: when it came, and whether the backend answered.
    results: BTreeMap<String, (u64, bool)>,
}

/// What a tick found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tick {
    /// Backends of which something else is known now.
    pub verdicts: Vec<(BackendId, Health)>,
    /// Whether there is somebody new to probe.
    pub new_probes: bool,
}

impl Leases {
    /// Leases of this length, all of them just renewed.
    pub fn new(lease_ms: u64, state: &State, now_ms: u64) -> Leases {
        let mut leases = Leases { lease_ms, last_tick_ms: now_ms, backends: BTreeMap::new() };
        leases.track(state, now_ms);
        leases
    }

    /// Follows the state: new backends have a fresh lease, retired ones have none.
    pub fn track(&mut self, state: &State, now_ms: u64) {
        let in_use = |id: &BackendId| state.backends.get(id).is_some_and(|b| b.retired_at_ms.is_none());
        self.backends.retain(|id, _| in_use(id));
        for id in state.backends.keys().filter(|id| in_use(id)) {
            let fresh = || Lease { renewed_ms: now_ms, probers: Vec::new(), results: BTreeMap::new() };
            self.backends.entry(*id).or_insert_with(fresh);
        }
    }

    /// The backend's agent has been heard of.
    pub fn renew(&mut self, id: BackendId, now_ms: u64) {
        if let Some(lease) = self.backends.get_mut(&id) {
            *lease = Lease { renewed_ms: now_ms, probers: Vec::new(), results: BTreeMap::new() };
        }
    }

    /// A node has probed the backend.
    pub fn probed(&mut self, id: BackendId, prober: &str, answered: bool, now_ms: u64) {
        if let Some(lease) = self.backends.get_mut(&id)
            && !lease.probers.is_empty()
        {
            lease.results.insert(prober.to_owned(), (now_ms, answered));
        }
    }

    /// Whom this node is to probe.
    pub fn to_probe(&self, node: &str) -> impl Iterator<Item = BackendId> {
        let asked = move |lease: &Lease| lease.probers.iter().any(|prober| prober == node);
        self.backends.iter().filter(move |(_, lease)| asked(lease)).map(|(id, _)| *id)
    }

    /// Looks at all leases. `muxes` and `agents` name the live nodes.
    pub fn tick(&mut self, state: &State, muxes: &[&str], agents: &[&str], now_ms: u64) -> Tick {
        let half = self.lease_ms / 2;
        // A controller that stood still knows nothing of the meantime: every lease begins anew.
        if now_ms.saturating_sub(self.last_tick_ms) > half {
            self.backends.values_mut().for_each(|lease| lease.renewed_ms = lease.renewed_ms.max(now_ms));
        }
        self.last_tick_ms = now_ms;
        let mut tick = Tick::default();
        for (id, lease) in &mut self.backends {
            let health = state.health(*id);
            let age = now_ms.saturating_sub(lease.renewed_ms);
            if !matches!(health, Health::Live | Health::Suspect) || (health == Health::Live && age < half) {
                lease.probers.clear();
                continue;
            }
            let name = state.backends.get(id).map_or("", |backend| &backend.name);
            let probers = probers(*id, name, muxes, agents);
            tick.new_probes |= probers.iter().any(|prober| !lease.probers.contains(prober));
            lease.probers = probers;
            if health == Health::Live && age < self.lease_ms {
                continue;
            }
            let since = now_ms.saturating_sub(self.lease_ms);
            // Every prober must have looked in vain: one alone may be cut off from the backend itself, and to take a
            // live backend for dead breaks its connections.
            let in_vain = |prober: &String| {
                lease.results.get(prober).is_some_and(|(at, answered)| *at >= since && !answered)
            };
            let dead = !lease.probers.is_empty() && lease.probers.iter().all(in_vain);
            let verdict = if dead { Health::Dead } else { Health::Suspect };
            if verdict != health {
                tick.verdicts.push((*id, verdict));
            }
        }
        tick
    }
}

/// Who probes a backend: a few of either kind, different ones for different backends.
fn probers(id: BackendId, name: &str, muxes: &[&str], agents: &[&str]) -> Vec<String> {
    let some = |nodes: &[&str]| -> Vec<String> {
        let first = usize::from(id.0) % nodes.len().max(1);
        let others = nodes[first..].iter().chain(&nodes[..first]).filter(|node| **node != name);
        others.take(PROBERS).map(|node| (*node).to_owned()).collect()
    };
    [some(muxes), some(agents)].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Backend;

    const LEASE: u64 = 3000;
    const B: BackendId = BackendId(1);

    fn state(health: Health) -> State {
        let backend =
            Backend { name: "b".into(), address: "10.0.0.1".parse().unwrap(), health, retired_at_ms: None };
        State { backends: [(B, backend)].into(), ..State::default() }
    }

    /// Ticks every 100 ms up to `until`, and returns the last tick.
    fn run(leases: &mut Leases, state: &State, muxes: &[&str], until: u64) -> Tick {
        let mut last = Tick::default();
        while leases.last_tick_ms < until {
            last = leases.tick(state, muxes, &["b"], leases.last_tick_ms + 100);
        }
        last
    }

    #[test]
    fn probes_begin_at_half_a_lease_and_never_ask_the_backend_itself() {
        let state = state(Health::Live);
        let mut leases = Leases::new(LEASE, &state, 0);
        assert_eq!(run(&mut leases, &state, &["m"], 1400), Tick::default());
        assert_eq!(leases.to_probe("m").count(), 0);
        assert!(run(&mut leases, &state, &["m"], 1500).new_probes);
        assert_eq!(leases.to_probe("m").collect::<Vec<_>>(), [B]);
        assert_eq!(leases.to_probe("b").count(), 0);
        assert!(!run(&mut leases, &state, &["m"], 1600).new_probes);
        leases.renew(B, 1650);
        assert_eq!(leases.to_probe("m").count(), 0);
        assert_eq!(run(&mut leases, &state, &["m"], 3100), Tick::default());
    }

    #[test]
    fn the_end_of_the_lease() {
        let live = state(Health::Live);
        let verdict = |results: &[(&str, bool)]| {
            let mut leases = Leases::new(LEASE, &live, 0);
            run(&mut leases, &live, &["m", "n"], 2900);
            for (prober, answered) in results {
                leases.probed(B, prober, *answered, 2900);
            }
            run(&mut leases, &live, &["m", "n"], 3000).verdicts
        };
        assert_eq!(verdict(&[]), [(B, Health::Suspect)]);
        assert_eq!(verdict(&[("m", false), ("n", true)]), [(B, Health::Suspect)]);
        assert_eq!(verdict(&[("m", false)]), [(B, Health::Suspect)]);
        assert_eq!(verdict(&[("m", false), ("n", false)]), [(B, Health::Dead)]);
    }

    #[test]
    fn a_suspect_is_probed_on_and_may_die() {
        let suspect = state(Health::Suspect);
        let mut leases = Leases::new(LEASE, &suspect, 0);
        run(&mut leases, &suspect, &["m"], 100);
        leases.probed(B, "m", true, 100);
        assert_eq!(run(&mut leases, &suspect, &["m"], 5000).verdicts, []);
        leases.probed(B, "m", false, 5000);
        assert_eq!(run(&mut leases, &suspect, &["m"], 5100).verdicts, [(B, Health::Dead)]);
    }

    #[test]
    fn a_controller_that_stood_still_blames_nobody() {
        let state = state(Health::Live);
        let mut leases = Leases::new(LEASE, &state, 0);
        run(&mut leases, &state, &["m"], 500);
        assert_eq!(leases.tick(&state, &["m"], &[], 60_000), Tick::default());
        assert_eq!(run(&mut leases, &state, &["m"], 62_900).verdicts, []);
        assert_eq!(run(&mut leases, &state, &["m"], 63_000).verdicts, [(B, Health::Suspect)]);
    }
}
