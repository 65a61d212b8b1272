//! What a run has to say about where and when it was made. No host name, no path.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};

/// The machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// The processor, as it calls itself.
    pub processor: String,
    /// CPUs.
    pub cpus: usize,
    /// Bytes of memory, in GiB.
    pub memory_gib: u64,
    /// The kernel's name and version.
    pub kernel: String,
    /// Whether a hypervisor runs it.
    pub virtual_machine: bool,
}

impl Machine {
    /// This one.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn this() -> Result<Machine> {
        let cpus = std::fs::read_to_string("/proc/cpuinfo").context("/proc/cpuinfo")?;
        let field = |name: &str| {
            let line = cpus.lines().find(|line| line.split(':').next().is_some_and(|n| n.trim() == name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let memory = std::fs::read_to_string("/proc/meminfo").context("/proc/meminfo")?;
        let total = memory.lines().find_map(|line| line.strip_prefix("MemTotal:"));
        let kib: u64 = total.and_then(|t| t.split_whitespace().next()?.parse().ok()).context("MemTotal")?;
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").context("osrelease")?;
        // What follows the version is whoever built it.
        let version = release.trim().split(['-', '+']).next().unwrap_or_default().to_owned();
        Ok(Machine {
            processor: field("model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            cpus: std::thread::available_parallelism()?.get(),
            memory_gib: (kib + (1 << 19)) >> 20,
            kernel: format!("Linux {version}"),
            virtual_machine: field("flags").is_some_and(|f| f.split(' ').any(|flag| flag == "hypervisor")),
        })
    }

    /// A neutral name for directories: the processor's name and the number of CPUs.
    pub fn slug(&self) -> String {
        const NOISE: [&str; 9] = ["amd", "intel", "r", "tm", "cpu", "processor", "core", "genuine", "with"];
        let lower = self.processor.to_lowercase();
        let name = lower.split(" @ ").next().unwrap_or_default();
        let words: Vec<&str> = name
            .split(|c: char| !c.is_ascii_alphanumeric())
            .filter(|word| !word.is_empty() && !NOISE.contains(word))
            .take(3)
            .collect();
        let name = if words.is_empty() { "cpu".to_owned() } else { words.join("-") };
        let between = if name.ends_with(|c: char| c.is_ascii_digit()) { "-" } else { "" };
        format!("{name}{between}{}", self.cpus)
    }
}

/// Today in UTC, as `2026-01-31`.
pub fn today() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    date(seconds / 86_400)
}

/// The Gregorian date so many days after 1970-01-01 (Hinnant: chrono-compatible low-level date algorithms, 2013).
fn date(days: u64) -> String {
    let z = days + 719_468;
    let (era, of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_dates() {
        assert_eq!(date(0), "1970-01-01");
        assert_eq!(date(11_016), "2000-02-29");
        assert_eq!(date(20_453), "2025-12-31");
        assert_eq!(date(20_454), "2026-01-01");
    }

    #[test]
    fn slugs_are_neutral() {
        let machine = |processor: &str, cpus| Machine {
            processor: processor.to_owned(),
            cpus,
            memory_gib: 1,
            kernel: String::new(),
            virtual_machine: true,
        };
        assert_eq!(machine("AMD EPYC", 2).slug(), "epyc2");
        assert_eq!(
            machine("Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz", 8).slug(),
            "xeon-platinum-8375c8"
        );
        assert_eq!(machine("AMD EPYC 9654 96-Core Processor", 4).slug(), "epyc-9654-96-4");
    }
}
