//! AF_XDP: frames in memory that the kernel or the driver and the mux share, without the kernel's stack.
//!
//! A thread serves some receive queues, the same on every interface, with one socket on each ([`Port`]). All its
//! sockets share its frames ([`Umem`]), and threads share nothing. So a frame is received by one socket, encapsulated
//! where it lies (the room before it takes the outer headers), and sent by another, on whichever interface.
//!
//! The rings are those of `linux/if_xdp.h`, written on `libc` directly: there is no kept crate that shares one UMEM
//! between receiving and sending and between sockets, binds with need-wakeup, polls busily, and lets frames be
//! accounted for.

mod port;
mod ring;
mod umem;

use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use daisy_node::xdp::Attached;
use daisy_shared::drop::DropReason;
use tracing::{info, warn};

use self::port::{Options, Port};
use self::umem::{FRAME_LEN, MAX_IP_LEN, Place, Umem};
use super::filter::Filter;
use super::request::{Copy, Request};
use super::sys;
use super::{IoError, PacketIo, Worker};
use crate::pipeline::{BURST, Slot, Verdict};

/// How long the sockets of a thread that closes may take to send what they have.
const CLOSE_WAIT: Duration = Duration::from_secs(1);
/// How many turns may pass before the kernel is asked what it dropped.
const STATISTICS_EVERY: u32 = 1024;

/// Attaches the XDP program to every interface and opens sockets on these receive queues, for as many threads as
/// there are cores, or queues where no cores are named.
///
/// # Errors
/// If the kernel, the driver or an interface's settings do not allow it.
pub fn open(request: &Request, queues: &[u32]) -> Result<(Vec<Filter>, Vec<AfXdp>), IoError> {
    for interface in &request.interfaces {
        if interface.mtu as usize > MAX_IP_LEN {
            let place = format!("interface {}", interface.name);
            let reason = format!("its MTU of {} is above {MAX_IP_LEN}, the most for af-xdp", interface.mtu);
            return Err(IoError::Unusable { place, reason });
        }
    }
    // The programs first: drivers give zero-copy queues to interfaces that have one.
    let count = queues.iter().max().map_or(0, |last| last + 1);
    let attach = |interface| Filter::attach(interface, count, request.xdp_mode);
    let mut filters = request.interfaces.iter().map(attach).collect::<Result<Vec<_>, _>>()?;
    let threads = request.cores.as_ref().map_or(queues.len(), |cores| cores.numbers().len());
    let mut opened = Vec::new();
    for thread in 0..threads {
        let mine: Vec<u32> = queues.iter().copied().skip(thread).step_by(threads).collect();
        opened.push(AfXdp::open(request, &mine, &filters)?);
    }
    // Packets come from now on: nothing is sent before all can be.
    for thread in &opened {
        for (port, at) in thread.ports.iter().zip(&thread.at) {
            filters[usize::from(at.interface)].set_socket(at.queue, port.fd())?;
        }
    }
    Ok((filters, opened))
}

/// Where a socket is.
#[derive(Clone, Copy, Debug)]
struct At {
    interface: u8,
    queue: u32,
}

/// The AF_XDP sockets of one thread.
#[derive(Debug)]
pub struct AfXdp {
    /// Queue by queue, and in each by interface: what comes in by one leaves by the others of the same queue.
    ports: Vec<Port>,
    at: Vec<At>,
    interfaces: usize,
    busy_poll: Option<Duration>,
    turns: u32,
    // After the sockets: the kernel uses it until they are closed.
    umem: Umem,
}

impl AfXdp {
    fn open(request: &Request, queues: &[u32], filters: &[Filter]) -> Result<AfXdp, IoError> {
        // Where frames come from the stack they are copied, whatever the driver could do.
        let generic =
            filters.iter().zip(&request.interfaces).find(|(f, _)| f.attached() == Attached::Generic);
        let copy = match (request.copy, generic) {
            (Copy::Zero, Some((_, interface))) => {
                return Err(IoError::Unusable {
                    place: format!("interface {}", interface.name),
                    reason: "--copy zero needs the XDP program in the driver, and it is in the generic path"
                        .to_owned(),
                });
            }
            (_, Some(_)) => Copy::Copy,
            (copy, None) => copy,
        };
        match AfXdp::with(request, queues, copy) {
            // All sockets of one memory copy, or none does, and the first may have found a better driver than the
            // others have.
            Err(error) if copy == Copy::Auto && request.interfaces.len() > 1 => {
                warn!(%error, "trying again with frames copied on every interface");
                AfXdp::with(request, queues, Copy::Copy)
            }
            other => other,
        }
    }

    fn with(request: &Request, queues: &[u32], copy: Copy) -> Result<AfXdp, IoError> {
        let interfaces = request.interfaces.len();
        let mut umem = Umem::new(queues.len() * interfaces).map_err(|error| IoError::System {
            place: "af-xdp".to_owned(),
            what: "memory for frames",
            error,
        })?;
        let options = Options { copy, busy_poll: request.busy_poll };
        let mut ports: Vec<Port> = Vec::new();
        let mut at = Vec::new();
        for &queue in queues {
            for (number, interface) in request.interfaces.iter().enumerate() {
                let first = ports.first();
                let port = Port::open(interface, queue, ports.len() as u16, &mut umem, first, options)?;
                ports.push(port);
                at.push(At { interface: number as u8, queue });
            }
        }
        Ok(AfXdp { ports, at, interfaces, busy_poll: request.busy_poll, turns: 0, umem })
    }

    /// Takes one burst from one socket through `worker`.
    fn serve(&mut self, number: usize, worker: &mut Worker) -> Result<usize, IoError> {
        let umem = &mut self.umem;
        let port = &mut self.ports[number];
        port.reclaim(umem)?;
        port.refill(umem);
        port.wake_receiver();
        let packets = port.take(umem)?;
        if packets.is_empty() {
            return Ok(0);
        }
        let mut burst: ArrayVec<Slot<'_>, BURST> = ArrayVec::new();
        for packet in &packets {
            let frame = umem::frame_at(packet.addr);
            let start = umem.memory().part(frame as usize * FRAME_LEN, FRAME_LEN);
            // SAFETY: within the mapping, which outlives `burst`; frames do not overlap, and this one is in
            // `Place::Burst`: the kernel has handed it over, and gave no other packet of this burst in it.
            let buffer = unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), FRAME_LEN) };
            let offset = (packet.addr % FRAME_LEN as u64) as usize;
            burst.push(Slot::new(buffer, offset, packet.len as usize));
        }
        worker.decide(self.at[number].interface, &mut burst);

        // The sockets of the same queue on all interfaces.
        let siblings = number - number % self.interfaces..;
        let siblings = &mut self.ports[siblings][..self.interfaces];
        for (slot, packet) in burst.iter_mut().zip(&packets) {
            let frame = umem::frame_at(packet.addr);
            match slot.verdict {
                Verdict::Send { egress, .. } => {
                    let addr = umem::address_of(frame) + slot.start() as u64;
                    let packet = libc::xdp_desc { addr, len: slot.frame().len() as u32, options: 0 };
                    if siblings[usize::from(egress)].push(umem, packet)? {
                        continue;
                    }
                    slot.verdict = Verdict::Drop(DropReason::TxFull);
                }
                // The program took it for a service that is gone since, and there is no way back to the kernel.
                Verdict::Pass => slot.verdict = Verdict::Drop(DropReason::UnknownService),
                Verdict::Drop(_) | Verdict::Undecided => {}
            }
            let free = umem.move_to(frame, Place::Burst, Place::Free);
            free.map_err(|reason| leak(siblings[0].place(), umem, reason))?;
        }
        worker.settle(&burst);
        let taken = burst.len();
        for port in siblings {
            port.kick(umem)?;
        }
        Ok(taken)
    }

    /// Takes one burst from each socket.
    fn serve_all(&mut self, worker: &mut Worker) -> Result<usize, IoError> {
        (0..self.ports.len()).try_fold(0, |sum, number| Ok(sum + self.serve(number, worker)?))
    }

    /// Has the kernel send what it has not sent yet.
    fn kick_all(&mut self) -> Result<(), IoError> {
        self.ports.iter_mut().try_for_each(|port| port.kick(&mut self.umem))
    }

    /// Waits until a socket is ready for `events`.
    fn wait(&mut self, events: libc::c_short, wait: Duration) -> Result<(), IoError> {
        let mut entries: Vec<_> = self.ports.iter().map(|port| sys::poll_entry(port.fd(), events)).collect();
        sys::poll_any(&mut entries, wait).map_err(self.ports[0].error("waiting for packets"))
    }

    fn ask_missed(&self, worker: &mut Worker) -> Result<(), IoError> {
        let missed = self.ports.iter().try_fold(0, |sum, port| Ok(sum + port.missed()?))?;
        worker.set_missed(missed);
        Ok(())
    }

    /// Whether every frame is where it must be, once nothing is received any more.
    fn check_frames(&mut self) -> Result<(), IoError> {
        for port in &mut self.ports {
            port.check_refused(&self.umem)?;
            port.check_filled(&self.umem)?;
        }
        if !self.umem.are_all_there() {
            let place = self.ports[0].place();
            return Err(leak(place, &self.umem, "frames are missing".to_owned()));
        }
        let [frames, free, fill, send] = self.umem.totals();
        info!(place = self.ports[0].place(), frames, free, fill, send, "every frame is accounted for");
        Ok(())
    }
}

fn leak(place: &str, umem: &Umem, reason: String) -> IoError {
    IoError::Leak { place: place.to_owned(), reason, accounts: umem.accounts() }
}

impl PacketIo for AfXdp {
    fn turn(&mut self, worker: &mut Worker, wait: Duration) -> Result<usize, IoError> {
        let mut taken = self.serve_all(worker)?;
        if taken == 0 && !wait.is_zero() {
            self.kick_all()?;
            if let Some(time) = self.busy_poll {
                let begun = Instant::now();
                while taken == 0 && begun.elapsed() < time {
                    taken = self.serve_all(worker)?;
                }
            }
            if taken == 0 {
                self.wait(libc::POLLIN, wait)?;
                taken = self.serve_all(worker)?;
            }
        }
        self.turns += 1;
        if taken == 0 || self.turns >= STATISTICS_EVERY {
            self.turns = 0;
            self.ask_missed(worker)?;
            self.ports.iter().try_for_each(Port::check_interface)?;
        }
        Ok(taken)
    }

    fn close(mut self, worker: &mut Worker) -> Result<(), IoError> {
        // What has been received is still served.
        while self.turn(worker, Duration::ZERO)? > 0 {}
        let deadline = Instant::now() + CLOSE_WAIT;
        while self.umem.totals()[3] > 0 && Instant::now() < deadline {
            self.kick_all()?;
            self.ports.iter_mut().try_for_each(|port| port.reclaim(&mut self.umem))?;
            if self.umem.totals()[3] > 0 {
                // Returns at once while a ring has room: it is the call that makes a driver send and complete.
                self.wait(libc::POLLOUT, Duration::from_millis(1))?;
                std::thread::yield_now();
            }
        }
        self.ask_missed(worker)?;
        self.check_frames()
    }
}

#[cfg(test)]
mod tests;
