//! A key's settings: `GET`, `PUT`, `DELETE`.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Json, Response};
use inflight_stats::protocol::key_name::KeyName;
use serde_json::Value;
use tracing::warn;

use crate::app::state::ServerState;
use crate::cli::limits::Limit;
use crate::http::body;
use crate::http::extract::{AdminKeyPath, KeyPath};
use crate::http::keys::unknown_key;
use crate::keys::settings_store::SetError;

/// Shows what a key is scaled by.
pub async fn get_settings(State(state): State<Arc<ServerState>>, KeyPath { name, .. }: KeyPath) -> Response {
    show(&state, &name)
}

fn show(state: &ServerState, name: &KeyName) -> Response {
    let settings = state.keys.read(name, |key| Arc::clone(key.settings()));
    settings.map_or_else(|| unknown_key(name), |settings| Json(settings).into_response())
}

/// Sets a key's settings, which replace all that it had.
pub async fn put_settings(
    State(state): State<Arc<ServerState>>,
    AdminKeyPath(name): AdminKeyPath,
    body: Body,
) -> Response {
    let json = match read_json(&state, body).await {
        Ok(json) => json,
        Err(refused) => return refused.into_response(),
    };
    // In a task, so that it is completed even if the client leaves meanwhile: else the file and the
    // key might not agree.
    let (task_state, key) = (Arc::clone(&state), name.clone());
    let set = tokio::spawn(async move { task_state.changes.settings(key, Some(json)).await }).await;
    match set.unwrap_or_else(|error| Err(SetError::File(std::io::Error::other(error)))) {
        Ok(()) => show(&state, &name),
        Err(error) => refuse(&state, &error),
    }
}

/// Has a key scaled by the defaults again.
pub async fn delete_settings(
    State(state): State<Arc<ServerState>>,
    AdminKeyPath(name): AdminKeyPath,
) -> Response {
    let task_state = Arc::clone(&state);
    let cleared = tokio::spawn(async move { task_state.changes.settings(name, None).await }).await;
    match cleared.unwrap_or_else(|error| Err(SetError::File(std::io::Error::other(error)))) {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(error) => refuse(&state, &error),
    }
}

async fn read_json(state: &ServerState, body: Body) -> Result<Value, (StatusCode, String)> {
    let body = body::receive(state, body, Limit::SettingsBytes, state.limits.max_settings_bytes).await?;
    match serde_json::from_slice(&body.bytes) {
        Ok(json) if depth(&json) > state.limits.max_depth => {
            state.metrics.refused(Limit::Depth);
            let max = state.limits.max_depth;
            let reason =
                format!("the values are nested too deeply; expected at most {max} levels (--max-depth)\n");
            Err((StatusCode::BAD_REQUEST, reason))
        }
        Ok(json) => Ok(json),
        Err(error) => Err((StatusCode::BAD_REQUEST, format!("invalid settings: not JSON: {error}\n"))),
    }
}

/// Returns how deeply values are nested: a number is 0 deep, an object of numbers 1.
fn depth(json: &Value) -> usize {
    match json {
        Value::Array(values) => values.iter().map(depth).max().unwrap_or(0) + 1,
        Value::Object(fields) => fields.values().map(depth).max().unwrap_or(0) + 1,
        _ => 0,
    }
}

fn refuse(state: &ServerState, error: &SetError) -> Response {
    let code = match error {
        SetError::ReadOnly(_) => StatusCode::CONFLICT,
        SetError::Invalid(_) => StatusCode::BAD_REQUEST,
        SetError::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        SetError::TooMany => StatusCode::INSUFFICIENT_STORAGE,
        SetError::CapacityExceeded(exceeded) => {
            state.metrics.refused(exceeded.limit);
            StatusCode::INSUFFICIENT_STORAGE
        }
        SetError::File(error) => {
            warn!(%error, "cannot write the settings file");
            StatusCode::INSUFFICIENT_STORAGE
        }
    };
    (code, format!("{error}\n")).into_response()
}
