//! Suite 4: muxes die and join, and nodes lose the controller while tables change and flows change muxes.

use std::time::Duration;

use daisy_tests::{EchoOptions, Io, Topology};

use crate::common::{LIVE, assert_unbroken, show_drops};

/// How long the router still sends to a dead mux: what BFD with usual settings takes.
const DETECTION: Duration = Duration::from_millis(150);

suite!(muxes_die_join_and_lag: xdp, af_xdp, af_packet);

fn muxes_die_join_and_lag(io: Io) {
    let mut net = Topology::new("muxes").io(io).muxes(2).backends(3).spares(1).start().unwrap();
    let mut echo = net.echo(0, &EchoOptions { connections: LIVE, ..EchoOptions::default() }).unwrap();
    echo.wait_live(LIVE).unwrap();

    net.kill_mux("m1", DETECTION).unwrap();
    echo.talk(2).unwrap();
    assert_eq!(net.add_mux().unwrap(), "m3");
    echo.talk(2).unwrap();

    // From here on m2 and the agent of b1 know no newer table.
    net.cut_from_controller("m2").unwrap();
    net.cut_from_controller("b1").unwrap();
    let old = net.service("echo").unwrap();
    net.enrol("b4", 100).unwrap();
    net.wait_settled().unwrap();
    net.rehash().unwrap();
    echo.talk(2).unwrap();
    net.set_weight("b3", 250).unwrap();
    net.wait_settled().unwrap();
    net.rehash().unwrap();
    echo.talk(2).unwrap();
    net.drain("b2").unwrap();
    net.wait_settled().unwrap();
    // New connections through both muxes, the old table and the new.
    echo.command("open 100").unwrap();
    echo.wait_live(LIVE + 100).unwrap();
    net.rehash().unwrap();
    echo.talk(2).unwrap();

    // Both leases end. The backend answers probes, so it keeps its connections, and gets no new ones.
    net.wait_state("echo", "b1", "suspect").unwrap();
    net.wait_for("the lease of m2 has ended", daisy_tests::topology::PATIENCE, |net| {
        Ok(net.node("m2")?.lease == "expired")
    })
    .unwrap();
    net.wait_settled().unwrap();
    assert_eq!(net.service("echo").unwrap().backend("b1").unwrap().head_buckets, 0);
    let stale = net.node("m2").unwrap().applied[&old.id.to_string()];
    assert!(stale <= old.generation, "m2 is not cut off: {stale} > {}", old.generation);
    echo.command("open 100").unwrap();
    echo.wait_live(LIVE + 200).unwrap();
    net.rehash().unwrap();
    echo.talk(3).unwrap();

    net.heal("m2").unwrap();
    net.heal("b1").unwrap();
    net.wait_settled().unwrap();
    net.wait_state("echo", "b1", "active").unwrap();
    net.wait_settled().unwrap();
    net.rehash().unwrap();
    let sample = echo.talk(3).unwrap();
    assert_eq!((sample.live, sample.broken), (LIVE + 200, 0));

    net.remove_mux("m2").unwrap();
    echo.talk(1).unwrap();
    show_drops(&net);
    let report = echo.finish().unwrap();
    assert_unbroken(&report);
    net.wait_windows_closed("echo").unwrap();
}
