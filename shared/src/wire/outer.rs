//! The outer headers of an encapsulated packet: IPv4 and UDP, or for IPIP (RFC 2003) IPv4 alone.
//!
//! DF is set and the identification is 0: such a packet is never fragmented, so the field means nothing
//! (RFC 6864). The UDP checksum is 0, as RFC 768 allows over IPv4. The type of service is the inner packet's
//! (RFC 6040 for its ECN half), the time to live is fresh.

use core::net::Ipv4Addr;

use crate::checksum;

/// Length in bytes of both headers.
pub const LEN: usize = 28;
/// Length in bytes of the outer header of a plain IPIP packet.
pub const IPIP_LEN: usize = 20;
/// The time to live of a fresh outer header.
pub const TTL: u8 = 64;

/// The lowest source port, and how far the flow hash is shifted to be added to it: see [`source_port`].
pub const SOURCE_PORT_BASE: u16 = 0xc000;
/// See [`SOURCE_PORT_BASE`].
pub const SOURCE_PORT_SHIFT: u32 = 50;

/// What differs from packet to packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outer {
    /// The sender on the underlay.
    pub source: Ipv4Addr,
    /// The receiver on the underlay.
    pub destination: Ipv4Addr,
    /// The flow's entropy, see [`source_port`].
    pub source_port: u16,
    /// The GUE port.
    pub destination_port: u16,
    /// DSCP and ECN.
    pub tos: u8,
    /// Length in bytes of what follows both headers.
    pub payload_len: u16,
}

impl Outer {
    /// The headers as bytes.
    ///
    /// # Panics
    /// If the packet would be longer than IPv4 allows (65,535 bytes): callers check against the link's MTU.
    pub fn to_bytes(&self) -> [u8; LEN] {
        let udp_len = self.payload_len + 8;
        let mut out = [0; LEN];
        out[..20].copy_from_slice(&ipv4(self.tos, udp_len + 20, UDP, self.source, self.destination));
        out[20..22].copy_from_slice(&self.source_port.to_be_bytes());
        out[22..24].copy_from_slice(&self.destination_port.to_be_bytes());
        out[24..26].copy_from_slice(&udp_len.to_be_bytes());
        out
    }
}

/// The outer header of a plain IPIP packet: what differs from packet to packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipip {
    /// The sender on the underlay.
    pub source: Ipv4Addr,
    /// The receiver on the underlay.
    pub destination: Ipv4Addr,
    /// DSCP and ECN.
    pub tos: u8,
    /// Length in bytes of the inner packet.
    pub payload_len: u16,
}

impl Ipip {
    /// The header as bytes.
    ///
    /// # Panics
    /// If the packet would be longer than IPv4 allows (65,535 bytes): callers check against the link's MTU.
    pub fn to_bytes(&self) -> [u8; IPIP_LEN] {
        ipv4(self.tos, self.payload_len + 20, IPV4, self.source, self.destination)
    }
}

/// IANA's numbers of what follows the IPv4 header.
const IPV4: u8 = 4;
const UDP: u8 = 17;

fn ipv4(tos: u8, total_len: u16, protocol: u8, source: Ipv4Addr, destination: Ipv4Addr) -> [u8; 20] {
    let mut out = [0; 20];
    out[0] = 0x45;
    out[1] = tos;
    out[2..4].copy_from_slice(&total_len.to_be_bytes());
    out[6] = 0x40;
    out[8] = TTL;
    out[9] = protocol;
    out[12..16].copy_from_slice(&source.octets());
    out[16..20].copy_from_slice(&destination.octets());
    let sum = checksum::of(&out);
    out[10..12].copy_from_slice(&sum.to_be_bytes());
    out
}

/// The outer UDP source port of a flow: 14 bits of its hash in the dynamic range (RFC 6335), away from those that
/// choose the bucket, so that routers and receive queues spread flows of one bucket too.
pub const fn source_port(hash: u64) -> u16 {
    SOURCE_PORT_BASE | (hash >> SOURCE_PORT_SHIFT) as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn etherparse_reads_what_was_meant(
            source: [u8; 4], destination: [u8; 4], source_port: u16, destination_port: u16, tos: u8, payload_len in 0u16..9000
        ) {
            let (source, destination) = (Ipv4Addr::from(source), Ipv4Addr::from(destination));
            let bytes = Outer { source, destination, source_port, destination_port, tos, payload_len }.to_bytes();
            let (ip, rest) = etherparse::Ipv4Header::from_slice(&bytes).unwrap();
            prop_assert_eq!(ip.header_checksum, ip.calc_header_checksum());
            prop_assert!(ip.dont_fragment && !ip.more_fragments);
            prop_assert_eq!((ip.source, ip.destination), (source.octets(), destination.octets()));
            prop_assert_eq!(ip.total_len, payload_len + 28);
            prop_assert_eq!((ip.dscp.value() << 2) | ip.ecn.value(), tos);
            let (udp, _) = etherparse::UdpHeader::from_slice(rest).unwrap();
            prop_assert_eq!((udp.source_port, udp.destination_port), (source_port, destination_port));
            prop_assert_eq!((udp.length, udp.checksum), (payload_len + 8, 0));
        }

        #[test]
        fn etherparse_reads_an_ipip_header_as_it_was_meant(
            source: [u8; 4], destination: [u8; 4], tos: u8, payload_len in 0u16..9000
        ) {
            let (source, destination) = (Ipv4Addr::from(source), Ipv4Addr::from(destination));
            let bytes = Ipip { source, destination, tos, payload_len }.to_bytes();
            let (ip, rest) = etherparse::Ipv4Header::from_slice(&bytes).unwrap();
            prop_assert!(rest.is_empty());
            prop_assert_eq!(ip.header_checksum, ip.calc_header_checksum());
            prop_assert!(ip.dont_fragment && !ip.more_fragments);
            prop_assert_eq!((ip.identification, ip.fragment_offset.value(), ip.time_to_live), (0, 0, TTL));
            prop_assert_eq!(ip.protocol, etherparse::IpNumber::IPV4);
            prop_assert_eq!((ip.source, ip.destination), (source.octets(), destination.octets()));
            prop_assert_eq!(ip.total_len, payload_len + 20);
            prop_assert_eq!((ip.dscp.value() << 2) | ip.ecn.value(), tos);
        }
    }
}
