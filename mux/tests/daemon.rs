//! `daisy-mux` itself, on veth interfaces between network namespaces, with a scripted controller: every way of
//! moving packets that needs a kernel. Needs root.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;
mod harness;
#[path = "../../shared/node/tests/netns/mod.rs"]
mod netns;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{VIP, directory, service};
use daisy_shared::control::SyncResponse;
use etherparse::{IcmpEchoHeader, Icmpv4Header, Icmpv4Type, IpNumber, Ipv4Header, TcpHeader};
use harness::{BACKENDS, Controller, Daemon, MUX, NOBODYS, PATIENCE, Peer, fails, pass_all, segment, update};
use netns::Host;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, recv, sendto, setsockopt, socket,
    sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use serde_json::Value;

/// The chain in a generation: it is another in each.
fn chain_of(generation: u32) -> [u16; 2] {
    let head = generation as u16 % BACKENDS;
    [head + 1, (head + 1) % BACKENDS + 1]
}

/// Two hosts and a wire.
fn network() -> (Host, Host) {
    let (mux, peer) = (Host::new(), Host::new());
    mux.join("eth0", &peer, "eth0");
    mux.sh("ip addr add 10.1.0.1/24 dev eth0; ip route add 10.2.0.0/16 dev eth0");
    peer.sh("ip addr add 10.1.0.254/24 dev eth0; ip route add 203.0.113.0/24 via 10.1.0.1");
    for backend in 1..=BACKENDS {
        peer.sh(&format!("ip addr add {}/32 dev eth0", common::address(backend)));
    }
    (mux, peer)
}

/// Sends an echo request, and waits for its answer.
fn ping(to: Ipv4Addr) {
    let icmp =
        socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Icmp).unwrap();
    setsockopt(&icmp, sockopt::ReceiveTimeout, &TimeVal::seconds(PATIENCE.as_secs() as i64)).unwrap();
    let echo = IcmpEchoHeader { id: 0xda15, seq: 1 };
    let mut request =
        Icmpv4Header::with_checksum(Icmpv4Type::EchoRequest(echo), b"there?").to_bytes().to_vec();
    request.extend_from_slice(b"there?");
    sendto(icmp.as_raw_fd(), &request, &SockaddrIn::from(SocketAddrV4::new(to, 0)), MsgFlags::empty())
        .unwrap();
    let mut bytes = [0; 200];
    loop {
        let length = recv(icmp.as_raw_fd(), &mut bytes, MsgFlags::empty()).expect("no answer to a ping");
        let (_, rest) = Ipv4Header::from_slice(&bytes[..length]).unwrap();
        if Icmpv4Header::from_slice(rest).unwrap().0.icmp_type == Icmpv4Type::EchoReply(echo) {
            return;
        }
    }
}

fn has_program(host: &Host) -> bool {
    host.run(|| {
        let links = Command::new("ip").args(["-j", "link", "show", "eth0"]).output().unwrap().stdout;
        let links: Value = serde_json::from_slice(&links).unwrap();
        !links[0]["xdp"].is_null()
    })
}

fn all_named(counters: &BTreeMap<String, u64>) -> (u64, u64) {
    let of = |name: &str| counters.get(name).copied().unwrap_or(0);
    let dropped: u64 = counters.iter().filter(|(name, _)| name.starts_with("dropped_")).map(|(_, n)| n).sum();
    (of("received"), of("sent") + of("passed") + dropped)
}

fn forwards(io: &[&str]) {
    let (mux_host, peer_host) = network();
    let _pass = pass_all(&peer_host, "eth0");
    let controller = mux_host.run(Controller::start);
    let state = tempfile::tempdir().unwrap();
    let state_dir = state.path().to_str().unwrap();
    let base = ["--name", "m1", "--interface", "eth0", "--state-dir", state_dir, "--log-format", "json"];
    let arguments = [&base[..], &["--controller", &controller.url], io].concat();
    let daemon = Daemon::start(&mux_host, &arguments);
    daemon.said("no table on disk; waiting for a controller");
    let mut peer = peer_host.run(Peer::start);

    // A table comes, and packets go where it says.
    let mut first = update(None, 5, &[1]);
    first.directory = Some(directory(1, 1..=2));
    controller.publish(first, 5);
    daemon.said("ready");
    peer.exchange(2000, |output| assert_eq!((output.backend, &output.gue.walk), (1, &None)));

    // Every window opens, and a backend is new.
    let mut second = update(Some(5), 6, &chain_of(6));
    second.directory = Some(directory(2, 1..=BACKENDS));
    controller.publish(second, 6);
    // Tables change under traffic: nothing is lost, and each packet goes by one table.
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    /// Ends the other thread whatever becomes of this one.
    struct SetOnDrop(Arc<AtomicBool>);
    impl Drop for SetOnDrop {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let (controller, generations) = std::thread::scope(|scope| {
        let guard = SetOnDrop(stop);
        let changes = scope.spawn(move || {
            let mut generation = 6;
            while !flag.load(Ordering::Relaxed) {
                generation += 1;
                // Now and then the whole table, as after a gap.
                let from = (generation % 10 != 0).then(|| generation - 1);
                controller.publish(update(from, generation, &chain_of(generation)), generation);
            }
            (controller, generation)
        });
        let mut seen = std::collections::BTreeSet::new();
        peer.exchange(30_000, |output| {
            let walk = output.gue.walk.as_ref().expect("every window is open");
            let [head, previous] = chain_of(walk.generation.0);
            assert_eq!(output.backend, head, "generation {}", walk.generation);
            assert_eq!(walk.to_visit[..], [common::address(previous)]);
            assert_eq!((walk.hops, walk.returned, walk.visited.len()), (0, false, 0));
            seen.insert(walk.generation.0);
        });
        drop(guard);
        let changed = changes.join().unwrap();
        assert!(seen.len() > 3, "the table was not changed under traffic: {seen:?}");
        changed
    });

    // What is not for the service is the kernel's: ARP anew, then TCP and ping of the mux's own address.
    peer_host.sh("ip neigh flush dev eth0");
    let listener = mux_host.run(|| TcpListener::bind((MUX, 7)).unwrap());
    peer_host.run(|| TcpStream::connect((MUX, 7)).unwrap());
    drop(listener);
    peer_host.run(|| ping(MUX));

    // Fragments are counted and dropped; another port of the address is not ours.
    let mut fragment = Ipv4Header::new(0, 60, IpNumber::TCP, common::CLIENT.octets(), VIP.octets()).unwrap();
    fragment.more_fragments = true;
    fragment.identification = 9;
    let fragment = common::ipv4(fragment, &[0; 64])[14..].to_vec();
    let elsewhere = common::tcp(1, VIP, 81, b"")[14..].to_vec();
    for _ in 0..10 {
        peer.packets.send((fragment.clone(), VIP)).unwrap();
        peer.packets.send((elsewhere.clone(), VIP)).unwrap();
    }
    let request = controller.until(|request| request.counters.get("dropped_fragment") == Some(&10));
    let (received, accounted) = all_named(&request.counters);
    assert_eq!(received, accounted, "{:?}", request.counters);
    assert_eq!(request.counters["sent"], peer.sent);
    assert_eq!(request.counters["chained_header"], peer.sent - 2000);
    assert_eq!(request.counters["missed"], 0);
    assert_eq!(request.counters["table_swaps"], u64::from(generations - 4));

    // The neighbour gets another Ethernet address.
    peer_host
        .sh("echo 1 > /proc/sys/net/ipv4/conf/eth0/arp_notify; ip link set eth0 address 02:00:00:00:00:77");
    peer.until_one_arrives();
    peer.exchange(500, |_| {});

    // The mux's own address changes, too.
    mux_host
        .sh("echo 1 > /proc/sys/net/ipv4/conf/eth0/arp_notify; ip link set eth0 address 02:00:00:00:00:66");
    peer.until_one_arrives();
    peer.exchange(500, |_| {});

    // The service goes, and comes back.
    controller.answers.send(SyncResponse { removed: vec![service().id], ..SyncResponse::default() }).unwrap();
    controller.until(|request| request.applied.is_empty());
    for _ in 0..10 {
        peer.packets.send((segment(NOBODYS), VIP)).unwrap();
    }
    controller.publish(update(None, generations, &chain_of(generations)), generations);
    peer.until_one_arrives();
    peer.exchange(500, |_| {});

    let (last, status) = daemon.terminate();
    assert!(status.success(), "{status}");
    assert_eq!(last["conserved"], true);
    assert_eq!(last["missed"], 0);
    assert!(!has_program(&mux_host));

    // Without a controller, from its disk.
    drop(controller);
    let daemon = Daemon::start(&mux_host, &[&base[..], &["--controller", "http://127.0.0.1:1"], io].concat());
    daemon.said("ready");
    let before = peer.sent;
    peer.exchange(500, |output| assert_eq!(output.backend, chain_of(generations)[0]));
    let (last, status) = daemon.terminate();
    assert!(status.success(), "{status}");
    assert_eq!(last["sent"], peer.sent - before);
    assert_eq!(last["conserved"], true);

    // Killed, it leaves nothing behind.
    let mut daemon =
        Daemon::start(&mux_host, &[&base[..], &["--controller", "http://127.0.0.1:1"], io].concat());
    daemon.said("ready");
    assert_eq!(has_program(&mux_host), !io.contains(&"af-packet"));
    daemon.child.kill().unwrap();
    daemon.child.wait().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while has_program(&mux_host) {
        assert!(Instant::now() < deadline, "an XDP program is left");
        std::thread::yield_now();
    }
}

#[test]
fn af_packet_forwards() {
    forwards(&["--io", "af-packet"]);
}

#[test]
fn xdp_native_forwards() {
    forwards(&["--io", "xdp", "--xdp-mode", "native"]);
}

#[test]
fn xdp_generic_forwards() {
    forwards(&["--io", "xdp", "--xdp-mode", "generic"]);
}

#[test]
fn af_xdp_native_forwards() {
    forwards(&["--io", "af-xdp", "--xdp-mode", "native"]);
}

#[test]
fn af_xdp_generic_forwards() {
    forwards(&["--io", "af-xdp", "--xdp-mode", "generic"]);
}

/// The daemon on a fresh network with a table, all packets to backend 1.
fn start_with_table(
    io: &[&str],
    prepare: impl FnOnce(&Host, &Host),
) -> (Host, Host, Daemon, tempfile::TempDir) {
    let (mux_host, peer_host) = network();
    prepare(&mux_host, &peer_host);
    let controller = mux_host.run(Controller::start);
    let state = tempfile::tempdir().unwrap();
    let state_dir = state.path().to_str().unwrap();
    let base = ["--name", "m1", "--interface", "eth0", "--state-dir", state_dir, "--log-format", "json"];
    let daemon = Daemon::start(&mux_host, &[&base[..], &["--controller", &controller.url], io].concat());
    let mut table = update(None, 5, &[1]);
    table.directory = Some(directory(1, 1..=1));
    controller.publish(table, 5);
    daemon.said("ready");
    (mux_host, peer_host, daemon, state)
}

#[test]
fn af_xdp_serves_every_queue() {
    if std::thread::available_parallelism().unwrap().get() < 2 {
        panic!("veth has as many queues as there are processors, and this test needs two");
    }
    let io = ["--io", "af-xdp", "--xdp-mode", "native"];
    let two_queues = |mux: &Host, peer: &Host| {
        mux.sh("ethtool -L eth0 rx 2 tx 2");
        peer.sh("ethtool -L eth0 rx 2 tx 2");
    };
    let (_mux_host, peer_host, daemon, _state) = start_with_table(&io, two_queues);
    let mut peer = peer_host.run(Peer::start);
    peer.exchange(5000, |_| {});
    let (last, status) = daemon.terminate();
    assert!(status.success(), "{status}");
    assert_eq!((&last["sent"], &last["conserved"]), (&5000.into(), &true.into()));
    let by_thread: Vec<u64> = serde_json::from_str(last["received_by_thread"].as_str().unwrap()).unwrap();
    assert!(by_thread.len() == 2 && by_thread.iter().all(|packets| *packets > 0), "{by_thread:?}");
}

#[test]
fn af_packet_shares_flows_among_threads() {
    let (_mux_host, peer_host, daemon, _state) =
        start_with_table(&["--io", "af-packet", "--cores", "0,1"], |_, _| {});
    let mut peer = peer_host.run(Peer::start);
    peer.exchange(5000, |_| {});
    let (last, status) = daemon.terminate();
    assert!(status.success(), "{status}");
    assert_eq!((&last["sent"], &last["conserved"]), (&5000.into(), &true.into()));
    let by_thread: Vec<u64> = serde_json::from_str(last["received_by_thread"].as_str().unwrap()).unwrap();
    assert!(by_thread.len() == 2 && by_thread.iter().all(|packets| *packets > 0), "{by_thread:?}");
}

#[test]
fn an_interface_that_is_removed_ends_the_mux() {
    for io in ["af-packet", "af-xdp", "xdp"] {
        let (_mux_host, peer_host, mut daemon, _state) = start_with_table(&["--io", io], |_, _| {});
        peer_host.sh("ip link del eth0");
        let error = daemon.said("packet I/O failed")["error"].to_string();
        assert!(error.contains("is gone"), "{error}");
        assert_eq!(daemon.child.wait().unwrap().code(), Some(1));
    }
}

#[test]
fn a_sender_that_leaves_checksums_to_the_device_is_served() {
    let (_mux_host, peer_host, _daemon, _state) = start_with_table(&["--io", "af-packet"], |_, _| {});
    let peer = peer_host.run(Peer::start);
    // A SYN from the kernel's own TCP, on a veth that offers to compute checksums.
    peer_host.run(|| {
        std::thread::spawn(|| TcpStream::connect_timeout(&(VIP, 80).into(), Duration::from_millis(500)));
    });
    let inner = peer.outputs.recv_timeout(PATIENCE).unwrap().inner;
    let (ip, rest) = Ipv4Header::from_slice(&inner).unwrap();
    let (tcp, payload) = TcpHeader::from_slice(rest).unwrap();
    assert!(tcp.syn && payload.is_empty());
    assert_eq!(tcp.checksum, tcp.calc_checksum_ipv4(&ip, payload).unwrap());
}

#[test]
fn what_cannot_work_stops_at_the_start_with_one_line() {
    let (host, peer) = (Host::new(), Host::new());
    host.join("eth0", &peer, "eth0");
    host.sh("ip addr add 10.1.0.1/24 dev eth0; ip link set eth0 mtu 9000; ip addr add 10.9.0.1/8 dev lo");
    let state = tempfile::tempdir().unwrap();
    let state_dir = state.path().to_str().unwrap();
    let file: PathBuf = state.path().join("file");
    std::fs::write(&file, "").unwrap();
    let with = |changes: &[(&str, &str)]| {
        let mut flags = BTreeMap::from([
            ("--name", "m1"),
            ("--interface", "eth0"),
            ("--io", "af-packet"),
            ("--controller", "http://127.0.0.1:1"),
            ("--state-dir", state_dir),
        ]);
        flags.extend(changes.iter().copied());
        let flags = flags.into_iter().filter(|(_, value)| !value.is_empty());
        flags.flat_map(|(flag, value)| [flag.to_owned(), value.to_owned()]).collect::<Vec<_>>()
    };
    let port_of = |more: &[&str]| {
        let flags = [("--io", "auto"), ("--interface", "netmap:p{1"), ("--address", "10.1.0.1")];
        [with(&flags), more.iter().map(|flag| (*flag).to_owned()).collect()].concat()
    };
    let mac = ["--mac", "02:00:00:00:00:01", "--next-hop", "02:00:00:00:00:02"];
    let inside = |path: &Path| path.join("inside").to_str().unwrap().to_owned();
    let rows = [
        (with(&[("--interface", "eth7")]), "interface eth7: there is no such interface"),
        (with(&[("--interface", "lo")]), "interface lo: has no Ethernet address"),
        (with(&[("--io", "af-xdp")]), "interface eth0: its MTU of 9000 is above"),
        (with(&[("--io", "fast")]), "invalid value 'fast' for '--io <IO>'"),
        (with(&[("--io", "netmap")]), "port eth0: is none of netmap:IF, netmap:IF-N,"),
        (
            with(&[("--io", "netmap"), ("--interface", "netmap:eth7")]),
            "interface eth7: there is no such interface",
        ),
        (
            with(&[("--io", "auto"), ("--interface", "vale0:a")]),
            "port vale0:a: needs --address, --mac and --next-hop",
        ),
        (with(&[("--address", "10.1.0.1")]), "--mac <MAC> --next-hop <NEXT_HOP>"),
        (port_of(&["--mac", "2:0:0", "--next-hop", "02:00:00:00:00:02"]), "not an Ethernet address"),
        (
            [port_of(&mac), vec!["--copy".to_owned(), "zero".to_owned()]].concat(),
            "--copy: means nothing to --io netmap",
        ),
        (
            with(&[("--io", "xdp"), ("--cores", "0")]),
            "--cores: means nothing to --io xdp: packets are forwarded",
        ),
        (
            with(&[("--io", "xdp"), ("--queues", "0")]),
            "--queues: means nothing to --io xdp: packets are forwarded",
        ),
        (with(&[("--name", "")]), "required arguments were not provided: --name <NAME>"),
        (with(&[("--name", "m/1")]), "node name \"m/1\" is not"),
        (with(&[("--controller", "ftp://x")]), "controller \"ftp://x\" is not of the form"),
        (with(&[("--token-file", file.to_str().unwrap())]), "holds no token"),
        (with(&[("--state-dir", &inside(&file))]), "file/inside"),
        (with(&[("--xdp-mode", "fast")]), "XDP mode \"fast\" is none of"),
        (with(&[("--gue-port", "70000")]), "'70000'"),
    ];
    // Where there is no netmap, as on most hosts.
    let no_netmap = (port_of(&mac), "/dev/netmap: opening netmap's device (its kernel module must be loaded");
    let no_netmap = Some(no_netmap).filter(|_| !Path::new("/dev/netmap").exists());
    for (arguments, expected) in rows.into_iter().chain(no_netmap) {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let (code, said) = fails(&host, &arguments);
        let last = said.lines().last().unwrap_or_default();
        assert_eq!(code, Some(2), "{arguments:?}: {said}");
        assert!(last.starts_with("error: ") && last.contains(expected), "{arguments:?}: {said}");
        let log_lines = said.lines().filter(|line| !line.contains("INFO") && !line.contains("WARN"));
        assert_eq!(log_lines.count(), 1, "{said}");
    }
}
