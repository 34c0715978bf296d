//! The connection to the autoscaler: a websocket of protobuf frames. It is opened again whenever it
//! is lost, and the queue holds what cannot be sent meanwhile.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use inflight_stats::KeyReport;
use inflight_stats::protocol::stat::{Stat, WireStatMessage, WireStatMessages};
use inflight_stats::scaling::sender::PerSecond;
use prost::Message as _;
use tokio::sync::Notify;
use tokio_tungstenite::connect_async_with_config;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tracing::{info, warn};

use crate::forward::queue::{EncodedStat, ForwardQueue};
use crate::net::shutdown::DrainWatcher;
use crate::os::clock::wall_time;
use crate::os::lock::lock;
use crate::telemetry::metrics::Metrics;

/// Maximum number of stats in a frame: well below what a websocket library accepts.
const MAX_STATS_PER_FRAME: usize = 1_000;
/// The largest message of the autoscaler, which has nothing to send but pongs.
const MAX_RECEIVED_BYTES: usize = 64 << 10;
const READ_BUFFER_BYTES: usize = 4 << 10;
const MIN_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(10);
/// How long connecting, or sending a frame, may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Forwards stats to an autoscaler.
pub struct Forwarder {
    url: String,
    queue: Mutex<ForwardQueue>,
    queued: Notify,
    metrics: Arc<Metrics>,
}

impl Forwarder {
    /// A forwarder with an empty queue. [`Forwarder::run`] sends it.
    pub fn new(url: &str, metrics: Arc<Metrics>) -> Self {
        Self { url: url.to_owned(), queue: Mutex::default(), queued: Notify::new(), metrics }
    }

    /// Queues stats as they were received.
    pub fn queue_stats(&self, messages: Vec<WireStatMessage>) {
        let encoded = messages
            .into_iter()
            .map(|message| WireStatMessages { messages: vec![message] }.encode_to_vec().into_boxed_slice());
        let encoded: Vec<EncodedStat> = encoded.collect();
        let mut queue = self.lock_queue();
        encoded.into_iter().for_each(|stat| queue.push_back(stat));
        self.finish_change(queue);
    }

    /// Queues what is to be forwarded of a key's report, as the stat that an activator (for a
    /// gateway) or a queue-proxy would send.
    pub fn queue_report(&self, pod: &str, report: &KeyReport, forward: &PerSecond) {
        let text = |text: &str| text.as_bytes().to_vec().into();
        let stat = Stat {
            pod_name: text(pod),
            average_concurrent_requests: forward.concurrency,
            average_proxied_concurrent_requests: forward.proxied_concurrency,
            request_count: forward.requests,
            proxied_request_count: forward.proxied_requests,
            process_uptime: 0.0,
            timestamp: i64::try_from(wall_time().as_secs()).unwrap_or(i64::MAX),
        };
        let (namespace, name) = (text(&report.namespace), text(&report.name));
        self.queue_stats(vec![WireStatMessage { namespace, name, stat: Some(stat) }]);
    }

    /// Sends the queue until the shutdown. Reconnects, more and more slowly, whenever the
    /// connection is lost.
    pub async fn run(self: Arc<Self>, drain: DrainWatcher) {
        let mut backoff = MIN_BACKOFF;
        let sending = async {
            loop {
                let config = WebSocketConfig::default()
                    .max_message_size(Some(MAX_RECEIVED_BYTES))
                    .max_frame_size(Some(MAX_RECEIVED_BYTES))
                    .read_buffer_size(READ_BUFFER_BYTES);
                let connecting = connect_async_with_config(&self.url, Some(config), true);
                let url = &self.url;
                let reason = match tokio::time::timeout(TIMEOUT, connecting).await {
                    Ok(Ok((socket, _))) => {
                        info!(url, "connected to the autoscaler; forwarding");
                        self.metrics.forward_connected.set(1);
                        backoff = MIN_BACKOFF;
                        let reason = self.send(socket).await;
                        self.metrics.forward_connected.set(0);
                        warn!(
                            url,
                            reason,
                            retry_in = ?backoff,
                            "connection to the autoscaler lost; reconnecting"
                        );
                        None
                    }
                    Ok(Err(error)) => Some(error.to_string()),
                    Err(_) => Some(format!("no connection within {TIMEOUT:?}")),
                };
                if let Some(reason) = reason {
                    warn!(url, reason, retry_in = ?backoff, "cannot connect to the autoscaler; retrying");
                }
                tokio::time::sleep(backoff).await;
                backoff = (backoff * 2).min(MAX_BACKOFF);
            }
        };
        tokio::select! {
            () = drain.closing() => {}
            () = sending => {}
        }
    }

    /// Sends the queue over one connection, until that is lost. Returns the reason.
    async fn send<S>(&self, socket: S) -> String
    where
        S: futures_util::Stream<Item = Result<Message, tokio_tungstenite::tungstenite::Error>>
            + futures_util::Sink<Message, Error = tokio_tungstenite::tungstenite::Error>
            + Unpin,
    {
        let (mut sink, mut stream) = socket.split();
        loop {
            tokio::select! {
                // A pong, a close: only whether the connection lives matters.
                received = stream.next() => match received {
                    Some(Ok(Message::Close(_))) | None => return "the autoscaler closed it".into(),
                    Some(Err(error)) => return error.to_string(),
                    Some(Ok(_)) => {}
                },
                () = self.queued.notified() => loop {
                    let stats = self.take();
                    let count = stats.len();
                    if count == 0 {
                        break;
                    }
                    let sending = sink.send(Message::Binary(stats.concat().into()));
                    let reason = match tokio::time::timeout(TIMEOUT, sending).await {
                        Ok(Ok(())) => {
                            self.metrics.forwarded.inc_by(count as u64);
                            continue;
                        }
                        Ok(Err(error)) => error.to_string(),
                        Err(_) => format!("the autoscaler did not read a frame within {TIMEOUT:?}"),
                    };
                    // The next connection sends them first.
                    let mut queue = self.lock_queue();
                    stats.into_iter().rev().for_each(|stat| queue.push_front(stat));
                    self.finish_change(queue);
                    return reason;
                },
            }
        }
    }

    /// Drops the excess, and wakes the sender.
    fn finish_change(&self, mut queue: MutexGuard<'_, ForwardQueue>) {
        let dropped = queue.drop_excess();
        drop(queue);
        self.metrics.forward_dropped.inc_by(dropped);
        self.queued.notify_one();
    }

    fn take(&self) -> Vec<EncodedStat> {
        let mut queue = self.lock_queue();
        std::iter::from_fn(|| queue.pop_front()).take(MAX_STATS_PER_FRAME).collect()
    }

    fn lock_queue(&self) -> MutexGuard<'_, ForwardQueue> {
        lock(&self.queue)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::forward::queue::MAX_BYTES;

    fn stat(name: Bytes) -> WireStatMessage {
        WireStatMessage { namespace: Bytes::from_static(b"ns"), name, stat: Some(Stat::default()) }
    }

    fn forwarder() -> Forwarder {
        Forwarder::new("ws://127.0.0.1:9", Arc::default())
    }

    #[test]
    fn what_waits_keeps_nothing_of_the_frame_that_it_came_in() {
        let forwarder = forwarder();
        let frame = Bytes::from(vec![b'x'; 1 << 20]);
        forwarder.queue_stats(vec![stat(frame.slice(..9))]);
        assert!(frame.is_unique());
        assert!(forwarder.lock_queue().bytes() < 100);
    }

    #[test]
    fn stats_one_after_the_other_are_a_frame_and_the_oldest_of_too_many_go() {
        let forwarder = forwarder();
        forwarder.queue_stats((0..3).map(|number| stat(number.to_string().into())).collect());
        let frame = WireStatMessages::decode(&forwarder.take().concat()[..]).unwrap();
        assert_eq!(frame.messages, [stat("0".into()), stat("1".into()), stat("2".into())]);
        let long = stat(vec![b'n'; 10_000].into());
        for _ in 0..20 {
            forwarder.queue_stats(vec![long.clone(); 100]);
        }
        assert!(forwarder.lock_queue().bytes() <= MAX_BYTES);
        assert!(forwarder.metrics.forward_dropped.get() > 300);
        assert_eq!(forwarder.take().len(), MAX_STATS_PER_FRAME);
    }
}
