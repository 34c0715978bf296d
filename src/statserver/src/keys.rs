//! Every key's figures, in memory. Keys lie in shards, so that reports of different keys seldom wait
//! for each other; no lock is held across keys.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use hashbrown::HashTable;
use inflight_stats::Report;
use inflight_stats::decider::Decision;
use inflight_stats::ingest::{Figures, Key, PerSecond, WentBack};
use inflight_stats::settings::KeySettings;
use inflight_stats::wire::WireStatMessage;
use serde::Serialize;

use crate::access::Grant;
use crate::watch::Watch;

const SHARDS: usize = 64;
/// What a chart shows: ten minutes of decisions.
pub const POINTS: usize = 300;
/// The most keys whose past is kept: 5 KB each.
const MOST_HISTORIES: usize = 2_000;

/// Namespace and name.
pub type KeyName = (String, String);

/// A key at one decision.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Point {
    stable: f32,
    panic: f32,
    in_flight: u32,
    desired_pods: u32,
}

/// All that is known of one key at one time.
#[derive(Clone, Debug)]
pub struct View {
    /// Namespace and name.
    pub name: KeyName,
    /// What its senders make it.
    pub figures: Figures,
    /// How many pods it wants.
    pub decision: Decision,
    /// What it is scaled by.
    pub settings: Arc<KeySettings>,
}

struct Entry {
    name: KeyName,
    key: Key,
    past: VecDeque<Point>,
}

impl Entry {
    fn view(&self, now_ns: u64) -> View {
        View {
            name: self.name.clone(),
            figures: self.key.figures(now_ns),
            decision: self.key.decision(),
            settings: Arc::clone(self.key.settings()),
        }
    }
}

/// Entries stay where they are; the table finds them by name.
#[derive(Default)]
struct Shard {
    places: HashTable<usize>,
    entries: Vec<Entry>,
}

/// Who is told of what a report or a stat added.
pub trait Added {
    /// `pod` added this to a key.
    fn added(&self, namespace: &str, name: &str, pod: &str, added: &PerSecond);
}

/// All keys.
pub struct Keys {
    shards: Vec<Mutex<Shard>>,
    hasher: RandomState,
    defaults: Arc<KeySettings>,
    told: RwLock<HashMap<KeyName, Arc<KeySettings>>>,
    /// Who waits for a key's first traffic.
    pub watch: Watch,
}

impl Keys {
    /// No keys yet; each is scaled by `defaults` unless it is told otherwise.
    pub fn new(defaults: Arc<KeySettings>) -> Self {
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        let (told, watch) = (RwLock::default(), Watch::default());
        Self { shards, hasher: RandomState::new(), defaults, told, watch }
    }

    /// What a key is scaled by that was told nothing.
    pub fn defaults(&self) -> &Arc<KeySettings> {
        &self.defaults
    }

    /// Takes a whole report, or nothing of it.
    ///
    /// # Errors
    /// [`WentBack`], with the key whose counters did.
    pub fn record(
        &self,
        report: &Report,
        now_ns: u64,
        observer: Option<&impl Added>,
    ) -> Result<(), (KeyName, WentBack)> {
        let Report { pod, incarnation, messages, .. } = report;
        let named = |namespace: &String, name: &String, error| ((namespace.clone(), name.clone()), error);
        for message in messages {
            let checked = self.known(&message.namespace, &message.name, |entry| {
                entry.key.check(pod, *incarnation, message)
            });
            checked.unwrap_or(Ok(())).map_err(|error| named(&message.namespace, &message.name, error))?;
        }
        for message in messages {
            let (namespace, name) = (&message.namespace, &message.name);
            let recorded =
                self.with(namespace, name, |entry| entry.key.record(pod, *incarnation, message, now_ns));
            let recorded =
                recorded.unwrap_or(Err(WentBack)).map_err(|error| named(namespace, name, error))?;
            if let (Some(observer), Some(added)) = (observer, &recorded.added) {
                observer.added(namespace, name, pod, added);
            }
            if recorded.woke {
                self.watch.woke(namespace, name);
            }
        }
        Ok(())
    }

    /// Takes a stat of the stream; whether it was one. A message without a stat or a name is none, nor is one of a
    /// namespace that is not granted.
    pub fn record_stat(&self, grant: &Grant, message: &WireStatMessage, now_ns: u64) -> bool {
        let text =
            |bytes| std::str::from_utf8(bytes).ok().filter(|text| inflight_stats::report::is_name(text));
        let (Some(namespace), Some(name)) = (text(&message.namespace), text(&message.name)) else {
            return false;
        };
        let Some((stat, pod)) = message.stat.as_ref().and_then(|stat| Some((stat, text(&stat.pod_name)?)))
        else {
            return false;
        };
        if !grant.covers(namespace) {
            return false;
        }
        let recorded = self.with(namespace, name, |entry| entry.key.record_stat(pod, stat, now_ns));
        let Some(Ok(recorded)) = recorded else { return false };
        if recorded.woke {
            self.watch.woke(namespace, name);
        }
        true
    }

    /// What is known of one key.
    pub fn view(&self, namespace: &str, name: &str, now_ns: u64) -> Option<View> {
        self.known(namespace, name, |entry| entry.view(now_ns))
    }

    /// Something of a key that is known.
    pub fn of<T>(&self, namespace: &str, name: &str, of: impl FnOnce(&Key) -> T) -> Option<T> {
        self.known(namespace, name, |entry| of(&entry.key))
    }

    /// A key's last ten minutes, the oldest first; empty if too many keys have one.
    pub fn past(&self, namespace: &str, name: &str) -> Option<Vec<Point>> {
        self.known(namespace, name, |entry| entry.past.iter().copied().collect())
    }

    /// The keys of the namespaces granted whose namespace and name, joined by a slash, contain `part`: the first `most`
    /// of them in alphabetical order, and how many there are.
    pub fn views(&self, grant: &Grant, part: &str, most: usize, now_ns: u64) -> (Vec<View>, usize) {
        let mut names = Vec::new();
        self.each(|entry| {
            let (namespace, name) = &entry.name;
            let fits = part.is_empty() || format!("{namespace}/{name}").contains(part);
            if fits && grant.covers(namespace) {
                names.push(entry.name.clone());
            }
        });
        let found = names.len();
        names.sort_unstable();
        let views =
            names.iter().take(most).filter_map(|(namespace, name)| self.view(namespace, name, now_ns));
        (views.collect(), found)
    }

    /// Decides for every key.
    pub fn decide(&self, now_ns: u64) {
        let mut pasts = 0;
        self.each(|entry| {
            let figures = entry.key.decide(now_ns);
            if pasts == MOST_HISTORIES && entry.past.is_empty() {
                return;
            }
            pasts += 1;
            if entry.past.len() == POINTS {
                entry.past.pop_front();
            }
            entry.past.push_back(Point {
                stable: figures.stable.concurrency as f32,
                panic: figures.panic.concurrency as f32,
                in_flight: u32::try_from(figures.in_flight).unwrap_or(u32::MAX),
                desired_pods: entry.key.decision().desired_pods,
            });
        });
        self.watch.refresh(|namespace, name| {
            self.known(namespace, name, |entry| entry.key.is_active(now_ns)).unwrap_or(false)
        });
    }

    /// Has a key scaled by other settings, or by the defaults again.
    pub fn tell(&self, name: &KeyName, settings: Option<Arc<KeySettings>>) {
        let mut told = self.told.write().unwrap_or_else(PoisonError::into_inner);
        match &settings {
            Some(settings) => told.insert(name.clone(), Arc::clone(settings)),
            None => told.remove(name),
        };
        drop(told);
        let (namespace, name) = name;
        match settings {
            // A key that is told something is there, also before its first report.
            Some(settings) => self.with(namespace, name, |entry| entry.key.apply(settings)),
            None => self.known_mut(namespace, name, |entry| entry.key.apply(Arc::clone(&self.defaults))),
        };
    }

    /// Forgets senders that have long been silent.
    pub fn forget(&self, now_ns: u64) {
        self.each(|entry| entry.key.forget(now_ns));
    }

    /// Every entry, each under a lock of its own.
    fn each(&self, mut f: impl FnMut(&mut Entry)) {
        for shard in &self.shards {
            for place in 0.. {
                match lock(shard).entries.get_mut(place) {
                    Some(entry) => f(entry),
                    None => break,
                }
            }
        }
    }

    fn known<T>(&self, namespace: &str, name: &str, f: impl FnOnce(&Entry) -> T) -> Option<T> {
        self.known_mut(namespace, name, |entry| f(entry))
    }

    fn known_mut<T>(&self, namespace: &str, name: &str, f: impl FnOnce(&mut Entry) -> T) -> Option<T> {
        let (hash, mut shard) = self.shard(namespace, name)?;
        let Shard { places, entries } = &mut *shard;
        let place = *places.find(hash, |place| is(entries, *place, namespace, name))?;
        entries.get_mut(place).map(f)
    }

    /// An entry, which is made if it is not there. A key that is there costs one hash and no allocation.
    fn with<T>(&self, namespace: &str, name: &str, f: impl FnOnce(&mut Entry) -> T) -> Option<T> {
        let (hash, mut shard) = self.shard(namespace, name)?;
        let Shard { places, entries } = &mut *shard;
        let place = match places.find(hash, |place| is(entries, *place, namespace, name)) {
            Some(place) => *place,
            None => {
                let name = (namespace.to_owned(), name.to_owned());
                let told = self.told.read().unwrap_or_else(PoisonError::into_inner);
                let settings = Arc::clone(told.get(&name).unwrap_or(&self.defaults));
                entries.push(Entry { name, key: Key::new(settings), past: VecDeque::new() });
                let place = entries.len() - 1;
                let rehash = |place: &usize| {
                    entries.get(*place).map_or(0, |entry| self.hash(&entry.name.0, &entry.name.1))
                };
                places.insert_unique(hash, place, rehash);
                place
            }
        };
        entries.get_mut(place).map(f)
    }

    fn hash(&self, namespace: &str, name: &str) -> u64 {
        self.hasher.hash_one((namespace, name))
    }

    fn shard(&self, namespace: &str, name: &str) -> Option<(u64, MutexGuard<'_, Shard>)> {
        let hash = self.hash(namespace, name);
        // The table within the shard goes by the lower and the highest bits.
        let shard = self.shards.get((hash >> 32) as usize % SHARDS)?;
        Some((hash, lock(shard)))
    }
}

fn is(entries: &[Entry], place: usize, namespace: &str, name: &str) -> bool {
    entries.get(place).is_some_and(|entry| entry.name.0 == namespace && entry.name.1 == name)
}

/// A thread that panicked in a shard left whole values behind: each change of a key is checked first.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
