//! How long the pipeline takes for a packet, in memory, on one core, beside a floor that only reads each frame's
//! header line and writes 54 bytes before it.
//!
//! ```text
//! cargo bench -p daisy-mux --bench pipeline
//! ```
//!
//! One iteration is 2²⁰ packets in 128 MiB, more than caches hold: each packet's first byte comes from memory, as it
//! does from a device. What is timed is the pipeline alone; frames are made anew in between. Time is this thread's
//! time on a processor, so that other processes' turns are not counted.

#![allow(missing_docs, reason = "criterion_group! makes a public function without any")]

#[path = "world/mod.rs"]
mod world;

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use daisy_mux::pipeline::{GROUP, Scratch};
use daisy_mux::processor::Flows;
use daisy_shared::flow::{self, HashKey};
use nix::time::{ClockId, clock_gettime};
use world::{Case, LEN, START, STRIDE};

const PACKETS: usize = 1 << 20;

/// Times `run` on the frames, and has them made anew after it.
fn timed(iterations: u64, arena: &mut [u8], mut run: impl FnMut(&mut [u8])) -> Duration {
    let mut total = Duration::ZERO;
    for _ in 0..iterations {
        let begun = processor_time();
        run(arena);
        total += processor_time() - begun;
        world::restore(arena);
    }
    total
}

/// How long this thread has run on a processor.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("Linux has this clock");
    time.into()
}

/// Reads each frame's header line and writes 54 bytes before it: what any encapsulator must do.
#[inline(never)]
fn floor(arena: &mut [u8]) {
    const HEADERS: [u8; LEN] = [0x5a; LEN];
    let mut sum = 0u64;
    for frame in arena.chunks_exact_mut(STRIDE) {
        sum += u64::from(frame[START + 26]);
        frame[START + 14 - LEN..START + 14].copy_from_slice(black_box(&HEADERS));
    }
    black_box(sum);
}

fn benches(criterion: &mut Criterion) {
    for (name, flows) in world::FLOWS {
        let mut arena = world::frames(PACKETS, flows);
        let mut group = criterion.benchmark_group("floor");
        group.throughput(Throughput::Elements(PACKETS as u64));
        group.bench_function(name, |b| b.iter_custom(|n| timed(n, &mut arena, floor)));
        group.finish();

        let mut group = criterion.benchmark_group("pipeline");
        group.throughput(Throughput::Elements(PACKETS as u64));
        for (name, case) in Case::all().into_iter().filter(|(_, case)| case.flows == flows) {
            let shared = case.tables().shared();
            let mut scratch = Scratch::default();
            group.bench_function(&name, |b| {
                b.iter_custom(|n| {
                    timed(n, &mut arena, |arena| world::run(arena, &shared.load(), &mut scratch))
                });
            });
        }
        group.finish();
    }
    let mut group = criterion.benchmark_group("hash");
    let mut flows = Flows::EMPTY;
    group.throughput(Throughput::Elements(GROUP as u64));
    group.bench_function("group", |b| b.iter(|| black_box(&mut flows).hash()));
    let key = HashKey([0x5a; 16]);
    let one = |i: u64| flow::siphash13(key.words(), [i, 0]);
    group.bench_function("one_by_one", |b| {
        b.iter(|| (0..GROUP as u64).map(|i| one(black_box(i))).sum::<u64>())
    });
    group.finish();
}

criterion_group! {
    name = pipeline;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1500))
        .without_plots();
    targets = benches
}
criterion_main!(pipeline);
