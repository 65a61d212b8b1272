//! Tables from the controller: what [`daisy_node::sync`] hands over, put to work.

use std::collections::BTreeMap;
use std::sync::Arc;

use daisy_node::sync::{Node, Refused};
use daisy_shared::bucket::Piece;
use daisy_shared::control::{Directory, DrainReport};
use daisy_shared::service::{Service, ServiceId};
use tracing::info;

use crate::metrics::{Counters, Published};
use crate::neighbours::Neighbours;
use crate::state::State;

/// The mux as the sync loop sees it.
#[derive(Debug)]
pub struct Mux {
    state: Arc<State>,
    neighbours: Neighbours,
    published: Vec<Arc<Published>>,
    is_ready: bool,
}

impl Mux {
    /// A mux of this state, whose I/O threads show their counters here.
    pub fn new(state: Arc<State>, neighbours: Neighbours, published: Vec<Arc<Published>>) -> Mux {
        Mux { state, neighbours, published, is_ready: false }
    }

    /// Says in the log, once, that the mux has a table and forwards by it.
    pub fn set_ready(&mut self) {
        if !self.is_ready {
            self.is_ready = true;
            let services = self.state.lock().tables.services().count();
            info!(services, "ready");
        }
    }
}

/// The counters of all I/O threads together.
pub fn total(published: &[Arc<Published>]) -> Counters {
    published.iter().fold(Counters::default(), |mut total, thread| {
        total += thread.read();
        total
    })
}

impl Node for Mux {
    fn apply_directory(&mut self, directory: &Directory) {
        let backends = {
            let mut control = self.state.lock();
            control.tables.set_directory(directory);
            control.tables.backend_addresses()
        };
        // Not under the lock: the resolver needs it to hand over what it finds.
        self.neighbours.want(backends);
    }

    fn apply_table(&mut self, service: &Service, piece: &Piece) -> Result<(), Refused> {
        self.state.lock().apply(service, piece)
    }

    fn remove_service(&mut self, service: ServiceId) {
        self.state.lock().remove(service);
    }

    fn snapshot(&self, service: ServiceId) -> Option<Piece> {
        self.state.lock().tables.piece(service)
    }

    fn counters(&mut self) -> BTreeMap<String, u64> {
        let mut control = self.state.lock();
        let mut total = total(&self.published);
        if let Some(plane) = control.tables.plane() {
            total += plane.counters();
        }
        let mut counters = total.by_name();
        counters.insert("table_swaps".to_owned(), control.tables.swaps());
        counters
    }

    /// Muxes hold no connections.
    fn drained(&mut self) -> Vec<DrainReport> {
        Vec::new()
    }

    fn synced(&mut self) {
        self.set_ready();
    }
}
