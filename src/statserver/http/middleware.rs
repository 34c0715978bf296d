//! What every request passes before its handler.

use std::sync::Arc;

use axum::extract::ws::WebSocketUpgrade;
use axum::extract::{FromRequestParts, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use inflight_stats::config::suggestion::closest;

use crate::app::state::ServerState;
use crate::http::extract::KEY_PARAMETERS;
use crate::http::keys::{KEY_AND_SENDER_PARAMETERS, LIST_PARAMETERS, SENDER_PARAMETERS};
use crate::net::auth::Grant;
use crate::net::connection_limits::ConnectionGuard;
use crate::protocols::stat_stream;

/// Refuses unknown parameters: misspelt ones would be ignored silently.
pub async fn only_known_parameters(request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let known = match path {
        "/v1/keys" => LIST_PARAMETERS,
        "/v1/key" | "/v1/key/history" | "/v1/key/settings" => KEY_PARAMETERS,
        "/v1/key/senders" => KEY_AND_SENDER_PARAMETERS,
        _ if is_sender_list(path) => SENDER_PARAMETERS,
        _ => &[],
    };
    let is_ours = path.starts_with("/v1/");
    let query = request.uri().query().filter(|query| is_ours && !query.is_empty()).unwrap_or_default();
    for (name, _) in form_urlencoded::parse(query.as_bytes()) {
        if !known.contains(&&*name) {
            let given: String = name.chars().take(100).collect();
            let advice = match closest(&name, known.iter().copied()) {
                Some(meant) => format!("did you mean `{meant}`?"),
                None if known.is_empty() => "this path takes no parameters".into(),
                None => format!("expected one of {}", known.join(", ")),
            };
            return (StatusCode::BAD_REQUEST, format!("unknown parameter {given:?}; {advice}\n"))
                .into_response();
        }
    }
    next.run(request).await
}

/// Returns whether a path is `/v1/keys/NAMESPACE/NAME/senders`; a key may be named `senders`.
fn is_sender_list(path: &str) -> bool {
    let key = path.strip_prefix("/v1/keys/").and_then(|below| below.strip_suffix("/senders"));
    key.is_some_and(|key| key.contains('/'))
}

/// Refuses what a page of another site has a browser do: report, change settings, open a stream. A
/// server on a loopback address asks for no token, and a browser sends one that it knows by itself.
/// Clients that are no browser do not name a site.
pub async fn same_origin(request: Request, next: Next) -> Response {
    let headers = request.headers();
    let text = |name| headers.get(name).map(HeaderValue::as_bytes);
    let changes = !matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
    if changes || headers.contains_key(header::UPGRADE) {
        let refused = match (text(HeaderName::from_static("sec-fetch-site")), text(header::ORIGIN)) {
            (Some(site), _) if !matches!(site, b"same-origin" | b"none") => {
                Some(("sec-fetch-site", site, "same-origin, or none"))
            }
            (_, Some(origin)) => {
                let scheme = [&b"http://"[..], b"https://"];
                let authority = scheme.iter().find_map(|scheme| origin.strip_prefix(*scheme));
                let is_own = authority.is_some() && authority == text(header::HOST);
                (!is_own).then_some(("origin", origin, "this server's own origin, or none"))
            }
            (_, None) => None,
        };
        if let Some((header, given, expected)) = refused {
            let given: String = String::from_utf8_lossy(given).chars().take(100).collect();
            let reason = format!("cross-site request refused: {header} is {given}; expected {expected}\n");
            return (StatusCode::FORBIDDEN, reason).into_response();
        }
    }
    next.run(request).await
}

/// Answers upgrades to a websocket on any path, as Knative's stats server does.
pub async fn websocket(State(state): State<Arc<ServerState>>, request: Request, next: Next) -> Response {
    let upgrade = request.headers().get(header::UPGRADE);
    if !upgrade.is_some_and(|upgrade| upgrade.as_bytes().eq_ignore_ascii_case(b"websocket")) {
        return next.run(request).await;
    }
    let (mut parts, _) = request.into_parts();
    let grant = match Grant::from_request_parts(&mut parts, &state).await {
        Ok(grant) => grant,
        Err(refused) => return refused,
    };
    let guard = parts.extensions.get::<Arc<ConnectionGuard>>().cloned();
    match WebSocketUpgrade::from_request_parts(&mut parts, &state).await {
        Ok(upgrade) => stat_stream::upgrade(upgrade, state, grant, guard),
        Err(error) => {
            let reason = format!(
                "not a websocket handshake: {}; expected a GET with connection: upgrade, \
                 sec-websocket-version: 13 and a sec-websocket-key\n",
                error.body_text()
            );
            (error.status(), reason).into_response()
        }
    }
}
