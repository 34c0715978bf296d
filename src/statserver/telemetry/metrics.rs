//! The server's own Prometheus metrics. What keys show is added at a scrape.

use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::text::encode_registry;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use serde::Serialize;

use crate::cli::limits::Limit;
use crate::telemetry::store_metrics::StoreMetrics;

/// What all names begin with.
pub const PREFIX: &str = "inflight_statserver";

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReportLabels {
    code: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LimitLabels {
    limit: &'static str,
}

/// Why a frame of the stat stream was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum DropReason {
    /// It is no binary frame.
    Text,
    /// It is in neither of the two formats.
    Undecodable,
    /// It is larger than allowed; its connection was closed.
    TooLarge,
    /// It has more stats, or deeper ones, than allowed.
    TooMuch,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FrameLabels {
    reason: DropReason,
}

/// What was built.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct BuildLabels {
    /// Of the package.
    pub version: &'static str,
    /// The commit, if the build was told it by `INFLIGHT_REVISION`; else it shows as empty.
    pub revision: Option<&'static str>,
}

/// This build.
pub const BUILD: BuildLabels =
    BuildLabels { version: env!("CARGO_PKG_VERSION"), revision: option_env!("INFLIGHT_REVISION") };

/// The codes of reports that were not recorded as a whole.
const FAILED_CODES: [u16; 8] = [400, 401, 403, 409, 413, 415, 503, 507];

/// Counts since the start by which an operator sees whether the server is well.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct HealthFigures {
    /// Reports that were recorded.
    reports_accepted: u64,
    /// Reports that were not, or not as a whole.
    reports_failed: u64,
    /// Open websockets of the stat stream.
    streams: i64,
    /// Requests that were not authenticated, or not authorized.
    unauthorized: u64,
    /// What exceeded a limit.
    refused: u64,
}

/// The server's metrics.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    build: Registry,
    reports: Family<ReportLabels, Counter>,
    report_bytes: Counter,
    keys: Gauge<u64, AtomicU64>,
    frames_dropped: Family<FrameLabels, Counter>,
    refused: Family<LimitLabels, Counter>,
    /// TLS handshakes that failed.
    pub handshakes_failed: Counter,
    /// Websockets that are open.
    pub streams: Gauge,
    /// Stats of the stream that were accepted.
    pub stats: Counter,
    /// Stats of the stream that were dropped.
    pub stats_dropped: Counter,
    /// Requests that were not authenticated, or not authorized.
    pub unauthorized: Counter,
    /// Keys of reports that were left out because the token does not cover their namespaces.
    pub report_keys_forbidden: Counter,
    /// Stats that were forwarded.
    pub forwarded: Counter,
    /// Stats that were dropped because the queue to the autoscaler was full.
    pub forward_dropped: Counter,
    /// Whether the autoscaler is connected.
    pub forward_connected: Gauge,
    store: OnceLock<StoreMetrics>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut build = Registry::default();
        build.register(
            "inflight_build",
            "Version of the server, and the commit it was built from",
            Info::new(BUILD),
        );
        let mut registry = Registry::with_prefix(PREFIX);
        let (reports, report_bytes, keys) = (Family::default(), Counter::default(), Gauge::default());
        registry.register("reports", "Reports, by the status code of the response", Family::clone(&reports));
        registry.register("report_bytes", "Bytes of accepted reports", report_bytes.clone());
        registry.register("keys", "Keys that have been reported", keys.clone());
        let frames_dropped = Family::default();
        registry.register(
            "stream_frames_dropped",
            "Frames of the stat stream that were dropped, by reason",
            frames_dropped.clone(),
        );
        let refused = Family::default();
        registry.register(
            "refused",
            "Connections, requests, frames and keys that exceeded a limit, by the limit's flag",
            Family::clone(&refused),
        );
        let streams = Gauge::default();
        registry.register("streams", "Open websockets of the stat stream", streams.clone());
        let mut counter = |name: &str, help: &str| {
            let counter = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let stats = counter("stream_stats", "Stats of the stream that were accepted");
        let stats_dropped = counter(
            "stream_stats_dropped",
            "Stats of the stream that were dropped: no name, implausible numbers, \
             a namespace that is not granted, or beyond a limit",
        );
        let unauthorized = counter(
            "unauthorized",
            "Requests without a known token, or whose token does not allow what they ask",
        );
        let report_keys_forbidden = counter(
            "report_keys_forbidden",
            "Keys that were left out of reports because the token does not cover their namespaces",
        );
        let handshakes_failed = counter("tls_handshakes_failed", "TLS handshakes that failed");
        let forwarded = counter("forwarded_stats", "Stats that were forwarded to the autoscaler");
        let forward_dropped = counter(
            "forward_dropped_stats",
            "Stats that were dropped, the oldest first, because the queue to the autoscaler was full",
        );
        let forward_connected = Gauge::default();
        registry.register(
            "forward_connected",
            "Whether the autoscaler to forward to is connected (1) or not (0)",
            forward_connected.clone(),
        );
        // Shown from the beginning, so that an alert has something to compare with.
        for limit in Limit::ALL {
            drop(refused.get_or_create(&LimitLabels { limit: limit.flag() }));
        }
        Self {
            registry,
            build,
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
            report_keys_forbidden,
            forwarded,
            forward_dropped,
            forward_connected,
            store: OnceLock::new(),
        }
    }
}

impl Metrics {
    /// Returns the metrics of a shared state, which are shown from the first call on.
    pub fn store(&self) -> &StoreMetrics {
        self.store.get_or_init(|| StoreMetrics::new(&format!("{PREFIX}_store")))
    }

    /// Counts a report by its response.
    pub fn report(&self, code: u16, bytes: usize) {
        self.reports.get_or_create(&ReportLabels { code }).inc();
        if code == 202 {
            self.report_bytes.inc_by(bytes as u64);
        }
    }

    /// Counts something that exceeded a limit.
    pub fn refused(&self, limit: Limit) {
        self.refused.get_or_create(&LimitLabels { limit: limit.flag() }).inc();
    }

    /// Counts a frame of the stat stream that was dropped.
    pub fn frame_dropped(&self, reason: DropReason) {
        self.frames_dropped.get_or_create(&FrameLabels { reason }).inc();
    }

    /// Returns what shows whether the server is well.
    pub fn health(&self) -> HealthFigures {
        let reports = |code| self.reports.get(&ReportLabels { code }).map_or(0, |count| count.get());
        let refused = |limit: &Limit| {
            self.refused.get(&LimitLabels { limit: limit.flag() }).map_or(0, |count| count.get())
        };
        HealthFigures {
            reports_accepted: reports(202),
            reports_failed: FAILED_CODES.into_iter().map(reports).sum(),
            streams: self.streams.get(),
            unauthorized: self.unauthorized.get(),
            refused: Limit::ALL.iter().map(refused).sum(),
        }
    }

    /// Sets how many keys there are.
    pub fn set_keys(&self, keys: usize) {
        self.keys.set(keys as u64);
    }

    /// Writes all metrics in the OpenMetrics text format, without its end.
    ///
    /// # Errors
    /// None that is known.
    pub fn write(&self, text: &mut String) -> fmt::Result {
        encode_registry(text, &self.build)?;
        encode_registry(text, &self.registry)?;
        self.store.get().map_or(Ok(()), |store| store.write(text))
    }
}
