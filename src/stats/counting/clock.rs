//! The pod's time. All workers of one Envoy derive it from the process's monotonic clock plus one
//! shared offset. It starts as the wall clock, but later steps of the wall clock do not affect it.
//! A step of the underlying clock backwards counts as no time at all. If the monotonic clock itself
//! jumps forwards (a frozen process, a faked clock), only a few periods of the jump count.

use crate::counting::time::{MonotonicNs, PodNs};

/// The pod's time as one thread reads it: it never goes back, and its steps forwards are bounded.
#[derive(Clone, Debug)]
pub struct Clock {
    last: MonotonicNs,
    now: PodNs,
    longest_step_ns: u64,
}

impl Clock {
    /// Returns a clock. `offset_ns` is the pod's time minus the monotonic time, wrapping.
    /// `longest_step_ns` is the most time that counts between two readings (see
    /// [`longest_step_ns`]).
    pub fn new(offset_ns: u64, reading: MonotonicNs, longest_step_ns: u64) -> Self {
        Self { last: reading, now: PodNs(reading.0.wrapping_add(offset_ns)), longest_step_ns }
    }

    /// Returns the pod's time at a reading.
    pub fn read(&mut self, reading: MonotonicNs) -> PodNs {
        let step = reading.since(self.last).min(self.longest_step_ns);
        self.last = reading;
        self.now = PodNs(self.now.0.saturating_add(step));
        self.now
    }

    /// Sets the longest step, for another reporting period.
    pub fn set_longest_step_ns(&mut self, longest_step_ns: u64) {
        self.longest_step_ns = longest_step_ns;
    }

    /// Returns whether only a part of the time up to a reading would count.
    pub fn cuts(&self, reading: MonotonicNs) -> bool {
        reading.since(self.last) > self.longest_step_ns
    }

    /// Adopts an instant that other workers have reached, with the offset that they had at that
    /// instant. So time during which only this worker was stalled counts, and a jump of all clocks
    /// still does not. The clock never goes back.
    pub fn catch_up(&mut self, reached: PodNs, offset_ns: u64) {
        if reached > self.now {
            self.now = reached;
            self.last = MonotonicNs(reached.0.wrapping_sub(offset_ns));
        }
    }

    /// Adopts the time of workers that are ahead, by their offset. The clock never goes back.
    pub fn advance_to(&mut self, offset_ns: u64) {
        self.now = self.now.max(PodNs(self.last.0.wrapping_add(offset_ns)));
    }

    /// Returns the pod's time minus the monotonic time, wrapping. A worker that joins later starts
    /// from it.
    pub fn offset_ns(&self) -> u64 {
        self.now.0.wrapping_sub(self.last.0)
    }
}

/// Returns the longest step that counts: five periods, and at least two seconds, because a starved
/// worker may well be late by some hundred milliseconds.
pub fn longest_step_ns(period_ns: u64) -> u64 {
    period_ns.saturating_mul(5).max(2_000_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_never_goes_back() {
        let mut clock = Clock::new(1_000, MonotonicNs(50), 100);
        assert_eq!(clock.read(MonotonicNs(60)), PodNs(1_060));
        assert_eq!(clock.read(MonotonicNs(40)), PodNs(1_060));
        assert_eq!(clock.read(MonotonicNs(41)), PodNs(1_061), "and goes on from where it stood");
    }

    #[test]
    fn a_jump_forwards_counts_for_the_longest_step_alone() {
        let mut clock = Clock::new(0, MonotonicNs(50), 100);
        assert_eq!(clock.read(MonotonicNs(1_000_000)), PodNs(150));
        assert_eq!(clock.read(MonotonicNs(1_000_010)), PodNs(160));
        assert_eq!(clock.offset_ns(), 160u64.wrapping_sub(1_000_010));
    }

    #[test]
    fn a_wall_clock_behind_the_monotonic_one_wraps_the_offset_and_nothing_else() {
        let mut clock = Clock::new(5u64.wrapping_sub(1_000), MonotonicNs(1_000), 100);
        assert_eq!(clock.read(MonotonicNs(1_001)), PodNs(6));
    }

    #[test]
    fn what_only_this_worker_slept_through_counts_and_a_jump_of_all_clocks_does_not() {
        let mut clock = Clock::new(0, MonotonicNs(50), 100);
        assert!(!clock.cuts(MonotonicNs(150)) && clock.cuts(MonotonicNs(1_000)));
        // The others reached 960 when their monotonic clock read 960.
        clock.catch_up(PodNs(960), 0);
        assert_eq!(clock.read(MonotonicNs(1_000)), PodNs(1_000));
        // All clocks jump by 4,000. A worker that was running before the jump counts 100 of it.
        assert!(clock.cuts(MonotonicNs(5_000)));
        clock.catch_up(PodNs(990), 0);
        assert_eq!(clock.clone().read(MonotonicNs(5_000)), PodNs(1_100), "nobody has got further yet");
        clock.catch_up(PodNs(1_090), 1_090u64.wrapping_sub(4_990));
        assert_eq!(clock.read(MonotonicNs(5_000)), PodNs(1_100), "by the time of one that has");
        clock.catch_up(PodNs(500), 0);
        assert_eq!(clock.read(MonotonicNs(5_010)), PodNs(1_110), "never back");
    }

    #[test]
    fn a_clock_that_is_behind_follows_and_never_goes_back() {
        let mut clock = Clock::new(0, MonotonicNs(50), 100);
        clock.read(MonotonicNs(1_000));
        clock.advance_to(0);
        assert_eq!(clock.read(MonotonicNs(1_010)), PodNs(1_010));
        clock.advance_to(0u64.wrapping_sub(500));
        assert_eq!(clock.read(MonotonicNs(1_020)), PodNs(1_020));
    }

    #[test]
    fn a_shorter_longest_step_holds_from_then_on() {
        let mut clock = Clock::new(0, MonotonicNs(50), 100);
        clock.set_longest_step_ns(1);
        assert_eq!(clock.read(MonotonicNs(70)), PodNs(51));
    }

    #[test]
    fn the_longest_step_is_a_few_periods() {
        assert_eq!(longest_step_ns(100_000_000), 2_000_000_000);
        assert_eq!(longest_step_ns(1_000_000_000), 5_000_000_000);
        assert_eq!(longest_step_ns(u64::MAX), u64::MAX);
    }
}
