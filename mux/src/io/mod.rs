//! Packet I/O: where frames come from and where they go.
//!
//! Every kind moves bursts of frames through the same [`Worker`]: it wraps each frame in a [`Slot`] where it lies,
//! calls [`Worker::decide`], does what the verdicts say, and calls [`Worker::settle`], which counts. There is no
//! trait object, and no copy but those that a kernel interface itself makes or leaves no way around.
//!
//! | kind | frames lie in | `Pass` means |
//! |---|---|---|
//! | [`memory`] | a vector | left alone |
//! | [`pcap`] | a capture file | left alone |
//! | [`af_packet`] | a ring of the kernel's | nothing: the kernel has its own copy |
//! | [`netmap`] | a ring's buffer; a copy, where the port gives no room for headers | to the host rings; VALE ports and pipes have none: left alone |
//! | [`af_xdp`] | a UMEM chunk | cannot be: the XDP program in front takes packets for services only |

pub mod af_packet;
pub mod af_xdp;
pub mod filter;
pub mod memory;
pub mod netmap;
pub mod open;
pub mod pcap;
pub mod request;
mod sys;
pub mod threads;
pub mod words;
pub mod xdp;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;

use crate::metrics::{Counters, Published};
use crate::pipeline::{self, Scratch, Slot};
use crate::table::Snapshot;

/// Where in a buffer a received frame begins, where the I/O may choose: room for headers, and the frame on a
/// cache line of its own.
pub const FRAME_START: usize = 64;
const _: () = assert!(FRAME_START >= pipeline::HEADROOM);

/// How long an I/O thread waits for packets before it looks at its stop flag.
pub const WAIT: Duration = Duration::from_millis(100);

/// What goes wrong with packet I/O. Each is one readable line that names the interface or file.
#[derive(Debug, thiserror::Error)]
pub enum IoError {
    /// A call to the kernel failed.
    #[error("{place}: {what}: {error}")]
    System {
        /// The interface, or the file.
        place: String,
        /// What was tried.
        what: &'static str,
        /// What the kernel answered.
        error: std::io::Error,
    },
    /// What was asked for cannot be used here.
    #[error("{place}: {reason}")]
    Unusable {
        /// The interface, or the file.
        place: String,
        /// Why not.
        reason: String,
    },
    /// Frames of the UMEM are not where they must be.
    #[error("{place}: {reason} (frames: {accounts})")]
    Leak {
        /// The interface and queue.
        place: String,
        /// What does not fit.
        reason: String,
        /// Where the frames are.
        accounts: String,
    },
}

/// One way to move packets, for one thread: a port on each of the mux's interfaces, to receive and to send.
///
/// Interfaces are numbered as they were given. A packet leaves by the port on the interface that its verdict names,
/// whichever it came in by.
pub trait PacketIo {
    /// Takes one burst through `worker`, waiting for it for at most `wait`. Returns how many packets it had.
    ///
    /// # Errors
    /// If the device can be used no longer.
    fn turn(&mut self, worker: &mut Worker, wait: Duration) -> Result<usize, IoError>;

    /// Takes no more packets, and finishes with those that it has.
    ///
    /// # Errors
    /// If it cannot, or if not every frame is accounted for.
    fn close(self, worker: &mut Worker) -> Result<(), IoError>;
}

/// The pipeline and the counters of one thread.
#[derive(Debug)]
pub struct Worker {
    snapshot: Arc<ArcSwap<Snapshot>>,
    scratch: Box<Scratch>,
    counters: Counters,
    published: Arc<Published>,
}

impl Worker {
    /// A worker that reads this snapshot and shows its counters here, where it must be the only one to do so.
    pub fn new(snapshot: Arc<ArcSwap<Snapshot>>, published: Arc<Published>) -> Worker {
        Worker { snapshot, scratch: Box::default(), counters: Counters::default(), published }
    }

    /// Gives every frame of a burst from interface number `ingress` a verdict, see [`pipeline::decide`].
    #[inline]
    pub fn decide(&mut self, ingress: u8, burst: &mut [Slot<'_>]) {
        pipeline::decide(&self.snapshot.load(), &mut self.scratch, ingress, burst);
    }

    /// Counts a burst whose verdicts have been carried out.
    #[inline]
    pub fn settle(&mut self, burst: &[Slot<'_>]) {
        self.counters.count(burst);
        self.published.publish(self.counters);
    }

    /// The kernel has dropped so many packets, in all, before the mux could take them.
    pub fn set_missed(&mut self, missed: u64) {
        if self.counters.missed != missed {
            self.counters.missed = missed;
            self.published.publish(self.counters);
        }
    }

    /// What this worker has counted.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }
}

/// Moves packets until `stop` is set, then closes the I/O. Returns what was counted.
///
/// # Errors
/// [`IoError`] of the I/O.
pub fn run(mut io: impl PacketIo, mut worker: Worker, stop: &AtomicBool) -> Result<Counters, IoError> {
    while !stop.load(Ordering::Relaxed) {
        io.turn(&mut worker, WAIT)?;
    }
    io.close(&mut worker)?;
    debug_assert!(worker.counters().is_conserved(), "{:?}", worker.counters());
    Ok(*worker.counters())
}
