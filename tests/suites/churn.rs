//! Suite 2: scale-out, weight change and scale-in with live connections that keep talking.

use daisy_shared::service::Encapsulation;
use daisy_tests::topology::WEB;
use daisy_tests::{EchoOptions, Io, Report, Topology};

use crate::common::{LIVE, assert_unbroken, show_drops};

suite!(scale_out_weights_and_scale_in: xdp, af_xdp, af_packet);

suite!(ipip_services_move_too: xdp, af_xdp, af_packet);

fn ipip_services_move_too(io: Io) {
    let topology = Topology::new("ipip").io(io).encapsulation(Encapsulation::Ipip);
    let (report, _) = changes_under_traffic(topology, true);
    assert_unbroken(&report);
}

fn scale_out_weights_and_scale_in(io: Io) {
    let (report, _) = changes_under_traffic(Topology::new("churn").io(io), true);
    assert_unbroken(&report);
    // Both before and after the changes, connections went to those that were to take them.
    for backend in ["b1", "b2", "b3", "b4"] {
        assert!(report.by_backend.get(backend).is_some_and(|count| *count > 20), "{:?}", report.by_backend);
    }
}

/// The changes of this suite, with or without chaining. Returns what became of the connections, and how many HTTP
/// requests failed.
pub fn changes_under_traffic(builder: daisy_tests::Builder, chaining: bool) -> (Report, u64) {
    let mut net = builder.muxes(2).backends(3).spares(1).chaining(chaining).start().unwrap();
    net.wait_windows_closed("echo").unwrap();
    let mut echo = net.echo(0, &EchoOptions { connections: LIVE, ..EchoOptions::default() }).unwrap();
    let web = net.requests(0, WEB, 20).unwrap();
    echo.wait_live(LIVE).unwrap();
    echo.talk(2).unwrap();

    // Scale-out: a quarter of all buckets moves, and no more.
    let before = net.service("echo").unwrap();
    net.enrol("b4", 100).unwrap();
    net.wait_settled().unwrap();
    let after = net.service("echo").unwrap();
    assert_eq!(after.backend("b4").unwrap().head_buckets, after.buckets / 4);
    assert!(after.generation > before.generation, "{} → {}", before.generation, after.generation);
    echo.talk(3).unwrap();
    if chaining {
        // The windows with connections stay open as long as these live.
        let windows = net.service("echo").unwrap().open_windows;
        assert!(windows > 100, "{windows} open windows");
    }

    // Weights: b1 is entitled to 3 of 6 shares.
    net.set_weight("b1", 300).unwrap();
    net.wait_settled().unwrap();
    let weighted = net.service("echo").unwrap();
    assert_eq!(weighted.backend("b1").unwrap().head_buckets, weighted.buckets / 2);
    echo.talk(3).unwrap();

    // Scale-in: no new connection goes there, and those that live go on.
    net.drain("b2").unwrap();
    net.wait_settled().unwrap();
    let draining = net.service("echo").unwrap();
    assert_eq!(draining.backend("b2").unwrap().head_buckets, 0);
    let count = |sample: &daisy_tests::Sample| sample.by_backend.get("b2").copied().unwrap_or(0);
    let before = count(&echo.talk(1).unwrap());
    echo.command("open 200").unwrap();
    echo.wait_for("200 more connections", std::time::Duration::from_secs(30), |s| s.opening == 0).unwrap();
    let after = count(&echo.talk(3).unwrap());
    if chaining {
        assert_eq!(before, after, "connections at the drained backend");
        assert!(before > 200, "only {before} connections were at b2");
    }

    // Its clients close, and it leaves the table by itself.
    if chaining {
        echo.command("close backend b2").unwrap();
        net.wait_state("echo", "b2", "drained").unwrap();
        let drained = net.service("echo").unwrap();
        let b2 = drained.backend("b2").unwrap();
        assert_eq!((b2.head_buckets, b2.past_buckets), (0, 0));
        assert!(drained.open_windows > 0, "others were closed as well");
    }
    let requests = web.finish().unwrap();
    println!("HTTP: {} answered, {} failed, slowest {} ms", requests.ok, requests.failed, requests.worst_ms);
    if chaining {
        assert_eq!(requests.failed, 0, "{:?}", requests.errors);
        assert_eq!(requests.by_backend.values().sum::<u64>(), requests.ok);
    }

    show_drops(&net);
    let report = echo.finish().unwrap();
    if chaining {
        for service in ["echo", "web"] {
            net.wait_windows_closed(service).unwrap();
        }
        let nodes = net.wait_conserved().unwrap();
        let chained: u64 = nodes.iter().map(|node| node.counter("sent_on")).sum();
        assert!(chained > 0, "no packet took a second hop, so nothing was proved");
        // What servers returned, and what clients got back right, are the same bytes.
        let mut bytes = 0;
        for name in net.backend_names() {
            bytes += net.echo_server_report(&name).unwrap().bytes;
        }
        if report.broken == 0 {
            assert_eq!(bytes, report.bytes);
        }
    }
    (report, requests.failed)
}
