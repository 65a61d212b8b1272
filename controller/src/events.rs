//! What happened lately: a bounded ring in memory, for people and tests.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// The most events kept.
pub const CAPACITY: usize = 4096;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A service was added.
    ServiceAdded,
    /// A service was removed.
    ServiceRemoved,
    /// A backend was added to a service.
    BackendAdded,
    /// A backend left a service.
    BackendRemoved,
    /// A backend's weight changed.
    WeightChanged,
    /// A backend began to give up its buckets.
    DrainBegan,
    /// A drain was called off.
    DrainCancelled,
    /// A draining backend is in no chain any more.
    DrainEnded,
    /// A backend was taken out of chains with connections it may have held.
    BackendForcedOut,
    /// A backend's lease ended, but it is not known to be dead.
    BackendSuspect,
    /// A backend was declared dead.
    BackendDead,
    /// A backend that was joining, suspect or dead has synced.
    BackendBack,
    /// A node synced for the first time, or after its lease had ended.
    NodeJoined,
    /// A node's lease ended.
    LeaseExpired,
    /// A mux was forgotten.
    MuxRemoved,
    /// Buckets moved to another head.
    BucketsMoved,
    /// A node knew a newer generation than the controller; the table was stamped anew.
    Rebased,
}

/// An event that has not been given its place yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// What happened.
    pub kind: Kind,
    /// The service it happened to.
    pub service: Option<String>,
    /// The node or backend it happened to.
    pub subject: Option<String>,
    /// The rest, for people.
    pub detail: String,
}

impl Event {
    /// An event about nobody in particular.
    pub fn new(kind: Kind, detail: impl Into<String>) -> Event {
        Event { kind, service: None, subject: None, detail: detail.into() }
    }

    /// The same about a service.
    #[must_use]
    pub fn service(self, name: &str) -> Event {
        Event { service: Some(name.into()), ..self }
    }

    /// The same about a node or backend.
    #[must_use]
    pub fn subject(self, name: &str) -> Event {
        Event { subject: Some(name.into()), ..self }
    }
}

/// An event in the ring.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its place, counted from 1 since the controller started.
    pub sequence: u64,
    /// When, in milliseconds of Unix time.
    pub at_unix_ms: u64,
    /// What happened.
    pub kind: Kind,
    /// The service it happened to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// The node or backend it happened to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
    /// The rest, for people.
    pub detail: String,
}

/// The last [`CAPACITY`] events.
#[derive(Debug, Default)]
pub struct Ring {
    last: u64,
    entries: VecDeque<Entry>,
}

impl Ring {
    /// Appends an event; the oldest makes room.
    pub fn push(&mut self, at_unix_ms: u64, event: Event) {
        let Event { kind, service, subject, detail } = event;
        self.last += 1;
        if self.entries.len() == CAPACITY {
            self.entries.pop_front();
        }
        self.entries.push_back(Entry { sequence: self.last, at_unix_ms, kind, service, subject, detail });
    }

    /// The sequence number of the newest event.
    pub fn last(&self) -> u64 {
        self.last
    }

    /// The events after this sequence number, oldest first.
    pub fn after(&self, sequence: u64) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(move |entry| entry.sequence > sequence)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_is_bounded_and_numbers_go_on() {
        let mut ring = Ring::default();
        for i in 0..CAPACITY as u64 + 10 {
            ring.push(i, Event::new(Kind::Rebased, ""));
        }
        let numbers: Vec<u64> = ring.after(0).map(|entry| entry.sequence).collect();
        assert_eq!((numbers.len(), numbers[0], ring.last()), (CAPACITY, 11, CAPACITY as u64 + 10));
        assert_eq!(ring.after(ring.last()).count(), 0);
    }
}
