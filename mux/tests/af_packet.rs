//! Packet sockets on veth interfaces between network namespaces, driven by hand: what comes in is known to the
//! packet, and so must be what comes out. Needs root.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;
#[path = "../../shared/node/tests/netns/mod.rs"]
mod netns;
mod wire;

use std::time::{Duration, Instant};

use common::{CLIENT, LINK, MUX_MAC, UNDERLAY, VIP, address, directory, mac, service, snapshot, tcp};
use daisy_mux::io::af_packet::{self, AfPacket};
use daisy_mux::io::{IoError, PacketIo, Worker};
use daisy_mux::table::{Link, NextHop, Tables};
use daisy_node::interface::Interface;
use daisy_shared::drop::DropReason;
use netns::Host;
use wire::{SECOND_MAC, Wire};

const PATIENCE: Duration = Duration::from_secs(20);
/// How long a turn may wait for packets.
const WAIT: Duration = Duration::from_millis(100);

/// A mux's host, with a wire on each of its interfaces, and the hosts at their ends.
fn network(interfaces: usize) -> (Host, Vec<(Host, Wire)>, Vec<Interface>) {
    let mux = Host::new();
    let wires = (0..interfaces).map(|i| {
        let peer = Host::new();
        mux.sh("sysctl -qw net.ipv6.conf.default.disable_ipv6=1");
        mux.join(&format!("eth{i}"), &peer, "eth0");
        mux.sh(&format!(
            "ip link set eth{i} address 02:00:00:00:00:0{}; ip addr add 10.{i}.0.1/24 dev eth{i}",
            i + 1
        ));
        let wire = peer.run(Wire::open);
        (peer, wire)
    });
    let wires = wires.collect();
    let names: Vec<_> = (0..interfaces).map(|i| format!("eth{i}")).collect();
    let found = mux.run(move || names.iter().map(|name| Interface::find(name).unwrap()).collect());
    (mux, wires, found)
}

/// Opens sockets for so many threads, and has a worker for each.
fn open(mux: &Host, interfaces: &[Interface], threads: usize, tables: &Tables) -> Vec<(AfPacket, Worker)> {
    let interfaces = interfaces.to_vec();
    let sockets = mux.run(move || af_packet::open(&interfaces, threads)).unwrap();
    sockets.into_iter().map(|socket| (socket, common::worker(tables))).collect()
}

fn received_by(threads: &[(AfPacket, Worker)]) -> u64 {
    threads.iter().map(|(_, worker)| worker.counters().received).sum()
}

/// Takes turns until all workers together have received so many packets.
fn serve(threads: &mut [(AfPacket, Worker)], received: u64) {
    let deadline = Instant::now() + PATIENCE;
    while received_by(threads) < received {
        assert!(Instant::now() < deadline, "packets are missing");
        for (socket, worker) in &mut *threads {
            socket.turn(worker, Duration::ZERO).unwrap();
        }
    }
}

/// A frame with VLAN tags, outermost first.
fn tagged(frame: &[u8], tags: &[[u8; 4]]) -> Vec<u8> {
    [&frame[..12], tags.as_flattened(), &frame[12..]].concat()
}

#[test]
fn a_flow_stays_on_one_thread() {
    const FLOWS: u16 = 64;
    const PACKETS: u64 = 5;
    let (mux, wires, interfaces) = network(1);
    let mut threads = open(&mux, &interfaces, 2, &common::tables(1, &[1]));
    let (_, wire) = &wires[0];
    let mut total = 0;
    for flow in 0..FLOWS {
        let before: Vec<_> = threads.iter().map(|(_, worker)| worker.counters().received).collect();
        let frame = tcp(2000 + flow, VIP, 80, b"once");
        for _ in 0..PACKETS {
            wire.send(&frame);
        }
        total += PACKETS;
        serve(&mut threads, total);
        let after = threads.iter().map(|(_, worker)| worker.counters().received);
        let mut took: Vec<_> = after.zip(before).map(|(after, before)| after - before).collect();
        took.sort_unstable();
        assert_eq!(took, [0, PACKETS], "flow {flow}");
        for _ in 0..PACKETS {
            assert_eq!(common::decapsulate(&wire.receive()).inner, frame[14..]);
        }
        assert!(wire.is_quiet(), "a packet came twice");
    }
    for (socket, mut worker) in threads {
        socket.close(&mut worker).unwrap();
        let counters = worker.counters();
        assert!(
            counters.sent > 0 && counters.sent == counters.received && counters.missed == 0,
            "{counters:?}"
        );
    }
}

#[test]
fn groups_of_two_muxes_are_not_one() {
    let (mux, wires, interfaces) = network(1);
    let mut threads = open(&mux, &interfaces, 2, &common::tables(1, &[1]));
    threads.extend(open(&mux, &interfaces, 2, &common::tables(1, &[1])));
    for flow in 0..16 {
        wires[0].1.send(&tcp(2000 + flow, VIP, 80, b""));
    }
    // Each of the two has every packet.
    serve(&mut threads[..2], 16);
    serve(&mut threads[2..], 16);
}

#[test]
fn a_packet_leaves_by_the_interface_of_its_backend() {
    let (mux, wires, interfaces) = network(2);
    let mut tables = Tables::new(UNDERLAY, [LINK, Link { mac: SECOND_MAC, ..LINK }]);
    tables.set_directory(&directory(1, 1..=2));
    for backend in 1..=2 {
        let next_hop = NextHop { egress: backend as u8 - 1, mac: mac(backend) };
        tables.set_next_hop(address(backend), Some(next_hop));
    }
    tables.apply(&service(), &snapshot(&service(), 1, &[1])).unwrap();
    let mut threads = open(&mux, &interfaces, 1, &tables);
    let mut total = 0;
    for generation in 2..20 {
        let backend = generation as u16 % 2 + 1;
        tables.apply(&service(), &snapshot(&service(), generation, &[backend])).unwrap();
        for (_, ingress) in &wires {
            // What comes in here is for this interface's Ethernet address.
            let mut frame = tcp(2000, VIP, 80, &generation.to_be_bytes());
            frame[..6].copy_from_slice(if total % 2 == 0 { &MUX_MAC } else { &SECOND_MAC });
            ingress.send(&frame);
            total += 1;
            serve(&mut threads, total);
            let egress = usize::from(backend) - 1;
            let output = common::decapsulate(&wires[egress].1.receive());
            assert_eq!(output.ethernet.source, [MUX_MAC, SECOND_MAC][egress]);
            assert_eq!((output.ethernet.destination, output.inner), (mac(backend), frame[14..].to_vec()));
            assert!(wires[1 - egress].1.is_quiet());
        }
    }
    assert_eq!(threads[0].1.counters().sent, total);
}

#[test]
fn tags_are_kept() {
    let (mux, wires, interfaces) = network(1);
    let mut threads = open(&mux, &interfaces, 1, &common::tables(1, &[1]));
    let (_, wire) = &wires[0];
    let frame = tcp(2000, VIP, 80, b"tagged");
    let rows: [&[[u8; 4]]; 5] = [
        &[],
        &[[0x81, 0, 0, 7]],
        // Priority only.
        &[[0x81, 0, 0xe0, 0]],
        &[[0x88, 0xa8, 0, 9]],
        &[[0x88, 0xa8, 0, 9], [0x81, 0, 0x20, 7]],
    ];
    for (i, tags) in rows.into_iter().enumerate() {
        wire.send(&tagged(&frame, tags));
        serve(&mut threads, i as u64 + 1);
        let mut output = wire.receive();
        let len = tags.as_flattened().len();
        assert_eq!(output[12..12 + len], *tags.as_flattened());
        output.drain(12..12 + len);
        assert_eq!(common::decapsulate(&output).inner, frame[14..]);
    }
    assert_eq!(threads[0].1.counters().sent, rows.len() as u64);
}

#[test]
fn what_is_longer_than_the_link_carries_is_too_big() {
    let (mux, wires, interfaces) = network(1);
    let mut threads = open(&mux, &interfaces, 1, &common::tables(1, &[1]));
    let (peer, wire) = &wires[0];
    // As receive offload does: packets longer than the MTU that was.
    mux.sh("ip link set eth0 mtu 9000");
    peer.sh("ip link set eth0 mtu 9000");
    for (i, len) in [1500, 1700, 5000, 8900].into_iter().enumerate() {
        wire.send(&tcp(2000, VIP, 80, &vec![7; len]));
        // Not for the service: the host's own, which is not judged.
        wire.send(&tcp(2000, CLIENT, 80, &vec![7; len]));
        serve(&mut threads, 2 * i as u64 + 2);
    }
    let counters = threads[0].1.counters();
    assert_eq!((counters.dropped_for(DropReason::TooBig), counters.passed), (4, 4), "{counters:?}");
    assert!(counters.is_conserved());
}

#[test]
fn what_was_received_is_served_to_the_end_and_what_was_not_is_counted() {
    // More than the ring holds.
    const PACKETS: u64 = 15_000;
    let (mux, wires, interfaces) = network(1);
    let mut threads = open(&mux, &interfaces, 1, &common::tables(1, &[1]));
    let (_, wire) = &wires[0];
    let frame = tcp(2000, VIP, 80, b"");
    for _ in 0..PACKETS {
        wire.send(&frame);
    }
    let (socket, mut worker) = threads.pop().unwrap();
    socket.close(&mut worker).unwrap();
    let counters = worker.counters();
    assert_eq!(counters.received + counters.missed, PACKETS, "{counters:?}");
    assert!(counters.missed > 0 && counters.sent == counters.received, "{counters:?}");
    for _ in 0..counters.sent {
        wire.receive();
    }
    assert!(wire.is_quiet());
}

#[test]
fn an_interface_may_go_down_and_come_back_but_not_vanish() {
    let (mux, wires, interfaces) = network(1);
    let mut threads = open(&mux, &interfaces, 2, &common::tables(1, &[1]));
    let (peer, wire) = &wires[0];
    for _ in 0..3 {
        mux.sh("ip link set eth0 down");
        for (socket, worker) in &mut threads {
            // The first turn may be told of it.
            socket.turn(worker, WAIT).unwrap();
            let begun = Instant::now();
            assert_eq!(socket.turn(worker, WAIT).unwrap(), 0);
            assert!(begun.elapsed() >= WAIT / 2, "an idle thread that does not sleep");
        }
        mux.sh("ip link set eth0 up");
        // The kernel takes its time to open the wire.
        let deadline = Instant::now() + PATIENCE;
        let before = received_by(&threads);
        while received_by(&threads) == before {
            assert!(Instant::now() < deadline, "nothing arrives any more");
            wire.send(&tcp(2000, VIP, 80, b""));
            for (socket, worker) in &mut threads {
                socket.turn(worker, WAIT / 10).unwrap();
            }
        }
        for (socket, worker) in &mut threads {
            while socket.turn(worker, WAIT).unwrap() > 0 {}
        }
        while !wire.is_quiet() {}
        let total = received_by(&threads) + 16;
        for flow in 0..16 {
            wire.send(&tcp(2000 + flow, VIP, 80, b""));
        }
        serve(&mut threads, total);
        for _ in 0..16 {
            wire.receive();
        }
    }
    peer.sh("ip link del eth0");
    for (socket, worker) in &mut threads {
        let error = (0..3).find_map(|_| socket.turn(worker, WAIT).err());
        let Some(IoError::Unusable { place, reason }) = error else { panic!("{error:?}") };
        assert_eq!((place.as_str(), reason.as_str()), ("interface eth0", "it is gone"));
    }
}
