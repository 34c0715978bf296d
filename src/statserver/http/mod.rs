//! The routes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::ws::WebSocketUpgrade;
use axum::extract::{FromRequestParts, Path, Query, RawPathParams, RawQuery, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use futures_util::StreamExt;
use http_body_util::{BodyExt, Collected};
use inflight_stats::Report;
use inflight_stats::counting::request::{KUBELET_PROBE_HEADER, is_kubelet_agent};
use inflight_stats::protocol::report::{CONTENT_TYPE, MAX_NAME_BYTES, is_name};
use inflight_stats::scaling::decider::DECISION_PERIOD_NS;
use inflight_stats::scaling::key::Averages;
use inflight_stats::scaling::settings::KeySettings;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::cli::limits::{Limit, Limits};
use crate::forward::Forward;
use crate::key_table::{KeyName, Keys, NotTaken, Point, View};
use crate::metrics::Metrics;
use crate::net::auth::{Access, Grant, Unknown};
use crate::net::guard::{Budget, FREE_BYTES, Guard, Share};
use crate::net::listener::Peer;
use crate::settings_store::{TellError, Told};
use crate::stat_stream::{self, Seldom};

/// How many keys one `GET` lists if it does not say, and at the most.
const LISTED: usize = 100;
const MOST_LISTED: usize = 10_000;
/// The largest list in bytes: names may be long.
const MOST_LISTED_BYTES: usize = 8 << 20;

/// What all requests share.
pub struct App {
    /// The keys.
    pub keys: Keys,
    /// Who may do what.
    pub access: Access,
    /// What single keys were told.
    pub told: Told,
    /// How much is taken from a network.
    pub limits: Limits,
    /// Bytes of what is being received.
    pub budget: Budget,
    /// Bytes of answers that have yet to be read.
    pub answers: Budget,
    /// gRPC calls that go on.
    pub calls: Arc<Semaphore>,
    /// One list of keys is made at a time.
    pub listing: tokio::sync::Mutex<()>,
    /// The server's own metrics.
    pub metrics: Arc<Metrics>,
    /// Where stats are sent on to.
    pub forward: Option<Arc<Forward>>,
    /// The target of keys that are scaled by requests a second and told no other.
    pub rps_target: f64,
    /// Set on SIGTERM.
    pub draining: AtomicBool,
    /// Cancelled when connections have to end.
    pub ending: CancellationToken,
    /// The connections that are open, websockets among them.
    pub connections: TaskTracker,
    /// What clients make us say.
    pub seldom: Seldom,
}

/// What whoever asks may do; without a token that is known, 401.
impl FromRequestParts<Arc<App>> for Grant {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Response> {
        let authorization = parts.headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
        let peer = parts.extensions.get::<Peer>().copied().unwrap_or_default();
        let grant = app.access.check(authorization, peer).map_err(|Unknown| {
            app.metrics.unauthorized.inc();
            // A browser asks its user for a password. Whoever has none keeps no connection.
            let headers = [
                (header::WWW_AUTHENTICATE, "Basic realm=\"inflight\", charset=\"UTF-8\""),
                (header::CONNECTION, "close"),
            ];
            (StatusCode::UNAUTHORIZED, headers, "authorization: no token, or one that is not known\n")
                .into_response()
        })?;
        if let Some(guard) = parts.extensions.get::<Arc<Guard>>() {
            guard.known();
        }
        Ok(grant)
    }
}

fn not_covered(app: &App, namespace: &str) -> (StatusCode, String) {
    app.metrics.unauthorized.inc();
    (StatusCode::FORBIDDEN, format!("the token is not good for namespace {namespace}\n"))
}

/// Unix time in nanoseconds as of this process's first look, and from then on by the monotonic clock: whoever sets the wall
/// clock must not move what is in the windows.
pub fn now_ns() -> u64 {
    static BEGAN: LazyLock<(Instant, Duration)> = LazyLock::new(|| (Instant::now(), since_1970()));
    let (began, since_1970) = *BEGAN;
    u64::try_from((since_1970 + began.elapsed()).as_nanos()).unwrap_or(u64::MAX)
}

/// Unix time, as the wall clock has it now.
pub fn since_1970() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// All routes.
pub fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/v1/reports", post(report))
        .route("/v1/keys", get(keys))
        .route("/v1/keys/{namespace}/{name}", get(key))
        .route("/v1/keys/{namespace}/{name}/history", get(history))
        .route("/v1/keys/{namespace}/{name}/settings", get(settings).put(tell).delete(untell))
        .route("/v1/key", get(key))
        .route("/v1/key/history", get(history))
        .route("/v1/key/settings", get(settings).put(tell).delete(untell))
        .route("/", get(|_: Grant| page("text/html; charset=utf-8", include_str!("page/index.html"))))
        .route("/page.css", get(|_: Grant| page("text/css", include_str!("page/page.css"))))
        .route("/page.js", get(|_: Grant| page("text/javascript", include_str!("page/page.js"))))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_method)
        .layer(middleware::from_fn(only_known_parameters))
        .layer(middleware::from_fn_with_state(Arc::clone(&app), within_budget))
        .layer(middleware::from_fn_with_state(Arc::clone(&app), websocket))
        .layer(middleware::from_fn(same_origin))
        .layer(middleware::from_fn(kubelet_probe))
        .with_state(app)
}

/// A kubelet probe is answered on any path, as Knative's stats server does; `/readyz` tells it more.
async fn kubelet_probe(request: Request, next: Next) -> Response {
    let headers = request.headers();
    let probe = headers.contains_key(KUBELET_PROBE_HEADER)
        || headers.get(header::USER_AGENT).is_some_and(|agent| is_kubelet_agent(agent.as_bytes()));
    if probe && request.uri().path() != "/readyz" {
        return StatusCode::OK.into_response();
    }
    next.run(request).await
}

async fn no_such_path() -> Response {
    let paths = "/, /healthz, /readyz, /metrics, /v1/reports, /v1/keys, /v1/keys/NAMESPACE/NAME and below it /history and \
                 /settings, and /v1/key?namespace=NAMESPACE&name=NAME likewise";
    (StatusCode::NOT_FOUND, format!("no such path; there are {paths}\n")).into_response()
}

async fn no_such_method() -> Response {
    let reason = "the path does not take this method; the header `allow` has those that it takes\n";
    (StatusCode::METHOD_NOT_ALLOWED, reason).into_response()
}

/// What is misspelt would otherwise be ignored without a word.
async fn only_known_parameters(request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let known = match path {
        "/v1/keys" => WANTED,
        "/v1/key" | "/v1/key/history" | "/v1/key/settings" => NAMED,
        _ => &[],
    };
    let is_ours = path.starts_with("/v1/");
    let query = request.uri().query().filter(|query| is_ours && !query.is_empty()).unwrap_or_default();
    for (name, _) in form_urlencoded::parse(query.as_bytes()) {
        if !known.contains(&&*name) {
            let name: String = name.chars().take(100).collect();
            let allowed = if known.is_empty() { "none".into() } else { known.join(", ") };
            let reason = format!("parameter {name:?} is not known, allowed here: {allowed}\n");
            return (StatusCode::BAD_REQUEST, reason).into_response();
        }
    }
    next.run(request).await
}

/// A page of another site must not have a browser report, tell keys anything or open a stream here: a server on a loopback
/// address asks for no token, and a browser sends one that it knows by itself. What is no browser says nothing of a site.
async fn same_origin(request: Request, next: Next) -> Response {
    let headers = request.headers();
    let text = |name| headers.get(name).map(HeaderValue::as_bytes);
    let changes = !matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
    if changes || headers.contains_key(header::UPGRADE) {
        let of_this_site = match (text(HeaderName::from_static("sec-fetch-site")), text(header::ORIGIN)) {
            (Some(site), _) if !matches!(site, b"same-origin" | b"none") => false,
            (_, Some(origin)) => {
                let scheme = [&b"http://"[..], b"https://"];
                let authority = scheme.iter().find_map(|scheme| origin.strip_prefix(*scheme));
                authority.is_some() && authority == text(header::HOST)
            }
            (_, None) => true,
        };
        if !of_this_site {
            let reason = "sec-fetch-site or origin: a page of another site may not do this\n";
            return (StatusCode::FORBIDDEN, reason).into_response();
        }
    }
    next.run(request).await
}

/// Answers that are not small take of a budget until they are written: clients may be slow to read.
async fn within_budget(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let (parts, body) = next.run(request).await.into_parts();
    if body.size_hint().exact().is_none_or(|bytes| bytes <= FREE_BYTES as u64) {
        return Response::from_parts(parts, body);
    }
    // All there already: nothing is waited for.
    let Ok(bytes) = body.collect().await.map(Collected::to_bytes) else {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    let mut share = Share::default();
    if app.answers.cover(&mut share, bytes.len()).is_err() {
        app.metrics.refused(Limit::AnswerBytes);
        let reason =
            "others have yet to read as many bytes of answers as --max-answer-bytes allows: try later\n";
        return (StatusCode::SERVICE_UNAVAILABLE, reason).into_response();
    }
    Response::from_parts(parts, Body::from(Bytes::from_owner(Answer { bytes, _share: share })))
}

/// Bytes with their share of the budget, which ends with the last of them.
struct Answer {
    bytes: Bytes,
    _share: Share,
}

impl AsRef<[u8]> for Answer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Knative's stats server takes its stream on any path.
async fn websocket(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let asked = request.headers().get(header::UPGRADE);
    if !asked.is_some_and(|upgrade| upgrade.as_bytes().eq_ignore_ascii_case(b"websocket")) {
        return next.run(request).await;
    }
    let (mut parts, _) = request.into_parts();
    let grant = match Grant::from_request_parts(&mut parts, &app).await {
        Ok(grant) => grant,
        Err(refused) => return refused,
    };
    let guard = parts.extensions.get::<Arc<Guard>>().cloned();
    match WebSocketUpgrade::from_request_parts(&mut parts, &app).await {
        Ok(upgrade) => stat_stream::upgrade(upgrade, app, grant, guard),
        Err(refused) => refused.into_response(),
    }
}

/// A part of the live page. It loads nothing from elsewhere, and nothing else may be loaded into it.
async fn page(content_type: &'static str, text: &'static str) -> Response {
    let policy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
                  base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
    let headers = [
        (header::CONTENT_TYPE, content_type),
        (header::CONTENT_SECURITY_POLICY, policy),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, text).into_response()
}

async fn ready(State(app): State<Arc<App>>) -> Response {
    if app.draining.load(Ordering::Relaxed) {
        return (StatusCode::SERVICE_UNAVAILABLE, "draining\n").into_response();
    }
    "ok\n".into_response()
}

async fn report(State(app): State<Arc<App>>, grant: Grant, headers: HeaderMap, body: Body) -> Response {
    let (code, reason, bytes) = match take(&app, &grant, &headers, body).await {
        Ok(bytes) => (StatusCode::ACCEPTED, String::new(), bytes),
        Err((code, reason)) => (code, reason, 0),
    };
    app.metrics.report(code.as_u16(), bytes);
    if !reason.is_empty() {
        debug!(%code, reason, "report refused");
    }
    (code, reason).into_response()
}

/// Takes a report; how many bytes it had.
async fn take(
    app: &App,
    grant: &Grant,
    headers: &HeaderMap,
    body: Body,
) -> Result<usize, (StatusCode, String)> {
    let content_type = headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    if let Some(was) = content_type.filter(|was| *was != CONTENT_TYPE.as_bytes()) {
        let was = String::from_utf8_lossy(was);
        return Err((
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            format!("content-type was {was}, allowed is {CONTENT_TYPE}\n"),
        ));
    }
    let Read { bytes, _share } = read(app, body, Limit::ReportBytes, app.limits.max_report_bytes).await?;
    let malformed = |error| {
        (
            StatusCode::BAD_REQUEST,
            format!(
                "{error}
"
            ),
        )
    };
    let mut report = Report::decode(&bytes).map_err(malformed)?;
    // By the wall clock as it is now: that of the server's start may have been wrong.
    let wall_ns = u64::try_from(since_1970().as_nanos()).unwrap_or(u64::MAX);
    report.check_clock(wall_ns.max(now_ns())).map_err(malformed)?;
    let (keys, most) = (report.messages.len(), app.limits.max_messages);
    if keys > most {
        app.metrics.refused(Limit::Messages);
        let reason = format!("the report has {keys} keys, allowed are {most} (--max-messages)\n");
        return Err((StatusCode::BAD_REQUEST, reason));
    }
    // A gateway whose clients name keys may report some that its token is not good for. They are left out, as of a stream:
    // else it would have to report them again for ever, and all others with them.
    let not_granted = report.messages.iter().find(|message| !grant.covers(&message.namespace));
    if let Some(namespace) = not_granted.map(|message| message.namespace.clone()) {
        let refused = not_covered(app, &namespace);
        report.messages.retain(|message| grant.covers(&message.namespace));
        if report.messages.is_empty() {
            return Err(refused);
        }
        app.seldom.say(|unsaid| {
            warn!(
                namespace,
                pod = report.pod,
                unsaid,
                "keys of a namespace that is not granted were left out"
            )
        });
    }
    match app.keys.record(&report, now_ns(), app.forward.as_deref()) {
        Ok(()) => Ok(bytes.len()),
        Err(NotTaken::WentBack((namespace, name), error)) => {
            Err((StatusCode::CONFLICT, format!("key {namespace}/{name}: {error}\n")))
        }
        // Not a 4xx: the sender says it again, and is heard once there is room.
        Err(NotTaken::Full(full)) => {
            app.metrics.refused(full.limit);
            app.seldom
                .say(|unsaid| warn!(%full, pod = report.pod, unsaid, "not the whole of a report was taken"));
            Err((StatusCode::INSUFFICIENT_STORAGE, format!("{full}\n")))
        }
    }
}

/// Reads a body of at most `most` bytes, in the time that a body may take.
async fn read(app: &App, body: Body, limit: Limit, most: usize) -> Result<Read, (StatusCode, String)> {
    let timeout = app.limits.body_timeout;
    match tokio::time::timeout(timeout, read_up_to(app, body, most)).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(NotRead::TooLong)) => {
            app.metrics.refused(limit);
            let reason = format!("the body has more than the allowed {most} bytes (--{})\n", limit.flag());
            Err((StatusCode::PAYLOAD_TOO_LARGE, reason))
        }
        Ok(Err(NotRead::NoRoom)) => {
            app.metrics.refused(Limit::BytesInFlight);
            let reason = "more bytes are being received than --max-bytes-in-flight allows: try later\n";
            Err((StatusCode::SERVICE_UNAVAILABLE, reason.into()))
        }
        Err(_) => {
            app.metrics.refused(Limit::BodyTimeout);
            let reason = format!("the body took longer than {timeout:?} (--body-timeout)\n");
            // It may come again.
            Err((StatusCode::SERVICE_UNAVAILABLE, reason))
        }
    }
}

/// Why a body was not read.
enum NotRead {
    TooLong,
    NoRoom,
}

/// A body and its share of the budget.
struct Read {
    bytes: Vec<u8>,
    _share: Share,
}

/// Reads a body of at most `most` bytes. Of a longer one some more is read and dropped, because a client that is still writing
/// when the connection closes never sees the answer. One that breaks off is as good as empty: nobody is there to be answered.
async fn read_up_to(app: &App, body: Body, most: usize) -> Result<Read, NotRead> {
    let (mut kept, mut share, mut length) = (Vec::new(), Share::default(), 0_usize);
    let mut refused = None;
    let mut chunks = body.into_data_stream();
    while let Some(chunk) = chunks.next().await {
        let Ok(chunk) = chunk else {
            kept = Vec::new();
            break;
        };
        length = length.saturating_add(chunk.len());
        if length > most {
            refused = Some(NotRead::TooLong);
        } else if refused.is_none() && app.budget.cover(&mut share, length).is_err() {
            refused = Some(NotRead::NoRoom);
        }
        if refused.is_none() {
            kept.extend_from_slice(&chunk);
        } else if length > most.saturating_mul(8) {
            break;
        } else {
            (kept, share) = (Vec::new(), Share::default());
        }
    }
    refused.map_or(Ok(Read { bytes: kept, _share: share }), Err)
}

/// How deep values lie in each other: a number is 0 deep, an object of numbers 1.
fn depth(json: &serde_json::Value) -> usize {
    match json {
        serde_json::Value::Array(values) => values.iter().map(depth).max().unwrap_or(0) + 1,
        serde_json::Value::Object(fields) => fields.values().map(depth).max().unwrap_or(0) + 1,
        _ => 0,
    }
}

#[derive(Serialize)]
struct KeyView {
    namespace: String,
    name: String,
    requests_total: u64,
    in_flight: u64,
    pods: u64,
    stable: AveragesView,
    panic: AveragesView,
    /// `null` where it is not known yet.
    desired_pods: Option<u32>,
    panic_mode: bool,
    /// `null` before the first decision.
    excess_burst_capacity: Option<i64>,
    /// `null` before the first report.
    last_report_age_ms: Option<u64>,
    settings: Arc<KeySettings>,
}

#[derive(Serialize)]
struct AveragesView {
    concurrency: f64,
    requests_per_second: f64,
}

impl From<Averages> for AveragesView {
    fn from(averages: Averages) -> Self {
        Self { concurrency: averages.concurrency, requests_per_second: averages.requests_per_second }
    }
}

impl From<View> for KeyView {
    fn from(View { name: (namespace, name), figures, desired_pods, decision, settings }: View) -> Self {
        Self {
            namespace,
            name,
            requests_total: figures.requests_total,
            in_flight: figures.in_flight,
            pods: figures.pods,
            stable: figures.stable.into(),
            panic: figures.panic.into(),
            desired_pods,
            panic_mode: decision.is_some_and(|decision| decision.panic_mode),
            excess_burst_capacity: decision.map(|decision| decision.excess_burst_capacity),
            last_report_age_ms: figures.last_report_age_ms,
            settings,
        }
    }
}

/// How `/v1/key` names one.
const NAMED: &[&str] = &["namespace", "name"];

/// What `GET /v1/keys` can be told.
const WANTED: &[&str] = &["search", "limit"];

/// Which keys to list.
struct Wanted {
    /// A part of `namespace/name`.
    search: String,
    limit: usize,
}

impl Wanted {
    fn of(query: &str) -> Result<Self, (StatusCode, String)> {
        let mut wanted = Self { search: String::new(), limit: LISTED };
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            if name == "search" {
                wanted.search = value.into_owned();
            } else if name == "limit" {
                wanted.limit = value.parse().ok().filter(|limit| *limit <= MOST_LISTED).ok_or_else(|| {
                    let value: String = value.chars().take(100).collect();
                    let allowed = format!("a whole number from 0 to {MOST_LISTED}");
                    (StatusCode::BAD_REQUEST, format!("`limit` was {value:?}, allowed is {allowed}\n"))
                })?;
            }
        }
        Ok(wanted)
    }
}

/// The first keys that fit, and in `found` how many there are, also beyond the limit.
async fn keys(
    State(app): State<Arc<App>>,
    grant: Grant,
    RawQuery(query): RawQuery,
) -> Result<Response, (StatusCode, String)> {
    let Wanted { search, limit } = Wanted::of(query.as_deref().unwrap_or_default())?;
    let _one = app.listing.lock().await;
    let (views, found) = app.keys.views(&grant, &search, limit, now_ns());
    let mut text = b"{\"keys\":[".to_vec();
    for view in views {
        let before = text.len();
        if before > b"{\"keys\":[".len() {
            text.push(b',');
        }
        let written = serde_json::to_writer(&mut text, &KeyView::from(view));
        if written.is_err() || text.len() > MOST_LISTED_BYTES {
            text.truncate(before);
            break;
        }
    }
    text.extend_from_slice(format!("],\"found\":{found}}}").as_bytes());
    text.shrink_to_fit();
    Ok(([(header::CONTENT_TYPE, "application/json")], text).into_response())
}

/// Which key a request is about: by its path, or by `?namespace=…&name=…`, because clients take `.` and `..` out of paths,
/// also if they are percent-encoded.
struct Named(KeyName);

#[derive(Deserialize)]
struct NamedByQuery {
    namespace: String,
    name: String,
}

impl<S: Send + Sync> FromRequestParts<S> for Named {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Response> {
        let in_path = RawPathParams::from_request_parts(parts, state).await;
        if in_path.map_err(IntoResponse::into_response)?.iter().next().is_some() {
            let name = Path::<KeyName>::from_request_parts(parts, state).await;
            return name.map(|Path(name)| Self(name)).map_err(IntoResponse::into_response);
        }
        let query = Query::<NamedByQuery>::from_request_parts(parts, state).await;
        let Query(NamedByQuery { namespace, name }) = query.map_err(|_| {
            let reason = "the query was not of this kind, allowed is ?namespace=NAMESPACE&name=NAME\n";
            (StatusCode::BAD_REQUEST, reason).into_response()
        })?;
        Ok(Self((namespace, name)))
    }
}

fn unknown((namespace, name): &KeyName) -> Response {
    (StatusCode::NOT_FOUND, format!("no report of key {namespace}/{name}\n")).into_response()
}

async fn key(State(app): State<Arc<App>>, grant: Grant, Named(name): Named) -> Response {
    if !grant.covers(&name.0) {
        return not_covered(&app, &name.0).into_response();
    }
    let view = app.keys.view(&name.0, &name.1, now_ns());
    view.map_or_else(|| unknown(&name), |view| Json(KeyView::from(view)).into_response())
}

#[derive(Serialize)]
struct HistoryView {
    seconds_between: u64,
    points: Vec<Point>,
}

async fn history(State(app): State<Arc<App>>, grant: Grant, Named(name): Named) -> Response {
    if !grant.covers(&name.0) {
        return not_covered(&app, &name.0).into_response();
    }
    let seconds_between = DECISION_PERIOD_NS / 1_000_000_000;
    let points = app.keys.past(&name.0, &name.1);
    points.map_or_else(
        || unknown(&name),
        |points| Json(HistoryView { seconds_between, points }).into_response(),
    )
}

async fn settings(State(app): State<Arc<App>>, grant: Grant, Named(name): Named) -> Response {
    if !grant.covers(&name.0) {
        return not_covered(&app, &name.0).into_response();
    }
    let settings = app.keys.of(&name.0, &name.1, |key| Arc::clone(key.settings()));
    settings.map_or_else(|| unknown(&name), |settings| Json(settings).into_response())
}

fn may_tell(app: &App, grant: &Grant, name: &KeyName) -> Result<(), (StatusCode, String)> {
    if !grant.admin {
        app.metrics.unauthorized.inc();
        return Err((StatusCode::FORBIDDEN, "settings take a token that is marked admin\n".into()));
    }
    if grant.covers(&name.0) { Ok(()) } else { Err(not_covered(app, &name.0)) }
}

/// What a key is told replaces all that it was told before.
async fn tell(State(app): State<Arc<App>>, grant: Grant, Named(name): Named, body: Body) -> Response {
    if let Err(refused) = may_tell(&app, &grant, &name) {
        return refused.into_response();
    }
    let bytes = match read(&app, body, Limit::SettingsBytes, app.limits.max_settings_bytes).await {
        Ok(read) => read.bytes,
        Err(refused) => return refused.into_response(),
    };
    for (what, value) in [("namespace", &name.0), ("name", &name.1)] {
        if !is_name(value) {
            let reason = format!("{what} was {} bytes, allowed are 1 to {MAX_NAME_BYTES}\n", value.len());
            return (StatusCode::BAD_REQUEST, reason).into_response();
        }
    }
    match serde_json::from_slice(&bytes) {
        Ok(json) if depth(&json) > app.limits.max_depth => {
            app.metrics.refused(Limit::Depth);
            let most = app.limits.max_depth;
            let reason =
                format!("values lie more than the allowed {most} deep in each other (--max-depth)\n");
            (StatusCode::BAD_REQUEST, reason).into_response()
        }
        Ok(json) => told(&app, name, Some(json)).await,
        Err(error) => (StatusCode::BAD_REQUEST, format!("not JSON: {error}\n")).into_response(),
    }
}

async fn untell(State(app): State<Arc<App>>, grant: Grant, Named(name): Named) -> Response {
    if let Err(refused) = may_tell(&app, &grant, &name) {
        return refused.into_response();
    }
    told(&app, name, None).await
}

async fn told(app: &Arc<App>, name: KeyName, json: Option<serde_json::Value>) -> Response {
    let removed = json.is_none();
    // Done also if the client goes meanwhile, or the file and the key would not agree.
    let (telling, of) = (Arc::clone(app), name.clone());
    let done = tokio::spawn(async move { telling.told.tell(&telling.keys, of, json).await }).await;
    match done.unwrap_or_else(|error| Err(TellError::File(std::io::Error::other(error)))) {
        Ok(()) if removed => StatusCode::NO_CONTENT.into_response(),
        Ok(()) => {
            let settings = app.keys.of(&name.0, &name.1, |key| Arc::clone(key.settings()));
            settings.map_or_else(|| unknown(&name), |settings| Json(settings).into_response())
        }
        Err(TellError::Invalid(reason)) => (StatusCode::BAD_REQUEST, format!("{reason}\n")).into_response(),
        Err(TellError::TooMany) => {
            (StatusCode::INSUFFICIENT_STORAGE, "too many keys have settings of their own\n").into_response()
        }
        Err(TellError::Full(full)) => {
            app.metrics.refused(full.limit);
            (StatusCode::INSUFFICIENT_STORAGE, format!("nothing was changed: {full}\n")).into_response()
        }
        Err(TellError::File(error)) => {
            warn!(%error, "the settings file cannot be written");
            let reason = format!("nothing was changed: the settings file cannot be written: {error}\n");
            (StatusCode::INSUFFICIENT_STORAGE, reason).into_response()
        }
    }
}

async fn metrics(State(app): State<Arc<App>>, grant: Grant) -> Response {
    let _one = app.listing.lock().await;
    let (views, keys) = app.keys.views(&grant, "", crate::metrics::MOST_KEYS, now_ns());
    match app.metrics.text(views, keys) {
        Ok(text) => {
            let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, content_type)], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

#[cfg(test)]
mod tests;
