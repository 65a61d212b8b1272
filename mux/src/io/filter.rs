//! The XDP program in front of AF_XDP sockets (`bpf/filter.bpf.c`): it takes packets for services and leaves the
//! rest to the kernel. Its link is not pinned, so that a mux that dies leaves no program behind.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::os::fd::AsRawFd;

use aya::maps::{Array, HashMap, Map, MapData, MapError, XskMap};
use aya::programs::Xdp;
use aya::{Ebpf, EbpfLoader};
use daisy_node::interface::Interface;
use daisy_node::log::causes;
use daisy_node::xdp::{self, Attached, Mode};
use daisy_shared::service::Service;

use super::IoError;

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/filter.bpf.o"));

/// `struct service` of the program: address, port, protocol, 0.
type Key = [u8; 8];

/// The program, attached. Detached when dropped.
pub struct Filter {
    // Holds the program and its link.
    _ebpf: Ebpf,
    services: HashMap<MapData, Key, u8>,
    station: Array<MapData, u64>,
    sockets: XskMap<MapData>,
    shown: BTreeSet<Key>,
    mac: [u8; 6],
    interface: String,
    attached: Attached,
}

impl fmt::Debug for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Filter { interface, attached, shown, .. } = self;
        write!(f, "Filter({interface}, {attached}, {} keys)", shown.len())
    }
}

impl Filter {
    /// Loads the program and attaches it. It takes nothing until it is told of services and sockets.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn attach(interface: &Interface, queues: u32, mode: Mode) -> Result<Filter, IoError> {
        let place = format!("interface {}", interface.name);
        let unusable = |reason| IoError::Unusable { place: place.clone(), reason };
        let mut ebpf = EbpfLoader::new()
            .map_max_entries("sockets", queues)
            .load(OBJECT)
            .map_err(|error| unusable(format!("the XDP program does not load: {}", causes(&error))))?;
        let missing = |what| unusable(format!("the XDP program has no {what}"));
        let mut map = |name| ebpf.take_map(name).ok_or_else(|| missing(name));
        let map_error = |error: MapError| unusable(format!("the XDP program's maps: {}", causes(&error)));
        let services = HashMap::try_from(map("services")?).map_err(map_error)?;
        let station = Array::try_from(map("station")?).map_err(map_error)?;
        let sockets = match map("sockets")? {
            Map::XskMap(data) => XskMap::try_from(Map::XskMap(data)).map_err(map_error)?,
            _ => return Err(missing("XSKMAP")),
        };
        let program: &mut Xdp = ebpf
            .program_mut("daisy_filter")
            .and_then(|program| program.try_into().ok())
            .ok_or_else(|| missing("daisy_filter"))?;
        program
            .load()
            .map_err(|error| unusable(format!("the kernel refuses the XDP program: {}", causes(&error))))?;
        let (_, attached) = xdp::attach(program, interface, mode)
            .map_err(|error| IoError::Unusable { place: "af-xdp".to_owned(), reason: error.to_string() })?;
        let (interface, shown) = (interface.name.clone(), BTreeSet::new());
        Ok(Filter { _ebpf: ebpf, services, station, sockets, shown, mac: [0; 6], interface, attached })
    }

    /// How the program is attached.
    pub fn attached(&self) -> Attached {
        self.attached
    }

    /// Hands packets of a receive queue to this AF_XDP socket.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_socket(&mut self, queue: u32, socket: &impl AsRawFd) -> Result<(), IoError> {
        let result = self.sockets.set(queue, socket.as_raw_fd(), 0);
        result.map_err(|error| self.failed(format!("socket of queue {queue}: {}", causes(&error))))
    }

    /// Takes packets that come to this Ethernet address for these services, and no others.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn follow<'s>(
        &mut self,
        mac: [u8; 6],
        services: impl Iterator<Item = &'s Service>,
    ) -> Result<(), IoError> {
        if self.mac != mac {
            let [a, b, c, d, e, f] = mac;
            let set = self.station.set(0, u64::from_ne_bytes([a, b, c, d, e, f, 0, 0]), 0);
            set.map_err(|error| self.failed(format!("Ethernet address: {}", causes(&error))))?;
            self.mac = mac;
        }
        let wanted: BTreeSet<Key> = services.flat_map(keys).collect();
        let (new, gone): (Vec<_>, Vec<_>) =
            wanted.symmetric_difference(&self.shown).copied().partition(|key| wanted.contains(key));
        let insert = new.iter().try_for_each(|key| self.services.insert(key, 1, 0));
        let remove = gone.iter().try_for_each(|key| self.services.remove(key));
        insert.and(remove).map_err(|error| self.failed(format!("services: {}", causes(&error))))?;
        self.shown = wanted;
        Ok(())
    }

    fn failed(&self, reason: String) -> IoError {
        IoError::Unusable { place: format!("interface {}", self.interface), reason }
    }
}

/// The keys of a service: its own, and that of fragments for its address.
fn keys(service: &Service) -> Vec<Key> {
    // Tables refuse other families.
    let IpAddr::V4(vip) = service.vip else { return Vec::new() };
    let [a, b, c, d] = vip.octets();
    let [high, low] = service.port.to_be_bytes();
    vec![[a, b, c, d, high, low, service.protocol.number(), 0], [a, b, c, d, 0, 0, 0, 0]]
}
