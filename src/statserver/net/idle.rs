//! The connections that are idle, the first of which is closed when another one needs its permit.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use tokio_util::sync::CancellationToken;

use crate::os::lock::lock;

/// The connections that are between two requests, in the order in which they became idle. If all
/// permits are taken, the first of them is closed: every pod keeps a connection open, and more pods
/// than permits must not keep each other out, nor a probe.
#[derive(Debug, Default)]
pub struct IdleConnections(Mutex<Idle>);

#[derive(Debug, Default)]
struct Idle {
    next_number: u64,
    to_close: BTreeMap<u64, CancellationToken>,
}

/// An idle connection's entry, which is removed on drop.
#[derive(Debug)]
pub struct IdleEntry {
    number: u64,
    connections: Arc<IdleConnections>,
}

impl IdleConnections {
    /// Adds a connection, which `close` closes.
    pub fn add(self: &Arc<Self>, close: CancellationToken) -> IdleEntry {
        let mut idle = lock(&self.0);
        let number = idle.next_number;
        idle.next_number += 1;
        idle.to_close.insert(number, close);
        IdleEntry { number, connections: Arc::clone(self) }
    }

    /// Closes the connection that has been idle for longest. Returns whether there was one.
    pub fn close_oldest(&self) -> bool {
        let oldest = lock(&self.0).to_close.pop_first();
        oldest.inspect(|(_, close)| close.cancel()).is_some()
    }
}

impl Drop for IdleEntry {
    fn drop(&mut self) {
        lock(&self.connections.0).to_close.remove(&self.number);
    }
}
