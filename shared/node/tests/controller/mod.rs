//! A controller of whose answers a test writes each.
#![allow(dead_code, reason = "each test uses its part")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use daisy_shared::control::{SyncRequest, SyncResponse};

/// How long tests wait for what must come.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A controller of whose answers the test writes each, when the request is there.
pub struct Controller {
    /// Where it listens.
    pub url: String,
    requests: Receiver<(SyncRequest, String, TcpStream)>,
}

impl Controller {
    /// Listens on a port of loopback.
    pub fn start() -> Controller {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (sender, requests) = channel();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut reader = BufReader::new(stream.unwrap());
                let (mut head, mut length) = (String::new(), 0);
                loop {
                    let mut line = String::new();
                    if reader.read_line(&mut line).unwrap() == 0 || line == "\r\n" {
                        break;
                    }
                    if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                        length = value.trim().parse().unwrap();
                    }
                    head.push_str(&line);
                }
                let mut body = vec![0; length];
                reader.read_exact(&mut body).unwrap();
                let request = serde_json::from_slice(&body).unwrap();
                if sender.send((request, head, reader.into_inner())).is_err() {
                    return;
                }
            }
        });
        Controller { url, requests }
    }

    /// Waits for a request.
    pub fn next(&self) -> Exchange {
        let (request, head, stream) = self.requests.recv_timeout(PATIENCE).expect("a sync request");
        Exchange { request, head, stream }
    }

    /// Waits for a request and answers it.
    pub fn answer(&self, response: &SyncResponse) -> SyncRequest {
        self.next().answer(response)
    }
}

/// A request that is not answered yet. Dropped, the controller hangs up.
pub struct Exchange {
    pub request: SyncRequest,
    /// Request line and header fields.
    pub head: String,
    stream: TcpStream,
}

impl Exchange {
    /// Answers.
    pub fn answer(self, response: &SyncResponse) -> SyncRequest {
        self.answer_raw("200 OK", &serde_json::to_vec(response).unwrap())
    }

    /// Answers with these bytes.
    pub fn answer_raw(mut self, status: &str, body: &[u8]) -> SyncRequest {
        let length = body.len();
        let head = format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n");
        self.stream.write_all(&[head.as_bytes(), body].concat()).unwrap();
        self.request
    }
}
