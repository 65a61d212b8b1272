//! The pipeline over memory and capture files: fixture rows, properties, and tables that change meanwhile.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::*;
use daisy_mux::io::memory::Memory;
use daisy_mux::io::pcap::Pcap;
use daisy_mux::io::{PacketIo, Worker};
use daisy_mux::metrics::Counters;
use daisy_mux::pipeline::{self, CLOSED_LEN, HEADROOM, OPEN_LEN, Scratch, Slot, Verdict};
use daisy_mux::table::{ApplyError, Link, NextHop, Tables};
use daisy_shared::bucket::BackendId;
use daisy_shared::chain::{Generation, Walk};
use daisy_shared::drop::DropReason;
use daisy_shared::flow::{FlowV4, HashKey, bucket_of};
use daisy_shared::service::{Encapsulation, Service, ServiceId};
use daisy_shared::wire::{gue, outer};
use etherparse::{IpNumber, Ipv4Header, PacketBuilder};
use pcap_file::pcap::{PcapPacket, PcapReader, PcapWriter};
use proptest::prelude::*;

const GUE_CLOSED: [u8; 4] = [0, 4, 0, 0];

/// The hash of the flow that [`tcp`] builds.
fn hash(source_port: u16) -> u64 {
    let flow = FlowV4 { source: CLIENT, destination: VIP, source_port, destination_port: 80, protocol: 6 };
    flow.hash(service().hash_key)
}

/// One frame through the pipeline.
fn through(tables: &Tables, frame: &[u8]) -> (Verdict, Vec<u8>) {
    let mut io = Memory::new([frame.to_vec()]);
    let mut worker = worker(tables);
    assert_eq!(io.turn(&mut worker, Duration::ZERO).unwrap(), 1);
    assert!(worker.counters().is_conserved());
    (io.verdicts[0], io.sent.pop().unwrap_or_default())
}

#[test]
fn fixture_rows() {
    let closed = tables(2, &[1]);
    let open = tables(3, &[3, 2]);
    let nobody = tables(1, &[]);
    let stranger = tables(1, &[9]);
    let forgotten = tables(1, &[1, 9]);
    let mut unresolved = tables(1, &[1]);
    unresolved.set_next_hop(address(1), None);

    let plain = tcp(4000, VIP, 80, b"hello");
    let port = outer::source_port(hash(4000));
    let mut padded = tcp(4000, VIP, 80, b"");
    let unpadded = padded.clone();
    padded.resize(60, 0xee);
    let mut marked = tcp(4000, VIP, 80, b"hello");
    marked[15] = 0xb8 | 3;
    let marked = {
        let (header, _) = Ipv4Header::from_slice(&marked[14..]).unwrap();
        ipv4(header, &marked[34..])
    };
    let walk = [3, 4, 0, 0, 0x10, 0, 0, 1, 0, 0, 0, 5, 10, 2, 0, 2];
    let fits = tcp(4000, VIP, 80, &vec![0x5a; 1500 - 32 - 40]);
    let too_long = tcp(4000, VIP, 80, &vec![0x5a; 1500 - 32 - 40 + 1]);
    let longest_open = tcp(4000, VIP, 80, &vec![0x5a; 1500 - 44 - 40]);
    let mut fragment = Ipv4Header::new(0, 64, IpNumber::TCP, CLIENT.octets(), VIP.octets()).unwrap();
    fragment.more_fragments = true;
    let mut strange_fragment = fragment.clone();
    strange_fragment.destination = [192, 0, 2, 1];
    let mut bad_checksum = plain.clone();
    bad_checksum[24] ^= 1;
    let mut bad_elsewhere = tcp(4000, MUX, 22, b"");
    bad_elsewhere[24] ^= 1;
    let mut flooded = plain.clone();
    flooded[5] ^= 0xff;
    let mut arp = vec![0xff; 60];
    arp[12..14].copy_from_slice(&[8, 6]);
    let mut arp_for_us = arp.clone();
    arp_for_us[..6].copy_from_slice(&MUX_MAC);
    let mut udp = Vec::new();
    PacketBuilder::ethernet2(ROUTER_MAC, MUX_MAC)
        .ipv4(CLIENT.octets(), VIP.octets(), 64)
        .udp(4000, 80)
        .write(&mut udp, b"x")
        .unwrap();
    let mut ping = Vec::new();
    PacketBuilder::ethernet2(ROUTER_MAC, MUX_MAC)
        .ipv4(CLIENT.octets(), VIP.octets(), 64)
        .icmpv4_echo_request(1, 2)
        .write(&mut ping, b"x")
        .unwrap();
    let mut options = Ipv4Header::new(0, 64, IpNumber::TCP, CLIENT.octets(), VIP.octets()).unwrap();
    options.options = etherparse::Ipv4Options::try_from(&[1u8, 1, 1, 0][..]).unwrap();
    let options = ipv4(options, &plain[34..]);

    let send = |backend, walk| Verdict::Send { backend: BackendId(backend), egress: 0, walk };
    let drop = Verdict::Drop;
    let wrapped =
        |backend, tos, gue: &[u8], frame: &[u8]| encapsulated(backend, port, tos, gue, &frame[14..]);
    #[rustfmt::skip]
    let rows = [
        ("closed window", &closed, &plain, send(1, false), wrapped(1, 0, &GUE_CLOSED, &plain)),
        ("open window: the walk to the previous owner", &open, &plain, send(3, true), wrapped(3, 0, &walk, &plain)),
        ("Ethernet's padding is cut off", &closed, &padded, send(1, false), wrapped(1, 0, &GUE_CLOSED, &unpadded)),
        ("DSCP and ECN are copied", &closed, &marked, send(1, false), wrapped(1, 0xbb, &GUE_CLOSED, &marked)),
        ("IP options are the inner packet's own", &closed, &options, send(1, false), wrapped(1, 0, &GUE_CLOSED, &options)),
        ("as long as the link allows", &closed, &fits, send(1, false), wrapped(1, 0, &GUE_CLOSED, &fits)),
        ("a byte longer", &closed, &too_long, drop(DropReason::TooBig), vec![]),
        ("as long as the link allows, open", &open, &longest_open, send(3, true), wrapped(3, 0, &walk, &longest_open)),
        ("fits closed but not open", &open, &fits, drop(DropReason::TooBig), vec![]),
        ("another port of the VIP", &closed, &tcp(4000, VIP, 81, b""), Verdict::Pass, vec![]),
        ("another protocol of the VIP", &closed, &udp, Verdict::Pass, vec![]),
        ("ping of the VIP", &closed, &ping, Verdict::Pass, vec![]),
        ("another address", &closed, &tcp(4000, MUX, 80, b""), Verdict::Pass, vec![]),
        ("another station's", &closed, &flooded, Verdict::Pass, vec![]),
        ("broadcast ARP", &closed, &arp, Verdict::Pass, vec![]),
        ("ARP for the mux", &closed, &arp_for_us, Verdict::Pass, vec![]),
        ("a fragment for the VIP", &closed, &ipv4(fragment, &[0; 24]), drop(DropReason::Fragment), vec![]),
        ("a fragment for another", &closed, &ipv4(strange_fragment, &[0; 24]), Verdict::Pass, vec![]),
        ("a wrong IP checksum", &closed, &bad_checksum, drop(DropReason::BadIpChecksum), vec![]),
        ("a wrong IP checksum for another", &closed, &bad_elsewhere, Verdict::Pass, vec![]),
        ("cut in the TCP header", &closed, &plain[..50].to_vec(), drop(DropReason::Truncated), vec![]),
        ("cut in the Ethernet header", &closed, &plain[..13].to_vec(), drop(DropReason::Truncated), vec![]),
        ("nothing", &closed, &vec![], drop(DropReason::Truncated), vec![]),
        ("a service without a backend", &nobody, &plain, drop(DropReason::NoBackend), vec![]),
        ("a head that the directory does not know", &stranger, &plain, drop(DropReason::UnknownBackend), vec![]),
        ("a previous owner that it does not know", &forgotten, &plain, drop(DropReason::UnknownBackend), vec![]),
        ("no next hop", &unresolved, &plain, drop(DropReason::NoNextHop), vec![]),
    ];
    for (what, tables, frame, verdict, bytes) in rows {
        let (got, sent) = through(tables, frame);
        assert_eq!(got, verdict, "{what}");
        assert_eq!(sent, bytes, "{what}");
    }
}

/// As [`tables`], of a service that travels in IPIP.
fn tables_with_ipip(backends: u16, chain: &[u16]) -> Tables {
    let service = Service { encapsulation: Encapsulation::Ipip, ..service() };
    let mut tables = tables(backends, chain);
    tables.apply(&service, &snapshot(&service, 5, chain)).unwrap();
    tables
}

#[test]
fn ipip_in_closed_windows_and_gue_in_open_ones() {
    let plain = tcp(4000, VIP, 80, b"hello");
    let send = |backend, walk| Verdict::Send { backend: BackendId(backend), egress: 0, walk };
    let (verdict, sent) = through(&tables_with_ipip(2, &[1]), &plain);
    assert_eq!((verdict, sent), (send(1, false), in_ipip(1, 0, &plain[14..])));
    assert_eq!(through(&tables_with_ipip(3, &[3, 2]), &plain), through(&tables(3, &[3, 2]), &plain));
    let longest = tcp(4000, VIP, 80, &vec![0x5a; 1500 - 20 - 40]);
    assert_eq!(through(&tables_with_ipip(1, &[1]), &longest).0, send(1, false));
    let too_long = tcp(4000, VIP, 80, &vec![0x5a; 1500 - 20 - 40 + 1]);
    assert_eq!(through(&tables_with_ipip(1, &[1]), &too_long).0, Verdict::Drop(DropReason::TooBig));
}

#[test]
fn vlan_tags_stay_on_the_frame() {
    let (customer, provider) = ([0x81, 0, 0x60, 7], [0x88, 0xa8, 0, 9]);
    let all = [tables(2, &[1]), tables(2, &[1, 2]), tables_with_ipip(2, &[1])];
    let plain = tcp(4000, VIP, 80, b"hello");
    let mut padded = tagged(&[customer], &tcp(4000, VIP, 80, b""));
    padded.resize(64, 0xee);
    for tables in &all {
        let (verdict, untagged) = through(tables, &plain);
        for tags in [&[customer][..], &[provider], &[provider, customer]] {
            assert_eq!(
                through(tables, &tagged(tags, &plain)),
                (verdict, tagged(tags, &untagged)),
                "{tags:x?}"
            );
        }
        let (_, untagged) = through(tables, &tcp(4000, VIP, 80, b""));
        assert_eq!(through(tables, &padded).1, tagged(&[customer], &untagged));
        // Three are more than is looked behind: somebody else's.
        let three = tagged(&[provider, provider, customer], &plain);
        assert_eq!(through(tables, &three), (Verdict::Pass, vec![]));
        let mut bad = tagged(&[customer], &plain);
        bad[28] ^= 1;
        assert_eq!(through(tables, &bad).0, Verdict::Drop(DropReason::BadIpChecksum));
        assert_eq!(
            through(tables, &tagged(&[customer], &plain)[..17]).0,
            Verdict::Drop(DropReason::Truncated)
        );
    }
}

#[test]
fn a_packet_leaves_by_the_interface_of_its_next_hop() {
    const INNER: Link = Link { mac: [2, 0, 0, 0, 9, 1], mtu: 1400 };
    let mut tables = Tables::new(UNDERLAY, [LINK, INNER]);
    tables.set_directory(&directory(1, [1, 2]));
    tables.set_next_hop(address(1), Some(NextHop { egress: 1, mac: mac(1) }));
    tables.set_next_hop(address(2), Some(NextHop { egress: 2, mac: mac(2) }));
    tables.apply(&service(), &snapshot(&service(), 5, &[1])).unwrap();
    let mut expected =
        encapsulated(1, outer::source_port(hash(4000)), 0, &GUE_CLOSED, &tcp(4000, VIP, 80, b"")[14..]);
    expected[6..12].copy_from_slice(&INNER.mac);
    let frame = tcp(4000, VIP, 80, b"");
    let (verdict, sent) = through(&tables, &frame);
    assert_eq!(verdict, Verdict::Send { backend: BackendId(1), egress: 1, walk: false });
    assert_eq!(sent, expected);
    // The MTU is that of the interface it leaves by.
    let too_long = tcp(4000, VIP, 80, &vec![0; 1400 - 32 - 40 + 1]);
    assert_eq!(through(&tables, &too_long).0, Verdict::Drop(DropReason::TooBig));
    // Each interface has an address of its own.
    let mut buffer = [&[0; 64][..], &frame].concat();
    let mut slot = Slot::new(&mut buffer, 64, frame.len());
    pipeline::decide(&tables.shared().load(), &mut Scratch::default(), 1, std::slice::from_mut(&mut slot));
    assert_eq!(slot.verdict, Verdict::Pass);
    // A next hop behind no interface of the mux's is none.
    tables.apply(&service(), &snapshot(&service(), 6, &[2])).unwrap();
    assert_eq!(through(&tables, &frame).0, Verdict::Drop(DropReason::NoNextHop));
}

#[test]
fn packets_of_several_services_share_a_burst() {
    let mut tables = tables(3, &[1]);
    let tls =
        Service { id: ServiceId(2), name: "tls".into(), port: 443, hash_key: HashKey([9; 16]), ..service() };
    tables.apply(&tls, &snapshot(&tls, 5, &[2])).unwrap();
    let frames: Vec<_> = (0..150u16).map(|i| tcp(i, VIP, [80, 443, 22][usize::from(i) % 3], b"")).collect();
    let mut io = Memory::new(frames.clone());
    let mut worker = worker(&tables);
    while io.turn(&mut worker, Duration::ZERO).unwrap() > 0 {}
    let alone: Vec<_> = frames.iter().map(|frame| through(&tables, frame)).collect();
    assert_eq!(io.verdicts, alone.iter().map(|(verdict, _)| *verdict).collect::<Vec<_>>());
    let sent: Vec<_> = alone.into_iter().map(|(_, sent)| sent).filter(|sent| !sent.is_empty()).collect();
    assert_eq!((io.sent.len(), &io.sent), (100, &sent));
}

#[test]
fn headers_need_their_room_and_no_more() {
    for (chain, len) in [(&[1][..], CLOSED_LEN), (&[1, 2], OPEN_LEN)] {
        let tables = tables(2, chain);
        let frame = tcp(4000, VIP, 80, b"");
        for room in 0..=HEADROOM {
            let mut buffer = [&vec![0; room][..], &frame].concat();
            let mut slot = Slot::new(&mut buffer, room, frame.len());
            pipeline::decide(
                &tables.shared().load(),
                &mut Scratch::default(),
                0,
                std::slice::from_mut(&mut slot),
            );
            if room + 14 >= len {
                assert!(matches!(slot.verdict, Verdict::Send { .. }), "{room}");
                assert_eq!(slot.start(), room + 14 - len);
            } else {
                assert_eq!(slot.verdict, Verdict::Drop(DropReason::NoHeadroom));
                assert_eq!(slot.frame(), frame);
            }
        }
    }
}

#[test]
fn a_verdict_from_outside_stands() {
    let tables = tables(1, &[1]);
    let frame = tcp(4000, VIP, 80, b"");
    let mut buffers = vec![[&[0; 64][..], &frame].concat(); 3];
    let mut burst: Vec<_> = buffers.iter_mut().map(|buffer| Slot::new(buffer, 64, frame.len())).collect();
    burst[0].verdict = Verdict::Pass;
    burst[2].verdict = Verdict::Drop(DropReason::TooBig);
    pipeline::decide(&tables.shared().load(), &mut Scratch::default(), 0, &mut burst);
    let mut counters = Counters::default();
    counters.count(&burst);
    assert_eq!((counters.passed, counters.sent, counters.dropped_for(DropReason::TooBig)), (1, 1, 1));
    assert!(counters.is_conserved() && burst[0].frame() == frame);
}

/// Tables in which every bucket has a chain of its own, of 0 to 3 of 5 backends.
fn chains() -> impl Strategy<Value = Vec<Vec<u16>>> {
    let chain = proptest::sample::subsequence(vec![1u16, 2, 3, 4, 5], 0..=3).prop_shuffle();
    proptest::collection::vec(chain, BUCKETS as usize)
}

proptest! {
    #[test]
    fn every_output_decapsulates_to_its_input(
        chains in chains(),
        packets in proptest::collection::vec(
            (any::<[u8; 4]>(), any::<u16>(), any::<u8>(), proptest::collection::vec(any::<u8>(), 0..200)),
            1..150,
        ),
    ) {
        let mut tables = tables(5, &[]);
        let entries = chains.iter().enumerate().map(|(bucket, chain)| entry(bucket as u32, 6 + bucket as u32, chain));
        tables.apply(&service(), &delta(&service(), 5, 100, entries.collect())).unwrap();
        let frames: Vec<_> = packets
            .iter()
            .map(|(source, port, tos, payload)| {
                let mut ip = Ipv4Header::new(0, 60, IpNumber::TCP, *source, VIP.octets()).unwrap();
                ip.dscp = etherparse::IpDscp::try_new(tos >> 2).unwrap();
                ip.ecn = etherparse::IpEcn::try_new(tos & 3).unwrap();
                let tcp = etherparse::TcpHeader::new(*port, 80, 1, 1).to_bytes();
                ipv4(ip, &[&tcp[..], payload].concat())
            })
            .collect();
        let mut io = Memory::new(frames.clone());
        let mut worker = worker(&tables);
        while io.turn(&mut worker, Duration::ZERO).unwrap() > 0 {}
        let mut sent = io.sent.iter();
        let (mut walks, mut dropped) = (0, 0);
        for ((frame, verdict), (source, source_port, tos, _)) in frames.iter().zip(&io.verdicts).zip(&packets) {
            let flow = FlowV4 {
                source: Ipv4Addr::from(*source), destination: VIP, source_port: *source_port, destination_port: 80, protocol: 6,
            };
            let hash = flow.hash(service().hash_key);
            let bucket = bucket_of(hash, BUCKETS);
            let chain = &chains[bucket as usize];
            let Some(head) = chain.first() else {
                prop_assert_eq!(*verdict, Verdict::Drop(DropReason::NoBackend));
                dropped += 1;
                continue;
            };
            prop_assert_eq!(*verdict, Verdict::Send { backend: BackendId(*head), egress: 0, walk: chain.len() > 1 });
            let out = decapsulate(sent.next().unwrap());
            prop_assert_eq!(out.ethernet.destination, mac(*head));
            prop_assert_eq!(out.ethernet.source, MUX_MAC);
            prop_assert_eq!((out.source, out.destination), (MUX, address(*head)));
            prop_assert_eq!((out.tos, out.source_port), (*tos, outer::source_port(hash)));
            prop_assert_eq!(&out.inner, &frame[14..]);
            let walk = chain.get(1).map(|previous| Walk {
                generation: Generation(6 + bucket),
                hops: 0,
                returned: false,
                visited: Default::default(),
                to_visit: [address(*previous)].into_iter().collect(),
            });
            walks += u64::from(walk.is_some());
            prop_assert_eq!(out.gue, gue::Header { protocol: 4, walk });
        }
        prop_assert!(sent.next().is_none());
        let counters = worker.counters();
        prop_assert!(counters.is_conserved());
        prop_assert_eq!(counters.chained_header, walks);
        prop_assert_eq!(counters.dropped_for(DropReason::NoBackend), dropped);
    }

    #[test]
    fn garbage_never_panics_and_is_counted(
        frames in proptest::collection::vec(
            prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..120),
                (any::<u16>(), proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4), any::<prop::sample::Index>())
                    .prop_map(|(port, changes, cut)| {
                        let mut frame = tcp(port, VIP, 80, b"payload");
                        for (at, value) in changes {
                            let at = at.index(frame.len());
                            frame[at] = value;
                        }
                        let keep = if port.is_multiple_of(2) { frame.len() } else { cut.index(frame.len()) };
                        frame.truncate(keep);
                        frame
                    }),
            ],
            0..200,
        ),
    ) {
        let count = frames.len() as u64;
        let mut io = Memory::new(frames);
        let tables = tables(2, &[1, 2]);
        let mut worker = worker(&tables);
        while io.turn(&mut worker, Duration::ZERO).unwrap() > 0 {}
        let counters = worker.counters();
        prop_assert_eq!(counters.received, count);
        prop_assert!(counters.is_conserved());
        prop_assert_eq!(counters.sent, io.sent.len() as u64);
        for frame in &io.sent {
            decapsulate(frame);
        }
    }
}

#[test]
fn tables_change_under_a_running_pipeline() {
    let tables = tables(4, &[1, 2]);
    let shared = tables.shared();
    let stop = AtomicBool::new(false);
    let begun = AtomicBool::new(false);
    let frames: Vec<_> = (0..256).map(|port| tcp(port, VIP, 80, b"x")).collect();
    std::thread::scope(|scope| {
        // Two pipelines, so that a writer has to wait for both.
        let pipelines: Vec<_> = (0..2)
            .map(|_| {
                let mut worker = Worker::new(Arc::clone(&shared), Arc::default());
                let (frames, stop, begun) = (&frames, &stop, &begun);
                scope.spawn(move || {
                    let mut rounds = 0;
                    while !stop.load(Ordering::Relaxed) || rounds == 0 {
                        let mut io = Memory::new(frames.iter().cloned());
                        while io.turn(&mut worker, Duration::ZERO).unwrap() > 0 {}
                        for (frame, sent) in frames.iter().zip(&io.sent) {
                            let out = decapsulate(sent);
                            assert_eq!(out.inner, frame[14..]);
                            // Of each change, head, previous owner and generation belong together.
                            let walk = out.gue.walk.expect("all windows are open");
                            let generation = walk.generation.0;
                            let (head, previous) = chain_of(generation);
                            assert_eq!(out.destination, address(head), "generation {generation}");
                            assert_eq!(out.ethernet.destination, mac(head));
                            assert_eq!(walk.to_visit[..], [address(previous)]);
                        }
                        rounds += 1;
                        begun.store(true, Ordering::Relaxed);
                    }
                    let counters = *worker.counters();
                    assert_eq!(
                        (counters.received, counters.sent),
                        (256 * rounds, 256 * rounds),
                        "{counters:?}"
                    );
                    rounds
                })
            })
            .collect();
        let mut tables = tables;
        while !begun.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
        for generation in 6..400 {
            let (head, previous) = chain_of(generation);
            // The directory knows none but those two and the last head, so that each change needs a new one.
            let (last, last_previous) = chain_of(generation - 1);
            tables.set_directory(&directory(generation.into(), [head, previous, last, last_previous]));
            for backend in [head, previous] {
                tables.set_next_hop(address(backend), Some(next_hop(backend)));
            }
            let entries = (0..BUCKETS).map(|bucket| entry(bucket, generation, &[head, previous])).collect();
            if generation % 50 == 0 {
                // From time to time as a new service, with a new table.
                let piece = snapshot(&service(), generation, &[head, previous]);
                let renamed = Service { name: format!("web-{generation}"), ..service() };
                tables.apply(&renamed, &piece).unwrap();
                tables.apply(&service(), &piece).unwrap();
            } else {
                tables.apply(&service(), &delta(&service(), generation - 1, generation, entries)).unwrap();
            }
        }
        stop.store(true, Ordering::Relaxed);
        let rounds: Vec<u64> = pipelines.into_iter().map(|pipeline| pipeline.join().unwrap()).collect();
        assert!(rounds.iter().all(|rounds| *rounds > 0));
    });
}

/// Head and previous owner in a generation.
fn chain_of(generation: u32) -> (u16, u16) {
    if generation <= 5 { (1, 2) } else { (generation as u16 + 5, generation as u16 + 4) }
}

#[test]
fn pieces_are_applied_or_refused() {
    let service = service();
    let mut tables = tables(3, &[1]);
    let gap = tables.apply(&service, &delta(&service, 4, 6, vec![])).unwrap_err();
    assert_eq!(
        gap.to_string(),
        "service web: a delta from generation 4 does not fit a table of generation 5"
    );
    tables.apply(&service, &delta(&service, 5, 6, vec![entry(3, 6, &[2, 1])])).unwrap();
    let piece = tables.piece(service.id).unwrap();
    assert_eq!(piece.generation, Generation(6));
    assert_eq!(piece.entries[3], entry(3, 6, &[2, 1]));
    assert_eq!(piece.entries[4], entry(4, 5, &[1]));
    // A snapshot that leaves buckets out empties them.
    let mut sparse = snapshot(&service, 9, &[3]);
    sparse.entries.retain(|entry| entry.bucket % 2 == 0);
    tables.apply(&service, &sparse).unwrap();
    let entries = tables.piece(service.id).unwrap().entries;
    assert_eq!((&entries[2], &entries[3]), (&entry(2, 9, &[3]), &entry(3, 0, &[])));

    let v6 = Service { vip: "2001:db8::1".parse().unwrap(), ..service.clone() };
    let refused = tables.apply(&v6, &snapshot(&v6, 10, &[1])).unwrap_err();
    assert!(matches!(refused, ApplyError::NotIpv4 { .. }));
    let other = Service { id: ServiceId(2), ..service.clone() };
    let refused = tables.apply(&other, &snapshot(&service, 10, &[1])).unwrap_err();
    assert!(matches!(refused, ApplyError::Mismatch { .. }));
    let bigger = Service { buckets: 32, ..service.clone() };
    let refused = tables.apply(&bigger, &delta(&bigger, 9, 10, vec![])).unwrap_err();
    assert!(matches!(refused, ApplyError::Gap { have: None, .. }));

    assert_eq!(tables.swaps(), 3);
    assert_eq!(tables.remove(service.id), Some(service.clone()));
    assert_eq!(tables.remove(service.id), None);
    assert_eq!(through(&tables, &tcp(4000, VIP, 80, b"")).0, Verdict::Pass);
}

#[test]
fn a_backend_stays_known_while_a_bucket_names_it() {
    let service = service();
    let mut tables = tables(2, &[1]);
    tables.set_directory(&directory(2, [2]));
    let frame = tcp(4000, VIP, 80, b"");
    assert!(matches!(through(&tables, &frame).0, Verdict::Send { .. }));
    tables.apply(&service, &snapshot(&service, 6, &[2])).unwrap();
    assert_eq!(tables.backend_addresses().len(), 2);
    tables.set_directory(&directory(3, [2]));
    assert_eq!(tables.backend_addresses().into_iter().collect::<Vec<_>>(), [address(2)]);
}

#[test]
fn many_services_are_told_apart() {
    let mut tables = tables(200, &[1]);
    let services: Vec<_> = (0..200u16)
        .map(|i| Service {
            id: ServiceId(100 + u32::from(i)),
            vip: Ipv4Addr::new(203, 0, 113, (i / 4) as u8).into(),
            port: 8000 + i % 4,
            ..service()
        })
        .collect();
    for (service, backend) in services.iter().zip(1..) {
        tables.apply(service, &snapshot(service, 1, &[backend])).unwrap();
    }
    for i in 0..200u16 {
        let vip = Ipv4Addr::new(203, 0, 113, (i / 4) as u8);
        let (verdict, _) = through(&tables, &tcp(1, vip, 8000 + i % 4, b""));
        assert_eq!(verdict, Verdict::Send { backend: BackendId(i + 1), egress: 0, walk: false });
        assert_eq!(through(&tables, &tcp(1, vip, 8004, b"")).0, Verdict::Pass);
    }
}

#[test]
fn a_capture_file_goes_in_and_one_comes_out() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in.pcap"), dir.path().join("out.pcap"));
    let frames = [tcp(1, VIP, 80, b"one"), tcp(2, MUX, 22, b"not for us"), tcp(3, VIP, 80, b"three")];
    let mut writer = PcapWriter::new(std::fs::File::create(&input).unwrap()).unwrap();
    for (second, frame) in frames.iter().enumerate() {
        let time = Duration::from_secs(second as u64);
        writer.write_packet(&PcapPacket::new(time, frame.len() as u32, frame)).unwrap();
    }
    drop(writer);
    let tables = tables(2, &[2, 1]);
    let mut worker = worker(&tables);
    let pcap = Pcap::open(&input, &output).unwrap();
    pcap.close(&mut worker).unwrap();
    let counters = worker.counters();
    assert_eq!((counters.received, counters.sent, counters.passed), (3, 2, 1));
    let mut reader = PcapReader::new(std::fs::File::open(&output).unwrap()).unwrap();
    for expected in [0, 2] {
        let packet = reader.next_packet().unwrap().unwrap();
        assert_eq!(packet.timestamp, Duration::from_secs(expected));
        assert_eq!(decapsulate(&packet.data).inner, frames[expected as usize][14..]);
    }
    assert!(reader.next_packet().is_none());

    let error = Pcap::open(&dir.path().join("none"), &output).err().unwrap().to_string();
    assert!(error.contains("none: No such file"), "{error}");
    std::fs::write(&input, b"not a capture").unwrap();
    assert!(Pcap::open(&input, &output).is_err());
}
