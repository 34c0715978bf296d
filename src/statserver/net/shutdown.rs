//! The orderly shutdown: a signal starts it, the listeners close after a delay, and open
//! connections finish.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TrackedFuture;

/// Starts the shutdown. Its [`DrainWatcher`]s follow it.
#[derive(Debug)]
pub struct DrainTrigger(DrainWatcher);

/// Follows the shutdown, and has it wait for connections.
#[derive(Clone, Debug)]
pub struct DrainWatcher {
    is_draining: Arc<AtomicBool>,
    closing: CancellationToken,
    connections: TaskTracker,
}

/// Some connections were not finished in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeadlineExceeded;

/// Returns the two ends of a shutdown.
pub fn new_drain() -> (DrainTrigger, DrainWatcher) {
    let watcher = DrainWatcher {
        is_draining: Arc::default(),
        closing: CancellationToken::new(),
        connections: TaskTracker::new(),
    };
    (DrainTrigger(watcher.clone()), watcher)
}

impl DrainTrigger {
    /// Has the server found not ready from now on, closes listeners and idle connections after
    /// `delay`, and waits for the other connections for as long as `deadline`.
    ///
    /// # Errors
    /// [`DeadlineExceeded`].
    pub async fn drain(self, delay: Duration, deadline: Duration) -> Result<(), DeadlineExceeded> {
        let Self(DrainWatcher { is_draining, closing, connections }) = self;
        is_draining.store(true, Ordering::Relaxed);
        tokio::time::sleep(delay).await;
        closing.cancel();
        connections.close();
        tokio::time::timeout(deadline, connections.wait()).await.map_err(|_| DeadlineExceeded)
    }
}

impl DrainWatcher {
    /// Returns whether the shutdown has begun.
    pub fn is_draining(&self) -> bool {
        self.is_draining.load(Ordering::Relaxed)
    }

    /// Resolves when listeners and connections have to close.
    pub async fn closing(&self) {
        self.closing.cancelled().await;
    }

    /// Runs a connection in a task that the shutdown waits for.
    pub fn spawn(&self, connection: impl Future<Output = ()> + Send + 'static) {
        self.connections.spawn(connection);
    }

    /// Returns a connection's future that the shutdown waits for.
    pub fn track<F: Future>(&self, connection: F) -> TrackedFuture<F> {
        self.connections.track_future(connection)
    }
}

/// Resolves on SIGTERM or SIGINT.
pub async fn terminated() {
    let wait = |kind| async move {
        match signal(kind) {
            Ok(mut signals) => {
                signals.recv().await;
            }
            // Without a handler the signal ends the process by itself.
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        () = wait(SignalKind::terminate()) => {}
        () = wait(SignalKind::interrupt()) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_shutdown_waits_for_connections_and_not_for_ever() {
        let (trigger, watcher) = new_drain();
        let connection = watcher.clone();
        watcher.spawn(async move { connection.closing().await });
        assert!(!watcher.is_draining());
        assert_eq!(trigger.drain(Duration::ZERO, Duration::from_secs(60)).await, Ok(()));
        assert!(watcher.is_draining());

        let (trigger, watcher) = new_drain();
        watcher.spawn(std::future::pending());
        let drained = trigger.drain(Duration::ZERO, Duration::from_millis(10)).await;
        assert_eq!(drained, Err(DeadlineExceeded));
    }
}
