//! What processors do better when asked with particular instructions: the flow hash of a group of packets, as many flows at
//! once as a vector register holds, and memory that is fetched before it is needed.
//!
//! Besides packet I/O this is the only `unsafe` of the mux: calling what was compiled for instructions that another
//! processor may lack, and naming an address to fetch. `docs/decisions/0017-groups-of-eight.md` has what each
//! buys.

use daisy_shared::flow;

/// How many packets of a burst are looked at together, while the frames of the next are fetched: as many as a vector
/// register of 512 bits has flows. Measured: with 16 and 32 more of what was fetched is gone again before it is used.
pub const GROUP: usize = 8;

/// The flows of a group of packets, in columns: row `i` of each belongs to flow `i`.
#[derive(Clone, Debug)]
#[repr(align(64))]
pub struct Flows {
    /// The keys' words.
    pub key: [[u64; GROUP]; 2],
    /// The messages' words, see [`flow::FlowV4::message`].
    pub message: [[u64; GROUP]; 2],
    /// The hashes, once they are computed.
    pub hash: [u64; GROUP],
}

impl Flows {
    /// Nothing yet.
    pub const EMPTY: Flows = Flows { key: [[0; GROUP]; 2], message: [[0; GROUP]; 2], hash: [0; GROUP] };

    /// Computes the hashes of all rows: of those that hold no flow, too, which costs nothing and says nothing.
    #[inline]
    pub fn hash(&mut self) {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                // SAFETY: this processor has the instructions that the function was compiled for.
                return unsafe { hash_avx512(self) };
            }
            if is_x86_feature_detected!("avx2") {
                // SAFETY: as above.
                return unsafe { hash_avx2(self) };
            }
        }
        hash_any(self);
    }
}

/// With rotations, and 8 flows in a register.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn hash_avx512(flows: &mut Flows) {
    hash_any(flows);
}

/// With 4 flows in a register.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn hash_avx2(flows: &mut Flows) {
    hash_any(flows);
}

#[inline(always)]
fn hash_any(flows: &mut Flows) {
    let Flows { key: [k0, k1], message: [m0, m1], hash } = flows;
    let rows = hash.iter_mut().zip(k0).zip(k1).zip(m0).zip(m1);
    for ((((hash, k0), k1), m0), m1) in rows {
        *hash = flow::siphash13((*k0, *k1), [*m0, *m1]);
    }
}

/// Has the memory of an item fetched, to be used soon. Nothing happens if there is none at that position.
#[inline(always)]
pub fn prefetch<T>(items: &[T], position: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

        let address = items.as_ptr().wrapping_add(position);
        // SAFETY: fetching reads nothing and cannot fault, whatever the address; SSE is part of x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _elsewhere_the_processor_guesses = (items, position);
}

#[cfg(test)]
mod tests {
    use super::*;
    use daisy_shared::flow::{FlowV4, HashKey};

    #[test]
    fn each_row_is_the_hash_of_its_flow() {
        let flow = |i: usize| FlowV4 {
            source: [10, 0, 0, i as u8].into(),
            destination: [203, 0, 113, 1].into(),
            source_port: 1000 + i as u16,
            destination_port: 80,
            protocol: 6,
        };
        let key = |i: usize| HashKey([i as u8 % 3; 16]);
        let mut empty = Flows::EMPTY;
        for i in 0..GROUP {
            (empty.key[0][i], empty.key[1][i]) = key(i).words();
            [empty.message[0][i], empty.message[1][i]] = flow(i).message();
        }
        type Function = fn(&mut Flows);
        let mut functions: Vec<(&str, Function)> = vec![("any", hash_any), ("detected", Flows::hash)];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            // SAFETY: just asked.
            functions.push(("avx2", |flows| unsafe { hash_avx2(flows) }));
        }
        for (name, function) in functions {
            let mut flows = empty.clone();
            function(&mut flows);
            for i in 0..GROUP {
                assert_eq!(flows.hash[i], flow(i).hash(key(i)), "{name}, flow {i}");
            }
        }
    }
}
