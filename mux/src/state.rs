//! What the control threads change, and the one lock around it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use daisy_node::sync::Refused;
use daisy_shared::bucket::Piece;
use daisy_shared::service::{Service, ServiceId};
use tracing::error;

use crate::io::filter::Filter;
use crate::table::Tables;

/// What the control threads change. I/O threads see it through the tables' snapshots only.
#[derive(Debug)]
pub struct State(Mutex<Control>);

/// The tables, and the XDP programs that follow them where there are some.
#[derive(Debug)]
pub struct Control {
    /// Services, tables, backends and next hops.
    pub tables: Tables,
    /// The programs that take packets for services from the interfaces, by number; with AF_XDP only.
    pub filters: Vec<Filter>,
}

impl State {
    /// No services yet.
    pub fn new(tables: Tables, filters: Vec<Filter>) -> State {
        let mut control = Control { tables, filters };
        control.show_filters();
        State(Mutex::new(control))
    }

    /// The state, to look at or to change.
    pub fn lock(&self) -> MutexGuard<'_, Control> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Control {
    /// An interface has this Ethernet address.
    pub fn set_mac(&mut self, interface: u8, mac: [u8; 6]) {
        if self.tables.links()[usize::from(interface)].mac != mac {
            self.tables.set_mac(interface, mac);
            self.show_filters();
        }
    }

    /// A table, or a part of one, has come.
    ///
    /// # Errors
    /// If it does not fit; then nothing changes.
    pub fn apply(&mut self, service: &Service, piece: &Piece) -> Result<(), Refused> {
        self.tables.apply(service, piece).map_err(|error| Refused(error.to_string()))?;
        // Only now, as whatever a filter takes must find its service.
        self.show_filters();
        Ok(())
    }

    /// A service is gone.
    pub fn remove(&mut self, service: ServiceId) {
        // First, as whatever a filter takes must find its service.
        self.show_filters_without(Some(service));
        self.tables.remove(service);
    }

    fn show_filters(&mut self) {
        self.show_filters_without(None);
    }

    fn show_filters_without(&mut self, gone: Option<ServiceId>) {
        for (filter, link) in self.filters.iter_mut().zip(self.tables.links()) {
            let services = self.tables.services().map(|(service, _)| service);
            report(filter.follow(link.mac, services.filter(|service| Some(service.id) != gone)));
        }
    }
}

fn report(result: Result<(), crate::io::IoError>) {
    if let Err(error) = result {
        error!(%error, "the XDP program does not follow the services");
    }
}
