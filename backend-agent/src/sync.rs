//! The agent's side of the sync loop: what the controller says, carried out.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};

use daisy_node::next_hops::NextHops;
use daisy_node::sync::{Node, Refused};
use daisy_shared::bucket::{BackendId, Chain, Entry, Piece};
use daisy_shared::chain::{Generation, Owners};
use daisy_shared::control::{Directory, DirectoryEntry, DrainReport};
use daisy_shared::service::{Service, ServiceId};
use tracing::{error, info, warn};

use crate::datapath::{Datapath, Installed};
use crate::drain::Drain;
use crate::peers::{Peers, lock};
use crate::vip::Vips;

/// What the threads of the agent share. Whoever locks several locks the data path last.
pub struct Shared {
    /// The data path.
    pub datapath: Arc<Mutex<Datapath>>,
    /// The other agents.
    pub peers: Arc<Peers>,
    /// Where they are reached.
    pub next_hops: NextHops,
    /// The buckets to be drained.
    pub drain: Mutex<Drain>,
    /// Drain reports that the sync loop has not taken yet.
    pub reports: Mutex<Vec<DrainReport>>,
}

/// The agent, as the sync loop sees it.
pub struct Agent {
    me: Ipv4Addr,
    shared: Arc<Shared>,
    vips: Vips,
    /// Prefixes that are trusted whatever the directory says.
    trust: Vec<(Ipv4Addr, u8)>,
    /// Prefixes have been handed to the data path.
    trusting: bool,
    backends: BTreeMap<BackendId, Backend>,
    tables: BTreeMap<ServiceId, Table>,
    /// A table was refused since the last answer.
    refused: bool,
    /// What an earlier run has left and the controller does not know has been removed.
    tidy: bool,
    /// Told once, when a controller has answered.
    synced: Option<Sender<()>>,
    /// Counters could not be read, and the log says so.
    uncounted: bool,
}

/// A backend of the directory.
struct Backend {
    name: String,
    address: IpAddr,
}

/// A service's table, as the controller has sent it.
struct Table {
    service: Service,
    generation: Generation,
    entries: BTreeMap<u32, Entry>,
}

impl Agent {
    /// An agent without tables. `synced` is told when a controller has answered for the first time.
    pub fn new(
        me: Ipv4Addr,
        shared: Arc<Shared>,
        vips: Vips,
        trust: Vec<(Ipv4Addr, u8)>,
        synced: Sender<()>,
    ) -> Agent {
        Agent {
            me,
            shared,
            vips,
            trust,
            trusting: false,
            backends: BTreeMap::new(),
            tables: BTreeMap::new(),
            refused: false,
            tidy: false,
            synced: Some(synced),
            uncounted: false,
        }
    }

    /// Has the data path trust the fixed prefixes and what a directory names.
    fn trust(&mut self, directory: &Directory) {
        let backends = directory.backends.iter().map(|backend| backend.address);
        let named = backends.chain(directory.muxes.iter().copied());
        let mut prefixes = self.trust.clone();
        prefixes.extend(named.filter_map(|address| match address {
            IpAddr::V4(address) => Some((address, 32)),
            IpAddr::V6(_) => None,
        }));
        match lock(&self.shared.datapath).set_trusted(&prefixes) {
            Ok(()) => self.trusting = true,
            Err(error) => error!(%error, "the data path does not know whom to trust"),
        }
    }

    fn try_apply_table(&mut self, service: &Service, piece: &Piece) -> Result<(), Refused> {
        let IpAddr::V4(vip) = service.vip else {
            return Err(Refused(format!("its address {} is not IPv4", service.vip)));
        };
        let installed = resolve(piece, &self.backends)?;
        let refused = |error: &dyn std::error::Error| Refused(error.to_string());
        lock(&self.shared.datapath).set_service(service).map_err(|error| refused(&error))?;
        // Before the table, with which connections may be accepted.
        self.vips.add(vip).map_err(|error| refused(&error))?;
        lock(&self.shared.datapath).install(service.id, &installed).map_err(|error| refused(&error))?;
        let snapshot = piece.from.is_none();
        let watch =
            piece.entries.iter().map(|entry| (entry.bucket, was_head(entry, self.me, &self.backends)));
        lock(&self.shared.drain).set_table(service, snapshot, watch);
        let table = self.tables.entry(service.id).or_insert_with(|| Table {
            service: service.clone(),
            generation: piece.generation,
            entries: BTreeMap::new(),
        });
        table.generation = piece.generation;
        if snapshot {
            table.entries.clear();
        }
        table.entries.extend(piece.entries.iter().map(|entry| (entry.bucket, entry.clone())));
        Ok(())
    }

    /// Takes an address from `lo` unless a service needs it.
    fn drop_vip(&mut self, vip: Ipv4Addr) {
        if self.tables.values().any(|table| table.service.vip == vip) {
            return;
        }
        if let Err(error) = self.vips.remove(vip) {
            error!(%vip, %error, "address not removed");
        }
    }

    /// Removes what an earlier run has left of services that are gone.
    fn tidy(&mut self) {
        let services = lock(&self.shared.datapath).services();
        for id in services.into_iter().filter(|id| !self.tables.contains_key(id)) {
            info!(service = %id, "removing a service of an earlier run");
            if let Err(error) = lock(&self.shared.datapath).remove_service(id) {
                error!(service = %id, %error, "service not removed from the data path");
            }
        }
        let vips = self.tables.values().filter_map(|table| match table.service.vip {
            IpAddr::V4(vip) => Some(vip),
            IpAddr::V6(_) => None,
        });
        for vip in self.vips.others(&vips.collect()) {
            self.drop_vip(vip);
        }
    }
}

impl Node for Agent {
    fn apply_directory(&mut self, directory: &Directory) {
        let mut peers = BTreeMap::new();
        self.backends.clear();
        for DirectoryEntry { id, name, address, dead } in &directory.backends {
            self.backends.insert(*id, Backend { name: name.clone(), address: *address });
            if let IpAddr::V4(address) = address
                && *address != self.me
            {
                peers.insert(*address, *dead);
            }
        }
        self.trust(directory);
        let wanted = self.shared.peers.set_directory(&peers);
        self.shared.next_hops.set_wanted(wanted);
    }

    fn apply_table(&mut self, service: &Service, piece: &Piece) -> Result<(), Refused> {
        let result = self.try_apply_table(service, piece);
        self.refused |= result.is_err();
        result
    }

    fn remove_service(&mut self, service: ServiceId) {
        lock(&self.shared.drain).remove_service(service);
        if let Err(error) = lock(&self.shared.datapath).remove_service(service) {
            error!(%service, %error, "service not removed from the data path");
        }
        if let Some(Table { service: Service { vip: IpAddr::V4(vip), .. }, .. }) =
            self.tables.remove(&service)
        {
            self.drop_vip(vip);
        }
    }

    fn snapshot(&self, service: ServiceId) -> Option<Piece> {
        let Table { service, generation, entries } = self.tables.get(&service)?;
        Some(Piece {
            service: service.id,
            from: None,
            generation: *generation,
            buckets: service.buckets,
            entries: entries.values().cloned().collect(),
        })
    }

    fn counters(&mut self) -> BTreeMap<String, u64> {
        let counters = lock(&self.shared.datapath).counters();
        if let Err(error) = &counters
            && !self.uncounted
        {
            warn!(%error, "the data path's counters cannot be read");
        }
        self.uncounted = counters.is_err();
        counters.unwrap_or_default()
    }

    fn drained(&mut self) -> Vec<DrainReport> {
        std::mem::take(&mut lock(&self.shared.reports))
    }

    fn synced(&mut self) {
        if !self.trusting {
            // A controller that has no directory yet.
            self.trust(&Directory::default());
        }
        if !std::mem::take(&mut self.refused) && !self.tidy {
            self.tidy();
            self.tidy = true;
        }
        if let Some(synced) = self.synced.take() {
            let _nobody_waits = synced.send(());
        }
    }
}

/// A piece's chains as addresses.
fn resolve(piece: &Piece, backends: &BTreeMap<BackendId, Backend>) -> Result<Vec<Installed>, Refused> {
    let address = |bucket: u32, id: &BackendId| match backends.get(id) {
        Some(Backend { address: IpAddr::V4(address), .. }) => Ok(*address),
        Some(Backend { name, address }) => {
            Err(Refused(format!("bucket {bucket} names backend {name}, whose address {address} is not IPv4")))
        }
        None => Err(Refused(format!("bucket {bucket} names backend {id}, which the directory does not"))),
    };
    let chain = |bucket: u32, chain: &Chain| {
        let chain: Result<Owners<Ipv4Addr>, Refused> = chain.iter().map(|id| address(bucket, id)).collect();
        let chain = chain?;
        let distinct: BTreeSet<_> = chain.iter().collect();
        if distinct.len() < chain.len() {
            return Err(Refused(format!("bucket {bucket} names two backends of one address")));
        }
        Ok(chain)
    };
    let installed = |entry: &Entry| {
        let Entry { bucket, generation, .. } = *entry;
        Ok(Installed { bucket, generation, chain: chain(bucket, &entry.chain)? })
    };
    piece.entries.iter().map(installed).collect()
}

/// The generation of an entry in which `me` is a previous owner.
fn was_head(entry: &Entry, me: Ipv4Addr, backends: &BTreeMap<BackendId, Backend>) -> Option<Generation> {
    let is_me = |id: &BackendId| backends.get(id).is_some_and(|backend| backend.address == me);
    entry.chain.iter().skip(1).any(is_me).then_some(entry.generation)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
    const OTHER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

    fn backends() -> BTreeMap<BackendId, Backend> {
        let addresses = [ME.into(), OTHER.into(), "2001:db8::1".parse().unwrap(), OTHER.into()];
        let backend = |(id, address)| (BackendId(id), Backend { name: format!("b{id}"), address });
        (0..).zip(addresses).map(backend).collect()
    }

    fn entry(bucket: u32, chain: &[u16]) -> Entry {
        Entry { bucket, generation: Generation(7), chain: chain.iter().map(|id| BackendId(*id)).collect() }
    }

    #[test]
    fn a_chain_that_cannot_be_resolved_refuses_the_piece() {
        let piece = |entries| Piece {
            service: ServiceId(1),
            from: None,
            generation: Generation(7),
            buckets: 16,
            entries,
        };
        let installed = resolve(&piece(vec![entry(3, &[1, 0]), entry(4, &[])]), &backends()).unwrap();
        let expected = [(3, Owners::from_iter([OTHER, ME])), (4, Owners::new())];
        assert_eq!(installed.len(), 2);
        for (installed, (bucket, chain)) in installed.into_iter().zip(expected) {
            assert_eq!(installed, Installed { bucket, generation: Generation(7), chain });
        }
        for (chain, reason) in [
            (&[0, 9][..], "bucket 5 names backend 9, which the directory does not"),
            (&[2], "bucket 5 names backend b2, whose address 2001:db8::1 is not IPv4"),
            (&[1, 0, 3], "bucket 5 names two backends of one address"),
        ] {
            let error = resolve(&piece(vec![entry(3, &[1, 0]), entry(5, chain)]), &backends()).unwrap_err();
            assert_eq!(error.to_string(), reason);
        }
    }

    #[test]
    fn only_previous_owners_are_watched() {
        for (chain, watched) in [(&[0, 1][..], false), (&[1, 0], true), (&[1], false), (&[], false)] {
            let generation = watched.then_some(Generation(7));
            assert_eq!(was_head(&entry(3, chain), ME, &backends()), generation, "{chain:?}");
        }
    }
}
