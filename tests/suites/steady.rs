//! Suite 1: all four daemons up, nothing changes. HTTP and bulk transfer reach every backend, byte for byte.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use daisy_tests::topology::{BULK_PORT, VIP, WEB};
use daisy_tests::{EchoOptions, Io, Topology, echo};

use crate::common::{LIVE, assert_unbroken};

const BACKENDS: [&str; 4] = ["b1", "b2", "b3", "b4"];
/// The file that is downloaded, and what is sent up and down to measure.
const BULK_BYTES: usize = 16 << 20;

suite!(every_backend_serves: xdp, af_xdp, af_packet);

fn every_backend_serves(io: Io) {
    let mut net = Topology::new("steady").io(io).clients(2).muxes(2).backends(4).start().unwrap();
    let mut file = Vec::new();
    echo::message(1, 1, (BULK_BYTES, BULK_BYTES), &mut file);
    std::fs::write(net.www().join("bulk"), &file).unwrap();
    // A service of its own for each backend: iperf3 needs two connections to the same server.
    for (index, name) in BACKENDS.iter().enumerate() {
        let service = format!("bulk-{name}");
        net.add_service(&service, bulk(index), 64).unwrap();
        net.enrol_in(&service, name, 100).unwrap();
    }
    for service in ["echo", "web"] {
        net.wait_windows_closed(service).unwrap();
    }
    net.wait_settled().unwrap();

    // HTTP: every backend answers every client, and sees its address.
    for client in 0..2 {
        let address = net.client(client).address;
        let mut seen = BTreeSet::new();
        for _ in 0..60 {
            let text = net.client(client).namespace.output("curl", &["-sSf", &url("")]).unwrap();
            let (backend, from) =
                text.trim().strip_prefix("backend ").unwrap().split_once(" client ").unwrap();
            assert_eq!(from, address.to_string());
            seen.insert(backend.to_owned());
        }
        assert_eq!(seen.len(), 4, "{seen:?}");
    }
    // Bulk over HTTP from every backend, byte-exact.
    let mut seen = BTreeSet::new();
    let (got, head) = (net.directory().join("got"), net.directory().join("head"));
    let arguments = ["-sSf", "-o", got.to_str().unwrap(), "-D", head.to_str().unwrap(), &url("bulk")];
    for _ in 0..60 {
        net.client(0).namespace.output("curl", &arguments).unwrap();
        assert!(std::fs::read(&got).unwrap() == file, "the file that came is not the one that was sent");
        seen.insert(backend_of(&std::fs::read_to_string(&head).unwrap()));
        if seen.len() == 4 {
            break;
        }
    }
    assert_eq!(seen.len(), 4, "{seen:?}");

    // And to every backend: on the way up, full-size segments pass the muxes.
    let original = net.directory().join("www/bulk");
    let arguments =
        ["-sSf", "-T", original.to_str().unwrap(), "-D", head.to_str().unwrap(), &url("upload/bulk")];
    let mut seen = BTreeSet::new();
    for _ in 0..60 {
        net.client(0).namespace.output("curl", &arguments).unwrap();
        let backend = backend_of(&std::fs::read_to_string(&head).unwrap());
        let kept = net.directory().join(format!("{backend}-nginx/upload/bulk"));
        assert!(
            std::fs::read(&kept).unwrap() == file,
            "the file that {backend} got is not the one that was sent"
        );
        seen.insert(backend);
        if seen.len() == 4 {
            break;
        }
    }
    assert_eq!(seen.len(), 4, "{seen:?}");

    // iperf3 from and to every backend. It ends when the sender has sent: what is under way is not counted.
    for (index, name) in BACKENDS.iter().enumerate() {
        for direction in ["up", "down"] {
            let (target, bytes) = (bulk(index), BULK_BYTES.to_string());
            let (ip, port) = (target.ip().to_string(), target.port().to_string());
            let mut arguments = vec!["--json", "--client", &ip, "--port", &port, "--bytes", &bytes];
            arguments.extend((direction == "down").then_some("--reverse"));
            let mut text = net.client(0).namespace.output("iperf3", &arguments).unwrap();
            while text.contains("the server is busy") {
                // It has not yet noticed that the run before is over.
                std::thread::sleep(std::time::Duration::from_millis(100));
                text = net.client(0).namespace.output("iperf3", &arguments).unwrap();
            }
            let report: serde_json::Value = serde_json::from_str(&text).unwrap();
            let end = |sum: &str, what: &str| {
                report["end"][sum][what].as_f64().unwrap_or_else(|| panic!("no {what} in {sum}: {text}"))
            };
            let speed = end("sum_received", "bits_per_second") / 1e6;
            let retransmits = end("sum_sent", "retransmits");
            println!("iperf3 {name} {direction}: {speed:.0} Mbit/s, {retransmits} segments sent again");
            assert!(end("sum_sent", "bytes") >= BULK_BYTES as f64, "{text}");
            assert!(end("sum_received", "bytes") >= BULK_BYTES as f64 / 2.0, "{text}");
        }
    }

    // Long-lived connections from both clients.
    let options = EchoOptions { connections: LIVE / 2, message_bytes: (8, 4_000), ..EchoOptions::default() };
    let mut one = net.echo(0, &options).unwrap();
    let mut two = net.echo(1, &options).unwrap();
    let web = net.requests(1, WEB, 100).unwrap();
    one.wait_live(LIVE / 2).unwrap();
    two.wait_live(LIVE / 2).unwrap();
    one.talk(6).unwrap();
    two.talk(6).unwrap();
    let requests = web.finish().unwrap();
    assert_eq!(requests.failed, 0, "{:?}", requests.errors);
    assert_eq!(requests.by_backend.len(), 4, "{:?}", requests.by_backend);
    let reports = [one.finish().unwrap(), two.finish().unwrap()];
    for report in &reports {
        assert_unbroken(report);
        assert_eq!(report.by_backend.len(), 4, "{:?}", report.by_backend);
    }

    // Every packet is accounted for, and none took a detour: no window is open.
    let nodes = net.wait_conserved().unwrap();
    assert_eq!(nodes.len(), 6);
    for node in &nodes {
        let counters: BTreeMap<_, _> = node.counters.iter().filter(|(_, count)| **count > 0).collect();
        println!("{}: {counters:?}", node.name);
        // Bulk transfer finds out how fast a mux is; too fast, and the device's queue is full.
        let dropped = node.dropped() - node.counter("dropped_tx_full");
        assert_eq!(dropped, 0, "{} dropped packets: {:?}", node.name, node.counters);
        for way in ["sent_on", "returned", "chained_header", "answered"] {
            assert_eq!(node.counter(way), 0, "{}: {way}", node.name);
        }
        if node.kind == "mux" {
            assert!(
                node.counter("sent") > 10_000,
                "{} got no share of the traffic: {:?}",
                node.name,
                node.counters
            );
        }
    }
    // What servers returned is what clients checked, backend by backend.
    for name in BACKENDS {
        let server = net.echo_server_report(name).unwrap();
        let sum: u64 = reports.iter().map(|r| r.bytes_by_backend[name]).sum();
        let connections: usize = reports.iter().map(|r| r.by_backend[name]).sum();
        assert_eq!((server.bytes, server.accepted, server.failed), (sum, connections as u64, 0), "{name}");
        assert_eq!(server.closed, server.accepted, "{name}");
    }
}

/// The backend that an answer names in its headers.
fn backend_of(headers: &str) -> String {
    headers.lines().find_map(|line| line.strip_prefix("X-Backend: ")).unwrap().trim().to_owned()
}

fn bulk(index: usize) -> SocketAddr {
    let [a, b, c, _] = VIP.octets();
    SocketAddr::from(([a, b, c, 11 + index as u8], BULK_PORT))
}

fn url(path: &str) -> String {
    format!("http://{WEB}/{path}")
}
