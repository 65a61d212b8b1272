//! Next hops: to which Ethernet address a packet for a peer goes.
//!
//! The data paths of muxes and agents send past the kernel's stack, but the kernel keeps what they need: routes
//! say through which neighbour a peer is reached, and the neighbour table (ARP) says where that neighbour is.
//! [`NextHops`] asks for both over rtnetlink, follows changes, and keeps the kernel asking: it resolves
//! neighbours that are wanted and missing, and has those confirmed that have gone stale, because the kernel
//! cannot see that they are in use.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use netlink_packet_core::{NLM_F_CREATE, NetlinkPayload};
use netlink_packet_route::link::LinkFlags;
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tracing::{debug, error, info, warn};

use crate::interface::{Interface, Mac, link, link_mac};
use crate::netlink::{Connection, messages};

/// Where a packet for a peer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NextHop {
    /// The number of the interface that it leaves through.
    pub interface: u32,
    /// That interface's Ethernet address.
    pub source: Mac,
    /// The Ethernet address of the neighbour that it goes to.
    pub destination: Mac,
}

/// Keeps the next hops of wanted addresses up to date, in a thread of its own, in the network namespace of the
/// thread that started it. Ends when dropped.
#[derive(Debug)]
pub struct NextHops {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What the resolver's thread and its users share.
#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// The resolver has worked.
    progress: Condvar,
    /// Wakes the resolver.
    wake: EventFd,
}

#[derive(Debug, Default)]
struct State {
    wanted: BTreeSet<Ipv4Addr>,
    /// `wanted` has changed since the resolver looked.
    changed: bool,
    stop: bool,
    /// Wanted addresses with a next hop, and those of which it is known that they have none for now.
    settled: BTreeMap<Ipv4Addr, bool>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        // The counter of an eventfd cannot overflow here, and a wake-up that is pending already is as good.
        let _pending = self.wake.write(1);
    }
}

impl NextHops {
    /// Starts to resolve through these interfaces and no others. `on_change` is called, from the resolver's thread,
    /// whenever the next hop of a wanted address appears, changes or (`None`) vanishes.
    ///
    /// # Errors
    /// If the kernel gives no netlink sockets or no thread.
    pub fn start(
        interfaces: &[Interface],
        on_change: impl FnMut(Ipv4Addr, Option<NextHop>) + Send + 'static,
    ) -> io::Result<NextHops> {
        // Subscribed before anything is asked for: nothing can change unseen in between.
        let mut monitor = Socket::new(NETLINK_ROUTE)?;
        monitor.bind(&SocketAddr::new(0, 0))?;
        for group in
            [libc::RTNLGRP_LINK, libc::RTNLGRP_NEIGH, libc::RTNLGRP_IPV4_ROUTE, libc::RTNLGRP_IPV4_IFADDR]
        {
            monitor.add_membership(group)?;
        }
        monitor.set_non_blocking(true)?;
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            progress: Condvar::new(),
            wake: EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
        });
        let resolver = Resolver {
            requests: Connection::open(NETLINK_ROUTE)?,
            monitor,
            links: interfaces
                .iter()
                .map(|interface| Link { interface: interface.clone(), up: false })
                .collect(),
            neighbours: HashMap::new(),
            targets: BTreeMap::new(),
            on_change,
            shared: shared.clone(),
        };
        let thread = std::thread::Builder::new().name("next-hops".into()).spawn(move || resolver.run())?;
        Ok(NextHops { shared, thread: Some(thread) })
    }

    /// Wants the next hops of these addresses and of no others.
    pub fn set_wanted(&self, addresses: BTreeSet<Ipv4Addr>) {
        self.shared.change(|state| {
            state.changed |= state.wanted != addresses;
            state.wanted = addresses;
        });
    }

    /// Wants the next hop of one more address.
    pub fn want(&self, address: Ipv4Addr) {
        self.shared.change(|state| state.changed |= state.wanted.insert(address));
    }

    /// Waits until it is known of every wanted address whether it has a next hop, at most for this long. Returns
    /// the addresses without one.
    pub fn settle(&self, timeout: Duration) -> BTreeSet<Ipv4Addr> {
        let deadline = Instant::now() + timeout;
        let mut state = self.shared.lock();
        loop {
            let unknown = state.wanted.iter().any(|address| !state.settled.contains_key(address));
            let left = deadline.saturating_duration_since(Instant::now());
            if !unknown || left.is_zero() {
                let has_none = |address: &&Ipv4Addr| state.settled.get(address) != Some(&true);
                return state.wanted.iter().filter(has_none).copied().collect();
            }
            state = self.shared.progress.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for NextHops {
    fn drop(&mut self) {
        self.shared.change(|state| state.stop = true);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            error!("the next-hop resolver panicked");
        }
    }
}

/// How often wanted neighbours that are missing or stale are asked for.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// One of the interfaces.
#[derive(Debug)]
struct Link {
    interface: Interface,
    up: bool,
}

/// Who a packet goes to next: an interface's number, and a neighbour's address there.
type Gateway = (u32, Ipv4Addr);

/// A neighbour on an interface, as the kernel has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Neighbour {
    state: NeighbourState,
    mac: Option<Mac>,
}

impl Neighbour {
    /// Where it is, if it can be sent to. The kernel itself sends to neighbours in these states.
    fn usable(&self) -> Option<Mac> {
        use NeighbourState::{Delay, Noarp, Permanent, Probe, Reachable, Stale};
        matches!(self.state, Reachable | Stale | Delay | Probe | Permanent | Noarp)
            .then_some(self.mac)
            .flatten()
    }

    /// Whether the kernel is to be told that it is in use.
    fn wants_asking(&self) -> bool {
        matches!(self.state, NeighbourState::Stale | NeighbourState::Failed | NeighbourState::None)
    }
}

/// A wanted address.
#[derive(Debug)]
struct Target {
    /// The neighbour that it is reached through, or why there is none.
    via: Result<Gateway, String>,
    /// What `on_change` was last told.
    published: Option<NextHop>,
    /// What the log was last told.
    complaint: Option<String>,
}

/// What a notification bears on.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Change {
    Nothing,
    /// Neighbours, which have been taken over already.
    Neighbours,
    /// Routes, or an interface itself.
    Routes,
    /// Notifications were lost: everything may have changed.
    Everything,
}

struct Resolver<F> {
    requests: Connection<RouteNetlinkMessage>,
    monitor: Socket,
    links: Vec<Link>,
    neighbours: HashMap<Gateway, Neighbour>,
    targets: BTreeMap<Ipv4Addr, Target>,
    on_change: F,
    shared: Arc<Shared>,
}

impl<F: FnMut(Ipv4Addr, Option<NextHop>)> Resolver<F> {
    fn run(mut self) {
        let mut change = Change::Everything;
        let mut asked: Option<Instant> = None;
        loop {
            let fresh = {
                let mut state = self.shared.lock();
                if state.stop {
                    return;
                }
                std::mem::take(&mut state.changed).then(|| state.wanted.clone())
            };
            if change == Change::Everything
                && let Err(error) = self.reload()
            {
                warn!(%error, "cannot read neighbours from the kernel");
            }
            if change >= Change::Routes {
                self.look_at_links();
                self.look_up_all();
            }
            let fresh_wanted = fresh.is_some();
            if let Some(wanted) = fresh {
                self.take_wanted(&wanted);
            }
            if fresh_wanted || change >= Change::Routes || asked.is_none_or(|at| at.elapsed() >= ASK_EVERY) {
                self.ask();
                asked = Some(Instant::now());
            }
            self.publish();
            let again = asked.filter(|_| self.must_ask()).map(|at| ASK_EVERY.saturating_sub(at.elapsed()));
            change = self.wait(again);
        }
    }

    /// Waits for notifications, a wake-up or the time, and takes over what the notifications say.
    fn wait(&mut self, timeout: Option<Duration>) -> Change {
        // Rounded up, so that it does not return just before the time.
        let timeout = timeout.map_or(PollTimeout::NONE, |timeout| {
            PollTimeout::try_from(timeout + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
        });
        let mut fds = [
            PollFd::new(self.monitor.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN),
        ];
        if let Err(error) = poll(&mut fds, timeout)
            && error != nix::Error::EINTR
        {
            // Cannot happen with valid arguments; the next round tries again, not at once.
            error!(%error, "poll");
            std::thread::sleep(ASK_EVERY);
        }
        let _none_pending = self.shared.wake.read();
        let mut change = Change::Nothing;
        loop {
            match self.monitor.recv_from_full() {
                Ok((datagram, _)) => {
                    for message in messages::<RouteNetlinkMessage>(&datagram) {
                        change = change.max(match message {
                            Ok(message) => self.notice(message.payload),
                            // From a kernel newer than the library: what it said can still be asked for.
                            Err(error) => {
                                debug!(%error, "unreadable notification");
                                Change::Everything
                            }
                        });
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return change,
                // ENOBUFS: the kernel had more to say than the socket held.
                Err(error) => {
                    debug!(%error, "notifications lost");
                    change = Change::Everything;
                }
            }
        }
    }

    fn notice(&mut self, payload: NetlinkPayload<RouteNetlinkMessage>) -> Change {
        let NetlinkPayload::InnerMessage(message) = payload else { return Change::Nothing };
        match message {
            RouteNetlinkMessage::NewNeighbour(message) => self.notice_neighbour(&message, true),
            RouteNetlinkMessage::DelNeighbour(message) => self.notice_neighbour(&message, false),
            RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link)
                if self.link(link.header.index).is_some() =>
            {
                Change::Routes
            }
            RouteNetlinkMessage::NewRoute(_)
            | RouteNetlinkMessage::DelRoute(_)
            | RouteNetlinkMessage::NewAddress(_)
            | RouteNetlinkMessage::DelAddress(_) => Change::Routes,
            _ => Change::Nothing,
        }
    }

    fn link(&self, index: u32) -> Option<&Link> {
        self.links.iter().find(|link| link.interface.index == index)
    }

    fn notice_neighbour(&mut self, message: &NeighbourMessage, exists: bool) -> Change {
        let Some((gateway, neighbour)) =
            neighbour(message).filter(|((index, _), _)| self.link(*index).is_some())
        else {
            return Change::Nothing;
        };
        if exists {
            self.neighbours.insert(gateway, neighbour);
        } else {
            self.neighbours.remove(&gateway);
        }
        Change::Neighbours
    }

    /// Reads all neighbours.
    fn reload(&mut self) -> io::Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        let replies = self.requests.dump(RouteNetlinkMessage::GetNeighbour(message))?;
        self.neighbours = replies
            .iter()
            .filter_map(|reply| match reply {
                RouteNetlinkMessage::NewNeighbour(message) => neighbour(message),
                _ => None,
            })
            .filter(|((index, _), _)| self.link(*index).is_some())
            .collect();
        Ok(())
    }

    /// Reads the interfaces' own state.
    fn look_at_links(&mut self) {
        for Link { interface, up } in &mut self.links {
            let (is_up, mac) = match link(&mut self.requests, interface.index) {
                Ok(link) => (link.header.flags.contains(LinkFlags::Running), link_mac(&link)),
                Err(error) => {
                    debug!(interface = interface.name, %error, "no answer about the interface");
                    (false, None)
                }
            };
            if let Some(mac) = mac {
                interface.mac = mac;
            }
            if is_up != *up {
                *up = is_up;
                if is_up {
                    info!(interface = interface.name, "the interface is up");
                } else {
                    warn!(interface = interface.name, "the interface is down or gone");
                }
            }
        }
    }

    fn take_wanted(&mut self, wanted: &BTreeSet<Ipv4Addr>) {
        let gone: Vec<Ipv4Addr> = self.targets.keys().filter(|a| !wanted.contains(a)).copied().collect();
        for address in gone {
            if let Some(Target { published: Some(_), .. }) = self.targets.remove(&address) {
                (self.on_change)(address, None);
            }
        }
        for &address in wanted {
            if !self.targets.contains_key(&address) {
                let via = self.look_up(address);
                self.targets.insert(address, Target { via, published: None, complaint: None });
            }
        }
    }

    fn look_up_all(&mut self) {
        let addresses: Vec<Ipv4Addr> = self.targets.keys().copied().collect();
        for address in addresses {
            let via = self.look_up(address);
            if let Some(target) = self.targets.get_mut(&address) {
                target.via = via;
            }
        }
    }

    /// Asks the kernel for the route to an address: which neighbour it goes through, or why it cannot be used.
    fn look_up(&mut self, address: Ipv4Addr) -> Result<Gateway, String> {
        if let [Link { interface, up: false }] = self.links.as_slice() {
            return Err(format!("interface {} is down", interface.name));
        }
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet;
        message.header.destination_prefix_length = 32;
        message.attributes.push(RouteAttribute::Destination(RouteAddress::Inet(address)));
        let replies = self
            .requests
            .request(RouteNetlinkMessage::GetRoute(message), 0)
            .map_err(|error| format!("no route: {error}"))?;
        let route = replies.into_iter().find_map(|reply| match reply {
            RouteNetlinkMessage::NewRoute(route) => Some(route),
            _ => None,
        });
        let route = route.ok_or("no route: the kernel answers without one")?;
        usable_gateway(&route, address, &self.links)
    }

    /// The neighbours through which wanted addresses are reached.
    fn gateways(&self) -> BTreeSet<Gateway> {
        self.targets.values().filter_map(|target| target.via.as_ref().ok()).copied().collect()
    }

    fn wants_asking(&self, gateway: Gateway) -> bool {
        self.neighbours.get(&gateway).is_none_or(Neighbour::wants_asking)
    }

    fn must_ask(&self) -> bool {
        self.gateways().into_iter().any(|gateway| self.wants_asking(gateway))
    }

    /// Tells the kernel that neighbours which are missing, failed or stale are in use; it asks for them (ARP).
    fn ask(&mut self) {
        for (index, gateway) in self.gateways() {
            if !self.wants_asking((index, gateway)) {
                continue;
            }
            let mut message = NeighbourMessage::default();
            message.header.family = AddressFamily::Inet;
            message.header.ifindex = index;
            message.header.flags = NeighbourFlags::Use;
            message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::Inet(gateway)));
            let asked = self.requests.request(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE);
            if let Err(error) = asked {
                debug!(%gateway, interface = index, %error, "cannot ask for the neighbour");
            }
        }
    }

    /// Tells `on_change`, the log and whoever waits what has become of the wanted addresses.
    fn publish(&mut self) {
        let mut settled = BTreeMap::new();
        for (&address, target) in &mut self.targets {
            let (next_hop, complaint) = match &target.via {
                Err(reason) => (None, Some(reason.clone())),
                Ok(gateway) => match self.neighbours.get(gateway).map(|n| (n.usable(), n.state)) {
                    Some((Some(destination), _)) => {
                        let link = self.links.iter().find(|link| link.interface.index == gateway.0);
                        let next_hop = link.map(|Link { interface, .. }| NextHop {
                            interface: interface.index,
                            source: interface.mac,
                            destination,
                        });
                        (next_hop, None)
                    }
                    Some((None, NeighbourState::Failed)) => {
                        (None, Some(format!("neighbour {} does not answer", gateway.1)))
                    }
                    // Being asked for: not known yet. One that failed before stays complained of meanwhile.
                    _ => (None, target.complaint.clone()),
                },
            };
            if next_hop.is_some() || complaint.is_some() {
                settled.insert(address, next_hop.is_some());
            }
            if target.complaint != complaint {
                match &complaint {
                    Some(reason) => {
                        warn!(%address, reason, "no next hop");
                    }
                    None => info!(%address, "next hop found again"),
                }
                target.complaint = complaint;
            }
            if target.published != next_hop {
                debug!(%address, ?next_hop, "next hop");
                target.published = next_hop;
                (self.on_change)(address, next_hop);
            }
        }
        self.shared.lock().settled = settled;
        self.shared.progress.notify_all();
    }
}

/// The IPv4 neighbour in a message, if there is one.
fn neighbour(message: &NeighbourMessage) -> Option<(Gateway, Neighbour)> {
    // Entries of the bridge's and the proxy's tables are no neighbours.
    let header = &message.header;
    if header.flags.contains(NeighbourFlags::Proxy) {
        return None;
    }
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some(*address),
        _ => None,
    })?;
    let mac = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(bytes) => bytes.as_slice().try_into().ok().map(Mac),
        _ => None,
    });
    Some(((header.ifindex, address), Neighbour { state: header.state, mac }))
}

/// The neighbour that a route to `address` goes through, or why the route cannot be used.
fn usable_gateway(route: &RouteMessage, address: Ipv4Addr, links: &[Link]) -> Result<Gateway, String> {
    match route.header.kind {
        RouteType::Unicast => {}
        RouteType::Local => return Err("this is one of the node's own addresses".into()),
        kind => return Err(format!("its route is of type {kind:?}, not unicast")),
    }
    let (mut gateway, mut out) = (address, None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => out = Some(*index),
            RouteAttribute::Gateway(RouteAddress::Inet(address)) => gateway = *address,
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) => {
                return Err("its route goes through a gateway that is not IPv4".into());
            }
            _ => {}
        }
    }
    let index = out.ok_or("its route names no interface")?;
    match links.iter().find(|link| link.interface.index == index) {
        Some(Link { up: true, .. }) => Ok((index, gateway)),
        Some(Link { interface, .. }) => Err(format!("interface {} is down", interface.name)),
        None => {
            let ours: Vec<_> = links
                .iter()
                .map(|link| format!("{} (number {})", link.interface.name, link.interface.index))
                .collect();
            Err(format!(
                "its route leaves through interface number {index}, not through {}",
                ours.join(" or ")
            ))
        }
    }
}
