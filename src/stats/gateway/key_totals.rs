//! The key totals of a gateway, in one value of the shared store. The leader adds the workers'
//! batches to them.
//!
//! The leader adds batches and records, in the same write, up to which boundary it has collected
//! from each worker. So a batch counts exactly once, whichever worker dies in between. A key that
//! was idle for a whole period, and of which the stats server knows everything, leaves the totals.
//! It costs nothing until it comes back.
//!
//! **Within an incarnation the totals of a key never start again at zero and never go down.** The
//! keys that leave raise the *floor*: the highest totals of any of them, field by field. Any key
//! that comes later, new or again, begins at the floor. Only differences count, so it does not
//! matter that a key begins with more than it ever had. It matters that a key never begins with
//! less.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::counting::snapshot::Snapshot;
use crate::gateway::key_name::KeyName;
use crate::gateway::keyed_recorder::Batch;
use crate::protocol::report::{KeyReport, Report};
use crate::protocol::report::{MAX_BYTES, VERSION};

/// The totals of one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyTotal {
    /// The last snapshot that the stats server acknowledged.
    pub since: Snapshot,
    /// The current snapshot.
    pub until: Snapshot,
    /// The snapshot at the previous boundary.
    pub before: Snapshot,
    /// Whether nothing happened in the last whole period.
    pub idle: bool,
    late: Option<Backdated>,
}

/// Marks a total with a worker's batch that came later than those of the other workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Backdated {
    from_ns: u64,
    collected_ns: u64,
}

impl KeyTotal {
    /// Returns the snapshot that a report of this key begins with: the acknowledged totals, as of
    /// the instant at which the new counts began. If a worker was late, that instant is before the
    /// last report.
    pub fn reported_since(&self) -> Snapshot {
        let late_ns = self.late.map_or(u64::MAX, |late| late.from_ns);
        Snapshot { as_of_ns: self.since.as_of_ns.min(late_ns), ..self.since }
    }

    fn is_acknowledged(&self) -> bool {
        self.since.holds_totals_of(&self.until)
    }
}

/// The requests that one worker had in flight, per key: all of them, and the proxied ones.
type InFlightByKey = Vec<(KeyName, (u32, u32))>;

/// All keys that have not left, and what has to be kept of those that have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyTotals {
    keys: BTreeMap<KeyName, KeyTotal>,
    floor: Snapshot,
    /// The boundary up to which each worker's batches are included.
    collected: Vec<(u64, u64)>,
    /// The requests that each worker had in flight at that boundary.
    in_flight: Vec<(u64, InFlightByKey)>,
    as_of_ns: u64,
}

/// Keys that are known and idle, to be reported as such. They all have the same snapshots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdleKeys {
    /// The keys.
    pub keys: Vec<KeyName>,
    /// The floor, as of the previous boundary.
    pub since: Snapshot,
    /// The floor, as of this boundary.
    pub until: Snapshot,
}

impl KeyTotals {
    /// Returns empty totals, as of the instant at which the counters began.
    pub fn starting_at(started_ns: u64) -> Self {
        Self {
            keys: BTreeMap::new(),
            floor: Snapshot::starting_at(started_ns),
            collected: Vec::new(),
            in_flight: Vec::new(),
            as_of_ns: started_ns,
        }
    }

    /// Returns the boundary up to which each worker's batches are included.
    pub fn collected_boundaries(&self) -> &[(u64, u64)] {
        &self.collected
    }

    /// Returns the boundary up to which one worker's batches are included.
    pub fn collected_until(&self, worker: u64) -> u64 {
        self.collected.iter().find(|(id, _)| *id == worker).map_or(0, |(_, until_ns)| *until_ns)
    }

    /// Returns the floor, as of the newest boundary: no key that has left had more than this.
    pub fn floor(&self) -> Snapshot {
        Snapshot { as_of_ns: self.as_of_ns, ..self.floor }
    }

    /// Returns whether a key is in the totals.
    pub fn has(&self, key: &KeyName) -> bool {
        self.keys.contains_key(key)
    }

    /// Returns every key in the totals.
    pub fn keys(&self) -> impl Iterator<Item = (&KeyName, &KeyTotal)> {
        self.keys.iter()
    }

    /// Adds the batches of all workers, each with its id, as of the newest boundary that all have
    /// closed. Skips batches that are already included. Workers that are `gone` have nothing in
    /// flight any more. Returns the keys that came.
    pub fn collect(&mut self, outboxes: &[(u64, Vec<Batch>)], gone: &[u64], as_of_ns: u64) -> Vec<KeyName> {
        let mut came = Vec::new();
        if as_of_ns <= self.as_of_ns {
            return came;
        }
        let before_ns = self.as_of_ns;
        let begins = self.floor();
        for total in self.keys.values_mut() {
            total.before = total.until;
        }
        let mut active = BTreeSet::new();
        for (worker, batches) in outboxes {
            let collected_ns = self.collected_until(*worker);
            for batch in batches.iter().filter(|b| b.until_ns > collected_ns && b.until_ns <= as_of_ns) {
                for (key, delta) in &batch.keys {
                    active.insert(key.clone());
                    let total = self.keys.entry(key.clone()).or_insert_with(|| {
                        came.push(key.clone());
                        KeyTotal { since: begins, until: begins, before: begins, idle: false, late: None }
                    });
                    // The requests in flight are summed over the workers below.
                    total.until = total.until.plus(delta);
                    if batch.until_ns <= before_ns {
                        total.before = total.before.plus(delta);
                    }
                    if batch.from_ns < before_ns {
                        let from_ns = total.late.map_or(u64::MAX, |late| late.from_ns).min(batch.from_ns);
                        total.late = Some(Backdated { from_ns, collected_ns: as_of_ns });
                    }
                }
                let held = batch.keys.iter().filter(|(_, delta)| delta.in_flight > 0);
                let held = held
                    .map(|(key, delta)| (key.clone(), (delta.in_flight, delta.proxied_in_flight)))
                    .collect();
                self.in_flight.retain(|(id, _)| id != worker);
                self.in_flight.push((*worker, held));
                self.collected.retain(|(id, _)| id != worker);
                self.collected.push((*worker, batch.until_ns));
            }
        }
        self.in_flight.retain(|(id, _)| !gone.contains(id));
        let mut in_flight: BTreeMap<&KeyName, (u32, u32)> = BTreeMap::new();
        for (key, (all, proxied)) in self.in_flight.iter().flat_map(|(_, held)| held) {
            let sum = in_flight.entry(key).or_default();
            *sum = (sum.0.saturating_add(*all), sum.1.saturating_add(*proxied));
        }
        for (key, total) in &mut self.keys {
            total.idle = !active.contains(key);
            (total.until.in_flight, total.until.proxied_in_flight) =
                in_flight.get(key).copied().unwrap_or_default();
            total.until.as_of_ns = as_of_ns;
        }
        self.as_of_ns = as_of_ns;
        came
    }

    /// Records that the stats server knows these keys up to these snapshots.
    pub fn acknowledge(&mut self, known: &[(KeyName, Snapshot)]) {
        for (key, until) in known {
            if let Some(total) = self.keys.get_mut(key)
                && until.as_of_ns > total.since.as_of_ns
            {
                total.since = *until;
                total.late = total.late.filter(|late| late.collected_ns > until.as_of_ns);
            }
        }
    }

    /// Removes the keys that were idle for a whole period, have nothing in flight, and are fully
    /// known to the stats server. Returns them.
    pub fn take_out_idle(&mut self) -> Vec<KeyName> {
        let (mut left, mut floor) = (Vec::new(), self.floor);
        self.keys.retain(|key, total| {
            let stays = !(total.idle && total.is_acknowledged() && total.until.in_flight == 0);
            if !stays {
                floor = floor.ceiling(&total.until);
                left.push(key.clone());
            }
            stays
        });
        self.floor = floor;
        left
    }

    /// Returns all keys, those that are `idle` included, as reports of at most [`MAX_BYTES`]. Each report
    /// comes with the snapshots that it reports of its keys.
    pub fn reports(
        &self,
        idle: &IdleKeys,
        pod: &str,
        incarnation: u64,
        max_keys: usize,
    ) -> Vec<(Report, Vec<(KeyName, Snapshot)>)> {
        const SNAPSHOTS_AND_LENGTHS: usize = 2 * 64 + 2 * 8 + 1;
        let head = pod.len() + 32;
        let empty = || Report { version: VERSION, pod: pod.to_owned(), incarnation, messages: Vec::new() };
        let mut reports = vec![(empty(), Vec::new())];
        let mut size = head;
        let active = self.keys.iter().map(|(key, total)| (key, total.reported_since(), total.until));
        for (key, since, until) in active.chain(idle.keys.iter().map(|key| (key, idle.since, idle.until))) {
            let more = key.namespace.len() + key.name.len() + SNAPSHOTS_AND_LENGTHS;
            let is_full = reports.last().is_some_and(|(_, known)| known.len() >= max_keys.max(1));
            if is_full || size + more > MAX_BYTES {
                reports.push((empty(), Vec::new()));
                size = head;
            }
            size += more;
            if let Some((report, known)) = reports.last_mut() {
                report.messages.push(message(key, since, until));
                known.push((key.clone(), until));
            }
        }
        reports.retain(|(report, _)| !report.messages.is_empty());
        reports
    }
}

/// Returns a gateway's report of one key.
pub fn message(key: &KeyName, since: Snapshot, until: Snapshot) -> KeyReport {
    let KeyName { namespace, name } = key;
    KeyReport { namespace: namespace.to_string(), name: name.to_string(), from_gateway: true, since, until }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::counting::grid::Grid;
    use crate::counting::request::Origin;
    use crate::counting::time::PodNs;
    use crate::gateway::keyed_recorder::KeyedRecorder;

    const GRID: Grid = Grid { anchor_ns: 1_000, period_ns: 100 };

    fn key(name: &str) -> KeyName {
        KeyName { namespace: "ns".into(), name: name.into() }
    }

    fn total(totals: &KeyTotals, name: &str) -> Option<KeyTotal> {
        totals.keys().find(|(k, _)| **k == key(name)).map(|(_, total)| *total)
    }

    fn figures(totals: &KeyTotals, name: &str) -> Option<(u64, u128, u32, bool)> {
        let KeyTotal { until, idle, .. } = total(totals, name)?;
        Some((until.requests, until.request_ns, until.in_flight, idle))
    }

    fn collect(totals: &mut KeyTotals, workers: &[(u64, &KeyedRecorder)], as_of_ns: u64) {
        let outboxes: Vec<_> = workers.iter().map(|(id, worker)| (*id, worker.outbox().to_vec())).collect();
        totals.collect(&outboxes, &[], as_of_ns);
    }

    fn acknowledge_all(totals: &mut KeyTotals) {
        let known: Vec<_> = totals.keys().map(|(key, total)| (key.clone(), total.until)).collect();
        totals.acknowledge(&known);
    }

    #[test]
    fn a_key_is_the_sum_over_workers_and_a_batch_counts_once() {
        let (mut a, mut b) = (KeyedRecorder::new(PodNs(1_000), GRID), KeyedRecorder::new(PodNs(1_000), GRID));
        a.request_in(&key("x"), PodNs(1_010), Origin::Direct);
        b.request_in(&key("x"), PodNs(1_020), Origin::Proxied);
        b.request_out(&key("x"), PodNs(1_040), Origin::Proxied);
        b.request_in(&key("y"), PodNs(1_050), Origin::Direct);
        a.advance(PodNs(1_103));
        b.advance(PodNs(1_150));
        let mut totals = KeyTotals::starting_at(1_000);
        for _ in 0..2 {
            collect(&mut totals, &[(1, &a), (2, &b)], 1_100);
            assert_eq!(figures(&totals, "x"), Some((2, 90 + 20, 1, false)));
            assert_eq!(figures(&totals, "y"), Some((1, 50, 1, false)));
        }
        a.drop_collected(totals.collected_until(1));
        assert_eq!(a.outbox().len(), 0);
        // b's batch is still in its outbox, and is skipped.
        a.request_out(&key("x"), PodNs(1_160), Origin::Direct);
        a.advance(PodNs(1_200));
        b.advance(PodNs(1_200));
        collect(&mut totals, &[(1, &a), (2, &b)], 1_200);
        assert_eq!(figures(&totals, "x"), Some((2, 90 + 20 + 60, 0, false)));
    }

    #[test]
    fn a_key_that_left_comes_back_with_no_less_than_any_key_that_left() {
        let mut worker = KeyedRecorder::new(PodNs(1_000), GRID);
        let request = |worker: &mut KeyedRecorder, name: &str, from: u64, to: u64| {
            worker.request_in(&key(name), PodNs(from), Origin::Direct);
            worker.request_out(&key(name), PodNs(to), Origin::Direct);
        };
        request(&mut worker, "x", 1_001, 1_002);
        request(&mut worker, "x", 1_003, 1_004);
        request(&mut worker, "y", 1_001, 1_090);
        let mut totals = KeyTotals::starting_at(1_000);
        worker.advance(PodNs(1_100));
        assert!(!worker.tracks(&key("x")));
        collect(&mut totals, &[(1, &worker)], 1_100);
        assert_eq!(total(&totals, "x").unwrap().since, Snapshot::starting_at(1_000));
        acknowledge_all(&mut totals);
        assert_eq!(totals.take_out_idle(), [], "active in this period");
        worker.advance(PodNs(1_200));
        collect(&mut totals, &[(1, &worker)], 1_200);
        assert_eq!(figures(&totals, "x"), Some((2, 2, 0, true)));
        assert_eq!(totals.take_out_idle(), [key("x"), key("y")]);
        assert_eq!(totals.keys().count(), 0);
        let floor = Snapshot { as_of_ns: 1_200, requests: 2, request_ns: 89, ..Snapshot::default() };
        assert_eq!(totals.floor(), floor);
        request(&mut worker, "x", 1_350, 1_360);
        worker.advance(PodNs(1_400));
        collect(&mut totals, &[(1, &worker)], 1_400);
        let KeyTotal { since, until, .. } = total(&totals, "x").unwrap();
        assert_eq!(since, floor);
        assert_eq!((until.as_of_ns, until.requests, until.request_ns), (1_400, 3, 99));
    }

    #[test]
    fn without_an_acknowledgement_nothing_leaves() {
        let mut worker = KeyedRecorder::new(PodNs(1_000), GRID);
        worker.request_in(&key("x"), PodNs(1_001), Origin::Direct);
        worker.request_out(&key("x"), PodNs(1_002), Origin::Direct);
        let mut totals = KeyTotals::starting_at(1_000);
        for boundary in [1_100, 1_200, 1_300] {
            worker.advance(PodNs(boundary));
            collect(&mut totals, &[(1, &worker)], boundary);
        }
        let old = Snapshot { as_of_ns: 1_100, ..Snapshot::default() };
        totals.acknowledge(&[(key("x"), old), (key("unknown"), old)]);
        assert_eq!(totals.take_out_idle(), []);
        assert_eq!(figures(&totals, "x"), Some((1, 1, 0, true)));
    }

    #[test]
    fn a_worker_that_is_gone_holds_nothing_and_its_last_batch_counts() {
        let mut worker = KeyedRecorder::new(PodNs(1_000), GRID);
        worker.request_in(&key("x"), PodNs(1_010), Origin::Direct);
        worker.advance(PodNs(1_100));
        let mut totals = KeyTotals::starting_at(1_000);
        collect(&mut totals, &[(1, &worker)], 1_100);
        worker.request_in(&key("x"), PodNs(1_110), Origin::Direct);
        worker.end(PodNs(1_150));
        totals.collect(&[(1, worker.outbox().to_vec())], &[1], 1_200);
        assert_eq!(figures(&totals, "x"), Some((2, 90 + 50 + 40, 0, false)));
    }

    #[test]
    fn what_comes_late_is_said_to_be_of_the_time_that_it_covers_and_the_last_period_is_its_own() {
        let (mut slow, mut quick) =
            (KeyedRecorder::new(PodNs(1_000), GRID), KeyedRecorder::new(PodNs(1_000), GRID));
        slow.request_in(&key("x"), PodNs(1_100), Origin::Direct);
        let mut totals = KeyTotals::starting_at(1_000);
        for boundary in [1_100, 1_200, 1_300, 1_400] {
            quick.advance(PodNs(boundary));
            let outbox = quick.outbox().to_vec();
            totals.collect(&[(1, outbox), (2, slow.outbox().to_vec())], &[], boundary);
            acknowledge_all(&mut totals);
        }
        assert_eq!(figures(&totals, "x"), None, "the slow one has handed over nothing of it");
        slow.advance(PodNs(1_500));
        quick.advance(PodNs(1_500));
        collect(&mut totals, &[(1, &quick), (2, &slow)], 1_500);
        let late = total(&totals, "x").unwrap();
        assert_eq!(
            (late.until.request_ns, late.until.since(&late.before).unwrap().average_milli()),
            (400, 1_000)
        );
        assert_eq!((late.since.as_of_ns, late.reported_since().as_of_ns), (1_400, 1_100));
        assert_eq!(late.reported_since().requests, late.since.requests);
        // This holds until the report is acknowledged.
        acknowledge_all(&mut totals);
        let known = total(&totals, "x").unwrap();
        assert_eq!(known.reported_since(), late.until);
    }

    #[test]
    fn reports_are_split_at_the_size_that_a_receiver_takes() {
        let mut worker = KeyedRecorder::new(PodNs(1_000), GRID);
        for number in 0..10_000 {
            worker.request_in(
                &key(&format!("a-key-with-a-long-name-{number}")),
                PodNs(1_010),
                Origin::Direct,
            );
        }
        worker.advance(PodNs(1_100));
        let mut totals = KeyTotals::starting_at(1_000);
        collect(&mut totals, &[(1, &worker)], 1_100);
        assert_eq!(totals.reports(&IdleKeys::default(), "gateway", 7, 1_000).len(), 10);
        assert_eq!(
            totals.reports(&IdleKeys::default(), "gateway", 7, 0).len(),
            10_000,
            "one key to a report at least"
        );
        let reports = totals.reports(&IdleKeys::default(), "gateway", 7, usize::MAX);
        assert!(reports.len() > 1);
        let keys: BTreeSet<_> = (reports.iter())
            .flat_map(|(report, known)| {
                assert_eq!(Report::decode(&report.encode().unwrap()).unwrap(), *report);
                assert_eq!(report.messages.len(), known.len());
                report.messages.iter().map(|message| message.name.clone())
            })
            .collect();
        assert_eq!(keys.len(), 10_000);
    }
}
