//! The data path: the eBPF programs in `bpf/`, and the maps through which the daemon steers them.
//!
//! | file | what |
//! |---|---|
//! | [`layout`] | numbers that both halves share |
//! | `values` | what stands in the maps |
//! | `pins` | where maps and link outlive the daemon |
//! | `attach` | the programs' attachment to the interface |
//! | [`syscall`] | bpf(2) calls that aya lacks |
//!
//! Programs, maps and the attachment stay when the daemon ends, however it ends: a new daemon takes the maps over
//! and puts its own programs in the place of the old ones, and no packet meets an interface without a program.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::path::PathBuf;

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, IterableMap as _, MapData, PerCpuArray, RingBuf};
use aya::programs::{ProgramFd, SchedClassifier, Xdp};
use aya::{Ebpf, EbpfLoader, VerifierLogLevel, include_bytes_aligned};
use daisy_node::interface::Interface;
use daisy_node::next_hops::NextHop;
use daisy_node::xdp::Mode;
use daisy_shared::chain::{Generation, Knowledge, Owners};
use daisy_shared::drop::DropReason;
use daisy_shared::service::{Service, ServiceId};
use tracing::warn;

mod attach;
mod error;
pub mod layout;
mod pins;
pub mod syscall;
mod values;

pub use error::DatapathError;

use pins::Pins;
use values::{Counters, KnowledgeValue, Link, PeerValue, ServiceKey, ServiceValue};

const OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/agent.bpf.o"));
const AGENT: &str = "daisy_agent";
const INSTALL: &str = "daisy_install";
const MSS: &str = "daisy_mss";
/// The maps that are pinned; the others hold nothing that is worth keeping.
const PINNED: [&str; 7] = ["link", "counters", "trusted", "services", "knowledge", "briefs", "peers"];

/// How the data path is to be.
#[derive(Clone, Debug)]
pub struct Config {
    /// The interface that encapsulated packets arrive at and leave through.
    pub interface: String,
    /// This agent's address on the underlay.
    pub address: Ipv4Addr,
    /// The UDP port of encapsulated packets.
    pub gue_port: u16,
    /// A bpf filesystem, for what outlives the daemon.
    pub bpffs: PathBuf,
    /// Where the XDP program is to run.
    pub mode: Mode,
    /// How many buckets all services together may have.
    pub bucket_capacity: u32,
    /// Off, every packet is delivered locally, which breaks connections: for comparison only.
    pub chaining: bool,
}

/// How the data path is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attached {
    /// Where the XDP program runs.
    pub mode: daisy_node::xdp::Attached,
    /// An earlier run's program was replaced, without a gap.
    pub replaced: bool,
}

/// What a table says of one bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installed {
    /// The bucket's number in its service's table.
    pub bucket: u32,
    /// The change in which its chain last changed.
    pub generation: Generation,
    /// Its owners, newest first.
    pub chain: Owners<Ipv4Addr>,
}

/// What the data path needs to know of another agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Where frames for it go, if that is known.
    pub next_hop: Option<NextHop>,
    /// The controller has declared it dead.
    pub dead: bool,
}

/// A service as it stands in the maps.
#[derive(Clone, Copy)]
struct Slot {
    key: ServiceKey,
    value: ServiceValue,
}

/// The loaded programs and their maps. Dropping it leaves everything attached and pinned, see
/// [`Datapath::unload`].
pub struct Datapath {
    config: Config,
    interface: Interface,
    pins: Pins,
    ebpf: Ebpf,
    install: ProgramFd,
    link: Array<MapData, Link>,
    counters: PerCpuArray<MapData, Counters>,
    trusted: LpmTrie<MapData, [u8; 4], u32>,
    services: HashMap<MapData, ServiceKey, ServiceValue>,
    knowledge: Array<MapData, KnowledgeValue>,
    peers: HashMap<MapData, [u8; 4], PeerValue>,
    wanted: RingBuf<MapData>,
    slots: BTreeMap<ServiceId, Slot>,
}

impl std::fmt::Debug for Datapath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Datapath").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Datapath {
    /// Loads the programs and takes over the maps of an earlier run, if they are pinned and fit; does not attach
    /// anything yet, so that services and tables can be put in place first.
    ///
    /// # Errors
    /// If the interface cannot be used, `bpffs` is not a bpf filesystem, or the kernel refuses a map or program.
    pub fn load(config: &Config) -> Result<Datapath, DatapathError> {
        let interface = Interface::find(&config.interface)?;
        let pins = Pins::new(&config.bpffs, &config.interface)?;
        pins.prepare(config.bucket_capacity, config.address)?;

        // The verifier's log is long and slow to write: only where it is needed.
        let mut ebpf = load_programs(config, &pins, VerifierLogLevel::DISABLE)
            .or_else(|_| load_programs(config, &pins, VerifierLogLevel::DEBUG))?;
        let install = program_fd(&ebpf, INSTALL)?;

        let link = take(&mut ebpf, "link")?;
        let counters = take(&mut ebpf, "counters")?;
        let trusted = take(&mut ebpf, "trusted")?;
        let services: HashMap<_, ServiceKey, ServiceValue> = take(&mut ebpf, "services")?;
        let knowledge = take(&mut ebpf, "knowledge")?;
        let peers = take(&mut ebpf, "peers")?;
        let wanted = take(&mut ebpf, "wanted")?;
        let mut slots = BTreeMap::new();
        for entry in services.iter() {
            let (key, value) = entry.map_err(|error| DatapathError::kernel("map services: read", &error))?;
            slots.insert(ServiceId(value.id), Slot { key, value });
        }
        let config = config.clone();
        let mut datapath = Datapath {
            config,
            interface,
            pins,
            ebpf,
            install,
            link,
            counters,
            trusted,
            services,
            knowledge,
            peers,
            wanted,
            slots,
        };
        datapath.write_link()?;
        Ok(datapath)
    }

    /// Reads the interface's MTU again, and sets the MSS that it allows. Called by [`Datapath::load`].
    ///
    /// # Errors
    /// If the interface is gone, or the kernel refuses.
    pub fn follow_interface(&mut self) -> Result<(), DatapathError> {
        self.interface = Interface::find(&self.config.interface)?;
        self.write_link()
    }

    fn write_link(&mut self) -> Result<(), DatapathError> {
        let mtu = self.interface.mtu;
        let max_mss = mtu.saturating_sub(40 + layout::RESERVE).min(u32::from(u16::MAX));
        let address = self.config.address.octets();
        self.change_link(|link| *link = Link { mtu, max_mss, address, ..*link })
    }

    fn change_link(&mut self, change: impl FnOnce(&mut Link)) -> Result<(), DatapathError> {
        let error = |error| DatapathError::kernel("map link", &error);
        let mut link = self.link.get(&0, 0).map_err(error)?;
        change(&mut link);
        self.link.set(0, link, 0).map_err(error)
    }

    /// Sets a service, with a table in which no bucket is known. Does nothing if it is set already just so.
    ///
    /// # Errors
    /// If there is no room for its table, its address is not IPv4, or the kernel refuses.
    pub fn set_service(&mut self, service: &Service) -> Result<(), DatapathError> {
        let key = ServiceKey::of(service).ok_or_else(|| DatapathError::NotIpv4(service.name.clone()))?;
        if let Some(slot) = self.slots.get(&service.id)
            && slot.key == key
            && slot.value == ServiceValue::of(service, slot.value.base)
        {
            return Ok(());
        }
        // The same number with other parameters, or the same address under another number.
        let replaced: Vec<ServiceId> = self
            .slots
            .iter()
            .filter(|(id, slot)| **id == service.id || slot.key == key)
            .map(|(id, _)| *id)
            .collect();
        for id in replaced {
            self.remove_service(id)?;
        }
        let base = self.free_range(service)?;
        // The range may have been another service's until just now: a packet that is being decided could still
        // teach it something of that one.
        self.settle();
        let clear: Vec<u8> = (base..base + service.buckets).flat_map(clear_entry).collect();
        self.write_batches(&clear)?;
        let value = ServiceValue::of(service, base);
        self.services
            .insert(key, value, 0)
            .map_err(|error| DatapathError::kernel(format!("map services: set {}", service.name), &error))?;
        self.slots.insert(service.id, Slot { key, value });
        self.follow_services()
    }

    /// Where a service's table fits: the first gap between the others that is long enough.
    fn free_range(&self, service: &Service) -> Result<u32, DatapathError> {
        let capacity = self.config.bucket_capacity;
        let mut taken: Vec<(u32, u32)> =
            self.slots.values().map(|slot| (slot.value.base, slot.value.buckets())).collect();
        taken.sort_unstable();
        taken.push((capacity, 0));
        let (mut start, mut longest) = (0, 0);
        for (base, buckets) in taken {
            let gap = base.saturating_sub(start);
            if gap >= service.buckets {
                return Ok(start);
            }
            longest = longest.max(gap);
            start = base + buckets;
        }
        let (service, buckets) = (service.name.clone(), service.buckets);
        Err(DatapathError::Capacity { service, buckets, free: longest, capacity })
    }

    /// Removes a service and what is known of its buckets. Nothing happens if it is not set.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn remove_service(&mut self, id: ServiceId) -> Result<(), DatapathError> {
        let Some(slot) = self.slots.get(&id) else { return Ok(()) };
        self.services
            .remove(&slot.key)
            .map_err(|error| DatapathError::kernel(format!("map services: remove {id}"), &error))?;
        self.slots.remove(&id);
        self.follow_services()
    }

    /// Has IPIP packets taken for daisy's while there is a service that travels so.
    fn follow_services(&mut self) -> Result<(), DatapathError> {
        let is_ipip = |slot: &Slot| slot.value.flags & layout::SERVICE_IPIP != 0;
        let flags = if self.slots.values().any(is_ipip) { layout::LINK_IPIP } else { 0 };
        // The data path remembers what it has found in the map, until it sees this.
        self.change_link(|link| {
            link.flags = flags;
            link.services_version = link.services_version.wrapping_add(1);
        })
    }

    /// The services that are set, also by an earlier run whose maps were taken over.
    pub fn services(&self) -> Vec<ServiceId> {
        self.slots.keys().copied().collect()
    }

    /// Installs a table's buckets, except those of which something newer is known (rule 3). Returns how many were
    /// installed.
    ///
    /// # Errors
    /// If the service is not set, a bucket is outside its table (then nothing is installed), or the kernel
    /// refuses.
    pub fn install(&mut self, id: ServiceId, table: &[Installed]) -> Result<u32, DatapathError> {
        let mut bytes = Vec::with_capacity(table.len() * layout::BATCH_ENTRY_LEN);
        for installed in table {
            let index = self.index(id, installed.bucket)?;
            bytes.extend(install_entry(index, installed.generation, &installed.chain));
        }
        self.write_batches(&bytes)
    }

    /// Forgets what is known of buckets.
    ///
    /// # Errors
    /// As [`Datapath::install`].
    pub fn forget(&mut self, id: ServiceId, buckets: &[u32]) -> Result<(), DatapathError> {
        let mut bytes = Vec::with_capacity(buckets.len() * layout::BATCH_ENTRY_LEN);
        for bucket in buckets {
            bytes.extend(clear_entry(self.index(id, *bucket)?));
        }
        self.write_batches(&bytes).map(|_| ())
    }

    /// What is known of a bucket, from tables and packets.
    ///
    /// # Errors
    /// If the service is not set, the bucket is outside its table, or the kernel refuses.
    pub fn knowledge(
        &self,
        id: ServiceId,
        bucket: u32,
    ) -> Result<Option<Knowledge<Ipv4Addr>>, DatapathError> {
        let index = self.index(id, bucket)?;
        let value = self
            .knowledge
            .get(&index, syscall::BPF_F_LOCK)
            .map_err(|error| DatapathError::kernel("map knowledge: read", &error))?;
        Ok(value.read())
    }

    /// What is known of all buckets of a service, by bucket.
    ///
    /// # Errors
    /// If the service is not set, or the kernel refuses.
    pub fn knowledge_of(&self, id: ServiceId) -> Result<Vec<Option<Knowledge<Ipv4Addr>>>, DatapathError> {
        let slot = self.slots.get(&id).ok_or(DatapathError::UnknownService(id))?;
        let mut values = vec![KnowledgeValue::EMPTY; slot.value.buckets() as usize];
        syscall::lookup_range(self.knowledge.map().fd(), slot.value.base, &mut values)
            .map_err(|error| DatapathError::kernel("map knowledge: read", &error))?;
        Ok(values.iter().map(KnowledgeValue::read).collect())
    }

    /// Where a bucket stands in the map of knowledge.
    fn index(&self, id: ServiceId, bucket: u32) -> Result<u32, DatapathError> {
        let slot = self.slots.get(&id).ok_or(DatapathError::UnknownService(id))?;
        let buckets = slot.value.buckets();
        if bucket >= buckets {
            return Err(DatapathError::NoSuchBucket { service: id, bucket, buckets });
        }
        Ok(slot.value.base + bucket)
    }

    /// Has the kernel's `daisy_install` write entries; returns how many it has written.
    fn write_batches(&self, entries: &[u8]) -> Result<u32, DatapathError> {
        let mut written = 0;
        for entries in entries.chunks(layout::BATCH_MAX * layout::BATCH_ENTRY_LEN) {
            let mut batch = vec![0; layout::BATCH_HEADER_LEN];
            let count = (entries.len() / layout::BATCH_ENTRY_LEN) as u32;
            batch[..4].copy_from_slice(&count.to_ne_bytes());
            batch.extend_from_slice(entries);
            written += syscall::run(&self.install, &batch)
                .map_err(|error| DatapathError::kernel(format!("{INSTALL}: run"), &error))?;
        }
        Ok(written)
    }

    /// Sets what is known of a peer.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_peer(&mut self, address: Ipv4Addr, peer: Peer) -> Result<(), DatapathError> {
        let mut value = PeerValue { destination: [0; 6], source: [0; 6], flags: 0 };
        if peer.dead {
            value.flags |= layout::PEER_DEAD;
        }
        if let Some(next_hop) = peer.next_hop {
            if next_hop.interface == self.interface.index {
                value.flags |= layout::PEER_RESOLVED;
                (value.destination, value.source) = (next_hop.destination.0, next_hop.source.0);
            } else {
                warn!(
                    peer = %address,
                    interface = self.interface.name,
                    "peer is reached through another interface than packets come in by: it gets none"
                );
            }
        }
        self.peers
            .insert(address.octets(), value, 0)
            .map_err(|error| DatapathError::kernel(format!("map peers: set {address}"), &error))?;
        self.follow_peers()
    }

    /// The data path remembers what it has found in the map of peers, until it sees this.
    fn follow_peers(&mut self) -> Result<(), DatapathError> {
        self.change_link(|link| link.peers_version = link.peers_version.wrapping_add(1))
    }

    /// Forgets a peer. Nothing happens if it is not set.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn remove_peer(&mut self, address: Ipv4Addr) -> Result<(), DatapathError> {
        match self.peers.remove(&address.octets()) {
            Err(error) if !is_missing(&error) => {
                Err(DatapathError::kernel(format!("map peers: remove {address}"), &error))
            }
            _ => self.follow_peers(),
        }
    }

    /// The peers that are set, also by an earlier run whose maps were taken over.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn peers(&self) -> Result<Vec<Ipv4Addr>, DatapathError> {
        let keys: Result<Vec<_>, _> = self.peers.keys().collect();
        let keys = keys.map_err(|error| DatapathError::kernel("map peers: read", &error))?;
        Ok(keys.into_iter().map(Ipv4Addr::from).collect())
    }

    /// Sets the prefixes from which encapsulated packets may come; all others are taken out.
    ///
    /// # Errors
    /// If a prefix is longer than 32 bits, or the kernel refuses.
    pub fn set_trusted(&mut self, prefixes: &[(Ipv4Addr, u8)]) -> Result<(), DatapathError> {
        let mut wanted = BTreeSet::new();
        for &(address, len) in prefixes {
            let host_bits =
                32u32.checked_sub(u32::from(len)).ok_or(DatapathError::BadPrefix(address, len))?;
            let mask = u32::MAX.checked_shl(host_bits).unwrap_or(0);
            wanted.insert((u32::from(len), (u32::from(address) & mask).to_be_bytes()));
        }
        let error = |error| DatapathError::kernel("map trusted: write", &error);
        let mut present = BTreeSet::new();
        for key in self.trusted.keys() {
            let key = key.map_err(error)?;
            present.insert((key.prefix_len(), key.data()));
        }
        // First what comes, then what goes: a prefix that is cut into two is never without trust.
        for (len, address) in wanted.difference(&present) {
            self.trusted.insert(&Key::new(*len, *address), 1, 0).map_err(error)?;
        }
        for (len, address) in present.difference(&wanted) {
            self.trusted.remove(&Key::new(*len, *address)).map_err(error)?;
        }
        // The data path remembers whom it has found trusted, until it sees this.
        self.change_link(|link| link.trusted_version = link.trusted_version.wrapping_add(1))
    }

    /// The counters, by the names they are reported under. They outlive the daemon with the maps.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn counters(&self) -> Result<BTreeMap<String, u64>, DatapathError> {
        let values =
            self.counters.get(&0, 0).map_err(|error| DatapathError::kernel("map counters: read", &error))?;
        let names = layout::COUNTERS.iter().map(|name| (*name).to_owned());
        let drops = DropReason::ALL.iter().map(|reason| format!("dropped_{reason}"));
        let sum = |index| values.iter().map(|cpu: &Counters| cpu[index]).sum();
        Ok(names.chain(drops).enumerate().map(|(index, name)| (name, sum(index))).collect())
    }

    /// The peers without a next hop that packets have needed since the last call. May name a peer that has got one
    /// meanwhile.
    pub fn wanted(&mut self) -> Vec<Ipv4Addr> {
        let mut wanted = BTreeSet::new();
        while let Some(item) = self.wanted.next() {
            if let Ok(octets) = <[u8; 4]>::try_from(&item[..]) {
                wanted.insert(Ipv4Addr::from(octets));
            }
        }
        wanted.into_iter().collect()
    }

    /// Becomes readable when [`Datapath::wanted`] has something to say.
    pub fn wanted_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.wanted)
    }

    /// Waits until no packet is being decided by what was known before the call. What the kernel then still has to
    /// hand from one CPU to another (receive packet steering) reaches the local stack a little later.
    pub fn settle(&self) {
        if let Err(error) = syscall::wait_for_programs() {
            warn!(%error, "this kernel cannot wait for packets that are being decided");
        }
    }

    /// The interface, as it was when last looked at.
    pub fn interface(&self) -> &Interface {
        &self.interface
    }

    /// Runs the data path on a frame without sending or delivering anything; sockets are those of the calling
    /// thread's network namespace. Counters count. For tests and measurements.
    ///
    /// # Errors
    /// If the kernel refuses: a frame shorter than an Ethernet header or longer than 3,520 bytes.
    pub fn test_run(&self, frame: &[u8]) -> Result<syscall::TestRun, DatapathError> {
        self.test_run_program(AGENT, frame, 1)
    }

    /// Runs one of the programs on a frame, for tests and measurements.
    ///
    /// # Errors
    /// As [`Datapath::test_run`].
    pub fn test_run_program(
        &self,
        name: &str,
        frame: &[u8],
        repeat: u32,
    ) -> Result<syscall::TestRun, DatapathError> {
        let program = self.ebpf.program(name).ok_or_else(|| missing(name))?;
        let program = program.fd().map_err(|error| DatapathError::kernel(name, &error))?;
        syscall::test_run(program, frame, repeat)
            .map_err(|error| DatapathError::kernel(format!("{name}: test run"), &error))
    }

    /// The file descriptor of the XDP program, for measurements.
    ///
    /// # Errors
    /// If the kernel refuses another one.
    pub fn program(&self) -> Result<ProgramFd, DatapathError> {
        program_fd(&self.ebpf, AGENT)
    }
}

/// Loads the object and its programs.
fn load_programs(config: &Config, pins: &Pins, log: VerifierLogLevel) -> Result<Ebpf, DatapathError> {
    let address = config.address.octets();
    let port = config.gue_port.to_be_bytes();
    let chaining = u8::from(config.chaining);
    let mut loader = EbpfLoader::new();
    loader
        .verifier_log_level(log)
        .override_global("my_address", &address, true)
        .override_global("gue_port", &port, true)
        .override_global("chaining", &chaining, true)
        .map_max_entries("knowledge", config.bucket_capacity)
        .map_max_entries("briefs", config.bucket_capacity);
    for name in PINNED {
        loader.map_pin_path(name, pins.maps().join(name));
    }
    let mut ebpf = loader.load(OBJECT).map_err(|error| DatapathError::kernel("eBPF object", &error))?;
    for name in [AGENT, INSTALL] {
        xdp(&mut ebpf, name)?.load().map_err(|error| DatapathError::kernel(name, &error))?;
    }
    classifier(&mut ebpf)?.load().map_err(|error| DatapathError::kernel(MSS, &error))?;
    Ok(ebpf)
}

/// An entry for `daisy_install`: `struct batch_entry` in `bpf/install.h`.
fn entry(
    index: u32,
    generation: Generation,
    operation: u8,
    chain: &[Ipv4Addr],
) -> [u8; layout::BATCH_ENTRY_LEN] {
    let mut bytes = [0; layout::BATCH_ENTRY_LEN];
    bytes[0..4].copy_from_slice(&index.to_ne_bytes());
    bytes[4..8].copy_from_slice(&generation.0.to_ne_bytes());
    bytes[8] = operation;
    bytes[9] = chain.len() as u8;
    let (places, _) = bytes[12..].as_chunks_mut::<4>();
    for (place, owner) in places.iter_mut().zip(chain) {
        *place = owner.octets();
    }
    bytes
}

fn install_entry(index: u32, generation: Generation, chain: &[Ipv4Addr]) -> [u8; layout::BATCH_ENTRY_LEN] {
    entry(index, generation, layout::OP_INSTALL, chain)
}

fn clear_entry(index: u32) -> [u8; layout::BATCH_ENTRY_LEN] {
    entry(index, Generation(0), layout::OP_CLEAR, &[])
}

/// Whether the map has no such key.
fn is_missing(error: &aya::maps::MapError) -> bool {
    use aya::maps::MapError;
    match error {
        MapError::KeyNotFound => true,
        MapError::SyscallError(error) => error.io_error.kind() == std::io::ErrorKind::NotFound,
        _ => false,
    }
}

fn missing(name: &str) -> DatapathError {
    DatapathError::Kernel { what: name.to_owned(), why: "not in the eBPF object".to_owned() }
}

fn xdp<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp, DatapathError> {
    let program = ebpf.program_mut(name).ok_or_else(|| missing(name))?;
    program.try_into().map_err(|error| DatapathError::kernel(name, &error))
}

fn classifier(ebpf: &mut Ebpf) -> Result<&mut SchedClassifier, DatapathError> {
    let program = ebpf.program_mut(MSS).ok_or_else(|| missing(MSS))?;
    program.try_into().map_err(|error| DatapathError::kernel(MSS, &error))
}

fn program_fd(ebpf: &Ebpf, name: &str) -> Result<ProgramFd, DatapathError> {
    let program = ebpf.program(name).ok_or_else(|| missing(name))?;
    let program: &Xdp = program.try_into().map_err(|error| DatapathError::kernel(name, &error))?;
    let program = program.fd().map_err(|error| DatapathError::kernel(name, &error))?;
    program.try_clone().map_err(|error| DatapathError::kernel(name, &error))
}

/// Takes a map out of the object, as what it is.
fn take<T>(ebpf: &mut Ebpf, name: &str) -> Result<T, DatapathError>
where
    T: TryFrom<aya::maps::Map, Error = aya::maps::MapError>,
{
    let map = ebpf.take_map(name).ok_or_else(|| missing(name))?;
    T::try_from(map).map_err(|error| DatapathError::kernel(format!("map {name}"), &error))
}
