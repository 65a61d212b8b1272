//! A number of packets through the pipeline, and nothing else: for counting instructions, which are the same in
//! every run and on every machine.
//!
//! ```text
//! valgrind --tool=callgrind target/release/examples/pipeline_instructions --case 64ki_1mi_closed_gue --packets 65536
//! ```
//!
//! Setting up is counted too; what a packet takes is the difference of two runs with different numbers of packets.

#[path = "../benches/world/mod.rs"]
mod world;

use std::process::ExitCode;

use clap::Parser;
use daisy_mux::pipeline::{BURST, Scratch};
use world::Case;

#[derive(Debug, Parser)]
struct Args {
    /// The case: buckets, flows, window and encapsulation, such as 64ki_1mi_closed_gue.
    #[arg(long)]
    case: String,
    /// How many packets go through the pipeline, in whole bursts of 64.
    #[arg(long)]
    packets: usize,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let all = Case::all();
    let Some((_, case)) = all.iter().find(|(name, _)| *name == args.case) else {
        let names: Vec<_> = all.iter().map(|(name, _)| name.as_str()).collect();
        eprintln!("case {:?} is none of {}", args.case, names.join(", "));
        return ExitCode::from(2);
    };
    let shared = case.tables().shared();
    let snapshot = shared.load();
    // One burst at a time: that the others exist must not cost instructions of their own. Flows follow one another
    // as in the benchmark only while they are as many as the frames.
    let mut scratch = Scratch::default();
    let mut arena = world::frames(BURST, case.flows);
    for _ in 0..args.packets.div_ceil(BURST) {
        world::run(&mut arena, &snapshot, &mut scratch);
        world::restore(&mut arena);
    }
    ExitCode::SUCCESS
}
