//! A whole network around a balancer, for real connections: the topology of the end-to-end suites. A balancer that is
//! not daisy's stands where a mux would.
//!
//! ```text
//!  c1 (clients)  ─┐                    ┌─ balancer 10.2.0.11
//!  c2 (attacker) ─┴──── router ────────┼─ b1, b2, b3: servers (with agents, if the balancer is daisy's)
//! ```
//!
//! daisy's servers answer clients directly, and so does the one behind plain forwarding. Replies to connections whose
//! addresses nftables translated go back through it, by a rule in the router. A proxy's connections to servers are its
//! own.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::Path;
use std::sync::atomic::AtomicBool;

use anyhow::{Context as _, Result};
use daisy_tests::topology::{BULK_PORT, ECHO, VIP, WEB};
use daisy_tests::{Namespace, Topology};

use super::contestant::{Balancer, Contestant, Site};
use super::cpu;
use super::memory::Memory;
use super::spoof;

const BACKENDS: u8 = 3;
const BUCKETS: u32 = 65_536;
const HOST: Ipv4Addr = Ipv4Addr::new(10, 2, 0, 11);
const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 2, 0, 1);
/// Where spoofed packets claim to come from. Answers to them end at the router.
const SPOOFED: &str = "198.18.0.0/15";

/// The service for bulk transfer: one server, as iperf3 needs two connections to the same.
pub const BULK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(VIP), BULK_PORT);

/// A balancer that is not the topology's own.
struct Guest {
    balancer: Balancer,
    host: Namespace,
}

/// Clients, servers, and a balancer between them.
pub struct Network {
    /// Who it is.
    pub contestant: Contestant,
    guest: Option<Guest>,
    net: Topology,
}

impl Network {
    /// Starts it all.
    ///
    /// # Errors
    /// If anything is missing or refused.
    pub fn new(contestant: Contestant, directory: &Path) -> Result<Network> {
        let made = match contestant {
            Contestant::Daisy(io) => Network::with_daisy(io).map(|net| (net, None)),
            _ => Network::with_guest(contestant, directory).map(|(net, guest)| (net, Some(guest))),
        };
        let (mut net, guest) = made.with_context(|| format!("the network around {contestant}"))?;
        let (host, port, processes) = match &guest {
            Some(guest) => (&guest.host, "lb", guest.balancer.processes()),
            None => {
                let mux = net.mux("m1")?;
                (&mux.namespace, "m1", mux.process.iter().map(|process| process.id()).collect())
            }
        };
        // An interface that does not poll is steered: so is that of daisy over AF_PACKET.
        cpu::place(host, "eth0", cpu::BALANCER)?;
        for process in processes {
            cpu::pin_process(process, cpu::BALANCER)?;
        }
        cpu::place(net.router(), port, cpu::OTHERS)?;
        net.router().ip(&[format!("route add blackhole {SPOOFED}")])?;
        let client = &net.client(0).namespace;
        client.sysctl("net/ipv4/ip_local_port_range", "1024 65535")?;
        client.sysctl("net/ipv4/tcp_tw_reuse", "1")?;
        Ok(Network { contestant, guest, net })
    }

    fn with_daisy(io: daisy_tests::Io) -> Result<Topology> {
        let name = format!("bench-{}", io.flag());
        let mut net =
            Topology::new(&name).io(io).clients(2).muxes(1).backends(BACKENDS).buckets(BUCKETS).start()?;
        net.add_service("bulk", BULK, 64)?;
        net.enrol_in("bulk", "b1", 100)?;
        for service in ["echo", "web", "bulk"] {
            net.wait_windows_closed(service)?;
        }
        net.wait_settled()?;
        Ok(net)
    }

    fn with_guest(contestant: Contestant, directory: &Path) -> Result<(Topology, Guest)> {
        let name = format!("bench-{contestant}");
        let mut net = Topology::new(&name).plain().clients(2).muxes(0).backends(BACKENDS).start()?;
        let host = net.add_host("muxes", "lb", HOST)?;
        let servers: Vec<Ipv4Addr> = (0..BACKENDS).map(|i| Ipv4Addr::new(10, 3, 0, 11 + i)).collect();
        // What a network card does for it: packets of a connection that come together are taken together.
        host.output("ethtool", &["-K", "eth0", "gro", "on"])?;
        net.router().output("ethtool", &["-K", "lb", "tso", "off"])?;
        net.router().ip(&[
            format!("route replace {VIP}/32 via {HOST} dev muxes"),
            // Plain forwarding sends on what it gets; from there it goes to the one server.
            format!("rule add iif muxes to {VIP}/32 lookup 101"),
            format!("route add {VIP}/32 via {} table 101", servers[0]),
        ])?;
        if contestant == Contestant::Nftables {
            net.router().ip(&[
                "rule add iif backends to 10.1.0.0/16 lookup 102".to_owned(),
                format!("rule add iif backends to {SPOOFED} lookup 102"),
                format!("route add default via {HOST} table 102"),
            ])?;
        }
        let directory = directory.join(contestant.name());
        std::fs::create_dir_all(&directory)?;
        let site = Site {
            host: &host,
            device: "eth0",
            vip: VIP,
            ports: vec![
                (ECHO.port(), servers.clone()),
                (WEB.port(), servers.clone()),
                (BULK.port(), servers[..1].to_vec()),
            ],
            next_hop: ROUTER,
            controller: (&host, HOST),
            directory: &directory,
            cpus: None,
        };
        let balancer = contestant.set_up(&site)?;
        Ok((net, Guest { balancer, host }))
    }

    /// Runs `work` on the clients' host.
    ///
    /// # Errors
    /// What `work` returns.
    pub fn as_client<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        self.net.client(0).namespace.run(work)
    }

    /// The topology.
    pub fn topology(&self) -> &Topology {
        &self.net
    }

    /// The balancer's host.
    ///
    /// # Errors
    /// If there is none.
    pub fn balancer_host(&mut self) -> Result<&Namespace> {
        match &self.guest {
            Some(guest) => Ok(&guest.host),
            None => Ok(&self.net.mux("m1")?.namespace),
        }
    }

    /// The memory of a balancer that is not daisy's.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn guest_memory(&self) -> Result<Memory> {
        let guest = self.guest.as_ref().context("daisy's memory is measured on the wire")?;
        guest.balancer.memory(&guest.host)
    }

    /// Packets that the clients have sent so far, which all of a balancer's work follows from.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn client_packets(&self) -> Result<u64> {
        let text = self.net.router().output("ip", &["-s", "-o", "link", "show", "dev", "c1"])?;
        received_packets(&text).with_context(|| format!("no figures for c1: {text}"))
    }

    /// Sends SYNs from random addresses to the service `echo`, so many in a second, until `stop`. Returns how many.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn flood(&self, per_second: u32, stop: &AtomicBool) -> Result<u64> {
        let target = SocketAddrV4::new(VIP, ECHO.port());
        self.net.client(1).namespace.run(|| spoof::flood(target, per_second, stop))
    }
}

/// The packets received, in what `ip -s -o link` prints: after the heading of that row, bytes and packets.
fn received_packets(text: &str) -> Option<u64> {
    let row = text.split_once("RX:")?.1.split_once('\\')?.1;
    row.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_found_in_what_ip_prints() {
        let text = "5: c1@if2: <UP> mtu 1500 \\    link/ether 02:00 brd ff:ff\\    RX:  bytes packets errors dropped \
                    \\       4242      17      0       0 \\    TX:  bytes packets \\   1 2 ";
        assert_eq!(received_packets(text), Some(17));
        assert_eq!(received_packets("nothing"), None);
    }
}
