//! What the server says of itself at `/metrics`.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answer {
    code: u16,
}

/// The server's own metrics.
pub struct Metrics {
    registry: Registry,
    reports: Family<Answer, Counter>,
    report_bytes: Counter,
    keys: Gauge<u64, AtomicU64>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("inflight_statserver");
        let (reports, report_bytes, keys) = (Family::default(), Counter::default(), Gauge::default());
        registry.register("reports", "Reports by the code that answered them", Family::clone(&reports));
        registry.register("report_bytes", "Bytes of the reports that were taken", report_bytes.clone());
        registry.register("keys", "Keys that have been reported", keys.clone());
        Self { registry, reports, report_bytes, keys }
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

    /// The metrics as text, with the present number of keys.
    pub fn text(&self, keys: usize) -> Result<String, std::fmt::Error> {
        self.keys.set(keys as u64);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}
