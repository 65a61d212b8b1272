//! What stands in the maps, byte for byte as in `bpf/maps.h`. Addresses and ports are in network byte order.

use std::net::Ipv4Addr;

use aya::Pod;
use daisy_shared::chain::{Generation, Knowledge, MAX_OWNERS};
use daisy_shared::service::{Encapsulation, Service};

use super::layout;

/// `struct link`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub mtu: u32,
    pub max_mss: u32,
    pub address: [u8; 4],
    pub trusted_version: u32,
    pub flags: u32,
    pub services_version: u32,
    pub peers_version: u32,
}

/// `struct counters`.
pub(super) type Counters = [u64; layout::COUNTER_COUNT];

/// `struct service_key`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct ServiceKey {
    pub vip: [u8; 4],
    pub port: [u8; 2],
    pub protocol: u8,
    pub zero: u8,
}

/// `struct service`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct ServiceValue {
    pub hash_key: [u64; 2],
    pub mask: u32,
    pub base: u32,
    pub id: u32,
    pub flags: u32,
}

impl ServiceKey {
    /// Where packets for a service are bound, if it has an IPv4 address.
    pub fn of(service: &Service) -> Option<ServiceKey> {
        let std::net::IpAddr::V4(vip) = service.vip else { return None };
        let (vip, port) = (vip.octets(), service.port.to_be_bytes());
        Some(ServiceKey { vip, port, protocol: service.protocol.number(), zero: 0 })
    }
}

impl ServiceValue {
    /// A service whose buckets start at `base`.
    pub fn of(service: &Service, base: u32) -> ServiceValue {
        let (first, second) = service.hash_key.words();
        let (mask, id) = (service.buckets - 1, service.id.0);
        let flags = match service.encapsulation {
            Encapsulation::Gue => 0,
            Encapsulation::Ipip => layout::SERVICE_IPIP,
        };
        ServiceValue { hash_key: [first, second], mask, base, id, flags }
    }

    /// How many buckets it has.
    pub fn buckets(&self) -> u32 {
        self.mask + 1
    }
}

/// `struct knowledge`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct KnowledgeValue {
    pub lock: u32,
    pub zero: u32,
    pub word: u64,
    pub owners: [[u8; 4]; MAX_OWNERS],
    pub zeros: [u64; 2],
}

impl KnowledgeValue {
    /// Room to read one into.
    pub const EMPTY: KnowledgeValue =
        KnowledgeValue { lock: 0, zero: 0, word: 0, owners: [[0; 4]; MAX_OWNERS], zeros: [0; 2] };

    /// What it says, if anything.
    pub fn read(&self) -> Option<Knowledge<Ipv4Addr>> {
        if self.word & layout::FLAG_KNOWN == 0 {
            return None;
        }
        let len = (self.word >> layout::LEN_SHIFT) as usize & 0xff;
        let chain = self.owners.iter().take(len).map(|octets| Ipv4Addr::from(*octets)).collect();
        let from_table = self.word & layout::FLAG_FROM_TABLE != 0;
        Some(Knowledge { generation: Generation(self.word as u32), chain, from_table })
    }
}

/// `struct peer`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PeerValue {
    pub destination: [u8; 6],
    pub source: [u8; 6],
    pub flags: u32,
}

// SAFETY: `repr(C)`, integers only, without padding, and any bytes are valid.
unsafe impl Pod for Link {}
// SAFETY: as above.
unsafe impl Pod for ServiceKey {}
// SAFETY: as above.
unsafe impl Pod for ServiceValue {}
// SAFETY: as above.
unsafe impl Pod for KnowledgeValue {}
// SAFETY: as above.
unsafe impl Pod for PeerValue {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_c_structures() {
        assert_eq!(size_of::<Link>(), 28);
        assert_eq!(size_of::<ServiceKey>(), 8);
        assert_eq!(size_of::<ServiceValue>(), 32);
        assert_eq!(size_of::<KnowledgeValue>(), 64);
        assert_eq!(size_of::<PeerValue>(), 16);
    }
}
