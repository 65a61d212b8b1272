//! Short HTTP requests, one connection each, at a steady rate.

use std::collections::BTreeMap;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::{Deserialize, Serialize};

/// What the generator is told at its start.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The server.
    pub target: SocketAddr,
    /// The path to ask for.
    pub path: String,
    /// Requests in a second.
    pub per_second: u32,
    /// How many requests may be under way at once.
    pub workers: u32,
    /// A request that takes longer has failed.
    pub timeout: Duration,
    /// How often totals are printed.
    pub sample: Duration,
}

/// What happened so far; printed as one JSON line at every sampling interval and at the end.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Totals {
    /// Milliseconds since the start.
    pub at_ms: u64,
    /// Set in the last line only.
    pub finished: bool,
    /// Answered with status 200 and a whole body.
    pub ok: u64,
    /// All others.
    pub failed: u64,
    /// The slowest request, in milliseconds.
    pub worst_ms: u64,
    /// Answers by the header `X-Backend`.
    pub by_backend: BTreeMap<String, u64>,
    /// The first few errors.
    pub errors: Vec<String>,
}

/// Errors kept for people to read.
const ERRORS_KEPT: usize = 10;

/// Runs until a line `finish`, or the end, comes on stdin.
///
/// # Errors
/// If stdout is gone.
pub fn run(settings: &Settings) -> Result<Totals> {
    let totals = Mutex::new(Totals::default());
    let stop = AtomicBool::new(false);
    let turns = AtomicU64::new(0);
    let start = Instant::now();
    let step = Duration::from_secs(1) / settings.per_second;
    std::thread::scope(|scope| {
        // Blocks in `read` until the end of stdin; it ends with the process if the output fails first.
        let stop = &stop;
        scope.spawn(move || {
            let _ = io::stdin().lock().lines().map_while(Result::ok).find(|line| line.trim() == "finish");
            stop.store(true, Ordering::Relaxed);
        });
        let workers: Vec<_> = (0..settings.workers)
            .map(|_| {
                scope.spawn(|| {
                    loop {
                        let turn = turns.fetch_add(1, Ordering::Relaxed);
                        // A rate so low, or a run so long, that this overflows would take years.
                        let due = start + step * turn as u32;
                        if let Some(early) = due.checked_duration_since(Instant::now()) {
                            std::thread::sleep(early);
                        }
                        if stop.load(Ordering::Relaxed) {
                            return;
                        }
                        let began = Instant::now();
                        let result = request(settings);
                        let took = began.elapsed().as_millis() as u64;
                        let mut totals = totals.lock().unwrap_or_else(|poison| poison.into_inner());
                        totals.worst_ms = totals.worst_ms.max(took);
                        match result {
                            Ok(backend) => {
                                totals.ok += 1;
                                *totals.by_backend.entry(backend).or_default() += 1;
                            }
                            Err(error) => {
                                totals.failed += 1;
                                if totals.errors.len() < ERRORS_KEPT {
                                    totals.errors.push(format!("after {took} ms: {error}"));
                                }
                            }
                        }
                    }
                })
            })
            .collect();
        let mut next = start + settings.sample;
        loop {
            std::thread::sleep(next.saturating_duration_since(Instant::now()).min(Duration::from_millis(50)));
            let finished = workers.iter().all(|worker| worker.is_finished());
            if !finished && Instant::now() < next {
                continue;
            }
            next += settings.sample;
            let mut line = totals.lock().unwrap_or_else(|poison| poison.into_inner()).clone();
            line.at_ms = start.elapsed().as_millis() as u64;
            line.finished = finished;
            let mut stdout = io::stdout().lock();
            serde_json::to_writer(&mut stdout, &line)?;
            stdout.write_all(b"\n")?;
            stdout.flush()?;
            if finished {
                return Ok(line);
            }
        }
    })
}

/// One request on a connection of its own, which the client closes: the server's port waits for nothing.
/// Returns the name of the backend.
fn request(settings: &Settings) -> Result<String, io::Error> {
    let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut stream = TcpStream::connect_timeout(&settings.target, settings.timeout)?;
    stream.set_read_timeout(Some(settings.timeout))?;
    stream.set_write_timeout(Some(settings.timeout))?;
    stream.set_nodelay(true)?;
    stream.write_all(
        format!("GET {} HTTP/1.1\r\nHost: {}\r\n\r\n", settings.path, settings.target).as_bytes(),
    )?;
    let mut reader = BufReader::new(&stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    if !line.starts_with("HTTP/1.1 200 ") {
        return Err(invalid(format!("the server answered {:?}", line.trim_end())));
    }
    let (mut length, mut backend) = (None, String::new());
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Err(invalid("the answer ends within its headers".into()));
        }
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse::<u64>().ok();
        } else if name.eq_ignore_ascii_case("x-backend") {
            backend = value.trim().to_owned();
        }
    }
    let length = length.ok_or_else(|| invalid("the answer has no Content-Length".into()))?;
    let got = io::copy(&mut reader.take(length), &mut io::sink())?;
    if got != length {
        return Err(invalid(format!("{got} of {length} bytes came")));
    }
    Ok(backend)
}
