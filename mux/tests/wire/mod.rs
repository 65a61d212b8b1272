//! The far end of a wire, on which every byte of a frame is the test's to choose and to see.
#![allow(dead_code, reason = "no test uses all of it")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::cmsg_space;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockProtocol, SockType, bind, recvmsg, send,
    setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use super::common::MUX_MAC;

const PATIENCE: Duration = Duration::from_secs(20);
/// The Ethernet address of the mux's second interface.
pub const SECOND_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// The far end of a wire: sends frames, and receives what the mux sends.
pub struct Wire(OwnedFd);

impl Wire {
    /// To be opened on the host at the far end.
    pub fn open() -> Wire {
        let kind = SockType::Raw;
        let fd = socket(AddressFamily::Packet, kind, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll).unwrap();
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::seconds(PATIENCE.as_secs() as i64)).unwrap();
        setsockopt(&fd, sockopt::RcvBufForce, &(32 << 20)).unwrap();
        let on: libc::c_int = 1;
        for option in [libc::PACKET_AUXDATA, libc::PACKET_IGNORE_OUTGOING] {
            let len = size_of_val(&on) as libc::socklen_t;
            // SAFETY: the kernel reads an integer.
            let result = unsafe {
                libc::setsockopt(fd.as_raw_fd(), libc::SOL_PACKET, option, (&raw const on).cast(), len)
            };
            assert_eq!(result, 0);
        }
        let eth0 = getifaddrs().unwrap().filter(|entry| entry.interface_name == "eth0");
        let link = eth0.filter_map(|entry| entry.address?.as_link_addr().copied()).next();
        bind(fd.as_raw_fd(), &link.unwrap()).unwrap();
        Wire(fd)
    }

    pub fn send(&self, frame: &[u8]) {
        assert_eq!(send(self.0.as_raw_fd(), frame, MsgFlags::empty()).unwrap(), frame.len());
    }

    /// The next IPv4 packet from the mux, with the tag that the kernel takes off; `None` if there is none now.
    pub fn next(&self, flags: MsgFlags) -> Option<Vec<u8>> {
        loop {
            let mut bytes = vec![0; 2000];
            let mut control = cmsg_space!(libc::tpacket_auxdata);
            let (len, tag) = {
                let mut vectors = [IoSliceMut::new(&mut bytes)];
                let message =
                    recvmsg::<()>(self.0.as_raw_fd(), &mut vectors, Some(&mut control), flags).ok()?;
                let mut messages = message.cmsgs().unwrap();
                let Some(ControlMessageOwned::Unknown(said)) = messages.next() else { panic!("no status") };
                let short = |at| u16::from_ne_bytes([said.data_bytes[at], said.data_bytes[at + 1]]);
                let status = u32::from_ne_bytes(said.data_bytes[..4].try_into().unwrap());
                let tag = (status & libc::TP_STATUS_VLAN_VALID != 0).then(|| (short(18), short(16)));
                (message.bytes, tag)
            };
            bytes.truncate(len);
            if let Some((tpid, tci)) = tag {
                bytes.splice(12..12, [tpid.to_be_bytes(), tci.to_be_bytes()].concat());
            }
            let from_mux = bytes[6..12] == MUX_MAC || bytes[6..12] == SECOND_MAC;
            // The mux's kernel says things of its own, but not by IPv4.
            if from_mux && (bytes[12..14] == [8, 0] || tag.is_some()) {
                return Some(bytes);
            }
        }
    }

    pub fn receive(&self) -> Vec<u8> {
        self.next(MsgFlags::empty()).expect("a packet from the mux")
    }

    pub fn is_quiet(&self) -> bool {
        self.next(MsgFlags::MSG_DONTWAIT).is_none()
    }
}
