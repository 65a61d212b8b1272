//! Probing a backend's data path (`daisy_shared::wire::probe`).

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, UdpSocket};
use std::time::{Duration, Instant};

use daisy_shared::control::ProbeResult;
use daisy_shared::wire::probe::{LEN, REPLY, REQUEST, emit, parse};
use tracing::warn;

/// How often a backend that does not answer is asked.
const TRIES: u32 = 3;
/// How long each question may wait for its answer.
const WAIT: Duration = Duration::from_millis(100);

/// Asks each backend for a sign of life, from `source`. Takes no longer than 300 ms, less when all answer.
///
/// A backend that this node could not even ask (no route to it, say) is left out: that says something of this
/// node and nothing of the backend.
pub fn probe(source: IpAddr, gue_port: u16, backends: &[IpAddr]) -> Vec<ProbeResult> {
    match ask(source, gue_port, backends) {
        Ok(results) => results,
        Err(error) => {
            warn!(%source, %error, "cannot probe backends");
            Vec::new()
        }
    }
}

fn ask(source: IpAddr, gue_port: u16, backends: &[IpAddr]) -> io::Result<Vec<ProbeResult>> {
    let socket = UdpSocket::bind((source, 0))?;
    let nonce: [u8; 8] = rand::random();
    let question = emit(REQUEST, nonce);
    // Whether each backend that could be asked has answered.
    let mut answered: BTreeMap<IpAddr, bool> = BTreeMap::new();
    for _ in 0..TRIES {
        for &backend in backends {
            if answered.get(&backend) == Some(&true) {
                continue;
            }
            match socket.send_to(&question, (backend, gue_port)) {
                Ok(_) => {
                    answered.entry(backend).or_insert(false);
                }
                Err(error) => warn!(%backend, %error, "cannot send a probe"),
            }
        }
        let deadline = Instant::now() + WAIT;
        while answered.values().any(|answered| !answered) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            socket.set_read_timeout(Some(left))?;
            // Room for more than a probe, so that what is longer is not taken for one.
            let mut bytes = [0; LEN + 1];
            match socket.recv_from(&mut bytes) {
                Ok((length, from)) => {
                    if from.port() == gue_port
                        && parse(&bytes[..length]) == Some((REPLY, nonce))
                        && let Some(answered) = answered.get_mut(&from.ip())
                    {
                        *answered = true;
                    }
                }
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                }
                Err(error) => return Err(error),
            }
        }
    }
    Ok(answered.into_iter().map(|(address, answered)| ProbeResult { address, answered }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    #[test]
    fn one_answers_late_one_lies_one_is_silent() {
        let address = |last| IpAddr::V4(Ipv4Addr::new(127, 0, 0, last));
        let backend = UdpSocket::bind((address(2), 0)).unwrap();
        let port = backend.local_addr().unwrap().port();
        let liar = UdpSocket::bind((address(3), port)).unwrap();
        let serve = move |socket: UdpSocket, answer: fn(u32, [u8; 8]) -> Option<[u8; LEN]>| {
            socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
            std::thread::spawn(move || {
                let mut bytes = [0; 64];
                for question in 0.. {
                    let Ok((length, from)) = socket.recv_from(&mut bytes) else { return question };
                    let (kind, nonce) = parse(&bytes[..length]).unwrap();
                    assert_eq!(kind, REQUEST);
                    if let Some(answer) = answer(question, nonce) {
                        socket.send_to(&answer, from).unwrap();
                    }
                }
                0
            })
        };
        let backend = serve(backend, |question, nonce| (question == 1).then(|| emit(REPLY, nonce)));
        let liar = serve(liar, |_, _| Some(emit(REPLY, *b"mistaken")));
        let results = probe(address(1), port, &[address(2), address(3)]);
        let expected = [(2, true), (3, false)];
        let expected = expected.map(|(last, answered)| ProbeResult { address: address(last), answered });
        assert_eq!(results, expected);
        assert_eq!((backend.join().unwrap(), liar.join().unwrap()), (2, 3));
    }
}
