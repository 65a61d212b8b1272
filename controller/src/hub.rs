//! The one writer of the state, and what readers share with it.
//!
//! A thread of its own takes commands one by one: decides, stores, applies, publishes. It alone changes the state,
//! so what it decided on is what it changes. Readers wait only while a change is applied, never for the disk.
//! Lock order: `tables`, then `live`.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::http::StatusCode;
use daisy_shared::bucket::BackendId;
use daisy_shared::chain::Generation;
use daisy_shared::control::{DrainReport, NodeKind};
use daisy_shared::service::ServiceId;
use tokio::sync::{RwLock, oneshot, watch};

use crate::answer::Answer;
use crate::core::{self, Command, Context};
use crate::events::{Event, Kind, Ring};
use crate::leases::Leases;
use crate::model::{Change, State};
use crate::problem::Problem;
use crate::publish::Publisher;
use crate::store::{Embedded, StoreError};

/// What the tables are and what of them is published.
pub struct Tables {
    /// The state.
    pub state: State,
    /// What of it is published.
    pub publisher: Publisher,
}

/// What is forgotten at a restart.
pub struct Live {
    /// The nodes heard of since the start, by name.
    pub nodes: BTreeMap<String, Node>,
    /// Agents that no backend is configured for: when and from where each was last heard of.
    pub knocks: HashMap<String, (u64, IpAddr)>,
    /// The backends' leases.
    pub leases: Leases,
    /// What happened lately.
    pub events: Ring,
}

/// A node as it last spoke.
#[derive(Clone, Debug)]
pub struct Node {
    /// What it is.
    pub kind: NodeKind,
    /// Its address.
    pub address: IpAddr,
    /// Its software.
    pub version: String,
    /// The directory that it has applied.
    pub directory: u64,
    /// The tables that it has applied.
    pub applied: BTreeMap<ServiceId, Generation>,
    /// Its counters.
    pub counters: BTreeMap<String, u64>,
    /// When it was last heard of.
    pub last_seen_ms: u64,
    /// Whether its lease has ended since.
    pub expired: bool,
    /// When it was last asked to probe a backend.
    pub asked_ms: HashMap<BackendId, u64>,
}

/// The longest list of agents without a backend that is remembered.
const MAX_KNOCKS: usize = 4096;

/// Shared by everything that runs.
pub struct Hub {
    /// How long a node may be silent.
    pub lease_ms: u64,
    /// The tables.
    pub tables: RwLock<Tables>,
    live: Mutex<Live>,
    jobs: mpsc::Sender<Job>,
    started: Instant,
    agents: watch::Sender<u64>,
    muxes: watch::Sender<u64>,
}

/// Ends with the store's error, if it had one.
pub type WriterThread = JoinHandle<Result<(), StoreError>>;

enum Job {
    Command { command: Command, dry_run: bool, reply: oneshot::Sender<Result<Answer, Problem>> },
    Reports { reports: Vec<(BackendId, DrainReport)>, reply: oneshot::Sender<()> },
    Stop,
}

impl Hub {
    /// Starts the writer. Its thread ends when [`Hub::stop`] is called, or with the store's error.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub fn start(store: Embedded, state: State, lease_ms: u64) -> std::io::Result<(Arc<Hub>, WriterThread)> {
        let (jobs, inbox) = mpsc::channel();
        let publisher = Publisher::new(&state);
        let live = Live {
            nodes: BTreeMap::new(),
            knocks: HashMap::new(),
            leases: Leases::new(lease_ms, &state, 0),
            events: Ring::default(),
        };
        let hub = Arc::new(Hub {
            lease_ms,
            tables: RwLock::new(Tables { state, publisher }),
            live: Mutex::new(live),
            jobs,
            started: Instant::now(),
            agents: watch::Sender::new(0),
            muxes: watch::Sender::new(0),
        });
        let writer = Writer { hub: Arc::clone(&hub), store };
        let thread = std::thread::Builder::new().name("writer".into()).spawn(move || writer.run(&inbox))?;
        Ok((hub, thread))
    }

    /// Ends the writer's thread after what it has been given so far.
    pub fn stop(&self) {
        // If the writer is gone already there is nothing to stop.
        let _gone = self.jobs.send(Job::Stop);
    }

    /// Milliseconds since the start.
    pub fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// What is forgotten at a restart. Hold it briefly.
    pub fn live(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what happened.
    pub fn event(&self, event: Event) {
        log(&event);
        self.live().events.push(now_unix_ms(), event);
    }

    /// Carries a command out, or says what it would do.
    ///
    /// # Errors
    /// Why it was refused.
    pub async fn command(&self, command: Command, dry_run: bool) -> Result<Answer, Problem> {
        let (reply, answer) = oneshot::channel();
        let stopping = || Problem::new(StatusCode::SERVICE_UNAVAILABLE, "the controller is stopping");
        self.jobs.send(Job::Command { command, dry_run, reply }).map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())?
    }

    /// Takes the drain reports of a backend.
    pub async fn report(&self, owner: BackendId, reports: Vec<DrainReport>) {
        let (reply, done) = oneshot::channel();
        let reports = reports.into_iter().map(|report| (owner, report)).collect();
        if self.jobs.send(Job::Reports { reports, reply }).is_ok() {
            // An error means that the controller is stopping; the agent will report again.
            let _stopping = done.await;
        }
    }

    /// Follows what may concern a node of this kind.
    pub fn watch(&self, kind: NodeKind) -> watch::Receiver<u64> {
        match kind {
            NodeKind::Mux => self.muxes.subscribe(),
            NodeKind::Agent => self.agents.subscribe(),
        }
    }

    /// Wakes the muxes that wait for something new.
    pub fn wake_muxes(&self) {
        self.muxes.send_modify(|count| *count += 1);
    }

    /// Wakes the agents that wait for something new.
    pub fn wake_agents(&self) {
        self.agents.send_modify(|count| *count += 1);
    }

    /// Remembers an agent that no backend is configured for.
    pub fn knock(&self, name: &str, address: IpAddr) {
        let now = self.now_ms();
        let mut live = self.live();
        if live.knocks.len() >= MAX_KNOCKS {
            live.knocks.retain(|_, (at, _)| *at + self.lease_ms > now);
        }
        if live.knocks.len() < MAX_KNOCKS {
            live.knocks.insert(name.to_owned(), (now, address));
        }
    }
}

/// Milliseconds of Unix time.
pub fn now_unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

fn log(event: &Event) {
    let (service, subject) = (event.service.as_deref(), event.subject.as_deref());
    tracing::info!(kind = ?event.kind, service, subject, detail = event.detail, "event");
}

/// The one that changes the state.
struct Writer {
    hub: Arc<Hub>,
    store: Embedded,
}

impl Writer {
    fn run(&self, inbox: &mpsc::Receiver<Job>) -> Result<(), StoreError> {
        let tick_ms = (self.hub.lease_ms / 30).clamp(5, 100);
        let mut next_tick_ms = tick_ms;
        loop {
            let release_ms = self.hub.tables.blocking_read().publisher.next_release_ms();
            let due_ms = release_ms.map_or(next_tick_ms, |release| release.min(next_tick_ms));
            let patience = Duration::from_millis(due_ms.saturating_sub(self.hub.now_ms()));
            let first = match inbox.recv_timeout(patience) {
                Ok(job) => Some(job),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            };
            // Reports that have come in the meantime become one change.
            let (mut reports, mut replies) = (Vec::new(), Vec::new());
            for job in first.into_iter().chain(inbox.try_iter()) {
                match job {
                    Job::Command { command, dry_run, reply } => {
                        let answer = self.carry_out(command, dry_run)?;
                        // Whoever asked may have gone.
                        let _gone = reply.send(answer);
                    }
                    Job::Reports { reports: more, reply } => {
                        reports.extend(more);
                        replies.push(reply);
                    }
                    Job::Stop => return Ok(()),
                }
            }
            if !reports.is_empty()
                && let Err(problem) = self.carry_out(Command::Reports(reports), false)?
            {
                tracing::error!(%problem, "drain reports refused");
            }
            for reply in replies {
                let _gone = reply.send(());
            }
            let now = self.hub.now_ms();
            if now >= next_tick_ms {
                next_tick_ms = now + tick_ms;
                self.tick(now)?;
            }
            if release_ms.is_some() && self.hub.tables.blocking_write().publisher.release(self.hub.now_ms()) {
                self.hub.wake_muxes();
            }
        }
    }

    fn carry_out(&self, command: Command, dry_run: bool) -> Result<Result<Answer, Problem>, StoreError> {
        let hub = &self.hub;
        let heard = |name: &str| {
            let (now, live) = (hub.now_ms(), hub.live());
            let fresh = |at: u64| at + hub.lease_ms > now;
            live.nodes.get(name).is_some_and(|node| node.kind == NodeKind::Agent && fresh(node.last_seen_ms))
                || live.knocks.get(name).is_some_and(|(at, _)| fresh(*at))
        };
        let tables = hub.tables.blocking_read();
        let context = Context { now_unix_ms: now_unix_ms(), heard: &heard };
        let (change, answer) = match core::decide(&tables.state, command, &context) {
            Ok(decided) => decided,
            Err(problem) => return Ok(Err(problem)),
        };
        if dry_run || change.is_empty() {
            return Ok(Ok(answer));
        }
        self.store.commit(&tables.state, &change)?;
        drop(tables);
        self.apply(change, &heard);
        Ok(Ok(answer))
    }

    /// Makes a stored change, and publishes it.
    fn apply(&self, change: Change, heard: &dyn Fn(&str) -> bool) {
        let hub = &self.hub;
        let now = hub.now_ms();
        {
            let mut tables = hub.tables.blocking_write();
            let Tables { state, publisher } = &mut *tables;
            publisher.record(state, &change, |id| heard(&state.name(id)), now);
            state.apply(&change);
            publisher.release(now);
            let mut live = hub.live();
            live.leases.track(state, now);
            live.knocks.retain(|name, _| state.backend(name).is_none());
            let known = |name: &String, node: &Node| match node.kind {
                NodeKind::Mux => state.muxes.contains_key(name),
                NodeKind::Agent => state.backend(name).is_some(),
            };
            live.nodes.retain(|name, node| known(name, node));
            for event in change.events {
                log(&event);
                live.events.push(now_unix_ms(), event);
            }
        }
        hub.wake_agents();
        hub.wake_muxes();
    }

    fn tick(&self, now: u64) -> Result<(), StoreError> {
        let hub = &self.hub;
        let tick = {
            let tables = hub.tables.blocking_read();
            let mut live = hub.live();
            let Live { nodes, leases, events, .. } = &mut *live;
            for (name, node) in nodes.iter_mut() {
                if !node.expired && node.last_seen_ms + hub.lease_ms <= now {
                    node.expired = true;
                    let event = Event::new(Kind::LeaseExpired, format!("silent for {} ms", hub.lease_ms));
                    let event = event.subject(name);
                    log(&event);
                    events.push(now_unix_ms(), event);
                }
            }
            let of = |kind: NodeKind| -> Vec<&str> {
                let live = nodes.iter().filter(|(_, node)| node.kind == kind && !node.expired);
                live.map(|(name, _)| &name[..]).collect()
            };
            leases.tick(&tables.state, &of(NodeKind::Mux), &of(NodeKind::Agent), now)
        };
        if !tick.verdicts.is_empty()
            && let Err(problem) = self.carry_out(Command::Health(tick.verdicts), false)?
        {
            tracing::error!(%problem, "verdicts refused");
        }
        if tick.new_probes {
            hub.wake_agents();
            hub.wake_muxes();
        }
        Ok(())
    }
}
