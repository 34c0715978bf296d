//! Appends changes to the log: those of ten milliseconds as one entry, one entry at a time, again
//! until it is certain that it is there.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};
use tracing::warn;

use crate::os::lock::lock;
use crate::replication::entry::Entry;
use crate::replication::replica::{Link, Pending, Replica};

/// How long changes are gathered for one entry.
const GATHER: Duration = Duration::from_millis(10);
/// How many bytes are gathered at most.
const GATHER_BYTES: usize = 256 << 10;
/// How long an entry is tried.
const MAX_TRIES: Duration = Duration::from_secs(60);
/// The pause between two tries.
const PAUSE: Duration = Duration::from_millis(20);

/// Appends for ever.
pub async fn run(replica: Arc<Replica>) {
    let mut number = 0;
    loop {
        let pending = gather(&replica).await;
        if pending.is_empty() {
            continue;
        }
        number += 1;
        let (changes, waiting) = pending.into_iter().map(|pending| (pending.change, pending.waiting)).unzip();
        lock(&replica.waiting).insert(number, waiting);
        let entry = Entry { server: replica.server, number, at_ns: 0, changes };
        if !append(&replica, entry).await {
            // They learn that it failed by their channel's end.
            lock(&replica.waiting).remove(&number);
            warn!(after = ?MAX_TRIES, "gave up an entry that could not be appended");
        }
        lock(&replica.queue).appending_bytes = 0;
    }
}

/// Waits for changes, and returns what belongs into one entry. Changes that nobody waits for any more
/// are left out: they will be submitted again.
async fn gather(replica: &Replica) -> Vec<Pending> {
    loop {
        let (bytes, since) = {
            let queue = lock(&replica.queue);
            (queue.bytes, queue.since)
        };
        match since {
            None => replica.filled.notified().await,
            Some(_) if bytes >= GATHER_BYTES => break,
            Some(since) => match GATHER.checked_sub(since.elapsed()) {
                Some(rest) => tokio::select! {
                    () = sleep(rest) => {}
                    () = replica.filled.notified() => {}
                },
                None => break,
            },
        }
    }
    let mut queue = lock(&replica.queue);
    let mut gathered = Vec::new();
    let mut bytes = 0;
    while bytes < GATHER_BYTES
        && let Some(pending) = queue.pending.pop_front()
    {
        queue.bytes = queue.bytes.saturating_sub(pending.bytes);
        if pending.waiting.as_ref().is_none_or(|waiting| !waiting.is_closed()) {
            bytes += pending.bytes;
            gathered.push(pending);
        }
    }
    queue.appending_bytes = bytes;
    if queue.pending.is_empty() {
        queue.since = None;
    }
    gathered
}

/// Returns whether the entry is in the log.
async fn append(replica: &Replica, mut entry: Entry) -> bool {
    let deadline = Instant::now() + MAX_TRIES;
    let mut links = replica.link.subscribe();
    loop {
        let link = timeout_at(deadline, links.wait_for(Option::is_some)).await;
        let link = link.ok().and_then(Result::ok).and_then(|link| link.clone());
        let Some(Link { number, connection }) = link else { return false };
        // An append whose answer was lost has been applied, now that there is a link again.
        if replica.applied_own.load(Ordering::Acquire) >= entry.number {
            return true;
        }
        let Some(now_ns) = replica.clock.now_ns() else {
            sleep(PAUSE).await;
            continue;
        };
        entry.at_ns = now_ns;
        let bytes = match entry.encode(replica.version.load(Ordering::Relaxed)) {
            Ok(bytes) => bytes,
            Err(error) => {
                warn!(%error, "cannot write an entry");
                return false;
            }
        };
        let began = Instant::now();
        match timeout_at(deadline, connection.append(&bytes)).await {
            Ok(Ok(())) => {
                replica.metrics().append_seconds.observe(began.elapsed().as_secs_f64());
                return true;
            }
            Ok(Err(error)) => {
                warn!(%error, "could not append to the store; trying again");
                replica.break_link(number);
                sleep(PAUSE).await;
            }
            Err(_) => {
                replica.break_link(number);
                return false;
            }
        }
    }
}
