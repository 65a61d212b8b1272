//! Opening ports: which rings each thread gets, and the descriptors through which the kernel is called.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::net::if_::if_nametoindex;
use tracing::{info, warn};

use super::abi::{self, Register, Request};
use super::name::{Kind, PortName};
use super::ring::{MAX_OFFSET, Region, Ring};
use super::{Forwarder, Netmap, Port, Rings};
use crate::io::sys::{self, Mapping};
use crate::io::{FRAME_START, IoError};

/// How long netmap may refuse a port, as it does while an interface is down or is reset, before it is looked whether
/// the interface is still there.
const REFUSAL: Duration = Duration::from_secs(1);
/// How long to wait before a port that is refused is tried again: nothing tells when.
const REFUSED_WAIT: Duration = Duration::from_millis(10);

/// What the kernel does for the ports of a thread. Tests play its part.
pub trait Kernel {
    /// Sends what lies in rings to send, takes what has arrived into rings to receive, and waits for something to
    /// arrive, at most this long.
    fn turn(&mut self, wait: Duration) -> io::Result<()>;

    /// Sends what lies in the ring to send of this handle, and takes back slots.
    fn send(&mut self, handle: usize) -> io::Result<()>;

    /// Does the same, and waits until there is a slot to send, at most this long.
    fn wait_for_room(&mut self, handle: usize, wait: Duration) -> io::Result<()>;
}

/// Netmap's descriptors of one thread, one for each pair of rings.
#[derive(Debug, Default)]
pub struct Descriptors {
    fds: Vec<OwnedFd>,
    polls: Vec<libc::pollfd>,
    /// The kernel's interfaces, with their numbers.
    interfaces: Vec<(String, u32)>,
    refused_since: Option<Instant>,
}

impl Kernel for Descriptors {
    fn turn(&mut self, wait: Duration) -> io::Result<()> {
        // Netmap syncs rings in this call. No reference to anything in its memory is held now.
        sys::poll_any(&mut self.polls, wait)?;
        if self.polls.iter().all(|entry| entry.revents & libc::POLLERR == 0) {
            self.refused_since = None;
            return Ok(());
        }
        if self.refused_since.get_or_insert_with(Instant::now).elapsed() > REFUSAL {
            self.refused_since = None;
            // What is down may come up again. What is gone does not.
            let is_gone = |(name, index): &&(String, u32)| if_nametoindex(name.as_str()) != Ok(*index);
            if let Some((name, _)) = self.interfaces.iter().find(is_gone) {
                return Err(io::Error::other(format!("interface {name} is gone")));
            }
        }
        std::thread::sleep(REFUSED_WAIT.min(wait));
        Ok(())
    }

    fn send(&mut self, handle: usize) -> io::Result<()> {
        abi::sync_tx(&self.fds[handle])
    }

    fn wait_for_room(&mut self, handle: usize, wait: Duration) -> io::Result<()> {
        // Whether it was worth it shows in the ring.
        sys::poll(&self.fds[handle], libc::POLLOUT, wait).map(|_ready| ())
    }
}

impl Descriptors {
    fn push(&mut self, fd: OwnedFd) -> usize {
        self.polls.push(sys::poll_entry(&fd, libc::POLLIN));
        self.fds.push(fd);
        self.fds.len() - 1
    }
}

/// Opens these ports, for one thread or several. Each thread has its own pair of rings, or several, on every port.
///
/// Threads: as many as `threads`, or else as the interface with the fewest pairs has. `queues` names the pairs of
/// rings that are used; by default all are. A VALE port or pipe has as many pairs as there are threads.
///
/// # Errors
/// If there is no netmap, or it does not give these ports.
pub fn open(
    ports: &[PortName],
    threads: Option<usize>,
    queues: Option<&[u32]>,
) -> Result<Vec<Netmap>, IoError> {
    let mut rings = Vec::new();
    for name in ports {
        rings.push(rings_of(name, queues)?);
    }
    let fewest = rings.iter().flatten().map(Vec::len).min();
    let threads = threads.or(fewest).unwrap_or(1);
    let mut opener = Opener { regions: BTreeMap::new(), ids: Vec::new() };
    let mut opened: Vec<(Rings, Descriptors)> = (0..threads).map(|_| Default::default()).collect();
    for (name, rings) in ports.iter().zip(&rings) {
        if let Some(rings) = rings
            && rings.len() < threads
        {
            let reason = format!("{} pairs of its rings are too few for {threads} threads", rings.len());
            return Err(IoError::Unusable { place: format!("port {name}"), reason });
        }
        warn_of_host_settings(name);
        for (thread, (all, descriptors)) in opened.iter_mut().enumerate() {
            let mine: Vec<u16> = match rings {
                Some(rings) => rings.iter().copied().skip(thread).step_by(threads).collect(),
                None => vec![thread as u16],
            };
            opener.port(name, &mine, thread, threads, all, descriptors)?;
        }
    }
    opened.into_iter().map(|(rings, descriptors)| Ok(Netmap(Forwarder::new(rings, descriptors)?))).collect()
}

/// The pairs of rings of an interface that are to be used. VALE ports and pipes are made as they are needed.
fn rings_of(name: &PortName, queues: Option<&[u32]>) -> Result<Option<Vec<u16>>, IoError> {
    if name.kind != Kind::Interface {
        // So that what is wrong with the host is said of the host.
        device()?;
        return Ok(None);
    }
    let info = abi::info(&device()?, &name.port).map_err(failed(name, "asking for its rings"))?;
    let pairs = info.tx_rings.min(info.rx_rings);
    let wanted: Vec<u32> = match (name.ring, queues) {
        (Some(ring), _) => vec![ring.into()],
        (None, Some(queues)) => queues.to_vec(),
        (None, None) => (0..pairs.into()).collect(),
    };
    let exists = |ring: u32| u16::try_from(ring).ok().filter(|ring| *ring < pairs).ok_or(ring);
    let wanted: Result<Vec<u16>, u32> = wanted.into_iter().map(exists).collect();
    wanted.map(Some).map_err(|ring| IoError::Unusable {
        place: format!("port {name}"),
        reason: format!("has no pair of rings {ring}, only {pairs}, from 0 on"),
    })
}

fn device() -> Result<std::fs::File, IoError> {
    abi::open_device().map_err(|error| IoError::System {
        place: abi::DEVICE.to_owned(),
        what: "opening netmap's device (its kernel module must be loaded, and we must be root)",
        error,
    })
}

fn failed(name: &PortName, what: &'static str) -> impl FnOnce(io::Error) -> IoError {
    let place = format!("port {name}");
    move |error| IoError::System { place, what, error }
}

struct Opener {
    /// What is mapped, by netmap's number for it.
    regions: BTreeMap<u16, Arc<Region>>,
    /// Those numbers, in the order in which we count regions.
    ids: Vec<u16>,
}

impl Opener {
    /// A thread's part of a port: these pairs of hardware rings and, where there are such, its own host rings.
    fn port(
        &mut self,
        name: &PortName,
        rings: &[u16],
        thread: usize,
        threads: usize,
        all: &mut Rings,
        descriptors: &mut Descriptors,
    ) -> Result<(), IoError> {
        let start = all.pairs.len();
        for ring in rings {
            self.pair(name, abi::Rings::Hardware(*ring), threads, all, descriptors)?;
        }
        let pairs = start..all.pairs.len();
        let host = match name.kind {
            Kind::Interface => {
                Some(self.pair(name, abi::Rings::Host(thread as u16), threads, all, descriptors)?)
            }
            Kind::Vale | Kind::Pipe => None,
        };
        let first = &all.rx[start];
        info!(
            port = %name,
            ?rings,
            slots = first.slot_count(),
            buffer_len = first.buffer_len(),
            in_place = first.has_offsets(),
            host_rings = host.is_some(),
            "netmap port opened"
        );
        if let Some(interface) = name.interface()
            && let Ok(index) = if_nametoindex(interface)
        {
            descriptors.interfaces.push((interface.to_owned(), index));
        }
        all.ports.push(Port { place: format!("port {name}"), pairs, host });
        Ok(())
    }

    /// One pair of rings, with its number among the thread's.
    fn pair(
        &mut self,
        name: &PortName,
        rings: abi::Rings,
        threads: usize,
        all: &mut Rings,
        descriptors: &mut Descriptors,
    ) -> Result<usize, IoError> {
        let device = device()?;
        let threads_u16 = u16::try_from(threads).unwrap_or(u16::MAX);
        let mut request = Request {
            name: &name.port,
            rings,
            pairs: if name.kind == Kind::Interface { 0 } else { threads_u16 },
            host_pairs: if name.kind == Kind::Interface { threads_u16 } else { 0 },
            // Not on a pipe: its slots are the other end's too, which may not know of offsets.
            offsets: (name.kind != Kind::Pipe).then_some((FRAME_START as u64, MAX_OFFSET as u64)),
        };
        let mut reply = abi::register(&device, &request);
        if let Err(error) = &reply
            && error.raw_os_error() == Some(libc::EOPNOTSUPP)
            && request.offsets.is_some()
        {
            info!(port = %name, ?rings, "grants no room before frames: they are copied to be encapsulated");
            request.offsets = None;
            reply = abi::register(&device, &request);
        }
        let what = match rings {
            abi::Rings::Hardware(_) => "opening a pair of its rings with netmap",
            abi::Rings::Host(_) => "opening its host rings with netmap",
        };
        let reply = reply.map_err(failed(name, what))?;
        let unusable = |reason: String| IoError::Unusable { place: format!("port {name}"), reason };
        if name.kind == Kind::Interface && usize::from(reply.host_tx_rings.min(reply.host_rx_rings)) < threads
        {
            return Err(unusable(format!(
                "has {} host rings, too few for {threads} threads; is it open elsewhere?",
                reply.host_tx_rings.min(reply.host_rx_rings)
            )));
        }
        let fd = OwnedFd::from(device);
        let (region, memory) = self.region(name, &fd, &reply)?;
        let at = usize::try_from(reply.offset).unwrap_or(usize::MAX);
        let (tx, rx) = find(&memory, at, rings).map_err(unusable)?;
        let handle = descriptors.push(fd);
        Ok(all.push(handle, region, name.kind != Kind::Pipe, rx, tx))
    }

    /// The memory of a port, and our number for it.
    fn region(
        &mut self,
        name: &PortName,
        fd: &OwnedFd,
        reply: &Register,
    ) -> Result<(usize, Arc<Region>), IoError> {
        let id = reply.memory_id;
        let known = match self.regions.get(&id) {
            Some(known) => Arc::clone(known),
            None => {
                let len = usize::try_from(reply.memory_len).unwrap_or(usize::MAX);
                let mapping = Mapping::shared(fd, len, 0).map_err(failed(name, "mapping netmap's memory"))?;
                let region = Arc::new(Region::new(mapping));
                self.regions.insert(id, Arc::clone(&region));
                self.ids.push(id);
                region
            }
        };
        let number = self.ids.iter().position(|known| *known == id).unwrap_or_default();
        Ok((number, known))
    }
}

/// The rings to send and to receive of a pair, from a port's `struct netmap_if`.
pub fn find(region: &Arc<Region>, interface_at: usize, rings: abi::Rings) -> Result<(Ring, Ring), String> {
    let counts = region
        .counts(interface_at)
        .ok_or_else(|| format!("the port's description at {interface_at} is not within the mapped memory"))?;
    let (tx, rx) = match rings {
        // Netmap takes the first for a number that one direction has not.
        abi::Rings::Hardware(ring) => {
            let ring = usize::from(ring);
            (if ring < counts.tx { ring } else { 0 }, if ring < counts.rx { ring } else { 0 })
        }
        abi::Rings::Host(ring) => {
            let ring = usize::from(ring);
            (
                counts.tx + if ring < counts.host_tx { ring } else { 0 },
                counts.rx + if ring < counts.host_rx { ring } else { 0 },
            )
        }
    };
    let ring = |index: usize| {
        let offset = region
            .ring_offset(interface_at, index)
            .ok_or_else(|| format!("the port's ring {index} is not within the mapped memory"))?;
        Ring::at(region, offset)
    };
    Ok((ring(tx)?, ring(counts.tx + counts.host_tx + rx)?))
}

/// Netmap drops packets of the host whose checksums are left to the device.
fn warn_of_host_settings(name: &PortName) {
    let Some(interface) = name.interface() else { return };
    if sys::transmit_offload(interface).is_ok_and(|on| on) {
        warn!(
            interface,
            "the host leaves checksums to this device, and netmap drops such packets: run `ethtool -K {interface} \
             tx off`, or TCP and UDP of the host itself do not get out"
        );
    }
    if sys::receive_offload(interface).is_ok_and(|on| on) {
        warn!(
            interface,
            "merges received segments (GRO), which netmap cannot send on where the driver has no netmap mode of its \
             own: run `ethtool -K {interface} gro off`"
        );
    }
}
