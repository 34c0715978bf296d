//! Stats by response code, defined as the codes occur.

use crate::host::Host;
use crate::host::metric::{Counter, Histogram};
use crate::vm::labels;

/// The counters and latency histograms of one point at which requests are observed, by response
/// code.
pub struct CodeStats {
    /// The beginning of the stats' names.
    point: &'static str,
    /// Sorted by code. There are few, and a search must be cheap.
    by_code: Vec<CodeMetrics>,
}

struct CodeMetrics {
    code: u16,
    count: Counter,
    latencies: Histogram,
    /// Requests counted since the last flush.
    pending: u64,
}

impl CodeStats {
    /// Returns the stats `POINT_count` and `POINT_latencies`.
    pub fn new(point: &'static str) -> Self {
        Self { point, by_code: Vec::new() }
    }

    /// Counts a request that ended. The count goes to Envoy at the tick; a histogram cannot be
    /// summed up in advance. If the stat has to be defined now, `labels` go between its name and
    /// the code.
    pub fn request_done(
        &mut self,
        host: impl Host,
        code: u16,
        latency_ns: u64,
        labels: impl FnOnce() -> String,
    ) {
        let position = self.by_code.binary_search_by_key(&code, |metrics| metrics.code);
        let position = position.unwrap_or_else(|position| {
            self.define(host, position, code, &labels());
            position
        });
        if let Some(metrics) = self.by_code.get_mut(position) {
            metrics.pending += 1;
            metrics.latencies.observe(host, latency_ns / 1_000_000);
        }
    }

    #[cold]
    fn define(&mut self, host: impl Host, position: usize, code: u16, labels: &str) {
        let (point, code_labels) = (self.point, labels::of_code(code));
        let metrics = CodeMetrics {
            code,
            count: Counter::define(host, &format!("{point}_count.{labels}{code_labels}")),
            latencies: Histogram::define(host, &format!("{point}_latencies.{labels}{code_labels}")),
            pending: 0,
        };
        self.by_code.insert(position.min(self.by_code.len()), metrics);
    }

    /// Adds what was counted since the last flush to Envoy's counters.
    pub fn flush(&mut self, host: impl Host) {
        for metrics in &mut self.by_code {
            metrics.count.add(host, std::mem::take(&mut metrics.pending));
        }
    }
}
