//! Envoy's stats of a gateway's keys. The leader sets the gauge of a key; every worker adds to the
//! other stats.

use std::collections::BTreeMap;

use inflight_stats::gateway::key_name::KeyName;

use crate::host::Host;
use crate::host::metric::{Counter, Gauge, Histogram};
use crate::vm::code_stats::CodeStats;
use crate::vm::labels;
use crate::vm::local_hold::HoldNews;

/// The stats of all keys that have any, and of the requests that were counted under no key.
pub struct KeyStats {
    by_key: BTreeMap<KeyName, KeyMetrics>,
    over_key_limit: Counter,
    without_key: Counter,
    pending_over_key_limit: u64,
    pending_without_key: u64,
}

struct KeyMetrics {
    concurrency: Option<Gauge>,
    shown: Option<u64>,
    by_code: CodeStats,
    /// Defined when a request of the key is held for the first time.
    hold: Option<HoldMetrics>,
}

#[derive(Clone, Copy)]
struct HoldMetrics {
    held: Gauge,
    held_ms: Histogram,
}

impl KeyStats {
    pub fn define(host: impl Host) -> Self {
        Self {
            by_key: BTreeMap::new(),
            over_key_limit: Counter::define(host, "inflight_requests_over_key_limit_total"),
            without_key: Counter::define(host, "inflight_requests_without_key_total"),
            pending_over_key_limit: 0,
            pending_without_key: 0,
        }
    }

    /// Gives a key stats of its own from now on.
    pub fn add_key(&mut self, key: &KeyName) {
        if !self.by_key.contains_key(key) {
            let by_code = CodeStats::new("activator_request");
            self.by_key
                .insert(key.clone(), KeyMetrics { concurrency: None, shown: None, by_code, hold: None });
        }
    }

    /// Returns whether a key has stats of its own, as far as this worker knows.
    pub fn has_key(&self, key: &KeyName) -> bool {
        self.by_key.contains_key(key)
    }

    /// Counts a request whose key is over the limit of keys.
    pub fn over_key_limit(&mut self) {
        self.pending_over_key_limit += 1;
    }

    /// Counts a request without a key.
    pub fn without_key(&mut self) {
        self.pending_without_key += 1;
    }

    /// Counts the end of a request of a key.
    pub fn request_done(&mut self, host: impl Host, key: &KeyName, code: u16, latency_ns: u64) {
        if let Some(metrics) = self.by_key.get_mut(key) {
            metrics.by_code.request_done(host, code, latency_ns, || labels::of_key(key));
        }
    }

    /// Sets a key's gauge, if it shows another value.
    pub fn show_average(&mut self, host: impl Host, key: &KeyName, milli: u64) {
        let Some(metrics) = self.by_key.get_mut(key) else { return };
        let gauge = metrics.concurrency.get_or_insert_with(|| {
            Gauge::define(host, &format!("activator_request_concurrency_milli.{}", labels::of_key(key)))
        });
        if metrics.shown.replace(milli) != Some(milli) {
            gauge.set(host, milli);
        }
    }

    /// Counts held requests, and how long they were held. The gauge of a key is the sum of what all
    /// workers add.
    pub fn hold_news(&mut self, host: impl Host, news: &HoldNews) {
        for (key, more) in &news.more_held {
            if let Some(metrics) = self.hold_metrics(host, key) {
                metrics.held.add(host, *more);
            }
        }
        for (key, milliseconds) in &news.held_ms {
            if let Some(metrics) = self.hold_metrics(host, key) {
                metrics.held_ms.observe(host, *milliseconds);
            }
        }
    }

    fn hold_metrics(&mut self, host: impl Host, key: &KeyName) -> Option<HoldMetrics> {
        let metrics = self.by_key.get_mut(key)?;
        Some(*metrics.hold.get_or_insert_with(|| HoldMetrics {
            held: Gauge::define(host, &format!("activator_held_requests.{}", labels::of_key(key))),
            held_ms: Histogram::define(host, &format!("activator_hold_milliseconds.{}", labels::of_key(key))),
        }))
    }

    /// Forgets what the gauges show, because another worker sets them from now on.
    pub fn forget_shown(&mut self) {
        self.by_key.values_mut().for_each(|metrics| metrics.shown = None);
    }

    /// Adds what was counted since the last flush to Envoy's counters.
    pub fn flush(&mut self, host: impl Host) {
        self.over_key_limit.add(host, std::mem::take(&mut self.pending_over_key_limit));
        self.without_key.add(host, std::mem::take(&mut self.pending_without_key));
        self.by_key.values_mut().for_each(|metrics| metrics.by_code.flush(host));
    }
}
