//! The whole mux in the kernel: the XDP program `bpf/mux.bpf.c`, and its control side.
//!
//! The program reads what [`crate::table`] gives it, from memory that both have mapped:
//!
//! - The words of a table lie in a BPF array. Tables change them in place, and there is no other copy.
//! - All else hangs on one snapshot (interfaces, services, and which backends there are), of which there are two:
//!   one that packets see, and one that is written. To change over is one store of the kernel's, after which it
//!   waits until no program runs that began before, for some milliseconds. So a thread does it, and takes many changes
//!   that come at once together. [`crate::table`] waits for it before a word may name a new backend.
//!
//! The link is not pinned: a mux that dies leaves no program behind.

pub mod layout;
mod syscall;
pub mod test_run;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use aya::maps::{Array, ArrayOfMaps, DevMap, IterableMap, Map, MapData, MapError, PerCpuArray};
use aya::programs::Xdp;
use aya::programs::xdp::XdpLinkId;
use aya::{Ebpf, Pod};
use daisy_node::interface::Interface;
use daisy_node::log::causes;
use daisy_node::xdp::{self, Attached, Mode};
use daisy_shared::bucket::{BackendId, BucketTable};
use daisy_shared::drop::DropReason;
use daisy_shared::service::{DEFAULT_BUCKETS, Encapsulation, MAX_BUCKETS, MIN_BUCKETS};
use tracing::error;

use super::sys::Mapping;
use super::words::Words;
use super::{IoError, PacketIo, Worker};
use crate::metrics::Counters;
use crate::table::{self, Plane, Reach, ServiceTable, Snapshot};
use layout::{
    CELL_SHIFT, CELLS, COUNTERS, HEADER_WORDS, MAX_LINKS, MAX_PROBES, MAX_TABLES, NEAR_BACKENDS, OUTCOMES,
};
use test_run::Runner;

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/mux.bpf.o"));

/// The most services that the program carries: with their addresses they fill half of the index at most.
pub const MAX_SERVICES: usize = CELLS / 4;

// linux/bpf.h
const BPF_F_MMAPABLE: u32 = 1 << 10;
const BPF_F_INNER_MAP: u32 = 1 << 12;

/// `struct link` of the program.
#[repr(C)]
#[derive(Clone, Copy)]
struct Link {
    mac: u64,
    ifindex: u32,
    zero: u32,
}

/// `struct cell`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Cell {
    key: u64,
    hash_key: [u64; 2],
    mask: u32,
    table: u32,
    is_ipip: u32,
    zero: [u32; 7],
}

/// `struct snapshot`.
#[repr(C)]
#[derive(Clone, Copy)]
struct View {
    multiplier: u64,
    backends: u32,
    zero: [u32; 13],
    links: [Link; MAX_LINKS],
    cells: [Cell; CELLS],
    near: [Backend; NEAR_BACKENDS],
}

/// `struct template`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Template {
    headers: [[u8; 8]; HEADER_WORDS],
    ip_sum: u32,
    address: [u8; 4],
    mtu: u16,
    reach: u8,
    egress: u8,
    ifindex: u32,
}

/// `struct backend`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Backend {
    gue: Template,
    ipip: Template,
}

// SAFETY: integers without padding between or behind them; every pattern of bits is a value.
unsafe impl Pod for View {}
// SAFETY: as above.
unsafe impl Pod for Backend {}
const _: () = assert!(size_of::<Backend>() == 128 && size_of::<Cell>() == 64 && size_of::<Link>() == 16);

/// A BPF array that is written as memory, while no program looks at it.
struct Mapped<T: Pod> {
    array: Array<MapData, T>,
    memory: Mapping,
}

impl<T: Pod> Mapped<T> {
    fn new(len: u32, flags: u32) -> Result<Mapped<T>, MapError> {
        let array = Array::create(len, BPF_F_MMAPABLE | flags)?;
        let bytes = len as usize * size_of::<T>();
        let memory = Mapping::shared(&array.map().fd().as_fd(), bytes, 0).map_err(MapError::IoError)?;
        Ok(Mapped { array, memory })
    }

    /// The values.
    ///
    /// # Safety
    /// No program reads the map meanwhile.
    unsafe fn values(&mut self) -> &mut [T] {
        // SAFETY: the mapping holds so many values, begins at a page, and is borrowed as long as this is. A `Pod` takes
        // any bytes. The caller answers for programs, and nobody else has the map.
        unsafe {
            std::slice::from_raw_parts_mut(self.memory.start().cast().as_ptr(), self.array.len() as usize)
        }
    }
}

/// One of the two snapshots.
struct Half {
    view: Mapped<View>,
    /// Those that have no room in the view. In the map of maps at this half's place.
    far: Mapped<Backend>,
}

/// In which of the maps of tables a table is: of the default size, of the largest, or of any other.
const fn class(buckets: u32) -> usize {
    match buckets {
        DEFAULT_BUCKETS => 0,
        MAX_BUCKETS => 1,
        _ => 2,
    }
}

impl Half {
    fn new() -> Result<Half, MapError> {
        Ok(Half { view: Mapped::new(1, 0)?, far: Mapped::new(1, BPF_F_INNER_MAP)? })
    }
}

/// The program, with a thread that shows it snapshots. Detached when dropped.
pub struct XdpPlane {
    ebpf: Ebpf,
    links: Vec<XdpLinkId>,
    counters: PerCpuArray<MapData, [u64; COUNTERS]>,
    /// The mux's interfaces, by number.
    interfaces: Vec<u32>,
    desk: Arc<Desk>,
    publisher: Option<JoinHandle<()>>,
}

/// What the publisher is to do, and what it has done.
#[derive(Default)]
struct Desk {
    state: Mutex<Orders>,
    change: Condvar,
}

#[derive(Default)]
struct Orders {
    /// The newest; those before it that have not been taken are skipped.
    snapshot: Option<Arc<Snapshot>>,
    /// How many have been ordered.
    ordered: u64,
    /// How many of them have been shown or skipped.
    done: u64,
    stop: bool,
}

impl Desk {
    fn lock(&self) -> MutexGuard<'_, Orders> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'l>(&self, orders: MutexGuard<'l, Orders>) -> MutexGuard<'l, Orders> {
        self.change.wait(orders).unwrap_or_else(PoisonError::into_inner)
    }
}

/// The maps that snapshots are shown in.
struct Publisher {
    snapshots: ArrayOfMaps<MapData, Array<MapData, View>>,
    backends: ArrayOfMaps<MapData, Array<MapData, Backend>>,
    /// By [`class`].
    tables: [Map; 3],
    interfaces: Vec<u32>,
    halves: [Half; 2],
    /// The half that programs do not look at.
    spare: usize,
    /// Which tables are at which places of `tables`.
    places: Vec<Option<Arc<BucketTable<Words>>>>,
}

impl fmt::Debug for XdpPlane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "XdpPlane(interfaces {:?})", self.interfaces)
    }
}

fn unusable(reason: String) -> IoError {
    IoError::Unusable { place: "xdp".to_owned(), reason }
}

fn map_error(error: impl std::error::Error + 'static) -> IoError {
    unusable(format!("the XDP program's maps: {}", causes(&error)))
}

impl XdpPlane {
    /// Loads the program, for interfaces of these numbers of the kernel's. It passes everything until something is
    /// published.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn load(interfaces: &[u32]) -> Result<XdpPlane, IoError> {
        if interfaces.len() > MAX_LINKS {
            let reason = format!("{} interfaces are more than the {MAX_LINKS} it carries", interfaces.len());
            return Err(unusable(reason));
        }
        let mut ebpf = Ebpf::load(OBJECT)
            .map_err(|error| unusable(format!("the XDP program does not load: {}", causes(&error))))?;
        let missing = |what| unusable(format!("the XDP program has no {what}"));
        let mut map = |name| ebpf.take_map(name).ok_or_else(|| missing(name));
        let mut ports = DevMap::try_from(map("ports")?).map_err(map_error)?;
        for (number, index) in (0..).zip(interfaces) {
            ports.set(number, *index, None, 0).map_err(map_error)?;
        }
        let snapshots = ArrayOfMaps::try_from(map("snapshots")?).map_err(map_error)?;
        let backends = ArrayOfMaps::try_from(map("backends")?).map_err(map_error)?;
        let tables = [map("default_tables")?, map("largest_tables")?, map("tables")?];
        let counters = PerCpuArray::try_from(map("counters")?).map_err(map_error)?;
        let halves = [Half::new().map_err(map_error)?, Half::new().map_err(map_error)?];
        let program: &mut Xdp = ebpf
            .program_mut("daisy_mux")
            .and_then(|program| program.try_into().ok())
            .ok_or_else(|| missing("daisy_mux"))?;
        program
            .load()
            .map_err(|error| unusable(format!("the kernel refuses the XDP program: {}", causes(&error))))?;
        let interfaces = interfaces.to_vec();
        let places = vec![None; MAX_TABLES as usize];
        let mut publisher = Publisher {
            snapshots,
            backends,
            tables,
            interfaces: interfaces.clone(),
            halves,
            spare: 0,
            places,
        };
        for (place, half) in (0..).zip(&publisher.halves) {
            publisher.backends.set(place, &half.far.array, 0).map_err(map_error)?;
        }
        let desk = Arc::new(Desk::default());
        let orders = Arc::clone(&desk);
        let thread = std::thread::Builder::new().name("publisher".to_owned());
        let publisher = thread
            .spawn(move || publisher.run(&orders))
            .map_err(|error| unusable(format!("no thread: {error}")))?;
        Ok(XdpPlane { ebpf, links: Vec::new(), counters, interfaces, desk, publisher: Some(publisher) })
    }

    /// Attaches the program to interfaces.
    ///
    /// # Errors
    /// If it cannot be attached to one of them; then it stays on those before.
    ///
    /// # Panics
    /// If they are not the interfaces that it was loaded for.
    pub fn attach(&mut self, interfaces: &[Interface], mode: Mode) -> Result<Vec<Attached>, IoError> {
        assert!(interfaces.iter().map(|interface| interface.index).eq(self.interfaces.iter().copied()));
        let program: &mut Xdp = self
            .ebpf
            .program_mut("daisy_mux")
            .and_then(|program| program.try_into().ok())
            .ok_or_else(|| unusable("the XDP program has no daisy_mux".to_owned()))?;
        let mut attached = Vec::new();
        for interface in interfaces {
            let (link, how) =
                xdp::attach(program, interface, mode).map_err(|error| unusable(error.to_string()))?;
            self.links.push(link);
            attached.push(how);
        }
        Ok(attached)
    }

    /// The program, to be run on frames.
    ///
    /// # Errors
    /// If there are no file descriptors left.
    pub fn runner(&self) -> io::Result<Runner> {
        let program: Option<&Xdp> =
            self.ebpf.program("daisy_mux").and_then(|program| program.try_into().ok());
        let fd = program.and_then(|program| program.fd().ok()).ok_or(io::ErrorKind::NotFound)?;
        Ok(Runner::new(fd.try_clone()?))
    }
}

impl Publisher {
    /// Shows what is ordered, until it is told to stop.
    fn run(mut self, desk: &Desk) {
        let mut orders = desk.lock();
        while !orders.stop {
            let Some(snapshot) = orders.snapshot.take() else {
                orders = desk.wait(orders);
                continue;
            };
            let ordered = orders.ordered;
            drop(orders);
            if let Err(error) = self.publish(&snapshot) {
                error!(error = causes(&error), "the XDP program forwards by older tables");
            }
            // Not under the lock: this may be the last hold on tables.
            drop(snapshot);
            orders = desk.lock();
            orders.done = ordered;
            desk.change.notify_all();
        }
    }

    /// Shows the program a snapshot. When this returns, no older one is used any more.
    fn publish(&mut self, snapshot: &Snapshot) -> Result<(), MapError> {
        self.place_tables(snapshot)?;
        self.write(snapshot)?;
        // Returns when no program runs that has seen what was there before.
        self.snapshots.set(0, &self.halves[self.spare].view.array, 0)?;
        self.spare = 1 - self.spare;
        self.forget_tables(snapshot)
    }

    /// Where a table is.
    fn place(&self, table: &Arc<BucketTable<Words>>) -> Option<usize> {
        let is_here = |place: &Option<_>| place.as_ref().is_some_and(|there| Arc::ptr_eq(there, table));
        self.places.iter().position(is_here)
    }

    /// Puts the tables that are new where they can be found.
    fn place_tables(&mut self, snapshot: &Snapshot) -> Result<(), MapError> {
        for ServiceTable { table, .. } in snapshot.services() {
            let Some(array) = table.words().array() else { continue };
            if self.place(table).is_some() {
                continue;
            }
            let out = MapError::OutOfBounds { index: MAX_TABLES, max_entries: MAX_TABLES };
            let place = self.places.iter().position(Option::is_none).ok_or(out)?;
            ArrayOfMaps::try_from(&mut self.tables[class(array.len())])?.set(place as u32, array, 0)?;
            self.places[place] = Some(Arc::clone(table));
        }
        Ok(())
    }

    /// Lets go of the tables that are not in the snapshot that programs see.
    fn forget_tables(&mut self, snapshot: &Snapshot) -> Result<(), MapError> {
        for (place, table) in (0..).zip(&mut self.places) {
            let is_used =
                |known: &Arc<_>| snapshot.services().iter().any(|service| Arc::ptr_eq(&service.table, known));
            if let Some(gone) = table.take_if(|known| !is_used(known))
                && let Map::ArrayOfMaps(tables) = &self.tables[class(gone.buckets())]
            {
                syscall::delete(tables.fd(), place).map_err(MapError::IoError)?;
            }
        }
        Ok(())
    }

    /// Writes a snapshot to the spare half.
    fn write(&mut self, snapshot: &Snapshot) -> Result<(), MapError> {
        let cells = self.cells(snapshot);
        let half = &mut self.halves[self.spare];
        let far = snapshot.backends().saturating_sub(NEAR_BACKENDS as u32);
        if half.far.array.len() < far {
            // Those that follow are nobody's, and zeros.
            half.far = Mapped::new(far.next_power_of_two(), BPF_F_INNER_MAP)?;
            self.backends.set(self.spare as u32, &half.far.array, 0)?;
        }
        // SAFETY: programs that run see the other half. Those that saw this one have ended before it became the spare
        // one, see `publish`.
        let (view, far) = unsafe { (&mut half.view.values()[0], half.far.values()) };
        for (number, place) in (0..=u16::MAX).zip(view.near.iter_mut().chain(far)) {
            let form = |encapsulation| {
                let template = snapshot.template(encapsulation, BackendId(number));
                template.map_or(Template::NOBODY, |template| Template::new(template, &self.interfaces))
            };
            *place = Backend { gue: form(Encapsulation::Gue), ipip: form(Encapsulation::Ipip) };
        }
        view.backends = self.spare as u32;
        view.links = [Link { mac: 0, ifindex: 0, zero: 0 }; MAX_LINKS];
        for ((place, link), index) in view.links.iter_mut().zip(&snapshot.links).zip(&self.interfaces) {
            let [a, b, c, d, e, f] = link.mac;
            *place = Link { mac: u64::from_ne_bytes([a, b, c, d, e, f, 0, 0]), ifindex: *index, zero: 0 };
        }
        view.multiplier = index(&cells, &mut view.cells);
        Ok(())
    }

    /// The cells of a snapshot's services, and of their addresses, by key.
    fn cells(&self, snapshot: &Snapshot) -> BTreeMap<u64, Cell> {
        let mut cells = BTreeMap::new();
        for service in snapshot.services() {
            let Some(place) = self.place(&service.table) else { continue };
            let ([a, b, c, d], [high, low]) = (service.vip.octets(), service.port.to_be_bytes());
            let address = u64::from_le_bytes([a, b, c, d, 0, 0, 0, 0]);
            let key = u64::from_le_bytes([a, b, c, d, high, low, service.protocol, 0]);
            let (k0, k1) = service.hash_key.words();
            let cell = Cell {
                key,
                hash_key: [k0, k1],
                mask: service.table.buckets() - 1,
                table: place as u32,
                is_ipip: u32::from(service.encapsulation == Encapsulation::Ipip),
                zero: [0; 7],
            };
            cells.insert(key, cell);
            cells.insert(address, Cell { key: address, ..EMPTY });
        }
        cells
    }
}

impl Plane for XdpPlane {
    fn max_services(&self) -> usize {
        MAX_SERVICES
    }

    fn words(&mut self, buckets: u32) -> io::Result<Words> {
        let other = |error: MapError| io::Error::other(causes(&error));
        // The kernel demands this flag where tables of several sizes are in one map.
        let flags = if class(buckets) == class(MIN_BUCKETS) { BPF_F_INNER_MAP } else { 0 };
        let Mapped { array, memory } = Mapped::new(buckets, flags).map_err(other)?;
        Ok(Words::of(array, memory))
    }

    fn publish(&mut self, snapshot: Arc<Snapshot>) {
        let mut orders = self.desk.lock();
        orders.snapshot = Some(snapshot);
        orders.ordered += 1;
        self.desk.change.notify_all();
    }

    fn settle(&mut self) {
        let mut orders = self.desk.lock();
        let ordered = orders.ordered;
        while orders.done < ordered {
            orders = self.desk.wait(orders);
        }
    }

    fn counters(&self) -> Counters {
        let mut total = Counters::default();
        let Ok(values) = self.counters.get(&0, 0) else { return total };
        for count in values.iter() {
            let [closed, open, passed] = *count.first_chunk::<{ OUTCOMES.len() }>().expect("there is room");
            total.sent += closed + open;
            total.chained_header += open;
            total.passed += passed;
            for reason in DropReason::ALL {
                total.dropped[*reason as usize] += count[OUTCOMES.len() + *reason as usize];
            }
        }
        // Every packet is counted once, for what became of it.
        total.received = total.sent + total.passed + total.dropped_total();
        total
    }

    fn close(&mut self) {
        let links = std::mem::take(&mut self.links);
        let program: Option<&mut Xdp> =
            self.ebpf.program_mut("daisy_mux").and_then(|program| program.try_into().ok());
        let Some(program) = program else { return };
        for link in links {
            if let Err(error) = program.detach(link) {
                error!(error = causes(&error), "detaching the XDP program");
            }
        }
    }
}

impl Drop for XdpPlane {
    fn drop(&mut self) {
        self.desk.lock().stop = true;
        self.desk.change.notify_all();
        if let Some(publisher) = self.publisher.take()
            && publisher.join().is_err()
        {
            error!("the thread that shows tables to the XDP program panicked");
        }
    }
}

/// What a thread does while packets are forwarded in the kernel: it sees whether the interfaces are still there.
#[derive(Debug)]
pub struct Watch(Vec<Interface>);

impl Watch {
    /// Of these interfaces.
    pub fn new(interfaces: &[Interface]) -> Watch {
        Watch(interfaces.to_vec())
    }
}

impl PacketIo for Watch {
    fn turn(&mut self, _worker: &mut Worker, wait: Duration) -> Result<usize, IoError> {
        for Interface { name, index, .. } in &self.0 {
            if nix::net::if_::if_nametoindex(name.as_str()) != Ok(*index) {
                let place = format!("interface {name}");
                return Err(IoError::Unusable { place, reason: "it is gone".to_owned() });
            }
        }
        std::thread::sleep(wait);
        Ok(0)
    }

    fn close(self, _worker: &mut Worker) -> Result<(), IoError> {
        Ok(())
    }
}

impl Template {
    const NOBODY: Template = Template {
        headers: [[0; 8]; HEADER_WORDS],
        ip_sum: 0,
        address: [0; 4],
        mtu: 0,
        reach: layout::REACH_UNKNOWN,
        egress: 0,
        ifindex: 0,
    };

    fn new(template: &table::Template, interfaces: &[u32]) -> Template {
        let mut headers = [[0; 8]; HEADER_WORDS];
        for (place, byte) in headers.as_flattened_mut().iter_mut().zip(template.headers) {
            *place = byte;
        }
        let (words, _) = template.headers[14..34].as_chunks::<2>();
        Template {
            headers,
            ip_sum: words.iter().map(|word| u32::from(u16::from_ne_bytes(*word))).sum(),
            address: template.address.octets(),
            mtu: template.mtu,
            reach: match template.reach {
                Reach::Unknown => layout::REACH_UNKNOWN,
                Reach::NoNextHop => layout::REACH_NO_NEXT_HOP,
                Reach::Resolved => layout::REACH_RESOLVED,
            },
            egress: template.egress,
            ifindex: interfaces.get(usize::from(template.egress)).copied().unwrap_or_default(),
        }
    }
}

const EMPTY: Cell = Cell { key: 0, hash_key: [0; 2], mask: 0, table: 0, is_ipip: 0, zero: [0; 7] };

/// Puts cells where the program finds them. Returns the multiplier with which it does.
fn index(cells: &BTreeMap<u64, Cell>, places: &mut [Cell; CELLS]) -> u64 {
    // 2⁶⁴ over the golden ratio, and then other odd numbers, until no key lies too far off. Keys come from operators.
    let golden = 0x9e37_79b9_7f4a_7c15_u64;
    let mut multiplier = golden;
    'other: loop {
        places.fill(EMPTY);
        for (key, cell) in cells {
            let first = (key.wrapping_mul(multiplier) >> CELL_SHIFT) as usize;
            let mut near = (first..first + MAX_PROBES).map(|at| at % CELLS);
            let Some(at) = near.find(|at| places[*at].key == 0) else {
                multiplier = multiplier.wrapping_mul(golden) | 1;
                continue 'other;
            };
            places[at] = *cell;
        }
        return multiplier;
    }
}
