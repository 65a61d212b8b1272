//! The frames that the sockets of one thread share, and where each of them is.
//!
//! Every frame is in one place at any time ([`Place`]). That the kernel hands back a frame which it does not have, or
//! that a frame is missing in the end, is an error.

use std::io;

use super::super::FRAME_START;
use super::super::sys::Mapping;
use super::ring::RING_LEN;
use daisy_shared::wire::fast;

/// Length in bytes of a frame with all room around it: one page, as drivers want.
pub const FRAME_LEN: usize = 4096;
/// Room that the kernel keeps before what we ask for (`XDP_PACKET_HEADROOM`).
const KERNEL_HEADROOM: usize = 256;
/// The longest packet without link-layer header that fits a frame.
pub const MAX_IP_LEN: usize = FRAME_LEN - KERNEL_HEADROOM - FRAME_START - fast::MAX_LINK_LEN;
/// Frames for each socket: as many as may wait to be received into and to be sent, so that neither ever has to wait
/// for the other.
const FRAMES_PER_PORT: u32 = 2 * RING_LEN;

/// Where a frame is. Sockets are numbered within their thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// With us, unused.
    Free,
    /// With the kernel, to be received into by this socket.
    Fill(u16),
    /// With us, in the burst at hand.
    Burst,
    /// With the kernel, to be sent by this socket.
    Send(u16),
}

/// Frames with the kernel for one socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// To be received into.
    pub fill: u32,
    /// To be sent.
    pub send: u32,
}

/// The frames of one thread.
#[derive(Debug)]
pub struct Umem {
    memory: Mapping,
    places: Box<[Place]>,
    free: Vec<u32>,
    held: Box<[Held]>,
}

/// The frame that an address lies in.
pub fn frame_at(address: u64) -> u32 {
    (address / FRAME_LEN as u64) as u32
}

/// The address of a frame.
pub fn address_of(frame: u32) -> u64 {
    u64::from(frame) * FRAME_LEN as u64
}

impl Umem {
    /// Frames for so many sockets, all free.
    pub fn new(ports: usize) -> io::Result<Umem> {
        let frames = ports as u32 * FRAMES_PER_PORT;
        let memory = Mapping::anonymous(frames as usize * FRAME_LEN)?;
        memory.advise_huge_pages();
        Ok(Umem {
            memory,
            places: vec![Place::Free; frames as usize].into(),
            // The first frames are used first.
            free: (0..frames).rev().collect(),
            held: vec![Held::default(); ports].into(),
        })
    }

    /// The memory of all frames.
    pub fn memory(&self) -> &Mapping {
        &self.memory
    }

    /// What the kernel has for a socket.
    pub fn held(&self, port: u16) -> Held {
        self.held[usize::from(port)]
    }

    /// Notes that a frame has moved.
    ///
    /// # Errors
    /// If it was elsewhere, or is none.
    #[inline]
    pub fn move_to(&mut self, frame: u32, from: Place, to: Place) -> Result<(), String> {
        let place =
            self.places.get_mut(frame as usize).ok_or_else(|| format!("no frame has number {frame}"))?;
        if *place != from {
            return Err(format!("frame {frame} is to move from {from:?} to {to:?}, but is in {place:?}"));
        }
        *place = to;
        if let Some(count) = self.count(from) {
            *count -= 1;
        }
        match self.count(to) {
            Some(count) => *count += 1,
            None if to == Place::Free => self.free.push(frame),
            None => {}
        }
        Ok(())
    }

    /// Takes an unused frame.
    pub fn take(&mut self, to: Place) -> Option<u32> {
        let frame = self.free.pop()?;
        self.places[frame as usize] = to;
        if let Some(count) = self.count(to) {
            *count += 1;
        }
        Some(frame)
    }

    fn count(&mut self, place: Place) -> Option<&mut u32> {
        match place {
            Place::Fill(port) => Some(&mut self.held[usize::from(port)].fill),
            Place::Send(port) => Some(&mut self.held[usize::from(port)].send),
            Place::Free | Place::Burst => None,
        }
    }

    /// How many frames there are, are free, are with the kernel to be filled, and to be sent.
    pub fn totals(&self) -> [u32; 4] {
        let (fill, send) = self.held.iter().fold((0, 0), |(f, s), held| (f + held.fill, s + held.send));
        [self.places.len() as u32, self.free.len() as u32, fill, send]
    }

    /// Where the frames are, in words.
    pub fn accounts(&self) -> String {
        let [all, free, fill, send] = self.totals();
        let burst = self.places.iter().filter(|place| **place == Place::Burst).count();
        format!("{all} in all, {free} free, {fill} to fill, {send} to send, {burst} in hand")
    }

    /// Whether, between bursts, every frame is free or with the kernel, each once.
    pub fn are_all_there(&self) -> bool {
        let [all, free, fill, send] = self.totals();
        let counted = |place| self.places.iter().filter(|other| **other == place).count() as u32;
        let of_ports = (0..self.held.len() as u16).all(|port| {
            let held = self.held(port);
            counted(Place::Fill(port)) == held.fill && counted(Place::Send(port)) == held.send
        });
        free + fill + send == all && counted(Place::Free) == free && of_ports
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_in_one_place() {
        let mut umem = Umem::new(2).unwrap();
        let [all, ..] = umem.totals();
        assert!(umem.are_all_there());
        let frame = umem.take(Place::Fill(0)).unwrap();
        assert_eq!((frame, umem.held(0).fill, umem.are_all_there()), (0, 1, true));
        umem.move_to(frame, Place::Fill(0), Place::Burst).unwrap();
        assert!(!umem.are_all_there());
        // Received by one socket, sent by another.
        umem.move_to(frame, Place::Burst, Place::Send(1)).unwrap();
        assert_eq!((umem.held(0), umem.held(1)), (Held::default(), Held { fill: 0, send: 1 }));
        assert!(umem.are_all_there());
        let error = umem.move_to(frame, Place::Send(0), Place::Free).unwrap_err();
        assert!(error.contains("is in Send(1)"), "{error}");
        umem.move_to(frame, Place::Send(1), Place::Free).unwrap();
        assert!(umem.move_to(frame, Place::Send(1), Place::Free).unwrap_err().contains("is in Free"));
        assert!(umem.move_to(all, Place::Free, Place::Burst).is_err());
        assert_eq!(umem.totals(), [all, all, 0, 0]);
    }

    #[test]
    fn addresses_and_frames() {
        for (address, frame) in [(0, 0), (FRAME_LEN as u64 - 1, 0), (FRAME_LEN as u64, 1)] {
            assert_eq!(frame_at(address), frame);
        }
        assert_eq!(address_of(3), 3 * FRAME_LEN as u64);
    }
}
