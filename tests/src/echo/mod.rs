//! Long-lived connections that keep talking, and check every byte that comes back.
//!
//! The server greets with its name and a line feed, and from then on returns what it is sent. The client sends
//! one message at a time per connection: its connection's number, the message's number (both 32 bits,
//! big-endian), and bytes that follow from the two. So every byte can be checked without being kept, and one that
//! strayed from another connection or another time is told from the right one.

pub mod client;
pub mod report;
pub mod server;

/// The length of a message's head.
pub const HEAD_BYTES: usize = 8;

/// Writes message `number` of connection `connection` into `into`; its length is between the bounds, and follows
/// from the two numbers as all else does.
pub fn message(connection: u32, number: u32, bytes: (usize, usize), into: &mut Vec<u8>) {
    let mut state = Random(u64::from(connection) << 32 | u64::from(number));
    let (least, most) = bytes;
    let length = least + (state.next() as usize) % (most - least + 1);
    into.clear();
    into.extend_from_slice(&connection.to_be_bytes());
    into.extend_from_slice(&number.to_be_bytes());
    while into.len() < length {
        let random = state.next().to_le_bytes();
        let take = random.len().min(length - into.len());
        into.extend_from_slice(&random[..take]);
    }
}

/// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_numbered_bounded_and_their_own() {
        let (mut one, mut other) = (Vec::new(), Vec::new());
        let mut lengths = std::collections::BTreeSet::new();
        for number in 0..200 {
            message(7, number, (64, 512), &mut one);
            assert_eq!(one[..4], 7u32.to_be_bytes());
            assert_eq!(one[4..8], number.to_be_bytes());
            assert!((64..=512).contains(&one.len()));
            lengths.insert(one.len());
            message(7, number, (64, 512), &mut other);
            assert_eq!(one, other);
            message(8, number, (64, 512), &mut other);
            assert_ne!(one[8..24], other[8..24]);
        }
        assert!(lengths.len() > 50);
        message(1, 1, (8, 8), &mut one);
        assert_eq!(one, [0, 0, 0, 1, 0, 0, 0, 1]);
    }
}
