//! The state machine: it changes only by entries, and by the same entries to the same.

use std::sync::Arc;

use inflight_stats::protocol::stat::WireStatMessages;
use inflight_stats::scaling::decider::DECISION_PERIOD_NS;
use prost::Message as _;
use tracing::warn;

use crate::forward::forwarder::Forwarder;
use crate::keys::key_table::{KeyStat, KeyTable, RecordError, StatError};
use crate::keys::settings_store::{SetError, SettingsStore};
use crate::replication::entry::{Change, Entry};
use crate::replication::progress::{Progress, REMEMBER_NS};
use crate::replication::snapshot::{self, Snapshot};
use crate::replication::stream_id::StreamId;

const SECOND_NS: u64 = 1_000_000_000;
/// The time between two ticks.
pub const TICK_NS: u64 = SECOND_NS;
/// Ticks between two times that old keys and senders are forgotten.
const FORGET_TICKS: u64 = 60;

/// Whose entries change nothing: the word that an epoch begins, and what is damaged.
pub const NO_SERVER: u64 = 0;

/// What a change did.
#[derive(Debug)]
pub enum Outcome {
    /// A report.
    Report(Result<(), RecordError>),
    /// Stats: how many were recorded, and why the first that was not was not.
    Stats(usize, Option<StatError>),
    /// Settings.
    Settings(Result<(), SetError>),
    /// Nothing that anybody waits for.
    Nothing,
}

/// A later epoch than the state's: the state must be loaded from the snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaterEpoch;

/// The state, and how far it is.
pub struct Machine {
    keys: Arc<KeyTable>,
    settings: Arc<SettingsStore>,
    progress: Progress,
}

impl Machine {
    /// An empty state.
    pub fn new(keys: Arc<KeyTable>, settings: Arc<SettingsStore>) -> Self {
        Self { keys, settings, progress: Progress::default() }
    }

    /// Returns how far it is.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Applies an entry. What the entries of the server itself add is forwarded. Returns what each
    /// change did; nothing for an entry that was applied before. Must not be called in a task.
    ///
    /// # Errors
    /// [`LaterEpoch`]; nothing was changed.
    pub fn apply(
        &mut self,
        id: StreamId,
        entry: Entry,
        forwarder: Option<&Forwarder>,
    ) -> Result<Vec<Outcome>, LaterEpoch> {
        let Entry { server, number, at_ns, changes } = entry;
        let is_later =
            |change: &Change| matches!(change, Change::Recovered { epoch } if *epoch > self.progress.epoch);
        if changes.iter().any(is_later) {
            return Err(LaterEpoch);
        }
        let progress = &mut self.progress;
        if server == NO_SERVER {
            (progress.id, progress.writer) = (id, (server, number));
            return Ok(Vec::new());
        }
        if progress.applied == 0 {
            self.keys.begin(at_ns);
        }
        progress.applied += 1;
        (progress.id, progress.writer) = (id, (server, number));
        progress.log_ns = progress.log_ns.max(at_ns);
        let log_ns = progress.log_ns;
        let (last, seen_ns) = progress.numbers.entry(server).or_default();
        if number <= *last {
            return Ok(Vec::new());
        }
        (*last, *seen_ns) = (number, log_ns);
        self.keys.set_log_time(log_ns);
        Ok(changes.into_iter().map(|change| self.change(change, log_ns, forwarder)).collect())
    }

    fn change(&mut self, change: Change, now_ns: u64, forwarder: Option<&Forwarder>) -> Outcome {
        match change {
            Change::Report(report) => Outcome::Report(self.keys.record(&report, now_ns, |message, stat| {
                if let Some(forwarder) = forwarder {
                    forwarder.queue_report(&report.pod, message, stat);
                }
            })),
            Change::Stats(bytes) => self.stats(&bytes, now_ns, forwarder),
            Change::SetSettings(name, json) => Outcome::Settings(match serde_json::from_str(&json) {
                Ok(json) => self.settings.apply(&self.keys, &name, Some(json)),
                Err(error) => Err(SetError::Invalid(error.to_string())),
            }),
            Change::ClearSettings(name) => Outcome::Settings(self.settings.apply(&self.keys, &name, None)),
            Change::Tick => {
                self.tick(now_ns);
                Outcome::Nothing
            }
            Change::Recovered { .. } => Outcome::Nothing,
        }
    }

    fn stats(&self, bytes: &[u8], now_ns: u64, forwarder: Option<&Forwarder>) -> Outcome {
        let mut messages = match WireStatMessages::decode(bytes) {
            Ok(WireStatMessages { messages }) => messages,
            Err(error) => {
                warn!(%error, "left out stats of the log");
                return Outcome::Stats(0, None);
            }
        };
        let mut failed = None;
        messages.retain(|message| {
            let recorded = KeyStat::check(message).and_then(|stat| self.keys.record_stat(stat, now_ns));
            recorded.map_err(|error| failed.get_or_insert(error).clone()).is_ok()
        });
        let recorded = messages.len();
        if let Some(forwarder) = forwarder {
            forwarder.queue_stats(messages);
        }
        Outcome::Stats(recorded, failed)
    }

    fn tick(&mut self, now_ns: u64) {
        let progress = &mut self.progress;
        // Two servers may take themselves for the one that ticks.
        if now_ns < progress.tick_ns.saturating_add(TICK_NS / 10 * 9) {
            return;
        }
        progress.tick_ns = now_ns;
        progress.ticks += 1;
        if progress.ticks.is_multiple_of(DECISION_PERIOD_NS / TICK_NS) {
            self.keys.decide(now_ns);
        }
        if progress.ticks.is_multiple_of(FORGET_TICKS) {
            self.keys.forget(now_ns);
            progress.numbers.retain(|_, (_, seen_ns)| now_ns.saturating_sub(*seen_ns) <= REMEMBER_NS);
        }
    }

    /// Has the state, which a store has lost a part of, be from now on that of the store at this
    /// position, in another epoch.
    pub fn begin_epoch(&mut self, epoch: u64, id: StreamId) {
        self.progress.epoch = epoch;
        self.progress.id = id;
    }

    /// Returns the state as a snapshot. Must not be called in a task.
    pub fn save(&self, version: u8) -> Result<Snapshot, String> {
        snapshot::make(version, &self.progress, &self.keys, &self.settings)
    }

    /// Replaces the state by that of a snapshot. Must not be called in a task.
    ///
    /// # Errors
    /// The snapshot is of another version, or malformed; nothing was changed.
    pub fn load(&mut self, pieces: &[Vec<u8>]) -> Result<(), String> {
        let progress = snapshot::load(pieces, &self.keys, &self.settings)?;
        self.keys.set_log_time(progress.log_ns);
        self.progress = progress;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use inflight_stats::protocol::key_name::KeyName;
    use inflight_stats::protocol::stat::{Stat, WireStatMessage};
    use inflight_stats::scaling::settings::{DEFAULT_RPS_TARGET, KeySettings};
    use inflight_stats::{KeyReport, Report, Snapshot as Counters};

    use super::*;
    use crate::keys::capacity::Capacity;
    use crate::replication::format::MIN_FORMAT;

    const NOW: u64 = 1_700_000_000 * SECOND_NS;

    fn machine() -> Machine {
        let capacity =
            Capacity { keys: 1_000, keys_per_namespace: 1_000, pods_per_key: 100, bytes: 64 << 20 };
        // Each process has a clock of its own, and hashes of its own.
        let keys = KeyTable::new(Arc::<KeySettings>::default(), capacity, 7 * SECOND_NS);
        Machine::new(Arc::new(keys), Arc::new(SettingsStore::shared(DEFAULT_RPS_TARGET)))
    }

    /// A generator of numbers: the same each time.
    struct Numbers(u64);

    impl Numbers {
        fn below(&mut self, end: u64) -> u64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) % end
        }
    }

    /// Entries of three servers, with traffic of all kinds.
    fn entries(seed: u64, count: u64) -> Vec<(StreamId, Entry)> {
        let mut numbers = Numbers(seed);
        let (mut of_server, mut totals) = ([0; 3], vec![Counters::starting_at(1); 40]);
        let mut at_ns = NOW;
        let mut entries = Vec::new();
        for number in 1..=count {
            let writer = numbers.below(3);
            // Estimates of the time differ a little.
            at_ns += numbers.below(300_000_000);
            of_server[writer as usize] += 1;
            let mut changes: Vec<Change> = (0..numbers.below(5))
                .map(|_| {
                    let sender = numbers.below(40);
                    let since = totals[sender as usize];
                    let mut until = since;
                    until.advance(
                        since.as_of_ns + [1, 9, 61][numbers.below(3) as usize] * SECOND_NS / 10 * 11,
                    );
                    until.requests += numbers.below(1_000);
                    until.request_ns += u128::from(numbers.below(20 * SECOND_NS));
                    until.in_flight = numbers.below(9) as u32;
                    totals[sender as usize] = until;
                    let key = KeyReport {
                        namespace: "ns".into(),
                        name: format!("key-{}", sender % 7),
                        from_gateway: sender.is_multiple_of(5),
                        since,
                        until,
                    };
                    let pod = format!("pod-{sender}");
                    Change::Report(Report { version: 1, pod, incarnation: 1, messages: vec![key] })
                })
                .collect();
            let stat = Stat {
                pod_name: "activator-1".into(),
                average_concurrent_requests: numbers.below(100) as f64 / 7.0,
                request_count: numbers.below(100) as f64,
                ..Stat::default()
            };
            let name = bytes::Bytes::from(format!("key-{}", numbers.below(7)));
            let message = WireStatMessage { namespace: "ns".into(), name, stat: Some(stat) };
            changes.push(Change::Stats(WireStatMessages { messages: vec![message] }.encode_to_vec()));
            if numbers.below(20) == 0 {
                let name = KeyName::new("ns", &format!("key-{}", numbers.below(9)));
                changes.push(match numbers.below(3) {
                    0 => Change::ClearSettings(name),
                    target => Change::SetSettings(
                        name,
                        format!("{{\"target\": {target}, \"stable_window\": \"30s\"}}"),
                    ),
                });
            }
            changes.push(Change::Tick);
            let number_of = of_server[writer as usize];
            let entry =
                Entry { server: writer + 1, number: number_of, at_ns: at_ns - numbers.below(100), changes };
            entries.push((StreamId(number, 0), entry));
        }
        entries
    }

    fn apply(machine: &mut Machine, entries: &[(StreamId, Entry)]) {
        for (id, entry) in entries {
            machine.apply(*id, entry.clone(), None).unwrap();
        }
    }

    /// All that is shown of all keys, to the last digit, in an order of its own.
    fn shown(machine: &Machine) -> Vec<String> {
        let keys = &machine.keys;
        let mut names = Vec::new();
        keys.visit(|name, _| names.push(name.clone()));
        names.sort();
        let now_ns = keys.now_ns();
        let mut shown: Vec<String> = names
            .iter()
            .map(|name| {
                let senders = keys.read(name, |key| key.senders("", 100, now_ns));
                format!("{:?} {senders:?}", keys.view(name, now_ns))
            })
            .collect();
        shown.push(format!("{:?} {:?} {:?}", keys.times(), machine.settings.all(), machine.progress()));
        shown
    }

    #[test]
    fn the_same_entries_make_the_same_state() {
        let entries = entries(1, 2_000);
        let (mut one, mut other) = (machine(), machine());
        apply(&mut one, &entries);
        // By way of their bytes, too.
        for (id, entry) in &entries {
            let bytes = entry.encode(MIN_FORMAT).unwrap();
            other.apply(*id, Entry::decode(&bytes).unwrap(), None).unwrap();
        }
        assert_eq!(shown(&one), shown(&other));
        assert!(shown(&one).len() > 7 && one.progress.ticks > 200, "{:?}", one.progress);
    }

    #[test]
    fn an_entry_that_comes_again_changes_nothing() {
        let entries = entries(2, 500);
        let (mut once, mut again) = (machine(), machine());
        apply(&mut once, &entries);
        for (position, (id, entry)) in entries.iter().enumerate() {
            again.apply(*id, entry.clone(), None).unwrap();
            for (id, entry) in &entries[position.saturating_sub(3)..=position] {
                let outcomes = again.apply(*id, entry.clone(), None).unwrap();
                assert_eq!(outcomes.len(), 0);
            }
        }
        let without_progress = |machine: &Machine| {
            let mut shown = shown(machine);
            shown.pop();
            shown
        };
        assert_eq!(without_progress(&once), without_progress(&again));
    }

    #[test]
    fn a_snapshot_is_as_good_as_the_entries() {
        for seed in 3..9 {
            let entries = entries(seed, 600);
            let mut whole = machine();
            let mut joined = machine();
            let (before, after) = entries.split_at(100 * (seed as usize - 2));
            apply(&mut whole, before);
            let snapshot = whole.save(MIN_FORMAT).unwrap();
            // What it had is replaced.
            apply(&mut joined, &super::tests::entries(99, 50));
            joined.load(&snapshot.pieces).unwrap();
            assert_eq!(shown(&whole), shown(&joined), "seed {seed}");
            assert_eq!(joined.save(MIN_FORMAT).unwrap().progress, snapshot.progress);
            apply(&mut whole, after);
            apply(&mut joined, after);
            assert_eq!(shown(&whole), shown(&joined), "seed {seed}");
        }
    }

    /// What version 1 of a snapshot has. Servers of other versions read it: whoever changes what is
    /// kept of a key makes a new version.
    #[test]
    fn the_first_format_of_snapshots_stays_as_it_is() {
        let mut machine = machine();
        for (id, mut entry) in entries(12, 300) {
            // Of one key: the keys of a snapshot are in no order.
            entry.changes.retain_mut(|change| match change {
                Change::Report(report) => report.messages[0].name == "key-1",
                Change::Tick => true,
                _ => false,
            });
            machine.apply(id, entry, None).unwrap();
        }
        let Snapshot { pieces, .. } = machine.save(1).unwrap();
        let plain: Vec<Vec<u8>> =
            pieces.iter().map(|piece| crate::replication::format::decompress(piece).unwrap().1).collect();
        assert_eq!(plain.iter().map(Vec::len).collect::<Vec<_>>(), [84, 1714]);
        assert_eq!(
            snapshot::digest(&plain),
            "e62b4d3b834e0e7f4d111bdf43c0750fd52796a47d96b419744c3b4495ac1b26"
        );
    }

    #[test]
    fn a_damaged_snapshot_changes_nothing() {
        let mut whole = machine();
        apply(&mut whole, &entries(10, 100));
        let Snapshot { pieces, .. } = whole.save(MIN_FORMAT).unwrap();
        let mut other = machine();
        apply(&mut other, &entries(11, 100));
        let before = shown(&other);
        for cut in [0, 1, pieces.len() - 1] {
            assert!(other.load(&pieces[..cut]).is_err());
        }
        let mut wrong = pieces.clone();
        let half = wrong[1].len() / 2;
        wrong[1].truncate(half);
        assert!(other.load(&wrong).is_err());
        assert!(other.load(&[vec![200, 1, 2]]).unwrap_err().contains("format 200"));
        assert_eq!(shown(&other), before);
    }

    #[test]
    fn what_a_later_epoch_begins_with_must_be_loaded() {
        let mut machine = machine();
        let word =
            |epoch| Entry { server: 0, number: 0, at_ns: 0, changes: vec![Change::Recovered { epoch }] };
        assert_eq!(machine.apply(StreamId(1, 0), word(1), None).unwrap_err(), LaterEpoch);
        assert_eq!(machine.progress, Progress::default());
        machine.begin_epoch(1, StreamId(5, 0));
        assert!(machine.apply(StreamId(6, 0), word(1), None).unwrap().is_empty());
    }

    #[test]
    fn a_tick_that_is_not_due_does_nothing() {
        let mut machine = machine();
        let tick = |number, at_ns| Entry { server: 1, number, at_ns, changes: vec![Change::Tick] };
        for (number, at_ns, ticks) in
            [(1, NOW, 1), (2, NOW + SECOND_NS / 2, 1), (3, NOW + SECOND_NS, 2), (4, NOW, 2)]
        {
            machine.apply(StreamId(number, 0), tick(number, at_ns), None).unwrap();
            assert_eq!(machine.progress.ticks, ticks, "{number}");
        }
        assert_eq!(machine.progress.log_ns, NOW + SECOND_NS, "time does not go back");
    }
}
