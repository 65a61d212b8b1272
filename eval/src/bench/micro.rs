//! The small measurements: programs that others of the workspace have for their own parts, run and collected.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::cpu;
use super::stats::Spread;
use super::summary::Summary;

/// The case of the pipeline that the bars speak of, without the number of buckets.
const BAR_CASE: &str = "1mi_closed_gue";
const BAR_FLOOR: &str = "1mi";

/// How long to look.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Seconds for each case of the pipeline's benchmark: to warm up, and to measure.
    pub pipeline_s: (f64, f64),
    /// Samples of each case.
    pub samples: usize,
    /// Which cases: a regular expression.
    pub filter: &'static str,
    /// Packets for instruction counts.
    pub packets: u64,
    /// The cases whose instructions are counted.
    pub counted: &'static [&'static str],
}

/// Runs all of them. Each that fails is told to `failed`, and the others go on.
///
/// # Errors
/// If a figure is no number.
pub fn run(
    effort: Effort,
    cpus: usize,
    directory: &Path,
    summary: &mut Summary,
    failed: &mut Vec<String>,
) -> Result<()> {
    let binaries = daisy_tests::builder::binary_directory()?;
    let mut attempt = |what: &str, result: Result<()>| {
        if let Err(error) = result {
            failed.push(format!("{what}: {error:#}"));
        }
    };
    println!("micro: the mux's pipeline (cargo bench -p daisy-mux --bench pipeline)");
    attempt("pipeline benchmark", pipeline(effort, cpus, &binaries, directory, summary));
    println!("micro: instructions of the pipeline (valgrind --tool=callgrind)");
    attempt("pipeline instructions", instructions(effort, &binaries, summary));
    for (what, program) in [("XDP pipeline", "xdp_nanoseconds"), ("agent's program", "nanoseconds")] {
        println!("micro: {what} (target/release/examples/{program} --json)");
        attempt(what, example(&binaries, program, summary));
    }
    Ok(())
}

/// Runs a program to its end and returns what it printed to stdout and stderr.
fn output(command: &mut Command) -> Result<(String, String)> {
    let shown = format!("{command:?}").replace('"', "");
    let out = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start {shown}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&out.stdout), text(&out.stderr));
    if !out.status.success() {
        let lines: Vec<&str> = stderr.lines().rev().take(4).collect();
        bail!("{shown} failed ({}): {}", out.status, lines.into_iter().rev().collect::<Vec<_>>().join(" / "));
    }
    Ok((stdout, stderr))
}

fn pipeline(
    effort: Effort,
    cpus: usize,
    binaries: &Path,
    directory: &Path,
    summary: &mut Summary,
) -> Result<()> {
    let target = binaries.parent().context("the directory of binaries has no parent")?;
    let home = target.join("criterion");
    let (warm, measure) = effort.pipeline_s;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let bench = |words: &[&str]| {
        let mut command = Command::new(&cargo);
        command.args(["bench", "-p", "daisy-mux", "--bench", "pipeline"]).args(words);
        command.env("CARGO_TARGET_DIR", target).env("CRITERION_HOME", &home);
        output(&mut command)
    };
    // It is built on all CPUs, and measured on one.
    cpu::allow(cpus)?;
    let built = bench(&["--no-run"]);
    cpu::pin(0, cpu::OTHERS)?;
    built?;
    let begun = SystemTime::now();
    let (warm, measure, samples_wanted) = (warm.to_string(), measure.to_string(), effort.samples.to_string());
    let times = ["--warm-up-time", &warm, "--measurement-time", &measure, "--sample-size", &samples_wanted];
    bench(&[&["--", effort.filter, "--noplot"], &times[..]].concat())?;
    let mut rows = String::from("group,case,min_ns,median_ns\n");
    let mut found = 0;
    for (metric, group) in [("floor_ns", "floor"), ("pipeline_ns", "pipeline")] {
        for (case, nanoseconds) in samples(&home.join(group), begun)? {
            rows += &format!("{group},{case},{},{}\n", nanoseconds.min, nanoseconds.median);
            summary.set(format!("{metric}.{case}"), nanoseconds.min)?;
            summary.set(format!("{metric}_median.{case}"), nanoseconds.median)?;
            found += 1;
        }
    }
    std::fs::write(directory.join("pipeline.csv"), rows)?;
    for (key, from) in [
        ("floor_ns", format!("floor_ns.{BAR_FLOOR}")),
        ("pipeline_ns_64ki", format!("pipeline_ns.64ki_{BAR_CASE}")),
        ("pipeline_ns_1mi", format!("pipeline_ns.1mi_{BAR_CASE}")),
    ] {
        let value =
            summary.get(&from).with_context(|| format!("{found} cases were measured, but not {from}"))?;
        summary.set(key, value)?;
    }
    Ok(())
}

/// Nanoseconds per packet of all cases of a group, measured after `begun`: Criterion's `<case>/new/sample.json`.
fn samples(group: &Path, begun: SystemTime) -> Result<BTreeMap<String, Spread>> {
    let mut found = BTreeMap::new();
    let entries = std::fs::read_dir(group).with_context(|| group.display().to_string())?;
    for entry in entries.flatten() {
        let file: PathBuf = entry.path().join("new/sample.json");
        let fresh = file.metadata().and_then(|m| m.modified()).is_ok_and(|at| at >= begun);
        if fresh {
            let read = |file: &Path| -> Result<Value> {
                let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
                serde_json::from_str(&text).with_context(|| file.display().to_string())
            };
            let about = read(&entry.path().join("new/benchmark.json"))?;
            let spread = per_packet(&read(&file)?, &about).with_context(|| file.display().to_string())?;
            found.insert(entry.file_name().to_string_lossy().into_owned(), spread);
        }
    }
    Ok(found)
}

/// A sample is so many iterations in so many nanoseconds; an iteration may be a burst, whose packets Criterion knows
/// as its throughput.
fn per_packet(sample: &Value, about: &Value) -> Result<Spread> {
    let numbers =
        |name: &str| -> Option<Vec<f64>> { sample[name].as_array()?.iter().map(Value::as_f64).collect() };
    let (iterations, times) = (numbers("iters").context("iters")?, numbers("times").context("times")?);
    let packets = about["throughput"]["Elements"].as_f64().unwrap_or(1.0);
    let each: Vec<f64> = iterations.iter().zip(&times).map(|(n, ns)| ns / n / packets).collect();
    Spread::of(&each).context("no samples")
}

fn instructions(effort: Effort, binaries: &Path, summary: &mut Summary) -> Result<()> {
    let program = example_path(binaries, "pipeline_instructions")?;
    let count = |case: &str, packets: u64| -> Result<u64> {
        let mut command = Command::new("valgrind");
        command.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]).arg(&program).args([
            "--case",
            case,
            "--packets",
            &packets.to_string(),
        ]);
        collected(&output(&mut command)?.1)
    };
    for case in effort.counted {
        // What comes before and after the packets is the same in both.
        let (once, twice) = (count(case, effort.packets)?, count(case, 2 * effort.packets)?);
        let each = twice.saturating_sub(once) as f64 / effort.packets as f64;
        summary.set(format!("pipeline_instructions.{case}"), each)?;
        if *case == format!("64ki_{BAR_CASE}") {
            summary.set("pipeline_instructions_64ki", each)?;
        }
    }
    Ok(())
}

/// The instructions that callgrind says it has counted.
fn collected(text: &str) -> Result<u64> {
    let figure = text.lines().find_map(|line| line.split_once("Collected :"));
    let (_, figure) = figure.with_context(|| format!("callgrind counted nothing: {text}"))?;
    figure.trim().parse().with_context(|| format!("callgrind counted {figure:?}"))
}

fn example(binaries: &Path, name: &str, summary: &mut Summary) -> Result<()> {
    let (text, _) = output(Command::new(example_path(binaries, name)?).arg("--json"))?;
    for (key, value) in last_object(&text).with_context(|| format!("{name} --json"))? {
        summary.set(key, value)?;
    }
    Ok(())
}

fn example_path(binaries: &Path, name: &str) -> Result<PathBuf> {
    let path = binaries.join("examples").join(name);
    if !path.is_file() {
        bail!("{name} is not built: cargo build --release --workspace --examples");
    }
    Ok(path)
}

/// The last line: one flat object of numbers.
fn last_object(text: &str) -> Result<BTreeMap<String, f64>> {
    let line = text.lines().rfind(|line| !line.trim().is_empty()).context("nothing was printed")?;
    serde_json::from_str(line).with_context(|| format!("the last line is no flat object of numbers: {line}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_sample_is_time_by_iterations_by_packets() {
        let sample = json!({"sampling_mode": "Linear", "iters": [10.0, 20.0], "times": [64_000.0, 64_000.0]});
        let about = json!({"throughput": {"Elements": 64}});
        assert_eq!(per_packet(&sample, &about).unwrap(), Spread { median: 75.0, min: 50.0, max: 100.0 });
        assert_eq!(per_packet(&sample, &json!({"throughput": null})).unwrap().min, 3_200.0);
        assert!(per_packet(&json!({"iters": [], "times": []}), &about).is_err());
    }

    #[test]
    fn what_programs_print_is_read() {
        assert_eq!(collected("==1== Events    : Ir\n==1== Collected : 123456\n==1==\n").unwrap(), 123_456);
        assert!(collected("==1== nothing\n").is_err());
        let text = "a table\n{\"agent_closed_net_ns\": 41.5, \"agent_open_net_ns\": 99}\n\n";
        assert_eq!(last_object(text).unwrap()["agent_closed_net_ns"], 41.5);
        assert!(last_object("{\"a\": \"b\"}").is_err());
        assert!(last_object("").is_err());
    }
}
