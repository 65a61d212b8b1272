//! The eBPF program and `daisy_shared` take the same decisions: random and mutated packets against random knowledge,
//! on a host with real sockets, through the loaded program and through the reference. Same verdict, same bytes,
//! same counter, same knowledge afterwards, same next hops asked for.
//!
//! `DAISY_SEED` and `DAISY_CASES` set the seed and the number of cases; both are printed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

#[path = "../common/mod.rs"]
mod common;
mod host;
mod reference;

use std::collections::{BTreeMap, HashMap};
use std::net::Ipv4Addr;
use std::str::FromStr;

use common::frames::{ACK, CLIENT_MAC, FIN, MY_MAC, RST, SYN, Segment, ethernet, gue, ipip, underlay};
use common::{GUE_PORT, ME, MUX, chain, config, known, on_new_host, service};
use daisy_agent::datapath::{Datapath, Installed, Peer};
use daisy_node::interface::Mac;
use daisy_node::next_hops::NextHop;
use daisy_shared::chain::{Generation, MAX_HOPS, MAX_OWNERS, Walk};
use daisy_shared::checksum;
use daisy_shared::flow::{FlowV4, bucket_of};
use daisy_shared::service::{Encapsulation, Service, ServiceId};
use daisy_shared::wire::probe;
use host::{COOKIES, PLAIN, SILENT};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use reference::{Expected, Local, Neighbour, World, XDP_DROP};

const CASES: u64 = 120_000;
const BUCKETS: u32 = 16;
/// Generations are drawn from around here, so that comparisons wrap around.
const GENERATION: u32 = u32::MAX - 3;

fn from_env<T: FromStr>(name: &str, default: T) -> T {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")),
        Err(_) => default,
    }
}

/// Addresses of owners: this agent and others.
fn owners() -> Vec<Ipv4Addr> {
    std::iter::once(ME).chain((10..20).map(|host| Ipv4Addr::new(10, 11, 0, host))).collect()
}

struct Bench {
    rng: StdRng,
    datapath: Datapath,
    world: World,
    counters: BTreeMap<String, u64>,
    seen: BTreeMap<String, u64>,
}

impl Bench {
    fn new(
        datapath: Datapath,
        sockets: HashMap<(Ipv4Addr, u16, u16), Local>,
        chaining: bool,
        seed: u64,
    ) -> Bench {
        let mut datapath = datapath;
        let mut services: Vec<_> =
            [PLAIN, COOKIES, SILENT].iter().map(|port| service(u32::from(*port), *port, BUCKETS)).collect();
        // IPIP packets for the others are taken all the same: a mux decides how they travel.
        services[0].encapsulation = Encapsulation::Ipip;
        for service in &services {
            datapath.set_service(service).unwrap();
        }
        let trusted = vec![(MUX, 32), (Ipv4Addr::new(10, 11, 0, 16), 30)];
        datapath.set_trusted(&trusted).unwrap();
        let mtu = datapath.interface().mtu as usize;
        let (peers, knowledge) = Default::default();
        let world = World { services, trusted, peers, knowledge, sockets, mtu, chaining };
        let counters = datapath.counters().unwrap();
        Bench { rng: StdRng::seed_from_u64(seed), datapath, world, counters, seen: BTreeMap::new() }
    }

    /// Changes one peer: resolved or not, dead or not, or unknown.
    fn change_peer(&mut self) {
        let address = *owners()[1..].choose(&mut self.rng).unwrap();
        if self.rng.random_ratio(1, 5) {
            self.world.peers.remove(&address);
            return self.datapath.remove_peer(address).unwrap();
        }
        let mut neighbour = Neighbour { macs: None, dead: self.rng.random_ratio(1, 4) };
        if self.rng.random_ratio(4, 5) {
            neighbour.macs = Some((self.rng.random(), self.rng.random()));
        }
        let interface = self.datapath.interface().index;
        let next_hop = neighbour.macs.map(|(destination, source)| NextHop {
            interface,
            source: Mac(source),
            destination: Mac(destination),
        });
        self.world.peers.insert(address, neighbour);
        self.datapath.set_peer(address, Peer { next_hop, dead: neighbour.dead }).unwrap();
    }

    /// Sets what is known of the bucket of a flow: nothing, a closed or an open window.
    fn change_knowledge(&mut self, segment: &Segment) {
        let Some((id, bucket)) = self.bucket(segment) else { return };
        self.datapath.forget(id, &[bucket]).unwrap();
        self.world.knowledge.remove(&(id, bucket));
        if self.rng.random_ratio(1, 8) {
            return;
        }
        let list = match self.rng.random_range(0..10) {
            0..3 => vec![ME],
            _ => self.distinct_owners(),
        };
        let knowledge = known(self.generation(), &list);
        let installed =
            Installed { bucket, generation: knowledge.generation, chain: knowledge.chain.clone() };
        assert_eq!(self.datapath.install(id, &[installed]).unwrap(), 1);
        self.world.knowledge.insert((id, bucket), knowledge);
    }

    fn generation(&mut self) -> u32 {
        match self.rng.random_range(0..20) {
            0 => self.rng.random(),
            // Exactly half the circle away.
            1 => GENERATION.wrapping_add(1 << 31),
            _ => GENERATION.wrapping_add(self.rng.random_range(0..6)),
        }
    }

    /// Mostly short lists.
    fn list_len(&mut self) -> usize {
        match self.rng.random_range(0..4) {
            0 => self.rng.random_range(0..=MAX_OWNERS),
            _ => self.rng.random_range(0..4),
        }
    }

    fn distinct_owners(&mut self) -> Vec<Ipv4Addr> {
        let len = self.list_len();
        owners().sample(&mut self.rng, len).copied().collect()
    }

    fn walk(&mut self) -> Option<Walk<Ipv4Addr>> {
        if self.rng.random_ratio(3, 10) {
            return None;
        }
        // A hostile sender may list an owner twice.
        let list = if self.rng.random_ratio(1, 10) {
            (0..self.list_len()).map(|_| *owners().choose(&mut self.rng).unwrap()).collect()
        } else {
            self.distinct_owners()
        };
        let returned = !list.is_empty() && self.rng.random_ratio(1, 6);
        let visited = if returned { list.len() } else { self.rng.random_range(0..=list.len()) };
        let hops = match self.rng.random_range(0..10) {
            0 => self.rng.random(),
            1 => self.rng.random_range(MAX_HOPS - 1..=MAX_HOPS + 1),
            _ => self.rng.random_range(0..5),
        };
        Some(Walk {
            generation: Generation(self.generation()),
            hops,
            returned,
            visited: chain(&list[..visited]),
            to_visit: chain(&list[visited..]),
        })
    }

    /// A walk of the generation that is known, along the chain that is known, near its end: where most rules meet.
    fn walk_as_known(&mut self, segment: &Segment) -> Option<Walk<Ipv4Addr>> {
        let knowledge = self.world.knowledge.get(&self.bucket(segment)?)?;
        let generation = knowledge.generation;
        let mut list: Vec<_> = knowledge.chain.iter().copied().filter(|owner| *owner != ME).collect();
        if self.rng.random_ratio(2, 3) && list.len() < MAX_OWNERS {
            list.insert(0, ME);
        }
        let visited =
            if self.rng.random_ratio(2, 3) { list.len() } else { self.rng.random_range(0..=list.len()) };
        let returned = visited == list.len() && visited > 0 && self.rng.random_ratio(1, 2);
        let hops = self.rng.random_range(0..5);
        let (visited, to_visit) = (chain(&list[..visited]), chain(&list[visited..]));
        Some(Walk { generation, hops, returned, visited, to_visit })
    }

    /// The bucket of a segment's flow, if it has a service.
    fn bucket(&self, segment: &Segment) -> Option<(ServiceId, u32)> {
        let service = self.world.services.iter().find(|service| service.port == segment.service.1)?;
        let flow = FlowV4 {
            source: segment.client.0,
            destination: segment.service.0,
            source_port: segment.client.1,
            destination_port: segment.service.1,
            protocol: 6,
        };
        Some((service.id, bucket_of(flow.hash(service.hash_key), BUCKETS)))
    }

    /// A segment for one of the known sockets, or for none.
    fn segment(&mut self) -> Segment {
        let sockets: Vec<_> = self.world.sockets.iter().map(|(tuple, local)| (*tuple, *local)).collect();
        let (mut client, mut port, mut local) = (
            (host::FAR, self.rng.random()),
            *[PLAIN, COOKIES, SILENT, 83].choose(&mut self.rng).unwrap(),
            None,
        );
        if self.rng.random_ratio(3, 4) {
            let ((address, from, to), socket) = *sockets.choose(&mut self.rng).unwrap();
            (client, port, local) = ((address, from), to, Some(socket));
        }
        let flags =
            [SYN, SYN, ACK, ACK, ACK, SYN | ACK, RST, RST | ACK, FIN | ACK, SYN | FIN, 0, self.rng.random()];
        let mut segment = Segment::new(client, *flags.choose(&mut self.rng).unwrap());
        segment.service.1 = port;
        segment.sequence = self.rng.random();
        segment.acknowledgement = self.rng.random();
        if let Some(Local::Cookie(sequence, acknowledgement)) = local
            && self.rng.random_ratio(3, 4)
        {
            (segment.sequence, segment.acknowledgement) = (sequence, acknowledgement);
        }
        if self.rng.random_ratio(1, 10) {
            segment.ip_options = vec![1; 4 * self.rng.random_range(1..=10)];
        }
        if self.rng.random_ratio(1, 4) {
            segment.tcp_options = vec![1; 4 * self.rng.random_range(1..=10)];
        }
        let len = match self.rng.random_range(0..50) {
            // Too big for the link with a longer header.
            0 => 1500 - 28 - 20 - self.rng.random_range(0..80),
            _ => self.rng.random_range(0..40),
        };
        segment.payload = vec![b'x'; len];
        segment
    }

    /// A well-formed frame, most of the time an encapsulated packet.
    fn frame(&mut self, segment: &Segment) -> Vec<u8> {
        let source = match self.rng.random_range(0..20) {
            0 => Ipv4Addr::new(10, 11, 0, 200),
            1..4 => Ipv4Addr::new(10, 11, 0, self.rng.random_range(16..22)),
            _ => MUX,
        };
        let source_port = self.rng.random();
        if self.rng.random_ratio(1, 30) {
            let bytes = probe::emit(self.rng.random_range(0..3), self.rng.random());
            return ethernet(MY_MAC, CLIENT_MAC, &underlay(source, source_port, &bytes));
        }
        if self.rng.random_ratio(1, 4) {
            let mut frame = ethernet(MY_MAC, CLIENT_MAC, &ipip(source, &segment.to_bytes()));
            if self.rng.random_ratio(1, 8) {
                // The outer packet, or the frame alone, is longer than the inner packet.
                let more = self.rng.random_range(1..20);
                frame.extend(vec![0; usize::from(more)]);
                if self.rng.random_ratio(1, 2) {
                    let len = u16::from_be_bytes([frame[16], frame[17]]) + more;
                    frame[16..18].copy_from_slice(&len.to_be_bytes());
                }
            }
            if self.rng.random_ratio(1, 20) {
                frame[15] = self.rng.random();
            }
            mend(&mut frame, 14);
            return frame;
        }
        let as_known = if self.rng.random_ratio(1, 6) { self.walk_as_known(segment) } else { None };
        let walk = as_known.or_else(|| self.walk());
        let mut frame =
            ethernet(MY_MAC, CLIENT_MAC, &underlay(source, source_port, &gue(walk, &segment.to_bytes())));
        if self.rng.random_ratio(1, 20) {
            // Another type of service, and the checksum to go with it.
            frame[15] = self.rng.random();
            mend(&mut frame, 14);
        }
        frame
    }

    /// Changes bytes of a frame, or where it ends.
    fn mutate(&mut self, frame: &mut Vec<u8>) {
        let inner = match frame[23] {
            4 => 34,
            _ => 46 + frame.get(42).map_or(0, |first| usize::from(first & 0x1f) * 4),
        };
        for _ in 0..self.rng.random_range(1..4) {
            let headers = frame.len().min(inner + 40);
            let at = self.rng.random_range(0..headers);
            match self.rng.random_range(0..8) {
                0 => frame[at] = self.rng.random(),
                1 => frame[at] ^= 1 << self.rng.random_range(0..8),
                2 => frame[at] = frame[at].wrapping_add(1),
                // The lengths and counts, which bytes at random seldom meet.
                3 => {
                    let fields = [16, 17, 20, 21, 38, 39, 42, 46, 47, 48, 49, inner, inner + 2, inner + 3];
                    let at = *fields.choose(&mut self.rng).unwrap();
                    if let Some(byte) = frame.get_mut(at) {
                        *byte = byte.wrapping_add_signed(self.rng.random_range(-3..=3));
                    }
                }
                4 => {
                    let fields = [inner + 6, inner + 7, inner + 9, inner + 19, inner + 23, inner + 32];
                    let at = *fields.choose(&mut self.rng).unwrap();
                    if let Some(byte) = frame.get_mut(at) {
                        *byte = *[0, 6, 17, 1, 0x20, 0x40, 0x50, 0xf0, PLAIN as u8]
                            .choose(&mut self.rng)
                            .unwrap();
                    }
                }
                5 => frame.truncate(self.rng.random_range(14..=frame.len())),
                6 => frame.extend(vec![0; self.rng.random_range(1..30)]),
                _ => {
                    let cut = self.rng.random_range(0..8).min(frame.len() - 14);
                    frame.truncate(frame.len() - cut);
                }
            }
        }
        // Half of the changed headers get a right checksum again, or nothing behind them would be reached.
        if self.rng.random_ratio(1, 2) {
            mend(frame, inner);
        }
        if self.rng.random_ratio(3, 4) {
            mend(frame, 14);
        }
    }

    fn case(&mut self, number: u64) {
        if number.is_multiple_of(16) {
            self.change_peer();
        }
        let segment = self.segment();
        if self.rng.random_ratio(1, 3) {
            self.change_knowledge(&segment);
        }
        let mut frame = self.frame(&segment);
        if self.rng.random_ratio(1, 3) {
            self.mutate(&mut frame);
        }

        let expected = self.world.expect(&frame);
        let got = self.datapath.test_run(&frame).unwrap();
        let before = expected.bucket.and_then(|bucket| self.world.knowledge.get(&bucket).cloned());
        let context = || {
            let Expected { action, counter, bucket, learned, wanted, .. } = &expected;
            let (bytes, expected_bytes) = (hex(&frame), hex(expected.frame.as_deref().unwrap_or_default()));
            format!(
                "case {number}\nframe {bytes}\nsegment {:?} flags {:#x}\nknowledge {before:?}\nexpected action \
                 {action} counter {counter} bucket {bucket:?} learned {learned:?} wanted {wanted:?}\nframe \
                 {expected_bytes}\ngot action {}\nframe {}",
                segment.client,
                segment.flags,
                got.returned,
                hex(&got.packet)
            )
        };
        assert!(got.returned == expected.action, "action of {}", context());
        if let Some(bytes) = &expected.frame {
            assert!(got.packet == *bytes, "bytes of {}", context());
        }

        let counters = self.datapath.counters().unwrap();
        let mut counted: Vec<&str> = Vec::new();
        for (name, count) in &counters {
            counted.extend((self.counters[name]..*count).map(|_| &name[..]));
        }
        let mut counters_expected = vec![&expected.counter[..]];
        if expected.counter != "passed" {
            counters_expected.push("received");
        }
        if expected.learned.is_some() {
            counters_expected.push("learned");
        }
        counters_expected.sort_unstable();
        assert_eq!(counted, counters_expected, "counters of {}", context());
        for name in &counted {
            *self.seen.entry((*name).to_owned()).or_default() += 1;
            if frame.get(23) == Some(&4) {
                *self.seen.entry(format!("ipip {name}")).or_default() += 1;
            }
        }
        self.counters = counters;

        let wanted: Vec<Ipv4Addr> = expected.wanted.into_iter().collect();
        assert_eq!(self.datapath.wanted(), wanted, "next hops wanted by {}", context());
        if let Some(bucket) = expected.bucket {
            if let Some(learned) = &expected.learned {
                self.world.knowledge.insert(bucket, learned.clone());
            }
            let knows = self.datapath.knowledge(bucket.0, bucket.1).unwrap();
            assert_eq!(knows.as_ref(), self.world.knowledge.get(&bucket), "knowledge after {}", context());
        }
    }
}

/// The headers of a frame.
fn hex(frame: &[u8]) -> String {
    frame.iter().take(150).map(|byte| format!("{byte:02x}")).collect()
}

/// Gives the IPv4 header at `at` a right checksum, if it is all there.
fn mend(frame: &mut [u8], at: usize) {
    let Some(first) = frame.get(at) else { return };
    let len = usize::from(first & 0x0f) * 4;
    if len < 20 || frame.len() < at + len {
        return;
    }
    frame[at + 10..at + 12].fill(0);
    let sum = checksum::of(&frame[at..at + len]);
    frame[at + 10..at + 12].copy_from_slice(&sum.to_be_bytes());
}

#[test]
fn the_program_decides_as_the_reference_does() {
    let seed = from_env("DAISY_SEED", rand::random());
    let cases = from_env("DAISY_CASES", CASES);
    println!("DAISY_SEED={seed} DAISY_CASES={cases}");
    let seen = on_new_host(|bpffs| {
        let sockets = host::set_up();
        let datapath = Datapath::load(&config(bpffs)).unwrap();
        let mut bench = Bench::new(datapath, sockets.known.clone(), true, seed);
        for number in 0..cases {
            bench.case(number);
        }
        bench.seen
    });
    println!("{seen:#?}");
    // Of every end that a packet can come to, enough cases were among them.
    if cases >= CASES {
        let unreachable = ["dropped_unknown_backend", "dropped_tx_full", "dropped_no_headroom"];
        for name in DatapathCounters::names().filter(|name| !unreachable.contains(&&name[..])) {
            let count = seen.get(&name).copied().unwrap_or(0);
            assert!(count >= 20, "only {count} cases of {name}");
        }
        // A packet without a walk teaches nothing, returns to nobody, and has no hops behind it; and where it could
        // be answered, the window is closed, and the data path does not look.
        for name in [
            "passed",
            "delivered",
            "accepted",
            "sent_on",
            "dropped_truncated",
            "dropped_bad_ip_header",
            "dropped_bad_ip_checksum",
            "dropped_bad_transport_header",
            "dropped_fragment",
            "dropped_unknown_service",
            "dropped_untrusted_source",
            "dropped_unknown_bucket",
            "dropped_no_backend",
            "dropped_no_next_hop",
            "dropped_too_big",
            "dropped_dead_owner",
        ] {
            let count = seen.get(&format!("ipip {name}")).copied().unwrap_or(0);
            assert!(count >= 10, "only {count} cases of ipip {name}");
        }
    }
}

#[test]
fn without_chaining_every_well_formed_packet_is_delivered() {
    let seed = from_env("DAISY_SEED", rand::random());
    println!("DAISY_SEED={seed}");
    on_new_host(|bpffs| {
        let sockets = host::set_up();
        let mut config = config(bpffs);
        config.chaining = false;
        let datapath = Datapath::load(&config).unwrap();
        let mut bench = Bench::new(datapath, sockets.known.clone(), false, seed);
        for number in 0..5_000 {
            bench.case(number);
        }
        for name in ["answered", "sent_on", "returned", "learned"] {
            assert_eq!(bench.seen.get(name), None);
        }
    });
}

/// The names of all counters.
struct DatapathCounters;

impl DatapathCounters {
    fn names() -> impl Iterator<Item = String> {
        let drops = daisy_shared::drop::DropReason::ALL.iter().map(|reason| format!("dropped_{reason}"));
        daisy_agent::datapath::layout::COUNTERS.iter().map(|name| (*name).to_owned()).chain(drops)
    }
}

/// Whose packets by IPIP are to be taken for daisy's follows the services.
#[test]
fn ipip_packets_are_daisys_while_a_service_travels_so() {
    on_new_host(|bpffs| {
        let sockets = host::set_up();
        let mut datapath = Datapath::load(&config(bpffs)).unwrap();
        datapath.set_trusted(&[(MUX, 32)]).unwrap();
        let plain = service(1, PLAIN, BUCKETS);
        let short = Service { encapsulation: Encapsulation::Ipip, ..service(2, COOKIES, BUCKETS) };
        let mut segment = Segment::new((host::FAR, 7), ACK);
        segment.service.1 = COOKIES;
        let frame = ethernet(MY_MAC, CLIENT_MAC, &ipip(MUX, &segment.to_bytes()));
        let stranger = ethernet(MY_MAC, CLIENT_MAC, &ipip(Ipv4Addr::new(10, 11, 0, 9), &segment.to_bytes()));
        let counted = |datapath: &Datapath, frame: &[u8]| {
            let before = datapath.counters().unwrap();
            let run = datapath.test_run(frame).unwrap();
            let after = datapath.counters().unwrap();
            let grown = after.into_iter().filter(|(name, count)| *count > before[name] && name != "received");
            (run, grown.map(|(name, _)| name).collect::<Vec<_>>())
        };

        datapath.set_service(&plain).unwrap();
        for frame in [&frame, &stranger] {
            let (run, counters) = counted(&datapath, frame);
            assert_eq!((run.packet, counters), (frame.clone(), vec!["passed".to_owned()]));
        }
        datapath.set_service(&short).unwrap();
        let table: Vec<_> = (0..BUCKETS)
            .map(|bucket| Installed { bucket, generation: Generation(5), chain: chain(&[ME]) })
            .collect();
        datapath.install(short.id, &table).unwrap();
        // Also after another daemon has taken the maps over.
        drop(datapath);
        let mut datapath = Datapath::load(&config(bpffs)).unwrap();
        let (run, counters) = counted(&datapath, &frame);
        assert_eq!((run.returned, counters), (reference::XDP_PASS, vec!["delivered".to_owned()]));
        assert_eq!(run.packet, [&frame[..14], &segment.to_bytes()].concat());
        assert_eq!(counted(&datapath, &stranger).1, ["dropped_untrusted_source"]);
        datapath.remove_service(short.id).unwrap();
        assert_eq!(counted(&datapath, &frame).1, ["passed"]);
        drop(sockets);
    });
}

/// The reference itself, on the plainest of cases.
#[test]
fn the_reference_passes_what_is_not_for_it() {
    let (services, trusted, peers, knowledge, sockets) = Default::default();
    let world = World { services, trusted, peers, knowledge, sockets, mtu: 1500, chaining: true };
    let mut frame = ethernet(MY_MAC, CLIENT_MAC, &underlay(MUX, 7, &gue(None, &[])));
    assert_eq!(world.expect(&frame).counter, "dropped_untrusted_source");
    assert_eq!(world.expect(&frame).action, XDP_DROP);
    frame[37] ^= 1;
    assert_ne!(u16::from_be_bytes([frame[36], frame[37]]), GUE_PORT);
    assert_eq!(world.expect(&frame).counter, "passed");
}
