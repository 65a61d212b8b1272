//! A raw packet socket: works on every interface, and is slower than the others.
//!
//! The kernel sees every packet too. What is not for a service is the kernel's alone; what is for one has an
//! address that the kernel does not own and, unless it forwards, drops.
//!
//! A thread has a socket on each interface. Where there are several threads, the kernel spreads packets over their
//! sockets by flow (`PACKET_FANOUT_HASH`).
//!
//! Three things that a packet socket shows and a wire would not:
//! - A sender on the same host leaves checksums to a device that never computes them. Such packets are marked
//!   (`TP_STATUS_CSUMNOTREADY`), and their checksum is completed here, or the backend would drop them.
//! - The kernel has taken the outermost VLAN tag off, and says so beside the packet: it is put back.
//! - Receive offload merges TCP segments into packets above the link's MTU, which cannot be sent on: they are
//!   dropped as too big, and a warning at the start says how to turn the merging off.

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

use super::sys::{self, Mapping};
use super::{FRAME_START, IoError, PacketIo, Worker};
use crate::pipeline::{self, BURST, Slot, Verdict};

/// Room for the longest packet that receive offload makes, in whole cache lines, and not a power of two, so that
/// the frames of a burst do not compete for the same cache sets.
const STRIDE: usize = (FRAME_START + fast::ETHERNET_LEN + 65_535).next_multiple_of(64);
/// Room for one control message of `tpacket_auxdata`, aligned as such messages are.
const CONTROL_WORDS: usize = 6;
/// How much the kernel may keep for us in each direction, in bytes.
const SOCKET_BUFFER: c_int = 16 << 20;
/// How long a burst may wait for room in a full device.
const SEND_WAIT: Duration = Duration::from_millis(10);
/// How many turns may pass before the kernel is asked what it dropped.
const STATISTICS_EVERY: u32 = 1024;

/// Raw packet sockets of one thread, one on each interface.
#[derive(Debug)]
pub struct AfPacket {
    ports: Vec<Port>,
    buffers: Mapping,
    turns: u32,
}

/// A socket on one interface.
#[derive(Debug)]
struct Port {
    fd: OwnedFd,
    interface: String,
    index: u32,
    /// The interface went down, and nothing has come since.
    is_down: bool,
    missed: u64,
}

/// What the kernel says of a received packet.
#[derive(Clone, Copy, Default)]
struct Received {
    len: usize,
    truncated: bool,
    /// Bits `TP_STATUS_...`.
    status: u32,
    /// The tag that the kernel has taken off: EtherType and contents.
    tag: [u16; 2],
}

impl AfPacket {
    /// Opens sockets that take the IPv4 packets which arrive on the interfaces, for so many threads.
    ///
    /// # Errors
    /// If the kernel refuses, for want of rights mostly.
    pub fn open(interfaces: &[Interface], threads: usize) -> Result<Vec<AfPacket>, IoError> {
        let mut ports: Vec<Vec<Port>> = (0..threads).map(|_| Vec::new()).collect();
        for interface in interfaces {
            warn_of_host_settings(&interface.name);
            let mut group = None;
            for thread in &mut ports {
                let port = Port::open(interface)?;
                if threads > 1 {
                    group = Some(port.join(group)?);
                }
                thread.push(port);
            }
        }
        let thread = |ports| {
            let buffers = Mapping::anonymous(BURST * STRIDE).map_err(|error| IoError::System {
                place: "af-packet".to_owned(),
                what: "memory for frames",
                error,
            })?;
            Ok(AfPacket { ports, buffers, turns: 0 })
        };
        ports.into_iter().map(thread).collect()
    }

    /// Takes one burst from one interface through `worker`.
    fn serve(&mut self, ingress: usize, worker: &mut Worker) -> Result<usize, IoError> {
        let received = self.ports[ingress].receive(&self.buffers)?;
        self.ports[ingress].is_down &= received.is_empty();
        if received.is_empty() {
            return Ok(0);
        }
        let mut burst: ArrayVec<Slot<'_>, BURST> = ArrayVec::new();
        for (i, packet) in received.iter().enumerate() {
            let start = self.buffers.part(i * STRIDE, STRIDE);
            // SAFETY: within the mapping, parts do not overlap, and while `burst` lives nobody else touches them:
            // the kernel writes in `Port::receive` only, which is called above and here alone.
            let buffer = unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), STRIDE) };
            let is_tagged = packet.status & libc::TP_STATUS_VLAN_VALID != 0 && packet.len >= ADDRESSES_LEN;
            let (start, len) = if is_tagged {
                put_tag_back(buffer, packet.tag);
                (FRAME_START - TAG_LEN, packet.len + TAG_LEN)
            } else {
                (FRAME_START, packet.len)
            };
            let mut slot = Slot::new(buffer, start, len);
            if packet.truncated {
                slot.verdict = Verdict::Drop(DropReason::TooBig);
            } else if packet.status & libc::TP_STATUS_CSUMNOTREADY != 0 {
                complete_checksum(slot.frame_mut());
            }
            burst.push(slot);
        }
        worker.decide(ingress as u8, &mut burst);
        for (egress, port) in self.ports.iter().enumerate() {
            port.send(egress as u8, &mut burst);
        }
        worker.settle(&burst);
        Ok(burst.len())
    }

    /// Takes one burst from each interface.
    fn serve_all(&mut self, worker: &mut Worker) -> Result<usize, IoError> {
        (0..self.ports.len()).try_fold(0, |sum, ingress| Ok(sum + self.serve(ingress, worker)?))
    }

    /// Adds what the kernel has dropped since it was last asked.
    fn ask_missed(&mut self, worker: &mut Worker) -> Result<(), IoError> {
        let mut missed = 0;
        for port in &mut self.ports {
            missed += port.ask_missed()?;
        }
        worker.set_missed(missed);
        Ok(())
    }
}

impl Port {
    fn open(interface: &Interface) -> Result<Port, IoError> {
        let name = interface.name.clone();
        let failed = |what| {
            let place = format!("interface {name}");
            move |error| IoError::System { place, what, error }
        };
        // Protocol 0 takes nothing: packets come only after `bind`, when all options are set.
        let fd = sys::socket(libc::AF_PACKET, libc::SOCK_RAW, 0)
            .map_err(failed("opening a packet socket (needs CAP_NET_RAW)"))?;
        let on: c_int = 1;
        sys::set_option(&fd, libc::SOL_PACKET, libc::PACKET_AUXDATA, &on)
            .map_err(failed("PACKET_AUXDATA"))?;
        sys::set_option(&fd, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, &on)
            .map_err(failed("PACKET_IGNORE_OUTGOING (needs Linux 4.20)"))?;
        for option in [libc::SO_RCVBUFFORCE, libc::SO_SNDBUFFORCE] {
            sys::set_option(&fd, libc::SOL_SOCKET, option, &SOCKET_BUFFER)
                .map_err(failed("setting the socket's buffers (needs CAP_NET_ADMIN)"))?;
        }
        let mut program = taken_packets();
        let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
        sys::set_option(&fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)
            .map_err(failed("choosing packets"))?;
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            // Of two tags the kernel leaves one in its place, and goes by that.
            sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
            sll_ifindex: interface.index as c_int,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        sys::bind(&fd, &address).map_err(failed("binding a packet socket"))?;
        Ok(Port { fd, interface: name, index: interface.index, is_down: false, missed: 0 })
    }

    /// Joins those sockets on the interface that share its packets; the first makes the group. Returns its number.
    fn join(&self, group: Option<u16>) -> Result<u16, IoError> {
        let kind = libc::PACKET_FANOUT_HASH as c_int;
        let option: c_int = match group {
            Some(group) => kind << 16 | c_int::from(group),
            None => (kind | libc::PACKET_FANOUT_FLAG_UNIQUEID as c_int) << 16,
        };
        sys::set_option(&self.fd, libc::SOL_PACKET, libc::PACKET_FANOUT, &option)
            .map_err(self.error("PACKET_FANOUT (needs Linux 4.12)"))?;
        let joined: c_int = sys::get_option(&self.fd, libc::SOL_PACKET, libc::PACKET_FANOUT)
            .map_err(self.error("PACKET_FANOUT"))?;
        // The lower half is the group.
        Ok(joined as u16)
    }

    fn error(&self, what: &'static str) -> impl FnOnce(io::Error) -> IoError {
        let place = format!("interface {}", self.interface);
        move |error| IoError::System { place, what, error }
    }

    /// Receives a burst into the buffers.
    fn receive(&mut self, buffers: &Mapping) -> Result<ArrayVec<Received, BURST>, IoError> {
        let mut controls = [[0u64; CONTROL_WORDS]; BURST];
        let mut vectors: ArrayVec<libc::iovec, BURST> = (0..BURST)
            .map(|i| {
                let len = STRIDE - FRAME_START;
                let start = buffers.part(i * STRIDE + FRAME_START, len);
                libc::iovec { iov_base: start.as_ptr().cast(), iov_len: len }
            })
            .collect();
        let mut messages: ArrayVec<libc::mmsghdr, BURST> = vectors
            .iter_mut()
            .zip(&mut controls)
            .map(|(vector, control)| {
                let mut message = message(vector);
                message.msg_hdr.msg_control = control.as_mut_ptr().cast();
                message.msg_hdr.msg_controllen = size_of_val(control);
                message
            })
            .collect();
        // SAFETY: each message has one vector, within the mapping, of which no part is borrowed now, and a control
        // buffer; all live through the call.
        let received = unsafe {
            libc::recvmmsg(
                self.fd.as_raw_fd(),
                messages.as_mut_ptr(),
                BURST as u32,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        if received < 0 {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::EAGAIN | libc::EINTR) => Ok(ArrayVec::new()),
                // Said once. It may come back.
                Some(libc::ENETDOWN) => {
                    self.is_down = true;
                    Ok(ArrayVec::new())
                }
                _ => Err(self.error("receiving")(error)),
            };
        }
        let said = |message: &libc::mmsghdr| {
            let (status, tag) = auxiliary(&message.msg_hdr);
            Received {
                len: (message.msg_len as usize).min(STRIDE - FRAME_START),
                truncated: message.msg_hdr.msg_flags & libc::MSG_TRUNC != 0,
                status,
                tag,
            }
        };
        Ok(messages.iter().take(received as usize).map(said).collect())
    }

    /// Sends those slots of a burst that leave by this interface. What the device does not take becomes a drop.
    fn send(&self, number: u8, burst: &mut [Slot<'_>]) {
        let mut places: ArrayVec<u8, BURST> = ArrayVec::new();
        let mut vectors: ArrayVec<libc::iovec, BURST> = ArrayVec::new();
        for (i, slot) in burst.iter_mut().enumerate() {
            if let Verdict::Send { egress, .. } = slot.verdict
                && egress == number
            {
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
        if self.is_down && nix::net::if_::if_nametoindex(self.interface.as_str()) != Ok(self.index) {
            let place = format!("interface {}", self.interface);
            return Err(IoError::Unusable { place, reason: "it is gone".to_owned() });
        }
        Ok(())
    }

    /// Asks what the kernel has dropped since it was last asked. Returns what it has dropped in all.
    fn ask_missed(&mut self) -> Result<u64, IoError> {
        let statistics: libc::tpacket_stats =
            sys::get_option(&self.fd, libc::SOL_PACKET, libc::PACKET_STATISTICS)
                .map_err(self.error("PACKET_STATISTICS"))?;
        self.missed += u64::from(statistics.tp_drops);
        Ok(self.missed)
    }
}

impl PacketIo for AfPacket {
    fn turn(&mut self, worker: &mut Worker, wait: Duration) -> Result<usize, IoError> {
        let mut taken = self.serve_all(worker)?;
        if taken == 0 && !wait.is_zero() {
            let mut entries: Vec<_> =
                self.ports.iter().map(|port| sys::poll_entry(&port.fd, libc::POLLIN)).collect();
            sys::poll_any(&mut entries, wait).map_err(self.ports[0].error("waiting for packets"))?;
            if entries.iter().any(|entry| entry.revents != 0) {
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
        // What has been received already is still served; a socket takes no more once it is closed.
        self.turn(worker, Duration::ZERO)?;
        self.ask_missed(worker)
    }
}

/// Length in bytes of both Ethernet addresses, behind which tags stand.
const ADDRESSES_LEN: usize = 12;
/// Length in bytes of a VLAN tag.
const TAG_LEN: usize = 4;
const _: () = assert!(FRAME_START - TAG_LEN >= pipeline::HEADROOM);

/// Puts a tag back into a frame that lies at `FRAME_START`; the frame then begins before it.
fn put_tag_back(buffer: &mut [u8], [kind, contents]: [u16; 2]) {
    buffer.copy_within(FRAME_START..FRAME_START + ADDRESSES_LEN, FRAME_START - TAG_LEN);
    let tag = &mut buffer[FRAME_START - TAG_LEN + ADDRESSES_LEN..][..TAG_LEN];
    tag[..2].copy_from_slice(&kind.to_be_bytes());
    tag[2..].copy_from_slice(&contents.to_be_bytes());
}

/// A program for the socket that takes IPv4 packets, and those with a VLAN tag that the kernel has not taken off.
fn taken_packets() -> [libc::sock_filter; 6] {
    let code =
        |code: u32, jt, jf, k: i32| libc::sock_filter { code: code as u16, jt, jf, k: k.cast_unsigned() };
    let load = libc::BPF_LD | libc::BPF_H | libc::BPF_ABS;
    let equals = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let answer = libc::BPF_RET | libc::BPF_K;
    [
        code(load, 0, 0, libc::SKF_AD_OFF + libc::SKF_AD_PROTOCOL),
        code(equals, 2, 0, libc::ETH_P_IP),
        code(equals, 1, 0, libc::ETH_P_8021Q),
        code(equals, 0, 1, libc::ETH_P_8021AD),
        code(answer, 0, 0, -1),
        code(answer, 0, 0, 0),
    ]
}

/// A message of one vector.
fn message(vector: &mut libc::iovec) -> libc::mmsghdr {
    // SAFETY: a `mmsghdr` of zeros is a value: no name, no vectors, no control data.
    let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
    message.msg_hdr.msg_iov = vector;
    message.msg_hdr.msg_iovlen = 1;
    message
}

/// The status word of a packet's `tpacket_auxdata`, and the tag in it: zeros if the kernel gave none.
fn auxiliary(header: &libc::msghdr) -> (u32, [u16; 2]) {
    // SAFETY: the kernel has filled the control buffer and set its length in the header.
    let control = unsafe { libc::CMSG_FIRSTHDR(header) };
    // SAFETY: null, or a whole header within the control buffer, which is aligned for it.
    let Some(control) = (unsafe { control.as_ref() }) else { return Default::default() };
    if (control.cmsg_level, control.cmsg_type) != (libc::SOL_PACKET, libc::PACKET_AUXDATA) {
        return Default::default();
    }
    // SAFETY: the message is of the type that this kind of control message carries.
    let data: libc::tpacket_auxdata = unsafe { std::ptr::read_unaligned(libc::CMSG_DATA(control).cast()) };
    (data.tp_status, [data.tp_vlan_tpid, data.tp_vlan_tci])
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
