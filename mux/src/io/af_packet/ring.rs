//! The receive ring of a packet socket (`TPACKET_V2` of `linux/if_packet.h`): frames of one length in memory that
//! the kernel and the mux share.
//!
//! The kernel fills the frames in turn, as far as it owns them, and hands each over by its status word; the mux
//! hands it back when the packet has been sent. Frames lie in blocks, which end in a rest if they are no multiple of
//! the frame. Within a frame:
//!
//! ```text
//! 0             52                    MAC_AT                                  frame_len
//! │ tpacket2_hdr │ room for headers     │ packet, from its Ethernet header …    │
//! │ sockaddr_ll  │ that are put before it                                       │
//! ```
//!
//! What the memory says is checked before it is used: a kernel that breaks this contract ends the I/O.

use std::sync::atomic::{AtomicU32, Ordering};

use arrayvec::ArrayVec;
use daisy_shared::wire::fast;

use super::complete_checksum;
use crate::io::sys::Mapping;
use crate::pipeline::{BURST, HEADROOM, Slot};

/// Where the kernel puts the first byte of a packet: at the start of a cache line.
const MAC_AT: usize = 128;
/// Where the kernel puts it if nothing is reserved: behind its own header, so that the IP packet is aligned.
const UNRESERVED_MAC_AT: usize =
    (libc::TPACKET2_HDRLEN + 16).next_multiple_of(libc::TPACKET_ALIGNMENT) - fast::ETHERNET_LEN;
/// The room that the kernel is to leave before each packet (`PACKET_RESERVE`), in bytes.
pub const RESERVE: libc::c_int = (MAC_AT - UNRESERVED_MAC_AT) as libc::c_int;
// A tag that is put back moves the start of the frame.
const _: () = assert!(MAC_AT - libc::TPACKET2_HDRLEN >= HEADROOM + fast::VLAN_LEN);

/// Length in bytes of a block: contiguous memory for the kernel, if it finds that much.
const BLOCK_LEN: usize = 1 << 18;
/// Length in bytes of a ring: what may wait while the thread is not run.
const RING_LEN: usize = 16 << 20;
const CACHE_LINE: usize = 64;

/// How frames lie in a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    frame_len: usize,
    frames_per_block: usize,
    block_len: usize,
    blocks: usize,
}

impl Geometry {
    /// For packets of at most `mtu` bytes without link-layer header; `None` if no block holds one.
    pub fn new(mtu: u32) -> Option<Geometry> {
        let len = MAC_AT + fast::MAX_LINK_LEN + usize::try_from(mtu).ok()?;
        // An odd number of lines: frames then do not compete for a few cache sets.
        let frame_len = (len.div_ceil(CACHE_LINE) | 1) * CACHE_LINE;
        let frames_per_block = BLOCK_LEN / frame_len;
        let geometry =
            Geometry { frame_len, frames_per_block, block_len: BLOCK_LEN, blocks: RING_LEN / BLOCK_LEN };
        (frames_per_block > 0).then_some(geometry)
    }

    /// What `PACKET_RX_RING` is to be asked for.
    pub fn request(&self) -> libc::tpacket_req {
        // All of them far below 2³².
        libc::tpacket_req {
            tp_block_size: self.block_len as u32,
            tp_block_nr: self.blocks as u32,
            tp_frame_size: self.frame_len as u32,
            tp_frame_nr: self.frames() as u32,
        }
    }

    fn frames(&self) -> usize {
        self.frames_per_block * self.blocks
    }

    /// Length in bytes of the ring's memory.
    pub fn len(&self) -> usize {
        self.block_len * self.blocks
    }
}

/// A frame's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cursor {
    block: usize,
    frame: usize,
}

impl Cursor {
    fn offset(self, geometry: &Geometry) -> usize {
        self.block * geometry.block_len + self.frame * geometry.frame_len
    }

    fn next(self, geometry: &Geometry) -> Cursor {
        if self.frame + 1 < geometry.frames_per_block {
            Cursor { frame: self.frame + 1, ..self }
        } else {
            let block = if self.block + 1 < geometry.blocks { self.block + 1 } else { 0 };
            Cursor { block, frame: 0 }
        }
    }
}

/// Received packets, where they lie.
#[derive(Debug, Default)]
pub struct Burst<'r> {
    /// The packets.
    pub slots: ArrayVec<Slot<'r>, BURST>,
    /// Those that were longer than a frame, and have lost their end.
    pub cut: ArrayVec<u8, BURST>,
}
const _: () = assert!(BURST <= 1 << u8::BITS);

/// A receive ring.
#[derive(Debug)]
pub struct Ring {
    memory: Mapping,
    geometry: Geometry,
    /// The first frame that has not been handed back.
    next: Cursor,
}

impl Ring {
    /// The ring in this memory, from its first frame.
    ///
    /// # Panics
    /// If the memory does not have the geometry's length.
    pub fn new(memory: Mapping, geometry: Geometry) -> Ring {
        assert_eq!(memory.len(), geometry.len());
        Ring { memory, geometry, next: Cursor { block: 0, frame: 0 } }
    }

    /// The packets that have come, at most a burst, as they were on the wire: with the VLAN tag that the kernel took
    /// off, and with the checksum that a sender on this host has left to a device.
    ///
    /// They come again until [`Ring::release`].
    ///
    /// # Errors
    /// What the kernel says that cannot be.
    pub fn burst(&mut self) -> Result<Burst<'_>, String> {
        let mut burst = Burst::default();
        let mut at = self.next;
        // Never a frame twice, not even in a ring that is shorter than a burst.
        for _ in 0..BURST.min(self.geometry.frames()) {
            let offset = at.offset(&self.geometry);
            if self.status(offset).load(Ordering::Acquire) & libc::TP_STATUS_USER == 0 {
                break;
            }
            // SAFETY: within the mapping, aligned as the frame is, and plain data that the kernel wrote before it
            // handed the frame over.
            let header =
                unsafe { self.memory.part(offset, HEADER_LEN).cast::<libc::tpacket2_hdr>().as_ptr().read() };
            let len = self.geometry.frame_len - libc::TPACKET2_HDRLEN;
            let start = self.memory.part(offset + libc::TPACKET2_HDRLEN, len);
            // SAFETY: within the mapping, and frames do not overlap; a burst has each frame once, and while it lives it
            // borrows the ring. The frame has been handed over to us: the kernel
            // does not touch it before `release`, which needs the ring back.
            let buffer = unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), len) };
            let cut = header.tp_snaplen < header.tp_len;
            let mut slot = slot(buffer, &header)?;
            if cut {
                burst.cut.push(burst.slots.len() as u8);
            } else if header.tp_status & libc::TP_STATUS_CSUMNOTREADY != 0 {
                complete_checksum(slot.frame_mut());
            }
            burst.slots.push(slot);
            at = at.next(&self.geometry);
        }
        Ok(burst)
    }

    /// Hands the first `count` packets of the last burst back to the kernel.
    pub fn release(&mut self, count: usize) {
        for _ in 0..count {
            let offset = self.next.offset(&self.geometry);
            self.status(offset).store(libc::TP_STATUS_KERNEL, Ordering::Release);
            self.next = self.next.next(&self.geometry);
        }
    }

    /// The word that says whose a frame is.
    fn status(&self, offset: usize) -> &AtomicU32 {
        let word = self.memory.part(offset, size_of::<AtomicU32>()).cast();
        // SAFETY: within the mapping, aligned as the frame is, and shared with the kernel as an atomic; slots begin
        // behind it.
        unsafe { word.as_ref() }
    }
}

const HEADER_LEN: usize = size_of::<libc::tpacket2_hdr>();
// A status word and a header at the start of each frame are aligned.
const _: () = assert!(CACHE_LINE.is_multiple_of(align_of::<libc::tpacket2_hdr>()));
const _: () = assert!(std::mem::offset_of!(libc::tpacket2_hdr, tp_status) == 0);

/// The packet in the part of a frame that lies behind the kernel's header.
fn slot<'r>(buffer: &'r mut [u8], header: &libc::tpacket2_hdr) -> Result<Slot<'r>, String> {
    let (mac, len) = (usize::from(header.tp_mac), header.tp_snaplen as usize);
    let bounds = mac
        .checked_sub(libc::TPACKET2_HDRLEN)
        .and_then(|start| Some((start, start.checked_add(len)?)))
        .filter(|(_, end)| *end <= buffer.len());
    let Some((start, end)) = bounds else {
        let room = libc::TPACKET2_HDRLEN + buffer.len();
        return Err(format!("the kernel puts {len} bytes at {mac} of a frame of {room}"));
    };
    if header.tp_status & libc::TP_STATUS_VLAN_VALID == 0 {
        return Ok(Slot::new(buffer, start, len));
    }
    // The tag stands behind both addresses, which move to make room for it.
    let Some(tagged) = start.checked_sub(fast::VLAN_LEN).filter(|_| len >= ADDRESSES_LEN) else {
        return Err(format!("the kernel puts a packet of {len} bytes at {mac} of a frame, and has its tag"));
    };
    let ethertype = match header.tp_status & libc::TP_STATUS_VLAN_TPID_VALID {
        0 => fast::ETHERTYPE_VLAN,
        _ => header.tp_vlan_tpid,
    };
    buffer.copy_within(start..start + ADDRESSES_LEN, tagged);
    let tag = &mut buffer[tagged + ADDRESSES_LEN..][..fast::VLAN_LEN];
    tag[..2].copy_from_slice(&ethertype.to_be_bytes());
    tag[2..].copy_from_slice(&header.tp_vlan_tci.to_be_bytes());
    Ok(Slot::new(buffer, tagged, end - tagged))
}

/// Length in bytes of the two addresses at the start of a frame.
const ADDRESSES_LEN: usize = 12;

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::PacketBuilder;

    /// Two blocks of three frames, each block with a rest.
    const SMALL: Geometry = Geometry { frame_len: 448, frames_per_block: 3, block_len: 1408, blocks: 2 };

    /// A ring, and the kernel's side of it.
    struct Image {
        ring: Ring,
        /// Where the kernel writes next.
        head: Cursor,
    }

    impl Image {
        fn new() -> Image {
            let memory = Mapping::anonymous(SMALL.len()).unwrap();
            Image { ring: Ring::new(memory, SMALL), head: Cursor { block: 0, frame: 0 } }
        }

        /// Writes a packet as the kernel does, if the next frame is the kernel's.
        fn receive(&mut self, packet: &[u8], change: impl FnOnce(&mut libc::tpacket2_hdr)) -> bool {
            let offset = self.head.offset(&SMALL);
            if self.ring.status(offset).load(Ordering::Acquire) != libc::TP_STATUS_KERNEL {
                return false;
            }
            let room = SMALL.frame_len - MAC_AT;
            let kept = &packet[..packet.len().min(room)];
            let mut header = libc::tpacket2_hdr {
                tp_status: libc::TP_STATUS_USER,
                tp_len: packet.len() as u32,
                tp_snaplen: kept.len() as u32,
                tp_mac: MAC_AT as u16,
                tp_net: (MAC_AT + 14) as u16,
                tp_sec: 0,
                tp_nsec: 0,
                tp_vlan_tci: 0,
                tp_vlan_tpid: 0,
                tp_padding: [0; 4],
            };
            change(&mut header);
            let frame = self.ring.memory.part(offset, SMALL.frame_len);
            // SAFETY: within the memory, and nobody has a reference to it.
            unsafe {
                std::ptr::copy_nonoverlapping(kept.as_ptr(), frame.as_ptr().add(MAC_AT), kept.len());
                frame.cast::<libc::tpacket2_hdr>().as_ptr().write(header);
            }
            self.head = self.head.next(&SMALL);
            true
        }

        /// What is in the ring, which is then released.
        fn take(&mut self) -> Vec<Vec<u8>> {
            let burst = self.ring.burst().unwrap();
            let packets: Vec<_> = burst.slots.iter().map(|slot| slot.frame().to_vec()).collect();
            drop(burst);
            self.ring.release(packets.len());
            packets
        }
    }

    fn packet(number: u8) -> Vec<u8> {
        vec![number; 60 + usize::from(number)]
    }

    #[test]
    fn the_ring_wraps_and_blocks_have_a_rest() {
        let mut image = Image::new();
        assert!(image.take().is_empty());
        // Bursts of every length, from every place.
        let mut number = 0;
        for length in (1..=6).cycle().take(60) {
            let packets: Vec<_> = (0..length)
                .map(|_| {
                    number = (number + 1) % 200;
                    packet(number)
                })
                .collect();
            for packet in &packets {
                assert!(image.receive(packet, |_| {}));
            }
            assert_eq!(image.take(), packets);
            assert!(image.take().is_empty());
        }
    }

    #[test]
    fn a_full_ring_takes_no_more_until_it_is_released() {
        let mut image = Image::new();
        let packets: Vec<_> = (0..6).map(packet).collect();
        assert!(packets.iter().all(|packet| image.receive(packet, |_| {})));
        assert!(!image.receive(&packet(9), |_| {}));
        // What is not released comes again.
        assert_eq!(image.ring.burst().unwrap().slots.len(), 6);
        image.ring.release(2);
        assert!(image.receive(&packet(6), |_| {}) && image.receive(&packet(7), |_| {}));
        assert!(!image.receive(&packet(8), |_| {}));
        assert_eq!(image.take(), (2..8).map(packet).collect::<Vec<_>>());
    }

    #[test]
    fn a_frame_that_the_kernel_still_writes_ends_the_burst() {
        let mut image = Image::new();
        assert!(image.receive(&packet(1), |_| {}));
        // Another processor was faster: the frame behind is ready.
        assert!(image.receive(&packet(2), |header| header.tp_status = libc::TP_STATUS_KERNEL));
        assert!(image.receive(&packet(3), |_| {}));
        assert_eq!(image.take(), [packet(1)]);
        assert!(image.take().is_empty());
        let second = Cursor { block: 0, frame: 1 }.offset(&SMALL);
        image.ring.status(second).store(libc::TP_STATUS_USER, Ordering::Release);
        assert_eq!(image.take(), [packet(2), packet(3)]);
    }

    #[test]
    fn a_tag_is_put_back() {
        let tagged = |tag: &[u8]| {
            let mut packet = packet(5);
            packet.splice(12..12, tag.iter().copied());
            packet
        };
        let mut image = Image::new();
        image.receive(&packet(5), |header| {
            header.tp_status |= libc::TP_STATUS_VLAN_VALID;
            header.tp_vlan_tci = 0x2007;
        });
        image.receive(&packet(5), |header| {
            header.tp_status |= libc::TP_STATUS_VLAN_VALID | libc::TP_STATUS_VLAN_TPID_VALID;
            (header.tp_vlan_tci, header.tp_vlan_tpid) = (9, 0x88a8);
        });
        assert_eq!(image.take(), [tagged(&[0x81, 0, 0x20, 7]), tagged(&[0x88, 0xa8, 0, 9])]);
    }

    #[test]
    fn a_packet_longer_than_a_frame_is_cut_and_said_to_be() {
        let mut image = Image::new();
        image.receive(&packet(1), |_| {});
        image.receive(&[7; 1500], |_| {});
        let burst = image.ring.burst().unwrap();
        assert_eq!(burst.cut[..], [1]);
        assert_eq!(burst.slots[1].frame(), vec![7; SMALL.frame_len - MAC_AT]);
    }

    #[test]
    fn a_checksum_is_completed_only_where_it_is_not_ready() {
        let mut whole = Vec::new();
        let builder = PacketBuilder::ethernet2([2; 6], [4; 6]).ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64);
        builder.udp(1000, 80).write(&mut whole, b"payload").unwrap();
        let mut image = Image::new();
        image.receive(&whole, |_| {});
        image.receive(&whole, |header| header.tp_status |= libc::TP_STATUS_CSUMNOTREADY);
        let packets = image.take();
        assert_eq!(packets[0], whole);
        assert_ne!(packets[1], whole);
    }

    #[test]
    fn what_cannot_be_is_an_error() {
        type Change = fn(&mut libc::tpacket2_hdr);
        let rows: [(&str, Change); 6] = [
            ("at 51 of", |header| header.tp_mac = 51),
            ("at 0 of", |header| header.tp_mac = 0),
            ("at 65535 of", |header| header.tp_mac = u16::MAX),
            ("puts 4294967295 bytes", |header| header.tp_snaplen = u32::MAX),
            ("puts 321 bytes at 128 of a frame of 448", |header| header.tp_snaplen = 321),
            ("and has its tag", |header| {
                header.tp_status |= libc::TP_STATUS_VLAN_VALID;
                header.tp_mac = 55;
            }),
        ];
        for (expected, change) in rows {
            let mut image = Image::new();
            image.receive(&packet(1), |_| {});
            image.receive(&packet(2), change);
            let reason = image.ring.burst().unwrap_err();
            assert!(reason.contains(expected), "{reason}");
        }
        // The last byte of a frame is still in it.
        let mut image = Image::new();
        image.receive(&packet(1), |header| header.tp_snaplen = 320);
        assert_eq!(image.take()[0].len(), 320);
    }

    #[test]
    fn frames_hold_the_longest_packet_with_its_tags() {
        for mtu in [68, 1280, 1500, 9000, 65_535] {
            let geometry = Geometry::new(mtu).unwrap();
            assert!(geometry.frame_len >= MAC_AT + fast::MAX_LINK_LEN + mtu as usize);
            assert!(geometry.frames_per_block * geometry.frame_len <= geometry.block_len);
            assert!(geometry.frames() >= BURST);
            let request = geometry.request();
            assert_eq!(
                request.tp_frame_nr,
                request.tp_block_size / request.tp_frame_size * request.tp_block_nr
            );
            assert!(request.tp_frame_size.is_multiple_of(libc::TPACKET_ALIGNMENT as u32));
        }
        assert_eq!(Geometry::new(1 << 20), None);
        assert_eq!(Geometry::new(u32::MAX), None);
    }
}
