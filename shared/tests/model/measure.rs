//! What a run measured on the way.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};

use daisy_shared::drop::DropReason;

use crate::state::Content;

/// Maxima and counts over all steps that were explored.
#[derive(Debug, Default)]
pub struct Measures {
    delivered: AtomicU8,
    accepted: AtomicU8,
    frozen: [AtomicU8; 2],
    settled: [AtomicU8; 2],
    answers: AtomicU64,
    drops: Mutex<BTreeMap<(Content, bool, DropReason), u64>>,
}

impl Measures {
    /// A packet reached its socket.
    pub fn delivered(&self, hops: u8) {
        raise(&self.delivered, hops);
    }

    /// A new flow was accepted.
    pub fn accepted(&self, hops: u8) {
        raise(&self.accepted, hops);
    }

    /// A packet of no connection was reset.
    pub fn answered(&self) {
        self.answers.fetch_add(1, Relaxed);
    }

    /// An agent dropped a packet, of a live connection or not.
    pub fn dropped(&self, content: Content, live: bool, reason: DropReason) {
        *self.drops.lock().expect("no checker thread panics").entry((content, live, reason)).or_default() +=
            1;
    }

    /// A packet arrived through tables that stood still.
    pub fn walked(&self, content: Content, settled: bool, hops: u8) {
        let maxima = if settled { &self.settled } else { &self.frozen };
        raise(&maxima[usize::from(content.is_syn())], hops);
    }

    /// The most hops of data and of a SYN through tables that stood still, whatever they were.
    pub fn frozen(&self) -> (u8, u8) {
        (self.frozen[0].load(Relaxed), self.frozen[1].load(Relaxed))
    }

    /// The same through tables that have settled.
    pub fn settled(&self) -> (u8, u8) {
        (self.settled[0].load(Relaxed), self.settled[1].load(Relaxed))
    }

    /// The most hops of a packet before its delivery, and before it was accepted, while tables changed.
    pub fn moving(&self) -> (u8, u8) {
        (self.delivered.load(Relaxed), self.accepted.load(Relaxed))
    }

    /// Drops by content, whether the connection was alive, and reason.
    pub fn drops(&self) -> BTreeMap<(Content, bool, DropReason), u64> {
        self.drops.lock().expect("no checker thread panics").clone()
    }

    /// How many packets of no connection were reset.
    pub fn answers(&self) -> u64 {
        self.answers.load(Relaxed)
    }
}

fn raise(maximum: &AtomicU8, value: u8) {
    if maximum.load(Relaxed) < value {
        maximum.fetch_max(value, Relaxed);
    }
}
