//! Two kinds of time, as two types, so that neither can be passed for the other. The instants in a
//! [`Snapshot`](crate::counting::snapshot::Snapshot) are the pod's time. As wire data they are
//! plain numbers.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A reading of the process's monotonic clock, in nanoseconds. It is the same for all threads of
/// one Envoy, and means nothing outside that process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MonotonicNs(pub u64);

/// An instant of the pod's time ([`crate::counting::clock`]), in nanoseconds since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PodNs(pub u64);

/// Returns a duration in nanoseconds; the largest number for one that is longer than 500 years.
pub fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl MonotonicNs {
    /// Returns the nanoseconds from `earlier` to this reading; 0 if `earlier` is later.
    pub fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// Returns the reading that is `nanoseconds` later.
    #[must_use]
    pub fn plus(self, nanoseconds: u64) -> Self {
        Self(self.0.saturating_add(nanoseconds))
    }
}
