//! How long the XDP program takes for a packet, by `BPF_PROG_TEST_RUN`: nanoseconds net of what an empty program takes
//! behind the same wrapper, which makes the packet of another flow for each round, of 2^20 if not said. Needs root:
//!
//! ```text
//! cargo run --release -p daisy-mux --example xdp_nanoseconds [-- --json]
//! ```
//!
//! With `--json` the last line is one flat JSON object.
#![allow(clippy::unwrap_used, reason = "a measurement that cannot be made ends")]

#[path = "../tests/common/mod.rs"]
mod common;

use aya::maps::{MapData, ProgramArray};
use aya::programs::{ProgramFd, Xdp};
use aya::{EbpfLoader, include_bytes_aligned};
use common::{LINK, UNDERLAY, directory, entry, tcp};
use daisy_mux::io::xdp::XdpPlane;
use daisy_mux::io::xdp::test_run::Runner;
use daisy_mux::table::{NextHop, Tables};
use daisy_shared::bucket::Piece;
use daisy_shared::chain::Generation;
use daisy_shared::service::{Encapsulation, Service};

static WRAPPER: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bench.bpf.o"));
const FLOWS: u32 = 1 << 20;
const BACKENDS: u16 = 100;
const ROUNDS: u32 = 1 << 20;
const REPETITIONS: usize = 15;
const XDP_PASS: u32 = 2;
const XDP_TX: u32 = 3;
/// The words of an IP packet: IPv4, TCP, and 8 bytes.
const WORDS: usize = 12;

/// Tables of one service of so many buckets.
fn tables(plane: XdpPlane, buckets: u32, open: bool, encapsulation: Encapsulation) -> Tables {
    let mut tables = Tables::on(plane, UNDERLAY, [LINK]);
    tables.set_directory(&directory(1, 1..=BACKENDS));
    for backend in 1..=BACKENDS {
        tables.set_next_hop(common::address(backend), Some(NextHop { egress: 0, mac: common::mac(backend) }));
    }
    let service = Service { buckets, encapsulation, ..common::service() };
    let chain = |bucket: u32| {
        let head = (bucket % u32::from(BACKENDS)) as u16;
        let chain = [head + 1, (head + 1) % BACKENDS + 1];
        if open { chain.to_vec() } else { chain[..1].to_vec() }
    };
    let entries = (0..buckets).map(|bucket| entry(bucket, 7, &chain(bucket))).collect();
    let piece = Piece { service: service.id, from: None, generation: Generation(7), buckets, entries };
    tables.apply(&service, &piece).unwrap();
    tables.plane().unwrap().settle();
    tables
}

/// The program that makes packets.
struct Wrapper {
    next: Runner,
    empty: ProgramFd,
    target: ProgramArray<MapData>,
}

impl Wrapper {
    /// Of this packet, in so many flows.
    fn new(link: &[u8], packet: [u32; WORDS], flows: u32) -> Wrapper {
        let mut wrapper = EbpfLoader::new()
            .override_global("addresses", &u64::from_ne_bytes(link[..8].try_into().unwrap()), true)
            .override_global("source_end", &u32::from_ne_bytes(link[8..12].try_into().unwrap()), true)
            .override_global("type", &u16::from_ne_bytes(link[12..14].try_into().unwrap()), true)
            .override_global("packet", &packet, true)
            .override_global("flow_mask", &(flows - 1), true)
            .load(WRAPPER)
            .unwrap();
        let mut fd = |name| {
            let program: &mut Xdp = wrapper.program_mut(name).unwrap().try_into().unwrap();
            program.load().unwrap();
            program.fd().unwrap().try_clone().unwrap()
        };
        let (next, empty) = (Runner::new(fd("bench_next")), fd("bench_empty"));
        let target = wrapper.take_map("target").unwrap().try_into().unwrap();
        Wrapper { next, empty, target }
    }
}

fn main() {
    let json = std::env::args().any(|argument| argument == "--json");
    let frame = tcp(0, common::VIP, common::service().port, &[0x5a; 8]);
    let (link, ip) = frame.split_at(14);
    let mut packet = [0u32; WORDS];
    for (word, bytes) in packet.iter_mut().zip(ip.chunks(4)) {
        *word = u32::from_ne_bytes(bytes.try_into().unwrap());
    }
    // What the wrapper fills in.
    packet[2] &= 0xffff;
    packet[3] &= 0xffff;
    packet[5] &= !0xffff;
    let loopback = nix::net::if_::if_nametoindex("lo").unwrap();

    let cases = [
        ("64ki", 1 << 16, FLOWS, false, Encapsulation::Gue),
        ("64ki_open", 1 << 16, FLOWS, true, Encapsulation::Gue),
        ("64ki_ipip", 1 << 16, FLOWS, false, Encapsulation::Ipip),
        ("64ki_one_flow", 1 << 16, 1, false, Encapsulation::Gue),
        ("1mi", 1 << 20, FLOWS, false, Encapsulation::Gue),
        ("1mi_open", 1 << 20, FLOWS, true, Encapsulation::Gue),
        ("1mi_ipip", 1 << 20, FLOWS, false, Encapsulation::Ipip),
    ];
    let mut emptiest = u128::MAX;
    let mut figures = Vec::new();
    println!("{:<14} {:>9} {:>9}", "", "ns", "net ns");
    for (name, buckets, flows, open, encapsulation) in cases {
        let Wrapper { next, empty, mut target } = Wrapper::new(link, packet, flows);
        let plane = XdpPlane::load(&[loopback]).unwrap();
        let runner = plane.runner().unwrap();
        let mut tables = tables(plane, buckets, open, encapsulation);
        let (mut bare, mut full) = (u128::MAX, u128::MAX);
        // By turns, and the best of each: what others do on this machine only adds.
        for _ in 0..REPETITIONS {
            for (program, action, best) in [(&empty, XDP_PASS, &mut bare), (runner.fd(), XDP_TX, &mut full)] {
                target.set(0, program, 0).unwrap();
                let run = next.run(&frame, loopback, ROUNDS).unwrap();
                assert_eq!(run.action, action);
                *best = (*best).min(run.duration.as_nanos());
            }
        }
        let counters = tables.plane().unwrap().counters();
        assert_eq!(counters.sent, REPETITIONS as u64 * u64::from(ROUNDS), "{counters:?}");
        println!("{name:<14} {full:>9} {:>9}", full - bare);
        emptiest = emptiest.min(bare);
        figures.push(format!("\"xdp_net_ns_{name}\":{}", full - bare));
    }
    println!("an empty program behind the same wrapper: {emptiest} ns; {FLOWS} flows");
    if json {
        println!("{{\"xdp_empty_ns\":{emptiest},{}}}", figures.join(","));
    }
}
