//! Several hosts for one thread, which moves between them.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::sched::{CloneFlags, setns, unshare};

use super::ip;

/// A network namespace without a name: it ends with this and with the sockets opened in it.
pub struct Netns(File);

impl Netns {
    /// Makes one, with loopback up.
    pub fn new() -> Netns {
        let home = Netns::current();
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests make network namespaces and need root");
        ip("link set lo up");
        let made = Netns::current();
        setns(&home.0, CloneFlags::CLONE_NEWNET).unwrap();
        made
    }

    fn current() -> Netns {
        Netns(File::open("/proc/thread-self/ns/net").unwrap())
    }

    /// Does something in it.
    pub fn inside<R>(&self, what: impl FnOnce() -> R) -> R {
        let home = Netns::current();
        setns(&self.0, CloneFlags::CLONE_NEWNET).unwrap();
        let result = what();
        setns(&home.0, CloneFlags::CLONE_NEWNET).unwrap();
        result
    }

    /// Moves an interface of the current namespace here.
    pub fn take(&self, interface: &str) {
        // ip(8) runs in a process of its own: the path names this one's file descriptor.
        let path = format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd());
        ip(&format!("link set {interface} netns {path}"));
    }
}

/// An AF_PACKET socket: whole frames of one interface.
pub struct Wire(OwnedFd);

impl Wire {
    /// Opens one in the current namespace; reading gives up after a while.
    pub fn open(interface: &str, patience: Duration) -> Wire {
        let protocol = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: no addresses are passed.
        let fd =
            unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol.into()) };
        assert!(fd >= 0, "AF_PACKET socket: {}", io::Error::last_os_error());
        // SAFETY: the file descriptor has just been opened and is nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let index = nix::net::if_::if_nametoindex(interface).unwrap();
        // SAFETY: all zeros are a valid address.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = index as i32;
        // SAFETY: the address is of the type and length that AF_PACKET takes, and outlives the call.
        let bound = unsafe {
            libc::bind(fd.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as libc::socklen_t)
        };
        assert_eq!(bound, 0, "AF_PACKET bind: {}", io::Error::last_os_error());
        let timeout =
            nix::sys::time::TimeVal::new(patience.as_secs() as i64, patience.subsec_micros().into());
        nix::sys::socket::setsockopt(&fd, nix::sys::socket::sockopt::ReceiveTimeout, &timeout).unwrap();
        Wire(fd)
    }

    pub fn send(&self, frame: &[u8]) {
        let sent = nix::sys::socket::send(self.0.as_raw_fd(), frame, nix::sys::socket::MsgFlags::empty());
        assert_eq!(sent, Ok(frame.len()));
    }

    /// The next frame that arrives; not those that leave. `None` if patience ends first.
    pub fn receive(&self) -> Option<Vec<u8>> {
        let mut buffer = vec![0; 65_536];
        loop {
            // SAFETY: all zeros are a valid address.
            let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
            let mut from_len = size_of_val(&from) as libc::socklen_t;
            // SAFETY: buffer and address are writable for the lengths given, and outlive the call.
            let received = unsafe {
                libc::recvfrom(
                    self.0.as_raw_fd(),
                    buffer.as_mut_ptr().cast(),
                    buffer.len(),
                    0,
                    (&raw mut from).cast(),
                    &raw mut from_len,
                )
            };
            if received < 0 {
                let error = io::Error::last_os_error();
                assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "AF_PACKET receive: {error}");
                return None;
            }
            if from.sll_pkttype != libc::PACKET_OUTGOING {
                buffer.truncate(received as usize);
                return Some(buffer);
            }
        }
    }

    /// The next frame that arrives and is wanted.
    pub fn receive_that(&self, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        loop {
            let frame = self.receive()?;
            if wanted(&frame) {
                return Some(frame);
            }
        }
    }
}
