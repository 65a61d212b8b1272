//! `make demo`: the scenario with chaining, then without, a table, a plot and `report.json`.

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Parser;
use daisy_eval::plot;
use daisy_eval::report::{Report, Run, table};
use daisy_eval::scenario::{Settings, play};

/// Live connections through scale-out, drains, weights, mux loss and controller restart; with chaining and without.
#[derive(Parser)]
struct Arguments {
    /// Long-lived connections that keep talking.
    #[arg(long, default_value_t = 1000)]
    connections: usize,
    /// Short HTTP requests in a second.
    #[arg(long, default_value_t = 20)]
    requests_per_second: u32,
    /// Seconds for which the traffic is watched after each change.
    #[arg(long, default_value_t = 5)]
    hold_s: u64,
    /// Where report.json and plot.svg go.
    #[arg(long, default_value = "target/demo")]
    output: PathBuf,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("daisy-demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Returns whether all is as promised.
fn run(arguments: &Arguments) -> Result<bool> {
    std::fs::create_dir_all(&arguments.output)
        .with_context(|| format!("cannot make the directory {}", arguments.output.display()))?;
    let began = Instant::now();
    let with = perform(arguments, true)?;
    let without = perform(arguments, false)?;

    let file = arguments.output.join("report.json");
    let json = serde_json::to_string_pretty(&Report::new(&with, &without))?;
    std::fs::write(&file, json + "\n").with_context(|| format!("cannot write {}", file.display()))?;
    let picture = arguments.output.join("plot.svg");
    plot::draw(&picture, &with, &without)?;

    println!("\n{}", table(&with, &without));
    println!(
        "{} connections and {} requests through all of it: {} broken, {} waits longer than a retransmission. \
         Without chaining: {} broken.",
        with.connections, with.requests, with.broken, with.stalls, without.broken
    );
    println!("{} and {}, after {} s", file.display(), picture.display(), began.elapsed().as_secs());
    if with.broken > 0 {
        eprintln!("daisy-demo: {} connections or requests broke", with.broken);
    }
    if without.broken == 0 {
        eprintln!("daisy-demo: nothing broke without chaining either, so this run shows nothing");
    }
    Ok(with.broken == 0 && without.broken > 0)
}

fn perform(arguments: &Arguments, chaining: bool) -> Result<Run> {
    println!("\n=== {} chaining", if chaining { "with" } else { "without" });
    let settings = Settings {
        connections: arguments.connections,
        requests_per_second: arguments.requests_per_second,
        hold: Duration::from_secs(arguments.hold_s),
        chaining,
    };
    // On a terminal the figures stay in one place; in a log each line stands.
    let terminal = std::io::stdout().is_terminal();
    let mut open_line = false;
    let run = play(&settings, &mut |line| {
        let figures = line.starts_with("   ");
        let mut out = std::io::stdout().lock();
        let start = if terminal && open_line { if figures { "\r\x1b[K" } else { "\n" } } else { "" };
        let end = if terminal && figures { "" } else { "\n" };
        // A closed pipe is no reason to leave a network behind: the run goes on and cleans up.
        let _ = write!(out, "{start}{line}{end}").and_then(|()| out.flush());
        open_line = terminal && figures;
    });
    if open_line {
        println!();
    }
    run
}
