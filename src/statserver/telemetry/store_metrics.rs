//! The metrics of a shared state and its store.

use std::fmt;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::text::encode_registry;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

/// The metrics of a shared state. A server without a store does not show them.
#[derive(Debug)]
pub struct StoreMetrics {
    registry: Registry,
    /// Entries that were applied.
    pub entries: Counter,
    /// Times that the store had lost entries.
    pub recoveries: Counter,
    /// Round trips of appends, in seconds.
    pub append_seconds: Histogram,
    /// From a report's receipt until it is applied here, in seconds.
    pub lag_seconds: Histogram,
    /// For how long the store has not been read from, in seconds.
    pub silence_seconds: Gauge<f64, AtomicU64>,
    /// When the newest snapshot was written, in unix seconds.
    pub snapshot_timestamp_seconds: Gauge<f64, AtomicU64>,
    /// Whether this server ticks and writes snapshots.
    pub leads: Gauge,
}

impl StoreMetrics {
    /// Metrics whose names begin with `prefix` and `_`.
    pub fn new(prefix: &str) -> Self {
        let mut registry = Registry::with_prefix(prefix);
        // From half a millisecond to 16 seconds.
        let histogram = || Histogram::new(exponential_buckets(0.0005, 2.0, 16));
        let (append_seconds, lag_seconds) = (histogram(), histogram());
        let (entries, recoveries) = (Counter::default(), Counter::default());
        let (silence_seconds, snapshot_timestamp_seconds) = (Gauge::default(), Gauge::default());
        let leads = Gauge::default();
        registry.register("entries", "Entries of the shared log that were applied", entries.clone());
        registry.register(
            "recoveries",
            "Times that this server gave the store back what it had lost",
            recoveries.clone(),
        );
        registry.register(
            "append_seconds",
            "Time that the store took to append an entry",
            append_seconds.clone(),
        );
        registry.register(
            "lag_seconds",
            "Time from the receipt of a report until this server had applied it",
            lag_seconds.clone(),
        );
        registry.register(
            "silence_seconds",
            "Time since this server last read from the store",
            silence_seconds.clone(),
        );
        registry.register(
            "snapshot_timestamp_seconds",
            "Unix time of the newest snapshot in the store; 0 if there is none",
            snapshot_timestamp_seconds.clone(),
        );
        registry.register(
            "leads",
            "Whether this server ticks and writes snapshots for all (1) or not (0)",
            leads.clone(),
        );
        Self {
            registry,
            entries,
            recoveries,
            append_seconds,
            lag_seconds,
            silence_seconds,
            snapshot_timestamp_seconds,
            leads,
        }
    }

    /// Writes all metrics in the OpenMetrics text format, without its end.
    ///
    /// # Errors
    /// None that is known.
    pub fn write(&self, text: &mut String) -> fmt::Result {
        encode_registry(text, &self.registry)
    }
}
