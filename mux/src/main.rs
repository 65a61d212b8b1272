//! `daisy-mux`: forwards packets for services to their backends.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::Context as _;
use arc_swap::ArcSwap;
use clap::{Parser, ValueEnum};
use daisy_mux::io::af_packet::AfPacket;
use daisy_mux::io::{self, IoError, PacketIo, Worker, af_xdp};
use daisy_mux::metrics::{Counters, Published};
use daisy_mux::neighbours::Neighbours;
use daisy_mux::state::State;
use daisy_mux::sync::Mux;
use daisy_mux::table::{Link, Snapshot, Tables, Underlay};
use daisy_node::interface::Interface;
use daisy_node::log::{self, die};
use daisy_node::stop::Stop;
use daisy_node::sync::{Config, Sync};
use daisy_node::xdp;
use daisy_shared::control::NodeKind;
use daisy_shared::drop::DropReason;
use daisy_shared::wire::gue;
use tracing::{error, info};

/// Forwards packets for services to their backends, encapsulated, by the controller's tables.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// The mux's name, unique among nodes.
    #[arg(long)]
    name: String,
    /// The network interface that packets come from and go to.
    #[arg(long)]
    interface: String,
    /// How packets are moved.
    #[arg(long, value_enum)]
    io: Kind,
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
    /// Where the XDP program runs, with --io af-xdp: auto, native or generic.
    #[arg(long, default_value = "auto")]
    xdp_mode: xdp::Mode,
    /// How log lines look: text or json.
    #[arg(long, default_value = "text")]
    log_format: log::Format,
}

/// How packets are moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// AF_XDP sockets, one for each receive queue, behind an XDP program.
    AfXdp,
    /// A raw packet socket.
    AfPacket,
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

/// The I/O threads.
struct Threads {
    snapshot: Arc<ArcSwap<Snapshot>>,
    published: Vec<Arc<Published>>,
    handles: Vec<JoinHandle<Result<Counters, IoError>>>,
    stop_io: Arc<AtomicBool>,
    stop: Stop,
}

impl Threads {
    /// Starts a thread that moves packets. If it fails, the whole mux stops.
    fn spawn(&mut self, io: impl PacketIo + Send + 'static) -> std::io::Result<()> {
        let published = Arc::<Published>::default();
        let worker = Worker::new(Arc::clone(&self.snapshot), Arc::clone(&published));
        self.published.push(published);
        let (stop_io, stop) = (Arc::clone(&self.stop_io), self.stop.clone());
        let thread = std::thread::Builder::new().name(format!("io-{}", self.handles.len()));
        self.handles.push(thread.spawn(move || {
            let result = io::run(io, worker, &stop_io);
            if result.is_err() {
                stop.set();
            }
            result
        })?);
        Ok(())
    }
}

/// Starts everything that can fail because of how the mux was started.
fn start(args: Args) -> anyhow::Result<Running> {
    log::init(args.log_format)?;
    let token = args.token_file.as_deref().map(log::read_token).transpose()?;
    let interface = Interface::find(&args.interface)?;
    let config = Config {
        name: args.name,
        kind: NodeKind::Mux,
        address: IpAddr::V4(interface.address),
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
    let underlay = Underlay { address: interface.address, gue_port: args.gue_port };
    let link = Link { mac: interface.mac.0, mtu: interface.mtu.try_into().unwrap_or(u16::MAX) };
    let tables = Tables::new(underlay, [link]);
    let stop = Stop::on_signals().context("signal handlers")?;
    let mut threads = Threads {
        snapshot: tables.shared(),
        published: Vec::new(),
        handles: Vec::new(),
        stop_io: Arc::default(),
        stop: stop.clone(),
    };
    let filter = match args.io {
        Kind::AfPacket => {
            let socket = AfPacket::open(&interface)?;
            threads.spawn(socket).context("starting an I/O thread")?;
            None
        }
        Kind::AfXdp => {
            let (filter, sockets) = af_xdp::open(&interface, args.xdp_mode)?;
            for socket in sockets {
                threads.spawn(socket).context("starting an I/O thread")?;
            }
            Some(filter)
        }
    };
    let state = Arc::new(State::new(tables, filter));
    let neighbours = Neighbours::start(std::slice::from_ref(&interface), Arc::clone(&state))
        .with_context(|| format!("interface {}: following its neighbours", args.interface))?;
    let mux = Mux::new(Arc::clone(&state), neighbours, threads.published.clone());
    let mut sync = Sync::new(config, mux).with_context(place)?;
    info!(
        interface = args.interface,
        address = %interface.address,
        io = ?args.io,
        threads = threads.handles.len(),
        "packet I/O runs"
    );
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
        // The XDP program first: what comes from now on is the kernel's.
        self.state.lock().filter.take();
        self.threads.stop_io.store(true, Ordering::Relaxed);
        let mut total = Counters::default();
        let mut by_thread = Vec::new();
        let mut code = ExitCode::SUCCESS;
        for thread in self.threads.handles {
            match thread.join() {
                Ok(Ok(counters)) => {
                    total += counters;
                    by_thread.push(counters.received);
                }
                Ok(Err(error)) => {
                    error!(%error, "packet I/O failed");
                    code = ExitCode::FAILURE;
                }
                Err(_) => {
                    error!("an I/O thread panicked");
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
