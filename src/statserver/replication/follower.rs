//! Reads the log, and applies it. It also makes the link to the store, compares the log with the
//! state each time, and joins, catches up or recovers accordingly.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::time::sleep;
use tracing::{error, info, warn};

use crate::os::clock::wall_time;
use crate::os::lock::lock;
use crate::replication::entry::{Change, Entry};
use crate::replication::format::FormatError;
use crate::replication::leader::{self, Word};
use crate::replication::machine::LaterEpoch;
use crate::replication::replica::{Link, Replica};
use crate::replication::stream_id::StreamId;
use crate::replication::valkey::{Connection, SnapshotHeader, StoreError};

/// Entries that are read at once: of up to 256 KiB each.
const READ_COUNT: usize = 64;
/// The pause before the store is tried again.
const PAUSE: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(1)];
/// A server that starts waits so long for a sign of another one, which knows the log's time.
const SIGN_OF_LIFE: Duration = Duration::from_secs(4);
/// How long the servers tell each other how far they are before one of them recovers the state.
const ELECTION: Duration = Duration::from_millis(1_500);
const ELECTION_STEP: Duration = Duration::from_millis(300);

/// Why the log cannot be followed for now.
#[derive(Debug)]
enum Failure {
    Store(StoreError),
    /// An entry or a snapshot of another version, or a damaged one.
    Unreadable(String),
    /// Somebody else found that the link is broken.
    Broken,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Store(error) => write!(f, "{error}"),
            Self::Unreadable(reason) => f.write_str(reason),
            Self::Broken => f.write_str("an append failed"),
        }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

/// How the log fits the state.
enum Standing {
    /// The log continues it.
    Current,
    /// The log continues a snapshot that is newer.
    Behind(SnapshotHeader),
    /// The log has lost entries that the state has.
    Lost,
}

/// What applying entries came to.
enum Applied {
    All,
    /// The state must be loaded.
    LaterEpoch,
    Unreadable(FormatError),
}

/// Follows the log for ever.
pub async fn run(replica: Arc<Replica>) {
    let (mut failures, mut links, mut logged) = (0_u32, 0, String::new());
    loop {
        let began = Instant::now();
        links += 1;
        let Err(failure) = follow(&replica, links).await;
        replica.link.send_replace(None);
        if let Failure::Unreadable(_) = failure {
            replica.set_caught_up(false);
        }
        let reason = failure.to_string();
        if reason != logged || began.elapsed() > Duration::from_secs(5) {
            warn!(reason, "cannot follow the log of the store; trying again");
            logged = reason;
        }
        failures = if began.elapsed() > PAUSE[1] { 0 } else { failures.saturating_add(1) };
        sleep((PAUSE[0] * 2_u32.saturating_pow(failures.min(8))).min(PAUSE[1])).await;
    }
}

async fn follow(replica: &Arc<Replica>, number: u64) -> Result<std::convert::Infallible, Failure> {
    let connection = replica.valkey.connect().await?;
    loop {
        join(replica, &connection).await?;
        if !catch_up(replica, &connection).await? {
            sleep(PAUSE[0]).await;
            continue;
        }
        if !know_the_time(replica, &connection).await? {
            continue;
        }
        info!("caught up with the log of the store");
        replica.set_caught_up(true);
        replica.link.send_replace(Some(Link { number, connection: connection.clone() }));
        loop {
            let entries = tokio::select! {
                entries = read(replica, &connection) => entries?,
                () = replica.broken.notified() => return Err(Failure::Broken),
            };
            if !apply(replica, entries).await? {
                replica.link.send_replace(None);
                break;
            }
        }
    }
}

async fn read(replica: &Replica, connection: &Connection) -> Result<Vec<(StreamId, Vec<u8>)>, Failure> {
    let id = lock(&replica.machine).progress().id;
    let entries = connection.read_after(id, READ_COUNT).await?;
    replica.note_contact();
    Ok(entries)
}

/// Brings the state to where the log continues it.
async fn join(replica: &Arc<Replica>, connection: &Connection) -> Result<(), Failure> {
    loop {
        match compare(replica, connection).await? {
            Standing::Current => return Ok(()),
            Standing::Behind(header) => {
                replica.set_caught_up(false);
                load(replica, connection, &header).await?;
            }
            Standing::Lost => {
                error!("the store has lost entries that were acknowledged; recovering them");
                recover(replica, connection).await?;
            }
        }
    }
}

async fn compare(replica: &Replica, connection: &Connection) -> Result<Standing, Failure> {
    let progress = lock(&replica.machine).progress().clone();
    let header = connection.snapshot_header().await?;
    let epoch = header.as_ref().map_or(0, |header| header.epoch);
    if let Some(header) = header.filter(|header| progress.applied == 0 || header.epoch > progress.epoch) {
        return Ok(Standing::Behind(header));
    }
    let unreadable = *lock(&replica.unreadable);
    if let Some(header) = connection.snapshot_header().await?
        && unreadable.is_some_and(|id| header.id >= id)
    {
        return Ok(Standing::Behind(header));
    }
    if epoch < progress.epoch {
        return Ok(Standing::Lost);
    }
    if progress.applied == 0 {
        return Ok(Standing::Current);
    }
    // An entry with the same id could be another one, if the store's clock was set back.
    let here = connection.range(progress.id, 1).await?.into_iter().find(|(id, _)| *id == progress.id);
    let is_same = |bytes: &[u8]| {
        Entry::decode(bytes).is_ok_and(|entry| (entry.server, entry.number) == progress.writer)
    };
    let first = connection.range(StreamId::default(), 1).await?.first().map(|(id, _)| *id);
    let is_trimmed = first.is_none_or(|first| progress.id < first);
    match (here, connection.snapshot_header().await?) {
        (Some((_, bytes)), _) if is_same(&bytes) => Ok(Standing::Current),
        // The log continues the snapshot that this state was saved as or loaded from.
        (_, Some(header)) if header.epoch == progress.epoch && header.id == progress.id => {
            Ok(Standing::Current)
        }
        (_, Some(header)) if header.epoch > progress.epoch || (is_trimmed && header.id > progress.id) => {
            Ok(Standing::Behind(header))
        }
        _ => Ok(Standing::Lost),
    }
}

/// Loads a snapshot.
async fn load(replica: &Replica, connection: &Connection, header: &SnapshotHeader) -> Result<(), Failure> {
    let Some(pieces) = connection.snapshot(header).await? else {
        // It was replaced meanwhile; or it is damaged, and the next one will not be.
        sleep(PAUSE[0]).await;
        return match connection.snapshot_header().await?.as_ref() == Some(header) {
            true => Err(Failure::Unreadable("the snapshot in the store is damaged".into())),
            false => Ok(()),
        };
    };
    let began = Instant::now();
    let machine = Arc::clone(&replica.machine);
    let loaded = tokio::task::spawn_blocking(move || {
        let mut machine = lock(&machine);
        machine.load(&pieces).map(|()| machine.progress().clone())
    });
    let progress = match loaded.await {
        Ok(Ok(progress)) => progress,
        Ok(Err(reason)) => return Err(Failure::Unreadable(format!("cannot load the snapshot: {reason}"))),
        Err(panicked) => return Err(Failure::Unreadable(panicked.to_string())),
    };
    *lock(&replica.unreadable) = None;
    replica.clock.advance(progress.log_ns);
    replica.log_bytes.store(0, Ordering::Relaxed);
    info!(entries = progress.applied, after = ?began.elapsed(), "loaded the snapshot of the store");
    Ok(())
}

/// Applies what the log has. Returns whether the state is at its end.
async fn catch_up(replica: &Arc<Replica>, connection: &Connection) -> Result<bool, Failure> {
    loop {
        let id = lock(&replica.machine).progress().id;
        let next = StreamId(id.0, id.1.saturating_add(1));
        let entries = connection.range(next, READ_COUNT).await?;
        let is_end = entries.len() < READ_COUNT;
        if !apply(replica, entries).await? {
            return Ok(false);
        }
        if is_end {
            return Ok(true);
        }
    }
}

/// Waits until the log's time is known: by an entry that is written now, or, if no server writes any,
/// by the wall clock. Returns whether the state is still at the log's end.
async fn know_the_time(replica: &Arc<Replica>, connection: &Connection) -> Result<bool, Failure> {
    let is_new = lock(&replica.machine).progress().applied == 0;
    let began = Instant::now();
    while replica.clock.now_ns().is_none() {
        if is_new || began.elapsed() > SIGN_OF_LIFE {
            replica.clock.begin(wall_time());
            break;
        }
        let entries = read(replica, connection).await?;
        let is_live = !entries.is_empty();
        if !apply(replica, entries).await? {
            return Ok(false);
        }
        if is_live {
            replica.clock.set_current();
        }
    }
    Ok(true)
}

/// Applies entries, and tells who waits for them. Returns whether all were applied; if not, the state
/// must be loaded.
async fn apply(replica: &Arc<Replica>, entries: Vec<(StreamId, Vec<u8>)>) -> Result<bool, Failure> {
    if entries.is_empty() {
        return Ok(true);
    }
    let shared = Arc::clone(replica);
    let applied = tokio::task::spawn_blocking(move || apply_now(&shared, entries)).await;
    match applied {
        Ok(Applied::All) => Ok(true),
        Ok(Applied::LaterEpoch) => Ok(false),
        Ok(Applied::Unreadable(error)) => {
            // A newer server notices this one, and writes its next snapshot so that it can be read.
            let _ = leader::exchange(replica).await;
            Err(Failure::Unreadable(error.to_string()))
        }
        Err(panicked) => Err(Failure::Unreadable(panicked.to_string())),
    }
}

fn apply_now(replica: &Replica, entries: Vec<(StreamId, Vec<u8>)>) -> Applied {
    let mut machine = lock(&replica.machine);
    for (id, bytes) in entries {
        let entry = match Entry::decode(&bytes) {
            Ok(entry) => entry,
            Err(error @ FormatError::Version(_)) => {
                *lock(&replica.unreadable) = Some(id);
                return Applied::Unreadable(error);
            }
            Err(error) => {
                // All servers leave it out.
                warn!(%error, %id, "left out an entry of the log");
                Entry { server: 0, number: 0, at_ns: 0, changes: Vec::new() }
            }
        };
        let (server, number, at_ns) = (entry.server, entry.number, entry.at_ns);
        let is_own = server == replica.server;
        let forwarder = replica.forwarder.as_deref().filter(|_| is_own);
        match machine.apply(id, entry, forwarder) {
            Ok(outcomes) if is_own => replica.deliver(number, outcomes),
            Ok(_) => {}
            Err(LaterEpoch) => return Applied::LaterEpoch,
        }
        replica.clock.advance(at_ns);
        replica.metrics().entries.inc();
        replica.log_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
    }
    Applied::All
}

/// Gives the store what it has lost: the server that has applied most writes its state as a snapshot of
/// a new epoch, with what the log got since.
async fn recover(replica: &Arc<Replica>, connection: &Connection) -> Result<(), Failure> {
    let mine = lock(&replica.machine).progress().clone();
    let mut seen: HashMap<u64, (String, bool)> = HashMap::new();
    let began = Instant::now();
    while began.elapsed() < ELECTION {
        for (server, word) in leader::say(replica, connection, true).await? {
            let (last, is_live) = seen.entry(server).or_insert_with(|| (word.clone(), false));
            *is_live |= *last != word;
            *last = word;
        }
        sleep(ELECTION_STEP).await;
        if connection.snapshot_header().await?.is_some_and(|header| header.epoch > mine.epoch) {
            return Ok(());
        }
    }
    let rank = |epoch, applied, server: u64| (epoch, applied, u64::MAX - server);
    let others = seen.iter().filter(|(server, (_, is_live))| *is_live && **server != replica.server);
    let is_first =
        others.filter_map(|(server, (word, _))| Some((server, Word::read(word)?))).all(|(server, word)| {
            !word.has_lost
                || rank(word.epoch, word.applied, *server) < rank(mine.epoch, mine.applied, replica.server)
        });
    if !is_first {
        // Another one has more.
        return Ok(());
    }
    let before = connection.snapshot_header().await?.map_or(0, |header| header.epoch);
    let from = common_position(replica, connection).await?;
    if !merge(replica, connection, from).await? {
        return Ok(());
    }
    let last = connection.last().await?;
    let epoch = before.max(mine.epoch) + 1;
    let version = replica.version.load(Ordering::Relaxed);
    let machine = Arc::clone(&replica.machine);
    let saved = tokio::task::spawn_blocking(move || {
        let mut machine = lock(&machine);
        let was = machine.progress().clone();
        machine.begin_epoch(epoch, last);
        let saved = machine.save(version);
        machine.begin_epoch(was.epoch, was.id);
        saved
    });
    let snapshot = match saved.await {
        Ok(Ok(snapshot)) => snapshot,
        Ok(Err(reason)) => return Err(Failure::Unreadable(reason)),
        Err(panicked) => return Err(Failure::Unreadable(panicked.to_string())),
    };
    // Not one of the appender's entries, and no more than a word: it needs no number.
    let word = Entry { server: 0, number: 0, at_ns: 0, changes: vec![Change::Recovered { epoch }] };
    let word = word.encode(version).map_err(|error| Failure::Unreadable(error.to_string()))?;
    let (name, unix_seconds) = leader::snapshot_name(replica, &snapshot);
    if connection.begin_epoch(&snapshot, &name, unix_seconds, before, &word).await? {
        lock(&replica.machine).begin_epoch(epoch, last);
        replica.metrics().recoveries.inc();
        warn!(epoch, entries = snapshot.progress.applied, "the store has again what it had lost");
    }
    Ok(())
}

/// Returns the last position that the log and the state have in common, as far as is known.
async fn common_position(replica: &Replica, connection: &Connection) -> Result<StreamId, Failure> {
    let Some((first, _)) = connection.range(StreamId::default(), 1).await?.into_iter().next() else {
        return Ok(StreamId::default());
    };
    // The latest first: those that the log has lost, then those that it has. Without those that it was
    // trimmed of.
    let recent: Vec<StreamId> = lock(&replica.machine).recent().filter(|id| *id >= first).collect();
    let (mut lost, mut kept) = (0, recent.len());
    while lost < kept {
        let middle = lost + (kept - lost) / 2;
        match recent.get(middle) {
            Some(id) if connection.has(*id).await? => kept = middle,
            Some(_) => lost = middle + 1,
            None => break,
        }
    }
    Ok(recent.get(kept).copied().unwrap_or_default())
}

/// Applies what the log has after a position. What the state has already is left out. Returns whether
/// all was applied.
async fn merge(replica: &Arc<Replica>, connection: &Connection, from: StreamId) -> Result<bool, Failure> {
    let mut from = from;
    loop {
        let next = StreamId(from.0, from.1.saturating_add(1));
        let entries = connection.range(next, READ_COUNT).await?;
        let Some((last, _)) = entries.last() else { return Ok(true) };
        from = *last;
        if !apply(replica, entries).await? {
            return Ok(false);
        }
    }
}
