//! Clients that run beside a test, and what they report.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{ChildStdin, Command};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::Signal;

use crate::echo::report::{Line, Report, Sample};
use crate::http::Totals;
use crate::netns::Namespace;
use crate::process::Process;

/// A wait for a reply longer than this is a stall: longer than a retransmission explains. On a link without delay
/// a lost segment is sent again after 200 ms (`TCP_RTO_MIN`), a lost retransmission after 400 ms more, a lost SYN
/// after 1 s (RFC 6298); half a second on top is for two cores that run the whole network.
pub const STALL_LIMIT_MS: u64 = 1_500;

/// How the echo client behaves.
#[derive(Clone, Debug)]
pub struct EchoOptions {
    /// Where to connect to.
    pub target: SocketAddr,
    /// How many connections to open at the start.
    pub connections: usize,
    /// How many connections to open in a second.
    pub open_per_second: u32,
    /// How often each connection sends.
    pub interval_ms: u64,
    /// The least and the most bytes of a message.
    pub message_bytes: (usize, usize),
    /// A wait for a reply longer than this ends the connection.
    pub hang_ms: u64,
    /// How often a sample is taken.
    pub sample_ms: u64,
}

impl Default for EchoOptions {
    fn default() -> EchoOptions {
        EchoOptions {
            target: crate::topology::ECHO,
            connections: 1_000,
            open_per_second: 500,
            interval_ms: 500,
            message_bytes: (64, 512),
            hang_ms: 20_000,
            sample_ms: 200,
        }
    }
}

/// What a reading thread has gathered.
struct Gathered<S, F> {
    samples: Vec<S>,
    last: Option<F>,
    ended: bool,
}

struct Shared<S, F> {
    gathered: Mutex<Gathered<S, F>>,
    changed: Condvar,
}

impl<S, F> Shared<S, F> {
    fn new() -> Arc<Shared<S, F>> {
        Arc::new(Shared {
            gathered: Mutex::new(Gathered { samples: Vec::new(), last: None, ended: false }),
            changed: Condvar::new(),
        })
    }

    fn change(&self, change: impl FnOnce(&mut Gathered<S, F>)) {
        change(&mut self.gathered.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    /// Waits until `look` finds something, the process ends or the time is over.
    fn wait<T>(&self, limit: Duration, mut look: impl FnMut(&Gathered<S, F>) -> Option<T>) -> Option<T> {
        let end = Instant::now() + limit;
        let mut gathered = self.gathered.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(found) = look(&gathered) {
                return Some(found);
            }
            let left = end.checked_duration_since(Instant::now())?;
            if gathered.ended {
                return None;
            }
            gathered = self.changed.wait_timeout(gathered, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// A running echo client (`daisy-echo client`).
pub struct EchoClient {
    process: Process,
    commands: ChildStdin,
    shared: Arc<Shared<Sample, Report>>,
    hang: Duration,
    started: Instant,
}

impl EchoClient {
    /// Starts it inside `namespace`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(
        namespace: &Namespace,
        binary: &Path,
        options: &EchoOptions,
        log: &Path,
    ) -> Result<EchoClient> {
        let mut command = Command::new(binary);
        let (least, most) = options.message_bytes;
        command
            .arg("client")
            .args(["--target", &options.target.to_string()])
            .args(["--connections", &options.connections.to_string()])
            .args(["--open-per-second", &options.open_per_second.to_string()])
            .args(["--interval-ms", &options.interval_ms.to_string()])
            .args(["--message-bytes", &format!("{least}..{most}")])
            .args(["--hang-ms", &options.hang_ms.to_string()])
            .args(["--sample-ms", &options.sample_ms.to_string()])
            .args(["--stall-ms", &STALL_LIMIT_MS.to_string()]);
        let mut process = Process::start("echo client", namespace, command, log, true)?;
        let (commands, output) = process.pipes().context("the echo client has no pipes")?;
        let shared = Shared::new();
        let writer = Arc::clone(&shared);
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                match serde_json::from_str(&line) {
                    Ok(Line::Sample(sample)) => writer.change(|g| g.samples.push(sample)),
                    Ok(Line::Report(report)) => writer.change(|g| g.last = Some(report)),
                    Err(error) => eprintln!("the echo client printed {line:?}: {error}"),
                }
            }
            writer.change(|g| g.ended = true);
        });
        let hang = Duration::from_millis(options.hang_ms);
        Ok(EchoClient { process, commands, shared, hang, started: Instant::now() })
    }

    /// Gives it a command: `open N`, `close N` (the oldest), `close all`, `close backend NAME`.
    ///
    /// # Errors
    /// If it has ended.
    pub fn command(&mut self, command: &str) -> Result<()> {
        writeln!(self.commands, "{command}").and_then(|()| self.commands.flush()).or_else(|_| {
            self.process.check()?;
            bail!("the echo client takes no commands any more")
        })
    }

    /// When it was started; `at_ms` of samples counts from (a little after) here.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// The newest sample.
    pub fn latest(&self) -> Sample {
        self.shared.wait(Duration::ZERO, |g| g.samples.last().cloned()).unwrap_or_default()
    }

    /// All samples so far.
    pub fn samples(&self) -> Vec<Sample> {
        self.shared.wait(Duration::ZERO, |g| Some(g.samples.clone())).unwrap_or_default()
    }

    /// Waits for a sample, one that is taken from now on, with `wanted`.
    ///
    /// # Errors
    /// If none comes within `limit`.
    pub fn wait_for(
        &mut self,
        what: &str,
        limit: Duration,
        mut wanted: impl FnMut(&Sample) -> bool,
    ) -> Result<Sample> {
        let seen = self.samples().len();
        // The sample under way may have been taken before the caller's last command.
        let found = self.shared.wait(limit, |g| g.samples.iter().skip(seen + 1).find(|s| wanted(s)).cloned());
        match found {
            Some(sample) => Ok(sample),
            None => {
                self.process.check()?;
                bail!("waited {limit:?} for the echo client: {what}; its last sample is {:?}", self.latest())
            }
        }
    }

    /// Waits until exactly `count` connections live and none is opening.
    ///
    /// # Errors
    /// If it takes longer than 30 seconds.
    pub fn wait_live(&mut self, count: usize) -> Result<Sample> {
        self.wait_for(&format!("{count} live connections"), Duration::from_secs(30), |s| {
            s.live == count && s.opening == 0
        })
    }

    /// Lets every live connection talk for a while: waits until `rounds` messages per connection that still lives
    /// have been echoed from now on.
    ///
    /// # Errors
    /// If that takes longer than 30 seconds.
    pub fn talk(&mut self, rounds: u64) -> Result<Sample> {
        let before = self.latest().messages;
        self.wait_for(&format!("{rounds} messages on each connection"), Duration::from_secs(30), |s| {
            s.messages >= before + rounds * s.live as u64
        })
    }

    /// Has it close everything, and returns what happened since its start.
    ///
    /// # Errors
    /// If it does not end in time.
    pub fn finish(mut self) -> Result<Report> {
        self.command("finish")?;
        // Waiting connections may hang for as long as they are allowed to, and then once more while closing.
        let report = self.shared.wait(self.hang * 2 + Duration::from_secs(10), |g| g.last.clone());
        match report {
            Some(report) => Ok(report),
            None => {
                self.process.check()?;
                bail!("the echo client did not finish; its last sample is {:?}", self.latest())
            }
        }
    }

    /// Ends it at once, without a report.
    pub fn kill(mut self) {
        self.process.kill();
    }
}

/// A running stream of short HTTP requests (`daisy-echo requests`).
pub struct Requests {
    process: Process,
    commands: ChildStdin,
    shared: Arc<Shared<Totals, Totals>>,
}

impl Requests {
    /// Starts it inside `namespace`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(
        namespace: &Namespace,
        binary: &Path,
        target: SocketAddr,
        per_second: u32,
        log: &Path,
    ) -> Result<Requests> {
        let mut command = Command::new(binary);
        command
            .arg("requests")
            .args(["--target", &target.to_string()])
            .args(["--per-second", &per_second.to_string()])
            .args(["--sample-ms", "200"]);
        let mut process = Process::start("HTTP requests", namespace, command, log, true)?;
        let (commands, output) = process.pipes().context("the request generator has no pipes")?;
        let shared = Shared::new();
        let writer = Arc::clone(&shared);
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                match serde_json::from_str::<Totals>(&line) {
                    Ok(totals) if totals.finished => writer.change(|g| g.last = Some(totals)),
                    Ok(totals) => writer.change(|g| g.samples.push(totals)),
                    Err(error) => eprintln!("the request generator printed {line:?}: {error}"),
                }
            }
            writer.change(|g| g.ended = true);
        });
        Ok(Requests { process, commands, shared })
    }

    /// The newest totals.
    pub fn latest(&self) -> Totals {
        self.shared.wait(Duration::ZERO, |g| g.samples.last().cloned()).unwrap_or_default()
    }

    /// Ends it in order and returns the totals.
    ///
    /// # Errors
    /// If it does not end within 20 seconds.
    pub fn finish(mut self) -> Result<Totals> {
        writeln!(self.commands, "finish").context("the request generator has ended")?;
        match self.shared.wait(Duration::from_secs(20), |g| g.last.clone()) {
            Some(totals) => Ok(totals),
            None => {
                self.process.signal(Signal::SIGKILL);
                bail!("the request generator did not finish; its last line is {:?}", self.latest())
            }
        }
    }
}
