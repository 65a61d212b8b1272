//! netmap: the rings of a network interface, of a VALE switch's port or of a pipe, mapped into the mux.
//!
//! A thread has a pair of rings, or several, on each port, and nobody else has those. In a turn it makes one call,
//! `poll`, in which netmap sends what the turn before has left in rings to send and receives what has come; then it
//! takes all that has come through the pipeline, in bursts. Only after many it calls for sending in between.
//!
//! **No copy.** A slot of a ring names a buffer. To send a frame, its buffer changes places with that of a free slot
//! of the ring to send (`NS_BUF_CHANGED`). Netmap is asked to receive frames [`FRAME_START`] bytes behind the start
//! of their buffers (`NETMAP_REQ_OPT_OFFSETS`), so that the outer headers go before the frame where it lies, and the
//! slot says where the whole now begins.
//!
//! **A copy** is made of a frame
//! - where there is no such room: on pipes, whose slots the other end writes too, and of ports whose driver does not
//!   grant it. The frame is copied into memory of our own, encapsulated there, and copied into the buffer of the slot
//!   to send. What is passed or dropped is not copied;
//! - that fills several slots (`NS_MOREFRAG`), as drivers do whose receive lengths are powers of two when a frame does
//!   not fit the power below: larger buffers (`buf_size` of the module) cure it;
//! - that leaves by a port of another memory region: VALE ports have each their own.
//!
//! **The host.** A network interface in netmap mode is cut off from the kernel, but for its host rings. What is not for
//! a service goes there, and what the host sends comes from there and is sent: ARP, BGP and SSH live on. VALE ports
//! and pipes have no host; what is passed there is counted and left.
//!
//! Buffers only ever change places, and closing looks whether all are still there, each once. A pipe's rings
//! are left out: no buffer of theirs is ever exchanged by us, but the other end may do so.

mod abi;
#[cfg(test)]
mod double;
mod name;
mod port;
mod ring;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use daisy_shared::drop::DropReason;
use netmap_sys::netmap::{NS_BUF_CHANGED, NS_MOREFRAG, netmap_slot};
use tracing::{info, warn};

pub use name::PortName;
pub use port::open;
use port::{Descriptors, Kernel};
use ring::Ring;

use super::sys::Mapping;
use super::{FRAME_START, IoError, PacketIo, Worker};
use crate::pipeline::{BURST, HEADROOM, Slot, Verdict};

/// How many frames may wait in a ring until the turn is over, so that a device or the other end of a pipe works on
/// them while we work on the next.
const UNSENT: usize = 4 * BURST;
/// How long a burst may wait for room in a full ring. One that does not move at all is waited for once.
const ROOM_WAIT: Duration = Duration::from_millis(10);
/// How long a port that is closed may take to send what it has.
const CLOSE_WAIT: Duration = Duration::from_secs(1);

/// A pair of rings, to receive and to send, with one descriptor.
#[derive(Clone, Copy, Debug)]
struct Pair {
    /// What the kernel knows it by.
    handle: usize,
    /// The number of the memory region, among those of this thread.
    region: usize,
    /// Whether buffers may be exchanged with other rings of the region.
    may_swap: bool,
    /// Where frames are to be received in their buffers, if we may say so.
    receive_at: Option<usize>,
    /// Whether the kernel has been asked for room in this burst already.
    has_tried: bool,
    /// Waiting for room was in vain, and there has been none since.
    is_stuck: bool,
    /// How many frames lie in the ring to send that the kernel has not been told of.
    unsent: usize,
}

/// A port, as far as it is this thread's.
#[derive(Debug)]
struct Port {
    place: String,
    /// Its pairs of hardware rings, by their numbers in this thread.
    pairs: Range<usize>,
    /// The pair of rings to and from the host.
    host: Option<usize>,
}

/// All rings of a thread.
#[derive(Debug, Default)]
struct Rings {
    ports: Vec<Port>,
    pairs: Vec<Pair>,
    /// To receive, by the pair's number.
    rx: Vec<Ring>,
    /// To send, by the pair's number.
    tx: Vec<Ring>,
}

impl Rings {
    /// Adds a pair, and returns its number.
    fn push(&mut self, handle: usize, region: usize, may_swap: bool, rx: Ring, tx: Ring) -> usize {
        let receive_at = (may_swap && rx.has_offsets()).then_some(FRAME_START);
        self.pairs.push(Pair {
            handle,
            region,
            may_swap,
            receive_at,
            has_tried: false,
            is_stuck: false,
            unsent: 0,
        });
        self.rx.push(rx);
        self.tx.push(tx);
        self.pairs.len() - 1
    }
}

/// A packet in a ring, from the slot `at` to the one before `next`.
#[derive(Clone, Copy)]
struct Packet {
    at: u32,
    next: u32,
    /// The only slot, if there is one only.
    slot: Option<netmap_slot>,
}

impl Packet {
    /// The packet that begins at `at`, if it is all there before `tail`.
    #[inline]
    fn read(rx: &Ring, at: u32, tail: u32) -> Option<Packet> {
        let slot = rx.slot(at);
        let mut next = rx.next(at);
        if slot.flags & NS_MOREFRAG == 0 {
            return Some(Packet { at, next, slot: Some(slot) });
        }
        while next != tail {
            let is_last = rx.slot(next).flags & NS_MOREFRAG == 0;
            next = rx.next(next);
            if is_last {
                return Some(Packet { at, next, slot: None });
            }
        }
        // The rest is still to come, unless there is no room for it: then it never comes.
        let is_full = at == rx.head() && rx.space() + 1 == rx.slot_count();
        is_full.then_some(Packet { at, next, slot: None })
    }
}

/// Which buffers of a region have a frame of the burst at hand, so that no buffer is ever two frames, whatever the
/// slots say.
#[derive(Debug, Default)]
struct Held(Vec<u64>);

impl Held {
    #[inline]
    fn has(&self, buffer: u32) -> bool {
        self.0[buffer as usize / 64] & (1 << (buffer % 64)) != 0
    }

    /// Takes a buffer. Returns whether it was not taken yet.
    #[inline]
    fn take(&mut self, buffer: u32) -> bool {
        let is_new = !self.has(buffer);
        self.0[buffer as usize / 64] |= 1 << (buffer % 64);
        is_new
    }

    #[inline]
    fn give(&mut self, buffer: u32) {
        self.0[buffer as usize / 64] &= !(1 << (buffer % 64));
    }
}

/// Moves packets between the rings of one thread.
#[derive(Debug)]
struct Forwarder<K> {
    kernel: K,
    rings: Rings,
    /// Room for frames that are copied, one place for each of a burst.
    copies: Mapping,
    copy_stride: usize,
    /// By region.
    held: Vec<Held>,
    /// All buffers in rings that may exchange theirs, by region, in order.
    census: Vec<Vec<u32>>,
    from_host: u64,
    from_host_dropped: u64,
}

impl<K: Kernel> Forwarder<K> {
    fn new(mut rings: Rings, kernel: K) -> Result<Forwarder<K>, IoError> {
        let buffer_len = rings.rx.iter().map(Ring::buffer_len).max().unwrap_or(0);
        // Not a power of two, so that the frames of a burst do not compete for the same cache sets.
        let copy_stride = (FRAME_START + buffer_len).next_multiple_of(64);
        let copies = Mapping::anonymous(BURST * copy_stride).map_err(|error| IoError::System {
            place: "netmap".to_owned(),
            what: "memory for frames",
            error,
        })?;
        let mut held = Vec::new();
        for (pair, rx) in rings.pairs.iter().zip(&rings.rx) {
            held.resize_with(held.len().max(pair.region + 1), Held::default);
            let words = &mut held[pair.region].0;
            words.resize(words.len().max((rx.buffer_count() as usize).div_ceil(64)), 0);
        }
        // As whoever had an end of a pipe before us left it.
        rings.rx.iter_mut().chain(&mut rings.tx).for_each(|ring| ring.publish(ring.head()));
        let (from_host, from_host_dropped, census) = (0, 0, Vec::new());
        let mut new =
            Forwarder { kernel, rings, copies, copy_stride, held, census, from_host, from_host_dropped };
        new.census = new.count();
        Ok(new)
    }

    /// All buffers in rings that may exchange theirs, by region, in order.
    fn count(&self) -> Vec<Vec<u32>> {
        let mut census = vec![Vec::new(); self.held.len()];
        for (number, pair) in self.rings.pairs.iter().enumerate().filter(|(_, pair)| pair.may_swap) {
            for ring in [&self.rings.rx[number], &self.rings.tx[number]] {
                census[pair.region].extend((0..ring.slot_count()).map(|at| ring.slot(at).buf_idx));
            }
        }
        census.iter_mut().for_each(|buffers| buffers.sort_unstable());
        census
    }

    fn place(&self) -> String {
        let places: Vec<&str> = self.rings.ports.iter().map(|port| port.place.as_str()).collect();
        places.join(", ")
    }

    fn turn(&mut self, worker: &mut Worker, wait: Duration) -> Result<usize, IoError> {
        if let Err(error) = self.kernel.turn(wait) {
            return Err(IoError::System { place: self.place(), what: "waiting for packets", error });
        }
        self.rings.pairs.iter_mut().for_each(|pair| pair.unsent = 0);
        let mut taken = 0;
        for port in 0..self.rings.ports.len() {
            for pair in self.rings.ports[port].pairs.clone() {
                taken += self.forward(worker, port, pair)?;
            }
            self.send_for_host(port)?;
        }
        Ok(taken)
    }

    /// What the kernel gave us in a ring ends here.
    fn tail(&self, port: usize, ring: &Ring) -> Result<u32, IoError> {
        ring.tail().ok_or_else(|| IoError::Unusable {
            place: self.rings.ports[port].place.clone(),
            reason: "netmap says of a ring that more slots are ours than it has".to_owned(),
        })
    }

    /// Takes all that has come into a ring through the pipeline.
    fn forward(&mut self, worker: &mut Worker, port: usize, pair: usize) -> Result<usize, IoError> {
        let tail = self.tail(port, &self.rings.rx[pair])?;
        let mut taken = 0;
        loop {
            let head = self.rings.rx[pair].head();
            if head == tail {
                return Ok(taken);
            }
            taken += self.burst(worker, port, pair, tail)?;
            let rx = &mut self.rings.rx[pair];
            if rx.head() == head {
                // The rest of a packet is still to come: that is what to wait for.
                rx.publish(tail);
                return Ok(taken);
            }
        }
    }

    /// Takes one burst of a ring through the pipeline, and carries out what it says.
    fn burst(&mut self, worker: &mut Worker, port: usize, pair: usize, tail: u32) -> Result<usize, IoError> {
        let rx = &self.rings.rx[pair];
        let region = self.rings.pairs[pair].region;
        let mut packets: ArrayVec<Packet, BURST> = ArrayVec::new();
        let mut burst: ArrayVec<Slot<'_>, BURST> = ArrayVec::new();
        let mut end = rx.head();
        while end != tail && !packets.is_full() {
            let Some(packet) = Packet::read(rx, end, tail) else { break };
            end = packet.next;
            if packet.slot.is_some_and(|slot| slot.len == 0) {
                // No packet: VALE leaves such slots where it had reserved more than it needed.
                continue;
            }
            let room = self.copies.part(packets.len() * self.copy_stride, self.copy_stride);
            // SAFETY: within the mapping, and nobody else has this part while `burst` lives.
            let room = unsafe { std::slice::from_raw_parts_mut(room.as_ptr(), self.copy_stride) };
            let held = &mut self.held[region];
            burst.push(match packet.slot {
                Some(slot) => take(rx, &slot, held, room),
                None => gather(rx, &packet, held, room),
            });
            packets.push(packet);
        }
        worker.decide(port as u8, &mut burst);
        for (packet, slot) in packets.iter().zip(&mut burst) {
            self.carry_out(port, pair, packet, slot)?;
        }
        worker.settle(&burst);
        let taken = burst.len();
        drop(burst);
        for buffer in packets.iter().filter_map(|packet| packet.slot).map(|slot| slot.buf_idx) {
            if self.rings.rx[pair].buffer(buffer).is_some() {
                self.held[region].give(buffer);
            }
        }
        self.give_back(pair, end);
        self.publish()?;
        Ok(taken)
    }

    /// Does with a packet what its verdict says. What the device does not take becomes a drop.
    #[inline]
    fn carry_out(
        &mut self,
        port: usize,
        pair: usize,
        packet: &Packet,
        slot: &mut Slot<'_>,
    ) -> Result<(), IoError> {
        let rings = &mut self.rings;
        let (target, start) = match slot.verdict {
            Verdict::Send { egress, .. } => {
                let pairs = &rings.ports[usize::from(egress)].pairs;
                // The ring beside the one that it came by, so that all are used.
                let nth = (pair - rings.ports[port].pairs.start) % pairs.len();
                let in_place = packet.slot.filter(|slot| is_in_place(&rings.rx[pair], slot));
                (pairs.start + nth, in_place.map(|_| slot.start()))
            }
            Verdict::Pass => match rings.ports[port].host {
                Some(host) => (host, packet.slot.map(|slot| rings.rx[pair].offset(&slot))),
                None => return Ok(()),
            },
            Verdict::Drop(_) | Verdict::Undecided => return Ok(()),
        };
        let source = start.map(|start| Source { pair, at: packet.at, start });
        let sent = send(rings, &mut self.kernel, &self.held, target, slot.frame(), source);
        match sent {
            Ok(true) => {}
            Ok(false) => slot.verdict = Verdict::Drop(DropReason::TxFull),
            Err(error) => {
                let what = "sending";
                return Err(IoError::System { place: self.place(), what, error });
            }
        }
        Ok(())
    }

    /// Sends what the host has for a port.
    fn send_for_host(&mut self, port: usize) -> Result<(), IoError> {
        let Some(host) = self.rings.ports[port].host else { return Ok(()) };
        let target = self.rings.ports[port].pairs.start;
        let tail = self.tail(port, &self.rings.rx[host])?;
        let mut at = self.rings.rx[host].head();
        if at == tail {
            return Ok(());
        }
        while at != tail {
            let rx = &self.rings.rx[host];
            let slot = rx.slot(at);
            let start = rx.offset(&slot);
            let end = start.saturating_add(slot.len.into());
            let is_sound = slot.flags & NS_MOREFRAG == 0 && end <= rx.buffer_len();
            let sent = match rx.buffer(slot.buf_idx) {
                Some(buffer) if is_sound => {
                    // SAFETY: within the buffer, which is ours, as the slot is; nothing is being received or sent.
                    let frame = unsafe { &buffer.as_ref()[start..end] };
                    let source = Some(Source { pair: host, at, start });
                    send(&mut self.rings, &mut self.kernel, &self.held, target, frame, source)
                        .map_err(|error| IoError::System { place: self.place(), what: "sending", error })?
                }
                _ => false,
            };
            self.from_host += 1;
            self.from_host_dropped += u64::from(!sent);
            at = self.rings.rx[host].next(at);
        }
        self.give_back(host, at);
        self.publish()
    }

    /// Gives slots of a ring to receive back to the kernel, to receive into where we want it.
    fn give_back(&mut self, pair: usize, end: u32) {
        let rx = &mut self.rings.rx[pair];
        if let Some(receive_at) = self.rings.pairs[pair].receive_at {
            let mut at = rx.head();
            while at != end {
                let slot = rx.slot(at);
                if rx.offset(&slot) != receive_at {
                    rx.set_slot(at, netmap_slot { ptr: rx.with_offset(slot.ptr, receive_at), ..slot });
                }
                at = rx.next(at);
            }
        }
        rx.give_up_to(end);
        rx.publish(end);
    }

    /// Shows the kernel what is to be sent, and has it sent where it is much.
    fn publish(&mut self) -> Result<(), IoError> {
        for (tx, pair) in self.rings.tx.iter_mut().zip(&mut self.rings.pairs) {
            tx.publish(tx.head());
            pair.has_tried = false;
            if pair.unsent >= UNSENT {
                pair.unsent = 0;
                if let Err(error) = self.kernel.send(pair.handle) {
                    return Err(IoError::System { place: self.place(), what: "sending", error });
                }
            }
        }
        Ok(())
    }

    fn close(mut self, worker: &mut Worker) -> Result<(), IoError> {
        // What has been received is still served.
        while self.turn(worker, Duration::ZERO)? > 0 {}
        self.flush()?;
        info!(
            ports = self.place(),
            from_host = self.from_host,
            from_host_dropped = self.from_host_dropped,
            "netmap ports closed"
        );
        let now = self.count();
        for (was, is) in self.census.iter().zip(&now) {
            if was != is {
                let lost = was.iter().filter(|buffer| is.binary_search(buffer).is_err()).count();
                return Err(IoError::Leak {
                    place: self.place(),
                    reason: "buffers are not where they must be".to_owned(),
                    accounts: format!("{} in the rings at first, of which {lost} are lost", was.len()),
                });
            }
        }
        Ok(())
    }

    /// Waits until devices have sent what they have, as they forget it when they are closed. VALE and the host have
    /// taken it when it is sent; the other end of a pipe finds it also afterwards.
    fn flush(&mut self) -> Result<(), IoError> {
        let deadline = Instant::now() + CLOSE_WAIT;
        for number in 0..self.rings.pairs.len() {
            let Pair { handle, may_swap, .. } = self.rings.pairs[number];
            loop {
                self.kernel.send(handle).map_err(|error| IoError::System {
                    place: self.place(),
                    what: "sending",
                    error,
                })?;
                let tx = &self.rings.tx[number];
                let waiting = tx.slot_count() - 1 - tx.space();
                if waiting == 0 || !may_swap {
                    break;
                }
                if Instant::now() > deadline {
                    warn!(ports = self.place(), frames = waiting, "the device has not sent these in time");
                    break;
                }
                std::thread::yield_now();
            }
        }
        Ok(())
    }
}

/// Where a frame lies that may be sent without a copy.
#[derive(Clone, Copy, Debug)]
struct Source {
    /// The pair of rings that it came by.
    pair: usize,
    /// Its slot.
    at: u32,
    /// Where in the slot's buffer it begins.
    start: usize,
}

/// Whether there is room for headers before the frame of a slot.
#[inline]
fn is_in_place(rx: &Ring, slot: &netmap_slot) -> bool {
    rx.offset(slot) >= HEADROOM
}

/// The frame of a slot: where it lies, or a copy if there is no room for headers before it.
#[inline]
fn take<'b>(rx: &Ring, slot: &netmap_slot, held: &mut Held, room: &'b mut [u8]) -> Slot<'b> {
    let (start, len) = (rx.offset(slot), usize::from(slot.len));
    let is_within = start.checked_add(len).is_some_and(|end| end <= rx.buffer_len());
    let Some(mut buffer) = rx.buffer(slot.buf_idx).filter(|_| is_within) else { return broken(room) };
    if !held.take(slot.buf_idx) {
        return broken(room);
    }
    // SAFETY: a buffer of a slot that is ours, which nobody else has: no other frame of the burst, as `held` says,
    // and not the kernel, which is not called to receive before the burst is done.
    let buffer: &'b mut [u8] = unsafe { buffer.as_mut() };
    if is_in_place(rx, slot) {
        return Slot::new(buffer, start, len);
    }
    room[FRAME_START..FRAME_START + len].copy_from_slice(&buffer[start..start + len]);
    Slot::new(room, FRAME_START, len)
}

/// A copy of the frame that fills several slots.
#[cold]
fn gather<'b>(rx: &Ring, packet: &Packet, held: &Held, room: &'b mut [u8]) -> Slot<'b> {
    let mut end = FRAME_START;
    let mut at = packet.at;
    while at != packet.next {
        let slot = rx.slot(at);
        let (start, len) = (rx.offset(&slot), usize::from(slot.len));
        let is_within = start.checked_add(len).is_some_and(|end| end <= rx.buffer_len());
        let Some(buffer) = rx.buffer(slot.buf_idx).filter(|_| is_within && !held.has(slot.buf_idx)) else {
            return broken(room);
        };
        if end + len > room.len() {
            // What does not fit a buffer cannot be sent.
            let mut slot = Slot::new(room, FRAME_START, 0);
            slot.verdict = Verdict::Drop(DropReason::TooBig);
            return slot;
        }
        // SAFETY: a buffer of a slot that is ours, and of no other frame of the burst.
        room[end..end + len].copy_from_slice(unsafe { &buffer.as_ref()[start..start + len] });
        end += len;
        at = rx.next(at);
    }
    Slot::new(room, FRAME_START, end - FRAME_START)
}

/// A packet whose slot cannot be: only damage to the shared memory makes one.
#[cold]
fn broken(room: &mut [u8]) -> Slot<'_> {
    let mut slot = Slot::new(room, FRAME_START, 0);
    slot.verdict = Verdict::Drop(DropReason::Truncated);
    slot
}

/// Puts a frame into a ring to send: its buffer, if that can be, or else a copy. Returns whether there was room.
#[inline]
fn send(
    rings: &mut Rings,
    kernel: &mut impl Kernel,
    held: &[Held],
    target: usize,
    frame: &[u8],
    source: Option<Source>,
) -> io::Result<bool> {
    let Rings { pairs, rx, tx, .. } = rings;
    let (pair, tx) = (&mut pairs[target], &mut tx[target]);
    if tx.space() == 0 {
        if pair.has_tried {
            return Ok(false);
        }
        pair.has_tried = true;
        pair.unsent = 0;
        tx.publish(tx.head());
        kernel.send(pair.handle)?;
        if tx.space() == 0 && !pair.is_stuck {
            kernel.wait_for_room(pair.handle, ROOM_WAIT)?;
        }
        pair.is_stuck = tx.space() == 0;
        if pair.is_stuck {
            return Ok(false);
        }
    }
    pair.unsent += 1;
    let pair = *pair;
    let at = tx.head();
    let free = tx.slot(at);
    // No longer than what it was received as and headers; checked against the buffer in either way below.
    let Ok(len) = u16::try_from(frame.len()) else { return Ok(false) };
    let swap = source.filter(|source| {
        let from = pairs[source.pair];
        from.may_swap && pair.may_swap && from.region == pair.region && tx.takes_offset(source.start)
    });
    match swap {
        Some(source) => {
            let receive_at = pairs[source.pair].receive_at;
            let rx = &mut rx[source.pair];
            let taken = rx.slot(source.at);
            let ptr = tx.with_offset(free.ptr, source.start);
            tx.set_slot(at, netmap_slot { buf_idx: taken.buf_idx, len, flags: NS_BUF_CHANGED, ptr });
            let ptr = receive_at.map_or(taken.ptr, |offset| rx.with_offset(taken.ptr, offset));
            rx.set_slot(
                source.at,
                netmap_slot { buf_idx: free.buf_idx, flags: NS_BUF_CHANGED, ptr, ..taken },
            );
        }
        None => {
            // Where the other end of a pipe wants it, which is the start for all that we know of.
            let start = if pair.may_swap { 0 } else { tx.offset(&free) };
            let end = start.saturating_add(frame.len());
            let Some(buffer) = tx.buffer(free.buf_idx).filter(|_| end <= tx.buffer_len()) else {
                return Ok(false);
            };
            if held[pair.region].has(free.buf_idx) {
                return Ok(false);
            }
            // SAFETY: `start..end` is within the buffer, which is a free slot's and of no frame of the burst; the
            // frame is thus elsewhere.
            unsafe {
                buffer
                    .cast::<u8>()
                    .add(start)
                    .copy_from_nonoverlapping(std::ptr::NonNull::from(frame).cast(), frame.len())
            };
            let flags = free.flags & NS_BUF_CHANGED;
            let ptr = tx.with_offset(free.ptr, start);
            tx.set_slot(at, netmap_slot { buf_idx: free.buf_idx, len, flags, ptr });
        }
    }
    tx.give_up_to(tx.next(at));
    Ok(true)
}

/// Netmap ports, for one thread.
#[derive(Debug)]
pub struct Netmap(Forwarder<Descriptors>);

impl PacketIo for Netmap {
    fn turn(&mut self, worker: &mut Worker, wait: Duration) -> Result<usize, IoError> {
        self.0.turn(worker, wait)
    }

    fn close(self, worker: &mut Worker) -> Result<(), IoError> {
        self.0.close(worker)
    }
}
