//! The services' addresses on this host: on `lo`, so that the local stack takes their packets, and silent on the
//! underlay, so that no ARP request for them is answered (they belong to the muxes there).
//!
//! What is changed is remembered in the state directory, before it is changed, so that whoever unloads the agent
//! can undo it: no more and no less.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use daisy_node::interface::{InterfaceAddress, addresses};
use daisy_node::netlink::Connection;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::net::if_::InterfaceFlags;
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

const FILE: &str = "vip.json";
const LOOPBACK: &str = "lo";

/// Why an address could not be set up or taken down.
#[derive(Debug, thiserror::Error)]
pub enum VipError {
    /// The kernel refused.
    #[error("{what}: {error}")]
    Kernel {
        /// What was to happen.
        what: String,
        /// What the kernel said.
        error: io::Error,
    },
    /// The record of changes cannot be used.
    #[error("{}: {error}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        error: io::Error,
    },
}

/// What was changed on this host and is to be undone.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    /// Addresses that were put on `lo`.
    addresses: BTreeSet<Ipv4Addr>,
    /// Settings of the kernel's, by file, with what they were and what they are.
    settings: BTreeMap<PathBuf, Setting>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Setting {
    was: u32,
    set: u32,
}

/// The services' addresses on this host.
pub struct Vips {
    netlink: Connection<RouteNetlinkMessage>,
    loopback: u32,
    path: PathBuf,
    record: Record,
    /// Addresses that were on `lo` already, as the log has said.
    foreign: BTreeSet<Ipv4Addr>,
    /// The record could not be written, and the log says so.
    unwritten: bool,
}

impl Vips {
    /// Reads what was changed earlier from the state directory, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// If the record is damaged, or if the kernel has no `lo`.
    pub fn open(state_dir: &Path) -> Result<Vips, VipError> {
        let path = state_dir.join(FILE);
        let record = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|error| VipError::Record { path: path.clone(), error: error.into() })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Record::default(),
            Err(error) => return Err(VipError::Record { path, error }),
        };
        Vips::with(path, record)
    }

    /// As [`Vips::open`]; but a record that cannot be read is reported in the log and begun anew, so that what
    /// was changed before it is taken for somebody else's and stays. Better that than an agent that does not start.
    ///
    /// # Errors
    /// If the kernel has no `lo`.
    pub fn open_or_begin(state_dir: &Path) -> Result<Vips, VipError> {
        Vips::open(state_dir).or_else(|error| match error {
            VipError::Record { path, error } => {
                warn!(file = %path.display(), %error, "the record of changes to this host is lost; beginning a new one");
                Vips::with(path, Record::default())
            }
            error => Err(error),
        })
    }

    fn with(path: PathBuf, record: Record) -> Result<Vips, VipError> {
        let netlink = Connection::open(NETLINK_ROUTE).map_err(kernel("open a netlink socket"))?;
        let loopback = nix::net::if_::if_nametoindex(LOOPBACK)
            .map_err(|error| kernel("find the loopback interface lo")(error.into()))?;
        let interfaces =
            nix::ifaddrs::getifaddrs().map_err(|error| kernel("list interfaces")(error.into()))?;
        let mut flags = interfaces.filter(|entry| entry.interface_name == LOOPBACK).map(|entry| entry.flags);
        if !flags.any(|flags| flags.contains(InterfaceFlags::IFF_UP)) {
            warn!("lo is down: the services' addresses on it will not be served (ip link set lo up)");
        }
        Ok(Vips { netlink, loopback, path, record, foreign: BTreeSet::new(), unwritten: false })
    }

    /// Keeps the underlay interface silent about addresses on `lo`: `arp_ignore` = 1, `arp_announce` = 2 (see
    /// `ip-sysctl` in the kernel's documentation). Stricter settings are left alone.
    ///
    /// # Errors
    /// If the settings cannot be read or written.
    pub fn silence_arp(&mut self, interface: &str) -> Result<(), VipError> {
        let setting = |interface: &str, name: &str| {
            PathBuf::from(format!("/proc/sys/net/ipv4/conf/{interface}/{name}"))
        };
        for (name, wanted) in [("arp_ignore", 1), ("arp_announce", 2)] {
            let path = setting(interface, name);
            let was = read_setting(&path)?;
            // The kernel goes by the larger of the interface's and the general setting.
            if was.max(read_setting(&setting("all", name))?) >= wanted {
                continue;
            }
            self.record.settings.insert(path.clone(), Setting { was, set: wanted });
            self.write_record();
            write_setting(&path, wanted)?;
            info!(interface, name, was, set = wanted, "ARP setting changed");
        }
        let effective =
            read_setting(&setting(interface, "rp_filter"))?.max(read_setting(&setting("all", "rp_filter"))?);
        if effective == 1 {
            warn!(
                interface,
                "rp_filter is 1: packets of clients whose route leaves through another interface will be dropped"
            );
        }
        Ok(())
    }

    /// Puts an address on `lo`. One that is there already is left alone.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn add(&mut self, vip: Ipv4Addr) -> Result<(), VipError> {
        if self.on_loopback()?.iter().any(|there| there.address == vip) {
            if !self.record.addresses.contains(&vip) && self.foreign.insert(vip) {
                info!(%vip, "the address is on lo already; it will be left there");
            }
            return Ok(());
        }
        self.record.addresses.insert(vip);
        self.write_record();
        let message = RouteNetlinkMessage::NewAddress(self.message(vip));
        match self.netlink.request(message, NLM_F_CREATE | NLM_F_EXCL) {
            Ok(_) => {
                info!(%vip, "address added to lo");
                Ok(())
            }
            Err(error) => {
                self.record.addresses.remove(&vip);
                self.write_record();
                Err(kernel(format!("add {vip}/32 to lo"))(error))
            }
        }
    }

    /// Takes an address from `lo`, if it was put there by [`Vips::add`].
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn remove(&mut self, vip: Ipv4Addr) -> Result<(), VipError> {
        if !self.record.addresses.contains(&vip) {
            return Ok(());
        }
        let message = RouteNetlinkMessage::DelAddress(self.message(vip));
        match self.netlink.request(message, 0) {
            Ok(_) => info!(%vip, "address removed from lo"),
            Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {
                info!(%vip, "the address is no longer on lo");
            }
            Err(error) => return Err(kernel(format!("remove {vip}/32 from lo"))(error)),
        }
        self.record.addresses.remove(&vip);
        self.write_record();
        Ok(())
    }

    /// The addresses that were put on `lo` and are not in `keep`.
    pub fn others(&self, keep: &BTreeSet<Ipv4Addr>) -> Vec<Ipv4Addr> {
        self.record.addresses.difference(keep).copied().collect()
    }

    /// Undoes everything. A setting that somebody else has changed since is left alone.
    ///
    /// # Errors
    /// The first thing that could not be undone; the record keeps what is left.
    pub fn restore(mut self) -> Result<(), VipError> {
        for vip in self.others(&BTreeSet::new()) {
            self.remove(vip)?;
        }
        while let Some((path, Setting { was, set })) = self.record.settings.pop_first() {
            // The interface may be gone, and its settings with it.
            if path.exists() && read_setting(&path)? == set {
                write_setting(&path, was)?;
                info!(setting = %path.display(), was = set, set = was, "ARP setting restored");
            }
        }
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(VipError::Record { path: self.path, error })
            }
            _ => Ok(()),
        }
    }

    fn on_loopback(&mut self) -> Result<Vec<InterfaceAddress>, VipError> {
        addresses(&mut self.netlink, self.loopback).map_err(kernel("list the addresses on lo"))
    }

    fn message(&self, vip: Ipv4Addr) -> AddressMessage {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.prefix_len = 32;
        message.header.index = self.loopback;
        // Valid on this host only: never chosen as the source of the host's own connections.
        message.header.scope = AddressScope::Host;
        message.attributes.push(AddressAttribute::Local(IpAddr::V4(vip)));
        message.attributes.push(AddressAttribute::Address(IpAddr::V4(vip)));
        message
    }

    /// Writes the record. A disk that refuses does not stop traffic: it is reported, once.
    fn write_record(&mut self) {
        match self.try_write_record() {
            Ok(()) => self.unwritten = false,
            Err(error) if !self.unwritten => {
                self.unwritten = true;
                warn!(file = %self.path.display(), %error, "what was changed on lo cannot be remembered");
            }
            Err(_) => {}
        }
    }

    fn try_write_record(&self) -> io::Result<()> {
        if let Some(dir) = self.path.parent() {
            fs::create_dir_all(dir)?;
        }
        let new = self.path.with_extension("new");
        fs::write(&new, serde_json::to_vec_pretty(&self.record)?)?;
        fs::File::open(&new)?.sync_all()?;
        fs::rename(&new, &self.path)
    }
}

fn kernel(what: impl Into<String>) -> impl FnOnce(io::Error) -> VipError {
    let what = format!("cannot {}", what.into());
    |error| VipError::Kernel { what, error }
}

fn read_setting(path: &Path) -> Result<u32, VipError> {
    let text = fs::read_to_string(path).map_err(kernel(format!("read {}", path.display())))?;
    let invalid =
        |error| kernel(format!("read {}", path.display()))(io::Error::new(io::ErrorKind::InvalidData, error));
    text.trim().parse::<u32>().map_err(invalid)
}

fn write_setting(path: &Path, value: u32) -> Result<(), VipError> {
    fs::write(path, value.to_string()).map_err(kernel(format!("write {}", path.display())))
}
