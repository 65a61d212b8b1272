//! AF_XDP: frames in memory that the kernel or the driver and the mux share, without the kernel's stack.
//!
//! One socket for each receive queue, each with its own frames (UMEM), so that threads share nothing. A frame is
//! received, encapsulated and sent in the same place: the room before it takes the outer headers. The rings are
//! those of `linux/if_xdp.h`, written on `libc` directly: there is no kept crate that shares one UMEM between
//! receiving and sending, binds with need-wakeup and lets frames be accounted for.
//!
//! Every frame is in one place at any time ([`Place`]); the kernel's handing back what it does not have, or a
//! frame missing in the end, is an error.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use daisy_node::interface::Interface;
use daisy_node::xdp::Attached;
use daisy_shared::drop::DropReason;
use daisy_shared::wire::fast;
use tracing::{info, warn};

use super::filter::Filter;
use super::open::Request;
use super::sys::{self, Mapping};
use super::{FRAME_START, IoError, PacketIo, Worker};
use crate::pipeline::{BURST, Slot, Verdict};

/// Length in bytes of a frame with all room around it: one page, as drivers want.
const FRAME_LEN: usize = 4096;
/// Room that the kernel keeps before what we ask for (`XDP_PACKET_HEADROOM`).
const KERNEL_HEADROOM: usize = 256;
/// The longest packet without Ethernet header that fits a frame.
const MAX_IP_LEN: usize = FRAME_LEN - KERNEL_HEADROOM - FRAME_START - fast::ETHERNET_LEN;
/// Entries of each ring.
const RING_LEN: u32 = 2048;
/// Frames of a socket: as many as may wait to be filled and to be sent.
const FRAMES: u32 = 2 * RING_LEN;
/// `XDP_MAX_TX_SKB_BUDGET`: how many frames a wake-up sends in copy mode. Older kernels send 32.
const XDP_MAX_TX_SKB_BUDGET: libc::c_int = 9;
/// How much the kernel may keep for us on its way out, in bytes.
const SEND_BUFFER: libc::c_int = 16 << 20;
/// How long a socket that is closed may take to send what it has.
const CLOSE_WAIT: Duration = Duration::from_secs(1);
/// How long to try to bind: the queue of a mux that died is free a moment later.
const BIND_WAIT: Duration = Duration::from_secs(2);
/// How many turns may pass before the kernel is asked what it dropped.
const STATISTICS_EVERY: u32 = 1024;

/// Attaches the XDP program to an interface and opens a socket on each of these receive queues.
///
/// # Errors
/// If the kernel, the driver or the interface's settings do not allow it.
pub fn open(request: &Request, queues: &[u32]) -> Result<(Vec<Filter>, Vec<AfXdp>), IoError> {
    let [interface] = &request.interfaces[..] else {
        let reason = "af-xdp serves one interface".to_owned();
        return Err(IoError::Unusable { place: "--interface".to_owned(), reason });
    };
    let place = format!("interface {}", interface.name);
    if interface.mtu as usize > MAX_IP_LEN {
        let reason = format!("its MTU of {} is above {MAX_IP_LEN}, the most for af-xdp", interface.mtu);
        return Err(IoError::Unusable { place, reason });
    }
    // The program first: drivers give zero-copy queues to interfaces that have one.
    let count = queues.iter().max().map_or(0, |last| last + 1);
    let mut filter = Filter::attach(interface, count, request.xdp_mode)?;
    let mut sockets = Vec::new();
    for queue in queues {
        let socket = AfXdp::open(interface, *queue, filter.attached())?;
        filter.set_socket(*queue, &socket.fd)?;
        sockets.push(socket);
    }
    Ok((vec![filter], sockets))
}

/// Where a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// With us, unused.
    Free,
    /// With the kernel, to be received into.
    Fill,
    /// With us, in the burst at hand.
    Burst,
    /// With the kernel, to be sent.
    Send,
}

/// Where each frame is.
#[derive(Debug)]
struct Frames {
    places: Box<[Place]>,
    free: Vec<u32>,
    fill: u32,
    send: u32,
}

impl Frames {
    fn new() -> Frames {
        Frames {
            places: vec![Place::Free; FRAMES as usize].into(),
            // The first frames are used first.
            free: (0..FRAMES).rev().collect(),
            fill: 0,
            send: 0,
        }
    }

    /// Notes that a frame has moved.
    fn move_to(&mut self, frame: u32, from: Place, to: Place) -> Result<(), String> {
        let place =
            self.places.get_mut(frame as usize).ok_or_else(|| format!("no frame has number {frame}"))?;
        if *place != from {
            return Err(format!("frame {frame} is to move from {from:?} to {to:?}, but is in {place:?}"));
        }
        *place = to;
        for (place, count) in [(Place::Fill, &mut self.fill), (Place::Send, &mut self.send)] {
            *count += u32::from(to == place);
            *count -= u32::from(from == place);
        }
        if to == Place::Free {
            self.free.push(frame);
        }
        Ok(())
    }

    /// Takes an unused frame.
    fn take(&mut self, to: Place) -> Option<u32> {
        let frame = self.free.pop()?;
        self.places[frame as usize] = to;
        self.fill += u32::from(to == Place::Fill);
        Some(frame)
    }

    fn accounts(&self) -> String {
        let burst = self.places.iter().filter(|place| **place == Place::Burst).count();
        format!(
            "{FRAMES} in all, {} free, {} to fill, {} to send, {burst} in hand",
            self.free.len(),
            self.fill,
            self.send
        )
    }

    /// Whether, between bursts, every frame is free or with the kernel.
    fn are_all_there(&self) -> bool {
        self.free.len() as u32 + self.fill + self.send == FRAMES
    }
}

/// A ring that the mux writes to: filled by us, emptied by the kernel.
#[derive(Debug)]
struct Producer<T> {
    ring: Ring<T>,
    /// Where we write next.
    head: u32,
    /// Where the kernel was when we last looked.
    tail: u32,
}

/// A ring that the mux reads from.
#[derive(Debug)]
struct Consumer<T> {
    ring: Ring<T>,
    /// Where we read next.
    tail: u32,
    /// Where the kernel was when we last looked.
    head: u32,
}

/// The memory of a ring. Positions count up and wrap; the low bits choose the entry.
#[derive(Debug)]
struct Ring<T> {
    producer: NonNull<AtomicU32>,
    consumer: NonNull<AtomicU32>,
    flags: NonNull<AtomicU32>,
    entries: NonNull<T>,
    _memory: Mapping,
}

// SAFETY: the pointers lead into the mapping that the ring owns.
unsafe impl<T: Send> Send for Ring<T> {}

impl<T: Copy> Ring<T> {
    fn map(fd: &OwnedFd, offsets: &libc::xdp_ring_offset, page: libc::off_t) -> io::Result<Ring<T>> {
        let len = offsets.desc as usize + RING_LEN as usize * size_of::<T>();
        let memory = Mapping::shared(fd, len, page)?;
        let word = |offset: u64| memory.part(offset as usize, 4).cast::<AtomicU32>();
        Ok(Ring {
            producer: word(offsets.producer),
            consumer: word(offsets.consumer),
            flags: word(offsets.flags),
            entries: memory.part(offsets.desc as usize, RING_LEN as usize * size_of::<T>()).cast(),
            _memory: memory,
        })
    }

    fn producer(&self) -> &AtomicU32 {
        // SAFETY: within the mapping, aligned by the kernel, and shared with it as an atomic.
        unsafe { self.producer.as_ref() }
    }

    fn consumer(&self) -> &AtomicU32 {
        // SAFETY: as above.
        unsafe { self.consumer.as_ref() }
    }

    /// Whether the kernel sleeps until it is called.
    fn needs_wakeup(&self) -> bool {
        // SAFETY: as above.
        unsafe { self.flags.as_ref() }.load(Ordering::Relaxed) & libc::XDP_RING_NEED_WAKEUP != 0
    }

    fn entry(&self, position: u32) -> NonNull<T> {
        // SAFETY: the ring has `RING_LEN` entries, a power of two, and the index is below it.
        unsafe { self.entries.add((position & (RING_LEN - 1)) as usize) }
    }
}

impl<T: Copy> Producer<T> {
    fn new(ring: Ring<T>) -> Producer<T> {
        Producer { ring, head: 0, tail: 0 }
    }

    /// Writes an entry, if there is room. The kernel sees it after [`Producer::submit`].
    fn push(&mut self, entry: T) -> bool {
        if !self.has_room() {
            return false;
        }
        // SAFETY: the entry is ours: the kernel has consumed what was there, and does not read beyond `submit`.
        unsafe { self.ring.entry(self.head).write(entry) };
        self.head = self.head.wrapping_add(1);
        true
    }

    fn has_room(&mut self) -> bool {
        if self.head.wrapping_sub(self.tail) == RING_LEN {
            self.tail = self.ring.consumer().load(Ordering::Acquire);
        }
        self.head.wrapping_sub(self.tail) < RING_LEN
    }

    fn submit(&mut self) {
        self.ring.producer().store(self.head, Ordering::Release);
    }

    /// How many entries the kernel has not taken yet.
    fn waiting(&mut self) -> u32 {
        self.tail = self.ring.consumer().load(Ordering::Acquire);
        self.head.wrapping_sub(self.tail)
    }
}

impl<T: Copy> Consumer<T> {
    fn new(ring: Ring<T>) -> Consumer<T> {
        Consumer { ring, tail: 0, head: 0 }
    }

    /// Reads an entry, if there is one. The kernel may reuse it after [`Consumer::release`].
    fn pop(&mut self) -> Option<T> {
        if self.tail == self.head {
            self.head = self.ring.producer().load(Ordering::Acquire);
            if self.tail == self.head {
                return None;
            }
        }
        // SAFETY: the kernel has written the entry before it moved its position, and leaves it until `release`.
        let entry = unsafe { self.ring.entry(self.tail).read() };
        self.tail = self.tail.wrapping_add(1);
        Some(entry)
    }

    fn release(&mut self) {
        self.ring.consumer().store(self.tail, Ordering::Release);
    }
}

/// An AF_XDP socket on one queue of an interface.
#[derive(Debug)]
pub struct AfXdp {
    place: String,
    fill: Producer<u64>,
    completion: Consumer<u64>,
    receive: Consumer<libc::xdp_desc>,
    send: Producer<libc::xdp_desc>,
    frames: Frames,
    turns: u32,
    fd: OwnedFd,
    // After the socket: the kernel uses it until the socket is closed.
    umem: Mapping,
}

impl AfXdp {
    fn open(interface: &Interface, queue: u32, attached: Attached) -> Result<AfXdp, IoError> {
        let place = format!("interface {} queue {queue}", interface.name);
        let failed = |what| {
            let place = place.clone();
            move |error| IoError::System { place, what, error }
        };
        let fd = sys::socket(libc::AF_XDP, libc::SOCK_RAW, 0)
            .map_err(failed("opening an AF_XDP socket (needs CAP_NET_RAW and a kernel with XDP_SOCKETS)"))?;
        let umem = Mapping::anonymous(FRAMES as usize * FRAME_LEN).map_err(failed("memory for frames"))?;
        let region = libc::xdp_umem_reg {
            addr: umem.start().addr().get() as u64,
            len: umem.len() as u64,
            chunk_size: FRAME_LEN as u32,
            headroom: FRAME_START as u32,
            flags: 0,
            tx_metadata_len: 0,
        };
        sys::set_option(&fd, libc::SOL_XDP, libc::XDP_UMEM_REG, &region)
            .map_err(failed("registering memory for frames"))?;
        let len = RING_LEN as libc::c_int;
        for (ring, what) in [
            (libc::XDP_UMEM_FILL_RING, "the fill ring"),
            (libc::XDP_UMEM_COMPLETION_RING, "the completion ring"),
            (libc::XDP_RX_RING, "the receive ring"),
            (libc::XDP_TX_RING, "the send ring"),
        ] {
            sys::set_option(&fd, libc::SOL_XDP, ring, &len).map_err(failed(what))?;
        }
        // Kernels before 6.18 do not know it, and sending takes more calls there.
        let _unknown = sys::set_option(&fd, libc::SOL_XDP, XDP_MAX_TX_SKB_BUDGET, &len);
        sys::set_option(&fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &SEND_BUFFER)
            .map_err(failed("setting the socket's buffer (needs CAP_NET_ADMIN)"))?;
        let offsets: libc::xdp_mmap_offsets =
            sys::get_option(&fd, libc::SOL_XDP, libc::XDP_MMAP_OFFSETS).map_err(failed("ring offsets"))?;
        let fill_page = libc::XDP_UMEM_PGOFF_FILL_RING as libc::off_t;
        let completion_page = libc::XDP_UMEM_PGOFF_COMPLETION_RING as libc::off_t;
        let mut socket = AfXdp {
            fill: Producer::new(Ring::map(&fd, &offsets.fr, fill_page).map_err(failed("the fill ring"))?),
            completion: Consumer::new(
                Ring::map(&fd, &offsets.cr, completion_page).map_err(failed("the completion ring"))?,
            ),
            receive: Consumer::new(
                Ring::map(&fd, &offsets.rx, libc::XDP_PGOFF_RX_RING).map_err(failed("the receive ring"))?,
            ),
            send: Producer::new(
                Ring::map(&fd, &offsets.tx, libc::XDP_PGOFF_TX_RING).map_err(failed("the send ring"))?,
            ),
            frames: Frames::new(),
            turns: 0,
            place,
            fd,
            umem,
        };
        // Before anything can arrive.
        socket.refill();
        socket.bind(interface.index, queue, attached)?;
        Ok(socket)
    }

    /// Binds to the queue: zero-copy where the driver grants it.
    fn bind(&self, interface: u32, queue: u32, attached: Attached) -> Result<(), IoError> {
        let copy = match attached {
            Attached::Native => 0,
            // Frames come from the stack then, whatever the driver could do.
            Attached::Generic => libc::XDP_COPY,
        };
        let address = libc::sockaddr_xdp {
            sxdp_family: libc::AF_XDP as u16,
            sxdp_flags: libc::XDP_USE_NEED_WAKEUP | copy,
            sxdp_ifindex: interface,
            sxdp_queue_id: queue,
            sxdp_shared_umem_fd: 0,
        };
        let begun = Instant::now();
        loop {
            match sys::bind(&self.fd, &address) {
                Ok(()) => break,
                // Nothing tells when the kernel has let go of a dead process's queue.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) && begun.elapsed() < BIND_WAIT => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(error) => return Err(self.error("binding to the queue")(error)),
            }
        }
        let options: libc::xdp_options =
            sys::get_option(&self.fd, libc::SOL_XDP, libc::XDP_OPTIONS).map_err(self.error("XDP_OPTIONS"))?;
        let zero_copy = options.flags & libc::XDP_OPTIONS_ZEROCOPY != 0;
        info!(place = self.place, zero_copy, "AF_XDP socket bound");
        Ok(())
    }

    fn error(&self, what: &'static str) -> impl FnOnce(io::Error) -> IoError {
        let place = self.place.clone();
        move |error| IoError::System { place, what, error }
    }

    fn leak(&self, reason: String) -> IoError {
        IoError::Leak { place: self.place.clone(), reason, accounts: self.frames.accounts() }
    }

    /// Gives unused frames to the kernel, to receive into. Half of the frames always stay for sending.
    fn refill(&mut self) {
        let mut any = false;
        while self.frames.fill < RING_LEN && self.fill.has_room() {
            let Some(frame) = self.frames.take(Place::Fill) else { break };
            any |= self.fill.push(u64::from(frame) * FRAME_LEN as u64);
        }
        if any {
            self.fill.submit();
        }
    }

    /// Takes back frames that have been sent.
    fn reclaim(&mut self) -> Result<(), IoError> {
        while let Some(address) = self.completion.pop() {
            let frame = (address / FRAME_LEN as u64) as u32;
            self.frames.move_to(frame, Place::Send, Place::Free).map_err(|reason| self.leak(reason))?;
        }
        self.completion.release();
        Ok(())
    }

    /// Has the kernel send what is in the ring, where it waits to be told.
    fn kick(&mut self) -> Result<(), IoError> {
        let mut waiting = self.send.waiting();
        let mut stuck = 0;
        while waiting > 0 && stuck < 2 && self.send.ring.needs_wakeup() {
            // SAFETY: an empty message without an address.
            let result = unsafe {
                libc::sendto(
                    self.fd.as_raw_fd(),
                    std::ptr::null(),
                    0,
                    libc::MSG_DONTWAIT,
                    std::ptr::null(),
                    0,
                )
            };
            if result < 0 {
                let error = io::Error::last_os_error();
                match error.raw_os_error() {
                    // Its share for one call is done, the device or a buffer is full, or the link is down: what
                    // is left stays in the ring.
                    Some(libc::EAGAIN | libc::EBUSY | libc::ENOBUFS | libc::EINTR | libc::ENETDOWN) => {}
                    _ => return Err(self.error("sending")(error)),
                }
            }
            self.reclaim()?;
            let before = std::mem::replace(&mut waiting, self.send.waiting());
            stuck = if waiting < before { 0 } else { stuck + 1 };
        }
        Ok(())
    }

    /// Wakes a driver that waits to be told of frames to receive into.
    fn wake_receiver(&self) {
        if self.fill.ring.needs_wakeup() {
            // SAFETY: receives nothing, into nothing.
            let _nothing = unsafe {
                libc::recvfrom(
                    self.fd.as_raw_fd(),
                    std::ptr::null_mut(),
                    0,
                    libc::MSG_DONTWAIT,
                    std::ptr::null_mut(),
                    std::ptr::null_mut(),
                )
            };
        }
    }

    /// Takes received frames, at most a burst.
    fn take(&mut self) -> Result<ArrayVec<libc::xdp_desc, BURST>, IoError> {
        let mut taken = ArrayVec::new();
        while !taken.is_full()
            && let Some(packet) = self.receive.pop()
        {
            self.frames
                .move_to(frame_of(&packet), Place::Fill, Place::Burst)
                .map_err(|reason| self.leak(reason))?;
            taken.push(packet);
        }
        self.receive.release();
        Ok(taken)
    }

    fn statistics(&self) -> Result<libc::xdp_statistics, IoError> {
        sys::get_option(&self.fd, libc::SOL_XDP, libc::XDP_STATISTICS).map_err(self.error("XDP_STATISTICS"))
    }

    /// A socket whose interface has been removed would wait for ever: `poll` does not say so, but this does.
    fn check_interface(&self) -> Result<(), IoError> {
        let error: libc::c_int = sys::get_option(&self.fd, libc::SOL_SOCKET, libc::SO_ERROR)
            .map_err(self.error("asking for the socket's state"))?;
        if error == libc::ENETDOWN {
            return Err(IoError::Unusable {
                place: self.place.clone(),
                reason: "the interface is gone".to_owned(),
            });
        }
        Ok(())
    }

    fn ask_missed(&mut self, worker: &mut Worker) -> Result<(), IoError> {
        let statistics = self.statistics()?;
        worker.set_missed(statistics.rx_dropped + statistics.rx_ring_full);
        Ok(())
    }
}

/// The frame that a descriptor points into.
fn frame_of(packet: &libc::xdp_desc) -> u32 {
    (packet.addr / FRAME_LEN as u64) as u32
}

impl PacketIo for AfXdp {
    fn turn(&mut self, worker: &mut Worker, wait: Duration) -> Result<usize, IoError> {
        self.reclaim()?;
        self.refill();
        self.wake_receiver();
        let mut packets = self.take()?;
        if packets.is_empty() {
            self.kick()?;
            if !wait.is_zero() {
                sys::poll(&self.fd, libc::POLLIN, wait).map_err(self.error("waiting for packets"))?;
                packets = self.take()?;
            }
        }
        self.turns += 1;
        if packets.is_empty() || self.turns >= STATISTICS_EVERY {
            self.turns = 0;
            self.ask_missed(worker)?;
            self.check_interface()?;
        }
        if packets.is_empty() {
            return Ok(0);
        }

        let mut burst: ArrayVec<Slot<'_>, BURST> = ArrayVec::new();
        for packet in &packets {
            let start = self.umem.part(frame_of(packet) as usize * FRAME_LEN, FRAME_LEN);
            // SAFETY: within the mapping; frames do not overlap, and this one is in `Place::Burst`: the kernel has
            // handed it over, and gave no other packet of this burst in it.
            let buffer = unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), FRAME_LEN) };
            let offset = (packet.addr % FRAME_LEN as u64) as usize;
            burst.push(Slot::new(buffer, offset, packet.len as usize));
        }
        worker.decide(0, &mut burst);
        for (slot, packet) in burst.iter_mut().zip(&packets) {
            let frame = frame_of(packet);
            if slot.verdict == Verdict::Pass {
                // The program took it for a service that is gone since, and there is no way back to the kernel.
                slot.verdict = Verdict::Drop(DropReason::UnknownService);
            }
            let mut place = Place::Free;
            if let Verdict::Send { .. } = slot.verdict {
                let addr = u64::from(frame) * FRAME_LEN as u64 + slot.start() as u64;
                let len = slot.frame().len() as u32;
                if self.send.push(libc::xdp_desc { addr, len, options: 0 }) {
                    place = Place::Send;
                } else {
                    slot.verdict = Verdict::Drop(DropReason::TxFull);
                }
            }
            self.frames.move_to(frame, Place::Burst, place).map_err(|reason| self.leak(reason))?;
        }
        worker.settle(&burst);
        let taken = burst.len();
        drop(burst);
        self.send.submit();
        self.kick()?;
        Ok(taken)
    }

    fn close(mut self, worker: &mut Worker) -> Result<(), IoError> {
        // What has been received is still served.
        while self.turn(worker, Duration::ZERO)? > 0 {}
        let deadline = Instant::now() + CLOSE_WAIT;
        while self.frames.send > 0 && Instant::now() < deadline {
            self.kick()?;
            self.reclaim()?;
            if self.frames.send > 0 {
                // Returns at once while the ring has room: it is the call that makes a driver send and complete.
                sys::poll(&self.fd, libc::POLLOUT, Duration::from_millis(1))
                    .map_err(self.error("waiting for what is sent"))?;
                std::thread::yield_now();
            }
        }
        self.ask_missed(worker)?;
        let statistics = self.statistics()?;
        if statistics.tx_invalid_descs > 0 || statistics.rx_invalid_descs > 0 {
            return Err(self.leak(format!(
                "the kernel refused {} entries to send and {} to fill",
                statistics.tx_invalid_descs, statistics.rx_invalid_descs
            )));
        }
        if !self.frames.are_all_there() {
            return Err(self.leak("frames are missing".to_owned()));
        }
        if self.frames.send > 0 {
            // Not a leak: the driver has them, and gives them up with the socket.
            warn!(place = self.place, frames = self.frames.send, "the device has not sent these in time");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_in_one_place() {
        let mut frames = Frames::new();
        assert!(frames.are_all_there());
        let frame = frames.take(Place::Fill).unwrap();
        assert_eq!((frame, frames.fill, frames.are_all_there()), (0, 1, true));
        frames.move_to(frame, Place::Fill, Place::Burst).unwrap();
        assert!(!frames.are_all_there());
        frames.move_to(frame, Place::Burst, Place::Send).unwrap();
        assert_eq!((frames.fill, frames.send, frames.are_all_there()), (0, 1, true));
        frames.move_to(frame, Place::Send, Place::Free).unwrap();
        assert!(frames.move_to(frame, Place::Send, Place::Free).unwrap_err().contains("but is in Free"));
        assert!(frames.move_to(FRAMES, Place::Send, Place::Free).is_err());
        assert_eq!((frames.free.len() as u32, frames.send), (FRAMES, 0));
    }
}
