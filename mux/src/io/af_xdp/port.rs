//! One AF_XDP socket, on one receive queue of one interface.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use daisy_node::interface::Interface;
use tracing::{info, warn};

use super::super::request::Copy;
use super::super::{FRAME_START, IoError, sys};
use super::ring::{Consumer, Producer, RING_LEN, Ring};
use super::umem::{self, FRAME_LEN, Place, Umem};
use crate::pipeline::BURST;

/// `XDP_MAX_TX_SKB_BUDGET`: how many frames a wake-up sends in copy mode. Older kernels send 32.
const XDP_MAX_TX_SKB_BUDGET: libc::c_int = 9;
/// How much the kernel may keep for us on its way out, in bytes.
const SEND_BUFFER: libc::c_int = 16 << 20;
/// How long to try to bind: the queue of a mux that died is free a moment later.
const BIND_WAIT: Duration = Duration::from_secs(2);
/// How many packets the kernel takes from a device each time that it polls it for us: a burst.
const BUSY_POLL_BUDGET: libc::c_int = BURST as libc::c_int;

/// How a socket is opened.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Whether frames may or must be copied.
    pub copy: Copy,
    /// How long the kernel polls the device for packets.
    pub busy_poll: Option<Duration>,
}

/// A socket, and its rings.
#[derive(Debug)]
pub struct Port {
    place: String,
    /// Its number within the thread.
    number: u16,
    busy: bool,
    fill: Producer<u64>,
    completion: Consumer<u64>,
    receive: Consumer<libc::xdp_desc>,
    send: Producer<libc::xdp_desc>,
    fd: OwnedFd,
}

impl Port {
    /// Opens a socket for frames of `umem`: the thread's first, or (`first`) one beside it.
    pub fn open(
        interface: &Interface,
        queue: u32,
        number: u16,
        umem: &mut Umem,
        first: Option<&Port>,
        options: Options,
    ) -> Result<Port, IoError> {
        let place = format!("interface {} queue {queue}", interface.name);
        let failed = |what| {
            let place = place.clone();
            move |error| IoError::System { place, what, error }
        };
        let fd = sys::socket(libc::AF_XDP, libc::SOCK_RAW, 0)
            .map_err(failed("opening an AF_XDP socket (needs CAP_NET_RAW and a kernel with XDP_SOCKETS)"))?;
        if first.is_none() {
            let region = libc::xdp_umem_reg {
                addr: umem.memory().start().addr().get() as u64,
                len: umem.memory().len() as u64,
                chunk_size: FRAME_LEN as u32,
                headroom: FRAME_START as u32,
                flags: 0,
                tx_metadata_len: 0,
            };
            sys::set_option(&fd, libc::SOL_XDP, libc::XDP_UMEM_REG, &region)
                .map_err(failed("registering memory for frames"))?;
        }
        // Sockets on other queues and interfaces share the memory, but each has all four rings.
        let len = RING_LEN as libc::c_int;
        for (ring, what) in [
            (libc::XDP_UMEM_FILL_RING, "the fill ring"),
            (libc::XDP_UMEM_COMPLETION_RING, "the completion ring"),
            (libc::XDP_RX_RING, "the receive ring"),
            (libc::XDP_TX_RING, "the send ring"),
        ] {
            sys::set_option(&fd, libc::SOL_XDP, ring, &len).map_err(failed(what))?;
        }
        // Kernels before 6.18 do not know it, and sending takes more calls there.
        let _unknown = sys::set_option(&fd, libc::SOL_XDP, XDP_MAX_TX_SKB_BUDGET, &len);
        sys::set_option(&fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &SEND_BUFFER)
            .map_err(failed("setting the socket's buffer (needs CAP_NET_ADMIN)"))?;
        if let Some(time) = options.busy_poll {
            busy_poll(&fd, time).map_err(|error| IoError::Unusable {
                place: place.clone(),
                reason: format!("the kernel refuses --busy-poll (needs Linux 5.11, CAP_NET_ADMIN): {error}"),
            })?;
        }
        let offsets: libc::xdp_mmap_offsets =
            sys::get_option(&fd, libc::SOL_XDP, libc::XDP_MMAP_OFFSETS).map_err(failed("ring offsets"))?;
        let fill_page = libc::XDP_UMEM_PGOFF_FILL_RING as libc::off_t;
        let completion_page = libc::XDP_UMEM_PGOFF_COMPLETION_RING as libc::off_t;
        let mut port = Port {
            number,
            busy: options.busy_poll.is_some(),
            fill: Producer::new(Ring::map(&fd, &offsets.fr, fill_page).map_err(failed("the fill ring"))?),
            completion: Consumer::new(
                Ring::map(&fd, &offsets.cr, completion_page).map_err(failed("the completion ring"))?,
            ),
            receive: Consumer::new(
                Ring::map(&fd, &offsets.rx, libc::XDP_PGOFF_RX_RING).map_err(failed("the receive ring"))?,
            ),
            send: Producer::new(
                Ring::map(&fd, &offsets.tx, libc::XDP_PGOFF_TX_RING).map_err(failed("the send ring"))?,
            ),
            place,
            fd,
        };
        // Before anything can arrive.
        port.refill(umem);
        port.bind(interface.index, queue, first, options.copy)?;
        Ok(port)
    }

    /// Binds to the queue: zero-copy where the driver grants it, and the thread's first socket has it.
    fn bind(&self, interface: u32, queue: u32, first: Option<&Port>, copy: Copy) -> Result<(), IoError> {
        let (flags, shared_with) = match (first, copy) {
            // The kernel takes copying and need-wakeup from the first, and no other flag beside this.
            (Some(first), _) => (libc::XDP_SHARED_UMEM, first.fd.as_raw_fd().cast_unsigned()),
            (None, Copy::Auto) => (libc::XDP_USE_NEED_WAKEUP, 0),
            (None, Copy::Zero) => (libc::XDP_USE_NEED_WAKEUP | libc::XDP_ZEROCOPY, 0),
            (None, Copy::Copy) => (libc::XDP_USE_NEED_WAKEUP | libc::XDP_COPY, 0),
        };
        let address = libc::sockaddr_xdp {
            sxdp_family: libc::AF_XDP as u16,
            sxdp_flags: flags,
            sxdp_ifindex: interface,
            sxdp_queue_id: queue,
            sxdp_shared_umem_fd: shared_with,
        };
        let begun = Instant::now();
        loop {
            match sys::bind(&self.fd, &address) {
                Ok(()) => break,
                // Nothing tells when the kernel has let go of a dead process's queue.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) && begun.elapsed() < BIND_WAIT => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    let reason = "the driver has no zero-copy, which was asked for".to_owned();
                    return Err(IoError::Unusable { place: self.place.clone(), reason });
                }
                Err(error) => return Err(self.error("binding to the queue")(error)),
            }
        }
        info!(place = self.place, zero_copy = self.is_zero_copy()?, "AF_XDP socket bound");
        Ok(())
    }

    /// Whether the driver works on our frames without copying them.
    pub fn is_zero_copy(&self) -> Result<bool, IoError> {
        let options: libc::xdp_options =
            sys::get_option(&self.fd, libc::SOL_XDP, libc::XDP_OPTIONS).map_err(self.error("XDP_OPTIONS"))?;
        Ok(options.flags & libc::XDP_OPTIONS_ZEROCOPY != 0)
    }

    /// A port whose rings are in memory, where a test plays the kernel at the other ends of them.
    #[cfg(test)]
    pub fn in_memory(
        number: u16,
        rings: (Ring<u64>, Ring<u64>, Ring<libc::xdp_desc>, Ring<libc::xdp_desc>),
    ) -> Port {
        Port {
            place: format!("port {number}"),
            number,
            busy: false,
            fill: Producer::new(rings.0),
            completion: Consumer::new(rings.1),
            receive: Consumer::new(rings.2),
            send: Producer::new(rings.3),
            fd: sys::socket(libc::AF_UNIX, libc::SOCK_DGRAM, 0).unwrap(),
        }
    }

    /// The socket.
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// What errors name.
    pub fn place(&self) -> &str {
        &self.place
    }

    pub fn error(&self, what: &'static str) -> impl FnOnce(io::Error) -> IoError {
        let place = self.place.clone();
        move |error| IoError::System { place, what, error }
    }

    fn leak(&self, umem: &Umem, reason: String) -> IoError {
        IoError::Leak { place: self.place.clone(), reason, accounts: umem.accounts() }
    }

    /// Gives unused frames to the kernel, to receive into.
    pub fn refill(&mut self, umem: &mut Umem) {
        let mut any = false;
        while umem.held(self.number).fill < RING_LEN && self.fill.has_room() {
            let Some(frame) = umem.take(Place::Fill(self.number)) else { break };
            any |= self.fill.push(umem::address_of(frame));
        }
        if any {
            self.fill.submit();
        }
    }

    /// Takes back frames that have been sent.
    pub fn reclaim(&mut self, umem: &mut Umem) -> Result<(), IoError> {
        let mut any = false;
        while let Some(address) = self.completion.pop() {
            any = true;
            umem.move_to(umem::frame_at(address), Place::Send(self.number), Place::Free)
                .map_err(|reason| self.leak(umem, reason))?;
        }
        if any {
            self.completion.release();
        }
        Ok(())
    }

    /// Takes received frames, at most a burst.
    pub fn take(&mut self, umem: &mut Umem) -> Result<ArrayVec<libc::xdp_desc, BURST>, IoError> {
        let mut taken = ArrayVec::new();
        while !taken.is_full()
            && let Some(packet) = self.receive.pop()
        {
            umem.move_to(umem::frame_at(packet.addr), Place::Fill(self.number), Place::Burst)
                .map_err(|reason| self.leak(umem, reason))?;
            taken.push(packet);
        }
        if !taken.is_empty() {
            self.receive.release();
        }
        Ok(taken)
    }

    /// Puts a frame of the burst at hand into the send ring, if it has room. The kernel sees it after
    /// [`Port::kick`].
    ///
    /// No more than a ring's length may be on its way out, in the ring or in the device: a device that is stuck must
    /// not keep the frames that others receive into.
    pub fn push(&mut self, umem: &mut Umem, packet: libc::xdp_desc) -> Result<bool, IoError> {
        if umem.held(self.number).send >= RING_LEN {
            self.reclaim(umem)?;
            if umem.held(self.number).send >= RING_LEN {
                return Ok(false);
            }
        }
        if !self.send.push(packet) {
            return Ok(false);
        }
        umem.move_to(umem::frame_at(packet.addr), Place::Burst, Place::Send(self.number))
            .map_err(|reason| self.leak(umem, reason))?;
        Ok(true)
    }

    /// Has the kernel send what is in the ring, where it waits to be told.
    pub fn kick(&mut self, umem: &mut Umem) -> Result<(), IoError> {
        self.send.submit();
        let mut waiting = self.send.waiting();
        let mut stuck = 0;
        // With busy polling the kernel works only when it is called, whatever the flag says.
        while waiting > 0 && stuck < 2 && (self.busy || self.send.needs_wakeup()) {
            // SAFETY: an empty message without an address.
            let result = unsafe {
                libc::sendto(
                    self.fd.as_raw_fd(),
                    std::ptr::null(),
                    0,
                    libc::MSG_DONTWAIT,
                    std::ptr::null(),
                    0,
                )
            };
            if result < 0 {
                let error = io::Error::last_os_error();
                match error.raw_os_error() {
                    // Its share for one call is done, the device or a buffer is full, or the link is down: what
                    // is left stays in the ring.
                    Some(libc::EAGAIN | libc::EBUSY | libc::ENOBUFS | libc::EINTR | libc::ENETDOWN) => {}
                    Some(libc::ENXIO) => return Err(self.gone()),
                    _ => return Err(self.error("sending")(error)),
                }
            }
            self.reclaim(umem)?;
            let before = std::mem::replace(&mut waiting, self.send.waiting());
            stuck = if waiting < before { 0 } else { stuck + 1 };
        }
        Ok(())
    }

    /// Wakes a driver that waits to be told of frames to receive into, or polls a device that is polled.
    pub fn wake_receiver(&self) {
        if self.busy || self.fill.needs_wakeup() {
            // SAFETY: receives nothing, into nothing.
            let _nothing = unsafe {
                libc::recvfrom(
                    self.fd.as_raw_fd(),
                    std::ptr::null_mut(),
                    0,
                    libc::MSG_DONTWAIT,
                    std::ptr::null_mut(),
                    std::ptr::null_mut(),
                )
            };
        }
    }

    fn statistics(&self) -> Result<libc::xdp_statistics, IoError> {
        sys::get_option(&self.fd, libc::SOL_XDP, libc::XDP_STATISTICS).map_err(self.error("XDP_STATISTICS"))
    }

    /// How many packets the kernel has dropped for want of frames or of room.
    pub fn missed(&self) -> Result<u64, IoError> {
        let statistics = self.statistics()?;
        Ok(statistics.rx_dropped + statistics.rx_ring_full)
    }

    /// A socket whose interface has been removed would wait for ever: `poll` does not say so, but this does.
    pub fn check_interface(&self) -> Result<(), IoError> {
        let error: libc::c_int = sys::get_option(&self.fd, libc::SOL_SOCKET, libc::SO_ERROR)
            .map_err(self.error("asking for the socket's state"))?;
        if error == libc::ENETDOWN { Err(self.gone()) } else { Ok(()) }
    }

    fn gone(&self) -> IoError {
        IoError::Unusable { place: self.place.clone(), reason: "the interface is gone".to_owned() }
    }

    /// Whether the kernel has taken every entry for what it was.
    ///
    /// # Errors
    /// If it has refused some: their frames are lost.
    pub fn check_refused(&self, umem: &Umem) -> Result<(), IoError> {
        let statistics = self.statistics()?;
        if statistics.tx_invalid_descs == 0 && statistics.rx_invalid_descs == 0 {
            return Ok(());
        }
        Err(self.leak(
            umem,
            format!(
                "the kernel refused {} entries to send and {} to fill",
                statistics.tx_invalid_descs, statistics.rx_invalid_descs
            ),
        ))
    }

    /// Whether all that the kernel has for us fits its rings' positions.
    pub fn check_filled(&mut self, umem: &Umem) -> Result<(), IoError> {
        let (waiting, held) = (self.fill.waiting(), umem.held(self.number));
        if waiting > held.fill {
            let reason = format!("{waiting} frames wait in a ring that {} were put into", held.fill);
            return Err(self.leak(umem, reason));
        }
        if held.send > 0 {
            // Not a leak: the driver has them, and gives them up with the socket.
            warn!(place = self.place, frames = held.send, "the device has not sent these in time");
        }
        Ok(())
    }
}

/// Has the kernel poll the device for packets when we ask, and leave its interrupts off as long as we do.
fn busy_poll(fd: &OwnedFd, time: Duration) -> io::Result<()> {
    let microseconds: libc::c_int = time.as_micros().try_into().unwrap_or(libc::c_int::MAX);
    sys::set_option(fd, libc::SOL_SOCKET, libc::SO_PREFER_BUSY_POLL, &1)?;
    sys::set_option(fd, libc::SOL_SOCKET, libc::SO_BUSY_POLL, &microseconds)?;
    sys::set_option(fd, libc::SOL_SOCKET, libc::SO_BUSY_POLL_BUDGET, &BUSY_POLL_BUDGET)
}
