//! Suite 7: a backend dies. Its connections die with it, all others live, and new ones go elsewhere.

use std::time::{Duration, Instant};

use daisy_tests::{EchoClient, EchoOptions, Io, Outcome, STALL_LIMIT_MS, Topology};

use crate::common::{LIVE, show_drops};

const LEASE: Duration = Duration::from_secs(2);

suite!(a_backend_dies: xdp, af_xdp, af_packet);
suite!(an_owner_in_the_middle_dies: xdp, af_xdp, af_packet);

fn start(name: &str, io: Io) -> Topology {
    Topology::new(name)
        .io(io)
        .muxes(2)
        .backends(3)
        .spares(1)
        .lease_ms(LEASE.as_millis() as u64)
        .start()
        .unwrap()
}

/// Without open windows nobody else's packets pass the backend: nobody else notices.
fn a_backend_dies(io: Io) {
    let mut net = start("failure", io);
    net.wait_windows_closed("echo").unwrap();
    let mut echo = net.echo(0, &EchoOptions { connections: LIVE, ..EchoOptions::default() }).unwrap();
    echo.wait_live(LIVE).unwrap();
    kill(&mut net, echo, |_| STALL_LIMIT_MS);
}

/// With open windows it is a previous owner of others' buckets: packets of connections behind it are lost until
/// it is declared dead, and TCP's doubling retransmission timer may be as long again. They live.
fn an_owner_in_the_middle_dies(io: Io) {
    let mut net = start("middle", io);
    let mut echo = net.echo(0, &EchoOptions { connections: LIVE, ..EchoOptions::default() }).unwrap();
    echo.wait_live(LIVE).unwrap();
    // Buckets of b1 and b3 move to b4, then buckets of all to b2.
    net.enrol("b4", 100).unwrap();
    net.wait_settled().unwrap();
    net.set_weight("b2", 250).unwrap();
    net.wait_settled().unwrap();
    kill(&mut net, echo, |declared| 2 * declared.as_millis() as u64 + STALL_LIMIT_MS);
}

/// Kills b2. `worst` says how long others may wait for a reply if it took so long to declare b2 dead.
fn kill(net: &mut Topology, mut echo: EchoClient, worst: impl Fn(Duration) -> u64) {
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
    assert!(took < LEASE * 3 / 2, "a lease of {LEASE:?} ended after {took:?}");
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
    show_drops(net);
    let report = echo.finish().unwrap();
    println!("{}", report.summary());
    for one in &report.each {
        let of_the_dead = one.backend.as_deref() == Some("b2");
        assert_eq!(one.outcome != Outcome::Closed, of_the_dead, "{one:?}");
        assert!(of_the_dead || one.worst_ms <= worst(took), "declared dead after {took:?}: {one:?}");
    }
    assert_eq!((report.broken, report.reset), (doomed, doomed), "{}", report.summary());
    net.wait_windows_closed("echo").unwrap();
}
