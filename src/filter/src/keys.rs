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
    /// The books as this worker wrote them last, and their stamp: as long as they lie in the shared data under this
    /// stamp, they need not be decoded.
    books: Option<(Stamp, Books)>,
    stamps: u64,
    /// What the stats server has acknowledged since the books were written.
    acknowledged: Vec<(KeyName, Snapshot)>,
    unkeyed: Option<u32>,
    keyless: Option<u32>,
    pending_unkeyed: u64,
    pending_keyless: u64,
}

/// Who wrote the books, and for which time: in front of them in the shared data.
type Stamp = (u64, u64);

/// The stats of one key: the gauge is the leader's, the others are every worker's.
#[derive(Default)]
struct KeyStats {
    concurrency: Option<Option<u32>>,
    shown: Option<u64>,
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
            books: None,
            stamps: 0,
            acknowledged: Vec::new(),
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
    pub fn lead(
        &mut self,
        writer: u64,
        workers: &[u64],
        departed: &[u64],
        as_of_ns: u64,
    ) -> Option<(&Books, Vec<u64>)> {
        let ids = workers.iter().chain(departed.iter().filter(|id| !workers.contains(id)));
        let outboxes: Vec<(u64, Vec<Batch>)> = ids
            .map(|id| {
                (*id, read(&outbox_key(&self.pod, *id)).map(|(batches, _)| batches).unwrap_or_default())
            })
            .collect();
        let gone: Vec<u64> = departed.iter().filter(|id| !workers.contains(id)).copied().collect();
        self.update_books(writer, |books| {
            let forgotten = books.forget_idle();
            books.collect(&outboxes, &gone, as_of_ns);
            forgotten
        })?;
        let (_, books) = self.books.as_ref()?;
        write(&self.pod.key("collected"), &books.marks());
        for (key, book) in books.keys() {
            let stats = self.stats.entry(key.clone()).or_default();
            let gauge = *stats.concurrency.get_or_insert_with(|| {
                host::define_metric(
                    Kind::Gauge,
                    &format!("activator_request_concurrency_milli{}", labels(key)),
                )
            });
            let average = book.until.since(&book.before).map_or(0, |period| period.average_milli());
            if stats.shown.replace(average) != Some(average) {
                host::record(gauge, average);
            }
        }
        let all_in = |id: &u64| {
            let batches = outboxes.iter().filter(|(worker, _)| worker == id).flat_map(|(_, batches)| batches);
            batches.map(Batch::until_ns).all(|until_ns| until_ns <= books.collected_from(*id))
        };
        let settled = departed.iter().filter(|id| all_in(id)).copied().collect();
        Some((books, settled))
    }

    /// The stats server knows these keys so far. The leader writes that into the books at its next tick, together with
    /// what it collects then.
    pub fn acknowledged(&mut self, known: Vec<(KeyName, Snapshot)>) {
        self.acknowledged.extend(known);
    }

    /// Who got an answer and no longer leads only notes it: the next leader will forget.
    pub fn follow(&mut self, writer: u64) {
        if !self.acknowledged.is_empty() {
            self.update_books(writer, |_| Vec::new());
        }
        // The next leader writes them from now on.
        if self.books.take().is_some() {
            self.stats.values_mut().for_each(|stats| stats.shown = None);
        }
    }

    /// Writes the books with what is acknowledged and a change, which says what keys it forgot.
    fn update_books(
        &mut self,
        writer: u64,
        mut change: impl FnMut(&mut Books) -> Vec<KeyName>,
    ) -> Option<()> {
        let key = self.pod.key("books");
        for _ in 0..ATTEMPTS {
            let (mut books, expect) = match SharedData.get(&key) {
                None => (Books::default(), Expect::Absent),
                Some((bytes, version)) => {
                    let expect = Expect::Version(version);
                    match self.books.take() {
                        Some((stamp, books))
                            if bincode::deserialize::<Stamp>(&bytes).is_ok_and(|s| s == stamp) =>
                        {
                            (books, expect)
                        }
                        _ => {
                            let (_, books): (Stamp, Books) = bincode::deserialize(&bytes).unwrap_or_default();
                            (books, expect)
                        }
                    }
                }
            };
            books.acknowledge(&self.acknowledged);
            let forgotten = change(&mut books);
            self.stamps += 1;
            let stamp = (writer, self.stamps);
            if bincode::serialize(&(stamp, &books)).is_ok_and(|bytes| SharedData.set(&key, &bytes, expect)) {
                for key in forgotten.iter().filter(|key| !books.has(key)) {
                    if let Some(stats) = self.stats.get_mut(key) {
                        stats.shown = Some(0);
                        stats.concurrency.into_iter().for_each(|gauge| host::record(gauge, 0));
                    }
                    self.registry.leave(&SharedData, key);
                }
                self.acknowledged.clear();
                self.books = Some((stamp, books));
                return Some(());
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
    let KeyName { namespace, name } = key;
    KeyReport { namespace: namespace.to_string(), name: name.to_string(), from_gateway: true, since, until }
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
