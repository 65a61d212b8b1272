//! Commands, reports and verdicts → changes. Pure: facts and the time are passed in, and nothing is written.

use std::collections::BTreeMap;
use std::net::IpAddr;

use daisy_shared::bucket::BackendId;
use daisy_shared::chain::Generation;
use daisy_shared::control::DrainReport;
use daisy_shared::service::{Service, ServiceId};

use crate::answer::Answer;
use crate::draft::Draft;
use crate::events::{Event, Kind};
use crate::model::{Backend, Change, Health, Member, Mux, ServiceRecord, State};
use crate::problem::Problem;

/// The weight of a backend for which none was given.
pub const DEFAULT_WEIGHT: u32 = 100;

/// What is asked of the controller. Fields are taken to be valid by themselves, see [`crate::api`].
#[derive(Clone, Debug)]
pub enum Command {
    /// Adds a service.
    AddService(Service),
    /// Removes a service with all its members.
    RemoveService {
        /// Its name.
        service: String,
    },
    /// Adds a backend to a service, or changes its weight.
    PutBackend {
        /// The service's name.
        service: String,
        /// The backend's name.
        name: String,
        /// Its address.
        address: IpAddr,
        /// Its weight, if given.
        weight: Option<u32>,
    },
    /// Changes a backend's part in a service.
    PatchBackend {
        /// The service's name.
        service: String,
        /// The backend's name.
        name: String,
        /// Its new weight.
        weight: Option<u32>,
        /// Whether it is to drain.
        drain: Option<bool>,
    },
    /// Removes a backend from a service: once it is drained, or at once.
    RemoveBackend {
        /// The service's name.
        service: String,
        /// The backend's name.
        name: String,
        /// At once, with the connections that it holds.
        force: bool,
    },
    /// A mux has come, or has come back with another address.
    AddMux {
        /// Its name.
        name: String,
        /// Its address.
        address: IpAddr,
    },
    /// Forgets a mux.
    RemoveMux {
        /// Its name.
        name: String,
    },
    /// Backends say in which buckets they hold nothing any more (rule 8).
    Reports(Vec<(BackendId, DrainReport)>),
    /// What is known of backends' health has changed (rule 9).
    Health(Vec<(BackendId, Health)>),
    /// A node knows newer generations than the controller.
    Rebase {
        /// The node's name.
        node: String,
        /// What it has applied.
        applied: BTreeMap<ServiceId, Generation>,
        /// The directory that it has applied.
        directory: u64,
    },
}

/// Facts that are not in the state.
pub struct Context<'a> {
    /// Milliseconds of Unix time.
    pub now_unix_ms: u64,
    /// Whether the agent of this name has been heard of within its lease.
    pub heard: &'a dyn Fn(&str) -> bool,
}

/// Decides what a command does to the state.
///
/// # Errors
/// A [`Problem`] if the command contradicts the state; then nothing changes.
pub fn decide(state: &State, command: Command, context: &Context<'_>) -> Result<(Change, Answer), Problem> {
    let mut draft = Draft::new(state, context.now_unix_ms);
    let mut answer = Answer::default();
    match command {
        Command::AddService(service) => add_service(&mut draft, service)?,
        Command::RemoveService { service } => remove_service(&mut draft, &service)?,
        Command::PutBackend { service, name, address, weight } => {
            answer = put_backend(&mut draft, &service, &name, address, weight, context)?;
        }
        Command::PatchBackend { service, name, weight, drain } => {
            answer = patch_backend(&mut draft, &service, &name, weight, drain)?;
        }
        Command::RemoveBackend { service, name, force } => {
            answer = remove_backend(&mut draft, &service, &name, force)?;
        }
        Command::AddMux { name, address } => add_mux(&mut draft, &name, address)?,
        Command::RemoveMux { name } => {
            if !state.muxes.contains_key(&name) {
                return Err(Problem::not_found("mux", &name, "there is no such mux"));
            }
            draft.event(Event::new(Kind::MuxRemoved, "forgotten by an operator").subject(&name));
            draft.set_mux(&name, None);
        }
        Command::Reports(reports) => draft.take_reports(&reports),
        Command::Health(verdicts) => take_verdicts(&mut draft, &verdicts),
        Command::Rebase { node, applied, directory } => rebase(&mut draft, &node, &applied, directory),
    }
    let change = draft.finish();
    answer.changed = !change.is_empty();
    Ok((change, answer))
}

fn find_service(draft: &Draft<'_>, name: &str) -> Result<ServiceId, Problem> {
    let service = draft.state.service(name);
    service.map(|s| s.id()).ok_or_else(|| Problem::not_found("service", name, "there is no such service"))
}

fn find_member(
    draft: &Draft<'_>,
    service: &str,
    name: &str,
) -> Result<(ServiceId, BackendId, Member), Problem> {
    let id = find_service(draft, service)?;
    let none = || Problem::not_found("backend", name, format!("service {service} has no such backend"));
    let (backend, _) = draft.state.backend(name).ok_or_else(none)?;
    let member = draft.record(id).members.get(&backend).copied().ok_or_else(none)?;
    Ok((id, backend, member))
}

fn add_service(draft: &mut Draft<'_>, service: Service) -> Result<(), Problem> {
    for other in draft.state.services.values().map(|other| &other.record.service) {
        if other.name == service.name {
            return Err(Problem::conflict("name", &service.name, "a service of this name exists"));
        }
        if (other.vip, other.port, other.protocol) == (service.vip, service.port, service.protocol) {
            let why =
                format!("service {} has {} port {} already", other.name, service.protocol, service.port);
            return Err(Problem::conflict("vip", service.vip, why));
        }
        if other.id == service.id {
            return Err(Problem::conflict("id", service.id, "drawn twice; ask again"));
        }
    }
    let taken = draft.state.backends.values().find(|b| b.retired_at_ms.is_none() && b.address == service.vip);
    if let Some(backend) = taken {
        return Err(Problem::conflict(
            "vip",
            service.vip,
            format!("it is the address of backend {}", backend.name),
        ));
    }
    let (vip, port, protocol) = (service.vip, service.port, service.protocol);
    let detail =
        format!("{vip} {protocol} port {port}, {} buckets, {}", service.buckets, service.encapsulation);
    draft.event(Event::new(Kind::ServiceAdded, detail).service(&service.name));
    let record = ServiceRecord { service, generation: Generation(0), members: BTreeMap::new() };
    draft.set_record(record);
    Ok(())
}

fn remove_service(draft: &mut Draft<'_>, name: &str) -> Result<(), Problem> {
    let id = find_service(draft, name)?;
    let members: Vec<BackendId> = draft.record(id).members.keys().copied().collect();
    draft.remove_service(id);
    for member in members {
        draft.retire_if_unused(member);
    }
    draft.event(Event::new(Kind::ServiceRemoved, "removed with all its backends").service(name));
    Ok(())
}

fn put_backend(
    draft: &mut Draft<'_>,
    service: &str,
    name: &str,
    address: IpAddr,
    weight: Option<u32>,
    context: &Context<'_>,
) -> Result<Answer, Problem> {
    let state = draft.state;
    let id = find_service(draft, service)?;
    if let Some((backend, known)) = state.backend(name) {
        if known.address != address {
            let why = format!("backend {name} is at {}; remove it first", known.address);
            return Err(Problem::conflict("address", address, why));
        }
        if draft.record(id).members.contains_key(&backend) {
            return patch_backend(draft, service, name, weight, None);
        }
    }
    let in_use = |b: &&Backend| b.retired_at_ms.is_none() && b.address == address && b.name != name;
    if let Some(other) = state.backends.values().find(in_use) {
        return Err(Problem::conflict(
            "address",
            address,
            format!("it is the address of backend {}", other.name),
        ));
    }
    if let Some(other) = state.services.values().find(|s| s.record.service.vip == address) {
        let why = format!("it is the VIP of service {}", other.record.service.name);
        return Err(Problem::conflict("address", address, why));
    }
    if state.muxes.contains_key(name) {
        return Err(Problem::conflict("name", name, "a mux has this name"));
    }
    // Where others serve already, a backend takes buckets only once its agent has been heard of: an address that
    // nobody is behind would otherwise take connections for as long as a lease.
    let mut others = draft.record(id).members.keys().map(|member| state.name(*member));
    let waits = !(context.heard)(name) && others.any(|other| (context.heard)(&other));
    let health = if waits { Health::Joining } else { Health::Live };
    let backend = draft.enlist(name, address, health)?;
    let weight = weight.unwrap_or(DEFAULT_WEIGHT);
    let mut record = draft.record(id).clone();
    record.members.insert(backend, Member { weight, draining: false, leaving: false });
    draft.set_record(record);
    let detail = format!("{address}, weight {weight}");
    draft.event(Event::new(Kind::BackendAdded, detail).service(service).subject(name));
    draft.settle(id, true);
    let mut answer = draft.answer(id);
    if draft.health(backend) == Health::Joining {
        answer.plan = draft.preview(id, backend);
        answer.note = Some(format!("{name} takes its buckets as soon as its agent is heard of"));
    }
    Ok(answer)
}

fn patch_backend(
    draft: &mut Draft<'_>,
    service: &str,
    name: &str,
    weight: Option<u32>,
    drain: Option<bool>,
) -> Result<Answer, Problem> {
    let (id, backend, old) = find_member(draft, service, name)?;
    let draining = drain.unwrap_or(old.draining);
    let new = Member { weight: weight.unwrap_or(old.weight), draining, leaving: old.leaving && draining };
    if new == old {
        return Ok(draft.answer(id));
    }
    if new.weight != old.weight {
        let detail = format!("{} to {}", old.weight, new.weight);
        draft.event(Event::new(Kind::WeightChanged, detail).service(service).subject(name));
    }
    if new.draining != old.draining {
        let (kind, detail) = match new.draining {
            true => (Kind::DrainBegan, "gives up its buckets"),
            false => (Kind::DrainCancelled, "takes buckets again"),
        };
        draft.event(Event::new(kind, detail).service(service).subject(name));
    }
    let mut record = draft.record(id).clone();
    record.members.insert(backend, new);
    draft.set_record(record);
    draft.settle(id, true);
    let mut answer = draft.answer(id);
    answer.note = waiting_note(draft, id, backend, name);
    Ok(answer)
}

fn remove_backend(draft: &mut Draft<'_>, service: &str, name: &str, force: bool) -> Result<Answer, Problem> {
    let (id, backend, old) = find_member(draft, service, name)?;
    let mut record = draft.record(id).clone();
    if force {
        let standing = draft.state.services[&id].figures.standing(backend);
        record.members.remove(&backend);
        draft.set_record(record);
        let cut = standing.head + standing.past;
        let detail = format!("taken out of {cut} buckets, whatever it held");
        draft.event(Event::new(Kind::BackendForcedOut, detail).service(service).subject(name));
        draft.settle(id, true);
        draft.retire_if_unused(backend);
        return Ok(Answer { cut_buckets: Some(cut), ..draft.answer(id) });
    }
    if !old.draining {
        let detail = "gives up its buckets, then leaves";
        draft.event(Event::new(Kind::DrainBegan, detail).service(service).subject(name));
    }
    record.members.insert(backend, Member { draining: true, leaving: true, ..old });
    draft.set_record(record);
    draft.settle(id, true);
    let mut answer = draft.answer(id);
    answer.note = waiting_note(draft, id, backend, name);
    Ok(answer)
}

/// What keeps a draining backend.
fn waiting_note(draft: &Draft<'_>, id: ServiceId, backend: BackendId, name: &str) -> Option<String> {
    let member = draft.record(id).members.get(&backend)?;
    let head = draft.standing(id, backend).head;
    (member.draining && head > 0).then(|| match draft.candidates(id).is_empty() {
        true => format!("no backend can take over the {head} buckets of {name}: it keeps them"),
        false => format!("{head} buckets of {name} have full chains: they wait for older owners to leave"),
    })
}

fn add_mux(draft: &mut Draft<'_>, name: &str, address: IpAddr) -> Result<(), Problem> {
    if draft.state.backend(name).is_some() {
        return Err(Problem::conflict("name", name, "a backend has this name"));
    }
    let mux = Mux { address };
    if draft.state.muxes.get(name) != Some(&mux) {
        draft.set_mux(name, Some(mux));
    }
    Ok(())
}

fn take_verdicts(draft: &mut Draft<'_>, verdicts: &[(BackendId, Health)]) {
    let mut concerned = Vec::new();
    for (id, health) in verdicts {
        let retired = draft.state.backends.get(id).is_none_or(|backend| backend.retired_at_ms.is_some());
        if retired || draft.health(*id) == *health {
            continue;
        }
        let (kind, detail) = match health {
            Health::Live => (Kind::BackendBack, "its agent has been heard of"),
            Health::Suspect => (Kind::BackendSuspect, "its lease has ended and nobody found it dead"),
            Health::Dead => (Kind::BackendDead, "its lease has ended and probes go unanswered"),
            Health::Joining => continue,
        };
        draft.event(Event::new(kind, detail).subject(&draft.state.name(*id)));
        draft.set_health(*id, *health);
        concerned.push(*id);
    }
    let state = draft.state;
    for (id, service) in &state.services {
        if concerned.iter().any(|backend| service.record.members.contains_key(backend)) {
            draft.settle(*id, true);
        }
    }
}

fn rebase(draft: &mut Draft<'_>, node: &str, applied: &BTreeMap<ServiceId, Generation>, directory: u64) {
    for (id, generation) in applied {
        let Some(service) = draft.state.services.get(id) else { continue };
        if generation.is_newer_than(service.record.generation) {
            let new = generation.next();
            let detail =
                format!("{node} has generation {generation}: {} becomes {new}", service.record.generation);
            draft
                .event(Event::new(Kind::Rebased, detail).service(&service.record.service.name).subject(node));
            draft.rebase(*id, new);
        }
    }
    if directory > draft.state.meta.directory {
        let detail = format!("{node} has directory {directory}, newer than {}", draft.state.meta.directory);
        draft.event(Event::new(Kind::Rebased, detail).subject(node));
        draft.raise_directory(directory);
    }
}
