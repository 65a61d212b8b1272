//! Answers as aligned columns.

use comfy_table::{CellAlignment, Table, presets};
use serde::Deserialize;
use serde_json::Value;

use crate::answer::Answer;
use crate::events;
use crate::views::{BackendView, DrainView, NodeView, ServiceView, StatusView, TableView};

/// Columns; a name that begins with `>` is aligned right.
fn table(columns: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let rows: Vec<Vec<String>> = rows.into_iter().collect();
    if rows.is_empty() {
        return "none".into();
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(columns.iter().map(|name| name.trim_start_matches('>').to_uppercase()));
    table.add_rows(rows);
    for (i, name) in columns.iter().enumerate() {
        if let Some(column) = table.column_mut(i) {
            column.set_padding((0, 2));
            if name.starts_with('>') {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
    }
    table.trim_fmt()
}

macro_rules! row {
    ($($cell:expr),* $(,)?) => { vec![$($cell.to_string()),*] };
}

pub(super) fn services(answer: Value) -> anyhow::Result<String> {
    let services: Vec<ServiceView> = serde_json::from_value(answer)?;
    Ok(service_table(&services))
}

fn service_table(services: &[ServiceView]) -> String {
    let columns = [
        "name",
        "vip",
        ">port",
        "protocol",
        "encapsulation",
        ">buckets",
        ">generation",
        ">open",
        ">deepest",
        ">backends",
    ];
    table(
        &columns,
        services.iter().map(|s| {
            row![
                s.name,
                s.vip,
                s.port,
                s.protocol,
                s.encapsulation,
                s.buckets,
                s.generation,
                s.open_windows,
                s.deepest_chain,
                s.backends.len(),
            ]
        }),
    )
}

pub(super) fn service(answer: Value) -> anyhow::Result<String> {
    let service: ServiceView = serde_json::from_value(answer)?;
    let backends = backend_table(&service.backends);
    Ok(format!("{}\n\n{backends}", service_table(std::slice::from_ref(&service))))
}

pub(super) fn backends(answer: Value) -> anyhow::Result<String> {
    let backends: Vec<BackendView> = serde_json::from_value(answer)?;
    Ok(backend_table(&backends))
}

fn backend_table(backends: &[BackendView]) -> String {
    let columns = ["service", "name", ">id", "address", ">weight", "state", ">head", ">target", ">past"];
    let row = |b: &BackendView| {
        row![
            b.service,
            b.name,
            b.id,
            b.address,
            b.weight,
            b.state,
            b.head_buckets,
            b.target_buckets,
            b.past_buckets,
        ]
    };
    table(&columns, backends.iter().map(row))
}

pub(super) fn nodes(answer: Value) -> anyhow::Result<String> {
    let nodes: Vec<NodeView> = serde_json::from_value(answer)?;
    Ok(node_table(&nodes))
}

fn node_table(nodes: &[NodeView]) -> String {
    let columns =
        ["name", "kind", "address", "version", "lease", ">directory", "applied", "behind", ">seen ms ago"];
    let row = |n: &NodeView| {
        let kind = format!("{:?}", n.kind).to_lowercase();
        let applied: Vec<String> =
            n.applied.iter().map(|(service, generation)| format!("{service}:{generation}")).collect();
        let applied = if applied.is_empty() { "-".into() } else { applied.join(",") };
        let seen = n.last_seen_ms.map_or("-".into(), |ms| ms.to_string());
        let version = if n.version.is_empty() { "-" } else { &n.version };
        let behind = if n.behind { "yes" } else { "no" };
        row![n.name, kind, n.address, version, n.lease, n.directory, applied, behind, seen]
    };
    table(&columns, nodes.iter().map(row))
}

pub(super) fn drains(answer: Value) -> anyhow::Result<String> {
    let drains: Vec<DrainView> = serde_json::from_value(answer)?;
    let row = |d: &DrainView| {
        let leaves = if d.leaves { "yes" } else { "no" };
        row![d.service, d.backend, d.state, d.head_buckets, d.past_buckets, leaves]
    };
    let columns = ["service", "backend", "state", ">head", ">past", "leaves"];
    Ok(table(&columns, drains.iter().map(row)))
}

pub(super) fn table_view(answer: Value) -> anyhow::Result<String> {
    let view: TableView = serde_json::from_value(answer)?;
    let rows = view.buckets.iter().map(|b| row![b.bucket, b.generation, b.chain.join(" > ")]);
    Ok(table(&[">bucket", ">generation", "chain"], rows))
}

pub(super) fn status(answer: Value) -> anyhow::Result<String> {
    let status: StatusView = serde_json::from_value(answer)?;
    let services = table(
        &[
            "service",
            ">id",
            ">generation",
            ">released",
            ">buckets",
            ">open",
            ">deepest",
            ">backends",
            ">active",
            ">behind",
        ],
        status.services.iter().map(|s| {
            row![
                s.name,
                s.id,
                s.generation,
                s.released,
                s.buckets,
                s.open_windows,
                s.deepest_chain,
                s.backends,
                s.active_backends,
                s.unpublished_nodes,
            ]
        }),
    );
    let head = format!(
        "controller {} at {}, lease {} ms, directory {}",
        status.version, status.listening, status.lease_ms, status.directory
    );
    Ok(format!("{head}\n\nservices\n{services}\n\nnodes\n{}", node_table(&status.nodes)))
}

#[derive(Deserialize)]
struct Events {
    events: Vec<events::Entry>,
}

pub(super) fn events(answer: Value) -> anyhow::Result<String> {
    let Events { events } = serde_json::from_value(answer)?;
    let row = |e: &events::Entry| {
        let kind = serde_json::to_value(e.kind).unwrap_or_default();
        let dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".into());
        row![
            e.sequence,
            time(e.at_unix_ms),
            kind.as_str().unwrap_or_default(),
            dash(&e.service),
            dash(&e.subject),
            e.detail,
        ]
    };
    Ok(table(&[">number", "time", "event", "service", "subject", "detail"], events.iter().map(row)))
}

/// The time of day in UTC.
fn time(unix_ms: u64) -> String {
    let (seconds, ms) = (unix_ms / 1000 % 86_400, unix_ms % 1000);
    format!("{:02}:{:02}:{:02}.{ms:03}Z", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

pub(super) fn change(answer: Value) -> anyhow::Result<String> {
    Ok(describe(&serde_json::from_value(answer)?, false))
}

pub(super) fn dry_run(answer: Value) -> anyhow::Result<String> {
    Ok(describe(&serde_json::from_value(answer)?, true))
}

pub(super) fn changes(answer: Value) -> anyhow::Result<String> {
    several(answer, false)
}

pub(super) fn dry_runs(answer: Value) -> anyhow::Result<String> {
    several(answer, true)
}

/// An answer about one of several services.
#[derive(Deserialize)]
struct OfService {
    service: String,
    #[serde(flatten)]
    answer: Answer,
}

fn several(answers: Value, dry_run: bool) -> anyhow::Result<String> {
    let answers: Vec<OfService> = serde_json::from_value(answers)?;
    let texts: Vec<String> =
        answers.iter().map(|of| format!("{}: {}", of.service, describe(&of.answer, dry_run))).collect();
    Ok(texts.join("\n"))
}

fn describe(answer: &Answer, dry_run: bool) -> String {
    let mut text = match (answer.changed, dry_run) {
        (false, false) => "unchanged".to_owned(),
        (false, true) => "would change nothing".to_owned(),
        (true, false) => format!("changed, generation {}", answer.generation),
        (true, true) => format!("would change, generation {}", answer.generation),
    };
    if answer.plan.moved_buckets > 0 {
        text += &format!(", {} buckets move", answer.plan.moved_buckets);
    }
    if let Some(cut) = answer.cut_buckets {
        text += &format!(", cut from {cut} buckets");
    }
    if let Some(note) = &answer.note {
        text += &format!("\n{note}");
    }
    if !answer.plan.per_backend.is_empty() {
        let rows = answer.plan.per_backend.iter().map(|(name, share)| row![name, share.before, share.after]);
        text += &format!("\n{}", table(&["backend", ">before", ">after"], rows));
    }
    text
}
