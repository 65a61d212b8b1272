//! Suite 3: three successive moves of the same buckets, with connections from every epoch alive.

use std::time::Duration;

use daisy_tests::{EchoOptions, Io, Topology};

use crate::common::{assert_unbroken, show_drops};

/// Connections of each epoch. With 64 buckets, hardly a bucket lacks one.
const EPOCH: usize = 300;
const BUCKETS: u32 = 64;

suite!(connections_of_four_epochs_in_one_chain: xdp, af_xdp, af_packet);

fn connections_of_four_epochs_in_one_chain(io: Io) {
    let mut net =
        Topology::new("depth").io(io).muxes(2).backends(1).spares(3).buckets(BUCKETS).start().unwrap();
    let options = EchoOptions { connections: EPOCH, ..EchoOptions::default() };
    let mut echo = net.echo(0, &options).unwrap();
    echo.wait_live(EPOCH).unwrap();
    for (epoch, (old, new)) in [("b1", "b2"), ("b2", "b3"), ("b3", "b4")].into_iter().enumerate() {
        net.enrol(new, 100).unwrap();
        net.drain(old).unwrap();
        net.wait_settled().unwrap();
        // Every bucket has moved: all new connections go to the new one.
        assert_eq!(net.service("echo").unwrap().backend(new).unwrap().head_buckets, BUCKETS);
        echo.talk(2).unwrap();
        echo.command(&format!("open {EPOCH}")).unwrap();
        let sample = echo.wait_live(EPOCH * (epoch + 2)).unwrap();
        assert_eq!(sample.by_backend[new], EPOCH, "{:?}", sample.by_backend);
        echo.talk(1).unwrap();
    }

    let view = net.service("echo").unwrap();
    assert_eq!(view.deepest_chain, 4);
    assert!(view.open_windows > BUCKETS * 9 / 10, "{} of {BUCKETS} windows are open", view.open_windows);
    // What a mux knows of a chain is its first two: the flows of the older half depend on the agents.
    net.rehash().unwrap();
    let sample = echo.talk(4).unwrap();
    assert_eq!((sample.live, sample.broken), (4 * EPOCH, 0));

    // An owner in the middle leaves, then the oldest, and the rest stays.
    for (leaving, left) in [("b2", 3), ("b1", 2)] {
        echo.command(&format!("close backend {leaving}")).unwrap();
        net.wait_state("echo", leaving, "drained").unwrap();
        net.wait_settled().unwrap();
        assert_eq!(net.service("echo").unwrap().deepest_chain, left);
        echo.talk(2).unwrap();
    }
    echo.command("close all").unwrap();
    echo.wait_for("everything is closed", Duration::from_secs(30), |s| s.live == 0).unwrap();
    net.wait_windows_closed("echo").unwrap();
    net.wait_conserved().unwrap();
    show_drops(&net);
    assert_unbroken(&echo.finish().unwrap());
}
