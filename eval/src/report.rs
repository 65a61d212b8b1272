//! What a run of the scenario found, and the file that says so.

use std::fmt::Write as _;

use serde::Serialize;

/// One step of the scenario.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Step {
    /// What happened.
    pub name: String,
    /// Buckets that changed their head.
    pub moved_buckets: u64,
    /// Buckets with previous owners at the end of the step.
    pub open_windows: u64,
    /// Packets that agents sent on along a chain during the step.
    pub chained_packets: u64,
    /// Connections that broke during the step.
    pub broken: u64,
}

/// The state of a run at one moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Moment {
    /// Seconds since the connections were all open.
    pub at_s: f64,
    /// Long-lived connections that talk.
    pub live: u64,
    /// Connections and requests that have broken since the start.
    pub broken: u64,
    /// Packets sent on along chains since the start.
    pub chained_packets: u64,
    /// Buckets with previous owners.
    pub open_windows: u64,
}

/// One run of the scenario.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// Long-lived connections opened.
    pub connections: u64,
    /// Short HTTP requests answered.
    pub requests: u64,
    /// Long-lived connections that broke, and short requests that failed.
    pub broken: u64,
    /// Waits for a reply that were longer than a retransmission.
    pub stalls: u64,
    /// The steps in order.
    pub steps: Vec<Step>,
    /// The state over time.
    pub moments: Vec<Moment>,
    /// When each step began: seconds as in [`Moment::at_s`], and its name.
    pub marks: Vec<(f64, String)>,
}

/// `report.json`.
#[derive(Debug, Serialize)]
pub struct Report<'a> {
    connections: u64,
    requests: u64,
    broken: u64,
    stalls: u64,
    steps: &'a [Step],
    without_chaining: Without<'a>,
}

#[derive(Debug, Serialize)]
struct Without<'a> {
    connections: u64,
    requests: u64,
    broken: u64,
    steps: &'a [Step],
}

impl<'a> Report<'a> {
    /// The report on a run and its counterpart without chaining.
    pub fn new(with: &'a Run, without: &'a Run) -> Report<'a> {
        Report {
            connections: with.connections,
            requests: with.requests,
            broken: with.broken,
            stalls: with.stalls,
            steps: &with.steps,
            without_chaining: Without {
                connections: without.connections,
                requests: without.requests,
                broken: without.broken,
                steps: &without.steps,
            },
        }
    }
}

/// The table that the demo ends with.
pub fn table(with: &Run, without: &Run) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "{:<34} {:>14} {:>13} {:>16} {:>7}   {:>16}",
        "step", "moved buckets", "open windows", "chained packets", "broken", "without chaining"
    );
    for (i, step) in with.steps.iter().enumerate() {
        let other = without.steps.get(i).map_or("-".into(), |step| format!("{} broken", step.broken));
        let Step { name, moved_buckets, open_windows, chained_packets, broken } = step;
        let _ = writeln!(
            text,
            "{name:<34} {moved_buckets:>14} {open_windows:>13} {chained_packets:>16} {broken:>7}   {other:>16}"
        );
    }
    let (moved, chained) = with
        .steps
        .iter()
        .fold((0, 0), |(moved, chained), step| (moved + step.moved_buckets, chained + step.chained_packets));
    let other = format!("{} broken", without.broken);
    let _ = writeln!(
        text,
        "{:<34} {moved:>14} {:>13} {chained:>16} {:>7}   {other:>16}",
        "total", "", with.broken
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(broken: u64) -> Run {
        let step =
            Step { name: "drain b1".into(), moved_buckets: 16, open_windows: 16, chained_packets: 7, broken };
        Run { connections: 1000, requests: 50, broken, steps: vec![step], ..Run::default() }
    }

    #[test]
    fn the_report_has_the_fields_that_its_readers_look_for() {
        let (with, without) = (run(0), run(93));
        let json = serde_json::to_value(Report::new(&with, &without)).unwrap();
        assert_eq!(json["connections"], 1000);
        assert_eq!(json["requests"], 50);
        assert_eq!(json["broken"], 0);
        assert_eq!(json["without_chaining"]["broken"], 93);
        for field in ["moved_buckets", "open_windows", "chained_packets", "broken"] {
            assert!(json["steps"][0][field].is_u64(), "{field}");
        }
        assert_eq!(json["steps"][0]["name"], "drain b1");
    }

    #[test]
    fn the_table_lines_up() {
        let text = table(&run(0), &run(93));
        let widths: Vec<_> = text.lines().map(|line| line.chars().count()).collect();
        assert!(widths.iter().all(|width| *width == widths[0]), "{text}");
    }
}
