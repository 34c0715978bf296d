//! The last decisions of a key, for the live page's charts.

use std::collections::VecDeque;

use inflight_stats::scaling::decider::Decision;
use inflight_stats::scaling::key::Figures;
use inflight_stats::scaling::settings::{KeySettings, Metric};

/// What a chart shows: ten minutes of decisions.
const MAX_POINTS: usize = 300;

/// A key at one decision.
#[derive(Clone, Copy, Debug)]
pub struct HistoryPoint {
    /// Unix time in seconds.
    at: u32,
    /// Not a number where nobody was heard.
    stable: f32,
    panic: f32,
    in_flight: u32,
    /// What each ready pod should have of the metric.
    pub target: f32,
    /// Pods that the decision took as ready.
    pub ready_pods: u32,
    /// The decision.
    pub desired_pods: u32,
}

impl HistoryPoint {
    /// The figures that a decision was made by, and the decision.
    pub fn new(
        now_ns: u64,
        settings: &KeySettings,
        figures: &Figures,
        is_heard: bool,
        ready_pods: u32,
        decision: &Decision,
    ) -> Self {
        let stable = figures.stable.value(settings.metric) as f32;
        Self {
            at: u32::try_from(now_ns / 1_000_000_000).unwrap_or(u32::MAX),
            stable: if is_heard { stable } else { f32::NAN },
            panic: figures.panic.value(settings.metric) as f32,
            in_flight: u32::try_from(figures.in_flight).unwrap_or(u32::MAX),
            target: settings.target_per_pod() as f32,
            ready_pods,
            desired_pods: decision.desired_pods,
        }
    }

    /// Returns its unix time in nanoseconds.
    pub fn at_ns(&self) -> u64 {
        u64::from(self.at) * 1_000_000_000
    }

    /// Returns the stable and the panic average of the metric, and the requests in flight; `None` if
    /// nobody was heard.
    pub fn heard(&self) -> Option<(f32, f32, u32)> {
        (!self.stable.is_nan()).then_some((self.stable, self.panic, self.in_flight))
    }
}

/// A key's last points, the oldest first. It takes no memory before [`History::enable`].
#[derive(Clone, Debug, Default)]
pub struct History {
    /// What the averages of all points are of.
    pub metric: Metric,
    /// The points.
    pub points: VecDeque<HistoryPoint>,
}

impl History {
    /// Returns whether points are kept.
    pub fn is_enabled(&self) -> bool {
        self.points.capacity() > 0
    }

    /// Has points kept from now on.
    pub fn enable(&mut self) {
        self.points = VecDeque::with_capacity(MAX_POINTS);
    }

    /// Adds a point, which replaces the oldest of too many. Averages of another metric than before
    /// cannot be compared with those before, which are dropped.
    pub fn push(&mut self, metric: Metric, point: HistoryPoint) {
        if metric != self.metric {
            self.metric = metric;
            self.points.clear();
        }
        if self.points.len() == MAX_POINTS {
            self.points.pop_front();
        }
        self.points.push_back(point);
    }
}
