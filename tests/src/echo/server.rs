//! The server: one thread, any number of connections.

use std::collections::HashMap;
use std::io::{self, Read as _, Write as _};
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token, Waker};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::report::ServerReport;

const LISTENER: Token = Token(0);
const STOP: Token = Token(1);
const FIRST: usize = 2;

/// More than this is not read ahead of what the client takes back.
const BACKLOG_BYTES: usize = 256 * 1024;

struct Connection {
    stream: TcpStream,
    /// What is still to be sent back; the greeting first.
    pending: Vec<u8>,
    greeting_left: usize,
    readable: bool,
    ended: bool,
}

/// What became of a connection that has ended.
enum End {
    Closed,
    Failed,
}

/// Serves until SIGTERM or SIGINT, then returns what happened. Says `ready` on stderr once it listens.
///
/// # Errors
/// If it cannot listen.
pub fn serve(listen: SocketAddr, name: &str) -> Result<ServerReport> {
    let mut poll = Poll::new()?;
    let waker = Arc::new(Waker::new(poll.registry(), STOP)?);
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    // Shared, not moved: a waker that is dropped takes its wake-up with it.
    let signalled = Arc::clone(&waker);
    std::thread::spawn(move || {
        if signals.forever().next().is_some() {
            // If the loop is gone, so is the process.
            let _ = signalled.wake();
        }
    });
    let mut listener = TcpListener::bind(listen).with_context(|| format!("cannot listen on {listen}"))?;
    poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
    eprintln!("ready: {name} on {listen}");

    let greeting = format!("{name}\n");
    let mut report = ServerReport::default();
    let mut connections: HashMap<usize, Connection> = HashMap::new();
    let mut next = FIRST;
    let mut events = Events::with_capacity(1024);
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match poll.poll(&mut events, None) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).context("epoll"),
        }
        for event in &events {
            match event.token() {
                STOP => return Ok(report),
                LISTENER => loop {
                    match listener.accept() {
                        Ok((mut stream, _)) => {
                            report.accepted += 1;
                            stream.set_nodelay(true)?;
                            poll.registry().register(
                                &mut stream,
                                Token(next),
                                Interest::READABLE | Interest::WRITABLE,
                            )?;
                            let mut connection = Connection {
                                stream,
                                pending: greeting.clone().into_bytes(),
                                greeting_left: greeting.len(),
                                readable: true,
                                ended: false,
                            };
                            if connection.go_on(&mut buffer, &mut report).is_none() {
                                connections.insert(next, connection);
                            }
                            next += 1;
                        }
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                        // The client gave up while it was waiting in the queue.
                        Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                        Err(error) => return Err(error).context("accept"),
                    }
                },
                Token(number) => {
                    let Some(connection) = connections.get_mut(&number) else { continue };
                    connection.readable |= event.is_readable() || event.is_read_closed() || event.is_error();
                    match connection.go_on(&mut buffer, &mut report) {
                        None => continue,
                        Some(End::Closed) => report.closed += 1,
                        Some(End::Failed) => report.failed += 1,
                    }
                    connections.remove(&number);
                }
            }
        }
    }
}

impl Connection {
    /// Reads and writes as far as the socket allows.
    fn go_on(&mut self, buffer: &mut [u8], report: &mut ServerReport) -> Option<End> {
        loop {
            let mut progress = false;
            while self.readable && !self.ended && self.pending.len() < BACKLOG_BYTES {
                match self.stream.read(buffer) {
                    Ok(0) => self.ended = true,
                    Ok(count) => self.pending.extend_from_slice(&buffer[..count]),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => return Some(End::Failed),
                }
            }
            while !self.pending.is_empty() {
                match self.stream.write(&self.pending) {
                    Ok(count) => {
                        let greeting = count.min(self.greeting_left);
                        self.greeting_left -= greeting;
                        report.bytes += (count - greeting) as u64;
                        self.pending.drain(..count);
                        progress = true;
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => return Some(End::Failed),
                }
            }
            if self.ended && self.pending.is_empty() {
                return Some(End::Closed);
            }
            if !(progress && self.readable && !self.ended) {
                return None;
            }
        }
    }
}
