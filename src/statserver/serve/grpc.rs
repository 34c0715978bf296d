//! gRPC, that is HTTP/2, over a connection: KEDA's scaler.

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::response::Response;
use futures_util::future::Either;
use http_body_util::BodyExt;
use hyper::HeaderMap;
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, HeaderValue};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::sync::OwnedSemaphorePermit;
use tonic::Status;
use tonic::service::Routes;
use tower::ServiceExt;
use tracing::debug;

use crate::app::state::ServerState;
use crate::cli::limits::{Limit, Limits};
use crate::net::auth::{Grant, Peer, Unauthenticated};
use crate::net::connection::Connection;
use crate::net::connection_limits::ConnectionGuard;
use crate::net::memory_budget::{FREE_BYTES, Reservation};
use crate::net::tracked_body::TrackedBody;
use crate::protocols::keda::{ExternalScalerServer, Scaler};

/// How often a silent client is pinged, and how long it may take to answer.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
/// Calls that HTTP/2 allows beyond the limit, so that they can be refused with a reason: a client
/// that keeps to HTTP/2's own limit would wait, and nobody would know for what.
const SPARE_STREAMS: usize = 64;
/// What a gRPC message has before it: whether it is compressed, and its length.
const MESSAGE_HEADER_BYTES: usize = 5;
/// What a connection may send before any of it is read; a call's message has its own limit.
const WINDOW_BYTES: u32 = 65_535;

/// Returns the routes of the scaler.
pub fn router(state: Arc<ServerState>) -> Router {
    let max_bytes = state.limits.max_grpc_bytes;
    let scaler = ExternalScalerServer::new(Scaler(state)).max_decoding_message_size(max_bytes);
    Routes::new(scaler).into_axum_router()
}

/// Serves a connection. Keep-alive pings find clients that are gone.
pub async fn serve(connection: Connection, router: Router, state: Arc<ServerState>) {
    let Limits { max_grpc_streams, max_head_bytes, head_timeout, write_timeout, .. } = state.limits;
    let saturated = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    let mut http = http2::Builder::new(TokioExecutor::new());
    http.timer(TokioTimer::new()).keep_alive_interval(KEEP_ALIVE).keep_alive_timeout(KEEP_ALIVE);
    http.max_concurrent_streams(saturated(max_grpc_streams.saturating_add(SPARE_STREAMS)));
    http.initial_connection_window_size(WINDOW_BYTES).initial_stream_window_size(WINDOW_BYTES);
    http.max_header_list_size(saturated(max_head_bytes));
    let (peer, guard) = (connection.peer(), connection.guard());
    let service = {
        let (state, guard) = (Arc::clone(&state), Arc::clone(&guard));
        service_fn(move |request: hyper::Request<Incoming>| {
            // Before anything of the call is kept.
            let response = match admit(&state, peer, &guard, request.headers()) {
                Ok((grant, permit)) => {
                    let (state, guard) = (Arc::clone(&state), Arc::clone(&guard));
                    Either::Left(Box::pin(respond(
                        request,
                        router.clone(),
                        state,
                        guard,
                        (peer, grant),
                        permit,
                    )))
                }
                Err(refused) => Either::Right(std::future::ready(refused.into_http())),
            };
            async { Ok::<_, Infallible>(response.await) }
        })
    };
    let mut serving = pin!(http.serve_connection(TokioIo::new(connection), service));
    let mut is_closing = false;
    let mut checks = tokio::time::interval(write_timeout.min(head_timeout) / 2);
    let authenticate_by = tokio::time::Instant::now() + head_timeout;
    loop {
        tokio::select! {
            ended = poll_fn(|cx| {
                guard.poll_started();
                serving.as_mut().poll(cx)
            }) => {
                if let Err(error) = ended {
                    debug!(%error, "a connection failed");
                }
                return;
            }
            () = state.drain.closing(), if !is_closing => {
                is_closing = true;
                serving.as_mut().graceful_shutdown();
            }
            now = checks.tick() => {
                let exceeded = if guard.is_unauthenticated() && now >= authenticate_by {
                    Some(Limit::HeadTimeout)
                } else if guard.has_unread_response(write_timeout) {
                    Some(Limit::WriteTimeout)
                } else {
                    None
                };
                if let Some(limit) = exceeded {
                    state.metrics.refused(limit);
                    return;
                }
            }
        }
    }
}

/// Admits a call with a token or a certificate, if there are not too many calls already.
fn admit(
    state: &ServerState,
    peer: Peer,
    guard: &ConnectionGuard,
    headers: &HeaderMap,
) -> Result<(Grant, OwnedSemaphorePermit), Status> {
    guard.call_started();
    let authorization = headers.get(AUTHORIZATION).map(HeaderValue::as_bytes);
    let grant = state.access.check(authorization, peer).map_err(|error: Unauthenticated| {
        state.refuse(peer, error.reason());
        guard.unauthenticated_call();
        Status::unauthenticated(error.to_string())
    })?;
    guard.authenticated();
    let permit = Arc::clone(&state.calls).try_acquire_owned().map_err(|_| {
        state.metrics.refused(Limit::GrpcStreams);
        let max = state.limits.max_grpc_streams;
        Status::resource_exhausted(format!(
            "there are {max} concurrent streams; --max-grpc-streams allows {max}"
        ))
    })?;
    Ok((grant, permit))
}

/// Responds to a call, which ends with its response's body.
async fn respond(
    request: hyper::Request<Incoming>,
    router: Router,
    state: Arc<ServerState>,
    guard: Arc<ConnectionGuard>,
    (peer, grant): (Peer, Grant),
    permit: OwnedSemaphorePermit,
) -> Response {
    let (mut parts, body) = request.into_parts();
    let mut reservation = Reservation::default();
    let message = match receive_message(&state, body, &mut reservation).await {
        Ok(message) => message,
        Err(refused) => return refused.into_http(),
    };
    parts.extensions.insert(peer);
    parts.extensions.insert(grant);
    let Ok(response) = router.oneshot(hyper::Request::from_parts(parts, Body::from(message))).await;
    drop(reservation);
    response.map(|body| Body::new(TrackedBody::new(body, guard, permit)))
}

/// Receives a call's message, of which no call has more than one, as it is in the body.
async fn receive_message(
    state: &ServerState,
    mut body: Incoming,
    reservation: &mut Reservation,
) -> Result<Vec<u8>, Status> {
    let Limits { max_grpc_bytes: max, body_timeout, .. } = state.limits;
    let receiving = async {
        let mut message = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| Status::cancelled(error.to_string()))?;
            let Ok(data) = frame.into_data() else { continue };
            let bytes = message.len().saturating_add(data.len());
            if bytes > max.saturating_add(MESSAGE_HEADER_BYTES) {
                state.metrics.refused(Limit::GrpcBytes);
                let reason =
                    format!("the message is too large; expected at most {max} bytes (--max-grpc-bytes)");
                return Err(Status::out_of_range(reason));
            }
            // Unlike connections there are many calls: nothing of them is free.
            state.budget.reserve(reservation, bytes + FREE_BYTES).map_err(|_| {
                state.metrics.refused(Limit::BytesInFlight);
                Status::resource_exhausted("more bytes in flight than --max-bytes-in-flight allows")
            })?;
            message.extend_from_slice(&data);
        }
        Ok(message)
    };
    tokio::time::timeout(body_timeout, receiving).await.unwrap_or_else(|_| {
        state.metrics.refused(Limit::BodyTimeout);
        let reason = format!("the message took longer than {body_timeout:?} (--body-timeout)");
        Err(Status::deadline_exceeded(reason))
    })
}
