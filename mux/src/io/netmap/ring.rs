//! A ring in the memory that netmap maps: its slots, which of them are ours, and the buffers that they name.
//!
//! Nothing that is read from that memory is believed. Where rings and buffers lie is checked once, when a ring is
//! found; positions, buffer numbers, offsets and lengths each time, as other processes may map the same memory.

use std::mem::offset_of;
use std::ptr::NonNull;
use std::sync::Arc;

use netmap_sys::netmap::{netmap_if, netmap_ring, netmap_slot};

use super::abi::{BUFFER_ALIGN_AT, FIRST_BUFFER, OFFSET_MASK_AT, SLOTS_AT};
use crate::io::FRAME_START;
use crate::io::sys::Mapping;

/// The most that a frame may lie behind the start of its buffer. VALE keeps a frame's place in its cache line and
/// may so move it by almost two lines behind where it was asked to put it.
pub const MAX_OFFSET: usize = FRAME_START + 128;

/// Memory that ports share. Threads hold the addresses of rings of their own in it.
#[derive(Debug)]
pub struct Region(Mapping);

// SAFETY: it gives out addresses; whoever uses them says why nobody else does at that time.
unsafe impl Sync for Region {}

impl Region {
    /// This memory.
    pub fn new(mapping: Mapping) -> Region {
        Region(mapping)
    }

    /// The address of a part, if it is one and is aligned.
    fn part<T>(&self, offset: usize) -> Option<NonNull<T>> {
        let end = offset.checked_add(size_of::<T>())?;
        (end <= self.0.len() && offset.is_multiple_of(align_of::<T>()))
            .then(|| self.0.part(offset, size_of::<T>()).cast())
    }

    /// Reads a value, if it lies within.
    pub fn read<T: Copy>(&self, offset: usize) -> Option<T> {
        // SAFETY: within the mapping and aligned; what is read here are integers, and structs and arrays of them.
        self.part::<T>(offset).map(|place| unsafe { place.read_volatile() })
    }

    /// Writes a value, as the kernel does.
    #[cfg(test)]
    pub fn write<T: Copy>(&self, offset: usize, value: T) {
        let place = self.part::<T>(offset).expect("within the image");
        // SAFETY: within the mapping and aligned; tests write integers and structs of them.
        unsafe { place.write_volatile(value) };
    }

    /// A part as bytes, to be read and written as the kernel does.
    #[cfg(test)]
    pub fn bytes(&self, offset: usize, len: usize) -> NonNull<[u8]> {
        NonNull::slice_from_raw_parts(self.0.part(offset, len), len)
    }

    /// Where a ring lies: `index` counts rings to send and then rings to receive, host rings behind the hardware's.
    pub fn ring_offset(&self, interface_at: usize, index: usize) -> Option<usize> {
        let entries = interface_at.checked_add(offset_of!(netmap_if, ring_ofs))?;
        let entry = index.checked_mul(size_of::<isize>())?.checked_add(entries)?;
        let offset: isize = self.read(entry)?;
        // 0 stands for a ring that this descriptor has not.
        if offset == 0 { None } else { interface_at.checked_add_signed(offset) }
    }

    /// How many rings a port has: to send and to receive, the host's included, and how many of each are hardware's.
    pub fn counts(&self, interface_at: usize) -> Option<Counts> {
        let word = |field: usize| Some(self.read::<u32>(interface_at.checked_add(field)?)? as usize);
        let (tx, rx) = (word(offset_of!(netmap_if, ni_tx_rings))?, word(offset_of!(netmap_if, ni_rx_rings))?);
        // API 14 has the numbers of host rings where API 11 had spare words.
        let spare = offset_of!(netmap_if, ni_spare1);
        Some(Counts { tx, rx, host_tx: word(spare)?, host_rx: word(spare + 4)? })
    }
}

/// How many rings a port has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Hardware rings to send.
    pub tx: usize,
    /// Hardware rings to receive.
    pub rx: usize,
    /// Rings to the host.
    pub host_tx: usize,
    /// Rings from the host.
    pub host_rx: usize,
}

/// A ring.
#[derive(Debug)]
pub struct Ring {
    header: NonNull<netmap_ring>,
    slots: NonNull<netmap_slot>,
    slot_count: u32,
    /// Buffer 0 of the region.
    buffers: NonNull<u8>,
    buffer_count: u32,
    buffer_len: usize,
    offset_mask: u64,
    align: u64,
    /// The first slot that is ours, as the kernel shall see it.
    head: u32,
    _region: Arc<Region>,
}

// SAFETY: the addresses lead into the region that the ring holds.
unsafe impl Send for Ring {}

impl Ring {
    /// The ring at this place of a region.
    ///
    /// # Errors
    /// If what is there cannot be a ring, with what is wrong.
    pub fn at(region: &Arc<Region>, offset: usize) -> Result<Ring, String> {
        let outside = |what: &str| format!("{what} of the ring at {offset} is not within the mapped memory");
        let len = region.0.len();
        let header = region.part::<netmap_ring>(offset).ok_or_else(|| outside("the header"))?;
        let read = |at: usize| region.read::<u64>(offset + at).ok_or_else(|| outside("a field"));
        let (offset_mask, align) = (read(OFFSET_MASK_AT)?, read(BUFFER_ALIGN_AT)?);
        let buffers_at: i64 = read(offset_of!(netmap_ring, buf_ofs))?.cast_signed();
        let word = |at: usize| region.read::<u32>(offset + at).ok_or_else(|| outside("a field"));
        let slot_count = word(offset_of!(netmap_ring, num_slots))?;
        let buffer_len = word(offset_of!(netmap_ring, nr_buf_size))? as usize;
        let head = word(offset_of!(netmap_ring, head))?;
        let slots_end = (slot_count as usize)
            .checked_mul(size_of::<netmap_slot>())
            .and_then(|slots| slots.checked_add(offset + SLOTS_AT))
            .filter(|end| *end <= len && slot_count >= 2)
            .ok_or_else(|| outside("the last slot"))?;
        let first = usize::try_from(buffers_at)
            .ok()
            .and_then(|at| at.checked_add(offset))
            // Behind the rings: a frame must not lie where slots do.
            .filter(|first| *first >= slots_end && *first < len)
            .ok_or_else(|| outside("the first buffer"))?;
        let buffer_count = (len - first).checked_div(buffer_len).unwrap_or(0);
        let buffer_count = u32::try_from(buffer_count).unwrap_or(u32::MAX);
        if buffer_count <= FIRST_BUFFER || buffer_len < 64 || head >= slot_count {
            return Err(format!(
                "the ring at {offset} has {slot_count} slots from {head}, and {buffer_count} buffers of {buffer_len} bytes"
            ));
        }
        Ok(Ring {
            slots: region.0.part(offset + SLOTS_AT, slots_end - offset - SLOTS_AT).cast(),
            buffers: region.0.part(first, buffer_count as usize * buffer_len),
            header,
            slot_count,
            buffer_count,
            buffer_len,
            offset_mask,
            align: align.max(1),
            head,
            _region: Arc::clone(region),
        })
    }

    /// How many slots it has.
    pub fn slot_count(&self) -> u32 {
        self.slot_count
    }

    /// How many buffers there are in its region.
    pub fn buffer_count(&self) -> u32 {
        self.buffer_count
    }

    /// The length of a buffer in bytes.
    pub fn buffer_len(&self) -> usize {
        self.buffer_len
    }

    /// Whether frames need not begin where their buffer does.
    pub fn has_offsets(&self) -> bool {
        self.offset_mask != 0
    }

    /// Whether a frame that begins at `offset` of its buffer may be sent as it lies.
    pub fn takes_offset(&self, offset: usize) -> bool {
        let bits = offset as u64;
        bits & !self.offset_mask == 0 && offset <= MAX_OFFSET && bits.is_multiple_of(self.align)
    }

    /// The first slot that is ours.
    pub fn head(&self) -> u32 {
        self.head
    }

    /// The first slot behind those that are ours: what the kernel last said, or `None` if that cannot be.
    pub fn tail(&self) -> Option<u32> {
        // SAFETY: within the region, as `at` found; written by the kernel, during calls of this thread.
        let tail = unsafe { (&raw const (*self.header.as_ptr()).tail).read_volatile() };
        (tail < self.slot_count).then_some(tail)
    }

    /// How many slots are ours.
    pub fn space(&self) -> u32 {
        self.tail().map_or(0, |tail| {
            if tail >= self.head { tail - self.head } else { tail + self.slot_count - self.head }
        })
    }

    /// The slot behind another.
    #[inline]
    pub fn next(&self, at: u32) -> u32 {
        if at + 1 == self.slot_count { 0 } else { at + 1 }
    }

    /// The slots before `head` are the kernel's now. It sees it after [`Ring::publish`].
    pub fn give_up_to(&mut self, head: u32) {
        debug_assert!(head < self.slot_count);
        self.head = head;
    }

    /// Tells the kernel which slots are its own, and to wake us when there is more than `seen`. It looks when it is
    /// called next.
    pub fn publish(&mut self, seen: u32) {
        // SAFETY: as for `tail`; the kernel reads them during calls of this thread.
        unsafe {
            (&raw mut (*self.header.as_ptr()).head).write_volatile(self.head);
            (&raw mut (*self.header.as_ptr()).cur).write_volatile(seen);
        }
    }

    /// Reads a slot.
    ///
    /// # Panics
    /// If there is no such slot.
    #[inline]
    pub fn slot(&self, at: u32) -> netmap_slot {
        assert!(at < self.slot_count);
        // SAFETY: one of the ring's slots, which all lie within the region.
        unsafe { self.slots.add(at as usize).read_volatile() }
    }

    /// Writes a slot, which should be ours.
    ///
    /// # Panics
    /// If there is no such slot.
    #[inline]
    pub fn set_slot(&mut self, at: u32, slot: netmap_slot) {
        assert!(at < self.slot_count);
        // SAFETY: as above. No reference to a slot is ever made.
        unsafe { self.slots.add(at as usize).write_volatile(slot) };
    }

    /// Where in its buffer the frame of a slot begins.
    #[inline]
    pub fn offset(&self, slot: &netmap_slot) -> usize {
        // Above any length of a buffer is as good as any other offset that is too large.
        usize::try_from(slot.ptr & self.offset_mask).unwrap_or(usize::MAX)
    }

    /// A slot's `ptr` with another offset. Without offsets it stays.
    #[inline]
    pub fn with_offset(&self, ptr: u64, offset: usize) -> u64 {
        (ptr & !self.offset_mask) | (offset as u64 & self.offset_mask)
    }

    /// The buffer of this number, if a slot may name it.
    #[inline]
    pub fn buffer(&self, index: u32) -> Option<NonNull<[u8]>> {
        if !(FIRST_BUFFER..self.buffer_count).contains(&index) {
            return None;
        }
        // SAFETY: within the buffers, which all lie within the region.
        let start = unsafe { self.buffers.add(index as usize * self.buffer_len) };
        Some(NonNull::slice_from_raw_parts(start, self.buffer_len))
    }
}
