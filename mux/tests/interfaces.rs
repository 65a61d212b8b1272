//! `daisy-mux` between hosts on several interfaces and queues: where packets leave, what becomes of VLAN tags, and
//! what an overload and an end in the middle of it do to its frames. Needs root.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;
mod harness;
#[path = "../../shared/node/tests/netns/mod.rs"]
mod netns;
mod wire;

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use common::{MUX_MAC, VIP, directory, tcp};
use harness::{BACKENDS, Controller, Daemon, Peer, fails, pass_all, update};
use netns::Host;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket,
};
use serde_json::Value;
use wire::{SECOND_MAC, Wire};

/// Every way of moving packets that serves such networks.
const KINDS: [&[&str]; 5] = [
    &["--io", "xdp", "--xdp-mode", "native"],
    &["--io", "xdp", "--xdp-mode", "generic"],
    &["--io", "af-packet"],
    &["--io", "af-xdp", "--xdp-mode", "native"],
    &["--io", "af-xdp", "--xdp-mode", "generic"],
];

/// A mux, with clients behind its first interface and backends behind its second.
struct Network {
    mux: Host,
    clients: Host,
    backends: Host,
}

impl Network {
    fn new() -> Network {
        let network = Network { mux: Host::new(), clients: Host::new(), backends: Host::new() };
        network.mux.join("eth0", &network.clients, "eth0");
        network.mux.join("eth1", &network.backends, "eth0");
        network.address();
        network
    }

    fn address(&self) {
        self.mux.sh(
            "ip link set eth0 address 02:00:00:00:00:01; ip link set eth1 address 02:00:00:00:00:02
             ip addr add 10.1.0.1/24 dev eth0; ip addr add 10.3.0.1/24 dev eth1; ip route add 10.2.0.0/16 dev eth1",
        );
        self.clients.sh("ip addr add 10.1.0.254/24 dev eth0; ip route add 203.0.113.0/24 via 10.1.0.1");
        self.backends.sh("ip addr add 10.3.0.254/24 dev eth0
             ip route add 203.0.113.0/24 via 10.3.0.1; ip route add 10.1.0.0/24 via 10.3.0.1");
        for backend in 1..=BACKENDS {
            self.backends.sh(&format!("ip addr add {}/32 dev eth0", common::address(backend)));
        }
    }

    /// Starts the daemon, and gives it a table with this chain in every bucket.
    fn start(&self, io: &[&str], chain: &[u16]) -> Running {
        let controller = self.mux.run(Controller::start);
        let state = tempfile::tempdir().unwrap();
        let base = ["--name", "m1", "--interface", "eth0", "--interface", "eth1", "--log-format", "json"];
        let rest = ["--state-dir", state.path().to_str().unwrap(), "--controller", &controller.url];
        let daemon = Daemon::start(&self.mux, &[&base[..], &rest, io].concat());
        let mut table = update(None, 5, chain);
        table.directory = Some(directory(1, 1..=BACKENDS));
        controller.publish(table, 5);
        daemon.said("ready");
        Running { controller, daemon, _state: state }
    }
}

struct Running {
    controller: Controller,
    daemon: Daemon,
    _state: tempfile::TempDir,
}

fn numbers(text: &Value) -> Vec<u64> {
    serde_json::from_str(text.as_str().unwrap()).unwrap()
}

#[test]
fn packets_leave_by_the_interface_of_their_backend() {
    for io in KINDS {
        let network = Network::new();
        let _pass = [&network.clients, &network.backends].map(|host| pass_all(host, "eth0"));
        let Running { controller, daemon, .. } = network.start(io, &[1]);
        let mut peer = Peer::between(&network.clients, &network.backends);
        peer.exchange(2000, |output| assert_eq!((output.backend, &output.gue.walk), (1, &None)));
        controller.publish(update(Some(5), 6, &[2, 1]), 6);
        peer.exchange(2000, |output| assert!(output.backend == 2 && output.gue.walk.is_some()));
        // Clients behind the second interface: in and out by the same.
        peer.packets = network.backends.run(Peer::feed);
        peer.exchange(1000, |output| assert_eq!(output.backend, 2));
        let (last, status) = daemon.terminate();
        assert!(status.success(), "{io:?}: {status}");
        assert_eq!((&last["sent"], &last["conserved"]), (&5000.into(), &true.into()), "{io:?}");
    }
}

/// A frame with VLAN tags.
fn tagged(frame: &[u8], tags: &[(u16, u16)]) -> Vec<u8> {
    let tags: Vec<u8> =
        tags.iter().flat_map(|(kind, id)| [kind.to_be_bytes(), id.to_be_bytes()]).flatten().collect();
    [&frame[..12], &tags, &frame[12..]].concat()
}

#[test]
fn vlan_tags_are_kept() {
    const TAGS: [&[(u16, u16)]; 5] = [
        &[],
        &[(0x8100, 7)],
        &[(0x88a8, 4094)],
        &[(0x88a8, 100), (0x8100, 0x6001)],
        &[(0x8100, 5), (0x8100, 6)],
    ];
    for io in KINDS {
        let network = Network::new();
        let _pass = [&network.clients, &network.backends].map(|host| pass_all(host, "eth0"));
        let Running { controller, daemon, .. } = network.start(io, &[1, 2]);
        let (client, backend) = (network.clients.run(Wire::open), network.backends.run(Wire::open));
        for round in 0..20u16 {
            for (number, tags) in TAGS.into_iter().enumerate() {
                let frame = tcp(1024 + round * 8 + number as u16, VIP, 80, b"tagged");
                client.send(&tagged(&frame, tags));
                let output = backend.receive();
                let tags_len = tags.len() * 4;
                let expected = tagged(&frame, tags);
                assert_eq!(output[12..14 + tags_len], expected[12..14 + tags_len], "{io:?} {tags:?}");
                let untagged = [&output[..12], &output[12 + tags_len..]].concat();
                let outer = common::decapsulate(&untagged);
                assert_eq!(outer.destination, common::address(1));
                assert_eq!(outer.ethernet.source, SECOND_MAC);
                assert!(outer.gue.walk.is_some());
                assert_eq!(outer.inner, frame[14..], "{io:?} {tags:?}");
            }
        }
        // Three tags, and tagged frames for others, are not for us.
        let frame = tcp(1, VIP, 80, b"");
        client.send(&tagged(&frame, &[(0x8100, 1); 3]));
        client.send(&tagged(&tcp(1, Ipv4Addr::new(203, 0, 113, 9), 80, b""), &[(0x8100, 1)]));
        client.send(&frame);
        assert_eq!(common::decapsulate(&backend.receive()).inner, frame[14..]);
        controller.until(|request| request.counters["sent"] == 101);
        let (last, status) = daemon.terminate();
        assert!(status.success(), "{io:?}: {status}");
        assert_eq!(
            (&last["sent"], &last["dropped"], &last["conserved"]),
            (&101.into(), &0.into(), &true.into())
        );
    }
}

/// Sends packets of many flows as fast as it can, from several threads, until it is dropped.
struct Flood {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Flood {
    fn start(clients: &Host) -> Flood {
        let stop = Arc::<AtomicBool>::default();
        let threads = (0..2u16).map(|thread| {
            let stop = Arc::clone(&stop);
            // By IP, as a veth spreads such packets over its queues by flow.
            let raw = clients.run(|| {
                socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw).unwrap()
            });
            let to = SockaddrIn::from(SocketAddrV4::new(VIP, 0));
            std::thread::spawn(move || {
                let frames: Vec<_> =
                    (0..500).map(|i| tcp(1024 + thread * 500 + i, VIP, 80, b"flood")).collect();
                while !stop.load(Ordering::Relaxed) {
                    for frame in &frames {
                        let _full = sendto(raw.as_raw_fd(), &frame[14..], &to, MsgFlags::MSG_DONTWAIT);
                    }
                }
            })
        });
        let threads = threads.collect();
        Flood { stop, threads }
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _panicked = thread.join();
        }
    }
}

/// Tells the daemon to stop, and checks what it says of its frames. Returns what it says in the end.
fn stops_with_all_frames(mut daemon: Daemon, threads: usize) -> Value {
    daemon.ask_to_stop();
    for _ in 0..threads {
        let said = daemon.said("every frame is accounted for");
        let of = |name: &str| said[name].as_u64().unwrap();
        assert_eq!(of("frames"), of("free") + of("fill") + of("send"), "{said}");
        assert_eq!(of("send"), 0, "{said}");
    }
    let last = daemon.said("stopped");
    let status = daemon.child.wait().unwrap();
    assert!(status.success(), "{status}");
    assert_eq!(last["conserved"], true);
    last
}

/// Two interfaces with two queues each, flooded. So many threads are to be busy.
fn overload(io: &[&str], threads: usize, busy: usize) {
    let network = Network::new();
    network.mux.sh("for i in eth0 eth1; do ethtool -L $i rx 2 tx 2; done");
    network.clients.sh("ethtool -L eth0 rx 2 tx 2");
    network.backends.sh("ethtool -L eth0 rx 2 tx 2");
    let Running { controller, daemon, _state } = network.start(io, &[1]);
    let flood = Flood::start(&network.clients);
    controller.until(|request| request.counters["received"] > 50_000);
    // In the middle of it.
    let last = stops_with_all_frames(daemon, threads);
    let by_thread = numbers(&last["received_by_thread"]);
    assert_eq!(by_thread.len(), threads);
    assert_eq!(by_thread.iter().filter(|packets| **packets > 0).count(), busy, "{by_thread:?}");
    // Once more, and this time the load ends first: all that was received has been sent, and nothing is left.
    drop(controller);
    let Running { controller, daemon, _state } = network.start(io, &[1]);
    controller.until(|request| request.counters["received"] > 50_000);
    drop(flood);
    stops_with_all_frames(daemon, threads);
}

#[test]
fn an_overload_that_is_stopped_in_the_middle_leaks_no_frame() {
    let native = ["--io", "af-xdp", "--xdp-mode", "native"];
    overload(&native, 2, 2);
    // One thread serves both queues of both interfaces.
    overload(&[&native[..], &["--cores", "0"]].concat(), 1, 1);
    // Towards a generic program, a veth uses one queue.
    overload(&["--io", "af-xdp", "--xdp-mode", "generic", "--cores", "0-1"], 2, 1);
}

#[test]
fn threads_keep_to_their_cores_and_may_poll_busily() {
    let network = Network::new();
    let io = ["--io", "af-xdp", "--cores", "1", "--busy-poll", "50", "--copy", "copy", "--queues", "0"];
    let Running { daemon, .. } = network.start(&io, &[1]);
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.child.id())).unwrap();
    let mut cores = BTreeMap::new();
    for task in tasks {
        let path = task.unwrap().path();
        let name = fs::read_to_string(path.join("comm")).unwrap().trim().to_owned();
        let status = fs::read_to_string(path.join("status")).unwrap();
        let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
        cores.insert(name, allowed.trim().to_owned());
    }
    assert_eq!(cores["io-0"], "1", "{cores:?}");
    assert_ne!(cores["daisy-mux"], "1", "{cores:?}");
    let mut peer = Peer::between(&network.clients, &network.backends);
    peer.exchange(3000, |output| assert_eq!(output.backend, 1));
    stops_with_all_frames(daemon, 1);
}

#[test]
fn auto_takes_the_best_and_says_why() {
    let network = Network::new();
    let Running { daemon, .. } = network.start(&["--io", "auto", "--queues", "0"], &[1]);
    let mut peer = Peer::between(&network.clients, &network.backends);
    peer.exchange(500, |_| {});
    stops_with_all_frames(daemon, 1);

    // Too long packets for AF_XDP, and cores for those that have threads: each kind that cannot be is named, with the
    // reason.
    let network = Network::new();
    network.mux.sh("ip link set eth0 mtu 9000");
    let state = tempfile::tempdir().unwrap();
    let base = ["--name", "m1", "--interface", "eth0", "--log-format", "json"];
    let rest = ["--state-dir", state.path().to_str().unwrap(), "--controller", "http://127.0.0.1:1"];
    let daemon = Daemon::start(&network.mux, &[&base[..], &rest, &["--cores", "0"]].concat());
    let rejected = loop {
        let said = daemon.said("packet I/O not chosen");
        if said["io"] == "af-xdp" {
            break said["reason"].to_string();
        }
    };
    assert!(rejected.contains("its MTU of 9000 is above"), "{rejected}");
    let chosen = daemon.said("packet I/O chosen");
    assert_eq!((&chosen["io"], &chosen["why"]), (&"af-packet".into(), &"it works on every interface".into()));
    assert!(daemon.terminate().1.success());
}

#[test]
fn flags_that_contradict_each_other_or_the_host_stop_it_with_one_line() {
    let network = Network::new();
    network.mux.sh("ethtool -L eth0 rx 2 tx 2");
    let state = tempfile::tempdir().unwrap();
    let base = ["--name", "m1", "--controller", "http://127.0.0.1:1"];
    let base = [&base[..], &["--state-dir", state.path().to_str().unwrap()]].concat();
    let rows = [
        ("eth0 eth0", "--io af-packet", "interface eth0: is given twice"),
        ("eth0 eth1", "--io af-xdp", "interface eth1: has 1 receive queues, and interface eth0 has 2"),
        ("eth0 eth1", "--io af-xdp --queues 1", "interface eth1: --queues names queue 1, and it has 1"),
        ("eth0", "--io af-xdp --cores 0-1 --queues 1", "--cores: 2 cores are more than the 1 receive queues"),
        ("eth0", "--io af-packet --cores 4000", "--cores: core 4000 does not exist; there are 0,1"),
        ("eth0", "--io af-packet --cores 0,0", "0 is named twice"),
        ("eth0", "--io af-packet --cores one", "\"one\" is not a list of numbers"),
        ("eth0", "--io af-packet --queues 0", "--queues: means nothing to --io af-packet"),
        ("eth0", "--io af-packet --busy-poll 10", "--busy-poll: means nothing to --io af-packet"),
        ("eth0", "--io af-packet --copy copy", "--copy: means nothing to --io af-packet"),
        ("eth0", "--io af-packet --xdp-mode native", "--xdp-mode: means nothing to --io af-packet"),
        ("eth0", "--io af-xdp --copy zero", "interface eth0 queue 0: the driver has no zero-copy"),
        (
            "eth0",
            "--io af-xdp --copy zero --xdp-mode generic",
            "interface eth0: --copy zero needs the XDP program in the driver",
        ),
        ("eth0", "--io af-xdp --busy-poll 0", "invalid value '0' for '--busy-poll"),
    ];
    for (interfaces, flags, expected) in rows {
        let interfaces = interfaces.split(' ').flat_map(|name| ["--interface", name]);
        let arguments: Vec<&str> = base.iter().copied().chain(interfaces).chain(flags.split(' ')).collect();
        let (code, said) = fails(&network.mux, &arguments);
        let last = said.lines().last().unwrap_or_default();
        assert_eq!(code, Some(2), "{flags}: {said}");
        assert!(last.starts_with("error: ") && last.contains(expected), "{flags}: {said}");
        let log_lines = said.lines().filter(|line| !line.contains("INFO") && !line.contains("WARN"));
        assert_eq!(log_lines.count(), 1, "{said}");
    }
    // A core that this process may not use.
    let only = format!(
        "taskset -c 0 {} {} --interface eth0 --io af-packet --cores 1 2>&1 | grep -q 'core 1 is not allowed for this \
         process; there are 0'",
        env!("CARGO_BIN_EXE_daisy-mux"),
        base.join(" ")
    );
    network.mux.sh(&only);
    assert_eq!(
        MUX_MAC,
        [2, 0, 0, 0, 0, 1],
        "the mux's first interface has the address that frames are made for"
    );
}
