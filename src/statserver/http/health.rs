//! Health: `/healthz`, `/readyz`, and kubelet's probes on any path.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use inflight_stats::counting::request::{KUBELET_PROBE_HEADER, is_kubelet_agent};

use crate::app::state::ServerState;

/// Answers that the process is alive.
pub async fn alive() -> &'static str {
    "ok\n"
}

/// Answers whether the server is ready: it is until it shuts down, and, with a store, once it knows
/// what the other servers know.
pub async fn ready(State(state): State<Arc<ServerState>>) -> Response {
    if state.drain.is_draining() {
        return (StatusCode::SERVICE_UNAVAILABLE, "draining\n").into_response();
    }
    if state.changes.replica().is_some_and(|replica| !replica.is_caught_up()) {
        return (StatusCode::SERVICE_UNAVAILABLE, "catching up with the store\n").into_response();
    }
    "ok\n".into_response()
}

/// Answers kubelet's probes on any path, as Knative's stats server does; `/readyz` tells them more.
pub async fn kubelet_probe(request: Request, next: Next) -> Response {
    let headers = request.headers();
    let is_probe = headers.contains_key(KUBELET_PROBE_HEADER)
        || headers.get(header::USER_AGENT).is_some_and(|agent| is_kubelet_agent(agent.as_bytes()));
    if is_probe && request.uri().path() != "/readyz" {
        return StatusCode::OK.into_response();
    }
    next.run(request).await
}
