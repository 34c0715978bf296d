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
