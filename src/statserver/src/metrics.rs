//! What the server says of itself, and of its keys, at `/metrics`.

use std::sync::Mutex;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::keys::View;
use crate::limits::Limit;

/// The most keys that `/metrics` shows.
pub const MOST_KEYS: usize = 10_000;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answer {
    code: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Refused {
    limit: &'static str,
}

/// Why a frame of the stream was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Dropped {
    /// Not a binary frame.
    Text,
    /// Neither of the two formats.
    Undecodable,
    /// Larger than allowed; that connection was closed.
    TooLarge,
    /// More stats, or deeper ones, than allowed.
    TooMuch,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Frame {
    reason: Dropped,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfKey {
    namespace: String,
    name: String,
}

type KeyGauge = Family<OfKey, Gauge<f64, AtomicU64>>;

/// A figure of each key, and how it is taken from one; a key of which it is not known has none.
type OfKeys = (fn(&View) -> Option<f64>, KeyGauge);

/// The server's metrics.
pub struct Metrics {
    registry: Registry,
    reports: Family<Answer, Counter>,
    report_bytes: Counter,
    keys: Gauge<u64, AtomicU64>,
    frames_dropped: Family<Frame, Counter>,
    refused: Family<Refused, Counter>,
    /// TLS handshakes that came to nothing.
    pub handshakes_failed: Counter,
    /// Websockets that are open.
    pub streams: Gauge,
    /// Stats of the stream that were taken.
    pub stats: Counter,
    /// Stats of the stream without a name, or with numbers that cannot be.
    pub stats_dropped: Counter,
    /// Requests without a token that is good for what they asked.
    pub unauthorized: Counter,
    /// Stats that were sent on.
    pub forwarded: Counter,
    /// Stats that were dropped because the autoscaler was away for too long.
    pub forward_dropped: Counter,
    /// Whether the autoscaler is connected.
    pub forward_connected: Gauge,
    of_keys: [OfKeys; 6],
    /// One scrape at a time: the keys' gauges are filled anew.
    scrape: Mutex<()>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("inflight_statserver");
        let (reports, report_bytes, keys) = (Family::default(), Counter::default(), Gauge::default());
        registry.register("reports", "Reports by the code that answered them", Family::clone(&reports));
        registry.register("report_bytes", "Bytes of the reports that were taken", report_bytes.clone());
        registry.register("keys", "Keys that have been reported", keys.clone());
        let frames_dropped = Family::default();
        registry.register("stream_frames_dropped", "Frames of the stat stream", frames_dropped.clone());
        let refused = Family::default();
        registry.register(
            "refused",
            "What went beyond a limit, by the limit's flag",
            Family::clone(&refused),
        );
        let streams = Gauge::default();
        registry.register("streams", "Websockets that are open", streams.clone());
        let mut counter = |name: &str, help: &str| {
            let counter = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let stats = counter("stream_stats", "Stats of the stream that were taken");
        let stats_dropped =
            counter("stream_stats_dropped", "Stats without a name, with impossible numbers, or not granted");
        let unauthorized =
            counter("unauthorized", "Requests without a token that is good for what they asked");
        let handshakes_failed = counter("tls_handshakes_failed", "TLS handshakes that came to nothing");
        let forwarded = counter("forwarded_stats", "Stats that were sent on");
        let forward_dropped =
            counter("forward_dropped_stats", "Stats that waited for too long to be sent on");
        let forward_connected = Gauge::default();
        registry.register(
            "forward_connected",
            "Whether the autoscaler is connected",
            forward_connected.clone(),
        );
        let mut of_key = |name: &str, help: &str, value: fn(&View) -> Option<f64>| {
            let family = KeyGauge::default();
            registry.register(format!("key_{name}"), help, family.clone());
            (value, family)
        };
        let of_keys = [
            of_key("stable_concurrency", "Average over the stable window", |v| {
                Some(v.figures.stable.concurrency)
            }),
            of_key("panic_concurrency", "Average over the panic window", |v| {
                Some(v.figures.panic.concurrency)
            }),
            of_key("requests_per_second", "Average over the stable window", |v| {
                Some(v.figures.stable.requests_per_second)
            }),
            of_key("in_flight", "Requests in flight", |v| Some(v.figures.in_flight as f64)),
            of_key("pods", "Pods that report", |v| Some(v.figures.pods as f64)),
            of_key("desired_pods", "Pods that the key wants", |v| v.desired_pods.map(f64::from)),
        ];
        // Shown from the beginning, so that an alert has something to compare with.
        for limit in Limit::ALL {
            drop(refused.get_or_create(&Refused { limit: limit.flag() }));
        }
        Self {
            registry,
            reports,
            report_bytes,
            keys,
            frames_dropped,
            refused,
            handshakes_failed,
            streams,
            stats,
            stats_dropped,
            unauthorized,
            forwarded,
            forward_dropped,
            forward_connected,
            of_keys,
            scrape: Mutex::default(),
        }
    }
}

impl Metrics {
    /// A report was answered.
    pub fn report(&self, code: u16, bytes: usize) {
        self.reports.get_or_create(&Answer { code }).inc();
        if code == 202 {
            self.report_bytes.inc_by(bytes as u64);
        }
    }

    /// Something went beyond a limit.
    pub fn refused(&self, limit: Limit) {
        self.refused.get_or_create(&Refused { limit: limit.flag() }).inc();
    }

    /// A frame of the stream was dropped.
    pub fn dropped(&self, reason: Dropped) {
        self.frames_dropped.get_or_create(&Frame { reason }).inc();
    }

    /// The metrics as text, with the present keys, of which there are `keys` in all.
    pub fn text(&self, views: &[View], keys: usize) -> Result<String, std::fmt::Error> {
        let _one = self.scrape.lock();
        self.keys.set(keys as u64);
        for (value, family) in &self.of_keys {
            family.clear();
            for view in views {
                let Some(value) = value(view) else { continue };
                let (namespace, name) = view.name.clone();
                family.get_or_create(&OfKey { namespace, name }).set(value);
            }
        }
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}
