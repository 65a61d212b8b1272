//! The bpf(2) calls that aya lacks.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

const BPF_MAP_DELETE_ELEM: libc::c_int = 3;

/// The part of `union bpf_attr` that belongs to the deletion of a map's element.
#[repr(C)]
struct ElementAttributes {
    map_fd: u32,
    zero: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Calls bpf(2).
///
/// # Safety
/// `attributes` is the part of `union bpf_attr` that the command reads, and the addresses in it are good for what the
/// command does with them.
pub(super) unsafe fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<()> {
    // SAFETY: alive, exclusively borrowed, with its true size; the caller answers for the rest.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attributes, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Deletes the element of a map whose key is a number.
pub(super) fn delete(map: impl AsFd, key: u32) -> io::Result<()> {
    let map_fd = map.as_fd().as_raw_fd().cast_unsigned();
    let mut attributes =
        ElementAttributes { map_fd, zero: 0, key: (&raw const key) as u64, value: 0, flags: 0 };
    // SAFETY: the kernel reads the four bytes of `key`, which outlives the call; maps of maps have such keys.
    unsafe { bpf(BPF_MAP_DELETE_ELEM, &mut attributes) }
}
