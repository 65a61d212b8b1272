//! The path of a packet: parse → service → keyed hash → bucket word → encapsulate.
//!
//! [`decide`] works on bursts of frames that lie wherever the packet I/O has them (a UMEM chunk, a ring slot, a
//! receive buffer), writes the outer headers into the room before each frame, and leaves a [`Verdict`]. It does
//! no I/O, takes no lock, allocates nothing and keeps nothing between bursts: the same frames and the same
//! [`Snapshot`] give the same bytes.
//!
//! A burst goes through in groups rather than packet by packet. Of each group, first all frames are parsed, then all
//! flows hashed, several at once; the buckets' words are fetched while the next group is looked at, and only then the
//! group is encapsulated. So the misses of many packets (frames, then words) overlap, and nobody waits for one.

use core::net::Ipv4Addr;

use arrayvec::ArrayVec;
use daisy_shared::bucket::{BackendId, BucketWord};
use daisy_shared::drop::DropReason;
use daisy_shared::service::Encapsulation;
use daisy_shared::wire::{fast, gue, outer};

use crate::metrics::Counters;
pub use crate::processor::GROUP;
use crate::processor::{self, Flows};
pub use crate::table::CLOSED_LEN;
use crate::table::{Reach, Snapshot, Template, service_key};

/// How many packets come and go together.
pub const BURST: usize = 64;

/// Length in bytes of all headers before the inner IP packet in an open window, but for VLAN tags.
pub const OPEN_LEN: usize = fast::ETHERNET_LEN + outer::LEN + gue::ONE_TO_VISIT_LEN;
/// Length in bytes of all headers before the inner IP packet with IPIP, but for VLAN tags.
pub const IPIP_LEN: usize = fast::ETHERNET_LEN + outer::IPIP_LEN;
/// The room in bytes that a frame needs before its first byte, so that it can be encapsulated in place. Tags that it
/// carries move within that, to the front.
pub const HEADROOM: usize = OPEN_LEN - fast::ETHERNET_LEN;

/// Where the fields that differ from packet to packet stand, from the start of the outer Ethernet header.
mod field {
    use super::fast;
    use core::ops::Range;

    const IP: usize = fast::ETHERNET_LEN;
    const UDP: usize = IP + 20;
    pub const TOS: usize = IP + 1;
    pub const IP_LEN: Range<usize> = IP + 2..IP + 4;
    pub const IP_CHECKSUM: Range<usize> = IP + 10..IP + 12;
    pub const UDP_SOURCE: Range<usize> = UDP..UDP + 2;
    pub const UDP_LEN: Range<usize> = UDP + 4..UDP + 6;
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not decided yet.
    Undecided,
    /// Send the frame, which is encapsulated now and begins with the Ethernet header of the next hop.
    Send {
        /// The bucket's head, to whom it goes.
        backend: BackendId,
        /// The number of the interface that it leaves by.
        egress: u8,
        /// Whether it carries a walk: its bucket's window is open.
        walk: bool,
    },
    /// Not for a service: it belongs to the host. The frame is as it came.
    Pass,
    /// Drop it and count the reason.
    Drop(DropReason),
}

/// One frame of a burst, in the memory of the packet I/O.
#[derive(Debug)]
pub struct Slot<'b> {
    buffer: &'b mut [u8],
    start: usize,
    end: usize,
    /// What becomes of it. Packet I/O may put a verdict here before [`decide`], which then leaves the frame
    /// alone, and may turn a `Send` into a drop where the device takes no more.
    pub verdict: Verdict,
}

impl<'b> Slot<'b> {
    /// The frame that lies in `buffer[start..start + len]`. What lies before `start` is room for headers.
    ///
    /// # Panics
    /// If the frame is not within the buffer.
    #[inline]
    pub fn new(buffer: &'b mut [u8], start: usize, len: usize) -> Slot<'b> {
        let end = start + len;
        assert!(end <= buffer.len(), "a frame of {len} bytes at {start} in a buffer of {}", buffer.len());
        Slot { buffer, start, end, verdict: Verdict::Undecided }
    }

    /// The frame, Ethernet header first.
    #[inline]
    pub fn frame(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// The frame, to be changed.
    #[inline]
    pub fn frame_mut(&mut self) -> &mut [u8] {
        &mut self.buffer[self.start..self.end]
    }

    /// Where the frame begins in its buffer.
    #[inline]
    pub fn start(&self) -> usize {
        self.start
    }
}

impl Counters {
    /// Counts a burst whose verdicts have been carried out. This is the one exit of every packet.
    pub fn count(&mut self, burst: &[Slot<'_>]) {
        for slot in burst {
            self.received += 1;
            match slot.verdict {
                Verdict::Send { walk, .. } => {
                    self.sent += 1;
                    self.chained_header += u64::from(walk);
                }
                Verdict::Pass => self.passed += 1,
                Verdict::Drop(reason) => self.dropped[reason as usize] += 1,
                // Conservation shows it: received, and nothing became of it.
                Verdict::Undecided => debug_assert!(false, "a packet left without a verdict"),
            }
        }
    }
}

/// What parsing finds out about a packet that is for a service.
#[derive(Clone, Copy, Debug, Default)]
struct Wanted {
    /// The frame, as an index into the burst.
    slot: u8,
    /// Length in bytes of the link-layer header, tags included.
    link_len: u8,
    tos: u8,
    ip_len: u16,
    /// The service, as an index into the snapshot's.
    service: u32,
}

/// What is found out about a group: its packets that are for a service, one after the other, and their flows in
/// columns.
#[derive(Clone, Debug)]
struct Found {
    len: usize,
    wanted: [Wanted; GROUP],
    flows: Flows,
}

impl Found {
    #[inline]
    fn push(&mut self, wanted: Wanted, key: (u64, u64), message: [u64; 2]) {
        // A group has no more; the mask tells the compiler.
        let row = self.len % GROUP;
        (self.flows.key[0][row], self.flows.key[1][row]) = key;
        [self.flows.message[0][row], self.flows.message[1][row]] = message;
        self.wanted[row] = wanted;
        self.len += 1;
    }
}

/// What [`decide`] writes down between its steps: the group that was looked at last and the one before. It says
/// nothing to the next burst, and is kept for it only because clearing so much memory would cost more than a packet.
#[derive(Debug)]
pub struct Scratch([Found; 2]);

impl Default for Scratch {
    fn default() -> Scratch {
        let found = Found { len: 0, wanted: [Wanted::default(); GROUP], flows: Flows::EMPTY };
        Scratch([found.clone(), found])
    }
}

/// Decides about every frame of a burst that has no verdict yet, and encapsulates those that are sent. All came in
/// by the interface of number `ingress`.
///
/// # Panics
/// If the snapshot has no interface of that number.
pub fn decide(snapshot: &Snapshot, scratch: &mut Scratch, ingress: u8, burst: &mut [Slot<'_>]) {
    let station = Station::new(snapshot.links[usize::from(ingress)].mac);
    let len = burst.len();
    let group = |k: usize| (k * GROUP).min(len)..((k + 1) * GROUP).min(len);
    let groups = len.div_ceil(GROUP);
    let mut last = Service::NONE;
    fetch(&burst[group(0)]);
    for k in 0..=groups {
        if k < groups {
            fetch(&burst[group(k + 1)]);
            look_at(snapshot, &station, &mut last, &mut scratch.0[k % 2], &mut burst[group(k)]);
        }
        if k > 0 {
            forward(snapshot, &scratch.0[(k - 1) % 2], &mut burst[group(k - 1)]);
        }
    }
}

/// Has the memory of frames fetched.
#[inline(always)]
fn fetch(group: &[Slot<'_>]) {
    for slot in group {
        processor::prefetch(slot.buffer, slot.start);
        processor::prefetch(slot.buffer, slot.start.wrapping_sub(1));
    }
}

/// Finds out which packets of a group are for a service, and has their buckets' words fetched. The others get their
/// verdicts.
#[inline(always)]
fn look_at(
    snapshot: &Snapshot,
    station: &Station,
    last: &mut Service,
    found: &mut Found,
    group: &mut [Slot<'_>],
) {
    found.len = 0;
    for (i, slot) in group.iter_mut().enumerate() {
        if !matches!(slot.verdict, Verdict::Undecided) {
            continue;
        }
        match classify(snapshot, station, last, slot.frame()) {
            Ok((wanted, message)) => {
                found.push(Wanted { slot: i as u8, ..wanted }, last.hash_key, message);
            }
            Err(verdict) => slot.verdict = verdict,
        }
    }
    let Found { len, wanted, flows } = found;
    flows.hash();
    for (wanted, hash) in wanted[..*len].iter().zip(&flows.hash) {
        let table = &snapshot.service(wanted.service).table;
        processor::prefetch(table.words(), table.position(*hash));
    }
}

/// Sends the packets that were found to the heads of their buckets.
#[inline(always)]
fn forward(snapshot: &Snapshot, found: &Found, group: &mut [Slot<'_>]) {
    for (wanted, hash) in found.wanted[..found.len].iter().zip(&found.flows.hash) {
        let word = snapshot.service(wanted.service).table.lookup(*hash);
        let slot = &mut group[usize::from(wanted.slot)];
        let is_common = word.previous() == BackendId::NONE && wanted.link_len == fast::ETHERNET_LEN as u8;
        let result = if is_common {
            encapsulate::<true>(snapshot, slot, wanted, *hash, word)
        } else {
            encapsulate_any(snapshot, slot, wanted, *hash, word)
        };
        if let Err(reason) = result {
            slot.verdict = Verdict::Drop(reason);
        }
    }
}

/// The Ethernet address of the interface that a burst came in by.
struct Station {
    mac: [u8; 6],
    /// For [`fast::parse_common`].
    word: u64,
}

impl Station {
    fn new(mac: [u8; 6]) -> Station {
        let [a, b, c, d, e, f] = mac;
        Station { mac, word: u64::from_le_bytes([a, b, c, d, e, f, 0, 0]) }
    }
}

/// A service that packets were for: the next packet is likely for the same.
#[derive(Clone, Copy)]
struct Service {
    key: u64,
    index: u32,
    hash_key: (u64, u64),
}

impl Service {
    /// No service's key is 0.
    const NONE: Service = Service { key: 0, index: 0, hash_key: (0, 0) };
}

/// Which service a frame is for, which becomes `last`, and its flow; otherwise its verdict.
#[inline(always)]
fn classify(
    snapshot: &Snapshot,
    station: &Station,
    last: &mut Service,
    frame: &[u8],
) -> Result<(Wanted, [u64; 2]), Verdict> {
    let (message, wanted) = match fast::parse_common(frame, station.word) {
        Some(fast::Common { message, tos, ip_len }) => {
            (message, Wanted { link_len: fast::ETHERNET_LEN as u8, tos, ip_len, ..Wanted::default() })
        }
        None => classify_any(snapshot, station, frame)?,
    };
    let key = service_key(message);
    if key != last.key {
        let index = snapshot.find(key).ok_or(Verdict::Pass)?;
        *last = Service { key, index, hash_key: snapshot.service(index).hash_key.words() };
    }
    Ok((Wanted { service: last.index, ..wanted }, message))
}

/// The flow of a frame that is not of the common kind; otherwise its verdict.
#[inline(never)]
fn classify_any(snapshot: &Snapshot, station: &Station, frame: &[u8]) -> Result<([u64; 2], Wanted), Verdict> {
    // A frame for another station (flooded by a switch, or broadcast) is another mux's, or nobody's.
    if frame.get(..6).is_some_and(|destination| destination != station.mac) {
        return Err(Verdict::Pass);
    }
    match fast::parse(frame) {
        Ok(fast::Frame::Flow(packet)) => {
            let fast::Packet { flow, link_len, tos, ip_len, .. } = packet;
            Ok((flow.message(), Wanted { link_len, tos, ip_len, ..Wanted::default() }))
        }
        Ok(fast::Frame::Fragment { destination }) if snapshot.is_vip(destination) => {
            Err(Verdict::Drop(DropReason::Fragment))
        }
        Ok(fast::Frame::Fragment { .. } | fast::Frame::Other) => Err(Verdict::Pass),
        Err(reason) => Err(malformed(snapshot, frame, reason)),
    }
}

/// A malformed packet is dropped, unless it says that it is for somebody else: the host judges its own.
#[cold]
fn malformed(snapshot: &Snapshot, frame: &[u8], reason: DropReason) -> Verdict {
    let ip = fast::link_len(frame).ok().flatten().and_then(|len| frame[len..].first_chunk::<20>());
    match ip {
        Some(ip) if !snapshot.is_vip(Ipv4Addr::new(ip[16], ip[17], ip[18], ip[19])) => Verdict::Pass,
        _ => Verdict::Drop(reason),
    }
}

/// [`encapsulate`] where something is to be kept or written that most packets do without.
#[inline(never)]
fn encapsulate_any(
    snapshot: &Snapshot,
    slot: &mut Slot<'_>,
    wanted: &Wanted,
    hash: u64,
    word: BucketWord,
) -> Result<(), DropReason> {
    encapsulate::<false>(snapshot, slot, wanted, hash, word)
}

/// Writes the outer headers before the IP packet of a frame, and the verdict to send it. `COMMON` says that the
/// window is closed and the frame has no tag, so that what the others need is not even compiled.
#[inline(always)]
fn encapsulate<const COMMON: bool>(
    snapshot: &Snapshot,
    slot: &mut Slot<'_>,
    wanted: &Wanted,
    hash: u64,
    word: BucketWord,
) -> Result<(), DropReason> {
    let (head, previous) = (word.head(), word.previous());
    let walk = !COMMON && previous != BackendId::NONE;
    let (encapsulation, outer_len) = match snapshot.service(wanted.service).encapsulation {
        // Only GUE has room for a walk.
        _ if walk => (Encapsulation::Gue, OPEN_LEN - fast::ETHERNET_LEN),
        Encapsulation::Gue => (Encapsulation::Gue, CLOSED_LEN - fast::ETHERNET_LEN),
        Encapsulation::Ipip => (Encapsulation::Ipip, outer::IPIP_LEN),
    };
    let Some(template) = snapshot.template(encapsulation, head) else {
        return Err(unreachable(snapshot, word));
    };
    let ip_len = outer_len + usize::from(wanted.ip_len);
    // Without a next hop nothing fits.
    if ip_len > usize::from(template.mtu) {
        return Err(unreachable(snapshot, word));
    }
    // Below the MTU, which is 16 bits.
    let ip_len = ip_len as u16;
    let link_len = if COMMON { fast::ETHERNET_LEN } else { usize::from(wanted.link_len) };
    let inner = slot.start + link_len;
    let Some(start) = slot.start.checked_sub(outer_len) else { return Err(DropReason::NoHeadroom) };
    let header = if walk {
        match snapshot.template(Encapsulation::Gue, previous) {
            // Not sent without its walk: this cannot happen while directories are applied before tables, and if it
            // did, it had better be seen.
            None | Some(Template { reach: Reach::Unknown, .. }) => return Err(DropReason::UnknownBackend),
            Some(previous) => Some(gue::one_to_visit(word.generation(), previous.address)),
        }
    } else {
        None
    };
    // Nothing is written before here. The tags are where the outer headers come to lie.
    let tagged = (link_len > fast::ETHERNET_LEN).then(|| Tags::of(slot.frame(), link_len));
    let ip_start = inner - outer_len;
    let out = &mut slot.buffer[ip_start - fast::ETHERNET_LEN..inner];
    let checksum = template.ip_checksum(wanted.tos, ip_len);
    if encapsulation == Encapsulation::Gue {
        out[..CLOSED_LEN].copy_from_slice(&template.headers);
        out[field::UDP_SOURCE].copy_from_slice(&outer::source_port(hash).to_be_bytes());
        out[field::UDP_LEN].copy_from_slice(&(ip_len - 20).to_be_bytes());
    } else {
        out[..IPIP_LEN].copy_from_slice(&template.headers[..IPIP_LEN]);
    }
    out[field::TOS] = wanted.tos;
    out[field::IP_LEN].copy_from_slice(&ip_len.to_be_bytes());
    out[field::IP_CHECKSUM].copy_from_slice(&checksum.to_be_bytes());
    if let Some(header) = header {
        out[CLOSED_LEN - gue::BASE_LEN..].copy_from_slice(&header);
    }
    if let Some(tags) = tagged {
        tags.put(&mut slot.buffer[start..ip_start], &template.headers);
    }
    slot.start = start;
    // Ethernet pads short frames; the padding is not part of the packet.
    slot.end = inner + usize::from(wanted.ip_len);
    slot.verdict = Verdict::Send { backend: head, egress: template.egress, walk };
    Ok(())
}

/// Why a packet of this bucket cannot be sent on.
#[cold]
fn unreachable(snapshot: &Snapshot, word: BucketWord) -> DropReason {
    let reach = |backend| snapshot.template(Encapsulation::Gue, backend).map_or(Reach::Unknown, |t| t.reach);
    let Some(head) = word.head().some() else { return DropReason::NoBackend };
    match (reach(head), word.previous().some().map(reach)) {
        (Reach::Unknown, _) | (_, Some(Reach::Unknown)) => DropReason::UnknownBackend,
        (Reach::NoNextHop, _) => DropReason::NoNextHop,
        (Reach::Resolved, _) => DropReason::TooBig,
    }
}

/// The VLAN tags of a frame, with the EtherType behind them.
struct Tags(ArrayVec<u8, { fast::MAX_LINK_LEN - Tags::START }>);

impl Tags {
    /// Where tags stand in a frame: behind both addresses.
    const START: usize = 12;

    #[cold]
    fn of(frame: &[u8], link_len: usize) -> Tags {
        Tags(frame[Tags::START..link_len].iter().copied().collect())
    }

    /// Writes a link-layer header: the addresses of a template, and the tags.
    #[cold]
    fn put(&self, link: &mut [u8], headers: &[u8]) {
        link[..Tags::START].copy_from_slice(&headers[..Tags::START]);
        link[Tags::START..].copy_from_slice(&self.0);
    }
}
