//! What the echo client tells, as JSON lines.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A line that the client prints.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "lowercase")]
pub enum Line {
    /// The state of things, at each sampling interval.
    Sample(Sample),
    /// The end: everything that happened.
    Report(Report),
}

/// The state of things at one moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Milliseconds since the client started.
    pub at_ms: u64,
    /// Connections asked for that are not established and greeted yet.
    pub opening: usize,
    /// Connections that talk, or are being closed by the client.
    pub live: usize,
    /// Connections that the client closed, all in order, since it started.
    pub closed: usize,
    /// Connections that ended in any other way, since the start.
    pub broken: usize,
    /// Connections that wait for a reply for longer than the limit now.
    pub stalled: usize,
    /// The longest wait for a reply that ended since the last sample, or still goes on, in milliseconds.
    pub worst_ms: u64,
    /// Messages whose echo came back right, since the start.
    pub messages: u64,
    /// Live connections by the name that the server greeted with.
    pub by_backend: BTreeMap<String, usize>,
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// The client closed it, and the server did too.
    Closed,
    /// Reset by the other side.
    Reset,
    /// The server closed it unasked, or in the middle of an echo.
    Eof,
    /// A byte came back that is not the one that was sent.
    Wrong,
    /// No reply came for as long as the client was told to wait.
    Hung,
    /// It was never established.
    Refused,
}

/// One connection's life.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Connection {
    /// Its number, from 0, in the order of opening.
    pub number: u32,
    /// The name that the server greeted with; none if it never did.
    pub backend: Option<String>,
    /// The client's port.
    pub port: u16,
    /// When it was opened, in milliseconds since the start of the client.
    pub opened_ms: u64,
    /// When it ended.
    pub ended_ms: u64,
    /// How long it took until the greeting.
    pub greeted_after_ms: Option<u64>,
    /// Messages whose echo came back right.
    pub messages: u32,
    /// The bytes that came back right, without the greeting.
    pub bytes: u64,
    /// The longest wait for a reply, in milliseconds.
    pub worst_ms: u64,
    /// How often it waited for longer than the limit.
    pub stalls: u32,
    /// How it ended.
    pub outcome: Outcome,
}

/// Everything that happened.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Connections opened.
    pub connections: usize,
    /// Ended in order, by the client.
    pub closed: usize,
    /// All others: the sum of the five below.
    pub broken: usize,
    /// See [`Outcome::Reset`].
    pub reset: usize,
    /// See [`Outcome::Eof`].
    pub eof: usize,
    /// See [`Outcome::Wrong`].
    pub wrong: usize,
    /// See [`Outcome::Hung`].
    pub hung: usize,
    /// See [`Outcome::Refused`].
    pub refused: usize,
    /// Waits for a reply that were longer than the limit, over all connections.
    pub stalls: u64,
    /// The longest wait for a reply, in milliseconds.
    pub worst_ms: u64,
    /// The longest wait for a greeting, in milliseconds.
    pub worst_greeting_ms: u64,
    /// Messages whose echo came back right.
    pub messages: u64,
    /// Bytes that came back right.
    pub bytes: u64,
    /// Connections by the name that the server greeted with.
    pub by_backend: BTreeMap<String, usize>,
    /// Bytes that came back right, by the name that the server greeted with.
    pub bytes_by_backend: BTreeMap<String, u64>,
    /// Each connection.
    pub each: Vec<Connection>,
}

impl Report {
    /// Sums up.
    pub fn of(each: Vec<Connection>) -> Report {
        let mut report = Report { connections: each.len(), ..Report::default() };
        for one in &each {
            let count = match one.outcome {
                Outcome::Closed => &mut report.closed,
                Outcome::Reset => &mut report.reset,
                Outcome::Eof => &mut report.eof,
                Outcome::Wrong => &mut report.wrong,
                Outcome::Hung => &mut report.hung,
                Outcome::Refused => &mut report.refused,
            };
            *count += 1;
            report.stalls += u64::from(one.stalls);
            report.worst_ms = report.worst_ms.max(one.worst_ms);
            report.worst_greeting_ms = report.worst_greeting_ms.max(one.greeted_after_ms.unwrap_or(0));
            report.messages += u64::from(one.messages);
            report.bytes += one.bytes;
            if let Some(backend) = &one.backend {
                *report.by_backend.entry(backend.clone()).or_default() += 1;
                *report.bytes_by_backend.entry(backend.clone()).or_default() += one.bytes;
            }
        }
        report.broken = report.connections - report.closed;
        report.each = each;
        report
    }

    /// One line for people: totals, and the first few connections that broke.
    pub fn summary(&self) -> String {
        let mut text = format!(
            "{} connections: {} closed in order, {} broken ({} reset, {} closed by the server, {} wrong bytes, \
             {} hung, {} refused), {} stalls, longest reply {} ms, longest greeting {} ms, {} messages",
            self.connections,
            self.closed,
            self.broken,
            self.reset,
            self.eof,
            self.wrong,
            self.hung,
            self.refused,
            self.stalls,
            self.worst_ms,
            self.worst_greeting_ms,
            self.messages
        );
        for one in self.each.iter().filter(|one| one.outcome != Outcome::Closed || one.stalls > 0).take(5) {
            text += &format!(
                "\n  connection {} (port {}, backend {}): {:?} after {} ms, {} messages, {} stalls, worst {} ms",
                one.number,
                one.port,
                one.backend.as_deref().unwrap_or("none"),
                one.outcome,
                one.ended_ms - one.opened_ms,
                one.messages,
                one.stalls,
                one.worst_ms
            );
        }
        text
    }
}

/// What a server prints when it is told to end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerReport {
    /// Connections accepted.
    pub accepted: u64,
    /// Connections that ended with the client's FIN, after all bytes were returned.
    pub closed: u64,
    /// Connections that ended with an error.
    pub failed: u64,
    /// Bytes returned, without greetings.
    pub bytes: u64,
}
