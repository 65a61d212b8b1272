//! What a service is: a virtual address, protocol and port, and the table that spreads its connections.

use core::fmt;
use core::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::flow::HashKey;

/// The number of a service. Given once by the controller and never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ServiceId(pub u32);

impl fmt::Display for ServiceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The transport protocol of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP (RFC 9293).
    Tcp,
}

impl Protocol {
    /// The IANA protocol number.
    pub const fn number(self) -> u8 {
        match self {
            Protocol::Tcp => 6,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "tcp",
        })
    }
}

/// How muxes wrap the packets of a service while a bucket's window is closed. In an open window it is always GUE, since
/// only there can a walk be written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Encapsulation {
    /// Generic UDP Encapsulation: 32 bytes, with the flow's entropy in the UDP source port.
    #[default]
    Gue,
    /// IPv4 in IPv4 (RFC 2003): 20 bytes, without entropy.
    Ipip,
}

impl fmt::Display for Encapsulation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Encapsulation::Gue => "gue",
            Encapsulation::Ipip => "ipip",
        })
    }
}

/// What a node needs to know of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Its number.
    pub id: ServiceId,
    /// Its name, as operators know it.
    pub name: String,
    /// The virtual address (VIP) that clients connect to.
    pub vip: IpAddr,
    /// The transport protocol.
    pub protocol: Protocol,
    /// The port that clients connect to.
    pub port: u16,
    /// How many buckets its table has: a power of two, see [`MIN_BUCKETS`] and [`MAX_BUCKETS`].
    pub buckets: u32,
    /// The key of its flow hash.
    pub hash_key: HashKey,
    /// How its packets travel in closed windows. GUE if nothing is said: tables written before there was a choice say
    /// nothing.
    #[serde(default)]
    pub encapsulation: Encapsulation,
}

/// The smallest table.
pub const MIN_BUCKETS: u32 = 16;
/// The largest table.
pub const MAX_BUCKETS: u32 = 1 << 20;
/// The table of a service for which nothing else was asked.
pub const DEFAULT_BUCKETS: u32 = 1 << 16;

/// Whether a table may have this many buckets.
pub const fn is_bucket_count(buckets: u32) -> bool {
    buckets.is_power_of_two() && buckets >= MIN_BUCKETS && buckets <= MAX_BUCKETS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_before_there_was_a_choice_is_gue() {
        let service = Service {
            id: ServiceId(7),
            name: "web".into(),
            vip: "203.0.113.1".parse().unwrap(),
            protocol: Protocol::Tcp,
            port: 80,
            buckets: 16,
            hash_key: HashKey([0x5a; 16]),
            encapsulation: Encapsulation::Ipip,
        };
        let mut json = serde_json::to_value(&service).unwrap();
        assert_eq!(json["encapsulation"], "ipip");
        assert_eq!(serde_json::from_value::<Service>(json.clone()).unwrap(), service);
        json.as_object_mut().unwrap().remove("encapsulation");
        let older: Service = serde_json::from_value(json).unwrap();
        assert_eq!(older, Service { encapsulation: Encapsulation::Gue, ..service });
    }

    #[test]
    fn display_and_wire_say_the_same() {
        for encapsulation in [Encapsulation::Gue, Encapsulation::Ipip] {
            assert_eq!(serde_json::to_value(encapsulation).unwrap(), encapsulation.to_string());
        }
    }
}
