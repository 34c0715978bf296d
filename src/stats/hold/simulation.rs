//! A simulated gateway for the tests: several workers' holds over one store, the messages between
//! them, probes, and clusters whose pods come and go. After every call it is checked that what the
//! workers say agrees with the store, and that nobody is let through who should not be.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::time::Duration;

use crate::counting::time::MonotonicNs;
use crate::gateway::key_name::KeyName;
use crate::hold::hold_store::HoldStore;
use crate::hold::key_hold::{Answer, DOUBLING_NS, View};
use crate::hold::settings::HoldSettings;
use crate::hold::worker_side::{Arrival, Effects, Passage, Probe, ProbeResult, WorkerHold};
use crate::pod::pod_state::PodStore;
use crate::pod::store::{Expect, Store};
use crate::testing::{Dice, Map};

pub const MILLISECOND: u64 = 1_000_000;
pub const SECOND: u64 = 1_000 * MILLISECOND;

/// How often a worker ticks at least.
const PERIOD_NS: u64 = SECOND;
const SECRET: u64 = 7;
const KEYS: usize = 3;
const CLUSTERS_OF_A_KEY: usize = 2;

/// Settings that replace each other in random runs.
pub fn settings(which: usize) -> HoldSettings {
    let (timeout_ms, depth, period_ms, trust_ms, release) =
        [(10_000, 6, 100, 2_000, 2), (4_000, 10, 50, 1_000, 3), (20_000, 6, 200, 3_000, 2)][which % 3];
    HoldSettings {
        timeout: Duration::from_millis(timeout_ms),
        depth,
        probe_path: "/".into(),
        probe_period: Duration::from_millis(period_ms),
        trust: Duration::from_millis(trust_ms),
        release,
    }
}

/// The largest `release`, and the longest `trust`, of any of these settings.
const MOST_RELEASE: u64 = 3;
const LONGEST_TRUST_NS: u64 = 3 * SECOND;

/// How often something goes wrong: in one of this many cases, or never for 0.
#[derive(Clone, Copy)]
pub struct Faults {
    pub stalls: u64,
    pub longest_stall_ns: u64,
    /// Workers that die without a word, and those that say so.
    pub deaths: u64,
    pub closes: u64,
    pub settings: u64,
    /// Messages and answers to probes that are lost.
    pub losses: u64,
    /// Writes before which another worker writes.
    pub conflicts: u64,
}

pub const NONE: Faults =
    Faults { stalls: 0, longest_stall_ns: 0, deaths: 0, closes: 0, settings: 0, losses: 0, conflicts: 0 };

/// A store in which other workers write between a read and a write.
pub struct SharedStore {
    map: Map,
    dice: RefCell<Dice>,
    conflicts: u64,
    /// The number of reads and writes.
    pub accesses: Cell<u64>,
}

impl Default for SharedStore {
    fn default() -> Self {
        Self::new(0, 0)
    }
}

impl SharedStore {
    fn new(seed: u64, conflicts: u64) -> Self {
        let dice = RefCell::new(Dice(seed));
        Self { map: Map::default(), dice, conflicts, accesses: Cell::new(0) }
    }

    /// Returns the sizes of all values.
    pub fn sizes(&self) -> BTreeMap<String, usize> {
        let size = |name: &String| self.map.get(name).map_or(0, |(bytes, _)| bytes.len());
        self.map.keys().into_iter().map(|name| (name.clone(), size(&name))).collect()
    }
}

impl Store for SharedStore {
    fn get(&self, key: &str) -> Option<(Vec<u8>, u32)> {
        self.accesses.set(self.accesses.get() + 1);
        self.map.get(key)
    }

    fn set(&self, key: &str, value: &[u8], expect: Expect) -> bool {
        self.accesses.set(self.accesses.get() + 1);
        let conflict = self.conflicts > 0 && self.dice.borrow_mut().roll(self.conflicts) == 0;
        !conflict && self.map.set(key, value, expect)
    }
}

/// A request that waits.
struct Waiting {
    cluster: usize,
    number: u64,
    since_ns: u64,
    /// Whether it got its permit when none waited. Then it goes on freely, whatever comes.
    is_free: bool,
}

/// A request in the app, or what the gateway takes for it.
pub struct Running {
    pub cluster: usize,
    pub passage: Passage,
    /// Whether there was a pod for it.
    has_pod: bool,
    is_free: bool,
    ends_ns: u64,
}

pub struct Worker {
    pub side: WorkerHold<u64>,
    pub id: u64,
    mail: Vec<u8>,
    /// The probes on their way: the number, the cluster, the instant.
    pub probes: Vec<(u64, usize, u64)>,
    /// The requests that wait, by their ids, which are in order of arrival.
    waiting: BTreeMap<u64, Waiting>,
    pub running: Vec<Running>,
    tick_ns: u64,
    stalled_until_ns: u64,
    /// When this worker last found each cluster without a pod.
    lost_ns: Vec<Option<u64>>,
}

pub struct Cluster {
    key: KeyName,
    pub name: String,
    pub has_pod: bool,
    had_pod_ns: u64,
    /// When any worker last found it without a pod.
    lost_ns: Option<u64>,
    /// When it last answered.
    answered_ns: Option<u64>,
    /// When a probe was sent.
    pub probed_ns: Vec<u64>,
}

/// What has become of requests.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub passed_at_once: u64,
    pub passed: u64,
    pub timed_out: u64,
    pub refused: u64,
    pub abandoned: u64,
    pub without_pod: u64,
    pub lost_with_worker: u64,
    /// Workers whose entries were removed although they live.
    pub forgotten: u64,
}

impl Tally {
    /// Adds what became of other requests.
    pub fn add(&mut self, other: &Self) {
        self.passed_at_once += other.passed_at_once;
        self.passed += other.passed;
        self.timed_out += other.timed_out;
        self.refused += other.refused;
        self.abandoned += other.abandoned;
        self.without_pod += other.without_pod;
        self.lost_with_worker += other.lost_with_worker;
        self.forgotten += other.forgotten;
    }
}

pub struct World {
    pub seed: u64,
    pub dice: Dice,
    pub store: SharedStore,
    hold_store: HoldStore,
    pub now_ns: u64,
    pub workers: Vec<Worker>,
    pub clusters: Vec<Cluster>,
    pub tally: Tally,
    /// How many requests of each key wait, as the workers have told, and since when any do.
    told: Vec<(i64, u64)>,
    faults: Faults,
    last_request: u64,
    last_worker: u64,
}

impl World {
    pub fn new(seed: u64, workers: usize, which: usize, faults: Faults) -> Self {
        let name = |at: usize| (format!("key{}", at / CLUSTERS_OF_A_KEY), format!("cluster{at}"));
        let cluster = |at: usize| Cluster {
            key: KeyName::checked("ns", &name(at).0).unwrap(),
            name: name(at).1,
            has_pod: false,
            had_pod_ns: 0,
            lost_ns: None,
            answered_ns: None,
            probed_ns: Vec::new(),
        };
        let mut world = Self {
            seed,
            dice: Dice(seed),
            store: SharedStore::new(!seed, faults.conflicts),
            hold_store: HoldStore::new(PodStore::new("gw"), SECRET),
            now_ns: 1_000 * SECOND,
            workers: Vec::new(),
            clusters: (0..KEYS * CLUSTERS_OF_A_KEY).map(cluster).collect(),
            tally: Tally::default(),
            told: vec![(0, 0); KEYS],
            faults,
            last_request: 0,
            last_worker: 0,
        };
        for _ in 0..workers {
            let worker = world.worker(settings(which));
            world.workers.push(worker);
        }
        world
    }

    /// Returns a world in which nothing happens but what the test does, and nothing is lost.
    pub fn by_hand(workers: usize, settings: &HoldSettings) -> Self {
        let mut world = Self::new(1, workers, 0, NONE);
        world.workers.iter_mut().for_each(|worker| worker.side.settings = settings.clone());
        world
    }

    fn worker(&mut self, settings: HoldSettings) -> Worker {
        self.last_worker += 1;
        Worker {
            side: WorkerHold::new(PodStore::new("gw"), self.last_worker, SECRET, settings),
            id: self.last_worker,
            mail: Vec::new(),
            probes: Vec::new(),
            waiting: BTreeMap::new(),
            running: Vec::new(),
            tick_ns: self.now_ns,
            stalled_until_ns: 0,
            lost_ns: vec![None; self.clusters.len()],
        }
    }

    fn now(&self) -> MonotonicNs {
        MonotonicNs(self.now_ns)
    }

    fn fails(&mut self, one_in: u64) -> bool {
        one_in > 0 && self.dice.roll(one_in) == 0
    }

    /// Returns what a worker sees of a key.
    pub fn view(&self, key: &KeyName, worker: u64) -> Option<View> {
        self.hold_store.bucket(&self.store.map, self.hold_store.bucket_of(key)).view(key, worker, [])
    }

    /// Returns how many requests wait at a worker.
    pub fn waiting_at(&self, at: usize) -> usize {
        self.workers[at].waiting.len()
    }

    /// Returns how many requests wait.
    pub fn waiting(&self) -> usize {
        (0..self.workers.len()).map(|at| self.waiting_at(at)).sum()
    }

    /// Returns how many requests are in the app.
    pub fn running(&self) -> usize {
        self.workers.iter().map(|worker| worker.running.len()).sum()
    }

    /// A worker's call of its hold, of which the effects are taken and the outcome is checked: that
    /// of a cluster's key, or of all keys.
    fn call<R>(
        &mut self,
        at: usize,
        cluster: Option<usize>,
        call: impl FnOnce(&mut WorkerHold<u64>, &SharedStore, MonotonicNs, &mut Effects<u64>) -> R,
    ) -> R {
        let (now, mut effects) = (self.now(), Effects::default());
        let result = call(&mut self.workers[at].side, &self.store, now, &mut effects);
        self.take(at, effects);
        self.check(cluster);
        result
    }

    /// A request comes to a worker.
    pub fn arrive(&mut self, at: usize, cluster: usize) {
        self.last_request += 1;
        let (id, now, mut effects) = (self.last_request, self.now(), Effects::default());
        let (key, name) = (self.clusters[cluster].key.clone(), self.clusters[cluster].name.clone());
        let tickets = self.tickets(cluster / CLUSTERS_OF_A_KEY);
        let Self { workers, store, .. } = self;
        let side = &mut workers[at].side;
        let arrival = side.arrive(store, &key, &name, now, |_| id, &mut effects);
        let depth = side.settings.depth as usize;
        let wake_ns = side.next_wake_ns(now);
        let is_steady = self.tally.forgotten == 0;
        match arrival {
            Arrival::Passed(passage) => {
                self.check_passed_at_once(at, cluster);
                self.tally.passed_at_once += 1;
                self.run_in_app(at, cluster, passage, true);
            }
            Arrival::Held(number) => {
                let waiting = Waiting { cluster, number, since_ns: now.0, is_free: false };
                self.workers[at].waiting.insert(id, waiting);
                let after = self.tickets(cluster / CLUSTERS_OF_A_KEY);
                assert!(!is_steady || after <= depth.max(tickets), "seed {}: {after} wait", self.seed);
                self.wake(at, wake_ns);
            }
            Arrival::Full => {
                self.tally.refused += 1;
                assert!(!is_steady || tickets >= depth, "seed {}: refused, {tickets} wait", self.seed);
            }
            Arrival::Unheld => panic!("seed {}: not held", self.seed),
        }
        self.take(at, effects);
        self.check(Some(cluster));
    }

    /// Checks that a worker has a reason to let a request through at once.
    fn check_passed_at_once(&self, at: usize, to: usize) {
        let (worker, cluster) = (&self.workers[at], &self.clusters[to]);
        let overtaken = worker.waiting.values().filter(|waiting| waiting.cluster == to).count();
        assert_eq!(overtaken, 0, "seed {}: overtaken at worker {at}", self.seed);
        let had_pod = if cluster.has_pod { self.now_ns } else { cluster.had_pod_ns };
        assert!(worker.lost_ns[to].is_none_or(|lost| had_pod >= lost), "seed {}: to no pod", self.seed);
        let trusted = cluster.answered_ns.is_some_and(|at| self.now_ns - at < LONGEST_TRUST_NS);
        let mut running = self.workers.iter().flat_map(|worker| &worker.running);
        let answers = running.any(|running| running.cluster == to);
        assert!(trusted || answers, "seed {}: {} has not answered", self.seed, cluster.name);
    }

    fn run_in_app(&mut self, at: usize, cluster: usize, passage: Passage, is_free: bool) {
        let has_pod = self.clusters[cluster].has_pod;
        let takes_ns = match self.dice.roll(20) {
            0 => self.dice.roll(5 * SECOND),
            _ => self.dice.roll(SECOND / 2),
        };
        let ends_ns = if has_pod { self.now_ns + takes_ns } else { self.now_ns };
        self.tally.without_pod += u64::from(!has_pod);
        self.workers[at].running.push(Running { cluster, passage, has_pod, is_free, ends_ns });
    }

    /// A client leaves that waits.
    pub fn abandon(&mut self, at: usize) {
        let ids: Vec<u64> = self.workers[at].waiting.keys().copied().collect();
        if ids.is_empty() {
            return;
        }
        let id = ids[self.dice.roll(ids.len() as u64) as usize];
        let Waiting { cluster, number, since_ns, .. } = self.workers[at].waiting.remove(&id).unwrap();
        let key = self.clusters[cluster].key.clone();
        let since = self.call(at, Some(cluster), |side, store, now, effects| {
            side.abandon(store, &key, number, now, effects)
        });
        assert_eq!(since, Some(MonotonicNs(since_ns)), "seed {}", self.seed);
        self.tally.abandoned += 1;
    }

    /// Ends the request in the app that has been there longest.
    pub fn end(&mut self, at: usize, answer: Answer) {
        let running = self.workers[at].running.remove(0);
        self.finish(at, &running, answer, false);
    }

    /// The request in the app that has been there longest turns out to have found no pod.
    pub fn lose(&mut self, at: usize) {
        let running = self.workers[at].running.remove(0);
        self.finish(at, &running, Answer::Unavailable, true);
    }

    fn end_due(&mut self, at: usize) {
        let due = |running: &Running| running.ends_ns <= self.now_ns;
        let Some(position) = self.workers[at].running.iter().position(due) else { return };
        let running = self.workers[at].running.remove(position);
        let stays = self.clusters[running.cluster].has_pod || self.dice.roll(2) == 0;
        let answer = match self.dice.roll(20) {
            0 | 1 => Answer::Neither,
            2 => Answer::Unavailable,
            _ if !running.has_pod || !stays => Answer::Unavailable,
            _ => Answer::Answered,
        };
        let lost = answer == Answer::Unavailable && !running.has_pod;
        self.finish(at, &running, answer, lost);
    }

    fn finish(&mut self, at: usize, running: &Running, answer: Answer, lost: bool) {
        let cluster = &mut self.clusters[running.cluster];
        let key = cluster.key.clone();
        // Trust runs from when it last was in the cluster, whatever came of it.
        cluster.answered_ns = Some(self.now_ns);
        if lost {
            cluster.lost_ns = Some(self.now_ns);
            self.workers[at].lost_ns[running.cluster] = Some(self.now_ns);
        }
        self.call(at, Some(running.cluster), |side, store, now, effects| {
            side.leave(store, &key, &running.passage, (answer, lost), now, effects);
        });
    }

    /// Sets whether a cluster has a pod.
    pub fn set_pod(&mut self, cluster: usize, has_pod: bool) {
        let cluster = &mut self.clusters[cluster];
        if cluster.has_pod {
            cluster.had_pod_ns = self.now_ns;
        }
        cluster.has_pod = has_pod;
    }

    /// A worker reads some of its messages.
    fn look(&mut self, at: usize, buckets: &[u8]) {
        self.call(at, None, |side, store, now, effects| side.look(store, buckets, now, effects));
        let wake_ns = self.workers[at].side.next_wake_ns(self.now());
        self.wake(at, wake_ns);
    }

    /// A worker reads all its messages.
    pub fn read_mail(&mut self, at: usize) {
        let buckets = std::mem::take(&mut self.workers[at].mail);
        if !buckets.is_empty() {
            self.look(at, &buckets);
        }
    }

    /// Handles the answer to a probe.
    fn answer_probe(&mut self, at: usize, which: usize) {
        let (number, cluster, _) = self.workers[at].probes.remove(which);
        let cluster = &mut self.clusters[cluster];
        let result = if cluster.has_pod { ProbeResult::Ready } else { ProbeResult::NotReady };
        if cluster.has_pod {
            cluster.answered_ns = Some(self.now_ns);
        }
        self.call(at, None, |side, store, now, effects| side.probed(store, number, result, now, effects));
    }

    /// Moves a worker's tick forward.
    fn wake(&mut self, at: usize, wake_ns: Option<u64>) {
        if let Some(wake_ns) = wake_ns {
            let worker = &mut self.workers[at];
            worker.tick_ns = worker.tick_ns.min(self.now_ns + wake_ns);
        }
    }

    fn tick(&mut self, at: usize) {
        self.call(at, None, |side, store, now, effects| side.tick(store, now, effects));
        self.workers[at].tick_ns = self.now_ns + PERIOD_NS;
        let wake_ns = self.workers[at].side.next_wake_ns(self.now());
        self.wake(at, wake_ns);
    }

    pub fn sweep(&mut self, at: usize) {
        self.call(at, None, |side, store, now, effects| side.sweep(store, now, effects));
    }

    /// Ends a worker, which says so if it can, and puts another in its place.
    pub fn replace(&mut self, at: usize, closes: bool) {
        let settings = self.workers[at].side.settings.clone();
        let waiting: Vec<u64> = std::mem::take(&mut self.workers[at].waiting).into_keys().collect();
        for running in &self.workers[at].running {
            self.clusters[running.cluster].answered_ns = Some(self.now_ns);
        }
        if closes {
            let mut left = self.call(at, None, |side, store, now, effects| side.close(store, now, effects));
            left.sort_unstable();
            assert_eq!(left, waiting, "seed {}", self.seed);
        }
        self.workers[at] = self.worker(settings);
        self.tally.lost_with_worker += waiting.len() as u64;
    }

    fn take(&mut self, at: usize, effects: Effects<u64>) {
        for (ended, passage) in effects.passed {
            let waiting = self.workers[at].waiting.remove(&ended.data);
            let Some(waiting) = waiting else { panic!("seed {}: {} did not wait", self.seed, ended.data) };
            assert_eq!(ended.since.0, waiting.since_ns);
            let earlier = self.workers[at].waiting.range(..ended.data);
            let overtaken = earlier.filter(|(_, other)| other.cluster == waiting.cluster).count();
            assert_eq!(overtaken, 0, "seed {}: {} overtakes", self.seed, ended.data);
            let cluster = &self.clusters[waiting.cluster];
            let had_pod = if cluster.has_pod { self.now_ns } else { cluster.had_pod_ns };
            let knows = cluster.lost_ns.is_some_and(|lost| waiting.since_ns > lost && had_pod < lost);
            assert!(!knows, "seed {}: {} goes to no pod", self.seed, ended.data);
            let view = self.view(&ended.key, self.workers[at].id);
            let may = view.is_none_or(|view| view.all_waiting == 0 || passage.round() == Some(view.round));
            assert!(may || waiting.is_free, "seed {}: no permit, while others wait", self.seed);
            self.tally.passed += 1;
            self.run_in_app(at, waiting.cluster, passage, waiting.is_free);
        }
        for ended in effects.timed_out {
            let waiting = self.workers[at].waiting.remove(&ended.data).unwrap();
            assert!(self.now_ns - waiting.since_ns >= 4 * SECOND, "seed {}: too early", self.seed);
            self.tally.timed_out += 1;
        }
        for Probe { number, cluster, request, key } in effects.probes {
            // It may have gone on in the same call.
            let Some(id) = self.workers[at].side.held(&key, request).copied() else {
                let (now, mut none) = (self.now(), Effects::default());
                self.workers[at].side.probed(&self.store, number, ProbeResult::NotReady, now, &mut none);
                continue;
            };
            let to = self.workers[at].waiting[&id].cluster;
            assert_eq!((&*cluster, &key), (&*self.clusters[to].name, &self.clusters[to].key));
            self.clusters[to].probed_ns.push(self.now_ns);
            self.workers[at].probes.push((number, to, self.now_ns));
        }
        for (id, bucket) in effects.notify {
            let to = self.workers.iter_mut().find(|worker| worker.id == id);
            to.into_iter().for_each(|worker| worker.mail.push(bucket));
        }
        for bucket in effects.notify_all {
            self.workers.iter_mut().for_each(|worker| worker.mail.push(bucket));
        }
        for (key, more) in effects.more_held {
            let at = self.clusters.iter().position(|cluster| cluster.key == key).unwrap();
            self.told[at / CLUSTERS_OF_A_KEY].0 += more;
        }
    }

    fn tickets(&self, key: usize) -> usize {
        let key = &self.clusters[key * CLUSTERS_OF_A_KEY].key;
        self.view(key, 0).map_or(0, |view| view.all_waiting as usize)
    }

    fn check(&mut self, cluster: Option<usize>) {
        for at in 0..KEYS {
            if cluster.is_some_and(|cluster| cluster / CLUSTERS_OF_A_KEY != at) {
                continue;
            }
            let key = self.clusters[at * CLUSTERS_OF_A_KEY].key.clone();
            let Some(view) = self.view(&key, 0) else {
                assert_eq!(self.told[at].0, 0, "seed {}", self.seed);
                continue;
            };
            let (told, since_ns) = &mut self.told[at];
            assert_eq!(*told, i64::from(view.all_waiting), "seed {}: what is told", self.seed);
            let of_key = |cluster: usize| cluster / CLUSTERS_OF_A_KEY == at;
            if view.all_waiting == 0 {
                *since_ns = self.now_ns;
                let all = self.workers.iter_mut().flat_map(|worker| worker.waiting.values_mut());
                all.filter(|waiting| of_key(waiting.cluster)).for_each(|waiting| waiting.is_free = true);
                continue;
            }
            let doublings = (self.now_ns - *since_ns) / DOUBLING_NS;
            let all = self.workers.iter().flat_map(|worker| &worker.running);
            let permits = all.filter(|running| {
                of_key(running.cluster) && !running.is_free && running.passage.round() == Some(view.round)
            });
            let permits = permits.count() as u64;
            assert!(
                self.tally.forgotten > 0 || permits <= MOST_RELEASE << doublings.min(20),
                "seed {}: {permits} in the app, {doublings} doublings",
                self.seed
            );
            for worker in &self.workers {
                let waits = worker.waiting.values().any(|waiting| of_key(waiting.cluster));
                let has_entry = || self.view(&key, worker.id).is_some_and(|view| view.has_entry);
                self.tally.forgotten += u64::from(waits && !has_entry());
            }
        }
    }

    /// Lets one worker do something.
    fn act(&mut self, at: usize) {
        if self.workers[at].tick_ns <= self.now_ns {
            self.tick(at);
        }
        if self.dice.roll(2) == 0 {
            // Some messages are late, and some are lost.
            let mail = std::mem::take(&mut self.workers[at].mail);
            let (late, mut read): (Vec<u8>, Vec<u8>) = mail.iter().partition(|_| self.dice.roll(4) == 0);
            read.retain(|_| !self.fails(self.faults.losses));
            self.look(at, &read);
            self.workers[at].mail.extend(late);
        }
        match self.dice.roll(16) {
            0..5 => {
                let cluster = self.dice.roll(self.clusters.len() as u64) as usize;
                self.arrive(at, cluster);
            }
            5..9 => self.end_due(at),
            9 => self.abandon(at),
            10..14 if !self.workers[at].probes.is_empty() => {
                let which = self.dice.roll(self.workers[at].probes.len() as u64) as usize;
                match self.fails(self.faults.losses) {
                    true => drop(self.workers[at].probes.remove(which)),
                    false => self.answer_probe(at, which),
                }
            }
            14 if self.fails(self.faults.settings) => {
                self.workers[at].side.settings = settings(self.dice.roll(3) as usize);
            }
            15 if self.dice.roll(4) == 0 => self.sweep(at),
            _ => {}
        }
    }

    /// Lets anything happen.
    pub fn run(&mut self, steps: u32) {
        for _ in 0..steps {
            self.now_ns += self.dice.roll(SECOND / 20);
            if self.dice.roll(40) == 0 {
                let cluster = self.dice.roll(self.clusters.len() as u64) as usize;
                let has_pod = !self.clusters[cluster].has_pod || self.dice.roll(2) == 0;
                self.set_pod(cluster, has_pod);
            }
            let at = self.dice.roll(self.workers.len() as u64) as usize;
            if self.now_ns < self.workers[at].stalled_until_ns {
                continue;
            }
            if self.fails(self.faults.stalls) {
                // With a sign of life before, so that the silence is no longer than the stall.
                self.look(at, &(0..64).collect::<Vec<u8>>());
                let stall_ns = self.dice.roll(self.faults.longest_stall_ns);
                self.workers[at].stalled_until_ns = self.now_ns + stall_ns;
            } else if self.fails(self.faults.deaths) {
                self.replace(at, false);
            } else if self.fails(self.faults.closes) {
                self.replace(at, true);
            } else {
                self.act(at);
            }
        }
    }

    /// Lets time pass without any fault: messages are read at once, probes are answered after a
    /// millisecond, timers fire when they are due. Requests stay in the app.
    pub fn pass(&mut self, ns: u64) {
        let until_ns = self.now_ns + ns;
        while self.now_ns < until_ns {
            self.now_ns += MILLISECOND;
            for at in 0..self.workers.len() {
                if self.workers[at].tick_ns <= self.now_ns {
                    self.tick(at);
                }
                let due = |(_, _, sent_ns): &(u64, usize, u64)| *sent_ns < self.now_ns;
                if let Some(which) = self.workers[at].probes.iter().position(due) {
                    self.answer_probe(at, which);
                }
            }
            while let Some(at) = self.workers.iter().position(|worker| !worker.mail.is_empty()) {
                self.read_mail(at);
            }
        }
    }

    /// Lets everything end. Returns how long requests waited.
    pub fn drain(&mut self) -> u64 {
        (0..self.clusters.len()).for_each(|cluster| self.set_pod(cluster, true));
        let began_ns = self.now_ns;
        let mut waited_ns = 0;
        while self.waiting() + self.running() > 0 {
            self.pass(10 * MILLISECOND);
            if self.waiting() > 0 {
                waited_ns = self.now_ns - began_ns;
            }
            for at in 0..self.workers.len() {
                self.end_due(at);
            }
            let left = (self.waiting(), self.running());
            assert!(self.now_ns - began_ns < 60 * SECOND, "seed {}: {left:?} for ever", self.seed);
        }
        waited_ns
    }
}
