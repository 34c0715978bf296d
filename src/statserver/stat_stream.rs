//! Knative's stat stream: a websocket of binary frames. What does not decode is dropped, counted and logged at most once a
//! second; the connection stays.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade};
use axum::response::Response;
use inflight_stats::protocol::frame::{self, FrameError};
use inflight_stats::protocol::gob::GobError;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{debug, warn};

use crate::cli::limits::Limit;
use crate::http::{App, now_ns};
use crate::key_table::NoStat;
use crate::metrics::Dropped;
use crate::net::auth::Grant;
use crate::net::guard::Guard;

/// "Service restart": Knative's activator connects again at once.
const RESTART: u16 = 1012;
const TOO_BIG: u16 = 1009;
const NOT_ALLOWED: u16 = 1008;
const TRY_LATER: u16 = 1013;
/// A client that says nothing for so long is asked whether it is there.
const PING_AFTER: Duration = Duration::from_secs(20);
/// A client that does not answer either is gone.
const GONE_AFTER: Duration = Duration::from_secs(60);
/// How long a frame of ours may take to leave: a client that never reads is gone.
const SEND: Duration = Duration::from_secs(5);
/// How long a client may take to answer our close.
const LAST_WORD: Duration = Duration::from_secs(1);
/// What is read at once; a thousand clients that send nothing hold a thousand of these.
const READ_BUFFER_BYTES: usize = 4 << 10;
const WRITE_BUFFER_BYTES: usize = 4 << 10;

/// Answers an upgrade.
pub fn upgrade(
    upgrade: WebSocketUpgrade,
    app: Arc<App>,
    grant: Grant,
    guard: Option<Arc<Guard>>,
) -> Response {
    let (tasks, most) = (app.connections.clone(), app.limits.max_frame_bytes);
    upgrade
        .read_buffer_size(READ_BUFFER_BYTES)
        .max_write_buffer_size(WRITE_BUFFER_BYTES)
        .write_buffer_size(0)
        .max_frame_size(most)
        .max_message_size(most)
        .on_upgrade(move |socket| tasks.track_future(serve(socket, app, grant, guard)))
}

async fn serve(mut socket: WebSocket, app: Arc<App>, grant: Grant, guard: Option<Arc<Guard>>) {
    app.metrics.streams.inc();
    if let Some(guard) = &guard {
        guard.upgraded();
    }
    let close = tokio::select! {
        close = receive(&mut socket, &app, &grant, guard.as_deref()) => close,
        () = app.ending.cancelled() => Some(CloseFrame { code: RESTART, reason: "Restarting".into() }),
        () = app.access.revoked(&grant) => {
            Some(CloseFrame { code: NOT_ALLOWED, reason: "the token is no longer known".into() })
        }
    };
    if let Some(frame) = close
        && let Ok(Ok(())) = timeout(SEND, socket.send(Message::Close(Some(frame)))).await
    {
        // Until the client closes, too: what closes first takes back what was not yet read.
        let answered = async { while let Some(Ok(_)) = socket.recv().await {} };
        let _ = timeout(LAST_WORD, answered).await;
    }
    app.metrics.streams.dec();
}

/// Takes frames until the client goes, or has to; what to tell it then.
async fn receive(
    socket: &mut WebSocket,
    app: &App,
    grant: &Grant,
    guard: Option<&Guard>,
) -> Option<CloseFrame> {
    let mut heard = Instant::now();
    loop {
        let message = match timeout_at(heard + PING_AFTER, socket.recv()).await {
            Ok(Some(Ok(message))) => message,
            Ok(Some(Err(error))) => {
                debug!(%error, "a stream broke off");
                if guard.is_some_and(Guard::is_over_budget) {
                    let reason = "more bytes than --max-bytes-in-flight allows".into();
                    return Some(CloseFrame { code: TRY_LATER, reason });
                }
                // The only one of these errors of which the client can still be told.
                let too_big = error.to_string().contains("too long");
                return too_big.then(|| {
                    app.metrics.dropped(Dropped::TooLarge);
                    app.metrics.refused(Limit::FrameBytes);
                    let most = app.limits.max_frame_bytes;
                    CloseFrame { code: TOO_BIG, reason: format!("at most {most} bytes").into() }
                });
            }
            Ok(None) => return None,
            Err(_) => {
                let asked = timeout(SEND, socket.send(Message::Ping(bytes::Bytes::new()))).await;
                let answered = timeout_at(heard + GONE_AFTER, socket.recv());
                match (asked, answered.await) {
                    (Ok(Ok(())), Ok(Some(Ok(message)))) => message,
                    _ => return None,
                }
            }
        };
        heard = Instant::now();
        match message {
            Message::Binary(frame) => take(app, grant, frame),
            Message::Text(_) => drop_frame(app, Dropped::Text, "a text frame"),
            Message::Close(_) => return None,
            Message::Ping(payload) | Message::Pong(payload) => {
                if let Some(guard) = guard {
                    guard.control_frame(payload.len());
                    // Its buffer is taken from it by a new connection; Knative's activator makes one at once.
                    if guard.wastes() {
                        return Some(CloseFrame { code: RESTART, reason: "Restarting".into() });
                    }
                }
                continue;
            }
        }
        if let Some(guard) = guard {
            guard.dealt_with();
            if guard.wastes() {
                return Some(CloseFrame { code: RESTART, reason: "Restarting".into() });
            }
        }
    }
}

fn take(app: &App, grant: &Grant, frame: bytes::Bytes) {
    let mut messages = match frame::decode(frame, &app.limits.of_frames()) {
        Ok(messages) => messages,
        Err(error) => {
            let limit = match error {
                FrameError::TooMany(_) => Some(Limit::Messages),
                FrameError::Gob(GobError::TooMuch(_)) => Some(Limit::Depth),
                FrameError::TooLarge(..) => Some(Limit::FrameBytes),
                FrameError::Protobuf(_) | FrameError::Gob(_) | FrameError::NotUtf8 => None,
            };
            if let Some(limit) = limit {
                app.metrics.refused(limit);
            }
            let why = if limit.is_some() { Dropped::TooMuch } else { Dropped::Undecodable };
            return drop_frame(app, why, error);
        }
    };
    let (sent, now_ns) = (messages.len(), now_ns());
    messages.retain(|message| match app.keys.record_stat(grant, message, now_ns) {
        Ok(()) => true,
        Err(why) => {
            if let NoStat::Full(full) = why {
                app.metrics.refused(full.limit);
                app.seldom.say(|unsaid| warn!(%full, unsaid, "dropped a stat"));
            }
            false
        }
    });
    app.metrics.stats.inc_by(messages.len() as u64);
    app.metrics.stats_dropped.inc_by((sent - messages.len()) as u64);
    if let Some(forward) = &app.forward {
        forward.all(messages);
    }
}

fn drop_frame(app: &App, why: Dropped, reason: impl std::fmt::Display) {
    app.metrics.dropped(why);
    app.seldom.say(|unsaid| warn!(%reason, unsaid, "dropped a frame of the stat stream"));
}

/// Says something at most once a second, and how often it was not said.
#[derive(Default)]
pub struct Seldom {
    second: AtomicU64,
    unsaid: AtomicU64,
}

impl Seldom {
    /// Says it, or counts it as unsaid.
    pub fn say(&self, say: impl FnOnce(u64)) {
        let second = now_ns() / 1_000_000_000;
        if self.second.swap(second, Ordering::Relaxed) == second {
            self.unsaid.fetch_add(1, Ordering::Relaxed);
        } else {
            say(self.unsaid.swap(0, Ordering::Relaxed));
        }
    }
}
