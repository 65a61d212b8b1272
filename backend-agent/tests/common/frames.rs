//! Frames as muxes, agents and clients build them.

use std::net::Ipv4Addr;

use daisy_shared::chain::Walk;
use daisy_shared::checksum;
use daisy_shared::wire::{gue, outer};

use super::{GUE_PORT, ME, MUX, PORT, VIP};

pub const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const MY_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// TCP flags.
pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

/// A TCP segment over IPv4.
#[derive(Clone, Debug)]
pub struct Segment {
    pub client: (Ipv4Addr, u16),
    pub service: (Ipv4Addr, u16),
    pub flags: u8,
    pub sequence: u32,
    pub acknowledgement: u32,
    pub ip_options: Vec<u8>,
    pub tcp_options: Vec<u8>,
    pub payload: Vec<u8>,
}

impl Segment {
    pub fn new(client: (Ipv4Addr, u16), flags: u8) -> Segment {
        Segment {
            client,
            service: (VIP, PORT),
            flags,
            sequence: 1000,
            acknowledgement: 0,
            ip_options: Vec::new(),
            tcp_options: Vec::new(),
            payload: Vec::new(),
        }
    }

    /// The IP packet, with right checksums.
    pub fn to_bytes(&self) -> Vec<u8> {
        let (source, destination) = (self.client.0.octets(), self.service.0.octets());
        let ip_len = 20 + self.ip_options.len();
        let tcp_len = 20 + self.tcp_options.len();
        let len = ip_len + tcp_len + self.payload.len();
        let mut ip = vec![0; ip_len];
        ip[0] = 0x40 | (ip_len / 4) as u8;
        ip[2..4].copy_from_slice(&(len as u16).to_be_bytes());
        ip[6] = 0x40;
        ip[8] = 61;
        ip[9] = 6;
        ip[12..16].copy_from_slice(&source);
        ip[16..20].copy_from_slice(&destination);
        ip[20..].copy_from_slice(&self.ip_options);
        let sum = checksum::of(&ip);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());

        let mut tcp = vec![0; 20];
        tcp[0..2].copy_from_slice(&self.client.1.to_be_bytes());
        tcp[2..4].copy_from_slice(&self.service.1.to_be_bytes());
        tcp[4..8].copy_from_slice(&self.sequence.to_be_bytes());
        tcp[8..12].copy_from_slice(&self.acknowledgement.to_be_bytes());
        tcp[12] = (tcp_len / 4) as u8 * 16;
        tcp[13] = self.flags;
        tcp[14..16].copy_from_slice(&8192u16.to_be_bytes());
        tcp.extend(&self.tcp_options);
        tcp.extend(&self.payload);
        let sum = tcp_checksum(source, destination, &tcp);
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        ip.extend(tcp);
        ip
    }
}

/// The checksum of a TCP segment; 0 if it carries the right one.
pub fn tcp_checksum(source: [u8; 4], destination: [u8; 4], tcp: &[u8]) -> u16 {
    let mut sum = checksum::add(0, &source);
    sum = checksum::add(sum, &destination);
    sum = checksum::add(sum, &(6 + tcp.len() as u32).to_be_bytes());
    checksum::finish(checksum::add(sum, tcp))
}

pub fn ethernet(destination: [u8; 6], source: [u8; 6], payload: &[u8]) -> Vec<u8> {
    let mut frame = [destination, source].concat();
    frame.extend([0x08, 0x00]);
    frame.extend(payload);
    frame
}

/// Outer IPv4 and UDP headers around a payload.
pub fn underlay(source: Ipv4Addr, source_port: u16, payload: &[u8]) -> Vec<u8> {
    let outer = outer::Outer {
        source,
        destination: ME,
        source_port,
        destination_port: GUE_PORT,
        tos: 0,
        payload_len: payload.len() as u16,
    };
    [&outer.to_bytes()[..], payload].concat()
}

/// An outer IPv4 header around an inner packet (IPIP).
pub fn ipip(source: Ipv4Addr, inner: &[u8]) -> Vec<u8> {
    let outer = outer::Ipip { source, destination: ME, tos: 0, payload_len: inner.len() as u16 };
    [&outer.to_bytes()[..], inner].concat()
}

/// A UDP payload: the GUE header and the inner packet.
pub fn gue(walk: Option<Walk<Ipv4Addr>>, inner: &[u8]) -> Vec<u8> {
    let header = gue::Header { protocol: gue::PROTO_IPV4, walk };
    let mut bytes = vec![0; header.len()];
    header.emit(&mut bytes);
    bytes.extend(inner);
    bytes
}

/// An encapsulated packet, as a mux sends it.
pub fn encapsulated(walk: Option<Walk<Ipv4Addr>>, inner: &[u8]) -> Vec<u8> {
    ethernet(MY_MAC, CLIENT_MAC, &underlay(MUX, 50_000, &gue(walk, inner)))
}
