//! What one server does for all, by a lease: ticks, and snapshots. And what all say of themselves to
//! each other.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::time::{MissedTickBehavior, interval};
use tracing::{info, warn};

use crate::os::clock::wall_time;
use crate::os::lock::lock;
use crate::replication::entry::Change;
use crate::replication::format::{MAX_FORMAT, MIN_FORMAT};
use crate::replication::replica::{Link, Replica, common_version};
use crate::replication::snapshot::Snapshot;
use crate::replication::valkey::{Connection, StoreError};

/// The time between two renewals of the lease, of which a tick is every second.
const PERIOD: Duration = Duration::from_millis(500);
/// The longest time between two snapshots, if anything changes.
const SNAPSHOT_PERIOD: Duration = Duration::from_secs(30);
/// So many bytes of the log make a snapshot, too. The log is trimmed up to the snapshot before the
/// newest, so it has up to twice as many.
const SNAPSHOT_BYTES: u64 = 128 << 20;
/// A server that has not said anything new for so long is gone.
const GONE_AFTER: Duration = Duration::from_secs(5);
/// What it said is removed after so long.
const REMOVED_AFTER: Duration = Duration::from_secs(60);

/// What a server says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Word {
    /// The oldest and the newest version that it reads.
    formats: (u8, u8),
    /// Its epoch.
    pub epoch: u64,
    /// How many entries it has applied.
    pub applied: u64,
    /// Whether the store has lost some of them.
    pub has_lost: bool,
    /// Differs from the word before.
    beat: u64,
}

impl Word {
    /// Reads a word; `None` if it is none, or one of a version that says something else.
    pub fn read(text: &str) -> Option<Self> {
        serde_json::from_str(text).ok()
    }
}

/// Says how far this server is, and returns what all say.
///
/// # Errors
/// [`StoreError`].
pub async fn say(
    replica: &Replica,
    connection: &Connection,
    has_lost: bool,
) -> Result<HashMap<u64, String>, StoreError> {
    let (epoch, applied) = {
        let machine = lock(&replica.machine);
        (machine.progress().epoch, machine.progress().applied)
    };
    // Any clock will do: nobody compares it with his own.
    let beat = wall_time().as_micros() as u64;
    let word = Word { formats: (MIN_FORMAT, MAX_FORMAT), epoch, applied, has_lost, beat };
    let text = serde_json::to_string(&word).unwrap_or_default();
    connection.exchange(replica.server, &text).await
}

/// Says how far this server is although it has no link, so that others take it into account.
///
/// # Errors
/// [`StoreError`].
pub async fn exchange(replica: &Replica) -> Result<(), StoreError> {
    let connection = replica.valkey.connect().await?;
    say(replica, &connection, false).await.map(drop)
}

/// Returns a name for a snapshot that no other one has, and the time now.
pub fn snapshot_name(replica: &Replica, snapshot: &Snapshot) -> (String, u64) {
    let progress = &snapshot.progress;
    let name = format!("{}-{}-{}", progress.epoch, progress.applied, replica.server);
    (name, wall_time().as_secs())
}

/// The servers, by what they said last and when it changed.
#[derive(Default)]
struct Members(HashMap<u64, (String, Instant)>);

impl Members {
    /// Notes what all say. Returns those that are long gone.
    fn note(&mut self, words: HashMap<u64, String>) -> Vec<u64> {
        self.0.retain(|server, _| words.contains_key(server));
        for (server, word) in words {
            match self.0.get_mut(&server) {
                Some((last, _)) if *last == word => {}
                _ => {
                    self.0.insert(server, (word, Instant::now()));
                }
            }
        }
        let is_old = |at: &Instant| at.elapsed() > REMOVED_AFTER;
        self.0.iter().filter(|(_, (_, at))| is_old(at)).map(|(server, _)| *server).collect()
    }

    /// Returns when each server last said something new.
    fn heard(&self) -> HashMap<u64, Instant> {
        self.0.iter().map(|(server, (_, at))| (*server, *at)).collect()
    }

    /// Returns the versions that live servers read.
    fn formats(&self) -> impl Iterator<Item = (u8, u8)> {
        let live = self.0.values().filter(|(_, at)| at.elapsed() < GONE_AFTER);
        live.filter_map(|(word, _)| Word::read(word)).map(|word| word.formats)
    }
}

/// Leads whenever the lease is this server's.
pub async fn run(replica: Arc<Replica>) {
    let mut periods = interval(PERIOD);
    periods.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut members, mut is_second, mut leads) = (Members::default(), false, false);
    let mut saved = Saved::new();
    loop {
        periods.tick().await;
        is_second = !is_second;
        let link = replica.link.borrow().clone();
        let holds = match link.clone() {
            Some(link) if !replica.is_resigning() => {
                one_period(&replica, link, &mut members, is_second).await
            }
            _ => false,
        };
        if holds != leads {
            leads = holds;
            info!(leads, "this server ticks and writes snapshots for all");
            replica.metrics().leads.set(leads.into());
            if leads {
                saved = Saved::new();
                seed(&replica);
            }
        }
        if leads && let Some(link) = link {
            if is_second {
                // One that is too early does nothing. If there is no room for it, there is none for
                // reports either.
                let _ = replica.enqueue(Change::Tick, 0, None);
            }
            saved.save_if_due(&replica, link);
        }
    }
}

/// Renews the lease, and every second time exchanges words. Returns whether the lease is this server's.
async fn one_period(replica: &Replica, link: Link, members: &mut Members, is_second: bool) -> bool {
    let Link { number, connection } = link;
    let work = async {
        let holds = connection.take_lease(replica.server).await?;
        if is_second {
            let gone = members.note(say(replica, &connection, false).await?);
            *lock(&replica.peers) = members.heard();
            if holds {
                for server in gone {
                    connection.forget_member(server).await?;
                }
            }
            let version = common_version(members.formats());
            if replica.version.swap(version, Ordering::Relaxed) != version {
                info!(version, "the version of entries and snapshots that this server writes");
            }
            if let Some(header) = connection.snapshot_header().await? {
                replica.metrics().snapshot_timestamp_seconds.set(header.unix_seconds as f64);
            }
        }
        Ok::<bool, StoreError>(holds)
    };
    work.await.unwrap_or_else(|error| {
        warn!(%error, "cannot renew the lease in the store");
        replica.break_link(number);
        false
    })
}

/// Has an empty state begin with the settings of a file.
fn seed(replica: &Replica) {
    if lock(&replica.machine).progress().applied > 0 {
        return;
    }
    for (name, json) in &replica.seeds {
        let text = json.to_string();
        let bytes = text.len();
        if replica.enqueue(Change::SetSettings(name.clone(), text), bytes, None).is_err() {
            warn!(key = %name, "no room for the settings of a key");
        }
    }
}

/// The last snapshot that this server saved while it led.
struct Saved {
    at: Instant,
    is_saving: Arc<AtomicBool>,
    applied: Arc<std::sync::atomic::AtomicU64>,
}

impl Saved {
    fn new() -> Self {
        Self { at: Instant::now(), is_saving: Arc::default(), applied: Arc::default() }
    }

    fn save_if_due(&mut self, replica: &Arc<Replica>, link: Link) {
        let is_due = self.at.elapsed() >= SNAPSHOT_PERIOD
            || replica.log_bytes.load(Ordering::Relaxed) >= SNAPSHOT_BYTES;
        let applied = lock(&replica.machine).progress().applied;
        let is_new = applied > self.applied.load(Ordering::Relaxed);
        if !is_due || !is_new || self.is_saving.swap(true, Ordering::Relaxed) {
            return;
        }
        self.at = Instant::now();
        replica.log_bytes.store(0, Ordering::Relaxed);
        let (replica, is_saving) = (Arc::clone(replica), Arc::clone(&self.is_saving));
        let saved_applied = Arc::clone(&self.applied);
        tokio::spawn(async move {
            match save(&replica, &link).await {
                Ok(applied) => saved_applied.store(applied, Ordering::Relaxed),
                Err(reason) => warn!(reason, "cannot write a snapshot into the store"),
            }
            is_saving.store(false, Ordering::Relaxed);
        });
    }
}

/// Returns how many entries are in the snapshot.
async fn save(replica: &Arc<Replica>, link: &Link) -> Result<u64, String> {
    let (machine, version) = (Arc::clone(&replica.machine), replica.version.load(Ordering::Relaxed));
    let began = Instant::now();
    let saved = tokio::task::spawn_blocking(move || lock(&machine).save(version));
    let snapshot = saved.await.map_err(|error| error.to_string())??;
    let made = began.elapsed();
    let (name, unix_seconds) = snapshot_name(replica, &snapshot);
    let replaced = link.connection.replace_snapshot(&snapshot, &name, unix_seconds).await;
    if replaced.map_err(|error| error.to_string())? {
        let bytes: usize = snapshot.pieces.iter().map(Vec::len).sum();
        let (applied, pieces) = (snapshot.progress.applied, snapshot.pieces.len());
        info!(applied, bytes, pieces, ?made, after = ?began.elapsed(), "wrote a snapshot into the store");
    }
    Ok(snapshot.progress.applied)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_other_versions_are_none() {
        let word = Word { formats: (1, 2), epoch: 3, applied: 4, has_lost: true, beat: 5 };
        assert_eq!(Word::read(&serde_json::to_string(&word).unwrap()), Some(word));
        assert_eq!(Word::read("{}"), None);
        assert_eq!(Word::read("x"), None);
    }
}
