//! Every key's figures, in memory. Keys are sharded, so that reports of different keys seldom wait
//! for each other; no lock is held across keys.

use std::collections::{BinaryHeap, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use hashbrown::HashTable;
use inflight_stats::protocol::key_name::KeyName;
use inflight_stats::protocol::report::is_name;
use inflight_stats::protocol::report_delta::CounterDecreased;
use inflight_stats::protocol::stat::{Stat, WireStatMessage};
use inflight_stats::scaling::answer::{Missing, Quantity};
use inflight_stats::scaling::key::{Figures, Key, MAX_PERIOD_NS, STALE_AFTER};
use inflight_stats::scaling::memory::heap_bytes;
use inflight_stats::scaling::sender::{ImplausibleStat, PerSecond};
use inflight_stats::scaling::settings::KeySettings;
use inflight_stats::{KeyReport, Report};
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::cli::limits::Limit;
use crate::keys::activity::ActivityWatchers;
use crate::keys::capacity::{Capacity, CapacityExceeded};
use crate::keys::history::{History, HistoryPoint};
use crate::keys::key_view::KeyView;
use crate::keys::listing::{Listed, Listing};
use crate::net::auth::Grant;
use crate::os::clock;
use crate::os::lock::lock;
use crate::telemetry::log_limit::LogLimiter;

const SHARDS: usize = 64;
/// Maximum number of keys whose history is kept: 8.4 KB each.
const MAX_HISTORIES: usize = 1_200;
/// A key that nobody has reported for so long is forgotten.
const RETENTION_NS: u64 = 24 * 3600 * 1_000_000_000;
/// With a shared state, its store may be away for so long before all keys are stale.
const MAX_STORE_SILENCE: Duration = Duration::from_secs(10);

struct TableEntry {
    name: KeyName,
    key: Key,
    history: History,
    /// What was last accounted for it, without its senders and for these.
    own_bytes: usize,
    sender_bytes: usize,
}

impl TableEntry {
    fn view(&self, now_ns: u64) -> KeyView {
        KeyView {
            name: self.name.clone(),
            figures: self.key.figures(now_ns),
            desired_pods: self.key.desired_pods(now_ns),
            ready_pods: self.key.ready_pods(),
            decision: self.key.is_decided().then(|| self.key.decision()),
            settings: Arc::clone(self.key.settings()),
            missing: self.key.missing(now_ns),
            stale_since_ns: self.key.stale_since_ns(now_ns),
        }
    }

    fn is(&self, namespace: &str, name: &str) -> bool {
        self.name.namespace == namespace && self.name.name == name
    }
}

/// A part of the keys: entries, and an index that finds them by name. The entries are a vector,
/// instead of values of a map, so that [`KeyTable::for_each`] can release the lock between two of
/// them and go on from there. Where one is removed, the last one takes its position.
#[derive(Default)]
struct Shard {
    index: HashTable<usize>,
    #[allow(clippy::vec_box, reason = "a vector that has grown is half empty: of pointers that is little")]
    entries: Vec<Box<TableEntry>>,
}

/// How many keys there are.
#[derive(Default)]
struct Counts {
    all: usize,
    by_namespace: HashMap<String, usize>,
}

/// Why a report was not recorded as a whole: the first key that was left out, and the reason. All
/// other keys were recorded.
#[derive(Debug)]
pub enum RecordError {
    /// A counter of the key decreased; that stays so when the report is sent again.
    CounterDecreased(KeyName, CounterDecreased),
    /// The report may be sent again.
    CapacityExceeded(CapacityExceeded),
}

/// Why a stat was not recorded.
#[derive(Clone, Debug)]
pub enum StatError {
    /// Missing fields, implausible numbers, or a namespace that the token does not cover.
    Invalid,
    /// Valid, but a limit is reached.
    CapacityExceeded(CapacityExceeded),
}

/// Who reports a key: by a report of an incarnation, or (without one) by a stat.
#[derive(Clone, Copy)]
struct SenderId<'a> {
    name: &'a str,
    incarnation: Option<u64>,
}

/// A stat whose fields are there.
#[derive(Clone, Copy, Debug)]
pub struct KeyStat<'a> {
    namespace: &'a str,
    name: &'a str,
    pod: &'a str,
    stat: &'a Stat,
}

impl<'a> KeyStat<'a> {
    /// Checks a stat. One that is not plausible makes no key.
    ///
    /// # Errors
    /// [`StatError::Invalid`].
    pub fn check(message: &'a WireStatMessage) -> Result<Self, StatError> {
        let text = |bytes| {
            let text = std::str::from_utf8(bytes).ok().filter(|text| is_name(text));
            text.ok_or(StatError::Invalid)
        };
        let (namespace, name) = (text(&message.namespace)?, text(&message.name)?);
        let stat = message.stat.as_ref().ok_or(StatError::Invalid)?;
        let pod = text(&stat.pod_name)?;
        PerSecond::try_from(stat).map_err(|ImplausibleStat| StatError::Invalid)?;
        Ok(Self { namespace, name, pod, stat })
    }

    /// Returns the key's namespace.
    pub fn namespace(&self) -> &'a str {
        self.namespace
    }
}

/// What of a table is not in its keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableTimes {
    started_ns: u64,
    first_report_ns: u64,
    has_just_started: bool,
}

/// All keys.
pub struct KeyTable {
    shards: Box<[Mutex<Shard>; SHARDS]>,
    hasher: RandomState,
    defaults: Arc<KeySettings>,
    capacity: Capacity,
    started_ns: AtomicU64,
    stale_after: Duration,
    /// When the first report or stat came; 0 before.
    first_report_ns: AtomicU64,
    /// Whether senders of a new key may have reported it to the server before this one.
    has_just_started: AtomicBool,
    counts: Mutex<Counts>,
    bytes: AtomicUsize,
    histories: AtomicUsize,
    /// Of the keys that have settings of their own.
    own_settings: RwLock<HashMap<KeyName, Arc<KeySettings>>>,
    /// Who waits for a key's first traffic.
    pub watchers: ActivityWatchers,
    /// For warnings about single keys, of which there may be many at once.
    warnings: LogLimiter,
    /// With a shared state, the time of the last change; else 0.
    log_time_ns: AtomicU64,
    /// How long the store of a shared state has been away.
    store_silence_ns: AtomicU64,
}

impl KeyTable {
    /// An empty table, whose keys are scaled by `defaults` unless they have settings of their own.
    /// Until all senders can have reported since the unix time `started_ns` in nanoseconds (0: long
    /// ago), too little is known to decide by.
    pub fn new(defaults: Arc<KeySettings>, capacity: Capacity, started_ns: u64) -> Self {
        Self {
            shards: Box::new(std::array::from_fn(|_| Mutex::default())),
            hasher: RandomState::new(),
            defaults,
            capacity,
            started_ns: AtomicU64::new(started_ns),
            stale_after: STALE_AFTER,
            first_report_ns: AtomicU64::new(0),
            has_just_started: AtomicBool::new(started_ns > 0),
            counts: Mutex::default(),
            bytes: AtomicUsize::new(0),
            histories: AtomicUsize::new(0),
            own_settings: RwLock::default(),
            watchers: ActivityWatchers::default(),
            warnings: LogLimiter::default(),
            log_time_ns: AtomicU64::new(0),
            store_silence_ns: AtomicU64::new(0),
        }
    }

    /// Returns the time by which keys are recorded, decided on and shown, as unix time in nanoseconds:
    /// that of the last change where the state is shared, else the server's.
    pub fn now_ns(&self) -> u64 {
        match self.log_time_ns.load(Ordering::Relaxed) {
            0 => clock::now_ns(),
            log_time_ns => log_time_ns,
        }
    }

    /// Has the keys shown by the time of a shared state from now on.
    pub fn set_log_time(&self, now_ns: u64) {
        self.log_time_ns.store(now_ns, Ordering::Relaxed);
    }

    /// Notes for how long the store of a shared state has been away: after ten seconds all keys are
    /// stale, as those whose senders fell silent.
    pub fn set_store_silence(&self, silence: Duration) {
        let was = self.store_missing();
        let silence_ns = u64::try_from(silence.as_nanos()).unwrap_or(u64::MAX);
        self.store_silence_ns.store(silence_ns, Ordering::Relaxed);
        if was.is_some() != self.store_missing().is_some() {
            self.refresh_watchers(self.now_ns());
        }
    }

    /// Returns why nothing is said of keys because the store of a shared state is away.
    fn store_missing(&self) -> Option<Missing> {
        let silence = Duration::from_nanos(self.store_silence_ns.load(Ordering::Relaxed));
        if silence < MAX_STORE_SILENCE {
            return None;
        }
        let since_ns = self.now_ns();
        Some(match silence > self.stale_after {
            true => Missing::Forgotten,
            false => Missing::Stale { since_ns, for_seconds: silence.as_secs() },
        })
    }

    fn refresh_watchers(&self, now_ns: u64) {
        self.watchers.refresh(|name| self.activity(name, now_ns).ok());
    }

    /// Notifies those who watch keys of a report that cannot be recorded now, although it has traffic.
    pub fn wake(&self, report: &Report) {
        for KeyReport { namespace, name, since, until, .. } in &report.messages {
            let has_traffic = until.in_flight > 0 || until.requests > since.requests;
            // Only keys that are there: whoever may report must not make others active.
            if has_traffic && self.known(&KeyName::new(namespace, name), |_| ()).is_some() {
                self.watchers.mark_active(namespace, name);
            }
        }
    }

    /// The same table, whose keys keep their decision for so long when their senders fall silent.
    #[must_use]
    pub fn with_stale_after(self, stale_after: Duration) -> Self {
        Self { stale_after, ..self }
    }

    /// Returns what keys are scaled by that have no settings of their own.
    pub fn defaults(&self) -> &Arc<KeySettings> {
        &self.defaults
    }

    /// Records a report, and calls `forward` with what to forward of each key. Keys that cannot be
    /// recorded are left out, and do not affect the others. The sender has to send those that
    /// exceed the capacity again: what was recorded adds nothing when it is sent again.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn record(
        &self,
        report: &Report,
        now_ns: u64,
        mut forward: impl FnMut(&KeyReport, &PerSecond),
    ) -> Result<(), RecordError> {
        let Report { pod, incarnation, messages, .. } = report;
        let sender = SenderId { name: pod, incarnation: Some(*incarnation) };
        self.note_report(now_ns);
        let (mut exceeded, mut decreased) = (None, None);
        for message in messages {
            let (namespace, name) = (&message.namespace, &message.name);
            let recorded = self.with_entry(namespace, name, Some(sender), |entry| {
                entry.key.record(pod, *incarnation, message, now_ns)
            });
            let recorded = match recorded {
                Ok(Ok(recorded)) => recorded,
                Ok(Err(error)) => {
                    decreased.get_or_insert_with(|| (KeyName::new(namespace, name), error));
                    continue;
                }
                Err(error) => {
                    exceeded.get_or_insert(error);
                    continue;
                }
            };
            if let Some(stat) = &recorded.forward {
                forward(message, stat);
            }
            if recorded.became_active {
                self.watchers.mark_active(namespace, name);
            }
        }
        match (exceeded, decreased) {
            (Some(exceeded), _) => Err(RecordError::CapacityExceeded(exceeded)),
            (None, Some((name, error))) => Err(RecordError::CounterDecreased(name, error)),
            (None, None) => Ok(()),
        }
    }

    /// Records a stat of the stream.
    ///
    /// # Errors
    /// [`StatError`].
    pub fn record_stat(&self, message: KeyStat<'_>, now_ns: u64) -> Result<(), StatError> {
        let KeyStat { namespace, name, pod, stat } = message;
        self.note_report(now_ns);
        let sender = SenderId { name: pod, incarnation: None };
        let recorded = self
            .with_entry(namespace, name, Some(sender), |entry| entry.key.record_stat(pod, stat, now_ns))
            .map_err(StatError::CapacityExceeded)?
            .map_err(|ImplausibleStat| StatError::Invalid)?;
        if recorded.became_active {
            self.watchers.mark_active(namespace, name);
        }
        Ok(())
    }

    /// Returns what is known of one key.
    pub fn view(&self, name: &KeyName, now_ns: u64) -> Option<KeyView> {
        let view = self.known(name, |entry| entry.view(now_ns))?;
        Some(self.shown(view))
    }

    /// Returns a view as it is shown while the store of a shared state is away.
    fn shown(&self, view: KeyView) -> KeyView {
        match self.store_missing() {
            Some(missing @ Missing::Stale { since_ns, .. }) => KeyView {
                missing: Some(missing),
                stale_since_ns: view.stale_since_ns.or(Some(since_ns)),
                ..view
            },
            Some(missing) => {
                KeyView { missing: Some(missing), stale_since_ns: None, desired_pods: None, ..view }
            }
            None => view,
        }
    }

    /// Returns what `read` returns of a known key.
    pub fn read<T>(&self, name: &KeyName, read: impl FnOnce(&Key) -> T) -> Option<T> {
        self.known(name, |entry| read(&entry.key))
    }

    /// Returns what is known of a key.
    ///
    /// # Errors
    /// [`Missing`]; also for a key that nobody has reported.
    pub fn ask<T>(&self, name: &KeyName, ask: impl FnOnce(&Key) -> Result<T, Missing>) -> Result<T, Missing> {
        let answer = self.read(name, ask).unwrap_or(Err(Missing::NeverReported));
        match (self.store_missing(), &answer) {
            (None, _) | (_, Err(Missing::NeverReported)) => answer,
            (Some(missing), _) => Err(missing),
        }
    }

    /// Returns what autoscalers are told of a key.
    ///
    /// # Errors
    /// [`Missing`].
    pub fn answer(&self, name: &KeyName, quantity: Quantity, now_ns: u64) -> Result<f64, Missing> {
        self.ask(name, |key| key.answer(quantity, now_ns))
    }

    /// Returns whether a key should have any pod.
    ///
    /// # Errors
    /// [`Missing`].
    pub fn activity(&self, name: &KeyName, now_ns: u64) -> Result<bool, Missing> {
        self.ask(name, |key| key.activity(now_ns))
    }

    /// Returns a key's last ten minutes, which are empty if too many keys have a history.
    pub fn history(&self, name: &KeyName) -> Option<History> {
        self.known(name, |entry| entry.history.clone())
    }

    /// Returns the first keys of a listing among those of the namespaces granted; and how many keys
    /// it has, also beyond its maximum.
    pub fn views(&self, grant: &Grant, listing: &Listing, now_ns: u64) -> (Vec<KeyView>, usize) {
        // No more names are kept than are asked for: the last of them goes when one comes before
        // it.
        let (mut listed, mut found) = (BinaryHeap::<Listed>::new(), 0_usize);
        self.for_each(|entry| {
            if !listing.finds(&entry.name) || !grant.covers(&entry.name.namespace) {
                return;
            }
            let Some(rank) = listing.rank(|| self.shown(entry.view(now_ns))) else { return };
            found += 1;
            if listed.len() < listing.max {
                listed.push(Listed { rank, name: entry.name.clone() });
            } else if let Some(mut last) = listed.peek_mut()
                && last.is_after(rank, &entry.name)
            {
                *last = Listed { rank, name: entry.name.clone() };
            }
        });
        let listed = listed.into_sorted_vec();
        (listed.iter().filter_map(|listed| self.view(&listed.name, now_ns)).collect(), found)
    }

    fn note_report(&self, now_ns: u64) {
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
        self.for_each(|entry| {
            let figures = entry.key.decide(now_ns);
            self.warn_of_mismatch(entry, &figures);
            if !entry.key.is_decided() {
                return;
            }
            if !entry.history.is_enabled() {
                if self.histories.load(Ordering::Relaxed) >= MAX_HISTORIES {
                    return;
                }
                self.histories.fetch_add(1, Ordering::Relaxed);
                entry.history.enable();
            }
            let settings = entry.key.settings();
            let is_heard = entry.key.is_heard(now_ns);
            let ready_pods = entry.key.ready_pods().unwrap_or_default();
            let decision = entry.key.decision();
            let point = HistoryPoint::new(now_ns, settings, &figures, is_heard, ready_pods, &decision);
            entry.history.push(settings.metric, point);
        });
        self.refresh_watchers(now_ns);
    }

    /// Warns of counts of a key that do not fit together, once. Where many keys have such counts,
    /// the others' turn comes with later decisions.
    fn warn_of_mismatch(&self, entry: &mut TableEntry, figures: &Figures) {
        let Some(mismatch) = entry.key.mismatch() else { return };
        self.warnings.log(|waiting| {
            let Figures { pods, gateways, .. } = figures;
            warn!(key = %entry.name, pods, gateways, waiting, "{mismatch}");
            entry.key.mismatch_logged(mismatch);
        });
    }

    /// Has the table begin at the unix time `started_ns` in nanoseconds, if nothing was reported yet.
    pub fn begin(&self, started_ns: u64) {
        if self.first_report_ns.load(Ordering::Relaxed) == 0 {
            self.started_ns.store(started_ns, Ordering::Relaxed);
            self.has_just_started.store(true, Ordering::Relaxed);
        }
    }

    /// Returns what [`KeyTable::replace`] takes besides the keys.
    pub fn times(&self) -> TableTimes {
        TableTimes {
            started_ns: self.started_ns.load(Ordering::Relaxed),
            first_report_ns: self.first_report_ns.load(Ordering::Relaxed),
            has_just_started: self.has_just_started.load(Ordering::Relaxed),
        }
    }

    /// Visits every key.
    pub fn visit(&self, mut visit: impl FnMut(&KeyName, &Key)) {
        self.for_each(|entry| visit(&entry.name, &entry.key));
    }

    /// Replaces the settings of all keys. Whoever calls it replaces the keys, too.
    pub fn replace_settings(&self, settings: HashMap<KeyName, Arc<KeySettings>>) {
        *self.own_settings.write().unwrap_or_else(PoisonError::into_inner) = settings;
    }

    /// Replaces all keys by others, scaled by the settings that this table has. Those that have a
    /// history here keep it. Must not be called beside anything that changes keys; whoever reads sees
    /// either state of each key.
    pub fn replace(&self, times: TableTimes, keys: Vec<(KeyName, Key)>) {
        let (mut shards, mut counts, mut bytes) = (Vec::new(), Counts::default(), 0);
        shards.resize_with(SHARDS, Shard::default);
        for (name, key) in keys {
            let own_settings = self.own_settings.read().unwrap_or_else(PoisonError::into_inner);
            let settings = Arc::clone(own_settings.get(&name).unwrap_or(&self.defaults));
            drop(own_settings);
            let own_bytes = self.own_bytes(&name, &settings);
            let key = key.restored(settings, self.stale_after);
            let sender_bytes = key.sender_bytes();
            bytes += own_bytes + sender_bytes;
            counts.all += 1;
            *counts.by_namespace.entry(name.namespace.clone()).or_default() += 1;
            let hash = self.hash(&name.namespace, &name.name);
            let history = History::default();
            let entry = Box::new(TableEntry { name, key, history, own_bytes, sender_bytes });
            if let Some(shard) = shards.get_mut(shard_of(hash)) {
                self.insert(shard, hash, entry);
            }
        }
        let mut histories = 0;
        for (shard, mut new) in self.shards.iter().zip(shards) {
            let mut shard = lock(shard);
            for old in shard.entries.iter_mut().filter(|entry| entry.history.is_enabled()) {
                let KeyName { namespace, name } = &old.name;
                let position = new.position(self.hash(namespace, name), namespace, name);
                if let Some(entry) = position.and_then(|position| new.entries.get_mut(position)) {
                    entry.history = std::mem::take(&mut old.history);
                    histories += 1;
                }
            }
            *shard = new;
        }
        *lock(&self.counts) = counts;
        self.bytes.store(bytes, Ordering::Relaxed);
        self.histories.store(histories, Ordering::Relaxed);
        self.started_ns.store(times.started_ns, Ordering::Relaxed);
        self.first_report_ns.store(times.first_report_ns, Ordering::Relaxed);
        self.has_just_started.store(times.has_just_started, Ordering::Relaxed);
    }

    /// Reserves memory for a key with these settings. Returns whether the key is new.
    ///
    /// # Errors
    /// [`CapacityExceeded`]; nothing was changed.
    pub fn reserve_key(&self, name: &KeyName, settings: &KeySettings) -> Result<bool, CapacityExceeded> {
        let is_new = self.known(name, |_| ()).is_none();
        let reserved = self.with_entry(&name.namespace, &name.name, None, |entry| {
            let more = self.own_bytes(name, settings).saturating_sub(entry.own_bytes);
            if more == 0 { Ok(()) } else { self.check_bytes(more) }
        })?;
        if reserved.is_err() && is_new {
            self.release_key(name);
        }
        reserved.map(|()| is_new)
    }

    /// Removes a key that was reserved and that nobody has reported.
    pub fn release_key(&self, name: &KeyName) {
        let (hash, mut shard) = self.shard(&name.namespace, &name.name);
        let position = shard.position(hash, &name.namespace, &name.name);
        if let Some(position) = position
            && shard.entries.get(position).is_some_and(|entry| entry.key.last_report_ns() == 0)
        {
            self.remove(&mut shard, position);
        }
    }

    /// Has a key scaled by settings of its own, or (`None`) by the defaults again.
    ///
    /// # Errors
    /// [`CapacityExceeded`]: the key is new and does not fit; it will get its settings when it
    /// does.
    pub fn set_settings(
        &self,
        name: &KeyName,
        settings: Option<Arc<KeySettings>>,
    ) -> Result<(), CapacityExceeded> {
        let mut own_settings = self.own_settings.write().unwrap_or_else(PoisonError::into_inner);
        match &settings {
            Some(settings) => own_settings.insert(name.clone(), Arc::clone(settings)),
            None => own_settings.remove(name),
        };
        drop(own_settings);
        match settings {
            // A key with settings exists, also before its first report.
            Some(settings) => self.with_entry(&name.namespace, &name.name, None, |entry| {
                self.set_entry_settings(entry, settings)
            }),
            None => {
                self.known_mut(name, |entry| self.set_entry_settings(entry, Arc::clone(&self.defaults)));
                Ok(())
            }
        }
    }

    fn set_entry_settings(&self, entry: &mut TableEntry, settings: Arc<KeySettings>) {
        self.bytes.fetch_sub(entry.own_bytes, Ordering::Relaxed);
        entry.own_bytes = self.own_bytes(&entry.name, &settings);
        self.bytes.fetch_add(entry.own_bytes, Ordering::Relaxed);
        entry.key.set_settings(settings);
    }

    /// Forgets senders that have long been silent, and keys that nobody has reported for a day,
    /// unless they have settings of their own.
    pub fn forget(&self, now_ns: u64) {
        self.for_each(|entry| {
            entry.key.forget(now_ns);
            self.account(entry);
        });
        let is_old = |entry: &TableEntry| now_ns.saturating_sub(entry.key.last_report_ns()) > RETENTION_NS;
        for shard in self.shards.iter() {
            let mut shard = lock(shard);
            let own_settings = self.own_settings.read().unwrap_or_else(PoisonError::into_inner);
            for position in (0..shard.entries.len()).rev() {
                let entry = shard.entries.get(position);
                if entry.is_some_and(|entry| is_old(entry) && !own_settings.contains_key(&entry.name)) {
                    self.remove(&mut shard, position);
                }
            }
        }
    }

    fn remove(&self, shard: &mut Shard, position: usize) {
        let removed = shard.entries.swap_remove(position);
        let KeyName { namespace, name } = &removed.name;
        let found = shard.index.find_entry(self.hash(namespace, name), |at| *at == position);
        if let Ok(found) = found {
            found.remove();
        }
        if let Some(moved) = shard.entries.get(position) {
            let from = shard.entries.len();
            let hash = self.hash(&moved.name.namespace, &moved.name.name);
            if let Some(at) = shard.index.find_mut(hash, |at| *at == from) {
                *at = position;
            }
        }
        self.bytes.fetch_sub(removed.own_bytes + removed.sender_bytes, Ordering::Relaxed);
        if removed.history.is_enabled() {
            self.histories.fetch_sub(1, Ordering::Relaxed);
        }
        let mut counts = lock(&self.counts);
        counts.all = counts.all.saturating_sub(1);
        if let Some(count) = counts.by_namespace.get_mut(namespace) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                counts.by_namespace.remove(namespace);
            }
        }
    }

    /// Returns what a key takes by these settings, without its senders; at least what it takes by
    /// the defaults, so that it can always return to these.
    fn own_bytes(&self, name: &KeyName, settings: &KeySettings) -> usize {
        const ENTRY: usize = size_of::<TableEntry>() + 16;
        // In the index, the entries and the counts by namespace, which are half full after they
        // have grown.
        const INDEX: usize = 2 * size_of::<Box<TableEntry>>()
            + (size_of::<usize>() + size_of::<(String, usize)>() + 2) * 16 / 7;
        let names = 2 * heap_bytes(name.namespace.len()) + heap_bytes(name.name.len());
        let of_settings = Key::settings_bytes(settings).max(Key::settings_bytes(&self.defaults));
        ENTRY + INDEX + names + of_settings
    }

    /// Checks whether so many more bytes fit. Concurrent callers may be granted the same ones: that
    /// exceeds the limit by no more than one key for each thread.
    fn check_bytes(&self, more: usize) -> Result<(), CapacityExceeded> {
        let taken = self.bytes.load(Ordering::Relaxed);
        if taken.saturating_add(more) <= self.capacity.bytes {
            return Ok(());
        }
        let max = self.capacity.bytes;
        let reason = format!("keys and senders take {taken} bytes and {more} more are needed");
        Err(CapacityExceeded { limit: Limit::TableBytes, reason, max })
    }

    /// Accounts for what a key's senders take now.
    fn account(&self, entry: &mut TableEntry) {
        let now = entry.key.sender_bytes();
        if now != entry.sender_bytes {
            self.bytes.fetch_add(now, Ordering::Relaxed);
            self.bytes.fetch_sub(entry.sender_bytes, Ordering::Relaxed);
            entry.sender_bytes = now;
        }
    }

    /// Visits every entry. The lock is released after each.
    fn for_each(&self, mut visit: impl FnMut(&mut TableEntry)) {
        for shard in self.shards.iter() {
            for position in 0.. {
                match lock(shard).entries.get_mut(position) {
                    Some(entry) => visit(entry),
                    None => break,
                }
            }
        }
    }

    fn known<T>(&self, name: &KeyName, read: impl FnOnce(&TableEntry) -> T) -> Option<T> {
        self.known_mut(name, |entry| read(entry))
    }

    fn known_mut<T>(&self, name: &KeyName, change: impl FnOnce(&mut TableEntry) -> T) -> Option<T> {
        let KeyName { namespace, name } = name;
        let (hash, mut shard) = self.shard(namespace, name);
        let position = shard.position(hash, namespace, name)?;
        shard.entries.get_mut(position).map(|entry| change(entry))
    }

    /// Changes an entry, which is made first if it does not exist. Checks the capacity: for the
    /// entry, and for its sender. A key that exists costs one hash and no allocation.
    fn with_entry<T>(
        &self,
        namespace: &str,
        name: &str,
        sender: Option<SenderId<'_>>,
        change: impl FnOnce(&mut TableEntry) -> T,
    ) -> Result<T, CapacityExceeded> {
        let (hash, mut shard) = self.shard(namespace, name);
        let position = match shard.position(hash, namespace, name) {
            Some(position) => position,
            None => {
                let entry = self.new_entry(namespace, name, sender.map(|sender| sender.name))?;
                self.insert(&mut shard, hash, entry)
            }
        };
        #[allow(clippy::indexing_slicing, reason = "the position is that of an entry")]
        let entry = &mut shard.entries[position];
        if let Some(SenderId { name: pod, incarnation }) = sender {
            let max = self.capacity.pods_per_key;
            if entry.key.sender_count() >= max && !entry.key.has_sender(pod) {
                let reason = format!("key {namespace}/{name} has {max} pods and gateways");
                return Err(CapacityExceeded { limit: Limit::PodsPerKey, reason, max });
            }
            // A known sender needs nothing more, which only has to be looked up if little is left.
            if self.check_bytes(Key::max_additional_bytes(pod)).is_err() {
                match entry.key.additional_bytes(pod, incarnation) {
                    0 => {}
                    additional => self.check_bytes(additional)?,
                }
            }
        }
        let result = change(entry);
        self.account(entry);
        Ok(result)
    }

    /// Adds an entry that is not there. Returns its position.
    fn insert(&self, shard: &mut Shard, hash: u64, entry: Box<TableEntry>) -> usize {
        let Shard { index, entries } = shard;
        entries.push(entry);
        let position = entries.len() - 1;
        let rehash = |position: &usize| {
            entries.get(*position).map_or(0, |entry| self.hash(&entry.name.namespace, &entry.name.name))
        };
        index.insert_unique(hash, position, rehash);
        position
    }

    /// Returns a new entry, if it and its first sender fit.
    fn new_entry(
        &self,
        namespace: &str,
        name: &str,
        sender: Option<&str>,
    ) -> Result<Box<TableEntry>, CapacityExceeded> {
        let name = KeyName::new(namespace, name);
        let own_settings = self.own_settings.read().unwrap_or_else(PoisonError::into_inner);
        let settings = Arc::clone(own_settings.get(&name).unwrap_or(&self.defaults));
        drop(own_settings);
        let own_bytes = self.own_bytes(&name, &settings);
        let mut counts = lock(&self.counts);
        let max = self.capacity.keys;
        if counts.all >= max {
            let reason = format!("there are {max} keys");
            return Err(CapacityExceeded { limit: Limit::Keys, reason, max });
        }
        let (max, in_namespace) = (self.capacity.keys_per_namespace, counts.by_namespace.get(namespace));
        if in_namespace.is_some_and(|count| *count >= max) {
            let reason = format!("namespace {namespace} has {max} keys");
            return Err(CapacityExceeded { limit: Limit::KeysPerNamespace, reason, max });
        }
        let mut key = Key::new(settings).with_stale_after(self.stale_after);
        if self.has_just_started.load(Ordering::Relaxed) {
            key = key.after_start(self.started_ns.load(Ordering::Relaxed));
        }
        let sender_bytes = key.sender_bytes();
        self.check_bytes(own_bytes + sender_bytes + sender.map_or(0, Key::max_additional_bytes))?;
        self.bytes.fetch_add(own_bytes + sender_bytes, Ordering::Relaxed);
        counts.all += 1;
        *counts.by_namespace.entry(namespace.to_owned()).or_default() += 1;
        Ok(Box::new(TableEntry { name, key, history: History::default(), own_bytes, sender_bytes }))
    }

    fn hash(&self, namespace: &str, name: &str) -> u64 {
        self.hasher.hash_one((namespace, name))
    }

    #[allow(clippy::indexing_slicing, reason = "a remainder of SHARDS is below SHARDS")]
    fn shard(&self, namespace: &str, name: &str) -> (u64, MutexGuard<'_, Shard>) {
        let hash = self.hash(namespace, name);
        (hash, lock(&self.shards[shard_of(hash)]))
    }
}

/// Returns which shard a key is in. The index within the shard uses the lower and the highest bits.
fn shard_of(hash: u64) -> usize {
    (hash >> 32) as usize % SHARDS
}

impl Shard {
    fn position(&self, hash: u64, namespace: &str, name: &str) -> Option<usize> {
        let is_same =
            |position: &usize| self.entries.get(*position).is_some_and(|entry| entry.is(namespace, name));
        self.index.find(hash, is_same).copied()
    }
}

#[cfg(test)]
mod tests {
    use inflight_stats::Snapshot;

    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const NOW: u64 = 1_700_000_000 * SECOND;

    fn keys(keys_per_namespace: usize, pods_per_key: usize) -> KeyTable {
        with_capacity(Capacity { keys: 100_000, keys_per_namespace, pods_per_key, bytes: 256 << 20 })
    }

    fn with_capacity(capacity: Capacity) -> KeyTable {
        KeyTable::new(Arc::default(), capacity, 0)
    }

    fn taken(keys: &KeyTable) -> usize {
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

    fn take(keys: &KeyTable, report: &Report, now_ns: u64) -> Result<(), String> {
        keys.record(report, now_ns, |_, _| {}).map_err(|error| match error {
            RecordError::CapacityExceeded(exceeded) => exceeded.to_string(),
            RecordError::CounterDecreased(_, error) => error.to_string(),
        })
    }

    fn total(keys: &KeyTable, namespace: &str, name: &str) -> Option<u64> {
        keys.view(&KeyName::new(namespace, name), NOW).map(|view| view.figures.requests_total)
    }

    #[test]
    fn a_full_namespace_takes_no_new_key_and_nothing_from_the_others() {
        let keys = keys(2, 9);
        take(&keys, &report("pod", &[("full", "a"), ("full", "b")]), NOW).unwrap();
        let mixed = report("gateway", &[("full", "a"), ("full", "c"), ("other", "c")]);
        for _ in 0..2 {
            // What fits is recorded, and recorded once, however often it is sent.
            assert_eq!(
                take(&keys, &mixed, NOW).unwrap_err(),
                "namespace full has 2 keys; --max-keys-per-namespace allows 2"
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
            "key ns/rev has 2 pods and gateways; --max-pods-per-key allows 2"
        );
        assert_eq!(total(&keys, "ns", "rev"), Some(10));
        // Silent ones are forgotten, and no longer count.
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
        keys.set_settings(&KeyName::new("ns", "rev-7"), Some(Arc::default())).unwrap();
        let later = NOW + RETENTION_NS;
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
        let keys =
            with_capacity(Capacity { keys: 3, keys_per_namespace: 2, pods_per_key: 9, bytes: 1 << 20 });
        take(&keys, &report("pod", &[("a", "1"), ("a", "2"), ("b", "1")]), NOW).unwrap();
        assert_eq!(
            take(&keys, &report("pod", &[("c", "1"), ("b", "1")]), NOW).unwrap_err(),
            "there are 3 keys; --max-keys allows 3"
        );
        keys.forget(NOW + RETENTION_NS + 1);
        take(&keys, &report("pod", &[("c", "1")]), NOW).unwrap();
    }

    #[test]
    fn what_keys_take_has_a_limit_and_comes_back() {
        let capacity = Capacity {
            keys: 1_000_000,
            keys_per_namespace: 1_000_000,
            pods_per_key: 1_000_000,
            bytes: 1 << 20,
        };
        let keys = with_capacity(capacity);
        let pods: Vec<String> = (0..10_000).map(|number| format!("pod-{number}")).collect();
        let fits = |more: &str| {
            pods.iter().take_while(|pod| take(&keys, &report(pod, &[("ns", more)]), NOW).is_ok()).count()
        };
        // Pods of one key, until they are too many; then a key does not fit either.
        let senders = fits("rev");
        assert!((2_000..4_000).contains(&senders), "{senders}");
        let reason = take(&keys, &report("more", &[("ns", "rev")]), NOW).unwrap_err();
        assert!(reason.contains("--max-table-bytes"), "{reason}");
        assert!(
            taken(&keys) <= capacity.bytes
                && take(&keys, &report("pod-0", &[("ns", "another")]), NOW).is_err()
        );
        // A known sender goes on.
        take(&keys, &report("pod-0", &[("ns", "rev")]), NOW).unwrap();
        keys.forget(NOW + 3600 * SECOND);
        assert!(taken(&keys) < 4_000, "{}", taken(&keys));

        // Keys, which go after a day.
        let made =
            (0..).take_while(|n| take(&keys, &report("pod", &[("ns", &n.to_string())]), NOW).is_ok()).count();
        assert!((300..600).contains(&made), "{made}");
        keys.forget(NOW + RETENTION_NS + 1);
        assert_eq!(taken(&keys), 0);

        // Wide windows; the defaults can always be had again.
        let settings = |json| Arc::new(keys.defaults().with(json, 200.0).unwrap());
        let widest = settings(serde_json::json!({"stable_window": "60m", "panic_window_percentage": 100}));
        let name = |number: usize| KeyName::new("ns", &number.to_string());
        let wide = (0..).take_while(|n| {
            let reserved = keys.reserve_key(&name(*n), &widest);
            reserved
                .is_ok_and(|is_new| is_new && keys.set_settings(&name(*n), Some(Arc::clone(&widest))).is_ok())
        });
        assert_eq!(wide.count(), (1 << 20) / (2 * (16 * 3600 + 16) + 1_000));
        assert!(
            keys.view(&KeyName::new("ns", "9"), NOW).is_none() && taken(&keys) <= capacity.bytes,
            "not made for nothing"
        );
        keys.set_settings(&name(0), None).unwrap();
        keys.set_settings(&name(0), Some(Arc::clone(&widest))).unwrap();
        (0..9).for_each(|number| keys.set_settings(&name(number), None).unwrap());
        keys.forget(NOW);
        assert_eq!((taken(&keys), keys.views(&all(), &Listing::first(9), NOW).1), (0, 0));
    }

    fn all() -> Grant {
        crate::net::auth::Access::load(None, false, crate::cli::flags::AnonymousAccess::Full)
            .unwrap()
            .check(None, crate::net::auth::Peer::default())
            .unwrap()
    }

    #[test]
    fn no_more_keys_than_so_many_have_a_history() {
        let keys = keys(100_000, 9);
        let with_history = || {
            let mut count = 0;
            keys.for_each(|entry| count += usize::from(entry.history.is_enabled()));
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
            [decide_with(0..1_190), decide_with(1_190..2_000), decide_with(2_000..2_020)],
            [1_190, 1_200, 1_200]
        );
        keys.forget(NOW + RETENTION_NS + 1);
        assert_eq!((with_history(), keys.histories.load(Ordering::Relaxed)), (0, 0));
    }

    #[test]
    fn a_stat_that_is_dropped_makes_no_key() {
        let keys = keys(9, 9);
        let mut stat = Stat { pod_name: "pod".into(), request_count: f64::NAN, ..Default::default() };
        let mut record = |count: f64| {
            stat.request_count = count;
            let message =
                WireStatMessage { namespace: "ns".into(), name: "ghost".into(), stat: Some(stat.clone()) };
            let recorded = KeyStat::check(&message).and_then(|stat| keys.record_stat(stat, NOW));
            (recorded.is_ok(), total(&keys, "ns", "ghost"))
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
        let (views, found) = keys.views(&all(), &Listing { search: "ns/".into(), ..Listing::first(3) }, NOW);
        let names: Vec<String> = views.into_iter().map(|view| view.name.name).collect();
        assert_eq!((names.join(" "), found), ("000 001 002".into(), 500));
    }
}
