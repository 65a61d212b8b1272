//! Blocking netlink requests: one socket, one request at a time.

use std::io;
use std::marker::PhantomData;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable,
};
use netlink_sys::Socket;

/// Set on the messages of a dump during which the dumped set changed (`linux/netlink.h`).
const NLM_F_DUMP_INTR: u16 = 0x10;
/// How often a dump that was interrupted by changes is made anew before it is given up.
const DUMP_TRIES: u32 = 8;

/// A netlink socket for messages of type `M`, in the network namespace of the thread that opened it.
pub struct Connection<M> {
    socket: Socket,
    sequence: u32,
    messages: PhantomData<fn() -> M>,
}

impl<M: NetlinkSerializable + NetlinkDeserializable + Clone> Connection<M> {
    /// Opens a socket of a netlink protocol (`netlink_sys::protocols`).
    ///
    /// # Errors
    /// What the kernel says.
    pub fn open(protocol: isize) -> io::Result<Connection<M>> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        Ok(Connection { socket, sequence: 0, messages: PhantomData })
    }

    /// Sends one request with these flags beside `NLM_F_REQUEST | NLM_F_ACK`, waits for the acknowledgement and
    /// returns what came before it.
    ///
    /// # Errors
    /// What the kernel answers, or answers that are not netlink.
    pub fn request(&mut self, message: M, flags: u16) -> io::Result<Vec<M>> {
        let mut replies = Vec::new();
        self.exchange(message, flags | NLM_F_ACK, &mut |reply| replies.push(reply))?;
        Ok(replies)
    }

    /// Asks for a dump. A dump during which the set changed is made anew.
    ///
    /// # Errors
    /// What the kernel answers, or answers that are not netlink; `Interrupted` if the set never held still.
    pub fn dump(&mut self, message: M) -> io::Result<Vec<M>> {
        for _ in 0..DUMP_TRIES {
            let mut replies = Vec::new();
            if self.exchange(message.clone(), NLM_F_DUMP, &mut |reply| replies.push(reply))? {
                return Ok(replies);
            }
        }
        Err(io::Error::new(
            io::ErrorKind::Interrupted,
            "the kernel's tables changed during each of several dumps",
        ))
    }

    /// Asks for a dump and hands on each message as it comes: for sets that are large, and of which a dump is a
    /// sample in any case.
    ///
    /// # Errors
    /// What the kernel answers, or answers that are not netlink.
    pub fn dump_each(&mut self, message: M, mut each: impl FnMut(M)) -> io::Result<()> {
        self.exchange(message, NLM_F_DUMP, &mut each).map(|_consistent| ())
    }

    /// Sends a request and reads until its end. Returns whether what was read is consistent.
    fn exchange(&mut self, message: M, flags: u16, each: &mut dyn FnMut(M)) -> io::Result<bool> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut consistent = true;
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            for reply in messages::<M>(&datagram) {
                let reply = reply?;
                // The rest of an exchange that ended in an error.
                if reply.header.sequence_number != self.sequence {
                    continue;
                }
                consistent &= reply.header.flags & NLM_F_DUMP_INTR == 0;
                match reply.payload {
                    NetlinkPayload::InnerMessage(message) => each(message),
                    NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                    NetlinkPayload::Done(done) if done.code != 0 => {
                        return Err(io::Error::from_raw_os_error(done.code.abs()));
                    }
                    NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(consistent),
                    _ => {}
                }
            }
        }
    }
}

/// The messages in a datagram.
pub(crate) fn messages<M: NetlinkDeserializable>(
    mut datagram: &[u8],
) -> impl Iterator<Item = io::Result<NetlinkMessage<M>>> {
    std::iter::from_fn(move || {
        if datagram.is_empty() {
            return None;
        }
        let length = datagram.first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes) as usize);
        let Some(bytes) = datagram.get(..length).filter(|bytes| !bytes.is_empty()) else {
            let error = format!("netlink message of length {length} in {} bytes", datagram.len());
            datagram = &[];
            return Some(Err(io::Error::new(io::ErrorKind::InvalidData, error)));
        };
        // Messages are aligned to 4 bytes.
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, format!("netlink message: {error}"));
        Some(NetlinkMessage::deserialize(bytes).map_err(invalid))
    })
}
