//! The agent's daemon: what is started in which order, and what is done every second.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use daisy_node::interface::Interface;
use daisy_node::next_hops::NextHops;
use daisy_node::stop::Stop;
use daisy_node::sync::{self, Sync};
use daisy_shared::control::{DrainReport, NodeKind};
use daisy_shared::service::ServiceId;
use tracing::{debug, info, warn};

use crate::datapath::{self, Datapath};
use crate::drain::Drain;
use crate::peers::{Peers, lock};
use crate::sockets::{Sockets, syn_cookies_sent};
use crate::sync::{Agent, Shared};
use crate::vip::Vips;

/// How the daemon is to run.
#[derive(Clone, Debug)]
pub struct Config {
    /// The node's name.
    pub name: String,
    /// The underlay interface, as it is now.
    pub interface: Interface,
    /// The controllers' URLs.
    pub controllers: Vec<String>,
    /// The bearer token for them.
    pub token: Option<String>,
    /// Where the last good tables and the record of changes to this host lie.
    pub state_dir: PathBuf,
    /// Prefixes from which encapsulated packets are accepted, beside the directory's muxes and backends.
    pub trust: Vec<(Ipv4Addr, u8)>,
    /// The data path.
    pub datapath: datapath::Config,
    /// Take packets with the tables on disk after a reboot, though no controller has answered.
    pub bootstrap: bool,
    /// Take everything down at the end.
    pub unload_on_exit: bool,
}

/// How long the start waits for next hops: neighbours that do not answer by then may never do.
const RESOLVE: Duration = Duration::from_secs(1);
/// How often the data path is asked for peers that it lacks.
const TICK: Duration = Duration::from_millis(100);
/// How often the rest is done.
const TICKS_PER_ROUND: u32 = 10;

/// Runs the agent until `stop` is set.
///
/// # Errors
/// What keeps it from starting, or from ending cleanly.
pub fn run(config: Config, stop: &Stop) -> anyhow::Result<()> {
    let me = config.interface.address;
    let sync_config = sync::Config {
        name: config.name.clone(),
        kind: NodeKind::Agent,
        address: me.into(),
        controllers: config.controllers.clone(),
        token: config.token.clone(),
        state_dir: config.state_dir.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
        gue_port: config.datapath.gue_port,
    };
    sync_config.check()?;
    // Now, and not when something has been changed that is to be remembered there.
    std::fs::create_dir_all(&config.state_dir)
        .with_context(|| format!("state directory {}", config.state_dir.display()))?;
    let datapath = Datapath::load(&config.datapath)?;
    let pinned = !datapath.services().is_empty();
    let datapath = Arc::new(Mutex::new(datapath));
    let mut vips = Vips::open_or_begin(&config.state_dir)?;
    vips.silence_arp(&config.interface.name)?;

    let peers = Arc::new(Peers::new(datapath.clone()));
    let listener = peers.clone();
    let next_hops = NextHops::start(std::slice::from_ref(&config.interface), move |address, next_hop| {
        listener.set_next_hop(address, next_hop);
    })
    .context("next-hop resolver")?;
    let (drain, reports) = <(Mutex<Drain>, Mutex<Vec<DrainReport>>)>::default();
    let shared = Arc::new(Shared { datapath, peers, next_hops, drain, reports });
    let rounds = Rounds::new(me, shared.clone())?;

    let (sender, synced) = channel();
    let agent = Agent::new(me, shared.clone(), vips, config.trust.clone(), sender);
    let mut sync = Sync::new(sync_config, agent).context("sync")?;
    // After a reboot the disk is not enough: it knows less than the maps did that are gone, and the promise rests on
    // nobody forgetting (`docs/decisions/0010-no-end-without-certainty.md`).
    let restored = (pinned || config.bootstrap) && sync.restore();
    let flag = stop.clone();
    let sync = std::thread::Builder::new().name("sync".into()).spawn(move || sync.run(&flag))?;

    if !restored && !pinned {
        info!("waiting for a controller: no earlier data path is left, and the disk may be behind it");
        while !stop.is_set() && synced.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {}
    }
    if !stop.is_set() {
        let unresolved = shared.next_hops.settle(RESOLVE);
        if !unresolved.is_empty() {
            warn!(peers = ?unresolved, "some peers have no next hop yet");
        }
        shared.peers.resolved();
        let attached = lock(&shared.datapath).attach()?;
        info!(
            name = config.name,
            interface = config.interface.name,
            address = %me,
            mode = %attached.mode,
            replaced = attached.replaced,
            chaining = config.datapath.chaining,
            "ready"
        );
        rounds.run(stop, || sync.is_finished());
        // The sync loop ends only with the daemon.
        stop.set();
    }
    drop(sync.join().map_err(|_| anyhow::anyhow!("the sync loop panicked"))?);
    if config.unload_on_exit {
        unload(&config.interface.name, &config.datapath.bpffs, &config.state_dir)?;
    } else {
        info!(
            interface = config.interface.name,
            "ending; the data path stays attached and goes on with what it knows (daisy-agent unload removes it)"
        );
    }
    Ok(())
}

/// Removes everything that an agent has put on this host for an interface, but its tables on disk.
///
/// # Errors
/// What could not be removed.
pub fn unload(interface: &str, bpffs: &Path, state_dir: &Path) -> anyhow::Result<()> {
    // The data path first: without the addresses it would deliver packets that nobody takes.
    let datapath = Datapath::unload(interface, bpffs);
    // Neither keeps the other from being undone.
    let vips = Vips::open(state_dir).and_then(Vips::restore);
    datapath?;
    vips?;
    info!(interface, "unloaded");
    Ok(())
}

/// What is done again and again.
struct Rounds {
    me: Ipv4Addr,
    shared: Arc<Shared>,
    sockets: Sockets,
    /// What went wrong last, so that the log says it once.
    trouble: Option<String>,
}

impl Rounds {
    fn new(me: Ipv4Addr, shared: Arc<Shared>) -> anyhow::Result<Rounds> {
        let sockets = Sockets::open().context("cannot ask the kernel for sockets")?;
        Ok(Rounds { me, shared, sockets, trouble: None })
    }

    fn run(mut self, stop: &Stop, ended: impl Fn() -> bool) {
        let mut tick = 0;
        while !stop.wait_timeout(TICK) && !ended() {
            for address in lock(&self.shared.datapath).wanted() {
                if address != self.me && self.shared.peers.meet(address) {
                    self.shared.next_hops.want(address);
                }
            }
            tick = (tick + 1) % TICKS_PER_ROUND;
            if tick == 0 {
                self.round();
            }
        }
    }

    fn round(&mut self) {
        let followed = lock(&self.shared.datapath).follow_interface().map_err(anyhow::Error::from);
        let trouble = followed.and(self.drain()).err().map(|error| format!("{error:#}"));
        if let Some(trouble) = trouble.as_ref().filter(|trouble| Some(*trouble) != self.trouble.as_ref()) {
            warn!(trouble, "the agent works on with what it knows");
        }
        self.trouble = trouble;
    }

    /// Looks for buckets that are drained, see [`crate::drain`].
    fn drain(&mut self) -> anyhow::Result<()> {
        let cookies = syn_cookies_sent()?;
        let services = {
            let mut drain = lock(&self.shared.drain);
            drain.cookies_sent(cookies, Instant::now());
            drain.services()
        };
        if services.is_empty() {
            return Ok(());
        }
        for service in &services {
            self.verify(service.id)?;
        }
        // Packets that are being decided by what was known before that have left the data path.
        lock(&self.shared.datapath).settle();
        let begun = Instant::now();
        let held = self.sockets.held(&services).context("cannot list sockets")?;
        let ended = Instant::now();
        let mut drain = lock(&self.shared.drain);
        for (service, held) in held {
            let buckets = drain.dumped(service, &held, begun, ended);
            if !buckets.is_empty() {
                debug!(%service, buckets = buckets.len(), "drained");
                lock(&self.shared.reports).push(DrainReport { service, buckets });
            }
        }
        Ok(())
    }

    /// Finds out in which watched buckets the data path knows that this backend is no longer head.
    fn verify(&self, service: ServiceId) -> anyhow::Result<()> {
        let unverified = lock(&self.shared.drain).unverified(service);
        if unverified.is_empty() {
            return Ok(());
        }
        let known = lock(&self.shared.datapath).knowledge_of(service)?;
        let mut drain = lock(&self.shared.drain);
        for (bucket, table) in unverified {
            if let Some(Some(known)) = known.get(bucket as usize) {
                drain.verify(service, (bucket, table), known, self.me, Instant::now());
            }
        }
        Ok(())
    }
}
