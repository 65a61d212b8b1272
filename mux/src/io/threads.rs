//! The I/O threads: one for each job, pinned to its core where it has one.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use arc_swap::ArcSwap;
use daisy_node::stop::Stop;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use super::{IoError, PacketIo, Worker, run};
use crate::metrics::{Counters, Published};
use crate::table::Snapshot;

/// What a thread does until it is told to stop.
type Loop = Box<dyn FnOnce(Worker, &AtomicBool) -> Result<Counters, IoError> + Send>;

/// What one I/O thread does.
pub struct Job {
    run: Loop,
    core: Option<u32>,
}

impl Job {
    /// Moves packets, on this core if one is named.
    pub fn new(io: impl PacketIo + Send + 'static, core: Option<u32>) -> Job {
        Job { run: Box::new(move |worker, stop| run(io, worker, stop)), core }
    }
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Job({:?})", self.core)
    }
}

/// The I/O threads of a mux. If one fails, the whole mux stops.
#[derive(Debug, Default)]
pub struct Threads {
    published: Vec<Arc<Published>>,
    handles: Vec<JoinHandle<Result<Counters, IoError>>>,
    stop: Arc<AtomicBool>,
}

impl Threads {
    /// Starts a thread for each job. They decide by this snapshot, and set `stop` when they fail.
    ///
    /// # Errors
    /// If the kernel gives no thread, or not on the core that is named.
    pub fn start(jobs: Vec<Job>, snapshot: &Arc<ArcSwap<Snapshot>>, stop: &Stop) -> Result<Threads, IoError> {
        let mut threads = Threads::default();
        for Job { run, core } in jobs {
            let published = Arc::<Published>::default();
            let worker = Worker::new(Arc::clone(snapshot), Arc::clone(&published));
            threads.published.push(published);
            let place = format!("I/O thread {}", threads.handles.len());
            let failed = |what| {
                let place = place.clone();
                move |error| IoError::System { place, what, error }
            };
            let (pinned, outcome) = std::sync::mpsc::channel();
            let (stop_io, stop) = (Arc::clone(&threads.stop), stop.clone());
            let body = move || {
                let is_pinned = core.map_or(Ok(()), pin);
                let may_run = is_pinned.is_ok();
                // Whoever starts threads waits for it.
                let _started = pinned.send(is_pinned);
                if !may_run {
                    return Ok(Counters::default());
                }
                let result = run(worker, &stop_io);
                if result.is_err() {
                    stop.set();
                }
                result
            };
            let builder = std::thread::Builder::new().name(format!("io-{}", threads.handles.len()));
            threads.handles.push(builder.spawn(body).map_err(failed("starting it"))?);
            let is_pinned = outcome.recv().map_err(std::io::Error::other).and_then(|result| result);
            is_pinned.map_err(failed("pinning it to its core"))?;
        }
        Ok(threads)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.handles.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.handles.is_empty()
    }

    /// Where each shows its counters.
    pub fn published(&self) -> &[Arc<Published>] {
        &self.published
    }

    /// Has all threads finish with what they have, and returns what each has counted, or why it ended.
    pub fn stop(self) -> Vec<Result<Counters, String>> {
        self.stop.store(true, Ordering::Relaxed);
        let outcome = |handle: JoinHandle<Result<Counters, IoError>>| match handle.join() {
            Ok(Ok(counters)) => Ok(counters),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("an I/O thread panicked".to_owned()),
        };
        self.handles.into_iter().map(outcome).collect()
    }
}

/// Keeps the calling thread on this core.
fn pin(core: u32) -> std::io::Result<()> {
    let mut set = CpuSet::new();
    set.set(core as usize)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}
