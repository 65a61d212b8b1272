//! A probe asks a backend's data path for a sign of life: a GUE control message that the agent's eBPF program
//! answers itself, so that a backend whose daemons are all down, but whose connections live, is not taken for
//! dead.
//!
//! ```text
//! | GUE base header: C = 1, Hlen = 0, ctype = 0xda, flags 0 | kind | 0 0 0 | nonce (8 bytes) |
//! ```
//!
//! The answer is the same message with kind 1, addresses and ports exchanged.

/// Length in bytes of a probe: the UDP payload.
pub const LEN: usize = 16;
/// The control type.
pub const CTYPE: u8 = 0xda;
/// Kind: the question.
pub const REQUEST: u8 = 0;
/// Kind: the answer.
pub const REPLY: u8 = 1;

/// A probe's bytes. The nonce ties an answer to its question.
pub const fn emit(kind: u8, nonce: [u8; 8]) -> [u8; LEN] {
    let n = nonce;
    [super::gue::CONTROL_BIT, CTYPE, 0, 0, kind, 0, 0, 0, n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7]]
}

/// Reads a probe: its kind and nonce.
pub fn parse(bytes: &[u8]) -> Option<(u8, [u8; 8])> {
    let bytes: &[u8; LEN] = bytes.try_into().ok()?;
    let nonce = *bytes.last_chunk()?;
    (*bytes == emit(bytes[4], nonce) && bytes[4] <= REPLY).then_some((bytes[4], nonce))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_undoes_emit_and_refuses_the_rest() {
        let bytes = emit(REPLY, *b"noncenon");
        assert_eq!(parse(&bytes), Some((REPLY, *b"noncenon")));
        assert_eq!(parse(&bytes[..15]), None);
        for at in 0..8 {
            let mut bad = bytes;
            bad[at] ^= 0x42;
            assert_eq!(parse(&bad), None, "byte {at}");
        }
    }
}
