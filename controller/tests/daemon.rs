//! The real controller over real HTTP, with `daisyctl` and simulated nodes.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::address;
use common::daemon::{Controller, Node, wait_for};
use daisy_shared::chain::Generation;
use daisy_shared::control::NodeKind;
use daisy_shared::service::Encapsulation;
use serde_json::{Value, json};

const LONG_LEASE: [&str; 2] = ["--lease-ms", "60000"];

struct Site {
    controller: Controller,
    directory: tempfile::TempDir,
}

impl Site {
    fn new(flags: &[&str]) -> Site {
        let directory = tempfile::tempdir().unwrap();
        let controller = Controller::start(&directory.path().join("store"), flags);
        Site { controller, directory }
    }

    /// With service `web` of 64 buckets.
    fn with_web(flags: &[&str]) -> Site {
        let site = Site::new(flags);
        site.controller.ctl("service add web --vip 203.0.113.1 --port 80 --buckets 64");
        site
    }

    /// Adds a backend, and an agent that has everything that is known of it.
    fn backend(&self, number: u8) -> Node {
        let (name, address) = (format!("b{number}"), address(number));
        self.controller.ctl(&format!("backend add web {name} --address {address}"));
        let mut agent = Node::new(&self.controller, NodeKind::Agent, &name, address);
        agent.sync(0);
        agent
    }

    fn mux(&self, number: u8) -> Node {
        Node::new(&self.controller, NodeKind::Mux, &format!("m{number}"), address(100 + number))
    }
}

/// How many buckets of the node's only table have this head.
fn heads(node: &Node, id: u16) -> usize {
    let table = node.tables.values().next().unwrap();
    table.values().filter(|entry| entry.chain.first().is_some_and(|owner| owner.0 == id)).count()
}

#[test]
fn scale_out_reaches_agents_first_and_then_the_muxes() {
    let site = Site::with_web(&LONG_LEASE);
    let mut b0 = site.backend(0);
    let mut mux = site.mux(0);
    mux.sync(0);
    b0.sync(0);
    mux.sync(1000);
    assert_eq!((mux.applied().1, heads(&mux, 0)), (Generation(1), 64));

    // Nobody has heard of b1: it waits, and the answer says what will happen.
    let answer = site.controller.ctl(&format!("backend add web b1 --address {}", address(1)));
    assert_eq!(
        (&answer["changed"], &answer["plan"]["moved_buckets"]),
        (&json!(true), &json!(32)),
        "{answer}"
    );
    assert_eq!(answer["plan"]["per_backend"]["b1"], json!({"before": 0, "after": 32}));
    assert_eq!(site.controller.backend("web", "b1").unwrap()["state"], "joining");
    assert_eq!(site.controller.backend("web", "b1").unwrap()["head_buckets"], 0);

    let mut b1 = Node::new(&site.controller, NodeKind::Agent, "b1", address(1));
    b1.sync(0);
    assert_eq!((b1.applied().1, heads(&b1, 1)), (Generation(2), 32), "its first sync brings it its buckets");
    // The mux waits while the agents do not.
    let waiting = std::thread::spawn(move || {
        while mux.applied().1 == Generation(1) {
            mux.sync(1000);
        }
        mux
    });
    b0.sync(0);
    assert_eq!((b0.applied().1, b0.tables.values().next().unwrap().len()), (Generation(2), 64));
    b0.sync(0);
    b1.sync(0);
    let mux = waiting.join().unwrap();
    assert_eq!((heads(&mux, 0), heads(&mux, 1)), (32, 32));
    let moved = mux.tables.values().next().unwrap().values().filter(|entry| entry.chain.len() == 2);
    assert!(moved.clone().all(|entry| entry.generation == Generation(2)) && moved.count() == 32);
    assert_eq!(site.controller.backend("web", "b1").unwrap()["state"], "active");
    assert_eq!(site.controller.events("backend-back", "b1"), 1);
}

#[test]
fn an_agent_that_knocked_before_it_was_added_takes_buckets_at_once() {
    let site = Site::with_web(&LONG_LEASE);
    site.backend(0);
    let b1 = Node::new(&site.controller, NodeKind::Agent, "b1", address(1));
    assert!(b1.is_spare());
    assert_eq!(site.controller.events("node-joined", "b1"), 0);
    let answer = site.controller.ctl(&format!("backend add web b1 --address {}", address(1)));
    assert_eq!((&answer["generation"], &answer["plan"]["moved_buckets"]), (&json!(2), &json!(32)));
    assert_eq!(site.controller.backend("web", "b1").unwrap()["state"], "active");
}

#[test]
fn a_drain_ends_by_the_backends_own_word() {
    let site = Site::with_web(&LONG_LEASE);
    let (mut b0, mut b1) = (site.backend(0), site.backend(1));
    // b0 was head everywhere before b1 came, and holds nothing of that.
    b0.sync(0);
    let known = b0.applied().1;
    b0.report(0..64, known);
    b0.sync(0);
    let web = site.controller.ctl("service show web");
    assert_eq!((&web["open_windows"], &web["generation"]), (&json!(0), &json!(3)), "{web}");

    b1.sync(0);
    let before = b1.applied().1;
    let dry = site.controller.ctl("backend remove web b1 --dry-run");
    assert_eq!(site.controller.ctl("service show web")["generation"], 3, "a dry run changes nothing");
    assert_eq!(site.controller.ctl("backend remove web b1"), dry);
    assert_eq!(dry["plan"]["moved_buckets"], 32);
    let drain = &site.controller.ctl("drain list")[0];
    assert_eq!(
        (&drain["backend"], &drain["state"], &drain["past_buckets"]),
        (&json!("b1"), &json!("draining"), &json!(32))
    );

    b1.report(0..64, before);
    b1.sync(0);
    assert_eq!(
        site.controller.backend("web", "b1").unwrap()["past_buckets"],
        32,
        "its knowledge was too old"
    );
    let known = b1.applied().1;
    assert_eq!(known, Generation(4));
    b1.report((0..64).chain([9999]), known);
    let response = b1.sync(0);
    assert_eq!(response.removed.len(), 1, "it has left with its last bucket");
    assert_eq!(site.controller.backend("web", "b1"), None);
    assert_eq!(site.controller.ctl("service show web")["open_windows"], 0);
    assert_eq!(site.controller.events("drain-ended", "b1"), 1);
    assert!(b1.is_spare());
    b0.sync(0);
    assert_eq!(b0.dead, ["b1"], "who is gone stays in the directory for a while, to be skipped");
}

#[test]
fn the_end_of_a_lease() {
    let site = Site::with_web(&["--lease-ms", "1500"]);
    let (mut b0, mut b1, mut b2) = (site.backend(0), site.backend(1), site.backend(2));
    let mut mux = site.mux(0);
    for node in [&mut b0, &mut b1, &mut b2] {
        node.sync(0);
    }
    let state =
        |name: &str| site.controller.backend("web", name).unwrap()["state"].as_str().unwrap().to_owned();
    // b1 answers probes and b2 does not; b0 and the mux go on.
    let mut alive = |until: &dyn Fn() -> bool| {
        wait_for("verdicts", || {
            for node in [&mut b0, &mut mux] {
                for probe in node.sync(50).probe {
                    node.probed(probe, probe == address(1));
                }
            }
            until().then_some(())
        });
    };
    alive(&|| state("b1") == "suspect" && state("b2") == "down");
    let view = |name| site.controller.backend("web", name).unwrap();
    assert_eq!(view("b1")["head_buckets"], 0, "a suspect is head of nothing");
    assert!(view("b1")["past_buckets"].as_u64() > Some(0), "but keeps its place");
    assert_eq!((&view("b2")["head_buckets"], &view("b2")["past_buckets"]), (&json!(0), &json!(0)));
    assert_eq!(view("b0")["head_buckets"], 64);
    for (kind, name) in [("lease-expired", "b1"), ("backend-suspect", "b1"), ("backend-dead", "b2")] {
        assert_eq!(site.controller.events(kind, name), 1, "{kind} {name}");
    }
    alive(&|| true);
    assert!(b0.dead.is_empty() || b0.dead == ["b2"]);
    b0.sync(0);
    assert_eq!(b0.dead, ["b2"]);
    assert!(
        b0.tables.values().all(|table| table.values().all(|entry| !entry.chain.iter().any(|o| o.0 == 2)))
    );

    b1.sync(0);
    b2.sync(0);
    assert_eq!((state("b1"), state("b2")), ("active".into(), "active".into()));
    assert!(b2.dead.is_empty());
    let counts = ["b0", "b1", "b2"].map(|name| view(name)["head_buckets"].as_u64().unwrap());
    assert!(counts.iter().all(|count| (21..=22).contains(count)), "{counts:?}");
}

#[test]
fn a_silent_mux_is_shown_as_expired_and_changes_nothing() {
    let site = Site::with_web(&["--lease-ms", "1000"]);
    let mut b0 = site.backend(0);
    site.mux(0).sync(0);
    let expired = || {
        b0.sync(0);
        let muxes = site.controller.ctl("mux list");
        (muxes[0]["lease"] == "expired").then_some(muxes)
    };
    let muxes = wait_for("expiry", expired);
    assert_eq!(muxes[0]["counters"]["received"], 7);
    assert_eq!(b0.sync(0).directory, None, "agents still take packets from it");
    // A mux of the same name may come back from elsewhere now, but not while it lives.
    let mut elsewhere = site.mux(0);
    elsewhere.request.address = address(200);
    elsewhere.sync(0);
    let (status, detail) = site.mux(0).ask().unwrap_err();
    assert_eq!(status, 409);
    assert!(detail.contains("10.0.0.210"), "{detail}");
    assert_eq!(b0.sync(0).directory.unwrap().muxes, [address(200)]);
    wait_for("removal", || site.controller.ctl_raw("mux remove m0").status.success().then_some(()));
    assert_eq!(site.controller.ctl("mux list"), json!([]));
    assert_eq!(site.controller.events("mux-removed", "m0"), 1);
}

#[test]
fn a_node_that_waits_is_woken() {
    let site = Site::with_web(&LONG_LEASE);
    let mut b0 = site.backend(0);
    let nothing = b0.sync(0);
    assert!(nothing.directory.is_none() && nothing.tables.is_empty() && nothing.lease_ms == 60_000);
    // A third of the lease would be longer than any test has patience for.
    let waiting = std::thread::spawn(move || (b0.sync(20_000), std::time::Instant::now()));
    let began = std::time::Instant::now();
    site.backend(1);
    let (response, _) = waiting.join().unwrap();
    assert!(response.directory.is_some() || !response.tables.is_empty());
    assert!(began.elapsed() < std::time::Duration::from_secs(15));
}

#[test]
fn a_restart_keeps_everything_and_a_restored_backup_is_rebased() {
    let mut site = Site::with_web(&LONG_LEASE);
    let (store, backup) = (site.directory.path().join("store"), site.directory.path().join("backup"));
    let (mut b0, mut b1) = (site.backend(0), site.backend(1));
    let mut mux = site.mux(0);
    let restart = |site: &mut Site, nodes: &mut [&mut Node]| {
        site.controller = Controller::start(&store, &LONG_LEASE);
        for node in nodes {
            node.moved_to(&site.controller);
        }
    };
    let stop = |site: &mut Site| {
        let placeholder = Controller::start(&site.directory.path().join("other"), &[]);
        std::mem::replace(&mut site.controller, placeholder).kill();
    };
    for _ in 0..2 {
        b0.sync(0);
        b1.sync(0);
    }
    mux.sync(0);
    b0.sync(0);
    b1.sync(0);
    mux.sync(500);
    let shown = site.controller.ctl("service list");
    stop(&mut site);
    std::fs::copy(&store, &backup).unwrap();
    restart(&mut site, &mut [&mut b0, &mut b1, &mut mux]);
    assert_eq!(site.controller.ctl("service list"), shown);
    for node in [&mut b0, &mut b1, &mut mux] {
        let response = node.sync(0);
        assert!(response.tables.is_empty() && response.directory.is_none(), "{}: {response:?}", node.name);
    }

    // Two changes, which the backup does not have.
    site.controller.ctl("backend weight web b1 10");
    site.controller.ctl("backend weight web b1 20");
    b0.sync(0);
    assert_eq!(b0.applied().1, Generation(4));
    stop(&mut site);
    std::fs::copy(&backup, &store).unwrap();
    restart(&mut site, &mut [&mut b0, &mut b1, &mut mux]);
    let response = b0.sync(0);
    assert_eq!(response.tables[0].piece.from, None);
    assert_eq!(b0.applied().1, Generation(5));
    assert!(response.tables[0].piece.entries.iter().all(|entry| entry.generation == Generation(5)));
    assert_eq!(site.controller.events("rebased", "b0"), 1);
    let web = site.controller.ctl("service show web");
    assert_eq!((&web["generation"], &web["backends"][1]["weight"]), (&json!(5), &json!(100)));
}

#[test]
fn a_node_cannot_push_the_controller_around_the_circle() {
    let site = Site::with_web(&LONG_LEASE);
    let mut b0 = site.backend(0);
    b0.sync(0);
    let (id, generation) = b0.applied();
    let honest = b0.request.clone();
    for directory in [u64::MAX, 1 << 53] {
        b0.request.directory = directory;
        assert_eq!(b0.ask().unwrap_err().0, 422, "directory {directory}");
    }
    b0.request = honest;
    for ahead in [(1 << 31) - 1, 1 << 31, (1 << 30) + 1] {
        b0.request.applied.insert(id, Generation(generation.0.wrapping_add(ahead)));
        let (status, detail) = b0.ask().unwrap_err();
        assert_eq!(status, 422, "{detail}");
    }
    assert_eq!(site.controller.events("rebased", "b0"), 0);
    b0.request.applied.insert(id, Generation(generation.0 + (1 << 30)));
    b0.sync(0);
    assert_eq!(b0.applied().1, Generation(generation.0 + (1 << 30) + 1));
}

#[test]
fn a_controller_with_the_wrong_store_takes_no_service_from_anybody() {
    let site = Site::with_web(&LONG_LEASE);
    let (mut b0, mut mux) = (site.backend(0), site.mux(0));
    for _ in 0..2 {
        b0.sync(0);
        mux.sync(0);
    }
    wait_for("a table for the mux", || {
        mux.sync(0);
        (!mux.request.applied.is_empty()).then_some(())
    });
    let other = Controller::start(&site.directory.path().join("misspelt"), &LONG_LEASE);
    for node in [&mut b0, &mut mux] {
        node.moved_to(&other);
        let (status, detail) = node.ask().unwrap_err();
        assert!(status == 409 && detail.contains("is --store right?"), "{detail}");
    }
    assert_eq!(other.ctl("mux list"), json!([]));
    // Who wants to begin anew can.
    other.ctl("service add new --vip 203.0.113.2 --port 80 --buckets 64");
    assert_eq!(mux.sync(0).removed.len(), 1);
}

#[test]
fn a_bad_start_is_one_line() {
    let directory = tempfile::tempdir().unwrap();
    let store = directory.path().join("missing/store");
    let store = store.to_str().unwrap();
    let cases: [(&[&str], &str, &str); 5] = [
        (&["--store", store], "info", "No such file or directory"),
        (&["--bogus"], "info", "--bogus"),
        (&["--listen", "nonsense"], "info", "nonsense"),
        (&["--lease-ms", "1"], "info", "--lease-ms"),
        (&["--store", store], "=====", "RUST_LOG"),
    ];
    for (flags, log, named) in cases {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_daisy-controller"))
            .args(flags)
            .env("RUST_LOG", log)
            .output()
            .unwrap();
        let line = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), line.lines().count()), (Some(2), 1), "{line}");
        assert_eq!(line.matches(named).count(), 1, "{line}");
    }
}

#[test]
fn force_says_how_many_buckets_it_cut() {
    let site = Site::with_web(&LONG_LEASE);
    let (mut b0, _b1) = (site.backend(0), site.backend(1));
    let answer = site.controller.ctl("backend remove web b1 --force");
    assert_eq!((&answer["cut_buckets"], &answer["plan"]["moved_buckets"]), (&json!(32), &json!(32)));
    b0.sync(0);
    assert_eq!((heads(&b0, 0), b0.dead.clone()), (64, vec!["b1".to_owned()]));
    let table = site.controller.ctl("table show web --bucket 3");
    assert_eq!(table["buckets"][0]["chain"], json!(["b0"]));
}

#[test]
fn the_last_backend_keeps_its_buckets_while_it_drains() {
    let site = Site::with_web(&LONG_LEASE);
    let _b0 = site.backend(0);
    let answer = site.controller.ctl("backend drain b0");
    assert_eq!(answer["plan"]["moved_buckets"], 0);
    assert!(answer["note"].as_str().unwrap().contains("no backend can take over the 64 buckets of b0"));
    assert_eq!(site.controller.backend("web", "b0").unwrap()["state"], "draining");
    site.controller.ctl("backend undrain b0 --service web");
    assert_eq!(site.controller.backend("web", "b0").unwrap()["state"], "active");
}

#[test]
fn a_service_travels_as_it_was_asked_to() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let controller = Controller::start(&path, &LONG_LEASE);
    controller.ctl("service add plain --vip 203.0.113.1 --port 80 --buckets 64");
    controller.ctl("service add short --vip 203.0.113.2 --port 80 --buckets 64 --encapsulation ipip");
    let body = r#"{"name": "told", "vip": "203.0.113.3", "port": 80, "encapsulation": "ipip"}"#;
    assert_eq!(controller.http("POST", "/v1/services", Some(body), None).0, 201);
    let said = controller.ctl_raw("service add x --vip 203.0.113.4 --port 80 --encapsulation vxlan");
    assert_eq!(said.status.code(), Some(2));
    let said = String::from_utf8(said.stderr).unwrap();
    assert!(said.contains("vxlan") && said.contains("gue, ipip"), "{said}");

    controller.ctl("backend add short b0 --address 10.0.0.10");
    let check = |controller: &Controller| {
        let listed = controller.ctl("service list");
        let listed: Vec<_> =
            listed.as_array().unwrap().iter().map(|s| (&s["name"], &s["encapsulation"])).collect();
        let expected = [("plain", "gue"), ("short", "ipip"), ("told", "ipip")];
        assert_eq!(listed.len(), 3);
        for (name, encapsulation) in expected {
            assert!(listed.contains(&(&json!(name), &json!(encapsulation))), "{listed:?}");
            assert_eq!(controller.ctl(&format!("service show {name}"))["encapsulation"], encapsulation);
        }
        for table in ["service list", "service show short"] {
            let text = String::from_utf8(controller.ctl_raw(table).stdout).unwrap();
            assert!(text.contains("ENCAPSULATION") && text.contains("ipip"), "{text}");
        }
        let agent = Node::new(controller, NodeKind::Agent, "b0", address(0));
        let told = agent.ask().unwrap();
        assert_eq!(told.tables[0].service.encapsulation, Encapsulation::Ipip);
    };
    check(&controller);
    controller.kill();
    check(&Controller::start(&path, &LONG_LEASE));
}

#[test]
fn what_is_refused_names_the_field_and_the_value() {
    let site = Site::with_web(&LONG_LEASE);
    let _b0 = site.backend(0);
    let refused = |method: &str, path: &str, body: &str| -> (u16, Value, Value) {
        let (status, mut problem) = site.controller.http(method, path, Some(body), None);
        assert!((400..500).contains(&status), "{problem}");
        assert_eq!(problem["status"], status);
        assert!(!problem["detail"].as_str().unwrap().contains('\n'));
        (status, problem["field"].take(), problem["value"].take())
    };
    let service = |name: &str, vip: &str, port: u32, buckets: u32| {
        let body = json!({"name": name, "vip": vip, "port": port, "buckets": buckets}).to_string();
        refused("POST", "/v1/services", &body)
    };
    assert_eq!(service("Web", "203.0.113.2", 80, 64), (422, json!("name"), json!("Web")));
    assert_eq!(service("web", "203.0.113.2", 80, 64), (409, json!("name"), json!("web")));
    assert_eq!(service("x", "203.0.113.1", 80, 64), (409, json!("vip"), json!("203.0.113.1")));
    assert_eq!(service("x", "2001:db8::1", 80, 64), (422, json!("vip"), json!("2001:db8::1")));
    assert_eq!(service("x", "10.0.0.10", 80, 64), (409, json!("vip"), json!("10.0.0.10")));
    assert_eq!(service("x", "203.0.113.2", 0, 64), (422, json!("port"), json!(0)));
    assert_eq!(service("x", "203.0.113.2", 80, 100), (422, json!("buckets"), json!(100)));
    assert_eq!(service("x", "203.0.113.2", 65536, 64).0, 400);
    let other = json!({"name": "x", "vip": "203.0.113.2", "port": 80, "encapsulation": "vxlan"});
    let (status, problem) = site.controller.http("POST", "/v1/services", Some(&other.to_string()), None);
    let detail = problem["detail"].as_str().unwrap();
    assert!(status == 400 && detail.contains("`vxlan`") && detail.contains("`gue` or `ipip`"), "{detail}");
    let backend =
        |path: &str, body: Value| refused("PUT", &format!("/v1/services/{path}"), &body.to_string());
    assert_eq!(
        backend("nil/backends/b", json!({"address": "10.0.0.2"})),
        (404, json!("service"), json!("nil"))
    );
    let moved = backend("web/backends/b0", json!({"address": "10.0.0.2"}));
    assert_eq!(moved, (409, json!("address"), json!("10.0.0.2")));
    let taken = backend("web/backends/b9", json!({"address": "10.0.0.10"}));
    assert_eq!(taken, (409, json!("address"), json!("10.0.0.10")));
    let heavy = backend("web/backends/b9", json!({"address": "10.0.0.2", "weight": 1_000_001}));
    assert_eq!(heavy, (422, json!("weight"), json!(1_000_001)));
    assert_eq!(backend("web/backends/b9", json!({"address": "10.0.0.2", "wait": 1})).0, 400);
    for nobodys in ["224.0.0.1", "127.0.0.1", "0.0.0.0", "0.0.0.1", "240.0.0.1", "255.255.255.255"] {
        let answer = backend("web/backends/b9", json!({"address": nobodys}));
        assert_eq!(answer, (422, json!("address"), json!(nobodys)));
    }
    assert_eq!(refused("PATCH", "/v1/services/web/backends/b9", "{}"), (404, json!("backend"), json!("b9")));
    assert_eq!(refused("GET", "/v1/services/web/table?bucket=64", "").1, "bucket");
    assert_eq!(refused("GET", "/v1/services/web/table?bukket=64", "").0, 400);
    assert_eq!(refused("GET", "/v1/nothing", "").0, 404);
    assert_eq!(refused("PATCH", "/v1/services", "{}").0, 405);
    assert_eq!(refused("POST", "/v1/services", &"x".repeat(70_000)).0, 413);
    let same = r#"{"address":"10.0.0.10"}"#;
    let (status, answer) = site.controller.http("PUT", "/v1/services/web/backends/b0", Some(same), None);
    assert_eq!((status, &answer["changed"]), (200, &json!(false)), "putting what is there changes nothing");

    let line = site.controller.ctl_refused("backend drain nobody");
    assert_eq!(line, "daisyctl: backend \"nobody\": no service has such a backend\n");
    let line = site.controller.ctl_refused("service show nobody");
    assert_eq!(line, "daisyctl: service \"nobody\": there is no such service\n");
    assert_eq!(site.controller.ctl_raw("backend drian b0").status.code(), Some(2));
    let mut impostor = Node::new(&site.controller, NodeKind::Agent, "b0", address(1));
    assert_eq!(impostor.ask().unwrap_err().0, 409);
    impostor.request.kind = NodeKind::Mux;
    assert_eq!(impostor.ask().unwrap_err().0, 409, "a backend has this name");
}

#[test]
fn a_token_is_asked_of_everybody() {
    let directory = tempfile::tempdir().unwrap();
    let token_file = directory.path().join("token");
    std::fs::write(&token_file, "s3cret\n").unwrap();
    let token_flag = token_file.to_str().unwrap();
    let controller = Controller::start(&directory.path().join("store"), &["--token-file", token_flag]);
    for (token, status) in [(None, 401), (Some("s3creT"), 401), (Some("s3cre"), 401), (Some("s3cret"), 200)] {
        assert_eq!(controller.http("GET", "/v1/status", None, token).0, status, "{token:?}");
    }
    let refused = controller.ctl_refused("status");
    assert_eq!(refused, "daisyctl: a valid bearer token is required\n");
    let status = controller.ctl(&format!("status --token-file {token_flag}"));
    assert_eq!(status["listening"], controller.url.strip_prefix("http://").unwrap());
    std::fs::write(&token_file, "two\nlines").unwrap();
    let refused = controller.ctl_refused(&format!("status --token-file {token_flag}"));
    assert_eq!(refused, format!("daisyctl: token file {token_flag}: not one word of visible ASCII\n"));
    let off_loopback = std::process::Command::new(env!("CARGO_BIN_EXE_daisy-controller"))
        .args(["--listen", "0.0.0.0:0", "--store"])
        .arg(directory.path().join("second"))
        .output()
        .unwrap();
    assert_eq!(off_loopback.status.code(), Some(2));
    assert_eq!(String::from_utf8(off_loopback.stderr).unwrap().lines().count(), 1);
    assert!(!directory.path().join("second").exists());
}

#[test]
fn tables_are_aligned_and_help_shows_examples() {
    let site = Site::with_web(&LONG_LEASE);
    let _b0 = site.backend(0);
    let text = |arguments: &str| String::from_utf8(site.controller.ctl_raw(arguments).stdout).unwrap();
    let listed = text("backend list web");
    let expected = "SERVICE  NAME  ID  ADDRESS    WEIGHT  STATE   HEAD  TARGET  PAST\n\
                    web      b0     0  10.0.0.10     100  active    64      64     0\n";
    assert_eq!(listed, expected);
    assert_eq!(text("drain list"), "none\n");
    for help in ["--help", "service add --help", "backend weight --help", "table show --help"] {
        assert!(text(help).contains("Example"), "{help}");
    }
    for list in ["service list", "service show web", "status", "node list", "event list", "table show web"] {
        assert!(text(list).lines().count() >= 2, "{list}");
    }
}
