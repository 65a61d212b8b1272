//! What the suites share.

use std::sync::{Mutex, MutexGuard, PoisonError};

use daisy_tests::{Report, STALL_LIMIT_MS, Topology};

/// Live connections in the suites that change things under traffic.
pub const LIVE: usize = 1_000;

/// Makes a test of a scenario for each kind of mux I/O: `suite!(scenario: af_xdp, af_packet)` runs
/// `scenario(Io::AfXdp)` as `scenario::af_xdp`, and so on.
macro_rules! suite {
    ($scenario:ident: $($io:ident),+) => {
        mod $scenario {
            $(
                #[test]
                fn $io() {
                    let _alone = $crate::common::alone();
                    super::$scenario(suite!(@ $io));
                }
            )+
        }
    };
    (@ xdp) => { daisy_tests::Io::Xdp };
    (@ af_xdp) => { daisy_tests::Io::AfXdp };
    (@ af_packet) => { daisy_tests::Io::AfPacket };
}

/// Keeps all other suites of this process waiting for as long as it is held.
pub fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    // A suite that failed harms no other.
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Nothing broke, nothing stalled, and everything was closed by the client.
pub fn assert_unbroken(report: &Report) {
    println!("{}", report.summary());
    assert_eq!(report.broken, 0, "connections broke: {}", report.summary());
    assert_eq!(report.stalls, 0, "replies took longer than {STALL_LIMIT_MS} ms: {}", report.summary());
    assert_eq!(report.closed, report.connections);
}

/// Says what nodes dropped and why, for whoever reads the output.
pub fn show_drops(net: &Topology) {
    for node in net.nodes().unwrap() {
        let drops: Vec<String> = node
            .counters
            .iter()
            .filter(|(name, count)| **count > 0 && (name.starts_with("dropped_") || *name == "answered"))
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        if !drops.is_empty() {
            println!("{}: {}", node.name, drops.join(", "));
        }
    }
}
