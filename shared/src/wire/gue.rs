//! Generic UDP Encapsulation (draft-ietf-intarea-gue, version 0) with the walk as private data.
//!
//! ```text
//!  0                   1                   2                   3
//!  0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//! +---+-+---------+---------------+-------------------------------+
//! | 0 |C|  Hlen   |  Proto/ctype  |             Flags             |
//! +---+-+-+-+-+-+-+---------------+---------------+---------------+
//! |Version|0|T|6|R|   Hop count   |    Visited    |    Owners     |
//! +-------+-+-+-+-+---------------+---------------+---------------+
//! |                       Bucket generation                       |
//! +---------------------------------------------------------------+
//! |                 Address of owner 1 … `Owners`                 |
//! +---------------------------------------------------------------+
//! ```
//!
//! The first word is GUE's own. `Hlen` counts the 32-bit words after it; 0 means no private data, which is how a
//! packet travels in a closed window. `T` (a keyed tag follows) and `6` (addresses of 16 bytes) are reserved: a
//! receiver that does not know a flag drops the packet. `R` is [`Walk::returned`]. The first `Visited` addresses
//! are [`Walk::visited`], the rest [`Walk::to_visit`]. All numbers are in network byte order.
//!
//! `docs/wire.md` numbers the rules for receivers.

use core::net::Ipv4Addr;
use core::ops::Range;

use crate::chain::{Generation, MAX_OWNERS, Owners, Walk};
use crate::drop::DropReason;

/// The default UDP port (IANA: gue).
pub const PORT: u16 = 6080;
/// Length in bytes of the part that is always there.
pub const BASE_LEN: usize = 4;
/// Length in bytes of the private data in front of the addresses.
pub const WALK_BASE_LEN: usize = 8;
/// Length in bytes of the longest header that daisy writes.
pub const MAX_LEN: usize = BASE_LEN + WALK_BASE_LEN + 4 * MAX_OWNERS;
/// The version of the private data.
pub const WALK_VERSION: u8 = 1;
/// Proto: the payload is an IPv4 packet.
pub const PROTO_IPV4: u8 = 4;

/// In the first byte: the GUE version, which is 0.
pub const VERSION_MASK: u8 = 0xc0;
/// In the first byte: a control message.
pub const CONTROL_BIT: u8 = 0x20;
/// In the first byte: the length after the first word, in 32-bit words.
pub const HLEN_MASK: u8 = 0x1f;
/// In the first byte of the private data: the walk has returned to its origin.
pub const FLAG_RETURNED: u8 = 0x01;

/// Where the fields stand.
mod field {
    use super::Range;

    pub const FIRST: usize = 0;
    pub const PROTO: usize = 1;
    pub const FLAGS: Range<usize> = 2..4;
    pub const WALK_FIRST: usize = 4;
    pub const HOPS: usize = 5;
    pub const VISITED: usize = 6;
    pub const OWNERS: usize = 7;
    pub const GENERATION: Range<usize> = 8..12;
    pub const ADDRESSES: usize = 12;
}

/// A GUE data header over IPv4.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The IANA protocol number of the payload.
    pub protocol: u8,
    /// The walk, in an open window.
    pub walk: Option<Walk<Ipv4Addr>>,
}

impl Header {
    /// Length in bytes of this header.
    pub fn len(&self) -> usize {
        let walk = |walk: &Walk<Ipv4Addr>| WALK_BASE_LEN + 4 * (walk.visited.len() + walk.to_visit.len());
        BASE_LEN + self.walk.as_ref().map_or(0, walk)
    }

    /// Always false: a header has at least [`BASE_LEN`] bytes.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Reads the header at the start of a UDP payload. The inner packet starts [`Header::len`] bytes into it.
    ///
    /// # Errors
    /// [`DropReason::Truncated`], [`DropReason::GueUnsupported`] or [`DropReason::GueMalformed`].
    pub fn parse(bytes: &[u8]) -> Result<Header, DropReason> {
        let base: &[u8; BASE_LEN] = bytes.first_chunk().ok_or(DropReason::Truncated)?;
        let first = base[field::FIRST];
        if first & (VERSION_MASK | CONTROL_BIT) != 0 || base[field::FLAGS] != [0, 0] {
            return Err(DropReason::GueUnsupported);
        }
        let protocol = base[field::PROTO];
        if protocol != PROTO_IPV4 {
            return Err(DropReason::GueUnsupported);
        }
        let len = BASE_LEN + 4 * usize::from(first & HLEN_MASK);
        let header = bytes.get(..len).ok_or(DropReason::Truncated)?;
        if len == BASE_LEN {
            return Ok(Header { protocol, walk: None });
        }
        if len < BASE_LEN + WALK_BASE_LEN {
            return Err(DropReason::GueMalformed);
        }
        let flags = header[field::WALK_FIRST];
        if flags >> 4 != WALK_VERSION || flags & 0x0f & !FLAG_RETURNED != 0 {
            return Err(DropReason::GueUnsupported);
        }
        let visited = usize::from(header[field::VISITED]);
        let owners = usize::from(header[field::OWNERS]);
        if owners > MAX_OWNERS || visited > owners || len != field::ADDRESSES + 4 * owners {
            return Err(DropReason::GueMalformed);
        }
        let returned = flags & FLAG_RETURNED != 0;
        if returned && (visited == 0 || visited != owners) {
            return Err(DropReason::GueMalformed);
        }
        let (addresses, _) = header[field::ADDRESSES..].as_chunks::<4>();
        let list =
            |part: &[[u8; 4]]| part.iter().map(|octets| Ipv4Addr::from(*octets)).collect::<Owners<_>>();
        let generation = header[field::GENERATION].try_into().map_err(|_| DropReason::Truncated)?;
        Ok(Header {
            protocol,
            walk: Some(Walk {
                generation: Generation(u32::from_be_bytes(generation)),
                hops: header[field::HOPS],
                returned,
                visited: list(&addresses[..visited]),
                to_visit: list(&addresses[visited..]),
            }),
        })
    }

    /// Writes the header to the start of `out`.
    ///
    /// # Panics
    /// If `out` is shorter than [`Header::len`], or if the walk lists more than [`MAX_OWNERS`] owners.
    pub fn emit(&self, out: &mut [u8]) {
        let len = self.len();
        assert!(len <= MAX_LEN, "a walk of more than {MAX_OWNERS} owners");
        let out = &mut out[..len];
        out[field::FIRST] = ((len - BASE_LEN) / 4) as u8;
        out[field::PROTO] = self.protocol;
        out[field::FLAGS].fill(0);
        let Some(walk) = &self.walk else { return };
        out[field::WALK_FIRST] = WALK_VERSION << 4 | if walk.returned { FLAG_RETURNED } else { 0 };
        out[field::HOPS] = walk.hops;
        out[field::VISITED] = walk.visited.len() as u8;
        out[field::OWNERS] = (walk.visited.len() + walk.to_visit.len()) as u8;
        out[field::GENERATION].copy_from_slice(&walk.generation.0.to_be_bytes());
        let (addresses, _) = out[field::ADDRESSES..].as_chunks_mut::<4>();
        for (place, owner) in addresses.iter_mut().zip(walk.visited.iter().chain(&walk.to_visit)) {
            *place = owner.octets();
        }
    }
}

/// Length in bytes of [`one_to_visit`].
pub const ONE_TO_VISIT_LEN: usize = BASE_LEN + WALK_BASE_LEN + 4;

/// The header that a mux writes in an open window: an IPv4 packet follows, nobody was visited, one owner is to be.
#[inline]
pub fn one_to_visit(generation: Generation, owner: Ipv4Addr) -> [u8; ONE_TO_VISIT_LEN] {
    let mut out = [0; ONE_TO_VISIT_LEN];
    out[field::FIRST] = ((ONE_TO_VISIT_LEN - BASE_LEN) / 4) as u8;
    out[field::PROTO] = PROTO_IPV4;
    out[field::WALK_FIRST] = WALK_VERSION << 4;
    out[field::OWNERS] = 1;
    out[field::GENERATION].copy_from_slice(&generation.0.to_be_bytes());
    out[field::ADDRESSES..].copy_from_slice(&owner.octets());
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn walks() -> impl Strategy<Value = Walk<Ipv4Addr>> {
        let list = proptest::collection::vec(any::<[u8; 4]>().prop_map(Ipv4Addr::from), 0..=MAX_OWNERS);
        (any::<u32>(), any::<u8>(), any::<bool>(), list, 0..=MAX_OWNERS).prop_map(
            |(generation, hops, returned, list, visited)| {
                let returned = returned && !list.is_empty();
                let visited = if returned { list.len() } else { visited.min(list.len()) };
                Walk {
                    generation: Generation(generation),
                    hops,
                    returned,
                    visited: list[..visited].iter().copied().collect(),
                    to_visit: list[visited..].iter().copied().collect(),
                }
            },
        )
    }

    #[test]
    fn the_bytes_of_a_closed_and_an_open_window() {
        let mut out = [0xff; MAX_LEN];
        Header { protocol: PROTO_IPV4, walk: None }.emit(&mut out);
        assert_eq!(out[..4], [0x00, 0x04, 0x00, 0x00]);
        let walk = Walk {
            generation: Generation(0x0102_0304),
            hops: 2,
            returned: false,
            visited: [Ipv4Addr::new(10, 0, 0, 1)].into_iter().collect(),
            to_visit: [Ipv4Addr::new(10, 0, 0, 2)].into_iter().collect(),
        };
        Header { protocol: PROTO_IPV4, walk: Some(walk) }.emit(&mut out);
        let expected =
            [0x04, 0x04, 0, 0, 0x10, 0x02, 0x01, 0x02, 0x01, 0x02, 0x03, 0x04, 10, 0, 0, 1, 10, 0, 0, 2];
        assert_eq!(out[..20], expected);
    }

    #[test]
    fn each_malformed_header_has_its_reason() {
        let rows: &[(&str, &[u8], DropReason)] = &[
            ("empty", &[], DropReason::Truncated),
            ("three bytes", &[0, 4, 0], DropReason::Truncated),
            ("version 1", &[0x40, 4, 0, 0], DropReason::GueUnsupported),
            ("control", &[0x20, 4, 0, 0], DropReason::GueUnsupported),
            ("flags", &[0, 4, 0x80, 0], DropReason::GueUnsupported),
            ("IPv6 payload", &[0, 41, 0, 0], DropReason::GueUnsupported),
            ("Hlen lies", &[2, 4, 0, 0, 0x10, 0, 0, 0], DropReason::Truncated),
            ("private data of one word", &[1, 4, 0, 0, 0x10, 0, 0, 0], DropReason::GueMalformed),
            ("walk version 2", &[2, 4, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 1], DropReason::GueUnsupported),
            ("tag flag", &[2, 4, 0, 0, 0x14, 0, 0, 0, 0, 0, 0, 1], DropReason::GueUnsupported),
            ("owners lie", &[2, 4, 0, 0, 0x10, 0, 0, 1, 0, 0, 0, 1], DropReason::GueMalformed),
            ("visited lies", &[3, 4, 0, 0, 0x10, 0, 2, 1, 0, 0, 0, 1, 10, 0, 0, 1], DropReason::GueMalformed),
            ("returned to nobody", &[2, 4, 0, 0, 0x11, 0, 0, 0, 0, 0, 0, 1], DropReason::GueMalformed),
            (
                "returned too early",
                &[3, 4, 0, 0, 0x11, 0, 0, 1, 0, 0, 0, 1, 10, 0, 0, 1],
                DropReason::GueMalformed,
            ),
        ];
        for (what, bytes, reason) in rows {
            assert_eq!(Header::parse(bytes), Err(*reason), "{what}");
        }
    }

    proptest! {
        #[test]
        fn one_to_visit_is_what_emit_writes(generation: u32, owner: [u8; 4]) {
            let (generation, owner) = (Generation(generation), Ipv4Addr::from(owner));
            let walk = Walk {
                generation,
                hops: 0,
                returned: false,
                visited: Owners::new(),
                to_visit: [owner].into_iter().collect(),
            };
            let mut out = [0xee; ONE_TO_VISIT_LEN];
            Header { protocol: PROTO_IPV4, walk: Some(walk) }.emit(&mut out);
            prop_assert_eq!(out, one_to_visit(generation, owner));
        }

        #[test]
        fn parse_undoes_emit(walk in proptest::option::of(walks())) {
            let header = Header { protocol: PROTO_IPV4, walk };
            let mut out = [0xff; MAX_LEN];
            header.emit(&mut out);
            prop_assert_eq!(Header::parse(&out), Ok(header.clone()));
            for cut in 0..header.len() {
                prop_assert_eq!(Header::parse(&out[..cut]), Err(DropReason::Truncated));
            }
        }

        #[test]
        fn any_bytes_are_refused_or_survive_a_round_trip(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            if let Ok(header) = Header::parse(&bytes) {
                let mut out = [0; MAX_LEN];
                header.emit(&mut out);
                prop_assert_eq!(&out[..header.len()], &bytes[..header.len()]);
            }
        }
    }
}
