//! The gateway's side of a worker: its counters by key, and Envoy's stats of each key.

use std::collections::BTreeMap;

use inflight_stats::gateway::key_admission::Admission;
use inflight_stats::gateway::key_name::KeyName;
use inflight_stats::gateway::key_totals::KeyTotals;
use inflight_stats::gateway::keyed_member::{KeyedMember, Led};
use inflight_stats::pod::{Pod, State};
use inflight_stats::{Config, Grid, Snapshot};

use crate::host::{self, Kind, SharedData};
use crate::metrics::ByCode;

/// What a worker of a gateway counted, by key.
pub struct KeyedWorker {
    member: KeyedMember,
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
    shown: Option<u64>,
    by_code: BTreeMap<u16, ByCode>,
}

impl KeyStats {
    fn show(&mut self, key: &KeyName, average_milli: u64) {
        let gauge = *self.concurrency.get_or_insert_with(|| {
            host::define_metric(Kind::Gauge, &format!("activator_request_concurrency_milli{}", labels(key)))
        });
        if self.shown.replace(average_milli) != Some(average_milli) {
            host::record(gauge, average_milli);
        }
    }
}

/// A request's key was counted, or could not be.
pub enum Counted {
    /// The key's very first: a report should leave at once, from these totals on.
    First(Snapshot),
    /// As any other.
    Yes,
    /// There is no capacity for another key.
    No,
}

impl KeyedWorker {
    pub fn new(config: &Config, pod: &Pod, state: &State, worker: u64, now_ns: u64) -> Self {
        Self {
            member: KeyedMember::new(pod, state, worker, now_ns, config.gateway.max_keys),
            stats: BTreeMap::new(),
            unkeyed: host::define_metric(Kind::Counter, "inflight_unkeyed_requests"),
            keyless: host::define_metric(Kind::Counter, "inflight_keyless_requests"),
            pending_unkeyed: 0,
            pending_keyless: 0,
        }
    }

    /// Takes over another configuration.
    pub fn configure(&mut self, config: &Config, grid: Grid) {
        self.member.set_capacity(config.gateway.max_keys);
        self.member.set_grid(grid);
    }

    pub fn set_grid(&mut self, grid: Grid) {
        self.member.set_grid(grid);
    }

    /// A request without a key.
    pub fn keyless(&mut self) {
        self.pending_keyless += 1;
    }

    pub fn request_in(&mut self, key: &KeyName, now_ns: u64) -> Counted {
        let Some(admission) = self.member.request_in(&SharedData, key, now_ns) else { return Counted::Yes };
        if let Admission::First { has_stats: true, .. } | Admission::Known { has_stats: true } = admission
            && !self.stats.contains_key(key)
        {
            self.stats.insert(key.clone(), KeyStats::default());
        }
        match admission {
            Admission::First { floor, .. } => Counted::First(floor),
            Admission::Known { .. } => Counted::Yes,
            Admission::Full => {
                self.pending_unkeyed += 1;
                Counted::No
            }
        }
    }

    pub fn request_out(&mut self, key: &KeyName, now_ns: u64, code: u16, latency_ns: u64) {
        self.member.request_out(key, now_ns);
        if let Some(stats) = self.stats.get_mut(key) {
            let define = || ByCode::define("activator_request", &labels(key), code);
            stats.by_code.entry(code).or_insert_with(define).done(latency_ns);
        }
    }

    /// Closes the boundary and puts what is new where the leader finds it.
    pub fn post(&mut self, now_ns: u64) {
        self.flush();
        self.member.post(&SharedData, now_ns);
    }

    /// The end of this worker.
    pub fn end(&mut self, now_ns: u64) {
        self.flush();
        self.member.end(&SharedData, now_ns);
    }

    fn flush(&mut self) {
        host::increment(self.unkeyed, std::mem::take(&mut self.pending_unkeyed));
        host::increment(self.keyless, std::mem::take(&mut self.pending_keyless));
        for stats in self.stats.values_mut() {
            stats.by_code.values_mut().for_each(ByCode::flush);
        }
    }

    /// At the leader, when all workers have closed `as_of_ns`: collects, sets the gauges. The totals, and which of
    /// the departed have nothing left to collect.
    pub fn lead(
        &mut self,
        workers: &[u64],
        departed: &[u64],
        as_of_ns: u64,
    ) -> Option<(&KeyTotals, Vec<u64>)> {
        let Led { with_stats, left, settled } = self.member.lead(&SharedData, workers, departed, as_of_ns)?;
        for key in with_stats {
            self.stats.entry(key).or_default();
        }
        for key in left {
            if let Some(stats) = self.stats.get_mut(&key) {
                stats.show(&key, 0);
            }
        }
        let totals = self.member.totals()?;
        for (key, total) in totals.keys() {
            if let Some(stats) = self.stats.get_mut(key) {
                stats.show(key, total.until.since(&total.before).map_or(0, |period| period.average_milli()));
            }
        }
        Some((totals, settled))
    }

    /// At the end of a worker: everything that all have handed over.
    pub fn collect_last(&mut self, all: &[u64], as_of_ns: u64) -> Option<&KeyTotals> {
        self.member.collect_last(&SharedData, all, as_of_ns)
    }

    /// The stats server knows these keys so far.
    pub fn acknowledged(&mut self, known: Vec<(KeyName, Snapshot)>) {
        self.member.acknowledged(known);
    }

    /// On a worker that does not lead.
    pub fn follow(&mut self) {
        if self.member.follow(&SharedData) {
            // Another sets the gauges from now on.
            self.stats.values_mut().for_each(|stats| stats.shown = None);
        }
    }
}

fn labels(key: &KeyName) -> String {
    format!(".namespace_name.{}.revision_name.{}", key.namespace, key.name)
}
