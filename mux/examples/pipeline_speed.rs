//! How long the pipeline takes for a packet: 64-byte TCP segments of 2²⁰ flows in random order, in memory, on one
//! core, beside a floor that only reads each frame's header line and writes as many bytes before it.
//!
//! `cargo run --release -p daisy-mux --example pipeline_speed`

use std::hint::black_box;
use std::net::Ipv4Addr;
use std::time::Instant;

use arrayvec::ArrayVec;
use daisy_mux::pipeline::{self, BURST, CLOSED_LEN, OPEN_LEN, Slot, Verdict};
use daisy_mux::table::{Link, NextHop, Tables, Underlay};
use daisy_shared::bucket::{BackendId, Entry, Piece};
use daisy_shared::chain::Generation;
use daisy_shared::checksum;
use daisy_shared::control::{Directory, DirectoryEntry};
use daisy_shared::flow::HashKey;
use daisy_shared::service::{Encapsulation, Protocol, Service, ServiceId};
use daisy_shared::wire::gue;

const FLOWS: usize = 1 << 20;
const BACKENDS: u32 = 100;
/// A frame and its room, on two cache lines of its own.
const STRIDE: usize = 128;
const START: usize = 64;
const LEN: usize = 54;
const ROUNDS: usize = 10;
const PARTS: usize = 64;
const VIP: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const UNDERLAY: Underlay = Underlay { address: Ipv4Addr::new(10, 0, 0, 1), gue_port: gue::PORT };
const LINK: Link = Link { mac: [2, 0, 0, 0, 0, 1], mtu: 1500 };

fn tables(buckets: u32, open: bool) -> Tables {
    let mut tables = Tables::new(UNDERLAY, [LINK]);
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
        buckets,
        hash_key: HashKey([0x5a; 16]),
        encapsulation: Encapsulation::Gue,
    };
    let entry = |bucket: u32| {
        let owners = [bucket % BACKENDS, (bucket + 1) % BACKENDS];
        let chain = owners[..if open { 2 } else { 1 }].iter().map(|id| BackendId(*id as u16)).collect();
        Entry { bucket, generation: Generation(1), chain }
    };
    let entries = (0..buckets).map(entry).collect();
    let piece = Piece { service: service.id, from: None, generation: Generation(1), buckets, entries };
    tables.apply(&service, &piece).expect("the table is well-formed");
    tables
}

/// Frames one after the other, their flows in no order.
fn frames() -> Vec<u8> {
    let mut arena = vec![0; FLOWS * STRIDE];
    for (i, place) in arena.chunks_exact_mut(STRIDE).enumerate() {
        let flow = (i as u32).wrapping_mul(0x9e37_79b1);
        let frame = &mut place[START..START + LEN];
        frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0]);
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

/// Nanoseconds for a packet. Each round goes through all frames, in parts shorter than a scheduler's slice; of each
/// part the best round counts, so that a busy machine does not blur the figure.
fn best(arena: &mut [u8], mut run: impl FnMut(&mut [u8])) -> f64 {
    let mut times = [f64::INFINITY; PARTS];
    for _ in 0..ROUNDS {
        for (part, best) in arena.chunks_exact_mut(FLOWS / PARTS * STRIDE).zip(&mut times) {
            let begun = Instant::now();
            run(part);
            *best = best.min(begun.elapsed().as_nanos() as f64);
        }
    }
    times.iter().sum::<f64>() / FLOWS as f64
}

fn pipeline_ns(arena: &mut [u8], tables: &Tables) -> f64 {
    let shared = tables.shared();
    best(arena, |arena| {
        let mut ethernet = [[0; 14]; BURST];
        for part in arena.chunks_mut(BURST * STRIDE) {
            let mut burst: ArrayVec<Slot<'_>, BURST> =
                part.chunks_exact_mut(STRIDE).map(|frame| Slot::new(frame, START, LEN)).collect();
            for (slot, saved) in burst.iter().zip(&mut ethernet) {
                saved.copy_from_slice(&slot.frame()[..14]);
            }
            pipeline::decide(&shared.load(), 0, &mut burst);
            assert!(burst.iter().all(|slot| matches!(slot.verdict, Verdict::Send { .. })));
            drop(burst);
            // The outer headers end where the Ethernet header was.
            for (frame, saved) in part.chunks_exact_mut(STRIDE).zip(&ethernet) {
                frame[START..START + 14].copy_from_slice(saved);
            }
        }
    })
}

fn floor_ns(arena: &mut [u8], headers: usize) -> f64 {
    let template = [0x5a; OPEN_LEN];
    best(arena, |arena| {
        let mut sum = 0u64;
        for frame in arena.chunks_exact_mut(STRIDE) {
            sum += u64::from(frame[START + 26]);
            frame[START + 14 - headers..START].copy_from_slice(&template[..headers - 14]);
        }
        black_box(sum);
    })
}

fn main() {
    let mut arena = frames();
    println!("{:<28} {:>9} {:>9}", "", "ns/packet", "floor");
    for (open, headers) in [(false, CLOSED_LEN), (true, OPEN_LEN)] {
        for buckets in [1 << 16, 1 << 20] {
            let floor = floor_ns(&mut arena, headers);
            let tables = tables(buckets, open);
            let ns = pipeline_ns(&mut arena, &tables);
            let window = if open { "open" } else { "closed" };
            println!("{:<28} {ns:>9.1} {floor:>9.1}", format!("{buckets} buckets, {window}"));
        }
    }
}
