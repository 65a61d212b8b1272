//! Suite 6: agents are killed, restarted and replaced under traffic. The data path does not stop.

use std::time::Duration;

use daisy_tests::{EchoOptions, Io, Topology};

use crate::common::{LIVE, assert_unbroken, show_drops};

suite!(agents_die_and_are_replaced: xdp, af_xdp);

fn agents_die_and_are_replaced(io: Io) {
    let mut net = Topology::new("upgrade").io(io).muxes(2).backends(3).spares(1).start().unwrap();
    let mut echo = net.echo(0, &EchoOptions { connections: LIVE, ..EchoOptions::default() }).unwrap();
    echo.wait_live(LIVE).unwrap();
    // Open windows: agents have to chain while their daemons are away.
    net.enrol("b4", 100).unwrap();
    net.set_weight("b1", 50).unwrap();
    net.wait_settled().unwrap();
    echo.talk(2).unwrap();

    for name in ["b1", "b4"] {
        let before = net.node(name).unwrap();
        net.kill_agent(name).unwrap();
        assert!(program(&mut net, name).is_some(), "the program of {name} went with its daemon");
        assert!(pins(&mut net, name) > 0, "nothing of {name} is pinned");
        echo.command("open 50").unwrap();
        echo.talk(2).unwrap();
        net.start_agent(name, None).unwrap();
        net.wait_settled().unwrap();
        echo.talk(1).unwrap();
        // The maps are the same ones: counters went on while nobody read them.
        let after = net.node(name).unwrap();
        assert!(
            after.counter("delivered") > before.counter("delivered"),
            "{name}: delivered {} before, {} after",
            before.counter("delivered"),
            after.counter("delivered")
        );
    }

    // A newer binary takes over from one that is stopped, and from one that is killed: the program is replaced in
    // place.
    let newer = net.directory().join("daisy-agent-next");
    std::fs::copy(net.binary("daisy-agent").unwrap(), &newer).unwrap();
    let old = ["b2", "b3"].map(|name| program(&mut net, name).unwrap());
    net.stop_agent("b2").unwrap();
    assert_eq!(program(&mut net, "b2"), Some(old[0].clone()), "SIGTERM took the program with it");
    echo.talk(2).unwrap();
    net.start_agent("b2", Some(&newer)).unwrap();
    net.kill_agent("b3").unwrap();
    // Maps of another size are what another layout is: they cannot be taken over, and are made and filled anew.
    net.backend("b3").unwrap().agent_arguments = vec!["--bucket-capacity".into(), "131072".into()];
    net.start_agent("b3", Some(&newer)).unwrap();
    net.wait_settled().unwrap();
    for (name, old) in ["b2", "b3"].into_iter().zip(old) {
        let new = program(&mut net, name).unwrap();
        assert_ne!(new, old, "{name} still runs the program of the binary before");
        let pid = net.backend(name).unwrap().agent.as_ref().unwrap().id();
        assert_eq!(std::fs::read_link(format!("/proc/{pid}/exe")).unwrap(), newer);
    }
    echo.talk(2).unwrap();

    // Tables change while a daemon is away: it catches up, and its kernel side learns from packets meanwhile.
    net.kill_agent("b1").unwrap();
    net.set_weight("b1", 200).unwrap();
    net.wait_settled().unwrap();
    echo.command("open 100").unwrap();
    echo.talk(2).unwrap();
    net.start_agent("b1", Some(&newer)).unwrap();
    net.wait_settled().unwrap();
    echo.talk(2).unwrap();

    echo.command("close all").unwrap();
    echo.wait_for("everything is closed", Duration::from_secs(30), |s| s.live == 0).unwrap();
    net.wait_windows_closed("echo").unwrap();
    let report = echo.finish().unwrap();
    assert_eq!(report.connections, LIVE + 200);
    assert_unbroken(&report);

    show_drops(&net);

    // Unloading leaves nothing.
    net.stop_agent("b1").unwrap();
    net.unload_agent("b1").unwrap();
    assert!(program(&mut net, "b1").is_none(), "an XDP program is left");
    assert_eq!(pins(&mut net, "b1"), 0, "pins are left");
    let namespace = &net.backend("b1").unwrap().namespace;
    let addresses = namespace.output("ip", &["-4", "-o", "address", "show", "dev", "lo"]).unwrap();
    assert!(!addresses.contains("203.0.113."), "a virtual address is left: {addresses}");
}

/// The number of the XDP program that is attached to the backend's link.
fn program(net: &mut Topology, name: &str) -> Option<String> {
    let namespace = &net.backend(name).unwrap().namespace;
    let text = namespace.output("ip", &["-d", "link", "show", "dev", "eth0"]).unwrap();
    let (_, about) = text.split_once("prog/xdp id ")?;
    about.split_whitespace().next().map(str::to_owned)
}

/// How many objects are pinned in the backend's BPF file system.
fn pins(net: &mut Topology, name: &str) -> usize {
    fn count(path: &std::path::Path) -> usize {
        std::fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap())
            // `maps.debug` and `progs.debug`, where a kernel has them, come with the file system.
            .filter(|entry| !entry.file_name().to_string_lossy().ends_with(".debug"))
            .map(|entry| if entry.file_type().unwrap().is_dir() { count(&entry.path()) } else { 1 })
            .sum()
    }
    count(net.backend(name).unwrap().bpffs.path())
}
