//! The node's half of `POST /v1/nodes/{name}/sync`: keeps directory and tables equal to the controller's.
//!
//! The loop asks, applies what the answer says, and asks again; the request after that acknowledges. A node
//! works without a controller for as long as it must, from what it has applied last, and starts so from its
//! disk.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use daisy_shared::bucket::Piece;
use daisy_shared::chain::Generation;
use daisy_shared::control::{
    Directory, DrainReport, NodeKind, ProbeResult, SyncRequest, SyncResponse, TableUpdate,
};
use daisy_shared::service::{Service, ServiceId};
use tracing::{info, warn};

use crate::probe::probe;
use crate::stop::Stop;
use crate::store::{self, Store};

/// Who a node is and with whom it syncs.
#[derive(Clone, Debug)]
pub struct Config {
    /// The node's name, unique among nodes.
    pub name: String,
    /// What it is.
    pub kind: NodeKind,
    /// Its address on the underlay.
    pub address: IpAddr,
    /// The controllers' URLs, such as `http://192.0.2.1:7600`; they are tried in turn.
    pub controllers: Vec<String>,
    /// The bearer token that the controllers want.
    pub token: Option<String>,
    /// Where the last good tables lie.
    pub state_dir: PathBuf,
    /// The version of the node's software.
    pub version: String,
    /// The UDP port at which data paths answer probes.
    pub gue_port: u16,
}

/// What is wrong with a [`Config`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The name is part of a URL and of logs. No controller takes another.
    #[error("node name {0:?} is not 1 to 63 of a-z, 0-9 and '-', or begins or ends with '-'")]
    Name(String),
    /// There must be at least one.
    #[error("no controller is given")]
    NoController,
    /// Not a URL that a controller can have.
    #[error("controller {0:?} is not of the form http://HOST:PORT")]
    Controller(String),
}

impl Config {
    /// Checks what can be checked without a controller.
    ///
    /// # Errors
    /// [`ConfigError`], which names the value.
    pub fn check(&self) -> Result<(), ConfigError> {
        let good = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        let inside = !self.name.starts_with('-') && !self.name.ends_with('-');
        if !inside || !self.name.bytes().all(good) || !(1..=63).contains(&self.name.len()) {
            return Err(ConfigError::Name(self.name.clone()));
        }
        if self.controllers.is_empty() {
            return Err(ConfigError::NoController);
        }
        for url in &self.controllers {
            let authority = url.strip_prefix("http://").map(|rest| rest.trim_end_matches('/'));
            let good = |authority: &str| {
                !authority.is_empty() && !authority.contains(|c: char| c == '/' || c.is_whitespace())
            };
            if !authority.is_some_and(good) {
                return Err(ConfigError::Controller(url.clone()));
            }
        }
        Ok(())
    }
}

/// Why a node does not apply a table. It is sent again, as a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

/// What is kept in sync. All calls come from the thread that runs the loop.
pub trait Node {
    /// A new directory. Comes before the tables that need it.
    fn apply_directory(&mut self, directory: &Directory);

    /// A service, new or known, with a snapshot or a delta of its table. The piece fits the service, and a delta
    /// begins where the last piece that was applied ended.
    ///
    /// # Errors
    /// [`Refused`] if it cannot be applied; then none of it may have been.
    fn apply_table(&mut self, service: &Service, piece: &Piece) -> Result<(), Refused>;

    /// The service is gone.
    fn remove_service(&mut self, service: ServiceId);

    /// A service's whole table as it was applied, for the disk.
    fn snapshot(&self, service: ServiceId) -> Option<Piece>;

    /// The node's counters, by name.
    fn counters(&mut self) -> BTreeMap<String, u64>;

    /// Drain reports (rule 8) that have come up since the last call. They are kept until a controller has them.
    fn drained(&mut self) -> Vec<DrainReport>;

    /// A controller has answered, and all that it said and that was not refused has been applied.
    fn synced(&mut self) {}
}

/// Restores the last good tables from disk and keeps the node in sync until `stop` is set. Then everything is
/// on disk, and the node is handed back.
///
/// # Errors
/// If the kernel gives no thread.
pub fn run<N: Node>(config: Config, node: N, stop: &Stop) -> std::io::Result<N> {
    let mut sync = Sync::new(config, node)?;
    sync.restore();
    Ok(sync.run(stop))
}

/// The longest that a controller is asked to wait: drain reports that come up meanwhile wait as long.
const MAX_WAIT: Duration = Duration::from_secs(1);
/// The lease before a controller has named it.
const DEFAULT_LEASE: Duration = Duration::from_secs(3);
/// Pause after a round in which no controller answered, and after a refused table; doubles up to the longest.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How often a service's table is written to disk at most.
const SAVE_EVERY: Duration = Duration::from_secs(1);
/// An answer without news that comes faster than this is not answered at once: a controller that does not wait
/// must not make the node spin.
const SHORTEST_POLL: Duration = Duration::from_millis(50);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// For the first byte of an answer, beyond the time that the controller was allowed to wait.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// The longest answer that is read, in bytes: a snapshot of the largest table is about 20 MB.
const MAX_ANSWER: u64 = 1 << 30;

/// The sync loop, for those who want to do something between restoring and syncing; see [`run`].
pub struct Sync<N> {
    config: Config,
    node: N,
    store: Store,
    http: ureq::Agent,
    lease: Duration,
    /// Whether any controller has answered since the start.
    answered: bool,
    directory: u64,
    services: BTreeMap<ServiceId, Applied>,
    /// Why tables were refused last, so that the log says it once.
    refused: BTreeMap<ServiceId, Refused>,
    /// Drain reports that no controller has answered yet.
    drained: BTreeMap<ServiceId, BTreeMap<u32, Generation>>,
    probed: Vec<ProbeResult>,
    /// Index of the controller that is asked.
    controller: usize,
    /// How many tries in a row have failed.
    failures: usize,
}

/// A service that the node has.
struct Applied {
    service: Service,
    /// `None`: a table was refused, and a snapshot is wanted.
    generation: Option<Generation>,
    /// The disk lacks what was applied last.
    dirty: bool,
    saved: Option<Instant>,
}

impl<N: Node> Sync<N> {
    /// A node that knows nothing yet.
    ///
    /// # Errors
    /// If the kernel gives no thread.
    pub fn new(config: Config, node: N) -> std::io::Result<Sync<N>> {
        let http = ureq::Agent::config_builder()
            // A proxy from the environment would be a surprise on an underlay.
            .proxy(None)
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_resolve(Some(CONNECT_TIMEOUT))
            .timeout_send_request(Some(ANSWER_TIMEOUT))
            .timeout_send_body(Some(ANSWER_TIMEOUT))
            .timeout_recv_response(Some(MAX_WAIT + ANSWER_TIMEOUT))
            .timeout_recv_body(Some(BODY_TIMEOUT))
            .build()
            .new_agent();
        Ok(Sync {
            store: Store::open(&config.state_dir)?,
            config,
            node,
            http,
            lease: DEFAULT_LEASE,
            answered: false,
            directory: 0,
            services: BTreeMap::new(),
            refused: BTreeMap::new(),
            drained: BTreeMap::new(),
            probed: Vec::new(),
            controller: 0,
            failures: 0,
        })
    }

    /// Applies the last good directory and tables from disk. Returns whether that is something to work from: the
    /// directory, and some table or all that there was.
    pub fn restore(&mut self) -> bool {
        let dir = self.config.state_dir.display().to_string();
        let loaded = match store::load(&self.config.state_dir) {
            Ok(loaded) => loaded,
            Err(error) => {
                warn!(dir, %error, "cannot read the state directory; starting without");
                return false;
            }
        };
        for (file, reason) in &loaded.damaged {
            warn!(file = %file.display(), reason, "damaged state file ignored");
        }
        if let Some(directory) = &loaded.directory {
            self.node.apply_directory(directory);
            self.directory = directory.version;
        }
        let mut whole = loaded.damaged.is_empty();
        for TableUpdate { service, piece } in loaded.tables {
            let generation = piece.generation;
            match self.node.apply_table(&service, &piece) {
                Ok(()) => {
                    info!(service = service.name, %generation, "table restored from disk");
                    let applied =
                        Applied { generation: Some(generation), service, dirty: false, saved: None };
                    self.services.insert(applied.service.id, applied);
                }
                Err(error) => {
                    warn!(service = service.name, %error, "table on disk ignored");
                    whole = false;
                }
            }
        }
        // Without a directory tables only name numbers.
        loaded.directory.is_some() && (whole || !self.services.is_empty())
    }

    /// The node.
    pub fn node(&mut self) -> &mut N {
        &mut self.node
    }

    /// Syncs until `stop` is set. Then everything is on disk, and the node is handed back.
    pub fn run(mut self, stop: &Stop) -> N {
        let mut pause = SHORTEST_PAUSE;
        while !stop.is_set() {
            let request = self.request();
            let begun = Instant::now();
            let good = match self.exchange(&request) {
                Ok(response) => {
                    self.recovered();
                    let news = has_news(&response);
                    let all_applied = self.take(response, &request);
                    if !news && request.wait_ms > 0 {
                        stop.wait_timeout(SHORTEST_POLL.saturating_sub(begun.elapsed()));
                    }
                    all_applied
                }
                Err(reason) => !self.failed(&reason),
            };
            if good {
                pause = SHORTEST_PAUSE;
            } else {
                // Jitter, so that nodes that lost a controller at once do not come back at once.
                stop.wait_timeout(pause.mul_f64(rand::random_range(0.5..1.0)));
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
            self.save(SAVE_EVERY);
        }
        self.save(Duration::ZERO);
        // Dropping the store writes what waits.
        self.node
    }

    fn request(&mut self) -> SyncRequest {
        for report in self.node.drained() {
            self.drained.entry(report.service).or_default().extend(report.buckets);
        }
        let reports = self.drained.iter().map(|(&service, buckets)| DrainReport {
            service,
            buckets: buckets.iter().map(|(&bucket, &generation)| (bucket, generation)).collect(),
        });
        // The first answer is wanted at once, whatever it says.
        let wait =
            if self.answered && self.failures == 0 { (self.lease / 3).min(MAX_WAIT) } else { Duration::ZERO };
        let applied = self.services.iter().filter_map(|(&id, service)| Some((id, service.generation?)));
        SyncRequest {
            kind: self.config.kind,
            address: self.config.address,
            version: self.config.version.clone(),
            wait_ms: wait.as_millis() as u64,
            directory: self.directory,
            applied: applied.collect(),
            drained: reports.collect(),
            // What was true then may not be when another controller is reached: sent once.
            probed: std::mem::take(&mut self.probed),
            counters: self.node.counters(),
        }
    }

    /// Asks the controller whose turn it is. An answer is checked here as far as it can be without the node.
    fn exchange(&self, request: &SyncRequest) -> Result<SyncResponse, String> {
        let base = self.config.controllers[self.controller].trim_end_matches('/');
        let mut post = self.http.post(format!("{base}/v1/nodes/{}/sync", self.config.name));
        if let Some(token) = &self.config.token {
            post = post.header("authorization", format!("Bearer {token}"));
        }
        let mut answer = post.send_json(request).map_err(|error| error.to_string())?;
        let status = answer.status();
        let body = answer.body_mut().with_config().limit(MAX_ANSWER).read_to_vec();
        let body = body.map_err(|error| format!("answer cut short: {error}"))?;
        if status != 200 {
            return Err(problem(status.as_u16(), &body));
        }
        let response: SyncResponse =
            serde_json::from_slice(&body).map_err(|error| format!("malformed answer: {error}"))?;
        if response.lease_ms == 0 {
            return Err("malformed answer: a lease of 0 ms".into());
        }
        for TableUpdate { service, piece } in &response.tables {
            if piece.service != service.id || piece.buckets != service.buckets {
                return Err(format!(
                    "malformed answer: the table of service {} does not fit it",
                    service.name
                ));
            }
        }
        Ok(response)
    }

    /// Applies an answer. Returns whether everything in it could be.
    fn take(&mut self, response: SyncResponse, request: &SyncRequest) -> bool {
        self.lease = Duration::from_millis(response.lease_ms);
        self.forget_reported(&request.drained);
        if let Some(directory) = response.directory {
            self.node.apply_directory(&directory);
            self.directory = directory.version;
            self.store.save_directory(directory);
        }
        let mut all_applied = true;
        for TableUpdate { service, piece } in response.tables {
            all_applied &= self.take_table(service, &piece);
        }
        for id in response.removed {
            self.node.remove_service(id);
            self.store.remove(id);
            self.drained.remove(&id);
            self.refused.remove(&id);
            if let Some(applied) = self.services.remove(&id) {
                info!(service = applied.service.name, "service removed");
            }
        }
        self.answered = true;
        self.node.synced();
        if !response.probe.is_empty() {
            self.probed = probe(self.config.address, self.config.gue_port, &response.probe);
        }
        all_applied
    }

    fn take_table(&mut self, service: Service, piece: &Piece) -> bool {
        let known = self.services.get_mut(&service.id);
        let generation = known.as_ref().and_then(|applied| applied.generation);
        let result = if piece.from.is_some() && piece.from != generation {
            let name = |generation: Option<Generation>| {
                generation.map_or("none".into(), |generation| generation.to_string())
            };
            let (from, has) = (name(piece.from), name(generation));
            Err(Refused(format!("the delta begins at generation {from}, applied is {has}")))
        } else {
            self.node.apply_table(&service, piece)
        };
        match (result, known) {
            (Ok(()), known) => {
                let saved = known.and_then(|applied| applied.saved);
                if self.refused.remove(&service.id).is_some() {
                    info!(service = service.name, generation = %piece.generation, "table applied after all");
                }
                let applied = Applied { generation: Some(piece.generation), dirty: true, saved, service };
                self.services.insert(applied.service.id, applied);
                true
            }
            (Err(error), known) => {
                if let Some(applied) = known {
                    applied.generation = None;
                }
                if self.refused.get(&service.id) != Some(&error) {
                    let generation = piece.generation;
                    warn!(service = service.name, %generation, %error, "table refused; asking for a snapshot");
                    self.refused.insert(service.id, error);
                }
                false
            }
        }
    }

    /// Forgets the drain reports that a controller has answered, except those that have been made anew since.
    fn forget_reported(&mut self, reports: &[DrainReport]) {
        for report in reports {
            if let Some(buckets) = self.drained.get_mut(&report.service) {
                for (bucket, generation) in &report.buckets {
                    if buckets.get(bucket) == Some(generation) {
                        buckets.remove(bucket);
                    }
                }
                if buckets.is_empty() {
                    self.drained.remove(&report.service);
                }
            }
        }
    }

    /// Notes that a controller did not answer well, and turns to the next. Returns whether it is time to pause:
    /// all have been tried.
    fn failed(&mut self, reason: &str) -> bool {
        let controllers = self.config.controllers.len();
        self.failures += 1;
        // Once for each controller, not for each try.
        if self.failures <= controllers {
            let controller = &self.config.controllers[self.controller];
            warn!(controller, reason, "no sync with the controller; going on with what is known");
        }
        self.controller = (self.controller + 1) % controllers;
        self.failures.is_multiple_of(controllers)
    }

    fn recovered(&mut self) {
        if self.failures > 0 || !self.answered {
            info!(controller = self.config.controllers[self.controller], "in sync with the controller");
            self.failures = 0;
        }
    }

    /// Has tables written that have changed and were last written this long ago.
    fn save(&mut self, at_most_every: Duration) {
        for (id, applied) in &mut self.services {
            if !applied.dirty || applied.saved.is_some_and(|at| at.elapsed() < at_most_every) {
                continue;
            }
            if let Some(piece) = self.node.snapshot(*id) {
                self.store.save_table(TableUpdate { service: applied.service.clone(), piece });
            }
            applied.dirty = false;
            applied.saved = Some(Instant::now());
        }
    }

    /// The services that the node has.
    pub fn services(&self) -> BTreeSet<ServiceId> {
        self.services.keys().copied().collect()
    }
}

fn has_news(response: &SyncResponse) -> bool {
    response.directory.is_some()
        || !(response.tables.is_empty() && response.removed.is_empty() && response.probe.is_empty())
}

/// What a controller that does not answer with 200 says (RFC 9457).
fn problem(status: u16, body: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct Problem {
        title: Option<String>,
        detail: Option<String>,
    }
    let problem = serde_json::from_slice(body).ok();
    match problem.and_then(|Problem { title, detail }| detail.or(title)) {
        Some(text) => format!("status {status}: {text}"),
        None => format!("status {status}"),
    }
}
