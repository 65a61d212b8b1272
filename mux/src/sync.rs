//! Tables from the controller: what [`daisy_node::sync`] hands over, put to work.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use daisy_node::sync::{Node, Refused};
use daisy_shared::bucket::Piece;
use daisy_shared::control::{Directory, DrainReport};
use daisy_shared::service::{Service, ServiceId};
use tracing::{error, info};

use crate::io::filter::Filter;
use crate::metrics::{Counters, Published};
use crate::neighbours::Neighbours;
use crate::table::{Link, Tables};

/// What the control threads change. I/O threads see it through the tables' snapshots only.
#[derive(Debug)]
pub struct State(Mutex<Control>);

/// The tables, and the XDP program that follows them where there is one.
#[derive(Debug)]
pub struct Control {
    /// Services, tables, backends and next hops.
    pub tables: Tables,
    /// Takes packets for services from the interface; with AF_XDP only.
    pub filter: Option<Filter>,
}

impl State {
    /// No services yet.
    pub fn new(tables: Tables, filter: Option<Filter>) -> State {
        let mut control = Control { tables, filter };
        control.show_filter();
        State(Mutex::new(control))
    }

    /// The state, to look at or to change.
    pub fn lock(&self) -> MutexGuard<'_, Control> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Control {
    /// The interface has changed.
    pub fn set_link(&mut self, link: Link) {
        if *self.tables.link() != link {
            self.tables.set_link(link);
            self.show_filter();
        }
    }

    fn apply(&mut self, service: &Service, piece: &Piece) -> Result<(), Refused> {
        self.tables.apply(service, piece).map_err(|error| Refused(error.to_string()))?;
        // Only now, as whatever the filter takes must find its service.
        self.show_filter();
        Ok(())
    }

    fn remove(&mut self, service: ServiceId) {
        if let Some(filter) = &mut self.filter {
            let rest = self.tables.services().map(|(service, _)| service).filter(|s| s.id != service);
            report(filter.follow(self.tables.link().mac, rest));
        }
        self.tables.remove(service);
    }

    fn show_filter(&mut self) {
        if let Some(filter) = &mut self.filter {
            let services = self.tables.services().map(|(service, _)| service);
            report(filter.follow(self.tables.link().mac, services));
        }
    }
}

fn report(result: Result<(), crate::io::IoError>) {
    if let Err(error) = result {
        error!(%error, "the XDP program does not follow the services");
    }
}

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
        let mut counters = total(&self.published).by_name();
        counters.insert("table_swaps".to_owned(), self.state.lock().tables.swaps());
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
