//! `--forward`: every stat on to a real Knative autoscaler, as its activator sends it: protobuf, over one websocket. What
//! cannot be sent waits in a queue that drops the oldest.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use inflight_stats::protocol::stat::{Stat, WireStatMessage, WireStatMessages};
use inflight_stats::scaling::sender::PerSecond;
use prost::Message as _;
use tokio::sync::Notify;
use tokio_tungstenite::connect_async_with_config;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::http::since_1970;
use crate::key_table::Added;
use crate::metrics::Metrics;

/// The most stats that wait, and the most memory that they take: some seconds of a large cluster.
const MOST_WAITING: usize = 100_000;
const MOST_WAITING_BYTES: usize = 16 << 20;
/// What a stat takes beside its bytes: its place in the queue, and the allocator's.
const PLACE_BYTES: usize = 32;
/// The most stats in a frame: well below what a websocket library takes.
const MOST_IN_A_FRAME: usize = 1_000;
/// What the autoscaler may say: it has nothing to say but pongs.
const MOST_HEARD_BYTES: usize = 64 << 10;
const READ_BUFFER_BYTES: usize = 4 << 10;
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(10);
/// How long connecting, or sending a frame, may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// A stat as it is sent: a frame with it alone. Frames one after the other are a frame of all their stats, and nothing of the
/// frame that it came in is kept.
type Encoded = Box<[u8]>;

#[derive(Default)]
struct Waiting {
    stats: VecDeque<Encoded>,
    bytes: usize,
}

impl Waiting {
    fn push_back(&mut self, stat: Encoded) {
        self.bytes += stat.len() + PLACE_BYTES;
        self.stats.push_back(stat);
    }

    fn push_front(&mut self, stat: Encoded) {
        self.bytes += stat.len() + PLACE_BYTES;
        self.stats.push_front(stat);
    }

    fn pop_front(&mut self) -> Option<Encoded> {
        let stat = self.stats.pop_front()?;
        self.bytes -= stat.len() + PLACE_BYTES;
        Some(stat)
    }

    /// Drops the oldest of too many; how many.
    fn shorten(&mut self) -> u64 {
        let mut dropped = 0;
        while self.stats.len() > MOST_WAITING || self.bytes > MOST_WAITING_BYTES {
            dropped += u64::from(self.pop_front().is_some());
        }
        dropped
    }
}

/// What waits to be sent on.
pub struct Forward {
    url: String,
    waiting: Mutex<Waiting>,
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
        let encoded = messages
            .into_iter()
            .map(|message| WireStatMessages { messages: vec![message] }.encode_to_vec().into_boxed_slice());
        let encoded: Vec<Encoded> = encoded.collect();
        let mut waiting = self.waiting();
        encoded.into_iter().for_each(|stat| waiting.push_back(stat));
        let dropped = waiting.shorten();
        drop(waiting);
        self.metrics.forward_dropped.inc_by(dropped);
        self.more.notify_one();
    }

    /// Sends until `ending`; connects again, more and more slowly, whenever the connection is lost.
    pub async fn run(self: Arc<Self>, ending: CancellationToken) {
        let mut wait = FIRST_WAIT;
        let sending = async {
            loop {
                let limits = WebSocketConfig::default()
                    .max_message_size(Some(MOST_HEARD_BYTES))
                    .max_frame_size(Some(MOST_HEARD_BYTES))
                    .read_buffer_size(READ_BUFFER_BYTES);
                let connecting = connect_async_with_config(&self.url, Some(limits), true);
                let connecting = tokio::time::timeout(PATIENCE, connecting);
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
                    let stats = self.take();
                    let count = stats.len();
                    if count == 0 {
                        break;
                    }
                    let sent = to.send(Message::Binary(stats.concat().into()));
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
                    stats.into_iter().rev().for_each(|stat| waiting.push_front(stat));
                    let dropped = waiting.shorten();
                    drop(waiting);
                    self.metrics.forward_dropped.inc_by(dropped);
                    self.more.notify_one();
                    return lost;
                },
            }
        }
    }

    fn take(&self) -> Vec<Encoded> {
        let mut waiting = self.waiting();
        std::iter::from_fn(|| waiting.pop_front()).take(MOST_IN_A_FRAME).collect()
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
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

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn stat(name: Bytes) -> WireStatMessage {
        WireStatMessage { namespace: Bytes::from_static(b"ns"), name, stat: Some(Stat::default()) }
    }

    fn forward() -> Forward {
        Forward::new("ws://127.0.0.1:9", Arc::default())
    }

    #[test]
    fn what_waits_keeps_nothing_of_the_frame_that_it_came_in() {
        let forward = forward();
        let frame = Bytes::from(vec![b'x'; 1 << 20]);
        forward.all(vec![stat(frame.slice(..9))]);
        assert!(frame.is_unique());
        assert!(forward.waiting().bytes < 100);
    }

    #[test]
    fn stats_one_after_the_other_are_a_frame_and_the_oldest_of_too_many_go() {
        let forward = forward();
        forward.all((0..3).map(|number| stat(number.to_string().into())).collect());
        let frame = WireStatMessages::decode(&forward.take().concat()[..]).unwrap();
        assert_eq!(frame.messages, [stat("0".into()), stat("1".into()), stat("2".into())]);
        let long = stat(vec![b'n'; 10_000].into());
        for _ in 0..20 {
            forward.all(vec![long.clone(); 100]);
        }
        assert!(forward.waiting().bytes <= MOST_WAITING_BYTES);
        assert!(forward.metrics.forward_dropped.get() > 300);
        assert_eq!(forward.take().len(), MOST_IN_A_FRAME);
    }
}
