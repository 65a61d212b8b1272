//! Next hops against a real kernel.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

mod netns;

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use daisy_node::interface::{Interface, InterfaceError, Mac};
use daisy_node::next_hops::{NextHop, NextHops};
use netns::Host;

const PATIENCE: Duration = Duration::from_secs(15);

fn address(text: &str) -> Ipv4Addr {
    text.parse().unwrap()
}

/// What the resolver has said so far.
struct Seen {
    changes: Receiver<(Ipv4Addr, Option<NextHop>)>,
    latest: BTreeMap<Ipv4Addr, Option<NextHop>>,
}

impl Seen {
    /// Waits until the next hop of this address is the given one.
    fn until(&mut self, of: &str, expected: Option<NextHop>) {
        let of = address(of);
        while self.latest.get(&of) != Some(&expected) {
            let change = self.changes.recv_timeout(PATIENCE);
            let (address, next_hop) = change.unwrap_or_else(|_| {
                panic!("next hop of {of}: {:?}, expected {expected:?}", self.latest.get(&of));
            });
            self.latest.insert(address, next_hop);
        }
    }
}

#[test]
fn next_hops_follow_the_kernel() {
    let (node, peer, other) = (Host::new(), Host::new(), Host::new());
    node.join("under", &peer, "eth0");
    node.join("beside", &other, "eth0");
    node.sh("ip addr add 10.9.0.1/24 dev under; ip addr add 10.6.0.1/24 dev beside");
    node.sh("ip route add 10.8.0.0/24 via 10.9.0.2");
    peer.sh("ip addr add 10.9.0.2/24 dev eth0; ip addr add 10.9.0.3/24 dev eth0");
    let there = peer.run(|| Interface::find("eth0").unwrap());
    let here = node.run(|| Interface::find("under").unwrap());
    assert_eq!((here.address, here.prefix_len, here.mtu), (address("10.9.0.1"), 24, 1500));

    let (sender, changes) = channel();
    let interface = here.clone();
    let next_hops = node.run(move || {
        NextHops::start(std::slice::from_ref(&interface), move |address, next_hop| {
            let _test_is_over = sender.send((address, next_hop));
        })
        .unwrap()
    });
    let wanted = ["10.9.0.2", "10.8.0.7", "10.7.0.1", "10.6.0.2", "10.9.0.1"].map(address);
    next_hops.set_wanted(BTreeSet::from(wanted));
    // No route, another interface, this node itself.
    let without = ["10.7.0.1", "10.6.0.2", "10.9.0.1"].map(address);
    assert_eq!(next_hops.settle(PATIENCE), BTreeSet::from(without));
    let hop = NextHop { interface: here.index, source: here.mac, destination: there.mac };
    let mut seen = Seen { changes, latest: BTreeMap::new() };
    seen.until("10.8.0.7", Some(hop));
    seen.until("10.9.0.2", Some(hop));
    assert_eq!(seen.latest.len(), 2);

    // One more, behind the same neighbour's second address.
    next_hops.want(address("10.9.0.3"));
    seen.until("10.9.0.3", Some(hop));

    // The neighbour changes its Ethernet address and says so.
    peer.sh("echo 1 > /proc/sys/net/ipv4/conf/eth0/arp_notify; ip link set eth0 address 02:00:00:00:00:77");
    let moved = NextHop { destination: Mac([2, 0, 0, 0, 0, 0x77]), ..hop };
    for address in ["10.9.0.2", "10.8.0.7", "10.9.0.3"] {
        seen.until(address, Some(moved));
    }

    // The route goes and comes.
    node.sh("ip route del 10.8.0.0/24");
    seen.until("10.8.0.7", None);
    node.sh("ip route add 10.8.0.0/24 via 10.9.0.3");
    seen.until("10.8.0.7", Some(moved));

    // A neighbour falls silent: the kernel would keep it as stale for ever, as nothing of its own goes there.
    node.sh("cd /proc/sys/net/ipv4/neigh/under; echo 500 > base_reachable_time_ms; \
         echo 1 > delay_first_probe_time; echo 200 > retrans_time_ms");
    peer.sh("ip addr del 10.9.0.3/24 dev eth0");
    seen.until("10.9.0.3", None);
    peer.sh("ip addr add 10.9.0.3/24 dev eth0");
    seen.until("10.9.0.3", Some(moved));

    // The interface goes down and up.
    node.sh("ip link set under down");
    seen.until("10.9.0.2", None);
    node.sh("ip link set under address 02:00:00:00:00:66; ip link set under up");
    let renamed = NextHop { source: Mac([2, 0, 0, 0, 0, 0x66]), ..moved };
    seen.until("10.9.0.2", Some(renamed));

    next_hops.set_wanted(BTreeSet::new());
    seen.until("10.9.0.2", None);
    assert_eq!(next_hops.settle(PATIENCE), BTreeSet::new());
}

#[test]
fn interfaces_that_cannot_be_used_are_named() {
    let (node, peer) = (Host::new(), Host::new());
    node.join("bare", &peer, "eth0");
    let find = |name: &'static str| node.run(move || Interface::find(name).unwrap_err());
    assert!(matches!(find("nothere"), InterfaceError::Missing(name) if name == "nothere"));
    assert!(matches!(find("lo"), InterfaceError::NotEthernet(_)));
    assert!(matches!(find("bare"), InterfaceError::NoAddress(_)));
}
