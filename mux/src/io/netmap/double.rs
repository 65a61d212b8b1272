//! The kernel's part, played over memory laid out as netmap does: for tests without the module.
//!
//! It is as strict as the kernel, and stricter: slots that it gets back must lie in what it had given, a slot with
//! another buffer must say so, a frame must be within its buffer, and frames must be received where the slots said at
//! first. Buffers are overwritten as soon as they are the kernel's again.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::mem::offset_of;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use netmap_sys::netmap::{NS_BUF_CHANGED, NS_MOREFRAG, netmap_if, netmap_ring, netmap_slot};

use super::abi::{self, FIRST_BUFFER, OFFSET_MASK_AT, SLOTS_AT};
use super::port::{Kernel, find};
use super::ring::{MAX_OFFSET, Region};
use super::{Port, Rings};
use crate::io::FRAME_START;
use crate::io::sys::Mapping;

/// The length of a buffer.
pub const BUFFER_LEN: usize = 2048;
/// What the other end wants on a pipe whose slots it has given offsets.
const PIPE_OFFSET: u64 = 32;

/// A port, for one thread.
#[derive(Clone, Copy, Debug)]
pub struct PortSpec {
    /// Slots of its rings to send and to receive.
    pub slots: (u32, u32),
    /// Whether it grants offsets.
    pub has_offsets: bool,
    /// Whether it has host rings.
    pub has_host: bool,
    /// Whether it is an end of a pipe.
    pub is_pipe: bool,
    /// Which memory region it is of.
    pub region: usize,
    /// The longest frame that fits a slot when it is received.
    pub receive_len: usize,
}

impl PortSpec {
    /// A network interface.
    pub const INTERFACE: PortSpec = PortSpec {
        slots: (128, 128),
        has_offsets: true,
        has_host: true,
        is_pipe: false,
        region: 0,
        receive_len: BUFFER_LEN - MAX_OFFSET,
    };
    /// A VALE port.
    pub const VALE: PortSpec = PortSpec { has_host: false, ..PortSpec::INTERFACE };
    /// An end of a pipe.
    pub const PIPE: PortSpec = PortSpec { is_pipe: true, has_offsets: false, ..PortSpec::VALE };

    fn receive_at(&self) -> u64 {
        if self.is_pipe { PIPE_OFFSET } else { FRAME_START as u64 }
    }
}

/// What arrives in a ring.
#[derive(Clone, Debug)]
pub enum Arrival {
    /// A frame, in as many slots as it needs.
    Frame(Vec<u8>),
    /// A slot with nothing in it.
    Empty,
    /// A frame that begins so many bytes behind where it was wanted, as VALE does it.
    Shifted(Vec<u8>, usize),
    /// A slot that names this buffer, length and offset.
    Broken(Option<u32>, u16, u64),
}

/// A ring as the kernel sees it.
#[derive(Debug)]
pub struct KernelRing {
    region: Arc<Region>,
    at: usize,
    slots: u32,
    current: u32,
    tail: u32,
    has_offsets: bool,
    receive_len: usize,
    /// Where frames are received in their buffers, with offsets.
    receive_at: u64,
    buffers_at: usize,
    /// The buffer in each slot, as the kernel last saw it.
    known: Vec<u32>,
    /// The buffers of slots in which a broken one was put.
    healed: BTreeMap<u32, u32>,
    /// What is still to arrive.
    pub wire: VecDeque<Arrival>,
    /// What was sent.
    pub sent: Vec<Vec<u8>>,
    /// How many slots came back with another buffer.
    pub swaps: usize,
    /// Nothing that is sent is ever done with.
    pub is_stalled: bool,
}

impl KernelRing {
    fn word(&self, field: usize) -> u32 {
        self.region.read(self.at + field).unwrap()
    }

    fn slot_at(&self, slot: u32) -> usize {
        self.at + SLOTS_AT + slot as usize * size_of::<netmap_slot>()
    }

    fn slot(&self, slot: u32) -> netmap_slot {
        self.region.read(self.slot_at(slot)).unwrap()
    }

    /// Writes a slot behind everybody's back.
    pub fn set_slot(&self, at: u32, slot: netmap_slot) {
        self.region.write(self.slot_at(at), slot);
    }

    /// Reads a slot, for a test to change it.
    pub fn get_slot(&self, at: u32) -> netmap_slot {
        self.slot(at)
    }

    /// Writes what the kernel says is the first slot that is its own.
    pub fn set_tail(&self, tail: u32) {
        self.region.write(self.at + offset_of!(netmap_ring, tail), tail);
    }

    fn distance(&self, from: u32, to: u32) -> u32 {
        (to + self.slots - from) % self.slots
    }

    fn next(&self, slot: u32) -> u32 {
        (slot + 1) % self.slots
    }

    fn buffer(&mut self, buffer: u32) -> &mut [u8] {
        assert!(buffer >= FIRST_BUFFER);
        let at = self.buffers_at + buffer as usize * BUFFER_LEN;
        // SAFETY: within the image, as `bytes` asserts; no reference to a buffer is held while the kernel is called.
        unsafe { self.region.bytes(at, BUFFER_LEN).as_mut() }
    }

    fn offset(&self, slot: &netmap_slot) -> usize {
        if self.has_offsets { slot.ptr as usize } else { 0 }
    }

    /// Takes over the slots before `head`, and shows each.
    fn take_back(&mut self, mut each: impl FnMut(&mut KernelRing, netmap_slot)) {
        let (head, cur) = (self.word(offset_of!(netmap_ring, head)), self.word(offset_of!(netmap_ring, cur)));
        let ours = self.distance(self.current, self.tail);
        assert!(
            self.distance(self.current, head) <= ours,
            "head {head} is not in {}..{}",
            self.current,
            self.tail
        );
        assert!(self.distance(head, cur) <= self.distance(head, self.tail), "cur {cur} is behind the tail");
        while self.current != head {
            let at = self.current;
            let mut slot = self.slot(at);
            if let Some(buf_idx) = self.healed.remove(&at) {
                assert_eq!(slot.flags & NS_BUF_CHANGED, 0, "a broken slot was used");
                slot.buf_idx = buf_idx;
            } else if slot.buf_idx != self.known[at as usize] {
                assert_ne!(
                    slot.flags & NS_BUF_CHANGED,
                    0,
                    "slot {at} has another buffer and does not say so"
                );
                self.swaps += 1;
            }
            self.known[at as usize] = slot.buf_idx;
            each(self, slot);
            slot.flags = 0;
            self.set_slot(at, slot);
            self.current = self.next(at);
        }
    }

    fn sync_tx(&mut self) {
        self.take_back(|ring, slot| {
            let start = ring.offset(&slot);
            assert!(start <= MAX_OFFSET && slot.flags & NS_MOREFRAG == 0);
            let buffer = ring.buffer(slot.buf_idx);
            let frame = buffer[start..start + usize::from(slot.len)].to_vec();
            buffer.fill(0xee);
            ring.sent.push(frame);
        });
        if !self.is_stalled {
            self.tail = (self.current + self.slots - 1) % self.slots;
        }
        self.set_tail(self.tail);
    }

    /// Releases what it has got back, and receives.
    pub fn sync_rx(&mut self) {
        self.take_back(|ring, slot| {
            if ring.has_offsets {
                assert_eq!(slot.ptr, ring.receive_at, "where to receive");
            }
            ring.buffer(slot.buf_idx).fill(0xdd);
        });
        let stop = (self.current + self.slots - 1) % self.slots;
        while let Some(arrival) = self.wire.pop_front() {
            let needed = match &arrival {
                Arrival::Frame(frame) => frame.len().div_ceil(self.receive_len).max(1) as u32,
                _ => 1,
            };
            if needed > self.distance(self.tail, stop) {
                self.wire.push_front(arrival);
                break;
            }
            match arrival {
                Arrival::Frame(frame) => {
                    let count = frame.len().div_ceil(self.receive_len);
                    for (i, part) in frame.chunks(self.receive_len).enumerate() {
                        self.receive(part, 0, if i + 1 < count { NS_MOREFRAG } else { 0 });
                    }
                }
                Arrival::Empty => self.receive(&[], 0, 0),
                Arrival::Shifted(frame, by) => self.receive(&frame, if self.has_offsets { by } else { 0 }, 0),
                Arrival::Broken(buffer, len, offset) => {
                    let healthy = self.slot(self.tail);
                    self.healed.insert(self.tail, healthy.buf_idx);
                    let buf_idx = buffer.unwrap_or(healthy.buf_idx);
                    let ptr = if self.has_offsets { offset } else { healthy.ptr };
                    self.set_slot(self.tail, netmap_slot { buf_idx, len, flags: 0, ptr });
                    self.tail = self.next(self.tail);
                }
            }
        }
        self.set_tail(self.tail);
    }

    /// Takes all slots back and fills every one with this frame; checks and keeps nothing. For measurements.
    pub fn renew(&mut self, frame: &[u8]) {
        self.current = self.word(offset_of!(netmap_ring, head));
        let stop = (self.current + self.slots - 1) % self.slots;
        self.tail = self.current;
        while self.tail != stop {
            self.receive(frame, 0, 0);
        }
        self.set_tail(self.tail);
    }

    /// Takes back all that was sent, and looks at none of it. For measurements.
    pub fn forget(&mut self) {
        self.current = self.word(offset_of!(netmap_ring, head));
        self.tail = (self.current + self.slots - 1) % self.slots;
        self.set_tail(self.tail);
    }

    fn receive(&mut self, part: &[u8], shift: usize, flags: u16) {
        let mut slot = self.slot(self.tail);
        let start = self.offset(&slot) + shift;
        self.buffer(slot.buf_idx)[start..start + part.len()].copy_from_slice(part);
        slot.len = part.len() as u16;
        // VALE counts slots in the upper half.
        slot.flags = flags | 1 << 8;
        if self.has_offsets {
            slot.ptr = start as u64;
        }
        self.set_slot(self.tail, slot);
        self.tail = self.next(self.tail);
    }
}

/// All rings of a thread, pair by pair: to send, to receive.
#[derive(Debug)]
pub struct World {
    /// The pairs.
    pub pairs: Vec<(KernelRing, KernelRing)>,
    /// How often it was waited for room.
    pub waits: usize,
}

/// The kernel, as the forwarder calls it.
#[derive(Clone, Debug)]
pub struct Double(pub Rc<RefCell<World>>);

impl Kernel for Double {
    fn turn(&mut self, _wait: Duration) -> io::Result<()> {
        for (tx, rx) in &mut self.0.borrow_mut().pairs {
            tx.sync_tx();
            rx.sync_rx();
        }
        Ok(())
    }

    fn send(&mut self, handle: usize) -> io::Result<()> {
        self.0.borrow_mut().pairs[handle].0.sync_tx();
        Ok(())
    }

    fn wait_for_room(&mut self, handle: usize, _wait: Duration) -> io::Result<()> {
        self.0.borrow_mut().waits += 1;
        self.send(handle)
    }
}

/// Lays out ports in memory, as netmap does, and finds their rings there.
pub fn world(specs: &[PortSpec]) -> (Rings, Double) {
    let mut rings = Rings::default();
    let mut pairs = Vec::new();
    let regions: Vec<Layout> = (0..=specs.iter().map(|spec| spec.region).max().unwrap())
        .map(|region| Layout::new(specs.iter().filter(|spec| spec.region == region)))
        .collect();
    let mut next_port = vec![0; regions.len()];
    for (number, spec) in specs.iter().enumerate() {
        let layout = &regions[spec.region];
        let port_at = layout.ports[next_port[spec.region]];
        next_port[spec.region] += 1;
        let kinds = [(0, true), (1, spec.has_host)];
        let start = rings.pairs.len();
        for (kind, _) in kinds.into_iter().filter(|(_, is_there)| *is_there) {
            let which = if kind == 0 { abi::Rings::Hardware(0) } else { abi::Rings::Host(0) };
            let (tx, rx) = find(&layout.region, port_at, which).unwrap();
            let kernel = |index: usize, slots: u32| {
                let mut ring =
                    layout.kernel(spec, layout.region.ring_offset(port_at, index).unwrap(), slots, index < 2);
                if kind == 1 {
                    // The host gives nothing in several slots.
                    ring.receive_len = BUFFER_LEN - MAX_OFFSET;
                }
                ring
            };
            pairs.push((kernel(kind, spec.slots.0), kernel(2 + kind, spec.slots.1)));
            rings.push(pairs.len() - 1, spec.region, !spec.is_pipe, rx, tx);
        }
        let host = spec.has_host.then_some(start + 1);
        rings.ports.push(Port { place: format!("port {number}"), pairs: start..start + 1, host });
    }
    (rings, Double(Rc::new(RefCell::new(World { pairs, waits: 0 }))))
}

/// One region.
struct Layout {
    region: Arc<Region>,
    ports: Vec<usize>,
    buffers_at: usize,
}

impl Layout {
    /// A description of each port, then all rings, then all buffers.
    fn new<'s>(specs: impl Iterator<Item = &'s PortSpec>) -> Layout {
        let specs: Vec<&PortSpec> = specs.collect();
        let ring_len = |slots: u32| (SLOTS_AT + slots as usize * 16).next_multiple_of(64);
        let port_len = (offset_of!(netmap_if, ring_ofs) + 4 * 8).next_multiple_of(64);
        let rings_at = 64 + specs.len() * port_len;
        let all_slots = |spec: &PortSpec| [spec.slots.0, spec.slots.0, spec.slots.1, spec.slots.1];
        let rings_len: usize = specs.iter().flat_map(|spec| all_slots(spec)).map(ring_len).sum();
        let buffers_at = rings_at + rings_len;
        let buffers = FIRST_BUFFER as usize
            + specs.iter().flat_map(|spec| all_slots(spec)).map(|slots| slots as usize).sum::<usize>();
        let region = Arc::new(Region::new(Mapping::anonymous(buffers_at + buffers * BUFFER_LEN).unwrap()));
        let (mut ring_at, mut buffer, mut ports) = (rings_at, FIRST_BUFFER, Vec::new());
        for (number, spec) in specs.iter().enumerate() {
            let port_at = 64 + number * port_len;
            ports.push(port_at);
            for (field, value) in [
                (offset_of!(netmap_if, ni_tx_rings), 1u32),
                (offset_of!(netmap_if, ni_rx_rings), 1),
                (offset_of!(netmap_if, ni_spare1), 1),
                (offset_of!(netmap_if, ni_spare1) + 4, 1),
            ] {
                region.write(port_at + field, value);
            }
            for (index, slots) in all_slots(spec).into_iter().enumerate() {
                let is_tx = index < 2;
                region.write(
                    port_at + offset_of!(netmap_if, ring_ofs) + 8 * index,
                    (ring_at - port_at) as isize,
                );
                region.write(ring_at + offset_of!(netmap_ring, buf_ofs), (buffers_at - ring_at) as i64);
                region.write(ring_at + offset_of!(netmap_ring, num_slots), slots);
                region.write(ring_at + offset_of!(netmap_ring, nr_buf_size), BUFFER_LEN as u32);
                region.write(ring_at + offset_of!(netmap_ring, dir), u16::from(!is_tx));
                region.write(ring_at + offset_of!(netmap_ring, tail), if is_tx { slots - 1 } else { 0 });
                region.write(ring_at + OFFSET_MASK_AT, if spec.has_offsets { u64::MAX } else { 0 });
                for slot in 0..slots {
                    let ptr = if spec.has_offsets { spec.receive_at() } else { 0 };
                    let at = ring_at + SLOTS_AT + slot as usize * 16;
                    region.write(at, netmap_slot { buf_idx: buffer, len: 0, flags: 0, ptr });
                    buffer += 1;
                }
                ring_at += ring_len(slots);
            }
        }
        Layout { region, ports, buffers_at }
    }

    fn kernel(&self, spec: &PortSpec, at: usize, slots: u32, is_tx: bool) -> KernelRing {
        let mut ring = KernelRing {
            region: Arc::clone(&self.region),
            at,
            slots,
            current: 0,
            tail: if is_tx { slots - 1 } else { 0 },
            has_offsets: spec.has_offsets,
            receive_len: spec.receive_len,
            receive_at: spec.receive_at(),
            buffers_at: self.buffers_at,
            known: Vec::new(),
            healed: BTreeMap::new(),
            wire: VecDeque::new(),
            sent: Vec::new(),
            swaps: 0,
            is_stalled: false,
        };
        ring.known = (0..slots).map(|slot| ring.slot(slot).buf_idx).collect();
        ring
    }
}
