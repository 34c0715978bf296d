//! Every key's figures, in memory. Keys lie in shards, so that reports of different keys seldom wait
//! for each other; no lock is held across keys.

use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use hashbrown::HashTable;
use inflight_stats::Report;
use inflight_stats::protocol::addition::CounterDecreased;
use inflight_stats::protocol::stat::WireStatMessage;
use inflight_stats::scaling::decider::Decision;
use inflight_stats::scaling::heap::heap_bytes;
use inflight_stats::scaling::key::{Figures, Key, MAX_PERIOD_NS};
use inflight_stats::scaling::sender::{ImplausibleStat, PerSecond};
use inflight_stats::scaling::settings::KeySettings;
use serde::Serialize;

use crate::activity::Watch;
use crate::cli::limits::Limit;
use crate::net::auth::Grant;

const SHARDS: usize = 64;
/// What a chart shows: ten minutes of decisions.
pub const POINTS: usize = 300;
/// The most keys whose past is kept: 4.8 KB each.
const MOST_HISTORIES: usize = 2_000;

/// A key of which nothing was heard for so long is forgotten.
const KEPT_NS: u64 = 24 * 3600 * 1_000_000_000;

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
    /// How many pods it wants; `None` where that is not known yet.
    pub desired_pods: Option<u32>,
    /// The last decision, if there is one.
    pub decision: Option<Decision>,
    /// What it is scaled by.
    pub settings: Arc<KeySettings>,
}

struct Entry {
    name: KeyName,
    key: Key,
    past: VecDeque<Point>,
    /// What it was last said to take, without its senders and of these.
    own_bytes: usize,
    sender_bytes: usize,
}

impl Entry {
    fn view(&self, now_ns: u64) -> View {
        View {
            name: self.name.clone(),
            figures: self.key.figures(now_ns),
            desired_pods: self.key.desired_pods(now_ns),
            decision: self.key.is_decided().then(|| self.key.decision()),
            settings: Arc::clone(self.key.settings()),
        }
    }
}

/// The table finds entries by name. Where one goes, the last one takes its place.
#[derive(Default)]
struct Shard {
    places: HashTable<usize>,
    #[allow(clippy::vec_box, reason = "a vector that has grown is half empty: of pointers that is little")]
    entries: Vec<Box<Entry>>,
}

/// How many keys there are.
#[derive(Default)]
struct Counts {
    all: usize,
    of_namespace: HashMap<String, usize>,
}

/// Who is told of what a report or a stat added.
pub trait Added {
    /// `pod` added this to a key.
    fn added(&self, namespace: &str, name: &str, pod: &str, added: &PerSecond);
}

/// There is no room for a new key, or for another pod of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Full {
    /// Which limit says so.
    pub limit: Limit,
    /// Where, and how many there are.
    reason: String,
}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.limit {
            Limit::TableBytes => write!(f, "{} (--{})", self.reason, self.limit.flag()),
            _ => write!(f, "{}, all that --{} allows", self.reason, self.limit.flag()),
        }
    }
}

/// Why not the whole of a report was taken: the first key that was left out, and its reason. The others were taken.
#[derive(Debug)]
pub enum NotTaken {
    /// Its counters went back; that stays so when it comes again.
    WentBack(KeyName, CounterDecreased),
    /// There is no room for it; it may come again.
    Full(Full),
}

/// Why a stat was not taken.
#[derive(Debug)]
pub enum NoStat {
    /// It has no stat, no name, impossible numbers, or a namespace that is not granted.
    Bad,
    /// It would have been taken.
    Full(Full),
}

/// How much is kept.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Keys in all.
    pub keys: usize,
    /// Keys of one namespace.
    pub keys_per_namespace: usize,
    /// Pods and gateways of one key.
    pub pods_per_key: usize,
    /// Bytes that keys, their windows and their senders take, histories apart.
    pub bytes: usize,
}

/// All keys.
pub struct Keys {
    shards: Box<[Mutex<Shard>; SHARDS]>,
    hasher: RandomState,
    defaults: Arc<KeySettings>,
    room: Room,
    started_ns: u64,
    /// When the first report or stat came; 0 before.
    first_report_ns: AtomicU64,
    /// Whether senders of a new key may have reported it to the server before this one.
    has_just_started: AtomicBool,
    counts: Mutex<Counts>,
    bytes: AtomicUsize,
    histories: AtomicUsize,
    told: RwLock<HashMap<KeyName, Arc<KeySettings>>>,
    /// Who waits for a key's first traffic.
    pub watch: Watch,
}

impl Keys {
    /// No keys yet; each is scaled by `defaults` unless it is told otherwise. Until all senders can have reported since the
    /// unix time `started_ns` in nanoseconds (0: long ago), too little is known to decide by.
    pub fn new(defaults: Arc<KeySettings>, room: Room, started_ns: u64) -> Self {
        Self {
            shards: Box::new(std::array::from_fn(|_| Mutex::default())),
            hasher: RandomState::new(),
            defaults,
            room,
            started_ns,
            first_report_ns: AtomicU64::new(0),
            has_just_started: AtomicBool::new(started_ns > 0),
            counts: Mutex::default(),
            bytes: AtomicUsize::new(0),
            histories: AtomicUsize::new(0),
            told: RwLock::default(),
            watch: Watch::default(),
        }
    }

    /// What a key is scaled by that was told nothing.
    pub fn defaults(&self) -> &Arc<KeySettings> {
        &self.defaults
    }

    /// Takes a report. Keys that cannot be taken are left out, and keep no other from being reported. Those for which there is
    /// no room the sender is to report again: what was taken adds nothing when it comes again.
    ///
    /// # Errors
    /// [`NotTaken`].
    pub fn record(
        &self,
        report: &Report,
        now_ns: u64,
        observer: Option<&impl Added>,
    ) -> Result<(), NotTaken> {
        let Report { pod, incarnation, messages, .. } = report;
        self.reported(now_ns);
        let (mut full, mut went_back) = (None, None);
        for message in messages {
            let (namespace, name) = (&message.namespace, &message.name);
            let recorded = self.with(namespace, name, Some((pod, Some(*incarnation))), |entry| {
                entry.key.record(pod, *incarnation, message, now_ns)
            });
            let recorded = match recorded {
                Ok(Ok(recorded)) => recorded,
                Ok(Err(error)) => {
                    went_back.get_or_insert_with(|| ((namespace.clone(), name.clone()), error));
                    continue;
                }
                Err(why) => {
                    full.get_or_insert(why);
                    continue;
                }
            };
            if let (Some(observer), Some(added)) = (observer, &recorded.added) {
                observer.added(namespace, name, pod, added);
            }
            if recorded.became_active {
                self.watch.woke(namespace, name);
            }
        }
        match (full, went_back) {
            (Some(full), _) => Err(NotTaken::Full(full)),
            (None, Some((name, error))) => Err(NotTaken::WentBack(name, error)),
            (None, None) => Ok(()),
        }
    }

    /// Takes a stat of the stream.
    ///
    /// # Errors
    /// [`NoStat`].
    pub fn record_stat(&self, grant: &Grant, message: &WireStatMessage, now_ns: u64) -> Result<(), NoStat> {
        let text = |bytes| {
            let text = std::str::from_utf8(bytes)
                .ok()
                .filter(|text| inflight_stats::protocol::report::is_name(text));
            text.ok_or(NoStat::Bad)
        };
        self.reported(now_ns);
        let (namespace, name) = (text(&message.namespace)?, text(&message.name)?);
        let stat = message.stat.as_ref().ok_or(NoStat::Bad)?;
        let pod = text(&stat.pod_name)?;
        if !grant.covers(namespace) {
            return Err(NoStat::Bad);
        }
        // A stat that is dropped makes no key.
        PerSecond::of(stat).map_err(|ImplausibleStat| NoStat::Bad)?;
        let recorded =
            self.with(namespace, name, Some((pod, None)), |entry| entry.key.record_stat(pod, stat, now_ns));
        let recorded = recorded.map_err(NoStat::Full)?.map_err(|ImplausibleStat| NoStat::Bad)?;
        if recorded.became_active {
            self.watch.woke(namespace, name);
        }
        Ok(())
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
        // No more names are kept than are asked for: the last of them goes when one comes before it.
        let (mut names, mut found) = (BinaryHeap::<KeyName>::new(), 0_usize);
        self.each(|entry| {
            let (namespace, name) = &entry.name;
            let fits = part.is_empty() || format!("{namespace}/{name}").contains(part);
            if !fits || !grant.covers(namespace) {
                return;
            }
            found += 1;
            if names.len() < most {
                names.push(entry.name.clone());
            } else if let Some(mut last) = names.peek_mut()
                && entry.name < *last
            {
                last.clone_from(&entry.name);
            }
        });
        let names = names.into_sorted_vec();
        let views = names.iter().filter_map(|(namespace, name)| self.view(namespace, name, now_ns));
        (views.collect(), found)
    }

    fn reported(&self, now_ns: u64) {
        if self.first_report_ns.load(Ordering::Relaxed) == 0 {
            self.first_report_ns.store(now_ns, Ordering::Relaxed);
        }
    }

    /// Decides for every key.
    pub fn decide(&self, now_ns: u64) {
        // From the first report on: until then nobody could reach the server.
        let first_ns = self.first_report_ns.load(Ordering::Relaxed);
        if first_ns > 0 && now_ns.saturating_sub(first_ns) > MAX_PERIOD_NS {
            self.has_just_started.store(false, Ordering::Relaxed);
        }
        self.each(|entry| {
            let figures = entry.key.decide(now_ns);
            if !entry.key.is_decided() {
                return;
            }
            if entry.past.capacity() == 0 {
                if self.histories.load(Ordering::Relaxed) >= MOST_HISTORIES {
                    return;
                }
                self.histories.fetch_add(1, Ordering::Relaxed);
                entry.past = VecDeque::with_capacity(POINTS);
            }
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

    /// Makes room for a key and for what it takes by these settings; whether the key was not there.
    ///
    /// # Errors
    /// [`Full`]; nothing was changed.
    pub fn admit(&self, name: &KeyName, settings: &KeySettings) -> Result<bool, Full> {
        let (namespace, key) = name;
        let is_new = self.known(namespace, key, |_| ()).is_none();
        let room = self.with(namespace, key, None, |entry| {
            let more = self.own_bytes(name, settings).saturating_sub(entry.own_bytes);
            if more == 0 { Ok(()) } else { self.room_for(more) }
        })?;
        if room.is_err() && is_new {
            self.dismiss(name);
        }
        room.map(|()| is_new)
    }

    /// Takes a key away of which nothing is known after all.
    pub fn dismiss(&self, (namespace, name): &KeyName) {
        let (hash, mut shard) = self.shard(namespace, name);
        let place = shard.places.find(hash, |place| is(&shard.entries, *place, namespace, name)).copied();
        if let Some(place) = place
            && shard.entries.get(place).is_some_and(|entry| entry.key.last_report_ns() == 0)
        {
            self.remove(&mut shard, place);
        }
    }

    /// Has a key scaled by other settings, or by the defaults again.
    ///
    /// # Errors
    /// [`Full`]: the key is not there and there is no room for it; it will have its settings when there is.
    pub fn tell(&self, name: &KeyName, settings: Option<Arc<KeySettings>>) -> Result<(), Full> {
        let mut told = self.told.write().unwrap_or_else(PoisonError::into_inner);
        match &settings {
            Some(settings) => told.insert(name.clone(), Arc::clone(settings)),
            None => told.remove(name),
        };
        drop(told);
        let (namespace, key) = name;
        match settings {
            // A key that is told something is there, also before its first report.
            Some(settings) => self.with(namespace, key, None, |entry| self.apply(entry, settings)),
            None => {
                self.known_mut(namespace, key, |entry| self.apply(entry, Arc::clone(&self.defaults)));
                Ok(())
            }
        }
    }

    fn apply(&self, entry: &mut Entry, settings: Arc<KeySettings>) {
        self.bytes.fetch_sub(entry.own_bytes, Ordering::Relaxed);
        entry.own_bytes = self.own_bytes(&entry.name, &settings);
        self.bytes.fetch_add(entry.own_bytes, Ordering::Relaxed);
        entry.key.apply(settings);
    }

    /// Forgets senders that have long been silent, and keys that nobody has reported for a day, unless they were told
    /// something.
    pub fn forget(&self, now_ns: u64) {
        self.each(|entry| {
            entry.key.forget(now_ns);
            self.account(entry);
        });
        let is_old = |entry: &Entry| now_ns.saturating_sub(entry.key.last_report_ns()) > KEPT_NS;
        for shard in self.shards.iter() {
            let mut shard = lock(shard);
            let told = self.told.read().unwrap_or_else(PoisonError::into_inner);
            for place in (0..shard.entries.len()).rev() {
                let entry = shard.entries.get(place);
                if entry.is_some_and(|entry| is_old(entry) && !told.contains_key(&entry.name)) {
                    self.remove(&mut shard, place);
                }
            }
        }
    }

    /// The last entry takes the place that is free.
    fn remove(&self, shard: &mut Shard, place: usize) {
        let removed = shard.entries.swap_remove(place);
        let (namespace, name) = &removed.name;
        let found = shard.places.find_entry(self.hash(namespace, name), |at| *at == place);
        if let Ok(found) = found {
            found.remove();
        }
        if let Some(moved) = shard.entries.get(place) {
            let (from, hash) = (shard.entries.len(), self.hash(&moved.name.0, &moved.name.1));
            if let Some(at) = shard.places.find_mut(hash, |at| *at == from) {
                *at = place;
            }
        }
        self.bytes.fetch_sub(removed.own_bytes + removed.sender_bytes, Ordering::Relaxed);
        if removed.past.capacity() > 0 {
            self.histories.fetch_sub(1, Ordering::Relaxed);
        }
        let mut counts = lock(&self.counts);
        counts.all = counts.all.saturating_sub(1);
        if let Some(count) = counts.of_namespace.get_mut(namespace) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                counts.of_namespace.remove(namespace);
            }
        }
    }

    /// What a key takes by these settings, without its senders; at least what it takes by the defaults, so that these can
    /// always be had again.
    fn own_bytes(&self, (namespace, name): &KeyName, settings: &KeySettings) -> usize {
        const ENTRY: usize = size_of::<Entry>() + 16;
        // Places in the lists of keys and of namespaces, which are half full after they have grown.
        const PLACES: usize =
            2 * size_of::<Box<Entry>>() + (size_of::<usize>() + size_of::<(String, usize)>() + 2) * 16 / 7;
        let names = 2 * heap_bytes(namespace.len()) + heap_bytes(name.len());
        ENTRY + PLACES + names + Key::settings_bytes(settings).max(Key::settings_bytes(&self.defaults))
    }

    /// Whether so many bytes more fit in. Whoever asks at the same time may get the same ones: too much by a key for each
    /// thread at the most.
    fn room_for(&self, more: usize) -> Result<(), Full> {
        let taken = self.bytes.load(Ordering::Relaxed);
        if taken.saturating_add(more) <= self.room.bytes {
            return Ok(());
        }
        let reason = format!("keys and who reports them take {taken} bytes, and {more} more are too many");
        Err(Full { limit: Limit::TableBytes, reason })
    }

    /// Notes what a key's senders take now.
    fn account(&self, entry: &mut Entry) {
        let now = entry.key.sender_bytes();
        if now != entry.sender_bytes {
            self.bytes.fetch_add(now, Ordering::Relaxed);
            self.bytes.fetch_sub(entry.sender_bytes, Ordering::Relaxed);
            entry.sender_bytes = now;
        }
    }

    /// Every entry, each under a lock of its own.
    fn each(&self, mut f: impl FnMut(&mut Entry)) {
        for shard in self.shards.iter() {
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
        let (hash, mut shard) = self.shard(namespace, name);
        let Shard { places, entries } = &mut *shard;
        let place = *places.find(hash, |place| is(entries, *place, namespace, name))?;
        entries.get_mut(place).map(|entry| f(entry))
    }

    /// An entry, which is made if it is not there and there is room: for it, and in it for a pod's stat, or for a report of
    /// an incarnation. A key that is there costs one hash and no allocation.
    fn with<T>(
        &self,
        namespace: &str,
        name: &str,
        sender: Option<(&str, Option<u64>)>,
        f: impl FnOnce(&mut Entry) -> T,
    ) -> Result<T, Full> {
        let (hash, mut shard) = self.shard(namespace, name);
        let Shard { places, entries } = &mut *shard;
        let place = match places.find(hash, |place| is(entries, *place, namespace, name)) {
            Some(place) => *place,
            None => {
                let entry = self.make(namespace, name, sender.map(|(pod, _)| pod))?;
                entries.push(entry);
                let place = entries.len() - 1;
                let rehash = |place: &usize| {
                    entries.get(*place).map_or(0, |entry| self.hash(&entry.name.0, &entry.name.1))
                };
                places.insert_unique(hash, place, rehash);
                place
            }
        };
        #[allow(clippy::indexing_slicing, reason = "a place is that of an entry")]
        let entry = &mut entries[place];
        if let Some((pod, incarnation)) = sender {
            let most = self.room.pods_per_key;
            if entry.key.sender_count() >= most && !entry.key.has_sender(pod) {
                let reason = format!("key {namespace}/{name} has {most} pods and gateways");
                return Err(Full { limit: Limit::PodsPerKey, reason });
            }
            // Who is known needs nothing more, which only has to be looked for if there is little left.
            if self.room_for(Key::max_additional_bytes(pod)).is_err() {
                match entry.key.additional_bytes(pod, incarnation) {
                    0 => {}
                    missing => self.room_for(missing)?,
                }
            }
        }
        let done = f(entry);
        self.account(entry);
        Ok(done)
    }

    /// A new key, if there is room for it and for the one who reports it.
    fn make(&self, namespace: &str, name: &str, pod: Option<&str>) -> Result<Box<Entry>, Full> {
        let name = (namespace.to_owned(), name.to_owned());
        let told = self.told.read().unwrap_or_else(PoisonError::into_inner);
        let settings = Arc::clone(told.get(&name).unwrap_or(&self.defaults));
        drop(told);
        let own_bytes = self.own_bytes(&name, &settings);
        let mut counts = lock(&self.counts);
        let most = self.room.keys;
        if counts.all >= most {
            return Err(Full { limit: Limit::Keys, reason: format!("there are {most} keys") });
        }
        let (most, of_namespace) = (self.room.keys_per_namespace, counts.of_namespace.get(namespace));
        if of_namespace.is_some_and(|count| *count >= most) {
            let reason = format!("namespace {namespace} has {most} keys");
            return Err(Full { limit: Limit::KeysPerNamespace, reason });
        }
        let mut key = Key::new(settings);
        if self.has_just_started.load(Ordering::Relaxed) {
            key = key.after_start(self.started_ns);
        }
        let sender_bytes = key.sender_bytes();
        self.room_for(own_bytes + sender_bytes + pod.map_or(0, Key::max_additional_bytes))?;
        self.bytes.fetch_add(own_bytes + sender_bytes, Ordering::Relaxed);
        counts.all += 1;
        *counts.of_namespace.entry(namespace.to_owned()).or_default() += 1;
        Ok(Box::new(Entry { name, key, past: VecDeque::new(), own_bytes, sender_bytes }))
    }

    fn hash(&self, namespace: &str, name: &str) -> u64 {
        self.hasher.hash_one((namespace, name))
    }

    #[allow(clippy::indexing_slicing, reason = "a remainder of SHARDS is below SHARDS")]
    fn shard(&self, namespace: &str, name: &str) -> (u64, MutexGuard<'_, Shard>) {
        let hash = self.hash(namespace, name);
        // The table within the shard goes by the lower and the highest bits.
        (hash, lock(&self.shards[(hash >> 32) as usize % SHARDS]))
    }
}

fn is(entries: &[Box<Entry>], place: usize, namespace: &str, name: &str) -> bool {
    entries.get(place).is_some_and(|entry| entry.name.0 == namespace && entry.name.1 == name)
}

/// A thread that panicked in a shard left whole values behind: each change of a key is checked first.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use inflight_stats::{KeyReport, Snapshot};

    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const NOW: u64 = 1_700_000_000 * SECOND;

    fn keys(keys_per_namespace: usize, pods_per_key: usize) -> Keys {
        in_room(Room { keys: 100_000, keys_per_namespace, pods_per_key, bytes: 256 << 20 })
    }

    fn in_room(room: Room) -> Keys {
        Keys::new(Arc::default(), room, 0)
    }

    fn taken(keys: &Keys) -> usize {
        keys.bytes.load(Ordering::Relaxed)
    }

    fn report(pod: &str, names: &[(&str, &str)]) -> Report {
        let until = Snapshot { as_of_ns: 2 * SECOND, requests: 5, ..Snapshot::default() };
        let message = |(namespace, name): &(&str, &str)| KeyReport {
            namespace: (*namespace).into(),
            name: (*name).into(),
            from_gateway: true,
            since: Snapshot::starting_at(SECOND),
            until,
        };
        Report { version: 1, pod: pod.into(), incarnation: 1, messages: names.iter().map(message).collect() }
    }

    fn take(keys: &Keys, report: &Report, now_ns: u64) -> Result<(), String> {
        keys.record(report, now_ns, None::<&crate::forward::Forward>).map_err(|not| match not {
            NotTaken::Full(full) => full.to_string(),
            NotTaken::WentBack(..) => "went back".into(),
        })
    }

    fn total(keys: &Keys, namespace: &str, name: &str) -> Option<u64> {
        keys.view(namespace, name, NOW).map(|view| view.figures.requests_total)
    }

    #[test]
    fn a_full_namespace_takes_no_new_key_and_nothing_from_the_others() {
        let keys = keys(2, 9);
        take(&keys, &report("pod", &[("full", "a"), ("full", "b")]), NOW).unwrap();
        let mixed = report("gateway", &[("full", "a"), ("full", "c"), ("other", "c")]);
        for _ in 0..2 {
            // What fits is taken, and taken once, however often it is said.
            assert_eq!(
                take(&keys, &mixed, NOW).unwrap_err(),
                "namespace full has 2 keys, all that --max-keys-per-namespace allows"
            );
            assert_eq!(total(&keys, "full", "a"), Some(10));
            assert_eq!((total(&keys, "full", "c"), total(&keys, "other", "c")), (None, Some(5)));
        }
    }

    #[test]
    fn a_key_takes_so_many_pods() {
        let keys = keys(9, 2);
        for pod in ["one", "two", "one"] {
            take(&keys, &report(pod, &[("ns", "rev")]), NOW).unwrap();
        }
        assert_eq!(
            take(&keys, &report("three", &[("ns", "rev")]), NOW).unwrap_err(),
            "key ns/rev has 2 pods and gateways, all that --max-pods-per-key allows"
        );
        assert_eq!(total(&keys, "ns", "rev"), Some(10));
        // Those that are silent make room.
        keys.forget(NOW + 3600 * SECOND);
        take(&keys, &report("three", &[("ns", "rev")]), NOW + 3600 * SECOND).unwrap();
    }

    #[test]
    fn a_key_is_forgotten_after_a_day_and_makes_room() {
        let keys = keys(40, 9);
        let names: Vec<String> = (0..40).map(|number| format!("rev-{number}")).collect();
        for name in &names {
            take(&keys, &report("pod", &[("ns", name)]), NOW).unwrap();
        }
        keys.tell(&("ns".into(), "rev-7".into()), Some(Arc::default())).unwrap();
        let later = NOW + KEPT_NS;
        take(&keys, &report("pod", &[("ns", "rev-3"), ("ns", "rev-39")]), later).unwrap();
        keys.forget(later);
        assert!(names.iter().all(|name| total(&keys, "ns", name).is_some()), "not yet a day");
        keys.forget(later + 1);
        let left: Vec<&String> = names.iter().filter(|name| total(&keys, "ns", name).is_some()).collect();
        assert_eq!(left, ["rev-3", "rev-7", "rev-39"]);
        for name in &names {
            take(&keys, &report("another", &[("ns", name)]), later).unwrap();
        }
        assert!(take(&keys, &report("pod", &[("ns", "one-more")]), later).is_err());
    }

    #[test]
    fn all_keys_together_have_a_limit() {
        let keys = in_room(Room { keys: 3, keys_per_namespace: 2, pods_per_key: 9, bytes: 1 << 20 });
        take(&keys, &report("pod", &[("a", "1"), ("a", "2"), ("b", "1")]), NOW).unwrap();
        assert_eq!(
            take(&keys, &report("pod", &[("c", "1"), ("b", "1")]), NOW).unwrap_err(),
            "there are 3 keys, all that --max-keys allows"
        );
        keys.forget(NOW + KEPT_NS + 1);
        take(&keys, &report("pod", &[("c", "1")]), NOW).unwrap();
    }

    #[test]
    fn what_keys_take_has_a_limit_and_comes_back() {
        let room =
            Room { keys: 1_000_000, keys_per_namespace: 1_000_000, pods_per_key: 1_000_000, bytes: 1 << 20 };
        let keys = in_room(room);
        let pods: Vec<String> = (0..10_000).map(|number| format!("pod-{number}")).collect();
        let fits = |more: &str| {
            pods.iter().take_while(|pod| take(&keys, &report(pod, &[("ns", more)]), NOW).is_ok()).count()
        };
        // Pods of one key, until they are too many; then a key finds no room either.
        let senders = fits("rev");
        assert!((2_000..4_000).contains(&senders), "{senders}");
        let reason = take(&keys, &report("more", &[("ns", "rev")]), NOW).unwrap_err();
        assert!(reason.contains("--max-table-bytes"), "{reason}");
        assert!(
            taken(&keys) <= room.bytes && take(&keys, &report("pod-0", &[("ns", "another")]), NOW).is_err()
        );
        // Who is known goes on.
        take(&keys, &report("pod-0", &[("ns", "rev")]), NOW).unwrap();
        keys.forget(NOW + 3600 * SECOND);
        assert!(taken(&keys) < 4_000, "{}", taken(&keys));

        // Keys, which go after a day.
        let made =
            (0..).take_while(|n| take(&keys, &report("pod", &[("ns", &n.to_string())]), NOW).is_ok()).count();
        assert!((300..600).contains(&made), "{made}");
        keys.forget(NOW + KEPT_NS + 1);
        assert_eq!(taken(&keys), 0);

        // Wide windows; the defaults can always be had again.
        let told = |json| Arc::new(keys.defaults().with(json, 200.0).unwrap());
        let widest = told(serde_json::json!({"stable_window": "60m", "panic_window_percentage": 100}));
        let name = |number: usize| ("ns".to_owned(), number.to_string());
        let wide = (0..).take_while(|n| {
            let admitted = keys.admit(&name(*n), &widest);
            admitted.is_ok_and(|is_new| is_new && keys.tell(&name(*n), Some(Arc::clone(&widest))).is_ok())
        });
        assert_eq!(wide.count(), (1 << 20) / (2 * (16 * 3600 + 16) + 1_000));
        assert!(keys.view("ns", "9", NOW).is_none() && taken(&keys) <= room.bytes, "not made for nothing");
        keys.tell(&name(0), None).unwrap();
        keys.tell(&name(0), Some(Arc::clone(&widest))).unwrap();
        (0..9).for_each(|number| keys.tell(&name(number), None).unwrap());
        keys.forget(NOW);
        assert_eq!((taken(&keys), keys.views(&all(), "", 9, NOW).1), (0, 0));
    }

    fn all() -> Grant {
        crate::net::auth::Access::load(None, false, crate::cli::flags::AnonymousAccess::Full)
            .unwrap()
            .check(None, crate::net::listener::Peer::default())
            .unwrap()
    }

    #[test]
    fn no_more_keys_than_so_many_have_a_history() {
        let keys = keys(100_000, 9);
        let with_history = || {
            let mut count = 0;
            keys.each(|entry| count += usize::from(entry.past.capacity() > 0));
            count
        };
        let decide_with = |names: std::ops::Range<usize>| {
            for name in names {
                take(&keys, &report("pod", &[("ns", &name.to_string())]), NOW).unwrap();
            }
            keys.decide(NOW);
            keys.decide(NOW);
            with_history()
        };
        assert_eq!(
            [decide_with(0..1_990), decide_with(1_990..3_000), decide_with(3_000..3_020)],
            [1_990, 2_000, 2_000]
        );
        keys.forget(NOW + KEPT_NS + 1);
        assert_eq!((with_history(), keys.histories.load(Ordering::Relaxed)), (0, 0));
    }

    #[test]
    fn a_stat_that_is_dropped_makes_no_key() {
        let keys = keys(9, 9);
        let mut stat = inflight_stats::protocol::stat::Stat {
            pod_name: "pod".into(),
            request_count: f64::NAN,
            ..Default::default()
        };
        let mut record = |count: f64| {
            stat.request_count = count;
            let message =
                WireStatMessage { namespace: "ns".into(), name: "ghost".into(), stat: Some(stat.clone()) };
            (keys.record_stat(&all(), &message, NOW).is_ok(), total(&keys, "ns", "ghost"))
        };
        assert_eq!(
            [record(f64::NAN), record(-2.0), record(-1.0)],
            [(false, None), (false, None), (true, Some(0))]
        );
    }

    #[test]
    fn a_listing_is_of_the_first_names() {
        let keys = keys(1_000, 9);
        for number in (0..500).rev() {
            take(&keys, &report("pod", &[("ns", &format!("{number:03}"))]), NOW).unwrap();
        }
        let (views, found) = keys.views(&all(), "ns/", 3, NOW);
        let names: Vec<String> = views.into_iter().map(|view| view.name.1).collect();
        assert_eq!((names.join(" "), found), ("000 001 002".into(), 500));
    }
}
