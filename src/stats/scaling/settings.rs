//! What a key can be told, by the names of Knative's annotations: as flags for all keys, and as JSON for one.

use std::time::Duration;

use serde::{Serialize, Serializer};
use serde_json::Value;

use crate::config::fields::{ConfigError, Fields};
use crate::scaling::decider;
use crate::scaling::key::WindowSizes;

/// What is scaled by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Metric {
    /// Requests in flight.
    #[default]
    Concurrency,
    /// Requests a second.
    Rps,
}

/// The names of [`Metric`]'s values, as configuration has them.
pub const METRICS: [(&str, Metric); 2] = [("concurrency", Metric::Concurrency), ("rps", Metric::Rps)];

/// Knative's default target of the metric rps.
pub const DEFAULT_RPS_TARGET: f64 = 200.0;
/// The shortest and the longest stable window (Knative: 6 s to 1 h).
pub const STABLE_WINDOW: [Duration; 2] = [Duration::from_secs(6), Duration::from_secs(3600)];
/// The longest scale-down delay.
pub const LONGEST_DELAY: Duration = Duration::from_secs(3600);
/// The most pods that anything can be told, or that a key can want.
pub const MOST_PODS: u32 = 1_000_000;

/// All that a key is scaled by. Serialized, it is what can be told it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KeySettings {
    /// What is scaled by.
    pub metric: Metric,
    /// What one pod can have of the metric.
    pub target: f64,
    /// How much of the target one pod should have, in percent.
    pub target_utilization_percentage: f64,
    /// The window of `stable`; whole seconds.
    #[serde(serialize_with = "as_text")]
    pub stable_window: Duration,
    /// The panic window, in percent of the stable one.
    pub panic_window_percentage: f64,
    /// Panic begins when the panic window wants so many percent of the ready pods.
    pub panic_threshold_percentage: f64,
    /// At most so many times the ready pods at once.
    pub max_scale_up_rate: f64,
    /// At least the ready pods divided by this.
    pub max_scale_down_rate: f64,
    /// Capacity to be kept free; 0: none; -1: there is never enough.
    pub target_burst_capacity: f64,
    /// Fewer pods only after they were enough for so long.
    #[serde(serialize_with = "as_text")]
    pub scale_down_delay: Duration,
    /// A count above zero is at least this.
    pub activation_scale: u32,
    /// Never fewer pods.
    pub min_scale: u32,
    /// Never more pods; 0: no bound.
    pub max_scale: u32,
    /// Pods that are ready; without it, those that report.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready_pods: Option<u32>,
}

impl Default for KeySettings {
    /// Knative's defaults.
    fn default() -> Self {
        Self {
            metric: Metric::Concurrency,
            target: 100.0,
            target_utilization_percentage: 70.0,
            stable_window: Duration::from_secs(60),
            panic_window_percentage: 10.0,
            panic_threshold_percentage: 200.0,
            max_scale_up_rate: 1000.0,
            max_scale_down_rate: 2.0,
            target_burst_capacity: 211.0,
            scale_down_delay: Duration::ZERO,
            activation_scale: 1,
            min_scale: 0,
            max_scale: 0,
            ready_pods: None,
        }
    }
}

/// What a number may be: a test, and its words.
pub type Bound = (fn(f64) -> bool, &'static str);
/// A target.
pub const TARGET: Bound = (|n| n >= 0.01, "a number from 0.01 on");
/// A share in percent.
pub const PERCENTAGE: Bound = (|n| (1.0..=100.0).contains(&n), "a number from 1 to 100");
/// The panic threshold in percent (Knative: 110 to 1000; less is allowed here).
pub const THRESHOLD: Bound = (|n| n >= 1.0, "a number from 1 on");
/// A scale rate.
pub const RATE: Bound = (|n| n > 1.0, "a number above 1");
/// A burst capacity.
pub const BURST: Bound = (|n| n >= 0.0 || n == -1.0, "-1, or a number from 0 on");

impl KeySettings {
    /// These settings with `json`, an object of some of them, over them. A key that is told to scale by rps and no target
    /// gets `rps_target`.
    ///
    /// # Errors
    /// [`ConfigError`], for the first mistake.
    pub fn with(&self, json: Value, rps_target: f64) -> Result<Self, ConfigError> {
        let mut fields = Fields::new("", json)?;
        let mut number = |key, (fits, allowed): Bound| fields.number(key, allowed, fits);
        let target = number("target", TARGET)?;
        let utilization = number("target_utilization_percentage", PERCENTAGE)?;
        let panic_window = number("panic_window_percentage", PERCENTAGE)?;
        let threshold = number("panic_threshold_percentage", THRESHOLD)?;
        let up = number("max_scale_up_rate", RATE)?;
        let down = number("max_scale_down_rate", RATE)?;
        let burst = number("target_burst_capacity", BURST)?;
        let metric = fields.one_of("metric", &METRICS)?.unwrap_or(self.metric);
        let [shortest, longest] = STABLE_WINDOW;
        let stable_window = fields.duration("stable_window", shortest, longest)?;
        if let Some(window) = stable_window.filter(|window| window.subsec_nanos() != 0) {
            return Err(fields.error("stable_window", format!("{window:?}"), "whole seconds"));
        }
        let settings = Self {
            metric,
            target: target.unwrap_or_else(|| self.full_target(metric, rps_target)),
            target_utilization_percentage: utilization.unwrap_or(self.target_utilization_percentage),
            stable_window: stable_window.unwrap_or(self.stable_window),
            panic_window_percentage: panic_window.unwrap_or(self.panic_window_percentage),
            panic_threshold_percentage: threshold.unwrap_or(self.panic_threshold_percentage),
            max_scale_up_rate: up.unwrap_or(self.max_scale_up_rate),
            max_scale_down_rate: down.unwrap_or(self.max_scale_down_rate),
            target_burst_capacity: burst.unwrap_or(self.target_burst_capacity),
            scale_down_delay: fields
                .duration("scale_down_delay", Duration::ZERO, LONGEST_DELAY)?
                .unwrap_or(self.scale_down_delay),
            activation_scale: fields.integer("activation_scale", MOST_PODS)?.unwrap_or(self.activation_scale),
            min_scale: fields.integer("min_scale", MOST_PODS)?.unwrap_or(self.min_scale),
            max_scale: fields.integer("max_scale", MOST_PODS)?.unwrap_or(self.max_scale),
            ready_pods: fields.integer("ready_pods", MOST_PODS)?.or(self.ready_pods),
        };
        if settings.max_scale > 0 && settings.max_scale < settings.min_scale {
            let allowed = format!("0, or a number from min_scale ({}) on", settings.min_scale);
            return Err(fields.error("max_scale", settings.max_scale.to_string(), allowed));
        }
        fields.finish()?;
        Ok(settings)
    }

    /// As the decider takes them.
    pub fn decider(&self) -> decider::Settings {
        decider::Settings {
            target: self.target_of(self.metric, self.target),
            total: self.target,
            max_scale_up_rate: self.max_scale_up_rate,
            max_scale_down_rate: self.max_scale_down_rate,
            target_burst_capacity: self.target_burst_capacity,
            panic_threshold: self.panic_threshold_percentage / 100.0,
            stable_window_ns: in_nanoseconds(self.stable_window),
            scale_down_delay_ns: in_nanoseconds(self.scale_down_delay),
            activation_scale: self.activation_scale,
        }
    }

    /// What one pod should have of a metric: of the key's own its target, of rps else `rps_target`, times the utilisation.
    pub fn target_of(&self, metric: Metric, rps_target: f64) -> f64 {
        self.full_target(metric, rps_target) * self.target_utilization_percentage / 100.0
    }

    fn full_target(&self, metric: Metric, rps_target: f64) -> f64 {
        match metric {
            _ if metric == self.metric => self.target,
            Metric::Rps => rps_target,
            Metric::Concurrency => Self::default().target,
        }
    }

    /// The windows in seconds; the panic window has at least one.
    pub fn windows(&self) -> WindowSizes {
        let [_, longest] = STABLE_WINDOW;
        let stable = self.stable_window.min(longest).as_secs();
        let panic = stable as f64 * self.panic_window_percentage / 100.0;
        WindowSizes { stable_seconds: stable as usize, panic_seconds: (panic.round() as usize).max(1) }
    }

    /// A count of pods within the bounds.
    pub fn bounded(&self, pods: u32) -> u32 {
        let most = if self.max_scale == 0 { MOST_PODS } else { self.max_scale };
        pods.max(self.min_scale).min(most)
    }

    /// The memory that a key takes by these settings, in bytes: its windows, and what its decider remembers of the
    /// scale-down delay at the most.
    pub fn bytes(&self) -> usize {
        let WindowSizes { stable_seconds, panic_seconds } = self.windows();
        let seconds = |seconds| heap_bytes(size_of::<[f64; 2]>().saturating_mul(seconds));
        let delay = decider::delay_bytes(in_nanoseconds(self.scale_down_delay));
        seconds(stable_seconds).saturating_add(seconds(panic_seconds)).saturating_add(heap_bytes(delay))
    }

    /// `json`, of which these settings were made, as short as it can be said: a duration may be written in any length.
    pub fn shortened(&self, json: Value) -> Value {
        let (Value::Object(mut told), Ok(Value::Object(mut shown))) = (json, serde_json::to_value(self))
        else {
            return Value::Null;
        };
        for (key, value) in &mut told {
            if value.is_string()
                && let Some(short) = shown.remove(key)
            {
                *value = short;
            }
        }
        Value::Object(told)
    }
}

/// What so many bytes take of the heap: an allocator adds a word and rounds up.
pub fn heap_bytes(bytes: usize) -> usize {
    if bytes == 0 { 0 } else { bytes.saturating_add(size_of::<usize>()).next_multiple_of(16).max(32) }
}

fn in_nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn as_text<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{}s", duration.as_secs_f64()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn with(json: Value) -> Result<KeySettings, String> {
        KeySettings::default().with(json, DEFAULT_RPS_TARGET).map_err(|e| e.to_string())
    }

    #[test]
    fn the_defaults_are_knatives() {
        assert_eq!(KeySettings::default().decider(), decider::Settings::default());
        assert_eq!(KeySettings::default().windows(), WindowSizes::default());
        assert_eq!(with(json!({})).unwrap(), KeySettings::default());
    }

    #[test]
    fn what_is_shown_can_be_told() {
        let told = json!({"metric": "rps", "target": 5, "stable_window": "30s", "scale_down_delay": "1.5s",
            "min_scale": 2, "max_scale": 7, "ready_pods": 3, "target_burst_capacity": -1});
        let settings = with(told).unwrap();
        assert_eq!(settings.windows(), WindowSizes { stable_seconds: 30, panic_seconds: 3 });
        assert_eq!((settings.bounded(0), settings.bounded(5), settings.bounded(9)), (2, 5, 7));
        let mut shown = serde_json::to_value(&settings).unwrap();
        assert_eq!(shown["scale_down_delay"], "1.5s");
        assert_eq!(with(shown.take()).unwrap(), settings);
        // Found by fuzzing: what was not told is not shown, or it could not be told.
        let shown = serde_json::to_value(KeySettings::default()).unwrap();
        assert_eq!(with(shown).unwrap(), KeySettings::default());
    }

    #[test]
    fn what_was_told_at_length_is_kept_short() {
        let zeros = "0".repeat(1_000);
        let told = json!({"stable_window": format!("{zeros}60s"), "scale_down_delay": format!("1500.{zeros}ms"), "target": 7,
            "metric": "rps"});
        let settings = with(told.clone()).unwrap();
        let short = settings.shortened(told);
        assert_eq!(
            short,
            json!({"stable_window": "60s", "scale_down_delay": "1.5s", "target": 7, "metric": "rps"})
        );
        assert_eq!(with(short).unwrap(), settings);
    }

    #[test]
    fn settings_say_what_their_windows_and_their_delay_take() {
        let bytes = |json| with(json).unwrap().bytes();
        let widest = json!({"stable_window": "60m", "panic_window_percentage": 100});
        assert_eq!((bytes(json!({})), bytes(widest)), (16 * 60 + 16 + 16 * 6 + 16, 2 * (16 * 3600 + 16)));
        assert_eq!(bytes(json!({"scale_down_delay": "60m"})) - bytes(json!({})), 8 * 2048 + 16);
    }

    #[test]
    fn a_key_that_scales_by_rps_has_its_own_default_target() {
        assert_eq!(with(json!({"metric": "rps"})).unwrap().decider().target, 140.0);
        assert_eq!(with(json!({"metric": "concurrency"})).unwrap().target, 100.0);
    }

    #[test]
    fn a_mistake_is_named_with_what_is_allowed() {
        for (json, key) in [
            (json!({"target": 0}), "target"),
            (json!({"target": "5"}), "target"),
            (json!({"max_scale_up_rate": 1}), "max_scale_up_rate"),
            (json!({"stable_window": "5s"}), "stable_window"),
            (json!({"stable_window": "6500ms"}), "stable_window"),
            (json!({"min_scale": 3, "max_scale": 2}), "max_scale"),
            (json!({"metric": "cpu"}), "metric"),
            (json!({"ready_pods": -1}), "ready_pods"),
            (json!({"tarjet": 1}), "tarjet"),
        ] {
            let error = with(json).unwrap_err();
            assert!(error.contains(&format!("`{key}` was ")) && error.contains("allowed is"), "{error}");
        }
        assert!(with(json!([1])).is_err());
    }
}
