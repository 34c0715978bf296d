//! How many pods a key wants: Knative's KPA (knative/serving,
//! `pkg/autoscaler/scaling/autoscaler.go`), which decides every two seconds.

use std::collections::VecDeque;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::counting::time::nanoseconds;
use crate::scaling::settings::{KeySettings, MAX_PODS};

/// The time between two decisions; also the unit of the scale-down delay.
pub const DECISION_PERIOD_NS: u64 = 2_000_000_000;

/// What a key shows, at one time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Observation {
    /// Unix time in nanoseconds.
    pub now_ns: u64,
    /// Pods that are ready.
    pub ready: u32,
    /// The metric over the stable window, all pods together.
    pub stable: f64,
    /// The metric over the panic window.
    pub panic: f64,
}

/// The autoscaler's decision for a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// Desired pod count.
    pub desired_pods: u32,
    /// The additional load that could be taken at once; below zero, the gateway should buffer.
    pub excess_burst_capacity: i64,
    /// Whether the key is in panic mode, in which pods are only added: the threshold was exceeded.
    pub panic_mode: bool,
}

/// One key's decider: what it must remember between two decisions.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Decider {
    panic_since_ns: Option<u64>,
    max_in_panic: u32,
    /// Whether the threshold was exceeded in this panic. A decider that begins in panic only holds
    /// what there is.
    has_exceeded: bool,
    delayed: Delay,
}

impl Decider {
    /// A decider that begins with more than one ready pod begins in panic at that count: it does
    /// not know yet what they are needed for.
    pub fn new(now_ns: u64, ready: u32) -> Self {
        let (panics, ready) = (ready > 1, ready.min(MAX_PODS));
        Self {
            panic_since_ns: panics.then_some(now_ns),
            max_in_panic: if panics { ready } else { 0 },
            has_exceeded: false,
            delayed: Delay::default(),
        }
    }

    /// Returns what the key wants now. The bounds of the settings ([`KeySettings::bounded`]) are
    /// the caller's to apply: Knative's decider does not know them either.
    pub fn decide(&mut self, settings: &KeySettings, seen: &Observation) -> Decision {
        let target = settings.target_per_pod();
        let ready = f64::from(seen.ready.max(1));
        let max = (settings.max_scale_up_rate * ready).ceil();
        let min = (ready / settings.max_scale_down_rate).floor();
        let wanted = |value: f64| {
            let needed = (value / target).ceil();
            let pods = needed.max(min).min(max).min(f64::from(MAX_PODS)) as u32;
            // What is needed counts, and not what may not go at once: else idle pods would stay for
            // ever.
            if needed > 0.0 && settings.activation_scale > 1 {
                pods.max(settings.activation_scale)
            } else {
                pods
            }
        };
        let (stable_pods, panic_pods) = (wanted(seen.stable), wanted(seen.panic));

        let panic_threshold = settings.panic_threshold_percentage / 100.0;
        let stable_window_ns = nanoseconds(settings.stable_window);
        if (seen.panic / target).ceil() / ready >= panic_threshold {
            self.panic_since_ns = Some(seen.now_ns);
            self.has_exceeded = true;
        } else if self
            .panic_since_ns
            .is_some_and(|since| since.saturating_add(stable_window_ns) < seen.now_ns)
        {
            self.panic_since_ns = None;
            self.max_in_panic = 0;
            self.has_exceeded = false;
        }
        let mut pods = stable_pods;
        if self.panic_since_ns.is_some() {
            pods = pods.max(panic_pods).max(self.max_in_panic);
            self.max_in_panic = pods;
        }
        if !settings.scale_down_delay.is_zero() {
            pods = self.delayed.highest(pods, seen.now_ns, nanoseconds(settings.scale_down_delay));
        }
        Decision {
            desired_pods: pods,
            excess_burst_capacity: excess_burst_capacity(settings, seen),
            panic_mode: self.panic_since_ns.is_some() && self.has_exceeded,
        }
    }

    /// Has no decision fall below `pods` for a stable window from now on, as at the decider's
    /// beginning.
    pub fn hold(&mut self, now_ns: u64, pods: u32) {
        self.panic_since_ns = Some(now_ns);
        self.max_in_panic = self.max_in_panic.max(pods);
    }
}

fn excess_burst_capacity(settings: &KeySettings, seen: &Observation) -> i64 {
    let burst = settings.target_burst_capacity;
    if burst == 0.0 {
        0
    } else if burst < 0.0 {
        -1
    } else {
        (f64::from(seen.ready) * settings.target - burst - seen.panic).floor() as i64
    }
}

/// The counts wanted within the scale-down delay, by units of [`DECISION_PERIOD_NS`]: only those
/// that no later one exceeds, so the first is the highest.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Delay(VecDeque<(u32, u32)>);

/// Returns the most bytes that a scale-down delay takes: its queue grows by doubling.
pub(super) fn delay_bytes(delay: Duration) -> usize {
    match usize::try_from(nanoseconds(delay).div_ceil(DECISION_PERIOD_NS)).unwrap_or(usize::MAX) {
        0 => 0,
        units => {
            let bytes = units.saturating_add(1).saturating_mul(size_of::<(u32, u32)>());
            bytes.checked_next_power_of_two().unwrap_or(usize::MAX)
        }
    }
}

impl Delay {
    fn highest(&mut self, pods: u32, now_ns: u64, delay_ns: u64) -> u32 {
        let in_units = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        let (unit, units) =
            (in_units(now_ns / DECISION_PERIOD_NS), in_units(delay_ns.div_ceil(DECISION_PERIOD_NS)));
        while self.0.back().is_some_and(|(_, earlier)| *earlier <= pods) {
            self.0.pop_back();
        }
        self.0.push_back((unit, pods));
        while self.0.front().is_some_and(|(at, _)| at.saturating_add(units) <= unit) {
            self.0.pop_front();
        }
        self.0.front().map_or(pods, |(_, highest)| *highest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    fn seen(second: u64, ready: u32, value: f64) -> Observation {
        Observation { now_ns: second * S, ready, stable: value, panic: value }
    }

    #[test]
    fn nothing_wants_nothing_and_zero_pods_can_be_reached() {
        let mut decider = Decider::new(0, 1);
        assert_eq!(decider.decide(&KeySettings::default(), &seen(2, 1, 0.0)).desired_pods, 0);
    }

    #[test]
    fn panic_holds_the_highest_count_for_a_stable_window() {
        let settings =
            KeySettings { target: 10.0, target_utilization_percentage: 100.0, ..KeySettings::default() };
        let mut decider = Decider::new(0, 1);
        let panicking = decider.decide(&settings, &seen(2, 1, 50.0));
        assert_eq!((panicking.desired_pods, panicking.panic_mode), (5, true));
        assert_eq!(decider.decide(&settings, &seen(62, 5, 0.0)).desired_pods, 5);
        let over = decider.decide(&settings, &seen(63, 5, 0.0));
        assert_eq!((over.desired_pods, over.panic_mode), (2, false));
    }

    #[test]
    fn idle_pods_go_whatever_the_activation_scale() {
        let settings = KeySettings { activation_scale: 4, ..KeySettings::default() };
        let mut decider = Decider::new(0, 1);
        assert_eq!(decider.decide(&settings, &seen(2, 1, 1.0)).desired_pods, 4);
        let mut ready = 4;
        let counts = [100, 102, 104].map(|second| {
            ready = decider.decide(&settings, &seen(second, ready, 0.0)).desired_pods;
            ready
        });
        assert_eq!(counts, [2, 1, 0]);
    }

    #[test]
    fn burst_capacity_has_three_cases() {
        let of = |target_burst_capacity, ready| {
            excess_burst_capacity(
                &KeySettings { target_burst_capacity, ..KeySettings::default() },
                &seen(0, ready, 10.5),
            )
        };
        assert_eq!((of(0.0, 9), of(-1.0, 9), of(200.0, 3)), (0, -1, 89));
    }

    #[test]
    fn a_delay_keeps_the_highest_count_for_as_long() {
        let mut delay = Delay::default();
        let counts: Vec<u32> = [3, 5, 1, 2, 1, 1]
            .iter()
            .zip(0..)
            .map(|(n, i)| delay.highest(*n, i * DECISION_PERIOD_NS, 3 * DECISION_PERIOD_NS))
            .collect();
        assert_eq!(counts, [3, 5, 5, 5, 2, 2]);
    }
}
