//! The live page.

use axum::http::header;
use axum::response::{IntoResponse, Response};

use crate::net::auth::Grant;

/// The document.
pub async fn document(_: Grant) -> Response {
    part("text/html; charset=utf-8", include_str!("page/index.html"))
}

/// Its style sheet.
pub async fn style(_: Grant) -> Response {
    part("text/css", include_str!("page/page.css"))
}

/// Its script.
pub async fn script(_: Grant) -> Response {
    part("text/javascript", include_str!("page/page.js"))
}

/// The page loads nothing from other sites, and no other site may embed it.
fn part(content_type: &'static str, text: &'static str) -> Response {
    let policy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                  img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
    let headers = [
        (header::CONTENT_TYPE, content_type),
        (header::CONTENT_SECURITY_POLICY, policy),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, text).into_response()
}
