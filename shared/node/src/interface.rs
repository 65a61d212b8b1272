//! What a node needs to know of the network interface it works on.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr};

use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;

use crate::netlink::Connection;

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// An Ethernet interface with an IPv4 address, as the kernel knew it when it was looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its number in the network namespace.
    pub index: u32,
    /// Its Ethernet address.
    pub mac: Mac,
    /// Its first primary IPv4 address.
    pub address: Ipv4Addr,
    /// The length of the prefix that is connected through that address, in bits.
    pub prefix_len: u8,
    /// The largest IP packet that it carries, in bytes.
    pub mtu: u32,
}

/// Why an interface cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InterfaceError {
    /// There is none of that name.
    #[error("interface {0}: there is no such interface in this network namespace")]
    Missing(String),
    /// It does not speak Ethernet.
    #[error("interface {0}: has no Ethernet address")]
    NotEthernet(String),
    /// It has no IPv4 address.
    #[error("interface {0}: has no IPv4 address")]
    NoAddress(String),
    /// The kernel would not say.
    #[error("interface {name}: {error}")]
    Kernel {
        /// The interface's name.
        name: String,
        /// What the kernel answered.
        error: io::Error,
    },
}

impl Interface {
    /// Looks an interface up in the network namespace of the calling thread.
    ///
    /// # Errors
    /// [`InterfaceError`], which names the interface.
    pub fn find(name: &str) -> Result<Interface, InterfaceError> {
        let kernel = |error| InterfaceError::Kernel { name: name.to_owned(), error };
        let index =
            nix::net::if_::if_nametoindex(name).map_err(|_| InterfaceError::Missing(name.to_owned()))?;
        let mut netlink = Connection::open(NETLINK_ROUTE).map_err(kernel)?;
        let link = link(&mut netlink, index).map_err(kernel)?;
        let mac = link_mac(&link).ok_or_else(|| InterfaceError::NotEthernet(name.to_owned()))?;
        let mtu = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Mtu(mtu) => Some(*mtu),
            _ => None,
        });
        let mtu = mtu.ok_or_else(|| kernel(io::Error::other("the kernel names no MTU")))?;
        let addresses = addresses(&mut netlink, index).map_err(kernel)?;
        let primary = addresses.iter().find(|a| !a.secondary && a.scope == AddressScope::Universe);
        let Some(&InterfaceAddress { address, prefix_len, .. }) = primary else {
            return Err(InterfaceError::NoAddress(name.to_owned()));
        };
        Ok(Interface { name: name.to_owned(), index, mac, address, prefix_len, mtu })
    }
}

/// An IPv4 address of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterfaceAddress {
    /// The address.
    pub address: Ipv4Addr,
    /// The length of its prefix, in bits.
    pub prefix_len: u8,
    /// How far it is valid.
    pub scope: AddressScope,
    /// Whether another address of the same prefix came before it.
    pub secondary: bool,
}

/// The IPv4 addresses of an interface, in the kernel's order.
///
/// # Errors
/// What the kernel answers.
pub fn addresses(
    netlink: &mut Connection<RouteNetlinkMessage>,
    index: u32,
) -> io::Result<Vec<InterfaceAddress>> {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    let replies = netlink.dump(RouteNetlinkMessage::GetAddress(message))?;
    Ok(replies
        .iter()
        .filter_map(|reply| match reply {
            RouteNetlinkMessage::NewAddress(message) if message.header.index == index => {
                // On a point-to-point link IFA_ADDRESS is the peer's.
                let address = message.attributes.iter().find_map(|attribute| match attribute {
                    AddressAttribute::Local(IpAddr::V4(address)) => Some(*address),
                    _ => None,
                })?;
                let header = &message.header;
                Some(InterfaceAddress {
                    address,
                    prefix_len: header.prefix_len,
                    scope: header.scope,
                    secondary: header.flags.contains(AddressHeaderFlags::Secondary),
                })
            }
            _ => None,
        })
        .collect())
}

/// Asks for one link.
pub(crate) fn link(netlink: &mut Connection<RouteNetlinkMessage>, index: u32) -> io::Result<LinkMessage> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    let replies = netlink.request(RouteNetlinkMessage::GetLink(message), 0)?;
    let link = replies.into_iter().find_map(|reply| match reply {
        RouteNetlinkMessage::NewLink(link) => Some(link),
        _ => None,
    });
    link.ok_or_else(|| io::Error::other(format!("the kernel says nothing of link {index}")))
}

/// The Ethernet address in a link message. The loopback interface has none, whatever its message says.
pub(crate) fn link_mac(link: &LinkMessage) -> Option<Mac> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(bytes) => {
            let mac: [u8; 6] = bytes.as_slice().try_into().ok()?;
            (mac != [0; 6]).then_some(Mac(mac))
        }
        _ => None,
    })
}
