//! The keyed flow hash: it maps a connection to a bucket.
//!
//! SipHash-1-3 (Aumasson and Bernstein, 2012, with 1 compression and 3 finalisation rounds) under a 128-bit key
//! for each service, so that nobody outside can aim at one bucket. The message is, in network byte order,
//!
//! ```text
//! source address ‖ destination address ‖ source port ‖ destination port ‖ protocol ‖ 0 0 0
//! ```
//!
//! which is 16 bytes for IPv4 and 40 for IPv6: whole 64-bit words either way. `shared/vectors/flow_hash.py`
//! computes the same from the description alone; the golden vectors beside it hold Rust, eBPF and Python together.

use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use core::str::FromStr;

use serde::{Deserialize, Serialize};

/// The key of a service's flow hash: 128 bits, written as 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct HashKey(pub [u8; 16]);

impl HashKey {
    /// The key as the two little-endian words of the SipHash paper.
    pub const fn words(self) -> (u64, u64) {
        let k = u128::from_le_bytes(self.0);
        (k as u64, (k >> 64) as u64)
    }
}

/// Not a hash key: the text, which is not 32 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("hash key {0:?} is not 32 hexadecimal digits")]
pub struct BadHashKey(String);

impl FromStr for HashKey {
    type Err = BadHashKey;

    fn from_str(text: &str) -> Result<HashKey, BadHashKey> {
        let digits = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
        match u128::from_str_radix(text, 16) {
            Ok(value) if digits => Ok(HashKey(value.to_be_bytes())),
            _ => Err(BadHashKey(text.to_owned())),
        }
    }
}

impl fmt::Display for HashKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// Keys stay out of logs: whoever holds the key can aim at a bucket.
impl fmt::Debug for HashKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HashKey(…)")
    }
}

impl From<HashKey> for String {
    fn from(key: HashKey) -> String {
        key.to_string()
    }
}

impl TryFrom<String> for HashKey {
    type Error = BadHashKey;

    fn try_from(text: String) -> Result<HashKey, BadHashKey> {
        text.parse()
    }
}

/// The 5-tuple of a flow over IPv4, as the client sends it. Fields are in host byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowV4 {
    /// The client.
    pub source: Ipv4Addr,
    /// The VIP.
    pub destination: Ipv4Addr,
    /// The client's port.
    pub source_port: u16,
    /// The service's port.
    pub destination_port: u16,
    /// The IANA protocol number.
    pub protocol: u8,
}

impl FlowV4 {
    /// What is hashed, as the two little-endian words of the SipHash paper.
    #[inline]
    pub fn message(&self) -> [u64; 2] {
        let address = |address: Ipv4Addr| u64::from(u32::from_le_bytes(address.octets()));
        let port = |port: u16| u64::from(port.swap_bytes());
        [
            address(self.source) | address(self.destination) << 32,
            port(self.source_port) | port(self.destination_port) << 16 | u64::from(self.protocol) << 32,
        ]
    }

    /// The keyed hash of the flow.
    #[inline]
    pub fn hash(&self, key: HashKey) -> u64 {
        siphash13(key.words(), self.message())
    }
}

/// The 5-tuple of a flow over IPv6, as the client sends it. Fields are in host byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowV6 {
    /// The client.
    pub source: Ipv6Addr,
    /// The VIP.
    pub destination: Ipv6Addr,
    /// The client's port.
    pub source_port: u16,
    /// The service's port.
    pub destination_port: u16,
    /// The IANA protocol number.
    pub protocol: u8,
}

impl FlowV6 {
    /// The keyed hash of the flow.
    #[inline]
    pub fn hash(&self, key: HashKey) -> u64 {
        let mut message = [0; 40];
        message[0..16].copy_from_slice(&self.source.octets());
        message[16..32].copy_from_slice(&self.destination.octets());
        message[32..34].copy_from_slice(&self.source_port.to_be_bytes());
        message[34..36].copy_from_slice(&self.destination_port.to_be_bytes());
        message[36] = self.protocol;
        let (words, _) = message.as_chunks::<8>();
        siphash13(key.words(), core::array::from_fn::<_, 5, _>(|i| u64::from_le_bytes(words[i])))
    }
}

/// The hash of a flow given by its addresses, or `None` if they are of different families.
pub fn hash(key: HashKey, source: (IpAddr, u16), destination: (IpAddr, u16), protocol: u8) -> Option<u64> {
    let (source_port, destination_port) = (source.1, destination.1);
    match (source.0, destination.0) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            Some(FlowV4 { source, destination, source_port, destination_port, protocol }.hash(key))
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            Some(FlowV6 { source, destination, source_port, destination_port, protocol }.hash(key))
        }
        _ => None,
    }
}

/// The bucket of a flow: the low bits of its hash. `buckets` is a power of two.
pub const fn bucket_of(hash: u64, buckets: u32) -> u32 {
    hash as u32 & (buckets - 1)
}

/// SipHash-1-3 of a message of whole 64-bit words, under a key of two; see [`HashKey::words`] and
/// [`FlowV4::message`]. Without branches, so that a compiler can make a loop over many messages hash several at once.
#[inline(always)]
pub fn siphash13<const N: usize>((k0, k1): (u64, u64), message: [u64; N]) -> u64 {
    let mut v = [
        k0 ^ 0x736f_6d65_7073_6575,
        k1 ^ 0x646f_7261_6e64_6f6d,
        k0 ^ 0x6c79_6765_6e65_7261,
        k1 ^ 0x7465_6462_7974_6573,
    ];
    for word in message {
        v[3] ^= word;
        round(&mut v);
        v[0] ^= word;
    }
    let length = ((N * 8) as u64) << 56;
    v[3] ^= length;
    round(&mut v);
    v[0] ^= length;
    v[2] ^= 0xff;
    for _ in 0..3 {
        round(&mut v);
    }
    v[0] ^ v[1] ^ v[2] ^ v[3]
}

#[inline(always)]
fn round(v: &mut [u64; 4]) {
    v[0] = v[0].wrapping_add(v[1]);
    v[1] = v[1].rotate_left(13) ^ v[0];
    v[0] = v[0].rotate_left(32);
    v[2] = v[2].wrapping_add(v[3]);
    v[3] = v[3].rotate_left(16) ^ v[2];
    v[0] = v[0].wrapping_add(v[3]);
    v[3] = v[3].rotate_left(21) ^ v[0];
    v[2] = v[2].wrapping_add(v[1]);
    v[1] = v[1].rotate_left(17) ^ v[2];
    v[2] = v[2].rotate_left(32);
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::hash::Hasher;
    use proptest::prelude::*;

    fn library(key: HashKey, message: &[u8]) -> u64 {
        let mut hasher = siphasher::sip::SipHasher13::new_with_key(&key.0);
        hasher.write(message);
        hasher.finish()
    }

    proptest! {
        #[test]
        fn is_siphash_1_3(key: [u8; 16], v4: [u64; 2], v6: [u64; 5]) {
            let bytes = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
            prop_assert_eq!(siphash13(HashKey(key).words(), v4), library(HashKey(key), &bytes(&v4)));
            prop_assert_eq!(siphash13(HashKey(key).words(), v6), library(HashKey(key), &bytes(&v6)));
        }

        #[test]
        fn keys_survive_text(key: [u8; 16]) {
            let key = HashKey(key);
            prop_assert!(key.to_string().parse::<HashKey>() == Ok(key));
        }
    }

    #[test]
    fn bad_keys_are_refused() {
        for text in ["", "00", "+0000000000000000000000000000001", &"g".repeat(32), &"0".repeat(33)] {
            assert!(text.parse::<HashKey>().is_err(), "{text:?}");
        }
    }

    /// The vectors are computed by `shared/vectors/flow_hash.py`, which knows nothing of this code.
    #[test]
    fn golden_vectors() {
        let text = include_str!("../vectors/flow_hash.json");
        let vectors: Vec<serde_json::Value> = serde_json::from_str(text).unwrap();
        assert!(vectors.len() >= 32);
        for vector in vectors {
            let text = |field: &str| vector[field].as_str().unwrap();
            let port = |field: &str| vector[field].as_u64().unwrap() as u16;
            let source = (text("source").parse().unwrap(), port("source_port"));
            let destination = (text("destination").parse().unwrap(), port("destination_port"));
            let protocol = vector["protocol"].as_u64().unwrap() as u8;
            let hash = hash(text("key").parse().unwrap(), source, destination, protocol).unwrap();
            assert_eq!(format!("{hash:016x}"), text("hash"), "{vector}");
            let buckets = vector["buckets"].as_u64().unwrap() as u32;
            assert_eq!(u64::from(bucket_of(hash, buckets)), vector["bucket"].as_u64().unwrap());
        }
    }
}
