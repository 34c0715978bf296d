//! The grid: the boundaries at which all workers of a pod take snapshots.

use serde::{Deserialize, Serialize};

/// The boundaries of reporting periods: `anchor_ns + k * period_ns`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grid {
    /// Any boundary, in nanoseconds of the pod's clock.
    pub anchor_ns: u64,
    /// The distance between two boundaries in nanoseconds; 0 is read as 1.
    pub period_ns: u64,
}

impl Grid {
    /// Returns the last boundary at or before `now_ns`, or the anchor if the anchor is later.
    pub fn at_or_before(&self, now_ns: u64) -> u64 {
        let since_anchor = now_ns.saturating_sub(self.anchor_ns);
        self.anchor_ns.saturating_add(since_anchor - since_anchor % self.period_ns.max(1))
    }

    /// Returns the first boundary after `now_ns`.
    pub fn after(&self, now_ns: u64) -> u64 {
        if now_ns < self.anchor_ns {
            return self.anchor_ns;
        }
        self.at_or_before(now_ns).saturating_add(self.period_ns.max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::counting::recorder::Recorder;
    use crate::counting::request::Origin;
    use crate::counting::time::PodNs;

    const GRID: Grid = Grid { anchor_ns: 1_000, period_ns: 100 };

    #[test]
    fn the_grid_at_its_edges() {
        assert_eq!((GRID.at_or_before(999), GRID.after(999)), (1_000, 1_000));
        assert_eq!((GRID.at_or_before(1_000), GRID.after(1_000)), (1_000, 1_100));
        let zero = Grid { anchor_ns: 0, period_ns: 0 };
        assert_eq!((zero.at_or_before(7), zero.after(7)), (7, 8));
        assert_eq!(GRID.after(u64::MAX), u64::MAX);
        let mut recorder = Recorder::new(PodNs(u64::MAX - 10), GRID);
        recorder.request_in(PodNs(u64::MAX), Origin::Direct);
        assert_eq!(recorder.current().requests, 1);
    }
}
