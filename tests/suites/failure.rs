//! Suite 7: a backend dies. Its connections die with it, all others live, and new ones go elsewhere.

use std::time::{Duration, Instant};

use daisy_tests::{EchoOptions, Io, Outcome, STALL_LIMIT_MS, Topology};

use crate::common::LIVE;

const LEASE: Duration = Duration::from_secs(2);

suite!(a_backend_dies: af_xdp, af_packet);

fn a_backend_dies(io: Io) {
    let mut net = Topology::new("failure")
        .io(io)
        .muxes(2)
        .backends(3)
        .spares(1)
        .lease_ms(LEASE.as_millis() as u64)
        .start()
        .unwrap();
    let mut echo = net.echo(0, &EchoOptions { connections: LIVE, ..EchoOptions::default() }).unwrap();
    echo.wait_live(LIVE).unwrap();
    // Windows are open, and the one that will die is an owner in the middle: connections behind it must live.
    net.enrol("b4", 100).unwrap();
    net.wait_settled().unwrap();
    net.set_weight("b2", 250).unwrap();
    net.wait_settled().unwrap();
    let sample = echo.talk(2).unwrap();
    assert_eq!(sample.broken, 0);
    let doomed = sample.by_backend["b2"];
    assert!(doomed > 100, "{:?}", sample.by_backend);

    let killed = Instant::now();
    net.kill_backend("b2").unwrap();
    // These are opened while nobody knows yet; the unlucky ones wait until the lease ends.
    echo.command("open 100").unwrap();
    net.wait_state("echo", "b2", "down").unwrap();
    let took = killed.elapsed();
    println!("b2 was declared dead after {took:?}");
    assert!(took < LEASE * 3, "a lease of {LEASE:?} ended after {took:?}");
    net.wait_settled().unwrap();
    let dead = net.service("echo").unwrap();
    let b2 = dead.backend("b2").unwrap();
    assert_eq!((b2.head_buckets, b2.past_buckets), (0, 0));

    // From now on a new connection waits for nothing.
    let mut late = net.echo(0, &EchoOptions { connections: 200, ..EchoOptions::default() }).unwrap();
    let sample = late.wait_live(200).unwrap();
    assert!(!sample.by_backend.contains_key("b2"), "{:?}", sample.by_backend);
    late.talk(2).unwrap();
    let late = late.finish().unwrap();
    assert_eq!((late.broken, late.stalls), (0, 0), "{}", late.summary());
    assert!(late.worst_greeting_ms < 1_000, "a new connection waited: {}", late.summary());

    // The dead one's connections are told so: whoever owns their buckets now answers with a reset.
    echo.wait_for("the dead backend's connections end", Duration::from_secs(30), |s| s.broken == doomed)
        .unwrap();
    let sample = echo.talk(3).unwrap();
    assert_eq!(sample.live, LIVE + 100 - doomed);
    let report = echo.finish().unwrap();
    println!("{}", report.summary());
    assert_eq!(report.broken, doomed);
    for one in &report.each {
        let of_the_dead = one.backend.as_deref() == Some("b2");
        assert_eq!(one.outcome != Outcome::Closed, of_the_dead, "{one:?}");
        assert!(of_the_dead || one.worst_ms <= STALL_LIMIT_MS, "{one:?}");
    }
    assert_eq!(report.reset, doomed, "{}", report.summary());
    net.wait_windows_closed("echo").unwrap();
}
