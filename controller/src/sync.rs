//! A node's sync: it renews its lease, acknowledges, reports; and is told what is new, at once or when there is.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use daisy_shared::bucket::BackendId;
use daisy_shared::chain::Generation;
use daisy_shared::control::{NodeKind, SyncRequest, SyncResponse};
use daisy_shared::service::ServiceId;
use tokio::time::Instant;

use crate::core::Command;
use crate::events::{Event, Kind};
use crate::hub::{Hub, Node, Tables};
use crate::model::Health;
use crate::problem::Problem;
use crate::publish;

/// How far a node may be ahead of the controller. A store restored from a backup lacks fewer changes than this. Half
/// the circle of generations, on the other hand, would make those of all other nodes count as newer than ours.
const MOST_AHEAD: u32 = 1 << 30;

/// Who a node is.
enum Who {
    /// A mux.
    Mux,
    /// The agent of this backend.
    Agent(BackendId),
    /// An agent that no backend is configured for.
    Spare,
}

/// Answers a sync.
///
/// # Errors
/// A [`Problem`]: the node is not who it says.
pub async fn sync(hub: &Arc<Hub>, name: &str, request: SyncRequest) -> Result<SyncResponse, Problem> {
    check_past(hub, &request).await?;
    let backend = match admit(hub, name, &request).await? {
        Who::Mux => None,
        Who::Agent(id) => Some(id),
        Who::Spare => return Ok(stand_by(hub, name, &request).await),
    };
    hear(hub, name, backend, &request);
    take_in(hub, name, backend, &request).await?;
    // What was taken in may have waited for the disk; that is no silence of the node's.
    renew(hub, name, backend);
    // A request that is kept long would let the lease run out meanwhile.
    let wait = Duration::from_millis(request.wait_ms.min(hub.lease_ms / 3));
    let deadline = Instant::now() + wait;
    let mut news = hub.watch(request.kind);
    loop {
        news.borrow_and_update();
        let over = Instant::now() >= deadline;
        let response = build(hub, name, backend, &request, over).await;
        let something = response.directory.is_some()
            || !(response.tables.is_empty() && response.removed.is_empty() && response.probe.is_empty());
        if something || over {
            return Ok(response);
        }
        tokio::select! {
            _ = tokio::time::sleep_until(deadline) => {}
            _ = news.changed() => {}
        }
    }
}

/// Answers an agent that no backend is configured for: it learns who is who, so that its data path stands ready
/// when one is. It hears of that at once: a backend that had to wait for its agent's next attempt would lose
/// packets meanwhile. Nothing is taken from it, what it may have applied while it served included.
async fn stand_by(hub: &Arc<Hub>, name: &str, request: &SyncRequest) -> SyncResponse {
    let wait = Duration::from_millis(request.wait_ms.min(hub.lease_ms / 3));
    let deadline = Instant::now() + wait;
    let mut news = hub.watch(request.kind);
    loop {
        news.borrow_and_update();
        let (directory, configured) = {
            let state = &hub.tables.read().await.state;
            let directory = (request.directory != state.meta.directory).then(|| publish::directory(state));
            (directory, state.backend(name).is_some())
        };
        if !configured {
            hub.knock(name, request.address);
        }
        if configured || directory.is_some() || Instant::now() >= deadline {
            return SyncResponse { lease_ms: hub.lease_ms, directory, ..SyncResponse::default() };
        }
        tokio::select! {
            _ = tokio::time::sleep_until(deadline) => {}
            _ = news.changed() => {}
        }
    }
}

/// Who the node is.
async fn admit(hub: &Arc<Hub>, name: &str, request: &SyncRequest) -> Result<Who, Problem> {
    let address = request.address;
    match request.kind {
        NodeKind::Agent => {
            let tables = hub.tables.read().await;
            let Some((id, backend)) = tables.state.backend(name) else { return Ok(Who::Spare) };
            if backend.address != address {
                let why = format!("backend {name} is configured at {}", backend.address);
                return Err(Problem::conflict("address", address, why));
            }
            Ok(Who::Agent(id))
        }
        NodeKind::Mux => {
            let known = hub.tables.read().await.state.muxes.get(name).map(|mux| mux.address);
            if known != Some(address) {
                let lives = hub.live().nodes.get(name).is_some_and(|node| {
                    !node.expired && node.address != address && node.kind == NodeKind::Mux
                });
                if let (true, Some(known)) = (lives, known) {
                    let why = format!("mux {name} is alive at {known}; two nodes cannot share a name");
                    return Err(Problem::conflict("address", address, why));
                }
                hub.command(Command::AddMux { name: name.to_owned(), address }, false).await?;
            }
            Ok(Who::Mux)
        }
    }
}

/// Refuses a node whose past cannot be this controller's, or had better not be.
async fn check_past(hub: &Hub, request: &SyncRequest) -> Result<(), Problem> {
    let state = &hub.tables.read().await.state;
    // Most likely another store than the one that was meant. The node goes on with what it has; were it told what is
    // in this store, it would give all its services up. Who does want to begin anew adds a service.
    if state.services.is_empty() && !request.applied.is_empty() && request.directory > state.meta.directory {
        let count = request.applied.len();
        let why = format!(
            "the node has {count} services, this controller's store has none and is older: is --store right?"
        );
        return Err(Problem::conflict("directory", request.directory, why));
    }
    // What no store that was ever this controller's can have led to: nobody rebases on that.
    let why = |ours: &dyn std::fmt::Display| format!("more than {MOST_AHEAD} changes ahead of {ours} here");
    let directory = state.meta.directory;
    if request.directory.saturating_sub(directory) > u64::from(MOST_AHEAD) {
        return Err(Problem::field("directory", request.directory, why(&directory)));
    }
    for (id, generation) in &request.applied {
        let Some(service) = state.services.get(id) else { continue };
        let ours = service.record.generation;
        // Exactly half the circle away is neither newer nor older, and never was.
        let newer = generation.is_newer_than(ours) || *generation == Generation(ours.0 ^ 1 << 31);
        if newer && generation.0.wrapping_sub(ours.0) > MOST_AHEAD {
            return Err(Problem::field("applied", generation, format!("service {id}: {}", why(&ours))));
        }
    }
    Ok(())
}

/// Notes that the node lives, and what it has applied.
fn hear(hub: &Arc<Hub>, name: &str, backend: Option<BackendId>, request: &SyncRequest) {
    let now = hub.now_ms();
    let mut live = hub.live();
    let old = live.nodes.remove(name);
    let joined = old.as_ref().is_none_or(|node| node.expired);
    let asked_ms = old.map_or_else(HashMap::new, |node| node.asked_ms);
    let node = Node {
        kind: request.kind,
        address: request.address,
        version: request.version.clone(),
        directory: request.directory,
        applied: request.applied.clone(),
        counters: request.counters.clone(),
        last_seen_ms: now,
        expired: false,
        asked_ms,
    };
    live.nodes.insert(name.to_owned(), node);
    if let Some(id) = backend {
        live.leases.renew(id, now);
    }
    drop(live);
    if joined {
        let what = match request.kind {
            NodeKind::Mux => "mux",
            NodeKind::Agent => "agent",
        };
        let detail = format!("{what} at {}, version {}", request.address, request.version);
        hub.event(Event::new(Kind::NodeJoined, detail).subject(name));
    }
}

/// Renews the node's lease.
fn renew(hub: &Hub, name: &str, backend: Option<BackendId>) {
    let now = hub.now_ms();
    let mut live = hub.live();
    if let Some(node) = live.nodes.get_mut(name) {
        node.last_seen_ms = now;
    }
    if let Some(id) = backend {
        live.leases.renew(id, now);
    }
}

/// Takes in what the node brings: its life, newer generations, probe results, drain reports, acknowledgements.
async fn take_in(
    hub: &Arc<Hub>,
    name: &str,
    backend: Option<BackendId>,
    request: &SyncRequest,
) -> Result<(), Problem> {
    let (back, newer, acknowledges) = {
        let tables = hub.tables.read().await;
        let state = &tables.state;
        let now = hub.now_ms();
        let mut live = hub.live();
        for result in &request.probed {
            let probed =
                state.backends.iter().find(|(_, b)| b.retired_at_ms.is_none() && b.address == result.address);
            if let Some((id, _)) = probed {
                live.leases.probed(*id, name, result.answered, now);
            }
        }
        let newer = request.directory > state.meta.directory
            || request.applied.iter().any(|(id, generation)| {
                state.services.get(id).is_some_and(|s| generation.is_newer_than(s.record.generation))
            });
        let back = backend.filter(|id| state.health(*id) != Health::Live);
        (back, newer, backend.filter(|id| tables.publisher.awaits(*id)))
    };
    if newer {
        let (applied, directory) = (request.applied.clone(), request.directory);
        hub.command(Command::Rebase { node: name.to_owned(), applied, directory }, false).await?;
    }
    if let Some(id) = back {
        hub.command(Command::Health(vec![(id, Health::Live)]), false).await?;
    }
    if let Some(id) = backend
        && !request.drained.is_empty()
    {
        hub.report(id, request.drained.clone()).await;
    }
    if let Some(id) = acknowledges {
        let mut tables = hub.tables.write().await;
        tables.publisher.acknowledge(id, &request.applied, request.directory);
        if tables.publisher.release(hub.now_ms()) {
            hub.wake_muxes();
        }
    }
    Ok(())
}

/// What there is to say to the node now.
async fn build(
    hub: &Arc<Hub>,
    name: &str,
    backend: Option<BackendId>,
    request: &SyncRequest,
    even_empty: bool,
) -> SyncResponse {
    let tables = hub.tables.read().await;
    let Tables { state, publisher } = &*tables;
    let serves = |id: &ServiceId| match (backend, state.services.get(id)) {
        (_, None) => false,
        (None, Some(_)) => true,
        (Some(backend), Some(service)) => service.record.members.contains_key(&backend),
    };
    let mut updates = Vec::new();
    for id in state.services.keys().filter(|id| serves(id)) {
        let applied = request.applied.get(id).copied();
        updates.extend(match backend {
            None => publisher.for_mux(state, *id, name, applied),
            Some(backend) => publisher.for_agent(state, *id, backend, applied, even_empty),
        });
    }
    SyncResponse {
        lease_ms: hub.lease_ms,
        directory: (request.directory != state.meta.directory).then(|| publish::directory(state)),
        tables: updates,
        removed: request.applied.keys().filter(|id| !serves(id)).copied().collect(),
        probe: to_probe(hub, name, &tables),
    }
}

/// Whom the node is to probe. It is asked again only after a while.
fn to_probe(hub: &Hub, name: &str, tables: &Tables) -> Vec<std::net::IpAddr> {
    let now = hub.now_ms();
    let mut live = hub.live();
    let live = &mut *live;
    let Some(node) = live.nodes.get_mut(name) else { return Vec::new() };
    let mut addresses = Vec::new();
    for id in live.leases.to_probe(name) {
        let due = node.asked_ms.get(&id).is_none_or(|at| at + hub.lease_ms / 4 <= now);
        if let (true, Some(backend)) = (due, tables.state.backends.get(&id)) {
            node.asked_ms.insert(id, now);
            addresses.push(backend.address);
        }
    }
    addresses
}
