//! Key admission: which keys a gateway tracks. A worker asks here about each key that it does not
//! track itself. The answer says whether this worker is the first of all workers to see the key, so
//! that one report is sent at once, and whether there is capacity for another key.
//!
//! The shared store cannot delete values, so a name that a client chose is never the name of a
//! value. Instead, keys are kept in a fixed number of *buckets*, by a hash that no client can
//! predict. The counts do not depend on the buckets (they depend on
//! [`crate::gateway::key_totals`]). The buckets only decide whether a first report is sent early,
//! and whether a key is tracked at all.
//!
//! A bucket has a *floor*: the totals that a key's first report says the key had before, as of the
//! last time that a key left the bucket. No key that left had more, and no key that comes begins
//! with less, so a first report fits between two lives of its key. This requires that a leader that
//! was replaced without knowing it removes no more keys. So each bucket says which worker leads, a
//! new leader writes itself into all buckets before it does anything else with them, and no other
//! worker removes keys.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::counting::snapshot::Snapshot;
use crate::gateway::key_name::KeyName;
use crate::pod::pod_state::PodStore;
use crate::pod::store::{self, ATTEMPTS, Attempt, Expect, Store, StoreError, encode};

/// With 10,000 keys, a worker reads some 2 KB for each key that it does not track.
pub const BUCKETS: u64 = 256;

/// The answer about a key that a worker does not track.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// No worker tracked the key: its first request has to be reported at once.
    First {
        /// The totals that the report begins with, and their instant, which is in the past.
        floor: Snapshot,
        /// Whether the key has Envoy stats of its own.
        has_stats: bool,
    },
    /// Another worker tracks the key.
    Known {
        /// Whether the key has Envoy stats of its own.
        has_stats: bool,
    },
    /// The largest number of keys is tracked already; the key is not counted.
    Full,
}

/// A gateway's keys, as all its workers see them.
#[derive(Clone, Debug)]
pub struct KeyAdmission {
    pod: PodStore,
    secret: u64,
    started_ns: u64,
    capacity: u32,
}

/// How many keys are tracked now, and how many have Envoy stats. The host never forgets a stat.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Usage {
    tracked: u32,
    with_stats: u32,
}

#[derive(Serialize, Deserialize)]
struct Bucket<'a> {
    leader: u64,
    /// The instant of the totals with which the leader began to lead, or last went through the
    /// buckets.
    led_since_ns: u64,
    floor: Snapshot,
    #[serde(borrow)]
    entries: Vec<BucketEntry<'a>>,
}

/// A key that is tracked, or that has stats.
#[derive(Serialize, Deserialize)]
struct BucketEntry<'a> {
    #[serde(borrow)]
    namespace: Cow<'a, str>,
    #[serde(borrow)]
    name: Cow<'a, str>,
    tracked: bool,
    has_stats: bool,
}

impl BucketEntry<'_> {
    fn is(&self, key: &KeyName) -> bool {
        key.is(&self.namespace, &self.name)
    }

    fn key(&self) -> KeyName {
        KeyName { namespace: (*self.namespace).into(), name: (*self.name).into() }
    }
}

impl<'a> Bucket<'a> {
    fn find(&mut self, key: &KeyName) -> Option<&mut BucketEntry<'a>> {
        self.entries.iter_mut().find(|entry| entry.is(key))
    }

    fn track(&mut self, key: &KeyName, has_stats: bool) {
        match self.find(key) {
            Some(entry) => entry.tracked = true,
            None => self.entries.push(BucketEntry {
                namespace: Cow::Owned(key.namespace.to_string()),
                name: Cow::Owned(key.name.to_string()),
                tracked: true,
                has_stats,
            }),
        }
    }

    /// Stops tracking keys. Returns how many were tracked.
    fn remove<'k>(&mut self, keys: impl IntoIterator<Item = &'k KeyName>) -> u32 {
        let mut removed = 0;
        for key in keys {
            if let Some(entry) = self.find(key).filter(|entry| entry.tracked) {
                entry.tracked = false;
                removed += 1;
            }
        }
        self.entries.retain(|entry| entry.tracked || entry.has_stats);
        removed
    }
}

impl KeyAdmission {
    /// Returns the admission for at most `capacity` keys at once. As many keys, over the life of
    /// this Envoy, can have stats of their own. `secret` and `started_ns` are the same for all
    /// workers.
    pub fn new(pod: PodStore, secret: u64, started_ns: u64, capacity: u32) -> Self {
        Self { pod, secret, started_ns, capacity }
    }

    /// Sets another capacity.
    pub fn set_capacity(&mut self, capacity: u32) {
        self.capacity = capacity;
    }

    /// Admits a key at its first request at a worker that does not track it.
    pub fn enter(&self, store: &impl Store, key: &KeyName) -> Admission {
        self.enter_within(store, key, self.capacity)
    }

    fn enter_within(&self, store: &impl Store, key: &KeyName, capacity: u32) -> Admission {
        let mut reserved = None;
        let entered = self.change_bucket(store, self.bucket_of(key), |bucket| {
            let entry = bucket.find(key).map(|entry| (entry.tracked, entry.has_stats));
            if let Some((true, has_stats)) = entry {
                return Attempt::Keep(Admission::Known { has_stats });
            }
            let had_stats = entry.is_some_and(|(_, has_stats)| has_stats);
            let Some(usage) = reserved.or_else(|| self.reserve(store, !had_stats, capacity)) else {
                return Attempt::Keep(Admission::Full);
            };
            reserved = Some(usage);
            let has_stats = had_stats || usage.with_stats > 0;
            bucket.track(key, has_stats);
            Attempt::Write((), Admission::First { floor: bucket.floor, has_stats })
        });
        // If a bucket stays contended, the key is counted like any other, and the leader finds it
        // in the totals.
        let admission = entered.unwrap_or(Admission::Known { has_stats: false });
        if let (Admission::Known { .. }, Some(usage)) = (admission, reserved) {
            // Another worker was faster with this key.
            self.give_back(store, usage);
        }
        admission
    }

    /// Returns whether a key has Envoy stats of its own.
    pub fn has_stats(&self, store: &impl Store, key: &KeyName) -> bool {
        let found = self.change_bucket(store, self.bucket_of(key), |bucket| {
            Attempt::Keep(bucket.find(key).is_some_and(|entry| entry.has_stats))
        });
        found.unwrap_or(false)
    }

    /// Returns the keys that are known, because they have Envoy stats, and not tracked, of some buckets.
    /// The buckets have turns, one after the other: [`BUCKETS`] turns are a round. The keys are to be
    /// reported as having `floor`, so that becomes the buckets' floor: a first report that comes later
    /// must not be of an earlier instant. Only the worker that leads by [`KeyAdmission::reconcile`] may
    /// call this.
    pub fn idle(&self, store: &impl Store, leader: u64, turns: Range<u64>, floor: &Snapshot) -> Vec<KeyName> {
        let mut idle = Vec::new();
        for number in turns.start.max(turns.end.saturating_sub(BUCKETS))..turns.end {
            let found = self.change_bucket(store, number % BUCKETS, |bucket| {
                let idle = bucket.entries.iter().filter(|entry| !entry.tracked);
                let idle: Vec<KeyName> = idle.map(BucketEntry::key).collect();
                if idle.is_empty() || bucket.leader != leader || bucket.led_since_ns > floor.as_of_ns {
                    return Attempt::Keep(Vec::new());
                }
                bucket.floor = bucket.floor.ceiling(floor);
                Attempt::Write((), idle)
            });
            idle.extend(found.unwrap_or_default());
        }
        idle
    }

    /// Tracks keys that the leader has counted, even if they were removed from their buckets
    /// meanwhile. Returns which of them have stats.
    pub fn admit(&self, store: &impl Store, keys: &[KeyName]) -> Vec<KeyName> {
        let has_stats = |key: &&KeyName| match self.enter_within(store, key, u32::MAX) {
            Admission::First { has_stats, .. } | Admission::Known { has_stats } => has_stats,
            Admission::Full => false,
        };
        keys.iter().filter(has_stats).cloned().collect()
    }

    /// Stops tracking keys that left the totals, none of which was above `floor` in any field. Only
    /// the worker that leads by [`KeyAdmission::reconcile`] may call this. If another worker leads
    /// by now, nothing happens.
    pub fn leave(&self, store: &impl Store, leader: u64, keys: &[KeyName], floor: &Snapshot) {
        for (number, keys) in self.by_bucket(keys) {
            let removed = self.change_bucket(store, number, |bucket| {
                if bucket.leader != leader || bucket.led_since_ns > floor.as_of_ns {
                    return Attempt::Keep(0);
                }
                let removed = bucket.remove(keys.iter().copied());
                bucket.floor = bucket.floor.ceiling(floor);
                if removed == 0 { Attempt::Keep(0) } else { Attempt::Write((), removed) }
            });
            if let Ok(tracked @ 1..) = removed {
                self.give_back(store, Usage { tracked, with_stats: 0 });
            }
        }
    }

    /// Makes `leader` the worker that removes keys from now on. Tracks `keys`, which are all keys
    /// in the totals; stops tracking the `orphans` that are not among them (with a floor as for
    /// [`KeyAdmission::leave`]); and counts anew how much capacity is used. Returns which keys have
    /// stats, and the orphans: keys that are tracked without being in the totals. The first
    /// requests of these keys are still to be collected, unless they remain orphans. Returns `None`
    /// if another worker leads by now, or if others wrote in between at every attempt. Then this
    /// has to be repeated before any key leaves.
    pub fn reconcile<'k>(
        &self,
        store: &impl Store,
        leader: u64,
        keys: impl IntoIterator<Item = &'k KeyName>,
        orphans: &BTreeSet<KeyName>,
        floor: &Snapshot,
    ) -> Option<(Vec<KeyName>, BTreeSet<KeyName>)> {
        let before = store.get(&self.usage_key());
        let (mut by_bucket, old_orphans) = (self.by_bucket(keys), self.by_bucket(orphans));
        let (mut with_stats, mut orphans) = (Vec::new(), BTreeSet::new());
        let mut usage = Usage::default();
        for number in 0..BUCKETS {
            let keys: BTreeSet<&KeyName> =
                by_bucket.remove(&number).unwrap_or_default().into_iter().collect();
            let entries = self.change_bucket(store, number, |bucket| {
                // Another worker has begun to lead meanwhile.
                if bucket.led_since_ns > floor.as_of_ns {
                    return Attempt::Keep(None);
                }
                (bucket.leader, bucket.led_since_ns) = (leader, floor.as_of_ns);
                let old_orphans = old_orphans.get(&number).into_iter().flatten().copied();
                if bucket.remove(old_orphans.filter(|key| !keys.contains(key))) > 0 {
                    bucket.floor = bucket.floor.ceiling(floor);
                }
                for &key in &keys {
                    bucket.track(key, false);
                }
                let entries = bucket.entries.iter();
                let entries: Vec<(KeyName, bool, bool)> =
                    entries.map(|entry| (entry.key(), entry.tracked, entry.has_stats)).collect();
                Attempt::Write((), Some(entries))
            });
            for (key, tracked, has_stats) in entries.ok()?? {
                usage.tracked += u32::from(tracked);
                usage.with_stats += u32::from(has_stats);
                if has_stats && keys.contains(&key) {
                    with_stats.push(key);
                } else if tracked && !keys.contains(&key) {
                    orphans.insert(key);
                }
            }
        }
        // If a key came meanwhile, this write fails, and the next call counts anew.
        let expect = before.map_or(Expect::Absent, |(_, version)| Expect::Version(version));
        let _ = encode(&usage).is_some_and(|bytes| store.set(&self.usage_key(), &bytes, expect));
        Some((with_stats, orphans))
    }

    /// Changes a bucket. If there is no bucket that decodes, changes an empty one.
    fn change_bucket<R>(
        &self,
        store: &impl Store,
        number: u64,
        mut change: impl FnMut(&mut Bucket<'_>) -> Attempt<(), R>,
    ) -> Result<R, StoreError> {
        store::update_bytes(store, &self.bucket_key(number), ATTEMPTS, |found| {
            let mut bucket =
                found.and_then(|bytes| bincode::deserialize(bytes).ok()).unwrap_or_else(|| Bucket {
                    leader: 0,
                    led_since_ns: 0,
                    floor: Snapshot::starting_at(self.started_ns),
                    entries: Vec::new(),
                });
            match change(&mut bucket) {
                Attempt::Write((), result) => match encode(&bucket) {
                    Some(bytes) => Attempt::Write(bytes, result),
                    None => Attempt::Retry,
                },
                Attempt::Keep(result) => Attempt::Keep(result),
                Attempt::Retry => Attempt::Retry,
            }
        })
    }

    fn by_bucket<'k>(&self, keys: impl IntoIterator<Item = &'k KeyName>) -> BTreeMap<u64, Vec<&'k KeyName>> {
        let mut by_bucket: BTreeMap<u64, Vec<&KeyName>> = BTreeMap::new();
        for key in keys {
            by_bucket.entry(self.bucket_of(key)).or_default().push(key);
        }
        by_bucket
    }

    fn bucket_of(&self, key: &KeyName) -> u64 {
        key.bucket(self.secret, BUCKETS)
    }

    fn bucket_key(&self, bucket: u64) -> String {
        self.pod.key(&format!("admitted/{bucket:02x}"))
    }

    fn usage_key(&self) -> String {
        self.pod.key("taken")
    }

    /// Reserves capacity for a key to track, and for its stats if it needs them and there is
    /// capacity.
    fn reserve(&self, store: &impl Store, needs_stats: bool, capacity: u32) -> Option<Usage> {
        let reserved = store::update(store, &self.usage_key(), ATTEMPTS, |found: Option<Usage>| {
            let used = found.unwrap_or_default();
            let with_stats = u32::from(needs_stats && used.with_stats < self.capacity);
            let sum = Usage {
                tracked: used.tracked.saturating_add(1),
                with_stats: used.with_stats.saturating_add(with_stats),
            };
            if used.tracked == u32::MAX || sum.tracked > capacity {
                Attempt::Keep(None)
            } else {
                Attempt::Write(sum, Some(Usage { tracked: 1, with_stats }))
            }
        });
        reserved.ok().flatten()
    }

    fn give_back(&self, store: &impl Store, less: Usage) {
        // If this fails, the leader counts anew when it next goes through the buckets.
        let _ = store::update(store, &self.usage_key(), ATTEMPTS, |found: Option<Usage>| {
            let used = found.unwrap_or_default();
            let rest = Usage {
                tracked: used.tracked.saturating_sub(less.tracked),
                with_stats: used.with_stats.saturating_sub(less.with_stats),
            };
            Attempt::Write(rest, ())
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Map;

    const LEADER: u64 = 3;
    const FLOOR: Snapshot = Snapshot {
        as_of_ns: 2_000,
        requests: 9,
        proxied_requests: 0,
        request_ns: 0,
        proxied_request_ns: 0,
        in_flight: 0,
        proxied_in_flight: 0,
    };

    fn key(name: &str) -> KeyName {
        KeyName { namespace: "ns".into(), name: name.into() }
    }

    fn admission(capacity: u32) -> KeyAdmission {
        KeyAdmission::new(PodStore::new("gw"), 7, 1_000, capacity)
    }

    fn first(has_stats: bool) -> Admission {
        Admission::First { floor: Snapshot::starting_at(1_000), has_stats }
    }

    fn lead(admission: &KeyAdmission, store: &Map, keys: &[KeyName]) -> BTreeSet<KeyName> {
        admission.reconcile(store, LEADER, keys, &BTreeSet::new(), &FLOOR).unwrap().1
    }

    #[test]
    fn one_is_the_first_and_the_capacity_of_keys_that_leave_is_used_again() {
        let (store, admission) = (Map::default(), admission(2));
        lead(&admission, &store, &[]);
        assert_eq!(admission.enter(&store, &key("a")), first(true));
        assert_eq!(admission.enter(&store, &key("a")), Admission::Known { has_stats: true });
        assert_eq!(admission.enter(&store, &key("b")), first(true));
        assert_eq!(admission.enter(&store, &key("c")), Admission::Full);
        admission.leave(&store, LEADER, &[key("a"), key("never came")], &FLOOR);
        assert!(matches!(admission.enter(&store, &key("c")), Admission::First { has_stats: false, .. }));
        assert_eq!(admission.enter(&store, &key("a")), Admission::Full);
        admission.leave(&store, LEADER, &[key("c")], &FLOOR);
        let again = Admission::First { floor: FLOOR, has_stats: true };
        assert_eq!(admission.enter(&store, &key("a")), again, "it begins where it left, and keeps its stats");
        let has_stats = |name: &str| admission.has_stats(&store, &key(name));
        assert_eq!(["a", "b", "c", "d"].map(has_stats), [true, true, false, false]);
    }

    #[test]
    fn a_client_that_makes_names_up_keeps_a_real_key_out_only_while_they_are_tracked() {
        let (store, admission) = (Map::default(), admission(20));
        lead(&admission, &store, &[]);
        let made_up: Vec<KeyName> = (0..25).map(|n| key(&format!("made-up-{n}"))).collect();
        let full = made_up.iter().filter(|key| admission.enter(&store, key) == Admission::Full).count();
        assert_eq!((full, admission.enter(&store, &key("real"))), (5, Admission::Full));
        admission.leave(&store, LEADER, &made_up, &Snapshot::starting_at(2_000));
        assert!(matches!(admission.enter(&store, &key("real")), Admission::First { .. }));
        let values = store.keys().into_iter().filter(|name| name.contains("made-up")).count();
        assert_eq!(values, 0, "no value is named by a client");
    }

    #[test]
    fn a_leader_that_was_replaced_takes_no_key_out() {
        let (store, admission) = (Map::default(), admission(2));
        lead(&admission, &store, &[]);
        admission.enter(&store, &key("a"));
        admission.reconcile(&store, LEADER + 1, [&key("a")], &BTreeSet::new(), &FLOOR).unwrap();
        admission.leave(&store, LEADER, &[key("a")], &Snapshot::starting_at(2_000));
        assert_eq!(admission.enter(&store, &key("a")), Admission::Known { has_stats: true });
    }

    #[test]
    fn who_leads_finds_keys_that_nobody_tracks_any_more_and_keys_that_were_taken_out_too_early() {
        let (store, admission) = (Map::default(), admission(2));
        admission.enter(&store, &key("dead worker's"));
        let orphan = lead(&admission, &store, &[key("a")]);
        assert_eq!(orphan, BTreeSet::from([key("dead worker's")]));
        assert_eq!(admission.enter(&store, &key("a")), Admission::Known { has_stats: false });
        assert_eq!(admission.enter(&store, &key("b")), Admission::Full);
        // The key did not come by the next call.
        let (_, orphan) = admission.reconcile(&store, LEADER, &[key("a")], &orphan, &FLOOR).unwrap();
        assert_eq!(orphan, BTreeSet::new());
        let later = admission.enter(&store, &key("dead worker's"));
        assert_eq!(later, Admission::First { floor: FLOOR, has_stats: true });
        admission.leave(&store, LEADER, &[key("dead worker's")], &FLOOR);
        assert!(matches!(admission.enter(&store, &key("b")), Admission::First { has_stats: true, .. }));
        // A key that came is an orphan no longer.
        let orphans = BTreeSet::from([key("a"), key("b")]);
        let (with_stats, orphan) =
            admission.reconcile(&store, LEADER, &[key("a"), key("b")], &orphans, &FLOOR).unwrap();
        assert_eq!((with_stats, orphan), (vec![key("b")], BTreeSet::new()));
    }

    #[test]
    fn a_key_that_was_counted_is_tracked_whatever_the_capacity() {
        let (store, admission) = (Map::default(), admission(1));
        assert_eq!(admission.admit(&store, &[key("a"), key("b")]), [key("a")]);
        assert_eq!(admission.enter(&store, &key("b")), Admission::Known { has_stats: false });
    }

    #[test]
    fn of_many_threads_one_is_the_first() {
        let (store, admission) = (Map::default(), admission(500));
        let firsts: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    let (store, admission) = (&store, &admission);
                    scope.spawn(move || {
                        let first = |n: &u32| admission.enter(store, &key(&n.to_string())) == first(true);
                        (0..500).filter(first).count()
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(firsts, 500, "races gave their capacity back");
        assert_eq!(admission.enter(&store, &key("one more")), Admission::Full);
    }
}
