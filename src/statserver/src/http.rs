//! The routes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use futures_util::StreamExt;
use inflight_stats::Report;
use inflight_stats::decider::Decision;
use inflight_stats::ingest::{Averages, Figures};
use inflight_stats::report::{CONTENT_TYPE, MAX_BYTES};
use inflight_stats::request::{KUBELET_PROBE_HEADER, is_kubelet_agent};
use serde::Serialize;
use tracing::debug;

use crate::keys::{KeyName, Keys};
use crate::metrics::Metrics;

/// What all requests share.
pub struct App {
    /// The keys.
    pub keys: Keys,
    /// The server's own metrics.
    pub metrics: Metrics,
    /// Set on SIGTERM.
    pub draining: AtomicBool,
}

/// Unix time in nanoseconds.
pub fn now_ns() -> u64 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_1970.as_nanos()).unwrap_or(u64::MAX)
}

/// All routes.
pub fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/v1/reports", post(report))
        .route("/v1/keys", get(keys))
        .route("/v1/keys/{namespace}/{name}", get(key))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
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

async fn ready(State(app): State<Arc<App>>) -> Response {
    if app.draining.load(Ordering::Relaxed) {
        return (StatusCode::SERVICE_UNAVAILABLE, "draining\n").into_response();
    }
    "ok\n".into_response()
}

async fn report(State(app): State<Arc<App>>, headers: HeaderMap, body: Body) -> Response {
    let (code, reason, bytes) = match take(&app, &headers, body).await {
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
async fn take(app: &App, headers: &HeaderMap, body: Body) -> Result<usize, (StatusCode, String)> {
    let content_type = headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    if let Some(was) = content_type.filter(|was| *was != CONTENT_TYPE.as_bytes()) {
        let was = String::from_utf8_lossy(was);
        return Err((
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            format!("content-type was {was}, allowed is {CONTENT_TYPE}\n"),
        ));
    }
    let too_large = || {
        (StatusCode::PAYLOAD_TOO_LARGE, format!("the report has more than the allowed {MAX_BYTES} bytes\n"))
    };
    let bytes = read_up_to(body, MAX_BYTES).await.map_err(|Cut| too_large())?;
    let report = Report::decode(&bytes).map_err(|error| (StatusCode::BAD_REQUEST, format!("{error}\n")))?;
    app.keys.record(&report, now_ns()).map_err(|((namespace, name), error)| {
        (StatusCode::CONFLICT, format!("key {namespace}/{name}: {error}\n"))
    })?;
    Ok(bytes.len())
}

/// The body was longer than allowed, or broke off.
struct Cut;

/// Reads a body of at most `most` bytes. Of a longer one some more is read and dropped, because a client that
/// is still writing when the connection closes never sees the answer.
async fn read_up_to(body: Body, most: usize) -> Result<Vec<u8>, Cut> {
    let (mut kept, mut length) = (Vec::new(), 0_usize);
    let mut chunks = body.into_data_stream();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|_| Cut)?;
        length = length.saturating_add(chunk.len());
        if length <= most {
            kept.extend_from_slice(&chunk);
        } else if length > most.saturating_mul(8) {
            break;
        } else {
            kept = Vec::new();
        }
    }
    if length <= most { Ok(kept) } else { Err(Cut) }
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
    desired_pods: u32,
    panic_mode: bool,
    excess_burst_capacity: i64,
    last_report_age_ms: u64,
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

impl From<(KeyName, (Figures, Decision))> for KeyView {
    fn from(((namespace, name), (figures, decision)): (KeyName, (Figures, Decision))) -> Self {
        Self {
            namespace,
            name,
            requests_total: figures.requests_total,
            in_flight: figures.in_flight,
            pods: figures.pods,
            stable: figures.stable.into(),
            panic: figures.panic.into(),
            desired_pods: decision.desired_pods,
            panic_mode: decision.panic_mode,
            excess_burst_capacity: decision.excess_burst_capacity,
            last_report_age_ms: figures.last_report_age_ms,
        }
    }
}

#[derive(Serialize)]
struct KeysView {
    keys: Vec<KeyView>,
}

async fn keys(State(app): State<Arc<App>>) -> Json<KeysView> {
    Json(KeysView { keys: app.keys.all(now_ns()).into_iter().map(KeyView::from).collect() })
}

async fn key(State(app): State<Arc<App>>, Path(name): Path<KeyName>) -> Response {
    match app.keys.figures(&name, now_ns()) {
        Some(figures) => Json(KeyView::from((name, figures))).into_response(),
        None => (StatusCode::NOT_FOUND, format!("no report of key {}/{}\n", name.0, name.1)).into_response(),
    }
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    match app.metrics.text(app.keys.len()) {
        Ok(text) => {
            let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, content_type)], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

#[cfg(test)]
mod tests;
