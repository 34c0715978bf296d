//! What is shown of a key.

use std::sync::Arc;

use inflight_stats::protocol::key_name::KeyName;
use inflight_stats::scaling::answer::Missing;
use inflight_stats::scaling::decider::Decision;
use inflight_stats::scaling::key::Figures;
use inflight_stats::scaling::settings::KeySettings;

/// All that is known of one key at one time.
#[derive(Clone, Debug)]
pub struct KeyView {
    /// Namespace and name.
    pub name: KeyName,
    /// What its senders make it.
    pub figures: Figures,
    /// How many pods it wants; `None` where that is not known yet.
    pub desired_pods: Option<u32>,
    /// How many pods the last decision took as ready, if there is one.
    pub ready_pods: Option<u32>,
    /// The last decision, if there is one.
    pub decision: Option<Decision>,
    /// What it is scaled by.
    pub settings: Arc<KeySettings>,
    /// Why autoscalers are told nothing of it, if they are not.
    pub missing: Option<Missing>,
    /// Since when its senders have been silent while it keeps its decision, as unix time in
    /// nanoseconds.
    pub stale_since_ns: Option<u64>,
}

impl KeyView {
    /// Returns the load of the ready pods as a share of what they should have: the stable average of
    /// the key's metric, divided by their targets times the utilization; `None` where no pod is ready.
    pub fn load(&self) -> Option<f64> {
        let ready = self.ready_pods.filter(|ready| *ready > 0)?;
        let stable = self.figures.stable.value(self.settings.metric);
        Some(stable / (self.settings.target_per_pod() * f64::from(ready)))
    }
}
