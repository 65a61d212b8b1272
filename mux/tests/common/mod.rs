//! What the tests of the mux share: a small network, frames built by etherparse, and a look into what comes out.
#![allow(dead_code, reason = "no test uses all of it")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::net::Ipv4Addr;

use daisy_mux::io::Worker;
use daisy_mux::table::{Link, NextHop, Tables, Underlay};
use daisy_shared::bucket::{BackendId, Entry, Piece};
use daisy_shared::chain::Generation;
use daisy_shared::control::{Directory, DirectoryEntry};
use daisy_shared::flow::HashKey;
use daisy_shared::service::{Encapsulation, Protocol, Service, ServiceId};
use daisy_shared::wire::gue;
use etherparse::{
    Ethernet2Header, IpDscp, IpEcn, Ipv4Header, LinkSlice, NetSlice, PacketBuilder, SlicedPacket,
    TransportSlice, UdpHeader,
};

pub const MUX_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const ROUTER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xfe];
pub const MUX: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 1);
pub const VIP: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
pub const BUCKETS: u32 = 16;
pub const UNDERLAY: Underlay = Underlay { address: MUX, gue_port: gue::PORT };
pub const LINK: Link = Link { mac: MUX_MAC, mtu: 1500 };

/// The underlay address of a backend.
pub fn address(backend: u16) -> Ipv4Addr {
    let [high, low] = backend.to_be_bytes();
    Ipv4Addr::new(10, 2, high, low)
}

/// The Ethernet address of a backend's next hop.
pub fn mac(backend: u16) -> [u8; 6] {
    let [high, low] = backend.to_be_bytes();
    [2, 2, 0, 0, high, low]
}

/// The next hop towards a backend, behind the only interface.
pub fn next_hop(backend: u16) -> NextHop {
    NextHop { egress: 0, mac: mac(backend) }
}

/// The service that most tests use.
pub fn service() -> Service {
    Service {
        id: ServiceId(1),
        name: "web".into(),
        vip: VIP.into(),
        protocol: Protocol::Tcp,
        port: 80,
        buckets: BUCKETS,
        hash_key: HashKey([7; 16]),
        encapsulation: Encapsulation::Gue,
    }
}

/// A directory of backends with these numbers.
pub fn directory(version: u64, backends: impl IntoIterator<Item = u16>) -> Directory {
    let entry = |id| DirectoryEntry {
        id: BackendId(id),
        name: format!("b{id}"),
        address: address(id).into(),
        dead: false,
    };
    Directory { version, backends: backends.into_iter().map(entry).collect(), muxes: vec![MUX.into()] }
}

/// A bucket's entry.
pub fn entry(bucket: u32, generation: u32, chain: &[u16]) -> Entry {
    let chain = chain.iter().copied().map(BackendId).collect();
    Entry { bucket, generation: Generation(generation), chain }
}

/// A snapshot in which every bucket has this chain.
pub fn snapshot(service: &Service, generation: u32, chain: &[u16]) -> Piece {
    Piece {
        service: service.id,
        from: None,
        generation: Generation(generation),
        buckets: service.buckets,
        entries: (0..service.buckets).map(|bucket| entry(bucket, generation, chain)).collect(),
    }
}

/// A delta.
pub fn delta(service: &Service, from: u32, generation: u32, entries: Vec<Entry>) -> Piece {
    Piece {
        service: service.id,
        from: Some(Generation(from)),
        generation: Generation(generation),
        buckets: service.buckets,
        entries,
    }
}

/// The service with backends 1 to `backends`, all reachable, and this chain in every bucket.
pub fn tables(backends: u16, chain: &[u16]) -> Tables {
    let mut tables = Tables::new(UNDERLAY, [LINK]);
    tables.set_directory(&directory(1, 1..=backends));
    for backend in 1..=backends {
        tables.set_next_hop(address(backend), Some(next_hop(backend)));
    }
    tables.apply(&service(), &snapshot(&service(), 5, chain)).unwrap();
    tables
}

/// A worker on these tables.
pub fn worker(tables: &Tables) -> Worker {
    Worker::new(tables.shared(), Default::default())
}

/// A TCP segment from a client.
pub fn tcp(source_port: u16, destination: Ipv4Addr, port: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(ROUTER_MAC, MUX_MAC)
        .ipv4(CLIENT.octets(), destination.octets(), 61)
        .tcp(source_port, port, 1, 4096)
        .ack(2)
        .write(&mut frame, payload)
        .unwrap();
    frame
}

/// A frame with an IPv4 header of one's own before `payload`, its length and checksum made right.
pub fn ipv4(mut header: Ipv4Header, payload: &[u8]) -> Vec<u8> {
    header.set_payload_len(payload.len()).unwrap();
    header.header_checksum = header.calc_header_checksum();
    let mut frame =
        Ethernet2Header { source: ROUTER_MAC, destination: MUX_MAC, ether_type: etherparse::EtherType::IPV4 }
            .to_bytes()
            .to_vec();
    frame.extend_from_slice(&header.to_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// What the mux is expected to make of an inner packet, built by etherparse alone.
pub fn encapsulated(backend: u16, source_port: u16, tos: u8, gue: &[u8], inner: &[u8]) -> Vec<u8> {
    let mut ip =
        Ipv4Header::new(0, 64, etherparse::IpNumber::UDP, MUX.octets(), address(backend).octets()).unwrap();
    ip.dont_fragment = true;
    ip.dscp = IpDscp::try_new(tos >> 2).unwrap();
    ip.ecn = IpEcn::try_new(tos & 3).unwrap();
    let payload = [gue, inner].concat();
    let mut udp = UdpHeader::without_ipv4_checksum(source_port, gue::PORT, payload.len()).unwrap();
    udp.checksum = 0;
    let mut frame = ipv4(ip, &[&udp.to_bytes()[..], &payload].concat());
    frame[0..6].copy_from_slice(&mac(backend));
    frame[6..12].copy_from_slice(&MUX_MAC);
    frame
}

/// The frame that the mux makes of the IP packet `inner` with IPIP.
pub fn in_ipip(backend: u16, tos: u8, inner: &[u8]) -> Vec<u8> {
    let mut ip =
        Ipv4Header::new(0, 64, etherparse::IpNumber::IPV4, MUX.octets(), address(backend).octets()).unwrap();
    ip.dont_fragment = true;
    ip.dscp = IpDscp::try_new(tos >> 2).unwrap();
    ip.ecn = IpEcn::try_new(tos & 3).unwrap();
    let mut frame = ipv4(ip, inner);
    frame[0..6].copy_from_slice(&mac(backend));
    frame[6..12].copy_from_slice(&MUX_MAC);
    frame
}

/// A frame with VLAN tags, the outermost first.
pub fn tagged(tags: &[[u8; 4]], frame: &[u8]) -> Vec<u8> {
    [&frame[..12], tags.as_flattened(), &frame[12..]].concat()
}

/// What an encapsulated frame says.
#[derive(Debug)]
pub struct Decapsulated {
    pub ethernet: Ethernet2Header,
    pub source: Ipv4Addr,
    pub destination: Ipv4Addr,
    pub tos: u8,
    pub source_port: u16,
    pub gue: gue::Header,
    pub inner: Vec<u8>,
}

/// Takes an encapsulated frame apart, and checks everything that does not depend on the packet.
pub fn decapsulate(frame: &[u8]) -> Decapsulated {
    let sliced = SlicedPacket::from_ethernet(frame).unwrap();
    let Some(LinkSlice::Ethernet2(ethernet)) = sliced.link else { panic!("no Ethernet header") };
    let Some(NetSlice::Ipv4(ip)) = sliced.net else { panic!("no IPv4 header") };
    let Some(TransportSlice::Udp(udp)) = sliced.transport else { panic!("no UDP header") };
    let header = ip.header().to_header();
    assert_eq!(header.header_checksum, header.calc_header_checksum());
    assert_eq!(14 + usize::from(header.total_len), frame.len(), "bytes after the packet");
    assert_eq!(udp.to_header().checksum, 0);
    assert_eq!(udp.destination_port(), gue::PORT);
    assert!(udp.source_port() >= 0xc000);
    assert!(header.dont_fragment && header.identification == 0 && header.time_to_live == 64);
    let gue = gue::Header::parse(udp.payload()).unwrap();
    Decapsulated {
        ethernet: ethernet.to_header(),
        source: header.source.into(),
        destination: header.destination.into(),
        tos: header.dscp.value() << 2 | header.ecn.value(),
        source_port: udp.source_port(),
        inner: udp.payload()[gue.len()..].to_vec(),
        gue,
    }
}
