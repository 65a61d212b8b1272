//! What the XDP program and its control side must agree on: `build.rs` turns this file and `daisy-shared` into the
//! header `daisy_constants.h`, so that every number stands in one place.
//!
//! This file is also compiled into `build.rs`; it may use nothing but `daisy-shared`.

use daisy_shared::drop::DropReason;

/// The most interfaces of a mux.
pub const MAX_LINKS: usize = 16;
/// The most tables; one for each service, and those that are about to replace another.
pub const MAX_TABLES: u32 = 1024;
/// Cells of the index of services.
pub const CELLS: usize = 2048;
/// How far a key may stand from its first cell.
pub const MAX_PROBES: usize = 32;
/// What chooses a key's first cell: the product's bits from this one on.
pub const CELL_SHIFT: u32 = 64 - CELLS.ilog2();
/// So many backends, by number, stand in the snapshot itself.
pub const NEAR_BACKENDS: usize = 512;
/// The longest header that lies ready, in 64-bit words.
pub const HEADER_WORDS: usize = 6;

/// Outcomes that are not drops, in the order of their index; drop reasons follow.
pub const OUTCOMES: [&str; 3] = ["sent_closed", "sent_open", "passed"];
/// How many outcomes there is room for: a power of two.
pub const COUNTERS: usize = (OUTCOMES.len() + DropReason::ALL.len()).next_power_of_two();

/// Of a template: the directory does not know the backend.
pub const REACH_UNKNOWN: u8 = 0;
/// Of a template: the Ethernet address of the next hop is not known.
pub const REACH_NO_NEXT_HOP: u8 = 1;
/// Of a template: ready.
pub const REACH_RESOLVED: u8 = 2;
