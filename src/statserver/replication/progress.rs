//! How far a server is in the log.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::replication::stream_id::StreamId;

/// How far a server is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// How often the store has lost entries that were applied.
    pub epoch: u64,
    /// How many entries were applied.
    pub applied: u64,
    /// The last of them.
    pub id: StreamId,
    /// Its server, and its number there.
    pub writer: (u64, u64),
    /// The log's time, in nanoseconds.
    pub log_ns: u64,
    /// When the last tick was due.
    pub tick_ns: u64,
    /// Ticks that were due.
    pub ticks: u64,
    /// The last number of each server, and when it came.
    pub numbers: BTreeMap<u64, (u64, u64)>,
}

/// How long the number of a server's last entry is remembered, by the log's time.
pub const REMEMBER_NS: u64 = 3_600_000_000_000;

impl Progress {
    /// Returns whether all entries that another state has were applied here.
    pub fn covers(&self, other: &Self) -> bool {
        other.numbers.iter().all(|(server, (number, seen_ns))| match self.numbers.get(server) {
            Some((last, _)) => last >= number,
            None => self.log_ns.saturating_sub(*seen_ns) > REMEMBER_NS,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_covers_those_that_have_no_entry_more() {
        let with = |numbers: &[(u64, u64)]| Progress {
            log_ns: 10 * REMEMBER_NS,
            numbers: numbers.iter().map(|(server, number)| (*server, (*number, 10 * REMEMBER_NS))).collect(),
            ..Progress::default()
        };
        let one = with(&[(1, 5), (2, 7)]);
        assert!(one.covers(&one) && one.covers(&with(&[])) && one.covers(&with(&[(1, 5), (2, 6)])));
        assert!(!one.covers(&with(&[(1, 6)])) && !one.covers(&with(&[(3, 1)])));
        let mut long_gone = with(&[(3, 1)]);
        long_gone.numbers.insert(3, (1, 0));
        assert!(one.covers(&long_gone));
    }
}
