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
    /// An interface has this Ethernet address.
    pub fn set_mac(&mut self, interface: u8, mac: [u8; 6]) {
        if self.tables.links()[usize::from(interface)].mac != mac {
            self.tables.set_mac(interface, mac);
            self.show_filter();
        }
    }

    /// A table, or a part of one, has come.
    ///
    /// # Errors
    /// If it does not fit; then nothing changes.
    pub fn apply(&mut self, service: &Service, piece: &Piece) -> Result<(), Refused> {
        self.tables.apply(service, piece).map_err(|error| Refused(error.to_string()))?;
        // Only now, as whatever the filter takes must find its service.
        self.show_filter();
        Ok(())
    }

    /// A service is gone.
    pub fn remove(&mut self, service: ServiceId) {
        if let Some(filter) = &mut self.filter {
            let rest = self.tables.services().map(|(service, _)| service).filter(|s| s.id != service);
            report(filter.follow(self.tables.links()[0].mac, rest));
        }
        self.tables.remove(service);
    }

    fn show_filter(&mut self) {
        if let Some(filter) = &mut self.filter {
            let services = self.tables.services().map(|(service, _)| service);
            report(filter.follow(self.tables.links()[0].mac, services));
        }
    }
}

fn report(result: Result<(), crate::io::IoError>) {
    if let Err(error) = result {
        error!(%error, "the XDP program does not follow the services");
    }
}
