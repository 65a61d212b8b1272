//! Counters: one set for each I/O thread, written by that thread alone, read as one consistent whole.
//!
//! Every packet is counted once, after its verdict has been carried out, so that at any reading
//! received = sent + passed + Σ dropped.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use daisy_shared::drop::DropReason;

const REASONS: usize = DropReason::ALL.len();

/// How many packets went where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Packets taken from the device.
    pub received: u64,
    /// Packets encapsulated and given to the device.
    pub sent: u64,
    /// Packets that are not for a service, left to the host.
    pub passed: u64,
    /// Those of `sent` that carry a walk: their bucket's window is open.
    pub chained_header: u64,
    /// Packets dropped, by [`DropReason`].
    pub dropped: [u64; REASONS],
    /// Packets that the kernel dropped before the mux could take them. Not among `received`.
    pub missed: u64,
}

impl Counters {
    /// Packets dropped for this reason.
    pub fn dropped_for(&self, reason: DropReason) -> u64 {
        self.dropped[reason as usize]
    }

    /// Packets dropped, whatever the reason.
    pub fn dropped_total(&self) -> u64 {
        self.dropped.iter().sum()
    }

    /// Whether received = sent + passed + Σ dropped.
    pub fn is_conserved(&self) -> bool {
        self.received == self.sent + self.passed + self.dropped_total()
    }

    /// The counters by name. A reason for which nothing was dropped is left out.
    pub fn by_name(&self) -> BTreeMap<String, u64> {
        let plain = [
            ("received", self.received),
            ("sent", self.sent),
            ("passed", self.passed),
            ("chained_header", self.chained_header),
            ("missed", self.missed),
        ];
        let dropped = DropReason::ALL.iter().map(|reason| (reason, self.dropped_for(*reason)));
        plain
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .chain(dropped.filter(|(_, n)| *n > 0).map(|(reason, n)| (format!("dropped_{reason}"), n)))
            .collect()
    }

    fn fields_mut(&mut self) -> impl Iterator<Item = &mut u64> {
        let Counters { received, sent, passed, chained_header, dropped, missed } = self;
        [received, sent, passed, chained_header, missed].into_iter().chain(dropped)
    }
}

impl core::ops::AddAssign for Counters {
    fn add_assign(&mut self, mut other: Counters) {
        for (mine, theirs) in self.fields_mut().zip(other.fields_mut()) {
            *mine += *theirs;
        }
    }
}

/// The counters of one thread, on cache lines of their own, as other threads see them.
///
/// A sequence lock without waiting on the writer's side: `sequence` is odd while it writes, and a reader that
/// met a write tries again.
#[derive(Debug)]
#[repr(align(64))]
pub struct Published {
    sequence: AtomicU64,
    values: [AtomicU64; 5 + REASONS],
}

impl Default for Published {
    fn default() -> Published {
        Published { sequence: AtomicU64::new(0), values: [const { AtomicU64::new(0) }; 5 + REASONS] }
    }
}

impl Published {
    /// Shows the counters to other threads. One thread only may do this.
    pub fn publish(&self, mut counters: Counters) {
        let sequence = self.sequence.load(Ordering::Relaxed);
        self.sequence.store(sequence + 1, Ordering::Relaxed);
        fence(Ordering::Release);
        for (shown, value) in self.values.iter().zip(counters.fields_mut()) {
            shown.store(*value, Ordering::Relaxed);
        }
        self.sequence.store(sequence + 2, Ordering::Release);
    }

    /// The counters as they were after some burst.
    pub fn read(&self) -> Counters {
        loop {
            let before = self.sequence.load(Ordering::Acquire);
            let mut counters = Counters::default();
            for (value, shown) in counters.fields_mut().zip(&self.values) {
                *value = shown.load(Ordering::Relaxed);
            }
            fence(Ordering::Acquire);
            if before.is_multiple_of(2) && self.sequence.load(Ordering::Relaxed) == before {
                return counters;
            }
            std::thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_api() {
        let mut counters = Counters { received: 3, sent: 2, ..Counters::default() };
        counters.dropped[DropReason::TooBig as usize] = 1;
        assert!(counters.is_conserved());
        let names = counters.by_name();
        assert_eq!(names["received"], 3);
        assert_eq!(names["dropped_too_big"], 1);
        assert!(!names.contains_key("dropped_fragment"));
    }

    #[test]
    fn a_reader_never_sees_half_a_burst() {
        let published = Published::default();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut counters = Counters::default();
                for _ in 0..200_000 {
                    counters.received += 3;
                    counters.sent += 1;
                    counters.passed += 1;
                    counters.dropped[0] += 1;
                    published.publish(counters);
                }
            });
            let mut last = 0;
            while last < 600_000 {
                let counters = published.read();
                assert!(counters.is_conserved(), "{counters:?}");
                assert!(counters.received >= last);
                last = counters.received;
            }
        });
    }
}
