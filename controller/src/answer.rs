//! What a change does, as the API answers it.

use std::collections::BTreeMap;

use daisy_shared::chain::Generation;
use serde::{Deserialize, Serialize};

/// What a change does, for whoever asked for it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Whether anything differs from before.
    pub changed: bool,
    /// The service's generation after the change.
    pub generation: Generation,
    /// Which buckets move.
    pub plan: PlanView,
    /// Buckets that were taken from a backend with the connections that it may hold in them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut_buckets: Option<u32>,
    /// What the operator should know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// Which buckets move.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanView {
    /// How many buckets get another head.
    pub moved_buckets: u32,
    /// For each backend whose share changes, by name.
    pub per_backend: BTreeMap<String, ShareView>,
}

/// How many buckets a backend is head of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareView {
    /// Before the change.
    pub before: u32,
    /// After the change.
    pub after: u32,
}
