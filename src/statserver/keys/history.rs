//! The last decisions of a key, for the live page's charts.

use std::collections::VecDeque;

use inflight_stats::scaling::decider::Decision;
use inflight_stats::scaling::key::Figures;
use serde::Serialize;

/// What a chart shows: ten minutes of decisions.
const MAX_POINTS: usize = 300;

/// A key at one decision.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct HistoryPoint {
    stable: f32,
    panic: f32,
    in_flight: u32,
    desired_pods: u32,
}

impl HistoryPoint {
    /// The figures that a decision was made by, and the decision.
    pub fn new(figures: &Figures, decision: &Decision) -> Self {
        Self {
            stable: figures.stable.concurrency as f32,
            panic: figures.panic.concurrency as f32,
            in_flight: u32::try_from(figures.in_flight).unwrap_or(u32::MAX),
            desired_pods: decision.desired_pods,
        }
    }
}

/// A key's last points, the oldest first. It takes no memory before [`History::enable`].
#[derive(Debug, Default)]
pub struct History(VecDeque<HistoryPoint>);

impl History {
    /// Returns whether points are kept.
    pub fn is_enabled(&self) -> bool {
        self.0.capacity() > 0
    }

    /// Has points kept from now on.
    pub fn enable(&mut self) {
        self.0 = VecDeque::with_capacity(MAX_POINTS);
    }

    /// Adds a point, which replaces the oldest of too many.
    pub fn push(&mut self, point: HistoryPoint) {
        if self.0.len() == MAX_POINTS {
            self.0.pop_front();
        }
        self.0.push_back(point);
    }

    /// Returns the points, the oldest first.
    pub fn points(&self) -> Vec<HistoryPoint> {
        self.0.iter().copied().collect()
    }
}
