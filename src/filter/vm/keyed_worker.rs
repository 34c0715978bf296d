//! The gateway's side of a worker: its counters per key, over the host's shared data, and Envoy's
//! stats of each key.

use inflight_stats::counting::time::PodNs;
use inflight_stats::gateway::key_admission::Admission;
use inflight_stats::gateway::key_name::KeyName;
use inflight_stats::gateway::key_totals::{IdleKeys, KeyTotals};
use inflight_stats::gateway::keyed_member::{KeyedMember, Led};
use inflight_stats::pod::pod_state::{PodState, PodStore};
use inflight_stats::{Config, Grid, Snapshot};

use crate::host::Host;
use crate::vm::key_stats::KeyStats;
use crate::vm::local_hold::HoldNews;

/// What a gateway's worker has counted, per key.
pub struct KeyedWorker<H> {
    host: H,
    member: KeyedMember,
    stats: KeyStats,
}

/// How a request of a key was counted.
pub enum KeyedRequest {
    /// It is counted, as the key's very first: a report that begins with these totals should be
    /// sent at once.
    First(Snapshot),
    /// It is counted.
    Counted,
    /// There is no capacity for another key; it is not counted.
    OverKeyLimit,
}

impl<H: Host> KeyedWorker<H> {
    pub fn new(host: H, config: &Config, pod: &PodStore, state: &PodState, worker: u64, now: PodNs) -> Self {
        let member = KeyedMember::new(pod, state, worker, now, config.gateway.max_keys);
        Self { host, member, stats: KeyStats::define(host) }
    }

    /// Applies another configuration.
    pub fn configure(&mut self, config: &Config, grid: Grid) {
        self.member.set_capacity(config.gateway.max_keys);
        self.member.set_grid(grid);
    }

    pub fn set_grid(&mut self, grid: Grid) {
        self.member.set_grid(grid);
    }

    /// Counts a request without a key.
    pub fn without_key(&mut self) {
        self.stats.without_key();
    }

    pub fn request_in(&mut self, key: &KeyName, now: PodNs) -> KeyedRequest {
        let Some(admission) = self.member.request_in(&self.host, key, now) else {
            return KeyedRequest::Counted;
        };
        if let Admission::First { has_stats: true, .. } | Admission::Known { has_stats: true } = admission {
            self.stats.add_key(key);
        }
        match admission {
            Admission::First { floor, .. } => KeyedRequest::First(floor),
            Admission::Known { .. } => KeyedRequest::Counted,
            Admission::Full => {
                self.stats.over_key_limit();
                KeyedRequest::OverKeyLimit
            }
        }
    }

    pub fn request_out(&mut self, key: &KeyName, now: PodNs, code: u16, latency_ns: u64) {
        self.member.request_out(key, now);
        self.stats.request_done(self.host, key, code, latency_ns);
    }

    /// Shows what the hold has to say of keys. Some of them may have come to other workers only.
    pub fn hold_news(&mut self, news: &HoldNews) {
        for (key, _) in &news.more_held {
            if !self.stats.has_key(key) && self.member.has_stats(&self.host, key) {
                self.stats.add_key(key);
            }
        }
        self.stats.hold_news(self.host, news);
    }

    /// Closes the boundary, and writes new batches to the outbox for the leader.
    pub fn post(&mut self, now: PodNs) {
        self.stats.flush(self.host);
        self.member.post(&self.host, now);
    }

    /// Ends this worker.
    pub fn end(&mut self, now: PodNs) {
        self.stats.flush(self.host);
        self.member.end(&self.host, now);
    }

    /// At the leader, when all workers have closed `as_of_ns`: collects the outboxes and sets the
    /// gauges. Returns the totals, and the departed workers that have nothing left to collect.
    pub fn lead(
        &mut self,
        workers: &[u64],
        departed: &[u64],
        as_of_ns: u64,
    ) -> Option<(&KeyTotals, Vec<u64>)> {
        let Led { with_stats, left, fully_collected } =
            self.member.lead(&self.host, workers, departed, as_of_ns)?;
        with_stats.iter().for_each(|key| self.stats.add_key(key));
        left.iter().for_each(|key| self.stats.show_average(self.host, key, 0));
        let totals = self.member.totals()?;
        for (key, total) in totals.keys() {
            let period = total.until.since(&total.before);
            self.stats.show_average(self.host, key, period.map_or(0, |period| period.average_milli()));
        }
        Some((totals, fully_collected))
    }

    /// At the leader, after [`KeyedWorker::lead`]: the idle keys and the totals that are to be reported.
    pub fn figures(&mut self) -> Option<(IdleKeys, &KeyTotals)> {
        let idle = self.member.idle(&self.host);
        self.member.totals().map(|totals| (idle, totals))
    }

    /// At the end of a worker: collects all outboxes, and returns the totals.
    pub fn collect_last(&mut self, all: &[u64], as_of_ns: u64) -> Option<&KeyTotals> {
        self.member.collect_last(&self.host, all, as_of_ns)
    }

    /// Notes that the stats server knows these keys up to these snapshots.
    pub fn acknowledged(&mut self, known: Vec<(KeyName, Snapshot)>) {
        self.member.acknowledged(known);
    }

    /// On a worker that does not lead: writes the outstanding acknowledgements and, if it led until
    /// now, forgets what the gauges show.
    pub fn follow(&mut self) {
        if self.member.follow(&self.host) {
            self.stats.forget_shown();
        }
    }
}
