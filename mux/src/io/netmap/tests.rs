//! The forwarder over the double of the kernel, beside the same packets through memory.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::mem::offset_of;
use std::sync::Arc;
use std::time::{Duration, Instant};

use daisy_shared::drop::DropReason;
use netmap_sys::netmap::{netmap_ring, netmap_slot};
use proptest::prelude::*;

use super::Forwarder;
use super::abi::{BUFFER_ALIGN_AT, OFFSET_MASK_AT};
use super::double::{Arrival, BUFFER_LEN, Double, PortSpec, world};
use super::port::Kernel;
use super::ring::{MAX_OFFSET, Region, Ring};
use crate::common::*;
use crate::io::memory::Memory;
use crate::io::sys::Mapping;
use crate::io::{IoError, PacketIo, Worker};
use crate::metrics::Counters;
use crate::pipeline::Verdict;
use crate::table::{Link, NextHop, Tables};

/// Ports and a worker on them.
struct Bench {
    io: Forwarder<Double>,
    kernel: Double,
    worker: Worker,
    tables: Tables,
}

/// Backend 1 in closed windows. Of several interfaces, packets leave by the last.
fn bench(specs: &[PortSpec], chain: &[u16]) -> Bench {
    let (rings, kernel) = world(specs);
    let mut tables = Tables::new(UNDERLAY, vec![Link { ..LINK }; specs.len()]);
    tables.set_directory(&directory(1, 1..=3));
    for backend in 1..=3 {
        let egress = specs.len() as u8 - 1;
        tables.set_next_hop(address(backend), Some(NextHop { egress, mac: mac(backend) }));
    }
    tables.apply(&service(), &snapshot(&service(), 5, chain)).unwrap();
    let io = Forwarder::new(rings, kernel.clone()).unwrap();
    Bench { io, kernel, worker: worker(&tables), tables }
}

impl Bench {
    fn arrive(&self, pair: usize, arrivals: impl IntoIterator<Item = Arrival>) {
        self.kernel.0.borrow_mut().pairs[pair].1.wire.extend(arrivals);
    }

    fn turn(&mut self) -> usize {
        self.io.turn(&mut self.worker, Duration::ZERO).unwrap()
    }

    fn sent(&self, pair: usize) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.kernel.0.borrow_mut().pairs[pair].0.sent)
    }

    fn stall(&self, pair: usize, is_stalled: bool) {
        self.kernel.0.borrow_mut().pairs[pair].0.is_stalled = is_stalled;
    }

    /// What the pipeline makes of these frames: verdicts, and those that it sends.
    fn reference(&self, frames: &[Vec<u8>]) -> (Vec<Verdict>, Vec<Vec<u8>>) {
        let mut memory = Memory::new(frames.to_vec());
        let mut worker = worker(&self.tables);
        while memory.turn(&mut worker, Duration::ZERO).unwrap() > 0 {}
        (memory.verdicts, memory.sent)
    }

    fn close(mut self) -> (Result<(), IoError>, Counters) {
        let result = self.io.close(&mut self.worker);
        let counters = *self.worker.counters();
        assert!(counters.is_conserved(), "{counters:?}");
        (result, counters)
    }
}

fn for_service(count: u16) -> Vec<Vec<u8>> {
    (0..count).map(|i| tcp(1000 + i, VIP, 80, &vec![i as u8; usize::from(i % 200)])).collect()
}

fn frames(frames: &[Vec<u8>]) -> Vec<Arrival> {
    frames.iter().cloned().map(Arrival::Frame).collect()
}

fn arp() -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 9, 9, 9, 9, 9, 0x08, 0x06]);
    frame.resize(60, 0x11);
    frame
}

/// All kinds of ports, with one arm.
const ONE_ARMED: [PortSpec; 5] = [
    PortSpec::INTERFACE,
    PortSpec { has_offsets: false, ..PortSpec::INTERFACE },
    PortSpec::VALE,
    PortSpec::PIPE,
    PortSpec { has_offsets: true, ..PortSpec::PIPE },
];

#[test]
fn forwards_what_the_pipeline_sends_through_rings_that_wrap() {
    for spec in ONE_ARMED {
        for chain in [&[1][..], &[2, 1]] {
            let mut bench = bench(&[PortSpec { slots: (31, 17), ..spec }], chain);
            let input = for_service(500);
            let (_, expected) = bench.reference(&input);
            bench.arrive(0, frames(&input));
            while bench.turn() > 0 {}
            assert_eq!(bench.sent(0), expected, "{spec:?}");
            // Without a copy where there is room for headers, and only there.
            let swaps = if spec.has_offsets && !spec.is_pipe { 500 } else { 0 };
            assert_eq!(bench.kernel.0.borrow().pairs[0].0.swaps, swaps, "{spec:?}");
            let (closed, counters) = bench.close();
            closed.unwrap();
            assert_eq!((counters.received, counters.sent), (500, 500));
        }
    }
}

#[test]
fn a_full_ring_to_send_drops_and_counts() {
    for spec in ONE_ARMED {
        let mut bench = bench(&[PortSpec { slots: (8, 64), ..spec }], &[1]);
        bench.stall(0, true);
        let input = for_service(60);
        let (_, expected) = bench.reference(&input);
        bench.arrive(0, frames(&input));
        while bench.turn() > 0 {}
        assert_eq!(bench.sent(0), expected[..7], "{spec:?}");
        let counters = *bench.worker.counters();
        assert_eq!((counters.received, counters.sent, counters.dropped_for(DropReason::TxFull)), (60, 7, 53));
        // A device that does not move is not waited for again and again.
        bench.arrive(0, frames(&input));
        while bench.turn() > 0 {}
        assert_eq!(bench.kernel.0.borrow().waits, 1);
        bench.stall(0, false);
        bench.turn();
        // Room is asked for when there is none: 7, and once more 7.
        bench.arrive(0, frames(&input));
        while bench.turn() > 0 {}
        assert_eq!(bench.sent(0), expected[..14], "{spec:?}");
        let (closed, counters) = bench.close();
        closed.unwrap();
        assert_eq!(
            (counters.received, counters.sent, counters.dropped_for(DropReason::TxFull)),
            (180, 21, 159)
        );
    }
}

#[test]
fn the_host_lives_on_the_same_interface() {
    for has_offsets in [true, false] {
        let mut bench = bench(&[PortSpec { slots: (16, 16), has_offsets, ..PortSpec::INTERFACE }], &[1]);
        let ssh = tcp(5000, MUX, 22, b"not for a service");
        let from_host: Vec<Vec<u8>> = (0..100u8).map(|i| vec![i; 60 + usize::from(i)]).collect();
        bench.arrive(1, frames(&from_host));
        let up: Vec<Vec<u8>> = (0..50).flat_map(|_| [arp(), ssh.clone()]).collect();
        bench.arrive(0, frames(&up));
        for _ in 0..50 {
            bench.turn();
        }
        assert_eq!(bench.sent(1), up, "to the host");
        assert_eq!(bench.sent(0), from_host, "from the host");
        assert_eq!((bench.io.from_host, bench.io.from_host_dropped), (100, 0));
        let (closed, counters) = bench.close();
        closed.unwrap();
        assert_eq!((counters.received, counters.passed), (100, 100));
    }
}

#[test]
fn what_is_passed_where_there_is_no_host_is_counted() {
    let mut bench = bench(&[PortSpec::VALE], &[1]);
    bench.arrive(0, [Arrival::Frame(arp()), Arrival::Empty, Arrival::Frame(for_service(1).remove(0))]);
    while bench.turn() > 0 {}
    assert_eq!(bench.sent(0).len(), 1);
    let (closed, counters) = bench.close();
    closed.unwrap();
    // A slot with nothing in it is no packet.
    assert_eq!((counters.received, counters.passed, counters.sent), (2, 1, 1));
}

#[test]
fn packets_leave_by_another_port_of_the_same_region_or_of_another() {
    for (first, second) in [
        (PortSpec::INTERFACE, PortSpec::INTERFACE),
        (PortSpec::INTERFACE, PortSpec { region: 1, ..PortSpec::INTERFACE }),
        (PortSpec::VALE, PortSpec { region: 1, ..PortSpec::VALE }),
        (PortSpec::INTERFACE, PortSpec { has_offsets: false, ..PortSpec::INTERFACE }),
        (PortSpec::PIPE, PortSpec::PIPE),
        (PortSpec::PIPE, PortSpec::INTERFACE),
        (PortSpec::INTERFACE, PortSpec { has_offsets: true, ..PortSpec::PIPE }),
    ] {
        let mut bench = bench(&[first, second], &[3, 1]);
        let input = for_service(300);
        let (_, expected) = bench.reference(&input);
        bench.arrive(0, frames(&input));
        while bench.turn() > 0 {}
        assert_eq!(bench.sent(0), Vec::<Vec<u8>>::new());
        assert_eq!(bench.sent(1 + usize::from(first.has_host)), expected);
        bench.close().0.unwrap();
    }
}

#[test]
fn frames_in_several_slots_are_put_together() {
    let spec = PortSpec { receive_len: 256, slots: (32, 32), ..PortSpec::INTERFACE };
    let mut bench = bench(&[spec], &[1]);
    let long = tcp(1, VIP, 80, &vec![7; 1200]);
    let mut for_host = arp();
    for_host.resize(700, 0x33);
    let huge = vec![0x44; 256 * 20];
    let input = [long.clone(), for_host.clone(), long.clone()];
    let (_, expected) = bench.reference(&input);
    bench.arrive(0, frames(&input));
    bench.arrive(0, [Arrival::Frame(huge), Arrival::Frame(long)]);
    for _ in 0..10 {
        bench.turn();
    }
    let sent = bench.sent(0);
    assert_eq!((sent.len(), &sent[..2]), (3, &expected[..]));
    assert_eq!(bench.sent(1), [for_host]);
    let (closed, counters) = bench.close();
    closed.unwrap();
    assert_eq!((counters.received, counters.sent, counters.passed), (5, 3, 1));
    assert_eq!(counters.dropped_for(DropReason::TooBig), 1);
}

#[test]
fn a_packet_whose_rest_is_to_come_waits_for_it() {
    let spec = PortSpec { receive_len: 256, ..PortSpec::INTERFACE };
    let mut bench = bench(&[spec], &[1]);
    let long = tcp(1, VIP, 80, &[7; 600]);
    bench.arrive(0, frames(&[long]));
    {
        let mut world = bench.kernel.0.borrow_mut();
        world.pairs[0].1.sync_rx();
        // As if only two of its three slots had been shown.
        world.pairs[0].1.set_tail(2);
    }
    let io = &mut bench.io;
    assert_eq!(io.forward(&mut bench.worker, 0, 0).unwrap(), 0);
    assert_eq!(io.rings.rx[0].head(), 0);
    assert_eq!(bench.turn(), 1);
    bench.turn();
    assert_eq!(bench.sent(0).len(), 1);
    bench.close().0.unwrap();
}

#[test]
fn slots_that_cannot_be_are_dropped_and_nothing_is_touched() {
    for has_offsets in [true, false] {
        let mut bench = bench(&[PortSpec { has_offsets, ..PortSpec::INTERFACE }], &[1]);
        let good = for_service(3);
        let (_, expected) = bench.reference(&good);
        let wrong = |buffer| Arrival::Broken(buffer, 60, 64);
        let held = bench.kernel.0.borrow().pairs[0].1.get_slot(0).buf_idx;
        bench.arrive(0, frames(&good[..1]));
        bench.arrive(0, [wrong(Some(0)), wrong(Some(1)), wrong(Some(u32::MAX)), wrong(Some(1 << 20))]);
        // The buffer of the first frame of this burst.
        bench.arrive(0, [wrong(Some(held))]);
        bench.arrive(0, [Arrival::Broken(None, u16::MAX, 0)]);
        if has_offsets {
            bench.arrive(
                0,
                [
                    Arrival::Broken(None, 60, BUFFER_LEN as u64 - 59),
                    Arrival::Broken(None, 60, u64::MAX),
                    Arrival::Broken(None, 60, u64::MAX - 59),
                ],
            );
        }
        bench.arrive(0, frames(&good[1..]));
        // Too short for any header.
        bench.arrive(0, [Arrival::Frame(vec![1]), Arrival::Frame(MUX_MAC.to_vec())]);
        while bench.turn() > 0 {}
        assert_eq!(bench.sent(0), expected);
        let (closed, counters) = bench.close();
        closed.unwrap();
        let broken = if has_offsets { 9 } else { 6 };
        assert_eq!((counters.received, counters.sent), (broken + 5, 3));
        assert_eq!(counters.passed + counters.dropped_for(DropReason::Truncated), broken + 2);
    }
}

#[test]
fn a_tail_that_cannot_be_is_an_error_that_names_the_port() {
    let mut bench = bench(&[PortSpec::INTERFACE], &[1]);
    bench.turn();
    bench.kernel.0.borrow().pairs[0].1.set_tail(128);
    let error = bench.io.forward(&mut bench.worker, 0, 0).unwrap_err().to_string();
    assert_eq!(error, "port 0: netmap says of a ring that more slots are ours than it has");
}

#[test]
fn a_buffer_that_is_lost_or_doubled_is_found_at_the_end() {
    let mut bench = bench(&[PortSpec::INTERFACE], &[1]);
    bench.arrive(0, frames(&for_service(40)));
    while bench.turn() > 0 {}
    {
        let world = bench.kernel.0.borrow();
        let other = world.pairs[0].1.get_slot(3).buf_idx;
        let slot = world.pairs[1].0.get_slot(5);
        world.pairs[1].0.set_slot(5, netmap_slot { buf_idx: other, ..slot });
    }
    let error = bench.close().0.unwrap_err().to_string();
    assert!(
        error.contains("buffers are not where they must be") && error.contains("of which 1 are lost"),
        "{error}"
    );
}

fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        4 => (any::<u16>(), 0..1500usize).prop_map(|(port, len)| tcp(port, VIP, 80, &vec![port as u8; len])),
        2 => (any::<u16>(), 0..100usize).prop_map(|(port, len)| tcp(port, MUX, 22, &vec![1; len])),
        1 => Just(arp()),
        1 => proptest::collection::vec(any::<u8>(), 1..200),
        1 => (any::<u16>(), 0..80usize).prop_map(|(port, cut)| {
            let mut frame = tcp(port, VIP, 80, b"cut");
            frame.truncate(cut.max(1));
            frame
        }),
    ]
}

#[derive(Clone, Debug)]
enum Step {
    Arrive(Vec<Vec<u8>>),
    Shifted(Vec<u8>, usize),
    Empty,
    Host(Vec<Vec<u8>>),
    Stall(bool),
    Turn,
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => proptest::collection::vec(any_frame(), 1..40).prop_map(Step::Arrive),
        1 => (0..200usize, 0..128usize).prop_map(|(len, by)| Step::Shifted(tcp(9, VIP, 80, &vec![5; len]), by)),
        1 => Just(Step::Empty),
        1 => proptest::collection::vec((60..300usize).prop_map(|len| vec![0xab; len]), 1..10).prop_map(Step::Host),
        1 => any::<bool>().prop_map(Step::Stall),
        5 => Just(Step::Turn),
    ]
}

fn any_port() -> impl Strategy<Value = PortSpec> {
    let receive_len = prop_oneof![Just(BUFFER_LEN - MAX_OFFSET), Just(256usize), Just(1024)];
    (0..ONE_ARMED.len(), 2..70u32, 12..70u32, 0..2usize, receive_len).prop_map(
        |(kind, tx, rx, region, receive_len)| PortSpec {
            slots: (tx, rx),
            region,
            receive_len,
            ..ONE_ARMED[kind]
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever comes in whatever order: every packet is sent, passed or dropped with its reason, as the pipeline
    /// says; in order, unchanged, each once; and all buffers are there in the end.
    #[test]
    fn any_sequence_keeps_account_of_packets_and_buffers(
        first in any_port(),
        second in proptest::option::of(any_port()),
        steps in proptest::collection::vec(any_step(), 1..40),
    ) {
        let mut specs = vec![PortSpec { region: 0, ..first }];
        specs.extend(second);
        let mut bench = bench(&specs, &[2, 1]);
        let out = if second.is_some() { 1 + usize::from(first.has_host) } else { 0 };
        let (mut input, mut to_wire, mut empty) = (Vec::new(), Vec::new(), 0u64);
        for step in steps {
            match step {
                Step::Arrive(new) => {
                    bench.arrive(0, frames(&new));
                    input.extend(new);
                }
                Step::Shifted(frame, by) => {
                    bench.arrive(0, [Arrival::Shifted(frame.clone(), if first.is_pipe { 0 } else { by })]);
                    input.push(frame);
                }
                Step::Empty => {
                    empty += 1;
                    bench.arrive(0, [Arrival::Empty]);
                }
                Step::Host(new) if first.has_host => {
                    bench.arrive(1, frames(&new));
                    to_wire.extend(new);
                }
                Step::Host(_) => {}
                Step::Stall(is_stalled) => bench.stall(out, is_stalled),
                Step::Turn => {
                    bench.turn();
                }
            }
        }
        // Slots that are not done with may hold up the rest, but not for ever.
        bench.stall(out, false);
        for _ in 0..200 {
            bench.turn();
        }
        let (verdicts, expected) = bench.reference(&input);
        let passed: Vec<&Vec<u8>> =
            input.iter().zip(&verdicts).filter(|(_, verdict)| **verdict == Verdict::Pass).map(|(frame, _)| frame).collect();
        let at_host = if first.has_host { bench.sent(1) } else { Vec::new() };
        let mut sent = bench.sent(out);
        if out == 0 {
            // What the host sends goes between.
            let from_host: Vec<Vec<u8>> = sent.extract_if(.., |frame| frame.iter().all(|byte| *byte == 0xab)).collect();
            prop_assert_eq!(from_host.len() as u64, bench.io.from_host - bench.io.from_host_dropped);
        }
        prop_assert_eq!(bench.io.from_host, to_wire.len() as u64);
        let (closed, counters) = bench.close();
        closed.unwrap();
        prop_assert_eq!(counters.received, input.len() as u64, "and {} empty slots", empty);
        prop_assert_eq!(counters.sent, sent.len() as u64);
        let full = counters.dropped_for(DropReason::TxFull);
        prop_assert_eq!(counters.sent + counters.passed + full, (expected.len() + passed.len()) as u64);
        prop_assert!(is_part_of(&sent.iter().collect::<Vec<_>>(), &expected.iter().collect::<Vec<_>>()));
        if first.has_host {
            prop_assert_eq!(counters.passed, at_host.len() as u64);
            prop_assert!(is_part_of(&at_host.iter().collect::<Vec<_>>(), &passed));
        }
    }

    /// Whatever stands where a ring should be: it is refused, or all that it leads to is within the memory.
    #[test]
    fn a_ring_leads_nowhere_but_into_its_memory(
        offset in 0..20_000usize,
        buf_ofs in prop_oneof![any::<i64>(), -100..20_000i64],
        slots in prop_oneof![any::<u32>(), 0..600u32],
        buffer_len in prop_oneof![any::<u32>(), 0..5_000u32],
        places in (any::<u32>(), any::<u32>(), any::<u32>()),
    ) {
        let region = Arc::new(Region::new(Mapping::anonymous(16_384).unwrap()));
        let offset = if offset % 3 == 0 { offset } else { offset / 64 * 64 };
        let at = |field: usize| offset + field;
        if offset.is_multiple_of(8) && offset + 256 <= 16_384 {
            region.write(at(offset_of!(netmap_ring, buf_ofs)), buf_ofs);
            region.write(at(offset_of!(netmap_ring, num_slots)), slots);
            region.write(at(offset_of!(netmap_ring, nr_buf_size)), buffer_len);
            region.write(at(offset_of!(netmap_ring, head)), places.0 % slots.saturating_add(2));
            region.write(at(offset_of!(netmap_ring, tail)), places.1);
            region.write(at(OFFSET_MASK_AT), u64::from(places.2));
            region.write(at(BUFFER_ALIGN_AT), u64::from(places.2 % 65));
        }
        if let Ok(ring) = Ring::at(&region, offset) {
            prop_assert!(offset + 256 + slots as usize * 16 <= 16_384);
            let _last = ring.slot(ring.slot_count() - 1);
            let _space = ring.space();
            for buffer in [places.0, 0, 1, 2, ring.buffer_count() - 1, ring.buffer_count()] {
                if let Some(bytes) = ring.buffer(buffer) {
                    prop_assert!((2..ring.buffer_count()).contains(&buffer));
                    // SAFETY: the test is about this: that it is within the memory, which nobody else has.
                    let bytes = unsafe { bytes.as_ref() };
                    prop_assert_eq!(bytes.len(), buffer_len as usize);
                    let _all = std::hint::black_box(bytes.to_vec());
                }
            }
        }
    }
}

/// A kernel that costs little: the same frames for ever.
struct Endless {
    kernel: Double,
    frame: Vec<u8>,
}

impl Kernel for Endless {
    fn turn(&mut self, _wait: Duration) -> std::io::Result<()> {
        for (tx, rx) in &mut self.kernel.0.borrow_mut().pairs {
            tx.forget();
            rx.renew(&self.frame);
        }
        Ok(())
    }

    fn send(&mut self, _handle: usize) -> std::io::Result<()> {
        Ok(())
    }

    fn wait_for_room(&mut self, _handle: usize, _wait: Duration) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
#[ignore = "a measurement: run it with --release --ignored --nocapture"]
fn what_a_copy_costs() {
    for payload in [6, 458, 1346] {
        let frame = tcp(1000, VIP, 80, &vec![7; payload]);
        let cost = |spec: PortSpec| {
            let (rings, kernel) = world(&[PortSpec { slots: (1024, 1024), has_host: false, ..spec }]);
            let tables = tables(3, &[1]);
            let mut worker = worker(&tables);
            let mut io = Forwarder::new(rings, Endless { kernel, frame: frame.clone() }).unwrap();
            let best = (0..300).map(|_| {
                io.kernel.turn(Duration::ZERO).unwrap();
                let begun = Instant::now();
                let taken = io.forward(&mut worker, 0, 0).unwrap();
                let elapsed = begun.elapsed();
                assert_eq!(taken, 1023);
                elapsed.as_nanos() as f64 / taken as f64
            });
            let best = best.fold(f64::MAX, f64::min);
            assert_eq!(worker.counters().sent, worker.counters().received);
            best
        };
        let [in_place, copied] =
            [true, false].map(|has_offsets| cost(PortSpec { has_offsets, ..PortSpec::VALE }));
        println!("frames of {} bytes: {in_place:.1} ns in place, {copied:.1} ns copied", frame.len());
    }
}

/// Whether one sequence is another with some left out.
fn is_part_of(part: &[&Vec<u8>], whole: &[&Vec<u8>]) -> bool {
    let mut whole = whole.iter();
    part.iter().all(|item| whole.any(|other| other == item))
}
