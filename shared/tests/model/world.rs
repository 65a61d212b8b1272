//! What may happen: the model's actions and their effects.

use std::sync::Arc;

use arrayvec::ArrayVec;
use daisy_shared::chain::Verdict;
use daisy_shared::drop::DropReason;
use stateright::{Model, Property};

use crate::measure::Measures;
use crate::properties;
use crate::rules::{Facts, Off, decide_without};
use crate::state::*;

/// The bounds of a run, and the rule that is switched off.
#[derive(Clone, Debug)]
pub struct Bounds {
    pub servers: u8,
    /// Whether only the first owner knows anything of the bucket at the start.
    pub blank: bool,
    /// How often the controller moves the bucket.
    pub moves: u8,
    /// How many packets may be in flight.
    pub packets: u8,
    /// Whether packets of other clients are about.
    pub strays: bool,
    /// Whether connections and half-open sockets end, and the client connects again with the same ports.
    pub closes: bool,
    /// Whether the controller restarts.
    pub restarts: bool,
    /// Whether a server crashes.
    pub crash: bool,
    /// Whether the crashed server comes back.
    pub revival: bool,
    /// How many servers reboot.
    pub reboots: u8,
    /// An agent that never hears from the controller, and is never heard.
    pub deaf: Option<Server>,
    /// What a rebooted agent starts with.
    pub start: Start,
    pub off: Option<Off>,
}

/// What an agent knows after a reboot, before it takes packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// The controller's table as it is now.
    Newest,
    /// The same, but only of buckets whose chain names the agent. Of the others it knows that as of now it has
    /// nothing to do with them.
    NewestOrNone,
    /// The same, but of the others it knows nothing.
    NewestOrBlank,
    /// A table from its own disk, taken for good.
    Disk,
    /// A table from its own disk, taken for what a packet could have said.
    DiskAsHint,
}

/// The model.
pub struct World {
    pub bounds: Bounds,
    pub measures: Arc<Measures>,
}

/// Something that reaches an agent together with a packet, or before a report. (That a table arrives makes no
/// difference until the agent uses it, so it arrives when it is used.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct News {
    /// The table that the agent takes.
    pub table: Option<Age>,
    /// The version of the directory that it has from now on.
    pub directory: u8,
}

/// Something that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The controller moves the bucket.
    Move { target: Server },
    /// An agent finds that it holds nothing, and says so.
    Report { server: Server, table: Option<Age> },
    /// The controller hears a report, and splices the owner out.
    HearReport { server: Server },
    /// The controller splices an owner out for no reason ([`Off::OwnWord`]).
    TimeOut { server: Server },
    /// The controller restarts and has lost what it had not stored.
    Restart,
    /// The client sends a SYN, through a mux that has this table.
    SendSyn { mux: Age },
    /// A packet is sent through a mux that has this table, and reaches the head in it.
    Enter { content: Content, mux: Age, news: News },
    /// A packet reaches the agent to which it is addressed.
    Arrive { place: usize, news: News },
    /// The network loses a packet.
    Lose { place: usize },
    /// The client gets a SYN-ACK.
    SynAck { server: Server },
    /// A server gives up a half-open socket, before the client has its SYN-ACK.
    Expire { server: Server },
    /// The connection ends. (Its packets in flight count as lost: they would be strays.)
    Close,
    /// A server crashes.
    Crash { server: Server },
    /// The controller declares the crashed server dead, and makes another head if that was.
    DeclareDead { head: Option<Server> },
    /// The crashed server is up again, with nothing but the newest table.
    Revive,
    /// A server reboots: its sockets are gone, and its agent starts with this table.
    Reboot { server: Server, table: Age },
}

impl World {
    /// Whether an agent may drop a packet of a live connection for this reason until tables have settled: where
    /// an owner is declared dead, and where an agent has never had a table.
    pub fn excuses(&self, state: &State, reason: DropReason) -> bool {
        match reason {
            DropReason::DeadOwner => state.directory != HEALTHY,
            DropReason::UnknownBucket | DropReason::NoBackend => self.bounds.blank || state.reboots > 0,
            _ => false,
        }
    }

    fn news_for(&self, state: &State, server: Server) -> impl Iterator<Item = News> + use<> {
        let tables = self.tables_for(state, server);
        let directories = state.told[usize::from(server)]..=state.directory;
        directories
            .flat_map(move |directory| tables.clone().into_iter().map(move |table| News { table, directory }))
    }

    /// The tables that may reach an agent: newer ones than it knows, and the one of the generation that it learned.
    fn tables_for(&self, state: &State, server: Server) -> ArrayVec<Option<Age>, { MAX_GENERATIONS + 1 }> {
        let known = state.known[usize::from(server)];
        let floor = state.floor[usize::from(server)];
        let first = if known.age == Age::NONE { floor } else { known.age.0.max(floor) };
        let hears = self.bounds.deaf != Some(server);
        let new = |age: &Age| hears && state.table(*age) != known;
        [None].into_iter().chain(state.ages_from(first).filter(new).map(Some)).collect()
    }

    /// A packet meets an agent.
    fn arrive(&self, state: &mut State, packet: &Packet, news: News) {
        let me = packet.at;
        if let Some(age) = news.table {
            state.take_table(me, age);
        }
        state.told[usize::from(me)] = news.directory;
        let skipped = if self.bounds.off == Some(Off::DeadAreSpliced) { 0 } else { state.skipped_by(me) };
        let (walk, knowledge) = (packet.walk(), state.known[usize::from(me)].knowledge());
        let facts = Facts {
            me,
            matched: !packet.content.is_stray() && state.holders & bit(me) != 0,
            syn: packet.content.is_syn(),
            walk: walk.as_ref(),
            knowledge: knowledge.as_ref(),
            skipped,
        };
        let decision = decide_without(self.bounds.off, &facts);
        if let Some(learned) = &decision.learned {
            state.known[usize::from(me)] = Known::of(learned);
        }
        let live_data = packet.content == Content::Data && state.owner().is_some();
        match decision.verdict {
            Verdict::Deliver => {
                self.measures.delivered(packet.hops);
                if packet.content == Content::Data && state.client != Client::Connected(me) {
                    state.breach = Some(Breach::WrongServer);
                }
            }
            Verdict::Accept => {
                self.measures.accepted(packet.hops);
                if !state.chain().contains(me) {
                    state.breach = Some(Breach::AcceptedOutside);
                } else if packet.content == Content::Syn {
                    if state.holders != 0 {
                        state.breach = Some(Breach::AcceptedTwice);
                    }
                    state.holders |= bit(me);
                }
            }
            Verdict::Answer => {
                self.measures.answered();
                if live_data {
                    state.breach = Some(Breach::Reset);
                }
            }
            Verdict::Send { to, walk } => {
                state.send(Packet::sent(packet.content, to, &walk));
            }
            Verdict::Drop(reason) => {
                self.measures.dropped(packet.content, live_data, reason);
                if live_data && !self.excuses(state, reason) {
                    state.breach = Some(Breach::Dropped);
                }
            }
        }
    }

    /// The controller changes the chain.
    fn change(&self, state: &mut State, chain: List) {
        state.history.push(chain);
        // Reports that can never count again are forgotten, and those that count are all alike: smaller states.
        if self.bounds.off != Some(Off::ReportsHaveGenerations) {
            for server in 0..self.bounds.servers {
                if state.reported[usize::from(server)] != Age::NONE && !self.would_hear(state, server) {
                    state.reported[usize::from(server)] = Age::NONE;
                }
            }
        }
    }

    /// Whether the controller accepts the report of this server that is on its way.
    fn would_hear(&self, state: &State, server: Server) -> bool {
        let reported = state.reported[usize::from(server)];
        let chain = state.chain();
        reported != Age::NONE
            && chain.contains(server)
            && chain.head() != server
            && (self.bounds.off == Some(Off::ReportsHaveGenerations)
                || !state.lost_at(server).generation().is_newer_than(reported.generation()))
    }

    /// An agent reports, if it may.
    fn report(&self, state: &mut State, server: Server, table: Option<Age>) -> Option<()> {
        if let Some(age) = table {
            state.take_table(server, age);
        }
        let known = state.known[usize::from(server)];
        if known.age == Age::NONE || known.chain.first() == Some(server) || state.holders & bit(server) != 0 {
            return None;
        }
        let before = state.reported[usize::from(server)];
        state.reported[usize::from(server)] = known.age;
        if self.bounds.off == Some(Off::ReportsHaveGenerations) {
            return (before != known.age).then_some(());
        }
        if !self.would_hear(state, server) {
            return None;
        }
        let counting = state.lost_at(server);
        state.reported[usize::from(server)] = counting;
        (before != counting).then_some(())
    }
}

/// A server's sockets are gone, and with them a connection there.
fn lose_sockets(state: &mut State, server: Server) {
    state.holders &= !bit(server);
    if state.client == Client::Connected(server) {
        state.client = Client::Connecting;
        state.packets.retain(|packet| packet.content.is_stray());
    }
}

impl Model for World {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State::new(self.bounds.blank)]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let bounds = &self.bounds;
        let room = state.packets.len() < usize::from(bounds.packets);
        let chain = state.chain();
        // Servers are named in the order in which they first become head: other names make no difference.
        let known_names = (state.seen().trailing_ones() as u8 + 1).min(bounds.servers);
        let heads = (0..known_names).filter(|server| *server != chain.head() && !state.is_dead(*server));

        if state.moves < bounds.moves {
            actions.extend(heads.clone().map(|target| Action::Move { target }));
        }
        for server in 0..bounds.servers {
            if state.holders & bit(server) == 0 && !state.is_down(server) && bounds.deaf != Some(server) {
                let tables = self.tables_for(state, server).into_iter();
                actions.extend(tables.map(|table| Action::Report { server, table }));
            }
            let known = state.known[usize::from(server)].age;
            if state.reboots < bounds.reboots && known != Age::NONE && !state.is_down(server) {
                let on_disk = matches!(bounds.start, Start::Disk | Start::DiskAsHint);
                let tables = if on_disk { 0..=known.0 } else { state.now().0..=state.now().0 };
                actions.extend(tables.map(|table| Action::Reboot { server, table: Age(table) }));
            }
            if self.would_hear(state, server) {
                actions.push(Action::HearReport { server });
            }
            if bounds.off == Some(Off::OwnWord) && chain.contains(server) && chain.head() != server {
                actions.push(Action::TimeOut { server });
            }
            if state.client == Client::Connecting && state.holders & bit(server) != 0 {
                actions.push(Action::SynAck { server });
                if bounds.closes {
                    actions.push(Action::Expire { server });
                }
            }
            if bounds.crash && state.casualty.is_none() && state.seen() & bit(server) != 0 {
                actions.push(Action::Crash { server });
            }
        }
        if bounds.restarts && state.reported.iter().any(|age| *age != Age::NONE) {
            actions.push(Action::Restart);
        }
        if room {
            let one = bounds.off != Some(Off::OneSyn);
            let syn = state.packets.iter().any(|packet| packet.content == Content::Syn) && one;
            if state.client == Client::Connecting && !syn {
                actions.extend(state.ages_from(0).map(|mux| Action::SendSyn { mux }));
            }
            for mux in state.ages_from(0) {
                let head = state.chain_at(mux).head();
                if state.is_down(head) {
                    continue;
                }
                let strays = [Content::Stray, Content::StraySyn].into_iter().filter(|_| bounds.strays);
                let data = state.owner().map(|_| Content::Data);
                for content in data.into_iter().chain(strays) {
                    actions.extend(self.news_for(state, head).map(|news| Action::Enter {
                        content,
                        mux,
                        news,
                    }));
                }
            }
        }
        for (place, packet) in state.packets.iter().enumerate() {
            actions.push(Action::Lose { place });
            if !state.is_down(packet.at) {
                actions.extend(self.news_for(state, packet.at).map(|news| Action::Arrive { place, news }));
            }
        }
        if bounds.closes && state.owner().is_some() {
            actions.push(Action::Close);
        }
        if let Some(casualty) = state.casualty
            && state.down
            && state.directory == HEALTHY
        {
            if chain.head() == casualty {
                actions.extend(heads.map(|head| Action::DeclareDead { head: Some(head) }));
            } else {
                actions.push(Action::DeclareDead { head: None });
            }
        }
        if bounds.revival && state.down && state.directory == DECLARED_DEAD {
            actions.push(Action::Revive);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        // What comes of two half-open sockets shows later.
        if last.breach.is_some_and(|breach| breach != Breach::AcceptedTwice) {
            return None;
        }
        let mut state = last.clone();
        match action {
            Action::Move { target } => {
                state.moves += 1;
                self.change(&mut state, last.chain().moved_to(target));
            }
            Action::Report { server, table } => self.report(&mut state, server, table)?,
            Action::HearReport { server } | Action::TimeOut { server } => {
                self.change(&mut state, last.chain().without(server));
            }
            Action::Restart => state.reported = [Age::NONE; MAX_SERVERS],
            Action::SendSyn { mux } => {
                state.send(Packet::from_mux(Content::Syn, mux, last.chain_at(mux)));
            }
            Action::Enter { content, mux, news } => {
                self.arrive(&mut state, &Packet::from_mux(content, mux, last.chain_at(mux)), news);
            }
            Action::Arrive { place, news } => {
                let packet = state.packets.remove(place);
                self.arrive(&mut state, &packet, news);
            }
            Action::Lose { place } => {
                state.packets.remove(place);
            }
            Action::SynAck { server } => state.client = Client::Connected(server),
            Action::Expire { server } => state.holders &= !bit(server),
            Action::Close => {
                state.holders = 0;
                state.client = Client::Connecting;
                state.packets.retain(|packet| packet.content.is_stray());
            }
            Action::Crash { server } => {
                state.casualty = Some(server);
                state.down = true;
                state.reported[usize::from(server)] = Age::NONE;
                state.known[usize::from(server)] = Known::nothing();
                lose_sockets(&mut state, server);
            }
            Action::Reboot { server, table } => {
                state.reboots += 1;
                let (table, named) = (last.table(table), last.chain().contains(server));
                state.known[usize::from(server)] = match self.bounds.start {
                    Start::NewestOrNone if !named => {
                        Known { chain: List::default(), from_table: false, ..table }
                    }
                    Start::NewestOrBlank if !named => Known::nothing(),
                    Start::DiskAsHint => Known { from_table: false, ..table },
                    _ => table,
                };
                // Later answers of the controller are no older than this.
                state.floor[usize::from(server)] = last.now().0;
                lose_sockets(&mut state, server);
            }
            Action::DeclareDead { head } => {
                let casualty = last.casualty.expect("somebody crashed");
                state.directory = DECLARED_DEAD;
                if self.bounds.off == Some(Off::DeadAreSpliced) {
                    if let Some(head) = head {
                        self.change(&mut state, last.chain().moved_to(head));
                    }
                } else {
                    let promoted = head.map_or(last.chain(), |head| last.chain().moved_to(head));
                    if promoted.without(casualty) != last.chain() {
                        self.change(&mut state, promoted.without(casualty));
                    }
                }
            }
            Action::Revive => {
                state.down = false;
                state.directory = BACK;
                let casualty = last.casualty.expect("somebody crashed");
                state.told[usize::from(casualty)] = BACK;
                state.take_table(casualty, last.now());
            }
        }
        (state != *last).then_some(state)
    }

    fn properties(&self) -> Vec<Property<World>> {
        properties::all(&self.bounds)
    }
}
