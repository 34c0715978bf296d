//! The routes.

use std::sync::Arc;

use axum::Router;
use axum::http::{Method, StatusCode};
use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::{get, post};

use crate::app::state::ServerState;
use crate::http::{body, health, keys, middleware, module, page, prometheus, reports, server, settings};

/// Returns all routes.
pub fn router(state: Arc<ServerState>) -> Router {
    let settings_methods =
        || get(settings::get_settings).put(settings::put_settings).delete(settings::delete_settings);
    Router::new()
        .route("/v1/reports", post(reports::post_report))
        .route("/v1/keys", get(keys::list_keys))
        .route("/v1/keys/{namespace}/{name}", get(keys::get_key))
        .route("/v1/keys/{namespace}/{name}/history", get(keys::get_history))
        .route("/v1/keys/{namespace}/{name}/senders", get(keys::list_senders))
        .route("/v1/keys/{namespace}/{name}/settings", settings_methods())
        .route("/v1/key", get(keys::get_key))
        .route("/v1/key/history", get(keys::get_history))
        .route("/v1/key/senders", get(keys::list_senders))
        .route("/v1/key/settings", settings_methods())
        .route("/v1/server", get(server::get_server))
        .route("/", get(page::document))
        .route("/page.css", get(page::style))
        .route("/page.js", get(page::script))
        .route("/healthz", get(health::alive))
        .route("/readyz", get(health::ready))
        .route("/metrics", get(prometheus::scrape))
        .route("/module/inflight_filter.wasm", get(module::module))
        .route("/module/sha256", get(module::sha256))
        .fallback(unknown_path)
        .method_not_allowed_fallback(unknown_method)
        .layer(from_fn(middleware::only_known_parameters))
        .layer(from_fn_with_state(Arc::clone(&state), body::reserve_response))
        .layer(from_fn_with_state(Arc::clone(&state), middleware::websocket))
        .layer(from_fn(middleware::same_origin))
        .layer(from_fn(health::kubelet_probe))
        .with_state(state)
}

async fn unknown_path() -> (StatusCode, &'static str) {
    let reason = "unknown path; expected /, /healthz, /readyz, /metrics, /module/inflight_filter.wasm, \
                  /module/sha256, /v1/reports, /v1/server, /v1/keys, /v1/keys/NAMESPACE/NAME and below it /history, /senders and /settings, or \
                  /v1/key?namespace=NAMESPACE&name=NAME likewise\n";
    (StatusCode::NOT_FOUND, reason)
}

async fn unknown_method(method: Method) -> (StatusCode, String) {
    // A method may be as long as a head.
    let reason = format!("{:.20} is not allowed here; see the allow header\n", method.as_str());
    (StatusCode::METHOD_NOT_ALLOWED, reason)
}
