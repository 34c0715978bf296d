//! What a key is scaled by, under the names of Knative's annotations: as flags for all keys, and as
//! JSON for one key.

use std::time::Duration;

use serde::{Serialize, Serializer};
use serde_json::Value;

use crate::config::fields::{ConfigError, Fields};
use crate::scaling::windows::WindowSizes;

/// What is scaled by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Metric {
    /// Requests in flight.
    #[default]
    Concurrency,
    /// Requests per second.
    Rps,
}

/// The names of [`Metric`]'s values, as configuration has them.
pub const METRICS: [(&str, Metric); 2] = [("concurrency", Metric::Concurrency), ("rps", Metric::Rps)];

/// Knative's default target of the metric rps.
pub const DEFAULT_RPS_TARGET: f64 = 200.0;
/// The shortest and the longest stable window (Knative: 6 s to 1 h).
const STABLE_WINDOW_RANGE: [Duration; 2] = [Duration::from_secs(6), Duration::from_secs(3600)];
/// The longest scale-down delay.
const MAX_DELAY: Duration = Duration::from_secs(3600);
/// Maximum number of pods that a setting may name, or that a key can need.
pub const MAX_PODS: u32 = 1_000_000;

/// One setting. The parser, the flag of the same name and the reference page all take it from here;
/// its default is in [`KeySettings::DEFAULT`].
#[derive(Clone, Copy, Debug)]
pub struct Setting<T> {
    /// Its key in JSON.
    pub name: &'static str,
    /// Whether a value is allowed.
    pub fits: fn(T) -> bool,
    /// What is allowed, in words.
    pub expected: &'static str,
    /// What it means.
    pub help: &'static str,
}

/// A [`Setting`] of any type, for the reference page.
#[derive(Clone, Copy, Debug)]
pub struct SettingHelp {
    /// Its key in JSON.
    pub name: &'static str,
    /// What is allowed, in words.
    pub expected: &'static str,
    /// What it means.
    pub help: &'static str,
}

impl<T> Setting<T> {
    const fn any(&self) -> SettingHelp {
        SettingHelp { name: self.name, expected: self.expected, help: self.help }
    }
}

const A_PERCENTAGE: &str = "a number from 1 to 100";
const A_RATE: &str = "a number above 1";
const A_POD_COUNT: &str = "a whole number from 0 to 1000000";

/// `metric`
pub const METRIC: Setting<Metric> = Setting {
    name: "metric",
    fits: |_| true,
    expected: r#""concurrency" or "rps""#,
    help: "What to scale by: concurrency (requests in flight) or rps (requests per second)",
};
/// `target`
pub const TARGET: Setting<f64> = Setting {
    name: "target",
    // KEDA multiplies it by 1000 in 64 bits.
    fits: |n| (0.01..=1e9).contains(&n),
    expected: "a number from 0.01 to 1000000000",
    help: "Concurrency that one pod can handle; with the metric rps, requests per second",
};
/// `target_utilization_percentage`
pub const TARGET_UTILIZATION_PERCENTAGE: Setting<f64> = Setting {
    name: "target_utilization_percentage",
    fits: |n| (1.0..=100.0).contains(&n),
    expected: A_PERCENTAGE,
    help: "Percentage of the target at which each pod should run",
};
/// `stable_window`
pub const STABLE_WINDOW: Setting<Duration> = Setting {
    name: "stable_window",
    fits: |window| {
        let [min, max] = STABLE_WINDOW_RANGE;
        (min..=max).contains(&window) && window.subsec_nanos() == 0
    },
    expected: r#"a duration from 6s to 60m in whole seconds, such as "60s"; units ms, s, m"#,
    help: "Time over which the stable averages are taken",
};
/// `panic_window_percentage`
pub const PANIC_WINDOW_PERCENTAGE: Setting<f64> = Setting {
    name: "panic_window_percentage",
    fits: |n| (1.0..=100.0).contains(&n),
    expected: A_PERCENTAGE,
    help: "Length of the panic window, as a percentage of the stable window",
};
/// `panic_threshold_percentage` (Knative: 110 to 1000; less is allowed here).
pub const PANIC_THRESHOLD_PERCENTAGE: Setting<f64> = Setting {
    name: "panic_threshold_percentage",
    fits: |n| n >= 1.0,
    expected: "a number of at least 1",
    help: "Panic mode starts when the panic window needs at least this percentage of the ready pods",
};
/// `max_scale_up_rate`
pub const MAX_SCALE_UP_RATE: Setting<f64> = Setting {
    name: "max_scale_up_rate",
    fits: |n| n > 1.0,
    expected: A_RATE,
    help: "Largest factor by which one decision may scale up",
};
/// `max_scale_down_rate`
pub const MAX_SCALE_DOWN_RATE: Setting<f64> = Setting {
    name: "max_scale_down_rate",
    fits: |n| n > 1.0,
    expected: A_RATE,
    help: "Largest factor by which one decision may scale down",
};
/// `target_burst_capacity`
pub const TARGET_BURST_CAPACITY: Setting<f64> = Setting {
    name: "target_burst_capacity",
    fits: |n| n >= 0.0 || n == -1.0,
    expected: "-1, or a number of at least 0",
    help: "Capacity to keep free for bursts; 0: none, -1: unlimited",
};
/// `scale_down_delay`
pub const SCALE_DOWN_DELAY: Setting<Duration> = Setting {
    name: "scale_down_delay",
    fits: |delay| delay <= MAX_DELAY,
    expected: r#"a duration from 0s to 60m, such as "1s" or "250ms"; units ms, s, m"#,
    help: "How long a lower pod count must hold before scaling down",
};
/// `activation_scale`
pub const ACTIVATION_SCALE: Setting<u32> = Setting {
    name: "activation_scale",
    fits: |pods| pods <= MAX_PODS,
    expected: A_POD_COUNT,
    help: "Smallest non-zero pod count",
};
/// `min_scale`
pub const MIN_SCALE: Setting<u32> = Setting {
    name: "min_scale",
    fits: |pods| pods <= MAX_PODS,
    expected: A_POD_COUNT,
    help: "Smallest pod count",
};
/// `max_scale`
pub const MAX_SCALE: Setting<u32> = Setting {
    name: "max_scale",
    fits: |pods| pods <= MAX_PODS,
    expected: A_POD_COUNT,
    help: "Largest pod count, not below min_scale; 0: no limit",
};
/// `ready_pods`
pub const READY_PODS: Setting<u32> = Setting {
    name: "ready_pods",
    fits: |pods| pods <= MAX_PODS,
    expected: A_POD_COUNT,
    help: "Number of ready pods; without it, the pods that report, or the last decision where none does",
};

/// All settings, in the order of the reference page.
pub const SETTINGS: [SettingHelp; 14] = [
    METRIC.any(),
    TARGET.any(),
    TARGET_UTILIZATION_PERCENTAGE.any(),
    STABLE_WINDOW.any(),
    PANIC_WINDOW_PERCENTAGE.any(),
    PANIC_THRESHOLD_PERCENTAGE.any(),
    MAX_SCALE_UP_RATE.any(),
    MAX_SCALE_DOWN_RATE.any(),
    TARGET_BURST_CAPACITY.any(),
    SCALE_DOWN_DELAY.any(),
    ACTIVATION_SCALE.any(),
    MIN_SCALE.any(),
    MAX_SCALE.any(),
    READY_PODS.any(),
];

/// Their names.
const NAMES: [&str; SETTINGS.len()] = {
    let mut names = [""; SETTINGS.len()];
    let mut index = 0;
    while index < SETTINGS.len() {
        #[allow(clippy::indexing_slicing, reason = "checked by the loop, and at compile time")]
        {
            names[index] = SETTINGS[index].name;
        }
        index += 1;
    }
    names
};

/// All that a key is scaled by. Serialized, it can be put again.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KeySettings {
    /// [`METRIC`]
    pub metric: Metric,
    /// [`TARGET`]
    pub target: f64,
    /// [`TARGET_UTILIZATION_PERCENTAGE`]
    pub target_utilization_percentage: f64,
    /// [`STABLE_WINDOW`]
    #[serde(serialize_with = "as_text")]
    pub stable_window: Duration,
    /// [`PANIC_WINDOW_PERCENTAGE`]
    pub panic_window_percentage: f64,
    /// [`PANIC_THRESHOLD_PERCENTAGE`]
    pub panic_threshold_percentage: f64,
    /// [`MAX_SCALE_UP_RATE`]
    pub max_scale_up_rate: f64,
    /// [`MAX_SCALE_DOWN_RATE`]
    pub max_scale_down_rate: f64,
    /// [`TARGET_BURST_CAPACITY`]
    pub target_burst_capacity: f64,
    /// [`SCALE_DOWN_DELAY`]
    #[serde(serialize_with = "as_text")]
    pub scale_down_delay: Duration,
    /// [`ACTIVATION_SCALE`]
    pub activation_scale: u32,
    /// [`MIN_SCALE`]
    pub min_scale: u32,
    /// [`MAX_SCALE`]
    pub max_scale: u32,
    /// [`READY_PODS`]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready_pods: Option<u32>,
}

impl Default for KeySettings {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl KeySettings {
    /// Knative's defaults.
    pub const DEFAULT: Self = Self {
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
    };

    /// Returns these settings with those in `json`, an object, over them. A key that is set to
    /// scale by rps, without a target, gets `rps_target`.
    ///
    /// # Errors
    /// [`ConfigError`], for the first mistake.
    pub fn with(&self, json: Value, rps_target: f64) -> Result<Self, ConfigError> {
        let mut fields = Fields::new("settings", "", json, &NAMES)?;
        let metric = fields.one_of(METRIC.name, METRIC.expected, &METRICS)?.unwrap_or(self.metric);
        let target = number(&mut fields, &TARGET)?.unwrap_or_else(|| self.full_target(metric, rps_target));
        let max_scale = pods(&mut fields, &MAX_SCALE)?.unwrap_or(self.max_scale);
        let min_scale = pods(&mut fields, &MIN_SCALE)?.unwrap_or(self.min_scale);
        if max_scale > 0 && max_scale < min_scale {
            let expected = format!("0, or at least min_scale ({min_scale})");
            return Err(fields.error(MAX_SCALE.name, max_scale.to_string(), expected));
        }
        Ok(Self {
            metric,
            target,
            target_utilization_percentage: number(&mut fields, &TARGET_UTILIZATION_PERCENTAGE)?
                .unwrap_or(self.target_utilization_percentage),
            stable_window: duration(&mut fields, &STABLE_WINDOW)?.unwrap_or(self.stable_window),
            panic_window_percentage: number(&mut fields, &PANIC_WINDOW_PERCENTAGE)?
                .unwrap_or(self.panic_window_percentage),
            panic_threshold_percentage: number(&mut fields, &PANIC_THRESHOLD_PERCENTAGE)?
                .unwrap_or(self.panic_threshold_percentage),
            max_scale_up_rate: number(&mut fields, &MAX_SCALE_UP_RATE)?.unwrap_or(self.max_scale_up_rate),
            max_scale_down_rate: number(&mut fields, &MAX_SCALE_DOWN_RATE)?
                .unwrap_or(self.max_scale_down_rate),
            target_burst_capacity: number(&mut fields, &TARGET_BURST_CAPACITY)?
                .unwrap_or(self.target_burst_capacity),
            scale_down_delay: duration(&mut fields, &SCALE_DOWN_DELAY)?.unwrap_or(self.scale_down_delay),
            activation_scale: pods(&mut fields, &ACTIVATION_SCALE)?.unwrap_or(self.activation_scale),
            min_scale,
            max_scale,
            ready_pods: pods(&mut fields, &READY_PODS)?.or(self.ready_pods),
        })
    }

    /// Returns what one pod should have of the key's own metric: Knative's target times its
    /// utilization.
    pub fn target_per_pod(&self) -> f64 {
        self.target * self.target_utilization_percentage / 100.0
    }

    /// Returns what one pod should have of a metric: the key's own target for its own metric, else
    /// `rps_target` for rps; times the utilization.
    pub fn target_of(&self, metric: Metric, rps_target: f64) -> f64 {
        self.full_target(metric, rps_target) * self.target_utilization_percentage / 100.0
    }

    fn full_target(&self, metric: Metric, rps_target: f64) -> f64 {
        match metric {
            _ if metric == self.metric => self.target,
            Metric::Rps => rps_target,
            Metric::Concurrency => Self::DEFAULT.target,
        }
    }

    /// Returns the windows in seconds; the panic window has at least one.
    pub fn windows(&self) -> WindowSizes {
        let [_, max] = STABLE_WINDOW_RANGE;
        let stable = self.stable_window.min(max).as_secs();
        let panic = stable as f64 * self.panic_window_percentage / 100.0;
        WindowSizes { stable_seconds: stable as usize, panic_seconds: (panic.round() as usize).max(1) }
    }

    /// Returns a pod count within the bounds.
    pub fn bounded(&self, pods: u32) -> u32 {
        let max = if self.max_scale == 0 { MAX_PODS } else { self.max_scale };
        pods.max(self.min_scale).min(max)
    }

    /// Returns `json`, of which these settings were made, in its shortest form: a duration may be
    /// written in any length.
    pub fn shortened(&self, json: Value) -> Value {
        let (Value::Object(mut given), Ok(Value::Object(mut shown))) = (json, serde_json::to_value(self))
        else {
            return Value::Null;
        };
        for (key, value) in &mut given {
            if value.is_string()
                && let Some(short) = shown.remove(key)
            {
                *value = short;
            }
        }
        Value::Object(given)
    }
}

fn number(fields: &mut Fields, setting: &Setting<f64>) -> Result<Option<f64>, ConfigError> {
    fields.number(setting.name, setting.expected, setting.fits)
}

fn duration(fields: &mut Fields, setting: &Setting<Duration>) -> Result<Option<Duration>, ConfigError> {
    fields.duration(setting.name, setting.expected, setting.fits)
}

fn pods(fields: &mut Fields, setting: &Setting<u32>) -> Result<Option<u32>, ConfigError> {
    fields.integer(setting.name, setting.expected, setting.fits)
}

fn as_text<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{}s", duration.as_secs_f64()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::scaling::key::Key;

    fn with(json: Value) -> Result<KeySettings, String> {
        KeySettings::default().with(json, DEFAULT_RPS_TARGET).map_err(|e| e.to_string())
    }

    #[test]
    fn the_defaults_are_knatives() {
        assert_eq!(KeySettings::default().target_per_pod(), 70.0);
        assert_eq!(KeySettings::default().windows(), WindowSizes::default());
        assert_eq!(with(json!({})).unwrap(), KeySettings::default());
    }

    #[test]
    fn every_setting_that_is_listed_is_read_and_every_one_that_is_shown_is_listed() {
        for setting in SETTINGS {
            let error = with(json!({setting.name: []})).unwrap_err();
            let expected =
                format!("invalid settings: `{}` is []; expected {}", setting.name, setting.expected);
            assert_eq!(error, expected);
        }
        let Value::Object(shown) = serde_json::to_value(KeySettings::default()).unwrap() else { panic!() };
        assert!(shown.keys().all(|key| NAMES.contains(&key.as_str())), "{shown:?}");
        assert_eq!(shown.len() + 1, NAMES.len(), "`ready_pods` has no default");
    }

    #[test]
    fn what_is_shown_can_be_told() {
        let given = json!({"metric": "rps", "target": 5, "stable_window": "30s", "scale_down_delay": "1.5s",
            "min_scale": 2, "max_scale": 7, "ready_pods": 3, "target_burst_capacity": -1});
        let settings = with(given).unwrap();
        assert_eq!(settings.windows(), WindowSizes { stable_seconds: 30, panic_seconds: 3 });
        assert_eq!((settings.bounded(0), settings.bounded(5), settings.bounded(9)), (2, 5, 7));
        let mut shown = serde_json::to_value(&settings).unwrap();
        assert_eq!(shown["scale_down_delay"], "1.5s");
        assert_eq!(with(shown.take()).unwrap(), settings);
        // Found by fuzzing: what was not given is not shown, or it could not be put again.
        let shown = serde_json::to_value(KeySettings::default()).unwrap();
        assert_eq!(with(shown).unwrap(), KeySettings::default());
    }

    #[test]
    fn what_was_told_at_length_is_kept_short() {
        let zeros = "0".repeat(1_000);
        let (window, delay) = (format!("{zeros}60s"), format!("1500.{zeros}ms"));
        let given = json!({"stable_window": window, "scale_down_delay": delay, "target": 7, "metric": "rps"});
        let settings = with(given.clone()).unwrap();
        let short = settings.shortened(given);
        assert_eq!(
            short,
            json!({"stable_window": "60s", "scale_down_delay": "1.5s", "target": 7, "metric": "rps"})
        );
        assert_eq!(with(short).unwrap(), settings);
    }

    #[test]
    fn settings_say_what_their_windows_and_their_delay_take() {
        let bytes = |json| Key::settings_bytes(&with(json).unwrap());
        let widest = json!({"stable_window": "60m", "panic_window_percentage": 100});
        assert_eq!((bytes(json!({})), bytes(widest)), (16 * 60 + 16 + 16 * 6 + 16, 2 * (16 * 3600 + 16)));
        assert_eq!(bytes(json!({"scale_down_delay": "60m"})) - bytes(json!({})), 8 * 2048 + 16);
    }

    #[test]
    fn a_key_that_scales_by_rps_has_its_own_default_target() {
        assert_eq!(with(json!({"metric": "rps"})).unwrap().target_per_pod(), 140.0);
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
        ] {
            let error = with(json).unwrap_err();
            assert!(error.starts_with(&format!("invalid settings: `{key}` is ")), "{error}");
            assert!(error.contains("; expected "), "{error}");
        }
        let error = with(json!({"tarjet": 1})).unwrap_err();
        assert_eq!(error, "invalid settings: unknown key `tarjet`; did you mean `target`?");
        assert_eq!(
            with(json!([1])).unwrap_err(),
            "invalid settings: the document is [1]; expected a JSON object"
        );
    }
}
