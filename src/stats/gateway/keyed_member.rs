//! A gateway worker as a member that counts per key, over the store that all workers share. It puts
//! its counts into its outbox and, if it leads, collects all outboxes. Which worker leads, which
//! ones are alive and which are gone is decided by [`crate::pod`], over the gateway's total.

use std::collections::BTreeSet;

use crate::counting::grid::Grid;
use crate::counting::request::Origin;
use crate::counting::snapshot::Snapshot;
use crate::counting::time::PodNs;
use crate::gateway::key_admission::{Admission, BUCKETS, KeyAdmission};
use crate::gateway::key_name::KeyName;
use crate::gateway::key_totals::{IdleKeys, KeyTotals};
use crate::gateway::keyed_recorder::{Batch, KeyedRecorder};
use crate::pod::pod_state::{PodState, PodStore};
use crate::pod::store::{self, Attempt, Store, encode};

/// Attempts at a write of the totals. Only the leader, a worker that read an answer, and a worker
/// at its end write them.
const ATTEMPTS: usize = 16;
/// The number of periods after which the leader looks for keys that are tracked but never came.
const SWEEP_PERIODS: u64 = 20;

/// The time in which every idle key is reported once. A server that was started anew thus knows within
/// a minute that they have nothing in flight, even if a report is lost or the leader ends.
#[cfg(not(test))]
const IDLE_ROUND_NS: u64 = 25_000_000_000;
/// Periods of tests are short.
#[cfg(test)]
const IDLE_ROUND_NS: u64 = 25 * tests::PERIOD;

/// Which worker wrote the totals, and the number of that write. It precedes the totals in the
/// store.
type Stamp = (u64, u64);

/// A worker's counters per key, and what it knows of the other workers' counters.
pub struct KeyedMember {
    pod: PodStore,
    /// This worker's id in the pod.
    id: u64,
    started_ns: u64,
    admission: KeyAdmission,
    recorder: KeyedRecorder,
    outbox_key: String,
    /// The boundary of the newest batch that was written to the outbox.
    written_ns: u64,
    /// The totals as this worker last wrote them, and their stamp. As long as the value in the
    /// store has this stamp, it need not be decoded, and no other worker has led meanwhile.
    totals: Option<(Stamp, KeyTotals)>,
    stamps: u64,
    /// What the stats server has acknowledged since the totals were written.
    acknowledged: Vec<(KeyName, Snapshot)>,
    /// Whether this worker has written itself into the buckets since it began to lead.
    reconciled: bool,
    swept_ns: u64,
    orphans: BTreeSet<KeyName>,
    /// The instant up to which idle keys were reported; 0 before this worker led.
    idle_until_ns: u64,
}

/// The result of the leader's work at a boundary.
#[derive(Debug, Default)]
pub struct Led {
    /// Keys that came, or were found, and have stats.
    pub with_stats: Vec<KeyName>,
    /// Keys that left.
    pub left: Vec<KeyName>,
    /// The departed workers that have nothing left to collect.
    pub fully_collected: Vec<u64>,
}

impl KeyedMember {
    /// Returns the worker `id` of a pod in `state`, from `now` on. For `capacity` see
    /// [`KeyAdmission::new`].
    pub fn new(pod: &PodStore, state: &PodState, id: u64, now: PodNs, capacity: u32) -> Self {
        Self {
            pod: pod.clone(),
            id,
            started_ns: state.started_ns,
            admission: KeyAdmission::new(pod.clone(), state.incarnation, state.started_ns, capacity),
            recorder: KeyedRecorder::new(now, state.grid),
            outbox_key: outbox_key(pod, id),
            written_ns: 0,
            totals: None,
            stamps: 0,
            acknowledged: Vec::new(),
            reconciled: false,
            swept_ns: 0,
            orphans: BTreeSet::new(),
            idle_until_ns: 0,
        }
    }

    /// Sets another capacity.
    pub fn set_capacity(&mut self, capacity: u32) {
        self.admission.set_capacity(capacity);
    }

    /// Switches to other boundaries.
    pub fn set_grid(&mut self, grid: Grid) {
        self.recorder.set_grid(grid);
    }

    /// Counts a request that came in, unless the key is [`Admission::Full`].
    pub fn request_in(&mut self, store: &impl Store, key: &KeyName, now: PodNs) -> Option<Admission> {
        self.recorder.advance(now);
        let admission = (!self.recorder.tracks(key)).then(|| self.admission.enter(store, key));
        if admission != Some(Admission::Full) {
            self.recorder.request_in(key, now, Origin::Direct);
        }
        admission
    }

    /// Returns whether a key has Envoy stats of its own.
    pub fn has_stats(&self, store: &impl Store, key: &KeyName) -> bool {
        self.admission.has_stats(store, key)
    }

    /// Counts the end of a request that was counted.
    pub fn request_out(&mut self, key: &KeyName, now: PodNs) {
        self.recorder.request_out(key, now, Origin::Direct);
    }

    /// Closes the boundaries up to now, and writes new batches to the outbox for the leader.
    pub fn post(&mut self, store: &impl Store, now: PodNs) {
        self.recorder.advance(now);
        let collected: Vec<(u64, u64)> = store::read(store, &self.collected_key()).unwrap_or_default();
        let until_ns = collected.iter().find(|(id, _)| *id == self.id).map_or(0, |(_, until_ns)| *until_ns);
        self.recorder.drop_collected(until_ns);
        self.write_outbox(store);
    }

    /// Ends this worker: everything that it counted is left to the other workers.
    pub fn end(&mut self, store: &impl Store, now: PodNs) {
        self.recorder.end(now);
        self.written_ns = 0;
        self.write_outbox(store);
    }

    fn write_outbox(&mut self, store: &impl Store) {
        let newest_ns = self.recorder.outbox().last().map_or(0, Batch::until_ns);
        if newest_ns > self.written_ns && store::write(store, &self.outbox_key, &self.recorder.outbox()) {
            self.written_ns = newest_ns;
        }
    }

    /// At the leader, when all `workers` have closed `as_of_ns`: collects the batches of these
    /// workers and of those that `departed`, and removes idle keys. Returns `None` if the totals
    /// could not be written; then the next boundary includes everything.
    pub fn lead(
        &mut self,
        store: &impl Store,
        workers: &[u64],
        departed: &[u64],
        as_of_ns: u64,
    ) -> Option<Led> {
        let (outboxes, gone) = self.outboxes(store, workers, departed);
        let (left, came) = self.update_totals(store, |totals| {
            let left = totals.take_out_idle();
            let came = totals.collect(&outboxes, &gone, as_of_ns);
            (left, came)
        })?;
        let (_, totals) = self.totals.as_ref()?;
        store::write(store, &self.collected_key(), &totals.collected_boundaries());
        let mut led = Led {
            with_stats: self.admission.admit(store, &came),
            left: left.into_iter().filter(|key| !totals.has(key)).collect(),
            fully_collected: fully_collected(totals, departed, &outboxes),
        };
        let sweeps = as_of_ns.saturating_sub(self.swept_ns)
            >= self.recorder.grid().period_ns.saturating_mul(SWEEP_PERIODS);
        if !self.reconciled || sweeps {
            let keys = totals.keys().map(|(key, _)| key);
            // The keys that were found when this worker began to lead may still come.
            let orphans = std::mem::take(&mut self.orphans);
            let orphans = if sweeps { orphans } else { BTreeSet::new() };
            let reconciled = self.admission.reconcile(store, self.id, keys, &orphans, &totals.floor());
            self.reconciled = reconciled.is_some();
            if let Some((with_stats, orphans)) = reconciled {
                led.with_stats = with_stats;
                self.orphans = orphans;
                self.swept_ns = as_of_ns;
            }
        }
        if self.reconciled {
            self.admission.leave(store, self.id, &led.left, &totals.floor());
        }
        Some(led)
    }

    /// At the end of a worker: collects all outboxes, so that the totals can be reported. No key
    /// leaves.
    pub fn collect_last(&mut self, store: &impl Store, all: &[u64], as_of_ns: u64) -> Option<&KeyTotals> {
        let (outboxes, gone) = self.outboxes(store, &[], all);
        self.update_totals(store, |totals| totals.collect(&outboxes, &gone, as_of_ns))?;
        self.totals()
    }

    /// At the leader, after [`KeyedMember::lead`] at a boundary: reports of the keys that are known and
    /// idle, a few at each boundary. They say that nothing was in flight in the last period, and count
    /// nothing: the totals are the floor, which no key that left was above.
    pub fn idle(&mut self, store: &impl Store) -> IdleKeys {
        let Some((_, totals)) = self.totals.as_ref().filter(|_| self.reconciled) else {
            return IdleKeys::default();
        };
        let until = totals.floor();
        let period_ns = self.recorder.grid().period_ns;
        let since = Snapshot { as_of_ns: until.as_of_ns.saturating_sub(period_ns), ..until };
        let from_ns = match self.idle_until_ns {
            0 => since.as_of_ns,
            idle_until_ns => idle_until_ns,
        };
        self.idle_until_ns = until.as_of_ns;
        let turn = |as_of_ns: u64| as_of_ns / (IDLE_ROUND_NS / BUCKETS);
        let mut keys = self.admission.idle(store, self.id, turn(from_ns)..turn(until.as_of_ns), &until);
        keys.retain(|key| !totals.has(key));
        IdleKeys { keys, since, until }
    }

    /// Returns the totals as this worker last wrote them, while it leads.
    pub fn totals(&self) -> Option<&KeyTotals> {
        self.totals.as_ref().map(|(_, totals)| totals)
    }

    /// Notes that the stats server knows these keys up to these snapshots. The leader writes this
    /// into the totals at its next boundary, together with what it collects then.
    pub fn acknowledged(&mut self, known: Vec<(KeyName, Snapshot)>) {
        self.acknowledged.extend(known);
    }

    /// On a worker that does not lead: writes the acknowledgements that it received while it still
    /// led. Returns whether it led until now.
    pub fn follow(&mut self, store: &impl Store) -> bool {
        if !self.acknowledged.is_empty() {
            self.update_totals(store, |_| ());
        }
        self.reconciled = false;
        self.idle_until_ns = 0;
        self.totals.take().is_some()
    }

    fn outboxes(
        &self,
        store: &impl Store,
        workers: &[u64],
        departed: &[u64],
    ) -> (Vec<(u64, Vec<Batch>)>, Vec<u64>) {
        let gone: Vec<u64> = departed.iter().filter(|id| !workers.contains(id)).copied().collect();
        let ids = workers.iter().chain(&gone);
        let outbox = |id: &u64| (*id, store::read(store, &outbox_key(&self.pod, *id)).unwrap_or_default());
        (ids.map(outbox).collect(), gone)
    }

    /// Writes the totals with the acknowledgements and a change.
    fn update_totals<R>(&mut self, store: &impl Store, change: impl Fn(&mut KeyTotals) -> R) -> Option<R> {
        let key = self.pod.key("totals");
        let updated = store::update_bytes(store, &key, ATTEMPTS, |found| {
            let Some(mut totals) = self.totals_in(found) else { return Attempt::Keep(None) };
            totals.acknowledge(&self.acknowledged);
            let result = change(&mut totals);
            self.stamps += 1;
            let written = ((self.id, self.stamps), totals);
            let bytes = encode(&written);
            self.totals = Some(written);
            bytes.map_or(Attempt::Retry, |bytes| Attempt::Write(bytes, Some(result)))
        });
        let result = updated.ok().flatten();
        match result {
            Some(_) => self.acknowledged.clear(),
            None => self.totals = None,
        }
        result
    }

    /// Returns the totals in the store, decoded unless this worker wrote them. Returns `None` if
    /// they do not decode.
    fn totals_in(&mut self, found: Option<&[u8]>) -> Option<KeyTotals> {
        let own = self.totals.take();
        let Some(bytes) = found else { return Some(KeyTotals::starting_at(self.started_ns)) };
        let stamp: Stamp = bincode::deserialize(bytes).ok()?;
        if let Some((_, totals)) = own.filter(|(own, _)| *own == stamp) {
            return Some(totals);
        }
        // Another worker wrote them, so it may have led.
        self.reconciled = false;
        let (_, totals): (Stamp, KeyTotals) = bincode::deserialize(bytes).ok()?;
        Some(totals)
    }

    fn collected_key(&self) -> String {
        self.pod.key("collected")
    }
}

fn fully_collected(totals: &KeyTotals, departed: &[u64], outboxes: &[(u64, Vec<Batch>)]) -> Vec<u64> {
    let all_in = |id: &u64| {
        let batches = outboxes.iter().filter(|(worker, _)| worker == id).flat_map(|(_, batches)| batches);
        batches.map(Batch::until_ns).all(|until_ns| until_ns <= totals.collected_until(*id))
    };
    departed.iter().filter(|id| all_in(id)).copied().collect()
}

fn outbox_key(pod: &PodStore, worker: u64) -> String {
    pod.key(&format!("outbox/{worker:016x}"))
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::collections::BTreeMap;

    use super::*;
    use crate::counting::recorder::Recorder;
    use crate::counting::time::MonotonicNs;
    use crate::pod::leader::LeaderStep;
    use crate::pod::member::Member;
    use crate::pod::store::Expect;
    use crate::protocol::report_delta::addition;
    use crate::testing::{Dice, Map};

    pub(super) const PERIOD: u64 = 1_000;
    const START: u64 = 1_000_000;
    const KEYS: u64 = 6;

    fn key(number: u64) -> KeyName {
        KeyName { namespace: "ns".into(), name: number.to_string().into() }
    }

    struct Worker {
        recorder: Recorder,
        member: Member,
        keyed: KeyedMember,
        open: Vec<(KeyName, u64)>,
        stalled_until: u64,
        /// The report that is not answered yet, and how long its answer is waited for.
        sending: Option<(u64, u64)>,
    }

    impl Worker {
        fn new(store: &impl Store, now: u64) -> Self {
            let pod = PodStore::new("gw");
            let state = pod.open(store, MonotonicNs(now), now, PERIOD, 7).unwrap();
            let mut member = Member::new(pod.clone(), PodNs(now), PERIOD);
            let id = member.id(store).unwrap();
            Self {
                recorder: Recorder::new(PodNs(now), state.grid),
                keyed: KeyedMember::new(&pod, &state, id, PodNs(now), KEYS as u32),
                member,
                open: Vec::new(),
                stalled_until: 0,
                sending: None,
            }
        }
    }

    /// A report on its way to the server.
    struct Sent {
        worker: usize,
        number: u64,
        messages: Vec<(KeyName, Snapshot, Snapshot)>,
    }

    #[derive(Default)]
    struct Server {
        known: BTreeMap<KeyName, Snapshot>,
        counted: BTreeMap<KeyName, (u64, u128)>,
        reported: Vec<(KeyName, Snapshot)>,
    }

    impl Server {
        fn take(&mut self, sent: &Sent) {
            for (key, since, until) in &sent.messages {
                let known = self.known.get(key).copied();
                let period = addition(known.as_ref(), since, until).expect("no counter went back");
                let sum = self.counted.entry(key.clone()).or_default();
                *sum = (sum.0 + period.requests, sum.1 + period.request_ns);
                self.known.insert(key.clone(), known.map_or(*until, |known| known.ceiling(until)));
                self.reported.push((key.clone(), *until));
            }
        }
    }

    /// A gateway in which, between any two steps of one worker, other workers act, stall, end and
    /// come back, while reports and answers are lost, are repeated and overtake each other.
    struct World {
        map: Map,
        dice: RefCell<Dice>,
        now: Cell<u64>,
        depth: Cell<u32>,
        workers: Vec<RefCell<Worker>>,
        transit: RefCell<Vec<Sent>>,
        server: RefCell<Server>,
        truth: RefCell<BTreeMap<KeyName, (u64, u128)>>,
        firsts: Cell<u64>,
        /// First reports of an instant before that of an earlier report of the key.
        older_firsts: Cell<u64>,
        numbers: Cell<u64>,
        calm: Cell<bool>,
    }

    impl Store for &World {
        fn get(&self, key: &str) -> Option<(Vec<u8>, u32)> {
            self.between();
            self.map.get(key)
        }

        fn set(&self, key: &str, value: &[u8], expect: Expect) -> bool {
            self.between();
            self.map.set(key, value, expect)
        }
    }

    impl World {
        fn new(seed: u64) -> Self {
            let map = Map::default();
            let workers = (0..3).map(|_| RefCell::new(Worker::new(&map, START))).collect();
            Self {
                map,
                dice: RefCell::new(Dice(seed)),
                now: Cell::new(START),
                depth: Cell::new(0),
                workers,
                transit: RefCell::default(),
                server: RefCell::default(),
                truth: RefCell::default(),
                firsts: Cell::new(0),
                older_firsts: Cell::new(0),
                numbers: Cell::new(0),
                calm: Cell::new(false),
            }
        }

        fn roll(&self, sides: u64) -> u64 {
            self.dice.borrow_mut().roll(sides)
        }

        fn between(&self) {
            if !self.calm.get() && self.depth.get() < 2 && self.roll(40) == 0 {
                self.depth.set(self.depth.get() + 1);
                self.act();
                self.depth.set(self.depth.get() - 1);
            }
        }

        fn act(&self) {
            let index = self.roll(self.workers.len() as u64) as usize;
            // This worker is busy: this call is in the middle of one of its steps.
            let Ok(mut worker) = self.workers[index].try_borrow_mut() else { return };
            let now = self.now.get();
            if now < worker.stalled_until {
                return;
            }
            match self.roll(400) {
                0 => worker.stalled_until = now + self.roll(8 * PERIOD),
                1 => self.end(index, &mut worker),
                2..70 => self.request_in(&mut worker),
                70..200 => self.request_out(&mut worker),
                200..300 => self.tick(index, &mut worker),
                _ => {
                    drop(worker);
                    self.deliver(true);
                }
            }
        }

        fn request_in(&self, worker: &mut Worker) {
            let now = self.now.get();
            // Two keys are active at a time, so that the others become idle.
            let key = key(2 * (now / (5 * PERIOD) % (KEYS / 2)) + self.roll(2));
            let admission = worker.keyed.request_in(&self, &key, PodNs(now));
            if admission == Some(Admission::Full) {
                return;
            }
            worker.recorder.request_in(PodNs(now), Origin::Direct);
            if let Some(Admission::First { floor, .. }) = admission {
                self.firsts.set(self.firsts.get() + 1);
                // Of an older one the server would take no notice: the key would be awake only with
                // its next report.
                let server = self.server.borrow();
                let reported = server.reported.iter().filter(|(reported, _)| *reported == key);
                let newest = reported.map(|(_, until)| until.as_of_ns).max();
                let is_older = newest.is_some_and(|newest| newest > floor.as_of_ns);
                self.older_firsts.set(self.older_firsts.get() + u64::from(is_older));
                let messages = vec![(key.clone(), floor, Snapshot { in_flight: 1, ..floor })];
                self.transit.borrow_mut().push(Sent { worker: usize::MAX, number: 0, messages });
            }
            self.truth.borrow_mut().entry(key.clone()).or_default().0 += 1;
            worker.open.push((key, now));
        }

        fn request_out(&self, worker: &mut Worker) {
            if worker.open.is_empty() {
                return;
            }
            let (key, since) = worker.open.swap_remove(self.roll(worker.open.len() as u64) as usize);
            self.out(worker, &key, since);
        }

        fn out(&self, worker: &mut Worker, key: &KeyName, since: u64) {
            let now = self.now.get();
            worker.keyed.request_out(key, PodNs(now));
            worker.recorder.request_out(PodNs(now), Origin::Direct);
            self.truth.borrow_mut().entry(key.clone()).or_default().1 += u128::from(now - since);
        }

        fn tick(&self, index: usize, worker: &mut Worker) {
            let now = self.now.get();
            worker.recorder.advance(PodNs(now));
            let pod = worker.member.pod().clone();
            let state = pod.state(&self).unwrap();
            worker.keyed.post(&self, PodNs(now));
            if worker.member.post(&self, &worker.recorder).is_err() {
                return;
            }
            let Ok(step) = worker.member.lead(&self, PodNs(now), 0) else { return };
            let LeaderStep::Published { latest, .. } = step else {
                if step == LeaderStep::Follow {
                    worker.keyed.follow(&self);
                }
                return;
            };
            let departed = pod.state(&self).unwrap().departed;
            let workers: Vec<u64> = pod.state(&self).unwrap().workers().collect();
            let Some(led) = worker.keyed.lead(&self, &workers, &departed, latest.as_of_ns) else { return };
            pod.forget_departed(&self, &led.fully_collected).unwrap();
            worker.sending = worker.sending.filter(|(_, deadline)| now < *deadline);
            if worker.sending.is_none() {
                let idle = worker.keyed.idle(&self);
                let number = self.send(index, idle, worker.keyed.totals().unwrap());
                worker.sending = Some((number, now + 2 * PERIOD));
            }
            assert_eq!(state.started_ns, START);
        }

        fn send(&self, worker: usize, idle: IdleKeys, totals: &KeyTotals) -> u64 {
            let number = self.numbers.get() + 1;
            self.numbers.set(number);
            let messages =
                totals.keys().map(|(key, total)| (key.clone(), total.reported_since(), total.until));
            let idle = idle.keys.into_iter().map(|key| (key, idle.since, idle.until));
            let messages = messages.chain(idle).collect();
            self.transit.borrow_mut().push(Sent { worker, number, messages });
            number
        }

        /// Ends a worker, as by a panic. Another worker replaces it.
        fn end(&self, index: usize, worker: &mut Worker) {
            for (key, since) in std::mem::take(&mut worker.open) {
                // No worker counts the end of a request that its worker leaves behind.
                let now = self.now.get();
                self.truth.borrow_mut().entry(key).or_default().1 += u128::from(now - since);
            }
            let now = self.now.get();
            worker.recorder.advance(PodNs(now));
            worker.keyed.end(&self, PodNs(now));
            worker.member.seal(&self, &worker.recorder).unwrap();
            if self.roll(2) == 0 {
                let (until, state) = worker.member.last_figure(&self, PodNs(now)).unwrap();
                let all: Vec<u64> = state.workers().chain(state.departed.iter().copied()).collect();
                if let Some(totals) = worker.keyed.collect_last(&self, &all, until.as_of_ns) {
                    self.send(index, IdleKeys::default(), totals);
                }
            }
            *worker = Worker::new(&self.map, now);
        }

        fn deliver(&self, faults: bool) {
            let mut transit = self.transit.borrow_mut();
            if transit.is_empty() {
                return;
            }
            let next = self.roll(transit.len() as u64) as usize;
            let sent = transit.swap_remove(next);
            drop(transit);
            if faults && self.roll(10) == 0 {
                return;
            }
            self.server.borrow_mut().take(&sent);
            if faults && self.roll(10) == 0 {
                self.transit.borrow_mut().push(sent);
                return;
            }
            let Some(worker) = self.workers.get(sent.worker) else { return };
            let Ok(mut worker) = worker.try_borrow_mut() else { return };
            if worker.sending.is_some_and(|(number, _)| number == sent.number) {
                worker.sending = None;
                let known = sent.messages.into_iter().map(|(key, _, until)| (key, until)).collect();
                worker.keyed.acknowledged(known);
            }
        }

        /// Lets all workers run again, all requests end, and nothing get lost any more.
        fn settle(&self) {
            self.calm.set(true);
            for worker in &self.workers {
                let mut worker = worker.borrow_mut();
                for (key, since) in std::mem::take(&mut worker.open) {
                    self.out(&mut worker, &key, since);
                }
            }
            for _ in 0..200 {
                self.now.set(self.now.get() + PERIOD / 4);
                for (index, worker) in self.workers.iter().enumerate() {
                    self.tick(index, &mut worker.borrow_mut());
                }
                for _ in 0..8 {
                    self.deliver(false);
                }
            }
        }
    }

    #[test]
    fn whoever_stalls_dies_or_leads_every_request_counts_once_and_no_total_goes_back() {
        let (mut firsts, mut older_firsts, mut lives) = (0, 0, 0);
        for seed in 0..400 {
            let world = World::new(seed);
            for _ in 0..1_500 {
                world.now.set(world.now.get() + world.roll(PERIOD / 15));
                world.act();
            }
            world.settle();
            let server = world.server.borrow();
            let truth = world.truth.borrow();
            let counted: BTreeMap<_, _> =
                server.counted.clone().into_iter().filter(|(key, _)| truth.contains_key(key)).collect();
            assert_eq!(counted, *truth, "seed {seed}");
            for key in truth.keys() {
                let mut reported: Vec<Snapshot> = server
                    .reported
                    .iter()
                    .filter(|(reported, _)| reported == key)
                    .map(|(_, until)| *until)
                    .collect();
                reported.sort_by_key(|until| (until.as_of_ns, until.requests, until.request_ns));
                let last = reported.last().expect("it was reported").as_of_ns;
                assert!(last > world.now.get() - 30 * PERIOD, "seed {seed}: idle keys are reported, too");
                for pair in reported.windows(2) {
                    assert!(pair[1].holds_totals_of(&pair[0]), "seed {seed}: {pair:?}");
                }
            }
            let left: usize = world
                .workers
                .iter()
                .filter_map(|w| w.borrow().keyed.totals().map(|t| t.keys().count()))
                .sum();
            assert_eq!(left, 0, "seed {seed}: idle keys leave");
            firsts += world.firsts.get();
            older_firsts += world.older_firsts.get();
            lives += truth.len() as u64;
        }
        assert!(firsts > 2 * lives, "keys left and came back: {firsts} firsts of {lives} keys");
        // Only a worker that stalled while it led can cause one.
        assert!(older_firsts * 100 < firsts, "{older_firsts} of {firsts}");
    }
}
