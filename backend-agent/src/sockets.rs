//! Which buckets hold connections, as the kernel's TCP sockets tell (sock_diag).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};

use bitvec::prelude::BitVec;
use daisy_node::netlink::Connection;
use daisy_shared::flow::{FlowV4, bucket_of};
use daisy_shared::service::{Protocol, Service, ServiceId};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;

/// Asks the kernel of the network namespace of the thread that opened it.
pub struct Sockets {
    netlink: Connection<SockDiagMessage>,
}

impl Sockets {
    /// Opens the way to the kernel.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn open() -> io::Result<Sockets> {
        Ok(Sockets { netlink: Connection::open(NETLINK_SOCK_DIAG)? })
    }

    /// The buckets of each service that hold a socket: one that is established, half-open (a request socket) or
    /// closing, `TIME_WAIT` included. What only listens or is closed holds nothing.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn held(&mut self, services: &[Service]) -> io::Result<BTreeMap<ServiceId, BitVec>> {
        let mut held: BTreeMap<ServiceId, BitVec> = BTreeMap::new();
        let mut by_address: BTreeMap<(Ipv4Addr, u16), &Service> = BTreeMap::new();
        for service in services {
            held.insert(service.id, BitVec::repeat(false, service.buckets as usize));
            if let (IpAddr::V4(vip), Protocol::Tcp) = (service.vip, service.protocol) {
                by_address.insert((vip, service.port), service);
            }
        }
        let ports: BTreeSet<u16> = by_address.keys().map(|(_, port)| *port).collect();
        for port in ports {
            // A server that listens on `::` has its IPv4 connections in IPv6 sockets, as mapped addresses.
            for family in [AF_INET, AF_INET6] {
                self.netlink.dump_each(request(family, port), |message| {
                    let Some((service, bucket)) = bucket(&message, &by_address) else { return };
                    if let Some(held) = held.get_mut(&service) {
                        held.set(bucket as usize, true);
                    }
                })?;
            }
        }
        Ok(held)
    }
}

/// All sockets of a local port that can have to do with a connection.
fn request(family: u8, port: u16) -> SockDiagMessage {
    let empty = if family == AF_INET { SocketId::new_v4() } else { SocketId::new_v6() };
    SockDiagMessage::InetRequest(InetRequest {
        family,
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::all() - StateFlags::LISTEN - StateFlags::CLOSE,
        socket_id: SocketId { source_port: port, ..empty },
    })
}

/// The service and the bucket of a socket, if it belongs to a service.
fn bucket(
    message: &SockDiagMessage,
    services: &BTreeMap<(Ipv4Addr, u16), &Service>,
) -> Option<(ServiceId, u32)> {
    let SockDiagMessage::InetResponse(response) = message else { return None };
    let id = &response.header.socket_id;
    let (IpAddr::V4(local), IpAddr::V4(client)) =
        (id.source_address.to_canonical(), id.destination_address.to_canonical())
    else {
        return None;
    };
    let service = services.get(&(local, id.source_port))?;
    let flow = FlowV4 {
        source: client,
        destination: local,
        source_port: id.destination_port,
        destination_port: id.source_port,
        protocol: service.protocol.number(),
    };
    Some((service.id, bucket_of(flow.hash(service.hash_key), service.buckets)))
}

/// How many SYN cookies the kernel has sent in the network namespace of the calling thread.
///
/// # Errors
/// If `/proc` does not say.
pub fn syn_cookies_sent() -> io::Result<u64> {
    // `/proc/net` would be the namespace of the process's first thread.
    const PATH: &str = "/proc/thread-self/net/netstat";
    counter(&fs::read_to_string(PATH)?, "TcpExt:", "SyncookiesSent").ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("{PATH} has no counter SyncookiesSent"))
    })
}

/// A counter in the format of `/proc/net/netstat`: a line of names, a line of values.
fn counter(text: &str, group: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(group));
    let (names, values) = (lines.next()?, lines.next()?);
    let at = names.split_whitespace().position(|found| found == name)?;
    values.split_whitespace().nth(at)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_is_found_by_its_name() {
        let text = "TcpExt: A SyncookiesSent C\nTcpExt: 1 2 3\nIpExt: SyncookiesSent\nIpExt: 9\n";
        assert_eq!(counter(text, "TcpExt:", "SyncookiesSent"), Some(2));
        assert_eq!(counter(text, "TcpExt:", "D"), None);
        assert_eq!(counter("", "TcpExt:", "C"), None);
        syn_cookies_sent().unwrap();
    }
}
