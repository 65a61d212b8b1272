//! The client: one thread, thousands of connections, each of which sends a message at every interval and checks
//! the echo.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::io::{self, BufRead as _, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token, Waker};

use super::report::{self, Line, Outcome, Report, Sample};
use super::{HEAD_BYTES, message};

const COMMANDS: Token = Token(usize::MAX);

/// What the client is told at its start.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The server.
    pub target: SocketAddr,
    /// How many connections to open at once; more by command.
    pub connections: usize,
    /// How many connections to open in a second, so that a server's queue does not overflow.
    pub open_per_second: u32,
    /// How often each connection sends a message.
    pub interval: Duration,
    /// The least and most bytes in a message.
    pub message_bytes: (usize, usize),
    /// A wait for a reply longer than this is a stall.
    pub stall: Duration,
    /// A wait for a reply longer than this ends the connection: it hangs.
    pub hang: Duration,
    /// How often a sample is printed.
    pub sample: Duration,
}

/// A command, one line on stdin each.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Command {
    /// `open N`
    Open(usize),
    /// `close N`: the N oldest that live; `close all`.
    Close(usize),
    /// `close backend NAME`
    CloseBackend(String),
    /// `finish`, or the end of stdin: close everything, report, end.
    Finish,
}

impl Command {
    fn parse(line: &str) -> Result<Command, String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |word: &str| word.parse().map_err(|_| format!("`{word}` in `{line}` is no number"));
        match words[..] {
            ["open", count] => Ok(Command::Open(number(count)?)),
            ["close", "all"] => Ok(Command::Close(usize::MAX)),
            ["close", "backend", name] => Ok(Command::CloseBackend(name.to_owned())),
            ["close", count] => Ok(Command::Close(number(count)?)),
            ["finish"] => Ok(Command::Finish),
            _ => Err(format!("`{line}` is none of: open N, close N, close all, close backend NAME, finish")),
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Phase {
    /// The connect or the greeting is not complete.
    Opening,
    /// Nothing is under way.
    Idle,
    /// A message was sent; its echo is not complete.
    Waiting,
    /// Half-closed by us; the server's end is awaited.
    Closing,
}

struct Connection {
    stream: TcpStream,
    phase: Phase,
    connected: bool,
    close_wanted: bool,
    greeting: Vec<u8>,
    backend: Option<String>,
    opened: Instant,
    greeted: Option<Instant>,
    since: Instant,
    message: Vec<u8>,
    sent: usize,
    received: usize,
    messages: u32,
    bytes: u64,
    worst: Duration,
    stalls: u32,
    port: u16,
}

struct Client<'a> {
    settings: &'a Settings,
    poll: Poll,
    start: Instant,
    to_open: usize,
    next_open: Instant,
    live: BTreeMap<u32, Connection>,
    next_number: u32,
    due: BinaryHeap<Reverse<(Instant, u32)>>,
    ended: Vec<report::Connection>,
    closed: usize,
    messages: u64,
    /// The longest wait that ended since the last sample.
    worst: Duration,
    finishing: bool,
}

/// Runs until it is told to finish. Prints [`Line`]s to stdout; takes commands on stdin.
///
/// # Errors
/// If the kernel refuses what no test provokes (an epoll instance, a socket), or stdout is gone.
pub fn run(settings: &Settings) -> Result<Report> {
    let poll = Poll::new()?;
    let waker = Arc::new(Waker::new(poll.registry(), COMMANDS)?);
    let (sender, commands) = mpsc::channel();
    // Shared, not moved: a waker that is dropped takes its wake-up with it.
    let said = Arc::clone(&waker);
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            match Command::parse(&line) {
                Ok(command) => {
                    if sender.send(command).is_err() {
                        return;
                    }
                    let _ = said.wake();
                }
                Err(error) => eprintln!("{error}"),
            }
        }
        // Whoever started us is gone, or has nothing more to say.
        let _ = sender.send(Command::Finish);
        let _ = said.wake();
    });

    let now = Instant::now();
    let mut client = Client {
        settings,
        poll,
        start: now,
        to_open: settings.connections,
        next_open: now,
        live: BTreeMap::new(),
        next_number: 0,
        due: BinaryHeap::new(),
        ended: Vec::new(),
        closed: 0,
        messages: 0,
        worst: Duration::ZERO,
        finishing: false,
    };
    let mut events = Events::with_capacity(1024);
    let mut buffer = vec![0; 64 * 1024];
    let mut next_sample = now + settings.sample;
    loop {
        let now = Instant::now();
        client.open_some(now)?;
        client.send_due(now);
        if now >= next_sample {
            client.expire(now);
            print(&Line::Sample(client.sample(now)))?;
            // Fixed steps, but none made up for if this machine was too busy.
            next_sample = (next_sample + settings.sample).max(now);
        }
        if client.finishing && client.live.is_empty() {
            print(&Line::Sample(client.sample(now)))?;
            client.ended.sort_by_key(|one| one.number);
            let report = Report::of(client.ended);
            print(&Line::Report(report.clone()))?;
            return Ok(report);
        }
        let mut wake = next_sample;
        if client.to_open > 0 {
            wake = wake.min(client.next_open);
        }
        if let Some(Reverse((due, _))) = client.due.peek() {
            wake = wake.min(*due);
        }
        match client.poll.poll(&mut events, Some(wake.saturating_duration_since(Instant::now()))) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).context("epoll"),
        }
        for event in &events {
            if event.token() == COMMANDS {
                for command in commands.try_iter() {
                    client.obey(command);
                }
            } else {
                // Numbers are 32 bits, and a token is one.
                client.go_on(event.token().0 as u32, &mut buffer);
            }
        }
    }
}

fn print(line: &Line) -> Result<()> {
    let mut stdout = io::stdout().lock();
    serde_json::to_writer(&mut stdout, line)?;
    stdout.write_all(b"\n")?;
    Ok(stdout.flush()?)
}

fn millis(duration: Duration) -> u64 {
    // Half a billion years fit.
    duration.as_millis() as u64
}

impl Client<'_> {
    fn obey(&mut self, command: Command) {
        match command {
            Command::Open(count) => self.to_open += count,
            Command::Close(count) => {
                let numbers: Vec<u32> =
                    self.live.iter().filter(|(_, c)| !c.close_wanted).map(|(n, _)| *n).take(count).collect();
                self.close(&numbers);
            }
            Command::CloseBackend(name) => {
                let numbers: Vec<u32> = self
                    .live
                    .iter()
                    .filter(|(_, c)| c.backend.as_deref() == Some(&name))
                    .map(|(n, _)| *n)
                    .collect();
                self.close(&numbers);
            }
            Command::Finish => {
                self.finishing = true;
                self.to_open = 0;
                let numbers: Vec<u32> = self.live.keys().copied().collect();
                self.close(&numbers);
            }
        }
    }

    fn close(&mut self, numbers: &[u32]) {
        for number in numbers {
            let Some(connection) = self.live.get_mut(number) else { continue };
            connection.close_wanted = true;
            if connection.phase == Phase::Idle {
                connection.half_close();
            }
        }
    }

    fn open_some(&mut self, now: Instant) -> Result<()> {
        let step = Duration::from_secs(1) / self.settings.open_per_second;
        while self.to_open > 0 && self.next_open <= now {
            self.to_open -= 1;
            let number = self.next_number;
            self.next_number += 1;
            self.next_open = self.next_open.max(now.checked_sub(step * 10).unwrap_or(now)) + step;
            let opened = Instant::now();
            let mut stream = match TcpStream::connect(self.settings.target) {
                Ok(stream) => stream,
                Err(error) => {
                    eprintln!("connection {number}: {error}");
                    self.ended.push(report::Connection {
                        number,
                        backend: None,
                        port: 0,
                        opened_ms: millis(opened - self.start),
                        ended_ms: millis(opened - self.start),
                        greeted_after_ms: None,
                        messages: 0,
                        bytes: 0,
                        worst_ms: 0,
                        stalls: 0,
                        outcome: Outcome::Refused,
                    });
                    continue;
                }
            };
            stream.set_nodelay(true)?;
            self.poll.registry().register(
                &mut stream,
                Token(number as usize),
                Interest::READABLE | Interest::WRITABLE,
            )?;
            let port = stream.local_addr().map_or(0, |address| address.port());
            self.live.insert(
                number,
                Connection {
                    stream,
                    phase: Phase::Opening,
                    connected: false,
                    close_wanted: false,
                    greeting: Vec::new(),
                    backend: None,
                    opened,
                    greeted: None,
                    since: opened,
                    message: Vec::new(),
                    sent: 0,
                    received: 0,
                    messages: 0,
                    bytes: 0,
                    worst: Duration::ZERO,
                    stalls: 0,
                    port,
                },
            );
        }
        Ok(())
    }

    /// Sends the next message of every connection whose time has come.
    fn send_due(&mut self, now: Instant) {
        while let Some(Reverse((due, number))) = self.due.peek().copied() {
            if due > now {
                break;
            }
            self.due.pop();
            let Some(connection) = self.live.get_mut(&number) else { continue };
            if connection.phase != Phase::Idle {
                continue;
            }
            message(number, connection.messages, self.settings.message_bytes, &mut connection.message);
            connection.phase = Phase::Waiting;
            connection.since = Instant::now();
            connection.sent = 0;
            connection.received = 0;
            if let Err(outcome) = connection.flush() {
                self.end(number, outcome);
            }
        }
    }

    fn go_on(&mut self, number: u32, buffer: &mut [u8]) {
        let Some(connection) = self.live.get_mut(&number) else { return };
        let before = connection.phase == Phase::Opening;
        let result = connection.flush().and_then(|()| connection.receive(buffer));
        let stall = self.settings.stall;
        match result {
            Err(outcome) => self.end(number, outcome),
            Ok(Some(waited)) => {
                connection.note_wait(waited, stall);
                connection.messages += 1;
                self.messages += 1;
                self.worst = self.worst.max(waited);
                let next = connection.since + self.settings.interval;
                if connection.close_wanted {
                    connection.half_close();
                } else {
                    self.due.push(Reverse((next, number)));
                }
            }
            Ok(None) if before && connection.phase == Phase::Idle => {
                if connection.close_wanted {
                    connection.half_close();
                } else {
                    // The first message at once: the connection talks from its first moment on.
                    self.due.push(Reverse((Instant::now(), number)));
                }
            }
            Ok(None) => {}
        }
    }

    fn end(&mut self, number: u32, outcome: Outcome) {
        let Some(mut connection) = self.live.remove(&number) else { return };
        if connection.phase == Phase::Waiting {
            connection.note_wait(connection.since.elapsed(), self.settings.stall);
        }
        if outcome == Outcome::Closed {
            self.closed += 1;
        }
        self.ended.push(report::Connection {
            number,
            backend: connection.backend,
            port: connection.port,
            opened_ms: millis(connection.opened - self.start),
            ended_ms: millis(self.start.elapsed()),
            greeted_after_ms: connection.greeted.map(|at| millis(at - connection.opened)),
            messages: connection.messages,
            bytes: connection.bytes,
            worst_ms: millis(connection.worst),
            stalls: connection.stalls,
            outcome,
        });
    }

    /// Gives up connections that have waited for too long.
    fn expire(&mut self, now: Instant) {
        let hang = self.settings.hang;
        let hung: Vec<u32> = self
            .live
            .iter()
            .filter(|(_, c)| c.phase != Phase::Idle && now.saturating_duration_since(c.since) > hang)
            .map(|(number, _)| *number)
            .collect();
        for number in hung {
            self.end(number, Outcome::Hung);
        }
    }

    fn sample(&mut self, now: Instant) -> Sample {
        let mut sample = Sample {
            at_ms: millis(now - self.start),
            opening: self.to_open,
            closed: self.closed,
            broken: self.ended.len() - self.closed,
            messages: self.messages,
            worst_ms: millis(std::mem::take(&mut self.worst)),
            ..Sample::default()
        };
        for connection in self.live.values() {
            if connection.phase == Phase::Opening {
                sample.opening += 1;
                continue;
            }
            sample.live += 1;
            if let Some(backend) = &connection.backend {
                *sample.by_backend.entry(backend.clone()).or_default() += 1;
            }
            if connection.phase == Phase::Waiting {
                let waited = now.saturating_duration_since(connection.since);
                sample.worst_ms = sample.worst_ms.max(millis(waited));
                sample.stalled += usize::from(waited > self.settings.stall);
            }
        }
        sample
    }
}

impl Connection {
    fn note_wait(&mut self, waited: Duration, limit: Duration) {
        self.worst = self.worst.max(waited);
        self.stalls += u32::from(waited > limit);
    }

    fn half_close(&mut self) {
        self.phase = Phase::Closing;
        self.since = Instant::now();
        // If the connection is gone already, the next read says so.
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// Sends as much of the message as the socket takes.
    fn flush(&mut self) -> Result<(), Outcome> {
        if !self.connected {
            match self.stream.take_error() {
                Ok(None) => {}
                Ok(Some(_)) | Err(_) => return Err(Outcome::Refused),
            }
            match self.stream.peer_addr() {
                Ok(_) => self.connected = true,
                Err(_) => return Ok(()),
            }
        }
        while self.phase == Phase::Waiting && self.sent < self.message.len() {
            match self.stream.write(&self.message[self.sent..]) {
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(Outcome::Reset),
            }
        }
        Ok(())
    }

    /// Reads and checks what has come. Returns how long the echo took if it is complete.
    fn receive(&mut self, buffer: &mut [u8]) -> Result<Option<Duration>, Outcome> {
        if !self.connected {
            return Ok(None);
        }
        let mut waited = None;
        loop {
            let count = match self.stream.read(buffer) {
                Ok(0) if self.phase == Phase::Closing => return Err(Outcome::Closed),
                Ok(0) => return Err(Outcome::Eof),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(waited),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return Err(Outcome::Reset),
            };
            let mut bytes = &buffer[..count];
            if self.phase == Phase::Opening {
                self.greeting.extend_from_slice(bytes);
                let Some(end) = self.greeting.iter().position(|byte| *byte == b'\n') else { continue };
                // Nothing was sent, so nothing may follow the greeting.
                if end + 1 != self.greeting.len() {
                    return Err(Outcome::Wrong);
                }
                self.backend = Some(String::from_utf8_lossy(&self.greeting[..end]).into_owned());
                self.greeted = Some(Instant::now());
                self.phase = Phase::Idle;
                bytes = &[];
            }
            if bytes.is_empty() {
                continue;
            }
            let expected = &self.message[self.received..self.sent];
            if self.phase != Phase::Waiting || !expected.starts_with(bytes) {
                return Err(Outcome::Wrong);
            }
            self.received += bytes.len();
            self.bytes += bytes.len() as u64;
            if self.received == self.message.len() {
                self.phase = Phase::Idle;
                waited = Some(self.since.elapsed());
            }
        }
    }
}

/// # Errors
/// If the bounds leave no room for a message's head, or are the wrong way round.
pub fn check_message_bytes(bytes: (usize, usize)) -> Result<(), String> {
    if bytes.0 < HEAD_BYTES || bytes.1 < bytes.0 {
        return Err(format!("a message has at least {HEAD_BYTES} bytes: {}..{} cannot be", bytes.0, bytes.1));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands() {
        assert_eq!(Command::parse("open 12"), Ok(Command::Open(12)));
        assert_eq!(Command::parse("close all"), Ok(Command::Close(usize::MAX)));
        assert_eq!(Command::parse("close backend b1"), Ok(Command::CloseBackend("b1".into())));
        assert_eq!(Command::parse(" finish "), Ok(Command::Finish));
        assert_eq!(Command::parse("open x"), Err("`x` in `open x` is no number".into()));
        assert!(Command::parse("").is_err());
    }
}
