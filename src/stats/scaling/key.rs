//! The receiver's view of one key: what its senders make of it, and how many pods it wants.
//!
//! A sender's counters are cumulative, so the receiver keeps the highest totals that each sender
//! has reported and adds differences. Whatever is repeated, late or overlapping adds only what was
//! not added before.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::counting::snapshot::Snapshot;
use crate::counting::time::nanoseconds;
use crate::protocol::report::KeyReport;
use crate::protocol::report_delta::{CounterDecreased, addition};
use crate::protocol::stat::Stat;
use crate::scaling::decider::{DECISION_PERIOD_NS, Decider, Decision, Observation, delay_bytes};
use crate::scaling::memory::heap_bytes;
use crate::scaling::mismatch::{Mismatch, MismatchDetector};
use crate::scaling::sender::{
    Early, ImplausibleStat, Incarnation, Live, PerSecond, PodFigures, SILENT_PERIODS, SenderPage, Senders,
    Streamed, is_activator,
};
use crate::scaling::settings::{KeySettings, Metric};
use crate::scaling::windows::{Window, WindowSizes};

const SECOND_NS: u64 = 1_000_000_000;
const MIN_PERIOD_NS: u64 = SECOND_NS / 10;
/// The longest time between two reports of a sender.
pub const MAX_PERIOD_NS: u64 = 60 * SECOND_NS;
/// After a start it takes so long, or a second more than the longest period of a key's senders,
/// until all of them can have reported.
const STARTUP_NS: u64 = 3 * SECOND_NS;
/// How long a key keeps its decision whose senders fell silent.
pub const STALE_AFTER: Duration = Duration::from_secs(15 * 60);

/// Averages over one window.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Averages {
    /// Requests in flight, on average.
    pub concurrency: f64,
    /// Requests that came in, per second.
    pub requests_per_second: f64,
}

impl Averages {
    /// Returns the average to scale by.
    pub fn value(&self, metric: Metric) -> f64 {
        match metric {
            Metric::Concurrency => self.concurrency,
            Metric::Rps => self.requests_per_second,
        }
    }
}

/// What is known of one key at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Figures {
    /// Requests since the receiver started, proxied ones subtracted.
    pub requests_total: u64,
    /// Requests in flight as of the live senders' last reports.
    pub in_flight: u64,
    /// Pods that report.
    pub pods: u64,
    /// Gateways that report.
    pub gateways: u64,
    /// The share of proxied requests among those that pods reported in the last 30 to 60 s; `None`
    /// if they reported none.
    pub proxied_share: Option<f64>,
    /// Over the stable window.
    pub stable: Averages,
    /// Over the panic window.
    pub panic: Averages,
    /// Milliseconds since the last report of any sender; `None` before the first.
    pub last_report_age_ms: Option<u64>,
}

impl Figures {
    /// Returns what an average counts as. Of a key's first report nothing is in the windows yet. It
    /// counts as what Knative's activator says at once: one request.
    pub(super) fn or_in_flight(&self, average: f64) -> f64 {
        if average == 0.0 && self.in_flight > 0 { 1.0 } else { average }
    }
}

/// What a report or a stat did to its key.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Recorded {
    /// What to forward to a Knative autoscaler: what was not known before, as its activator would
    /// say it; `None` if nothing.
    pub forward: Option<PerSecond>,
    /// Whether the key was not active until now.
    pub became_active: bool,
}

/// One key, as its senders make it. What it is scaled by is kept elsewhere: see [`Key::restored`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Key {
    #[serde(skip)]
    settings: Arc<KeySettings>,
    requests_total: u64,
    /// The same from stats, whose counts are doubles.
    streamed_total: f64,
    stable: Window<2>,
    panic: Window<2>,
    senders: Senders,
    last_report_ns: u64,
    last_traffic_second: Option<u64>,
    /// When the last report with traffic came, proxied or not.
    traffic_ns: u64,
    started_ns: Option<u64>,
    /// When its first report or stat came.
    first_report_ns: Option<u64>,
    decided: Option<Decided>,
    /// Whether the key was active as of the last call of [`Key::decide`] or since.
    was_active: bool,
    mismatches: MismatchDetector,
    #[serde(skip)]
    stale_after_ns: u64,
    /// As of the last call of [`Key::decide`] or [`Key::forget`]: senders may be forgotten meanwhile.
    silence: Option<Silence>,
    recovery: Option<Recovery>,
}

/// Senders of a key are not heard any more, although they had traffic by their last words, and nobody
/// else reports any.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Silence {
    /// The receiver's unix time at their last report, in nanoseconds.
    pub since_ns: u64,
    /// How many senders of the key there were then.
    senders: u64,
}

/// A silence has ended.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Recovery {
    /// When the first sender came back.
    since_ns: u64,
    /// How long the other senders are waited for: a stable window, or the longest period.
    until_ns: u64,
    /// How many there were.
    senders: u64,
}

/// What a key wants, and since when.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Decided {
    decider: Decider,
    decision: Decision,
    /// How many pods were taken as ready.
    ready_pods: u32,
    at_ns: u64,
}

impl Key {
    /// A key of which nothing is known yet.
    pub fn new(settings: Arc<KeySettings>) -> Self {
        let sizes = settings.windows();
        Self {
            settings,
            requests_total: 0,
            streamed_total: 0.0,
            stable: Window::new(sizes.stable_seconds),
            panic: Window::new(sizes.panic_seconds),
            senders: Senders::default(),
            last_report_ns: 0,
            last_traffic_second: None,
            traffic_ns: 0,
            started_ns: None,
            first_report_ns: None,
            decided: None,
            was_active: false,
            mismatches: MismatchDetector::default(),
            stale_after_ns: nanoseconds(STALE_AFTER),
            silence: None,
            recovery: None,
        }
    }

    /// The same key at a receiver that has just started, at its unix time `started_ns` in
    /// nanoseconds. Until all senders can have reported, too little is known to decide by.
    #[must_use]
    pub fn after_start(self, started_ns: u64) -> Self {
        Self { started_ns: Some(started_ns), ..self }
    }

    /// The same key, which keeps its decision for so long when its senders fall silent.
    #[must_use]
    pub fn with_stale_after(self, stale_after: Duration) -> Self {
        Self { stale_after_ns: nanoseconds(stale_after), ..self }
    }

    /// Returns a key that was saved, and is scaled by these settings.
    #[must_use]
    pub fn restored(mut self, settings: Arc<KeySettings>, stale_after: Duration) -> Self {
        let sizes = settings.windows();
        for (window, seconds) in
            [(&mut self.stable, sizes.stable_seconds), (&mut self.panic, sizes.panic_seconds)]
        {
            if window.seconds() != seconds {
                *window = window.resized(seconds);
            }
        }
        self.settings = settings;
        self.with_stale_after(stale_after)
    }

    /// Returns what the key is scaled by.
    pub fn settings(&self) -> &Arc<KeySettings> {
        &self.settings
    }

    /// Has the key scaled by other settings from now on. What its windows hold stays, as far as it
    /// fits.
    pub fn set_settings(&mut self, settings: Arc<KeySettings>) {
        let sizes = settings.windows();
        if sizes != self.settings.windows() {
            self.stable = self.stable.resized(sizes.stable_seconds);
            self.panic = self.panic.resized(sizes.panic_seconds);
        }
        self.settings = settings;
    }

    /// Returns the memory that a key takes by these settings, in bytes: its windows, and the most
    /// that its decider remembers of the scale-down delay.
    pub fn settings_bytes(settings: &KeySettings) -> usize {
        let WindowSizes { stable_seconds, panic_seconds } = settings.windows();
        let seconds = |seconds| heap_bytes(size_of::<[f64; 2]>().saturating_mul(seconds));
        let delay = delay_bytes(settings.scale_down_delay);
        seconds(stable_seconds).saturating_add(seconds(panic_seconds)).saturating_add(heap_bytes(delay))
    }

    /// Returns whether this pod or gateway is one of the senders remembered.
    pub fn has_sender(&self, name: &str) -> bool {
        self.senders.by_name.contains_key(name)
    }

    /// Returns the memory that the senders take, in bytes.
    pub fn sender_bytes(&self) -> usize {
        Senders::EMPTY_BYTES + self.senders.bytes
    }

    /// Returns the memory that a report of an incarnation, or a stat, of this sender would take
    /// that is not taken yet.
    pub fn additional_bytes(&self, sender: &str, incarnation: Option<u64>) -> usize {
        self.senders.additional_bytes(sender, incarnation)
    }

    /// Returns the most that [`Key::additional_bytes`] can be.
    pub fn max_additional_bytes(sender: &str) -> usize {
        Senders::sender_bytes(sender) + Senders::INCARNATION_BYTES
    }

    /// Returns how many pods and gateways are remembered, silent ones included.
    pub fn sender_count(&self) -> usize {
        self.senders.by_name.len()
    }

    /// Returns the receiver's unix time at the last report, in nanoseconds; 0 before the first.
    pub fn last_report_ns(&self) -> u64 {
        self.last_report_ns
    }

    /// Adds what a report contains and was not known, at the receiver's unix time `now_ns`.
    ///
    /// # Errors
    /// [`CounterDecreased`]; nothing was changed.
    pub fn record(
        &mut self,
        sender: &str,
        incarnation: u64,
        report: &KeyReport,
        now_ns: u64,
    ) -> Result<Recorded, CounterDecreased> {
        let KeyReport { since, until, from_gateway, .. } = report;
        let known = self.senders.incarnation(sender, incarnation).copied();
        let period = addition(known.as_ref().map(|known| &known.last), since, until)?;
        let (last, last_rates) = (known.map(|known| known.last), known.map(|known| known.rates));
        let early = known.map_or(Early::Nothing, |known| known.early);
        let known_before = until.requests.saturating_sub(period.requests);
        let window_requests = known.map_or(known_before, |known| known.window_requests);
        let is_latest =
            last.is_none_or(|last| until.as_of_ns >= last.as_of_ns && until.holds_totals_of(&last));
        // What is new happened since the report before, or since a later `since`. A sender that
        // found something that it had missed reports it with a `since` before its last one: then
        // what is new is spread over all that time.
        let from_ns = match known {
            Some(known) if since.as_of_ns >= known.since_ns => known.last.as_of_ns.max(since.as_of_ns),
            _ => since.as_of_ns,
        };
        // The latest report shows the sender's period; one that bridges a gap is corrected by the
        // next. One of no length, such as a gateway's first of a key, shows none: until the next,
        // the longest is assumed.
        let length_ns = match until.as_of_ns.saturating_sub(since.as_of_ns) {
            0 => known.map_or(MAX_PERIOD_NS / SILENT_PERIODS, |known| known.period_ns),
            length_ns => length_ns,
        };
        let silence = self.note_report(now_ns);
        if !is_latest && period.is_empty() {
            self.senders.touch(sender, incarnation, now_ns);
            self.end_silence(silence, now_ns);
            return Ok(Recorded::default());
        }
        // A gateway is in front of all; what it passed on arrives at the pods as proxied.
        let (proxied, proxied_ns) =
            if *from_gateway { (0, 0) } else { (period.proxied_requests, period.proxied_request_ns) };
        self.requests_total = self.requests_total.saturating_add(period.requests.saturating_sub(proxied));
        // What took longer than a second is spread evenly over the seconds that it took. A report
        // without a beginning (0) counts as one second.
        let elapsed_ns = if from_ns == 0 { 0 } else { until.as_of_ns.saturating_sub(from_ns) };
        let seconds = (elapsed_ns.saturating_add(SECOND_NS / 2) / SECOND_NS).max(1);
        // A sender with a long period reports rates. They count in the seconds from its last report
        // to this one, in all of them and in none twice, although reports come a little early or
        // late.
        let since_last = known
            .filter(|known| known.has_long_period() && seconds > 1)
            .map(|known| (now_ns / SECOND_NS).saturating_sub(known.seen_ns / SECOND_NS))
            .filter(|between| between.abs_diff(seconds) <= 1);
        let held_ns = since_last.and_then(|_| known.map(|known| known.period_ns.min(length_ns))).unwrap_or(0);
        let length = since_last.map_or(seconds as f64, |_| elapsed_ns as f64 / SECOND_NS as f64);
        let seconds = since_last.unwrap_or(seconds);
        let per_second = |value: f64| value / length;
        let added = PerSecond {
            concurrency: per_second(period.request_ns as f64 / SECOND_NS as f64),
            proxied_concurrency: per_second(proxied_ns as f64 / SECOND_NS as f64),
            requests: per_second(period.requests as f64),
            proxied_requests: per_second(proxied as f64),
        };
        let unproxied = added.unproxied();
        // A gateway's first report of a key counts nothing yet: something in flight is traffic,
        // too.
        let has_in_flight =
            is_latest && until.in_flight > if *from_gateway { 0 } else { until.proxied_in_flight };
        let added_anything = (!period.is_empty()).then_some(added);
        let (forward, early) = match until.as_of_ns > since.as_of_ns {
            true if early == Early::Nothing => (added_anything, early),
            true => (Some(early.take_off(added, seconds)), Early::Nothing),
            false if has_in_flight && early == Early::Nothing => {
                let (said, early) = Early::say(added);
                (Some(said), early)
            }
            false => (added_anything, early),
        };
        let highest = last.map_or(*until, |last| last.ceiling(until));
        let latest = last.filter(|_| !is_latest).unwrap_or(*until);
        let Snapshot { in_flight, proxied_in_flight, .. } = latest;
        let now = Incarnation {
            id: incarnation,
            last: Snapshot { in_flight, proxied_in_flight, ..highest },
            since_ns: since.as_of_ns,
            from_gateway: *from_gateway,
            period_ns: length_ns.clamp(MIN_PERIOD_NS, MAX_PERIOD_NS),
            seen_ns: now_ns,
            rates: last_rates.filter(|_| !is_latest).unwrap_or(added.into()),
            has_ended: match known {
                Some(known) if !is_latest => known.has_ended,
                Some(known) => latest.in_flight == 0 && length_ns < known.period_ns / 8 * 7,
                None => false,
            },
            early,
            window_requests,
        };
        if latest.in_flight > 0 || !now.rates.is_zero() {
            self.traffic_ns = now_ns;
        }
        self.senders.store(sender, now);
        // As a rule the first report after a silence covers it.
        let covered_ns = elapsed_ns.saturating_add(2 * SECOND_NS);
        if self
            .end_silence(silence, now_ns)
            .is_some_and(|silence| now_ns.saturating_sub(silence.since_ns) > covered_ns)
        {
            self.clear_windows();
        }
        if !from_gateway {
            self.mismatches.add_pod_requests(period.requests as f64, proxied as f64);
        }
        let has_traffic_again = self.add(unproxied, seconds, has_in_flight, now_ns, held_ns);
        let is_busy = is_latest && until.in_flight > 0;
        Ok(Recorded { forward, became_active: self.note_activity(has_traffic_again, is_busy) })
    }

    /// Adds a stat of the stream, at the receiver's unix time `now_ns`. As in Knative, proxied
    /// requests are subtracted whoever sent the stat, and it counts for the second in which it
    /// arrives.
    ///
    /// # Errors
    /// [`ImplausibleStat`]; nothing was changed.
    pub fn record_stat(
        &mut self,
        sender: &str,
        stat: &Stat,
        now_ns: u64,
    ) -> Result<Recorded, ImplausibleStat> {
        let added = PerSecond::try_from(stat)?;
        let unproxied @ [concurrency, requests] = added.unproxied();
        let silence = self.note_report(now_ns);
        let from_gateway = is_activator(sender);
        let proxied_concurrency = added.proxied_concurrency as f32;
        let requests_in = added.requests as f32;
        let streamed = Streamed {
            concurrency,
            proxied_concurrency,
            requests: requests_in,
            seen_ns: now_ns,
            from_gateway,
        };
        self.senders.sender_mut(sender).streamed = Some(streamed);
        if added.concurrency > 0.0 || added.requests > 0.0 {
            self.traffic_ns = now_ns;
        }
        // What a stat tells is one second: nobody knows what happened in the silence.
        if self.end_silence(silence, now_ns).is_some() {
            self.clear_windows();
        }
        if !from_gateway {
            self.mismatches.add_pod_requests(added.requests, added.proxied_requests);
        }
        self.streamed_total += requests;
        let has_traffic_again = self.add(unproxied, 1, false, now_ns, 0);
        let became_active = self.note_activity(has_traffic_again, added.concurrency > 0.0);
        Ok(Recorded { forward: Some(added), became_active })
    }

    /// Notes whether a report or a stat makes the key active: traffic after a stable window without
    /// does, and anything in flight, proxied or not. Returns whether the key was not active before.
    fn note_activity(&mut self, has_traffic_again: bool, is_busy: bool) -> bool {
        let became_active = has_traffic_again || (is_busy && !self.was_active);
        self.was_active |= became_active;
        became_active
    }

    /// Adds to the buckets of so many seconds, the present one being the last; the next report is
    /// due in `held_ns`. Returns whether this is traffic, after a stable window without.
    fn add(
        &mut self,
        per_second: [f64; 2],
        seconds: u64,
        in_flight: bool,
        now_ns: u64,
        held_ns: u64,
    ) -> bool {
        let this = now_ns / SECOND_NS;
        for second in (this + 1).saturating_sub(seconds.min(self.stable.seconds() as u64))..=this {
            self.stable.record(second, per_second);
            self.panic.record(second, per_second);
        }
        let traffic = in_flight || per_second.into_iter().any(|value| value > 0.0);
        let has_traffic_again = traffic && !self.has_traffic(now_ns);
        if traffic {
            let until = now_ns.saturating_add(held_ns) / SECOND_NS;
            self.last_traffic_second = self.last_traffic_second.max(Some(until));
            // A key at zero does not wait for the next tick. Traffic too small to want a pod asks
            // again at most once a second.
            let asks = |decided: &Decided| {
                let has_asked = decided.at_ns / SECOND_NS >= this;
                decided.decision.desired_pods == 0 && (has_traffic_again || !has_asked)
            };
            if self.decided.as_ref().is_some_and(asks) {
                self.decide(now_ns);
            }
        }
        has_traffic_again
    }

    /// Returns whether anything came or was in flight within the stable window.
    fn has_traffic(&self, now_ns: u64) -> bool {
        let second = now_ns / SECOND_NS;
        self.last_traffic_second
            .is_some_and(|last| second.saturating_sub(last) < self.stable.seconds() as u64)
    }

    /// Returns whether the key should have any pod: it has traffic, its decider still wants one, or
    /// anything is in flight at a live sender. Proxied requests count there, too: if no gateway
    /// counted them under this key, nothing else shows them.
    pub fn is_active(&self, now_ns: u64) -> bool {
        self.has_traffic(now_ns)
            || self.decision().desired_pods > 0
            || self.settings.min_scale > 0
            || self.senders.live(now_ns).is_busy
    }

    /// Notes that a report or a stat came. What was decided after a start and before the first of
    /// them was decided without any data, and is dropped. Returns the silence that was before it.
    fn note_report(&mut self, now_ns: u64) -> Option<Silence> {
        // Between two decisions a silence of all is looked for, which is longer than ten of the
        // shortest periods, and only then: a key with many senders has many reports.
        let is_late = now_ns.saturating_sub(self.last_report_ns) > MIN_PERIOD_NS * SILENT_PERIODS;
        let silence = if is_late { self.silence(now_ns) } else { self.silence };
        self.last_report_ns = self.last_report_ns.max(now_ns);
        if self.first_report_ns.is_none() {
            self.first_report_ns = Some(now_ns);
            self.decided = self.decided.take().filter(|_| self.started_ns.is_none());
        }
        silence
    }

    /// Notes what a report means for the silence that was before it: whether it was of a sender that
    /// had been silent, or has the traffic. Returns the silence if it has ended.
    fn end_silence(&mut self, silence: Option<Silence>, now_ns: u64) -> Option<Silence> {
        self.silence = silence;
        let Silence { senders, .. } = silence?;
        if self.senders.vanished(now_ns, self.stable_window_ns(), self.traffic_ns).is_some() {
            return None;
        }
        let is_forgotten = self.is_forgotten(now_ns);
        self.silence = None;
        if is_forgotten {
            // As after a start: nobody knows what happened in between.
            (self.started_ns, self.first_report_ns) = (Some(now_ns), Some(now_ns));
            (self.decided, self.recovery) = (None, None);
        } else {
            let wait_ns = self.stable_window_ns().max(MAX_PERIOD_NS + SECOND_NS);
            let until_ns = now_ns.saturating_add(wait_ns);
            self.recovery = Some(Recovery { since_ns: now_ns, until_ns, senders });
            if let Some(Decided { decider, decision, .. }) = &mut self.decided {
                decider.hold(now_ns, decision.desired_pods);
            }
        }
        silence
    }

    fn clear_windows(&mut self) {
        self.stable.clear();
        self.panic.clear();
    }

    fn stable_window_ns(&self) -> u64 {
        (self.stable.seconds() as u64).saturating_mul(SECOND_NS)
    }

    /// Returns whether senders fell silent that had traffic, and nobody else reports any. (Knative
    /// decides nothing without data, either.) They are silent after ten of their periods, or once their
    /// reports are overdue and the stable window has nothing of them any more.
    pub fn silence(&self, now_ns: u64) -> Option<Silence> {
        if self.silence.is_some() || self.last_report_ns == 0 {
            return self.silence;
        }
        let since_ns = self.senders.vanished(now_ns, self.stable_window_ns(), self.traffic_ns)?;
        Some(Silence { since_ns, senders: self.senders.live(since_ns).senders })
    }

    /// Returns whether a silence has lasted for so long that the decision no longer holds.
    pub fn is_forgotten(&self, now_ns: u64) -> bool {
        let silence = self.silence(now_ns);
        silence.is_some_and(|silence| now_ns.saturating_sub(silence.since_ns) > self.stale_after_ns)
    }

    /// Returns since when the key is stale, as the receiver's unix time in nanoseconds: its senders
    /// fell silent, and it keeps its decision.
    pub fn stale_since_ns(&self, now_ns: u64) -> Option<u64> {
        self.silence(now_ns).filter(|_| !self.is_forgotten(now_ns)).map(|silence| silence.since_ns)
    }

    /// Returns whether a silence has just ended, and some of its senders are not back.
    pub fn is_recovering(&self, now_ns: u64) -> bool {
        self.recovery.is_some_and(|Recovery { since_ns, until_ns, senders }| {
            // Senders may be live that were not heard since: a window can be shorter than ten of
            // their periods.
            now_ns < until_ns && self.senders.heard_since(since_ns) < senders
        })
    }

    /// Returns whether the key was first reported less than a stable window ago: senders may be missing
    /// that were not waited for.
    pub fn is_young(&self, now_ns: u64) -> bool {
        self.first_report_ns.is_some_and(|first_ns| now_ns < first_ns.saturating_add(self.stable_window_ns()))
    }

    /// Returns whether there is traffic, and one pod takes it all.
    pub fn has_traffic_for_one(&self, now_ns: u64) -> bool {
        self.has_traffic(now_ns) && self.is_one_enough(now_ns)
    }

    /// Returns whether a report is overdue from a sender that had traffic: nothing less is known.
    pub fn is_overdue(&self, now_ns: u64) -> bool {
        self.senders.live(now_ns).is_overdue
    }

    /// Returns whether any sender reports less often than each second.
    pub fn has_long_periods(&self, now_ns: u64) -> bool {
        self.senders.live(now_ns).has_long_periods
    }

    /// Returns how many pods the metric wants by these figures, whatever was decided before.
    pub fn wanted_pods(&self, figures: &Figures) -> u64 {
        let value = figures.or_in_flight(self.metric(self.settings.metric, figures));
        (value / self.settings.target_per_pod()).ceil() as u64
    }

    /// Returns whether the receiver has just started, and senders may be missing that will yet
    /// report: then nothing smaller than the truth must be answered. The others have reported a
    /// period after the first, if they can reach the receiver at all; a gateway that pods had
    /// requests from has, within the longest period that there is.
    pub fn is_starting(&self, now_ns: u64) -> bool {
        let Some(started_ns) = self.started_ns.filter(|_| self.decided.is_none()) else { return false };
        let since_ns = now_ns.saturating_sub(self.first_report_ns.unwrap_or(started_ns));
        if since_ns > MAX_PERIOD_NS + SECOND_NS {
            return false;
        }
        let live = || self.senders.incarnations().filter(|incarnation| incarnation.is_live(now_ns));
        let proxied = live().any(|pod| !pod.from_gateway && pod.last.proxied_in_flight > 0);
        if self.first_report_ns.is_none() || (proxied && !live().any(|sender| sender.from_gateway)) {
            return true;
        }
        let longest = live().map(|sender| sender.period_ns).max().unwrap_or(0);
        since_ns < STARTUP_NS.max(longest + SECOND_NS)
    }

    /// Returns how many pods the key wants, as of the last decision; `None` where that is not
    /// known.
    ///
    /// A key whose senders fell silent keeps its decision, until it is
    /// [forgotten](Self::is_forgotten).
    ///
    /// Traffic that came after the decision wants one at once. Before the first decision that is
    /// all that can be answered, and only where one pod is not less than there may be: after a
    /// start, where no pod has reported and one is enough.
    pub fn desired_pods(&self, now_ns: u64) -> Option<u32> {
        let decided_second = self.decided.as_ref().map_or(0, |decided| decided.at_ns / SECOND_NS);
        let has_new_traffic = self.has_traffic(now_ns) && self.last_traffic_second >= Some(decided_second);
        let at_once = || self.settings.bounded(self.settings.activation_scale.max(1));
        match &self.decided {
            Some(_) if self.is_forgotten(now_ns) => None,
            Some(Decided { decision, .. }) if has_new_traffic => Some(decision.desired_pods.max(at_once())),
            Some(Decided { decision, .. }) => Some(decision.desired_pods),
            None if has_new_traffic && (self.started_ns.is_none() || self.is_one_enough(now_ns)) => {
                Some(at_once())
            }
            None => None,
        }
    }

    /// Returns whether gateways alone report, and no more than one pod takes.
    fn is_one_enough(&self, now_ns: u64) -> bool {
        let figures = self.figures(now_ns);
        let load = match self.settings.metric {
            Metric::Concurrency => figures.stable.concurrency.max(figures.in_flight as f64),
            Metric::Rps => figures.stable.requests_per_second,
        };
        figures.pods == 0 && load <= self.settings.target_per_pod()
    }

    /// Returns the metric to scale by, all pods together: the stable average, or in panic the panic
    /// average where that is larger.
    pub fn metric(&self, metric: Metric, figures: &Figures) -> f64 {
        let Figures { stable, panic, .. } = figures;
        let (stable, panic) = (stable.value(metric), panic.value(metric));
        if self.decision().panic_mode { stable.max(panic) } else { stable }
    }

    /// Returns the figures at the receiver's unix time `now_ns`.
    pub fn figures(&self, now_ns: u64) -> Figures {
        let second = now_ns / SECOND_NS;
        let Live { in_flight, pods, gateways, has_long_periods, .. } = self.senders.live(now_ns);
        // A stat with more proxied requests than requests is subtracted, as in Knative; what is
        // shown is never negative.
        let averages = |window: &Window<2>| {
            let average = match has_long_periods {
                true => window.average_with(second, self.senders.held()),
                false => window.average(second),
            };
            let [concurrency, requests_per_second] = average.map(|value| value.max(0.0));
            Averages { concurrency, requests_per_second }
        };
        Figures {
            requests_total: self.requests_total.saturating_add(self.streamed_total.max(0.0).round() as u64),
            in_flight: in_flight.max(0.0).round() as u64,
            pods,
            gateways,
            proxied_share: self.mismatches.proxied_share(),
            stable: averages(&self.stable),
            panic: averages(&self.panic),
            last_report_age_ms: (self.last_report_ns > 0)
                .then(|| now_ns.saturating_sub(self.last_report_ns) / 1_000_000),
        }
    }

    /// Decides how many pods the key wants at the receiver's unix time `now_ns`, unless it [is
    /// starting](Self::is_starting) or [nobody is heard](Self::silence). Returns the figures that it decided by.
    ///
    /// Ready are the pods that report. Where none does, because a gateway alone reports the key,
    /// the last decision is assumed to be done: were it always one pod, panic would never end, and
    /// nothing would ever be scaled down. (Knative asks the endpoints, which need not exist for the
    /// stats server.) Told ready pods count only as far as that decision: a constant would keep the
    /// key above zero for ever.
    pub fn decide(&mut self, now_ns: u64) -> Figures {
        let figures = self.decide_by_figures(now_ns);
        self.was_active = self.is_active(now_ns);
        figures
    }

    fn decide_by_figures(&mut self, now_ns: u64) -> Figures {
        let figures = self.figures(now_ns);
        if self.mismatches.is_window_over(now_ns) {
            let of_gateways = self.senders.take_gateway_requests(now_ns);
            self.mismatches.end_window(now_ns, of_gateways);
        }
        self.silence = self.silence(now_ns);
        self.recovery = self.recovery.filter(|_| self.is_recovering(now_ns));
        if self.silence.is_some() || self.is_starting(now_ns) {
            return figures;
        }
        let told = self.settings.ready_pods;
        let ready = match figures.pods {
            0 => told.unwrap_or(u32::MAX).min(self.decision().desired_pods),
            reporting => told.unwrap_or_else(|| u32::try_from(reporting).unwrap_or(u32::MAX)),
        };
        let metric = self.settings.metric;
        let stable = figures.or_in_flight(figures.stable.value(metric));
        let panic = figures.or_in_flight(figures.panic.value(metric));
        let decided = self.decided.get_or_insert_with(|| Decided {
            decider: Decider::new(now_ns, ready),
            decision: Decision::default(),
            ready_pods: ready,
            at_ns: now_ns,
        });
        if self.recovery.is_some() {
            decided.decider.hold(now_ns, decided.decision.desired_pods);
        }
        let seen = Observation { now_ns, ready, stable, panic };
        let wanted = decided.decider.decide(&self.settings, &seen);
        // Less is not wanted because a report is late.
        let least = if self.senders.live(now_ns).is_overdue { decided.decision.desired_pods } else { 0 };
        let desired_pods = self.settings.bounded(wanted.desired_pods.max(least));
        decided.decision = Decision { desired_pods, ..wanted };
        decided.ready_pods = ready;
        decided.at_ns = now_ns;
        figures
    }

    /// Returns counts that do not fit together, as of the last call of [`Key::decide`], unless
    /// [`Key::mismatch_logged`] was called for them.
    pub fn mismatch(&self) -> Option<Mismatch> {
        self.mismatches.found()
    }

    /// Notes that a mismatch was logged: it is not returned again.
    pub fn mismatch_logged(&mut self, mismatch: Mismatch) {
        self.mismatches.logged(mismatch);
    }

    /// Returns the first `limit` senders whose names come after `after`, silent ones included.
    pub fn senders(&self, after: &str, limit: usize, now_ns: u64) -> SenderPage {
        self.senders.page(after, limit, now_ns)
    }

    /// Returns what each live pod has of all requests, in order of their names.
    pub fn pods(&self, now_ns: u64) -> Vec<PodFigures> {
        self.senders.pods(now_ns)
    }

    /// Returns the last decision; before the first, no pod is wanted.
    pub fn decision(&self) -> Decision {
        self.decided.as_ref().map(|decided| decided.decision).unwrap_or_default()
    }

    /// Returns how many pods the last decision took as ready; `None` before the first.
    pub fn ready_pods(&self) -> Option<u32> {
        self.decided.as_ref().map(|decided| decided.ready_pods)
    }

    /// Returns whether the averages are what senders say. Where those that had traffic are not heard,
    /// nothing fills the windows any more, and they fall as if there were none.
    pub fn is_heard(&self, now_ns: u64) -> bool {
        let is_late = now_ns.saturating_sub(self.last_report_ns) > DECISION_PERIOD_NS;
        self.silence(now_ns).is_none() && !(is_late && self.is_overdue(now_ns))
    }

    /// Returns whether there is a decision.
    pub fn is_decided(&self) -> bool {
        self.decided.is_some()
    }

    /// Forgets senders that have been silent for long.
    pub fn forget(&mut self, now_ns: u64) {
        self.silence = self.silence(now_ns);
        self.senders.forget(now_ns);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scaling::sender::{RETENTION_NS, Role, SenderFigures};

    const S: u64 = SECOND_NS;
    const NOW: u64 = 1_700_000_000 * S;

    fn at(second: u64, requests: u64, request_seconds: u64, in_flight: u32) -> Snapshot {
        Snapshot {
            as_of_ns: second * S,
            requests,
            request_ns: u128::from(request_seconds * S),
            in_flight,
            ..Snapshot::default()
        }
    }

    fn report(since: Snapshot, until: Snapshot) -> KeyReport {
        KeyReport { namespace: "ns".into(), name: "rev".into(), from_gateway: false, since, until }
    }

    #[test]
    fn a_repeated_report_adds_nothing() {
        let mut key = Key::new(Arc::default());
        let first = report(at(1, 0, 0, 0), at(2, 5, 2, 1));
        key.record("pod", 1, &first, NOW).unwrap();
        key.record("pod", 1, &first, NOW + S).unwrap();
        // The acknowledgement was lost: the same since, a later until.
        key.record("pod", 1, &report(at(1, 0, 0, 0), at(3, 8, 4, 2)), NOW + S).unwrap();
        let figures = key.figures(NOW + S);
        assert_eq!((figures.requests_total, figures.in_flight, figures.pods), (8, 2, 1));
        assert_eq!(figures.stable.concurrency, 2.0);
        assert_eq!(figures.stable.requests_per_second, 4.0);
    }

    #[test]
    fn a_late_report_adds_nothing_and_takes_nothing() {
        let mut key = Key::new(Arc::default());
        key.record("pod", 1, &report(at(1, 0, 0, 0), at(3, 8, 4, 2)), NOW).unwrap();
        key.record("pod", 1, &report(at(1, 0, 0, 0), at(2, 5, 2, 9)), NOW).unwrap();
        let figures = key.figures(NOW);
        assert_eq!((figures.requests_total, figures.in_flight), (8, 2));
    }

    #[test]
    fn an_empty_receiver_goes_on_from_since() {
        let mut key = Key::new(Arc::default());
        key.record("pod", 1, &report(at(100, 1_000, 500, 3), at(101, 1_010, 503, 3)), NOW).unwrap();
        assert_eq!(key.figures(NOW).requests_total, 10);
        // What another receiver acknowledged in between is not ours.
        key.record("pod", 1, &report(at(105, 1_050, 520, 3), at(106, 1_057, 523, 3)), NOW).unwrap();
        assert_eq!(key.figures(NOW).requests_total, 17);
    }

    #[test]
    fn counters_that_go_back_are_refused_and_change_nothing() {
        let mut key = Key::new(Arc::default());
        key.record("pod", 1, &report(at(1, 0, 0, 0), at(3, 8, 4, 2)), NOW).unwrap();
        let back = report(at(1, 0, 0, 0), at(4, 7, 4, 9));
        assert_eq!(key.record("pod", 1, &back, NOW), Err(CounterDecreased));
        assert_eq!(key.figures(NOW).in_flight, 2);
        assert!(key.record("pod", 2, &back, NOW).is_ok(), "another incarnation is another sender");
    }

    #[test]
    fn proxied_requests_count_at_the_gateway_alone() {
        let mut key = Key::new(Arc::default());
        let proxied = Snapshot {
            proxied_requests: 6,
            proxied_request_ns: u128::from(3 * S),
            proxied_in_flight: 2,
            ..at(2, 10, 5, 3)
        };
        key.record("pod", 1, &report(at(1, 0, 0, 0), proxied), NOW).unwrap();
        let gateway = KeyReport { from_gateway: true, ..report(at(1, 0, 0, 0), at(2, 6, 3, 2)) };
        key.record("gateway", 1, &gateway, NOW).unwrap();
        let figures = key.figures(NOW);
        assert_eq!((figures.requests_total, figures.in_flight, figures.pods), (10, 3, 1));
        assert_eq!(figures.stable.concurrency, 5.0);
    }

    #[test]
    fn a_report_of_fifteen_seconds_is_spread_over_fifteen_seconds() {
        let mut key = Key::new(Arc::default());
        key.record("pod", 1, &report(at(1, 0, 0, 0), at(16, 30, 45, 3)), NOW).unwrap();
        let figures = key.figures(NOW);
        assert_eq!((figures.stable.concurrency, figures.panic.concurrency), (3.0, 3.0));
        assert_eq!(figures.stable.requests_per_second, 2.0);
    }

    #[test]
    fn ten_reports_of_a_tenth_of_a_second_make_one_second() {
        let mut key = Key::new(Arc::default());
        let tenth = |n: u64| Snapshot {
            as_of_ns: S + n * S / 10,
            requests: n,
            request_ns: u128::from(n * S / 5),
            ..Snapshot::default()
        };
        for n in 1..=10 {
            key.record("pod", 1, &report(tenth(n - 1), tenth(n)), NOW + (n - 1) * S / 10).unwrap();
        }
        assert_eq!(key.figures(NOW + S - 1).stable.concurrency, 2.0);
    }

    #[test]
    fn a_pod_that_is_silent_for_ten_periods_no_longer_counts() {
        let mut key = Key::new(Arc::default());
        key.record("a", 1, &report(at(0, 0, 0, 0), at(15, 1, 1, 4)), NOW).unwrap();
        key.record("a", 1, &report(at(15, 1, 1, 4), at(16, 1, 1, 4)), NOW).unwrap();
        key.record("b", 1, &report(at(15, 1, 1, 1), at(16, 1, 1, 1)), NOW + 5 * S).unwrap();
        assert_eq!((key.figures(NOW + 10 * S).pods, key.figures(NOW + 10 * S).in_flight), (2, 5));
        assert_eq!((key.figures(NOW + 10 * S + 1).pods, key.figures(NOW + 10 * S + 1).in_flight), (1, 1));
        key.forget(NOW + 10 * S);
        key.record("a", 1, &report(at(0, 0, 0, 0), at(16, 1, 1, 4)), NOW + 11 * S).unwrap();
        assert_eq!(key.figures(NOW + 11 * S).requests_total, 1, "still recognised");
    }

    #[test]
    fn a_gateways_first_report_counts_nothing_wakes_the_key_and_holds_until_the_next_whatever_its_period() {
        let mut key = Key::new(Arc::default());
        let floor = at(90, 7, 3, 0);
        let gateway = |since, until| KeyReport { from_gateway: true, ..report(since, until) };
        let at_once = gateway(floor, Snapshot { in_flight: 1, ..floor });
        let recorded = key.record("gateway", 1, &at_once, NOW).unwrap();
        let early = PerSecond { concurrency: 1.0, requests: 1.0, ..PerSecond::default() };
        assert_eq!(recorded, Recorded { forward: Some(early), became_active: true });
        let again = key.record("gateway", 1, &at_once, NOW).unwrap();
        assert_eq!(again, Recorded::default(), "it was forwarded already");
        assert!(key.is_active(NOW));
        let figures = key.figures(NOW + 59 * S);
        assert_eq!((figures.in_flight, figures.requests_total), (1, 0));
        let next = gateway(at(100, 7, 3, 0), at(101, 9, 5, 1));
        let recorded = key.record("gateway", 1, &next, NOW + S).unwrap();
        let rest = PerSecond { concurrency: 1.0, requests: 1.0, ..PerSecond::default() };
        assert_eq!(
            recorded,
            Recorded { forward: Some(rest), became_active: false },
            "two of each, one early"
        );
        // The first report comes once more, late: it takes nothing.
        key.record("gateway", 1, &at_once, NOW + S).unwrap();
        let figures = key.figures(NOW + S);
        assert_eq!((figures.requests_total, figures.in_flight, figures.panic.concurrency), (2, 1, 1.0));
        assert_eq!(key.figures(NOW + 11 * S).in_flight, 1);
        assert_eq!(key.figures(NOW + 11 * S + 1).in_flight, 0);
    }

    #[test]
    fn what_is_forwarded_of_a_gateway_has_an_average_above_zero_at_once_and_the_right_sum() {
        let mut key = Key::new(Arc::default());
        let gateway = |since, until| KeyReport { from_gateway: true, ..report(since, until) };
        let (mut total, mut forwarded) = (0, 0.0);
        for round in 0..20 {
            // A key that comes back: its request at once, and what came of it with the next tick.
            let begins = at(100 + round * 10, total, total, 0);
            let counted_at_once = round % 2;
            total += 1 + round % 3;
            let first = Snapshot { in_flight: 1, requests: begins.requests + counted_at_once, ..begins };
            let next = at(101 + round * 10, total, total, 0);
            let mut forward = |since, until| {
                let recorded =
                    key.record("gateway", 1, &gateway(since, until), NOW + round * 10 * S).unwrap();
                forwarded += recorded.forward.map_or(0.0, |forward| forward.requests);
                recorded.forward
            };
            assert_eq!(
                forward(begins, first).map(|stat| (stat.concurrency, stat.requests)),
                Some((1.0, 1.0))
            );
            assert_eq!(forward(begins, next).map(|stat| stat.concurrency), Some((round % 3) as f64));
            assert_eq!(forward(next, at(102 + round * 10, total, total, 0)), None);
        }
        assert_eq!((forwarded, key.figures(NOW).requests_total), (total as f64, total));
    }

    #[test]
    fn what_was_forwarded_early_is_taken_off_once_however_long_the_next_report_is() {
        let gateway = |since, until| KeyReport { from_gateway: true, ..report(since, until) };
        for seconds in 1..5 {
            let mut key = Key::new(Arc::default());
            let begins = at(10, 0, 0, 0);
            let first = gateway(begins, Snapshot { in_flight: 1, ..begins });
            key.record("gateway", 1, &first, NOW).unwrap();
            let next = gateway(begins, at(10 + seconds, 1, 1, 0));
            let recorded = key.record("gateway", 1, &next, NOW + seconds * S).unwrap();
            assert_eq!(
                recorded.forward,
                Some(PerSecond::default()),
                "the only request was forwarded already"
            );
        }
    }

    #[test]
    fn a_key_at_zero_gets_its_decision_with_the_first_report() {
        let json = serde_json::json!({"activation_scale": 3});
        for (settings, pods) in
            [(KeySettings::default(), 1), (KeySettings::default().with(json, 200.0).unwrap(), 3)]
        {
            let mut key = Key::new(Arc::new(settings));
            let gateway = |since, until| KeyReport { from_gateway: true, ..report(since, until) };
            key.record("gateway", 1, &gateway(at(1, 0, 0, 0), at(2, 0, 0, 0)), NOW).unwrap();
            key.decide(NOW);
            assert_eq!(key.decision().desired_pods, 0);
            let begins = at(10, 0, 0, 0);
            let now = NOW + S / 10;
            key.record("gateway", 1, &gateway(begins, Snapshot { in_flight: 1, ..begins }), now).unwrap();
            assert_eq!((key.decision().desired_pods, key.desired_pods(now)), (pods, Some(pods)));
            // It stays so until the gateway's next report, unless that fails to come.
            for second in 1..10 {
                key.decide(NOW + second * S);
                assert_eq!(key.desired_pods(NOW + second * S), Some(pods), "{second}");
            }
        }
    }

    #[test]
    fn what_a_report_found_late_is_spread_over_the_time_that_it_covers() {
        let mut key = Key::new(Arc::default());
        for second in 1..10 {
            key.record("pod", 1, &report(at(second - 1, 0, 0, 0), at(second, 0, 0, 0)), NOW + second * S)
                .unwrap();
        }
        // A worker that had stalled is back, with four requests over seven seconds.
        let late = report(Snapshot { as_of_ns: 3 * S, ..at(9, 0, 0, 0) }, at(10, 4, 28, 4));
        key.record("pod", 1, &late, NOW + 10 * S).unwrap();
        assert_eq!(key.figures(NOW + 10 * S).panic.concurrency, 4.0);
        // Not acknowledged: what is new since then is of the last second.
        let again = report(late.since, at(11, 4, 32, 4));
        key.record("pod", 1, &again, NOW + 11 * S).unwrap();
        assert_eq!(key.figures(NOW + 11 * S).panic.concurrency, 4.0);
        assert_eq!(key.figures(NOW + 11 * S).requests_total, 4);
    }

    #[test]
    fn in_whatever_order_reports_come_and_are_repeated_the_sum_is_the_last_total() {
        let mut seed = 1_u64;
        let mut roll = |sides: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % sides
        };
        for _ in 0..200 {
            let mut key = Key::new(Arc::default());
            let (mut sent, mut acknowledged, mut now) = (Vec::new(), at(1, 0, 0, 0), at(1, 0, 0, 0));
            for second in 2..20 {
                now = at(second, now.requests + roll(5), second * 2, 1);
                sent.push(report(acknowledged, now));
                sent.push(report(acknowledged, now));
                let arrives = roll(sent.len() as u64) as usize;
                let arrived = sent.swap_remove(arrives);
                key.record("pod", 1, &arrived, NOW).unwrap();
                if roll(2) == 0 && arrived.until.as_of_ns > acknowledged.as_of_ns {
                    acknowledged = arrived.until;
                }
            }
            for late in sent {
                key.record("pod", 1, &late, NOW).unwrap();
            }
            assert_eq!(key.figures(NOW).requests_total, now.requests);
        }
    }

    #[test]
    fn a_key_wants_pods_by_what_its_pods_report() {
        let mut key = Key::new(Arc::default());
        assert_eq!(key.decision(), Decision::default());
        key.record("pod", 1, &report(at(1, 0, 0, 0), at(2, 5, 140, 140)), NOW).unwrap();
        key.decide(NOW);
        let decision = key.decision();
        assert_eq!((decision.desired_pods, decision.panic_mode), (2, true));
        assert_eq!(decision.excess_burst_capacity, 100 - 211 - 140);
    }

    #[test]
    fn one_pod_in_two_incarnations_is_one_pod() {
        let mut key = Key::new(Arc::default());
        for incarnation in [1, 2] {
            key.record("pod", incarnation, &report(at(1, 0, 0, 0), at(2, 3, 1, 1)), NOW).unwrap();
        }
        let figures = key.figures(NOW);
        assert_eq!((figures.pods, figures.requests_total, figures.in_flight), (1, 6, 2));
    }

    #[test]
    fn of_a_pod_the_last_four_incarnations_are_kept() {
        let mut key = Key::new(Arc::default());
        for incarnation in 1..=20_000 {
            let at_ns = NOW + incarnation * 1_000;
            assert!(key.additional_bytes("pod", Some(incarnation)) <= Key::max_additional_bytes("pod"));
            key.record("pod", incarnation, &report(at(1, 0, 0, 0), at(2, 3, 1, 7)), at_ns).unwrap();
        }
        let figures = key.figures(NOW + S);
        assert_eq!((figures.pods, figures.requests_total, figures.in_flight), (1, 60_000, 28));
        // Those of which nobody will hear again went; the last are still known.
        key.record("pod", 19_997, &report(at(1, 0, 0, 0), at(2, 3, 1, 7)), NOW + S).unwrap();
        assert_eq!(key.figures(NOW + S).requests_total, 60_000);
        assert_eq!(key.additional_bytes("pod", Some(19_997)), 0);
        assert_eq!(key.senders.by_name["pod"].incarnations.capacity(), 4);
        assert!(size_of::<Incarnation>() <= 128, "what 100,000 pods take depends on it");
        let four = Senders::sender_bytes("pod") + 4 * Senders::INCARNATION_BYTES;
        assert_eq!((key.senders.bytes, key.sender_bytes()), (four, four + Senders::EMPTY_BYTES));
    }

    #[test]
    fn pods_that_are_forgotten_leave_no_memory_behind() {
        let mut key = Key::new(Arc::default());
        for pod in 0..10_000 {
            let name = format!("pod-{pod}");
            let additional = key.additional_bytes(&name, Some(1));
            assert_eq!(additional, Key::max_additional_bytes(&name));
            let before = key.sender_bytes();
            key.record(&name, 1, &report(at(1, 0, 0, 0), at(2, 1, 1, 1)), NOW).unwrap();
            key.record_stat(&name, &stat("", 1.0, 1.0), NOW).unwrap();
            assert_eq!((key.sender_bytes() - before, key.additional_bytes(&name, None)), (additional, 0));
        }
        assert!(key.senders.by_name.allocation_size() <= key.sender_bytes());
        key.forget(NOW + RETENTION_NS);
        assert_eq!((key.sender_count(), key.sender_bytes()), (0, Senders::EMPTY_BYTES));
        assert!(key.senders.by_name.allocation_size() <= Senders::EMPTY_BYTES + Senders::BUCKET_BYTES);
    }

    #[test]
    fn the_senders_of_a_key_are_listed_by_name_with_what_each_shows() {
        let mut key = Key::new(Arc::default());
        let proxied = Snapshot {
            proxied_requests: 6,
            proxied_request_ns: u128::from(3 * S),
            proxied_in_flight: 2,
            ..at(2, 8, 5, 3)
        };
        key.record("pod-b", 1, &report(at(1, 0, 0, 0), proxied), NOW).unwrap();
        key.record("pod-a", 1, &report(at(1, 0, 0, 0), at(2, 0, 0, 0)), NOW + S).unwrap();
        let gateway = KeyReport { from_gateway: true, ..report(at(1, 0, 0, 0), at(2, 6, 3, 2)) };
        key.record("gateway", 1, &gateway, NOW + S).unwrap();
        key.record_stat("activator-1", &stat("", 0.4, 1.0), NOW).unwrap();
        let now = NOW + 10 * S + S / 2;
        let SenderPage { senders, found, has_more } = key.senders("", 9, now);
        let names: Vec<&str> = senders.iter().map(|sender| &*sender.name).collect();
        assert_eq!((names.join(" "), found, has_more), ("activator-1 gateway pod-a pod-b".into(), 4, false));
        assert_eq!(
            senders[3],
            SenderFigures {
                name: "pod-b".into(),
                role: Role::Pod,
                is_live: false,
                in_flight: 1,
                proxied_in_flight: 2,
                average_concurrency: 2.0,
                last_report_age_ms: 10_500,
            }
        );
        assert_eq!((senders[1].role, senders[1].in_flight, senders[1].is_live), (Role::Gateway, 2, true));
        assert_eq!((senders[0].role, senders[0].is_live), (Role::Gateway, false), "silent for ten seconds");
        // Page by page: each begins after the last name of the one before.
        let page = |after, limit| {
            let SenderPage { senders, has_more, .. } = key.senders(after, limit, now);
            (senders.into_iter().map(|sender| sender.name).collect::<Vec<_>>().join(" "), has_more)
        };
        assert_eq!(page("", 3), ("activator-1 gateway pod-a".into(), true));
        assert_eq!(page("pod-a", 3), ("pod-b".into(), false));
        assert_eq!((page("zzz", 3), page("", 0)), ((String::new(), false), (String::new(), true)));
        let figures = key.figures(NOW + S);
        assert_eq!((figures.pods, figures.gateways, figures.proxied_share), (2, 2, Some(0.75)));
    }

    /// Has two gateways report each second, one half a second after the other, and decides. `split`
    /// returns how many requests each had in a half second, and how many of them a pod had as
    /// proxied ones. Returns the second in which a mismatch is found.
    fn second_of_agreement(seconds: u64, mut split: impl FnMut() -> [u64; 3]) -> Option<u64> {
        let mut key = Key::new(Arc::default());
        let (mut totals, mut reported) = ([0; 3], [at(1, 0, 0, 0); 3]);
        for half in 2..seconds * 2 {
            let now = NOW + half * S / 2;
            totals.iter_mut().zip(split()).for_each(|(total, more)| *total += more);
            for (sender, (total, since)) in totals.into_iter().zip(&mut reported).enumerate() {
                if half % 2 == (sender % 2) as u64 {
                    let is_pod = sender == 2;
                    let until = Snapshot {
                        as_of_ns: now,
                        requests: total,
                        proxied_requests: if is_pod { total } else { 0 },
                        ..*since
                    };
                    let of_sender = KeyReport { from_gateway: !is_pod, ..report(*since, until) };
                    key.record(["front", "behind", "pod"][sender], 1, &of_sender, now).unwrap();
                    *since = until;
                }
            }
            if half % 4 == 0 {
                key.decide(now);
            }
            if let Some(mismatch) = key.mismatch() {
                assert_eq!(mismatch, Mismatch::GatewaysInARow);
                key.mismatch_logged(mismatch);
                assert_eq!(key.mismatch(), None, "once");
                return Some(half / 2);
            }
        }
        None
    }

    #[test]
    fn gateways_in_a_row_are_told_from_those_that_share_the_traffic() {
        let mut seed = 1_u64;
        let mut roll = |sides: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % sides
        };
        let in_a_row = second_of_agreement(3_000, || {
            let requests = 40 + roll(20);
            [requests, requests, requests]
        });
        assert!(in_a_row.is_some_and(|second| second >= 240), "{in_a_row:?}");
        let too_few = second_of_agreement(3_000, || [5, 5, 5]);
        assert_eq!(too_few, None);
        for requests in [50, 500] {
            let by_chance = second_of_agreement(20_000, || {
                let first = (0..requests).filter(|_| roll(2) == 0).count() as u64;
                [first, requests - first, 0]
            });
            assert_eq!(by_chance, None, "{requests} requests in half a second");
        }
        // By turns, so exactly evenly; the pods have all of them.
        assert_eq!(second_of_agreement(3_000, || [50, 50, 100]), None);
    }

    /// Has a pod and, if told, a gateway report each second, by `proxied` of ten requests. Returns
    /// the second in which a mismatch is found.
    fn second_of_mismatch(proxied: u64, gateway_until: u64) -> Option<u64> {
        let mut key = Key::new(Arc::default());
        let snapshot =
            |second: u64| Snapshot { proxied_requests: second * proxied, ..at(second, second * 10, 0, 0) };
        for second in 1..400 {
            let now = NOW + second * S;
            let of_pod = report(snapshot(second), snapshot(second + 1));
            key.record("pod", 1, &of_pod, now).unwrap();
            if second < gateway_until {
                key.record("gateway", 1, &KeyReport { from_gateway: true, ..of_pod }, now).unwrap();
            }
            if second % 2 == 0 {
                key.decide(now);
            }
            if let Some(mismatch) = key.mismatch() {
                assert_eq!(mismatch, Mismatch::NoGateway);
                assert_eq!(key.figures(now).proxied_share, Some(1.0));
                key.mismatch_logged(mismatch);
                assert_eq!(key.mismatch(), None, "once");
                return Some(second);
            }
        }
        None
    }

    #[test]
    fn a_key_whose_pods_have_proxied_requests_alone_needs_a_gateway_that_reports_it() {
        assert_eq!(second_of_mismatch(10, 0), Some(92), "after three windows");
        assert_eq!(second_of_mismatch(9, 0), None, "one of ten came directly");
        assert_eq!(second_of_mismatch(10, 400), None);
        assert_eq!(second_of_mismatch(10, 100), Some(182), "its gateway fell silent");
    }

    /// What a gateway reports each second: the totals, and what is in flight.
    fn gateway(second: u64, total: &mut u64, concurrency: u32) -> KeyReport {
        let since = at(second, 0, *total, concurrency);
        *total += u64::from(concurrency);
        KeyReport { from_gateway: true, ..report(since, at(second + 1, 0, *total, concurrency)) }
    }

    /// Returns desired pods and panic mode at each decision of 60 s: for 9 s with 700 requests in
    /// flight, for 25 s with 210, then with none. One gateway reports them, or the pods that the
    /// key wants, ten at first.
    fn decisions(ready_pods: Option<u32>, of_pods: bool) -> Vec<(u32, bool)> {
        let json = match ready_pods {
            Some(ready) => serde_json::json!({"stable_window": "6s", "ready_pods": ready}),
            None => serde_json::json!({"stable_window": "6s"}),
        };
        let mut key = Key::new(Arc::new(KeySettings::default().with(json, 200.0).unwrap()));
        let (mut totals, mut counts) = ([0; 10], vec![(10, true)]);
        for second in 0..60 {
            let concurrency = match second {
                0..9 => 700,
                9..34 => 210,
                _ => 0,
            };
            let now = NOW + second * S;
            let senders = if of_pods { counts.last().unwrap().0.clamp(1, 10) } else { 1 };
            for (number, total) in totals.iter_mut().enumerate().take(senders as usize) {
                let share = concurrency / senders;
                let report = KeyReport { from_gateway: !of_pods, ..gateway(second + 1, total, share) };
                key.record(&format!("sender-{number}"), 1, &report, now).unwrap();
            }
            if second % 2 == 0 {
                key.decide(now);
                let Decision { desired_pods, panic_mode, .. } = key.decision();
                counts.push((desired_pods, panic_mode));
            }
        }
        counts.split_off(1)
    }

    #[test]
    fn behind_a_gateway_alone_panic_ends_and_pods_go_in_the_end_all_of_them() {
        // Told ready pods count only as far as the last decision.
        for ready_pods in [None, Some(10), Some(1_000)] {
            let counts = decisions(ready_pods, false);
            let at = |second: usize| counts[second / 2];
            assert_eq!(at(4), (10, true), "{counts:?}");
            assert_eq!(at(32), (3, false), "{counts:?}");
            assert_eq!(at(58), (0, false), "{counts:?}");
        }
    }

    #[test]
    fn a_gateway_alone_gets_the_decisions_of_ten_sidecars() {
        for of_pods in [false, true] {
            let counts = decisions(None, of_pods);
            // Ten pods that were there before are no reason to panic.
            assert_eq!((counts[2], counts[16]), ((10, !of_pods), (3, false)), "{of_pods}: {counts:?}");
        }
    }

    #[test]
    fn after_a_start_nothing_is_decided_by_the_pods_that_happen_to_report_first() {
        let mut key = Key::new(Arc::default()).after_start(NOW);
        assert_eq!(key.desired_pods(NOW), None);
        let of_pod =
            |second: u64| report(at(second, 0, 70 * second, 70), at(second + 1, 0, 70 * (second + 1), 70));
        // A hundred pods, spread over each second.
        for tick in 0..300 {
            let (second, pod, now) = (tick / 100 + 1, tick % 100, NOW + tick * S / 100);
            key.record(&format!("pod-{pod}"), 1, &of_pod(second), now).unwrap();
            key.decide(now);
            assert!(key.is_starting(now) && key.is_active(now), "active with the first");
            assert_eq!((key.desired_pods(now), key.is_decided()), (None, false));
        }
        assert_eq!(key.desired_pods(NOW + 3 * S), None, "until it is decided");
        key.decide(NOW + 3 * S);
        assert_eq!((key.desired_pods(NOW + 3 * S), key.is_starting(NOW)), (Some(100), false));
    }

    #[test]
    fn after_a_start_pods_with_a_long_period_are_waited_for() {
        let mut key = Key::new(Arc::default()).after_start(NOW);
        key.record("pod", 1, &report(at(1, 0, 0, 0), at(21, 9, 9, 1)), NOW + S).unwrap();
        assert!(key.is_starting(NOW + 22 * S - 1) && !key.is_starting(NOW + 22 * S));
        // The next report says that it only had been away.
        key.record("pod", 1, &report(at(21, 9, 9, 1), at(22, 9, 9, 1)), NOW + 2 * S).unwrap();
        assert!(key.is_starting(NOW + 4 * S - 1) && !key.is_starting(NOW + 4 * S));
    }

    #[test]
    fn after_a_start_the_wait_begins_with_a_keys_first_report_whatever_it_was_told() {
        let mut key = Key::new(Arc::default()).after_start(NOW);
        assert!(key.is_starting(NOW + 61 * S) && !key.is_starting(NOW + 62 * S));
        key.decide(NOW + 62 * S);
        assert_eq!(key.desired_pods(NOW + 62 * S), Some(0), "nobody reports it");
        // The first of many pods: the server could not be reached until now.
        key.record("pod", 1, &report(at(1, 0, 0, 0), at(2, 0, 70, 70)), NOW + 70 * S).unwrap();
        key.decide(NOW + 70 * S);
        assert_eq!((key.desired_pods(NOW + 70 * S), key.is_active(NOW + 70 * S)), (None, true));
        key.decide(NOW + 73 * S);
        assert_eq!(key.desired_pods(NOW + 73 * S), Some(1));
    }

    #[test]
    fn after_a_start_pods_that_have_requests_from_a_gateway_wait_for_it() {
        let mut key = Key::new(Arc::default()).after_start(NOW);
        let proxied = Snapshot { proxied_in_flight: 5, ..at(2, 5, 5, 5) };
        key.record("pod", 1, &report(at(1, 0, 0, 0), proxied), NOW).unwrap();
        assert!(key.is_starting(NOW + 9 * S));
        key.record("gateway", 1, &gateway(1, &mut 0, 5), NOW + 9 * S).unwrap();
        assert!(!key.is_starting(NOW + 9 * S));
    }

    #[test]
    fn after_a_start_the_first_request_of_an_idle_key_wants_a_pod_at_once() {
        let with = |json| Arc::new(KeySettings::default().with(json, 200.0).unwrap());
        let answer = |key: &Key| (key.desired_pods(NOW), key.is_active(NOW));
        let of_gateway = |concurrency| gateway(1, &mut 0, concurrency);
        for (concurrency, json, desired) in [
            (1, serde_json::json!({}), Some(1)),
            (1, serde_json::json!({"min_scale": 3}), Some(3)),
            // More than one pod takes: the answer must not be that one is enough.
            (71, serde_json::json!({}), None),
        ] {
            let mut key = Key::new(with(json)).after_start(NOW);
            key.record("gateway", 1, &of_gateway(concurrency), NOW).unwrap();
            assert_eq!(answer(&key), (desired, true), "{concurrency}");
        }
        // Where the server was there, whoever reports is all that there is; and no decision is
        // waited for.
        let mut key = Key::new(Arc::default());
        key.record("pod", 1, &report(at(1, 0, 0, 0), at(2, 0, 0, 0)), NOW - 60 * S).unwrap();
        key.decide(NOW - 60 * S);
        assert_eq!(answer(&key), (Some(0), false));
        key.record("pod", 1, &report(at(2, 0, 0, 0), at(3, 1, 1, 1)), NOW).unwrap();
        assert_eq!(answer(&key), (Some(1), true));
    }

    #[test]
    fn no_key_wants_more_than_a_million_pods() {
        let json =
            serde_json::json!({"target": 0.01, "max_scale_up_rate": 1e30, "activation_scale": 1_000_000});
        let mut key = Key::new(Arc::new(KeySettings::default().with(json, 200.0).unwrap()));
        key.record_stat("p", &stat("p", 1e9, 1e9), NOW).unwrap();
        key.decide(NOW);
        assert_eq!(key.desired_pods(NOW), Some(1_000_000));
    }

    #[test]
    fn a_stat_takes_back_one_request_and_nothing_is_shown_below_zero() {
        let mut key = Key::new(Arc::default());
        key.record_stat("activator", &stat("", 0.0, -1.0), NOW).unwrap();
        let figures = key.figures(NOW);
        assert_eq!((figures.requests_total, figures.stable, figures.in_flight), (0, Averages::default(), 0));
        key.record_stat("activator", &stat("", 1.0, 3.0), NOW).unwrap();
        assert_eq!(key.figures(NOW).requests_total, 2);
        assert_eq!(key.record_stat("activator", &stat("", 0.0, -1.01), NOW), Err(ImplausibleStat));
    }

    fn stat(pod_name: &'static str, concurrency: f64, requests: f64) -> Stat {
        Stat {
            pod_name: pod_name.into(),
            average_concurrent_requests: concurrency,
            request_count: requests,
            ..Stat::default()
        }
    }

    #[test]
    fn a_stat_is_of_its_second_and_an_activator_is_no_pod() {
        let mut key = Key::new(Arc::default());
        key.record_stat("activator-1", &stat("activator-1", 1.0, 1.0), NOW).unwrap();
        key.record_stat("activator-1", &stat("activator-1", 2.0, 9.0), NOW).unwrap();
        let pod = Stat {
            average_proxied_concurrent_requests: 1.5,
            proxied_request_count: 4.0,
            ..stat("p", 2.0, 5.0)
        };
        key.record_stat("p", &pod, NOW).unwrap();
        let figures = key.figures(NOW);
        assert_eq!((figures.requests_total, figures.pods, figures.in_flight), (11, 1, 3));
        assert_eq!(figures.stable, Averages { concurrency: 3.5, requests_per_second: 11.0 });
        assert_eq!(key.figures(NOW + 11 * S).in_flight, 0, "silent for more than ten seconds");
        key.forget(NOW + 11 * S);
        assert_eq!((key.sender_count(), key.senders.bytes), (0, 0));
    }

    #[test]
    fn a_stat_that_nobody_can_have_measured_changes_nothing() {
        let mut key = Key::new(Arc::default());
        for wrong in [f64::NAN, f64::INFINITY, -2.0, 1e300] {
            assert_eq!(key.record_stat("p", &stat("p", wrong, 0.0), NOW), Err(ImplausibleStat));
            assert_eq!(key.record_stat("p", &stat("p", 0.0, wrong), NOW), Err(ImplausibleStat));
        }
        assert_eq!((key.figures(NOW).pods, key.figures(NOW).last_report_age_ms), (0, None));
    }

    #[test]
    fn a_key_wakes_with_its_first_traffic_in_a_stable_window() {
        let mut key = Key::new(Arc::default());
        let mut at = |second: u64, requests| {
            let recorded = key.record_stat("p", &stat("p", 0.0, requests), NOW + second * S).unwrap();
            (recorded.became_active, key.is_active(NOW + second * S))
        };
        assert_eq!([at(0, 0.0), at(1, 1.0), at(2, 1.0)], [(false, false), (true, true), (false, true)]);
        assert_eq!([at(61, 0.0), at(62, 0.0), at(63, 1.0)], [(false, true), (false, false), (true, true)]);
    }

    #[test]
    fn a_key_with_anything_in_flight_is_active_proxied_or_not() {
        let mut key = Key::new(Arc::default());
        let proxied = |second: u64, in_flight: u32| Snapshot {
            proxied_requests: 10,
            proxied_request_ns: u128::from(second * 10 * S),
            proxied_in_flight: in_flight,
            ..at(second, 10, second * 10, in_flight)
        };
        let mut record = |second: u64, in_flight: u32| {
            let now = NOW + second * S;
            let of_pod = report(proxied(second, in_flight), proxied(second + 1, in_flight));
            let recorded = key.record("pod", 1, &of_pod, now).unwrap();
            if second.is_multiple_of(2) {
                key.decide(now);
            }
            (recorded.became_active, key.is_active(now))
        };
        assert_eq!(record(0, 0), (false, false));
        assert_eq!(record(1, 10), (true, true));
        for second in 2..200 {
            assert_eq!(record(second, 10), (false, true), "as long as the requests last: {second}");
        }
        assert_eq!([record(200, 0), record(201, 0)], [(false, false); 2]);
        assert_eq!(record(202, 1), (true, true));
        let (in_flight, desired) = (key.figures(NOW + 202 * S).in_flight, key.decision().desired_pods);
        assert_eq!((in_flight, desired), (0, 0), "counted elsewhere, if at all");
        assert!(!key.is_active(NOW + 213 * S), "its sender fell silent");
        let stat = Stat { average_proxied_concurrent_requests: 0.4, ..stat("p", 0.4, 0.0) };
        key.decide(NOW + 213 * S);
        assert!(key.record_stat("p", &stat, NOW + 213 * S).unwrap().became_active);
        assert!(key.is_active(NOW + 213 * S));
    }

    #[test]
    fn a_steady_load_is_the_same_in_every_window_at_any_time_whatever_the_period() {
        // Seven senders of 100 each, out of step, with jitter; one of them has short periods.
        for (period, stable_window) in
            [(2, "60s"), (5, "6s"), (10, "60s"), (10, "6s"), (60, "60s"), (60, "6s")]
        {
            let json = serde_json::json!({"stable_window": stable_window});
            let mut key = Key::new(Arc::new(KeySettings::default().with(json, 200.0).unwrap()));
            let (mut seed, mut sent) = (1_u64, [0; 7]);
            let periods = [1, period, period, period, period, period, period];
            let snapshot = |tick: u64| at(tick, tick * 200, tick * 100, 100);
            for tenth in 0..3_000 {
                let now = NOW + tenth * S / 10;
                for (sender, number) in sent.iter_mut().zip(0_u64..) {
                    let period = periods[number as usize];
                    let phase = number * period / 7;
                    seed =
                        seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    // Up to half a second late, around the end of a second.
                    let late = if period == 1 { 0 } else { (seed >> 33) % 5 };
                    let due = (*sender + 1) * period + phase;
                    if tenth < due * 10 + late || tenth % 10 > 5 && period == 1 {
                        continue;
                    }
                    let of_sender =
                        report(snapshot(1 + *sender * period), snapshot(1 + (*sender + 1) * period));
                    key.record(&format!("sender-{number}"), 1, &of_sender, now).unwrap();
                    *sender += 1;
                }
                // Once all have reported for a whole window.
                if tenth > (2 * period + 62) * 10 {
                    let Figures { stable, panic, .. } = key.figures(now);
                    for Averages { concurrency, requests_per_second } in [stable, panic] {
                        let shown = (concurrency, requests_per_second);
                        assert_eq!(shown, (700.0, 1400.0), "{period} s, {stable_window}, at {tenth}");
                    }
                    key.decide(now);
                    assert!(key.is_active(now) && key.desired_pods(now) >= Some(10));
                }
            }
            // It does not last.
            let due = NOW + 300 * S + (period + 1 + 61) * S;
            let Figures { stable, panic, .. } = key.figures(due);
            assert_eq!((stable, panic), (Averages::default(), Averages::default()));
        }
    }

    #[test]
    fn other_settings_keep_what_the_windows_hold() {
        let mut key = Key::new(Arc::default());
        for n in 0..10 {
            key.record_stat("p", &stat("p", 4.0, 300.0), NOW + n * S).unwrap();
        }
        let json = serde_json::json!({"metric": "rps", "stable_window": "30s", "min_scale": 3,
            "ready_pods": 1,
            "target": 100, "target_utilization_percentage": 100});
        key.set_settings(Arc::new(KeySettings::default().with(json, 200.0).unwrap()));
        assert_eq!(
            key.figures(NOW + 9 * S).stable,
            Averages { concurrency: 4.0, requests_per_second: 300.0 }
        );
        key.decide(NOW + 9 * S);
        assert_eq!(
            (key.decision().desired_pods, key.metric(Metric::Rps, &key.figures(NOW + 9 * S))),
            (3, 300.0)
        );
        assert!(key.is_active(NOW + 9000 * S), "it never goes below min_scale");
    }
}
