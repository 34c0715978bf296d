//! Handles of Envoy's stats. A handle that the host refused to define records nothing.

use crate::host::{Host, MetricKind};

/// A stat that only grows. Every VM adds to it.
#[derive(Clone, Copy, Debug)]
pub struct Counter(Option<u32>);

/// A stat that the leader sets, or to which every VM contributes its part.
#[derive(Clone, Copy, Debug)]
pub struct Gauge(Option<u32>);

/// A stat of single values. Every VM adds values to it.
#[derive(Clone, Copy, Debug)]
pub struct Histogram(Option<u32>);

impl Counter {
    pub fn define(host: impl Host, name: &str) -> Self {
        Self(host.define_metric(MetricKind::Counter, name))
    }

    /// Returns a handle that records nothing.
    pub const fn none() -> Self {
        Self(None)
    }

    pub fn add(self, host: impl Host, by: u64) {
        if let (Some(metric), 1..) = (self.0, by) {
            host.increment_metric(metric, i64::try_from(by).unwrap_or(i64::MAX));
        }
    }
}

impl Gauge {
    pub fn define(host: impl Host, name: &str) -> Self {
        Self(host.define_metric(MetricKind::Gauge, name))
    }

    /// Returns a handle that records nothing.
    pub const fn none() -> Self {
        Self(None)
    }

    pub fn set(self, host: impl Host, value: u64) {
        if let Some(metric) = self.0 {
            host.record_metric(metric, value);
        }
    }

    /// Adds to a gauge that all VMs contribute to.
    pub fn add(self, host: impl Host, difference: i64) {
        if let Some(metric) = self.0
            && difference != 0
        {
            host.increment_metric(metric, difference);
        }
    }

    /// Changes this VM's part of a gauge that all VMs contribute to.
    pub fn adjust(self, host: impl Host, to: u64, from: u64) {
        self.add(host, i64::try_from(to).unwrap_or(i64::MAX).saturating_sub_unsigned(from));
    }
}

impl Histogram {
    pub fn define(host: impl Host, name: &str) -> Self {
        Self(host.define_metric(MetricKind::Histogram, name))
    }

    pub fn observe(self, host: impl Host, value: u64) {
        if let Some(metric) = self.0 {
            host.record_metric(metric, value);
        }
    }
}
