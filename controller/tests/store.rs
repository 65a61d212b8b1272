//! The store: whatever happens to the process, an acknowledged change is there and no other is there by half.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use common::daemon::Controller;
use common::{command, start, steps};
use daisy_controller::core::{self, Command, Context};
use daisy_controller::model::{Change, Health, State};
use daisy_controller::store::{Embedded, StoreError};
use daisy_shared::bucket::BackendId;
use daisy_shared::chain::Generation;
use daisy_shared::service::{Encapsulation, Service};
use proptest::prelude::*;
use rand::RngExt;
use redb::ReadableTable as _;

fn decide(state: &State, command: Command) -> Option<Change> {
    let context = Context { now_unix_ms: 5, heard: &|_| false };
    core::decide(state, command, &context).ok().map(|(change, _)| change)
}

/// The change from nothing to this state.
fn whole(state: &State) -> Change {
    use daisy_controller::model::ServiceChange;
    let service = |s: &daisy_controller::model::ServiceState| {
        let buckets = s.buckets.iter().enumerate().map(|(n, bucket)| (n as u32, bucket.clone())).collect();
        (s.id(), Some(ServiceChange { record: s.record.clone(), buckets }))
    };
    Change {
        meta: Some(state.meta),
        services: state.services.values().map(service).collect(),
        ..Change::default()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn what_is_read_back_is_what_was_applied(script in proptest::collection::vec(steps(), 1..30)) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store");
        let (store, empty) = Embedded::open(&path).unwrap();
        prop_assert_eq!(&empty, &State::default());
        let mut state = start();
        let empty_services = {
            // A service is stored before it has changed buckets, as it is when it is added.
            let mut state = state.clone();
            state.services.values_mut().for_each(|s| s.buckets.iter_mut().for_each(|b| *b = Default::default()));
            state
        };
        store.commit(&empty_services, &whole(&state)).unwrap();
        for step in script {
            let Some(change) = command(&state, &step).and_then(|command| decide(&state, command)) else { continue };
            store.commit(&state, &change).unwrap();
            state.apply(&change);
        }
        drop(store);
        let (_, read) = Embedded::open(&path).unwrap();
        prop_assert_eq!(read, state);
    }
}

#[test]
fn a_second_opening_and_a_newer_schema_are_refused_in_one_line() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let first = Embedded::open(&path).unwrap();
    let second = Embedded::open(&path).unwrap_err();
    assert!(matches!(second, StoreError::InUse(_)), "{second}");
    drop(first);
    {
        let database = redb::Database::open(&path).unwrap();
        let write = database.begin_write().unwrap();
        let meta: redb::TableDefinition<'_, &str, &[u8]> = redb::TableDefinition::new("meta");
        write.open_table(meta).unwrap().insert("schema", &b"2"[..]).unwrap();
        write.commit().unwrap();
    }
    let newer = Embedded::open(&path).unwrap_err().to_string();
    assert!(newer.contains("schema version 2, this program knows 1") && !newer.contains('\n'), "{newer}");
    std::fs::write(&path, "not a store").unwrap();
    assert!(!Embedded::open(&path).unwrap_err().to_string().contains('\n'));
}

/// A service as it was written before it could say how its packets travel.
#[test]
fn a_store_from_before_encapsulations_holds_gue_services() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let (store, _) = Embedded::open(&path).unwrap();
    let mut state = State::default();
    let service = Service { encapsulation: Encapsulation::Ipip, ..common::service(7, 16) };
    let change = decide(&state, Command::AddService(service)).unwrap();
    store.commit(&state, &change).unwrap();
    state.apply(&change);
    drop(store);
    assert_eq!(read(&path), state);
    {
        let database = redb::Database::open(&path).unwrap();
        let write = database.begin_write().unwrap();
        let services: redb::TableDefinition<'_, u32, &[u8]> = redb::TableDefinition::new("services");
        let mut table = write.open_table(services).unwrap();
        let mut row: serde_json::Value =
            serde_json::from_slice(table.get(1007).unwrap().unwrap().value()).unwrap();
        let said = row["service"].as_object_mut().unwrap().remove("encapsulation");
        assert_eq!(said, Some("ipip".into()));
        table.insert(1007, &serde_json::to_vec(&row).unwrap()[..]).unwrap();
        drop(table);
        write.commit().unwrap();
    }
    let older = read(&path);
    let found = &older.service("s7").unwrap().record.service;
    assert_eq!(found, &common::service(7, 16));
    assert_eq!(found.encapsulation, Encapsulation::Gue);
}

const BUCKETS: u32 = 4096;

/// A change that moves many buckets, and its request.
fn request(number: u32) -> (&'static str, String, String, Command) {
    let (service, name) = ("s0".to_owned(), format!("b{}", number % 5));
    let path = format!("/v1/services/s0/backends/{name}");
    if number < 5 {
        let address = common::address(number as u8);
        let body = format!(r#"{{"address":"{address}"}}"#);
        return ("PUT", path, body, Command::PutBackend { service, name, address, weight: None });
    }
    let (weight, drain) = (1 + number.wrapping_mul(7919) % 50, number.is_multiple_of(7));
    let body = format!(r#"{{"weight":{weight},"drain":{drain}}}"#);
    ("PATCH", path, body, Command::PatchBackend { service, name, weight: Some(weight), drain: Some(drain) })
}

fn read(path: &Path) -> State {
    Embedded::open(path).unwrap().1
}

/// Sends changes until the controller is gone; how many it has acknowledged.
fn stream(url: String, first: u32, begun: mpsc::Sender<()>) -> u32 {
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    for number in first.. {
        let (method, path, body, _) = request(number);
        let request = ureq::http::Request::builder().method(method).uri(format!("{url}{path}"));
        match agent.run(request.body(body).unwrap()) {
            Ok(answer) => assert!(answer.status().is_success(), "{}", answer.status()),
            Err(_) => return number,
        }
        let _late = begun.send(());
    }
    unreachable!("there are more numbers than a test has time")
}

#[test]
fn killed_at_any_instant_nothing_acknowledged_is_lost_and_nothing_is_there_by_half() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let flags = ["--lease-ms", "3600000"];
    let controller = Controller::start(&path, &flags);
    controller.ctl(&format!("service add s0 --vip 203.0.113.7 --port 80 --buckets {BUCKETS}"));
    controller.kill();
    let (mut state, mut number, mut unacknowledged) = (read(&path), 0, 0);
    for _ in 0..30 {
        let controller = Controller::start(&path, &flags);
        let (begun, begins) = mpsc::channel();
        let url = controller.url.clone();
        let client = std::thread::spawn(move || stream(url, number, begun));
        begins.recv().unwrap();
        std::thread::sleep(Duration::from_micros(rand::rng().random_range(0..40_000)));
        controller.kill();
        let end = client.join().unwrap();
        for number in number..end {
            let change = decide(&state, request(number).3).unwrap();
            state.apply(&change);
        }
        number = end;
        let found = read(&path);
        if found != state {
            // The one change that was on its way may be there, but then all of it.
            let change = decide(&state, request(number).3).unwrap();
            state.apply(&change);
            assert!(found == state, "change {number} is there by half, or one before it is lost");
            number += 1;
            unacknowledged += 1;
        }
    }
    println!("{number} changes, {unacknowledged} of them stored but not acknowledged");
    assert!(number > 30);
}

#[test]
fn a_restart_moves_nothing_and_bumps_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let controller = Controller::start(&path, &[]);
    controller.ctl("service add web --vip 203.0.113.7 --port 80 --buckets 1024");
    for number in 0..3 {
        controller.ctl(&format!("backend add web b{number} --address {}", common::address(number)));
    }
    controller.ctl("backend drain b1");
    let shown = controller.ctl("table show web");
    let second = std::process::Command::new(env!("CARGO_BIN_EXE_daisy-controller"))
        .args(["--listen", "127.0.0.1:0", "--store"])
        .arg(&path)
        .output()
        .unwrap();
    let line = String::from_utf8(second.stderr).unwrap();
    assert_eq!((second.status.code(), line.lines().count()), (Some(2), 1), "{line}");
    assert!(line.contains("another controller uses it"), "{line}");
    controller.kill();
    let before = read(&path);
    let controller = Controller::start(&path, &[]);
    assert_eq!(controller.ctl("table show web"), shown);
    controller.kill();
    let after = read(&path);
    assert_eq!(after, before);
    assert_eq!(after.service("s0"), None);
    let web = after.service("web").unwrap();
    assert_eq!(web.record.generation, Generation(4));
    assert_eq!((web.figures.standing(BackendId(1)).head, after.health(BackendId(1))), (0, Health::Live));
}
