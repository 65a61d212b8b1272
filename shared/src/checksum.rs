//! The Internet checksum (RFC 1071), whole and incremental (RFC 1624).

/// Adds `bytes` to a running sum of 16-bit big-endian words; an odd last byte counts as the high half of a word.
#[inline]
pub fn add(mut sum: u32, bytes: &[u8]) -> u32 {
    let mut words = bytes.chunks_exact(2);
    for word in &mut words {
        sum += u32::from(u16::from_be_bytes([word[0], word[1]]));
    }
    if let [last] = words.remainder() {
        sum += u32::from(u16::from_be_bytes([*last, 0]));
    }
    // Fold now and then, so that no packet is long enough to overflow the sum.
    (sum & 0xffff) + (sum >> 16)
}

/// Folds a running sum to the 16-bit value that is written into a header.
pub const fn finish(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// The checksum of `bytes`. Over a header that carries a right checksum the result is 0.
#[inline]
pub fn of(bytes: &[u8]) -> u16 {
    finish(add(0, bytes))
}

/// The checksum after one 16-bit word of the covered data has changed (RFC 1624, equation 3).
pub const fn update(checksum: u16, old: u16, new: u16) -> u16 {
    finish(!checksum as u32 + !old as u32 + new as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_example_of_rfc_1071() {
        assert_eq!(of(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
    }

    proptest! {
        #[test]
        fn agrees_with_etherparse(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let expected = etherparse::checksum::Sum16BitWords::new().add_slice(&bytes).ones_complement();
            prop_assert_eq!(of(&bytes), expected.to_be());
        }

        #[test]
        fn incremental_equals_full(mut bytes in proptest::collection::vec(any::<u8>(), 20), at in 1usize..10, new: u16) {
            let before = of(&bytes);
            let word = [bytes[2 * at], bytes[2 * at + 1]];
            bytes[2 * at..2 * at + 2].copy_from_slice(&new.to_be_bytes());
            // The two zeros of ones' complement stand for the same sum.
            let same = |a: u16, b: u16| a == b || (a == 0 && b == 0xffff) || (a == 0xffff && b == 0);
            prop_assert!(same(update(before, u16::from_be_bytes(word), new), of(&bytes)));
        }
    }
}
