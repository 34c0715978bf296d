//! `--forward`: every stat on to a real Knative autoscaler, as its activator sends it: protobuf, over one websocket. What
//! cannot be sent waits in a queue that drops the oldest.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use inflight_stats::ingest::PerSecond;
use inflight_stats::wire::{Stat, WireStatMessage, WireStatMessages};
use prost::Message as _;
use tokio::sync::Notify;
use tokio_tungstenite::tungstenite::Message;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::http::since_1970;
use crate::keys::Added;
use crate::metrics::Metrics;

/// The most stats that wait: some seconds of a large cluster, some 20 MB.
const MOST_WAITING: usize = 100_000;
/// The most stats in a frame: well below what a websocket library takes.
const MOST_IN_A_FRAME: usize = 1_000;
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(10);
/// How long connecting, or sending a frame, may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What waits to be sent on.
pub struct Forward {
    url: String,
    waiting: Mutex<VecDeque<WireStatMessage>>,
    more: Notify,
    metrics: Arc<Metrics>,
}

impl Forward {
    /// Nothing waits yet. The caller has [`Forward::run`] run.
    pub fn new(url: &str, metrics: Arc<Metrics>) -> Self {
        Self { url: url.to_owned(), waiting: Mutex::default(), more: Notify::new(), metrics }
    }

    /// Has these sent on, as they came.
    pub fn all(&self, messages: Vec<WireStatMessage>) {
        let mut waiting = self.waiting();
        waiting.extend(messages);
        let dropped = waiting.len().saturating_sub(MOST_WAITING);
        waiting.drain(..dropped);
        drop(waiting);
        self.metrics.forward_dropped.inc_by(dropped as u64);
        self.more.notify_one();
    }

    /// Sends until `ending`; connects again, more and more slowly, whenever the connection is lost.
    pub async fn run(self: Arc<Self>, ending: CancellationToken) {
        let mut wait = FIRST_WAIT;
        let sending = async {
            loop {
                let connecting = tokio::time::timeout(PATIENCE, tokio_tungstenite::connect_async(&self.url));
                let lost = match connecting.await {
                    Ok(Ok((socket, _))) => {
                        info!(url = self.url, "forwarding");
                        self.metrics.forward_connected.set(1);
                        wait = FIRST_WAIT;
                        let lost = self.send(socket).await;
                        self.metrics.forward_connected.set(0);
                        lost
                    }
                    Ok(Err(error)) => error.to_string(),
                    Err(_) => "connecting took too long".into(),
                };
                warn!(url = self.url, lost, again_in = ?wait, "not forwarding");
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(LONGEST_WAIT);
            }
        };
        tokio::select! {
            () = ending.cancelled() => {}
            () = sending => {}
        }
    }

    /// Sends what waits over one connection, until that is lost; why it was.
    async fn send<S>(&self, socket: S) -> String
    where
        S: futures_util::Stream<Item = Result<Message, tokio_tungstenite::tungstenite::Error>>
            + futures_util::Sink<Message, Error = tokio_tungstenite::tungstenite::Error>
            + Unpin,
    {
        let (mut to, mut from) = socket.split();
        loop {
            tokio::select! {
                // A pong, a close: only whether the connection lives matters.
                heard = from.next() => match heard {
                    Some(Ok(Message::Close(_))) | None => return "the autoscaler closed".into(),
                    Some(Err(error)) => return error.to_string(),
                    Some(Ok(_)) => {}
                },
                () = self.more.notified() => loop {
                    let messages = self.take();
                    let count = messages.len();
                    if count == 0 {
                        break;
                    }
                    let frame = WireStatMessages { messages };
                    let sent = to.send(Message::Binary(frame.encode_to_vec().into()));
                    let lost = match tokio::time::timeout(PATIENCE, sent).await {
                        Ok(Ok(())) => {
                            self.metrics.forwarded.inc_by(count as u64);
                            continue;
                        }
                        Ok(Err(error)) => error.to_string(),
                        Err(_) => "the autoscaler does not read".into(),
                    };
                    // In front again, for the next connection.
                    let mut waiting = self.waiting();
                    frame.messages.into_iter().rev().for_each(|message| waiting.push_front(message));
                    self.more.notify_one();
                    return lost;
                },
            }
        }
    }

    fn take(&self) -> Vec<WireStatMessage> {
        let mut waiting = self.waiting();
        let count = waiting.len().min(MOST_IN_A_FRAME);
        waiting.drain(..count).collect()
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<WireStatMessage>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Added for Forward {
    /// A report as the stat that an activator (for a gateway) or queue-proxy would send of it.
    fn added(&self, namespace: &str, name: &str, pod: &str, added: &PerSecond) {
        let text = |text: &str| text.as_bytes().to_vec().into();
        let stat = Stat {
            pod_name: text(pod),
            average_concurrent_requests: added.concurrency,
            average_proxied_concurrent_requests: added.proxied_concurrency,
            request_count: added.requests,
            proxied_request_count: added.proxied_requests,
            process_uptime: 0.0,
            timestamp: i64::try_from(since_1970().as_secs()).unwrap_or(i64::MAX),
        };
        self.all(vec![WireStatMessage { namespace: text(namespace), name: text(name), stat: Some(stat) }]);
    }
}
