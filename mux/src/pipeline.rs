//! The path of a packet: parse → service → keyed hash → bucket word → encapsulate.
//!
//! [`decide`] works on bursts of frames that lie wherever the packet I/O has them (a UMEM chunk, a ring slot, a
//! receive buffer), writes the outer headers into the room before each frame, and leaves a [`Verdict`]. It does
//! no I/O, takes no lock, allocates nothing and keeps nothing between bursts: the same frames and the same
//! [`Snapshot`] give the same bytes.
//!
//! A burst goes through three loops rather than each packet through all steps: the loads of one loop do not
//! depend on one another, so the misses of a whole burst (frame headers, then bucket words) overlap.

use core::net::Ipv4Addr;

use arrayvec::ArrayVec;
use daisy_shared::bucket::{BackendId, BucketWord};
use daisy_shared::chain::{Owners, Walk};
use daisy_shared::drop::DropReason;
use daisy_shared::service::Encapsulation;
use daisy_shared::wire::{fast, gue, outer};

pub use crate::table::CLOSED_LEN;
use crate::table::{Reach, Snapshot, Template};

/// How many packets go through the pipeline together.
pub const BURST: usize = 64;

/// Length in bytes of the GUE header in an open window: the walk with one owner to visit.
const GUE_OPEN_LEN: usize = gue::BASE_LEN + gue::WALK_BASE_LEN + 4;
/// Length in bytes of all headers before the inner IP packet in an open window, but for VLAN tags.
pub const OPEN_LEN: usize = fast::ETHERNET_LEN + outer::LEN + GUE_OPEN_LEN;
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

/// What the first loop finds out about a packet that is for a service.
#[derive(Clone, Copy)]
struct Wanted {
    hash: u64,
    /// The service, as an index into the snapshot's.
    service: u32,
    ip_len: u16,
    tos: u8,
    /// Length in bytes of the link-layer header, tags included.
    link_len: u8,
}

const NOT_WANTED: Wanted = Wanted { hash: 0, service: 0, ip_len: 0, tos: 0, link_len: 0 };

/// Decides about every frame of a burst that has no verdict yet, and encapsulates those that are sent. All came in
/// by the interface of number `ingress`.
///
/// # Panics
/// If the snapshot has no interface of that number.
pub fn decide(snapshot: &Snapshot, ingress: u8, burst: &mut [Slot<'_>]) {
    let station = snapshot.links[usize::from(ingress)].mac;
    for part in burst.chunks_mut(BURST) {
        let mut wanted = [NOT_WANTED; BURST];
        let mut words = [BucketWord::EMPTY; BURST];
        for (slot, wanted) in part.iter_mut().zip(&mut wanted) {
            if slot.verdict == Verdict::Undecided {
                match classify(snapshot, station, slot.frame()) {
                    Ok(found) => *wanted = found,
                    Err(verdict) => slot.verdict = verdict,
                }
            }
        }
        for (slot, (wanted, word)) in part.iter().zip(wanted.iter().zip(&mut words)) {
            if slot.verdict == Verdict::Undecided {
                *word = snapshot.service(wanted.service).table.lookup(wanted.hash);
            }
        }
        for (slot, (wanted, word)) in part.iter_mut().zip(wanted.iter().zip(&words)) {
            if slot.verdict == Verdict::Undecided {
                slot.verdict = match encapsulate(snapshot, slot, wanted, *word) {
                    Ok(verdict) => verdict,
                    Err(reason) => Verdict::Drop(reason),
                };
            }
        }
    }
}

/// Which service a frame is for, and where it falls; otherwise its verdict.
#[inline]
fn classify(snapshot: &Snapshot, station: [u8; 6], frame: &[u8]) -> Result<Wanted, Verdict> {
    // A frame for another station (flooded by a switch, or broadcast) is another mux's, or nobody's.
    if frame.get(..6).is_some_and(|destination| destination != station) {
        return Err(Verdict::Pass);
    }
    match fast::parse(frame) {
        Ok(fast::Frame::Flow(packet)) => {
            let service = snapshot.find(&packet.flow).ok_or(Verdict::Pass)?;
            let hash = packet.flow.hash(snapshot.service(service).hash_key);
            let fast::Packet { ip_len, tos, link_len, .. } = packet;
            Ok(Wanted { hash, service, ip_len, tos, link_len })
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

/// Writes the outer headers before the IP packet of a frame.
#[inline]
fn encapsulate(
    snapshot: &Snapshot,
    slot: &mut Slot<'_>,
    wanted: &Wanted,
    word: BucketWord,
) -> Result<Verdict, DropReason> {
    let head = word.head().some().ok_or(DropReason::NoBackend)?;
    let previous = match word.previous().some() {
        None => None,
        // Not sent without its walk: this cannot happen while directories are applied before tables, and if it
        // did, it had better be seen.
        Some(previous) => Some(known(snapshot, Encapsulation::Gue, previous)?.address),
    };
    let (encapsulation, outer_len) = match (previous, snapshot.service(wanted.service).encapsulation) {
        (Some(_), _) => (Encapsulation::Gue, OPEN_LEN - fast::ETHERNET_LEN),
        (None, Encapsulation::Gue) => (Encapsulation::Gue, CLOSED_LEN - fast::ETHERNET_LEN),
        (None, Encapsulation::Ipip) => (Encapsulation::Ipip, outer::IPIP_LEN),
    };
    let template = known(snapshot, encapsulation, head)?;
    if template.reach != Reach::Resolved {
        return Err(DropReason::NoNextHop);
    }
    let ip_len = outer_len + usize::from(wanted.ip_len);
    if ip_len > usize::from(template.mtu) {
        return Err(DropReason::TooBig);
    }
    // Below the MTU, which is 16 bits.
    let ip_len = ip_len as u16;
    let link_len = usize::from(wanted.link_len);
    let inner = slot.start + link_len;
    let Some(start) = inner.checked_sub(link_len + outer_len) else { return Err(DropReason::NoHeadroom) };

    // The tags are where the outer headers come to lie.
    let tagged = (link_len > fast::ETHERNET_LEN).then(|| Tags::of(slot.frame(), link_len));
    let ip_start = inner - outer_len;
    let checksum = template.ip_checksum(wanted.tos, ip_len);
    match encapsulation {
        Encapsulation::Ipip => {
            let out = &mut slot.buffer[ip_start - fast::ETHERNET_LEN..][..IPIP_LEN];
            out.copy_from_slice(&template.headers[..IPIP_LEN]);
            write_ip(out, wanted.tos, ip_len, checksum);
        }
        Encapsulation::Gue => {
            let out = &mut slot.buffer[ip_start - fast::ETHERNET_LEN..][..CLOSED_LEN];
            out.copy_from_slice(&template.headers);
            write_ip(out, wanted.tos, ip_len, checksum);
            out[field::UDP_SOURCE].copy_from_slice(&outer::source_port(wanted.hash).to_be_bytes());
            out[field::UDP_LEN].copy_from_slice(&(ip_len - 20).to_be_bytes());
        }
    }
    if let Some(previous) = previous {
        let walk = Walk {
            generation: word.generation(),
            hops: 0,
            returned: false,
            visited: Owners::new(),
            to_visit: Owners::from_iter([previous]),
        };
        let header = gue::Header { protocol: gue::PROTO_IPV4, walk: Some(walk) };
        header.emit(&mut slot.buffer[inner - GUE_OPEN_LEN..inner]);
    }
    if let Some(tags) = tagged {
        tags.put(&mut slot.buffer[start..ip_start], &template.headers);
    }
    slot.start = start;
    // Ethernet pads short frames; the padding is not part of the packet.
    slot.end = inner + usize::from(wanted.ip_len);
    Ok(Verdict::Send { backend: head, egress: template.egress, walk: previous.is_some() })
}

/// Writes what differs from packet to packet into an Ethernet and IPv4 header.
#[inline]
fn write_ip(out: &mut [u8], tos: u8, ip_len: u16, checksum: u16) {
    out[field::TOS] = tos;
    out[field::IP_LEN].copy_from_slice(&ip_len.to_be_bytes());
    out[field::IP_CHECKSUM].copy_from_slice(&checksum.to_be_bytes());
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

/// A backend's template, if the directory knows it.
#[inline]
fn known(
    snapshot: &Snapshot,
    encapsulation: Encapsulation,
    backend: BackendId,
) -> Result<&Template, DropReason> {
    let template = snapshot.template(encapsulation, backend);
    template.filter(|t| t.reach != Reach::Unknown).ok_or(DropReason::UnknownBackend)
}
