//! Snapshots: cumulative counters. Every statement of Inflight about concurrency is a difference of
//! two [`Snapshot`]s, in integers. So nothing drifts, and a lost or repeated report changes no sum.

use serde::{Deserialize, Serialize};

use crate::counting::request::Origin;

/// Everything that was counted up to one instant. Also the wire type: the order and the width of
/// the fields are fixed (see [`crate::protocol::report`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The instant, in nanoseconds of the sender's clock ([`crate::counting::clock`]).
    pub as_of_ns: u64,
    /// Requests that came in.
    pub requests: u64,
    /// Of these, requests that a proxy (activator, gateway) had already counted.
    pub proxied_requests: u64,
    /// The integral of concurrency over time: in-flight requests times nanoseconds.
    pub request_ns: u128,
    /// The same integral over proxied requests alone.
    pub proxied_request_ns: u128,
    /// Requests in flight at the instant.
    pub in_flight: u32,
    /// Of these, proxied requests.
    pub proxied_in_flight: u32,
}

impl Snapshot {
    /// Returns a snapshot with nothing counted yet, at an instant in nanoseconds.
    pub fn starting_at(as_of_ns: u64) -> Self {
        Self { as_of_ns, ..Self::default() }
    }

    /// Advances the time to `now_ns`. An instant before the last change counts as no time at all
    /// (knative/serving, `pkg/queue/stats.go`: a late event moves the counts, not the time).
    pub fn advance(&mut self, now_ns: u64) {
        if let Some(elapsed) = now_ns.checked_sub(self.as_of_ns) {
            let elapsed = u128::from(elapsed);
            self.request_ns = self.request_ns.saturating_add(elapsed * u128::from(self.in_flight));
            self.proxied_request_ns =
                self.proxied_request_ns.saturating_add(elapsed * u128::from(self.proxied_in_flight));
            self.as_of_ns = now_ns;
        }
    }

    /// Counts a request that came in at `now_ns`. A proxied request counts in both columns.
    pub fn request_in(&mut self, now_ns: u64, origin: Origin) {
        self.advance(now_ns);
        self.requests = self.requests.saturating_add(1);
        self.in_flight = self.in_flight.saturating_add(1);
        if origin == Origin::Proxied {
            self.proxied_requests = self.proxied_requests.saturating_add(1);
            self.proxied_in_flight = self.proxied_in_flight.saturating_add(1);
        }
    }

    /// Counts the end, at `now_ns`, of a request that came in earlier.
    pub fn request_out(&mut self, now_ns: u64, origin: Origin) {
        self.advance(now_ns);
        self.in_flight = self.in_flight.saturating_sub(1);
        if origin == Origin::Proxied {
            self.proxied_in_flight = self.proxied_in_flight.saturating_sub(1);
        }
    }

    /// Returns the sum of two parts of one pod, as of the later of the two instants.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        Self {
            as_of_ns: self.as_of_ns.max(other.as_of_ns),
            requests: self.requests.saturating_add(other.requests),
            proxied_requests: self.proxied_requests.saturating_add(other.proxied_requests),
            request_ns: self.request_ns.saturating_add(other.request_ns),
            proxied_request_ns: self.proxied_request_ns.saturating_add(other.proxied_request_ns),
            in_flight: self.in_flight.saturating_add(other.in_flight),
            proxied_in_flight: self.proxied_in_flight.saturating_add(other.proxied_in_flight),
        }
    }

    /// Returns what remains of this snapshot when the totals of `base` are accounted for elsewhere.
    /// The requests in flight stay: they were never accounted for.
    #[must_use]
    pub fn less_totals_of(&self, base: &Self) -> Self {
        Self {
            requests: self.requests.saturating_sub(base.requests),
            proxied_requests: self.proxied_requests.saturating_sub(base.proxied_requests),
            request_ns: self.request_ns.saturating_sub(base.request_ns),
            proxied_request_ns: self.proxied_request_ns.saturating_sub(base.proxied_request_ns),
            ..*self
        }
    }

    /// Returns the totals alone, with nothing in flight: what remains of a worker that is gone.
    #[must_use]
    pub fn finished(&self) -> Self {
        Self { in_flight: 0, proxied_in_flight: 0, ..*self }
    }

    /// Returns the larger of both totals, field by field, as of the later instant, with nothing in
    /// flight.
    #[must_use]
    pub fn ceiling(&self, other: &Self) -> Self {
        Self {
            as_of_ns: self.as_of_ns.max(other.as_of_ns),
            requests: self.requests.max(other.requests),
            proxied_requests: self.proxied_requests.max(other.proxied_requests),
            request_ns: self.request_ns.max(other.request_ns),
            proxied_request_ns: self.proxied_request_ns.max(other.proxied_request_ns),
            in_flight: 0,
            proxied_in_flight: 0,
        }
    }

    /// Returns whether each of its totals is at least that of `other`.
    pub fn holds_totals_of(&self, other: &Self) -> bool {
        self.requests >= other.requests
            && self.proxied_requests >= other.proxied_requests
            && self.request_ns >= other.request_ns
            && self.proxied_request_ns >= other.proxied_request_ns
    }

    /// Returns by how much each field exceeds that of `other`; a field that is smaller counts as
    /// equal.
    pub fn more_than(&self, other: &Self) -> Period {
        let rest = self.less_totals_of(other);
        Period {
            elapsed_ns: self.as_of_ns.saturating_sub(other.as_of_ns),
            requests: rest.requests,
            proxied_requests: rest.proxied_requests,
            request_ns: rest.request_ns,
            proxied_request_ns: rest.proxied_request_ns,
        }
    }

    /// Returns what happened between `earlier` and this snapshot. Returns `None` if any field went
    /// backwards: then the two cannot belong to the same run of the same sender.
    pub fn since(&self, earlier: &Self) -> Option<Period> {
        Some(Period {
            elapsed_ns: self.as_of_ns.checked_sub(earlier.as_of_ns)?,
            requests: self.requests.checked_sub(earlier.requests)?,
            proxied_requests: self.proxied_requests.checked_sub(earlier.proxied_requests)?,
            request_ns: self.request_ns.checked_sub(earlier.request_ns)?,
            proxied_request_ns: self.proxied_request_ns.checked_sub(earlier.proxied_request_ns)?,
        })
    }
}

/// The difference of two snapshots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Period {
    /// Its length in nanoseconds.
    pub elapsed_ns: u64,
    /// Requests that came in during it.
    pub requests: u64,
    /// Of these, proxied requests.
    pub proxied_requests: u64,
    /// The requests in flight times nanoseconds.
    pub request_ns: u128,
    /// The same for proxied requests.
    pub proxied_request_ns: u128,
}

impl Period {
    /// Returns whether nothing happened in the period, however long it was.
    pub fn is_empty(&self) -> bool {
        Self { elapsed_ns: 0, ..*self } == Self::default()
    }

    /// Returns the time-weighted average concurrency; 0 for a period of no length, as in Knative.
    pub fn average(&self) -> f64 {
        ratio(self.request_ns, self.elapsed_ns)
    }

    /// Returns the time-weighted average concurrency of proxied requests.
    pub fn proxied_average(&self) -> f64 {
        ratio(self.proxied_request_ns, self.elapsed_ns)
    }

    /// Returns the average concurrency times 1000, rounded to the nearest integer, because Envoy's
    /// gauges hold integers.
    pub fn average_milli(&self) -> u64 {
        milli(self.request_ns, self.elapsed_ns)
    }

    /// Returns [`Period::average_milli`] of proxied requests.
    pub fn proxied_average_milli(&self) -> u64 {
        milli(self.proxied_request_ns, self.elapsed_ns)
    }

    /// Returns the requests per second times 1000, rounded.
    pub fn requests_per_second_milli(&self) -> u64 {
        milli(u128::from(self.requests) * 1_000_000_000, self.elapsed_ns)
    }

    /// Returns [`Period::requests_per_second_milli`] of proxied requests.
    pub fn proxied_per_second_milli(&self) -> u64 {
        milli(u128::from(self.proxied_requests) * 1_000_000_000, self.elapsed_ns)
    }
}

fn ratio(numerator: u128, denominator: u64) -> f64 {
    if denominator == 0 { 0.0 } else { numerator as f64 / denominator as f64 }
}

fn milli(numerator: u128, denominator: u64) -> u64 {
    if denominator == 0 {
        return 0;
    }
    let denominator = u128::from(denominator);
    let rounded = numerator.saturating_mul(1000).saturating_add(denominator / 2) / denominator;
    u64::try_from(rounded).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    #[test]
    fn a_late_event_moves_the_count_but_not_the_time() {
        let mut snapshot = Snapshot::starting_at(10 * S);
        snapshot.request_in(11 * S, Origin::Direct);
        snapshot.request_in(10 * S + S / 2, Origin::Direct);
        assert_eq!((snapshot.as_of_ns, snapshot.requests, snapshot.in_flight), (11 * S, 2, 2));
        assert_eq!(snapshot.request_ns, 0);
    }

    #[test]
    fn a_period_of_no_length_reports_zero() {
        let mut now = Snapshot::starting_at(S);
        let before = now;
        now.request_in(S, Origin::Direct);
        let period = now.since(&before).unwrap();
        assert_eq!((period.average(), period.average_milli(), period.requests), (0.0, 0, 1));
        assert_eq!(period.requests_per_second_milli(), 0);
    }

    #[test]
    fn a_proxied_request_counts_in_both_columns() {
        let mut snapshot = Snapshot::starting_at(0);
        snapshot.request_in(0, Origin::Proxied);
        snapshot.request_in(0, Origin::Direct);
        snapshot.request_out(3, Origin::Proxied);
        snapshot.request_out(5, Origin::Direct);
        assert_eq!((snapshot.request_ns, snapshot.proxied_request_ns), (8, 3));
        assert_eq!((snapshot.requests, snapshot.proxied_requests), (2, 1));
        assert_eq!((snapshot.in_flight, snapshot.proxied_in_flight), (0, 0));
    }

    #[test]
    fn an_out_without_an_in_does_not_wrap() {
        let mut snapshot = Snapshot::starting_at(0);
        snapshot.request_out(1, Origin::Proxied);
        snapshot.advance(2);
        assert_eq!((snapshot.in_flight, snapshot.request_ns), (0, 0));
    }

    #[test]
    fn counters_that_went_back_are_no_period() {
        let mut later = Snapshot::starting_at(0);
        later.request_in(0, Origin::Direct);
        assert_eq!(Snapshot::starting_at(1).since(&later), None);
        assert_eq!(Snapshot::starting_at(0).since(&Snapshot::starting_at(1)), None);
    }

    #[test]
    fn extremes_saturate() {
        let mut snapshot = Snapshot {
            as_of_ns: 0,
            requests: u64::MAX,
            proxied_requests: u64::MAX,
            request_ns: u128::MAX,
            proxied_request_ns: u128::MAX,
            in_flight: u32::MAX,
            proxied_in_flight: u32::MAX,
        };
        let sum = snapshot.plus(&snapshot);
        assert_eq!(sum, snapshot);
        snapshot.request_in(u64::MAX, Origin::Proxied);
        assert_eq!(snapshot.in_flight, u32::MAX);
        let period = Period { elapsed_ns: 1, requests: u64::MAX, request_ns: u128::MAX, ..Period::default() };
        assert_eq!((period.average_milli(), period.requests_per_second_milli()), (u64::MAX, u64::MAX));
    }
}
