//! The hosts of a topology, and the command lines of what runs on them.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use nix::mount::{MsFlags, mount};
use serde::Deserialize;

use crate::cleanup;
use crate::netns::Namespace;
use crate::process::Process;

/// A host that only opens connections.
#[derive(Debug)]
pub struct Client {
    /// `c1`, `c2`, …
    pub name: String,
    /// Its address.
    pub address: Ipv4Addr,
    /// Its namespace; dropped last, when nothing runs inside any more.
    pub namespace: Namespace,
}

/// The controller's host.
#[derive(Debug)]
pub struct Controller {
    /// Its address.
    pub address: Ipv4Addr,
    /// The daemon, while it runs.
    pub process: Option<Process>,
    /// Its namespace; dropped last, when nothing runs inside any more.
    pub namespace: Namespace,
}

/// A mux's host.
#[derive(Debug)]
pub struct Mux {
    /// `m1`, `m2`, …
    pub name: String,
    /// Its address.
    pub address: Ipv4Addr,
    /// The daemon, while it runs.
    pub process: Option<Process>,
    /// Whether the router sends traffic to it.
    pub routed: bool,
    /// Its namespace; dropped last, when nothing runs inside any more.
    pub namespace: Namespace,
}

/// A backend's host: agent and servers.
#[derive(Debug)]
pub struct Backend {
    /// `b1`, `b2`, …
    pub name: String,
    /// Its address.
    pub address: Ipv4Addr,
    /// More arguments for the agent, from its next start on.
    pub agent_arguments: Vec<String>,
    /// The agent, while it runs.
    pub agent: Option<Process>,
    /// The echo server, while it runs.
    pub echo: Option<Process>,
    /// nginx and iperf3.
    pub servers: Vec<Process>,
    /// The BPF file system that outlives the agent.
    pub bpffs: BpfFs,
    /// Its namespace; dropped last, when nothing runs inside any more.
    pub namespace: Namespace,
}

/// A BPF file system of its own, unmounted in `Drop`: what an agent has pinned there goes with it.
#[derive(Debug)]
pub struct BpfFs(PathBuf);

impl BpfFs {
    /// Mounts one at `path`, which is made.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn mount(path: &Path) -> Result<BpfFs> {
        std::fs::create_dir_all(path)?;
        mount(Some("bpf"), path, Some("bpf"), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("cannot mount a BPF file system at {}", path.display()))?;
        cleanup::add_mount(path);
        Ok(BpfFs(path.to_owned()))
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for BpfFs {
    fn drop(&mut self) {
        cleanup::unmount(&self.0);
        cleanup::remove_mount(&self.0);
    }
}

/// The command line of nginx, whose configuration and files are made in `directory`: `/` tells the backend's name
/// and the client's address, anything else is a file below `www`; a PUT to `/upload/NAME` is kept as
/// `upload/NAME` in `directory`.
///
/// # Errors
/// If a file cannot be written.
pub fn nginx(name: &str, directory: &Path, www: &Path) -> Result<Command> {
    std::fs::create_dir_all(directory.join("upload"))?;
    let dir = directory.display();
    let www = www.display();
    let configuration = format!(
        r#"daemon off;
user root;
worker_processes 1;
pid {dir}/nginx.pid;
error_log {dir}/error.log;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    default_type application/octet-stream;
    keepalive_timeout 60s;
    keepalive_requests 1000000;
    client_body_temp_path {dir}/body;
    proxy_temp_path {dir}/proxy;
    fastcgi_temp_path {dir}/fastcgi;
    uwsgi_temp_path {dir}/uwsgi;
    scgi_temp_path {dir}/scgi;
    server {{
        listen 80 backlog=1024;
        add_header X-Backend {name} always;
        location = / {{
            default_type text/plain;
            return 200 "backend {name} client $remote_addr\n";
        }}
        location / {{ root {www}; }}
        location /upload {{
            root {dir};
            dav_methods PUT;
            client_max_body_size 1g;
        }}
    }}
}}
"#
    );
    let file = directory.join("nginx.conf");
    std::fs::write(&file, configuration)?;
    let mut command = Command::new("nginx");
    command.arg("-p").arg(directory).arg("-c").arg(file).arg("-e").arg(directory.join("error.log"));
    Ok(command)
}

/// Whether something listens on this TCP port of IPv4 inside the namespace.
///
/// # Errors
/// If the kernel's list cannot be read.
pub fn listens(namespace: &Namespace, port: u16) -> Result<bool> {
    let table = namespace.run(|| {
        // Not `/proc/net`: that is the namespace of the whole process, not of this thread.
        std::fs::read_to_string("/proc/thread-self/net/tcp").context("cannot read the list of sockets")
    })?;
    let local = format!(":{port:04X}");
    Ok(table.lines().skip(1).any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let (address, _, state) = (fields.next(), fields.next(), fields.next());
        // 0A is LISTEN (`include/net/tcp_states.h`).
        address.is_some_and(|a| a.ends_with(&local)) && state == Some("0A")
    }))
}

/// A node as the controller shows it.
#[derive(Clone, Debug, Deserialize)]
pub struct NodeView {
    /// Its name.
    pub name: String,
    /// `mux` or `agent`.
    pub kind: String,
    /// The version of its software.
    pub version: String,
    /// `live` or `expired`.
    pub lease: String,
    /// Whether it lacks a generation that it should have.
    pub behind: bool,
    /// The generation of each service that it has applied.
    pub applied: BTreeMap<String, u32>,
    /// How long ago it was heard of, in milliseconds; none if not since the controller started.
    pub last_seen_ms: Option<u64>,
    /// Its counters.
    #[serde(default)]
    pub counters: BTreeMap<String, u64>,
}

impl NodeView {
    /// Whether it has been heard of in time and has applied everything that it should.
    pub fn is_settled(&self) -> bool {
        self.lease == "live" && self.last_seen_ms.is_some() && !self.behind
    }

    /// A counter; 0 if it was never sent.
    pub fn counter(&self, name: &str) -> u64 {
        self.counters.get(name).copied().unwrap_or(0)
    }

    /// The sum of all counters of drops.
    pub fn dropped(&self) -> u64 {
        self.counters.iter().filter(|(name, _)| name.starts_with("dropped_")).map(|(_, count)| count).sum()
    }

    /// The packets that came in, and all that became of them. The two are equal once traffic has stopped.
    pub fn conservation(&self) -> (u64, u64) {
        let ways: &[&str] = match self.kind.as_str() {
            "mux" => &["sent", "passed"],
            _ => &["delivered", "accepted", "answered", "sent_on", "returned", "probes_answered"],
        };
        (self.counter("received"), ways.iter().map(|way| self.counter(way)).sum::<u64>() + self.dropped())
    }
}

/// A service as the controller shows it.
#[derive(Clone, Debug, Deserialize)]
pub struct ServiceView {
    /// Its name.
    pub name: String,
    /// Its number.
    pub id: u32,
    /// The generation of its newest table.
    pub generation: u32,
    /// The size of its table.
    pub buckets: u32,
    /// Buckets whose chain is longer than one.
    pub open_windows: u32,
    /// The longest chain.
    pub deepest_chain: u32,
    /// Its backends.
    pub backends: Vec<BackendView>,
}

impl ServiceView {
    /// A backend of it.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn backend(&self, name: &str) -> Result<&BackendView> {
        self.backends
            .iter()
            .find(|b| b.name == name)
            .with_context(|| format!("service {} has no backend {name}", self.name))
    }
}

/// A backend of a service as the controller shows it.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct BackendView {
    /// Its name.
    pub name: String,
    /// Its weight.
    pub weight: u32,
    /// `active`, `draining`, `drained`, `suspect` or `down`.
    pub state: String,
    /// Buckets whose new connections it takes.
    pub head_buckets: u32,
    /// Buckets in which it is a previous owner.
    pub past_buckets: u32,
    /// Buckets that its weight entitles it to.
    pub target_buckets: u32,
}
