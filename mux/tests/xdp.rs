//! The XDP program beside the pipeline that it must equal: random tables and frames through both, and tables that
//! change while packets flow. Needs root.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;
#[path = "../../shared/node/tests/netns/mod.rs"]
mod netns;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use daisy_mux::io::xdp::XdpPlane;
use daisy_mux::io::xdp::test_run::Runner;
use daisy_mux::metrics::Counters;
use daisy_mux::pipeline::{self, Scratch, Slot, Verdict};
use daisy_mux::table::{Link, NextHop, Tables, Underlay};
use daisy_shared::bucket::{BackendId, Piece};
use daisy_shared::chain::Generation;
use daisy_shared::checksum;
use daisy_shared::control::{Directory, DirectoryEntry};
use daisy_shared::drop::DropReason;
use daisy_shared::flow::HashKey;
use daisy_shared::service::{Encapsulation, Protocol, Service, ServiceId};
use netns::Host;
use nix::net::if_::if_nametoindex;

const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
const XDP_TX: u32 = 3;
const XDP_REDIRECT: u32 = 4;

/// Random numbers (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// True once in `n`.
    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn of<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len())]
    }
}

const VIPS: [Ipv4Addr; 4] = [
    Ipv4Addr::new(203, 0, 113, 1),
    Ipv4Addr::new(203, 0, 113, 2),
    Ipv4Addr::new(203, 0, 114, 1),
    Ipv4Addr::new(1, 113, 0, 203),
];
const PORTS: [u16; 5] = [80, 443, 53, 0x5000, 8080];
/// Addresses of backends that directories know, and of some that they do not.
const BACKENDS: u16 = 24;

/// Random tables, in the kernel and in userspace at once.
fn random_tables(random: &mut Random, interfaces: &[u32]) -> (Tables, Runner) {
    let links: Vec<Link> = (0..interfaces.len())
        .map(|number| Link {
            mac: [2, 0, 0, 0, random.next() as u8, number as u8],
            mtu: *random.of(&[576, 1500, 1500, 1500, 9000, 65_535]),
        })
        .collect();
    let underlay = Underlay { address: common::MUX, gue_port: *random.of(&[6080, 1, 65_535]) };
    let plane = XdpPlane::load(interfaces).unwrap();
    let runner = plane.runner().unwrap();
    let mut tables = Tables::on(plane, underlay, links);
    change_directory(random, &mut tables);
    for id in 1..=1 + random.below(12) as u32 {
        change_service(random, &mut tables, id);
    }
    (tables, runner)
}

fn change_directory(random: &mut Random, tables: &mut Tables) {
    let id = |n: u16| BackendId(if n == BACKENDS - 1 { 65_534 } else { n * 3 });
    let known = (0..BACKENDS).filter(|n| *n < 20 || random.one_in(2)).map(|n| DirectoryEntry {
        id: id(n),
        name: format!("b{n}"),
        address: common::address(n).into(),
        dead: false,
    });
    let backends = known.collect();
    tables.set_directory(&Directory { version: 1, backends, muxes: vec![] });
    for n in 0..BACKENDS {
        let egress = *random.of(&[0, 0, 0, 1, 1, 7]);
        let next_hop = NextHop { egress, mac: common::mac(random.next() as u16) };
        tables.set_next_hop(common::address(n), (!random.one_in(8)).then_some(next_hop));
    }
}

/// A service of this number, with another flow, key, encapsulation, size or chains than before.
fn change_service(random: &mut Random, tables: &mut Tables, id: u32) {
    let known = tables.services().map(|(service, _)| service).find(|service| service.id.0 == id).cloned();
    let service = match known {
        Some(service) if !random.one_in(4) => service,
        _ => Service {
            id: ServiceId(id),
            name: format!("s{id}"),
            vip: (*random.of(&VIPS)).into(),
            protocol: Protocol::Tcp,
            port: *random.of(&PORTS),
            buckets: *random.of(&[16, 64, 4096]),
            hash_key: HashKey(u128::from(random.next()).wrapping_mul(0x1234_5678_9abc_def1).to_le_bytes()),
            encapsulation: *random.of(&[Encapsulation::Gue, Encapsulation::Ipip]),
        },
    };
    let owners = [0u16, 3, 6, 9, 12, 30, 57, 63, 65_534, 1, 60_000];
    let generation = random.next() as u32;
    let entries = (0..service.buckets)
        .map(|bucket| {
            let mut chain = vec![];
            for _ in 0..*random.of(&[0, 1, 1, 1, 1, 2, 2, 2]) {
                let owner = *random.of(&owners);
                if !chain.contains(&owner) {
                    chain.push(owner);
                }
            }
            common::entry(bucket, random.next() as u32, &chain)
        })
        .collect();
    let (service_id, buckets) = (service.id, service.buckets);
    let generation = Generation(generation);
    let piece = Piece { service: service_id, from: None, generation, buckets, entries };
    tables.apply(&service, &piece).unwrap();
}

fn sum(frame: &mut [u8], start: usize) {
    let len = (usize::from(frame[start] & 0x0f) * 4).min(frame.len() - start);
    if len >= 20 {
        frame[start + 10..start + 12].fill(0);
        let sum = checksum::of(&frame[start..start + len]);
        frame[start + 10..start + 12].copy_from_slice(&sum.to_be_bytes());
    }
}

/// A frame as clients send it, or damaged.
fn random_frame(random: &mut Random, mac: [u8; 6], vips: &[(Ipv4Addr, u16)]) -> Vec<u8> {
    let (vip, port) = *random.of(vips);
    let protocol = *random.of(&[6u8, 6, 6, 6, 6, 6, 17, 17, 1]);
    let options = 4 * *random.of(&[0usize, 0, 0, 0, 1, 3, 10]);
    let payload = match random.below(10) {
        0 => 0,
        1..=6 => random.below(80),
        7 => 500 + random.below(100),
        8 => 1380 + random.below(100),
        _ => *random.of(&[2000, 3300, 5000, 8940]),
    };
    let mut segment = match protocol {
        6 => {
            let offset = *random.of(&[5u8, 5, 5, 8, 15]);
            let mut tcp = vec![0; usize::from(offset) * 4];
            tcp[12] = offset << 4;
            tcp[13] = *random.of(&[2, 0x10, 0x12, 0x18]);
            tcp
        }
        17 => vec![0; 8],
        _ => vec![8, 0, 0, 0, 0, 0, 0, 1],
    };
    segment.resize(segment.len() + payload, 0x5a);
    if protocol != 1 {
        segment[0..2].copy_from_slice(&(random.next() as u16).to_be_bytes());
        segment[2..4].copy_from_slice(&port.to_be_bytes());
    }
    if protocol == 17 {
        let len = segment.len() as u16;
        segment[4..6].copy_from_slice(&len.to_be_bytes());
    }
    let mut ip = vec![0; 20 + options];
    ip[0] = 4 << 4 | (ip.len() / 4) as u8;
    ip[1] = *random.of(&[0, 0, 0xb8, 0xff, 1]);
    ip[2..4].copy_from_slice(&((20 + options + segment.len()) as u16).to_be_bytes());
    ip[4..6].copy_from_slice(&(random.next() as u16).to_be_bytes());
    ip[6] = *random.of(&[0x40, 0x40, 0x40, 0, 0, 0x20, 0x80]);
    ip[7] = if random.one_in(30) { 9 } else { 0 };
    ip[8] = 60;
    ip[9] = protocol;
    ip[12..16].copy_from_slice(&(random.next() as u32).to_be_bytes());
    ip[16..20].copy_from_slice(&vip.octets());
    let mut frame = [&mac[..], &common::ROUTER_MAC, &[8, 0], &ip, &segment].concat();
    sum(&mut frame, 14);
    // Damage.
    if random.one_in(4) {
        for _ in 0..=random.below(3) {
            let end = if random.one_in(2) { 60 } else { frame.len() };
            let at = random.below(end.min(frame.len()));
            frame[at] = if random.one_in(2) { random.next() as u8 } else { frame[at] ^ 1 << random.below(8) };
        }
        if !random.one_in(3) {
            sum(&mut frame, 14);
        }
    }
    if random.one_in(10) {
        frame.truncate(random.below(frame.len()).min(*random.of(&[30, 60, 10_000])));
    } else if random.one_in(3) {
        let len = (frame.len() + random.below(10)).max(60);
        frame.resize(len, 0xee);
    }
    // The outermost tag first. Three are more than are looked behind.
    for _ in 0..*random.of(&[0, 0, 0, 0, 0, 1, 1, 2, 2, 3]) {
        let tag = [*random.of(&[[0x81, 0], [0x88, 0xa8]]), (random.next() as u16).to_be_bytes()].concat();
        let at = 12.min(frame.len());
        frame.splice(at..at, tag);
    }
    if random.one_in(20) {
        frame.truncate(14 + random.below(12));
    }
    // The kernel takes no shorter ones.
    frame.resize(frame.len().max(14), 0);
    frame
}

/// Keeps the other tests of this process waiting for as long as it is held: some of them measure.
fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The host of a test, with two interfaces and their numbers.
fn host() -> (Host, Host, [u32; 2]) {
    let (mux, peer) = (Host::new(), Host::new());
    mux.join("eth0", &peer, "eth0");
    mux.join("eth1", &peer, "eth1");
    let interfaces = mux.run(|| ["eth0", "eth1"].map(|name| if_nametoindex(name).unwrap()));
    (mux, peer, interfaces)
}

#[test]
fn the_program_does_what_the_pipeline_does() {
    let _alone = alone();
    const TABLES: u64 = 20;
    const FRAMES: usize = 6_000;
    let (mux, _peer, interfaces) = host();
    let seen = mux.run(move || {
        let mut seen = Counters::default();
        let mut redirected = 0;
        for seed in 0..TABLES {
            let mut random = Random(seed);
            let (mut tables, runner) = random_tables(&mut random, &interfaces);
            for half in 0..2 {
                let place = format!("seed {seed}.{half}");
                redirected += compare(&mut random, &mut tables, &runner, &interfaces, FRAMES / 2, &place);
                // Once more, after changes to what is there.
                change_directory(&mut random, &mut tables);
                for id in 1..=4 {
                    change_service(&mut random, &mut tables, id);
                }
                tables.remove(ServiceId(5));
            }
            seen += tables.plane().unwrap().counters();
        }
        (seen, redirected)
    });
    let (counters, redirected) = seen;
    println!("{counters:?}, {redirected} redirected");
    assert!(counters.is_conserved() && counters.received == TABLES * FRAMES as u64);
    // All of it was reached.
    assert!(redirected > 1000 && counters.chained_header > 1000, "{redirected} {counters:?}");
    for reason in [
        DropReason::Truncated,
        DropReason::BadIpHeader,
        DropReason::BadIpChecksum,
        DropReason::BadTransportHeader,
        DropReason::Fragment,
        DropReason::NoBackend,
        DropReason::UnknownBackend,
        DropReason::NoNextHop,
        DropReason::TooBig,
    ] {
        assert!(counters.dropped_for(reason) > 10, "{reason}: {counters:?}");
    }
}

/// Random frames through both. Returns how many were redirected.
fn compare(
    random: &mut Random,
    tables: &mut Tables,
    runner: &Runner,
    interfaces: &[u32],
    frames: usize,
    place: &str,
) -> u64 {
    tables.plane().unwrap().settle();
    let before = tables.plane().unwrap().counters();
    let mut expected = Counters::default();
    let mut redirected = 0;
    let snapshot = tables.shared();
    let snapshot = snapshot.load();
    let mut vips: Vec<(Ipv4Addr, u16)> =
        snapshot.services().iter().map(|service| (service.vip, service.port)).collect();
    vips.extend(vips.clone());
    vips.extend([(VIPS[0], 81), (Ipv4Addr::UNSPECIFIED, 80), (common::MUX, 22)]);
    for n in 0..frames {
        let ingress = random.below(interfaces.len());
        let addressed = if random.one_in(10) { random.below(interfaces.len()) } else { ingress };
        let frame = random_frame(random, snapshot.links[addressed].mac, &vips);
        let mut buffer = [&[0; 64][..], &frame].concat();
        let mut slot = Slot::new(&mut buffer, 64, frame.len());
        pipeline::decide(&snapshot, &mut Scratch::default(), ingress as u8, std::slice::from_mut(&mut slot));
        let action = match slot.verdict {
            Verdict::Send { egress, .. } if usize::from(egress) == ingress => XDP_TX,
            Verdict::Send { .. } => XDP_REDIRECT,
            Verdict::Pass => XDP_PASS,
            Verdict::Drop(_) => XDP_DROP,
            Verdict::Undecided => panic!("undecided"),
        };
        redirected += u64::from(action == XDP_REDIRECT);
        let ran = runner.run(&frame, interfaces[ingress], 1).unwrap();
        let context = || {
            let len = frame.len().min(120);
            format!(
                "{place}, frame {n} by {ingress}: {:?} of {} bytes {:02x?}",
                slot.verdict,
                frame.len(),
                &frame[..len]
            )
        };
        assert_eq!(ran.action, action, "{}", context());
        if action != XDP_DROP && ran.frame != slot.frame() {
            let same = ran.frame.iter().zip(slot.frame()).take_while(|(a, b)| a == b).count();
            let (ran, wanted) = (&ran.frame, slot.frame());
            let rest = |frame: &[u8]| frame[same..].iter().take(16).copied().collect::<Vec<u8>>();
            panic!(
                "from byte {same} on {:02x?} instead of {:02x?}, {} bytes instead of {}: {}",
                rest(ran),
                rest(wanted),
                ran.len(),
                wanted.len(),
                context()
            );
        }
        expected.count(std::slice::from_ref(&slot));
    }
    let mut total = before;
    total += expected;
    assert_eq!(tables.plane().unwrap().counters(), total, "{place}");
    redirected
}

/// What all bytes of the kernel's memory are that BPF maps of this process take.
fn map_bytes() -> BTreeMap<String, u64> {
    let mut maps = BTreeMap::new();
    for entry in std::fs::read_dir("/proc/self/fdinfo").unwrap() {
        let Ok(text) = std::fs::read_to_string(entry.unwrap().path()) else { continue };
        let field =
            |name: &str| Some(text.lines().find_map(|line| line.strip_prefix(name))?.trim().to_owned());
        if let (Some(id), Some(bytes)) = (field("map_id:"), field("memlock:")) {
            maps.insert(id, bytes.parse().unwrap());
        }
    }
    maps
}

#[test]
fn the_largest_table_takes_as_little_as_promised() {
    let _alone = alone();
    let (mux, _peer, interfaces) = host();
    mux.run(move || {
        let before = map_bytes();
        let mut tables = Tables::on(XdpPlane::load(&interfaces).unwrap(), common::UNDERLAY, [common::LINK]);
        tables.set_directory(&common::directory(1, 1..=100));
        let service = Service { buckets: 1 << 20, ..common::service() };
        tables.apply(&service, &common::snapshot(&service, 5, &[1])).unwrap();
        let taken = |maps: BTreeMap<String, u64>| -> u64 {
            maps.iter().filter(|(id, _)| !before.contains_key(*id)).map(|(_, bytes)| bytes).sum()
        };
        let bytes = taken(map_bytes());
        assert!(bytes > 8 << 20, "{bytes} bytes are not even the table");
        assert!(bytes <= (17 << 20) / 2, "{bytes} bytes");
        // And gives it back.
        tables.remove(service.id);
        tables.plane().unwrap().settle();
        assert!(taken(map_bytes()) < 1 << 20, "{:?}", map_bytes());
    });
}

/// The chain of generation `n`: another in each.
fn chain_of(n: u32) -> [u16; 2] {
    [1 + (n % 7) as u16, 1 + ((n + 1) % 7) as u16]
}

/// While packets run through the program, everything changes: words in place, whole tables and keys, next hops, the
/// directory. Every packet leaves, by one state of the tables.
#[test]
fn tables_are_swapped_under_the_program() {
    const CHANGES: u32 = 600;
    let _alone = alone();
    let (mux, _peer, interfaces) = host();
    mux.run(move || {
        let plane = XdpPlane::load(&interfaces).unwrap();
        let runner = plane.runner().unwrap();
        let mut tables = Tables::on(plane, common::UNDERLAY, [common::LINK]);
        // A next hop's address says whose it is, and when it was given.
        let next_hop =
            |backend: u16, turn: u32| NextHop { egress: 0, mac: [2, turn as u8, 0, 0, 0, backend as u8] };
        tables.set_directory(&common::directory(1, 1..=8));
        for backend in 1..=8 {
            tables.set_next_hop(common::address(backend), Some(next_hop(backend, 0)));
        }
        let mut service = common::service();
        tables.apply(&service, &common::snapshot(&service, 1, &chain_of(1))).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        let interface = interfaces[0];
        let traffic = std::thread::spawn(move || {
            let (mut packets, mut generations, mut turns) = (0u64, BTreeMap::new(), BTreeMap::new());
            while !flag.load(Ordering::Relaxed) {
                let frame = common::tcp(packets as u16, common::VIP, 80, b"payload");
                let ran = runner.run(&frame, interface, 1).unwrap();
                assert_eq!(ran.action, XDP_TX, "packet {packets}");
                packets += 1;
                let packet = common::decapsulate(&ran.frame);
                assert_eq!(packet.inner, frame[14..]);
                let walk = packet.gue.walk.as_ref().expect("every window is open");
                let [head, previous] = chain_of(walk.generation.0);
                assert_eq!(packet.destination, common::address(head), "{packet:?}");
                assert_eq!(walk.to_visit[..], [common::address(previous)], "{packet:?}");
                let [_, turn, .., backend] = packet.ethernet.destination;
                assert_eq!(u16::from(backend), head, "{packet:?}");
                *generations.entry(walk.generation.0).or_insert(0u64) += 1;
                *turns.entry(turn).or_insert(0u64) += 1;
            }
            (packets, generations.len(), turns.len())
        });
        let mut generation = 1;
        for change in 1..=CHANGES {
            assert!(!traffic.is_finished(), "see above");
            generation += 1;
            let chain = chain_of(generation);
            match change % 20 {
                // The same flows under another key, of another size, in a table that takes the other's place.
                0 => {
                    service.buckets = if change % 40 == 0 { 16 } else { 1 << 16 };
                    service.hash_key = HashKey([change as u8; 16]);
                    tables.apply(&service, &common::snapshot(&service, generation, &chain)).unwrap();
                }
                // A backend goes, and comes back under the same number.
                5 => {
                    tables.set_directory(&common::directory(2, 1..=7));
                    tables.set_directory(&common::directory(3, 1..=8));
                    generation -= 1;
                }
                // A second service comes and goes.
                10 => {
                    let other = Service { id: ServiceId(2), port: 81, ..common::service() };
                    tables.apply(&other, &common::snapshot(&other, 1, &[1])).unwrap();
                    tables.remove(other.id);
                    generation -= 1;
                }
                _ => {
                    for backend in 1..=8 {
                        tables.set_next_hop(common::address(backend), Some(next_hop(backend, change)));
                    }
                    let entries = (0..service.buckets)
                        .map(|bucket| common::entry(bucket, generation, &chain))
                        .collect();
                    let delta = common::delta(&service, generation - 1, generation, entries);
                    tables.apply(&service, &delta).unwrap();
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
        let (packets, generations, turns) = traffic.join().unwrap();
        println!("{packets} packets by {generations} generations and {turns} next hops");
        assert!(packets > 1000 && generations > 20 && turns > 5, "{packets} {generations} {turns}");
        let counters = tables.plane().unwrap().counters();
        assert_eq!((counters.sent, counters.received), (packets, packets), "{counters:?}");
    });
}
