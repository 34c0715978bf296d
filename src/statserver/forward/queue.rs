//! The stats that wait to be forwarded: a bounded queue that drops the oldest.

use std::collections::VecDeque;

/// Maximum number of stats that wait, and of bytes that they take: some seconds of a large cluster.
const MAX_STATS: usize = 100_000;
pub(super) const MAX_BYTES: usize = 16 << 20;
/// What a stat takes beside its bytes: in the queue, and for the allocator.
const OVERHEAD_BYTES: usize = 32;

/// A stat as it is sent: encoded as a frame with it alone. Frames one after the other are a frame
/// of all their stats, and nothing of the frame that it was received in is kept.
pub type EncodedStat = Box<[u8]>;

/// The stats that wait, oldest first.
#[derive(Default)]
pub struct ForwardQueue {
    stats: VecDeque<EncodedStat>,
    bytes: usize,
}

impl ForwardQueue {
    /// Adds a stat as the last.
    pub fn push_back(&mut self, stat: EncodedStat) {
        self.bytes += stat.len() + OVERHEAD_BYTES;
        self.stats.push_back(stat);
    }

    /// Adds a stat as the first.
    pub fn push_front(&mut self, stat: EncodedStat) {
        self.bytes += stat.len() + OVERHEAD_BYTES;
        self.stats.push_front(stat);
    }

    /// Takes the first stat.
    pub fn pop_front(&mut self) -> Option<EncodedStat> {
        let stat = self.stats.pop_front()?;
        self.bytes -= stat.len() + OVERHEAD_BYTES;
        Some(stat)
    }

    /// Drops the oldest of too many. Returns how many were dropped.
    pub fn drop_excess(&mut self) -> u64 {
        let mut dropped = 0;
        while self.stats.len() > MAX_STATS || self.bytes > MAX_BYTES {
            dropped += u64::from(self.pop_front().is_some());
        }
        dropped
    }

    /// Returns the memory that the stats take.
    #[cfg(test)]
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}
