//! The hold's settings, as the configuration has them under `gateway.hold`.

use std::time::Duration;

use crate::counting::time::nanoseconds;

/// Settings of the hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HoldSettings {
    /// The longest time that a request is held.
    pub timeout: Duration,
    /// The largest number of held requests of one key, over all workers.
    pub depth: u32,
    /// The `:path` of a probe.
    pub probe_path: String,
    /// The time between two probes of a cluster.
    pub probe_period: Duration,
    /// How long a cluster is taken to be ready after its last answer.
    pub trust: Duration,
    /// How many requests of a key may be in the app at once while others of it are held, at first.
    pub release: u32,
}

impl Default for HoldSettings {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(60),
            depth: 1000,
            probe_path: "/".into(),
            probe_period: Duration::from_millis(100),
            trust: Duration::from_secs(30),
            release: 100,
        }
    }
}

impl HoldSettings {
    /// Returns how long to wait for the answer to a probe. A Service's address may lead to a pod
    /// that is gone, and a booting pod may drop packets: then there is no answer at all.
    pub fn probe_timeout(&self) -> Duration {
        self.probe_period.saturating_mul(3).max(Duration::from_millis(300))
    }

    /// Returns [`HoldSettings::trust`] in nanoseconds.
    pub(super) fn trust_ns(&self) -> u64 {
        nanoseconds(self.trust)
    }

    /// Returns [`HoldSettings::timeout`] in nanoseconds.
    pub(super) fn timeout_ns(&self) -> u64 {
        nanoseconds(self.timeout)
    }

    /// Returns [`HoldSettings::probe_period`] in nanoseconds.
    pub(super) fn probe_period_ns(&self) -> u64 {
        nanoseconds(self.probe_period)
    }

    /// Returns how long a worker remains the one that probes a cluster without probing it.
    pub(super) fn lease_ns(&self) -> u64 {
        nanoseconds(self.probe_timeout()).saturating_mul(2).max(1_000_000_000)
    }
}
