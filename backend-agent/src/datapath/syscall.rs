//! The bpf(2) calls that aya lacks, and membarrier(2). The only `unsafe` code of the agent's data path besides the
//! declarations in `values`.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const BPF_OBJ_GET: libc::c_int = 7;
const BPF_PROG_TEST_RUN: libc::c_int = 10;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_LINK_DETACH: libc::c_int = 34;
const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;
/// Reads values that hold a `bpf_spin_lock` under that lock.
pub(super) const BPF_F_LOCK: u64 = 4;
const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;

/// What a program did in a test run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestRun {
    /// What it returned: an XDP action, for the data path.
    pub returned: u32,
    /// The packet as it left it.
    pub packet: Vec<u8>,
    /// The mean duration of a round, in nanoseconds.
    pub nanoseconds: u32,
}

/// The part of `union bpf_attr` that belongs to `BPF_PROG_TEST_RUN`.
#[repr(C)]
#[derive(Default)]
struct TestRunAttr {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    zero: u32,
}

/// The part of `union bpf_attr` that belongs to `BPF_OBJ_GET_INFO_BY_FD`.
#[repr(C)]
#[derive(Default)]
struct InfoAttr {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// The part of `union bpf_attr` that belongs to `BPF_OBJ_GET`.
#[repr(C)]
#[derive(Default)]
struct ObjectAttr {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// The part of `union bpf_attr` that belongs to `BPF_LINK_DETACH`.
#[repr(C)]
struct DetachAttr {
    link_fd: u32,
}

/// The start of `struct bpf_link_info`, for an XDP link.
#[repr(C)]
#[derive(Default)]
struct XdpLinkInfo {
    link_type: u32,
    id: u32,
    prog_id: u32,
    zero: u32,
    ifindex: u32,
    zero_too: u32,
}

/// The part of `union bpf_attr` that belongs to `BPF_MAP_LOOKUP_BATCH`.
#[repr(C)]
#[derive(Default)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is the part of `union bpf_attr` that `command` reads, alive and exclusively borrowed, with its
    // true size; the callers below say why the addresses in it are good.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attr, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Runs a program on a packet, `repeat` times on what each round leaves. The network namespace is the caller's.
///
/// # Errors
/// What the kernel says: a packet shorter than an Ethernet header or longer than a page leaves room for is refused.
pub fn test_run(program: impl AsFd, packet: &[u8], repeat: u32) -> io::Result<TestRun> {
    let mut out = vec![0; packet.len() + 256];
    let mut attr = TestRunAttr {
        prog_fd: program.as_fd().as_raw_fd() as u32,
        data_size_in: packet.len() as u32,
        data_in: packet.as_ptr() as u64,
        data_size_out: out.len() as u32,
        data_out: out.as_mut_ptr() as u64,
        repeat,
        ..TestRunAttr::default()
    };
    // The kernel reads `data_size_in` bytes of `packet` and writes at most `data_size_out` of `out`; both outlive
    // the call.
    bpf(BPF_PROG_TEST_RUN, &mut attr)?;
    out.truncate(attr.data_size_out as usize);
    Ok(TestRun { returned: attr.retval, packet: out, nanoseconds: attr.duration })
}

/// Runs a program on a packet and returns only what it returned.
///
/// # Errors
/// As [`test_run`].
pub(super) fn run(program: impl AsFd, packet: &[u8]) -> io::Result<u32> {
    let mut attr = TestRunAttr {
        prog_fd: program.as_fd().as_raw_fd() as u32,
        data_size_in: packet.len() as u32,
        data_in: packet.as_ptr() as u64,
        repeat: 1,
        ..TestRunAttr::default()
    };
    // The kernel reads `data_size_in` bytes of `packet` and, without `data_out`, writes none.
    bpf(BPF_PROG_TEST_RUN, &mut attr)?;
    Ok(attr.retval)
}

/// Opens what is pinned.
fn open_pin(pin: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    // The kernel reads `path` up to its terminating zero; it outlives the call.
    let fd = bpf(BPF_OBJ_GET, &mut ObjectAttr { pathname: path.as_ptr() as u64, ..ObjectAttr::default() })?;
    // SAFETY: BPF_OBJ_GET returns a file descriptor that is open and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Detaches a pinned link at once; removing the pin alone would do so some time later.
///
/// # Errors
/// What the kernel says; `NotFound` if there is no such pin.
pub(super) fn detach_link(pin: &Path) -> io::Result<()> {
    let link = open_pin(pin)?;
    let mut attr = DetachAttr { link_fd: link.as_raw_fd() as u32 };
    bpf(BPF_LINK_DETACH, &mut attr).map(|_| ())
}

/// The number of the interface that a pinned XDP link is attached to; 0 if that interface is gone.
///
/// # Errors
/// What the kernel says.
pub(super) fn link_interface(pin: &Path) -> io::Result<u32> {
    let link = open_pin(pin)?;
    let mut info = XdpLinkInfo::default();
    let mut attr = InfoAttr {
        bpf_fd: link.as_raw_fd() as u32,
        info_len: size_of::<XdpLinkInfo>() as u32,
        info: &raw mut info as u64,
    };
    // The kernel writes at most `info_len` bytes of `info`, which outlives the call; any bytes are valid in it.
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(info.ifindex)
}

/// Reads the values `first..first + values.len()` of an array map, each under its lock.
///
/// # Errors
/// What the kernel says; also if the map ends earlier.
pub(super) fn lookup_range<V: aya::Pod>(map: impl AsFd, first: u32, values: &mut [V]) -> io::Result<()> {
    // The kernel starts behind the key it is given, and at the first without one.
    let (before, mut last) = (first.wrapping_sub(1), 0u32);
    let mut keys = vec![0u32; values.len()];
    let mut attr = BatchAttr {
        in_batch: if first == 0 { 0 } else { &raw const before as u64 },
        out_batch: &raw mut last as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count: values.len() as u32,
        map_fd: map.as_fd().as_raw_fd() as u32,
        elem_flags: BPF_F_LOCK,
        flags: 0,
    };
    // The kernel writes `count` keys of 4 bytes and `count` values of the map's value size, which aya has compared
    // with `V`'s; any bytes are valid in a `Pod`. All outlive the call.
    match bpf(BPF_MAP_LOOKUP_BATCH, &mut attr) {
        // The end of the map has been reached: no error, if everything has been read.
        Err(error) if error.raw_os_error() != Some(libc::ENOENT) => Err(error),
        _ if attr.count as usize != values.len() => {
            Err(io::Error::other(format!("{} of {} values read from {first} on", attr.count, values.len())))
        }
        _ => Ok(()),
    }
}

/// Waits until every run of a BPF program that is under way now has ended.
///
/// # Errors
/// If the kernel has no global memory barrier (CPUs without timer ticks, `nohz_full`).
pub(super) fn wait_for_programs() -> io::Result<()> {
    // SAFETY: the call takes no addresses. This command waits for an RCU grace period, and network programs run
    // inside RCU read-side sections.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
