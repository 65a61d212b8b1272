//! The sync loop against a scripted controller.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

mod controller;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use controller::{Controller, PATIENCE};
use daisy_node::stop::Stop;
use daisy_node::sync::{Config, ConfigError, Node, Refused, run};
use daisy_shared::bucket::{BackendId, Chain, Entry, Piece};
use daisy_shared::chain::Generation;
use daisy_shared::control::{
    Directory, DrainReport, NodeKind, ProbeResult, SyncRequest, SyncResponse, TableUpdate,
};
use daisy_shared::flow::HashKey;
use daisy_shared::service::{Encapsulation, Protocol, Service, ServiceId};

/// Says what it is told, and keeps heads by bucket.
struct Recorder {
    calls: Sender<String>,
    tables: BTreeMap<ServiceId, Piece>,
    refuse: Arc<Mutex<bool>>,
    reports: Arc<Mutex<Vec<DrainReport>>>,
}

impl Node for Recorder {
    fn apply_directory(&mut self, directory: &Directory) {
        self.calls.send(format!("directory {}", directory.version)).unwrap();
    }

    fn apply_table(&mut self, service: &Service, piece: &Piece) -> Result<(), Refused> {
        if *self.refuse.lock().unwrap() {
            return Err(Refused("backend 9 is not in the directory".into()));
        }
        let kind = if piece.from.is_some() { "delta" } else { "snapshot" };
        self.calls.send(format!("{kind} of {} to {}", service.name, piece.generation)).unwrap();
        let table = self.tables.entry(service.id).or_insert_with(|| piece.clone());
        table.generation = piece.generation;
        for entry in &piece.entries {
            table.entries.retain(|old| old.bucket != entry.bucket);
            table.entries.push(entry.clone());
        }
        table.entries.sort_by_key(|entry| entry.bucket);
        Ok(())
    }

    fn remove_service(&mut self, service: ServiceId) {
        self.tables.remove(&service);
        self.calls.send(format!("removed {service}")).unwrap();
    }

    fn snapshot(&self, service: ServiceId) -> Option<Piece> {
        self.tables.get(&service).cloned()
    }

    fn counters(&mut self) -> BTreeMap<String, u64> {
        BTreeMap::from([("received".into(), 3)])
    }

    fn drained(&mut self) -> Vec<DrainReport> {
        std::mem::take(&mut self.reports.lock().unwrap())
    }
}

/// A running node and what is seen of it.
struct Running {
    stop: Stop,
    calls: Receiver<String>,
    refuse: Arc<Mutex<bool>>,
    reports: Arc<Mutex<Vec<DrainReport>>>,
    thread: JoinHandle<Recorder>,
}

impl Running {
    fn start(dir: &Path, controllers: &[&Controller]) -> Running {
        let config = Config {
            name: "agent-1".into(),
            kind: NodeKind::Agent,
            address: "127.0.0.1".parse().unwrap(),
            controllers: controllers.iter().map(|controller| controller.url.clone()).collect(),
            token: Some("s3cret".into()),
            state_dir: dir.to_owned(),
            version: "1.2.3".into(),
            gue_port: 9,
        };
        assert_eq!(config.check(), Ok(()));
        let (sender, calls) = channel();
        let (refuse, reports, stop) = <(Arc<Mutex<bool>>, Arc<Mutex<Vec<_>>>, Stop)>::default();
        let tables = BTreeMap::new();
        let node = Recorder { calls: sender, tables, refuse: refuse.clone(), reports: reports.clone() };
        let flag = stop.clone();
        let thread = std::thread::spawn(move || run(config, node, &flag).unwrap());
        Running { stop, calls, refuse, reports, thread }
    }

    fn call(&self) -> String {
        self.calls.recv_timeout(PATIENCE).expect("a call")
    }

    /// Stops while a request waits, which the controller answers with nothing.
    fn stop(self, controller: &Controller) {
        let exchange = controller.next();
        self.stop.set();
        exchange.answer(&nothing());
        self.thread.join().unwrap();
    }
}

fn nothing() -> SyncResponse {
    SyncResponse { lease_ms: 600, ..SyncResponse::default() }
}

fn update(from: Option<u32>, to: u32, bucket: u32) -> TableUpdate {
    let service = Service {
        id: ServiceId(5),
        name: "web".into(),
        vip: "203.0.113.1".parse().unwrap(),
        protocol: Protocol::Tcp,
        port: 80,
        buckets: 16,
        hash_key: HashKey([1; 16]),
        encapsulation: Encapsulation::Gue,
    };
    let entry = Entry { bucket, generation: Generation(to), chain: Chain::from_iter([BackendId(1)]) };
    let piece = Piece {
        service: service.id,
        from: from.map(Generation),
        generation: Generation(to),
        buckets: 16,
        entries: vec![entry],
    };
    TableUpdate { service, piece }
}

fn tables(tables: Vec<TableUpdate>) -> SyncResponse {
    SyncResponse { tables, ..nothing() }
}

fn applied(request: &SyncRequest) -> Vec<(u32, u32)> {
    request.applied.iter().map(|(service, generation)| (service.0, generation.0)).collect()
}

#[test]
fn applies_acknowledges_and_starts_again_from_disk() {
    let dir = tempfile::tempdir().unwrap();
    let controller = Controller::start();
    let node = Running::start(dir.path(), &[&controller]);
    let exchange = controller.next();
    let head = &exchange.head;
    assert!(head.starts_with("POST /v1/nodes/agent-1/sync HTTP/1.1\r\n"), "{head}");
    assert!(head.to_ascii_lowercase().contains("authorization: bearer s3cret\r\n"), "{head}");
    // The first answer: everything.
    let directory = Directory { version: 7, ..Directory::default() };
    let response = SyncResponse { directory: Some(directory), ..tables(vec![update(None, 10, 3)]) };
    let first = exchange.answer(&response);
    assert_eq!((first.wait_ms, first.directory, first.applied.len()), (0, 0, 0));
    assert_eq!((first.version.as_str(), first.counters["received"]), ("1.2.3", 3));
    assert_eq!([node.call(), node.call()], ["directory 7", "snapshot of web to 10"]);
    // The second request acknowledges it, and waits a third of the lease.
    let second = controller.answer(&tables(vec![update(Some(10), 11, 4)]));
    assert_eq!((second.wait_ms, second.directory, applied(&second)), (200, 7, vec![(5, 10)]));
    assert_eq!(node.call(), "delta of web to 11");
    let third = controller.answer(&nothing());
    assert_eq!(applied(&third), [(5, 11)]);
    node.stop(&controller);

    // No controller at all: the last good state is there, whole.
    let gone = Controller::start();
    let node = Running::start(dir.path(), &[&gone]);
    assert_eq!([node.call(), node.call()], ["directory 7", "snapshot of web to 11"]);
    drop(gone.next());
    node.stop.set();
    let node = node.thread.join().unwrap();
    let buckets: Vec<u32> = node.tables[&ServiceId(5)].entries.iter().map(|entry| entry.bucket).collect();
    assert_eq!(buckets, [3, 4]);

    // The service is removed, from the disk as well.
    let node = Running::start(dir.path(), &[&controller]);
    let request = controller.answer(&SyncResponse { removed: vec![ServiceId(5)], ..nothing() });
    assert_eq!((request.directory, applied(&request)), (7, vec![(5, 11)]));
    node.stop(&controller);
    let node = Running::start(dir.path(), &[&controller]);
    assert_eq!(applied(&controller.answer(&nothing())), []);
    node.stop(&controller);
}

#[test]
fn what_does_not_fit_is_not_applied_and_a_snapshot_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let controller = Controller::start();
    let node = Running::start(dir.path(), &[&controller]);
    controller.answer(&tables(vec![update(None, 10, 3)]));
    assert_eq!(node.call(), "snapshot of web to 10");
    // A delta from elsewhere.
    controller.answer(&tables(vec![update(Some(9), 11, 3)]));
    assert_eq!(applied(&controller.answer(&tables(vec![update(None, 11, 3)]))), []);
    assert_eq!(node.call(), "snapshot of web to 11");
    // The node itself refuses.
    *node.refuse.lock().unwrap() = true;
    assert_eq!(applied(&controller.answer(&tables(vec![update(Some(11), 12, 3)]))), [(5, 11)]);
    let exchange = controller.next();
    *node.refuse.lock().unwrap() = false;
    assert_eq!(applied(&exchange.answer(&tables(vec![update(None, 13, 3)]))), []);
    assert_eq!(node.call(), "snapshot of web to 13");
    // Malformed answers change nothing: not JSON, a damaged table, a table of another service, no lease.
    let good = serde_json::to_string(&tables(vec![update(Some(13), 14, 3)])).unwrap();
    let mut alien = update(Some(13), 14, 3);
    alien.piece.service = ServiceId(6);
    let bodies = [
        "{".to_owned(),
        good.replace("\"piece\":\"RFNZ", "\"piece\":\"RFNY"),
        serde_json::to_string(&tables(vec![alien])).unwrap(),
        good.replace("600", "0"),
    ];
    for body in bodies {
        assert_eq!(applied(&controller.next().answer_raw("200 OK", body.as_bytes())), [(5, 13)], "{body}");
    }
    controller.next().answer_raw("401 Unauthorized", br#"{"title": "no token"}"#);
    assert_eq!(applied(&controller.next().answer_raw("200 OK", good.as_bytes())), [(5, 13)]);
    assert_eq!(node.call(), "delta of web to 14");
    node.stop(&controller);
}

#[test]
fn drain_reports_are_sent_until_they_are_answered() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (Controller::start(), Controller::start());
    let node = Running::start(dir.path(), &[&first, &second]);
    first.answer(&nothing());
    let report = |buckets: &[(u32, u32)]| DrainReport {
        service: ServiceId(5),
        buckets: buckets.iter().map(|(bucket, generation)| (*bucket, Generation(*generation))).collect(),
    };
    // Each controller hangs up; the other is next.
    let exchange = first.next();
    assert_eq!(exchange.request.drained, []);
    node.reports.lock().unwrap().push(report(&[(1, 10), (2, 10)]));
    drop(exchange);
    let exchange = second.next();
    assert_eq!(exchange.request.drained, [report(&[(1, 10), (2, 10)])]);
    node.reports.lock().unwrap().push(report(&[(2, 11), (3, 11)]));
    drop(exchange);
    // Both, and the newer of what was reported twice.
    let both = [report(&[(1, 10), (2, 11), (3, 11)])];
    assert_eq!(first.next().request.drained, both);
    assert_eq!(second.answer(&nothing()).drained, both);
    // Answered: not sent again, and no other controller is asked.
    assert_eq!(second.answer(&nothing()).drained, []);
    node.stop(&second);
}

#[test]
fn probes_are_answered_for() {
    let dir = tempfile::tempdir().unwrap();
    let controller = Controller::start();
    let node = Running::start(dir.path(), &[&controller]);
    let address = "127.0.0.9".parse().unwrap();
    controller.answer(&SyncResponse { probe: vec![address], ..nothing() });
    let expected = [ProbeResult { address, answered: false }];
    assert_eq!(controller.answer(&nothing()).probed, expected);
    assert_eq!(controller.answer(&nothing()).probed, []);
    node.stop(&controller);
}

#[test]
fn what_cannot_work_is_refused_at_start() {
    let good = Config {
        name: "mux-1".into(),
        kind: NodeKind::Mux,
        address: "127.0.0.1".parse().unwrap(),
        controllers: vec!["http://[2001:db8::1]:7600/".into()],
        token: None,
        state_dir: "/nonexistent".into(),
        version: String::new(),
        gue_port: 6080,
    };
    assert_eq!(good.check(), Ok(()));
    for name in ["", "..", "a/b", "a b", "Mux-1", "a_b", "a.b", "-a", "a-", &"x".repeat(64)] {
        let config = Config { name: name.into(), ..good.clone() };
        assert_eq!(config.check(), Err(ConfigError::Name(name.into())));
    }
    for url in ["localhost:7600", "https://a", "http://", "http://a/b"] {
        let config = Config { controllers: vec![url.into()], ..good.clone() };
        assert_eq!(config.check(), Err(ConfigError::Controller(url.into())));
    }
    assert_eq!(Config { controllers: vec![], ..good }.check(), Err(ConfigError::NoController));
}
