//! Attaching the programs to the interface, so that a later run finds and replaces them without a gap, and
//! removing them.

use std::fs;
use std::io;
use std::path::Path;

use aya::programs::links::{FdLink, Link as _, LinkError, PinnedLink};
use aya::programs::tc::{
    NlOptions, SchedClassifierLink, TcAttachOptions, TcAttachType, TcError, TcHandle, qdisc_add_clsact,
};
use aya::programs::xdp::XdpLink;
use daisy_node::interface::{Interface, InterfaceError};
use daisy_node::netlink::Connection;
use daisy_node::xdp::{Attached as In, Mode};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage, LinkXdp, XdpAttached};
use netlink_packet_route::tc::{TcHandle as Handle, TcMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use tracing::{info, warn};

use super::error::DatapathError;
use super::pins::Pins;
use super::{AGENT, Attached, Datapath, MSS, classifier, syscall, xdp};

/// The tc filter's place, by which a later run finds it.
const TC_PRIORITY: u16 = 0xda1;
const TC_HANDLE: TcHandle = TcHandle::new(0, 0xda1);

impl Datapath {
    /// Attaches the programs to the interface. Where an earlier run's are attached, they are replaced: every packet
    /// meets one or the other.
    ///
    /// # Errors
    /// If the kernel refuses; that another XDP program is attached is the usual cause.
    pub fn attach(&mut self) -> Result<Attached, DatapathError> {
        self.attach_mss()?;
        let attached = match self.replace_xdp()? {
            Some(mode) => Attached { mode, replaced: true },
            None => {
                let interface = self.interface.clone();
                let program = xdp(&mut self.ebpf, AGENT)?;
                let (link, mode) = daisy_node::xdp::attach(program, &interface, self.config.mode)
                    .map_err(|error| DatapathError::kernel(AGENT, &error))?;
                let link = program.take_link(link).map_err(|error| DatapathError::kernel(AGENT, &error))?;
                let link = FdLink::try_from(link).map_err(|error| DatapathError::kernel(AGENT, &error))?;
                let path = self.pins.link();
                link.pin(&path).map_err(|error| DatapathError::kernel(path.display().to_string(), &error))?;
                Attached { mode, replaced: false }
            }
        };
        self.pins.remove_older()?;
        Ok(attached)
    }

    /// Puts the XDP program in the place of an earlier run's, if one is attached in the mode asked for.
    fn replace_xdp(&mut self) -> Result<Option<In>, DatapathError> {
        let path = self.pins.link();
        let what = || path.display().to_string();
        let pinned = match PinnedLink::from_pin(&path) {
            Ok(pinned) => pinned,
            Err(LinkError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {
                return Ok(None);
            }
            Err(error) => return Err(DatapathError::kernel(what(), &error)),
        };
        let link = FdLink::from(pinned);
        let interface = syscall::link_interface(&path).map_err(|error| DatapathError::io(&path, error))?;
        let mode = attached_mode(&self.interface)?;
        let reason = match (self.config.mode, mode) {
            _ if interface != self.interface.index => "its interface is gone",
            (Mode::Native, Some(In::Generic)) => "it runs in the generic path, native was asked for",
            (Mode::Generic, Some(In::Native)) => "it runs in the driver, generic was asked for",
            (_, None) => "the kernel says that nothing is attached",
            (_, Some(mode)) => {
                let link = XdpLink::try_from(link).map_err(|error| DatapathError::kernel(what(), &error))?;
                let program = xdp(&mut self.ebpf, AGENT)?;
                let id =
                    program.attach_to_link(link).map_err(|error| DatapathError::kernel(what(), &error))?;
                // The pin holds the attachment; this program object must not.
                let link = program.take_link(id).map_err(|error| DatapathError::kernel(what(), &error))?;
                drop(FdLink::try_from(link).map_err(|error| DatapathError::kernel(what(), &error))?);
                info!(interface = self.interface.name, %mode, "XDP program replaced");
                return Ok(Some(mode));
            }
        };
        warn!(link = what(), reason, "the earlier attachment cannot be taken over; detaching it");
        detach_xdp(&self.pins)?;
        Ok(None)
    }

    /// Attaches the MSS program, or puts it in the place of an earlier run's.
    fn attach_mss(&mut self) -> Result<(), DatapathError> {
        let name = self.interface.name.clone();
        let error = |error: &dyn std::error::Error| DatapathError::kernel(MSS, error);
        match qdisc_add_clsact(&name) {
            Ok(()) => {
                let marker = self.pins.clsact();
                match fs::create_dir(&marker) {
                    Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                        return Err(DatapathError::io(&marker, error));
                    }
                    _ => {}
                }
            }
            Err(failed) if is(&failed, libc::EEXIST) => {}
            Err(failed) => return Err(DatapathError::kernel(format!("{name}: clsact qdisc"), &failed)),
        }
        let program = classifier(&mut self.ebpf)?;
        let earlier = earlier_filter(&name).map_err(|failed| error(&failed))?;
        let id = match program.attach_to_link(earlier) {
            Ok(id) => id,
            // There is none.
            Err(_) => {
                let options = NlOptions { priority: TC_PRIORITY, handle: TC_HANDLE, classid: None };
                program
                    .attach_with_options(&name, TcAttachType::Egress, TcAttachOptions::Netlink(options))
                    .map_err(|failed| error(&failed))?
            }
        };
        // Dropped, it would detach.
        std::mem::forget(program.take_link(id).map_err(|failed| error(&failed))?);
        Ok(())
    }

    /// Removes everything from an interface: the programs, their maps and pins, and the clsact qdisc if daisy made
    /// it and nobody else uses it. Fine if there is nothing, or the interface is gone.
    ///
    /// # Errors
    /// If `bpffs` is not a bpf filesystem, or the kernel refuses.
    pub fn unload(interface: &str, bpffs: &Path) -> Result<(), DatapathError> {
        // The kernel knows no such names either, and others' pins may lie there.
        if interface.contains('/') || matches!(interface, "" | "." | "..") {
            return Err(InterfaceError::Missing(interface.to_owned()).into());
        }
        let pins = Pins::new(bpffs, interface)?;
        if let Ok(filter) = earlier_filter(interface) {
            // An error means that there is none.
            let _none = filter.detach();
            if pins.clsact().exists() {
                remove_clsact(interface)
                    .map_err(|error| DatapathError::kernel(format!("{interface}: clsact qdisc"), &error))?;
            }
        }
        detach_xdp(&pins)?;
        pins.remove_all()
    }
}

/// Detaches what is pinned as the XDP program's attachment, and removes the pin.
fn detach_xdp(pins: &Pins) -> Result<(), DatapathError> {
    let path = pins.link();
    match syscall::detach_link(&path) {
        Ok(()) => fs::remove_file(&path).map_err(|error| DatapathError::io(&path, error)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(DatapathError::io(&path, error)),
    }
}

/// The filter that an earlier run may have attached.
fn earlier_filter(interface: &str) -> io::Result<SchedClassifierLink> {
    SchedClassifierLink::attached(interface, TcAttachType::Egress, TC_PRIORITY, TC_HANDLE, None)
}

/// Whether an error of aya's is this one of the kernel's.
fn is(error: &TcError, errno: i32) -> bool {
    match error {
        TcError::NetlinkError(error) => error.raw_os_error() == Some(errno),
        TcError::IoError(error) => error.raw_os_error() == Some(errno),
        _ => false,
    }
}

/// How an XDP program is attached to the interface, if one is.
fn attached_mode(interface: &Interface) -> Result<Option<In>, DatapathError> {
    let error = |error: io::Error| DatapathError::kernel(format!("{}: XDP mode", interface.name), &error);
    let mut netlink = Connection::open(NETLINK_ROUTE).map_err(error)?;
    let mut message = LinkMessage::default();
    message.header.index = interface.index;
    let replies = netlink.request(RouteNetlinkMessage::GetLink(message), 0).map_err(error)?;
    for reply in replies {
        let RouteNetlinkMessage::NewLink(link) = reply else { continue };
        for attribute in link.attributes {
            let LinkAttribute::Xdp(parts) = attribute else { continue };
            for part in parts {
                match part {
                    LinkXdp::Attached(XdpAttached::Driver) => return Ok(Some(In::Native)),
                    LinkXdp::Attached(XdpAttached::SocketBuffer) => return Ok(Some(In::Generic)),
                    _ => {}
                }
            }
        }
    }
    Ok(None)
}

/// Removes the clsact qdisc, unless somebody's filters hang on it.
fn remove_clsact(interface: &str) -> io::Result<()> {
    let index = nix::net::if_::if_nametoindex(interface)?;
    let mut netlink = Connection::open(NETLINK_ROUTE)?;
    for parent in [Handle::from(0xffff_fff2), Handle::from(0xffff_fff3)] {
        let mut message = TcMessage::with_index(index as i32);
        message.header.parent = parent;
        if !netlink.dump(RouteNetlinkMessage::GetTrafficFilter(message))?.is_empty() {
            info!(interface, "the clsact qdisc has filters of others; it stays");
            return Ok(());
        }
    }
    let mut message = TcMessage::with_index(index as i32);
    message.header.handle = Handle::from(0xffff_0000);
    message.header.parent = Handle::from(0xffff_fff1);
    netlink.request(RouteNetlinkMessage::DelQueueDiscipline(message), 0).map(|_| ())
}
