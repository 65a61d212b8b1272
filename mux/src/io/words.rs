//! Where the words of a bucket table lie: memory with huge pages, as the look-ups of a burst fall anywhere in it.

use std::fmt;
use std::io;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use aya::maps::{Array, MapData};

use super::sys::Mapping;

/// The length in bytes of a huge page. A table of at least this length begins at one's boundary.
const HUGE_PAGE: usize = 2 << 20;

/// The words of one table.
pub struct Words {
    words: NonNull<[AtomicU64]>,
    /// The BPF array that they are the values of.
    array: Option<Array<MapData, u64>>,
    _memory: Mapping,
}

impl fmt::Debug for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Words({})", self.words.len())
    }
}

// SAFETY: the words belong to whoever has this, and there are only atomics to be shared.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    /// Room for a table of so many buckets.
    ///
    /// # Errors
    /// If there is no memory.
    pub fn new(buckets: u32) -> io::Result<Words> {
        let bytes = buckets as usize * size_of::<AtomicU64>();
        // The kernel maps at any page's boundary, and gives huge pages to what lies at theirs.
        let spare = if bytes >= HUGE_PAGE { HUGE_PAGE } else { 0 };
        let memory = Mapping::anonymous(bytes + spare)?;
        memory.advise_huge_pages();
        let gap = if spare > 0 { memory.start().align_offset(HUGE_PAGE) } else { 0 };
        let first = memory.part(gap, bytes).cast::<AtomicU64>();
        Ok(Words::at(first, buckets, None, memory))
    }

    /// The values of a BPF array, mapped here.
    pub(super) fn of(array: Array<MapData, u64>, memory: Mapping) -> Words {
        let buckets = array.len();
        let first = memory.part(0, buckets as usize * size_of::<AtomicU64>()).cast();
        Words::at(first, buckets, Some(array), memory)
    }

    fn at(
        first: NonNull<AtomicU64>,
        buckets: u32,
        array: Option<Array<MapData, u64>>,
        memory: Mapping,
    ) -> Words {
        let words = NonNull::slice_from_raw_parts(first, buckets as usize);
        Words { words, array, _memory: memory }
    }

    /// The BPF array that they are the values of, if an XDP program reads them.
    pub(super) fn array(&self) -> Option<&Array<MapData, u64>> {
        self.array.as_ref()
    }
}

impl Deref for Words {
    type Target = [AtomicU64];

    #[inline]
    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: within the mapping, which lives as long as this, is readable and writable and at first zero;
        // aligned, as mappings begin at pages and the gap is a multiple of 8.
        unsafe { self.words.as_ref() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_as_asked_for() {
        for buckets in [16, 1 << 16, 1 << 18, 1 << 20] {
            let words = Words::new(buckets).unwrap();
            assert_eq!(words.len(), buckets as usize);
            if buckets >= 1 << 18 {
                assert_eq!(words.as_ptr().addr() % HUGE_PAGE, 0);
            }
        }
    }
}
