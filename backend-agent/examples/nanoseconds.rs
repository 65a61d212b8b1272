//! How long the data path takes for a packet, by `BPF_PROG_TEST_RUN`: nanoseconds net of what an empty program takes
//! behind the same wrapper, which makes the packet anew for each round, in turn one of 4096 flows (of 256 connections,
//! where connections live here). Needs root:
//!
//! ```text
//! cargo run --release -p daisy-agent --example nanoseconds [-- [--json] [--flows=N] [CASE…]]
//! ```
//!
//! Without a case all are timed. With `--flows=1` everything that a packet needs is in the nearest cache. With `--json` the last line is one JSON object with the net figures.
#![allow(clippy::unwrap_used, reason = "a measurement that cannot be made ends")]

#[path = "../tests/common/mod.rs"]
mod common;

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};

use aya::maps::{Array, ProgramArray};
use aya::programs::Xdp;
use aya::{Ebpf, include_bytes_aligned};
use common::frames::{ACK, CLIENT_MAC, MY_MAC, SYN, Segment, encapsulated, ethernet, ipip};
use common::{ME, MUX, PORT, VIP, chain, config, ip, lone_interface, on_new_host, service};
use daisy_agent::datapath::layout::{BENCH_FRAME_LEN, BENCH_FRAMES};
use daisy_agent::datapath::{Config, Datapath, Installed, Peer, syscall};
use daisy_node::interface::Mac;
use daisy_node::next_hops::NextHop;
use daisy_shared::chain::{Generation, Walk};
use daisy_shared::service::{Encapsulation, Service, ServiceId};

static WRAPPER: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bench.bpf.o"));
const BUCKETS: u32 = 1 << 16;
const CONNECTIONS: usize = 256;
/// Short runs, the one program and the other in turn: what else runs on this machine then meets both.
const ROUNDS: u32 = 40_960;
const REPETITIONS: usize = 60;
const PAST: Ipv4Addr = Ipv4Addr::new(10, 11, 0, 10);

type Client = (Ipv4Addr, u16);

struct Timer {
    wrapper: Ebpf,
}

impl Timer {
    fn new() -> Timer {
        let mut wrapper = Ebpf::load(WRAPPER).unwrap();
        for name in ["bench_restore", "bench_empty"] {
            let program: &mut Xdp = wrapper.program_mut(name).unwrap().try_into().unwrap();
            program.load().unwrap();
        }
        Timer { wrapper }
    }

    /// Nanoseconds of one round with the data path and with the empty program, and what the data path did with the
    /// frame: the best of all runs, for what others do on this machine only adds.
    fn time(&mut self, datapath: &Datapath, frames: &[Vec<u8>], flows: usize) -> (u32, u32, u32) {
        let mut map: Array<_, [u8; BENCH_FRAME_LEN]> =
            self.wrapper.map_mut("frames").unwrap().try_into().unwrap();
        for (at, frame) in (0..BENCH_FRAMES).zip(frames.iter().take(flows).cycle()) {
            let mut bytes = [0u8; BENCH_FRAME_LEN];
            bytes[..frame.len()].copy_from_slice(frame);
            map.set(at as u32, bytes, 0).unwrap();
        }
        let empty: &Xdp = self.wrapper.program("bench_empty").unwrap().try_into().unwrap();
        let empty = empty.fd().unwrap().try_clone().unwrap();
        let full = datapath.program().unwrap();
        let (mut best, mut action) = ([u32::MAX; 2], 0);
        for _ in 0..REPETITIONS {
            for (program, best) in [&empty, &full].into_iter().zip(&mut best) {
                let mut targets: ProgramArray<_> =
                    self.wrapper.map_mut("target").unwrap().try_into().unwrap();
                targets.set(0, program, 0).unwrap();
                let restore: &Xdp = self.wrapper.program("bench_restore").unwrap().try_into().unwrap();
                let run = syscall::test_run(restore.fd().unwrap(), &[0; BENCH_FRAME_LEN], ROUNDS).unwrap();
                *best = run.nanoseconds.min(*best);
                action = run.returned;
            }
        }
        (best[1], best[0], action)
    }
}

/// A case: what is printed, its key in the JSON, the chain of every bucket, and the frames.
type Row = (&'static str, &'static str, &'static [Ipv4Addr], Vec<Vec<u8>>);

fn rows(live: &[Client]) -> Vec<Row> {
    let strangers: Vec<Client> = (0..BENCH_FRAMES as u32)
        .map(|i| (Ipv4Addr::from(0xcb00_7100 + i % 251), 1024 + (i * 13) as u16))
        .collect();
    let gue = |clients: &[Client], flags, walk: Option<Walk<Ipv4Addr>>| -> Vec<Vec<u8>> {
        let frame = |client| encapsulated(walk.clone(), &Segment::new(client, flags).to_bytes());
        clients.iter().copied().map(frame).collect()
    };
    let by_ipip = |client| ethernet(MY_MAC, CLIENT_MAC, &ipip(MUX, &Segment::new(client, ACK).to_bytes()));
    let walk = |visited: &[_], to_visit: &[_], hops, returned| {
        let (visited, to_visit) = (chain(visited), chain(to_visit));
        Some(Walk { generation: Generation(5), hops, returned, visited, to_visit })
    };
    let open = || walk(&[], &[PAST], 0, false);
    let back = walk(&[ME, PAST], &[], 2, true);
    vec![
        ("closed window, delivered", "closed", &[ME], gue(&strangers, ACK, None)),
        ("closed window, accepted", "closed_syn", &[ME], gue(&strangers, SYN, None)),
        ("closed window, by IPIP", "ipip", &[ME], strangers.iter().copied().map(by_ipip).collect()),
        ("open window, connection here", "open", &[ME, PAST], gue(live, ACK, open())),
        ("open window, sent to the past", "sent_on", &[ME, PAST], gue(&strangers, ACK, open())),
        ("open window, SYN to the past", "syn_sent_on", &[ME, PAST], gue(&strangers, SYN, open())),
        ("open window, SYN back, accepted", "syn_back", &[ME, PAST], gue(&strangers, SYN, back)),
        ("stale mux, restarted at the head", "restarted", &[PAST, ME], gue(&strangers, ACK, None)),
    ]
}

fn main() {
    let (flags, cases): (Vec<String>, Vec<String>) =
        std::env::args().skip(1).partition(|argument| argument.starts_with("--"));
    let (mut json, mut flows) = (false, BENCH_FRAMES);
    for flag in &flags {
        match flag.strip_prefix("--flows=").map(str::parse) {
            Some(Ok(number)) if number > 0 => flows = number,
            _ if flag == "--json" => json = true,
            _ => panic!("{flag}: only --json and --flows=N are known"),
        }
    }
    on_new_host(|bpffs| {
        lone_interface();
        ip(&format!("address add {VIP}/32 dev lo"));
        ip("address add 192.0.2.1/24 dev lo");
        let listener = TcpListener::bind((VIP, PORT)).unwrap();
        let connections: Vec<(TcpStream, TcpStream)> = (0..CONNECTIONS)
            .map(|_| (TcpStream::connect((VIP, PORT)).unwrap(), listener.accept().unwrap().0))
            .collect();
        let live: Vec<Client> = connections
            .iter()
            .map(|(client, _)| match client.local_addr().unwrap() {
                SocketAddr::V4(address) => (*address.ip(), address.port()),
                SocketAddr::V6(address) => panic!("{address} is not IPv4"),
            })
            .collect();

        let config = Config { bucket_capacity: BUCKETS, ..config(bpffs) };
        let mut datapath = Datapath::load(&config).unwrap();
        let id = ServiceId(1);
        datapath
            .set_service(&Service { encapsulation: Encapsulation::Ipip, ..service(1, PORT, BUCKETS) })
            .unwrap();
        datapath.set_trusted(&[(MUX, 32), (PAST, 32)]).unwrap();
        let next_hop =
            NextHop { interface: datapath.interface().index, source: Mac([2; 6]), destination: Mac([4; 6]) };
        datapath.set_peer(PAST, Peer { next_hop: Some(next_hop), dead: false }).unwrap();

        let mut timer = Timer::new();
        let mut figures = Vec::new();
        println!("{:<34} {:>9} {:>9} {:>9}  action", "", "ns", "empty ns", "net ns");
        let rows = rows(&live);
        for case in &cases {
            assert!(rows.iter().any(|row| row.1 == case), "{case}: no such case");
        }
        for (what, key, owners, frames) in rows {
            if !cases.is_empty() && !cases.iter().any(|case| case == key) {
                continue;
            }
            let table: Vec<Installed> = (0..BUCKETS)
                .map(|bucket| Installed { bucket, generation: Generation(5), chain: chain(owners) })
                .collect();
            datapath.install(id, &table).unwrap();
            let (full, empty, action) = timer.time(&datapath, &frames, flows);
            let net = full.saturating_sub(empty);
            println!("{what:<34} {full:>9} {empty:>9} {net:>9}  {action}");
            figures.push(format!("\"agent_{key}_net_ns\": {net}"));
        }
        println!("{:?}", common::counted(&datapath));
        if json {
            println!("{{{}}}", figures.join(", "));
        }
    });
}
