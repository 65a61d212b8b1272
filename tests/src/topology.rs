//! A whole network in namespaces: clients, an ECMP router, muxes, backends, a controller.
//!
//! ```text
//!  c1 10.1.1.2 ─┐             ┌─ bridge `muxes`    10.2.0.1/24 ─ m1 10.2.0.11, m2 10.2.0.12, …
//!  c2 10.1.2.2 ─┴─ router ────┼─ bridge `backends` 10.3.0.1/24 ─ b1 10.3.0.11, b2 10.3.0.12, …
//!                             └─ controller        10.4.0.2
//! ```
//!
//! Muxes and backends each stand in a segment of their own, as racks do: a mux reaches backends through the
//! router, agents reach each other directly, and every backend sees the others' ARP requests. The router spreads
//! the virtual address over the muxes by a hash over the 5-tuple (`fib_multipath_hash_policy=1`), and knows
//! nothing of their health: [`Topology::set_routed`] is what a routing daemon would do. Replies go straight from
//! backends to clients. Every link has an MTU of 1,500.
//!
//! What is not obvious, and needed:
//! * Clients compute their own checksums (`ethtool -K eth0 tx off`): a veth leaves that to a device that does not
//!   exist, and muxes would forward what they find.
//! * The router's end of every mux's and backend's link has an XDP program ([`crate::bpf`]).
//! * No reverse-path filter: replies come in where nothing is ever sent to.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::api::Api;
use crate::bpf::PassProgram;
use crate::builder::{Builder, binary_directory, binary_in};
use crate::capture::Capture;
use crate::cleanup;
use crate::netns::{self, Namespace};
use crate::node::{Backend, BpfFs, Client, Controller, Mux, listens, nginx};
use crate::process::{Process, tail};

/// The virtual address of the services that a topology starts with.
pub const VIP: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
/// The service `echo`.
pub const ECHO: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(VIP), 7000);
/// The service `web`.
pub const WEB: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(VIP), 80);
/// The port on which every backend's iperf3 listens.
pub const BULK_PORT: u16 = 5201;

pub(crate) const CONTROLLER_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 4, 0, 2);
pub(crate) const CONTROLLER_PORT: u16 = 7600;

/// How long state may take to arrive where a helper waits for it. Far more than it takes: a loaded machine must
/// not fail a test.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A running network. Everything in it ends with it.
pub struct Topology {
    pub(crate) builder: Builder,
    pub(crate) number: u32,
    pub(crate) directory: PathBuf,
    pub(crate) binaries: PathBuf,
    pub(crate) token_file: PathBuf,
    pub(crate) api: Api,
    pub(crate) captures: Vec<Capture>,
    pub(crate) clients: Vec<Client>,
    pub(crate) muxes: Vec<Mux>,
    pub(crate) backends: Vec<Backend>,
    pub(crate) controller: Controller,
    pub(crate) passes: Vec<(String, PassProgram)>,
    pub(crate) vips: Vec<Ipv4Addr>,
    pub(crate) rotation: usize,
    /// Nodes that are cut off from the controller.
    pub(crate) cut: Vec<String>,
    pub(crate) failed: bool,
    // Last: the links of all others end here.
    pub(crate) router: Namespace,
}

impl Topology {
    pub(crate) fn lay_out(builder: Builder) -> Result<Topology> {
        let number = netns::next_number();
        let binaries = binary_directory()?;
        let target = binaries.parent().context("the directory of binaries has no parent")?;
        let directory =
            target.join("daisy-tests").join(format!("{}-{}-{number}", builder.name, std::process::id()));
        std::fs::create_dir_all(&directory)
            .with_context(|| format!("cannot make the directory {}", directory.display()))?;
        if !builder.keep {
            cleanup::add_directory(&directory);
        }
        let token = format!("daisy-tests-{}-{number}", std::process::id());
        let token_file = directory.join("token");
        std::fs::write(&token_file, &token)?;

        let router = Namespace::create(number, "router")?;
        router.sysctl("net/ipv4/ip_forward", "1")?;
        router.sysctl("net/ipv4/fib_multipath_hash_policy", "1")?;
        router.ip(&[
            "link add muxes type bridge stp_state 0 forward_delay 0",
            "link add backends type bridge stp_state 0 forward_delay 0",
            "address add 10.2.0.1/24 dev muxes",
            "address add 10.3.0.1/24 dev backends",
            "link set muxes up",
            "link set backends up",
        ])?;
        let controller = Controller {
            namespace: Namespace::create(number, "controller")?,
            address: CONTROLLER_ADDRESS,
            process: None,
        };
        router.link_to("controller", &controller.namespace)?;
        router.ip(&["address add 10.4.0.1/24 dev controller", "link set controller up"])?;
        configure(&controller.namespace, CONTROLLER_ADDRESS, Ipv4Addr::new(10, 4, 0, 1))?;

        let api = Api::new(&format!("http://{CONTROLLER_ADDRESS}:{CONTROLLER_PORT}"), &token);
        Ok(Topology {
            builder,
            number,
            directory,
            binaries,
            token_file,
            api,
            captures: Vec::new(),
            clients: Vec::new(),
            muxes: Vec::new(),
            backends: Vec::new(),
            controller,
            passes: Vec::new(),
            vips: vec![VIP],
            rotation: 0,
            cut: Vec::new(),
            failed: false,
            router,
        })
    }

    pub(crate) fn start_all(&mut self) -> Result<()> {
        std::fs::create_dir_all(self.directory.join("www"))?;
        for _ in 0..self.builder.clients {
            self.add_client()?;
        }
        if std::env::var_os("DAISY_TEST_PCAP").is_some() {
            let file = self.directory.join("router.pcap");
            self.captures.push(Capture::start("capture", &self.router, &file, &self.log("capture"))?);
        }
        let Builder { muxes, backends, spares, daemons, buckets, .. } = self.builder;
        if !daemons {
            for _ in 0..backends + spares {
                self.start_backend_host()?;
            }
            let first = self.backends.first().context("a topology without daemons needs a backend")?;
            first.namespace.ip(&[format!("address add {VIP}/32 dev lo")])?;
            self.router.ip(&[format!("route replace {VIP}/32 via {}", first.address)])?;
            return Ok(());
        }
        self.start_controller()?;
        for (name, address) in [("echo", ECHO), ("web", WEB)] {
            self.add_service(name, address, buckets)?;
        }
        for _ in 0..muxes {
            self.start_mux_host()?;
        }
        for _ in 0..backends + spares {
            self.start_backend_host()?;
        }
        for index in 0..usize::from(backends + spares) {
            let name = self.backends[index].name.clone();
            self.start_agent(&name, None)?;
        }
        for index in 0..usize::from(backends) {
            let name = self.backends[index].name.clone();
            self.enrol(&name, 100)?;
        }
        self.wait_settled()?;
        for mux in &mut self.muxes {
            mux.routed = true;
        }
        self.route()
    }

    // ---- what is where -------------------------------------------------------------------------------------

    /// Where logs and data are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The files that every backend's nginx serves.
    pub fn www(&self) -> PathBuf {
        self.directory.join("www")
    }

    /// A client, from 0.
    pub fn client(&self, index: usize) -> &Client {
        &self.clients[index]
    }

    /// A mux by its name.
    ///
    /// # Errors
    /// If there is none.
    pub fn mux(&mut self, name: &str) -> Result<&mut Mux> {
        self.muxes.iter_mut().find(|m| m.name == name).with_context(|| format!("there is no mux {name}"))
    }

    /// A backend by its name.
    ///
    /// # Errors
    /// If there is none.
    pub fn backend(&mut self, name: &str) -> Result<&mut Backend> {
        self.backends
            .iter_mut()
            .find(|b| b.name == name)
            .with_context(|| format!("there is no backend {name}"))
    }

    /// The names of all muxes.
    pub fn mux_names(&self) -> Vec<String> {
        self.muxes.iter().map(|m| m.name.clone()).collect()
    }

    /// The names of all backends, spares too.
    pub fn backend_names(&self) -> Vec<String> {
        self.backends.iter().map(|b| b.name.clone()).collect()
    }

    /// The router's namespace.
    pub fn router(&self) -> &Namespace {
        &self.router
    }

    /// The controller's host.
    pub fn controller(&self) -> &Controller {
        &self.controller
    }

    /// A binary of this workspace.
    ///
    /// # Errors
    /// If it is not built.
    pub fn binary(&self, name: &str) -> Result<PathBuf> {
        binary_in(&self.binaries, name)
    }

    pub(crate) fn log(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.log"))
    }

    pub(crate) fn host(&self, name: &str) -> Result<(&Namespace, Ipv4Addr)> {
        let muxes = self.muxes.iter().map(|m| (&m.name, &m.namespace, m.address));
        let backends = self.backends.iter().map(|b| (&b.name, &b.namespace, b.address));
        let (_, namespace, address) = muxes
            .chain(backends)
            .find(|(n, ..)| *n == name)
            .with_context(|| format!("there is no node {name}"))?;
        Ok((namespace, address))
    }

    // ---- hosts ---------------------------------------------------------------------------------------------

    fn add_client(&mut self) -> Result<()> {
        let index = u8::try_from(self.clients.len() + 1)?;
        let name = format!("c{index}");
        let namespace = Namespace::create(self.number, &name)?;
        let gateway = Ipv4Addr::new(10, 1, index, 1);
        let address = Ipv4Addr::new(10, 1, index, 2);
        self.router.link_to(&name, &namespace)?;
        self.router.ip(&[format!("address add {gateway}/24 dev {name}"), format!("link set {name} up")])?;
        configure(&namespace, address, gateway)?;
        namespace.output("ethtool", &["-K", "eth0", "tx", "off"])?;
        // Thousands of connections come and go within the minute that TIME_WAIT lasts.
        namespace.sysctl("net/ipv4/ip_local_port_range", "10240 65000")?;
        self.clients.push(Client { name, namespace, address });
        Ok(())
    }

    /// A host in the segment `bridge` (`muxes` or `backends`), linked and configured. It is the caller's, and has to
    /// go before the topology does.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn add_host(&mut self, bridge: &str, name: &str, address: Ipv4Addr) -> Result<Namespace> {
        let namespace = Namespace::create(self.number, name)?;
        let [a, b, c, _] = address.octets();
        self.router.link_to(name, &namespace)?;
        self.router.ip(&[format!("link set {name} master {bridge}"), format!("link set {name} up")])?;
        configure(&namespace, address, Ipv4Addr::new(a, b, c, 1))?;
        self.passes.push((name.to_owned(), PassProgram::attach(&self.router, name)?));
        Ok(namespace)
    }

    fn start_mux_host(&mut self) -> Result<String> {
        let index = u8::try_from(self.muxes.len() + 1)?;
        let name = format!("m{index}");
        let address = Ipv4Addr::new(10, 2, 0, 10 + index);
        let namespace = self.add_host("muxes", &name, address)?;
        self.muxes.push(Mux { name: name.clone(), namespace, address, process: None, routed: false });
        self.start_mux(&name)?;
        Ok(name)
    }

    /// Starts (again) the daemon on a mux's host. The router sends nothing to it until [`Topology::set_routed`].
    ///
    /// # Errors
    /// If it does not start.
    pub fn start_mux(&mut self, name: &str) -> Result<()> {
        let mut command = self.daemon("daisy-mux", name)?;
        command.args(["--io", self.builder.io.flag()]);
        let log = self.log(name);
        let mux = self.mux(name)?;
        let process = mux.process.insert(Process::start(name, &mux.namespace, command, &log, false)?);
        process.wait_for_line("ready", PATIENCE)
    }

    /// A new mux, up to date and routed.
    ///
    /// # Errors
    /// If it does not get there.
    pub fn add_mux(&mut self) -> Result<String> {
        let name = self.start_mux_host()?;
        self.wait_node_settled(&name)?;
        self.set_routed(&name, true)?;
        Ok(name)
    }

    /// Kills a mux with SIGKILL; after `detection`, in which the router still sends to it, it is routed no more.
    ///
    /// # Errors
    /// If there is no such mux, or the route cannot be changed.
    pub fn kill_mux(&mut self, name: &str, detection: Duration) -> Result<()> {
        if let Some(mut process) = self.mux(name)?.process.take() {
            process.kill();
        }
        std::thread::sleep(detection);
        self.set_routed(name, false)
    }

    /// Takes a mux out of service in order: first out of the route, then stopped with SIGTERM.
    ///
    /// # Errors
    /// If it does not end well.
    pub fn remove_mux(&mut self, name: &str) -> Result<()> {
        self.set_routed(name, false)?;
        match self.mux(name)?.process.take() {
            Some(mut process) => process.stop(),
            None => Ok(()),
        }
    }

    /// Whether the router sends traffic to this mux.
    ///
    /// # Errors
    /// If the route cannot be changed.
    pub fn set_routed(&mut self, name: &str, routed: bool) -> Result<()> {
        self.mux(name)?.routed = routed;
        self.route()
    }

    /// Has the router spread flows differently over the same muxes: with two, every flow changes its mux.
    ///
    /// # Errors
    /// If the route cannot be changed.
    pub fn rehash(&mut self) -> Result<()> {
        self.rotation += 1;
        self.route()
    }

    pub(crate) fn route(&self) -> Result<()> {
        let mut hops: Vec<String> = self
            .muxes
            .iter()
            .filter(|mux| mux.routed)
            .map(|mux| format!(" nexthop via {} dev muxes", mux.address))
            .collect();
        if !hops.is_empty() {
            let turn = self.rotation % hops.len();
            hops.rotate_left(turn);
        }
        let routes: Vec<String> = self
            .vips
            .iter()
            .map(|vip| match hops.is_empty() {
                true => format!("route replace blackhole {vip}/32"),
                false => format!("route replace {vip}/32{}", hops.concat()),
            })
            .collect();
        self.router.ip(&routes).map(drop)
    }

    fn start_backend_host(&mut self) -> Result<String> {
        let index = u8::try_from(self.backends.len() + 1)?;
        let name = format!("b{index}");
        let address = Ipv4Addr::new(10, 3, 0, 10 + index);
        let namespace = self.add_host("backends", &name, address)?;
        // A burst of connections waits in the queue; cookies are for floods.
        namespace.sysctl("net/core/somaxconn", "4096")?;
        namespace.sysctl("net/ipv4/tcp_max_syn_backlog", "4096")?;
        let bpffs = BpfFs::mount(&self.directory.join(format!("{name}-bpffs")))?;

        let mut echo = Command::new(self.binary("daisy-echo")?);
        echo.args(["server", "--listen", "0.0.0.0:7000", "--name", &name]);
        let echo = Process::start(
            &format!("echo server of {name}"),
            &namespace,
            echo,
            &self.log(&format!("{name}-echo")),
            false,
        )?;
        let web = nginx(&name, &self.directory.join(format!("{name}-nginx")), &self.www())?;
        let mut bulk = Command::new("iperf3");
        bulk.args(["-4", "--server", "--port", &BULK_PORT.to_string()]);
        let servers = vec![
            Process::start(
                &format!("nginx of {name}"),
                &namespace,
                web,
                &self.log(&format!("{name}-nginx")),
                false,
            )?,
            Process::start(
                &format!("iperf3 of {name}"),
                &namespace,
                bulk,
                &self.log(&format!("{name}-iperf3")),
                false,
            )?,
        ];
        let mut backend = Backend {
            name: name.clone(),
            namespace,
            address,
            agent_arguments: Vec::new(),
            agent: None,
            echo: Some(echo),
            servers,
            bpffs,
        };
        for port in [ECHO.port(), WEB.port(), BULK_PORT] {
            let end = Instant::now() + PATIENCE;
            while !listens(&backend.namespace, port)? {
                for process in backend.servers.iter_mut().chain(&mut backend.echo) {
                    process.check()?;
                }
                if Instant::now() > end {
                    bail!("nothing listens on port {port} of {name}");
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        self.backends.push(backend);
        Ok(name)
    }

    /// Starts the agent of a backend, from `binary` if one is given. Used to restart it after
    /// [`Topology::kill_agent`], too.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start_agent(&mut self, name: &str, binary: Option<&Path>) -> Result<()> {
        let mut command = self.daemon("daisy-agent", name)?;
        if let Some(binary) = binary {
            let mut other = Command::new(binary);
            other.args(command.get_args()).envs(command.get_envs().filter_map(|(k, v)| Some((k, v?))));
            command = other;
        }
        command.args(["--trust", "10.2.0.0/24", "--trust", "10.3.0.0/24"]);
        if !self.builder.chaining {
            command.arg("--no-chaining");
        }
        let log = self.log(name);
        let backend = self.backend(name)?;
        command.arg("--bpffs").arg(backend.bpffs.path()).args(&backend.agent_arguments);
        let process = backend.agent.insert(Process::start(name, &backend.namespace, command, &log, false)?);
        process.wait_for_line("ready", PATIENCE)
    }

    /// Has `daisy-agent unload` remove everything that the agent of a backend left.
    ///
    /// # Errors
    /// If it fails.
    pub fn unload_agent(&mut self, name: &str) -> Result<()> {
        let mut command = Command::new(self.binary("daisy-agent")?);
        let state = self.directory.join(format!("{name}-state"));
        let backend = self.backend(name)?;
        command.args(["unload", "--interface", "eth0", "--bpffs"]).arg(backend.bpffs.path());
        command.arg("--state-dir").arg(state);
        backend.namespace.run(|| netns::run(&mut command, None)).map(drop)
    }

    /// What all daemons on nodes have in common.
    fn daemon(&self, program: &str, name: &str) -> Result<Command> {
        let state = self.directory.join(format!("{name}-state"));
        std::fs::create_dir_all(&state)?;
        let mut command = Command::new(self.binary(program)?);
        if program == "daisy-agent" {
            command.arg("run");
        }
        command
            .args(["--name", name, "--interface", "eth0", "--controller", self.api.base()])
            .arg("--token-file")
            .arg(&self.token_file)
            .arg("--state-dir")
            .arg(state)
            .env("RUST_LOG", log_filter());
        Ok(command)
    }

    /// A new backend with running servers and agent, in no service yet.
    ///
    /// # Errors
    /// If it does not start.
    pub fn add_spare(&mut self) -> Result<String> {
        let name = self.start_backend_host()?;
        self.start_agent(&name, None)?;
        Ok(name)
    }

    /// A new backend that serves `echo` and `web` with this weight.
    ///
    /// # Errors
    /// If it does not start, or the controller refuses.
    pub fn add_backend(&mut self, weight: u32) -> Result<String> {
        let name = self.add_spare()?;
        self.enrol(&name, weight)?;
        Ok(name)
    }

    /// Kills a backend whole: cuts its link, then kills agent and servers with SIGKILL.
    ///
    /// # Errors
    /// If there is no such backend.
    pub fn kill_backend(&mut self, name: &str) -> Result<()> {
        self.router.ip(&[format!("link set {name} down")])?;
        let backend = self.backend(name)?;
        backend.agent = None;
        backend.echo = None;
        backend.servers.clear();
        Ok(())
    }

    /// Kills the agent of a backend with SIGKILL. Its data path stays.
    ///
    /// # Errors
    /// If there is no such backend.
    pub fn kill_agent(&mut self, name: &str) -> Result<()> {
        self.backend(name)?.agent = None;
        Ok(())
    }

    /// Stops the agent of a backend with SIGTERM. Its data path stays.
    ///
    /// # Errors
    /// If it does not end well.
    pub fn stop_agent(&mut self, name: &str) -> Result<()> {
        match self.backend(name)?.agent.take() {
            Some(mut agent) => agent.stop(),
            None => Ok(()),
        }
    }

    /// Has the router silently lose every packet between a node and the controller, and no other.
    ///
    /// # Errors
    /// If there is no such node.
    pub fn cut_from_controller(&mut self, name: &str) -> Result<()> {
        self.change_cut(name, "add")?;
        self.cut.push(name.to_owned());
        Ok(())
    }

    /// Undoes [`Topology::cut_from_controller`].
    ///
    /// # Errors
    /// If it was not cut.
    pub fn heal(&mut self, name: &str) -> Result<()> {
        self.change_cut(name, "del")?;
        self.cut.retain(|cut| cut != name);
        Ok(())
    }

    fn change_cut(&self, name: &str, verb: &str) -> Result<()> {
        let (_, address) = self.host(name)?;
        let controller = self.controller.address;
        self.router
            .ip(&[
                format!("rule {verb} from {address} to {controller} blackhole"),
                format!("rule {verb} from {controller} to {address} blackhole"),
            ])
            .map(drop)
    }
}

impl Drop for Topology {
    fn drop(&mut self) {
        let failed = self.failed || std::thread::panicking();
        let keep = failed || self.builder.keep;
        if failed {
            self.show_logs();
            eprintln!("logs and data of this run: {}", self.directory.display());
        }
        self.captures.clear();
        // Agents and muxes first: none has to notice that the controller goes.
        self.muxes.clear();
        self.backends.clear();
        self.controller.process = None;
        self.clients.clear();
        self.passes.clear();
        cleanup::remove_directory(&self.directory);
        if !keep && let Err(error) = std::fs::remove_dir_all(&self.directory) {
            eprintln!("cannot remove {}: {error}", self.directory.display());
        }
    }
}

impl Topology {
    fn show_logs(&self) {
        let Ok(entries) = std::fs::read_dir(&self.directory) else { return };
        let mut logs: Vec<PathBuf> = entries
            .flatten()
            .map(|e| e.path())
            .filter(|p| p.extension().is_some_and(|e| e == "log"))
            .collect();
        logs.sort();
        for log in logs {
            let text = tail(&log, 25);
            if !text.is_empty() {
                eprintln!("--- the end of {} ---\n{text}", log.display());
            }
        }
    }
}

pub(crate) fn log_filter() -> String {
    std::env::var("DAISY_TEST_LOG").unwrap_or_else(|_| "info".into())
}

fn configure(namespace: &Namespace, address: Ipv4Addr, gateway: Ipv4Addr) -> Result<()> {
    namespace
        .ip(&[
            format!("address add {address}/24 dev eth0"),
            "link set eth0 up".to_owned(),
            format!("route add default via {gateway}"),
        ])
        .map(drop)
}
