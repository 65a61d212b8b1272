//! What the pipeline reads, and the only place where it changes.
//!
//! A [`Snapshot`] is everything a burst needs: services, their bucket tables, and a ready-made header for each
//! backend. I/O threads load it once for each burst. [`Tables`] is the writer's side:
//!
//! - Services, backends, next hops and the link change by putting a new snapshot in the place of the old one.
//! - Buckets change in place, a word at a time, in the table that old and new snapshots share. Before a word may
//!   name a backend, every I/O thread uses a snapshot that knows it: [`Tables`] waits until none holds an older
//!   one, which is at most for one burst.

use core::net::{IpAddr, Ipv4Addr};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use arc_swap::ArcSwap;
use daisy_shared::bucket::{BackendId, BucketTable, Chain, Entry, Piece};
use daisy_shared::chain::Generation;
use daisy_shared::checksum;
use daisy_shared::control::Directory;
use daisy_shared::flow::{FlowV4, HashKey};
use daisy_shared::service::{Encapsulation, Service, ServiceId};
use daisy_shared::wire::{fast, gue, outer};

use crate::io::words::Words;
use crate::metrics::Counters;

/// Length in bytes of all headers before the inner IP packet in a closed window.
pub const CLOSED_LEN: usize = fast::ETHERNET_LEN + outer::LEN + gue::BASE_LEN;

/// How the mux appears on the underlay, whichever interface a packet leaves by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Underlay {
    /// The mux's address, by which agents know it.
    pub address: Ipv4Addr,
    /// The UDP port on which agents take encapsulated packets.
    pub gue_port: u16,
}

/// What the pipeline needs to know of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// The mux's Ethernet address there: where packets for services come to, and the source of what it sends.
    pub mac: [u8; 6],
    /// The longest IP packet in bytes that the link carries.
    pub mtu: u16,
}

/// Where packets for a backend go next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextHop {
    /// The number of the interface that they leave by.
    pub egress: u8,
    /// The Ethernet address that they go to.
    pub mac: [u8; 6],
}

/// Whether packets can be sent to a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// The directory does not know it.
    Unknown,
    /// The Ethernet address of its next hop is not known yet.
    NoNextHop,
    /// Its header is ready.
    Resolved,
}

/// A backend's headers, ready but for the fields that differ from packet to packet: one cache line.
#[derive(Clone, Debug)]
#[repr(align(64))]
pub struct Template {
    /// Ethernet and IPv4, then UDP and GUE without a walk, or with IPIP nothing. TOS, lengths, IPv4 checksum and UDP
    /// source port are 0.
    pub headers: [u8; CLOSED_LEN],
    /// Whether it may be used.
    pub reach: Reach,
    /// The number of the interface that it leaves by.
    pub egress: u8,
    /// The longest IP packet in bytes that this interface carries; 0 unless [`Reach::Resolved`].
    pub mtu: u16,
    /// The backend's underlay address.
    pub address: Ipv4Addr,
    /// The sum of the IPv4 header's 16-bit words, as it stands in `headers`.
    ip_sum: u32,
}
const _: () = assert!(size_of::<Template>() == 64);

impl Template {
    const UNKNOWN: Template = Template {
        headers: [0; CLOSED_LEN],
        reach: Reach::Unknown,
        egress: 0,
        mtu: 0,
        address: Ipv4Addr::UNSPECIFIED,
        ip_sum: 0,
    };

    fn new(
        encapsulation: Encapsulation,
        underlay: &Underlay,
        links: &[Link],
        address: Ipv4Addr,
        next_hop: Option<NextHop>,
    ) -> Template {
        let (source, destination) = (underlay.address, address);
        let mut headers = [0; CLOSED_LEN];
        let (ethernet, rest) = headers.split_at_mut(fast::ETHERNET_LEN);
        match encapsulation {
            Encapsulation::Gue => {
                let (ip_udp, gue_base) = rest.split_at_mut(outer::LEN);
                let outer = outer::Outer {
                    source,
                    destination,
                    source_port: 0,
                    destination_port: underlay.gue_port,
                    tos: 0,
                    payload_len: 0,
                };
                ip_udp.copy_from_slice(&outer.to_bytes());
                ip_udp[24..26].fill(0);
                gue::Header { protocol: gue::PROTO_IPV4, walk: None }.emit(gue_base);
            }
            Encapsulation::Ipip => {
                let outer = outer::Ipip { source, destination, tos: 0, payload_len: 0 };
                rest[..outer::IPIP_LEN].copy_from_slice(&outer.to_bytes());
            }
        }
        rest[2..4].fill(0);
        rest[10..12].fill(0);
        let ip_sum = checksum::add(0, &rest[..20]);
        // A next hop behind an interface that is not the mux's is none.
        let next_hop = next_hop.and_then(|hop| Some((hop, links.get(usize::from(hop.egress))?)));
        let Some((NextHop { egress, mac }, link)) = next_hop else {
            return Template { headers, reach: Reach::NoNextHop, egress: 0, mtu: 0, address, ip_sum };
        };
        ethernet[0..6].copy_from_slice(&mac);
        ethernet[6..12].copy_from_slice(&link.mac);
        ethernet[12..14].copy_from_slice(&fast::ETHERTYPE_IPV4.to_be_bytes());
        Template { headers, reach: Reach::Resolved, egress, mtu: link.mtu, address, ip_sum }
    }

    /// The checksum of the IPv4 header once it carries this type of service and total length.
    #[inline]
    pub fn ip_checksum(&self, tos: u8, total_len: u16) -> u16 {
        checksum::finish(self.ip_sum + u32::from(tos) + u32::from(total_len))
    }
}

/// A service as the pipeline sees it.
#[derive(Clone, Debug)]
pub struct ServiceTable {
    /// The address that clients connect to.
    pub vip: Ipv4Addr,
    /// The IANA protocol number.
    pub protocol: u8,
    /// The port that clients connect to.
    pub port: u16,
    /// The key of its flow hash.
    pub hash_key: HashKey,
    /// How its packets travel in closed windows.
    pub encapsulation: Encapsulation,
    /// Its buckets.
    pub table: Arc<BucketTable<Words>>,
}

/// All that a burst reads.
#[derive(Debug)]
pub struct Snapshot {
    /// The mux's interfaces, by number.
    pub links: Box<[Link]>,
    services: Box<[ServiceTable]>,
    index: ServiceIndex,
    vips: Box<[Ipv4Addr]>,
    /// By [`Encapsulation`], and by backend number.
    templates: [Box<[Template]>; 2],
}

impl Snapshot {
    /// The service of this key, as an index for [`Snapshot::service`].
    #[inline]
    pub fn find(&self, key: u64) -> Option<u32> {
        self.index.find(key)
    }

    /// The service of this index.
    ///
    /// # Panics
    /// If the index does not come from [`Snapshot::find`] of the same snapshot.
    #[inline]
    pub fn service(&self, index: u32) -> &ServiceTable {
        &self.services[index as usize]
    }

    /// All services. Of two for the same flows the later one gets them.
    pub fn services(&self) -> &[ServiceTable] {
        &self.services
    }

    /// One more than the highest number of a backend.
    pub fn backends(&self) -> u32 {
        self.templates[0].len() as u32
    }

    /// Whether a service has this address.
    pub fn is_vip(&self, address: Ipv4Addr) -> bool {
        self.vips.binary_search(&address).is_ok()
    }

    /// The template of a backend. There may be one with [`Reach::Unknown`] for a number that nobody has.
    #[inline]
    pub fn template(&self, encapsulation: Encapsulation, backend: BackendId) -> Option<&Template> {
        self.templates[encapsulation as usize].get(usize::from(backend.0))
    }
}

/// The key of the service that a flow is for, from [`FlowV4::message`]: destination address, destination port and
/// protocol in one word, which is never 0 as no protocol is.
#[inline]
pub fn service_key([addresses, rest]: [u64; 2]) -> u64 {
    addresses >> 32 | (rest & 0xff_ffff_0000) << 16
}

/// Somebody besides I/O threads who forwards by the tables: the XDP program.
pub trait Plane: core::fmt::Debug + Send {
    /// How many services it carries.
    fn max_services(&self) -> usize;

    /// Memory for the words of a table, where it reads them.
    ///
    /// # Errors
    /// If there is none.
    fn words(&mut self, buckets: u32) -> std::io::Result<Words>;

    /// Forwards by this snapshot from now on, or soon. If it cannot, it says so in the log, and stays with what it had.
    fn publish(&mut self, snapshot: Arc<Snapshot>);

    /// Returns when no packet is forwarded any more by an older snapshot than the last.
    fn settle(&mut self);

    /// What it has counted.
    fn counters(&self) -> Counters;

    /// Takes no more packets.
    fn close(&mut self);
}

/// Finds services by address, protocol and port: open addressing, at most half full.
#[derive(Debug)]
struct ServiceIndex {
    /// Key and service; key 0 is nobody.
    cells: Box<[(u64, u32)]>,
    /// 64 less the number of bits that choose a cell.
    shift: u32,
}

impl ServiceIndex {
    fn new(keys: impl ExactSizeIterator<Item = u64>) -> ServiceIndex {
        let bits = (keys.len() * 2).next_power_of_two().ilog2().max(1);
        let mut index = ServiceIndex { cells: vec![(0, 0); 1 << bits].into(), shift: 64 - bits };
        for (service, key) in keys.enumerate() {
            let mut at = index.first_cell(key);
            while index.cells[at].0 != 0 && index.cells[at].0 != key {
                at = (at + 1) & (index.cells.len() - 1);
            }
            index.cells[at] = (key, service as u32);
        }
        index
    }

    /// Fibonacci hashing: the high bits of a product with 2⁶⁴ over the golden ratio. Keys come from operators.
    #[inline]
    fn first_cell(&self, key: u64) -> usize {
        (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> self.shift) as usize
    }

    #[inline]
    fn find(&self, key: u64) -> Option<u32> {
        let mut at = self.first_cell(key);
        loop {
            match self.cells[at] {
                (0, _) => return None,
                (found, service) if found == key => return Some(service),
                _ => at = (at + 1) & (self.cells.len() - 1),
            }
        }
    }
}

/// Why a table was not applied.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The mux carries IPv4.
    #[error("service {name}: its address {vip} is not IPv4, which is all this mux carries")]
    NotIpv4 {
        /// The service.
        name: String,
        /// Its address.
        vip: IpAddr,
    },
    /// Service and piece contradict each other.
    #[error(
        "service {name} has number {id} and {buckets} buckets, its table piece {piece_id} and {piece_buckets}"
    )]
    Mismatch {
        /// The service.
        name: String,
        /// Its number.
        id: ServiceId,
        /// Its bucket count.
        buckets: u32,
        /// The number in the piece.
        piece_id: ServiceId,
        /// The bucket count in the piece.
        piece_buckets: u32,
    },
    /// More services than can be carried.
    #[error("service {name}: more than the {most} services that --io xdp carries")]
    TooMany {
        /// The service.
        name: String,
        /// How many it may be.
        most: usize,
    },
    /// There is no memory for the table.
    #[error("service {name}: memory for its table: {error}")]
    Memory {
        /// The service.
        name: String,
        /// What the kernel answered.
        error: std::io::Error,
    },
    /// A delta that does not start where the table is.
    #[error("service {name}: a delta from generation {from} does not fit a table of generation {}", found(.have))]
    Gap {
        /// The service.
        name: String,
        /// Where the delta starts.
        from: Generation,
        /// What there is.
        have: Option<Generation>,
    },
}

fn found(have: &Option<Generation>) -> String {
    have.map_or_else(|| "(none)".to_owned(), |generation| generation.to_string())
}

#[derive(Debug)]
struct Known {
    service: Service,
    vip: Ipv4Addr,
    generation: Generation,
    table: Arc<BucketTable<Words>>,
}

/// The writer's side: one for each mux, used by its control threads only.
#[derive(Debug)]
pub struct Tables {
    shared: Arc<ArcSwap<Snapshot>>,
    plane: Option<Box<dyn Plane>>,
    underlay: Underlay,
    links: Box<[Link]>,
    services: BTreeMap<ServiceId, Known>,
    backends: BTreeMap<BackendId, Ipv4Addr>,
    next_hops: BTreeMap<Ipv4Addr, NextHop>,
    swaps: u64,
}

impl Tables {
    /// No services yet, on these interfaces.
    pub fn new(underlay: Underlay, links: impl Into<Box<[Link]>>) -> Tables {
        let links = links.into();
        let empty = Snapshot {
            links: links.clone(),
            services: Box::default(),
            index: ServiceIndex::new([].into_iter()),
            vips: Box::default(),
            templates: Default::default(),
        };
        Tables {
            shared: Arc::new(ArcSwap::from_pointee(empty)),
            plane: None,
            underlay,
            links,
            services: BTreeMap::new(),
            backends: BTreeMap::new(),
            next_hops: BTreeMap::new(),
            swaps: 0,
        }
    }

    /// The same, where somebody else forwards by them too.
    pub fn on(plane: impl Plane + 'static, underlay: Underlay, links: impl Into<Box<[Link]>>) -> Tables {
        let mut tables = Tables::new(underlay, links);
        let plane = tables.plane.insert(Box::new(plane));
        plane.publish(tables.shared.load_full());
        tables
    }

    /// Who else forwards by them.
    pub fn plane(&mut self) -> Option<&mut dyn Plane> {
        Some(self.plane.as_mut()?.as_mut())
    }

    /// What I/O threads load from.
    pub fn shared(&self) -> Arc<ArcSwap<Snapshot>> {
        Arc::clone(&self.shared)
    }

    /// The mux's interfaces, by number.
    pub fn links(&self) -> &[Link] {
        &self.links
    }

    /// How often a table has changed.
    pub fn swaps(&self) -> u64 {
        self.swaps
    }

    /// The services, with the generation that each has.
    pub fn services(&self) -> impl Iterator<Item = (&Service, Generation)> {
        self.services.values().map(|known| (&known.service, known.generation))
    }

    /// The addresses of all backends that packets may be sent to.
    pub fn backend_addresses(&self) -> BTreeSet<Ipv4Addr> {
        self.backends.values().copied().collect()
    }

    /// An interface has another Ethernet address now.
    ///
    /// # Panics
    /// If there is no interface of this number.
    pub fn set_mac(&mut self, interface: u8, mac: [u8; 6]) {
        let link = &mut self.links[usize::from(interface)];
        if link.mac != mac {
            link.mac = mac;
            self.publish_soon();
        }
    }

    /// Takes the backends of a directory. One that is gone stays known for as long as a bucket names it, for
    /// tables are applied after the directory.
    pub fn set_directory(&mut self, directory: &Directory) {
        let mut backends: BTreeMap<_, _> = directory
            .backends
            .iter()
            .filter_map(|backend| match backend.address {
                IpAddr::V4(address) => Some((backend.id, address)),
                IpAddr::V6(address) => {
                    tracing::warn!(backend = backend.name, %address, "not IPv4, which is all this mux carries");
                    None
                }
            })
            .collect();
        let gone: Vec<_> = self
            .backends
            .iter()
            .filter(|(id, _)| !backends.contains_key(id))
            .map(|(id, a)| (*id, *a))
            .collect();
        if !gone.is_empty() {
            let named = self.named();
            backends.extend(gone.into_iter().filter(|(id, _)| named.contains(id)));
        }
        if self.backends != backends {
            self.backends = backends;
            self.publish();
        }
    }

    /// The next hop towards a backend has become known, has changed, or (`None`) is gone.
    pub fn set_next_hop(&mut self, backend: Ipv4Addr, next_hop: Option<NextHop>) {
        let before = match next_hop {
            Some(next_hop) => self.next_hops.insert(backend, next_hop),
            None => self.next_hops.remove(&backend),
        };
        if before != next_hop {
            self.publish_soon();
        }
    }

    /// Applies a snapshot or delta of a service's table.
    ///
    /// # Errors
    /// [`ApplyError`]; then nothing has changed.
    pub fn apply(&mut self, service: &Service, piece: &Piece) -> Result<(), ApplyError> {
        let name = || service.name.clone();
        let IpAddr::V4(vip) = service.vip else {
            return Err(ApplyError::NotIpv4 { name: name(), vip: service.vip });
        };
        if (service.id, service.buckets) != (piece.service, piece.buckets) {
            return Err(ApplyError::Mismatch {
                name: name(),
                id: service.id,
                buckets: service.buckets,
                piece_id: piece.service,
                piece_buckets: piece.buckets,
            });
        }
        let most = self.plane.as_ref().map_or(usize::MAX, |plane| plane.max_services());
        if self.services.len() >= most && !self.services.contains_key(&service.id) {
            return Err(ApplyError::TooMany { name: name(), most });
        }
        let known = self.services.get_mut(&service.id);
        if let Some(from) = piece.from {
            let same_table = known.as_ref().filter(|known| known.table.buckets() == piece.buckets);
            let have = same_table.map(|known| known.generation);
            if have != Some(from) {
                return Err(ApplyError::Gap { name: name(), from, have });
            }
        }
        self.swaps += 1;
        match known {
            // The same service: its words change where they are.
            Some(known) if known.service == *service => {
                known.table.apply(&piece.entries);
                if piece.from.is_none() {
                    known.table.apply(&omitted(piece));
                }
                known.generation = piece.generation;
            }
            _ => {
                let table = match known {
                    Some(known) if piece.from.is_some() => Arc::clone(&known.table),
                    _ => {
                        let memory = |error| ApplyError::Memory { name: name(), error };
                        let words = match &mut self.plane {
                            Some(plane) => plane.words(piece.buckets),
                            None => Words::new(piece.buckets),
                        };
                        Arc::new(BucketTable::in_words(words.map_err(memory)?))
                    }
                };
                table.apply(&piece.entries);
                let known = Known { service: service.clone(), vip, generation: piece.generation, table };
                self.services.insert(service.id, known);
                self.publish();
            }
        }
        Ok(())
    }

    /// Forgets a service. Returns it, if it was known.
    pub fn remove(&mut self, service: ServiceId) -> Option<Service> {
        let known = self.services.remove(&service)?;
        self.swaps += 1;
        self.publish();
        Some(known.service)
    }

    /// A service's table as a snapshot piece, as it would lie on disk.
    pub fn piece(&self, service: ServiceId) -> Option<Piece> {
        let known = self.services.get(&service)?;
        let entry = |bucket: u32| {
            let word = known.table.lookup(bucket.into());
            let chain: Chain = [word.head().some(), word.previous().some()].into_iter().flatten().collect();
            Entry { bucket, generation: word.generation(), chain }
        };
        Some(Piece {
            service,
            from: None,
            generation: known.generation,
            buckets: known.table.buckets(),
            entries: (0..known.table.buckets()).map(entry).collect(),
        })
    }

    /// All backends that a bucket names.
    fn named(&self) -> BTreeSet<BackendId> {
        let words = self
            .services
            .values()
            .flat_map(|known| (0..known.table.buckets()).map(|bucket| known.table.lookup(bucket.into())));
        let mut seen = vec![false; usize::from(u16::MAX) + 1];
        for word in words {
            seen[usize::from(word.head().0)] = true;
            seen[usize::from(word.previous().0)] = true;
        }
        (0..u16::MAX).filter(|id| seen[usize::from(*id)]).map(BackendId).collect()
    }

    /// Puts a new snapshot in place, and returns when nobody uses an older one.
    fn publish(&mut self) {
        self.publish_soon();
        if let Some(plane) = &mut self.plane {
            plane.settle();
        }
    }

    /// Puts a new snapshot in place, and returns when no I/O thread uses an older one.
    fn publish_soon(&mut self) {
        let keys = self.services.values().map(|known| {
            let flow = FlowV4 {
                source: Ipv4Addr::UNSPECIFIED,
                destination: known.vip,
                source_port: 0,
                destination_port: known.service.port,
                protocol: known.service.protocol.number(),
            };
            service_key(flow.message())
        });
        let vips: BTreeSet<_> = self.services.values().map(|known| known.vip).collect();
        let len = self.backends.last_key_value().map_or(0, |(id, _)| usize::from(id.0) + 1);
        let templates = [Encapsulation::Gue, Encapsulation::Ipip].map(|encapsulation| {
            let mut templates = vec![Template::UNKNOWN; len];
            for (id, address) in &self.backends {
                let next_hop = self.next_hops.get(address).copied();
                templates[usize::from(id.0)] =
                    Template::new(encapsulation, &self.underlay, &self.links, *address, next_hop);
            }
            templates.into_boxed_slice()
        });
        let snapshot = Snapshot {
            links: self.links.clone(),
            services: self
                .services
                .values()
                .map(|known| ServiceTable {
                    vip: known.vip,
                    protocol: known.service.protocol.number(),
                    port: known.service.port,
                    hash_key: known.service.hash_key,
                    encapsulation: known.service.encapsulation,
                    table: Arc::clone(&known.table),
                })
                .collect(),
            index: ServiceIndex::new(keys),
            vips: vips.into_iter().collect(),
            templates,
        };
        let snapshot = Arc::new(snapshot);
        if let Some(plane) = &mut self.plane {
            plane.publish(Arc::clone(&snapshot));
        }
        let old = self.shared.swap(snapshot);
        if self.plane.is_some() {
            // There are no I/O threads.
            return;
        }
        // `swap` has turned each thread's hold on the old snapshot into a counted one.
        while Arc::strong_count(&old) > 1 {
            std::thread::yield_now();
        }
        // Pairs with the release in the last hold's decrement: its reads lie before our writes.
        fence(Ordering::Acquire);
    }
}

/// Buckets that a snapshot does not mention: nobody owns them.
fn omitted(piece: &Piece) -> Vec<Entry> {
    let mut mentioned = piece.entries.iter().map(|entry| entry.bucket).peekable();
    (0..piece.buckets)
        .filter(|bucket| mentioned.next_if_eq(bucket).is_none())
        .map(|bucket| Entry { bucket, generation: Generation(0), chain: Chain::new() })
        .collect()
}
