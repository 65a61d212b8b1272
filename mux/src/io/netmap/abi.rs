//! How netmap is asked for ports: `/dev/netmap`, its requests, and where things lie in the memory that it maps.
//!
//! Slots, rings, their flags and the calls that sync them are crate `netmap_sys`'s: their layout has not changed
//! since API 11, for which it was written. Today's module speaks API 14 and takes nothing older. What came with it
//! stands here: requests are made with `NIOCCTRL` and a header, a body and options, as only that grants offsets in
//! slots and several host rings; and the ring has got two fields where the crate has padding.

use std::ffi::c_int;
use std::fs::{File, OpenOptions};
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, OwnedFd};

use netmap_sys::netmap::{self, netmap_ring, netmap_slot};

/// The device.
pub const DEVICE: &str = "/dev/netmap";
/// The version of netmap's interface that is spoken here.
const API: u16 = 14;
/// Buffers 0 and 1 are netmap's own; no ring has them.
pub const FIRST_BUFFER: u32 = 2;
/// The longest name of a port, with its terminating zero.
const NAME_LEN: usize = 64;

/// Of `struct netmap_ring`: which part of a slot's `ptr` is the offset of the frame in its buffer. API 14.
pub const OFFSET_MASK_AT: usize = 56;
/// Of `struct netmap_ring`: what offsets of frames to be sent must be multiples of. API 14.
pub const BUFFER_ALIGN_AT: usize = 64;
/// Where the slots of a ring begin.
pub const SLOTS_AT: usize = offset_of!(netmap_ring, slot);
const _: () = assert!(SLOTS_AT == 256 && size_of::<netmap_slot>() == 16);
const _: () = assert!(offset_of!(netmap_ring, ts) + size_of::<libc::timeval>() == OFFSET_MASK_AT);
const _: () = assert!(BUFFER_ALIGN_AT + 8 <= offset_of!(netmap_ring, sem));

/// Which rings of a port a descriptor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rings {
    /// The pair of hardware rings of this number (`NR_REG_ONE_NIC`).
    Hardware(u16),
    /// The pair of rings to and from the host's stack of this number (`NR_REG_ONE_SW`, API 14).
    Host(u16),
}

/// `struct nmreq_header`.
#[repr(C)]
struct Header {
    version: u16,
    request: u16,
    reserved: u32,
    name: [u8; NAME_LEN],
    options: u64,
    body: u64,
}

/// `struct nmreq_register`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Register {
    /// Where the port's `struct netmap_if` lies in the mapped memory.
    pub offset: u64,
    /// How much memory there is to map.
    pub memory_len: u64,
    /// Slots of each ring to send.
    pub tx_slots: u32,
    /// Slots of each ring to receive.
    pub rx_slots: u32,
    /// Hardware rings to send.
    pub tx_rings: u16,
    /// Hardware rings to receive.
    pub rx_rings: u16,
    /// Rings to the host.
    pub host_tx_rings: u16,
    /// Rings from the host.
    pub host_rx_rings: u16,
    /// The region that buffers are of. Between ports of one region, buffers can be swapped.
    pub memory_id: u16,
    ring: u16,
    mode: u32,
    extra_buffers: u32,
    flags: u64,
}

/// `struct nmreq_port_info_get`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Info {
    memory_len: u64,
    tx_slots: u32,
    rx_slots: u32,
    /// Hardware rings to send.
    pub tx_rings: u16,
    /// Hardware rings to receive.
    pub rx_rings: u16,
    host_tx_rings: u16,
    host_rx_rings: u16,
    memory_id: u16,
    padding: [u16; 3],
}

/// `struct nmreq_opt_offsets`, which begins with a `struct nmreq_option`.
#[repr(C)]
struct Offsets {
    next: u64,
    option: u32,
    status: u32,
    size: u64,
    max_offset: u64,
    initial_offset: u64,
    offset_bits: u32,
    tx_align: u32,
    min_gap: u64,
}

const _: () = assert!(size_of::<Header>() == 88);
const _: () = assert!(size_of::<Register>() == 56);
const _: () = assert!(size_of::<Info>() == 32);
const _: () = assert!(size_of::<Offsets>() == 56);

const NETMAP_REQ_REGISTER: u16 = 1;
const NETMAP_REQ_PORT_INFO_GET: u16 = 2;
const NETMAP_REQ_OPT_OFFSETS: u32 = 5;
const NR_REG_ONE_SW: u32 = 8;
/// `_IOWR('i', 151, struct nmreq_header)`.
const NIOCCTRL: libc::Ioctl =
    (3 << 30 | size_of::<Header>() << 16 | (b'i' as usize) << 8 | 151) as libc::Ioctl;

/// Opens the device.
pub fn open_device() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(DEVICE)
}

/// What is to be opened.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The port, as netmap names it: without `netmap:` before it.
    pub name: &'a str,
    /// Which of its rings.
    pub rings: Rings,
    /// How many pairs of rings it shall have, where it is made by this request; 0: as many as netmap gives.
    pub pairs: u16,
    /// How many pairs of host rings it shall have, where nobody else has opened it; 0: as it is.
    pub host_pairs: u16,
    /// Where frames shall begin in their buffers, and the most that this will ever be.
    pub offsets: Option<(u64, u64)>,
}

/// Binds a descriptor to rings of a port, for this descriptor alone.
pub fn register(device: &File, request: &Request<'_>) -> io::Result<Register> {
    let (mode, ring) = match request.rings {
        Rings::Hardware(ring) => (netmap::NR_REG_ONE_NIC, ring),
        Rings::Host(ring) => (NR_REG_ONE_SW, ring),
    };
    let mut body = Register {
        tx_rings: request.pairs,
        rx_rings: request.pairs,
        host_tx_rings: request.host_pairs,
        host_rx_rings: request.host_pairs,
        ring,
        mode,
        flags: netmap::NR_EXCLUSIVE.into(),
        ..Register::default()
    };
    let mut offsets = request.offsets.map(|(initial_offset, max_offset)| Offsets {
        next: 0,
        option: NETMAP_REQ_OPT_OFFSETS,
        status: 0,
        size: 0,
        max_offset,
        initial_offset,
        // All of the slot's `ptr`, which has no other use here.
        offset_bits: 0,
        tx_align: 0,
        min_gap: 0,
    });
    let options = offsets.as_mut().map_or(0, |offsets| std::ptr::from_mut(offsets).expose_provenance());
    let body_at = std::ptr::from_mut(&mut body).expose_provenance();
    // SAFETY: NETMAP_REQ_REGISTER takes a `struct nmreq_register` and a list of options, here of one or none. All
    // live through the call.
    unsafe { control(device, NETMAP_REQ_REGISTER, request.name, body_at, options) }?;
    Ok(body)
}

/// Asks what a port has.
pub fn info(device: &File, name: &str) -> io::Result<Info> {
    let mut body = Info::default();
    let body_at = std::ptr::from_mut(&mut body).expose_provenance();
    // SAFETY: NETMAP_REQ_PORT_INFO_GET takes a `struct nmreq_port_info_get`, which lives through the call.
    unsafe { control(device, NETMAP_REQ_PORT_INFO_GET, name, body_at, 0) }?;
    Ok(body)
}

/// # Safety
/// `body` and `options` are addresses of what this request takes, or 0.
unsafe fn control(device: &File, request: u16, name: &str, body: usize, options: usize) -> io::Result<()> {
    let mut header = Header {
        version: API,
        request,
        reserved: 0,
        name: [0; NAME_LEN],
        options: options as u64,
        body: body as u64,
    };
    if name.len() >= NAME_LEN {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    header.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: NIOCCTRL takes a `struct nmreq_header`; the caller answers for what it points to.
    check(unsafe { libc::ioctl(device.as_raw_fd(), NIOCCTRL, &raw mut header) })
}

/// Sends what lies in the descriptor's rings to send, and takes back slots whose frames have been sent.
pub fn sync_tx(fd: &OwnedFd) -> io::Result<()> {
    // SAFETY: takes no argument.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), netmap::NIOCTXSYNC as libc::Ioctl) })
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_calls_are_those_of_the_header() {
        assert_eq!(NIOCCTRL, 0xc058_6997);
        assert_eq!(netmap::NIOCTXSYNC, 0x6994);
        assert_eq!(netmap::NIOCRXSYNC, 0x6995);
    }
}
