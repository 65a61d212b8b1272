//! Messages between nodes (muxes and agents) and the controller.
//!
//! One request does it all: `POST /v1/nodes/{name}/sync`. A node says who it is, what it has applied and what it
//! has to report; that renews its lease and acknowledges generations. The controller answers at once if it has
//! something to say, and otherwise when it has, or after [`SyncRequest::wait_ms`]. Then the node applies, and
//! syncs again. Bodies are JSON; tables travel in them as base64 of [`Piece::encode`].

use core::net::IpAddr;
use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::bucket::{BackendId, Piece};
use crate::chain::Generation;
use crate::service::{Service, ServiceId};

/// What a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeKind {
    /// A mux: needs every bucket, head and previous owner.
    Mux,
    /// A backend's agent: needs the whole chain of the buckets that concern it.
    Agent,
}

/// A node's half of a sync.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SyncRequest {
    /// What the node is.
    pub kind: NodeKind,
    /// Its address on the underlay.
    pub address: IpAddr,
    /// The version of its software, for people.
    pub version: String,
    /// How long the controller may keep the request when it has nothing to say, in milliseconds.
    pub wait_ms: u64,
    /// The version of the directory that it has applied; 0 if none.
    pub directory: u64,
    /// The generation of each service's table that it has applied.
    pub applied: BTreeMap<ServiceId, Generation>,
    /// Buckets in which this backend, a previous owner, holds nothing any more (rule 8).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drained: Vec<DrainReport>,
    /// What came of the probes that the controller asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub probed: Vec<ProbeResult>,
    /// The node's counters since it started, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub counters: BTreeMap<String, u64>,
}

/// Buckets in which a previous owner holds nothing any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrainReport {
    /// The service.
    pub service: ServiceId,
    /// Each bucket with the generation that the agent knew of it, and in which it is not the head, before it
    /// looked for connections.
    pub buckets: Vec<(u32, Generation)>,
}

/// What came of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProbeResult {
    /// The backend that was probed.
    pub address: IpAddr,
    /// Whether its data path answered.
    pub answered: bool,
}

/// The controller's half of a sync.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncResponse {
    /// A node that has not been heard of for this long is taken for lost, in milliseconds.
    pub lease_ms: u64,
    /// The directory, if the node's is older. It is to be applied before the tables.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<Directory>,
    /// Tables that the node lacks or has older.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tables: Vec<TableUpdate>,
    /// Services that are gone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub removed: Vec<ServiceId>,
    /// Backends to probe; results go into the next sync.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub probe: Vec<IpAddr>,
}

/// Who is who on the underlay.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Directory {
    /// Grows with every change.
    pub version: u64,
    /// All backends that a table may name.
    pub backends: Vec<DirectoryEntry>,
    /// The addresses of all muxes.
    pub muxes: Vec<IpAddr>,
}

/// A backend in the directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectoryEntry {
    /// Its number in tables.
    pub id: BackendId,
    /// Its name, as operators know it.
    pub name: String,
    /// Its address on the underlay.
    pub address: IpAddr,
    /// Declared dead (rule 9): agents skip it.
    pub dead: bool,
}

/// A service and what is new in its table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableUpdate {
    /// The service, whole.
    pub service: Service,
    /// A snapshot, or a delta from what the node said it has applied.
    #[serde(serialize_with = "piece_to_base64", deserialize_with = "piece_from_base64")]
    pub piece: Piece,
}

fn piece_to_base64<S: Serializer>(piece: &Piece, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&STANDARD.encode(piece.encode()))
}

fn piece_from_base64<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Piece, D::Error> {
    let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
    let bytes = STANDARD.decode(text.as_bytes()).map_err(de::Error::custom)?;
    Piece::decode(&bytes).map_err(de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bucket::{Chain, Entry};
    use crate::flow::HashKey;
    use crate::service::{Encapsulation, Protocol};

    #[test]
    fn a_table_survives_json() {
        let service = Service {
            id: ServiceId(7),
            name: "web".into(),
            vip: "203.0.113.1".parse().unwrap(),
            protocol: Protocol::Tcp,
            port: 80,
            buckets: 16,
            hash_key: HashKey([0x5a; 16]),
            encapsulation: Encapsulation::Gue,
        };
        let chain: Chain = [BackendId(1), BackendId(0)].into_iter().collect();
        let piece = Piece {
            service: service.id,
            from: Some(Generation(3)),
            generation: Generation(4),
            buckets: 16,
            entries: vec![Entry { bucket: 5, generation: Generation(4), chain }],
        };
        let response = SyncResponse {
            lease_ms: 3000,
            tables: vec![TableUpdate { service, piece }],
            ..Default::default()
        };
        let text = serde_json::to_string(&response).unwrap();
        assert_eq!(serde_json::from_str::<SyncResponse>(&text).unwrap(), response);
        let damaged = text.replace("\"piece\":\"RFNZ", "\"piece\":\"RFNY");
        assert!(serde_json::from_str::<SyncResponse>(&damaged).is_err());
    }
}
