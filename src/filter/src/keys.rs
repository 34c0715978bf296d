//! The gateway's side of a worker: what happened to each key here, and, at the leader, the books.

use std::collections::BTreeMap;

use inflight_stats::keyed::{Batch, Books, KeyName, KeyedRecorder};
use inflight_stats::registry::{Place, Registry};
use inflight_stats::report::{MAX_BYTES, VERSION};
use inflight_stats::shared::{Expect, Pod, Store};
use inflight_stats::{Config, Grid, KeyReport, Report, Snapshot};

use crate::host::{self, Kind, SharedData};
use crate::metrics::ByCode;

/// Attempts at a write of the books; only the leader writes them, and whoever reads an answer.
const ATTEMPTS: usize = 16;

/// What a worker of a gateway counted, by key.
pub struct Keys {
    pod: Pod,
    registry: Registry,
    recorder: KeyedRecorder,
    outbox_key: String,
    /// Boundary of the newest batch in the outbox that was written.
    written_ns: u64,
    stats: BTreeMap<KeyName, KeyStats>,
    unkeyed: Option<u32>,
    keyless: Option<u32>,
    pending_unkeyed: u64,
    pending_keyless: u64,
}

/// The stats of one key: the gauge is the leader's, the others are every worker's.
#[derive(Default)]
struct KeyStats {
    concurrency: Option<Option<u32>>,
    by_code: BTreeMap<u16, ByCode>,
}

/// A request's key was counted, or could not be.
pub enum Counted {
    /// The key's very first: this report should leave at once.
    First(Snapshot, Snapshot),
    /// As any other.
    Yes,
    /// There is no place for another key.
    No,
}

impl Keys {
    pub fn new(config: &Config, pod: &Pod, worker: u64, now_ns: u64, grid: Grid) -> Self {
        Self {
            registry: Registry::new(pod.clone(), config.gateway.max_keys),
            recorder: KeyedRecorder::new(now_ns, grid),
            outbox_key: outbox_key(pod, worker),
            pod: pod.clone(),
            written_ns: 0,
            stats: BTreeMap::new(),
            unkeyed: host::define_metric(Kind::Counter, "inflight_unkeyed_requests"),
            keyless: host::define_metric(Kind::Counter, "inflight_keyless_requests"),
            pending_unkeyed: 0,
            pending_keyless: 0,
        }
    }

    /// Takes over another configuration.
    pub fn configure(&mut self, config: &Config, grid: Grid) {
        self.registry = Registry::new(self.pod.clone(), config.gateway.max_keys);
        self.recorder.set_grid(grid);
    }

    pub fn set_grid(&mut self, grid: Grid) {
        self.recorder.set_grid(grid);
    }

    /// A request without a key.
    pub fn keyless(&mut self) {
        self.pending_keyless += 1;
    }

    pub fn request_in(&mut self, key: &KeyName, now_ns: u64) -> Counted {
        self.recorder.advance(now_ns);
        let place =
            if self.recorder.tracks(key) { Place::Known } else { self.registry.enter(&SharedData, key) };
        if place == Place::None {
            self.pending_unkeyed += 1;
            return Counted::No;
        }
        self.recorder.request_in(key, now_ns, false);
        if place == Place::Known {
            return Counted::Yes;
        }
        // The books will begin with the period that this request fell into.
        let since = Snapshot::starting_at(self.recorder.closed_ns());
        Counted::First(since, Snapshot { as_of_ns: now_ns, requests: 1, in_flight: 1, ..since })
    }

    pub fn request_out(&mut self, key: &KeyName, now_ns: u64, code: u16, latency_ns: u64) {
        self.recorder.request_out(key, now_ns, false);
        let stats = self.stats.entry(key.clone()).or_default();
        let define = || ByCode::define("activator_request", &labels(key), code);
        stats.by_code.entry(code).or_insert_with(define).done(latency_ns);
    }

    /// Closes the boundary and puts what is new where the leader finds it.
    pub fn post(&mut self, worker: u64, now_ns: u64) {
        self.recorder.advance(now_ns);
        host::increment(self.unkeyed, std::mem::take(&mut self.pending_unkeyed));
        host::increment(self.keyless, std::mem::take(&mut self.pending_keyless));
        for stats in self.stats.values_mut() {
            stats.by_code.values_mut().for_each(ByCode::flush);
        }
        let marks: Vec<(u64, u64)> =
            read(&self.pod.key("collected")).map(|(marks, _)| marks).unwrap_or_default();
        let collected_ns = marks.iter().find(|(id, _)| *id == worker).map_or(0, |(_, until_ns)| *until_ns);
        self.recorder.collected(collected_ns);
        self.write_outbox();
    }

    /// The end of this worker.
    pub fn end(&mut self, now_ns: u64) {
        self.recorder.end(now_ns);
        self.written_ns = 0;
        self.write_outbox();
    }

    fn write_outbox(&mut self) {
        let newest = self.recorder.outbox().last().map_or(0, Batch::until_ns);
        if newest > self.written_ns && write(&self.outbox_key, &self.recorder.outbox()) {
            self.written_ns = newest;
        }
    }

    /// At the leader, when all workers have closed `as_of_ns`: collects, sets the gauges. The books, and which of
    /// the departed have nothing left to collect.
    pub fn lead(&mut self, workers: &[u64], departed: &[u64], as_of_ns: u64) -> Option<(Books, Vec<u64>)> {
        let ids = workers.iter().chain(departed.iter().filter(|id| !workers.contains(id)));
        let outboxes: Vec<(u64, Vec<Batch>)> = ids
            .map(|id| {
                (*id, read(&outbox_key(&self.pod, *id)).map(|(batches, _)| batches).unwrap_or_default())
            })
            .collect();
        let gone: Vec<u64> = departed.iter().filter(|id| !workers.contains(id)).copied().collect();
        let books = self.update_books(|books| {
            books.collect(&outboxes, &gone, as_of_ns);
            books.clone()
        })?;
        write(&self.pod.key("collected"), &books.marks());
        for (key, book) in books.keys() {
            let stats = self.stats.entry(key.clone()).or_default();
            let gauge = *stats.concurrency.get_or_insert_with(|| {
                host::define_metric(
                    Kind::Gauge,
                    &format!("activator_request_concurrency_milli{}", labels(key)),
                )
            });
            host::record(gauge, book.until.since(&book.before).map_or(0, |period| period.average_milli()));
        }
        let all_in = |id: &u64| {
            let batches = outboxes.iter().filter(|(worker, _)| worker == id).flat_map(|(_, batches)| batches);
            batches.map(Batch::until_ns).all(|until_ns| until_ns <= books.collected_from(*id))
        };
        let settled = departed.iter().filter(|id| all_in(id)).copied().collect();
        Some((books, settled))
    }

    /// The stats server knows these keys so far.
    pub fn acknowledged(&mut self, known: &[(KeyName, Snapshot)]) {
        let forgotten = self.update_books(|books| books.acknowledge(known)).unwrap_or_default();
        for key in &forgotten {
            if let Some(gauge) = self.stats.get(key).and_then(|stats| stats.concurrency) {
                host::record(gauge, 0);
            }
            self.registry.leave(&SharedData, key);
        }
    }

    fn update_books<R>(&self, mut change: impl FnMut(&mut Books) -> R) -> Option<R> {
        let key = self.pod.key("books");
        for _ in 0..ATTEMPTS {
            let (mut books, expect) = read::<Books>(&key).unwrap_or((Books::default(), expect(&key)));
            let result = change(&mut books);
            if bincode::serialize(&books).is_ok_and(|bytes| SharedData.set(&key, &bytes, expect)) {
                return Some(result);
            }
        }
        None
    }
}

/// The books as reports of at most [`MAX_BYTES`], each with what it says of its keys.
pub fn reports(pod: &str, incarnation: u64, books: &Books) -> Vec<(Report, Vec<(KeyName, Snapshot)>)> {
    const SNAPSHOTS_AND_LENGTHS: usize = 2 * 64 + 2 * 8 + 1;
    let head = pod.len() + 32;
    let empty = || Report { version: VERSION, pod: pod.to_owned(), incarnation, messages: Vec::new() };
    let mut reports = vec![(empty(), Vec::new())];
    let mut size = head;
    for (key, book) in books.keys() {
        let more = key.namespace.len() + key.name.len() + SNAPSHOTS_AND_LENGTHS;
        if size + more > MAX_BYTES {
            reports.push((empty(), Vec::new()));
            size = head;
        }
        size += more;
        if let Some((report, known)) = reports.last_mut() {
            report.messages.push(message(key, book.since, book.until));
            known.push((key.clone(), book.until));
        }
    }
    reports.retain(|(report, _)| !report.messages.is_empty());
    reports
}

pub fn message(key: &KeyName, since: Snapshot, until: Snapshot) -> KeyReport {
    let KeyName { namespace, name } = key.clone();
    KeyReport { namespace, name, from_gateway: true, since, until }
}

fn labels(key: &KeyName) -> String {
    format!(".namespace_name.{}.revision_name.{}", key.namespace, key.name)
}

fn outbox_key(pod: &Pod, worker: u64) -> String {
    pod.key(&format!("outbox/{worker:016x}"))
}

fn expect(key: &str) -> Expect {
    SharedData.get(key).map_or(Expect::Absent, |(_, version)| Expect::Version(version))
}

fn read<T: serde::de::DeserializeOwned>(key: &str) -> Option<(T, Expect)> {
    let (bytes, version) = SharedData.get(key)?;
    Some((bincode::deserialize(&bytes).ok()?, Expect::Version(version)))
}

/// Of a value that only one worker writes.
fn write<T: serde::Serialize + ?Sized>(key: &str, value: &T) -> bool {
    bincode::serialize(value).is_ok_and(|bytes| SharedData.set(key, &bytes, expect(key)))
}
