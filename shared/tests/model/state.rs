//! One state of the world, packed small: millions of them are kept.

use std::fmt;

use arrayvec::ArrayVec;
use daisy_shared::chain::{Generation, Knowledge, Owners, Walk};

/// The most servers that a model may have.
pub const MAX_SERVERS: usize = 4;
/// The most generations that a run may reach.
pub const MAX_GENERATIONS: usize = 12;
/// The most packets in flight.
pub const MAX_PACKETS: usize = 3;

/// A server's number.
pub type Server = u8;

/// The servers of a bit set.
pub fn members(bits: u8) -> impl Iterator<Item = Server> {
    (0..MAX_SERVERS as Server).filter(move |server| bits & bit(*server) != 0)
}

/// The bit of a server in a bit set.
pub const fn bit(server: Server) -> u8 {
    1 << server
}

/// A place in the controller's history: the bucket's generation, counted from the start of the run.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Age(pub u8);

impl Age {
    /// Before everything: no knowledge, or no walk in the packet.
    pub const NONE: Age = Age(u8::MAX);

    /// The generation as the protocol sees it. The run starts just below the wrap-around of the counter.
    pub fn generation(self) -> Generation {
        Generation(u32::MAX.wrapping_add(u32::from(self.0)))
    }

    fn of(generation: Generation) -> Age {
        Age(generation.0.wrapping_add(1) as u8)
    }
}

impl fmt::Debug for Age {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Age::NONE { f.write_str("-") } else { write!(f, "g{}", self.0) }
    }
}

/// Owners in order, four bits each: the server's number plus one, the first in the lowest bits.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct List(u16);

impl List {
    pub fn of(servers: impl IntoIterator<Item = Server>) -> List {
        let mut list = List::default();
        for (place, server) in servers.into_iter().enumerate() {
            assert!(place < MAX_SERVERS, "no walk lists a server twice");
            list.0 |= u16::from(server + 1) << (4 * place);
        }
        list
    }

    pub fn iter(self) -> impl Iterator<Item = Server> {
        (0..MAX_SERVERS)
            .map(move |place| (self.0 >> (4 * place)) & 15)
            .take_while(|n| *n != 0)
            .map(|n| n as u8 - 1)
    }

    pub fn contains(self, server: Server) -> bool {
        self.iter().any(|other| other == server)
    }

    pub fn first(self) -> Option<Server> {
        self.iter().next()
    }

    pub fn head(self) -> Server {
        self.first().expect("a chain has a head")
    }

    pub fn without(self, server: Server) -> List {
        List::of(self.iter().filter(|other| *other != server))
    }

    /// This chain after a move of the bucket to `target`.
    pub fn moved_to(self, target: Server) -> List {
        List::of([target].into_iter().chain(self.without(target).iter()))
    }

    pub fn owners(self) -> Owners<Server> {
        self.iter().collect()
    }
}

impl fmt::Debug for List {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// What an agent knows of the bucket.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Known {
    pub age: Age,
    pub chain: List,
    pub from_table: bool,
}

impl Known {
    pub fn nothing() -> Known {
        Known { age: Age::NONE, chain: List::default(), from_table: false }
    }

    pub fn knowledge(self) -> Option<Knowledge<Server>> {
        (self.age != Age::NONE).then(|| Knowledge {
            generation: self.age.generation(),
            chain: self.chain.owners(),
            from_table: self.from_table,
        })
    }

    pub fn of(knowledge: &Knowledge<Server>) -> Known {
        let chain = List::of(knowledge.chain.iter().copied());
        Known { age: Age::of(knowledge.generation), chain, from_table: knowledge.from_table }
    }
}

impl fmt::Debug for Known {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}{:?}{}", self.age, self.chain, if self.from_table { "" } else { "?" })
    }
}

/// What a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Content {
    /// The client's SYN, first or retransmitted.
    Syn,
    /// The client's ACK, or data after it.
    Data,
    /// A SYN of somebody else in the same bucket.
    StraySyn,
    /// A packet in the same bucket that belongs to no connection.
    Stray,
}

impl Content {
    pub fn is_stray(self) -> bool {
        matches!(self, Content::StraySyn | Content::Stray)
    }

    pub fn is_syn(self) -> bool {
        matches!(self, Content::StraySyn | Content::Syn)
    }
}

/// A packet on its way to an agent.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Packet {
    pub content: Content,
    /// The server that it is addressed to.
    pub at: Server,
    pub returned: bool,
    pub hops: u8,
    /// The walk's generation; [`Age::NONE`] if it carries none.
    pub age: Age,
    pub visited: List,
    pub to_visit: List,
}

impl Packet {
    /// A packet as a mux sends it that has the table `age`: closed windows without a walk, open windows with one
    /// previous owner.
    pub fn from_mux(content: Content, age: Age, chain: List) -> Packet {
        let mut owners = chain.iter();
        let at = owners.next().expect("a chain has a head");
        let to_visit = List::of(owners.next());
        let age = if to_visit == List::default() { Age::NONE } else { age };
        Packet { content, at, returned: false, hops: 0, age, visited: List::default(), to_visit }
    }

    pub fn walk(&self) -> Option<Walk<Server>> {
        (self.age != Age::NONE).then(|| Walk {
            generation: self.age.generation(),
            hops: self.hops,
            returned: self.returned,
            visited: self.visited.owners(),
            to_visit: self.to_visit.owners(),
        })
    }

    /// The packet, sent on.
    pub fn sent(content: Content, to: Server, walk: &Walk<Server>) -> Packet {
        Packet {
            content,
            at: to,
            returned: walk.returned,
            hops: walk.hops,
            age: Age::of(walk.generation),
            visited: List::of(walk.visited.iter().copied()),
            to_visit: List::of(walk.to_visit.iter().copied()),
        }
    }
}

impl fmt::Debug for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Packet { content, at, hops, age, visited, to_visit, returned } = self;
        let returned = if *returned { " returned" } else { "" };
        write!(f, "{content:?} to {at} ({age:?} {visited:?}|{to_visit:?} after {hops}{returned})")
    }
}

/// How far the client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Client {
    /// Sends SYNs.
    Connecting,
    /// Has the SYN-ACK of this server.
    Connected(Server),
}

/// A breach of the promise, noted by the step that committed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Breach {
    /// A connection that a live server holds was reset.
    Reset,
    /// A packet of a connection met another server's socket for it.
    WrongServer,
    /// A connection that a live server holds was accepted by another.
    AcceptedTwice,
    /// A server that is in no chain any more accepted.
    AcceptedOutside,
    /// An agent dropped a packet of a connection that a live server holds.
    Dropped,
}

/// Version of the directory before a crash.
pub const HEALTHY: u8 = 0;
/// Version of the directory that marks the casualty as dead.
pub const DECLARED_DEAD: u8 = 1;
/// Version of the directory after the casualty came back.
pub const BACK: u8 = 2;

/// The world.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct State {
    /// The bucket's chain in every generation: the controller's is the last, and any mux may have any.
    pub history: ArrayVec<List, MAX_GENERATIONS>,
    /// How many moves the controller made.
    pub moves: u8,
    /// What each agent knows.
    pub known: [Known; MAX_SERVERS],
    /// The version of the directory that each agent has.
    pub told: [u8; MAX_SERVERS],
    /// Sorted: packets overtake each other.
    pub packets: ArrayVec<Packet, MAX_PACKETS>,
    pub client: Client,
    /// Servers with a socket for the client's connection, half-open or established.
    pub holders: u8,
    /// The generation with which each server last reported that it holds nothing, until the controller has heard.
    pub reported: [Age; MAX_SERVERS],
    /// The server that crashed. There is one crash in a run at most.
    pub casualty: Option<Server>,
    /// Whether it is still down.
    pub down: bool,
    /// The version of the directory: [`HEALTHY`], [`DECLARED_DEAD`] or [`BACK`].
    pub directory: u8,
    /// How many reboots there were.
    pub reboots: u8,
    /// The oldest table that can still reach each agent.
    pub floor: [u8; MAX_SERVERS],
    pub breach: Option<Breach>,
}

impl State {
    pub fn new(blank: bool) -> State {
        let first = List::of([0]);
        let first_table = Known { age: Age(0), chain: first, from_table: true };
        let mut known = if blank { [Known::nothing(); MAX_SERVERS] } else { [first_table; MAX_SERVERS] };
        known[0] = first_table;
        State {
            history: [first].into_iter().collect(),
            moves: 0,
            known,
            told: [HEALTHY; MAX_SERVERS],
            packets: ArrayVec::new(),
            client: Client::Connecting,
            holders: 0,
            reported: [Age::NONE; MAX_SERVERS],
            casualty: None,
            down: false,
            directory: HEALTHY,
            reboots: 0,
            floor: [0; MAX_SERVERS],
            breach: None,
        }
    }

    /// The newest generation.
    pub fn now(&self) -> Age {
        Age(self.history.len() as u8 - 1)
    }

    /// All generations from `first` on.
    pub fn ages_from(&self, first: u8) -> impl Iterator<Item = Age> + use<> {
        (first..self.history.len() as u8).map(Age)
    }

    /// The chain of a generation.
    pub fn chain_at(&self, age: Age) -> List {
        self.history[usize::from(age.0)]
    }

    /// The controller's chain.
    pub fn chain(&self) -> List {
        self.chain_at(self.now())
    }

    /// The generation in which a server last lost the headship.
    pub fn lost_at(&self, server: Server) -> Age {
        (1..self.history.len())
            .rev()
            .find(|i| self.history[i - 1].head() == server && self.history[*i].head() != server)
            .map_or(Age::NONE, |i| Age(i as u8))
    }

    /// The servers that have ever been in the chain.
    pub fn seen(&self) -> u8 {
        self.history.iter().flat_map(|chain| chain.iter()).fold(0, |bits, server| bits | bit(server))
    }

    /// The server that holds the client's connection, once the client knows of it.
    pub fn owner(&self) -> Option<Server> {
        match self.client {
            Client::Connected(server) if self.holders & bit(server) != 0 => Some(server),
            _ => None,
        }
    }

    /// Whether a server is down.
    pub fn is_down(&self, server: Server) -> bool {
        self.down && self.casualty == Some(server)
    }

    /// Whether the controller takes a server for dead.
    pub fn is_dead(&self, server: Server) -> bool {
        self.directory == DECLARED_DEAD && self.casualty == Some(server)
    }

    /// The servers that an agent skips, as a bit set.
    pub fn skipped_by(&self, server: Server) -> u8 {
        match self.casualty {
            Some(casualty) if self.told[usize::from(server)] == DECLARED_DEAD => bit(casualty),
            _ => 0,
        }
    }

    /// Puts a packet into the network.
    pub fn send(&mut self, packet: Packet) {
        self.packets.push(packet);
        self.packets.sort_unstable();
    }

    /// What an agent knows from a table.
    pub fn table(&self, age: Age) -> Known {
        Known { age, chain: self.chain_at(age), from_table: true }
    }

    /// A table reaches an agent: it replaces what the agent knows, unless that is newer.
    pub fn take_table(&mut self, server: Server, age: Age) {
        self.known[usize::from(server)] = self.table(age);
    }
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} known {:?} holders {:?}",
            self.history,
            self.known,
            members(self.holders).collect::<Vec<_>>()
        )?;
        write!(f, " {:?} packets {:?} reported {:?}", self.client, self.packets, self.reported)?;
        write!(f, " casualty {:?} down {} told {:?}", self.casualty, self.down, self.told)?;
        write!(f, " of {} {:?}", self.directory, self.breach)
    }
}
