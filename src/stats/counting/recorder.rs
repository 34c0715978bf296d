//! One worker's recorder: it turns events into snapshots at instants that all workers of a pod
//! agree on.
//!
//! Workers tick at slightly different times, and a busy worker ticks late. A sum of snapshots of
//! different instants would make a second's average wrong by the requests in flight times the
//! difference. So every recorder takes its snapshots at the same boundaries ([`Grid`]). Between two
//! events concurrency is constant, so the integral at a boundary is exact, however late the worker
//! computes it.

use std::collections::VecDeque;

use crate::counting::grid::Grid;
use crate::counting::request::Origin;
use crate::counting::snapshot::Snapshot;
use crate::counting::time::PodNs;

/// How many closed boundaries a worker keeps. The leader sums at the newest boundary that every
/// live worker has closed. A worker that is 2.5 periods behind is declared dead at the leader's
/// next step, so the others are never further ahead than this.
pub const KEPT_BOUNDARIES: usize = 6;

/// One worker's counters.
#[derive(Clone, Debug)]
pub struct Recorder {
    now: Snapshot,
    grid: Grid,
    next_boundary_ns: u64,
    closed: VecDeque<Snapshot>,
}

impl Recorder {
    /// Returns a recorder that starts at zero.
    pub fn new(now: PodNs, grid: Grid) -> Self {
        Self {
            now: Snapshot::starting_at(now.0),
            grid,
            next_boundary_ns: grid.after(now.0),
            closed: VecDeque::with_capacity(KEPT_BOUNDARIES + 1),
        }
    }

    /// Counts a request that came in.
    pub fn request_in(&mut self, now: PodNs, origin: Origin) {
        self.close_until(now.0);
        self.now.request_in(now.0, origin);
    }

    /// Counts the end of a request that came in here.
    pub fn request_out(&mut self, now: PodNs, origin: Origin) {
        self.close_until(now.0);
        self.now.request_out(now.0, origin);
    }

    /// Advances the time to `now` and closes the boundaries on the way.
    pub fn advance(&mut self, now: PodNs) {
        self.close_until(now.0);
        self.now.advance(now.0);
    }

    /// Switches to other boundaries. Those already closed stay as they are.
    pub fn set_grid(&mut self, grid: Grid) {
        if grid != self.grid {
            self.grid = grid;
            self.next_boundary_ns = grid.after(self.now.as_of_ns);
        }
    }

    /// Returns the counters up to the last event or [`Recorder::advance`].
    pub fn current(&self) -> &Snapshot {
        &self.now
    }

    /// Returns the grid in use.
    pub fn grid(&self) -> Grid {
        self.grid
    }

    /// Returns the snapshots at the last boundaries, oldest first, at most [`KEPT_BOUNDARIES`].
    pub fn closed(&self) -> impl DoubleEndedIterator<Item = &Snapshot> {
        self.closed.iter()
    }

    fn close_until(&mut self, now_ns: u64) {
        if now_ns < self.next_boundary_ns {
            return;
        }
        // After a long silence nobody reads any boundaries but the last few.
        let newest = self.grid.at_or_before(now_ns);
        let span = (KEPT_BOUNDARIES as u64 - 1).saturating_mul(self.grid.period_ns.max(1));
        let mut boundary =
            self.next_boundary_ns.max(self.grid.after(newest.saturating_sub(span).saturating_sub(1)));
        while boundary <= newest {
            self.now.advance(boundary);
            if self.closed.len() == KEPT_BOUNDARIES {
                self.closed.pop_front();
            }
            self.closed.push_back(self.now);
            boundary = boundary.saturating_add(self.grid.period_ns.max(1));
            if boundary == u64::MAX {
                break;
            }
        }
        self.next_boundary_ns = self.grid.after(now_ns);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRID: Grid = Grid { anchor_ns: 1_000, period_ns: 100 };

    #[test]
    fn a_boundary_is_exact_however_late_it_is_computed() {
        let mut prompt = Recorder::new(PodNs(1_000), GRID);
        let mut late = prompt.clone();
        for recorder in [&mut prompt, &mut late] {
            recorder.request_in(PodNs(1_050), Origin::Direct);
        }
        prompt.advance(PodNs(1_100));
        prompt.advance(PodNs(1_200));
        for recorder in [&mut prompt, &mut late] {
            recorder.request_out(PodNs(1_250), Origin::Direct);
        }
        assert_eq!(prompt.closed().collect::<Vec<_>>(), late.closed().collect::<Vec<_>>());
        let at: Vec<_> = late.closed().map(|s| (s.as_of_ns, s.request_ns, s.in_flight)).collect();
        assert_eq!(at, [(1_100, 50, 1), (1_200, 150, 1)]);
    }

    #[test]
    fn an_event_at_a_boundary_belongs_to_the_next_period() {
        let mut recorder = Recorder::new(PodNs(1_000), GRID);
        recorder.request_in(PodNs(1_100), Origin::Direct);
        assert_eq!(recorder.closed().map(|s| s.requests).collect::<Vec<_>>(), [0]);
        assert_eq!(recorder.current().requests, 1);
    }

    #[test]
    fn a_long_silence_closes_only_the_last_boundaries_and_loses_no_time() {
        let mut recorder = Recorder::new(PodNs(1_000), GRID);
        recorder.request_in(PodNs(1_000), Origin::Proxied);
        recorder.advance(PodNs(1_000_000_049));
        let closed: Vec<_> = recorder.closed().map(|s| s.as_of_ns).collect();
        assert_eq!(closed.len(), KEPT_BOUNDARIES);
        assert_eq!(closed.last(), Some(&1_000_000_000));
        assert_eq!(closed.first(), Some(&999_999_500));
        assert_eq!(recorder.current().request_ns, 1_000_000_049 - 1_000);
    }

    #[test]
    fn another_grid_takes_effect_from_now_on() {
        let mut recorder = Recorder::new(PodNs(1_000), GRID);
        recorder.advance(PodNs(1_110));
        recorder.set_grid(Grid { anchor_ns: 1_130, period_ns: 50 });
        recorder.advance(PodNs(1_190));
        assert_eq!(recorder.closed().map(|s| s.as_of_ns).collect::<Vec<_>>(), [1_100, 1_130, 1_180]);
    }
}
