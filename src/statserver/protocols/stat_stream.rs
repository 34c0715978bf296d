//! Knative's stat stream: a websocket of binary frames. A frame that cannot be decoded is dropped,
//! counted and logged at most once a second; the connection stays open.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade};
use axum::response::Response;
use inflight_stats::protocol::frame::{self, FrameError};
use inflight_stats::protocol::gob::GobError;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_tungstenite::tungstenite::Error as WebSocketError;
use tokio_tungstenite::tungstenite::error::CapacityError;
use tracing::{debug, warn};

use crate::app::state::ServerState;
use crate::cli::limits::Limit;
use crate::keys::key_table::{KeyStat, StatError};
use crate::net::auth::Grant;
use crate::net::connection_limits::ConnectionGuard;
use crate::telemetry::metrics::DropReason;

/// "Service restart": Knative's activator reconnects at once.
const RESTART: u16 = 1012;
const TOO_BIG: u16 = 1009;
const POLICY_VIOLATION: u16 = 1008;
const TRY_AGAIN_LATER: u16 = 1013;
/// A client that sends nothing for so long is pinged.
const PING_AFTER: Duration = Duration::from_secs(20);
/// A client that does not answer either is gone.
const GONE_AFTER: Duration = Duration::from_secs(60);
/// How long sending a frame may take: a client that never reads is gone.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a client may take to answer our close.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// What is read at once; a thousand clients that send nothing hold a thousand of these.
const READ_BUFFER_BYTES: usize = 4 << 10;
const WRITE_BUFFER_BYTES: usize = 4 << 10;

/// Answers an upgrade.
pub fn upgrade(
    upgrade: WebSocketUpgrade,
    state: Arc<ServerState>,
    grant: Grant,
    guard: Option<Arc<ConnectionGuard>>,
) -> Response {
    let (drain, max) = (state.drain.clone(), state.limits.max_frame_bytes);
    upgrade
        .read_buffer_size(READ_BUFFER_BYTES)
        .max_write_buffer_size(WRITE_BUFFER_BYTES)
        .write_buffer_size(0)
        .max_frame_size(max)
        .max_message_size(max)
        .on_upgrade(move |socket| drain.track(serve(socket, state, grant, guard)))
}

async fn serve(
    mut socket: WebSocket,
    state: Arc<ServerState>,
    grant: Grant,
    guard: Option<Arc<ConnectionGuard>>,
) {
    state.metrics.streams.inc();
    if let Some(guard) = &guard {
        guard.upgraded();
    }
    let close = tokio::select! {
        close = receive(&mut socket, &state, &grant, guard.as_deref()) => close,
        () = state.drain.closing() => Some(close_frame(RESTART, "Restarting")),
        () = state.access.revoked(&grant) => {
            Some(close_frame(POLICY_VIOLATION, "the bearer token is no longer known"))
        }
    };
    if let Some(frame) = close
        && let Ok(Ok(())) = timeout(SEND_TIMEOUT, socket.send(Message::Close(Some(frame)))).await
    {
        // Until the client closes, too: whoever closes first discards what was not yet read.
        let answered = async { while let Some(Ok(_)) = socket.recv().await {} };
        let _ = timeout(CLOSE_TIMEOUT, answered).await;
    }
    state.metrics.streams.dec();
}

fn close_frame(code: u16, reason: &'static str) -> CloseFrame {
    CloseFrame { code, reason: reason.into() }
}

/// Receives frames until the connection ends. Returns how to close it, if it is still open.
async fn receive(
    socket: &mut WebSocket,
    state: &ServerState,
    grant: &Grant,
    guard: Option<&ConnectionGuard>,
) -> Option<CloseFrame> {
    let mut last_received = Instant::now();
    loop {
        let message = match timeout_at(last_received + PING_AFTER, socket.recv()).await {
            Ok(Some(Ok(message))) => message,
            Ok(Some(Err(error))) => return after_error(state, guard, error),
            Ok(None) => return None,
            Err(_) => {
                let ping = timeout(SEND_TIMEOUT, socket.send(Message::Ping(bytes::Bytes::new()))).await;
                let answer = timeout_at(last_received + GONE_AFTER, socket.recv());
                match (ping, answer.await) {
                    (Ok(Ok(())), Ok(Some(Ok(message)))) => message,
                    _ => return None,
                }
            }
        };
        last_received = Instant::now();
        match message {
            Message::Binary(frame) => record_frame(state, grant, frame).await,
            Message::Text(_) => {
                drop_frame(state, DropReason::Text, "it is a text frame; expected a binary one")
            }
            Message::Close(_) => return None,
            Message::Ping(payload) | Message::Pong(payload) => {
                if let Some(guard) = guard {
                    guard.control_frame(payload.len());
                    // Only a new connection frees its buffer; Knative's activator opens one at
                    // once.
                    if guard.has_unused_buffer() {
                        return Some(close_frame(RESTART, "Restarting"));
                    }
                }
                continue;
            }
        }
        if let Some(guard) = guard {
            guard.message_handled();
            if guard.has_unused_buffer() {
                return Some(close_frame(RESTART, "Restarting"));
            }
        }
    }
}

/// Returns how to close the connection after an error of which the client can still be notified.
fn after_error(
    state: &ServerState,
    guard: Option<&ConnectionGuard>,
    error: axum::Error,
) -> Option<CloseFrame> {
    debug!(%error, "the connection of a stat stream failed");
    if guard.is_some_and(ConnectionGuard::is_over_budget) {
        return Some(close_frame(TRY_AGAIN_LATER, "more bytes in flight than --max-bytes-in-flight allows"));
    }
    let error = error.into_inner();
    let is_too_big = error
        .downcast_ref::<WebSocketError>()
        .is_some_and(|error| matches!(error, WebSocketError::Capacity(CapacityError::MessageTooLong { .. })));
    is_too_big.then(|| {
        state.metrics.frame_dropped(DropReason::TooLarge);
        state.metrics.refused(Limit::FrameBytes);
        let max = state.limits.max_frame_bytes;
        let reason = format!("the frame is too large; expected at most {max} bytes (--max-frame-bytes)");
        CloseFrame { code: TOO_BIG, reason: reason.into() }
    })
}

async fn record_frame(state: &ServerState, grant: &Grant, frame: bytes::Bytes) {
    let mut messages = match frame::decode(frame, &state.limits.frame_limits()) {
        Ok(messages) => messages,
        Err(error) => {
            let limit = match error {
                FrameError::TooMany(..) => Some(Limit::Messages),
                FrameError::Gob(GobError::TooManyTypes | GobError::TooDeep(_)) => Some(Limit::Depth),
                FrameError::TooLarge(..) => Some(Limit::FrameBytes),
                FrameError::Protobuf(_) | FrameError::Gob(_) | FrameError::NotUtf8(_) => None,
            };
            if let Some(limit) = limit {
                state.metrics.refused(limit);
            }
            let reason = if limit.is_some() { DropReason::TooMuch } else { DropReason::Undecodable };
            return drop_frame(state, reason, error);
        }
    };
    let received = messages.len();
    messages.retain(|message| KeyStat::check(message).is_ok_and(|stat| grant.covers(stat.namespace())));
    let recorded = match state.changes.stats(messages).await {
        Ok((recorded, Some(StatError::CapacityExceeded(exceeded)))) => {
            state.metrics.refused(exceeded.limit);
            state.log_limiter.log(|suppressed| warn!(reason = %exceeded, suppressed, "dropped stats"));
            recorded
        }
        Ok((recorded, _)) => recorded,
        Err(unavailable) => {
            state.log_limiter.log(|suppressed| warn!(reason = %unavailable, suppressed, "dropped stats"));
            0
        }
    };
    state.metrics.stats.inc_by(recorded as u64);
    state.metrics.stats_dropped.inc_by(received.saturating_sub(recorded) as u64);
}

fn drop_frame(state: &ServerState, why: DropReason, reason: impl std::fmt::Display) {
    state.metrics.frame_dropped(why);
    state.log_limiter.log(|suppressed| warn!(%reason, suppressed, "dropped a frame of the stat stream"));
}
