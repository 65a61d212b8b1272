//! The tools of the suites, proved without a load balancer in between.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use daisy_tests::topology::WEB;
use daisy_tests::{EchoOptions, Topology};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[test]
fn clients_and_servers_agree_on_every_byte() {
    let _alone = crate::common::alone();
    let mut net = Topology::new("tools").plain().clients(1).backends(1).start().unwrap();
    let mut echo = net.echo(0, &EchoOptions::default()).unwrap();
    let web = net.requests(0, WEB, 50).unwrap();
    let sample = echo.wait_live(1_000).unwrap();
    assert_eq!(sample.by_backend["b1"], 1_000);
    echo.command("close 300").unwrap();
    echo.wait_for("300 closed", Duration::from_secs(10), |s| s.closed == 300).unwrap();
    echo.command("open 100").unwrap();
    echo.wait_live(800).unwrap();
    echo.talk(3).unwrap();
    let report = echo.finish().unwrap();
    println!("{}", report.summary());
    assert_eq!((report.connections, report.closed, report.broken, report.stalls), (1_100, 1_100, 0, 0));
    assert!(report.messages >= 800 * 3);

    let totals = web.finish().unwrap();
    assert_eq!(totals.failed, 0, "{:?}", totals.errors);
    assert_eq!(totals.by_backend["b1"], totals.ok);

    let server = net.echo_server_report("b1").unwrap();
    assert_eq!((server.accepted, server.closed, server.failed), (1_100, 1_100, 0));
    assert_eq!(server.bytes, report.bytes);
}

#[test]
fn a_dead_server_is_noticed() {
    let _alone = crate::common::alone();
    let mut net = Topology::new("dead").plain().clients(1).backends(1).start().unwrap();
    let options = EchoOptions { connections: 50, hang_ms: 2_000, ..EchoOptions::default() };
    let mut echo = net.echo(0, &options).unwrap();
    echo.wait_live(50).unwrap();
    // Its kernel resets what it had.
    net.backend("b1").unwrap().echo = None;
    echo.wait_for("50 broken", Duration::from_secs(10), |s| s.broken == 50).unwrap();
    // Nobody listens.
    echo.command("open 5").unwrap();
    echo.wait_for("5 refused", Duration::from_secs(10), |s| s.broken == 55).unwrap();
    let report = echo.finish().unwrap();
    assert_eq!(
        (report.connections, report.reset + report.eof, report.refused),
        (55, 50, 5),
        "{}",
        report.summary()
    );

    let mut net = Topology::new("cut").plain().clients(1).backends(1).start().unwrap();
    let mut echo = net.echo(0, &options).unwrap();
    echo.wait_live(50).unwrap();
    net.kill_backend("b1").unwrap();
    echo.wait_for("50 stalled", Duration::from_secs(10), |s| s.stalled == 50).unwrap();
    echo.wait_for("50 hung", Duration::from_secs(10), |s| s.broken == 50).unwrap();
    let report = echo.finish().unwrap();
    assert_eq!((report.hung, report.stalls), (50, 50), "{}", report.summary());
}

#[test]
fn nothing_is_left_behind() {
    let _alone = crate::common::alone();
    let net = Topology::new("clean").plain().clients(2).backends(2).start().unwrap();
    let directory = net.directory().to_owned();
    let namespace = net.router().name().to_owned();
    assert!(directory.is_dir());
    assert!(std::path::Path::new("/run/netns").join(&namespace).exists());
    drop(net);
    assert_nothing_left(namespace.strip_suffix("router").unwrap(), &directory);
}

#[test]
fn a_signal_leaves_nothing_behind() {
    let _alone = crate::common::alone();
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "tools::stands_until_a_signal", "--ignored", "--nocapture"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let standing =
            lines.filter_map(|line| Some(line.strip_prefix("standing ")?.to_owned())).next().unwrap();
        let (namespace, directory) = standing.split_once(' ').unwrap();
        assert!(Path::new("/run/netns").join(namespace).exists());
        kill(Pid::from_raw(child.id() as i32), signal).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(128 + signal as i32));
        assert_nothing_left(namespace.strip_suffix("router").unwrap(), Path::new(directory));
    }
}

#[test]
#[ignore = "the other half of `a_signal_leaves_nothing_behind`, which runs it: it waits for a signal"]
fn stands_until_a_signal() {
    let net = Topology::new("signal").plain().clients(1).backends(2).start().unwrap();
    let _echo = net.echo(0, &EchoOptions { connections: 10, ..EchoOptions::default() }).unwrap();
    println!("standing {} {}", net.router().name(), net.directory().display());
    loop {
        std::thread::park();
    }
}

/// No namespace whose name begins so, no mount or process below the directory, and no directory.
fn assert_nothing_left(prefix: &str, directory: &Path) {
    assert!(!directory.exists(), "{} is left", directory.display());
    let left: Vec<_> = std::fs::read_dir("/run/netns")
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().into_string().ok())
        .filter(|name| name.starts_with(prefix))
        .collect();
    assert_eq!(left, Vec::<String>::new());
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(directory.to_str().unwrap()));
    for entry in std::fs::read_dir("/proc").unwrap().map(Result::unwrap) {
        // Most have gone by the time they are looked at, or are no processes.
        let command = std::fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
        assert!(
            !command.contains(directory.to_str().unwrap()),
            "process {} is left: {command}",
            entry.path().display()
        );
    }
}
