//! One worker's side of the hold: its held requests, the requests that it has let through, and what
//! it knows of each key. The shared state is asked only about keys that this worker does not know
//! to be ready; for all others a request costs a look into a map.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use crate::counting::time::{MonotonicNs, nanoseconds};
use crate::gateway::key_name::KeyName;
use crate::hold::hold_store::{Bucket, Changed, HoldStore};
use crate::hold::key_hold::{Answer, KeyHold, LocalLine, LocalPart, MAX_CLUSTERS, NotHeld, View};
use crate::hold::settings::HoldSettings;
use crate::pod::pod_state::PodStore;
use crate::pod::store::{Store, StoreError};

/// How often a worker that has nothing but permits gives a sign of life, and how often it looks
/// at a key for which it holds requests if no message comes.
const LOOK_NS: u64 = 1_000_000_000;

/// After this time without an answer that all know of, a cluster that is ready is probed while requests
/// wait for permits: those that have them may be websockets or slow uploads, and end in hours.
const QUIET_NS: u64 = 1_000_000_000;

/// How often keys of which nothing is left are forgotten.
const SWEEP_NS: u64 = 10_000_000_000;

/// How often the leader removes silent workers from keys that nobody else changes.
const SHARED_SWEEP_NS: u64 = 2_000_000_000;

/// Timers count milliseconds, and are at least this far apart.
const TIMER_NS: u64 = 1_000_000;

/// By how much a look may be early. Envoy's timers follow the kernel's coarse clock, and are late by up
/// to its step, which is often 4 ms.
const MOST_EARLY_NS: u64 = 4_000_000;

/// One worker's side of the hold. `W` is the worker's data about a held request.
pub struct WorkerHold<W> {
    /// The settings in effect.
    pub settings: HoldSettings,
    store: HoldStore,
    worker: u64,
    keys: BTreeMap<KeyName, LocalKey<W>>,
    /// The keys with held requests or permits.
    active: BTreeSet<KeyName>,
    last_number: u64,
    last_probe: u64,
    swept: MonotonicNs,
    shared_swept: MonotonicNs,
}

/// What this worker knows of a key.
struct LocalKey<W> {
    bucket: u8,
    clusters: Vec<LocalCluster<W>>,
    /// Whether requests of the key were waiting when this worker last looked. Then new ones get in
    /// line.
    queues: bool,
    round: MonotonicNs,
    permits: u32,
    looked: MonotonicNs,
}

struct LocalCluster<W> {
    name: Rc<str>,
    /// The requests that this worker holds, by their numbers: in order of arrival.
    held: BTreeMap<u64, Held<W>>,
    /// Until when the cluster is taken to be ready while none of this worker's requests is in it;
    /// `None` if it is not ready.
    trusted_until: Option<MonotonicNs>,
    /// This worker's requests that are in it.
    upstream: u32,
    /// When it was last found without a pod.
    lost: MonotonicNs,
    /// The last answer that the shared state knows of.
    shared: MonotonicNs,
    next_probe: MonotonicNs,
    probing: Option<Probing>,
    /// The number of the request for which it was probed last.
    probed_for: u64,
}

/// A held request.
struct Held<W> {
    since: MonotonicNs,
    data: W,
}

/// A probe that is on its way.
#[derive(Clone, Copy, Debug)]
struct Probing {
    number: u64,
    sent: MonotonicNs,
}

/// How a request was let through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passage {
    cluster: Rc<str>,
    sent: MonotonicNs,
    /// The round of its permit, if it has one.
    permit: Option<MonotonicNs>,
}

#[cfg(test)]
impl Passage {
    /// Returns the round of the permit.
    pub(super) fn round(&self) -> Option<MonotonicNs> {
        self.permit
    }
}

/// What becomes of an arriving request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// It goes on at once.
    Passed(Passage),
    /// It is held, under this number.
    Held(u64),
    /// It goes on at once, and the hold has nothing to do with it: the key has too many clusters, or
    /// there is no shared state that could say when to let it go.
    Unheld,
    /// As many requests of the key are held as may be.
    Full,
}

/// A probe to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Its number, for [`WorkerHold::probed`].
    pub number: u64,
    /// The cluster to probe.
    pub cluster: Rc<str>,
    /// The number of a held request of this cluster.
    pub request: u64,
    /// The key of that request.
    pub key: KeyName,
}

/// What came of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeResult {
    /// The app answered, or there is no such cluster: then Envoy is to say so to the client.
    Ready,
    /// There was no answer of the app.
    NotReady,
}

/// A request whose hold has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended<W> {
    /// Its key.
    pub key: KeyName,
    /// Since when it was held.
    pub since: MonotonicNs,
    /// The worker's data about it.
    pub data: W,
}

/// What is to be done after a call.
#[derive(Debug)]
pub struct Effects<W> {
    /// Requests that go on, in order of arrival, with their passages.
    pub passed: Vec<(Ended<W>, Passage)>,
    /// Requests that have been held for too long.
    pub timed_out: Vec<Ended<W>>,
    /// Probes to send.
    pub probes: Vec<Probe>,
    /// Workers to be told to look at a bucket. This worker may be one of them.
    pub notify: Vec<(u64, u8)>,
    /// Buckets at which all workers are to look.
    pub notify_all: Vec<u8>,
    /// How many more requests of a key are held, over all workers.
    pub more_held: Vec<(KeyName, i64)>,
}

impl<W> Effects<W> {
    /// Returns whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        let Self { passed, timed_out, probes, notify, notify_all, more_held } = self;
        passed.is_empty()
            && timed_out.is_empty()
            && probes.is_empty()
            && notify.is_empty()
            && notify_all.is_empty()
            && more_held.is_empty()
    }
}

impl<W> Default for Effects<W> {
    fn default() -> Self {
        Self {
            passed: Vec::new(),
            timed_out: Vec::new(),
            probes: Vec::new(),
            notify: Vec::new(),
            notify_all: Vec::new(),
            more_held: Vec::new(),
        }
    }
}

impl<W> LocalKey<W> {
    fn lines(&self) -> Vec<LocalLine> {
        let lines = self.clusters.iter().filter_map(|cluster| {
            let (first, last) = (cluster.held.values().next()?, cluster.held.values().next_back()?);
            Some(LocalLine {
                cluster: Rc::clone(&cluster.name),
                held: u32::try_from(cluster.held.len()).unwrap_or(u32::MAX),
                first: first.since,
                last: last.since,
            })
        });
        lines.collect()
    }

    fn holds_any(&self) -> bool {
        self.clusters.iter().any(|cluster| !cluster.held.is_empty())
    }

    /// Returns when the request came that has been held for longest.
    fn oldest(&self) -> Option<MonotonicNs> {
        let oldest = self.clusters.iter().filter_map(|cluster| cluster.held.values().next());
        oldest.map(|held| held.since).min()
    }

    fn cluster(&mut self, name: &str) -> Option<&mut LocalCluster<W>> {
        self.clusters.iter_mut().find(|cluster| *cluster.name == *name)
    }

    fn cluster_or_new(&mut self, name: &str) -> Option<&mut LocalCluster<W>> {
        let found = self.clusters.iter().position(|cluster| *cluster.name == *name);
        if found.is_none() && self.clusters.len() >= MAX_CLUSTERS {
            return None;
        }
        let at = found.unwrap_or_else(|| {
            self.clusters.push(LocalCluster {
                name: name.into(),
                held: BTreeMap::new(),
                trusted_until: None,
                upstream: 0,
                lost: MonotonicNs::default(),
                shared: MonotonicNs::default(),
                next_probe: MonotonicNs::default(),
                probing: None,
                probed_for: 0,
            });
            self.clusters.len() - 1
        });
        self.clusters.get_mut(at)
    }

    fn is_active(&self) -> bool {
        self.permits > 0 || self.holds_any()
    }

    fn is_in_use(&self, now: MonotonicNs) -> bool {
        self.is_active()
            || self
                .clusters
                .iter()
                .any(|cluster| cluster.upstream > 0 || cluster.trusted_until.is_some_and(|until| now < until))
    }
}

impl<W> LocalCluster<W> {
    fn is_in_use(&self) -> bool {
        self.upstream > 0 && self.trusted_until.is_some()
    }

    fn is_trusted(&self, now: MonotonicNs) -> bool {
        self.trusted_until.is_some_and(|until| self.upstream > 0 || now < until)
    }

    fn pass(&mut self, sent: MonotonicNs, permit: Option<MonotonicNs>) -> Passage {
        self.upstream = self.upstream.saturating_add(1);
        Passage { cluster: Rc::clone(&self.name), sent, permit }
    }
}

impl<W> WorkerHold<W> {
    /// Returns the hold of a worker. `secret` is the same for all workers of this Envoy, and unknown
    /// to clients.
    pub fn new(pod: PodStore, worker: u64, secret: u64, settings: HoldSettings) -> Self {
        Self {
            settings,
            store: HoldStore::new(pod, secret),
            worker,
            keys: BTreeMap::new(),
            active: BTreeSet::new(),
            last_number: 0,
            last_probe: 0,
            swept: MonotonicNs::default(),
            shared_swept: MonotonicNs::default(),
        }
    }

    /// Returns where the workers' mailboxes are noted.
    pub fn store(&self) -> &HoldStore {
        &self.store
    }

    /// Lets a request to a cluster of a key through, or holds it. `data` is asked only for a request
    /// that is held. A held request goes on only after this worker has looked at the shared state in
    /// a later callback, even if its permit is there already. By then this worker knows of every
    /// endpoint that the worker knew of which found the cluster ready: Envoy tells all its workers of
    /// an endpoint before any of them can use it, in the queue by which they are told to look.
    pub fn arrive(
        &mut self,
        store: &impl Store,
        key: &KeyName,
        cluster: &str,
        now: MonotonicNs,
        data: impl FnOnce(u64) -> W,
        effects: &mut Effects<W>,
    ) -> Arrival {
        if let Some(local) = self.keys.get_mut(key)
            && !local.queues
            && let Some(cluster) = local.cluster(cluster)
            && cluster.is_trusted(now)
        {
            return Arrival::Passed(cluster.pass(now, None));
        }
        self.hold(store, key, cluster, now, data, effects)
    }

    #[cold]
    fn hold(
        &mut self,
        store: &impl Store,
        key: &KeyName,
        cluster: &str,
        now: MonotonicNs,
        data: impl FnOnce(u64) -> W,
        effects: &mut Effects<W>,
    ) -> Arrival {
        let number = self.last_number.wrapping_add(1);
        let (worker, settings) = (self.worker, self.settings.clone());
        let local = self.local(key, now);
        let Some(name) = local.cluster_or_new(cluster).map(|cluster| Rc::clone(&cluster.name)) else {
            return Arrival::Unheld;
        };
        let changed =
            self.change(store, key, now, |hold| hold.arrive(worker, &name, now, &settings), effects);
        match changed {
            Ok(Changed { result: Ok(()), .. }) => {}
            Ok(Changed { result: Err(NotHeld::Full), .. }) => return Arrival::Full,
            Ok(Changed { result: Err(NotHeld::TooManyClusters), .. }) | Err(_) => return Arrival::Unheld,
        }
        let Some(local) = self.keys.get_mut(key) else { return Arrival::Unheld };
        self.last_number = number;
        let Some(cluster) = local.cluster(&name) else { return Arrival::Unheld };
        cluster.held.insert(number, Held { since: now, data: data(number) });
        local.queues = true;
        self.active.insert(key.clone());
        // A look in a callback of its own: it lets the request through, or probes.
        notify(effects, worker, local.bucket);
        Arrival::Held(number)
    }

    /// Ends a held request that is not to go on. Returns since when it was held.
    pub fn abandon(
        &mut self,
        store: &impl Store,
        key: &KeyName,
        number: u64,
        now: MonotonicNs,
        effects: &mut Effects<W>,
    ) -> Option<MonotonicNs> {
        let clusters = &mut self.keys.get_mut(key)?.clusters;
        let held = clusters.iter_mut().find_map(|cluster| cluster.held.remove(&number))?;
        // If this fails, the next look repeats it.
        let _ = self.change(store, key, now, |_| (), effects);
        self.note_activity(key);
        Some(held.since)
    }

    /// Ends a request that was let through: what came of it, and whether it found no pod.
    pub fn leave(
        &mut self,
        store: &impl Store,
        key: &KeyName,
        passage: &Passage,
        (answer, lost): (Answer, bool),
        now: MonotonicNs,
        effects: &mut Effects<W>,
    ) {
        let trust_ns = self.settings.trust_ns();
        let Some(local) = self.keys.get_mut(key) else { return };
        let permit = passage.permit.filter(|round| *round == local.round && local.permits > 0);
        if permit.is_some() {
            local.permits -= 1;
        }
        let Some(cluster) = local.cluster(&passage.cluster) else { return };
        cluster.upstream = cluster.upstream.saturating_sub(1);
        let mut share = false;
        if lost {
            (cluster.trusted_until, cluster.lost) = (None, now);
        } else if answer == Answer::Answered && passage.sent >= cluster.lost {
            // What was sent before the cluster was lost says nothing about it any more.
            cluster.trusted_until = Some(now.plus(trust_ns));
            share = now.since(cluster.shared) > trust_ns / 4;
        }
        if permit.is_none() && !lost && !share {
            return;
        }
        if share {
            cluster.shared = now;
        }
        let noted = permit.map(|round| (round, answer));
        self.leave_shared(store, key, passage, noted, (lost, share), now, effects);
    }

    #[cold]
    #[allow(clippy::too_many_arguments)]
    fn leave_shared(
        &mut self,
        store: &impl Store,
        key: &KeyName,
        passage: &Passage,
        noted: Option<(MonotonicNs, Answer)>,
        (lost, share): (bool, bool),
        now: MonotonicNs,
        effects: &mut Effects<W>,
    ) {
        // If this fails, the next look gives the permit back.
        let _ = self.change(
            store,
            key,
            now,
            |hold| {
                if let Some((round, answer)) = noted {
                    hold.note(round, answer, now);
                }
                if share {
                    hold.answered(&passage.cluster, passage.sent, now);
                }
                if lost {
                    hold.lost(&passage.cluster, now);
                }
            },
            effects,
        );
        if let Some(local) = self.keys.get(key)
            && lost
        {
            effects.notify_all.push(local.bucket);
        }
        self.note_activity(key);
    }

    /// Looks at the keys of some buckets, after a message.
    pub fn look(&mut self, store: &impl Store, buckets: &[u8], now: MonotonicNs, effects: &mut Effects<W>) {
        let keys = self.keys.iter().filter(|(_, local)| buckets.contains(&local.bucket));
        let keys: Vec<KeyName> = keys.map(|(key, _)| key.clone()).collect();
        let mut read = BTreeMap::new();
        for key in keys {
            self.look_at(store, &key, &mut read, now, effects);
        }
    }

    /// Does what depends on time. A look that is due becomes a message of this worker to itself:
    /// see [`WorkerHold::arrive`].
    pub fn tick(&mut self, store: &impl Store, now: MonotonicNs, effects: &mut Effects<W>) {
        for key in self.active.clone() {
            self.time_out(store, &key, now, effects);
            let due = self.keys.get(&key).map(|local| self.look_due(local));
            if let Some(due) = due.filter(|due| *due <= now.plus(self.early_ns()))
                && let Some(local) = self.keys.get_mut(&key)
            {
                local.looked = now.max(due);
                notify(effects, self.worker, local.bucket);
            }
        }
        if now.since(self.swept) >= SWEEP_NS {
            self.swept = now;
            self.keys.retain(|_, local| local.is_in_use(now));
        }
    }

    /// Returns the nanoseconds until a tick is needed; `None` if nothing here depends on time.
    pub fn next_wake_ns(&self, now: MonotonicNs) -> Option<u64> {
        let timeout_ns = self.settings.timeout_ns();
        let wakes = self.active.iter().filter_map(|key| self.keys.get(key)).flat_map(|local| {
            let timeout = local.oldest().map(|since| since.plus(timeout_ns).since(now));
            [Some(self.look_due(local).since(now).saturating_sub(self.early_ns())), timeout]
        });
        wakes.flatten().min().map(|wake_ns| (wake_ns / TIMER_NS * TIMER_NS).max(TIMER_NS))
    }

    /// Returns by how much a look may be early.
    fn early_ns(&self) -> u64 {
        (self.settings.probe_period_ns() / 5 * 2).min(MOST_EARLY_NS)
    }

    fn look_due(&self, local: &LocalKey<W>) -> MonotonicNs {
        if !local.holds_any() {
            // Others may wait, and are to know that these requests are still in the app.
            return local.looked.plus(LOOK_NS.min(self.settings.trust_ns() / 2));
        }
        let often = self.settings.probe_period_ns().min(LOOK_NS);
        // A look that a message asks for puts no probe off.
        let probes = local.clusters.iter().map(|cluster| cluster.next_probe);
        probes.filter(|due| *due > local.looked).fold(local.looked.plus(often), MonotonicNs::min)
    }

    /// Handles the result of a probe.
    pub fn probed(
        &mut self,
        store: &impl Store,
        number: u64,
        result: ProbeResult,
        now: MonotonicNs,
        effects: &mut Effects<W>,
    ) {
        let found = self.keys.iter_mut().find_map(|(key, local)| {
            let is_it = |cluster: &&mut LocalCluster<W>| {
                cluster.probing.is_some_and(|probing| probing.number == number)
            };
            let cluster = local.clusters.iter_mut().find(is_it)?;
            Some((key.clone(), Rc::clone(&cluster.name), cluster.probing.take()?.sent))
        });
        let Some((key, cluster, sent)) = found else { return };
        let (worker, lease_ns) = (self.worker, self.settings.lease_ns());
        let note = |hold: &mut KeyHold| match result {
            ProbeResult::Ready => hold.probe_answered(&cluster, sent, now),
            ProbeResult::NotReady => hold.probed_in_vain(worker, &cluster, sent, now, lease_ns),
        };
        // If this fails, the next probe repeats it.
        let _ = self.change(store, &key, now, note, effects);
    }

    /// Ends this worker. Returns its held requests.
    pub fn close(&mut self, store: &impl Store, now: MonotonicNs, effects: &mut Effects<W>) -> Vec<W> {
        let mut held = Vec::new();
        for key in std::mem::take(&mut self.active) {
            let worker = self.worker;
            let _ = self.change(store, &key, now, |hold| hold.remove(worker), effects);
            if let Some(local) = self.keys.get_mut(&key) {
                for cluster in &mut local.clusters {
                    held.extend(std::mem::take(&mut cluster.held).into_values().map(|held| held.data));
                }
                local.permits = 0;
            }
        }
        held
    }

    /// At the leader: removes workers that are silent from keys that nobody else changes, every two
    /// seconds, because that reads everything.
    pub fn sweep(&mut self, store: &impl Store, now: MonotonicNs, effects: &mut Effects<W>) {
        if now.since(self.shared_swept) < SHARED_SWEEP_NS {
            return;
        }
        self.shared_swept = now;
        for (key, more, granted) in self.store.sweep(store, now, &self.settings) {
            let bucket = self.store.bucket_of(&key);
            granted.into_iter().for_each(|worker| notify(effects, worker, bucket));
            effects.more_held.push((key, more));
        }
    }

    fn local(&mut self, key: &KeyName, now: MonotonicNs) -> &mut LocalKey<W> {
        let bucket = self.store.bucket_of(key);
        self.keys.entry(key.clone()).or_insert_with(|| LocalKey {
            bucket,
            clusters: Vec::new(),
            queues: false,
            round: MonotonicNs::default(),
            permits: 0,
            looked: now,
        })
    }

    fn note_activity(&mut self, key: &KeyName) {
        if self.keys.get(key).is_some_and(LocalKey::is_active) {
            self.active.insert(key.clone());
        } else {
            self.active.remove(key);
        }
    }

    /// Changes the shared state of a key. Afterwards this worker's entry is what this worker knows.
    fn change<R>(
        &self,
        store: &impl Store,
        key: &KeyName,
        now: MonotonicNs,
        mut change: impl FnMut(&mut KeyHold) -> R,
        effects: &mut Effects<W>,
    ) -> Result<Changed<R>, StoreError> {
        let Some(local) = self.keys.get(key) else { return Err(StoreError::NoState) };
        let clusters: Vec<&str> = local.clusters.iter().map(|cluster| &*cluster.name).collect();
        let lines = local.lines();
        let part = LocalPart { round: local.round, permits: local.permits, lines: &lines };
        let both = |hold: &mut KeyHold| {
            hold.reconcile(self.worker, &part, now);
            for cluster in local.clusters.iter().filter(|cluster| cluster.is_in_use()) {
                hold.in_use(&cluster.name, now);
            }
            change(hold)
        };
        let changed = self.store.change(store, key, self.worker, &clusters, (now, &self.settings), both)?;
        changed.granted.iter().for_each(|worker| notify(effects, *worker, local.bucket));
        if changed.more_waiting != 0 {
            effects.more_held.push((key.clone(), changed.more_waiting));
        }
        Ok(changed)
    }

    /// Looks at the shared state of a key: lets requests through that have permits, learns which
    /// clusters are ready, and probes the others if that is up to this worker. `read` are the buckets
    /// that were read for keys in which this worker has no part.
    fn look_at(
        &mut self,
        store: &impl Store,
        key: &KeyName,
        read: &mut BTreeMap<u8, Bucket>,
        now: MonotonicNs,
        effects: &mut Effects<W>,
    ) {
        let Some(local) = self.keys.get_mut(key) else { return };
        local.looked = now;
        let view = if local.is_active() {
            // A sign of life, too.
            self.change(store, key, now, |_| (), effects).ok().map(|changed| changed.view)
        } else {
            let clusters = local.clusters.iter().map(|cluster| &*cluster.name);
            let bucket = read.entry(local.bucket);
            let bucket = bucket.or_insert_with(|| self.store.bucket(store, local.bucket));
            bucket.view(key, self.worker, clusters)
        };
        let Some(view) = view else { return };
        self.learn(key, &view, now, effects);
        self.probe(store, key, &view, now, effects);
        self.note_activity(key);
    }

    fn learn(&mut self, key: &KeyName, view: &View, now: MonotonicNs, effects: &mut Effects<W>) {
        let (trust_ns, period_ns) = (self.settings.trust_ns(), self.settings.probe_period_ns());
        let worker = self.worker;
        let Some(local) = self.keys.get_mut(key) else { return };
        for (cluster, seen) in local.clusters.iter_mut().zip(&view.clusters) {
            // Another worker may have handed the probing on to this one.
            if seen.prober == worker {
                cluster.next_probe = cluster.next_probe.max(seen.probed.plus(period_ns));
            }
            if seen.lost > cluster.lost {
                (cluster.lost, cluster.trusted_until) = (seen.lost, None);
            }
            if let Some(answered) = seen.answered.filter(|answered| *answered >= cluster.lost) {
                cluster.shared = answered;
                cluster.trusted_until = cluster.trusted_until.max(Some(answered.plus(trust_ns)));
            }
        }
        if view.round != local.round {
            (local.round, local.permits) = (view.round, 0);
        }
        local.queues = view.all_waiting > 0;
        if !view.has_entry {
            return;
        }
        let mut granted = Vec::new();
        for (at, (cluster, seen)) in local.clusters.iter_mut().zip(&view.clusters).enumerate() {
            let waiting = seen.waiting as usize;
            while cluster.held.len() > waiting
                && let Some((number, held)) = cluster.held.pop_first()
            {
                granted.push((number, at, held));
            }
        }
        granted.sort_by_key(|(number, ..)| *number);
        // Those that came last have the permits of this round, if not all have one.
        let permits = view.permits.saturating_sub(local.permits) as usize;
        let without = granted.len().saturating_sub(permits);
        for (nth, (_, at, held)) in granted.into_iter().enumerate() {
            let permit = (nth >= without).then_some(local.round);
            local.permits = local.permits.saturating_add(u32::from(permit.is_some()));
            if let Some(cluster) = local.clusters.get_mut(at) {
                let passage = cluster.pass(now, permit);
                let ended = Ended { key: key.clone(), since: held.since, data: held.data };
                effects.passed.push((ended, passage));
            }
        }
    }

    /// Probes the clusters that held requests wait for, if no other worker does.
    fn probe(
        &mut self,
        store: &impl Store,
        key: &KeyName,
        view: &View,
        now: MonotonicNs,
        effects: &mut Effects<W>,
    ) {
        let (trust_ns, lease_ns) = (self.settings.trust_ns(), self.settings.lease_ns());
        // The answer may never come, if the context that would get it has ended.
        let overdue_ns = nanoseconds(self.settings.probe_timeout()).saturating_add(100_000_000);
        let (early_ns, period_ns) = (self.early_ns(), self.settings.probe_period_ns());
        let worker = self.worker;
        let Some(local) = self.keys.get_mut(key) else { return };
        let due: Vec<(Rc<str>, u64, bool)> = local
            .clusters
            .iter()
            .zip(&view.clusters)
            .filter(|(cluster, seen)| {
                let ready = seen.answered.is_some_and(|answered| now.since(answered) < trust_ns);
                let ready = ready && now.since(seen.heard) < QUIET_NS;
                let probing = cluster.probing.is_some_and(|probing| now.since(probing.sent) < overdue_ns);
                let due = cluster.next_probe.max(seen.probed.plus(period_ns));
                !ready && !probing && due <= now.plus(early_ns)
            })
            .filter_map(|(cluster, seen)| {
                // One after the other: an app may refuse what one of them asks for.
                let next = cluster.held.range(cluster.probed_for.saturating_add(1)..).next();
                let (number, _) = next.or_else(|| cluster.held.first_key_value())?;
                let mine = seen.prober == self.worker && now.plus(lease_ns / 2) < seen.prober_until;
                Some((Rc::clone(&cluster.name), *number, mine))
            })
            .collect();
        for (name, request, mine) in due {
            let claim = |hold: &mut KeyHold| hold.claim_probe(worker, &name, now, lease_ns);
            if !mine && !self.change(store, key, now, claim, effects).is_ok_and(|changed| changed.result) {
                continue;
            }
            self.last_probe = self.last_probe.wrapping_add(1);
            let number = self.last_probe;
            if let Some(cluster) = self.keys.get_mut(key).and_then(|local| local.cluster(&name)) {
                cluster.probing = Some(Probing { number, sent: now });
                cluster.probed_for = request;
                cluster.next_probe = now.plus(period_ns);
                effects.probes.push(Probe { number, cluster: name, request, key: key.clone() });
            }
        }
    }

    fn time_out(&mut self, store: &impl Store, key: &KeyName, now: MonotonicNs, effects: &mut Effects<W>) {
        let timeout_ns = self.settings.timeout_ns();
        let Some(local) = self.keys.get_mut(key) else { return };
        let mut late = Vec::new();
        for cluster in &mut local.clusters {
            while let Some(first) = cluster.held.first_entry()
                && now.since(first.get().since) >= timeout_ns
            {
                let (number, Held { since, data }) = first.remove_entry();
                late.push((number, Ended { key: key.clone(), since, data }));
            }
        }
        if late.is_empty() {
            return;
        }
        late.sort_by_key(|(number, _)| *number);
        effects.timed_out.extend(late.into_iter().map(|(_, ended)| ended));
        // A permit that one of them may have got just now goes to another request. If this fails,
        // the next look repeats it.
        let _ = self.change(store, key, now, |_| (), effects);
        self.note_activity(key);
    }

    /// Returns the number of keys of which this worker knows anything.
    #[cfg(test)]
    pub(super) fn known_keys(&self) -> usize {
        self.keys.len()
    }

    /// Returns the data of a held request.
    pub fn held(&self, key: &KeyName, number: u64) -> Option<&W> {
        let clusters = &self.keys.get(key)?.clusters;
        clusters.iter().find_map(|cluster| cluster.held.get(&number)).map(|held| &held.data)
    }
}

fn notify<W>(effects: &mut Effects<W>, worker: u64, bucket: u8) {
    if !effects.notify.contains(&(worker, bucket)) {
        effects.notify.push((worker, bucket));
    }
}
