//! Buckets: the word that a mux reads for each packet, the table of them, and the pieces in which tables travel.

use core::fmt;
use core::ops::{Deref, Range};
use std::sync::atomic::{AtomicU64, Ordering};

use arrayvec::ArrayVec;
use serde::{Deserialize, Serialize};

use crate::chain::{Generation, MAX_CHAIN};
use crate::service::{ServiceId, is_bucket_count};

/// The number of a backend in the directory. Given by the controller, and not used again while a table or a node
/// may still name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BackendId(pub u16);

impl BackendId {
    /// Nobody.
    pub const NONE: BackendId = BackendId(u16::MAX);

    /// This backend, or `None` if it is nobody.
    pub fn some(self) -> Option<BackendId> {
        (self != BackendId::NONE).then_some(self)
    }
}

impl fmt::Display for BackendId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The owners of a bucket, newest first. Empty only where the service has no backend at all.
pub type Chain = ArrayVec<BackendId, MAX_CHAIN>;

/// What a mux knows of a bucket, in one word that is read and written whole:
/// `head:16 | previous:16 | generation:32`, the head in the highest bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BucketWord(u64);

impl BucketWord {
    /// The word of a bucket that nobody owns and that never changed.
    pub const EMPTY: BucketWord = BucketWord::new(BackendId::NONE, BackendId::NONE, Generation(0));

    /// Packs a word.
    pub const fn new(head: BackendId, previous: BackendId, generation: Generation) -> BucketWord {
        BucketWord((head.0 as u64) << 48 | (previous.0 as u64) << 32 | generation.0 as u64)
    }

    /// The owner that takes new connections.
    pub const fn head(self) -> BackendId {
        BackendId((self.0 >> 48) as u16)
    }

    /// The newest previous owner, [`BackendId::NONE`] in a closed window.
    pub const fn previous(self) -> BackendId {
        BackendId((self.0 >> 32) as u16)
    }

    /// When the chain last changed.
    pub const fn generation(self) -> Generation {
        Generation(self.0 as u32)
    }
}

impl From<&Entry> for BucketWord {
    fn from(entry: &Entry) -> BucketWord {
        let owner = |i| entry.chain.get(i).copied().unwrap_or(BackendId::NONE);
        BucketWord::new(owner(0), owner(1), entry.generation)
    }
}

/// A mux's table. Words are read and written one at a time, each whole, while packets flow: no order among
/// buckets is promised, and the chain protocol needs none.
///
/// The words lie in memory of the caller's choosing: a mux has them where huge pages are, or where an eBPF program
/// reads them.
#[derive(Debug)]
pub struct BucketTable<W = Box<[AtomicU64]>> {
    words: W,
}

impl BucketTable {
    /// A table of which nothing is known yet.
    ///
    /// # Panics
    /// If `buckets` is not a bucket count, see [`is_bucket_count`].
    pub fn new(buckets: u32) -> BucketTable {
        BucketTable::in_words((0..buckets).map(|_| AtomicU64::new(0)).collect())
    }
}

impl<W: Deref<Target = [AtomicU64]>> BucketTable<W> {
    /// A table of which nothing is known yet, in these words, whatever they hold.
    ///
    /// # Panics
    /// If the number of words is not a bucket count, see [`is_bucket_count`].
    pub fn in_words(words: W) -> BucketTable<W> {
        assert!(u32::try_from(words.len()).is_ok_and(is_bucket_count), "{} buckets", words.len());
        for word in words.iter() {
            word.store(BucketWord::EMPTY.0, Ordering::Relaxed);
        }
        BucketTable { words }
    }

    /// The memory that the words lie in.
    pub fn words(&self) -> &W {
        &self.words
    }

    /// How many buckets the table has.
    pub fn buckets(&self) -> u32 {
        self.words.len() as u32
    }

    /// The position of the bucket that `hash` falls into.
    #[inline]
    pub fn position(&self, hash: u64) -> usize {
        // The length is a power of two; the mask keeps the index inside.
        hash as usize & (self.words.len() - 1)
    }

    /// The word of the bucket that `hash` falls into.
    #[inline]
    pub fn lookup(&self, hash: u64) -> BucketWord {
        BucketWord(self.words[self.position(hash)].load(Ordering::Relaxed))
    }

    /// Sets the words of a piece's entries.
    ///
    /// # Panics
    /// If an entry's bucket is not in the table. [`Piece::decode`] lets none through.
    pub fn apply(&self, entries: &[Entry]) {
        for entry in entries {
            self.words[entry.bucket as usize].store(BucketWord::from(entry).0, Ordering::Relaxed);
        }
    }
}

/// One bucket in a piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The bucket's number.
    pub bucket: u32,
    /// When its chain last changed.
    pub generation: Generation,
    /// Its owners. A piece for a mux carries at most two, all that it uses.
    pub chain: Chain,
}

/// A snapshot or a delta of one service's table, as it travels to a node and lies on its disk.
///
/// ```text
/// "DSYT" | version:8 | kind:8 | 0:16 | service:32 | from:32 | generation:32 | buckets:32 | entries:32
/// entry: bucket:32 | generation:32 | owners:8 | owner:16 …
/// CRC-32 (IEEE) of all before it
/// ```
///
/// All numbers in network byte order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The service whose table this is.
    pub service: ServiceId,
    /// For a delta: the generation that the receiver must have. `None` for a snapshot.
    pub from: Option<Generation>,
    /// The table's generation once the piece is applied.
    pub generation: Generation,
    /// How many buckets the table has.
    pub buckets: u32,
    /// The buckets that the receiver needs to know, in ascending order.
    pub entries: Vec<Entry>,
}

/// Why bytes are not a [`Piece`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PieceError {
    /// The bytes end too early.
    #[error("table piece ends after {0} bytes, inside a field")]
    Truncated(usize),
    /// The bytes do not begin like a piece.
    #[error("not a table piece: begins with {0:02x?}")]
    Magic([u8; 4]),
    /// A version that this program does not read.
    #[error("table piece of version {0}, this program reads version {VERSION}")]
    Version(u8),
    /// A field holds what it cannot.
    #[error("table piece: {field} is {value}")]
    Field {
        /// Which field.
        field: &'static str,
        /// What it holds.
        value: u64,
    },
    /// The checksum is wrong.
    #[error("table piece: checksum {found:08x}, should be {expected:08x}")]
    Checksum {
        /// Computed over the bytes.
        expected: u32,
        /// Read from the end.
        found: u32,
    },
}

const MAGIC: [u8; 4] = *b"DSYT";
const VERSION: u8 = 1;
const HEADER_LEN: usize = 28;

impl Piece {
    /// The piece as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_LEN + self.entries.len() * 13 + 4);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&[VERSION, self.from.is_some().into(), 0, 0]);
        let from = self.from.unwrap_or_default();
        for word in [self.service.0, from.0, self.generation.0, self.buckets, self.entries.len() as u32] {
            out.extend_from_slice(&word.to_be_bytes());
        }
        for entry in &self.entries {
            out.extend_from_slice(&entry.bucket.to_be_bytes());
            out.extend_from_slice(&entry.generation.0.to_be_bytes());
            out.push(entry.chain.len() as u8);
            for owner in &entry.chain {
                out.extend_from_slice(&owner.0.to_be_bytes());
            }
        }
        let checksum = crc32fast::hash(&out);
        out.extend_from_slice(&checksum.to_be_bytes());
        out
    }

    /// Reads a piece. What comes back is well-formed: buckets within the table and ascending, chains within
    /// [`MAX_CHAIN`] that name nobody twice.
    ///
    /// # Errors
    /// [`PieceError`]; nothing of a piece with an error is to be used.
    pub fn decode(bytes: &[u8]) -> Result<Piece, PieceError> {
        let bad = |field, value: u64| PieceError::Field { field, value };
        let mut reader = Reader { bytes, at: 0 };
        let magic = reader.take::<4>()?;
        if magic != MAGIC {
            return Err(PieceError::Magic(magic));
        }
        let [version, kind, ..] = reader.take::<4>()?;
        if version != VERSION {
            return Err(PieceError::Version(version));
        }
        let (body, found) = bytes.split_last_chunk().ok_or(PieceError::Truncated(bytes.len()))?;
        let (expected, found) = (crc32fast::hash(body), u32::from_be_bytes(*found));
        if expected != found {
            return Err(PieceError::Checksum { expected, found });
        }
        reader.bytes = body;
        let service = ServiceId(reader.u32()?);
        let from = Generation(reader.u32()?);
        let from = match kind {
            0 => None,
            1 => Some(from),
            other => return Err(bad("kind", other.into())),
        };
        let generation = Generation(reader.u32()?);
        let buckets = reader.u32()?;
        if !is_bucket_count(buckets) {
            return Err(bad("bucket count", buckets.into()));
        }
        let count = reader.u32()?;
        if count > buckets {
            return Err(bad("number of entries", count.into()));
        }
        let mut entries = Vec::with_capacity(count as usize);
        let mut least = 0;
        for _ in 0..count {
            let bucket = reader.u32()?;
            if bucket < least || bucket >= buckets {
                return Err(bad("bucket", bucket.into()));
            }
            least = bucket + 1;
            let generation = Generation(reader.u32()?);
            let [owners] = reader.take()?;
            let mut chain = Chain::new();
            for _ in 0..owners {
                let owner = BackendId(u16::from_be_bytes(reader.take()?));
                if owner == BackendId::NONE || chain.contains(&owner) || chain.try_push(owner).is_err() {
                    return Err(bad("owner", owner.0.into()));
                }
            }
            entries.push(Entry { bucket, generation, chain });
        }
        if reader.at != body.len() {
            return Err(bad("bytes after the last entry", (body.len() - reader.at) as u64));
        }
        Ok(Piece { service, from, generation, buckets, entries })
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], PieceError> {
        let range: Range<usize> = self.at..self.at + N;
        let field = self.bytes.get(range).ok_or(PieceError::Truncated(self.bytes.len()))?;
        self.at += N;
        field.try_into().map_err(|_| PieceError::Truncated(self.bytes.len()))
    }

    fn u32(&mut self) -> Result<u32, PieceError> {
        self.take().map(u32::from_be_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn chains() -> impl Strategy<Value = Chain> {
        proptest::collection::btree_set(0u16..50, 0..=MAX_CHAIN)
            .prop_map(|owners| owners.into_iter().rev().map(BackendId).collect())
    }

    fn pieces() -> impl Strategy<Value = Piece> {
        let entries = proptest::collection::btree_map(0u32..64, (any::<u32>(), chains()), 0..64);
        (any::<u32>(), any::<Option<u32>>(), any::<u32>(), entries).prop_map(
            |(service, from, generation, entries)| {
                let entry = |(bucket, (generation, chain))| Entry {
                    bucket,
                    generation: Generation(generation),
                    chain,
                };
                Piece {
                    service: ServiceId(service),
                    from: from.map(Generation),
                    generation: Generation(generation),
                    buckets: 64,
                    entries: entries.into_iter().map(entry).collect(),
                }
            },
        )
    }

    /// The bytes with a right checksum again, so that what is behind it is reached.
    fn reseal(bytes: &mut [u8]) {
        let (body, checksum) = bytes.split_last_chunk_mut().unwrap();
        *checksum = crc32fast::hash(body).to_be_bytes();
    }

    proptest! {
        #[test]
        fn decode_undoes_encode(piece in pieces()) {
            prop_assert_eq!(Piece::decode(&piece.encode()), Ok(piece));
        }

        #[test]
        fn one_changed_byte_or_a_cut_is_noticed(piece in pieces(), at: prop::sample::Index, change in 1u8..) {
            let mut bytes = piece.encode();
            let at = at.index(bytes.len());
            bytes[at] ^= change;
            prop_assert!(Piece::decode(&bytes).is_err());
            bytes[at] ^= change;
            prop_assert!(Piece::decode(&bytes[..at]).is_err());
        }

        #[test]
        fn whatever_decodes_is_well_formed(piece in pieces(), at: prop::sample::Index, value: u8) {
            let mut bytes = piece.encode();
            let at = at.index(bytes.len());
            bytes[at] = value;
            reseal(&mut bytes);
            if let Ok(piece) = Piece::decode(&bytes) {
                BucketTable::new(piece.buckets).apply(&piece.entries);
            }
        }

        #[test]
        fn words_hold_what_was_packed(head: u16, previous: u16, generation: u32) {
            let word = BucketWord::new(BackendId(head), BackendId(previous), Generation(generation));
            prop_assert_eq!((word.head().0, word.previous().0, word.generation().0), (head, previous, generation));
        }
    }

    #[test]
    fn a_table_holds_what_is_applied() {
        let table = BucketTable::new(16);
        assert_eq!(table.lookup(3), BucketWord::EMPTY);
        let chain = [BackendId(7), BackendId(8), BackendId(9)].into_iter().collect();
        table.apply(&[Entry { bucket: 3, generation: Generation(5), chain }]);
        assert_eq!(table.lookup(3 + 16), BucketWord::new(BackendId(7), BackendId(8), Generation(5)));
        assert_eq!(table.lookup(2), BucketWord::EMPTY);
    }
}
