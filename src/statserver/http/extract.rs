//! Who asks, and for which key: extractors that refuse what is not granted.

use std::convert::Infallible;
use std::sync::Arc;

use axum::extract::{FromRequestParts, Path, RawPathParams};
use axum::http::request::Parts;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use inflight_stats::protocol::key_name::KeyName;
use inflight_stats::protocol::report::check_name;

use crate::app::state::ServerState;
use crate::net::auth::{Grant, NOT_ADMIN, NOT_COVERED, Peer, Unauthenticated, not_covered};
use crate::net::connection_limits::ConnectionGuard;

/// How `/v1/key` names a key.
pub const KEY_PARAMETERS: &[&str] = &["namespace", "name"];

/// What is known of the client.
impl<S: Send + Sync> FromRequestParts<S> for Peer {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(parts.extensions.get::<Self>().copied().unwrap_or_default())
    }
}

/// What the client may do; 401 without a known token.
impl FromRequestParts<Arc<ServerState>> for Grant {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, state: &Arc<ServerState>) -> Result<Self, Response> {
        let Ok(peer) = Peer::from_request_parts(parts, state).await;
        let authorization = parts.headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
        let grant = state.access.check(authorization, peer).map_err(|error: Unauthenticated| {
            state.refuse(peer, error.reason());
            // A browser asks its user for a password. Clients without a token keep no connection.
            let headers = [
                (header::WWW_AUTHENTICATE, "Basic realm=\"inflight\", charset=\"UTF-8\""),
                (header::CONNECTION, "close"),
            ];
            (StatusCode::UNAUTHORIZED, headers, format!("{error}\n")).into_response()
        })?;
        if let Some(guard) = parts.extensions.get::<Arc<ConnectionGuard>>() {
            guard.authenticated();
        }
        Ok(grant)
    }
}

/// Counts, logs and returns a refusal: the token does not cover a namespace.
pub fn forbidden(state: &ServerState, peer: Peer, namespace: &str) -> (StatusCode, String) {
    state.refuse(peer, NOT_COVERED);
    (StatusCode::FORBIDDEN, format!("{}\n", not_covered(namespace)))
}

/// The key that a request is about, whose namespace the grant covers. It is named by the path, or
/// by `?namespace=…&name=…`, because clients remove `.` and `..` from paths, also if they are
/// percent-encoded.
pub struct KeyPath {
    /// The key.
    pub name: KeyName,
    /// What the client may do.
    pub grant: Grant,
}

impl FromRequestParts<Arc<ServerState>> for KeyPath {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, state: &Arc<ServerState>) -> Result<Self, Response> {
        let grant = Grant::from_request_parts(parts, state).await?;
        let in_path = RawPathParams::from_request_parts(parts, state).await;
        let is_in_path = in_path
            .map_err(|error| invalid_path(error.status(), &error.body_text()))?
            .iter()
            .next()
            .is_some();
        let name = if is_in_path {
            let path = Path::<KeyName>::from_request_parts(parts, state).await;
            path.map(|Path(name)| name).map_err(|error| invalid_path(error.status(), &error.body_text()))?
        } else {
            key_in_query(parts.uri.query().unwrap_or_default()).map_err(IntoResponse::into_response)?
        };
        for (what, value) in [("namespace", &name.namespace), ("name", &name.name)] {
            let check = check_name(value);
            check
                .map_err(|error| (StatusCode::BAD_REQUEST, format!("`{what}` {error}\n")).into_response())?;
        }
        match grant.covers(&name.namespace) {
            true => Ok(Self { name, grant }),
            false => {
                let Ok(peer) = Peer::from_request_parts(parts, state).await;
                Err(forbidden(state, peer, &name.namespace).into_response())
            }
        }
    }
}

fn invalid_path(status: StatusCode, reason: &str) -> Response {
    let reason = format!("invalid path: {reason}; expected percent-encoded UTF-8\n");
    (status, reason).into_response()
}

/// Reads the parameters [`KEY_PARAMETERS`].
fn key_in_query(query: &str) -> Result<KeyName, (StatusCode, String)> {
    let parameter = |name: &str| {
        let mut values = form_urlencoded::parse(query.as_bytes()).filter(|(given, _)| given == name);
        let mistake = match (values.next(), values.next()) {
            (Some((_, value)), None) => return Ok(value.into_owned()),
            (None, _) => "is missing from the query",
            (Some(_), Some(_)) => "is in the query more than once",
        };
        let reason = format!("`{name}` {mistake}; expected ?namespace=NAMESPACE&name=NAME\n");
        Err((StatusCode::BAD_REQUEST, reason))
    };
    Ok(KeyName { namespace: parameter("namespace")?, name: parameter("name")? })
}

/// The key whose settings a request changes, which requires an admin token.
pub struct AdminKeyPath(
    /// The key.
    pub KeyName,
);

impl FromRequestParts<Arc<ServerState>> for AdminKeyPath {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, state: &Arc<ServerState>) -> Result<Self, Response> {
        let KeyPath { name, grant } = KeyPath::from_request_parts(parts, state).await?;
        if !grant.admin {
            let Ok(peer) = Peer::from_request_parts(parts, state).await;
            state.refuse(peer, NOT_ADMIN);
            return Err((StatusCode::FORBIDDEN, format!("{NOT_ADMIN}\n")).into_response());
        }
        Ok(Self(name))
    }
}
