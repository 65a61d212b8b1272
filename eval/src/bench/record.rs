//! Raw figures: one row for each measurement, a CSV file for each case, and the medians of rounds.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result};

use super::contestant::Contestant;
use super::stats::Spread;
use super::summary::Summary;

/// One measurement.
#[derive(Clone, Debug)]
struct Row {
    part: &'static str,
    contestant: Contestant,
    metric: &'static str,
    case: String,
    round: usize,
    value: f64,
}

/// All that was measured, in order.
#[derive(Debug, Default)]
pub struct Record(Vec<Row>);

/// Whose measurements are noted, and where.
pub struct Noter<'a> {
    record: &'a mut Record,
    part: &'static str,
    contestant: Contestant,
    round: usize,
}

impl Noter<'_> {
    /// Notes a figure: a metric with its unit, of a case if it has several. What is no number (a rate over no time) is
    /// left out.
    pub fn note(&mut self, metric: &'static str, case: &str, value: f64) {
        if value.is_finite() {
            let Noter { part, contestant, round, .. } = *self;
            self.record.0.push(Row { part, contestant, metric, case: case.to_owned(), round, value });
        }
    }
}

impl Record {
    /// Where a contestant's figures of a round are noted. Each part has a file of its own.
    pub fn of(&mut self, part: &'static str, contestant: Contestant, round: usize) -> Noter<'_> {
        Noter { record: self, part, contestant, round }
    }

    /// What the rounds of one measurement found.
    pub fn spread(&self, contestant: Contestant, metric: &str, case: &str) -> Option<Spread> {
        let values: Vec<f64> = self
            .0
            .iter()
            .filter(|row| row.contestant == contestant && row.case == case && row.metric == metric)
            .map(|row| row.value)
            .collect();
        Spread::of(&values)
    }

    /// Writes a CSV file for each case and one with the spread of each measurement, and sets the medians in the
    /// summary: `<metric>.<contestant>.<case>`, or without a case.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write(&self, directory: &Path, summary: &mut Summary) -> Result<()> {
        let put = |name: &str, text: &str| {
            let file = directory.join(name);
            std::fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))
        };
        let parts: BTreeSet<&str> = self.0.iter().map(|row| row.part).collect();
        for wanted in parts {
            let mut text = String::from("contestant,metric,case,round,value\n");
            for row in self.0.iter().filter(|row| row.part == wanted) {
                let Row { contestant, metric, case, round, value, .. } = row;
                let _ = writeln!(text, "{contestant},{metric},{case},{round},{value}");
            }
            put(&format!("{wanted}.csv"), &text)?;
        }
        let mut text = String::from("contestant,metric,case,median,min,max\n");
        let mut done = BTreeSet::new();
        for Row { contestant, metric, case, .. } in &self.0 {
            if !done.insert((contestant.name(), metric, case)) {
                continue;
            }
            if let Some(Spread { median, min, max }) = self.spread(*contestant, metric, case) {
                let _ = writeln!(text, "{contestant},{metric},{case},{median},{min},{max}");
                let point = if case.is_empty() { "" } else { "." };
                summary.set(format!("{metric}.{contestant}{point}{case}"), median)?;
            }
        }
        put("spread.csv", &text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_become_a_median_in_the_summary_and_rows_in_a_file() {
        let directory = std::env::temp_dir().join(format!("daisy-record-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let mut record = Record::default();
        for (round, value) in [3.0, 1.0, 2.0].into_iter().enumerate() {
            record.of("small", Contestant::Kernel, round).note("pps", "one", value);
        }
        record.of("small", Contestant::Kernel, 3).note("pps", "one", f64::INFINITY);
        record.of("flood", Contestant::Kernel, 0).note("broken", "", 4.0);
        let mut summary = Summary::default();
        record.write(&directory, &mut summary).unwrap();
        assert_eq!(summary.get("pps.kernel.one"), Some(2.0));
        assert_eq!(summary.get("broken.kernel"), Some(4.0));
        assert_eq!(std::fs::read_to_string(directory.join("small.csv")).unwrap().lines().count(), 4);
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
