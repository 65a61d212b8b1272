//! Why a packet was dropped. Every drop anywhere in daisy has exactly one of these reasons, and every reason is
//! a counter.

/// Declares the reasons once: the enum, the list of all, and the metric labels cannot drift apart.
macro_rules! drop_reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $label:literal,)+) => {
        /// Why a packet was dropped. [`DropReason::label`] is the name of its counter.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum DropReason {
            $($(#[doc = $doc])+ $name,)+
        }

        impl DropReason {
            /// Every reason, in the order of its discriminant; the eBPF programs number theirs alike.
            pub const ALL: &'static [DropReason] = &[$(DropReason::$name,)+];

            /// The name of the counter, as it stands in metrics, logs and the API.
            pub const fn label(self) -> &'static str {
                match self { $(DropReason::$name => $label,)+ }
            }
        }
    };
}

drop_reasons! {
    /// The frame ends before a header that it announces.
    Truncated = "truncated",
    /// An IPv4 header whose version, header length or total length cannot be.
    BadIpHeader = "bad_ip_header",
    /// An IPv4 header whose checksum is wrong (RFC 791).
    BadIpChecksum = "bad_ip_checksum",
    /// A TCP or UDP header whose lengths cannot be.
    BadTransportHeader = "bad_transport_header",
    /// A fragment: its ports are not all there.
    Fragment = "fragment",
    /// No service is configured for this address, protocol and port.
    UnknownService = "unknown_service",
    /// The service has no backend.
    NoBackend = "no_backend",
    /// The table names a backend that the directory does not know.
    UnknownBackend = "unknown_backend",
    /// The link-layer address of the next hop is not known yet; it has been asked for.
    NoNextHop = "no_next_hop",
    /// With its outer headers the packet does not fit the link.
    TooBig = "too_big",
    /// The device took no more packets.
    TxFull = "tx_full",
    /// A GUE header of another version than 0, or with flags that are not known here.
    GueUnsupported = "gue_unsupported",
    /// A GUE header whose lengths contradict each other, or private data that is not a walk.
    GueMalformed = "gue_malformed",
    /// An encapsulated packet from an address that is neither a mux nor a peer.
    UntrustedSource = "untrusted_source",
    /// The packet has been sent on as often as a packet may be.
    HopsSpent = "hops_spent",
    /// The walk lists more owners than a header can carry.
    WalkOverflow = "walk_overflow",
    /// What the packet teaches does not fit beside what is known.
    ChainOverflow = "chain_overflow",
    /// Nothing is known of the bucket, or nothing but what packets said, and the walk ends here.
    UnknownBucket = "unknown_bucket",
    /// All owners that are left to visit are declared dead, and the newer table without them is not here yet.
    DeadOwner = "dead_owner",
    /// The packet claims to have returned to its origin, or to have visited it, and this is not so.
    WalkContradicts = "walk_contradicts",
    /// The driver gave no room for the outer headers.
    NoHeadroom = "no_headroom",
}

impl core::fmt::Display for DropReason {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.label())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn all_is_indexed_by_discriminant_and_labels_are_unique() {
        for (i, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, i);
        }
        let labels: BTreeSet<_> = DropReason::ALL.iter().map(|r| r.label()).collect();
        assert_eq!(labels.len(), DropReason::ALL.len());
    }
}
