//! What the tasks of a server with a shared state share, and how changes are submitted to it.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use inflight_stats::protocol::key_name::KeyName;
use serde_json::Value;
use tokio::sync::{Notify, oneshot, watch};
use tracing::warn;

use crate::forward::forwarder::Forwarder;
use crate::keys::key_table::KeyTable;
use crate::keys::settings_store::{SetError, SettingsStore};
use crate::os::lock::lock;
use crate::replication::entry::Change;
use crate::replication::format::{MAX_FORMAT, MIN_FORMAT};
use crate::replication::log_clock::LogClock;
use crate::replication::machine::{Machine, Outcome};
use crate::replication::stream_id::StreamId;
use crate::replication::valkey::{Connection, StoreError, Valkey};
use crate::telemetry::metrics::Metrics;
use crate::telemetry::store_metrics::StoreMetrics;

/// Changes that wait to be appended may have so many bytes.
const MAX_WAITING_BYTES: usize = 16 << 20;
/// What a change takes besides its bytes.
const CHANGE_BYTES: usize = 256;
/// How long a caller waits until its change is applied.
const MAX_WAIT: Duration = Duration::from_secs(4);

/// The store is away, or too much waits for it. The change may be made or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unavailable;

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the store of the shared state (--store) is away; try again later")
    }
}

impl std::error::Error for Unavailable {}

/// Whoever waits for what a change did.
pub type Waiting = Option<oneshot::Sender<Outcome>>;

/// A change that waits to be appended.
pub struct Pending {
    /// The change.
    pub change: Change,
    /// Who waits for it.
    pub waiting: Waiting,
    /// Its part of the memory that may wait.
    pub bytes: usize,
}

/// The changes that wait.
#[derive(Default)]
pub struct Queue {
    /// In order.
    pub pending: VecDeque<Pending>,
    /// Their bytes.
    pub bytes: usize,
    /// Bytes of an entry that is being appended.
    pub appending_bytes: usize,
    /// When the first of them came.
    pub since: Option<Instant>,
}

/// A connection over which the log can be appended to. The server has applied all that the log had.
#[derive(Clone)]
pub struct Link {
    /// Which of the connections that the server ever had.
    pub number: u64,
    /// It.
    pub connection: Connection,
}

/// A server's part of a shared state.
pub struct Replica {
    /// The server, by a random number.
    pub server: u64,
    /// The store.
    pub valkey: Valkey,
    /// The state.
    pub machine: Arc<Mutex<Machine>>,
    /// The log's time.
    pub clock: LogClock,
    /// The link, while there is one.
    pub link: watch::Sender<Option<Link>>,
    /// Wakes the follower when a link has failed.
    pub broken: Notify,
    /// Changes that wait.
    pub queue: Mutex<Queue>,
    /// Wakes the appender.
    pub filled: Notify,
    /// Who waits for entries that were appended, by the entries' numbers.
    pub waiting: Mutex<BTreeMap<u64, Vec<Waiting>>>,
    /// The number of the last own entry that was applied.
    pub applied_own: AtomicU64,
    /// The version that is written.
    pub version: AtomicU8,
    /// Bytes of the log that were applied since the newest snapshot.
    pub log_bytes: AtomicU64,
    /// An entry that this server cannot read: it waits for a snapshot that has it.
    pub unreadable: Mutex<Option<StreamId>>,
    /// Whether the state has entries that the store has lost, and some of those that came after them:
    /// an epoch must begin, whatever the log has.
    pub is_ahead: AtomicBool,
    /// When each of the other servers last said something new.
    pub peers: Mutex<HashMap<u64, Instant>>,
    /// When the store was last read from.
    pub contact: Mutex<Instant>,
    /// What a new log begins with.
    pub seeds: Vec<(KeyName, Value)>,
    /// Where stats are forwarded to.
    pub forwarder: Option<Arc<Forwarder>>,
    keys: Arc<KeyTable>,
    settings: Arc<SettingsStore>,
    metrics: Arc<Metrics>,
    is_caught_up: AtomicBool,
    is_resigning: AtomicBool,
}

impl Replica {
    /// A server that has not reached its store yet.
    pub fn new(
        valkey: Valkey,
        (keys, settings): (&Arc<KeyTable>, &Arc<SettingsStore>),
        seeds: Vec<(KeyName, Value)>,
        forwarder: Option<Arc<Forwarder>>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            server: random(),
            valkey,
            machine: Arc::new(Mutex::new(Machine::new(Arc::clone(keys), Arc::clone(settings)))),
            clock: LogClock::default(),
            link: watch::Sender::new(None),
            broken: Notify::new(),
            queue: Mutex::default(),
            filled: Notify::new(),
            waiting: Mutex::default(),
            applied_own: AtomicU64::new(0),
            version: AtomicU8::new(MIN_FORMAT),
            log_bytes: AtomicU64::new(0),
            unreadable: Mutex::new(None),
            is_ahead: AtomicBool::new(false),
            peers: Mutex::default(),
            contact: Mutex::new(Instant::now()),
            seeds,
            forwarder,
            keys: Arc::clone(keys),
            settings: Arc::clone(settings),
            metrics,
            is_caught_up: AtomicBool::new(false),
            is_resigning: AtomicBool::new(false),
        }
    }

    /// Returns the metrics.
    pub fn metrics(&self) -> &StoreMetrics {
        self.metrics.store()
    }

    /// Returns whether the server knows all that the log had when it last reached it.
    pub fn is_caught_up(&self) -> bool {
        self.is_caught_up.load(Ordering::Relaxed)
    }

    /// Notes whether the server knows all that the log has.
    pub fn set_caught_up(&self, is_caught_up: bool) {
        self.is_caught_up.store(is_caught_up, Ordering::Relaxed);
    }

    /// Returns a key's settings as they are submitted.
    ///
    /// # Errors
    /// They are not valid.
    pub fn check_settings(&self, json: Value) -> Result<Value, SetError> {
        self.settings.check(&self.keys, json)
    }

    /// Submits a change of so many bytes, and returns what it did once this server has applied it.
    ///
    /// # Errors
    /// [`Unavailable`]: the store is away, or slow.
    pub async fn submit(&self, change: Change, bytes: usize) -> Result<Outcome, Unavailable> {
        if self.link.borrow().is_none() {
            return Err(Unavailable);
        }
        let received = Instant::now();
        let outcome = tokio::time::timeout(MAX_WAIT, self.submit_patiently(change, bytes)).await;
        let outcome = outcome.map_err(|_| Unavailable)??;
        self.metrics().lag_seconds.observe(received.elapsed().as_secs_f64());
        Ok(outcome)
    }

    /// The same for a change that nobody would submit again: waits as long as the appender tries.
    ///
    /// # Errors
    /// [`Unavailable`]
    pub async fn submit_patiently(&self, change: Change, bytes: usize) -> Result<Outcome, Unavailable> {
        let (sender, receiver) = oneshot::channel();
        self.enqueue(change, bytes, Some(sender))?;
        receiver.await.map_err(|_| Unavailable)
    }

    /// Has a change appended. Nobody waits for it, unless `waiting` does.
    ///
    /// # Errors
    /// [`Unavailable`]: too much waits already.
    pub fn enqueue(&self, change: Change, bytes: usize, waiting: Waiting) -> Result<(), Unavailable> {
        let bytes = bytes + CHANGE_BYTES;
        let mut queue = lock(&self.queue);
        if queue.bytes + queue.appending_bytes + bytes > MAX_WAITING_BYTES {
            return Err(Unavailable);
        }
        queue.bytes += bytes;
        queue.since.get_or_insert_with(Instant::now);
        queue.pending.push_back(Pending { change, waiting, bytes });
        drop(queue);
        self.filled.notify_one();
        Ok(())
    }

    /// Notes that a link has failed. Another one is made, and the log compared with the state.
    pub fn break_link(&self, number: u64) {
        let broke = self.link.send_if_modified(|link| {
            let is_it = link.as_ref().is_some_and(|link| link.number == number);
            if is_it {
                *link = None;
            }
            is_it
        });
        if broke {
            self.broken.notify_one();
        }
    }

    /// Tells who waits for an own entry what it did.
    pub fn deliver(&self, number: u64, outcomes: Vec<Outcome>) {
        self.applied_own.fetch_max(number, Ordering::Release);
        // Those of entries before it, if any, wait for nothing any more.
        let mut waiting = lock(&self.waiting);
        let later = waiting.split_off(&(number + 1));
        let done = std::mem::replace(&mut *waiting, later);
        drop(waiting);
        let of_entry = done.into_iter().find(|(of, _)| *of == number).map(|(_, waiting)| waiting);
        for (waiting, outcome) in of_entry.into_iter().flatten().zip(outcomes) {
            if let Some(waiting) = waiting {
                let _ = waiting.send(outcome);
            }
        }
    }

    /// Notes that the store was read from.
    pub fn note_contact(&self) {
        *lock(&self.contact) = Instant::now();
    }

    /// Notes for how long the store was not read from: its keys become stale by that.
    pub fn note_silence(&self) {
        let silence = lock(&self.contact).elapsed();
        self.metrics().silence_seconds.set(silence.as_secs_f64());
        self.keys.set_store_silence(silence);
    }

    /// Returns whether this server gives the lead to another one.
    pub fn is_resigning(&self) -> bool {
        self.is_resigning.load(Ordering::Relaxed)
    }

    /// Gives the lead to another server, and takes it no more: this one ends.
    pub async fn resign(&self) {
        self.is_resigning.store(true, Ordering::Relaxed);
        self.tell(async |connection: &Connection| connection.release_lease(self.server).await).await;
    }

    /// Has the other servers forget this one.
    pub async fn leave(&self) {
        self.tell(async |connection: &Connection| connection.forget_member(self.server).await).await;
    }

    async fn tell(&self, tell: impl AsyncFnOnce(&Connection) -> Result<(), StoreError>) {
        let Some(Link { connection, .. }) = self.link.borrow().clone() else { return };
        if let Ok(Err(error)) = tokio::time::timeout(Duration::from_secs(1), tell(&connection)).await {
            warn!(%error, "could not tell the store that this server ends");
        }
    }
}

/// The version that may be written, by the ranges that live servers announce.
pub fn common_version(ranges: impl IntoIterator<Item = (u8, u8)>) -> u8 {
    ranges.into_iter().map(|(_, max)| max).min().unwrap_or(MAX_FORMAT).clamp(MIN_FORMAT, MAX_FORMAT)
}

/// A number that no other server has.
fn random() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    // 63 bits: scripts and readers of JSON may have no more than a signed number.
    RandomState::new().hash_one((std::process::id(), Instant::now())) >> 1 | 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_server_that_lives_decides_the_version() {
        assert_eq!(common_version([]), MAX_FORMAT);
        assert_eq!(common_version([(1, 1), (1, 200)]), 1);
        assert_eq!(common_version([(200, 200)]), MAX_FORMAT);
        assert_eq!(common_version([(0, 0)]), MIN_FORMAT);
    }
}
