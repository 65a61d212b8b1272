//! Suite 8, the control: the changes of suite 2 break connections if agents do not send packets on. If they did
//! not, suite 2 would prove nothing.

use daisy_tests::{Io, Topology};

use crate::churn::changes_under_traffic;

suite!(without_chaining_connections_break: af_xdp);

fn without_chaining_connections_break(io: Io) {
    let (report, failed) = changes_under_traffic(Topology::new("control").io(io), false);
    println!("{}\n{failed} HTTP requests failed", report.summary());
    assert!(report.broken > 0, "nothing broke without chaining: suite 2 proves nothing");
    assert_eq!(report.wrong, 0, "connections may break, but never mix: {}", report.summary());
}
