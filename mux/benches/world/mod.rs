//! What the pipeline is measured on: a table of 100 backends, and 64-byte TCP segments (54 bytes without padding and
//! checksum of Ethernet) that lie one after the other in memory, their flows in no order.
#![allow(dead_code, reason = "no measurement uses all of it")]

use std::hint::black_box;
use std::net::Ipv4Addr;

use arrayvec::ArrayVec;
use daisy_mux::pipeline::{self, BURST, Scratch, Slot, Verdict};
use daisy_mux::table::{Link, NextHop, Snapshot, Tables, Underlay};
use daisy_shared::bucket::{BackendId, Entry, Piece};
use daisy_shared::chain::Generation;
use daisy_shared::checksum;
use daisy_shared::control::{Directory, DirectoryEntry};
use daisy_shared::flow::HashKey;
use daisy_shared::service::{Encapsulation, Protocol, Service, ServiceId};
use daisy_shared::wire::gue;

/// Counts by the names that cases have.
pub const BUCKETS: [(&str, u32); 2] = [("64ki", 1 << 16), ("1mi", 1 << 20)];
pub const FLOWS: [(&str, u32); 3] = [("1", 1), ("1ki", 1 << 10), ("1mi", 1 << 20)];
pub const WINDOWS: [(&str, bool); 2] = [("closed", false), ("open", true)];
pub const ENCAPSULATIONS: [(&str, Encapsulation); 2] =
    [("gue", Encapsulation::Gue), ("ipip", Encapsulation::Ipip)];

const BACKENDS: u32 = 100;
/// A frame and its room, on two cache lines of its own.
pub const STRIDE: usize = 128;
/// Where a frame begins.
pub const START: usize = 64;
/// Length in bytes of a frame.
pub const LEN: usize = 54;
const VIP: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const ETHERNET: [u8; 14] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];

/// One way of running the pipeline.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub buckets: u32,
    pub flows: u32,
    pub open: bool,
    pub encapsulation: Encapsulation,
}

impl Case {
    /// All cases, with their names.
    pub fn all() -> Vec<(String, Case)> {
        let mut all = Vec::new();
        for (buckets_name, buckets) in BUCKETS {
            for (flows_name, flows) in FLOWS {
                for (window, open) in WINDOWS {
                    for (encapsulation_name, encapsulation) in ENCAPSULATIONS {
                        let name = format!("{buckets_name}_{flows_name}_{window}_{encapsulation_name}");
                        all.push((name, Case { buckets, flows, open, encapsulation }));
                    }
                }
            }
        }
        all
    }

    /// Tables for it.
    pub fn tables(&self) -> Tables {
        let underlay = Underlay { address: Ipv4Addr::new(10, 0, 0, 1), gue_port: gue::PORT };
        let mut tables = Tables::new(underlay, [Link { mac: [2, 0, 0, 0, 0, 1], mtu: 1500 }]);
        let address = |id: u32| Ipv4Addr::from_bits(0x0a01_0000 + id);
        let backends = (0..BACKENDS)
            .map(|id| DirectoryEntry {
                id: BackendId(id as u16),
                name: format!("b{id}"),
                address: address(id).into(),
                dead: false,
            })
            .collect();
        tables.set_directory(&Directory { version: 1, backends, muxes: Vec::new() });
        for id in 0..BACKENDS {
            tables.set_next_hop(address(id), Some(NextHop { egress: 0, mac: [2, 0, 0, 1, 0, id as u8] }));
        }
        let service = Service {
            id: ServiceId(1),
            name: "speed".into(),
            vip: VIP.into(),
            protocol: Protocol::Tcp,
            port: 80,
            buckets: self.buckets,
            hash_key: HashKey([0x5a; 16]),
            encapsulation: self.encapsulation,
        };
        let entry = |bucket: u32| {
            let owners = [bucket % BACKENDS, (bucket + 1) % BACKENDS];
            let chain =
                owners[..if self.open { 2 } else { 1 }].iter().map(|id| BackendId(*id as u16)).collect();
            Entry { bucket, generation: Generation(1), chain }
        };
        let entries = (0..self.buckets).map(entry).collect();
        let piece = Piece {
            service: service.id,
            from: None,
            generation: Generation(1),
            buckets: self.buckets,
            entries,
        };
        tables.apply(&service, &piece).expect("the table is well-formed");
        tables
    }
}

/// So many frames of so many flows.
pub fn frames(packets: usize, flows: u32) -> Vec<u8> {
    let mut arena = vec![0; packets * STRIDE];
    for (i, place) in arena.chunks_exact_mut(STRIDE).enumerate() {
        let flow = (i as u32 % flows).wrapping_mul(0x9e37_79b1);
        let frame = &mut place[START..START + LEN];
        frame[..14].copy_from_slice(&ETHERNET);
        frame[14..24].copy_from_slice(&[0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6]);
        frame[26..30].copy_from_slice(&(0xc633_0000 + (flow >> 16)).to_be_bytes());
        frame[30..34].copy_from_slice(&VIP.octets());
        let sum = checksum::of(&frame[14..34]);
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
        frame[34..36].copy_from_slice(&(flow as u16).to_be_bytes());
        frame[36..38].copy_from_slice(&80u16.to_be_bytes());
        frame[46..48].copy_from_slice(&[0x50, 0x10]);
    }
    arena
}

/// Makes frames what they were: the outer headers end where the Ethernet header was.
pub fn restore(arena: &mut [u8]) {
    for place in arena.chunks_exact_mut(STRIDE) {
        place[START..START + 14].copy_from_slice(&ETHERNET);
    }
}

/// All frames through the pipeline, burst by burst.
#[inline(never)]
pub fn run(arena: &mut [u8], snapshot: &Snapshot, scratch: &mut Scratch) {
    for part in arena.chunks_mut(BURST * STRIDE) {
        let mut burst = ArrayVec::<Slot<'_>, BURST>::new();
        for frame in part.chunks_exact_mut(STRIDE) {
            burst.push(Slot::new(frame, START, LEN));
        }
        pipeline::decide(snapshot, scratch, 0, &mut burst);
        // What becomes of the others is not left to the compiler to forget.
        let burst = black_box(burst.as_slice());
        assert!(matches!(burst[0].verdict, Verdict::Send { .. }));
    }
}
