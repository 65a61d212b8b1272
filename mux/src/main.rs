//! `daisy-mux`: forwards packets for services to their backends.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use daisy_mux::io::netmap::PortName;
use daisy_mux::io::open::{self, Opened};
use daisy_mux::io::request::{Copy, Kind, List, Request};
use daisy_mux::io::threads::Threads;
use daisy_mux::metrics::Counters;
use daisy_mux::neighbours::Neighbours;
use daisy_mux::state::State;
use daisy_mux::sync::Mux;
use daisy_mux::table::{Link, NextHop, Tables, Underlay};
use daisy_node::interface::{Interface, Mac};
use daisy_node::log::{self, die};
use daisy_node::stop::Stop;
use daisy_node::sync::{Config, Sync};
use daisy_node::xdp;
use daisy_shared::control::NodeKind;
use daisy_shared::drop::DropReason;
use daisy_shared::wire::gue;
use tracing::{error, info};

/// The longest IP packet in bytes of a port that no kernel interface stands behind.
const PORT_MTU: u32 = 1500;

/// Forwards packets for services to their backends, encapsulated, by the controller's tables.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// The mux's name, unique among nodes.
    #[arg(long)]
    name: String,
    /// A network interface that packets come from and go to; repeat it for several. The mux's address is that of
    /// the first. With netmap a port: netmap:IF, netmap:IF-N (one pair of its rings), valeX:P, netmap:X{N or
    /// netmap:X}N.
    #[arg(long, required = true)]
    interface: Vec<String>,
    /// How packets are moved.
    #[arg(long, value_enum, default_value = "auto")]
    io: Kind,
    /// The mux's address, where no kernel interface stands behind its ports: VALE ports and pipes.
    #[arg(long, requires_all = ["mac", "next_hop"])]
    address: Option<Ipv4Addr>,
    /// The mux's Ethernet address on such ports.
    #[arg(long, requires = "address", value_parser = parse_mac)]
    mac: Option<Mac>,
    /// The Ethernet address that all backends are behind, on the last of such ports.
    #[arg(long, requires = "address", value_parser = parse_mac)]
    next_hop: Option<Mac>,
    /// The processors that I/O threads run on, such as 0,2-3: one thread on each. Without it, af-xdp has a thread
    /// for each receive queue, and af-packet has one, wherever the kernel puts them.
    #[arg(long)]
    cores: Option<List>,
    /// The receive queues that are served on each interface, such as 0-3, with af-xdp and netmap. Without it, all.
    #[arg(long)]
    queues: Option<List>,
    /// For how many microseconds the kernel polls a device for packets before it waits for an interrupt, with
    /// af-xdp. Without it, not at all.
    #[arg(long, value_name = "MICROSECONDS", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    busy_poll: Option<u32>,
    /// Whether frames are copied between the driver and the mux, with af-xdp.
    #[arg(long, value_enum, default_value = "auto")]
    copy: Copy,
    /// The controller's URL, such as http://192.0.2.1:7600; repeat it for several.
    #[arg(long, required = true)]
    controller: Vec<String>,
    /// A file with the bearer token that the controller wants.
    #[arg(long)]
    token_file: Option<PathBuf>,
    /// Where the last good tables are kept.
    #[arg(long)]
    state_dir: PathBuf,
    /// The UDP port on which agents take encapsulated packets.
    #[arg(long, default_value_t = gue::PORT, value_parser = clap::value_parser!(u16).range(1..))]
    gue_port: u16,
    /// Where the XDP program runs, with --io xdp or af-xdp: auto, native or generic.
    #[arg(long, default_value = "auto")]
    xdp_mode: xdp::Mode,
    /// How log lines look: text or json.
    #[arg(long, default_value = "text")]
    log_format: log::Format,
}

fn main() -> ExitCode {
    let args = Args::try_parse().unwrap_or_else(|error| {
        if error.use_stderr() {
            // The first paragraph says what is wrong; the rest is help.
            let text = error.to_string();
            let line = text.lines().take_while(|line| !line.is_empty()).collect::<Vec<_>>().join("\n");
            die(line.trim_start_matches("error: "));
        }
        error.exit()
    });
    start(args).unwrap_or_else(|error| die(error)).run()
}

/// A mux whose I/O runs.
struct Running {
    sync: Sync<Mux>,
    state: Arc<State>,
    threads: Threads,
    stop: Stop,
}

fn parse_mac(text: &str) -> Result<Mac, String> {
    let byte = |text: &str| u8::from_str_radix(text, 16).ok().filter(|_| text.len() == 2);
    let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
    let mac = bytes.and_then(|bytes| bytes.try_into().ok());
    mac.map(Mac).ok_or_else(|| "not an Ethernet address such as 02:00:00:00:00:01".to_owned())
}

/// The interfaces that the mux works on and, if they are netmap's, its ports. Ports that no kernel interface stands
/// behind are what the flags say.
fn find_interfaces(args: &Args) -> anyhow::Result<(Vec<Interface>, Vec<PortName>)> {
    let any_port = args.interface.iter().any(|name| PortName::is_one(name));
    if args.io != Kind::Netmap && !(args.io == Kind::Auto && any_port) {
        anyhow::ensure!(args.address.is_none(), "--address: is for VALE ports and pipes, with --io netmap");
        let interfaces = args.interface.iter().map(|name| Interface::find(name)).collect::<Result<_, _>>()?;
        return Ok((interfaces, Vec::new()));
    }
    let mut interfaces = Vec::new();
    let mut ports = Vec::new();
    for name in &args.interface {
        let port = PortName::parse(name)?;
        interfaces.push(match (port.interface(), args.address.zip(args.mac)) {
            (Some(interface), None) => Interface::find(interface)?,
            (Some(_), Some(_)) => {
                anyhow::bail!("port {name}: the kernel knows its address; --address is for others")
            }
            (None, None) => anyhow::bail!("port {name}: needs --address, --mac and --next-hop"),
            // No packet leaves there by the kernel's routes: number and prefix are nobody's.
            (None, Some((address, mac))) => {
                Interface { name: name.clone(), index: 0, mac, address, prefix_len: 32, mtu: PORT_MTU }
            }
        });
        ports.push(port);
    }
    Ok((interfaces, ports))
}

/// Starts everything that can fail because of how the mux was started.
fn start(args: Args) -> anyhow::Result<Running> {
    log::init(args.log_format)?;
    let token = args.token_file.as_deref().map(log::read_token).transpose()?;
    let (interfaces, ports) = find_interfaces(&args)?;
    let address = interfaces.first().context("no interface is given")?.address;
    let config = Config {
        name: args.name,
        kind: NodeKind::Mux,
        address: IpAddr::V4(address),
        controllers: args.controller,
        token,
        state_dir: args.state_dir.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        gue_port: args.gue_port,
    };
    config.check()?;
    // Now, and not when there is first something to keep.
    let place = || format!("state directory {}", args.state_dir.display());
    std::fs::create_dir_all(&args.state_dir).with_context(place)?;
    let underlay = Underlay { address, gue_port: args.gue_port };
    let link = |interface: &Interface| Link {
        mac: interface.mac.0,
        mtu: interface.mtu.try_into().unwrap_or(u16::MAX),
    };
    let links: Vec<Link> = interfaces.iter().map(link).collect();
    let stop = Stop::on_signals().context("signal handlers")?;
    let request = Request {
        kind: args.io,
        interfaces,
        ports,
        cores: args.cores,
        queues: args.queues,
        busy_poll: args.busy_poll.map(|us| Duration::from_micros(us.into())),
        copy: args.copy,
        xdp_mode: args.xdp_mode,
    };
    let Opened { kind, jobs, filters, plane } = open::open(&request)?;
    let tables = match plane {
        Some(plane) => Tables::on(plane, underlay, links),
        None => Tables::new(underlay, links),
    };
    let threads = Threads::start(jobs, &tables.shared(), &stop)?;
    let state = Arc::new(State::new(tables, filters));
    let neighbours = match args.next_hop {
        Some(Mac(mac)) => {
            let egress = (request.interfaces.len() - 1) as u8;
            Neighbours::fixed(NextHop { egress, mac }, Arc::clone(&state))
        }
        None => Neighbours::start(&request.interfaces, Arc::clone(&state))
            .with_context(|| format!("interface {}: following its neighbours", args.interface.join(", ")))?,
    };
    let mux = Mux::new(Arc::clone(&state), neighbours, threads.published().to_vec());
    let mut sync = Sync::new(config, mux).with_context(place)?;
    info!(interfaces = args.interface.join(","), %address, io = %kind, threads = threads.len(), "packet I/O runs");
    if sync.restore() && !sync.services().is_empty() {
        sync.node().set_ready();
    } else {
        info!("no table on disk; waiting for a controller");
    }
    Ok(Running { sync, state, threads, stop })
}

impl Running {
    /// Forwards and syncs until it is told to stop, then says what it has done.
    fn run(self) -> ExitCode {
        let mux = self.sync.run(&self.stop);
        info!("stopping");
        let mut total = Counters::default();
        // The XDP programs first: what comes from now on is the kernel's.
        let mut control = self.state.lock();
        control.filters.clear();
        if let Some(plane) = control.tables.plane() {
            plane.close();
            total += plane.counters();
        }
        drop(control);
        let mut by_thread = Vec::new();
        let mut code = ExitCode::SUCCESS;
        for outcome in self.threads.stop() {
            match outcome {
                Ok(counters) => {
                    total += counters;
                    by_thread.push(counters.received);
                }
                Err(error) => {
                    error!(error, "packet I/O failed");
                    code = ExitCode::FAILURE;
                }
            }
        }
        drop(mux);
        let dropped: BTreeMap<_, _> = DropReason::ALL
            .iter()
            .map(|reason| (reason.label(), total.dropped_for(*reason)))
            .filter(|(_, packets)| *packets > 0)
            .collect();
        info!(
            received = total.received,
            sent = total.sent,
            passed = total.passed,
            chained_header = total.chained_header,
            dropped = total.dropped_total(),
            dropped_by_reason = serde_json::to_string(&dropped).unwrap_or_default(),
            missed = total.missed,
            received_by_thread = ?by_thread,
            conserved = total.is_conserved(),
            "stopped"
        );
        code
    }
}
