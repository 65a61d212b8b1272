//! What each command asks of the controller.

use anyhow::bail;
use serde_json::{Value, json};

use super::client::Client;
use super::{Backend, Event, Flags, List, Mux, Noun, Output, Service, Table, show};
use crate::views::BackendView;

/// Runs one command; what to print.
pub(super) fn run(flags: &Flags) -> anyhow::Result<String> {
    let client = Client::new(&flags.controller, flags.token_file.as_deref())?;
    let get = |path: String| client.call("GET", &path, None);
    let (answer, shown) = match &flags.noun {
        Noun::Service(noun) => service(&client, noun)?,
        Noun::Backend(noun) => backend(&client, noun)?,
        Noun::Mux(Mux::List) => (get("/v1/muxes".into())?, show::nodes as Shown),
        Noun::Mux(Mux::Remove { name, change }) => {
            let path = format!("/v1/muxes/{}", part(name)?);
            (
                client.call("DELETE", &with(path, &[("dry_run", change.dry_run)]), None)?,
                changed(change.dry_run),
            )
        }
        Noun::Node(List::List) => (get("/v1/nodes".into())?, show::nodes as Shown),
        Noun::Drain(List::List) => (get("/v1/drains".into())?, show::drains as Shown),
        Noun::Table(Table::Show { service, bucket }) => {
            let query = bucket.map_or(String::new(), |bucket| format!("?bucket={bucket}"));
            (get(format!("/v1/services/{}/table{query}", part(service)?))?, show::table_view as Shown)
        }
        Noun::Status => (get("/v1/status".into())?, show::status as Shown),
        Noun::Event(Event::List { after }) => {
            (get(format!("/v1/events?after={after}"))?, show::events as Shown)
        }
    };
    match flags.output {
        Output::Json => Ok(serde_json::to_string_pretty(&answer)?),
        Output::Table => shown(answer),
    }
}

type Shown = fn(Value) -> anyhow::Result<String>;

fn changed(dry_run: bool) -> Shown {
    if dry_run { show::dry_run } else { show::change }
}

fn service(client: &Client, noun: &Service) -> anyhow::Result<(Value, Shown)> {
    Ok(match noun {
        Service::Add { name, vip, port, protocol, buckets, encapsulation, change } => {
            let body = json!({
                "name": name,
                "vip": vip,
                "port": port,
                "protocol": protocol,
                "buckets": buckets,
                "encapsulation": encapsulation,
            });
            let path = with("/v1/services".into(), &[("dry_run", change.dry_run)]);
            (client.call("POST", &path, Some(&body))?, changed(change.dry_run))
        }
        Service::List => (client.call("GET", "/v1/services", None)?, show::services),
        Service::Show { name } => {
            (client.call("GET", &format!("/v1/services/{}", part(name)?), None)?, show::service)
        }
        Service::Remove { name, change } => {
            let path = with(format!("/v1/services/{}", part(name)?), &[("dry_run", change.dry_run)]);
            (client.call("DELETE", &path, None)?, changed(change.dry_run))
        }
    })
}

fn backend(client: &Client, noun: &Backend) -> anyhow::Result<(Value, Shown)> {
    let at = |service: &str, name: &str| {
        anyhow::Ok(format!("/v1/services/{}/backends/{}", part(service)?, part(name)?))
    };
    Ok(match noun {
        Backend::Add { service, name, address, weight, change } => {
            let mut body = json!({"address": address});
            if let Some(weight) = weight {
                body["weight"] = json!(weight);
            }
            let path = with(at(service, name)?, &[("dry_run", change.dry_run)]);
            (client.call("PUT", &path, Some(&body))?, changed(change.dry_run))
        }
        Backend::List { service: None } => (client.call("GET", "/v1/backends", None)?, show::backends),
        Backend::List { service: Some(service) } => {
            (client.call("GET", &format!("/v1/services/{}/backends", part(service)?), None)?, show::backends)
        }
        Backend::Weight { service, name, weight, change } => {
            let path = with(at(service, name)?, &[("dry_run", change.dry_run)]);
            (client.call("PATCH", &path, Some(&json!({"weight": weight})))?, changed(change.dry_run))
        }
        Backend::Drain { name, service, change } => {
            drain(client, name, service.as_deref(), true, change.dry_run)?
        }
        Backend::Undrain { name, service, change } => {
            drain(client, name, service.as_deref(), false, change.dry_run)?
        }
        Backend::Remove { service, name, force, change } => {
            let path = with(at(service, name)?, &[("force", *force), ("dry_run", change.dry_run)]);
            (client.call("DELETE", &path, None)?, changed(change.dry_run))
        }
    })
}

/// Drains a backend in one service, or in each that it serves; then the answer is a list.
fn drain(
    client: &Client,
    name: &str,
    service: Option<&str>,
    drain: bool,
    dry_run: bool,
) -> anyhow::Result<(Value, Shown)> {
    let body = json!({"drain": drain});
    let one = |service: &str| {
        let path = format!("/v1/services/{}/backends/{}", part(service)?, part(name)?);
        client.call("PATCH", &with(path, &[("dry_run", dry_run)]), Some(&body))
    };
    if let Some(service) = service {
        return Ok((one(service)?, changed(dry_run)));
    }
    let all: Vec<BackendView> = serde_json::from_value(client.call("GET", "/v1/backends", None)?)?;
    let services: Vec<String> = all.into_iter().filter(|b| b.name == name).map(|b| b.service).collect();
    match &services[..] {
        [] => bail!("backend {name:?}: no service has such a backend"),
        [service] => Ok((one(service)?, changed(dry_run))),
        services => {
            let answers = services.iter().map(|service| {
                let mut answer = one(service)?;
                answer["service"] = json!(service);
                anyhow::Ok(answer)
            });
            let answers = Value::Array(answers.collect::<anyhow::Result<_>>()?);
            Ok((answers, if dry_run { show::dry_runs } else { show::changes }))
        }
    }
}

/// A name as part of a path. The controller judges names; this only keeps the path one.
fn part(name: &str) -> anyhow::Result<&str> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if name.is_empty() || !name.bytes().all(plain) || name.starts_with('.') {
        bail!("name {name:?}: a name is 1 to 63 of a-z, 0-9 and -");
    }
    Ok(name)
}

/// The path with those parameters that are true.
fn with(path: String, parameters: &[(&str, bool)]) -> String {
    let given: Vec<String> =
        parameters.iter().filter(|(_, value)| *value).map(|(name, _)| format!("{name}=true")).collect();
    if given.is_empty() { path } else { format!("{path}?{}", given.join("&")) }
}
