//! Suite 5: the controller dies, comes back, and is absent. Traffic goes on and nothing moves.

use std::time::Duration;

use daisy_tests::topology::WEB;
use daisy_tests::{EchoOptions, Io, Topology};
use serde_json::Value;

use crate::common::{LIVE, assert_unbroken};

suite!(controller_dies_and_returns: xdp, af_xdp);
suite!(controller_stays_away: xdp, af_xdp, af_packet);

/// What must survive: tables, bucket by bucket, and what they were made from.
fn state(net: &Topology) -> Vec<Value> {
    ["echo", "web"]
        .iter()
        .flat_map(|service| {
            let view = net.service(service).unwrap();
            let backends =
                view.backends.iter().map(|b| format!("{} {} {}", b.name, b.weight, b.state)).collect();
            [
                Value::from(view.generation),
                Value::Array(backends_sorted(backends)),
                net.get(&format!("/v1/services/{service}/table")).unwrap(),
            ]
        })
        .collect()
}

fn backends_sorted(mut backends: Vec<String>) -> Vec<Value> {
    backends.sort();
    backends.into_iter().map(Value::from).collect()
}

fn controller_dies_and_returns(io: Io) {
    let mut net = Topology::new("restart").io(io).muxes(2).backends(3).spares(1).start().unwrap();
    let mut echo = net.echo(0, &EchoOptions { connections: LIVE, ..EchoOptions::default() }).unwrap();
    echo.wait_live(LIVE).unwrap();
    // Open windows are part of the state.
    net.enrol("b4", 100).unwrap();
    net.wait_settled().unwrap();
    echo.talk(2).unwrap();

    // Windows without a connection close within seconds; those with one stay as they are.
    net.wait_still().unwrap();
    let before = state(&net);
    net.kill_controller();
    echo.talk(2).unwrap();
    net.start_controller().unwrap();
    net.wait_settled().unwrap();
    assert!(state(&net) == before, "the controller came back with another state");
    // Long enough for every lease to have ended if any had not been renewed.
    net.wait_settled().unwrap();
    let sample = echo.latest();
    echo.wait_for("two leases", Duration::from_secs(30), |s| s.at_ms > sample.at_ms + 6_000).unwrap();
    assert!(state(&net) == before, "something moved after the controller came back");

    // An acknowledged change survives SIGKILL at once after the acknowledgement, and is published later.
    let mut generation = net.service("echo").unwrap().generation;
    for weight in [50, 200, 100] {
        net.set_weight("b1", weight).unwrap();
        net.kill_controller();
        net.start_controller().unwrap();
        let view = net.service("echo").unwrap();
        assert_eq!(view.backend("b1").unwrap().weight, weight);
        assert!(view.generation > generation, "generation {} after {generation}", view.generation);
        generation = view.generation;
        net.wait_settled().unwrap();
    }
    echo.talk(2).unwrap();
    assert_unbroken(&echo.finish().unwrap());
    net.wait_windows_closed("echo").unwrap();
}

fn controller_stays_away(io: Io) {
    let mut net = Topology::new("absent").io(io).muxes(2).backends(3).spares(1).start().unwrap();
    let mut echo = net.echo(0, &EchoOptions { connections: LIVE, ..EchoOptions::default() }).unwrap();
    let web = net.requests(0, WEB, 20).unwrap();
    echo.wait_live(LIVE).unwrap();
    net.enrol("b4", 100).unwrap();
    net.wait_settled().unwrap();
    net.wait_still().unwrap();
    let before = state(&net);
    net.kill_controller();

    // Longer than any lease; and all that may happen to nodes meanwhile.
    net.rehash().unwrap();
    echo.talk(3).unwrap();
    net.kill_mux("m1", Duration::from_millis(150)).unwrap();
    echo.talk(2).unwrap();
    // It has nobody to ask: its table comes from its disk.
    net.start_mux("m1").unwrap();
    net.set_routed("m1", true).unwrap();
    net.rehash().unwrap();
    echo.talk(3).unwrap();
    net.kill_agent("b2").unwrap();
    echo.talk(2).unwrap();
    net.start_agent("b2", None).unwrap();
    echo.command("open 200").unwrap();
    let sample = echo.wait_live(LIVE + 200).unwrap();
    assert_eq!(sample.by_backend.len(), 4, "{:?}", sample.by_backend);
    echo.talk(5).unwrap();
    let requests = web.finish().unwrap();
    assert_eq!(requests.failed, 0, "{:?}", requests.errors);
    assert_eq!(requests.by_backend.len(), 4, "{:?}", requests.by_backend);

    net.start_controller().unwrap();
    net.wait_settled().unwrap();
    assert!(state(&net) == before, "the controller came back with another state");
    let sample = echo.talk(2).unwrap();
    assert_eq!((sample.live, sample.broken), (LIVE + 200, 0));
    assert_unbroken(&echo.finish().unwrap());
    net.wait_windows_closed("echo").unwrap();
}
