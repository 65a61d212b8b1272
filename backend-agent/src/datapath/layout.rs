//! What the data path's two halves must agree on: `build.rs` turns this file and `daisy-shared` into the header
//! `daisy_constants.h`, so that every number stands in one place.
//!
//! This file is also compiled into `build.rs`; it may use nothing but `daisy-shared`.

use daisy_shared::chain::MAX_OWNERS;
use daisy_shared::drop::DropReason;
use daisy_shared::wire::{gue, outer};

/// The version of the pinned maps' layout. Raised with every change to the meaning of a map, so that a newer
/// agent never reads an older one's maps as its own.
pub const LAYOUT: u32 = 3;

/// Counters that are not drop reasons, in the order of their index. [`PASSES`] and [`SENDS`] say what the program
/// does with a packet that ends in one of them.
pub const COUNTERS: [&str; 9] = [
    "received",
    "learned",
    "passed",
    "delivered",
    "accepted",
    "answered",
    "probes_answered",
    "sent_on",
    "returned",
];
/// The counters of packets that go to the kernel.
pub const PASSES: core::ops::Range<usize> = 2..6;
/// The counters of packets that are sent.
pub const SENDS: core::ops::Range<usize> = 6..9;
/// How many counters there are.
pub const COUNTER_COUNT: usize = COUNTERS.len() + DropReason::ALL.len();

/// In a knowledge word: something is known of the bucket.
pub const FLAG_KNOWN: u64 = 1 << 40;
/// In a knowledge word: this agent is the head.
pub const FLAG_HEAD_IS_ME: u64 = 1 << 41;
/// In a knowledge word: a table of the controller is at the root of it.
pub const FLAG_FROM_TABLE: u64 = 1 << 42;
/// In a knowledge word: where the chain's length stands (8 bits).
pub const LEN_SHIFT: u32 = 32;
/// In a knowledge word: where the number of writes stands (16 bits). It is odd while the owners are being written.
pub const WRITES_SHIFT: u32 = 48;

/// In the flags of `struct link`: a service here travels by IPIP, so IPIP packets to this agent are daisy's.
pub const LINK_IPIP: u32 = 1;
/// In a service's flags: it travels by IPIP in closed windows.
pub const SERVICE_IPIP: u32 = 1;

/// How many owners stand in a bucket's brief.
pub const BRIEF_OWNERS: usize = 2;
/// Length in bytes of a bucket's brief.
pub const BRIEF_LEN: usize = 8 + 4 * BRIEF_OWNERS;

/// In a peer's flags: the link-layer addresses are known.
pub const PEER_RESOLVED: u32 = 1;
/// In a peer's flags: the controller has declared it dead.
pub const PEER_DEAD: u32 = 2;

/// Length in bytes of what comes before the entries of an install batch.
pub const BATCH_HEADER_LEN: usize = 16;
/// Length in bytes of one entry of an install batch.
pub const BATCH_ENTRY_LEN: usize = 12 + 4 * MAX_OWNERS;
/// The most entries of one install batch: what fits the linear part of a test packet (a page less head and tail
/// room).
pub const BATCH_MAX: usize = 64;
/// Operation of an install entry: write it, unless what is known is newer.
pub const OP_INSTALL: u8 = 0;
/// Operation of an install entry: forget the bucket.
pub const OP_CLEAR: u8 = 1;

/// The most services on one host.
pub const MAX_SERVICES: u32 = 4096;
/// The most peers (other agents).
pub const MAX_PEERS: u32 = 16_384;
/// The most trusted prefixes.
pub const MAX_TRUSTED: u32 = 4096;
/// Bytes of the ring buffer that names next hops to resolve.
pub const WANTED_BYTES: u32 = 4096;

/// Length in bytes of the frames that are timed, with what they are padded with.
pub const BENCH_FRAME_LEN: usize = 128;
/// How many frames are timed in turn.
pub const BENCH_FRAMES: usize = 4096;

/// Bytes that the longest encapsulation adds to an inner packet: outer headers, GUE, and room for a tag.
pub const RESERVE: u32 = (outer::LEN + gue::MAX_LEN + 8) as u32;
