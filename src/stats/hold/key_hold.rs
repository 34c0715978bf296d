//! The rules of the hold: the state of one key, which all workers of a gateway share.
//!
//! A key's requests go to one cluster or to several. A cluster is ready while it answers, and for
//! the time of trust after its last answer. A request gets a permit at once if its cluster is ready,
//! and else waits in its worker's line for that cluster. While requests wait, the permits are
//! limited: a pod that has just started must not get all of them at once. When none waits any more,
//! the round ends: its permits are void, and the key flows freely.
//!
//! Of a line the state has the length, and when its first and its last request came. That is enough
//! for the order: within a worker it is exact, since the first requests of a line have the permits;
//! between workers, the next permit goes to the line whose first request came first, where the
//! requests of a line are taken to have come evenly. So a change costs the same, however many wait.
//!
//! The state alone says what was granted: a line that is shorter than its worker knows has permits
//! for the difference. Messages between workers are only hints to look, so that a lost message
//! costs time and nothing else. A worker that shows no sign of life for [`PATIENCE_NS`] loses its
//! entry, its lines and its permits. If it comes back, it finds no entry of its own, and gets in
//! line again.

use std::rc::Rc;

use serde::{Deserialize, Serialize};

use crate::counting::time::MonotonicNs;
use crate::hold::settings::HoldSettings;

/// How long a worker keeps its lines and permits without a sign of life.
pub const PATIENCE_NS: u64 = 6_000_000_000;

/// While requests are held, the number of permits doubles after this time, if answers came in it
/// and none was 503.
pub const DOUBLING_NS: u64 = 2_000_000_000;

/// How long it is remembered that a cluster was lost. A request that was sent before that may be
/// answered later, by a pod that is about to end.
pub const LOSS_NS: u64 = 60_000_000_000;

/// The largest number of clusters of one key. Requests to further clusters are not held.
pub const MAX_CLUSTERS: usize = 64;

/// One key's state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyHold {
    clusters: Vec<Cluster>,
    /// Which permits are valid: those of this round. It is the time at which the round began.
    round: MonotonicNs,
    /// The largest number of permits at once.
    limit: u32,
    /// Since when the limit has been what it is, and answers came; `None` before the first answer.
    answered_since: Option<MonotonicNs>,
    entries: Vec<Entry>,
    /// Those in which requests wait.
    lines: Vec<Line>,
}

/// What is known of a cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Cluster {
    name: String,
    /// When it last answered, as far as the workers have told, or had a request of theirs.
    answered: Option<MonotonicNs>,
    /// When it last answered.
    heard: MonotonicNs,
    /// When a request last found it without a pod. What began before that says nothing any more.
    lost: MonotonicNs,
    /// The worker that probes it.
    prober: u64,
    /// How long that worker remains the one.
    prober_until: MonotonicNs,
    /// When the last probe was sent that was in vain.
    probed: MonotonicNs,
}

/// One worker's part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    worker: u64,
    permits: u32,
    /// Its last sign of life.
    seen: MonotonicNs,
}

/// A worker's waiting requests to one cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Line {
    worker: u64,
    /// The cluster's position.
    cluster: u16,
    /// How many requests wait; at least one.
    waiting: u32,
    /// When the first of them came, and the last.
    first: MonotonicNs,
    last: MonotonicNs,
}

/// What a worker sees of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// Whether the worker has an entry. Without one, its lines and permits are void.
    pub has_entry: bool,
    /// The worker's permits, those that it does not know of yet included.
    pub permits: u32,
    /// How many requests wait, of all workers.
    pub all_waiting: u32,
    /// The round whose permits are valid.
    pub round: MonotonicNs,
    /// What is known of one cluster each, in the order of the names that were asked for.
    pub clusters: Vec<ClusterView>,
}

/// What a worker sees of a cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClusterView {
    /// How many of the worker's own requests wait for it.
    pub waiting: u32,
    /// When it last answered, or had a request.
    pub answered: Option<MonotonicNs>,
    /// When it last answered.
    pub heard: MonotonicNs,
    /// When it was last found without a pod.
    pub lost: MonotonicNs,
    /// The worker that probes it; 0 if none does.
    pub prober: u64,
    /// How long that worker remains the one.
    pub prober_until: MonotonicNs,
    /// When the last probe was sent that was in vain.
    pub probed: MonotonicNs,
}

/// A worker's requests to one cluster, as the worker knows them: those that it holds.
#[derive(Clone, Debug)]
pub struct LocalLine {
    /// The cluster.
    pub cluster: Rc<str>,
    /// How many there are, those included that have permits without the worker knowing it yet.
    pub held: u32,
    /// When the first of them came.
    pub first: MonotonicNs,
    /// When the last of them came.
    pub last: MonotonicNs,
}

/// What a worker knows of its part.
#[derive(Clone, Copy, Debug)]
pub struct LocalPart<'a> {
    /// The round of its permits.
    pub round: MonotonicNs,
    /// The permits that its requests hold.
    pub permits: u32,
    /// Its lines that are not empty.
    pub lines: &'a [LocalLine],
}

/// Why a request is not held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotHeld {
    /// As many requests of the key are held as may be.
    Full,
    /// The key has too many clusters already.
    TooManyClusters,
}

/// What came of a request that had a permit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The app answered.
    Answered,
    /// The answer was 503.
    Unavailable,
    /// Neither: the client went away, or the answer says nothing about the app.
    Neither,
}

impl KeyHold {
    /// Returns a key of which nothing is known.
    pub fn new(now: MonotonicNs, settings: &HoldSettings) -> Self {
        Self { round: now, limit: settings.release, ..Self::default() }
    }

    /// Puts a request to a cluster in line.
    ///
    /// # Errors
    /// [`NotHeld`], and then nothing changed.
    pub fn arrive(
        &mut self,
        worker: u64,
        cluster: &str,
        now: MonotonicNs,
        settings: &HoldSettings,
    ) -> Result<(), NotHeld> {
        let goes_on = self.is_ready(cluster, now, settings) && self.permits() < self.limit;
        if !goes_on && self.waiting() >= settings.depth {
            return Err(NotHeld::Full);
        }
        let cluster = self.cluster(cluster).ok_or(NotHeld::TooManyClusters)?;
        if !self.entries.iter().any(|entry| entry.worker == worker) {
            self.entries.push(Entry { worker, permits: 0, seen: now });
        }
        let line = self.lines.iter_mut().find(|line| (line.worker, line.cluster) == (worker, cluster));
        match line {
            Some(line) => (line.waiting, line.last) = (line.waiting.saturating_add(1), now),
            None => self.lines.push(Line { worker, cluster, waiting: 1, first: now, last: now }),
        }
        Ok(())
    }

    /// Makes the worker's entry match what the worker knows. Of requests that the worker does not
    /// know of none waits; of those that it knows, all that do not wait have their permits. A worker
    /// without an entry gets in line again.
    pub fn reconcile(&mut self, worker: u64, local: &LocalPart<'_>, now: MonotonicNs) {
        let in_this_round = local.round == self.round;
        let known = if in_this_round { local.permits } else { 0 };
        let Some(at) = self.entries.iter().position(|entry| entry.worker == worker) else {
            self.join(worker, known, local, now);
            return;
        };
        let of = |cluster: &Cluster| local.lines.iter().find(|line| *line.cluster == *cluster.name);
        for line in self.lines.iter_mut().filter(|line| line.worker == worker) {
            let cluster = self.clusters.get(usize::from(line.cluster));
            match cluster.and_then(of) {
                Some(local) => {
                    if local.held <= line.waiting {
                        (line.waiting, line.first) = (local.held, local.first);
                    }
                    line.last = local.last;
                }
                None => line.waiting = 0,
            }
        }
        self.lines.retain(|line| line.waiting > 0);
        let held = local.lines.iter().fold(0_u32, |sum, line| sum.saturating_add(line.held));
        let granted = held.saturating_sub(self.waiting_of(worker));
        if let Some(entry) = self.entries.get_mut(at) {
            // A worker that has not looked since the round began may know of none of its permits, and
            // some of what it was granted is void: the entry has those of this round.
            entry.permits =
                if in_this_round { known.saturating_add(granted) } else { entry.permits.min(granted) };
            entry.seen = now;
        }
    }

    /// Makes an entry for a worker that has none.
    fn join(&mut self, worker: u64, permits: u32, local: &LocalPart<'_>, now: MonotonicNs) {
        if local.lines.is_empty() && permits == 0 {
            return;
        }
        self.entries.push(Entry { worker, permits, seen: now });
        for line in local.lines {
            if let Some(cluster) = self.cluster(&line.cluster) {
                let LocalLine { held: waiting, first, last, .. } = *line;
                self.lines.push(Line { worker, cluster, waiting, first, last });
            }
        }
    }

    /// Notes what came of a request that had a permit of `round`. It has given the permit back
    /// ([`KeyHold::reconcile`]). What came of an earlier round says nothing about this one's limit.
    pub fn note(&mut self, round: MonotonicNs, answer: Answer, now: MonotonicNs) {
        if round != self.round {
            return;
        }
        match answer {
            Answer::Answered => {
                self.answered_since.get_or_insert(now);
            }
            Answer::Unavailable => {
                // Not below `release`: see `settle`.
                self.limit /= 2;
                self.answered_since = None;
            }
            Answer::Neither => {}
        }
    }

    /// Notes that a cluster answered something that was sent at `sent`.
    pub fn answered(&mut self, cluster: &str, sent: MonotonicNs, now: MonotonicNs) {
        let Some(cluster) = self.cluster(cluster).and_then(|at| self.clusters.get_mut(usize::from(at)))
        else {
            return;
        };
        if sent >= cluster.lost {
            cluster.answered = cluster.answered.max(Some(now));
            cluster.heard = cluster.heard.max(now);
        }
    }

    /// Notes that a cluster answered a probe that was sent at `sent`. If requests have permits, this is
    /// an answer as good as theirs.
    pub fn probe_answered(&mut self, cluster: &str, sent: MonotonicNs, now: MonotonicNs) {
        self.answered(cluster, sent, now);
        if self.permits() > 0 {
            self.answered_since.get_or_insert(now);
        }
    }

    /// Notes that a worker's probe that was sent at `sent` was in vain. What the app answers may depend
    /// on the request for which it is probed. So the next worker of which requests wait for the cluster
    /// becomes the one that probes it, unless it may have died.
    pub fn probed_in_vain(
        &mut self,
        worker: u64,
        cluster: &str,
        sent: MonotonicNs,
        now: MonotonicNs,
        lease_ns: u64,
    ) {
        let Some(at) = self.clusters.iter().position(|known| known.name == cluster) else { return };
        let is_alive = |worker: u64| {
            let entry = self.entries.iter().find(|entry| entry.worker == worker);
            entry.is_some_and(|entry| now.since(entry.seen) < lease_ns)
        };
        let lines = self.lines.iter().filter(|line| usize::from(line.cluster) == at);
        let waiting = lines.map(|line| line.worker).filter(|worker| is_alive(*worker));
        let next = waiting.clone().filter(|other| *other > worker).min().or_else(|| waiting.min());
        let Some(cluster) = self.clusters.get_mut(at) else { return };
        cluster.probed = cluster.probed.max(sent);
        if cluster.prober == worker
            && let Some(next) = next.filter(|next| *next != worker)
        {
            (cluster.prober, cluster.prober_until) = (next, now.plus(lease_ns));
        }
    }

    /// Notes that requests are in a cluster that was not lost: trust runs only while none is.
    pub fn in_use(&mut self, cluster: &str, now: MonotonicNs) {
        let found = self.clusters.iter_mut().find(|known| known.name == cluster);
        if let Some(Cluster { answered: Some(answered), .. }) = found {
            *answered = now.max(*answered);
        }
    }

    /// Notes that a request found no pod in a cluster.
    pub fn lost(&mut self, cluster: &str, now: MonotonicNs) {
        if let Some(at) = self.cluster(cluster)
            && let Some(cluster) = self.clusters.get_mut(usize::from(at))
        {
            cluster.answered = None;
            cluster.lost = cluster.lost.max(now);
            // Whoever sees it first probes.
            cluster.prober_until = MonotonicNs::default();
        }
    }

    /// Makes a worker the one that probes a cluster, if no other is. Returns whether it is.
    pub fn claim_probe(&mut self, worker: u64, cluster: &str, now: MonotonicNs, lease_ns: u64) -> bool {
        let Some(at) = self.cluster(cluster) else { return false };
        let Some(cluster) = self.clusters.get_mut(usize::from(at)) else { return false };
        if cluster.prober != worker && now < cluster.prober_until {
            return false;
        }
        (cluster.prober, cluster.prober_until) = (worker, now.plus(lease_ns));
        true
    }

    /// Removes a worker that ends, with its lines and permits.
    pub fn remove(&mut self, worker: u64) {
        self.entries.retain(|entry| entry.worker != worker);
        self.lines.retain(|line| line.worker != worker);
    }

    /// Does what is due after any change: removes silent workers, raises the limit, gives permits to
    /// the requests that have waited longest, and ends the probing of workers for which none waits
    /// any more. Returns the workers of the requests that got permits, each once.
    pub fn settle(&mut self, now: MonotonicNs, settings: &HoldSettings) -> Vec<u64> {
        let silent: Vec<u64> = self
            .entries
            .iter()
            .filter(|entry| now.since(entry.seen) > PATIENCE_NS)
            .map(|entry| entry.worker)
            .collect();
        silent.into_iter().for_each(|worker| self.remove(worker));
        if self.answered_since.is_some_and(|since| now.since(since) >= DOUBLING_NS) {
            self.limit = self.limit.saturating_mul(2);
            self.answered_since = None;
        }
        self.limit = self.limit.max(settings.release);
        let granted = self.grant(now, settings);
        self.release_probers();
        if self.lines.is_empty() {
            // None waits any more: the key flows freely, and its permits are void.
            (self.limit, self.answered_since) = (settings.release, None);
            if self.permits() > 0 {
                self.round = MonotonicNs(now.0.max(self.round.0.saturating_add(1)));
                self.entries.iter_mut().for_each(|entry| entry.permits = 0);
            }
        }
        granted
    }

    fn grant(&mut self, now: MonotonicNs, settings: &HoldSettings) -> Vec<u64> {
        let mut granted = Vec::new();
        let ready: Vec<bool> =
            self.clusters.iter().map(|cluster| cluster.is_ready(now, settings.trust_ns())).collect();
        let is_ready = |line: &Line| ready.get(usize::from(line.cluster)).is_some_and(|ready| *ready);
        for _ in self.permits()..self.limit {
            let lines = self.lines.iter_mut().filter(|line| is_ready(line));
            let Some(line) = lines.min_by_key(|line| line.first) else { break };
            let worker = line.worker;
            line.pop();
            self.lines.retain(|line| line.waiting > 0);
            if let Some(entry) = self.entries.iter_mut().find(|entry| entry.worker == worker) {
                entry.permits = entry.permits.saturating_add(1);
            }
            if !granted.contains(&worker) {
                granted.push(worker);
            }
        }
        granted
    }

    /// Lets others probe the clusters for which the worker that probes them holds no request.
    fn release_probers(&mut self) {
        for (at, cluster) in self.clusters.iter_mut().enumerate() {
            let waits = |line: &Line| line.worker == cluster.prober && usize::from(line.cluster) == at;
            if cluster.prober != 0 && !self.lines.iter().any(waits) {
                (cluster.prober, cluster.prober_until) = (0, MonotonicNs::default());
            }
        }
    }

    /// Returns what a worker sees.
    pub fn view<'a>(&self, worker: u64, clusters: impl IntoIterator<Item = &'a str>) -> View {
        let clusters = clusters.into_iter().map(|name| {
            let Some(at) = self.clusters.iter().position(|cluster| cluster.name == name) else {
                return ClusterView::default();
            };
            let lines = self.lines.iter().filter(|line| line.worker == worker);
            let waiting = lines.filter(|line| usize::from(line.cluster) == at).map(|line| line.waiting).sum();
            let view = self.clusters.get(at).map(Cluster::view).unwrap_or_default();
            ClusterView { waiting, ..view }
        });
        let entry = self.entries.iter().find(|entry| entry.worker == worker);
        View {
            has_entry: entry.is_some(),
            permits: entry.map_or(0, |entry| entry.permits),
            all_waiting: self.waiting(),
            round: self.round,
            clusters: clusters.collect(),
        }
    }

    /// Returns how many requests wait.
    pub fn waiting(&self) -> u32 {
        self.lines.iter().fold(0, |sum, line| sum.saturating_add(line.waiting))
    }

    fn waiting_of(&self, worker: u64) -> u32 {
        let lines = self.lines.iter().filter(|line| line.worker == worker);
        lines.fold(0, |sum, line| sum.saturating_add(line.waiting))
    }

    /// Returns whether this state says no more than a new one would.
    pub fn is_spent(&self, now: MonotonicNs, settings: &HoldSettings) -> bool {
        let says_something = |cluster: &Cluster| {
            let was_lost = cluster.lost != MonotonicNs::default();
            cluster.is_ready(now, settings.trust_ns()) || (was_lost && now.since(cluster.lost) <= LOSS_NS)
        };
        self.lines.is_empty()
            && self.entries.iter().all(|entry| now.since(entry.seen) > PATIENCE_NS)
            && !self.clusters.iter().any(says_something)
    }

    fn permits(&self) -> u32 {
        self.entries.iter().fold(0, |sum, entry| sum.saturating_add(entry.permits))
    }

    fn is_ready(&self, cluster: &str, now: MonotonicNs, settings: &HoldSettings) -> bool {
        let cluster = self.clusters.iter().find(|known| known.name == cluster);
        cluster.is_some_and(|cluster| cluster.is_ready(now, settings.trust_ns()))
    }

    /// Returns the position of a cluster, which is added if need be and if there may be one more.
    fn cluster(&mut self, name: &str) -> Option<u16> {
        let found = self.clusters.iter().position(|cluster| cluster.name == name);
        let at = found.unwrap_or(self.clusters.len());
        if at >= MAX_CLUSTERS {
            return None;
        }
        if found.is_none() {
            self.clusters.push(Cluster {
                name: name.to_owned(),
                answered: None,
                heard: MonotonicNs::default(),
                lost: MonotonicNs::default(),
                prober: 0,
                prober_until: MonotonicNs::default(),
                probed: MonotonicNs::default(),
            });
        }
        u16::try_from(at).ok()
    }
}

impl Line {
    /// Takes the first request out. The others came evenly between it and the last, as far as the
    /// state knows; their worker corrects that at its next change.
    fn pop(&mut self) {
        let apart_ns = self.last.since(self.first) / u64::from(self.waiting.saturating_sub(1).max(1));
        self.waiting = self.waiting.saturating_sub(1);
        self.first = self.first.plus(apart_ns);
    }
}

impl Cluster {
    fn is_ready(&self, now: MonotonicNs, trust_ns: u64) -> bool {
        self.answered.is_some_and(|answered| now.since(answered) < trust_ns)
    }

    fn view(&self) -> ClusterView {
        let Self { answered, heard, lost, prober, prober_until, probed, .. } = *self;
        ClusterView { waiting: 0, answered, heard, lost, prober, prober_until, probed }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const A: &str = "outbound|80||a.ns.svc.cluster.local";
    const B: &str = "outbound|90||a.ns.svc.cluster.local";

    fn settings() -> HoldSettings {
        HoldSettings { release: 2, trust: Duration::from_secs(5), ..HoldSettings::default() }
    }

    /// Trust that outlasts a worker.
    fn patient() -> HoldSettings {
        HoldSettings { trust: Duration::from_secs(60), ..settings() }
    }

    /// A key and its workers. A worker learns of a permit when it looks.
    struct Key {
        hold: KeyHold,
        settings: HoldSettings,
        now: MonotonicNs,
        workers: BTreeMap<u64, Worker>,
    }

    #[derive(Default)]
    struct Worker {
        round: MonotonicNs,
        permits: u32,
        /// By their numbers: the clusters that they go to, and when they came.
        held: BTreeMap<u64, (String, MonotonicNs)>,
    }

    impl Worker {
        fn lines(&self) -> Vec<LocalLine> {
            let mut lines: Vec<LocalLine> = Vec::new();
            for (cluster, came) in self.held.values() {
                match lines.iter_mut().find(|line| *line.cluster == **cluster) {
                    Some(line) => (line.held, line.last) = (line.held + 1, *came),
                    None => {
                        lines.push(LocalLine {
                            cluster: (**cluster).into(),
                            held: 1,
                            first: *came,
                            last: *came,
                        });
                    }
                }
            }
            lines
        }
    }

    impl Key {
        fn new(settings: HoldSettings) -> Self {
            let now = MonotonicNs(SECOND);
            Self { hold: KeyHold::new(now, &settings), settings, now, workers: BTreeMap::new() }
        }

        /// A key of which these requests, each at a worker, wait when its cluster becomes ready.
        fn after_a_wave(settings: HoldSettings, requests: &[(u64, u64)]) -> Self {
            let mut key = Self::new(settings);
            key.arrivals(A, requests);
            key.answer(A);
            key
        }

        /// Changes the key as a worker does: first its entry becomes what the worker knows. Returns
        /// the workers that have got permits.
        fn change(&mut self, worker: u64, change: impl FnOnce(&mut KeyHold)) -> Vec<u64> {
            let part = self.workers.entry(worker).or_default();
            let (round, permits, lines) = (part.round, part.permits, part.lines());
            self.hold.reconcile(worker, &LocalPart { round, permits, lines: &lines }, self.now);
            change(&mut self.hold);
            self.hold.settle(self.now, &self.settings)
        }

        fn arrive(&mut self, worker: u64, number: u64, cluster: &str) -> Result<(), NotHeld> {
            let (now, settings) = (self.now, self.settings.clone());
            let mut arrived = Ok(());
            self.change(worker, |hold| arrived = hold.arrive(worker, cluster, now, &settings));
            if arrived.is_ok() {
                self.workers.entry(worker).or_default().held.insert(number, (cluster.into(), now));
                self.pass(1);
            }
            arrived
        }

        /// Requests come, each to a worker, under numbers of their own.
        fn arrivals(&mut self, cluster: &str, requests: &[(u64, u64)]) {
            for (worker, number) in requests {
                assert_eq!(self.arrive(*worker, *number, cluster), Ok(()));
            }
        }

        /// A worker looks. Returns its requests that go on.
        fn look(&mut self, worker: u64) -> Vec<u64> {
            self.change(worker, |_| ());
            let view = self.hold.view(worker, [A, B]);
            let local = self.workers.entry(worker).or_default();
            if view.round != local.round {
                (local.round, local.permits) = (view.round, 0);
            }
            let mut passed = Vec::new();
            for (cluster, view) in [A, B].into_iter().zip(&view.clusters) {
                let held = local.held.iter().filter(|(_, (to, _))| to == cluster).map(|(number, _)| *number);
                let held: Vec<u64> = held.collect();
                passed.extend(&held[..held.len() - view.waiting as usize]);
            }
            local.held.retain(|number, _| !passed.contains(number));
            local.permits = view.permits;
            passed
        }

        /// A request of a worker ends that had a permit of the worker's round.
        fn leave(&mut self, worker: u64, answer: Answer) {
            let local = self.workers.entry(worker).or_default();
            local.permits -= 1;
            let (round, now) = (local.round, self.now);
            self.change(worker, |hold| hold.note(round, answer, now));
        }

        /// A request ends, and the next one goes on at once: the app is always full.
        fn leave_and_look(&mut self, worker: u64, answer: Answer) {
            self.leave(worker, answer);
            self.look(worker);
        }

        fn answer(&mut self, cluster: &str) {
            self.hold.answered(cluster, self.now, self.now);
            self.hold.settle(self.now, &self.settings);
        }

        fn lose(&mut self, cluster: &str) {
            self.hold.lost(cluster, self.now);
            self.hold.settle(self.now, &self.settings);
        }

        fn pass(&mut self, ns: u64) {
            self.now = self.now.plus(ns);
        }

        /// Lets time pass in which these workers give signs of life.
        fn pass_with(&mut self, ns: u64, workers: &[u64]) {
            self.pass(ns);
            workers.iter().for_each(|worker| drop(self.look(*worker)));
        }

        /// Returns the numbers of the requests that wait: of each line, those that came last.
        fn waiting(&self) -> Vec<u64> {
            let mut waiting = Vec::new();
            for line in &self.hold.lines {
                let cluster = &self.hold.clusters[usize::from(line.cluster)].name;
                let held = self.workers[&line.worker].held.iter().filter(|(_, (to, _))| to == cluster);
                waiting.extend(held.map(|(number, _)| *number).rev().take(line.waiting as usize));
            }
            waiting.sort_unstable();
            waiting
        }

        fn permits(&self, worker: u64) -> u32 {
            self.hold.view(worker, []).permits
        }
    }

    #[test]
    fn whoever_came_first_goes_on_first_whichever_worker_it_is_at() {
        let mut key = Key::new(settings());
        key.arrivals(A, &[(1, 1), (2, 2), (1, 3), (3, 4)]);
        assert_eq!((key.waiting(), key.look(1)), (vec![1, 2, 3, 4], vec![]), "not ready");
        key.hold.answered(A, key.now, key.now);
        assert_eq!(key.hold.settle(key.now, &key.settings), [1, 2], "the workers to be told");
        assert_eq!((key.look(1), key.look(2), key.look(3)), (vec![1], vec![2], vec![]));
        key.leave(2, Answer::Answered);
        assert_eq!((key.waiting(), key.look(1)), (vec![4], vec![3]));
        key.leave(1, Answer::Neither);
        assert_eq!(key.look(3), [4]);
    }

    #[test]
    fn each_worker_that_gets_permits_is_told_once() {
        let mut key = Key::new(HoldSettings { release: 4, ..settings() });
        key.arrivals(A, &[(1, 1), (1, 2), (2, 3), (1, 4)]);
        key.hold.answered(A, key.now, key.now);
        assert_eq!(key.hold.settle(key.now, &key.settings), [1, 2]);
        assert!(key.hold.settle(key.now, &key.settings).is_empty());
    }

    #[test]
    fn a_request_to_a_cluster_that_is_not_ready_keeps_no_other_from_going_on() {
        let mut key = Key::new(settings());
        key.arrivals(A, &[(1, 1)]);
        key.arrivals(B, &[(1, 2), (1, 3)]);
        key.answer(B);
        assert_eq!((key.look(1), key.waiting()), (vec![2, 3], vec![1]));
        key.answer(A);
        assert_eq!(key.waiting(), [1], "the limit is the key's");
        key.leave(1, Answer::Neither);
        assert_eq!(key.look(1), [1]);
    }

    #[test]
    fn a_cluster_is_ready_for_the_time_of_trust_after_its_last_answer() {
        let mut key = Key::new(settings());
        key.answer(A);
        key.pass(5 * SECOND - 1);
        key.arrivals(A, &[(1, 1)]);
        assert_eq!(key.look(1), [1]);
        key.pass(1);
        key.arrivals(A, &[(1, 2)]);
        assert!(key.look(1).is_empty());
        // An answer that was told of late takes nothing back.
        key.answer(A);
        key.hold.answered(A, MonotonicNs(SECOND), MonotonicNs(SECOND));
        assert_eq!(key.look(1), [2]);
    }

    #[test]
    fn a_cluster_without_a_pod_is_not_ready_until_it_answers_what_was_sent_after_that() {
        let mut key = Key::new(settings());
        key.answer(A);
        key.answer(B);
        let before = key.now;
        key.pass(SECOND);
        key.lose(A);
        key.arrivals(A, &[(1, 1)]);
        key.hold.answered(A, before, key.now);
        assert!(key.look(1).is_empty());
        key.arrivals(B, &[(1, 2)]);
        assert_eq!(key.look(1), [2], "the other cluster has its pods");
        key.hold.answered(A, key.now, key.now);
        assert_eq!(key.look(1), [1]);
    }

    #[test]
    fn no_more_than_the_limit_have_permits_while_others_wait() {
        let mut key = Key::after_a_wave(settings(), &[(1, 1), (2, 2), (1, 3), (2, 4), (1, 5)]);
        assert_eq!((key.look(1), key.look(2), key.waiting()), (vec![1], vec![2], vec![3, 4, 5]));
        assert_eq!((key.permits(1), key.permits(2)), (1, 1));
        key.settings.release = 3;
        assert_eq!((key.look(1), key.waiting()), (vec![3], vec![4, 5]), "more by another configuration");
        key.settings.release = 1;
        key.leave(1, Answer::Neither);
        assert_eq!(key.waiting(), [5], "fewer only when none waits any more");
    }

    #[test]
    fn the_limit_doubles_two_seconds_after_an_answer_and_again() {
        let requests: Vec<_> = (0..40).map(|number| (1, number)).collect();
        let mut key = Key::after_a_wave(patient(), &requests);
        key.look(1);
        key.pass_with(4 * SECOND, &[1]);
        assert_eq!(key.hold.limit, 2, "no answer yet");
        key.leave_and_look(1, Answer::Neither);
        key.pass_with(2 * SECOND, &[1]);
        assert_eq!(key.hold.limit, 2, "a client that leaves is no answer");
        key.leave_and_look(1, Answer::Answered);
        key.pass_with(2 * SECOND - 1, &[1]);
        assert_eq!((key.hold.limit, key.permits(1)), (2, 2));
        key.pass_with(1, &[1]);
        assert_eq!((key.hold.limit, key.permits(1)), (4, 4));
        key.pass_with(2 * SECOND, &[1]);
        assert_eq!(key.hold.limit, 4, "no answer since");
        key.leave_and_look(1, Answer::Answered);
        key.pass_with(2 * SECOND, &[1]);
        assert_eq!((key.hold.limit, key.permits(1)), (8, 8));
    }

    #[test]
    fn a_503_halves_the_limit_but_not_below_the_first_one_and_begins_the_two_seconds_anew() {
        let requests: Vec<_> = (0..40).map(|number| (1, number)).collect();
        let mut key = Key::after_a_wave(patient(), &requests);
        key.look(1);
        key.hold.limit = 9;
        key.look(1);
        key.leave_and_look(1, Answer::Answered);
        key.pass_with(SECOND, &[1]);
        key.leave_and_look(1, Answer::Unavailable);
        assert_eq!((key.hold.limit, key.permits(1)), (4, 8), "nobody is called back");
        key.leave_and_look(1, Answer::Answered);
        key.pass_with(2 * SECOND - 1, &[1]);
        assert_eq!((key.hold.limit, key.permits(1)), (4, 7));
        for _ in 0..3 {
            key.leave_and_look(1, Answer::Unavailable);
        }
        assert_eq!((key.hold.limit, key.permits(1)), (2, 4));
    }

    #[test]
    fn as_many_wait_as_may_and_one_more_is_turned_away_and_changes_nothing() {
        let mut key = Key::new(HoldSettings { depth: 4, ..settings() });
        key.arrivals(A, &[(1, 1), (2, 2), (3, 3), (4, 4)]);
        key.look(1);
        let before = key.hold.clone();
        assert_eq!(key.arrive(1, 5, A), Err(NotHeld::Full));
        assert_eq!(key.arrive(5, 1, "another"), Err(NotHeld::Full));
        assert_eq!(key.hold, before);
        key.answer(B);
        key.arrivals(B, &[(5, 1), (5, 2)]);
        assert_eq!(key.look(5), [1, 2], "they do not have to wait");
        assert_eq!(key.arrive(5, 3, B), Err(NotHeld::Full), "this one would");
        key.workers.get_mut(&2).unwrap().held.clear();
        key.look(2);
        assert_eq!(key.arrive(5, 3, B), Ok(()), "a client that leaves frees its place");
    }

    #[test]
    fn when_none_waits_any_more_permits_are_void_and_the_next_wave_begins_with_the_first_limit() {
        let mut key = Key::after_a_wave(settings(), &[(1, 1), (1, 2), (1, 3), (1, 4)]);
        assert_eq!(key.look(1), [1, 2]);
        let round = key.hold.round;
        key.hold.limit = 4;
        assert_eq!((key.look(1), key.waiting()), (vec![3, 4], vec![]));
        assert!(key.hold.round > round);
        assert_eq!((key.hold.limit, key.permits(1)), (2, 0));
        // The key flows freely.
        key.arrivals(A, &[(1, 5), (2, 6), (1, 7)]);
        assert_eq!((key.look(1), key.look(2)), (vec![5, 7], vec![6]));
        key.lose(A);
        key.arrivals(A, &[(1, 8), (1, 9), (1, 10)]);
        key.answer(A);
        assert_eq!((key.look(1), key.waiting()), (vec![8, 9], vec![10]));
    }

    #[test]
    fn a_request_whose_permit_was_not_picked_up_before_the_rounds_end_goes_on_freely() {
        let mut key = Key::after_a_wave(settings(), &[(1, 1)]);
        assert_eq!((key.waiting(), key.permits(1)), (vec![], 0), "the round has ended");
        key.lose(A);
        key.arrivals(A, &[(2, 2), (2, 3)]);
        assert_eq!((key.look(1), key.permits(1)), (vec![1], 0), "as the key flowed freely then");
        key.answer(A);
        assert_eq!((key.look(2), key.waiting()), (vec![2, 3], vec![]));
    }

    #[test]
    fn the_next_wave_begins_with_the_first_limit_even_if_the_last_ones_gave_up() {
        let mut key = Key::after_a_wave(settings(), &[(1, 1), (1, 2), (1, 3)]);
        key.look(1);
        key.lose(A);
        key.hold.limit = 64;
        for _ in 0..2 {
            key.leave(1, Answer::Answered);
        }
        assert_eq!((key.waiting(), key.permits(1), key.hold.limit), (vec![3], 0, 64));
        key.workers.get_mut(&1).unwrap().held.clear();
        key.look(1);
        assert_eq!((key.hold.limit, key.hold.answered_since), (2, None));
    }

    #[test]
    fn what_came_of_a_permit_of_an_earlier_round_says_nothing_of_this_one() {
        let mut key = Key::after_a_wave(settings(), &[(1, 1), (1, 2), (1, 3)]);
        key.look(1);
        let round = key.hold.round;
        key.hold.limit = 3;
        key.look(1);
        assert!(key.hold.round > round && key.waiting().is_empty());
        key.lose(A);
        key.arrivals(A, &[(2, 4)]);
        key.hold.limit = 8;
        key.hold.note(round, Answer::Unavailable, key.now);
        assert_eq!(key.hold.limit, 8);
        key.hold.note(round, Answer::Answered, key.now);
        assert_eq!(key.hold.answered_since, None);
    }

    #[test]
    fn a_worker_that_gives_no_sign_of_life_for_the_patience_loses_its_place_and_its_permits() {
        let mut key = Key::after_a_wave(patient(), &[(1, 1), (1, 2), (1, 3), (2, 4), (2, 5)]);
        assert_eq!(key.look(1), [1, 2]);
        key.pass_with(PATIENCE_NS, &[2]);
        assert_eq!(key.waiting(), [3, 4, 5], "it may only be slow");
        key.pass(1);
        assert_eq!((key.look(2), key.waiting()), (vec![4, 5], vec![]));
        assert!(!key.hold.view(1, []).has_entry);
    }

    #[test]
    fn a_worker_that_comes_back_gets_in_line_again_and_its_permits_of_this_round_count() {
        let wave = [(1, 1), (1, 2), (1, 3), (2, 4), (2, 5), (2, 6)];
        let mut key = Key::after_a_wave(patient(), &wave);
        assert_eq!(key.look(1), [1, 2]);
        key.pass(PATIENCE_NS + 1);
        assert_eq!((key.look(2), key.waiting()), (vec![4, 5], vec![6]));
        assert!(key.look(1).is_empty());
        assert_eq!((key.waiting(), key.permits(1), key.permits(2)), (vec![3, 6], 2, 2));
        for _ in 0..2 {
            key.leave(1, Answer::Neither);
        }
        assert_eq!(key.waiting(), [3, 6], "two are in the app");
        key.leave(2, Answer::Neither);
        key.leave(2, Answer::Neither);
        assert_eq!((key.look(2), key.look(1)), (vec![6], vec![3]));
    }

    #[test]
    fn the_permits_of_a_worker_that_comes_back_in_another_round_are_void() {
        let mut key = Key::after_a_wave(patient(), &[(1, 1), (1, 2), (2, 3)]);
        key.look(1);
        key.pass_with(PATIENCE_NS, &[2]);
        key.pass(1);
        assert_eq!((key.look(2), key.waiting()), (vec![3], vec![]), "the end of the round");
        key.lose(A);
        key.arrivals(A, &[(2, 4)]);
        assert_eq!((key.look(1), key.permits(1)), (vec![], 0));
    }

    #[test]
    fn a_ticket_that_its_worker_does_not_know_of_is_void_and_so_is_its_permit() {
        let mut key = Key::after_a_wave(settings(), &[(1, 1), (1, 2), (1, 3), (2, 4)]);
        assert_eq!(key.waiting(), [3, 4]);
        // This worker forgets what it had, as after a change of which it knows nothing.
        key.workers.insert(1, Worker { round: key.hold.round, ..Worker::default() });
        key.look(1);
        assert_eq!((key.waiting(), key.look(2)), (vec![], vec![4]));
    }

    #[test]
    fn one_worker_probes_a_cluster_until_its_lease_ends() {
        const LEASE: u64 = SECOND;
        let mut key = Key::new(settings());
        key.arrivals(A, &[(1, 1), (2, 2)]);
        key.arrivals(B, &[(1, 3), (2, 4)]);
        let claim = |key: &mut Key, worker, cluster| key.hold.claim_probe(worker, cluster, key.now, LEASE);
        assert!(claim(&mut key, 1, A) && !claim(&mut key, 2, A));
        assert!(claim(&mut key, 2, B), "each cluster has its own");
        key.pass(LEASE / 2);
        assert!(claim(&mut key, 1, A), "it goes on");
        key.pass_with(LEASE - 1, &[1, 2]);
        assert!(!claim(&mut key, 2, A));
        key.pass(1);
        assert!(claim(&mut key, 2, A) && !claim(&mut key, 1, A));
        let seen = key.hold.view(1, [A]).clusters[0];
        assert_eq!((seen.prober, seen.prober_until), (2, key.now.plus(LEASE)));
        key.lose(A);
        assert!(claim(&mut key, 1, A), "whoever sees that there is no pod");
    }

    #[test]
    fn a_worker_that_ends_or_has_nobody_to_probe_for_leaves_the_probing_to_others() {
        let mut key = Key::new(settings());
        key.arrivals(A, &[(1, 1), (2, 2), (3, 3)]);
        let claim = |key: &mut Key, worker| key.hold.claim_probe(worker, A, key.now, SECOND);
        assert!(claim(&mut key, 1) && !claim(&mut key, 2));
        key.change(1, |hold| hold.remove(1));
        assert!(claim(&mut key, 2) && !claim(&mut key, 3));
        key.workers.get_mut(&2).unwrap().held.clear();
        key.look(2);
        assert!(claim(&mut key, 3));
    }

    #[test]
    fn the_number_of_clusters_is_limited() {
        let mut key = Key::new(HoldSettings { depth: 1_000, ..settings() });
        for number in 0..64 {
            assert_eq!(key.arrive(1, number, &format!("cluster-{number}")), Ok(()));
        }
        assert_eq!(key.arrive(1, 64, "one more"), Err(NotHeld::TooManyClusters));
        assert!(!key.hold.claim_probe(1, "one more", key.now, SECOND));
        key.hold.answered("one more", key.now, key.now);
        key.hold.lost("one more", key.now);
        assert_eq!(key.hold.view(1, ["one more"]).clusters, [ClusterView::default()]);
        assert_eq!((key.hold.clusters.len(), key.waiting().len()), (64, 64));
    }

    #[test]
    fn a_key_is_spent_once_nothing_is_ready_nobody_waits_and_no_worker_gives_signs_of_life() {
        let mut key = Key::after_a_wave(settings(), &[(1, 1)]);
        assert!(!key.hold.is_spent(key.now, &key.settings));
        key.look(1);
        key.pass(5 * SECOND);
        assert!(!key.hold.is_spent(key.now, &key.settings), "its worker may be there");
        key.pass(PATIENCE_NS + 1 - 5 * SECOND);
        assert!(key.hold.is_spent(key.now, &key.settings));
        key.answer(A);
        assert!(!key.hold.is_spent(key.now, &key.settings));
        key.pass(5 * SECOND);
        assert!(key.hold.is_spent(key.now, &key.settings));
        key.lose(A);
        key.pass(LOSS_NS);
        assert!(!key.hold.is_spent(key.now, &key.settings), "an old request may still be answered");
        key.pass(1);
        assert!(key.hold.is_spent(key.now, &key.settings));
        key.arrivals(A, &[(1, 2)]);
        key.pass(60 * SECOND);
        assert!(!key.hold.is_spent(key.now, &key.settings), "one waits, as far as is known");
        key.hold.settle(key.now, &key.settings);
        assert!(key.hold.is_spent(key.now, &key.settings));
    }
}
