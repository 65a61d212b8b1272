//! What is made of a summary: the run's README, the table in the project's README, the plots.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

use super::contestant::Contestant;
use super::machine::Machine;
use super::record::Record;
use super::stats::Spread;
use super::summary::{BARS, Summary, human, table};

const BLOCK_START: &str = "<!-- bench: written by daisy-bench --readme -->";
const BLOCK_END: &str = "<!-- /bench -->";

/// A figure that is shown for each contestant.
struct Column {
    head: &'static str,
    metric: &'static str,
    case: &'static str,
}

const fn column(head: &'static str, metric: &'static str, case: &'static str) -> Column {
    Column { head, metric, case }
}

impl Column {
    fn key(&self, contestant: Contestant) -> String {
        let point = if self.case.is_empty() { "" } else { "." };
        format!("{}.{contestant}{point}{}", self.metric, self.case)
    }

    fn cell(&self, summary: &Summary, contestant: Contestant) -> String {
        summary.get(&self.key(contestant)).map_or("–".into(), human)
    }
}

const FORWARDED: [Column; 4] = [
    column("60-byte frames, 1 Ki flows", "forwarded_pps_per_cpu_s", "small_1ki"),
    column("64 Ki flows", "forwarded_pps_per_cpu_s", "small"),
    column("1 Mi flows", "forwarded_pps_per_cpu_s", "small_1mi"),
    column("new connections", "forwarded_pps_per_cpu_s", "connections"),
];
const CONNECTIONS: [Column; 6] = [
    column("connections/s", "connections_per_s", ""),
    column("per CPU-s", "connections_per_cpu_s", ""),
    column("bulk up, Gbit/s", "gbit_per_s", "bulk_up"),
    column("CPU", "cpu_share", "bulk_up"),
    column("bulk down, Gbit/s", "gbit_per_s", "bulk_down"),
    column("CPU", "cpu_share", "bulk_down"),
];
const LATENCY: [Column; 6] = [
    column("p50, µs", "latency_us", "requests.p50"),
    column("p99", "latency_us", "requests.p99"),
    column("p99.9", "latency_us", "requests.p99_9"),
    column("added: p50", "added_latency_us", "requests.p50"),
    column("p99", "added_latency_us", "requests.p99"),
    column("p99.9", "added_latency_us", "requests.p99_9"),
];
const SCALING: [Column; 3] = [
    column("packets/s, 1 core", "chain_pps", "1"),
    column("2 cores", "chain_pps", "2"),
    column("times", "scaling", "1_to_2"),
];
const FLOOD: [Column; 7] = [
    column("live connections broken", "flood_broken", ""),
    column("stalls", "flood_stalls", ""),
    column("longest wait, ms", "flood_worst_ms", ""),
    column("messages/s", "flood_messages_per_s", ""),
    column("new requests answered", "flood_new_answered", ""),
    column("failed", "flood_new_failed", ""),
    column("conntrack entries", "flood_conntrack_entries", ""),
];
/// What the project's README shows.
const FRONT: [Column; 5] = [
    column("packets per CPU-second, 60-byte frames", "forwarded_pps_per_cpu_s", "small"),
    column("connections per CPU-second", "connections_per_cpu_s", ""),
    column("latency p99, µs", "latency_us", "requests.p99"),
    column("from 1 to 2 cores", "scaling", "1_to_2"),
    column("waits over 1.5 s in a SYN flood", "flood_stalls", ""),
];

/// Adds what follows from the figures: ratios to plain forwarding, added latency, scaling, whether bars hold.
///
/// # Errors
/// If a figure is no number.
pub fn derive(summary: &mut Summary) -> Result<()> {
    let floor = Contestant::Kernel;
    for contestant in Contestant::ALL {
        for case in ["small_1ki", "small", "small_1mi"] {
            let key = |who| format!("forwarded_pps_per_cpu_s.{who}.{case}");
            if let (Some(own), Some(of_floor)) = (summary.get(&key(contestant)), summary.get(&key(floor))) {
                summary.set(format!("ratio.{contestant}_to_kernel.{case}"), own / of_floor)?;
            }
        }
        for name in ["p50", "p99", "p99_9"] {
            let key = |who| format!("latency_us.{who}.requests.{name}");
            if let (Some(own), Some(of_floor)) = (summary.get(&key(contestant)), summary.get(&key(floor))) {
                summary.set(format!("added_latency_us.{contestant}.requests.{name}"), own - of_floor)?;
            }
        }
        let chains = |cores: u8| summary.get(&format!("chain_pps.{contestant}.{cores}"));
        if let (Some(one), Some(two)) = (chains(1), chains(2)) {
            summary.set(format!("scaling.{contestant}.1_to_2"), two / one)?;
        }
    }
    summary.judge()
}

fn by_contestant(summary: &Summary, columns: &[Column]) -> Option<String> {
    let heads: Vec<&str> = std::iter::once("").chain(columns.iter().map(|column| column.head)).collect();
    let rows: Vec<Vec<String>> = Contestant::ALL
        .into_iter()
        .filter(|one| columns.iter().any(|column| summary.get(&column.key(*one)).is_some()))
        .map(|one| {
            let cells = columns.iter().map(|column| column.cell(summary, one));
            std::iter::once(one.name().to_owned()).chain(cells).collect()
        })
        .collect();
    (!rows.is_empty()).then(|| table(&heads, &rows))
}

fn bars(summary: &Summary) -> Option<String> {
    let rows: Vec<Vec<String>> = BARS
        .iter()
        .filter_map(|bar| {
            let value = bar.value(summary)?;
            let holds = if value <= bar.most {
                "holds".to_owned()
            } else {
                format!("misses by {:.0} %", 100.0 * (value / bar.most - 1.0))
            };
            Some(vec![bar.what.to_owned(), human(value), human(bar.most), holds])
        })
        .collect();
    (!rows.is_empty()).then(|| table(&["", "measured", "at most", ""], &rows))
}

fn memory(summary: &Summary) -> Option<String> {
    let mut rows = Vec::new();
    for contestant in Contestant::ALL {
        let mut found: Vec<(u64, f64)> = summary
            .matching(&format!("memory_bytes.{contestant}.*"))
            .into_iter()
            .filter_map(|(key, bytes)| Some((key.rsplit('.').next()?.parse().ok()?, bytes)))
            .collect();
        found.sort_by_key(|(flows, _)| *flows);
        for (flows, bytes) in found {
            let of = |metric: &str| summary.get(&format!("{metric}.{contestant}.{flows}"));
            let known = of("known_flows").map_or("–".into(), human);
            let share = of("forwarded_share").map_or("–".into(), |share| format!("{:.1} %", 100.0 * share));
            rows.push(vec![
                contestant.name().into(),
                human(flows as f64),
                format!("{:.2}", bytes / 1048576.0),
                known,
                share,
            ]);
        }
    }
    let heads = ["", "flows", "MiB", "flows that it knows", "packets of new flows forwarded"];
    (!rows.is_empty()).then(|| table(&heads, &rows))
}

/// What stands around the figures.
pub struct About<'a> {
    /// Where.
    pub machine: &'a Machine,
    /// When.
    pub date: &'a str,
    /// How.
    pub command: &'a str,
    /// Rounds with frames, and with real connections.
    pub rounds: (usize, usize),
    /// What was not measured.
    pub failed: &'a [String],
}

/// The run's README.
pub fn readme(summary: &Summary, about: &About<'_>) -> String {
    let About { machine, date, command, rounds: (rounds, real_rounds), failed } = about;
    let kind = if machine.virtual_machine { "virtual machine" } else { "machine" };
    let mut text = format!(
        "# `{command}`, {date}\n\n{kind} with {} CPUs ({}), {} GiB, {}. Everything, generator, network, balancer and \
         servers, in network namespaces on that machine. Medians of {rounds} interleaved rounds with frames and {real_rounds} with \
         connections; each figure of each \
         round in the `.csv` files, least and most in `spread.csv`, medians in `summary.json`.\n",
        machine.cpus, machine.processor, machine.memory_gib, machine.kernel
    );
    if let Some(share) = summary.get("strangers_cpu_share") {
        let _ = write!(
            text,
            "\nBefore the run, with nothing to do, CPU 1 was {:.1} % busy: so much noise is in figures of CPU time.\n",
            100.0 * share
        );
    }
    let mut part = |title: &str, words: &str, table: Option<String>| {
        if let Some(table) = table {
            let _ = write!(text, "\n## {title}\n\n{words}\n\n{table}");
        }
    };
    part(
        "Bars",
        "Each in nanoseconds, the least of many samples; instructions and all other cases in `summary.json`.",
        bars(summary),
    );
    part(
        "Packets forwarded per second of CPU time",
        "One balancer with a CPU of its own: receive processing of its interface in a kernel thread (threaded NAPI) on \
         CPU 1, its process there too; everything else on CPU 0. A CPU-second is a second in which CPU 1 was not idle \
         (and not taken by the hypervisor): soft interrupts, kernel threads and processes count alike, which figures by \
         process would not. Frames are headers of established-looking connections, made by XDP programs that keep at \
         most 192 under way, so that each balancer is busy and no queue overflows; a sink at the same link counts what \
         comes back, and both are on CPU 0. The last column is packets of clients that open and close connections. \
         HAProxy forwards no packets of others' connections, so it has a figure there only.",
        by_contestant(summary, &FORWARDED),
    );
    part(
        "Real connections",
        "32 connections at a time: connect, be greeted, close. iperf3 with one connection, segments of 1,500 bytes from the \
         client, the share of a CPU that the balancer took. Clients, router and servers share CPU 0, and are what \
         bounds connections and bytes where the balancer's CPU is not full. Behind daisy and behind plain forwarding \
         replies go from the server to the client directly.",
        by_contestant(summary, &CONNECTIONS),
    );
    part(
        "Latency",
        "1,000 requests a second of 64 bytes over 64 established connections, from when a request was due until its reply \
         was complete. Added: beyond plain forwarding.",
        by_contestant(summary, &LATENCY),
    );
    part(
        "From one core to two",
        "Generator, balancer and sink all on one core, then such a chain on each of two cores, each with a queue of the \
         interface: what is shown is whether cores get in each other's way.",
        by_contestant(summary, &SCALING),
    );
    part(
        "Memory by flows",
        "daisy: resident pages of the mux and memory of its eBPF maps. nftables: growth of the kernel's slabs, at least the \
         entries of connection tracking; its limit is the kernel's default. HAProxy: resident pages, kernel objects of its \
         sockets, socket queues; real connections, as many as could be opened.",
        memory(summary),
    );
    part(
        "SYN flood",
        "40,000 SYNs a second from random addresses in 198.18.0.0/15 to the service, while 1,000 connections exchange a \
         message every half second and 50 new requests a second are made. A stall is a wait for a reply of more than 1.5 s.",
        by_contestant(summary, &FLOOD),
    );
    if !failed.is_empty() {
        text += "\n## Not measured\n\n";
        for line in *failed {
            let _ = writeln!(text, "- {}", line.replace('\n', " "));
        }
    }
    text
}

/// The project's README with its table made anew from a run.
///
/// # Errors
/// If it has no marked block.
pub fn with_block(readme: &str, summary: &Summary, run: &str) -> Result<String> {
    let missing = || format!("README.md has no lines `{BLOCK_START}` and `{BLOCK_END}` in this order");
    let (before, rest) = readme.split_once(BLOCK_START).with_context(missing)?;
    let (_, after) = rest.split_once(BLOCK_END).with_context(missing)?;
    let table = by_contestant(summary, &FRONT).unwrap_or_default();
    let bars = bars(summary).unwrap_or_default();
    Ok(format!(
        "{before}{BLOCK_START}\n`make bench`, one run, everything on one machine ([{run}]({run})):\n\n{table}\n{bars}{BLOCK_END}{after}"
    ))
}

// ---- plots ---------------------------------------------------------------------------------------------------

const COLOURS: [RGBColor; 6] = [
    RGBColor(0x88, 0x88, 0x88),
    RGBColor(0xc0, 0x39, 0x2b),
    RGBColor(0xd6, 0x89, 0x10),
    RGBColor(0x7f, 0xb0, 0x8f),
    RGBColor(0x3f, 0x93, 0x68),
    RGBColor(0x1b, 0x6f, 0x4f),
];

/// A panel of bars: the rounds' median, and a line from least to most.
struct Panel {
    title: &'static str,
    metric: &'static str,
    case: &'static str,
    /// What a figure is divided by before it is shown.
    unit: f64,
}

const PANELS: [Panel; 8] = [
    Panel {
        title: "Million packets per CPU-second, 64 Ki flows",
        metric: "forwarded_pps_per_cpu_s",
        case: "small",
        unit: 1e6,
    },
    Panel {
        title: "Thousand connections per CPU-second",
        metric: "connections_per_cpu_s",
        case: "",
        unit: 1e3,
    },
    Panel { title: "Latency p50, µs", metric: "latency_us", case: "requests.p50", unit: 1.0 },
    Panel { title: "Latency p99, µs", metric: "latency_us", case: "requests.p99", unit: 1.0 },
    Panel { title: "Bulk from the client, Gbit/s", metric: "gbit_per_s", case: "bulk_up", unit: 1.0 },
    Panel { title: "Bulk to the client, Gbit/s", metric: "gbit_per_s", case: "bulk_down", unit: 1.0 },
    Panel { title: "Million packets/s, chains on 1 core", metric: "chain_pps", case: "1", unit: 1e6 },
    Panel { title: "Million packets/s, chains on 2 cores", metric: "chain_pps", case: "2", unit: 1e6 },
];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws `comparison.svg` and `memory.svg`, of what there is.
///
/// # Errors
/// If a file cannot be written.
pub fn draw(directory: &Path, record: &Record, summary: &Summary) -> Result<()> {
    let file = directory.join("comparison.svg");
    let shown: Vec<(&Panel, Vec<(Contestant, Spread)>)> = PANELS
        .iter()
        .map(|panel| {
            let spreads = Contestant::ALL
                .into_iter()
                .filter_map(|one| Some((one, record.spread(one, panel.metric, panel.case)?)));
            (panel, spreads.collect::<Vec<_>>())
        })
        .filter(|(_, spreads)| !spreads.is_empty())
        .collect();
    if !shown.is_empty() {
        let rows = shown.len().div_ceil(2);
        let root = SVGBackend::new(&file, (1100, 240 * rows as u32)).into_drawing_area();
        draw_panels(&root, &shown, rows).map_err(|error| anyhow!("{}: {error}", file.display()))?;
    }
    let file = directory.join("memory.svg");
    if !summary.matching("memory_bytes.*.*").is_empty() {
        let root = SVGBackend::new(&file, (1100, 420)).into_drawing_area();
        draw_memory(&root, summary).map_err(|error| anyhow!("{}: {error}", file.display()))?;
    }
    Ok(())
}

fn draw_panels(root: &Area<'_>, shown: &[(&Panel, Vec<(Contestant, Spread)>)], rows: usize) -> Result<()> {
    root.fill(&WHITE)?;
    for (area, (panel, spreads)) in root.split_evenly((rows, 2)).iter().zip(shown) {
        let most =
            spreads.iter().map(|(_, spread)| spread.max).fold(f64::MIN_POSITIVE, f64::max) / panel.unit;
        let mut chart = ChartBuilder::on(area)
            .caption(panel.title, ("sans-serif", 16))
            .margin(10)
            .x_label_area_size(24)
            .build_cartesian_2d(0.0..most * 1.6, 0.0..spreads.len() as f64)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .disable_y_axis()
            .light_line_style(TRANSPARENT)
            .label_style(("sans-serif", 12))
            .draw()?;
        for (i, (contestant, spread)) in spreads.iter().enumerate() {
            let (low, high) = ((spreads.len() - i) as f64 - 0.85, (spreads.len() - i) as f64 - 0.15);
            let middle = f64::midpoint(low, high);
            let value = spread.median / panel.unit;
            let colour = colour(*contestant);
            chart.draw_series([Rectangle::new([(0.0, low), (value, high)], colour.filled())])?;
            let (least, most) = (spread.min / panel.unit, spread.max / panel.unit);
            chart.draw_series([PathElement::new(
                vec![(least, middle), (most, middle)],
                BLACK.stroke_width(1),
            )])?;
            let label = format!("  {contestant} {}", human(value));
            let style = ("sans-serif", 12).into_font().color(&BLACK);
            chart.draw_series([Text::new(label, (most.max(value), middle + 0.2), style)])?;
        }
    }
    root.present()?;
    Ok(())
}

fn draw_memory(root: &Area<'_>, summary: &Summary) -> Result<()> {
    root.fill(&WHITE)?;
    let lines: Vec<(Contestant, Vec<(f64, f64)>)> = Contestant::ALL
        .into_iter()
        .filter_map(|one| {
            let mut points: Vec<(f64, f64)> = summary
                .matching(&format!("memory_bytes.{one}.*"))
                .into_iter()
                .filter_map(|(key, bytes)| Some((key.rsplit('.').next()?.parse().ok()?, bytes / 1048576.0)))
                .collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            (!points.is_empty()).then_some((one, points))
        })
        .collect();
    let all = || lines.iter().flat_map(|(_, points)| points);
    let most = all().map(|(_, bytes)| *bytes).fold(1.0, f64::max);
    let least = all().map(|(_, bytes)| *bytes).fold(most, f64::min).max(0.01);
    let flows = all().map(|(flows, _)| *flows).fold(2_048.0, f64::max);
    let mut chart = ChartBuilder::on(root)
        .caption("Memory by flows, MiB", ("sans-serif", 17))
        .margin(10)
        .x_label_area_size(36)
        .y_label_area_size(60)
        .build_cartesian_2d((1_000.0..flows * 1.2).log_scale(), (least / 2.0..most * 2.0).log_scale())?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc("flows")
        .x_label_formatter(&|value| human(value.round()))
        .y_label_formatter(&|value| human(*value))
        .label_style(("sans-serif", 12))
        .draw()?;
    for (contestant, points) in lines {
        let colour = colour(contestant);
        chart.draw_series(points.iter().map(|point| Circle::new(*point, 3, colour.filled())))?;
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
            .label(contestant.name())
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 16, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .label_font(("sans-serif", 12))
        .draw()?;
    root.present()?;
    Ok(())
}

fn colour(contestant: Contestant) -> RGBColor {
    let index = Contestant::ALL.iter().position(|one| *one == contestant).unwrap_or(0);
    COLOURS[index]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled() -> Summary {
        let mut summary = Summary::default();
        for (key, value) in [
            ("forwarded_pps_per_cpu_s.kernel.small", 1_000_000.0),
            ("forwarded_pps_per_cpu_s.daisy_xdp.small", 3_000_000.0),
            ("latency_us.kernel.requests.p50", 50.0),
            ("latency_us.daisy_xdp.requests.p50", 60.0),
            ("chain_pps.daisy_xdp.1", 2.0),
            ("chain_pps.daisy_xdp.2", 3.8),
            ("memory_bytes.daisy_xdp.1024", 4_000_000.0),
            ("floor_ns", 10.0),
            ("pipeline_ns_64ki", 21.0),
        ] {
            summary.set(key, value).unwrap();
        }
        derive(&mut summary).unwrap();
        summary
    }

    #[test]
    fn what_follows_from_figures_is_added() {
        let summary = filled();
        assert_eq!(summary.get("ratio.daisy_xdp_to_kernel.small"), Some(3.0));
        assert_eq!(summary.get("added_latency_us.daisy_xdp.requests.p50"), Some(10.0));
        assert_eq!(summary.get("scaling.daisy_xdp.1_to_2"), Some(1.9));
        assert_eq!(summary.get("holds.pipeline_64ki_to_floor"), Some(0.0));
    }

    #[test]
    fn the_block_in_the_readme_is_replaced_and_nothing_else() {
        let readme = format!("before\n{BLOCK_START}\nold\n{BLOCK_END}\nafter\n");
        let once = with_block(&readme, &filled(), "eval/runs/x").unwrap();
        assert!(once.starts_with("before\n") && once.ends_with("\nafter\n"), "{once}");
        assert!(once.contains("| daisy_xdp | 3,000,000 |") && !once.contains("old"), "{once}");
        assert_eq!(with_block(&once, &filled(), "eval/runs/x").unwrap(), once);
        assert!(with_block("nothing", &filled(), "x").is_err());
    }

    #[test]
    fn a_run_tells_what_it_has_and_what_failed() {
        let machine = Machine {
            processor: "Some CPU".into(),
            cpus: 2,
            memory_gib: 4,
            kernel: "Linux 6.1.0".into(),
            virtual_machine: true,
        };
        let failed = ["small: daisy_xdp: not there".to_owned()];
        let about = About {
            machine: &machine,
            date: "2026-01-01",
            command: "make bench",
            rounds: (3, 2),
            failed: &failed,
        };
        let text = readme(&filled(), &about);
        for wanted in ["Some CPU", "misses by 5 %", "## Not measured", "daisy_xdp: not there", "| 3.81 |"] {
            assert!(text.contains(wanted), "{wanted}: {text}");
        }
        assert!(!text.contains("## SYN flood"));
    }

    #[test]
    fn plots_are_drawn_of_what_there_is() {
        let directory = std::env::temp_dir().join(format!("daisy-report-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let mut record = Record::default();
        record.of("small", Contestant::Kernel, 0).note("forwarded_pps_per_cpu_s", "small", 2e6);
        draw(&directory, &record, &filled()).unwrap();
        for name in ["comparison.svg", "memory.svg"] {
            assert!(std::fs::read_to_string(directory.join(name)).unwrap().contains("</svg>"), "{name}");
        }
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
