//! `GET /v1/server`: how the server itself is.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Json;
use serde::Serialize;

use crate::app::state::ServerState;
use crate::net::auth::Grant;
use crate::os::clock::rfc3339;
use crate::os::process;
use crate::telemetry::metrics::{BUILD, HealthFigures};

/// The server as JSON.
#[derive(Serialize)]
pub struct ServerJson {
    version: &'static str,
    /// `null` if the build was not told it.
    revision: Option<&'static str>,
    now: String,
    /// `null` where it is not known.
    started: Option<String>,
    draining: bool,
    #[serde(flatten)]
    figures: HealthFigures,
    /// Whether the autoscaler to forward to is connected; `null` if nothing is forwarded.
    forward_connected: Option<bool>,
}

/// Shows the server's health.
pub async fn get_server(State(state): State<Arc<ServerState>>, _: Grant) -> Json<ServerJson> {
    let started = process::figures().map(|process| rfc3339((process.started_at_seconds * 1e9) as u64));
    Json(ServerJson {
        version: BUILD.version,
        revision: BUILD.revision,
        now: rfc3339(state.keys.now_ns()),
        started,
        draining: state.drain.is_draining(),
        figures: state.metrics.health(),
        forward_connected: state.forwarder.is_some().then(|| state.metrics.forward_connected.get() == 1),
    })
}
