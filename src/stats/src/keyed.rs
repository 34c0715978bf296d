//! One figure per key, for a gateway: many keys come and go, over many workers.
//!
//! A worker hands over what happened between two boundaries as a [`Batch`], a few bytes for each key that was
//! active and none for the others. Its *outbox* keeps batches until the leader has collected them. The
//! leader adds them to the *books*, together with the note up to which boundary it collected from whom: one write, so
//! a batch counts exactly once, whoever dies in between. A key that is idle for a whole period is reported once as
//! idle and, when that is acknowledged, forgotten; should it come back, it starts at zero, with a `since` later
//! than anything that was said of it before.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use serde::{Deserialize, Serialize};

use crate::{Grid, Snapshot};

/// Namespace and name; a clone shares them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct KeyName {
    /// The key's namespace.
    pub namespace: Rc<str>,
    /// The key's name.
    pub name: Rc<str>,
}

/// The last word of Istio's service host names.
const SVC: &str = ".svc.";

impl KeyName {
    /// The key of a request that goes to an Envoy cluster. Istio's `outbound|80|subset|svc.ns.svc.cluster.local` (the
    /// subset may be empty) gives namespace and service; any other cluster is the name itself, in `namespace`.
    /// `None` for names that no report could carry.
    pub fn of_cluster(cluster: &str, namespace: &str) -> Option<Self> {
        let (namespace, name) = of_istio(cluster).unwrap_or((namespace, cluster));
        Self::checked(namespace, name)
    }

    /// A key out of two headers.
    pub fn checked(namespace: &str, name: &str) -> Option<Self> {
        let fits = crate::report::is_name;
        (fits(namespace) && fits(name)).then(|| Self { namespace: namespace.into(), name: name.into() })
    }
}

fn of_istio(cluster: &str) -> Option<(&str, &str)> {
    let mut parts = cluster.split('|');
    let ("outbound", Some(port), Some(_subset), Some(host), None) =
        (parts.next()?, parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return None;
    };
    if port.is_empty() || !port.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let (service, _domain) = host.split_once(SVC)?;
    let (name, namespace) = service.rsplit_once('.')?;
    Some((namespace, name))
}

/// What happened to all keys of one worker between two boundaries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    from_ns: u64,
    until_ns: u64,
    /// The totals of this batch alone, and what is in flight at its end.
    keys: Vec<(KeyName, Snapshot)>,
}

impl Batch {
    /// The boundary at its end.
    pub fn until_ns(&self) -> u64 {
        self.until_ns
    }
}

/// One worker's counters per key.
#[derive(Clone, Debug)]
pub struct KeyedRecorder {
    grid: Grid,
    closed_ns: u64,
    next_boundary_ns: u64,
    /// Since the last closed boundary.
    keys: BTreeMap<KeyName, Snapshot>,
    outbox: Vec<Batch>,
}

impl KeyedRecorder {
    /// Nothing yet, at `now_ns`.
    pub fn new(now_ns: u64, grid: Grid) -> Self {
        let next_boundary_ns = grid.after(now_ns);
        Self { grid, closed_ns: now_ns, next_boundary_ns, keys: BTreeMap::new(), outbox: Vec::new() }
    }

    /// Whether a key is being tracked here.
    pub fn tracks(&self, key: &KeyName) -> bool {
        self.keys.contains_key(key)
    }

    /// A request came in.
    pub fn request_in(&mut self, key: &KeyName, now_ns: u64, proxied: bool) {
        self.advance(now_ns);
        match self.keys.get_mut(key) {
            Some(snapshot) => snapshot.request_in(now_ns, proxied),
            None => {
                let mut snapshot = Snapshot::starting_at(now_ns);
                snapshot.request_in(now_ns, proxied);
                self.keys.insert(key.clone(), snapshot);
            }
        }
    }

    /// A request that came in here left.
    pub fn request_out(&mut self, key: &KeyName, now_ns: u64, proxied: bool) {
        self.advance(now_ns);
        if let Some(snapshot) = self.keys.get_mut(key) {
            snapshot.request_out(now_ns, proxied);
        }
    }

    /// Lets time go on; past a boundary, what happened before it goes into the outbox.
    pub fn advance(&mut self, now_ns: u64) {
        if now_ns >= self.next_boundary_ns {
            self.close(self.grid.at_or_before(now_ns));
        }
    }

    /// Takes over other boundaries.
    pub fn set_grid(&mut self, grid: Grid) {
        if grid != self.grid {
            self.grid = grid;
            self.next_boundary_ns = grid.after(self.closed_ns);
        }
    }

    /// The end of this worker: everything up to now goes into the outbox, with nothing in flight.
    pub fn end(&mut self, now_ns: u64) {
        self.close(now_ns.max(self.closed_ns));
        if let Some(batch) = self.outbox.last_mut() {
            for (_, delta) in &mut batch.keys {
                *delta = delta.finished();
            }
        }
        self.keys.clear();
    }

    /// Drops what the leader has collected.
    pub fn collected(&mut self, until_ns: u64) {
        self.outbox.retain(|batch| batch.until_ns > until_ns);
    }

    /// The last closed boundary, or the beginning.
    pub fn closed_ns(&self) -> u64 {
        self.closed_ns
    }

    /// The batches that are still to be collected, oldest first.
    pub fn outbox(&self) -> &[Batch] {
        &self.outbox
    }

    fn close(&mut self, boundary_ns: u64) {
        let mut keys = Vec::new();
        self.keys.retain(|key, snapshot| {
            snapshot.advance(boundary_ns);
            keys.push((key.clone(), *snapshot));
            // What is in flight stays; the totals begin anew.
            *snapshot = snapshot.less_totals_of(snapshot);
            snapshot.in_flight > 0
        });
        self.outbox.push(Batch { from_ns: self.closed_ns, until_ns: boundary_ns, keys });
        self.closed_ns = boundary_ns;
        self.next_boundary_ns = self.grid.after(boundary_ns);
    }
}

/// What the leader knows of one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Book {
    /// The last snapshot that the stats server acknowledged.
    pub since: Snapshot,
    /// Now.
    pub until: Snapshot,
    /// At the boundary before.
    pub before: Snapshot,
    /// Nothing happened in the last whole period.
    pub idle: bool,
}

/// What one worker had in flight: all, and proxied.
type Held = Vec<(KeyName, (u32, u32))>;

/// Everything collected and not forgotten.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Books {
    keys: BTreeMap<KeyName, Book>,
    /// Up to which boundary each worker's batches are in.
    collected: Vec<(u64, u64)>,
    /// What each worker had in flight there.
    in_flight: Vec<(u64, Held)>,
    as_of_ns: u64,
}

impl Books {
    /// Up to which boundary a worker's batches are in.
    pub fn collected_from(&self, worker: u64) -> u64 {
        self.collected.iter().find(|(id, _)| *id == worker).map_or(0, |(_, until_ns)| *until_ns)
    }

    /// Takes in the batches of all workers, each with its id, as of the newest boundary that all have closed; those that
    /// are in already are passed over. Workers that are `gone` hold nothing in flight any more.
    pub fn collect(&mut self, outboxes: &[(u64, Vec<Batch>)], gone: &[u64], as_of_ns: u64) {
        if as_of_ns <= self.as_of_ns {
            return;
        }
        for book in self.keys.values_mut() {
            book.before = book.until;
        }
        let mut active = BTreeSet::new();
        for (worker, batches) in outboxes {
            let collected_ns = self.collected_from(*worker);
            for batch in batches.iter().filter(|b| b.until_ns > collected_ns && b.until_ns <= as_of_ns) {
                for (key, delta) in &batch.keys {
                    active.insert(key.clone());
                    let zero = Snapshot::starting_at(batch.from_ns);
                    let book = self.keys.entry(key.clone()).or_insert(Book {
                        since: zero,
                        until: zero,
                        before: zero,
                        idle: false,
                    });
                    // What is in flight is summed over workers below.
                    book.until = book.until.plus(delta);
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
        for (key, book) in &mut self.keys {
            book.idle = !active.contains(key);
            (book.until.in_flight, book.until.proxied_in_flight) =
                in_flight.get(key).copied().unwrap_or_default();
            book.until.as_of_ns = as_of_ns;
        }
        self.as_of_ns = as_of_ns;
    }

    /// Up to which boundary each worker's batches are in.
    pub fn marks(&self) -> &[(u64, u64)] {
        &self.collected
    }

    /// Whether a key is not forgotten.
    pub fn has(&self, key: &KeyName) -> bool {
        self.keys.contains_key(key)
    }

    /// Every key that is not forgotten.
    pub fn keys(&self) -> impl Iterator<Item = (&KeyName, &Book)> {
        self.keys.iter()
    }

    /// The stats server knows these keys up to these snapshots.
    pub fn acknowledge(&mut self, known: &[(KeyName, Snapshot)]) {
        for (key, until) in known {
            if let Some(book) = self.keys.get_mut(key)
                && until.as_of_ns > book.since.as_of_ns
            {
                book.since = *until;
            }
        }
    }

    /// Takes out the keys that were idle for a whole period and of which the stats server knows all; which these are. Only
    /// the leader may do it, who also puts them in: a key must not be told that it is forgotten while it comes back.
    pub fn forget_idle(&mut self) -> Vec<KeyName> {
        let mut forgotten = Vec::new();
        self.keys.retain(|key, book| {
            let nothing_left =
                Snapshot { as_of_ns: 0, ..book.since } == Snapshot { as_of_ns: 0, ..book.until };
            let stays = !(book.idle && nothing_left && book.until.in_flight == 0);
            if !stays {
                forgotten.push(key.clone());
            }
            stays
        });
        forgotten
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRID: Grid = Grid { anchor_ns: 1_000, period_ns: 100 };

    fn key(name: &str) -> KeyName {
        KeyName { namespace: "ns".into(), name: name.into() }
    }

    fn name_of(cluster: &str) -> Option<(String, String)> {
        KeyName::of_cluster(cluster, "default").map(|key| (key.namespace.to_string(), key.name.to_string()))
    }

    #[test]
    fn istios_clusters_give_namespace_and_service_others_are_the_name() {
        let pair = |a: &str, b: &str| Some((a.to_owned(), b.to_owned()));
        assert_eq!(name_of("outbound|80||cart.shop.svc.cluster.local"), pair("shop", "cart"));
        assert_eq!(name_of("outbound|8080|v2|cart.shop.svc.example.org"), pair("shop", "cart"));
        for other in [
            "app",
            "outbound|80||example.org",
            "outbound|x||a.b.svc.c",
            "inbound|80||a.b.svc.c",
            "outbound|80||a.svc.c",
            "outbound|80||a.b.svc.c|x",
        ] {
            assert_eq!(name_of(other), pair("default", other));
        }
        assert_eq!(name_of(""), None);
        assert_eq!(name_of("outbound|80||.b.svc.c"), None);
        assert_eq!(name_of("a\nb"), None);
        assert_eq!(KeyName::of_cluster("app", ""), None);
    }

    fn figures(books: &Books, name: &str) -> Option<(u64, u128, u32, bool)> {
        let (_, book) = books.keys().find(|(k, _)| **k == key(name))?;
        Some((book.until.requests, book.until.request_ns, book.until.in_flight, book.idle))
    }

    fn collect(books: &mut Books, workers: &[(u64, &KeyedRecorder)], as_of_ns: u64) {
        let outboxes: Vec<_> = workers.iter().map(|(id, worker)| (*id, worker.outbox().to_vec())).collect();
        books.collect(&outboxes, &[], as_of_ns);
    }

    #[test]
    fn a_key_is_the_sum_over_workers_and_a_batch_counts_once() {
        let (mut a, mut b) = (KeyedRecorder::new(1_000, GRID), KeyedRecorder::new(1_000, GRID));
        a.request_in(&key("x"), 1_010, false);
        b.request_in(&key("x"), 1_020, true);
        b.request_out(&key("x"), 1_040, true);
        b.request_in(&key("y"), 1_050, false);
        a.advance(1_103);
        b.advance(1_150);
        let mut books = Books::default();
        for _ in 0..2 {
            collect(&mut books, &[(1, &a), (2, &b)], 1_100);
            assert_eq!(figures(&books, "x"), Some((2, 90 + 20, 1, false)));
            assert_eq!(figures(&books, "y"), Some((1, 50, 1, false)));
        }
        a.collected(books.collected_from(1));
        assert_eq!(a.outbox().len(), 0);
        // b's batch lies there still, and is passed over.
        a.request_out(&key("x"), 1_160, false);
        a.advance(1_200);
        b.advance(1_200);
        collect(&mut books, &[(1, &a), (2, &b)], 1_200);
        assert_eq!(figures(&books, "x"), Some((2, 90 + 20 + 60, 0, false)));
    }

    #[test]
    fn a_short_request_and_never_another_is_reported_then_idle_then_forgotten() {
        let mut worker = KeyedRecorder::new(1_000, GRID);
        worker.request_in(&key("x"), 1_001, false);
        worker.request_out(&key("x"), 1_002, false);
        let mut books = Books::default();
        worker.advance(1_100);
        assert!(!worker.tracks(&key("x")));
        collect(&mut books, &[(1, &worker)], 1_100);
        assert_eq!(figures(&books, "x"), Some((1, 1, 0, false)));
        let said = |books: &Books| books.keys().map(|(k, b)| (k.clone(), b.until)).collect::<Vec<_>>();
        books.acknowledge(&said(&books));
        assert_eq!(books.forget_idle(), [], "active in this period");
        worker.advance(1_200);
        collect(&mut books, &[(1, &worker)], 1_200);
        assert_eq!(figures(&books, "x"), Some((1, 1, 0, true)));
        books.acknowledge(&said(&books));
        assert_eq!(books.forget_idle(), [key("x")]);
        assert_eq!(books.keys().count(), 0);
        // It comes back: from zero, and later than anything that was said of it.
        worker.request_in(&key("x"), 1_350, false);
        worker.advance(1_400);
        collect(&mut books, &[(1, &worker)], 1_400);
        let (_, book) = books.keys().next().unwrap();
        assert_eq!((book.since.as_of_ns, book.since.requests, book.until.requests), (1_300, 0, 1));
    }

    #[test]
    fn without_an_acknowledgement_nothing_is_forgotten() {
        let mut worker = KeyedRecorder::new(1_000, GRID);
        worker.request_in(&key("x"), 1_001, false);
        worker.request_out(&key("x"), 1_002, false);
        let mut books = Books::default();
        for boundary in [1_100, 1_200, 1_300] {
            worker.advance(boundary);
            collect(&mut books, &[(1, &worker)], boundary);
        }
        let old = Snapshot { as_of_ns: 1_100, ..Snapshot::default() };
        books.acknowledge(&[(key("x"), old), (key("unknown"), old)]);
        assert_eq!(books.forget_idle(), []);
        assert_eq!(figures(&books, "x"), Some((1, 1, 0, true)));
    }

    #[test]
    fn a_worker_that_is_gone_holds_nothing_and_its_last_batch_counts() {
        let mut worker = KeyedRecorder::new(1_000, GRID);
        worker.request_in(&key("x"), 1_010, false);
        worker.advance(1_100);
        let mut books = Books::default();
        collect(&mut books, &[(1, &worker)], 1_100);
        worker.request_in(&key("x"), 1_110, false);
        worker.end(1_150);
        books.collect(&[(1, worker.outbox().to_vec())], &[1], 1_200);
        assert_eq!(figures(&books, "x"), Some((2, 90 + 50 + 40, 0, false)));
    }
}
