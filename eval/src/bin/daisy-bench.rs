//! `make bench`: daisy by itself and beside others. Raw figures, plots, `summary.json` and a README of the run.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use daisy_eval::bench::cases::{self, Effort, Part, Runner};
use daisy_eval::bench::contestant::{self, Contestant};
use daisy_eval::bench::machine::{Machine, today};
use daisy_eval::bench::record::Record;
use daisy_eval::bench::report::{self, About};
use daisy_eval::bench::summary::Summary;
use daisy_eval::bench::{cpu, micro};
use daisy_tests::builder::{binary_directory, program_exists};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Measures daisy by itself and beside nftables, HAProxy and plain forwarding.
#[derive(Parser)]
struct Arguments {
    /// A short run that shows that all of it works. Its figures are not worth much.
    #[arg(long)]
    quick: bool,
    /// Only these parts, separated by commas.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Only these contestants, separated by commas: kernel, nftables, haproxy, daisy_af_packet, daisy_af_xdp,
    /// daisy_xdp.
    #[arg(long, value_delimiter = ',')]
    contestants: Vec<Contestant>,
    /// Where the run is written; if not said, eval/runs/<date>-<machine> for a whole run, else target/daisy-bench/last.
    #[arg(long)]
    output: Option<PathBuf>,
    /// Measure nothing: rewrite the table in README.md from the run in this directory.
    #[arg(long, value_name = "RUN")]
    readme: Option<PathBuf>,
}

/// More than this of the balancer's CPU in use while nothing is measured is said.
const QUIET: f64 = 0.05;

const PARTS: [Part; 6] = [Part::Micro, Part::Small, Part::Real, Part::Scaling, Part::Memory, Part::Flood];

const WHOLE: (Effort, micro::Effort) = (
    Effort {
        rounds: 4,
        real_rounds: 3,
        wire: Duration::from_secs(1),
        real: Duration::from_secs(2),
        latency: Duration::from_secs(3),
        flows: &[1 << 10, 1 << 15, 1 << 18, 1 << 20],
        connections: &[1_000, 8_000, 30_000, 60_000],
        flood: Duration::from_secs(12),
    },
    micro::Effort {
        pipeline_s: (0.5, 2.0),
        samples: 20,
        filter: "^(pipeline|floor)/",
        packets: 100_000,
        counted: &["64ki_1mi_closed_gue", "64ki_1mi_open_gue", "1mi_1mi_closed_gue"],
    },
);

const QUICK: (Effort, micro::Effort) = (
    Effort {
        rounds: 1,
        real_rounds: 1,
        wire: Duration::from_millis(400),
        real: Duration::from_secs(1),
        latency: Duration::from_secs(1),
        flows: &[1 << 10, 1 << 15],
        connections: &[1_000, 4_000],
        flood: Duration::from_secs(2),
    },
    micro::Effort {
        pipeline_s: (0.1, 0.3),
        samples: 10,
        filter: "^(pipeline/.*_1mi_closed_gue|floor/1mi)$",
        packets: 20_000,
        counted: &["64ki_1mi_closed_gue"],
    },
);

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("daisy-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Returns whether everything was measured.
fn run(arguments: &Arguments) -> Result<bool> {
    if let Some(run) = &arguments.readme {
        rewrite_readme(run)?;
        return Ok(true);
    }
    let begun = Instant::now();
    let contestants = cases::chosen(&arguments.contestants);
    check(&contestants)?;
    let machine = Machine::this()?;
    // What we start begins here, on the CPU of the others; a balancer is moved to its own.
    cpu::pin(0, cpu::OTHERS)?;
    let whole = arguments.only.is_empty() && !arguments.quick && contestants.len() == Contestant::ALL.len();
    let directory = match &arguments.output {
        Some(directory) => directory.clone(),
        None if whole => free_run(&format!("{}-{}", today(), machine.slug())),
        None => PathBuf::from("target/daisy-bench/last"),
    };
    std::fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    let scratch = cases::scratch(&binary_directory()?)?;

    let strangers = cpu::share_of_strangers(cpu::BALANCER, Duration::from_secs(1))?;
    if strangers > QUIET {
        eprintln!(
            "daisy-bench: NOT QUIET: others use {:.0} % of the balancer's CPU; figures are worth little",
            100.0 * strangers
        );
    }
    let (effort, micro_effort) = if arguments.quick { QUICK } else { WHOLE };
    let mut summary = Summary::default();
    summary.set("strangers_cpu_share", strangers)?;
    let mut runner = Runner {
        contestants: &contestants,
        effort,
        scratch: scratch.clone(),
        record: Record::default(),
        failed: Vec::new(),
    };
    for part in PARTS.into_iter().filter(|part| arguments.only.is_empty() || arguments.only.contains(part)) {
        println!("=== {part:?}, after {} s", begun.elapsed().as_secs());
        match part {
            Part::Micro => {
                micro::run(micro_effort, machine.cpus, &directory, &mut summary, &mut runner.failed)?
            }
            _ => runner.run(part),
        }
    }
    let Runner { record, mut failed, .. } = runner;
    record.write(&directory, &mut summary)?;
    report::derive(&mut summary)?;
    if arguments.only.is_empty() {
        failed.extend(summary.missing().into_iter().map(|key| format!("summary.json lacks {key}")));
    }
    report::draw(&directory, &record, &summary)?;
    let put = |name: &str, text: String| {
        let file = directory.join(name);
        std::fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))
    };
    put("summary.json", summary.to_json()?)?;
    let command = if whole { "make bench" } else { "daisy-bench, not a whole run" };
    let about = About {
        machine: &machine,
        date: &today(),
        command,
        rounds: (effort.rounds, effort.real_rounds),
        failed: &failed,
    };
    let text = report::readme(&summary, &about);
    put("README.md", text.clone())?;
    println!("\n{text}\n{}, after {} s", directory.display(), begun.elapsed().as_secs());
    for line in &failed {
        eprintln!("daisy-bench: NOT MEASURED: {line}");
    }
    if failed.is_empty() {
        std::fs::remove_dir_all(&scratch).with_context(|| scratch.display().to_string())?;
    } else {
        eprintln!("daisy-bench: logs are in {}", scratch.display());
    }
    Ok(failed.is_empty())
}

/// What would go wrong later, said in one line each.
fn check(contestants: &[Contestant]) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("needs root: network namespaces and eBPF programs are made; run this as root");
    }
    cpu::check()?;
    let common = [("ip", "iproute2"), ("ethtool", "ethtool"), ("iperf3", "iperf3"), ("valgrind", "valgrind")];
    for (program, package) in common.into_iter().chain(contestant::programs(contestants)) {
        if !program_exists(program) {
            bail!("the program `{program}` is missing: apt-get install {package}, or run `make setup-bench`");
        }
    }
    // Tens of thousands of connections are held at both ends. What we start inherits it. Not everybody may have more
    // than was given: then there are fewer connections, and the run says how many.
    let (_, given) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let wanted = given.max(1 << 20);
    if setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted).is_err() {
        setrlimit(Resource::RLIMIT_NOFILE, given, given).context("cannot raise the limit of open files")?;
    }
    Ok(())
}

/// The directory of a run: of several in a day, each has its own.
fn free_run(name: &str) -> PathBuf {
    let runs = Path::new("eval/runs");
    let numbered = (2..).map(|n| runs.join(format!("{name}-{n}")));
    std::iter::once(runs.join(name))
        .chain(numbered)
        .find(|directory| !directory.exists())
        .unwrap_or_else(|| runs.join(name))
}

fn rewrite_readme(run: &Path) -> Result<()> {
    let file = run.join("summary.json");
    let text = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    let summary = Summary::from_json(&text).with_context(|| file.display().to_string())?;
    let readme = std::fs::read_to_string("README.md").context("README.md: run this where the project is")?;
    let shown = run.display().to_string();
    let new = report::with_block(&readme, &summary, shown.trim_end_matches('/'))?;
    std::fs::write("README.md", new).context("cannot write README.md")?;
    println!("README.md has the table of {}", run.display());
    Ok(())
}
