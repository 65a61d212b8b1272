//! The fast parse of what clients send: Ethernet II, up to two VLAN tags, IPv4, TCP or UDP. Property tests hold it
//! equal to `etherparse`.

use core::net::Ipv4Addr;
use core::ops::Range;

use crate::checksum;
use crate::drop::DropReason;
use crate::flow::FlowV4;

/// Length in bytes of an Ethernet II header.
pub const ETHERNET_LEN: usize = 14;
/// EtherType of IPv4.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// EtherType of a customer's VLAN tag (IEEE 802.1Q).
pub const ETHERTYPE_VLAN: u16 = 0x8100;
/// EtherType of a provider's VLAN tag (IEEE 802.1ad).
pub const ETHERTYPE_PROVIDER_VLAN: u16 = 0x88a8;
/// Length in bytes of a VLAN tag: its EtherType, priority and number.
pub const VLAN_LEN: usize = 4;
/// Length in bytes of the longest link-layer header that is looked behind: two tags.
pub const MAX_LINK_LEN: usize = ETHERNET_LEN + 2 * VLAN_LEN;

const ETHERTYPE: Range<usize> = 12..14;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame {
    /// A whole TCP segment or UDP datagram over IPv4.
    Flow(Packet),
    /// A fragment of an IPv4 packet: not all of its ports are here.
    Fragment {
        /// Where it is bound for.
        destination: Ipv4Addr,
    },
    /// Something that no service here can want.
    Other,
}

/// A whole TCP segment or UDP datagram over IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Its 5-tuple.
    pub flow: FlowV4,
    /// Length in bytes of what stands before the IP packet: [`ETHERNET_LEN`], and [`VLAN_LEN`] for each tag. 0 where
    /// only an IP packet was parsed.
    pub link_len: u8,
    /// DSCP and ECN.
    pub tos: u8,
    /// Length in bytes of the IP packet, which may be shorter than the frame: Ethernet pads to 60 bytes.
    pub ip_len: u16,
    /// Whether this is the start of a TCP connection: SYN without ACK.
    pub is_syn: bool,
}

/// Parses an Ethernet frame.
///
/// # Errors
/// The reason to drop it, where it announces IPv4 and is not well-formed.
#[inline]
pub fn parse(frame: &[u8]) -> Result<Frame, DropReason> {
    let Some(ethertype) = frame.get(ETHERTYPE) else { return Err(DropReason::Truncated) };
    if ethertype == ETHERTYPE_IPV4.to_be_bytes() {
        return behind_link(frame, ETHERNET_LEN);
    }
    match link_len(frame)? {
        Some(len) => behind_link(frame, len),
        None => Ok(Frame::Other),
    }
}

/// What most frames are: no VLAN tag, an IPv4 header without options, and a whole TCP segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Common {
    /// The flow, see [`FlowV4::message`].
    pub message: [u64; 2],
    /// DSCP and ECN.
    pub tos: u8,
    /// Length in bytes of the IP packet.
    pub ip_len: u16,
}

/// Length in bytes of the headers in the common case: Ethernet, IPv4 and TCP without options.
const COMMON_LEN: usize = ETHERNET_LEN + 20 + 20;

/// Parses a frame that is what most are, and is bound for `station`, its Ethernet address in the six low bytes of a
/// little-endian word. `None` says nothing about a frame but that [`parse`] must look at it.
///
/// All checks of [`parse`] are here, on words rather than fields, and with one way out.
#[inline(always)]
pub fn parse_common(frame: &[u8], station: u64) -> Option<Common> {
    let head: &[u8; COMMON_LEN] = frame.first_chunk()?;
    let word = |at: usize| u64::from_le_bytes(*head[at..].first_chunk().expect("within the headers"));
    let half =
        |at: usize| u64::from(u32::from_le_bytes(*head[at..].first_chunk().expect("within the headers")));
    // EtherType, version and header length; the type of service may be anything.
    let is_ipv4 = half(12) & 0x00ff_ffff == 0x0045_0008;
    let for_us = word(0) << 16 == station << 16;
    // No fragment (the flag "don't" and the reserved one do not count), and TCP.
    let is_whole_tcp = half(20) & 0xff00_ff3f == u64::from(TCP) << 24;
    // The sum of 16-bit words is the same, whatever their byte order and however many are added at once.
    let sum = half(14) + half(18) + half(22) + half(26) + half(30);
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    let ip_len = u16::from_be_bytes([head[16], head[17]]);
    let data_offset = usize::from(head[46] >> 4) * 4;
    let lengths_fit = usize::from(ip_len) + ETHERNET_LEN <= frame.len()
        && data_offset >= 20
        && data_offset + 20 <= usize::from(ip_len);
    if !(is_ipv4 & for_us & is_whole_tcp & (sum == 0xffff) & lengths_fit) {
        return None;
    }
    Some(Common { message: [word(26), half(34) | u64::from(TCP) << 32], tos: head[15], ip_len })
}

/// Length in bytes of the link-layer header, tags included, where an IPv4 packet follows it.
///
/// # Errors
/// [`DropReason::Truncated`] if the frame ends inside.
#[cold]
pub fn link_len(frame: &[u8]) -> Result<Option<usize>, DropReason> {
    let mut len = ETHERNET_LEN;
    loop {
        let ethertype: [u8; 2] = match frame.get(len - 2..len) {
            Some(bytes) => [bytes[0], bytes[1]],
            None => return Err(DropReason::Truncated),
        };
        match u16::from_be_bytes(ethertype) {
            ETHERTYPE_IPV4 => return Ok(Some(len)),
            ETHERTYPE_VLAN | ETHERTYPE_PROVIDER_VLAN if len < MAX_LINK_LEN => len += VLAN_LEN,
            _ => return Ok(None),
        }
    }
}

#[inline]
fn behind_link(frame: &[u8], len: usize) -> Result<Frame, DropReason> {
    Ok(match parse_ipv4(&frame[len..])? {
        // At most `MAX_LINK_LEN`.
        Frame::Flow(packet) => Frame::Flow(Packet { link_len: len as u8, ..packet }),
        other => other,
    })
}

/// Parses an IPv4 packet; bytes after its end are ignored.
///
/// # Errors
/// The reason to drop it, where it is not well-formed.
#[inline]
pub fn parse_ipv4(bytes: &[u8]) -> Result<Frame, DropReason> {
    let ip: &[u8; 20] = bytes.first_chunk().ok_or(DropReason::Truncated)?;
    let header_len = usize::from(ip[0] & 0x0f) * 4;
    let ip_len = u16::from_be_bytes([ip[2], ip[3]]);
    if ip[0] >> 4 != 4 || header_len < 20 || usize::from(ip_len) < header_len {
        return Err(DropReason::BadIpHeader);
    }
    let packet = bytes.get(..usize::from(ip_len)).ok_or(DropReason::Truncated)?;
    if checksum::of(&packet[..header_len]) != 0 {
        return Err(DropReason::BadIpChecksum);
    }
    let (source, destination) = (address(&ip[12..16]), address(&ip[16..20]));
    let fragment = u16::from_be_bytes([ip[6], ip[7]]) & 0x3fff;
    if fragment != 0 {
        return Ok(Frame::Fragment { destination });
    }
    let protocol = ip[9];
    let transport = &packet[header_len..];
    let is_syn = match protocol {
        TCP => {
            let tcp: &[u8; 20] = transport.first_chunk().ok_or(DropReason::BadTransportHeader)?;
            let data_offset = usize::from(tcp[12] >> 4) * 4;
            if data_offset < 20 || data_offset > transport.len() {
                return Err(DropReason::BadTransportHeader);
            }
            tcp[13] & 0x12 == 0x02
        }
        UDP => {
            let udp: &[u8; 8] = transport.first_chunk().ok_or(DropReason::BadTransportHeader)?;
            let udp_len = usize::from(u16::from_be_bytes([udp[4], udp[5]]));
            if udp_len < 8 || udp_len > transport.len() {
                return Err(DropReason::BadTransportHeader);
            }
            false
        }
        _ => return Ok(Frame::Other),
    };
    let source_port = u16::from_be_bytes([transport[0], transport[1]]);
    let destination_port = u16::from_be_bytes([transport[2], transport[3]]);
    let flow = FlowV4 { source, destination, source_port, destination_port, protocol };
    Ok(Frame::Flow(Packet { flow, link_len: 0, tos: ip[1], ip_len, is_syn }))
}

/// The address in exactly four bytes.
fn address(octets: &[u8]) -> Ipv4Addr {
    Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3])
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
    use proptest::prelude::*;

    /// A TCP or UDP packet, then up to three of its bytes changed and its end cut.
    fn frames() -> impl Strategy<Value = Vec<u8>> {
        let addresses = any::<([u8; 4], [u8; 4], u16, u16)>();
        let payload = proptest::collection::vec(any::<u8>(), 0..64);
        let changes = proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3);
        (addresses, any::<bool>(), any::<bool>(), payload, changes, 0usize..20, 0usize..4).prop_map(
            |((source, destination, sport, dport), tcp, syn, payload, changes, cut, tags)| {
                let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]).ipv4(
                    source,
                    destination,
                    64,
                );
                let mut frame = Vec::new();
                if tcp {
                    let builder = builder.tcp(sport, dport, 7, 1000);
                    let builder = if syn { builder.syn() } else { builder.ack(9) };
                    builder.write(&mut frame, &payload).unwrap();
                } else {
                    builder.udp(sport, dport).write(&mut frame, &payload).unwrap();
                }
                for (at, value) in changes {
                    let at = at.index(frame.len());
                    frame[at] = value;
                }
                // Half of the changed headers get a right checksum again, or nothing behind it would be reached.
                if cut % 2 == 0 && frame[14] & 0x0f >= 5 {
                    let len = (usize::from(frame[14] & 0x0f) * 4).min(frame.len() - 14);
                    frame[24..26].fill(0);
                    let sum = checksum::of(&frame[14..14 + len]);
                    frame[24..26].copy_from_slice(&sum.to_be_bytes());
                }
                frame.truncate(frame.len() - cut / 2);
                // The outermost tag first. Three are more than is looked behind.
                for tag in [[0x81, 0, 0x20, 7], [0x88, 0xa8, 0, 9], [0x88, 0xa8, 0, 1]].iter().take(tags) {
                    frame.splice(12..12, *tag);
                }
                frame
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]
        #[test]
        fn equals_etherparse(frame in frames()) {
            match (parse(&frame), SlicedPacket::from_ethernet(&frame)) {
                (Ok(Frame::Flow(packet)), Ok(sliced)) => {
                    let Some(NetSlice::Ipv4(ip)) = sliced.net else { panic!("not IPv4 to etherparse") };
                    let header = ip.header();
                    prop_assert_eq!(packet.flow.source, header.source_addr());
                    prop_assert_eq!(packet.flow.destination, header.destination_addr());
                    prop_assert_eq!(packet.ip_len, header.total_len());
                    prop_assert_eq!(packet.tos, header.dcp().value() << 2 | header.ecn().value());
                    prop_assert_eq!(packet.flow.protocol, header.protocol().0);
                    let (ports, is_syn) = match sliced.transport {
                        Some(TransportSlice::Tcp(tcp)) => ((tcp.source_port(), tcp.destination_port()), tcp.syn() && !tcp.ack()),
                        Some(TransportSlice::Udp(udp)) => ((udp.source_port(), udp.destination_port()), false),
                        _ => panic!("neither TCP nor UDP to etherparse"),
                    };
                    prop_assert_eq!((packet.flow.source_port, packet.flow.destination_port), ports);
                    prop_assert_eq!(packet.is_syn, is_syn);
                    prop_assert_eq!(usize::from(packet.link_len), ETHERNET_LEN + VLAN_LEN * sliced.link_exts.len());
                }
                (Ok(Frame::Flow(packet)), Err(error)) => panic!("{packet:?}, but etherparse: {error}"),
                (Ok(Frame::Fragment { destination }), Ok(sliced)) => {
                    let Some(NetSlice::Ipv4(ip)) = sliced.net else { panic!("not IPv4 to etherparse") };
                    prop_assert!(ip.header().is_fragmenting_payload());
                    prop_assert_eq!(destination, ip.header().destination_addr());
                }
                (Err(DropReason::BadIpChecksum), _) => {
                    let len = link_len(&frame).unwrap().unwrap();
                    let (header, _) = etherparse::Ipv4Header::from_slice(&frame[len..]).unwrap();
                    prop_assert_ne!(header.header_checksum, header.calc_header_checksum());
                }
                // etherparse takes a UDP length of 0 for "as long as the packet" (RFC 2675); over IPv4 it is an error.
                (Err(DropReason::BadTransportHeader), Ok(sliced)) => {
                    let Some(TransportSlice::Udp(udp)) = sliced.transport else { panic!("well-formed to etherparse") };
                    prop_assert!(udp.length() == 0);
                }
                (Err(reason), Ok(_)) => panic!("{reason}, but etherparse takes it"),
                (Ok(Frame::Fragment { .. } | Frame::Other) | Err(_), _) => {}
            }
        }

        #[test]
        fn the_common_case_is_no_other(frame in frames(), station_is_other: bool) {
            let station = if station_is_other { 0x0300_0000_0002 } else { 0x0200_0000_0002 };
            let parsed = parse(&frame);
            match parse_common(&frame, station) {
                Some(common) => {
                    prop_assert_eq!(&frame[..6], &[2, 0, 0, 0, 0, 2][..]);
                    let Ok(Frame::Flow(packet)) = parsed else { panic!("{parsed:?}") };
                    prop_assert_eq!(common.message, packet.flow.message());
                    prop_assert_eq!((common.tos, common.ip_len), (packet.tos, packet.ip_len));
                    prop_assert_eq!((packet.flow.protocol, usize::from(packet.link_len)), (TCP, ETHERNET_LEN));
                }
                // It must not miss what it is for.
                None => if let Ok(Frame::Flow(packet)) = parsed {
                    let common = packet.flow.protocol == TCP && frame[12..15] == [8, 0, 0x45];
                    prop_assert!(!common || frame[..6] != station.to_le_bytes()[..6]);
                },
            }
        }

        #[test]
        fn a_cut_at_any_byte_is_an_error(frame in frames(), cut: prop::sample::Index) {
            if let Ok(Frame::Flow(packet)) = parse(&frame) {
                let whole = usize::from(packet.link_len) + usize::from(packet.ip_len);
                prop_assert!(parse(&frame[..cut.index(whole)]).is_err());
                prop_assert_eq!(parse(&frame[..whole]), Ok(Frame::Flow(packet)));
            }
        }
    }
}
