//! The HTTP API: validates, hands commands to the [`Hub`], and shows the state.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, PathRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, FromRequest, FromRequestParts, Request, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri, header, request::Parts};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, patch, post};
use axum::{Json, Router};
use daisy_shared::control::{NodeKind, SyncRequest, SyncResponse};
use daisy_shared::flow::HashKey;
use daisy_shared::service::{
    DEFAULT_BUCKETS, Encapsulation, MAX_BUCKETS, MIN_BUCKETS, Protocol, Service, ServiceId, is_bucket_count,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::answer::Answer;
use crate::core::Command;
use crate::hub::{Hub, Tables};
use crate::model::ServiceState;
use crate::problem::Problem;
use crate::{sync, views};

/// The largest weight.
pub const MAX_WEIGHT: u32 = 1_000_000;
/// The largest body of an operator's request, in bytes.
const BODY_LIMIT: usize = 64 << 10;
/// The largest body of a sync, in bytes: room for drain reports of 1 Mi buckets.
const SYNC_LIMIT: usize = 64 << 20;

/// What the handlers share.
#[derive(Clone)]
pub struct App {
    /// The state and its writer.
    pub hub: Arc<Hub>,
    /// Where the controller listens.
    pub listening: SocketAddr,
    /// The bearer token that every request must carry, if one is asked for.
    pub token: Option<Arc<str>>,
}

/// The API's routes.
pub fn router(app: App) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/services", get(list_services).post(add_service))
        .route("/v1/services/{service}", get(show_service).delete(remove_service))
        .route("/v1/services/{service}/backends", get(service_backends))
        .route(
            "/v1/services/{service}/backends/{backend}",
            patch(patch_backend).put(put_backend).delete(remove_backend),
        )
        .route("/v1/services/{service}/table", get(table))
        .route("/v1/services/{service}/windows", get(windows))
        .route("/v1/backends", get(all_backends))
        .route("/v1/muxes", get(muxes))
        .route("/v1/muxes/{mux}", delete(remove_mux))
        .route("/v1/nodes", get(nodes))
        .route("/v1/drains", get(drains))
        .route("/v1/events", get(events))
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .merge(
            Router::new()
                .route("/v1/nodes/{node}/sync", post(node_sync))
                .layer(DefaultBodyLimit::max(SYNC_LIMIT)),
        )
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(middleware::from_fn_with_state(app.clone(), authorize))
        .with_state(app)
}

async fn no_route(uri: Uri) -> Problem {
    Problem::not_found("path", uri.path(), "there is no such resource")
}

async fn no_method(method: Method, uri: Uri) -> Problem {
    let detail = format!("{} does not take {method}", uri.path());
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, detail)
}

async fn authorize(State(app): State<App>, headers: HeaderMap, request: Request, next: Next) -> Response {
    if let Some(token) = &app.token {
        let given =
            headers.get(header::AUTHORIZATION).and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
        if !given.is_some_and(|given| same_secret(given, token.as_bytes())) {
            let problem = Problem::new(StatusCode::UNAUTHORIZED, "a valid bearer token is required");
            let mut response = problem.into_response();
            response
                .headers_mut()
                .insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Bearer"));
            return response;
        }
    }
    next.run(request).await
}

/// Compares in a time that depends on the lengths only.
fn same_secret(a: &[u8], b: &[u8]) -> bool {
    let differing = a.iter().zip(b).fold(0, |acc, (a, b)| std::hint::black_box(acc | (a ^ b)));
    a.len() == b.len() && differing == 0
}

/// A JSON body; what is wrong with it becomes a [`Problem`].
struct Body<T>(T);

impl<T: DeserializeOwned> FromRequest<App> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, app: &App) -> Result<Body<T>, Problem> {
        let bytes = Bytes::from_request(request, app)
            .await
            .map_err(|e: BytesRejection| Problem::new(e.status(), e.body_text().to_lowercase()))?;
        serde_json::from_slice(&bytes)
            .map(Body)
            .map_err(|e| Problem::new(StatusCode::BAD_REQUEST, format!("body: {e}")))
    }
}

/// Path parameters; what is wrong with them becomes a [`Problem`].
struct Path<T>(T);

impl<T: DeserializeOwned + Send> FromRequestParts<App> for Path<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Path<T>, Problem> {
        let path = axum::extract::Path::<T>::from_request_parts(parts, app).await;
        let path =
            path.map_err(|e: PathRejection| Problem::new(e.status(), format!("path: {}", e.body_text())))?;
        Ok(Path(path.0))
    }
}

/// Query parameters; what is wrong with them becomes a [`Problem`].
struct Query<T>(T);

impl<T: DeserializeOwned> FromRequestParts<App> for Query<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Query<T>, Problem> {
        let query = axum::extract::Query::<T>::from_request_parts(parts, app).await;
        let query = query
            .map_err(|e: QueryRejection| Problem::new(e.status(), format!("query: {}", e.body_text())))?;
        Ok(Query(query.0))
    }
}

/// The query of a change.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ChangeQuery {
    #[serde(default)]
    dry_run: bool,
}

/// The query of a removal.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RemoveQuery {
    #[serde(default)]
    dry_run: bool,
    #[serde(default)]
    force: bool,
}

/// The query of what has no parameters.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NoQuery {}

/// The body of `POST /v1/services`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewService {
    /// Its name.
    pub name: String,
    /// Its address.
    pub vip: IpAddr,
    /// Its port.
    pub port: u16,
    /// Its protocol.
    #[serde(default = "tcp")]
    pub protocol: Protocol,
    /// How many buckets it has.
    #[serde(default = "default_buckets")]
    pub buckets: u32,
    /// How its packets travel in closed windows.
    #[serde(default)]
    pub encapsulation: Encapsulation,
}

fn tcp() -> Protocol {
    Protocol::Tcp
}

fn default_buckets() -> u32 {
    DEFAULT_BUCKETS
}

/// The body of `PUT /v1/services/{service}/backends/{backend}`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewBackend {
    /// Its address.
    pub address: IpAddr,
    /// Its weight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
}

/// The body of `PATCH /v1/services/{service}/backends/{backend}`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackendPatch {
    /// Its new weight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
    /// Whether it is to drain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<bool>,
}

/// Names are like labels of host names (RFC 1123), in lower case.
fn check_name(field: &str, name: &str) -> Result<(), Problem> {
    let plain = name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if plain && (1..=63).contains(&name.len()) && !name.starts_with('-') && !name.ends_with('-') {
        return Ok(());
    }
    Err(Problem::field(
        field,
        name,
        "a name is 1 to 63 of a-z, 0-9 and -, and neither begins nor ends with -",
    ))
}

fn check_address(field: &str, address: IpAddr) -> Result<(), Problem> {
    let IpAddr::V4(v4) = address else {
        return Err(Problem::field(field, address, "IPv6 is not supported yet; give an IPv4 address"));
    };
    // 0.0.0.0/8 is "this network", 240.0.0.0/4 is reserved (RFC 6890).
    let [first, ..] = v4.octets();
    if first == 0 || v4.is_loopback() || v4.is_multicast() || first >= 240 {
        return Err(Problem::field(field, address, "not the address of one host"));
    }
    Ok(())
}

fn check_weight(weight: Option<u32>) -> Result<(), Problem> {
    match weight {
        Some(weight) if weight > MAX_WEIGHT => {
            Err(Problem::field("weight", weight, format!("a weight is at most {MAX_WEIGHT}")))
        }
        _ => Ok(()),
    }
}

fn find<'a>(tables: &'a Tables, name: &str) -> Result<&'a ServiceState, Problem> {
    let service = tables.state.service(name);
    service.ok_or_else(|| Problem::not_found("service", name, "there is no such service"))
}

async fn node_sync(
    State(app): State<App>,
    Path(node): Path<String>,
    Body(request): Body<SyncRequest>,
) -> Result<Json<SyncResponse>, Problem> {
    check_name("node", &node)?;
    check_address("address", request.address)?;
    Ok(Json(sync::sync(&app.hub, &node, request).await?))
}

async fn status(State(app): State<App>, Query(NoQuery {}): Query<NoQuery>) -> Json<views::StatusView> {
    let tables = app.hub.tables.read().await;
    let (now, live) = (app.hub.now_ms(), app.hub.live());
    Json(views::StatusView {
        version: env!("CARGO_PKG_VERSION").into(),
        leader: true,
        listening: app.listening.to_string(),
        lease_ms: app.hub.lease_ms,
        directory: tables.state.meta.directory,
        services: views::service_statuses(&tables, &live),
        nodes: views::nodes(&tables, &live, now),
    })
}

async fn list_services(State(app): State<App>) -> Json<Vec<views::ServiceView>> {
    let tables = app.hub.tables.read().await;
    Json(tables.state.services.values().map(|service| views::service(&tables.state, service)).collect())
}

async fn show_service(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<Json<views::ServiceView>, Problem> {
    let tables = app.hub.tables.read().await;
    Ok(Json(views::service(&tables.state, find(&tables, &name)?)))
}

async fn add_service(
    State(app): State<App>,
    Query(query): Query<ChangeQuery>,
    Body(body): Body<NewService>,
) -> Result<(StatusCode, Json<Answer>), Problem> {
    let NewService { name, vip, port, protocol, buckets, encapsulation } = body;
    check_name("name", &name)?;
    check_address("vip", vip)?;
    if port == 0 {
        return Err(Problem::field("port", port, "a port is 1 to 65535"));
    }
    if !is_bucket_count(buckets) {
        let why = format!("a power of two from {MIN_BUCKETS} to {MAX_BUCKETS}");
        return Err(Problem::field("buckets", buckets, why));
    }
    let (id, hash_key) = (ServiceId(rand::random()), HashKey(rand::random()));
    let service = Service { id, name, vip, protocol, port, buckets, hash_key, encapsulation };
    let answer = app.hub.command(Command::AddService(service), query.dry_run).await?;
    let status = if query.dry_run { StatusCode::OK } else { StatusCode::CREATED };
    Ok((status, Json(answer)))
}

async fn remove_service(
    State(app): State<App>,
    Path(service): Path<String>,
    Query(query): Query<ChangeQuery>,
) -> Result<Json<Answer>, Problem> {
    Ok(Json(app.hub.command(Command::RemoveService { service }, query.dry_run).await?))
}

async fn service_backends(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<Json<Vec<views::BackendView>>, Problem> {
    let tables = app.hub.tables.read().await;
    Ok(Json(views::backends(&tables.state, find(&tables, &name)?)))
}

async fn all_backends(State(app): State<App>) -> Json<Vec<views::BackendView>> {
    let tables = app.hub.tables.read().await;
    let services = tables.state.services.values();
    Json(services.flat_map(|service| views::backends(&tables.state, service)).collect())
}

async fn put_backend(
    State(app): State<App>,
    Path((service, name)): Path<(String, String)>,
    Query(query): Query<ChangeQuery>,
    Body(body): Body<NewBackend>,
) -> Result<Json<Answer>, Problem> {
    check_name("backend", &name)?;
    check_address("address", body.address)?;
    check_weight(body.weight)?;
    let command = Command::PutBackend { service, name, address: body.address, weight: body.weight };
    Ok(Json(app.hub.command(command, query.dry_run).await?))
}

async fn patch_backend(
    State(app): State<App>,
    Path((service, name)): Path<(String, String)>,
    Query(query): Query<ChangeQuery>,
    Body(body): Body<BackendPatch>,
) -> Result<Json<Answer>, Problem> {
    check_weight(body.weight)?;
    let command = Command::PatchBackend { service, name, weight: body.weight, drain: body.drain };
    Ok(Json(app.hub.command(command, query.dry_run).await?))
}

async fn remove_backend(
    State(app): State<App>,
    Path((service, name)): Path<(String, String)>,
    Query(query): Query<RemoveQuery>,
) -> Result<Json<Answer>, Problem> {
    let command = Command::RemoveBackend { service, name, force: query.force };
    Ok(Json(app.hub.command(command, query.dry_run).await?))
}

/// The query of a table.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TableQuery {
    bucket: Option<u32>,
}

async fn table(
    State(app): State<App>,
    Path(name): Path<String>,
    Query(query): Query<TableQuery>,
) -> Result<Json<views::TableView>, Problem> {
    let tables = app.hub.tables.read().await;
    let service = find(&tables, &name)?;
    let count = service.record.service.buckets;
    let numbers = match query.bucket {
        Some(bucket) if bucket >= count => {
            return Err(Problem::field("bucket", bucket, format!("service {name} has {count} buckets")));
        }
        Some(bucket) => bucket..bucket + 1,
        None => 0..count,
    };
    let buckets = views::buckets(&tables.state, service, numbers);
    Ok(Json(views::TableView { service: name, generation: service.record.generation, buckets }))
}

/// The query of open windows.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WindowsQuery {
    #[serde(default = "default_limit")]
    limit: usize,
}

fn default_limit() -> usize {
    1000
}

async fn windows(
    State(app): State<App>,
    Path(name): Path<String>,
    Query(query): Query<WindowsQuery>,
) -> Result<Json<views::WindowsView>, Problem> {
    let tables = app.hub.tables.read().await;
    Ok(Json(views::windows(&tables.state, find(&tables, &name)?, query.limit)))
}

async fn nodes(State(app): State<App>) -> Json<Vec<views::NodeView>> {
    let tables = app.hub.tables.read().await;
    let (now, live) = (app.hub.now_ms(), app.hub.live());
    Json(views::nodes(&tables, &live, now))
}

async fn muxes(state: State<App>) -> Json<Vec<views::NodeView>> {
    let Json(mut all) = nodes(state).await;
    all.retain(|node| node.kind == NodeKind::Mux);
    Json(all)
}

async fn remove_mux(
    State(app): State<App>,
    Path(name): Path<String>,
    Query(query): Query<ChangeQuery>,
) -> Result<Json<Answer>, Problem> {
    let lives = app.hub.live().nodes.get(&name).is_some_and(|node| !node.expired);
    if lives {
        return Err(Problem::conflict("mux", &name, "it is alive; stop it first"));
    }
    Ok(Json(app.hub.command(Command::RemoveMux { name }, query.dry_run).await?))
}

async fn drains(State(app): State<App>) -> Json<Vec<views::DrainView>> {
    Json(views::drains(&app.hub.tables.read().await.state))
}

/// The query of events.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EventsQuery {
    #[serde(default)]
    after: u64,
}

async fn events(State(app): State<App>, Query(query): Query<EventsQuery>) -> Json<serde_json::Value> {
    let live = app.hub.live();
    let events: Vec<_> = live.events.after(query.after).collect();
    Json(json!({ "last": live.events.last(), "events": events }))
}
