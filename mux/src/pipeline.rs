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

use daisy_shared::bucket::{BackendId, BucketWord};
use daisy_shared::chain::{Owners, Walk};
use daisy_shared::drop::DropReason;
use daisy_shared::wire::{fast, gue, outer};

pub use crate::table::CLOSED_LEN;
use crate::table::{Reach, Snapshot, Template};

/// How many packets go through the pipeline together.
pub const BURST: usize = 64;

/// Length in bytes of the GUE header in an open window: the walk with one owner to visit.
const GUE_OPEN_LEN: usize = gue::BASE_LEN + gue::WALK_BASE_LEN + 4;
/// Length in bytes of all headers before the inner IP packet in an open window.
pub const OPEN_LEN: usize = fast::ETHERNET_LEN + outer::LEN + GUE_OPEN_LEN;
/// The room in bytes that a frame needs before its first byte, so that it can be encapsulated in place.
pub const HEADROOM: usize = OPEN_LEN - fast::ETHERNET_LEN;

/// Where the fields that differ from packet to packet stand, from the start of the outer Ethernet header.
mod field {
    use super::{fast, outer};
    use core::ops::Range;

    const IP: usize = fast::ETHERNET_LEN;
    const UDP: usize = IP + 20;
    pub const TOS: usize = IP + 1;
    pub const IP_LEN: Range<usize> = IP + 2..IP + 4;
    pub const IP_CHECKSUM: Range<usize> = IP + 10..IP + 12;
    pub const UDP_SOURCE: Range<usize> = UDP..UDP + 2;
    pub const UDP_LEN: Range<usize> = UDP + 4..UDP + 6;
    pub const GUE: usize = IP + outer::LEN;
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
}

const NOT_WANTED: Wanted = Wanted { hash: 0, service: 0, ip_len: 0, tos: 0 };

/// Decides about every frame of a burst that has no verdict yet, and encapsulates those that are sent.
pub fn decide(snapshot: &Snapshot, burst: &mut [Slot<'_>]) {
    for part in burst.chunks_mut(BURST) {
        let mut wanted = [NOT_WANTED; BURST];
        let mut words = [BucketWord::EMPTY; BURST];
        for (slot, wanted) in part.iter_mut().zip(&mut wanted) {
            if slot.verdict == Verdict::Undecided {
                match classify(snapshot, slot.frame()) {
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
fn classify(snapshot: &Snapshot, frame: &[u8]) -> Result<Wanted, Verdict> {
    // A frame for another station (flooded by a switch, or broadcast) is another mux's, or nobody's.
    if frame.get(..6).is_some_and(|destination| destination != snapshot.link.mac) {
        return Err(Verdict::Pass);
    }
    match fast::parse(frame) {
        Ok(fast::Frame::Flow(packet)) => {
            let service = snapshot.find(&packet.flow).ok_or(Verdict::Pass)?;
            let hash = packet.flow.hash(snapshot.service(service).hash_key);
            Ok(Wanted { hash, service, ip_len: packet.ip_len, tos: packet.tos })
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
    match frame[fast::ETHERNET_LEN.min(frame.len())..].first_chunk::<20>() {
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
    let template = known(snapshot, head)?;
    let previous = match word.previous().some() {
        None => None,
        // Not sent without its walk: this cannot happen while directories are applied before tables, and if it
        // did, it had better be seen.
        Some(previous) => Some(known(snapshot, previous)?.address),
    };
    if template.reach != Reach::Resolved {
        return Err(DropReason::NoNextHop);
    }
    let headers_len = if previous.is_some() { OPEN_LEN } else { CLOSED_LEN };
    let outer_len = headers_len - fast::ETHERNET_LEN + usize::from(wanted.ip_len);
    if outer_len > usize::from(snapshot.link.mtu) {
        return Err(DropReason::TooBig);
    }
    let inner = slot.start + fast::ETHERNET_LEN;
    let Some(start) = inner.checked_sub(headers_len) else { return Err(DropReason::NoHeadroom) };
    let out: &mut [u8; CLOSED_LEN] = slot.buffer[start..].first_chunk_mut().ok_or(DropReason::NoHeadroom)?;

    *out = template.headers;
    out[field::TOS] = wanted.tos;
    // `outer_len` is within the MTU, which is 16 bits.
    let ip_len = outer_len as u16;
    out[field::IP_LEN].copy_from_slice(&ip_len.to_be_bytes());
    out[field::IP_CHECKSUM].copy_from_slice(&template.ip_checksum(wanted.tos, ip_len).to_be_bytes());
    out[field::UDP_SOURCE].copy_from_slice(&outer::source_port(wanted.hash).to_be_bytes());
    out[field::UDP_LEN].copy_from_slice(&(ip_len - 20).to_be_bytes());
    if let Some(previous) = previous {
        let walk = Walk {
            generation: word.generation(),
            hops: 0,
            returned: false,
            visited: Owners::new(),
            to_visit: Owners::from_iter([previous]),
        };
        let header = gue::Header { protocol: gue::PROTO_IPV4, walk: Some(walk) };
        header.emit(&mut slot.buffer[start + field::GUE..inner]);
    }
    slot.start = start;
    // Ethernet pads short frames; the padding is not part of the packet.
    slot.end = inner + usize::from(wanted.ip_len);
    Ok(Verdict::Send { backend: head, walk: previous.is_some() })
}

/// A backend's template, if the directory knows it.
#[inline]
fn known(snapshot: &Snapshot, backend: BackendId) -> Result<&Template, DropReason> {
    snapshot.template(backend).filter(|t| t.reach != Reach::Unknown).ok_or(DropReason::UnknownBackend)
}
