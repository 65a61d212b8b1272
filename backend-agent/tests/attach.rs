//! Attaching, taking over what an earlier run has left, and leaving nothing.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

mod common;

use common::{config, ip, lone_interface, on_new_host, run, service};
use daisy_agent::datapath::{Attached, Datapath, DatapathError};
use daisy_node::xdp::{Attached as In, Mode};
use daisy_shared::service::ServiceId;

/// The numbers of the XDP and tc programs on `eth0`.
fn programs() -> (Option<String>, Option<String>) {
    let number = |text: &str, before: &str| {
        let at = text.find(before)? + before.len();
        Some(text[at..].chars().take_while(char::is_ascii_digit).collect())
    };
    let xdp = ip("-details link show dev eth0");
    let tc = run("tc", "filter show dev eth0 egress");
    (number(&xdp, "prog/xdp id "), number(&tc, " id "))
}

#[test]
fn attaches_replaces_and_leaves_nothing() {
    on_new_host(|bpffs| {
        lone_interface();
        let config = config(bpffs);
        assert_eq!(programs(), (None, None));
        let mut first = Datapath::load(&config).unwrap();
        assert_eq!(first.attach().unwrap(), Attached { mode: In::Native, replaced: false });
        first.set_service(&service(1, 80, 16)).unwrap();
        let (xdp, tc) = programs();
        assert!(xdp.is_some() && tc.is_some());
        drop(first);
        assert_eq!(programs(), (xdp.clone(), tc.clone()), "the end of the daemon changes nothing");

        let mut second = Datapath::load(&config).unwrap();
        assert_eq!(programs(), (xdp.clone(), tc.clone()), "loading changes nothing");
        assert_eq!(second.attach().unwrap(), Attached { mode: In::Native, replaced: true });
        assert_eq!(second.services(), [ServiceId(1)]);
        let replaced = programs();
        assert!(replaced.0.is_some() && replaced.1.is_some());
        assert!(replaced.0 != xdp && replaced.1 != tc);
        assert_eq!(run("tc", "filter show dev eth0 egress").matches("handle 0xda1 ").count(), 1);
        // And once more by the same daemon.
        assert_eq!(second.attach().unwrap(), Attached { mode: In::Native, replaced: true });
        drop(second);

        Datapath::unload("eth0", bpffs).unwrap();
        assert_eq!(programs(), (None, None));
        assert!(!bpffs.join("daisy-agent").exists());
        assert!(!run("tc", "qdisc show dev eth0").contains("clsact"));
        Datapath::unload("eth0", bpffs).unwrap();
        Datapath::unload("gone0", bpffs).unwrap();
        // Nor what others have pinned beside it.
        std::fs::create_dir(bpffs.join("other")).unwrap();
        for astray in ["../other", "..", ".", ""] {
            assert!(Datapath::unload(astray, bpffs).is_err(), "{astray:?}");
        }
        assert!(bpffs.join("other").exists());
    });
}

#[test]
fn generic_mode_and_a_change_of_mode() {
    on_new_host(|bpffs| {
        lone_interface();
        let mut config = config(bpffs);
        config.mode = Mode::Generic;
        let mut datapath = Datapath::load(&config).unwrap();
        assert_eq!(datapath.attach().unwrap(), Attached { mode: In::Generic, replaced: false });
        config.mode = Mode::Auto;
        let mut datapath = Datapath::load(&config).unwrap();
        assert_eq!(datapath.attach().unwrap(), Attached { mode: In::Generic, replaced: true });
        config.mode = Mode::Native;
        let mut datapath = Datapath::load(&config).unwrap();
        assert_eq!(datapath.attach().unwrap(), Attached { mode: In::Native, replaced: false });
        Datapath::unload("eth0", bpffs).unwrap();
    });
}

#[test]
fn an_interface_that_was_made_anew_gets_a_new_attachment() {
    on_new_host(|bpffs| {
        lone_interface();
        Datapath::load(&config(bpffs)).unwrap().attach().unwrap();
        ip("link delete eth0");
        lone_interface();
        let mut datapath = Datapath::load(&config(bpffs)).unwrap();
        assert_eq!(datapath.attach().unwrap(), Attached { mode: In::Native, replaced: false });
        assert!(programs().0.is_some());
    });
}

#[test]
fn other_peoples_programs_stay() {
    on_new_host(|bpffs| {
        lone_interface();
        run("tc", "qdisc add dev eth0 clsact");
        let mut datapath = Datapath::load(&config(bpffs)).unwrap();
        datapath.attach().unwrap();
        Datapath::unload("eth0", bpffs).unwrap();
        assert!(run("tc", "qdisc show dev eth0").contains("clsact"), "it was not ours");
        run("tc", "qdisc delete dev eth0 clsact");

        let mut datapath = Datapath::load(&config(bpffs)).unwrap();
        datapath.attach().unwrap();
        run("tc", "filter add dev eth0 ingress protocol ip u32 match u32 0 0 flowid 1:1");
        Datapath::unload("eth0", bpffs).unwrap();
        assert!(run("tc", "filter show dev eth0 ingress").contains("u32"));
    });
}

#[test]
fn another_program_on_the_interface_is_named_as_the_reason() {
    on_new_host(|bpffs| {
        lone_interface();
        let mut config = config(bpffs);
        Datapath::load(&config).unwrap().attach().unwrap();
        let other = common::mount_bpffs();
        config.bpffs = other.path().to_owned();
        let error = Datapath::load(&config).unwrap().attach().unwrap_err();
        assert!(
            matches!(error, DatapathError::Kernel { .. }) && error.to_string().contains("eth0"),
            "{error}"
        );
    });
}
