//! Bodies: receiving those of requests within their limits, and keeping those of responses within a
//! budget.

use std::sync::Arc;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use http_body_util::{BodyExt, Collected};

use crate::app::state::ServerState;
use crate::cli::limits::Limit;
use crate::net::memory_budget::{FREE_BYTES, Reservation};

/// A request's body, with its part of the budget.
pub struct ReceivedBody {
    /// The bytes.
    pub bytes: Vec<u8>,
    _reservation: Reservation,
}

/// Why a body was not received.
enum ReceiveError {
    TooLarge,
    Exhausted,
}

/// Receives a body of at most `max` bytes, in the time that a body may take.
///
/// # Errors
/// The response.
pub async fn receive(
    state: &ServerState,
    body: Body,
    limit: Limit,
    max: usize,
) -> Result<ReceivedBody, (StatusCode, String)> {
    let timeout = state.limits.body_timeout;
    match tokio::time::timeout(timeout, receive_up_to(state, body, max)).await {
        Ok(Ok(body)) => Ok(body),
        Ok(Err(ReceiveError::TooLarge)) => {
            state.metrics.refused(limit);
            let reason =
                format!("the body is too large; expected at most {max} bytes (--{})\n", limit.flag());
            Err((StatusCode::PAYLOAD_TOO_LARGE, reason))
        }
        Ok(Err(ReceiveError::Exhausted)) => {
            state.metrics.refused(Limit::BytesInFlight);
            let reason = "more bytes in flight than --max-bytes-in-flight allows; try again later\n";
            Err((StatusCode::SERVICE_UNAVAILABLE, reason.into()))
        }
        Err(_) => {
            state.metrics.refused(Limit::BodyTimeout);
            let reason = format!("the body took longer than {timeout:?} (--body-timeout)\n");
            // It may be sent again.
            Err((StatusCode::SERVICE_UNAVAILABLE, reason))
        }
    }
}

/// Receives a body of at most `max` bytes. Of a larger one some more is received and dropped,
/// because a client that is still writing when the connection closes never sees the response. One
/// that breaks off is treated as empty: nobody is there to be answered.
async fn receive_up_to(state: &ServerState, body: Body, max: usize) -> Result<ReceivedBody, ReceiveError> {
    let (mut bytes, mut reservation, mut length) = (Vec::<u8>::new(), Reservation::default(), 0_usize);
    let mut refused = None;
    // The announced length at once: a buffer that grows leaves its smaller predecessors in the
    // allocator's heaps. Of a large one the system provides only the pages that are written.
    let announced = HttpBody::size_hint(&body).exact().map(|length| usize::try_from(length).unwrap_or(max));
    let mut announced = announced.map(|length| length.min(max));
    let mut chunks = body.into_data_stream();
    while let Some(chunk) = chunks.next().await {
        let Ok(chunk) = chunk else {
            bytes = Vec::new();
            break;
        };
        length = length.saturating_add(chunk.len());
        if length > max {
            refused = Some(ReceiveError::TooLarge);
        } else if refused.is_none() && state.budget.reserve(&mut reservation, length).is_err() {
            refused = Some(ReceiveError::Exhausted);
        }
        if refused.is_none() {
            if let Some(length) = announced.take() {
                // Without it the buffer grows.
                let _ = bytes.try_reserve_exact(length);
            }
            bytes.extend_from_slice(&chunk);
        } else if length > max.saturating_mul(8) {
            break;
        } else {
            (bytes, reservation) = (Vec::new(), Reservation::default());
        }
    }
    refused.map_or(Ok(ReceivedBody { bytes, _reservation: reservation }), Err)
}

/// A response's bytes, with their part of the budget, which is returned with the last of them.
struct ReservedBytes {
    bytes: Bytes,
    _reservation: Reservation,
}

impl AsRef<[u8]> for ReservedBytes {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Marks a response whose bytes other responses have, too: it needs no memory of its own.
#[derive(Clone, Copy, Debug)]
pub struct SharedBody;

/// Has responses that are not small reserve their bytes until they are written: clients may be slow
/// to read.
pub async fn reserve_response(
    State(state): State<Arc<ServerState>>,
    request: Request,
    next: Next,
) -> Response {
    let (parts, body) = next.run(request).await.into_parts();
    let is_small = body.size_hint().exact().is_none_or(|bytes| bytes <= FREE_BYTES as u64);
    if is_small || parts.extensions.get::<SharedBody>().is_some() {
        return Response::from_parts(parts, body);
    }
    // It is complete already, so this does not wait.
    let Ok(bytes) = body.collect().await.map(Collected::to_bytes) else {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    let mut reservation = Reservation::default();
    if state.response_budget.reserve(&mut reservation, bytes.len()).is_err() {
        state.metrics.refused(Limit::AnswerBytes);
        let reason = "more bytes of unread answers than --max-answer-bytes allows; try again later\n";
        return (StatusCode::SERVICE_UNAVAILABLE, reason).into_response();
    }
    let bytes = ReservedBytes { bytes, _reservation: reservation };
    Response::from_parts(parts, Body::from(Bytes::from_owner(bytes)))
}
