//! Bytes on the wire. `etherparse` reads and builds what a library can; here stands what it lacks, and the fast
//! parse of the common case, which property tests hold equal to it.

pub mod fast;
pub mod gue;
pub mod outer;
pub mod probe;
