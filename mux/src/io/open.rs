//! Choosing how packets are moved, and opening it on all of the mux's interfaces.
//!
//! A new way of moving packets is one variant of [`Kind`], one line in each table here ([`Kind::uses`], [`Kind::why`],
//! [`AUTO`]), and one arm of [`open_kind`].

use daisy_node::interface::Interface;
use daisy_node::xdp::Mode;
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;
use tracing::info;

use super::filter::Filter;
use super::netmap;
use super::request::{Copy, Kind, List, Request};
use super::threads::Job;
use super::xdp::{Watch, XdpPlane};
use super::{IoError, sys};
use super::{af_packet, af_xdp};

/// What `auto` tries, best first. A name of netmap's own leaves no choice.
const AUTO: [Kind; 3] = [Kind::Xdp, Kind::AfXdp, Kind::AfPacket];

/// A flag that not every kind has a use for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flag {
    Cores,
    Queues,
    BusyPoll,
    Copy,
    XdpMode,
}

impl Kind {
    /// Whether a flag means anything to this kind.
    fn uses(self, flag: Flag) -> bool {
        match self {
            Kind::Auto => true,
            Kind::Xdp => flag == Flag::XdpMode,
            Kind::AfXdp => true,
            Kind::AfPacket => flag == Flag::Cores,
            Kind::Netmap => matches!(flag, Flag::Cores | Flag::Queues),
        }
    }

    /// Why `auto` takes it where it can.
    fn why(self) -> &'static str {
        match self {
            Kind::Auto => "it was not asked for more",
            Kind::Xdp => "packets are forwarded in the driver, and none comes to userspace",
            Kind::AfXdp => "packets come from the driver past the kernel's stack",
            Kind::AfPacket => "it works on every interface",
            Kind::Netmap => "the names of its ports are netmap's",
        }
    }
}

/// Packet I/O, open.
pub struct Opened {
    /// How packets are moved.
    pub kind: Kind,
    /// What I/O threads do.
    pub jobs: Vec<Job>,
    /// The XDP programs in front of AF_XDP sockets, one on each interface.
    pub filters: Vec<Filter>,
    /// The XDP program that is the whole mux, if it is that.
    pub plane: Option<XdpPlane>,
}

/// Opens packet I/O on all interfaces.
///
/// # Errors
/// If what is asked for contradicts itself, or cannot be had here.
pub fn open(request: &Request) -> Result<Opened, IoError> {
    check_interfaces(&request.interfaces)?;
    if let Some(cores) = &request.cores {
        check_cores(cores)?;
    }
    if request.kind != Kind::Auto {
        return open_kind(request.kind, request);
    }
    if !request.ports.is_empty() {
        info!(io = %Kind::Netmap, why = Kind::Netmap.why(), "packet I/O chosen");
        return open_kind(Kind::Netmap, request);
    }
    let mut last = None;
    for kind in AUTO {
        match open_kind(kind, request) {
            Ok(opened) => {
                info!(io = %kind, why = kind.why(), "packet I/O chosen");
                return Ok(opened);
            }
            Err(error) => {
                info!(io = %kind, reason = %error, "packet I/O not chosen");
                last = Some(error);
            }
        }
    }
    let reason = last.map_or_else(String::new, |error| error.to_string());
    Err(unusable("--io auto", format!("nothing works here; the last that was tried: {reason}")))
}

/// Opens one kind of packet I/O, which is not `auto`.
fn open_kind(kind: Kind, request: &Request) -> Result<Opened, IoError> {
    check_flags(kind, request)?;
    let (jobs, filters, plane) = match kind {
        Kind::Auto => return Err(unusable("--io auto", "is no kind of its own".to_owned())),
        Kind::Xdp => {
            let indices: Vec<u32> = request.interfaces.iter().map(|interface| interface.index).collect();
            let mut plane = XdpPlane::load(&indices)?;
            // Where the driver takes no program, `auto` has better.
            let is_auto = request.kind == Kind::Auto && request.xdp_mode == Mode::Auto;
            plane.attach(&request.interfaces, if is_auto { Mode::Native } else { request.xdp_mode })?;
            (vec![Job::new(Watch::new(&request.interfaces), None)], Vec::new(), Some(plane))
        }
        Kind::AfXdp => {
            let (filters, threads) = af_xdp::open(request, &queues(request)?)?;
            (jobs(threads, request), filters, None)
        }
        Kind::AfPacket => {
            let threads = request.cores.as_ref().map_or(1, |cores| cores.numbers().len());
            (jobs(af_packet::open(&request.interfaces, threads)?, request), Vec::new(), None)
        }
        Kind::Netmap => {
            let threads = request.cores.as_ref().map(|cores| cores.numbers().len());
            let queues = request.queues.as_ref().map(List::numbers);
            (jobs(netmap::open(&request.ports, threads, queues)?, request), Vec::new(), None)
        }
    };
    Ok(Opened { kind, jobs, filters, plane })
}

/// One job for each thread, on the cores that were asked for.
fn jobs(threads: Vec<impl super::PacketIo + Send + 'static>, request: &Request) -> Vec<Job> {
    let mut cores = request.cores.iter().flat_map(|cores| cores.numbers().iter().copied());
    threads.into_iter().map(|io| Job::new(io, cores.next())).collect()
}

/// The receive queues that are served, the same on each interface.
fn queues(request: &Request) -> Result<Vec<u32>, IoError> {
    let mut first: Option<(&str, u32)> = None;
    for Interface { name, .. } in &request.interfaces {
        let place = || format!("interface {name}");
        let count = sys::receive_queues(name).map_err(|error| IoError::System {
            place: place(),
            what: "asking for its receive queues",
            error,
        })?;
        if let Some(beyond) = request.queues.iter().flat_map(List::numbers).find(|queue| **queue >= count) {
            let reason = format!("--queues names queue {beyond}, and it has {count}, from 0 on");
            return Err(unusable(&place(), reason));
        }
        match first {
            None => first = Some((name, count)),
            Some((other, others)) if request.queues.is_none() && others != count => {
                let reason = format!(
                    "has {count} receive queues, and interface {other} has {others}; say with --queues which are \
                     served on each, or make them equal (ethtool -L)"
                );
                return Err(unusable(&place(), reason));
            }
            Some(_) => {}
        }
    }
    let count = first.map_or(0, |(_, count)| count);
    let queues = request.queues.as_ref().map_or_else(|| (0..count).collect(), |list| list.numbers().to_vec());
    if let Some(cores) = request.cores.as_ref().filter(|cores| cores.numbers().len() > queues.len()) {
        let (cores, queues) = (cores.numbers().len(), queues.len());
        let reason = format!("{cores} cores are more than the {queues} receive queues that are served");
        return Err(unusable("--cores", reason));
    }
    Ok(queues)
}

fn check_interfaces(interfaces: &[Interface]) -> Result<(), IoError> {
    for (i, Interface { name, index, .. }) in interfaces.iter().enumerate() {
        // What no kernel interface stands behind has number 0.
        let is_other = |other: &Interface| other.index != *index || (*index == 0 && other.name != *name);
        if !interfaces[..i].iter().all(is_other) {
            return Err(unusable(&format!("interface {name}"), "is given twice".to_owned()));
        }
    }
    if interfaces.len() > usize::from(u8::MAX) {
        return Err(unusable("--interface", format!("{} interfaces are too many", interfaces.len())));
    }
    Ok(())
}

/// Whether threads may run on these processors.
fn check_cores(cores: &List) -> Result<(), IoError> {
    let system = |error: nix::Error| IoError::System {
        place: "--cores".to_owned(),
        what: "asking for the processors of this process",
        error: error.into(),
    };
    let allowed = sched_getaffinity(Pid::from_raw(0)).map_err(system)?;
    let may = |core: u32| allowed.is_set(core as usize).unwrap_or(false);
    let Some(core) = cores.numbers().iter().copied().find(|core| !may(*core)) else { return Ok(()) };
    let usable: Vec<_> =
        (0..CpuSet::count() as u32).filter(|core| may(*core)).map(|c| c.to_string()).collect();
    let exists = std::path::Path::new(&format!("/sys/devices/system/cpu/cpu{core}")).exists();
    let problem = if exists { "is not allowed for this process" } else { "does not exist" };
    Err(unusable("--cores", format!("core {core} {problem}; there are {}", usable.join(","))))
}

/// Whether the kind has a use for every flag that was given.
fn check_flags(kind: Kind, request: &Request) -> Result<(), IoError> {
    let given = [
        (Flag::Cores, "--cores", request.cores.is_some()),
        (Flag::Queues, "--queues", request.queues.is_some()),
        (Flag::BusyPoll, "--busy-poll", request.busy_poll.is_some()),
        (Flag::Copy, "--copy", request.copy != Copy::Auto),
        (Flag::XdpMode, "--xdp-mode", request.xdp_mode != Mode::Auto),
    ];
    match given.into_iter().find(|(flag, _, is_given)| *is_given && !kind.uses(*flag)) {
        Some((Flag::Cores | Flag::Queues, name, _)) if kind == Kind::Xdp => {
            let reason =
                "means nothing to --io xdp: packets are forwarded where the interface's interrupts are";
            Err(unusable(name, reason.to_owned()))
        }
        Some((_, name, _)) => Err(unusable(name, format!("means nothing to --io {kind}"))),
        None => Ok(()),
    }
}

fn unusable(place: &str, reason: String) -> IoError {
    IoError::Unusable { place: place.to_owned(), reason }
}
