//! What the data path must do with a frame, said by `daisy_shared` alone.

use std::collections::{BTreeMap, HashMap};
use std::net::Ipv4Addr;
use std::ops::Range;

use daisy_shared::chain::{Decision, Kind, Knowledge, MAX_OWNERS, Verdict, Walk, decide};
use daisy_shared::drop::DropReason;
use daisy_shared::flow::bucket_of;
use daisy_shared::service::{Encapsulation, Service, ServiceId};
use daisy_shared::wire::fast::{self, ETHERNET_LEN, Frame, Packet};
use daisy_shared::wire::gue::{self, Header};
use daisy_shared::wire::{outer, probe};

use crate::common::{GUE_PORT, ME};

pub const XDP_DROP: u32 = 1;
pub const XDP_PASS: u32 = 2;
pub const XDP_TX: u32 = 3;
const GUE_AT: usize = ETHERNET_LEN + outer::LEN;
const IPIP_AT: usize = ETHERNET_LEN + outer::IPIP_LEN;
const IPIP: u8 = 4;
const UDP: u8 = 17;

/// A cookie carries the number of one of so many maximum segment sizes, added to a hash and the client's sequence
/// number. The ones sent carry number 0; with any other they are as valid.
const COOKIE_MSS: u32 = 4;

/// What the local stack holds for a tuple.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Local {
    /// A connection in any state but TIME_WAIT.
    Connection,
    /// A request socket.
    Request,
    /// A connection that has ended.
    TimeWait,
    /// A SYN cookie that is out: the sequence number and acknowledgement that bring it back.
    Cookie(u32, u32),
}

/// What is known of another agent.
#[derive(Clone, Copy, Debug, Default)]
pub struct Neighbour {
    /// Destination and source of frames for it.
    pub macs: Option<([u8; 6], [u8; 6])>,
    pub dead: bool,
}

/// All that the data path consults besides the packet.
pub struct World {
    pub services: Vec<Service>,
    pub trusted: Vec<(Ipv4Addr, u8)>,
    pub peers: BTreeMap<Ipv4Addr, Neighbour>,
    pub knowledge: HashMap<(ServiceId, u32), Knowledge<Ipv4Addr>>,
    /// By client address, client port and service port.
    pub sockets: HashMap<(Ipv4Addr, u16, u16), Local>,
    pub mtu: usize,
    pub chaining: bool,
}

/// What comes of a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    pub action: u32,
    /// Of a frame that is not dropped.
    pub frame: Option<Vec<u8>>,
    pub counter: String,
    /// The bucket that was looked at.
    pub bucket: Option<(ServiceId, u32)>,
    /// What is known of it from now on, if the packet has taught something.
    pub learned: Option<Knowledge<Ipv4Addr>>,
    /// The peer that is asked for.
    pub wanted: Option<Ipv4Addr>,
}

fn end(action: u32, counter: &str, frame: Option<Vec<u8>>) -> Expected {
    let counter = counter.to_owned();
    Expected { action, frame, counter, bucket: None, learned: None, wanted: None }
}

fn dropped(reason: DropReason) -> Expected {
    end(XDP_DROP, &format!("dropped_{reason}"), None)
}

impl World {
    pub fn expect(&self, frame: &[u8]) -> Expected {
        self.process(frame).unwrap_or_else(dropped)
    }

    fn process(&self, frame: &[u8]) -> Result<Expected, DropReason> {
        let takes_ipip = self.services.iter().any(|service| service.encapsulation == Encapsulation::Ipip);
        if !is_for_the_data_path(frame, takes_ipip) {
            return Ok(end(XDP_PASS, "passed", Some(frame.to_vec())));
        }
        let source = Ipv4Addr::new(frame[26], frame[27], frame[28], frame[29]);
        if !self.trusted.iter().any(|prefix| covers(*prefix, source)) {
            return Err(DropReason::UntrustedSource);
        }
        let parsed = fast::parse(frame)?;
        let (header, inner_at, inner_end) = if frame[23] == IPIP {
            assert_eq!(parsed, Frame::Other);
            let ip_len = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
            (Header { protocol: gue::PROTO_IPV4, walk: None }, IPIP_AT, ETHERNET_LEN + ip_len)
        } else {
            assert!(matches!(parsed, Frame::Flow(_)), "it is UDP and no fragment");
            let udp_len = usize::from(u16::from_be_bytes([frame[38], frame[39]]));
            let payload = &frame[GUE_AT..GUE_AT + udp_len - 8];
            if let Some((probe::REQUEST, nonce)) = probe::parse(payload) {
                return Ok(end(XDP_TX, "probes_answered", Some(answer(frame, nonce))));
            }
            let header = Header::parse(payload)?;
            let inner_at = GUE_AT + header.len();
            (header, inner_at, GUE_AT + payload.len())
        };
        let inner = &frame[inner_at..inner_end];
        let packet = match fast::parse_ipv4(inner)? {
            Frame::Flow(packet) => packet,
            Frame::Fragment { .. } => return Err(DropReason::Fragment),
            Frame::Other => return Err(DropReason::UnknownService),
        };
        let service = self.services.iter().find(|service| {
            service.vip == packet.flow.destination
                && service.port == packet.flow.destination_port
                && service.protocol.number() == packet.flow.protocol
        });
        let service = service.ok_or(DropReason::UnknownService)?;
        let local = |counter| end(XDP_PASS, counter, Some(decapsulated(frame, inner_at)));
        let by_flags = if packet.is_syn { "accepted" } else { "delivered" };
        if !self.chaining {
            return Ok(local(by_flags));
        }
        let hash = packet.flow.hash(service.hash_key);
        let bucket = (service.id, bucket_of(hash, service.buckets));
        let knowledge = self.knowledge.get(&bucket);
        let walk = header.walk.as_ref();
        let kind = self.kind(&packet, &inner[usize::from(inner[0] & 0x0f) * 4..]);
        let dead = |owner| self.peers.get(&owner).is_some_and(|peer| peer.dead);
        let Decision { verdict, learned } = decide(ME, kind, walk, knowledge, dead);
        let closed = knowledge.is_some_and(|known| is_closed(known, walk));
        let back = packet.is_syn && knowledge.zip(walk).is_some_and(|(known, walk)| is_back(known, walk));
        let mut expected = match verdict {
            // Where the local stack gets the packet whatever it has, the data path does not look for a socket.
            Verdict::Deliver | Verdict::Accept | Verdict::Answer if closed || back => local(by_flags),
            Verdict::Deliver => local("delivered"),
            Verdict::Accept => local("accepted"),
            Verdict::Answer => local("answered"),
            Verdict::Drop(reason) => dropped(reason),
            Verdict::Send { to, walk } => {
                let source_port = match frame[23] {
                    IPIP => outer::source_port(hash),
                    _ => u16::from_be_bytes([frame[34], frame[35]]),
                };
                self.send(frame, inner_at..inner_end, to, walk, source_port)
            }
        };
        expected.bucket = Some(bucket);
        expected.learned = learned;
        Ok(expected)
    }

    fn kind(&self, packet: &Packet, tcp: &[u8]) -> Kind {
        let flow = &packet.flow;
        let word = |at: usize| u32::from_be_bytes([tcp[at], tcp[at + 1], tcp[at + 2], tcp[at + 3]]);
        let is_ack = tcp[13] & 0x16 == 0x10;
        let is_cookie = |sequence: u32, acknowledgement: u32| {
            let mss = word(8).wrapping_sub(acknowledgement).wrapping_sub(word(4).wrapping_sub(sequence));
            mss < COOKIE_MSS
        };
        match self.sockets.get(&(flow.source, flow.source_port, flow.destination_port)) {
            Some(Local::Connection | Local::Request) => Kind::Matched,
            Some(Local::TimeWait) if !packet.is_syn => Kind::Matched,
            Some(Local::Cookie(sequence, acknowledgement))
                if is_ack && is_cookie(*sequence, *acknowledgement) =>
            {
                Kind::Matched
            }
            _ if packet.is_syn => Kind::New,
            _ => Kind::Orphan,
        }
    }

    fn send(
        &self,
        frame: &[u8],
        inner: Range<usize>,
        to: Ipv4Addr,
        walk: Walk<Ipv4Addr>,
        source_port: u16,
    ) -> Expected {
        // What lies behind the outer packet, padding, stays.
        let (inner, rest) = (&frame[inner.clone()], &frame[inner.end..]);
        let header = Header { protocol: gue::PROTO_IPV4, walk: Some(walk) };
        let payload_len = header.len() + inner.len();
        if payload_len + outer::LEN > self.mtu {
            return dropped(DropReason::TooBig);
        }
        let Some((destination, source)) = self.peers.get(&to).and_then(|peer| peer.macs) else {
            return Expected { wanted: Some(to), ..dropped(DropReason::NoNextHop) };
        };
        let outer = outer::Outer {
            source: ME,
            destination: to,
            source_port,
            destination_port: GUE_PORT,
            tos: frame[15],
            payload_len: payload_len as u16,
        };
        let mut bytes = vec![0; header.len()];
        header.emit(&mut bytes);
        let sent = [&destination, &source, &[8, 0][..], &outer.to_bytes(), &bytes, inner, rest].concat();
        let returned = header.walk.is_some_and(|walk| walk.returned);
        end(XDP_TX, if returned { "returned" } else { "sent_on" }, Some(sent))
    }
}

/// IPv4 without options, no fragment, to this agent: UDP to its port, and not the answer to a probe; or IPIP.
fn is_for_the_data_path(frame: &[u8], takes_ipip: bool) -> bool {
    let is_gue = || frame.len() >= GUE_AT && frame[36..38] == GUE_PORT.to_be_bytes() && !is_reply(frame);
    frame.len() >= IPIP_AT
        && frame[12..15] == [0x08, 0x00, 0x45]
        && u16::from_be_bytes([frame[20], frame[21]]) & 0x3fff == 0
        && frame[30..34] == ME.octets()
        && match frame[23] {
            UDP => is_gue(),
            IPIP => takes_ipip,
            _ => false,
        }
}

fn is_reply(frame: &[u8]) -> bool {
    let payload = frame.get(GUE_AT..GUE_AT + probe::LEN);
    let kind = payload.and_then(probe::parse).map(|(kind, _)| kind);
    frame[38..40] == [0, 8 + probe::LEN as u8] && kind == Some(probe::REPLY)
}

fn covers((address, len): (Ipv4Addr, u8), source: Ipv4Addr) -> bool {
    let difference = u32::from(address) ^ u32::from(source);
    len == 0 || difference >> (32 - u32::from(len)) == 0
}

/// The chain holds this agent alone, a table says so, and the packet has nothing to add.
fn is_closed(known: &Knowledge<Ipv4Addr>, walk: Option<&Walk<Ipv4Addr>>) -> bool {
    let adds_nothing = walk.is_none_or(|walk| {
        known.generation.is_newer_than(walk.generation)
            || !walk.generation.is_newer_than(known.generation)
                && walk.to_visit.is_empty()
                && walk.visited.len() < MAX_OWNERS
    });
    known.from_table && known.chain[..] == [ME] && adds_nothing
}

/// The packet has gone along the whole chain that is known, back to this agent, which is its origin.
fn is_back(known: &Knowledge<Ipv4Addr>, walk: &Walk<Ipv4Addr>) -> bool {
    known.from_table
        && known.chain.first() == Some(&ME)
        && !known.generation.is_newer_than(walk.generation)
        && !walk.generation.is_newer_than(known.generation)
        && walk.to_visit.is_empty()
        && walk.visited == known.chain
}

fn decapsulated(frame: &[u8], inner_at: usize) -> Vec<u8> {
    [&frame[..12], &[8, 0], &frame[inner_at..]].concat()
}

fn answer(frame: &[u8], nonce: [u8; 8]) -> Vec<u8> {
    let mut answer = [&frame[6..12], &frame[0..6], &frame[12..26]].concat();
    answer.extend([&frame[30..34], &frame[26..30], &frame[36..38], &frame[34..36], &frame[38..40]].concat());
    answer.extend([0, 0]);
    answer.extend(probe::emit(probe::REPLY, nonce));
    answer.extend(&frame[GUE_AT + probe::LEN..]);
    answer
}
