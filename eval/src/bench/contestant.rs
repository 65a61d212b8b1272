//! Who is compared, and how each is set up on a host: the one place for it.

use std::collections::BTreeSet;
use std::fmt;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use daisy_tests::node::NodeView;
use daisy_tests::{Api, Io, Namespace, Process, builder};
use nix::sys::resource::{Resource, getrlimit};

use super::memory;

const PATIENCE: Duration = Duration::from_secs(30);
const CONTROLLER_PORT: u16 = 7600;
/// On the wire there are no agents that could renew a lease: none may end. An hour is the most that can be had.
const LEASE_MS: &str = "3600000";
const BUCKETS: &str = "65536";

/// Something that stands between clients and servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contestant {
    /// The kernel's forwarding, to one server. It balances nothing: this is the floor.
    Kernel,
    /// Destination NAT by nftables, which picks the server by a hash and leaves the rest to connection tracking.
    Nftables,
    /// HAProxy in TCP mode.
    Haproxy,
    /// daisy-mux.
    Daisy(Io),
}

impl Contestant {
    /// All, in the order in which they are measured and shown.
    pub const ALL: [Contestant; 6] = [
        Contestant::Kernel,
        Contestant::Nftables,
        Contestant::Haproxy,
        Contestant::Daisy(Io::AfPacket),
        Contestant::Daisy(Io::AfXdp),
        Contestant::Daisy(Io::Xdp),
    ];

    /// As in keys and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Contestant::Kernel => "kernel",
            Contestant::Nftables => "nftables",
            Contestant::Haproxy => "haproxy",
            Contestant::Daisy(Io::AfPacket) => "daisy_af_packet",
            Contestant::Daisy(Io::AfXdp) => "daisy_af_xdp",
            Contestant::Daisy(Io::Xdp) => "daisy_xdp",
        }
    }

    /// Whether it forwards packets one by one. A proxy does not: it ends connections and makes others.
    pub const fn forwards(self) -> bool {
        !matches!(self, Contestant::Haproxy)
    }

    /// Sets it up on a host.
    ///
    /// # Errors
    /// If something is missing or refused, or does not start.
    pub fn set_up(self, site: &Site<'_>) -> Result<Balancer> {
        let made = match self {
            Contestant::Kernel => kernel(site),
            Contestant::Nftables => nftables(site),
            Contestant::Haproxy => haproxy(site),
            Contestant::Daisy(io) => daisy(site, io),
        };
        made.with_context(|| format!("{self} could not be set up"))
    }
}

impl fmt::Display for Contestant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Contestant {
    type Err = String;

    fn from_str(text: &str) -> Result<Contestant, String> {
        let known = || Contestant::ALL.map(Contestant::name).join(", ");
        Contestant::ALL
            .into_iter()
            .find(|one| one.name() == text)
            .ok_or_else(|| format!("{text:?} is none of {}", known()))
    }
}

/// Where a balancer is set up, and for what.
pub struct Site<'a> {
    /// Its host, whose links, addresses and routes are there.
    pub host: &'a Namespace,
    /// Its interface.
    pub device: &'a str,
    /// The virtual address.
    pub vip: Ipv4Addr,
    /// Its ports, and the servers behind each.
    pub ports: Vec<(u16, Vec<Ipv4Addr>)>,
    /// Where plain forwarding sends the virtual address.
    pub next_hop: Ipv4Addr,
    /// The host of a controller, and its address, for those that need one.
    pub controller: (&'a Namespace, Ipv4Addr),
    /// Where configurations and logs go.
    pub directory: &'a Path,
    /// The CPUs to work on, if not one that is chosen from outside.
    pub cpus: Option<usize>,
}

/// A running balancer.
#[derive(Debug)]
pub struct Balancer {
    workers: Vec<Process>,
    _others: Vec<Process>,
    /// The kernel's slabs when it was new.
    slab_before: u64,
    contestant: Contestant,
}

impl Balancer {
    fn new(contestant: Contestant, workers: Vec<Process>, others: Vec<Process>) -> Result<Balancer> {
        Ok(Balancer { workers, _others: others, slab_before: memory::slab_bytes()?, contestant })
    }

    /// The processes that do its work. The kernel needs none.
    pub fn processes(&self) -> Vec<u32> {
        self.workers.iter().map(Process::id).collect()
    }

    /// What it holds, and in how many bytes.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn memory(&self, host: &Namespace) -> Result<memory::Memory> {
        match (self.contestant, &self.workers[..]) {
            (Contestant::Kernel, _) => Ok(memory::Memory::default()),
            (Contestant::Nftables, _) => memory::of_conntrack(host, self.slab_before),
            (Contestant::Haproxy, [worker, ..]) => memory::of_proxy(host, worker.id()),
            (Contestant::Daisy(_), [worker, ..]) => memory::of_daemon(worker.id()),
            (_, []) => bail!("{} has no process", self.contestant),
        }
    }
}

fn kernel(site: &Site<'_>) -> Result<Balancer> {
    site.host.sysctl("net/ipv4/ip_forward", "1")?;
    site.host.ip(&[format!("route replace {}/32 via {} dev {}", site.vip, site.next_hop, site.device)])?;
    Balancer::new(Contestant::Kernel, Vec::new(), Vec::new())
}

fn nftables(site: &Site<'_>) -> Result<Balancer> {
    site.host.sysctl("net/ipv4/ip_forward", "1")?;
    let rules: String = site.ports.iter().map(|(port, servers)| nft_rule(site.vip, *port, servers)).collect();
    let text = format!(
        "table ip balance {{\n chain in {{\n  type nat hook prerouting priority dstnat;\n{rules} }}\n}}\n"
    );
    let file = site.directory.join("balance.nft");
    std::fs::write(&file, text)?;
    site.host.output("nft", &["-f", &file.display().to_string()])?;
    Balancer::new(Contestant::Nftables, Vec::new(), Vec::new())
}

fn nft_rule(vip: Ipv4Addr, port: u16, servers: &[Ipv4Addr]) -> String {
    let chosen = match servers {
        [only] => only.to_string(),
        _ => {
            let choices: Vec<_> = servers.iter().enumerate().map(|(i, s)| format!("{i} : {s}")).collect();
            format!("jhash ip saddr . tcp sport mod {} map {{ {} }}", servers.len(), choices.join(", "))
        }
    };
    format!("  ip daddr {vip} tcp dport {port} dnat to {chosen}\n")
}

fn haproxy(site: &Site<'_>) -> Result<Balancer> {
    site.host.ip(&[format!("address add {}/32 dev lo", site.vip)])?;
    for (key, value) in [
        ("net/ipv4/ip_local_port_range", "1024 65535"),
        ("net/ipv4/tcp_tw_reuse", "1"),
        ("net/core/somaxconn", "4096"),
        ("net/ipv4/tcp_max_syn_backlog", "4096"),
    ] {
        site.host.sysctl(key, value)?;
    }
    // One thread: it has one CPU.
    let (threads, most) = (site.cpus.unwrap_or(1), proxied_most()?);
    let mut text = format!(
        "global\n maxconn {most}\n nbthread {threads}\ndefaults\n mode tcp\n maxconn {most}\n backlog 4096\n \
         timeout connect 10s\n timeout client 1h\n timeout server 1h\n"
    );
    for (port, servers) in &site.ports {
        text += &format!("listen port{port}\n bind {}:{port}\n balance roundrobin\n", site.vip);
        for (i, server) in servers.iter().enumerate() {
            text += &format!(" server s{i} {server}:{port}\n");
        }
    }
    let file = site.directory.join("haproxy.cfg");
    std::fs::write(&file, text)?;
    let mut command = Command::new("haproxy");
    command.arg("-db").arg("-f").arg(&file);
    let log = site.directory.join("haproxy.log");
    let mut process = Process::start("haproxy", site.host, command, &log, false)?;
    let end = Instant::now() + PATIENCE;
    while !daisy_tests::node::listens(site.host, site.ports[0].0)? {
        process.check()?;
        if Instant::now() > end {
            bail!("HAProxy does not listen");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Balancer::new(Contestant::Haproxy, vec![process], Vec::new())
}

/// Controller and mux, without agents: what a mux does does not depend on them. Each service has one server, the first:
/// with more, buckets would have moved, and without agents nobody would say that the windows may close.
fn daisy(site: &Site<'_>, io: Io) -> Result<Balancer> {
    let binaries = builder::binary_directory()?;
    let token = format!("bench-{}", std::process::id());
    let token_file = site.directory.join("token");
    std::fs::write(&token_file, &token)?;
    let (controller_host, controller_address) = site.controller;
    let mut command = Command::new(builder::binary_in(&binaries, "daisy-controller")?);
    command
        .args(["--listen", &format!("{controller_address}:{CONTROLLER_PORT}"), "--lease-ms", LEASE_MS])
        .arg("--store")
        .arg(site.directory.join("controller.redb"))
        .arg("--token-file")
        .arg(&token_file);
    let log = site.directory.join("controller.log");
    let mut controller = Process::start("controller", controller_host, command, &log, false)?;
    controller.wait_for_line("ready", PATIENCE)?;

    let api = Api::new(&format!("http://{controller_address}:{CONTROLLER_PORT}"), &token);
    let program = builder::binary_in(&binaries, "daisyctl")?.display().to_string();
    let file = token_file.display().to_string();
    let ask = |words: &[&str]| {
        let arguments = [&["--controller", api.base(), "--token-file", &file][..], words].concat();
        controller_host.output(&program, &arguments)
    };
    for (port, servers) in &site.ports {
        let (name, vip, port) = (format!("port{port}"), site.vip.to_string(), port.to_string());
        ask(&["service", "add", &name, "--vip", &vip, "--port", &port, "--buckets", BUCKETS])?;
        let server = servers.first().context("a service without servers")?.to_string();
        ask(&["backend", "add", &name, &format!("server-{port}"), "--address", &server])?;
    }
    let mut command = Command::new(builder::binary_in(&binaries, "daisy-mux")?);
    command
        .args(["--name", "mux", "--interface", site.device, "--io", io.flag(), "--controller", api.base()])
        .arg("--token-file")
        .arg(&token_file)
        .arg("--state-dir")
        .arg(site.directory.join("mux-state"));
    if let (Some(cpus), Io::AfPacket | Io::AfXdp) = (site.cpus, io) {
        command.args(["--cores", &format!("0-{}", cpus - 1)]);
    }
    let mut mux = Process::start("mux", site.host, command, &site.directory.join("mux.log"), false)?;
    mux.wait_for_line("ready", PATIENCE)?;
    let end = Instant::now() + PATIENCE;
    loop {
        mux.check()?;
        let nodes: Vec<NodeView> = serde_json::from_value(api.get(controller_host, "/v1/nodes")?)?;
        if nodes.iter().any(|node| node.name == "mux" && node.is_settled()) {
            break;
        }
        if Instant::now() > end {
            bail!("the mux has not taken its tables: {nodes:?}");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Balancer::new(Contestant::Daisy(io), vec![mux], vec![controller])
}

/// How many connections a proxy can have, two files each, and a few for itself.
///
/// # Errors
/// If the kernel does not tell.
pub fn proxied_most() -> Result<usize> {
    let (files, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok((usize::try_from(files)?.saturating_sub(200) / 2).max(1))
}

/// The programs that the contestants need, with their packages.
pub fn programs(of: &[Contestant]) -> BTreeSet<(&'static str, &'static str)> {
    of.iter()
        .filter_map(|one| match one {
            Contestant::Nftables => Some(("nft", "nftables")),
            Contestant::Haproxy => Some(("haproxy", "haproxy")),
            Contestant::Kernel | Contestant::Daisy(_) => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_keys_and_come_back() {
        for one in Contestant::ALL {
            assert_eq!(one.name().parse::<Contestant>(), Ok(one));
            assert!(one.name().chars().all(|c| c.is_ascii_lowercase() || c == '_'));
        }
        assert!("ipvs".parse::<Contestant>().is_err());
    }

    #[test]
    fn a_rule_spreads_over_all_servers() {
        let servers = [Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2)];
        let rule = nft_rule(Ipv4Addr::new(203, 0, 113, 1), 80, &servers);
        assert!(rule.contains("mod 2 map { 0 : 10.0.0.1, 1 : 10.0.0.2 }"), "{rule}");
        assert!(nft_rule(Ipv4Addr::LOCALHOST, 80, &servers[..1]).contains("dnat to 10.0.0.1\n"));
    }
}
