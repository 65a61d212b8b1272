//! How long the data path takes for a packet, by `BPF_PROG_TEST_RUN`: nanoseconds net of what an empty program takes
//! behind the same wrapper, which makes the packet anew for each round. Needs root:
//!
//! ```text
//! cargo run --release -p daisy-agent --example nanoseconds
//! ```
#![allow(clippy::unwrap_used, reason = "a measurement that cannot be made ends")]

#[path = "../tests/common/mod.rs"]
mod common;

use std::net::{Ipv4Addr, TcpListener, TcpStream};

use aya::maps::{Array, ProgramArray};
use aya::programs::Xdp;
use aya::{Ebpf, include_bytes_aligned};
use common::frames::{ACK, SYN, Segment, encapsulated};
use common::{ME, MUX, PORT, VIP, chain, config, ip, lone_interface, on_new_host, service};
use daisy_agent::datapath::{Datapath, Installed, Peer, syscall};
use daisy_node::interface::Mac;
use daisy_node::next_hops::NextHop;
use daisy_shared::chain::{Generation, Walk};
use daisy_shared::service::ServiceId;

static WRAPPER: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bench.bpf.o"));
const FRAME_LEN: usize = 128;
const ROUNDS: u32 = 1_000_000;
const REPETITIONS: usize = 9;
const PAST: Ipv4Addr = Ipv4Addr::new(10, 11, 0, 10);

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

    /// Nanoseconds of one round with a target: the best of several runs, what others do on this machine only adds.
    fn time(&mut self, target: Option<&Datapath>, frame: &[u8]) -> (f64, u32) {
        let mut bytes = [0u8; FRAME_LEN];
        bytes[..frame.len()].copy_from_slice(frame);
        let empty: &Xdp = self.wrapper.program("bench_empty").unwrap().try_into().unwrap();
        let program = match target {
            Some(datapath) => datapath.program().unwrap(),
            None => empty.fd().unwrap().try_clone().unwrap(),
        };
        let mut frames: Array<_, [u8; FRAME_LEN]> =
            self.wrapper.map_mut("frame").unwrap().try_into().unwrap();
        frames.set(0, bytes, 0).unwrap();
        let mut targets: ProgramArray<_> = self.wrapper.map_mut("target").unwrap().try_into().unwrap();
        targets.set(0, &program, 0).unwrap();
        let restore: &Xdp = self.wrapper.program("bench_restore").unwrap().try_into().unwrap();
        let restore = restore.fd().unwrap();
        let action = syscall::test_run(restore, &bytes, 1).unwrap().returned;
        let runs = (0..REPETITIONS).map(|_| syscall::test_run(restore, &bytes, ROUNDS).unwrap().nanoseconds);
        (f64::from(runs.min().unwrap()), action)
    }
}

fn main() {
    on_new_host(|bpffs| {
        lone_interface();
        ip(&format!("address add {VIP}/32 dev lo"));
        ip("address add 192.0.2.1/24 dev lo");
        let listener = TcpListener::bind((VIP, PORT)).unwrap();
        let client = TcpStream::connect((VIP, PORT)).unwrap();
        let _server = listener.accept().unwrap();
        let std::net::SocketAddr::V4(from) = client.local_addr().unwrap() else { panic!("IPv4") };

        let mut datapath = Datapath::load(&config(bpffs)).unwrap();
        let id = ServiceId(1);
        datapath.set_service(&service(1, PORT, 16)).unwrap();
        datapath.set_trusted(&[(MUX, 32), (PAST, 32)]).unwrap();
        let next_hop =
            NextHop { interface: datapath.interface().index, source: Mac([2; 6]), destination: Mac([4; 6]) };
        datapath.set_peer(PAST, Peer { next_hop: Some(next_hop), dead: false }).unwrap();

        let segment = |client, flags| Segment::new(client, flags).to_bytes();
        let live = (*from.ip(), from.port());
        let stranger = (Ipv4Addr::new(203, 0, 113, 9), 7777);
        let open = || {
            let (visited, to_visit) = (chain(&[]), chain(&[PAST]));
            Some(Walk { generation: Generation(5), hops: 0, returned: false, visited, to_visit })
        };
        let returned = || {
            let (visited, to_visit) = (chain(&[ME, PAST]), chain(&[]));
            Some(Walk { generation: Generation(5), hops: 2, returned: true, visited, to_visit })
        };
        let rows = [
            ("closed window, delivered", &[ME][..], encapsulated(None, &segment(live, ACK))),
            ("closed window, accepted", &[ME], encapsulated(None, &segment(stranger, SYN))),
            ("open window, connection here", &[ME, PAST], encapsulated(open(), &segment(live, ACK))),
            ("open window, sent to the past", &[ME, PAST], encapsulated(open(), &segment(stranger, ACK))),
            ("open window, SYN to the past", &[ME, PAST], encapsulated(open(), &segment(stranger, SYN))),
            (
                "open window, SYN back, accepted",
                &[ME, PAST],
                encapsulated(returned(), &segment(stranger, SYN)),
            ),
            ("stale mux, restarted at the head", &[PAST, ME], encapsulated(None, &segment(stranger, ACK))),
        ];
        let mut timer = Timer::new();
        println!("{:<34} {:>9} {:>9} {:>9}  action", "", "ns", "empty ns", "net ns");
        for (what, owners, frame) in rows {
            let table: Vec<Installed> = (0..16)
                .map(|bucket| Installed { bucket, generation: Generation(5), chain: chain(owners) })
                .collect();
            datapath.install(id, &table).unwrap();
            let (empty, _) = timer.time(None, &frame);
            let (full, action) = timer.time(Some(&datapath), &frame);
            println!("{what:<34} {full:>9.0} {empty:>9.0} {:>9.0}  {action}", full - empty);
        }
        println!("{:?}", common::counted(&datapath));
    });
}
