//! The log's time. It is unix time only at the log's beginning; from then on it advances as the
//! servers' monotonic clocks do, so that a step of a wall clock moves nothing.
//!
//! Each server estimates it: the time of the entry that showed the most, and what has passed since by
//! the server's monotonic clock. It writes its estimate into its entries. An entry is applied as of
//! its own time or that of the one before it, whichever is later, so the time of the log is a function
//! of the log.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use inflight_stats::counting::time::nanoseconds;

use crate::os::lock::lock;

/// A server's estimate of the log's time.
#[derive(Debug, Default)]
pub struct LogClock(Mutex<Estimate>);

#[derive(Clone, Copy, Debug, Default)]
struct Estimate {
    /// The log's time at an instant; `None` before anything is known.
    at: Option<(u64, Instant)>,
    /// Whether it is not merely the time of an old entry.
    is_current: bool,
}

impl Estimate {
    fn now_ns(&self, now: Instant) -> u64 {
        self.at.map_or(0, |(ns, at)| ns.saturating_add(nanoseconds(now.saturating_duration_since(at))))
    }
}

impl LogClock {
    /// Notes the time of an entry, or of another server. One that is earlier than the estimate is old.
    pub fn advance(&self, log_ns: u64) {
        self.advance_at(log_ns, Instant::now());
    }

    fn advance_at(&self, log_ns: u64, now: Instant) {
        let mut estimate = lock(&self.0);
        if estimate.at.is_none() || log_ns > estimate.now_ns(now) {
            estimate.at = Some((log_ns, now));
        }
    }

    /// Notes that the estimate is as good as that of a server that runs.
    pub fn set_current(&self) {
        lock(&self.0).is_current = true;
    }

    /// Sets the estimate by the wall clock, if it is later: no server runs that would know better.
    pub fn begin(&self, wall_time: Duration) {
        self.advance(nanoseconds(wall_time));
        self.set_current();
    }

    /// Returns the log's time, in nanoseconds; `None` while it is not known.
    pub fn now_ns(&self) -> Option<u64> {
        let estimate = *lock(&self.0);
        estimate.is_current.then(|| estimate.now_ns(Instant::now()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_estimate_counts_and_goes_on() {
        let (clock, start) = (LogClock::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let now = |seconds| lock(&clock.0).now_ns(at(seconds)) / 1_000_000_000;
        clock.advance_at(1_000_000_000_000, at(0));
        assert_eq!(clock.now_ns(), None, "an old entry's time");
        assert_eq!(now(5), 1_005);
        clock.advance_at(1_003_000_000_000, at(5));
        assert_eq!(now(5), 1_005, "an entry that came late moves nothing back");
        clock.advance_at(1_007_000_000_000, at(6));
        assert_eq!(now(8), 1_009);
        clock.set_current();
        assert!(clock.now_ns().is_some());
    }
}
