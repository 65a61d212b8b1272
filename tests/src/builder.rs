//! The description of a topology, and what it needs of this machine.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use daisy_shared::service::Encapsulation;

use crate::cleanup;
use crate::topology::Topology;

/// How a mux receives and sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Io {
    /// An XDP program that does it all.
    Xdp,
    /// AF_XDP sockets.
    AfXdp,
    /// AF_PACKET rings.
    AfPacket,
}

impl Io {
    /// The value of the mux's `--io`.
    pub const fn flag(self) -> &'static str {
        match self {
            Io::Xdp => "xdp",
            Io::AfXdp => "af-xdp",
            Io::AfPacket => "af-packet",
        }
    }
}

/// What a topology shall consist of.
#[derive(Clone, Debug)]
pub struct Builder {
    pub(crate) name: String,
    pub(crate) clients: u8,
    pub(crate) muxes: u8,
    pub(crate) backends: u8,
    pub(crate) spares: u8,
    pub(crate) io: Io,
    pub(crate) buckets: u32,
    pub(crate) lease_ms: u64,
    pub(crate) encapsulation: Encapsulation,
    pub(crate) chaining: bool,
    pub(crate) daemons: bool,
    pub(crate) keep: bool,
}

impl Builder {
    /// How many clients; 1 if not said.
    #[must_use]
    pub fn clients(mut self, count: u8) -> Builder {
        self.clients = count;
        self
    }

    /// How many muxes; 2 if not said.
    #[must_use]
    pub fn muxes(mut self, count: u8) -> Builder {
        self.muxes = count;
        self
    }

    /// How many backends serve `echo` and `web` from the start; 3 if not said.
    #[must_use]
    pub fn backends(mut self, count: u8) -> Builder {
        self.backends = count;
        self
    }

    /// How many more backends stand ready, server and agent running, but in no service; 0 if not said.
    #[must_use]
    pub fn spares(mut self, count: u8) -> Builder {
        self.spares = count;
        self
    }

    /// How muxes receive and send; AF_XDP if not said.
    #[must_use]
    pub fn io(mut self, io: Io) -> Builder {
        self.io = io;
        self
    }

    /// The size of the tables of `echo` and `web`; 4,096 if not said.
    #[must_use]
    pub fn buckets(mut self, buckets: u32) -> Builder {
        self.buckets = buckets;
        self
    }

    /// The controller's `--lease-ms`; 3,000 if not said.
    #[must_use]
    pub fn lease_ms(mut self, lease_ms: u64) -> Builder {
        self.lease_ms = lease_ms;
        self
    }

    /// How packets of all services travel in closed windows; GUE if not said.
    #[must_use]
    pub fn encapsulation(mut self, encapsulation: Encapsulation) -> Builder {
        self.encapsulation = encapsulation;
        self
    }

    /// Whether agents send packets on along the chain; if not, they run with `--no-chaining`.
    #[must_use]
    pub fn chaining(mut self, on: bool) -> Builder {
        self.chaining = on;
        self
    }

    /// Hosts and servers only: no daemon runs, and the router sends the virtual address to the first backend.
    #[must_use]
    pub fn plain(mut self) -> Builder {
        self.daemons = false;
        self
    }

    /// Keeps logs and data also when all goes well.
    #[must_use]
    pub fn keep(mut self) -> Builder {
        self.keep = true;
        self
    }

    /// Builds and starts it all, and waits until every node has applied the newest tables.
    ///
    /// # Errors
    /// If something is missing on this machine, or does not start; the error says what.
    pub fn start(self) -> Result<Topology> {
        check_machine(self.daemons)?;
        cleanup::install();
        cleanup::sweep();
        let mut topology = Topology::lay_out(self)?;
        if let Err(error) = topology.start_all() {
            topology.failed = true;
            return Err(error);
        }
        Ok(topology)
    }
}

impl Topology {
    /// The start of a description; `name` appears in logs and directories.
    #[expect(clippy::new_ret_no_self, reason = "a description is what one begins a topology with")]
    pub fn new(name: &str) -> Builder {
        Builder {
            name: name.to_owned(),
            clients: 1,
            muxes: 2,
            backends: 3,
            spares: 0,
            io: Io::AfXdp,
            buckets: 4096,
            lease_ms: 3000,
            encapsulation: Encapsulation::Gue,
            chaining: true,
            daemons: true,
            keep: false,
        }
    }
}

/// The first things that would go wrong, said in one line each.
fn check_machine(daemons: bool) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("needs root: network namespaces and eBPF programs are made; run this as root");
    }
    let mut needed =
        vec![("ip", "iproute2"), ("ethtool", "ethtool"), ("nginx", "nginx-light"), ("iperf3", "iperf3")];
    if std::env::var_os("DAISY_TEST_PCAP").is_some() {
        needed.push(("tcpdump", "tcpdump"));
    }
    for (program, package) in needed {
        if !program_exists(program) {
            bail!("the program `{program}` is missing: apt-get install {package}, or run `make setup`");
        }
    }
    for path in ["/proc/self/ns/net", "/sys/class/net"] {
        if !Path::new(path).exists() {
            bail!("{path} is missing: mount /proc and /sys");
        }
    }
    let binaries = binary_directory()?;
    let daemon_binaries: &[&str] = &["daisy-controller", "daisyctl", "daisy-mux", "daisy-agent"];
    for name in std::iter::once(&"daisy-echo").chain(if daemons { daemon_binaries } else { &[] }) {
        binary_in(&binaries, name)?;
    }
    Ok(())
}

/// Whether a program is on the path.
pub fn program_exists(name: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(name).is_file()))
}

/// Where cargo puts the workspace's binaries: beside this one, or above it if this is a test.
///
/// # Errors
/// If this program's own place cannot be told.
pub fn binary_directory() -> Result<PathBuf> {
    if let Some(directory) = std::env::var_os("DAISY_BIN_DIR") {
        return Ok(PathBuf::from(directory));
    }
    let this = std::env::current_exe().context("cannot tell where this program is")?;
    let mut directory = this.parent().context("this program is in no directory")?;
    if directory.ends_with("deps") {
        directory = directory.parent().context("`deps` has no parent")?;
    }
    Ok(directory.to_owned())
}

/// A binary of this workspace, in this directory.
///
/// # Errors
/// If it is not built.
pub fn binary_in(directory: &Path, name: &str) -> Result<PathBuf> {
    let path = directory.join(name);
    if !path.is_file() {
        bail!("{} is not built: run `make build`", path.display());
    }
    Ok(path)
}
