//! `GET /module/inflight_filter.wasm` and `GET /module/sha256`: the filter's module, for Envoys that
//! fetch it. It is no secret, so everybody may have it.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::app::filter_module::FilterModule;
use crate::app::state::ServerState;
use crate::http::body::SharedBody;

const NO_MODULE: (StatusCode, &str) =
    (StatusCode::NOT_FOUND, "this server has no module to hand out: it was started without --module\n");

/// Answers with the module's bytes, or with 304 if the client has them.
pub async fn module(State(state): State<Arc<ServerState>>, headers: HeaderMap) -> Response {
    let Some(FilterModule { bytes, sha256 }) = &state.module else { return NO_MODULE.into_response() };
    let tag = format!("\"{sha256}\"");
    let has_it = headers.get_all(header::IF_NONE_MATCH).iter().any(|known| names(known.as_bytes(), &tag));
    let caching = [(header::ETAG, tag), (header::CACHE_CONTROL, "no-cache".to_owned())];
    if has_it {
        return (StatusCode::NOT_MODIFIED, caching).into_response();
    }
    let mut response = (caching, [(header::CONTENT_TYPE, "application/wasm")], bytes.clone()).into_response();
    response.extensions_mut().insert(SharedBody);
    response
}

/// Answers with the module's SHA-256.
pub async fn sha256(State(state): State<Arc<ServerState>>) -> Response {
    match &state.module {
        Some(module) => format!("{}\n", module.sha256).into_response(),
        None => NO_MODULE.into_response(),
    }
}

/// Returns whether the value of an `if-none-match` header names a tag. Our tags have no commas.
fn names(known: &[u8], tag: &str) -> bool {
    known.split(|byte| *byte == b',').map(<[u8]>::trim_ascii).any(|known| {
        let known = known.strip_prefix(b"W/").unwrap_or(known);
        known == b"*" || known == tag.as_bytes()
    })
}
