//! A client with real connections: opens them, talks over them, measures. One thread, no more load than it is told.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};

/// A connection that takes longer to be greeted has failed.
const OPENING_LIMIT: Duration = Duration::from_secs(5);
/// The length of a request, and of its reply.
const MESSAGE_BYTES: usize = 64;

#[derive(Debug, PartialEq, Eq)]
enum Phase {
    /// Not greeted yet: the server's greeting ends with a line feed.
    Opening,
    Idle,
    /// A reply is awaited, to a request that was due then.
    Waiting {
        due: Instant,
        received: usize,
    },
}

struct Connection {
    stream: TcpStream,
    phase: Phase,
    opened: Instant,
}

/// What happened on a connection.
enum Progress {
    None,
    Greeted,
    /// The reply is complete: the request was due then.
    Replied(Instant),
    Failed,
}

/// Connections to one server, polled together.
struct Client {
    target: SocketAddr,
    poll: Poll,
    connections: Vec<Option<Connection>>,
    read: Vec<u8>,
}

impl Client {
    fn new(target: SocketAddr, slots: usize) -> Result<Client> {
        let connections = (0..slots).map(|_| None).collect();
        Ok(Client { target, poll: Poll::new()?, connections, read: vec![0; 4096] })
    }

    /// Begins to open a connection in a slot. What was there is closed.
    fn open(&mut self, slot: usize) -> Result<()> {
        self.connections[slot] = None;
        let mut stream = TcpStream::connect(self.target)
            .with_context(|| format!("cannot open connection {slot} to {}", self.target))?;
        stream.set_nodelay(true)?;
        self.poll.registry().register(&mut stream, Token(slot), Interest::READABLE)?;
        self.connections[slot] = Some(Connection { stream, phase: Phase::Opening, opened: Instant::now() });
        Ok(())
    }

    /// Waits for something to happen, for at most this long, and tells `each` of it.
    fn turn(
        &mut self,
        events: &mut Events,
        limit: Duration,
        mut each: impl FnMut(usize, Progress),
    ) -> Result<()> {
        match self.poll.poll(events, Some(limit)) {
            Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(()),
            other => other?,
        }
        for event in events.iter() {
            let Token(slot) = event.token();
            if let Some(connection) = &mut self.connections[slot] {
                each(slot, connection.progress(&mut self.read));
            }
        }
        Ok(())
    }

    /// Sends a request in a slot that is idle. Returns whether it was.
    fn request(&mut self, slot: usize, due: Instant) -> Result<bool> {
        match &mut self.connections[slot] {
            Some(connection) if connection.phase == Phase::Idle => {
                // 64 bytes always fit in the queue of a connection that waits for nothing.
                connection.stream.write_all(&[0x55; MESSAGE_BYTES]).context("request")?;
                connection.phase = Phase::Waiting { due, received: 0 };
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// Opens all slots, so many at a time, and waits until each is greeted or has failed. Returns how many failed.
    fn open_all(&mut self, at_once: usize) -> Result<usize> {
        let (mut next, mut opening, mut failed) = (0, 0, 0);
        let mut events = Events::with_capacity(1024);
        let mut heard = Instant::now();
        while next < self.connections.len() || opening > 0 {
            while opening < at_once && next < self.connections.len() {
                self.open(next)?;
                next += 1;
                opening += 1;
            }
            let mut lost = Vec::new();
            self.turn(&mut events, OPENING_LIMIT, |slot, progress| match progress {
                Progress::Greeted => {
                    opening -= 1;
                    heard = Instant::now();
                }
                Progress::Failed => lost.push(slot),
                Progress::None | Progress::Replied(_) => {}
            })?;
            for slot in lost {
                let was = self.connections[slot].take();
                opening -= usize::from(was.is_some_and(|c| c.phase == Phase::Opening));
                failed += 1;
            }
            if heard.elapsed() > OPENING_LIMIT {
                // Whoever still opens has failed.
                for slot in &mut self.connections {
                    failed += usize::from(slot.take_if(|c| c.phase == Phase::Opening).is_some());
                }
                return Ok(failed + self.connections.len() - next);
            }
        }
        Ok(failed)
    }
}

impl Connection {
    fn progress(&mut self, buffer: &mut [u8]) -> Progress {
        let mut last = Progress::None;
        loop {
            let length = match self.stream.read(buffer) {
                Ok(0) => return Progress::Failed,
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return last,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => return Progress::Failed,
            };
            match &mut self.phase {
                Phase::Opening if buffer[..length].contains(&b'\n') => {
                    self.phase = Phase::Idle;
                    last = Progress::Greeted;
                }
                Phase::Opening => {}
                Phase::Waiting { due, received } => {
                    *received += length;
                    if *received >= MESSAGE_BYTES {
                        last = Progress::Replied(*due);
                        self.phase = Phase::Idle;
                    }
                }
                Phase::Idle => return Progress::Failed,
            }
        }
    }
}

/// Connections opened and closed one after another.
#[derive(Clone, Copy, Debug, Default)]
pub struct Opened {
    /// That were established, greeted and closed.
    pub completed: u64,
    /// That were not.
    pub failed: u64,
}

/// Opens connections, `at_once` at any time, reads the greeting and closes each, for this long.
///
/// # Errors
/// If the kernel gives no sockets.
pub fn open_and_close(target: SocketAddr, at_once: usize, time: Duration) -> Result<Opened> {
    let mut client = Client::new(target, at_once)?;
    let mut events = Events::with_capacity(1024);
    let mut found = Opened::default();
    let end = Instant::now() + time;
    let mut again: Vec<usize> = (0..at_once).collect();
    let mut look = Instant::now() + OPENING_LIMIT;
    while Instant::now() < end {
        for slot in again.drain(..) {
            client.open(slot)?;
        }
        client.turn(&mut events, Duration::from_millis(100), |slot, progress| match progress {
            Progress::Greeted => {
                found.completed += 1;
                again.push(slot);
            }
            Progress::Failed | Progress::Replied(_) => {
                found.failed += 1;
                again.push(slot);
            }
            Progress::None => {}
        })?;
        if Instant::now() > look {
            look = Instant::now() + OPENING_LIMIT;
            for (slot, connection) in client.connections.iter().enumerate() {
                let late = connection.as_ref().is_some_and(|c| c.opened.elapsed() > OPENING_LIMIT);
                if late && !again.contains(&slot) {
                    found.failed += 1;
                    again.push(slot);
                }
            }
        }
    }
    Ok(found)
}

/// Replies to requests sent at a steady rate.
#[derive(Clone, Debug, Default)]
pub struct Replies {
    /// From when a request was due until its reply was complete, in microseconds.
    pub latencies_us: Vec<f64>,
    /// Requests that could not be sent when they were due: their connection still waited for a reply.
    pub late: u64,
}

/// Opens connections, then sends requests of 64 bytes, in turn over all of them, at a steady rate for this long.
///
/// # Errors
/// If connections cannot be opened, or break.
pub fn request_and_reply(
    target: SocketAddr,
    connections: usize,
    per_second: u32,
    time: Duration,
) -> Result<Replies> {
    let mut client = Client::new(target, connections)?;
    let failed = client.open_all(64)?;
    if failed > 0 {
        bail!("{failed} of {connections} connections to {target} could not be opened");
    }
    let mut events = Events::with_capacity(1024);
    let mut found = Replies::default();
    let interval = Duration::from_secs(1) / per_second;
    let begun = Instant::now();
    let (mut due, mut slot, mut broken) = (begun, 0, 0);
    while begun.elapsed() < time {
        while due <= Instant::now() {
            if !client.request(slot, due)? {
                found.late += 1;
            }
            slot = (slot + 1) % connections;
            due += interval;
        }
        let pause = due.saturating_duration_since(Instant::now());
        client.turn(&mut events, pause, |_, progress| match progress {
            Progress::Replied(due) => found.latencies_us.push(due.elapsed().as_secs_f64() * 1e6),
            Progress::Failed => broken += 1,
            Progress::None | Progress::Greeted => {}
        })?;
        if broken > 0 {
            bail!("{broken} of {connections} connections to {target} broke");
        }
    }
    Ok(found)
}

/// Connections that are open and say nothing.
pub struct Held {
    _client: Client,
    /// How many there are.
    pub open: usize,
}

/// Opens connections and keeps them.
///
/// # Errors
/// If the kernel gives no sockets.
pub fn hold(target: SocketAddr, count: usize) -> Result<Held> {
    let mut client = Client::new(target, count)?;
    let failed = client.open_all(128)?;
    Ok(Held { open: count - failed, _client: client })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// Greets, then echoes.
    fn server() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                std::thread::spawn(move || {
                    stream.write_all(b"here\n").unwrap();
                    let mut buffer = [0; 256];
                    while let Ok(length @ 1..) = stream.read(&mut buffer) {
                        if stream.write_all(&buffer[..length]).is_err() {
                            break;
                        }
                    }
                });
            }
        });
        address
    }

    #[test]
    fn connections_are_counted_and_replies_timed() {
        let target = server();
        let opened = open_and_close(target, 4, Duration::from_millis(300)).unwrap();
        assert!(opened.completed > 0);
        assert_eq!(opened.failed, 0);
        let replies = request_and_reply(target, 3, 100, Duration::from_millis(500)).unwrap();
        assert!(!replies.latencies_us.is_empty());
        assert!(replies.latencies_us.iter().all(|us| *us > 0.0));
        assert_eq!(hold(target, 5).unwrap().open, 5);
    }

    #[test]
    fn nobody_answers_is_no_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = listener.local_addr().unwrap();
        drop(listener);
        assert_eq!(hold(target, 2).unwrap().open, 0);
    }
}
