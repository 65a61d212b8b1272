//! The daemon as a process, on a host of its own, with a scripted controller.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

mod common;
#[path = "../../shared/node/tests/controller/mod.rs"]
mod controller;

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use common::{ME, VIP, ip, lone_interface, on_new_host, service};
use controller::{Controller, PATIENCE};
use daisy_shared::bucket::{BackendId, Entry, Piece};
use daisy_shared::chain::Generation;
use daisy_shared::control::{Directory, DirectoryEntry, DrainReport, SyncResponse, TableUpdate};
use daisy_shared::service::ServiceId;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A running agent. Killed when dropped.
struct Agent {
    child: Child,
    lines: Receiver<String>,
}

impl Agent {
    fn start(bpffs: &Path, state: &Path, controller: &str, more: &[&str]) -> Agent {
        let mut child = Command::new(env!("CARGO_BIN_EXE_daisy-agent"))
            .args([
                "--log-format",
                "json",
                "run",
                "--name",
                "b1",
                "--interface",
                "eth0",
                "--controller",
                controller,
            ])
            .args([Path::new("--bpffs"), bpffs, Path::new("--state-dir"), state])
            .args(["--bucket-capacity", "4096"])
            .args(more)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                // Shown if the test fails.
                eprintln!("{line}");
                let _test_is_over = sender.send(line);
            }
        });
        Agent { child, lines }
    }

    /// Waits for a log line with this message.
    fn until(&self, message: &str) {
        let wanted = format!("\"message\":\"{message}");
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) if line.contains(&wanted) => return,
                Ok(_) => {}
                Err(_) => panic!("the agent does not say {message:?}"),
            }
        }
    }

    fn says(&self, message: &str) -> bool {
        self.lines.try_iter().any(|line| line.contains(&format!("\"message\":\"{message}")))
    }

    fn signal(&mut self, signal: Signal) -> ExitStatus {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
        self.child.wait().unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _waited_already = self.child.wait();
    }
}

fn nothing() -> SyncResponse {
    SyncResponse { lease_ms: 600, ..SyncResponse::default() }
}

/// This backend (0) is head of bucket 1, previous owner of bucket 2, and has nothing to do with bucket 3.
fn everything() -> SyncResponse {
    let backend = |id: u16, name: &str, address: &str| DirectoryEntry {
        id: BackendId(id),
        name: name.into(),
        address: address.parse().unwrap(),
        dead: false,
    };
    let directory = Directory {
        version: 3,
        backends: vec![backend(0, "b1", &ME.to_string()), backend(1, "b2", "10.11.0.77")],
        muxes: vec!["10.11.0.1".parse().unwrap()],
    };
    let entry = |bucket, chain: &[u16]| Entry {
        bucket,
        generation: Generation(10),
        chain: chain.iter().map(|id| BackendId(*id)).collect(),
    };
    let service = service(1, 80, 16);
    let piece = Piece {
        service: service.id,
        from: None,
        generation: Generation(12),
        buckets: 16,
        entries: vec![entry(1, &[0, 1]), entry(2, &[1, 0]), entry(3, &[1])],
    };
    let tables = vec![TableUpdate { service, piece }];
    SyncResponse { directory: Some(directory), tables, ..nothing() }
}

fn is_attached() -> bool {
    ip("link show eth0").contains("xdp")
}

fn has_vip() -> bool {
    ip("address show dev lo").contains(&format!("{VIP}/32"))
}

fn unload(bpffs: &Path, state: &Path) {
    let status = Command::new(env!("CARGO_BIN_EXE_daisy-agent"))
        .args(["unload", "--interface", "eth0"])
        .args([Path::new("--bpffs"), bpffs, Path::new("--state-dir"), state])
        .status();
    assert!(status.unwrap().success());
}

#[test]
fn a_state_directory_that_cannot_be_stops_it_before_it_changes_anything() {
    on_new_host(|bpffs| {
        lone_interface();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let mut agent = Agent::start(bpffs, &file, "http://127.0.0.1:1", &[]);
        assert_eq!(agent.child.wait().unwrap().code(), Some(2));
        let said: Vec<String> = agent.lines.iter().collect();
        assert!(said.len() == 1 && said[0].contains("state directory"), "{said:?}");
        assert!(!bpffs.join("daisy-agent").exists());
    });
}

#[test]
fn starts_reports_stays_starts_again_and_unloads() {
    on_new_host(|bpffs| {
        lone_interface();
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path();
        let controller = Controller::start();

        // Without any knowledge it is not ready.
        let mut agent = Agent::start(bpffs, state, &controller.url, &[]);
        agent.until("waiting for a controller");
        let exchange = controller.next();
        assert!(!is_attached());
        assert_eq!(exchange.request.applied.len(), 0);
        let begun = Instant::now();
        exchange.answer(&everything());
        agent.until("ready");
        assert!(is_attached() && has_vip());
        let request = controller.answer(&nothing());
        assert_eq!(request.applied[&ServiceId(1)], Generation(12));
        assert_eq!(request.directory, 3);
        assert!(request.counters.contains_key("received"), "{:?}", request.counters);

        // Bucket 2 is empty, and nothing new can come: with the generation of the bucket.
        let report = DrainReport { service: ServiceId(1), buckets: vec![(2, Generation(10))] };
        loop {
            let request = controller.answer(&nothing());
            if !request.drained.is_empty() {
                assert_eq!(request.drained, [report]);
                break;
            }
            assert!(begun.elapsed() < PATIENCE, "no drain report");
        }
        assert!(begun.elapsed() > Duration::from_secs(1), "two dumps are a second apart");

        // The data path outlives the daemon, however that ends.
        let exchange = controller.next();
        kill(Pid::from_raw(agent.child.id() as i32), Signal::SIGTERM).unwrap();
        exchange.answer(&nothing());
        agent.until("ending; the data path stays attached");
        assert_eq!(agent.child.wait().unwrap().code(), Some(0));
        assert!(is_attached() && has_vip());

        // From disk, with no controller.
        drop(controller);
        let mut agent = Agent::start(bpffs, state, "http://127.0.0.1:9", &[]);
        agent.until("table restored from disk");
        agent.until("ready");
        agent.signal(Signal::SIGKILL);
        assert!(is_attached() && has_vip());

        // From the pinned maps alone; the controller has forgotten the service.
        let empty = tempfile::tempdir().unwrap();
        std::fs::copy(state.join("vip.json"), empty.path().join("vip.json")).unwrap();
        let controller = Controller::start();
        let mut agent = Agent::start(bpffs, empty.path(), &controller.url, &[]);
        agent.until("ready");
        assert!(has_vip());
        controller.answer(&nothing());
        let exchange = controller.next();
        assert!(!has_vip());
        drop(exchange);
        agent.signal(Signal::SIGTERM);

        unload(bpffs, empty.path());
        assert!(!is_attached());
        assert!(!bpffs.join("daisy-agent").exists());

        // As after a reboot: with the disk alone it waits for a controller, unless it is told otherwise.
        let mut agent = Agent::start(bpffs, state, "http://127.0.0.1:9", &[]);
        agent.until("waiting for a controller");
        agent.signal(Signal::SIGTERM);
        assert!(!is_attached());
        let mut agent = Agent::start(bpffs, state, "http://127.0.0.1:9", &["--bootstrap"]);
        agent.until("table restored from disk");
        agent.until("ready");
        agent.signal(Signal::SIGTERM);
        unload(bpffs, state);
        assert_eq!(std::fs::read_to_string("/proc/sys/net/ipv4/conf/eth0/arp_ignore").unwrap().trim(), "0");
    });
}

#[test]
fn takes_everything_down_if_told_to() {
    on_new_host(|bpffs| {
        lone_interface();
        let state = tempfile::tempdir().unwrap();
        let controller = Controller::start();
        let mut agent =
            Agent::start(bpffs, state.path(), &controller.url, &["--unload-on-exit", "--trust", "10.11.0.1"]);
        controller.answer(&everything());
        agent.until("ready");
        let exchange = controller.next();
        kill(Pid::from_raw(agent.child.id() as i32), Signal::SIGINT).unwrap();
        exchange.answer(&nothing());
        assert_eq!(agent.child.wait().unwrap().code(), Some(0));
        assert!(!is_attached() && !has_vip());
        assert!(!agent.says("ending; the data path stays attached"));
    });
}

#[test]
fn what_cannot_work_is_one_line_and_exit_code_2() {
    let bad = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_daisy-agent")).args(args).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), text.lines().count()), (Some(2), 1), "{args:?}: {text}");
        text
    };
    let run = ["run", "--name", "b1", "--controller", "http://127.0.0.1:9"];
    assert!(bad(&["run", "--name", "b1"]).contains("--interface"));
    assert!(bad(&[&run[..], &["--interface", "daisy-none"]].concat()).contains("daisy-none"));
    for (flag, value) in [
        ("--trust", "10.0.0.0/33"),
        ("--gue-port", "0"),
        ("--xdp-mode", "fast"),
        ("--bucket-capacity", "3"),
        ("--log-format", "xml"),
    ] {
        let text = bad(&[&run[..], &["--interface", "lo", flag, value]].concat());
        assert!(text.contains(value) && text.contains(flag), "{text}");
    }
}
