//! HTTP/1.1 over a connection.

use std::pin::pin;
use std::sync::Arc;

use axum::Router;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tower::ServiceExt;
use tracing::debug;

use crate::app::state::ServerState;
use crate::cli::limits::Limit;
use crate::net::connection::Connection;

/// Serves a connection. A client that closes its side after a request is still answered: an Envoy
/// that ends sends its last report so.
pub async fn serve(connection: Connection, router: Router, state: Arc<ServerState>) {
    let mut http = http1::Builder::new();
    // The head is timed by the connection.
    http.half_close(true).timer(TokioTimer::new()).header_read_timeout(None);
    http.max_buf_size(state.limits.max_head_bytes);
    let (peer, guard, certificates) = (connection.peer(), connection.guard(), connection.certificates());
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        guard.request_started();
        request.extensions_mut().insert(peer);
        if let Some(certificates) = &certificates {
            request.extensions_mut().insert(certificates.clone());
        }
        request.extensions_mut().insert(Arc::clone(&guard));
        let (response, guard) = (router.clone().oneshot(request), Arc::clone(&guard));
        async move {
            let response = response.await;
            guard.response_ready();
            response
        }
    });
    let mut serving = pin!(http.serve_connection(TokioIo::new(connection), service).with_upgrades());
    let ended = tokio::select! {
        ended = &mut serving => ended,
        () = state.drain.closing() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = ended {
        debug!(%error, "a connection failed");
        if error.is_parse_too_large() {
            state.metrics.refused(Limit::HeadBytes);
        }
    }
}
