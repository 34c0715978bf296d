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
use crate::replication::machine::{LaterEpoch, NO_SERVER};
use crate::replication::progress::Progress;
use crate::replication::replica::{Link, Replica};
use crate::replication::snapshot;
use crate::replication::stream_id::StreamId;
use crate::replication::valkey::{Connection, SnapshotHeader, StoreError};

/// Entries that are read at once: of up to 256 KiB each.
const READ_COUNT: usize = 64;
/// The pause before the store is tried again.
const PAUSE: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(1)];
/// A server that starts waits so long for a sign of another one, which knows the log's time.
const SIGN_OF_LIFE: Duration = Duration::from_secs(4);
/// How long the servers tell each other how far they are before one of them begins an epoch.
const ELECTION: Duration = Duration::from_millis(1_500);
const ELECTION_STEP: Duration = Duration::from_millis(300);
/// A server without any state waits for longer: others may have one and not have noticed yet.
const EMPTY_ELECTION: Duration = Duration::from_millis(2_500);
/// A server that was there shortly before may have more. It is waited for so long.
const PATIENCE: Duration = Duration::from_secs(10);
/// A server that said something new so long before the store was last read from was there.
const SHORTLY: Duration = Duration::from_secs(5);
/// The digits of an epoch that differ if two servers begin one of a store that is empty.
const EPOCH_STEP: u64 = 1_000_000;

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
    /// There is no log.
    Empty,
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
                entries = read(replica, &connection, true) => entries?,
                () = replica.broken.notified() => return Err(Failure::Broken),
            };
            let applied = match entries {
                Some(entries) => apply(replica, entries).await?,
                None => false,
            };
            if !applied {
                replica.link.send_replace(None);
                break;
            }
        }
    }
}

/// Returns the entries that continue the state. `None`: the log does not continue it any more. Entries
/// that it has not seen were trimmed, or the log began anew.
async fn read(
    replica: &Replica,
    connection: &Connection,
    waits: bool,
) -> Result<Option<Vec<(StreamId, Vec<u8>)>>, Failure> {
    let (id, epoch) = {
        let machine = lock(&replica.machine);
        (machine.progress().id, machine.progress().epoch)
    };
    let tail = connection.read_after(id, READ_COUNT, waits).await?;
    if tail.epoch != Some(epoch) || id < tail.from {
        return Ok(None);
    }
    replica.note_contact();
    Ok(Some(tail.entries))
}

/// Brings the state to where the log continues it.
async fn join(replica: &Arc<Replica>, connection: &Connection) -> Result<(), Failure> {
    loop {
        match compare(replica, connection).await? {
            Standing::Current => return Ok(()),
            Standing::Behind(header) => {
                replica.set_caught_up(false);
                if !load(replica, connection, &header).await? {
                    error!("the store has another state without entries that were acknowledged; adding them");
                    recover(replica, connection, false).await?;
                }
            }
            Standing::Empty => recover(replica, connection, true).await?,
            Standing::Lost => {
                error!("the store has lost entries that were acknowledged; recovering them");
                recover(replica, connection, false).await?;
            }
        }
    }
}

async fn compare(replica: &Replica, connection: &Connection) -> Result<Standing, Failure> {
    let progress = lock(&replica.machine).progress().clone();
    let has_state = progress.applied > 0 || progress.epoch > 0;
    let Some(header) = connection.snapshot_header().await? else {
        return Ok(if has_state { Standing::Lost } else { Standing::Empty });
    };
    if header.epoch > progress.epoch {
        return Ok(Standing::Behind(header));
    }
    if header.epoch < progress.epoch || replica.is_ahead.load(Ordering::Relaxed) {
        return Ok(Standing::Lost);
    }
    let unreadable = *lock(&replica.unreadable);
    if unreadable.is_some_and(|id| header.id >= id) {
        return Ok(Standing::Behind(header));
    }
    let Some((first, _)) = connection.range(StreamId::default(), 1).await?.into_iter().next() else {
        return Ok(Standing::Lost);
    };
    // The log continues the snapshot that this state was saved as or loaded from.
    if header.id == progress.id {
        return Ok(Standing::Current);
    }
    // An entry with the same id could be another one, if the store's clock was set back.
    let here = connection.range(progress.id, 1).await?.into_iter().find(|(id, _)| *id == progress.id);
    let is_same = |bytes: &[u8]| {
        let writer = Entry::decode(bytes).map_or((NO_SERVER, 0), |entry| (entry.server, entry.number));
        writer == progress.writer
    };
    Ok(match here {
        Some((_, bytes)) if is_same(&bytes) => Standing::Current,
        None if progress.id < header.from.max(first) && header.id > progress.id => Standing::Behind(header),
        _ => Standing::Lost,
    })
}

/// Loads a snapshot. Returns whether it has all that the state has, or comes too late to be corrected.
async fn load(replica: &Replica, connection: &Connection, header: &SnapshotHeader) -> Result<bool, Failure> {
    let Some(pieces) = connection.snapshot(header).await? else {
        // It was replaced meanwhile; or it is damaged, and the next one will not be.
        sleep(PAUSE[0]).await;
        return match connection.snapshot_header().await?.as_ref() == Some(header) {
            true => Err(Failure::Unreadable("the snapshot in the store is damaged".into())),
            false => Ok(true),
        };
    };
    let unreadable = |reason| Failure::Unreadable(format!("cannot load the snapshot: {reason}"));
    let mine = lock(&replica.machine).progress().clone();
    if header.is_first && header.epoch > mine.epoch {
        let theirs = snapshot::progress(&pieces).map_err(unreadable)?;
        if !theirs.covers(&mine) && !with_the_log(theirs, connection).await?.covers(&mine) {
            return Ok(false);
        }
    }
    let began = Instant::now();
    let machine = Arc::clone(&replica.machine);
    let loaded = tokio::task::spawn_blocking(move || {
        let mut machine = lock(&machine);
        machine.load(&pieces).map(|()| machine.progress().clone())
    });
    let progress = match loaded.await {
        Ok(Ok(progress)) => progress,
        Ok(Err(reason)) => return Err(unreadable(reason)),
        Err(panicked) => return Err(Failure::Unreadable(panicked.to_string())),
    };
    *lock(&replica.unreadable) = None;
    replica.is_ahead.store(false, Ordering::Relaxed);
    replica.clock.advance(progress.log_ns);
    replica.log_bytes.store(0, Ordering::Relaxed);
    info!(entries = progress.applied, after = ?began.elapsed(), "loaded the snapshot of the store");
    Ok(true)
}

/// Returns how far a state will be that has applied what the log has after it.
async fn with_the_log(mut state: Progress, connection: &Connection) -> Result<Progress, Failure> {
    loop {
        let next = StreamId(state.id.0, state.id.1.saturating_add(1));
        let entries = connection.range(next, READ_COUNT).await?;
        let Some((last, _)) = entries.last() else { return Ok(state) };
        state.id = *last;
        for entry in entries.iter().filter_map(|(_, bytes)| Entry::decode(bytes).ok()) {
            let number = state.numbers.entry(entry.server).or_default();
            number.0 = number.0.max(entry.number);
        }
    }
}

/// Applies what the log has. Returns whether the state is at its end.
async fn catch_up(replica: &Arc<Replica>, connection: &Connection) -> Result<bool, Failure> {
    loop {
        let Some(entries) = read(replica, connection, false).await? else { return Ok(false) };
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
        let Some(entries) = read(replica, connection, true).await? else { return Ok(false) };
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
                Entry { server: NO_SERVER, number: 0, at_ns: 0, changes: Vec::new() }
            }
        };
        let (server, number, at_ns) = (entry.server, entry.number, entry.at_ns);
        let is_own = server == replica.server;
        // An entry is applied once more if an epoch begins before it. It was forwarded then.
        let is_first = number > replica.applied_own.load(Ordering::Acquire);
        let forwarder = replica.forwarder.as_deref().filter(|_| is_own && is_first);
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

/// Begins an epoch: the server that has applied most writes its state as a snapshot, with what the log
/// got since. So a store gets back what it has lost, and an empty one its first log.
async fn recover(replica: &Arc<Replica>, connection: &Connection, is_empty: bool) -> Result<(), Failure> {
    let mine = lock(&replica.machine).progress().clone();
    let contact = *lock(&replica.contact);
    let peers = lock(&replica.peers).clone();
    let awaited: Vec<u64> = peers
        .into_iter()
        .filter(|(server, heard)| *server != replica.server && *heard + SHORTLY > contact)
        .map(|(server, _)| server)
        .collect();
    let epoch_of = |header: Option<SnapshotHeader>| header.map_or(0, |header| header.epoch);
    let before = epoch_of(connection.snapshot_header().await?);
    let mut seen: HashMap<u64, (String, bool)> = HashMap::new();
    let began = Instant::now();
    let least = if is_empty { EMPTY_ELECTION } else { ELECTION };
    loop {
        for (server, word) in leader::say(replica, connection, true).await? {
            let (last, is_live) = seen.entry(server).or_insert_with(|| (word.clone(), false));
            *is_live |= *last != word;
            *last = word;
        }
        sleep(ELECTION_STEP).await;
        if epoch_of(connection.snapshot_header().await?) != before {
            return Ok(());
        }
        let are_all_here = awaited.iter().all(|server| seen.get(server).is_some_and(|(_, is_live)| *is_live));
        if began.elapsed() >= PATIENCE || (began.elapsed() >= least && are_all_here) {
            break;
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
    replica.is_ahead.store(true, Ordering::Relaxed);
    let Some(last) = merge(replica, connection).await? else { return Ok(()) };
    let epoch = (before.max(mine.epoch) / EPOCH_STEP + 1) * EPOCH_STEP + replica.server % EPOCH_STEP;
    let version = replica.version.load(Ordering::Relaxed);
    let machine = Arc::clone(&replica.machine);
    let saved = tokio::task::spawn_blocking(move || {
        let mut machine = lock(&machine);
        machine.begin_epoch(epoch, last);
        machine.save(version)
    });
    let snapshot = match saved.await {
        Ok(Ok(snapshot)) => snapshot,
        Ok(Err(reason)) => return Err(Failure::Unreadable(reason)),
        Err(panicked) => return Err(Failure::Unreadable(panicked.to_string())),
    };
    let word = Entry { server: NO_SERVER, number: 0, at_ns: 0, changes: vec![Change::Recovered { epoch }] };
    let word = word.encode(version).map_err(|error| Failure::Unreadable(error.to_string()))?;
    let (name, unix_seconds) = leader::snapshot_name(replica, &snapshot);
    if connection.begin_epoch(&snapshot, &name, unix_seconds, before, &word).await? {
        replica.is_ahead.store(false, Ordering::Relaxed);
        if !is_empty {
            replica.metrics().recoveries.inc();
            warn!(epoch, entries = snapshot.progress.applied, "the store has again what it had lost");
        }
    }
    Ok(())
}

/// Applies all that the log has. The numbers of entries tell what the state has already. Positions do
/// not: two stores may have given the same one to two entries. Returns the log's last position; `None`
/// if the state must be loaded.
async fn merge(replica: &Arc<Replica>, connection: &Connection) -> Result<Option<StreamId>, Failure> {
    let mut last = StreamId::default();
    loop {
        let next = StreamId(last.0, last.1.saturating_add(1));
        let entries = connection.range(next, READ_COUNT).await?;
        let Some((id, _)) = entries.last() else { return Ok(Some(last)) };
        last = *id;
        if !apply(replica, entries).await? {
            return Ok(None);
        }
    }
}
