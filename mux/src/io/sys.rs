//! The few kernel interfaces that no library wraps: mapped memory, socket options by value, ethtool.

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::time::Duration;

/// Memory from `mmap`, unmapped when dropped. It is shared with the kernel or cut into frames, so nobody may hold
/// a reference to all of it.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the memory belongs to the mapping wherever it goes; there is no thread-local part of it.
unsafe impl Send for Mapping {}
// SAFETY: shared, it gives its addresses away and nothing of what lies there.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Zeroed memory of this process alone.
    pub fn anonymous(len: usize) -> io::Result<Mapping> {
        Mapping::map(len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
    }

    /// What `fd` offers at `offset`, shared with the kernel and present from the start.
    pub fn shared(fd: &impl AsRawFd, len: usize, offset: libc::off_t) -> io::Result<Mapping> {
        Mapping::map(len, libc::MAP_SHARED | libc::MAP_POPULATE, fd.as_raw_fd(), offset)
    }

    fn map(len: usize, flags: c_int, fd: c_int, offset: libc::off_t) -> io::Result<Mapping> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping where the kernel chooses; nothing else is touched.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, access, flags, fd, offset) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Mapping { start, len })
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Its first byte.
    pub fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// Asks for huge pages, where the kernel gives them on request: fewer misses of the TLB.
    pub fn advise_huge_pages(&self) {
        // SAFETY: advice about memory that is ours. It fails where the kernel has no huge pages, and harms nothing.
        let _no_huge_pages =
            unsafe { libc::madvise(self.start.as_ptr().cast(), self.len, libc::MADV_HUGEPAGE) };
    }

    /// The address of a part.
    ///
    /// # Panics
    /// If the part is not within the mapping.
    pub fn part(&self, offset: usize, len: usize) -> NonNull<u8> {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len),
            "{len} bytes at {offset} of {}",
            self.len
        );
        // SAFETY: within the mapping, as was just checked.
        unsafe { self.start.add(offset) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length, and whoever holds parts of it borrows or owns `self`.
        let result = unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
        debug_assert_eq!(result, 0, "munmap: {}", io::Error::last_os_error());
    }
}

/// Opens a socket that closes on exec.
pub fn socket(family: c_int, kind: c_int, protocol: c_int) -> io::Result<OwnedFd> {
    // SAFETY: takes no pointers.
    let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just opened, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Plain data that the kernel reads or writes as bytes.
///
/// # Safety
/// The type is `repr(C)` or primitive, and every pattern of bits is a value of it.
pub unsafe trait Plain: Copy {}

// SAFETY: every pattern of bits is an integer.
unsafe impl Plain for c_int {}
// SAFETY: C structs of integers.
unsafe impl Plain for libc::xdp_mmap_offsets {}
// SAFETY: see above.
unsafe impl Plain for libc::xdp_umem_reg {}
// SAFETY: see above.
unsafe impl Plain for libc::xdp_statistics {}
// SAFETY: see above.
unsafe impl Plain for libc::xdp_options {}
// SAFETY: see above.
unsafe impl Plain for libc::sockaddr_xdp {}
// SAFETY: see above.
unsafe impl Plain for libc::sockaddr_ll {}
// SAFETY: see above.
unsafe impl Plain for libc::tpacket_stats {}
// SAFETY: see above.
unsafe impl Plain for libc::tpacket_req {}

/// Sets a socket option.
pub fn set_option<T: Plain>(fd: &OwnedFd, level: c_int, name: c_int, value: &T) -> io::Result<()> {
    let len = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel reads `len` bytes of a value of that length.
    let result =
        unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, std::ptr::from_ref(value).cast(), len) };
    check(result)
}

/// Gets a socket option. A kernel that knows a shorter form of it leaves the rest zero.
pub fn get_option<T: Plain>(fd: &OwnedFd, level: c_int, name: c_int) -> io::Result<T> {
    // SAFETY: `T` is plain, so zeros are a value of it.
    let mut value: T = unsafe { std::mem::zeroed() };
    let mut len = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes into a value of that length, and `T` is plain.
    let result = unsafe {
        libc::getsockopt(fd.as_raw_fd(), level, name, std::ptr::from_mut(&mut value).cast(), &raw mut len)
    };
    check(result).map(|()| value)
}

/// Binds a socket.
pub fn bind<A: Plain>(fd: &OwnedFd, address: &A) -> io::Result<()> {
    let len = size_of::<A>() as libc::socklen_t;
    // SAFETY: the kernel reads `len` bytes of a value of that length.
    let result = unsafe { libc::bind(fd.as_raw_fd(), std::ptr::from_ref(address).cast(), len) };
    check(result)
}

/// What a socket is bound to. Where the kernel knows less than the structure holds, the rest is zero.
pub fn local_address<A: Plain>(fd: &OwnedFd) -> io::Result<A> {
    // SAFETY: `A` is plain, so zeros are a value of it.
    let mut address: A = unsafe { std::mem::zeroed() };
    let mut len = size_of::<A>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes into a value of that length, and `A` is plain.
    let result =
        unsafe { libc::getsockname(fd.as_raw_fd(), std::ptr::from_mut(&mut address).cast(), &raw mut len) };
    check(result).map(|()| address)
}

/// Has a socket take only what a program of classic BPF lets in, in place of what it had before.
pub fn attach_filter(fd: &OwnedFd, program: &[libc::sock_filter]) -> io::Result<()> {
    let len = program.len().try_into().map_err(io::Error::other)?;
    let value = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    let value_len = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the kernel reads the structure, and through it `len` instructions, which it copies.
    let result = unsafe {
        let value = std::ptr::from_ref(&value).cast();
        libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, value, value_len)
    };
    check(result)
}

/// Waits until a socket is ready for `events`, at most this long. Returns what it is ready for; 0 after the time
/// or a signal.
pub fn poll(fd: &OwnedFd, events: libc::c_short, wait: Duration) -> io::Result<libc::c_short> {
    let mut entries = [poll_entry(fd, events)];
    poll_any(&mut entries, wait)?;
    Ok(entries[0].revents)
}

/// What [`poll_any`] is to wait for.
pub fn poll_entry(fd: &OwnedFd, events: libc::c_short) -> libc::pollfd {
    libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 }
}

/// Waits until one of several sockets is ready, at most this long. Says in `revents` what each is ready for; nothing
/// after the time or a signal.
pub fn poll_any(entries: &mut [libc::pollfd], wait: Duration) -> io::Result<()> {
    let wait_ms = wait.as_millis().try_into().unwrap_or(c_int::MAX);
    // SAFETY: as many entries as are said, which live through the call.
    let result = unsafe { libc::poll(entries.as_mut_ptr(), entries.len() as libc::nfds_t, wait_ms) };
    match check(result.min(0)) {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => {
            entries.iter_mut().for_each(|entry| entry.revents = 0);
            Ok(())
        }
        other => other,
    }
}

/// Turns -1 into `errno`.
pub fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

const SIOCETHTOOL: libc::Ioctl = 0x8946;
const ETHTOOL_GTXCSUM: u32 = 0x16;
const ETHTOOL_GGRO: u32 = 0x2b;
const ETHTOOL_GCHANNELS: u32 = 0x3c;

/// `struct ethtool_value`.
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// `struct ethtool_channels`.
#[repr(C)]
#[derive(Default)]
struct Channels {
    command: u32,
    max_rx: u32,
    max_tx: u32,
    max_other: u32,
    max_combined: u32,
    rx: u32,
    tx: u32,
    other: u32,
    combined: u32,
}

/// Whether the kernel merges TCP segments that arrive on this interface (generic receive offload).
pub fn receive_offload(interface: &str) -> io::Result<bool> {
    is_on(interface, ETHTOOL_GGRO)
}

/// Whether the host leaves checksums of what it sends to this interface.
pub fn transmit_offload(interface: &str) -> io::Result<bool> {
    is_on(interface, ETHTOOL_GTXCSUM)
}

fn is_on(interface: &str, command: u32) -> io::Result<bool> {
    let mut value = Value { command, data: 0 };
    // SAFETY: these commands write a `struct ethtool_value`.
    unsafe { ethtool(interface, (&raw mut value).cast()) }?;
    Ok(value.data != 0)
}

/// How many receive queues an interface uses.
pub fn receive_queues(interface: &str) -> io::Result<u32> {
    let mut channels = Channels { command: ETHTOOL_GCHANNELS, ..Channels::default() };
    // SAFETY: ETHTOOL_GCHANNELS writes a `struct ethtool_channels`.
    match unsafe { ethtool(interface, (&raw mut channels).cast()) } {
        Ok(()) => Ok((channels.rx + channels.combined).max(1)),
        // A driver that does not say has one.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(1),
        Err(error) => Err(error),
    }
}

/// # Safety
/// `request` points to the structure that its first word, the command, stands for.
unsafe fn ethtool(interface: &str, request: *mut libc::c_char) -> io::Result<()> {
    let socket = socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    // SAFETY: an `ifreq` of zeros is a value.
    let mut ifreq: libc::ifreq = unsafe { std::mem::zeroed() };
    if interface.len() >= ifreq.ifr_name.len() {
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    for (place, byte) in ifreq.ifr_name.iter_mut().zip(interface.bytes()) {
        *place = byte.cast_signed();
    }
    ifreq.ifr_ifru.ifru_data = request;
    // SAFETY: SIOCETHTOOL takes an `ifreq`, whose data the caller answers for.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut ifreq) })
}
