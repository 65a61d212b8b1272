//! The real controller on a loopback port, `daisyctl`, and simulated nodes.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::net::IpAddr;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use daisy_shared::bucket::Entry;
use daisy_shared::chain::Generation;
use daisy_shared::control::{DrainReport, NodeKind, ProbeResult, SyncRequest, SyncResponse};
use daisy_shared::service::ServiceId;
use serde_json::Value;

/// How long a test waits for what must come.
const PATIENCE: Duration = Duration::from_secs(20);

/// A running controller; killed when dropped.
pub struct Controller {
    child: Child,
    pub url: String,
    reader: Option<std::thread::JoinHandle<()>>,
}

impl Controller {
    /// Starts it with this store, and waits until it says that it is ready.
    pub fn start(store: &Path, flags: &[&str]) -> Controller {
        let mut child = Command::new(env!("CARGO_BIN_EXE_daisy-controller"))
            .args(["--listen", "127.0.0.1:0", "--log-format", "json", "--store"])
            .arg(store)
            .args(flags)
            .env("RUST_LOG", "info")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let ready = lines
            .by_ref()
            .map_while(Result::ok)
            .map(|line| serde_json::from_str::<Value>(&line).unwrap_or_else(|_| panic!("{line}")))
            .find(|line| line["fields"]["message"] == "ready")
            .expect("a controller that is ready");
        let url = format!("http://{}", ready["fields"]["listening"].as_str().unwrap());
        // Reads on, so that the controller never waits for whoever reads its log.
        let reader = std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        Controller { child, url, reader: Some(reader) }
    }

    /// SIGKILL.
    pub fn kill(mut self) {
        self.stop();
    }

    fn stop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
    }

    /// Runs `daisyctl` with JSON output.
    pub fn ctl(&self, arguments: &str) -> Value {
        let output = self.ctl_raw(&format!("{arguments} --output json"));
        assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Runs `daisyctl`, which is refused; what it says.
    pub fn ctl_refused(&self, arguments: &str) -> String {
        let output = self.ctl_raw(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    pub fn ctl_raw(&self, arguments: &str) -> Output {
        let arguments = arguments.split_whitespace();
        let mut command = Command::new(env!("CARGO_BIN_EXE_daisyctl"));
        command.args(["--controller", &self.url]).args(arguments).output().unwrap()
    }

    /// One request to the API: status and JSON.
    pub fn http(&self, method: &str, path: &str, body: Option<&str>, token: Option<&str>) -> (u16, Value) {
        let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        let mut request = ureq::http::Request::builder().method(method).uri(format!("{}{path}", self.url));
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let mut answer = match body {
            Some(body) => agent.run(request.body(body.to_owned()).unwrap()).unwrap(),
            None => agent.run(request.body(()).unwrap()).unwrap(),
        };
        let status = answer.status().as_u16();
        (status, answer.body_mut().read_json().unwrap())
    }

    /// A backend's view in a service.
    pub fn backend(&self, service: &str, name: &str) -> Option<Value> {
        let all = self.ctl(&format!("backend list {service}"));
        all.as_array().unwrap().iter().find(|backend| backend["name"] == name).cloned()
    }

    /// How many events of this kind there are about this backend or node.
    pub fn events(&self, kind: &str, subject: &str) -> usize {
        let all = self.ctl("event list");
        let events = all["events"].as_array().unwrap();
        events.iter().filter(|event| event["kind"] == kind && event["subject"] == subject).count()
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        if self.reader.is_some() {
            self.stop();
        }
    }
}

/// Tries until something is there.
pub fn wait_for<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = attempt() {
            return found;
        }
        assert!(Instant::now() < end, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A mux or an agent that applies what it is told.
#[derive(Clone)]
pub struct Node {
    url: String,
    http: ureq::Agent,
    pub name: String,
    pub request: SyncRequest,
    pub tables: BTreeMap<ServiceId, BTreeMap<u32, Entry>>,
    /// Backends in the directory that are dead.
    pub dead: Vec<String>,
}

impl Node {
    pub fn new(controller: &Controller, kind: NodeKind, name: &str, address: IpAddr) -> Node {
        let request = SyncRequest {
            kind,
            address,
            version: "test".into(),
            wait_ms: 0,
            directory: 0,
            applied: BTreeMap::new(),
            drained: Vec::new(),
            probed: Vec::new(),
            counters: BTreeMap::from([("received".into(), 7)]),
        };
        let http = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        let url = controller.url.clone();
        Node { url, http, name: name.into(), request, tables: BTreeMap::new(), dead: Vec::new() }
    }

    /// Its controller is another one now.
    pub fn moved_to(&mut self, controller: &Controller) {
        self.url = controller.url.clone();
    }

    /// One request; the answer, or the status and the detail of the problem.
    pub fn ask(&self) -> Result<SyncResponse, (u16, String)> {
        let url = format!("{}/v1/nodes/{}/sync", self.url, self.name);
        let mut answer = self.http.post(&url).send_json(&self.request).unwrap();
        if answer.status().is_success() {
            return Ok(answer.body_mut().with_config().limit(1 << 30).read_json().unwrap());
        }
        let problem: Value = answer.body_mut().read_json().unwrap();
        Err((answer.status().as_u16(), problem["detail"].as_str().unwrap().to_owned()))
    }

    /// Whether no backend is configured for this agent: it is given no table.
    pub fn is_spare(&self) -> bool {
        match self.ask() {
            Ok(response) => response.tables.is_empty(),
            Err((status, _)) => status == 404,
        }
    }

    /// One sync: asks and applies.
    pub fn sync(&mut self, wait_ms: u64) -> SyncResponse {
        self.request.wait_ms = wait_ms;
        let response = self.ask().unwrap_or_else(|problem| panic!("{}: {problem:?}", self.name));
        self.request.drained.clear();
        self.request.probed.clear();
        if let Some(directory) = &response.directory {
            self.request.directory = directory.version;
            let dead = directory.backends.iter().filter(|entry| entry.dead);
            self.dead = dead.map(|entry| entry.name.clone()).collect();
        }
        for update in &response.tables {
            let (id, piece) = (update.service.id, &update.piece);
            let table = self.tables.entry(id).or_default();
            match piece.from {
                None => table.clear(),
                Some(from) => assert_eq!(self.request.applied[&id], from),
            }
            table.extend(piece.entries.iter().map(|entry| (entry.bucket, entry.clone())));
            self.request.applied.insert(id, piece.generation);
        }
        for id in &response.removed {
            self.request.applied.remove(id);
            self.tables.remove(id);
        }
        response
    }

    /// The only service that this node knows, and its generation.
    pub fn applied(&self) -> (ServiceId, Generation) {
        let (id, generation) = self.request.applied.iter().next().expect("a service");
        (*id, *generation)
    }

    /// Reports all of these buckets as drained, with this knowledge.
    pub fn report(&mut self, buckets: impl Iterator<Item = u32>, known: Generation) {
        let service = self.applied().0;
        self.request.drained.push(DrainReport { service, buckets: buckets.map(|b| (b, known)).collect() });
    }

    /// Will say so in the next sync.
    pub fn probed(&mut self, address: IpAddr, answered: bool) {
        self.request.probed.push(ProbeResult { address, answered });
    }
}
