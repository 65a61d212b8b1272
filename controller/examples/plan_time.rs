//! How long a plan takes: 1 Mi buckets, 1,000 backends. `cargo run --release -p daisy-controller --example plan_time`
#![allow(clippy::unwrap_used, reason = "a measurement")]

use std::time::Instant;

use daisy_controller::chains;
use daisy_controller::model::Bucket;
use daisy_controller::planner::{Candidate, Chains, Move, plan};
use daisy_shared::bucket::BackendId;
use daisy_shared::chain::Generation;

const BUCKETS: usize = 1 << 20;

fn main() {
    let able = |ids: std::ops::Range<u16>, weight: fn(u16) -> u32| -> Vec<Candidate> {
        ids.map(|id| Candidate { id: BackendId(id), weight: weight(id) }).collect()
    };
    let mut buckets = vec![Bucket::default(); BUCKETS];
    let mut generation = Generation(0);
    let steps = [
        ("fill an empty table", able(0..1000, |_| 100)),
        ("nothing to do", able(0..1000, |_| 100)),
        ("one backend leaves", able(1..1000, |_| 100)),
        ("one backend comes", able(0..1000, |_| 100)),
        ("all weights change", able(0..1000, |id| 50 + u32::from(id) % 101)),
        ("half of them leave", able(0..500, |_| 100)),
        ("they come back", able(0..1000, |_| 100)),
    ];
    for (name, candidates) in steps {
        let times: Vec<u128> = (0..5)
            .map(|_| {
                let start = Instant::now();
                std::hint::black_box(plan(Chains::new(&buckets, &[]), &candidates));
                start.elapsed().as_micros()
            })
            .collect();
        let moves = plan(Chains::new(&buckets, &[]), &candidates);
        generation = generation.next();
        for Move { bucket, to } in &moves {
            let place = &mut buckets[*bucket as usize];
            *place = chains::moved(place, *to, generation).unwrap();
        }
        println!("{name:20} {:8} moves, {:6} µs (of 5: best)", moves.len(), times.iter().min().unwrap());
    }
}
