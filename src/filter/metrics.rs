//! Envoy's stats. Counters and histograms are added to by every VM; gauges are set by the leader.

use std::collections::BTreeMap;

use inflight_stats::config::Role;
use inflight_stats::counting::request::code_suffix;
use inflight_stats::{Period, Snapshot};

use crate::host::{self, Kind};

/// The ids of the stats without labels, and those by response code as they come up.
pub struct Metrics {
    requests: Option<u32>,
    proxied_requests: Option<u32>,
    milliseconds: Option<u32>,
    proxied_milliseconds: Option<u32>,
    in_flight: Option<u32>,
    proxied_in_flight: Option<u32>,
    average: Option<u32>,
    proxied_average: Option<u32>,
    per_second: Option<u32>,
    proxied_per_second: Option<u32>,
    reports_sent: Option<u32>,
    reports_failed: Option<u32>,
    queue_depth: Option<u32>,
    memory: Option<u32>,
    memory_shown: u64,
    requests_by_code: BTreeMap<u16, ByCode>,
    app_requests_by_code: BTreeMap<u16, ByCode>,
    flushed: Snapshot,
}

/// One vantage point's stats for one response code.
pub struct ByCode {
    count: Option<u32>,
    latencies: Option<u32>,
    pending: u64,
}

impl ByCode {
    /// `labels` come between the stat's name and the code.
    pub fn define(vantage: &str, labels: &str, code: u16) -> Self {
        let suffix = code_suffix(code);
        Self {
            count: host::define_metric(Kind::Counter, &format!("{vantage}_count{labels}{suffix}")),
            latencies: host::define_metric(Kind::Histogram, &format!("{vantage}_latencies{labels}{suffix}")),
            pending: 0,
        }
    }

    /// A request ended. Its count goes out at the tick; a histogram cannot be added up.
    pub fn done(&mut self, latency_ns: u64) {
        self.pending += 1;
        host::record(self.latencies, latency_ns / 1_000_000);
    }

    /// Adds what was counted since the last flush.
    pub fn flush(&mut self) {
        host::increment(self.count, std::mem::take(&mut self.pending));
    }
}

impl Metrics {
    /// Those of a role: a gateway has no `queue_*`.
    pub fn define(role: Role) -> Self {
        let of_role = |kind, name: &str| {
            let defined = role != Role::Gateway || name.starts_with("inflight_");
            defined.then(|| host::define_metric(kind, name)).flatten()
        };
        let counter = |name| of_role(Kind::Counter, name);
        let gauge = |name| of_role(Kind::Gauge, name);
        Self {
            requests: counter("queue_requests_total"),
            proxied_requests: counter("queue_proxied_requests_total"),
            milliseconds: counter("queue_request_milliseconds_total"),
            proxied_milliseconds: counter("queue_proxied_request_milliseconds_total"),
            in_flight: gauge("queue_in_flight_requests"),
            proxied_in_flight: gauge("queue_in_flight_proxied_requests"),
            average: gauge("queue_average_concurrent_requests_milli"),
            proxied_average: gauge("queue_average_proxied_concurrent_requests_milli"),
            per_second: gauge("queue_requests_per_second_milli"),
            proxied_per_second: gauge("queue_proxied_operations_per_second_milli"),
            reports_sent: counter("inflight_reports_sent"),
            reports_failed: counter("inflight_reports_failed"),
            queue_depth: None,
            memory: gauge("inflight_wasm_memory_bytes"),
            memory_shown: 0,
            requests_by_code: BTreeMap::new(),
            app_requests_by_code: BTreeMap::new(),
            flushed: Snapshot::default(),
        }
    }

    /// A request ended: from its arrival, and from leaving the breaker's queue if it ever did. Counts go out at
    /// the tick; a histogram cannot be added up.
    pub fn request_done(&mut self, code: u16, latency_ns: u64, app_ns: Option<u64>) {
        let define = |vantage| move || ByCode::define(vantage, "", code);
        self.requests_by_code.entry(code).or_insert_with(define("revision_request")).done(latency_ns);
        if let Some(app_ns) = app_ns {
            self.app_requests_by_code.entry(code).or_insert_with(define("revision_app_request")).done(app_ns);
        }
    }

    /// Requests in the app plus requests that wait.
    pub fn queue_depth(&mut self, depth: u64) {
        if self.queue_depth.is_none() {
            self.queue_depth = host::define_metric(Kind::Gauge, "revision_queue_depth");
        }
        host::record(self.queue_depth, depth);
    }

    /// Adds what this VM counted since the last flush to Envoy's counters.
    pub fn flush(&mut self, now: &Snapshot) {
        let milliseconds = |ns: u128| u64::try_from(ns / 1_000_000).unwrap_or(u64::MAX);
        let before = self.flushed;
        let counters = [
            (self.requests, now.requests, before.requests),
            (self.proxied_requests, now.proxied_requests, before.proxied_requests),
            (self.milliseconds, milliseconds(now.request_ns), milliseconds(before.request_ns)),
            (
                self.proxied_milliseconds,
                milliseconds(now.proxied_request_ns),
                milliseconds(before.proxied_request_ns),
            ),
        ];
        for (id, now, before) in counters {
            host::increment(id, now.saturating_sub(before));
        }
        self.flushed = *now;
        for by_code in self.requests_by_code.values_mut().chain(self.app_requests_by_code.values_mut()) {
            by_code.flush();
        }
    }

    /// Shows how much memory this VM has: the gauge is the sum over all VMs, each adding what it has more. 0 at
    /// the end of the VM.
    pub fn show_memory(&mut self, bytes: u64) {
        host::adjust(self.memory, bytes, std::mem::replace(&mut self.memory_shown, bytes));
    }

    /// Sets the pod's gauges.
    pub fn publish(&self, period: &Period, latest: &Snapshot) {
        host::record(self.in_flight, u64::from(latest.in_flight));
        host::record(self.proxied_in_flight, u64::from(latest.proxied_in_flight));
        host::record(self.average, period.average_milli());
        host::record(self.proxied_average, period.proxied_average_milli());
        host::record(self.per_second, period.requests_per_second_milli());
        host::record(self.proxied_per_second, period.proxied_per_second_milli());
    }

    pub fn report_sent(&self) {
        host::increment(self.reports_sent, 1);
    }

    pub fn report_failed(&self) {
        host::increment(self.reports_failed, 1);
    }
}
