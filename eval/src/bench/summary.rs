//! `summary.json`: one object, one level of keys, numbers only.
//!
//! A key is a metric, or a metric and what it is of, joined by points: `floor_ns`,
//! `forwarded_pps_per_cpu_s.<contestant>.<case>`, `latency_us.<contestant>.<case>.<percentile>`,
//! `memory_bytes.<contestant>.<flows>`. Figures are medians over the rounds of the run; least and most are in the
//! CSV files. `ratio.<…>` compares figures of the same run, `holds.<bar>` is 1 if a bar of the design holds, else 0.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context as _, Result, bail};

/// Keys that every whole run has. `*` stands for one word, or for one that is given elsewhere.
pub const REQUIRED: [&str; 11] = [
    "floor_ns",
    "pipeline_ns_64ki",
    "pipeline_ns_1mi",
    "pipeline_instructions_64ki",
    "xdp_net_ns_64ki",
    "agent_closed_net_ns",
    "agent_open_net_ns",
    "forwarded_pps_per_cpu_s.*.small",
    "latency_us.*.requests.p50",
    "latency_us.*.requests.p99_9",
    "memory_bytes.*.1024",
];

/// A bar of the design: what is measured, and what it may be at most.
#[derive(Clone, Copy, Debug)]
pub struct Bar {
    /// Its name in keys.
    pub name: &'static str,
    /// For people.
    pub what: &'static str,
    /// The key, and the key that it is divided by if any.
    pub of: (&'static str, Option<&'static str>),
    /// At most.
    pub most: f64,
}

/// The bars.
pub const BARS: [Bar; 7] = [
    Bar {
        name: "pipeline_64ki_to_floor",
        what: "mux pipeline, 64 Ki buckets, 1 Mi flows, to the floor",
        of: ("pipeline_ns_64ki", Some("floor_ns")),
        most: 2.0,
    },
    Bar {
        name: "pipeline_1mi_to_floor",
        what: "mux pipeline, 1 Mi buckets, 1 Mi flows, to the floor",
        of: ("pipeline_ns_1mi", Some("floor_ns")),
        most: 2.0,
    },
    Bar {
        name: "pipeline_64ki",
        what: "the same, 64 Ki buckets, ns",
        of: ("pipeline_ns_64ki", None),
        most: 20.0,
    },
    Bar {
        name: "pipeline_1mi",
        what: "the same, 1 Mi buckets, ns",
        of: ("pipeline_ns_1mi", None),
        most: 25.0,
    },
    Bar {
        name: "xdp_64ki",
        what: "XDP pipeline net of an empty program, 64 Ki buckets, ns",
        of: ("xdp_net_ns_64ki", None),
        most: 50.0,
    },
    Bar {
        name: "agent_closed",
        what: "agent's program net of an empty one, closed window, ns",
        of: ("agent_closed_net_ns", None),
        most: 60.0,
    },
    Bar {
        name: "agent_open",
        what: "agent's program net of an empty one, open window, ns",
        of: ("agent_open_net_ns", None),
        most: 150.0,
    },
];

impl Bar {
    /// What was measured, if it was.
    pub fn value(&self, summary: &Summary) -> Option<f64> {
        let value = summary.get(self.of.0)?;
        match self.of.1 {
            None => Some(value),
            Some(floor) => Some(value / summary.get(floor)?),
        }
    }
}

/// The figures of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary(BTreeMap<String, f64>);

impl Summary {
    /// Sets a figure.
    ///
    /// # Errors
    /// If it is no number, or its key is not made of words and points.
    pub fn set(&mut self, key: impl Into<String>, value: f64) -> Result<()> {
        let key = key.into();
        let word = |w: &str| {
            !w.is_empty() && w.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
        };
        if !key.split('.').all(word) {
            bail!("{key:?} is no key");
        }
        if !value.is_finite() {
            bail!("{key} is {value}");
        }
        self.0.insert(key, value);
        Ok(())
    }

    /// A figure.
    pub fn get(&self, key: &str) -> Option<f64> {
        self.0.get(key).copied()
    }

    /// All figures whose key matches: words, of which `*` is any.
    pub fn matching(&self, pattern: &str) -> Vec<(&str, f64)> {
        let matches = |key: &str| {
            let (mut key, mut pattern) = (key.split('.'), pattern.split('.'));
            loop {
                match (key.next(), pattern.next()) {
                    (None, None) => return true,
                    (Some(word), Some(wanted)) if wanted == "*" || word == wanted => {}
                    _ => return false,
                }
            }
        };
        self.0.iter().filter(|(key, _)| matches(key)).map(|(key, value)| (key.as_str(), *value)).collect()
    }

    /// What a whole run has and this one lacks.
    pub fn missing(&self) -> Vec<&'static str> {
        REQUIRED.into_iter().filter(|pattern| self.matching(pattern).is_empty()).collect()
    }

    /// Adds whether each bar holds.
    ///
    /// # Errors
    /// If a figure is no number.
    pub fn judge(&mut self) -> Result<()> {
        for bar in BARS {
            let Some(value) = bar.value(self) else { continue };
            if bar.of.1.is_some() {
                self.set(format!("ratio.{}", bar.name), value)?;
            }
            self.set(format!("holds.{}", bar.name), f64::from(u8::from(value <= bar.most)))?;
        }
        Ok(())
    }

    /// As JSON, keys in order.
    ///
    /// # Errors
    /// Never: keys are text and values are numbers.
    pub fn to_json(&self) -> Result<String> {
        let rounded: BTreeMap<&String, f64> = self.0.iter().map(|(key, value)| (key, tidy(*value))).collect();
        Ok(serde_json::to_string_pretty(&rounded)? + "\n")
    }

    /// From JSON.
    ///
    /// # Errors
    /// If it is not one flat object of numbers.
    pub fn from_json(text: &str) -> Result<Summary> {
        Ok(Summary(serde_json::from_str(text).context("not one flat object of numbers")?))
    }
}

/// Four digits are more than a run is good for.
fn tidy(value: f64) -> f64 {
    if value == 0.0 || value.abs() >= 1000.0 {
        return value.round();
    }
    let digits = 3.0 - value.abs().log10().floor();
    let scale = 10_f64.powf(digits);
    (value * scale).round() / scale
}

/// A number for people: with commas, or with as many decimals as tell something.
pub fn human(value: f64) -> String {
    if value.abs() < 1000.0 {
        let decimals = if value.abs() >= 100.0 || value.fract() == 0.0 {
            0
        } else if value.abs() >= 10.0 {
            1
        } else {
            2
        };
        return format!("{value:.decimals$}");
    }
    let digits = format!("{:.0}", value.abs());
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    if value < 0.0 { format!("-{text}") } else { text }
}

/// A table in Markdown.
pub fn table(heads: &[&str], rows: &[Vec<String>]) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "| {} |", heads.join(" | "));
    let _ = writeln!(text, "|---{}|", "|---:".repeat(heads.len() - 1));
    for row in rows {
        let _ = writeln!(text, "| {} |", row.join(" | "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_is_flat_and_comes_back() {
        let mut summary = Summary::default();
        summary.set("floor_ns", 7.123_456).unwrap();
        summary.set("forwarded_pps_per_cpu_s.daisy_xdp.small", 1_234_567.8).unwrap();
        assert!(summary.set("a b", 1.0).is_err());
        assert!(summary.set("a..b", 1.0).is_err());
        assert!(summary.set("nan", f64::NAN).is_err());
        let json = summary.to_json().unwrap();
        assert!(json.contains("\"floor_ns\": 7.123,"), "{json}");
        let back = Summary::from_json(&json).unwrap();
        assert_eq!(back.get("forwarded_pps_per_cpu_s.daisy_xdp.small"), Some(1_234_568.0));
        assert!(Summary::from_json("{\"a\": {\"b\": 1}}").is_err());
    }

    #[test]
    fn what_is_missing_is_named() {
        let mut summary = Summary::default();
        for key in REQUIRED {
            assert!(summary.missing().contains(&key));
            summary.set(key.replace('*', "kernel"), 1.0).unwrap();
        }
        assert!(summary.missing().is_empty());
        assert_eq!(summary.matching("latency_us.*.requests.*").len(), 2);
    }

    #[test]
    fn bars_are_judged_by_ratio_or_by_value() {
        let mut summary = Summary::default();
        summary.set("floor_ns", 8.0).unwrap();
        summary.set("pipeline_ns_64ki", 15.0).unwrap();
        summary.set("agent_closed_net_ns", 61.0).unwrap();
        summary.judge().unwrap();
        assert_eq!(summary.get("ratio.pipeline_64ki_to_floor"), Some(1.875));
        assert_eq!(summary.get("holds.pipeline_64ki_to_floor"), Some(1.0));
        assert_eq!(summary.get("holds.agent_closed"), Some(0.0));
        assert_eq!(summary.get("holds.agent_open"), None);
    }

    #[test]
    fn numbers_are_for_people() {
        assert_eq!(human(1_234_567.0), "1,234,567");
        assert_eq!(human(999.4), "999");
        assert_eq!(human(12.34), "12.3");
        assert_eq!(human(1.234), "1.23");
        assert_eq!(human(0.0), "0");
    }
}
