//! One worker's counters per key, for a gateway, where many keys come and go.
//!
//! What happened between two boundaries goes into a [`Batch`]: a few bytes for each key that was
//! active, and none for the others. The worker's *outbox* keeps batches until the leader has
//! collected them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::counting::grid::Grid;
use crate::counting::request::Origin;
use crate::counting::snapshot::Snapshot;
use crate::counting::time::PodNs;
use crate::gateway::key_name::KeyName;

/// A batch: what happened to all keys of one worker between two boundaries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    pub(crate) from_ns: u64,
    pub(crate) until_ns: u64,
    /// The totals of this batch alone, and the requests in flight at its end.
    pub(crate) keys: Vec<(KeyName, Snapshot)>,
}

impl Batch {
    /// Returns the boundary at its end.
    pub fn until_ns(&self) -> u64 {
        self.until_ns
    }
}

/// One worker's counters per key.
#[derive(Clone, Debug)]
pub struct KeyedRecorder {
    grid: Grid,
    closed_ns: u64,
    next_boundary_ns: u64,
    /// The counts since the last closed boundary.
    keys: BTreeMap<KeyName, Snapshot>,
    outbox: Vec<Batch>,
}

impl KeyedRecorder {
    /// Returns a recorder that has counted nothing yet.
    pub fn new(now: PodNs, grid: Grid) -> Self {
        let next_boundary_ns = grid.after(now.0);
        Self { grid, closed_ns: now.0, next_boundary_ns, keys: BTreeMap::new(), outbox: Vec::new() }
    }

    /// Returns whether a key is being tracked here.
    pub fn tracks(&self, key: &KeyName) -> bool {
        self.keys.contains_key(key)
    }

    /// Counts a request that came in.
    pub fn request_in(&mut self, key: &KeyName, now: PodNs, origin: Origin) {
        self.advance(now);
        match self.keys.get_mut(key) {
            Some(snapshot) => snapshot.request_in(now.0, origin),
            None => {
                let mut snapshot = Snapshot::starting_at(now.0);
                snapshot.request_in(now.0, origin);
                self.keys.insert(key.clone(), snapshot);
            }
        }
    }

    /// Counts the end of a request that came in here.
    pub fn request_out(&mut self, key: &KeyName, now: PodNs, origin: Origin) {
        self.advance(now);
        if let Some(snapshot) = self.keys.get_mut(key) {
            snapshot.request_out(now.0, origin);
        }
    }

    /// Advances the time. At a boundary, the counts before it go into the outbox. A worker that is
    /// late by several periods puts the last of them into a batch of its own: that batch is as new
    /// as those of the other workers.
    pub fn advance(&mut self, now: PodNs) {
        if now.0 >= self.next_boundary_ns {
            let newest_ns = self.grid.at_or_before(now.0);
            let before_ns = newest_ns.saturating_sub(self.grid.period_ns);
            if before_ns > self.closed_ns {
                self.close(before_ns);
            }
            self.close(newest_ns);
        }
    }

    /// Switches to other boundaries.
    pub fn set_grid(&mut self, grid: Grid) {
        if grid != self.grid {
            self.grid = grid;
            self.next_boundary_ns = grid.after(self.closed_ns);
        }
    }

    /// Ends this worker: everything up to now goes into the outbox, with nothing in flight.
    pub fn end(&mut self, now: PodNs) {
        self.close(now.0.max(self.closed_ns));
        if let Some(batch) = self.outbox.last_mut() {
            for (_, delta) in &mut batch.keys {
                *delta = delta.finished();
            }
        }
        self.keys.clear();
    }

    /// Drops the batches that the leader has collected.
    pub fn drop_collected(&mut self, until_ns: u64) {
        self.outbox.retain(|batch| batch.until_ns > until_ns);
    }

    /// Returns the grid in use.
    pub fn grid(&self) -> Grid {
        self.grid
    }

    /// Returns the last closed boundary, or the time at which this recorder began.
    pub fn closed_ns(&self) -> u64 {
        self.closed_ns
    }

    /// Returns the batches that are still to be collected, oldest first.
    pub fn outbox(&self) -> &[Batch] {
        &self.outbox
    }

    fn close(&mut self, boundary_ns: u64) {
        let mut keys = Vec::new();
        self.keys.retain(|key, snapshot| {
            snapshot.advance(boundary_ns);
            keys.push((key.clone(), *snapshot));
            // The requests in flight stay; the totals start again at zero.
            *snapshot = snapshot.less_totals_of(snapshot);
            snapshot.in_flight > 0
        });
        self.outbox.push(Batch { from_ns: self.closed_ns, until_ns: boundary_ns, keys });
        self.closed_ns = boundary_ns;
        self.next_boundary_ns = self.grid.after(boundary_ns);
    }
}
