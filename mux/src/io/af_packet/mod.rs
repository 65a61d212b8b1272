//! Raw packet sockets: they work on every interface, and are slower than the others.
//!
//! One socket for each thread and interface. Packets are received into a ring that the kernel shares with us
//! ([`ring`]), encapsulated in place, and sent out of it: a burst is one call to the kernel, and nothing when there
//! is nothing to send. What is received while a burst is worked on waits in the ring. The choice of the ring's kind
//! and of the way out is measured: `docs/decisions/0014-packet-socket-rings.md`.
//!
//! Several threads share an interface's packets by fan-out: the kernel hashes each packet's flow, the same for every
//! packet of it, so that a flow stays in order on one thread whatever queues the device has.
//!
//! The kernel sees every packet too. What is not for a service is the kernel's alone; what is for one has an
//! address that the kernel does not own and, unless it forwards, drops.
//!
//! What a packet socket shows and a wire would not is undone in [`ring`]:
//! - A sender on the same host leaves checksums to a device that never computes them. Such packets are marked
//!   (`TP_STATUS_CSUMNOTREADY`), and their checksum is completed, or the backend would drop them.
//! - The kernel takes the outer VLAN tag off. It is put back.
//!
//! Receive offload merges TCP segments into packets above the link's MTU, which cannot be sent on: they are dropped
//! as too big, and a warning at the start says how to turn the merging off.
//!
//! Packets are sent past the interface's queueing discipline (`PACKET_QDISC_BYPASS`), so rules of the host for
//! outgoing packets (`tc`), and `tcpdump`, do not see them.

mod ring;

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use arrayvec::ArrayVec;
use daisy_node::interface::Interface;
use daisy_shared::checksum;
use daisy_shared::drop::DropReason;
use daisy_shared::wire::fast;
use tracing::warn;

use self::ring::{Burst, Geometry, Ring};
use super::sys::{self, Mapping};
use super::{IoError, PacketIo, Worker};
use crate::pipeline::{BURST, Slot, Verdict};

/// How much may be on its way out, in bytes.
const SEND_BUFFER: c_int = 16 << 20;
/// How long a burst may wait for room in a full device.
const SEND_WAIT: Duration = Duration::from_millis(10);
/// How many turns may pass before the kernel is asked what it dropped.
const STATISTICS_EVERY: u32 = 1024;
/// How the kernel shares packets out, and that packets which leave are none of them. Older kernels, such as 6.1, do
/// not know the latter, and ignore it; there [`TAKE`] refuses them.
const FANOUT: u32 = libc::PACKET_FANOUT_HASH | libc::PACKET_FANOUT_FLAG_IGNORE_OUTGOING;

/// Opens a socket for each of so many threads on every interface. The sockets of one thread are one [`AfPacket`].
///
/// # Errors
/// If the kernel refuses, for want of rights mostly.
pub fn open(interfaces: &[Interface], threads: usize) -> Result<Vec<AfPacket>, IoError> {
    let mut ports: Vec<AfPacket> = (0..threads).map(|_| AfPacket::default()).collect();
    for interface in interfaces {
        warn_of_host_settings(&interface.name);
        let mut group = None;
        for thread in &mut ports {
            let (socket, ring) = Socket::open(interface)?;
            if threads > 1 {
                group = Some(socket.join(group)?);
            }
            thread.polled.push(sys::poll_entry(&socket.fd, libc::POLLIN));
            thread.sockets.push(socket);
            thread.rings.push(ring);
        }
    }
    // Not before: a socket that is not in its group yet would get what another one gets, too.
    for socket in ports.iter().flat_map(|thread| &thread.sockets) {
        socket.filter(&TAKE).map_err(socket.error("letting packets in"))?;
    }
    Ok(ports)
}

/// The sockets of one thread: one on each interface.
#[derive(Debug, Default)]
pub struct AfPacket {
    sockets: Vec<Socket>,
    /// The receive ring of each socket.
    rings: Vec<Ring>,
    /// The sockets again, as `poll` wants them.
    polled: Vec<libc::pollfd>,
    missed: u64,
    turns: u32,
}

/// A raw packet socket on one interface.
#[derive(Debug)]
struct Socket {
    fd: OwnedFd,
    interface: String,
    index: u32,
}

/// Lets in what the pipeline can want: IPv4, bare or behind VLAN tags. Of these the kernel has taken off the
/// outermost when it asks.
static TAKE: [libc::sock_filter; 7] = [
    op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, (libc::SKF_AD_OFF + libc::SKF_AD_PKTTYPE) as u32),
    op(libc::BPF_JMP | libc::BPF_JEQ, 4, 0, libc::PACKET_OUTGOING as u32),
    op(libc::BPF_LD | libc::BPF_H | libc::BPF_ABS, 0, 0, 12),
    op(libc::BPF_JMP | libc::BPF_JEQ, 1, 0, fast::ETHERTYPE_IPV4 as u32),
    op(libc::BPF_JMP | libc::BPF_JEQ, 0, 1, fast::ETHERTYPE_VLAN as u32),
    op(libc::BPF_RET, 0, 0, u32::MAX),
    op(libc::BPF_RET, 0, 0, 0),
];
/// Lets nothing in.
static REFUSE: [libc::sock_filter; 1] = [op(libc::BPF_RET, 0, 0, 0)];

/// An instruction of classic BPF.
const fn op(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt, jf, k }
}

impl Socket {
    /// Opens a socket on an interface, with its ring. It lets nothing in yet.
    fn open(interface: &Interface) -> Result<(Socket, Ring), IoError> {
        let place = || format!("interface {}", interface.name);
        let geometry = Geometry::new(interface.mtu).ok_or_else(|| IoError::Unusable {
            place: place(),
            reason: format!("its MTU of {} is more than af-packet takes", interface.mtu),
        })?;
        // Protocol 0 takes nothing: packets come only after `bind`, when all options are set.
        let fd = sys::socket(libc::AF_PACKET, libc::SOCK_RAW, 0).map_err(|error| IoError::System {
            place: place(),
            what: "opening a packet socket (needs CAP_NET_RAW)",
            error,
        })?;
        let socket = Socket { fd, interface: interface.name.clone(), index: interface.index };
        let fd = &socket.fd;
        let on: c_int = 1;
        let version = libc::tpacket_versions::TPACKET_V2 as c_int;
        for (option, value, what) in [
            (libc::PACKET_IGNORE_OUTGOING, on, "PACKET_IGNORE_OUTGOING (needs Linux 4.20)"),
            (libc::PACKET_QDISC_BYPASS, on, "PACKET_QDISC_BYPASS"),
            (libc::PACKET_VERSION, version, "PACKET_VERSION"),
            (libc::PACKET_RESERVE, ring::RESERVE, "PACKET_RESERVE"),
        ] {
            sys::set_option(fd, libc::SOL_PACKET, option, &value).map_err(socket.error(what))?;
        }
        sys::set_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &SEND_BUFFER)
            .map_err(socket.error("setting the socket's buffer (needs CAP_NET_ADMIN)"))?;
        sys::set_option(fd, libc::SOL_PACKET, libc::PACKET_RX_RING, &geometry.request())
            .map_err(socket.error("a receive ring"))?;
        let memory =
            Mapping::shared(fd, geometry.len(), 0).map_err(socket.error("mapping the receive ring"))?;
        socket.filter(&REFUSE).map_err(socket.error("a filter"))?;
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            // All protocols, as the kernel tells IPv4 behind two tags from nothing else.
            sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
            sll_ifindex: interface.index as c_int,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        sys::bind(fd, &address).map_err(socket.error("binding a packet socket"))?;
        Ok((socket, Ring::new(memory, geometry)))
    }

    /// Joins a fan-out group, or founds one with a number that no other process has. Returns its number.
    fn join(&self, group: Option<u16>) -> Result<u16, IoError> {
        let what = FANOUT | if group.is_none() { libc::PACKET_FANOUT_FLAG_UNIQUEID } else { 0 };
        let argument = (what << 16 | u32::from(group.unwrap_or(0))).cast_signed();
        sys::set_option(&self.fd, libc::SOL_PACKET, libc::PACKET_FANOUT, &argument)
            .map_err(self.error("joining a fan-out group (needs Linux 4.12)"))?;
        let joined: c_int = sys::get_option(&self.fd, libc::SOL_PACKET, libc::PACKET_FANOUT)
            .map_err(self.error("asking for the fan-out group"))?;
        // The kind of fan-out is above its number.
        Ok(joined as u16)
    }

    fn filter(&self, program: &'static [libc::sock_filter]) -> io::Result<()> {
        sys::attach_filter(&self.fd, program)
    }

    fn error(&self, what: &'static str) -> impl FnOnce(io::Error) -> IoError {
        let place = format!("interface {}", self.interface);
        move |error| IoError::System { place, what, error }
    }

    /// Sends those slots of a burst that leave by this interface, of number `egress`. What the device does not take
    /// becomes a drop.
    fn send(&self, egress: u8, burst: &mut [Slot<'_>]) {
        let mut places: ArrayVec<u8, BURST> = ArrayVec::new();
        let mut vectors: ArrayVec<libc::iovec, BURST> = ArrayVec::new();
        for (i, slot) in burst.iter_mut().enumerate() {
            if matches!(slot.verdict, Verdict::Send { egress: by, .. } if by == egress) {
                let frame = slot.frame_mut();
                places.push(i as u8);
                vectors.push(libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: frame.len() });
            }
        }
        let mut messages: ArrayVec<libc::mmsghdr, BURST> = vectors.iter_mut().map(message).collect();
        let mut done = 0;
        let mut waited = false;
        while done < messages.len() {
            let rest = &mut messages[done..];
            // SAFETY: each message has one vector, which points into a frame that the burst borrows.
            let sent = unsafe {
                libc::sendmmsg(self.fd.as_raw_fd(), rest.as_mut_ptr(), rest.len() as u32, libc::MSG_DONTWAIT)
            };
            if sent > 0 {
                done += sent as usize;
                continue;
            }
            let error = io::Error::last_os_error();
            let reason = match error.raw_os_error() {
                Some(libc::EINTR) => continue,
                Some(libc::EAGAIN | libc::ENOBUFS) if !waited => {
                    waited = true;
                    // Full: whether it was worth the wait shows in the next attempt.
                    let _ready = sys::poll(&self.fd, libc::POLLOUT, SEND_WAIT);
                    continue;
                }
                Some(libc::EMSGSIZE) => DropReason::TooBig,
                _ => DropReason::TxFull,
            };
            burst[usize::from(places[done])].verdict = Verdict::Drop(reason);
            done += 1;
        }
    }

    /// An interface that is down may come up again. One that is gone does not, and the socket would wait for ever.
    fn check_interface(&self) -> Result<(), IoError> {
        // A socket whose interface went down has an error for whoever asks first, and `poll` would not wait.
        let error: c_int = sys::get_option(&self.fd, libc::SOL_SOCKET, libc::SO_ERROR)
            .map_err(self.error("asking for the socket's state"))?;
        if ![0, libc::ENETDOWN].contains(&error) {
            return Err(self.error("receiving")(io::Error::from_raw_os_error(error)));
        }
        // A socket whose interface is gone is bound to none.
        let bound: libc::sockaddr_ll =
            sys::local_address(&self.fd).map_err(self.error("asking for the socket's interface"))?;
        if bound.sll_ifindex.cast_unsigned() != self.index {
            let place = format!("interface {}", self.interface);
            return Err(IoError::Unusable { place, reason: "it is gone".to_owned() });
        }
        Ok(())
    }

    /// How many packets the kernel has dropped since it was last asked, because the ring was full.
    fn dropped(&self) -> Result<u32, IoError> {
        let statistics: libc::tpacket_stats =
            sys::get_option(&self.fd, libc::SOL_PACKET, libc::PACKET_STATISTICS)
                .map_err(self.error("PACKET_STATISTICS"))?;
        Ok(statistics.tp_drops)
    }
}

impl AfPacket {
    /// Takes a burst from each ring through `worker`. Returns how many packets there were.
    fn work(&mut self, worker: &mut Worker) -> Result<usize, IoError> {
        let mut taken = 0;
        for (ingress, ring) in self.rings.iter_mut().enumerate() {
            let Burst { mut slots, cut } = ring.burst().map_err(|reason| {
                let place = format!("interface {}", self.sockets[ingress].interface);
                IoError::Unusable { place, reason }
            })?;
            if slots.is_empty() {
                continue;
            }
            // Interfaces are numbered in a byte.
            worker.decide(ingress as u8, &mut slots);
            for cut in cut {
                let verdict = &mut slots[usize::from(cut)].verdict;
                // Its end is in no frame, and it would be in none on its way.
                if *verdict == Verdict::Drop(DropReason::Truncated) {
                    *verdict = Verdict::Drop(DropReason::TooBig);
                }
            }
            for (egress, socket) in self.sockets.iter().enumerate() {
                socket.send(egress as u8, &mut slots);
            }
            worker.settle(&slots);
            let count = slots.len();
            drop(slots);
            ring.release(count);
            taken += count;
        }
        Ok(taken)
    }

    /// Asks the kernel what it has dropped, and whether the interfaces are still there.
    fn look_around(&mut self, worker: &mut Worker) -> Result<(), IoError> {
        self.turns = 0;
        for socket in &self.sockets {
            self.missed += u64::from(socket.dropped()?);
            socket.check_interface()?;
        }
        worker.set_missed(self.missed);
        Ok(())
    }
}

impl PacketIo for AfPacket {
    fn turn(&mut self, worker: &mut Worker, wait: Duration) -> Result<usize, IoError> {
        let mut taken = self.work(worker)?;
        if taken == 0 && !wait.is_zero() {
            sys::poll_any(&mut self.polled, wait).map_err(self.sockets[0].error("waiting for packets"))?;
            taken = self.work(worker)?;
        }
        self.turns += 1;
        if taken == 0 || self.turns >= STATISTICS_EVERY {
            self.look_around(worker)?;
        }
        Ok(taken)
    }

    fn close(mut self, worker: &mut Worker) -> Result<(), IoError> {
        for socket in &self.sockets {
            socket.filter(&REFUSE).map_err(socket.error("letting nothing in any more"))?;
        }
        // What has been received already is still served.
        while self.work(worker)? > 0 {}
        for socket in &self.sockets {
            self.missed += u64::from(socket.dropped()?);
        }
        worker.set_missed(self.missed);
        Ok(())
    }
}

/// A message of one vector.
fn message(vector: &mut libc::iovec) -> libc::mmsghdr {
    // SAFETY: a `mmsghdr` of zeros is a value: no name, no vectors, no control data.
    let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
    message.msg_hdr.msg_iov = vector;
    message.msg_hdr.msg_iovlen = 1;
    message
}

/// Completes the TCP or UDP checksum of a packet that was left to a device: the field holds the sum of the
/// pseudo-header so far.
fn complete_checksum(frame: &mut [u8]) {
    let Ok(fast::Frame::Flow(packet)) = fast::parse(frame) else { return };
    let ip = &mut frame[usize::from(packet.link_len)..][..usize::from(packet.ip_len)];
    let header_len = usize::from(ip[0] & 0x0f) * 4;
    let transport = &mut ip[header_len..];
    let is_udp = packet.flow.protocol == 17;
    let field = if is_udp { 6..8 } else { 16..18 };
    let sum = match checksum::of(transport) {
        // Over UDP, 0 would say that there is no checksum (RFC 768).
        0 if is_udp => 0xffff,
        sum => sum,
    };
    transport[field].copy_from_slice(&sum.to_be_bytes());
}

/// Warns of settings of the host that make the mux useless or harmful.
fn warn_of_host_settings(interface: &str) {
    let path = format!("/proc/sys/net/ipv4/conf/{interface}/forwarding");
    if std::fs::read_to_string(&path).is_ok_and(|text| text.trim() == "1") {
        warn!(
            interface,
            "the kernel forwards packets that arrive here, so those for services reach their addresses twice or \
             loop; turn it off: sysctl -w net.ipv4.conf.{interface}.forwarding=0"
        );
    }
    if sys::receive_offload(interface).unwrap_or(false) {
        warn!(
            interface,
            "receive offload merges TCP segments into packets that do not fit once encapsulated, and that the mux \
             drops as too_big; turn it off: ethtool -K {interface} gro off"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{PacketBuilder, TransportHeader};

    #[test]
    fn a_checksum_left_to_the_device_is_completed() {
        for (tcp, payload) in [(true, &b"odd"[..]), (true, &[]), (false, b"even"), (false, b"odd")] {
            let builder = PacketBuilder::ethernet2([2; 6], [4; 6]).ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64);
            let mut whole = Vec::new();
            let field = if tcp {
                builder.tcp(1000, 80, 7, 100).write(&mut whole, payload).unwrap();
                14 + 20 + 16
            } else {
                builder.udp(1000, 80).write(&mut whole, payload).unwrap();
                14 + 20 + 6
            };
            whole.resize(whole.len().max(60), 0xee);
            // What Linux leaves in the field: the folded sum of the pseudo-header, not inverted.
            let transport_len = (whole[17] - 20).to_be_bytes();
            let pseudo = [&whole[26..34], &[0, whole[23], 0], &transport_len].concat();
            let mut partial = whole.clone();
            partial[field..field + 2].copy_from_slice(&(!checksum::of(&pseudo)).to_be_bytes());
            assert_ne!(partial, whole);
            complete_checksum(&mut partial);
            assert_eq!(partial, whole, "tcp {tcp}, {} bytes", payload.len());
            let headers = etherparse::PacketHeaders::from_ethernet_slice(&partial).unwrap();
            let Some(etherparse::NetHeaders::Ipv4(ip, _)) = headers.net else { panic!() };
            let expected = match headers.transport.unwrap() {
                TransportHeader::Tcp(tcp) => (tcp.checksum, tcp.calc_checksum_ipv4(&ip, payload).unwrap()),
                TransportHeader::Udp(udp) => (udp.checksum, udp.calc_checksum_ipv4(&ip, payload).unwrap()),
                _ => panic!(),
            };
            assert_eq!(expected.0, expected.1);
        }
    }
}
