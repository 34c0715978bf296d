//! Envoy's stats of the pod. Every VM adds to the counters and histograms. The leader sets the
//! gauges, except for the memory gauge, to which every VM adds.

use inflight_stats::config::Role;
use inflight_stats::{Period, Snapshot};

use crate::host::Host;
use crate::host::metric::{Counter, Gauge};
use crate::vm::code_stats::CodeStats;

/// The stats without labels, and those by response code.
pub struct PodStats {
    requests: Counter,
    proxied_requests: Counter,
    milliseconds: Counter,
    proxied_milliseconds: Counter,
    in_flight: Gauge,
    proxied_in_flight: Gauge,
    average: Gauge,
    proxied_average: Gauge,
    per_second: Gauge,
    proxied_per_second: Gauge,
    queue_depth: Option<Gauge>,
    memory: Gauge,
    memory_shown: u64,
    by_code: CodeStats,
    app_by_code: CodeStats,
    flushed: Snapshot,
}

impl PodStats {
    /// Defines the stats of a role. A gateway has no `queue_*` stats.
    pub fn define(host: impl Host, role: Role) -> Self {
        let is_gateway = role == Role::Gateway;
        let counter = |name| if is_gateway { Counter::none() } else { Counter::define(host, name) };
        let gauge = |name| if is_gateway { Gauge::none() } else { Gauge::define(host, name) };
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
            queue_depth: None,
            memory: Gauge::define(host, "inflight_wasm_memory_bytes"),
            memory_shown: 0,
            by_code: CodeStats::new("revision_request"),
            app_by_code: CodeStats::new("revision_app_request"),
            flushed: Snapshot::default(),
        }
    }

    /// Counts a request that ended. `latency_ns` is the time since its arrival, `app_ns` the time
    /// since it left the breaker's queue, if it ever did.
    pub fn request_done(&mut self, host: impl Host, code: u16, latency_ns: u64, app_ns: Option<u64>) {
        self.by_code.request_done(host, code, latency_ns, String::new);
        if let Some(app_ns) = app_ns {
            self.app_by_code.request_done(host, code, app_ns, String::new);
        }
    }

    /// Sets the gauge of requests in the app plus waiting requests.
    pub fn set_queue_depth(&mut self, host: impl Host, depth: u64) {
        let gauge = self.queue_depth.get_or_insert_with(|| Gauge::define(host, "revision_queue_depth"));
        gauge.set(host, depth);
    }

    /// Adds what this VM counted since the last flush to Envoy's counters.
    pub fn flush(&mut self, host: impl Host, now: &Snapshot) {
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
        for (counter, now, before) in counters {
            counter.add(host, now.saturating_sub(before));
        }
        self.flushed = *now;
        self.by_code.flush(host);
        self.app_by_code.flush(host);
    }

    /// Shows how much memory this VM has. The gauge is the sum over all VMs: each adds the growth
    /// of its own memory. `bytes` is 0 at the end of the VM.
    pub fn show_memory(&mut self, host: impl Host, bytes: u64) {
        self.memory.adjust(host, bytes, std::mem::replace(&mut self.memory_shown, bytes));
    }

    /// Sets the pod's gauges.
    pub fn publish(&self, host: impl Host, period: &Period, latest: &Snapshot) {
        self.in_flight.set(host, u64::from(latest.in_flight));
        self.proxied_in_flight.set(host, u64::from(latest.proxied_in_flight));
        self.average.set(host, period.average_milli());
        self.proxied_average.set(host, period.proxied_average_milli());
        self.per_second.set(host, period.requests_per_second_milli());
        self.proxied_per_second.set(host, period.proxied_per_second_milli());
    }
}
