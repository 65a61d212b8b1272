//! What the agent does to its host and asks of it: addresses on `lo`, ARP settings, sockets.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

#[path = "../../shared/node/tests/netns/mod.rs"]
mod netns;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use daisy_agent::sockets::{Sockets, syn_cookies_sent};
use daisy_agent::vip::Vips;
use daisy_shared::flow::{FlowV4, HashKey, bucket_of};
use daisy_shared::service::{Encapsulation, Protocol, Service, ServiceId};
use netns::Host;

const PATIENCE: Duration = Duration::from_secs(10);
const VIP: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
const OTHER_VIP: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 8);

fn service(id: u32, vip: Ipv4Addr, port: u16) -> Service {
    Service {
        id: ServiceId(id),
        name: format!("service-{id}"),
        vip: vip.into(),
        protocol: Protocol::Tcp,
        port,
        buckets: 1 << 16,
        hash_key: HashKey(*b"sixteen secrets!"),
        encapsulation: Encapsulation::Gue,
    }
}

fn bucket(service: &Service, client: SocketAddr, vip: Ipv4Addr) -> usize {
    let std::net::IpAddr::V4(source) = client.ip() else { panic!("{client}") };
    let flow = FlowV4 {
        source,
        destination: vip,
        source_port: client.port(),
        destination_port: service.port,
        protocol: 6,
    };
    bucket_of(flow.hash(service.hash_key), service.buckets) as usize
}

/// A server with the address on `lo`, and a client.
fn server_and_client() -> (Host, Host) {
    let (server, client) = (Host::new(), Host::new());
    server.join("eth0", &client, "eth0");
    server.sh(&format!("ip addr add 10.12.0.1/24 dev eth0; ip addr add {VIP}/32 dev lo"));
    client.sh(&format!("ip addr add 10.12.0.2/24 dev eth0; ip route add {VIP} via 10.12.0.1"));
    (server, client)
}

/// The buckets of the first service that hold something.
fn held(server: &Host, services: &[Service]) -> Vec<usize> {
    let services = services.to_vec();
    server.run(move || {
        let held = Sockets::open().unwrap().held(&services).unwrap();
        assert_eq!(held.len(), services.len());
        held[&services[0].id].iter_ones().collect()
    })
}

/// Waits until the service holds just these buckets; the kernels' segments take their time.
fn until_held(server: &Host, services: &[Service], expected: &[usize]) {
    let start = Instant::now();
    loop {
        let held = held(server, services);
        if held == expected {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "held: {held:?}, expected {expected:?}");
        std::thread::yield_now();
    }
}

/// The states of a connection, for a server that listens on this address.
fn a_connection_is_held_in_its_bucket(listen: &'static str) {
    let (server, client) = server_and_client();
    let web = service(1, VIP, 8080);
    // The same port on another address, and the same address with another port.
    let services = [web.clone(), service(2, OTHER_VIP, 8080), service(3, VIP, 8081)];
    let listener = server.run(move || TcpListener::bind(listen).unwrap());
    // One that only listens holds nothing.
    assert_eq!(held(&server, &services), [0_usize; 0]);
    let connect = || client.run(|| TcpStream::connect((VIP, 8080)).unwrap());

    let mut stream = connect();
    let of_stream = bucket(&web, stream.local_addr().unwrap(), VIP);
    // Established, and not yet accepted by the program.
    until_held(&server, &services, &[of_stream]);
    let (mut accepted, _) = listener.accept().unwrap();
    accepted.write_all(b"x").unwrap();
    stream.read_exact(&mut [0]).unwrap();
    assert_eq!(held(&server, &services), [of_stream]);

    // A second connection, which the client closes first: CLOSE-WAIT, and then nothing.
    let second = connect();
    let of_second = bucket(&web, second.local_addr().unwrap(), VIP);
    let (mut second_accepted, _) = listener.accept().unwrap();
    let mut both = [of_stream, of_second];
    both.sort();
    until_held(&server, &services, &both);
    drop(second);
    assert_eq!(second_accepted.read(&mut [0]).unwrap(), 0);
    assert_eq!(held(&server, &services), both);
    drop(second_accepted);
    until_held(&server, &services, &[of_stream]);

    // The server closes the first: FIN-WAIT, and TIME-WAIT once the client has closed as well.
    accepted.shutdown(Shutdown::Both).unwrap();
    drop(accepted);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    assert_eq!(held(&server, &services), [of_stream]);
    drop(stream);
    server.sh(
        "for i in $(seq 500); do ss -tan state time-wait | grep -q 8080 && exit 0; sleep 0.01; done; exit 1",
    );
    assert_eq!(held(&server, &services), [of_stream]);

    // A handshake whose last part is missing: the client's address is known under a wrong Ethernet address.
    client.sh("ip addr add 10.12.0.3/24 dev eth0");
    server.sh("ip neigh replace 10.12.0.3 lladdr 02:00:00:00:00:99 dev eth0 nud permanent");
    client.sh(&format!("ip route replace {VIP} via 10.12.0.1 src 10.12.0.3"));
    let half_open = client.run(|| {
        std::thread::spawn(|| TcpStream::connect_timeout(&(VIP, 8080).into(), Duration::from_millis(1500)))
    });
    let start = Instant::now();
    while held(&server, &services).len() < 2 {
        assert!(start.elapsed() < PATIENCE, "no request socket is seen");
    }
    half_open.join().unwrap().unwrap_err();
}

#[test]
fn a_connection_is_held_in_its_bucket_ipv4() {
    a_connection_is_held_in_its_bucket("0.0.0.0:8080");
}

#[test]
fn a_connection_is_held_in_its_bucket_dual_stack() {
    a_connection_is_held_in_its_bucket("[::]:8080");
}

#[test]
fn syn_cookies_are_counted_in_the_own_namespace() {
    let (server, client) = server_and_client();
    let count = || server.run(|| syn_cookies_sent().unwrap());
    assert_eq!(count(), 0);
    // 2: a cookie for every SYN.
    server.sh("echo 2 > /proc/sys/net/ipv4/tcp_syncookies");
    let _listener = server.run(|| TcpListener::bind((VIP, 8080)).unwrap());
    let _stream = client.run(|| TcpStream::connect((VIP, 8080)).unwrap());
    assert_eq!(count(), 1);
}

fn addresses_on_lo(host: &Host) -> Vec<String> {
    host.run(|| {
        let output =
            std::process::Command::new("ip").args(["-4", "-o", "address", "show", "dev", "lo"]).output();
        let text = String::from_utf8(output.unwrap().stdout).unwrap();
        let addresses = text.lines().filter_map(|line| line.split_whitespace().nth(3));
        let addresses = addresses.filter(|address| !address.starts_with("127.")).map(str::to_owned);
        let mut addresses: Vec<String> = addresses.collect();
        addresses.sort();
        addresses
    })
}

fn settings(host: &Host) -> [String; 2] {
    let read = |name: &str| {
        let path = format!("/proc/sys/net/ipv4/conf/eth0/{name}");
        host.run(move || fs::read_to_string(path).unwrap().trim().to_owned())
    };
    [read("arp_ignore"), read("arp_announce")]
}

/// Does something with the addresses of a state directory on a host.
fn with_vips(host: &Host, dir: &Path, act: impl FnOnce(Vips) + Send + 'static) {
    let dir = dir.to_owned();
    host.run(move || act(Vips::open(&dir).unwrap()));
}

#[test]
fn addresses_come_and_go_and_what_was_there_stays() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let (host, peer) = (Host::new(), Host::new());
    host.join("eth0", &peer, "eth0");
    // One of the addresses and one of the settings are somebody else's.
    host.sh(&format!("ip addr add {OTHER_VIP}/32 dev lo; echo 8 > /proc/sys/net/ipv4/conf/eth0/arp_ignore"));
    let (vip, other) = (format!("{VIP}/32"), format!("{OTHER_VIP}/32"));

    with_vips(&host, &state, |mut vips| {
        vips.silence_arp("eth0").unwrap();
        vips.add(VIP).unwrap();
        vips.add(OTHER_VIP).unwrap();
        vips.add(VIP).unwrap();
    });
    assert_eq!(addresses_on_lo(&host), [&*vip, &*other]);
    assert_eq!(settings(&host), ["8", "2"]);

    // Another run of the agent knows what the first has done.
    with_vips(&host, &state, |mut vips| {
        vips.silence_arp("eth0").unwrap();
        vips.add(VIP).unwrap();
        assert_eq!(vips.others(&[OTHER_VIP].into()), [VIP]);
        vips.remove(VIP).unwrap();
        vips.remove(OTHER_VIP).unwrap();
    });
    assert_eq!(addresses_on_lo(&host), [&*other]);
    with_vips(&host, &state, |mut vips| vips.add(VIP).unwrap());

    // Somebody removes the address meanwhile.
    host.sh(&format!("ip addr del {VIP}/32 dev lo"));
    with_vips(&host, &state, |vips| vips.restore().unwrap());
    assert_eq!(addresses_on_lo(&host), [&*other]);
    assert_eq!(settings(&host), ["8", "0"]);
    assert_eq!(fs::read_dir(&state).unwrap().count(), 0);
    // Nothing is left to undo.
    with_vips(&host, &state, |vips| vips.restore().unwrap());
}

#[test]
fn a_damaged_record_is_named_and_a_refusing_disk_stops_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let host = Host::new();
    let state = dir.path().to_owned();
    fs::write(state.join("vip.json"), "{").unwrap();
    let error = host.run(move || Vips::open(&state).err().unwrap().to_string());
    assert!(error.contains("vip.json: "), "{error}");
    let state = dir.path().to_owned();
    host.run(move || Vips::open_or_begin(&state).unwrap());
    // A file where the directory should be.
    let state = dir.path().join("vip.json").join("state");
    host.run(move || {
        // Not a directory: nothing can be read from it either.
        assert!(Vips::open(&state).is_err());
    });
    let state = dir.path().join("gone");
    let moved = state.clone();
    with_vips(&host, &state, move |mut vips| {
        fs::write(&moved, "").unwrap();
        vips.add(VIP).unwrap();
    });
    assert_eq!(addresses_on_lo(&host), [format!("{VIP}/32")]);
}
