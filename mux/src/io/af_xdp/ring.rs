//! The rings of `linux/if_xdp.h`: each has one writer and one reader, of which one is the kernel.

use std::io;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::super::sys::Mapping;

/// Entries of each ring.
pub const RING_LEN: u32 = 2048;

/// A ring that is written here, and read by the other side.
#[derive(Debug)]
pub struct Producer<T> {
    ring: Ring<T>,
    /// Where we write next.
    head: u32,
    /// Where the other side was when we last looked.
    tail: u32,
}

/// A ring that is read here, and written by the other side.
#[derive(Debug)]
pub struct Consumer<T> {
    ring: Ring<T>,
    /// Where we read next.
    tail: u32,
    /// Where the other side was when we last looked.
    head: u32,
}

/// The memory of a ring. Positions count up and wrap; the low bits choose the entry.
#[derive(Clone, Debug)]
pub struct Ring<T> {
    producer: NonNull<AtomicU32>,
    consumer: NonNull<AtomicU32>,
    flags: NonNull<AtomicU32>,
    entries: NonNull<T>,
    _memory: Arc<Mapping>,
}

// SAFETY: the pointers lead into the mapping that the ring holds.
unsafe impl<T: Send> Send for Ring<T> {}

impl<T: Copy> Ring<T> {
    /// Maps a socket's ring.
    pub fn map(fd: &OwnedFd, offsets: &libc::xdp_ring_offset, page: libc::off_t) -> io::Result<Ring<T>> {
        let len = offsets.desc as usize + RING_LEN as usize * size_of::<T>();
        Ok(Ring::within(Mapping::shared(fd, len, page)?, offsets))
    }

    fn within(memory: Mapping, offsets: &libc::xdp_ring_offset) -> Ring<T> {
        let word = |offset: u64| memory.part(offset as usize, 4).cast::<AtomicU32>();
        Ring {
            producer: word(offsets.producer),
            consumer: word(offsets.consumer),
            flags: word(offsets.flags),
            entries: memory.part(offsets.desc as usize, RING_LEN as usize * size_of::<T>()).cast(),
            _memory: Arc::new(memory),
        }
    }

    /// A ring in memory of this process, where a test plays the kernel.
    #[cfg(test)]
    pub fn in_memory() -> Ring<T> {
        let offsets = libc::xdp_ring_offset { producer: 0, consumer: 64, desc: 192, flags: 128 };
        Ring::within(Mapping::anonymous(192 + RING_LEN as usize * size_of::<T>()).unwrap(), &offsets)
    }

    fn producer(&self) -> &AtomicU32 {
        // SAFETY: within the mapping, aligned by the kernel, and shared with it as an atomic.
        unsafe { self.producer.as_ref() }
    }

    fn consumer(&self) -> &AtomicU32 {
        // SAFETY: as above.
        unsafe { self.consumer.as_ref() }
    }

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
    /// Begins with an empty ring.
    pub fn new(ring: Ring<T>) -> Producer<T> {
        Producer { ring, head: 0, tail: 0 }
    }

    /// Writes an entry, if there is room. The other side sees it after [`Producer::submit`].
    pub fn push(&mut self, entry: T) -> bool {
        if !self.has_room() {
            return false;
        }
        // SAFETY: the entry is ours: the other side has consumed what was there, and does not read beyond `submit`.
        unsafe { self.ring.entry(self.head).write(entry) };
        self.head = self.head.wrapping_add(1);
        true
    }

    /// Whether there is room for an entry.
    pub fn has_room(&mut self) -> bool {
        if self.head.wrapping_sub(self.tail) == RING_LEN {
            self.tail = self.ring.consumer().load(Ordering::Acquire);
        }
        self.head.wrapping_sub(self.tail) < RING_LEN
    }

    /// Shows all entries to the other side.
    pub fn submit(&mut self) {
        self.ring.producer().store(self.head, Ordering::Release);
    }

    /// How many entries the other side has not taken yet.
    pub fn waiting(&mut self) -> u32 {
        self.tail = self.ring.consumer().load(Ordering::Acquire);
        self.head.wrapping_sub(self.tail)
    }

    /// Whether the kernel sleeps until it is called.
    pub fn needs_wakeup(&self) -> bool {
        self.ring.needs_wakeup()
    }
}

impl<T: Copy> Consumer<T> {
    /// Begins with an empty ring.
    pub fn new(ring: Ring<T>) -> Consumer<T> {
        Consumer { ring, tail: 0, head: 0 }
    }

    /// Reads an entry, if there is one. The other side may reuse it after [`Consumer::release`].
    pub fn pop(&mut self) -> Option<T> {
        if self.tail == self.head {
            self.head = self.ring.producer().load(Ordering::Acquire);
            if self.tail == self.head {
                return None;
            }
        }
        // SAFETY: the other side has written the entry before it moved its position, and leaves it until `release`.
        let entry = unsafe { self.ring.entry(self.tail).read() };
        self.tail = self.tail.wrapping_add(1);
        Some(entry)
    }

    /// Gives back all entries that were read.
    pub fn release(&mut self) {
        self.ring.consumer().store(self.tail, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_come_out_in_order_across_the_wrap() {
        let ring = Ring::<u64>::in_memory();
        let (mut producer, mut consumer) = (Producer::new(ring.clone()), Consumer::new(ring));
        // Positions wrap at 2^32, too.
        let near = u32::MAX - 1000;
        producer.ring.producer().store(near, Ordering::Relaxed);
        producer.ring.consumer().store(near, Ordering::Relaxed);
        (producer.head, producer.tail, consumer.head, consumer.tail) = (near, near, near, near);
        let (mut next_in, mut next_out) = (0, 0);
        for round in 0..5000u64 {
            for _ in 0..round % 7 {
                next_in += u64::from(producer.push(next_in));
            }
            producer.submit();
            for _ in 0..round % 6 {
                let Some(entry) = consumer.pop() else { break };
                assert_eq!(entry, next_out);
                next_out += 1;
            }
            consumer.release();
        }
        assert!(next_out > 10_000 && next_in - next_out == u64::from(producer.waiting()));
    }

    #[test]
    fn a_full_ring_takes_no_more() {
        let ring = Ring::<u64>::in_memory();
        let (mut producer, mut consumer) = (Producer::new(ring.clone()), Consumer::new(ring));
        assert!((0..u64::from(RING_LEN)).all(|entry| producer.push(entry)));
        assert!(!producer.push(0) && consumer.pop().is_none());
        producer.submit();
        assert_eq!(producer.waiting(), RING_LEN);
        assert_eq!(consumer.pop(), Some(0));
        assert!(!producer.has_room(), "the entry is not given back yet");
        consumer.release();
        assert!(producer.has_room());
    }
}
