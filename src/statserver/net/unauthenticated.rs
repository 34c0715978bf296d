//! The connections over which nobody has shown a token or a certificate yet.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::os::lock::lock;

/// How old a connection must be to be evicted for another one.
const GRACE: Duration = Duration::from_secs(2);

/// A limited number of unauthenticated connections. One too many waits, and then evicts the oldest:
/// a client with a token shows it with its first request, in much less than [`GRACE`].
#[derive(Debug)]
pub struct UnauthenticatedConnections {
    max: usize,
    open: Mutex<Open>,
    left: Notify,
}

#[derive(Debug, Default)]
struct Open {
    next_number: u64,
    /// In order of arrival.
    by_number: BTreeMap<u64, (Instant, CancellationToken)>,
}

/// One of them, until it is dropped.
#[derive(Debug)]
pub struct UnauthenticatedConnection {
    number: u64,
    evicted: CancellationToken,
    connections: Arc<UnauthenticatedConnections>,
}

impl UnauthenticatedConnections {
    /// At most so many.
    pub fn new(max: usize) -> Self {
        Self { max, open: Mutex::default(), left: Notify::new() }
    }

    /// Admits a connection, if need be when another one can be evicted. Returns whether one was;
    /// the caller counts these.
    pub async fn admit(self: &Arc<Self>) -> (UnauthenticatedConnection, bool) {
        loop {
            let left = self.left.notified();
            let until = {
                let mut open = lock(&self.open);
                let mut evicts = false;
                if open.by_number.len() >= self.max
                    && let Some(oldest) = open.by_number.first_entry()
                    && oldest.get().0.elapsed() >= GRACE
                {
                    oldest.remove().1.cancel();
                    evicts = true;
                }
                if open.by_number.len() < self.max {
                    let (number, evicted) = (open.next_number, CancellationToken::new());
                    open.next_number += 1;
                    open.by_number.insert(number, (Instant::now(), evicted.clone()));
                    let connections = Arc::clone(self);
                    return (UnauthenticatedConnection { number, evicted, connections }, evicts);
                }
                open.by_number.first_key_value().map_or_else(Instant::now, |(_, (since, _))| *since + GRACE)
            };
            let _ = timeout_at(until, left).await;
        }
    }
}

impl UnauthenticatedConnection {
    /// Resolves when it is evicted for another one.
    pub async fn evicted(&self) {
        self.evicted.cancelled().await;
    }

    /// Returns what is cancelled when it is evicted.
    pub fn eviction(&self) -> CancellationToken {
        self.evicted.clone()
    }
}

impl Drop for UnauthenticatedConnection {
    fn drop(&mut self) {
        if lock(&self.connections.open).by_number.remove(&self.number).is_some() {
            self.connections.left.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stranger_too_many_takes_the_place_of_the_oldest_after_a_while() {
        let connections = Arc::new(UnauthenticatedConnections::new(2));
        let (first, _) = connections.admit().await;
        let (second, evicts) = connections.admit().await;
        assert!(!evicts);
        let began = Instant::now();
        let (_third, evicts) = connections.admit().await;
        assert!(evicts && began.elapsed() >= GRACE);
        first.evicted().await;
        // One that ends lets another in at once.
        drop(second);
        let (_fourth, evicts) = connections.admit().await;
        assert!(!evicts);
    }
}
