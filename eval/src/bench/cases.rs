//! What is compared: each case says what is done and what is noted. How it is measured stands elsewhere.
//!
//! Rounds are interleaved: every contestant in turn, then all again, so that what the machine does meanwhile meets all
//! of them. Contestants' networks stand all the time; the idle ones cost next to nothing.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use daisy_tests::EchoOptions;
use daisy_tests::topology::{ECHO, WEB};
use serde_json::Value;

use super::contestant::{self, Contestant};
use super::cpu::{self, Watch};
use super::load;
use super::memory;
use super::network::{BULK, Network};
use super::record::Record;
use super::stats::percentile;
use super::wire::{Layout, Wire};

/// A part of the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// Nanoseconds and instructions of pipelines.
    Micro,
    /// Packets per second of CPU time, 60-byte frames.
    Small,
    /// Connections per second, bulk transfer, latency: real connections.
    Real,
    /// From one core to two.
    Scaling,
    /// Memory by flows.
    Memory,
    /// SYNs from spoofed addresses while connections live.
    Flood,
}

/// How much of each.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Rounds with frames on the wire.
    pub rounds: usize,
    /// Rounds with real connections.
    pub real_rounds: usize,
    /// How long packets are forwarded in a round.
    pub wire: Duration,
    /// How long connections are opened, or bytes sent.
    pub real: Duration,
    /// How long requests are sent for latencies.
    pub latency: Duration,
    /// Flows for memory, powers of two.
    pub flows: &'static [u32],
    /// Connections through a proxy for memory.
    pub connections: &'static [usize],
    /// How long a flood lasts.
    pub flood: Duration,
}

/// Flows in the cases of small packets, and their names.
pub const SMALL: [(u32, &str); 3] = [(1 << 10, "small_1ki"), (1 << 16, "small"), (1 << 20, "small_1mi")];
/// Connections that are opened at the same time.
const OPEN_AT_ONCE: usize = 32;
/// Connections over which requests are sent, and how many a second: moderate load.
const TALKING: usize = 64;
const REQUESTS_PER_SECOND: u32 = 1_000;
/// Live connections in a flood, SYNs a second, new connections a second.
const LIVE: usize = 1_000;
const SYNS_PER_SECOND: u32 = 40_000;
const NEW_PER_SECOND: u32 = 50;

/// Measures, and notes what fails.
pub struct Runner<'a> {
    /// Who takes part.
    pub contestants: &'a [Contestant],
    /// How much.
    pub effort: Effort,
    /// Logs and configurations of what runs.
    pub scratch: PathBuf,
    /// What was measured.
    pub record: Record,
    /// What was not, and why.
    pub failed: Vec<String>,
}

impl Runner<'_> {
    /// Runs a part.
    pub fn run(&mut self, part: Part) {
        match part {
            Part::Micro => {}
            Part::Small => self.small(),
            Part::Real => self.real(),
            Part::Scaling => self.scaling(),
            Part::Memory => self.memory(),
            Part::Flood => self.flood(),
        }
    }

    /// Keeps what succeeds; what fails is said at once, and again in the end.
    fn keep<T>(&mut self, what: &str, result: Result<T>) -> Option<T> {
        result
            .map_err(|error| {
                eprintln!("FAILED: {what}: {error:#}");
                self.failed.push(format!("{what}: {error:#}"));
            })
            .ok()
    }

    fn wires(&mut self, layout: Layout, what: &str) -> Vec<Wire> {
        let mut wires = Vec::new();
        for contestant in self.contestants.iter().copied().filter(|one| one.forwards()) {
            let directory = self.scratch.join(format!("{what}-{contestant}"));
            let wire = Wire::new(contestant, layout, directory);
            wires.extend(self.keep(&format!("{what}: {contestant}"), wire));
        }
        wires
    }

    // ---- on the wire ---------------------------------------------------------------------------------------

    fn small(&mut self) {
        let wires = self.wires(Layout::Apart, "small");
        let limit = memory::conntrack_most().unwrap_or(0);
        for round in 0..self.effort.rounds {
            for wire in &wires {
                for (flows, case) in SMALL {
                    let who = wire.contestant;
                    // More flows than connection tracking may know are not forwarded but refused: see memory.
                    if who == Contestant::Nftables && u64::from(flows) > limit {
                        continue;
                    }
                    let found = wire.forward(flows, self.effort.wire);
                    let Some(found) = self.keep(&format!("{case}: {who}"), found) else { continue };
                    let lost = found.count.sent.saturating_sub(found.count.arrived);
                    println!(
                        "{case:<10} round {round} {who:<16} {:>10.0} packets/s, CPU {:>3.0} %, {:>10.0} packets per CPU-s, \
                         {lost} lost or under way",
                        found.per_second(),
                        100.0 * found.busy_s / found.wall_s,
                        found.per_cpu_second()
                    );
                    let mut noter = self.record.of("small", who, round);
                    noter.note("forwarded_pps_per_cpu_s", case, found.per_cpu_second());
                    noter.note("forwarded_pps", case, found.per_second());
                    noter.note("cpu_share", case, found.busy_s / found.wall_s);
                    noter.note("lost_packets", case, lost as f64);
                }
            }
        }
    }

    fn scaling(&mut self) {
        for cores in [1, 2] {
            let wires = self.wires(Layout::Chains(cores), &format!("scaling-{cores}"));
            let case = format!("scaling.{cores}");
            for round in 0..self.effort.rounds {
                for wire in &wires {
                    let found = wire.forward(1 << 16, self.effort.wire);
                    let Some(found) = self.keep(&format!("{case}: {}", wire.contestant), found) else {
                        continue;
                    };
                    println!(
                        "{case:<10} round {round} {:<16} {:>10.0} packets/s, {} sent, {} arrived of {:.0} bytes",
                        wire.contestant,
                        found.per_second(),
                        found.count.sent,
                        found.count.arrived,
                        found.count.bytes as f64 / found.count.arrived as f64
                    );
                    let mut noter = self.record.of("scaling", wire.contestant, round);
                    noter.note("chain_pps", &cores.to_string(), found.per_second());
                }
            }
        }
    }

    fn memory(&mut self) {
        for contestant in self.contestants.iter().copied() {
            match contestant {
                // It knows no flows and no services: there is nothing to measure.
                Contestant::Kernel => {}
                Contestant::Haproxy => {
                    let result = self.memory_of_connections(contestant);
                    self.keep(&format!("memory: {contestant}"), result);
                }
                _ => {
                    let result = self.memory_of_flows(contestant);
                    self.keep(&format!("memory: {contestant}"), result);
                }
            }
        }
    }

    fn memory_of_flows(&mut self, contestant: Contestant) -> Result<()> {
        let directory = self.scratch.join(format!("memory-{contestant}"));
        let wire = Wire::new(contestant, Layout::Apart, directory)?;
        for flows in self.effort.flows.iter().copied() {
            let arrived = wire.visit(flows)?;
            self.note_memory(contestant, u64::from(flows), wire.memory()?);
            let share = (arrived as f64 / f64::from(flows)).min(1.0);
            self.record.of("memory", contestant, 0).note("forwarded_share", &flows.to_string(), share);
            println!(
                "memory      {contestant:<16} {:.1} % of {flows} flows' packets forwarded",
                100.0 * share
            );
        }
        Ok(())
    }

    fn memory_of_connections(&mut self, contestant: Contestant) -> Result<()> {
        let network = Network::new(contestant, &self.scratch.join("memory"))?;
        let most = contestant::proxied_most()?;
        let mut counts: Vec<usize> = self.effort.connections.iter().map(|count| (*count).min(most)).collect();
        counts.dedup();
        for count in counts {
            let held = network.as_client(|| load::hold(ECHO, count))?;
            self.note_memory(contestant, held.open as u64, network.guest_memory()?);
        }
        Ok(())
    }

    fn note_memory(&mut self, contestant: Contestant, flows: u64, found: memory::Memory) {
        println!(
            "memory      {contestant:<16} {flows:>8} flows {:>12} bytes, knows {}",
            found.bytes, found.entries
        );
        let (case, mut noter) = (flows.to_string(), self.record.of("memory", contestant, 0));
        noter.note("memory_bytes", &case, found.bytes as f64);
        noter.note("known_flows", &case, found.entries as f64);
    }

    // ---- real connections ----------------------------------------------------------------------------------

    fn real(&mut self) {
        let mut networks = Vec::new();
        for contestant in self.contestants.iter().copied() {
            let network = Network::new(contestant, &self.scratch.join("real"));
            networks.extend(self.keep(&format!("network: {contestant}"), network));
        }
        for round in 0..self.effort.real_rounds {
            for network in &networks {
                let who = network.contestant;
                for (what, result) in [
                    ("connections", self.connections(network, round)),
                    ("requests", self.requests(network, round)),
                    ("bulk_up", self.bulk(network, round, false)),
                    ("bulk_down", self.bulk(network, round, true)),
                ] {
                    self.keep(&format!("{what}: {who}"), result);
                }
            }
        }
    }

    fn connections(&mut self, network: &Network, round: usize) -> Result<()> {
        let time = self.effort.real;
        let (opened, cost) =
            measured(network, || network.as_client(|| load::open_and_close(ECHO, OPEN_AT_ONCE, time)))?;
        let rate = opened.completed as f64 / cost.wall_s;
        println!(
            "connections round {round} {:<16} {rate:>8.0} a second, {} failed, CPU {:.1} us each",
            network.contestant,
            opened.failed,
            1e6 * cost.busy_s / opened.completed as f64
        );
        let mut noter = self.record.of("connections", network.contestant, round);
        noter.note("connections_per_s", "", rate);
        noter.note("connections_failed", "", opened.failed as f64);
        noter.note("connections_per_cpu_s", "", opened.completed as f64 / cost.busy_s);
        noter.note("forwarded_pps_per_cpu_s", "connections", cost.packets as f64 / cost.busy_s);
        Ok(())
    }

    fn requests(&mut self, network: &Network, round: usize) -> Result<()> {
        let time = self.effort.latency;
        let (mut replies, cost) = measured(network, || {
            network.as_client(|| load::request_and_reply(ECHO, TALKING, REQUESTS_PER_SECOND, time))
        })?;
        if replies.latencies_us.is_empty() {
            bail!("no replies");
        }
        let mut shown = String::new();
        for (name, share) in [("p50", 0.5), ("p99", 0.99), ("p99_9", 0.999)] {
            let value = percentile(&mut replies.latencies_us, share);
            shown += &format!(" {name} {value:.0} us");
            let mut noter = self.record.of("requests", network.contestant, round);
            noter.note("latency_us", &format!("requests.{name}"), value);
        }
        println!("requests    round {round} {:<16}{shown}, {} late", network.contestant, replies.late);
        let mut noter = self.record.of("requests", network.contestant, round);
        noter.note("requests_late", "", replies.late as f64);
        noter.note("forwarded_pps_per_cpu_s", "requests", cost.packets as f64 / cost.busy_s);
        Ok(())
    }

    fn bulk(&mut self, network: &Network, round: usize, down: bool) -> Result<()> {
        let (case, seconds) = (if down { "bulk_down" } else { "bulk_up" }, self.effort.real.as_secs().max(1));
        let (gbit, cost) = measured(network, || iperf(network, seconds, down))?;
        println!(
            "{case:<11} round {round} {:<16} {gbit:>6.2} Gbit/s, CPU {:.0} %",
            network.contestant,
            100.0 * cost.busy_s / cost.wall_s
        );
        let mut noter = self.record.of("bulk", network.contestant, round);
        noter.note("gbit_per_s", case, gbit);
        noter.note("cpu_share", case, cost.busy_s / cost.wall_s);
        // Downwards nothing but acknowledgements passes a balancer whose servers answer directly.
        if !down {
            noter.note("forwarded_pps_per_cpu_s", case, cost.packets as f64 / cost.busy_s);
        }
        Ok(())
    }

    // ---- a flood -------------------------------------------------------------------------------------------

    fn flood(&mut self) {
        for contestant in self.contestants.iter().copied() {
            let result = self.flood_on(contestant);
            self.keep(&format!("flood: {contestant}"), result);
        }
    }

    fn flood_on(&mut self, contestant: Contestant) -> Result<()> {
        let mut network = Network::new(contestant, &self.scratch.join("flood"))?;
        let options = EchoOptions { connections: LIVE, ..EchoOptions::default() };
        let mut echo = network.topology().echo(0, &options)?;
        echo.wait_live(LIVE)?;
        let calm = echo.talk(2)?;
        let new = network.topology().requests(0, WEB, NEW_PER_SECOND)?;
        let stop = AtomicBool::new(false);
        let time = self.effort.flood;
        let sent = std::thread::scope(|scope| {
            let flood = scope.spawn(|| network.flood(SYNS_PER_SECOND, &stop));
            std::thread::sleep(time);
            stop.store(true, Ordering::Relaxed);
            flood.join().map_err(|_| anyhow::anyhow!("the flood panicked"))?
        })?;
        let during = echo.latest();
        let totals = new.finish()?;
        let known = match contestant {
            Contestant::Nftables => memory::conntrack_count(network.balancer_host()?)?,
            _ => 0,
        };
        let report = echo.finish()?;
        println!(
            "flood {contestant:<16} {sent} SYNs: of {LIVE} live connections {} broken, {} stalls, longest wait {} ms; new ones: \
             {} answered, {} failed",
            report.broken, report.stalls, report.worst_ms, totals.ok, totals.failed
        );
        let seconds = time.as_secs_f64();
        let mut noter = self.record.of("flood", contestant, 0);
        for (metric, value) in [
            ("flood_syns_per_s", sent as f64 / seconds),
            ("flood_broken", report.broken as f64),
            ("flood_stalls", report.stalls as f64),
            ("flood_worst_ms", report.worst_ms as f64),
            ("flood_messages_per_s", during.messages.saturating_sub(calm.messages) as f64 / seconds),
            ("flood_new_answered", totals.ok as f64),
            ("flood_new_failed", totals.failed as f64),
            ("flood_conntrack_entries", known as f64),
        ] {
            noter.note(metric, "", value);
        }
        Ok(())
    }
}

/// What something cost the balancer.
struct Cost {
    busy_s: f64,
    wall_s: f64,
    /// Packets that clients sent.
    packets: u64,
}

fn measured<T>(network: &Network, work: impl FnOnce() -> Result<T>) -> Result<(T, Cost)> {
    let before = network.client_packets()?;
    let watch = Watch::start(cpu::BALANCER)?;
    let result = work()?;
    let (busy_s, wall_s) = watch.busy_and_wall()?;
    Ok((result, Cost { busy_s, wall_s, packets: network.client_packets()? - before }))
}

/// Gigabits per second, as the receiver counts them.
fn iperf(network: &Network, seconds: u64, down: bool) -> Result<f64> {
    let (address, port, time) = (BULK.ip().to_string(), BULK.port().to_string(), seconds.to_string());
    let mut arguments = vec!["--json", "--client", &address, "--port", &port, "--time", &time];
    arguments.extend(down.then_some("--reverse"));
    for _ in 0..50 {
        let text = network.topology().client(0).namespace.output("iperf3", &arguments)?;
        // It has not yet noticed that the run before is over, and turns us away or closes on us.
        if !["the server is busy", "control message"].iter().any(|sign| text.contains(sign)) {
            return received_gbit(&text);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    bail!("iperf3's server stays busy")
}

fn received_gbit(text: &str) -> Result<f64> {
    let report: Value = serde_json::from_str(text).context("iperf3")?;
    let bits = report["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(bits.with_context(|| format!("iperf3 reports no speed: {}", report["error"]))? / 1e9)
}

/// Contestants that are there, in order: those wanted, or all.
pub fn chosen(wanted: &[Contestant]) -> Vec<Contestant> {
    Contestant::ALL.into_iter().filter(|one| wanted.is_empty() || wanted.contains(one)).collect()
}

/// Where logs go while a run lasts.
///
/// # Errors
/// If the directory cannot be made.
pub fn scratch(binaries: &Path) -> Result<PathBuf> {
    let target = binaries.parent().context("the directory of binaries has no parent")?;
    let directory = target.join("daisy-bench").join(std::process::id().to_string());
    std::fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    Ok(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_receiver_counted_is_the_speed() {
        let text =
            r#"{"end": {"sum_sent": {"bits_per_second": 9e9}, "sum_received": {"bits_per_second": 2.5e9}}}"#;
        assert_eq!(received_gbit(text).unwrap(), 2.5);
        assert!(received_gbit(r#"{"error": "unable to connect"}"#).is_err());
    }
}
