//! Every key's figures, in memory. Keys lie in shards, so that reports of different keys seldom wait
//! for each other; no lock is held across keys.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Mutex, MutexGuard, PoisonError};

use inflight_stats::decider::{Decision, Settings};
use inflight_stats::ingest::{Figures, Key, WentBack, WindowSizes};
use inflight_stats::{KeyReport, Report};

const SHARDS: usize = 64;

/// Namespace and name.
pub type KeyName = (String, String);

type Shard = HashMap<KeyName, Key>;

/// All keys.
pub struct Keys {
    shards: Vec<Mutex<Shard>>,
    hasher: RandomState,
    windows: WindowSizes,
}

impl Keys {
    /// No keys yet.
    pub fn new(windows: WindowSizes) -> Self {
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        Self { shards, hasher: RandomState::new(), windows }
    }

    /// Takes a whole report, or nothing of it.
    ///
    /// # Errors
    /// [`WentBack`], with the key whose counters did.
    pub fn record(&self, report: &Report, now_ns: u64) -> Result<(), (KeyName, WentBack)> {
        let refused = |message: &KeyReport, error| ((message.namespace.clone(), message.name.clone()), error);
        for message in &report.messages {
            let name = (message.namespace.clone(), message.name.clone());
            if let Some(key) = self.shard(&name).and_then(|shard| {
                shard.get(&name).map(|key| key.check(&report.pod, report.incarnation, message))
            }) {
                key.map_err(|error| refused(message, error))?;
            }
        }
        for message in &report.messages {
            let name = (message.namespace.clone(), message.name.clone());
            if let Some(mut shard) = self.shard(&name) {
                let key = shard.entry(name).or_insert_with(|| Key::new(self.windows));
                key.record(&report.pod, report.incarnation, message, now_ns)
                    .map_err(|error| refused(message, error))?;
            }
        }
        Ok(())
    }

    /// One key's figures, and how many pods it wants.
    pub fn figures(&self, name: &KeyName, now_ns: u64) -> Option<(Figures, Decision)> {
        self.shard(name)?.get(name).map(|key| (key.figures(now_ns), key.decision()))
    }

    /// All keys' figures, by namespace and name.
    pub fn all(&self, now_ns: u64) -> Vec<(KeyName, (Figures, Decision))> {
        let mut all: Vec<_> = self
            .shards
            .iter()
            .flat_map(|shard| {
                let shard = lock(shard);
                let keys = shard.iter();
                keys.map(|(name, key)| (name.clone(), (key.figures(now_ns), key.decision())))
                    .collect::<Vec<_>>()
            })
            .collect();
        all.sort_by(|(a, _), (b, _)| a.cmp(b));
        all
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).len()).sum()
    }

    /// Decides for every key.
    pub fn decide(&self, settings: &Settings, now_ns: u64) {
        for shard in &self.shards {
            lock(shard).values_mut().for_each(|key| key.decide(settings, now_ns));
        }
    }

    /// Forgets senders that have long been silent.
    pub fn forget(&self, now_ns: u64) {
        for shard in &self.shards {
            lock(shard).values_mut().for_each(|key| key.forget(now_ns));
        }
    }

    fn shard(&self, name: &KeyName) -> Option<MutexGuard<'_, Shard>> {
        let index = self.hasher.hash_one(name) as usize % SHARDS;
        self.shards.get(index).map(lock)
    }
}

/// A thread that panicked in a shard left whole values behind: each change of a key is checked first.
fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}
