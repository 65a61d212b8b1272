//! The daemon, a controller that is told what to say, and a peer who is client and backends at once.
#![allow(dead_code, reason = "no test uses all of it")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use aya::programs::{Xdp, XdpMode};
use aya::{Ebpf, include_bytes_aligned};
use daisy_shared::control::{SyncRequest, SyncResponse, TableUpdate};
use daisy_shared::wire::gue;
use etherparse::{IpNumber, Ipv4Header, TcpHeader};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, setsockopt, socket,
    sockopt,
};
use nix::unistd::Pid;
use serde_json::Value;

use super::common::{self, VIP, delta, entry, service, snapshot};
use super::netns::Host;

pub const PATIENCE: Duration = Duration::from_secs(20);
/// The mux's address; its peer, who is client and backends at once, has the others.
pub const MUX: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 1);
pub const BACKENDS: u16 = 3;
/// How many packets may be on their way: fewer than any buffer between here and there holds.
pub const WINDOW: usize = 100;

/// The sequence number of segments that are sent while nobody is to get them, and that may be late.
pub const NOBODYS: u32 = u32::MAX;

/// A controller that says what it is told, and shows what the mux asks.
pub struct Controller {
    pub url: String,
    pub answers: Sender<SyncResponse>,
    pub requests: Receiver<SyncRequest>,
}

impl Controller {
    pub fn start() -> Controller {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (answers, script) = channel::<SyncResponse>();
        let (seen, requests) = channel();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut reader = BufReader::new(stream.unwrap());
                let mut length = 0;
                loop {
                    let mut line = String::new();
                    if reader.read_line(&mut line).unwrap() == 0 || line == "\r\n" {
                        break;
                    }
                    if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                        length = value.trim().parse().unwrap();
                    }
                }
                let mut body = vec![0; length];
                reader.read_exact(&mut body).unwrap();
                let request: SyncRequest = serde_json::from_slice(&body).unwrap();
                let wait = Duration::from_millis(request.wait_ms.min(50));
                if seen.send(request).is_err() {
                    return;
                }
                let answer = script.recv_timeout(wait).unwrap_or_default();
                let body = serde_json::to_vec(&SyncResponse { lease_ms: 3000, ..answer }).unwrap();
                let head =
                    format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
                // A mux that was killed does not read it.
                let _gone = reader.into_inner().write_all(&[head.as_bytes(), &body].concat());
            }
        });
        Controller { url, answers, requests }
    }

    /// Says something, and waits until the mux has applied this generation.
    pub fn publish(&self, answer: SyncResponse, generation: u32) -> SyncRequest {
        self.answers.send(answer).unwrap();
        self.until(|request| request.applied.get(&service().id).is_some_and(|g| g.0 == generation))
    }

    /// Waits for a request that says this.
    pub fn until(&self, good: impl Fn(&SyncRequest) -> bool) -> SyncRequest {
        loop {
            let request = self.requests.recv_timeout(PATIENCE).expect("a sync request");
            if good(&request) {
                return request;
            }
        }
    }
}

/// The daemon.
pub struct Daemon {
    pub child: Child,
    pub lines: Receiver<String>,
}

impl Daemon {
    pub fn start(host: &Host, arguments: &[&str]) -> Daemon {
        let mut command = Command::new(env!("CARGO_BIN_EXE_daisy-mux"));
        command.args(arguments).stderr(Stdio::piped());
        let mut child = host.run(move || command.spawn().unwrap());
        let (sender, lines) = channel();
        let stderr = child.stderr.take().unwrap();
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines() {
                let line = line.unwrap();
                eprintln!("daisy-mux: {line}");
                let _test_is_over = sender.send(line);
            }
        });
        Daemon { child, lines }
    }

    /// Waits for a log line with this message.
    pub fn said(&self, message: &str) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left).unwrap_or_else(|_| panic!("never said {message:?}"));
            let line: Value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("said {line:?}"));
            if line["message"] == message {
                return line;
            }
        }
    }

    pub fn ask_to_stop(&self) {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM).unwrap();
    }

    pub fn terminate(mut self) -> (Value, ExitStatus) {
        self.ask_to_stop();
        let last = self.said("stopped");
        (last, self.child.wait().unwrap())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _status = self.child.wait();
    }
}

/// An encapsulated packet, as its backend gets it.
pub struct Output {
    pub backend: u16,
    pub gue: gue::Header,
    pub inner: Vec<u8>,
}

/// The mux's peer: sends what clients send, and receives what backends receive.
pub struct Peer {
    pub outputs: Receiver<Output>,
    pub packets: Sender<(Vec<u8>, Ipv4Addr)>,
    pub next: u32,
    /// How many packets have been sent to the service.
    pub sent: u64,
}

impl Peer {
    /// To be started on the peer's host.
    pub fn start() -> Peer {
        let outputs = Peer::listen();
        Peer { outputs, packets: Peer::feed(), next: 0, sent: 0 }
    }

    /// Clients on one host, and backends on another.
    pub fn between(clients: &Host, backends: &Host) -> Peer {
        Peer { outputs: backends.run(Peer::listen), packets: clients.run(Peer::feed), next: 0, sent: 0 }
    }

    /// To be started where backends are: receives what they receive.
    pub fn listen() -> Receiver<Output> {
        let (sender, outputs) = channel();
        for backend in 1..=BACKENDS {
            let udp = UdpSocket::bind((common::address(backend), gue::PORT)).unwrap();
            setsockopt(&udp, sockopt::RcvBufForce, &(8 << 20)).unwrap();
            let sender = sender.clone();
            std::thread::spawn(move || {
                let mut bytes = vec![0; 2000];
                while let Ok((length, from)) = udp.recv_from(&mut bytes) {
                    assert_eq!(from.ip(), MUX);
                    let gue = gue::Header::parse(&bytes[..length]).unwrap();
                    let inner = bytes[gue.len()..length].to_vec();
                    if sender.send(Output { backend, gue, inner }).is_err() {
                        return;
                    }
                }
            });
        }
        outputs
    }

    /// To be started where clients are: sends the packets that it is given.
    pub fn feed() -> Sender<(Vec<u8>, Ipv4Addr)> {
        let (packets, inbox) = channel::<(Vec<u8>, Ipv4Addr)>();
        std::thread::spawn(move || {
            let raw = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw)
                .unwrap();
            for (packet, to) in inbox {
                let to = SockaddrIn::from(SocketAddrV4::new(to, 0));
                sendto(raw.as_raw_fd(), &packet, &to, MsgFlags::empty()).unwrap();
            }
        });
        packets
    }

    /// A TCP segment for the service, unlike all before. Returns its sequence number.
    pub fn send(&mut self) -> u32 {
        let sequence = self.next;
        self.next += 1;
        self.sent += 1;
        let packet = segment(sequence);
        self.packets.send((packet, VIP)).unwrap();
        sequence
    }

    /// Sends so many segments, and checks that each comes out once, unchanged, and as `legal` says.
    pub fn exchange(&mut self, count: usize, mut legal: impl FnMut(&Output)) {
        let mut waiting = HashMap::new();
        let mut left = count;
        while left > 0 || !waiting.is_empty() {
            while left > 0 && waiting.len() < WINDOW {
                let sequence = self.send();
                waiting.insert(sequence, segment(sequence));
                left -= 1;
            }
            let output = self.outputs.recv_timeout(PATIENCE).unwrap_or_else(|_| {
                panic!("{} packets lost, after {} of {count}", waiting.len(), count - left - waiting.len())
            });
            let sequence = sequence_of(&output.inner);
            if sequence == NOBODYS {
                continue;
            }
            let packet = waiting.remove(&sequence).expect("a packet that came twice, or was never sent");
            assert_eq!(output.inner, packet);
            legal(&output);
        }
    }

    /// Sends single segments until one comes out.
    pub fn until_one_arrives(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let sequence = self.send();
            // Earlier ones may come late; the last one closes the series.
            while let Ok(output) = self.outputs.recv_timeout(Duration::from_millis(100)) {
                if sequence_of(&output.inner) == sequence {
                    return;
                }
            }
            assert!(Instant::now() < deadline, "nothing arrives any more");
        }
    }
}

/// The TCP segment with this number, from one of many ports.
pub fn segment(sequence: u32) -> Vec<u8> {
    let mut ip = Ipv4Header::new(0, 60, IpNumber::TCP, common::CLIENT.octets(), VIP.octets()).unwrap();
    // Or the kernel would choose one.
    ip.identification = sequence as u16 | 1;
    let tcp = TcpHeader::new((sequence % 5000) as u16 + 1024, 80, sequence, 1000);
    let payload = vec![sequence as u8; sequence as usize % 1000];
    let packet = common::ipv4(ip, &[&tcp.to_bytes()[..], &payload].concat());
    packet[14..].to_vec()
}

pub fn sequence_of(inner: &[u8]) -> u32 {
    u32::from_be_bytes(inner[24..28].try_into().unwrap())
}

/// The service's table, all buckets alike.
pub fn update(from: Option<u32>, generation: u32, chain: &[u16]) -> SyncResponse {
    let service = service();
    let piece = match from {
        None => snapshot(&service, generation, chain),
        Some(from) => {
            let entries = (0..service.buckets).map(|bucket| entry(bucket, generation, chain)).collect();
            delta(&service, from, generation, entries)
        }
    };
    SyncResponse { tables: vec![TableUpdate { service, piece }], ..SyncResponse::default() }
}

/// Runs the daemon to its end. Returns its exit code and what it said.
pub fn fails(host: &Host, arguments: &[&str]) -> (Option<i32>, String) {
    // One that does start would run for ever.
    let mut command = Command::new("timeout");
    command.arg("20").arg(env!("CARGO_BIN_EXE_daisy-mux")).args(arguments);
    let output = host.run(move || command.output().unwrap());
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

/// Has a host's native XDP program pass everything, for as long as what is returned lives. The peer of a veth whose
/// program transmits needs one, or what is sent vanishes.
pub fn pass_all(host: &Host, interface: &'static str) -> Ebpf {
    host.run(move || {
        let mut object =
            Ebpf::load(include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bench.bpf.o"))).unwrap();
        let program: &mut Xdp = object.program_mut("bench_empty").unwrap().try_into().unwrap();
        program.load().unwrap();
        program.attach(interface, XdpMode::Driver).unwrap();
        object
    })
}
