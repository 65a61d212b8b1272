//! A flag that says that a daemon is to end, and lets threads wait for it.

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// The flag. Copies are the same flag.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<(Mutex<bool>, Condvar)>);

impl Stop {
    /// A flag that is not set.
    pub fn new() -> Stop {
        Stop::default()
    }

    /// A flag that SIGTERM and SIGINT set.
    ///
    /// # Errors
    /// If the kernel takes no signal handlers.
    pub fn on_signals() -> io::Result<Stop> {
        let stop = Stop::new();
        let mut signals = Signals::new([SIGTERM, SIGINT])?;
        let flag = stop.clone();
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            for _signal in signals.forever() {
                flag.set();
            }
        })?;
        Ok(stop)
    }

    /// Sets the flag and wakes all who wait.
    pub fn set(&self) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.1.notify_all();
    }

    /// Whether the flag is set.
    pub fn is_set(&self) -> bool {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the flag is set, at most for this long. Returns whether it is set.
    pub fn wait_timeout(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut set = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        while !*set {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            set = self.0.1.wait_timeout(set, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        *set
    }

    /// Waits until the flag is set.
    pub fn wait(&self) {
        let mut set = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        while !*set {
            set = self.0.1.wait(set).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_wakes_who_waits() {
        let stop = Stop::new();
        assert!(!stop.wait_timeout(Duration::from_millis(1)));
        let copy = stop.clone();
        let waiting = std::thread::spawn(move || copy.wait());
        stop.set();
        waiting.join().unwrap();
        assert!(stop.is_set() && stop.wait_timeout(Duration::from_secs(60)));
    }
}
