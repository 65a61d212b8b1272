//! A host whose sockets are known: connections, request sockets, ended connections, SYN cookies that are out.

use std::collections::HashMap;
use std::fs;
use std::io::Read as _;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, setsockopt, socket, sockopt,
};

use super::reference::Local;
use crate::common::frames::{ACK, CLIENT_MAC, SYN, Segment, ethernet};
use crate::common::netns::Wire;
use crate::common::{VIP, ip, lone_interface};

/// Where local clients are.
const NEAR: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// Where clients are whose packets are made up, behind `wire0`.
pub const FAR: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
/// A service whose listener has no cookies out.
pub const PLAIN: u16 = 80;
/// A service whose listener has cookies out.
pub const COOKIES: u16 = 81;
/// A service that nobody listens for.
pub const SILENT: u16 = 82;

/// The sockets, kept open, and what they amount to.
pub struct Sockets {
    pub known: HashMap<(Ipv4Addr, u16, u16), Local>,
    _listeners: [TcpListener; 2],
    _streams: Vec<TcpStream>,
}

/// Sets the host up: `eth0`, the VIP and the clients' addresses.
pub fn set_up() -> Sockets {
    lone_interface();
    ip(&format!("address add {VIP}/32 dev lo"));
    ip(&format!("address add {NEAR}/24 dev lo"));
    ip("route add 203.0.113.0/24 via 10.11.0.1 dev eth0");
    ip("neighbour add 10.11.0.1 lladdr 02:00:00:00:00:01 dev eth0");
    // Nothing else writes to these files: they belong to this network namespace.
    for file in ["conf/all/rp_filter", "conf/eth0/rp_filter"] {
        fs::write(format!("/proc/sys/net/ipv4/{file}"), "0").unwrap();
    }
    let listeners = [PLAIN, COOKIES].map(|port| TcpListener::bind((VIP, port)).unwrap());
    let mut known = HashMap::new();
    let mut streams = Vec::new();
    for port in [40_001, 40_002, 40_003, 40_004] {
        let client = dial(port);
        let (server, from) = listeners[0].accept().unwrap();
        assert_eq!(from.port(), port);
        known.insert((NEAR, port, PLAIN), Local::Connection);
        match port {
            // Closed by the client: the server is in CLOSE_WAIT.
            40_002 => drop(client),
            // Closed by the server, then by the client: TIME_WAIT.
            40_003 | 40_004 => {
                drop(server);
                let mut client = client;
                assert_eq!(client.read(&mut [0]).unwrap(), 0);
                drop(client);
                known.insert((NEAR, port, PLAIN), Local::TimeWait);
                continue;
            }
            _ => streams.push(client),
        }
        streams.push(server);
    }

    let mac = parse_mac(&ip("-brief link show dev eth0"));
    let wire = Wire::open("wire0", Duration::from_secs(5));
    for port in [50_001, 50_002] {
        syn(&wire, mac, port, PLAIN);
        known.insert((FAR, port, PLAIN), Local::Request);
    }
    fs::write("/proc/sys/net/ipv4/tcp_syncookies", "2").unwrap();
    for port in [50_003, 50_004] {
        let cookie = syn(&wire, mac, port, COOKIES);
        known.insert((FAR, port, COOKIES), Local::Cookie(1001, cookie.wrapping_add(1)));
    }
    let [plain, cookies] = listeners;
    Sockets { known, _listeners: [plain, cookies], _streams: streams }
}

/// Connects from a port of the near client.
fn dial(port: u16) -> TcpStream {
    let fd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    setsockopt(&fd, sockopt::ReuseAddr, &true).unwrap();
    bind(fd.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(NEAR, port))).unwrap();
    connect(fd.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(VIP, PLAIN))).unwrap();
    let stream = TcpStream::from(fd);
    let SocketAddr::V4(from) = stream.local_addr().unwrap() else { panic!("IPv4") };
    assert_eq!(from, SocketAddrV4::new(NEAR, port));
    stream
}

/// Sends a SYN from afar, and returns the sequence number of the SYN-ACK.
fn syn(wire: &Wire, mac: [u8; 6], port: u16, service: u16) -> u32 {
    let mut segment = Segment::new((FAR, port), SYN);
    segment.service.1 = service;
    wire.send(&ethernet(mac, CLIENT_MAC, &segment.to_bytes()));
    let is_answer = |frame: &[u8]| {
        frame.len() >= 54
            && frame[12..14] == [8, 0]
            && frame[30..34] == FAR.octets()
            && frame[36..38] == port.to_be_bytes()
            && frame[47] == SYN | ACK
    };
    let answer = wire.receive_that(is_answer).expect("the listener answers a SYN");
    u32::from_be_bytes([answer[38], answer[39], answer[40], answer[41]])
}

/// The first MAC address in a text.
fn parse_mac(text: &str) -> [u8; 6] {
    let word = text.split_whitespace().find(|word| word.matches(':').count() == 5).unwrap();
    let bytes: Vec<u8> = word.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    bytes.try_into().unwrap()
}
