//! The receiver's side: what a report adds to what is already known of a key.
//!
//! A sender's counters are cumulative, so the receiver keeps the highest totals that each sender has reported and adds
//! differences. Whatever is repeated, late or overlapping, adds only what was not added before.

use std::hash::RandomState;
use std::sync::Arc;

use hashbrown::HashMap;
use hashbrown::hash_map::EntryRef;

use crate::counting::snapshot::Snapshot;
use crate::protocol::addition::{CounterDecreased, addition};
use crate::protocol::report::KeyReport;
use crate::protocol::stat::Stat;
use crate::scaling::decider::{Decider, Decision, Observation};
use crate::scaling::settings::{KeySettings, Metric, heap_bytes};
use crate::scaling::windows::Window;

const SECOND_NS: u64 = 1_000_000_000;
/// A sender that has not reported for this many of its periods no longer counts.
pub const SILENT_PERIODS: u64 = 10;
/// How long the last snapshot of a silent sender is kept, so that a report whose acknowledgement was
/// lost is recognised when it comes again.
pub const MEMORY_NS: u64 = 15 * 60 * SECOND_NS;
/// A sender of stats says nothing of its period; Knative's is a second.
const STAT_PERIOD_NS: u64 = SECOND_NS;
const SHORTEST_PERIOD_NS: u64 = SECOND_NS / 10;
/// The longest time between two reports of a sender.
pub const LONGEST_PERIOD_NS: u64 = 60 * SECOND_NS;
/// The incarnations of a pod that are kept: one that ends, one that comes, and as many again.
const MOST_INCARNATIONS: usize = 4;
/// After a start it takes so long, or a second more than the longest period of a key's senders, until all of them can have
/// reported.
const START_NS: u64 = 3 * SECOND_NS;

/// The sizes of the stable and the panic window in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowSizes {
    /// Knative's stable window; its default is 60 s.
    pub stable_seconds: usize,
    /// Knative's panic window; its default is 10 % of the stable one.
    pub panic_seconds: usize,
}

impl Default for WindowSizes {
    fn default() -> Self {
        Self { stable_seconds: 60, panic_seconds: 6 }
    }
}

#[derive(Clone, Debug)]
struct Sender {
    /// The highest totals that it has reported, and what was in flight at the latest instant.
    last: Snapshot,
    /// The instant that its last report began at.
    since_ns: u64,
    from_gateway: bool,
    period_ns: u64,
    seen_ns: u64,
}

impl Sender {
    fn is_live(&self, now_ns: u64) -> bool {
        now_ns.saturating_sub(self.seen_ns) <= self.period_ns.saturating_mul(SILENT_PERIODS)
    }
}

/// Averages over one window.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Averages {
    /// Requests in flight, on average.
    pub concurrency: f64,
    /// Requests that came in, a second.
    pub requests_per_second: f64,
}

impl Averages {
    /// The one of them to scale by.
    pub fn of(&self, metric: Metric) -> f64 {
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
    /// Over the stable window.
    pub stable: Averages,
    /// Over the panic window.
    pub panic: Averages,
    /// Since the last report of any sender, in milliseconds; `None` before the first.
    pub last_report_age_ms: Option<u64>,
}

/// What a sender added, a second; what its bucket in the windows gets.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PerSecond {
    /// Requests in flight, on average.
    pub concurrency: f64,
    /// Of these, proxied ones; always 0 of a gateway, which is in front of all.
    pub proxied_concurrency: f64,
    /// Requests that came in.
    pub requests: f64,
    /// Of these, proxied ones.
    pub proxied_requests: f64,
}

impl PerSecond {
    /// What a stat says.
    ///
    /// # Errors
    /// [`Implausible`].
    pub fn of(stat: &Stat) -> Result<Self, Implausible> {
        let per_second = Self {
            concurrency: stat.average_concurrent_requests,
            proxied_concurrency: stat.average_proxied_concurrent_requests,
            requests: stat.request_count,
            proxied_requests: stat.proxied_request_count,
        };
        let Self { concurrency, proxied_concurrency, requests, proxied_requests } = per_second;
        let fits = |value: f64| (0.0..=MOST).contains(&value);
        let plausible = fits(concurrency)
            && fits(proxied_concurrency)
            && (-MOST_TAKEN_BACK..=MOST).contains(&requests)
            && fits(proxied_requests);
        if plausible { Ok(per_second) } else { Err(Implausible) }
    }

    /// What counts for the key: what no gateway has counted already.
    fn own(&self) -> [f64; 2] {
        [self.concurrency - self.proxied_concurrency, self.requests - self.proxied_requests]
    }
}

/// What a report or a stat did to its key.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Recorded {
    /// What was not known before; `None` if nothing.
    pub added: Option<PerSecond>,
    /// Whether the key had no traffic in its stable window until now.
    pub woke: bool,
}

/// A stat whose numbers are none, or out of all proportion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Implausible;

/// No pod has so many requests in a second.
const MOST: f64 = 1e9;
/// A count below zero takes back what was said too early: Knative's activator says 1 for a key's first request at once, and
/// one less at its next tick, of which the request may already have been the last.
const MOST_TAKEN_BACK: f64 = 1.0;

/// One pod, or one gateway.
#[derive(Clone, Debug, Default)]
struct Pod {
    /// By incarnation: seldom more than one, never more than [`MOST_INCARNATIONS`].
    reported: Vec<(u64, Sender)>,
    streamed: Option<Streamed>,
}

#[derive(Clone, Copy, Debug)]
struct Streamed {
    concurrency: f64,
    seen_ns: u64,
    from_gateway: bool,
}

impl Streamed {
    fn is_live(&self, now_ns: u64) -> bool {
        now_ns.saturating_sub(self.seen_ns) <= STAT_PERIOD_NS * SILENT_PERIODS
    }
}

impl Pod {
    /// What is in flight in it, and whether it counts as a pod; `None` if it is silent.
    fn live(&self, now_ns: u64) -> Option<(f64, bool)> {
        let mut live = None;
        let mut add = |in_flight: f64, is_pod: bool| {
            let (sum, pod) = live.unwrap_or((0.0, false));
            live = Some((sum + in_flight, pod || is_pod));
        };
        for (_, sender) in self.reported.iter().filter(|(_, sender)| sender.is_live(now_ns)) {
            let proxied = if sender.from_gateway { 0 } else { sender.last.proxied_in_flight };
            add(sender.last.in_flight.saturating_sub(proxied).into(), !sender.from_gateway);
        }
        if let Some(streamed) = self.streamed.filter(|streamed| streamed.is_live(now_ns)) {
            add(streamed.concurrency, !streamed.from_gateway);
        }
        live
    }
}

/// A key's pods and gateways by their names, and what memory they take.
#[derive(Clone, Debug, Default)]
struct Pods {
    by_name: HashMap<Box<str>, Pod, RandomState>,
    bytes: usize,
}

impl Pods {
    /// A place in the map, which is at least 7/16 full once it has grown, and a byte beside it.
    const PLACE_BYTES: usize = (size_of::<(Box<str>, Pod)>() + 1) * 16 / 7;
    /// What the smallest map takes beyond its first place.
    const EMPTY_BYTES: usize = 4 * size_of::<(Box<str>, Pod)>();
    const INCARNATION_BYTES: usize = size_of::<(u64, Sender)>() + 16;

    fn pod_bytes(name: &str) -> usize {
        Self::PLACE_BYTES + heap_bytes(name.len())
    }

    /// What a report, or (without an incarnation) a stat would take that is not there yet.
    fn missing_bytes(&self, name: &str, incarnation: Option<u64>) -> usize {
        let pod = self.by_name.get(name);
        let reported = pod.map_or(&[][..], |pod| &pod.reported);
        let is_new = incarnation.is_some_and(|incarnation| {
            reported.len() < MOST_INCARNATIONS && !reported.iter().any(|(i, _)| *i == incarnation)
        });
        let of_pod = if pod.is_none() { Self::pod_bytes(name) } else { 0 };
        of_pod + if is_new { Self::INCARNATION_BYTES } else { 0 }
    }

    fn sender(&self, name: &str, incarnation: u64) -> Option<&Sender> {
        let reported = &self.by_name.get(name)?.reported;
        reported.iter().find(|(i, _)| *i == incarnation).map(|(_, sender)| sender)
    }

    /// Has a sender say something else; the one that was silent for longest makes room for an incarnation too many.
    fn put(&mut self, name: &str, incarnation: u64, now: Sender) {
        let reported = &mut self.pod(name).reported;
        if let Some((_, sender)) = reported.iter_mut().find(|(i, _)| *i == incarnation) {
            *sender = now;
        } else if reported.len() < MOST_INCARNATIONS {
            reported.reserve_exact(1);
            reported.push((incarnation, now));
            self.bytes += Self::INCARNATION_BYTES;
        } else if let Some(oldest) = reported.iter_mut().min_by_key(|(_, sender)| sender.seen_ns) {
            *oldest = (incarnation, now);
        }
    }

    /// A sender was heard, and said nothing new.
    fn heard(&mut self, name: &str, incarnation: u64, now_ns: u64) {
        let reported = self.by_name.get_mut(name).map_or(&mut [][..], |pod| &mut pod.reported);
        if let Some((_, sender)) = reported.iter_mut().find(|(i, _)| *i == incarnation) {
            sender.seen_ns = now_ns;
        }
    }

    /// A pod by its name, which is copied only the first time.
    fn pod(&mut self, name: &str) -> &mut Pod {
        let Self { by_name, bytes } = self;
        match by_name.entry_ref(name) {
            EntryRef::Occupied(pod) => pod.into_mut(),
            EntryRef::Vacant(place) => {
                *bytes += Self::pod_bytes(name);
                place.insert_with_key(name.into(), Pod::default())
            }
        }
    }

    fn forget(&mut self, now_ns: u64) {
        let mut bytes = 0;
        self.by_name.retain(|name, pod| {
            pod.reported.retain(|(_, sender)| now_ns.saturating_sub(sender.seen_ns) < MEMORY_NS);
            pod.reported.shrink_to_fit();
            pod.streamed = pod.streamed.filter(|streamed| streamed.is_live(now_ns));
            let is_kept = !pod.reported.is_empty() || pod.streamed.is_some();
            if is_kept {
                bytes += Self::pod_bytes(name) + pod.reported.len() * Self::INCARNATION_BYTES;
            }
            is_kept
        });
        self.bytes = bytes;
        // A map keeps its places. Those that are counted for a pod are enough for one that is 7/16 full.
        if self.by_name.capacity() > self.by_name.len() * 2 {
            self.by_name.shrink_to(self.by_name.len());
        }
    }
}

/// Whether a sender of stats is an activator and no pod: a stat does not say, its pod's name does (as in older Knative's
/// `pkg/autoscaler`, which told them apart by this prefix).
pub fn is_activator(pod_name: &str) -> bool {
    pod_name.starts_with("activator")
}

/// One key, as its senders make it.
#[derive(Clone, Debug)]
pub struct Key {
    settings: Arc<KeySettings>,
    requests_total: u64,
    /// The same from stats, whose counts are doubles.
    streamed_total: f64,
    stable: Window<2>,
    panic: Window<2>,
    pods: Pods,
    last_report_ns: u64,
    last_traffic_second: Option<u64>,
    started_ns: Option<u64>,
    /// When its first report or stat came.
    first_report_ns: Option<u64>,
    decided: Option<Decided>,
}

/// What a key wants, and since when.
#[derive(Clone, Debug)]
struct Decided {
    decider: Decider,
    decision: Decision,
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
            pods: Pods::default(),
            last_report_ns: 0,
            last_traffic_second: None,
            started_ns: None,
            first_report_ns: None,
            decided: None,
        }
    }

    /// The same key with a receiver that has just started, at its unix time `started_ns` in nanoseconds: until all senders can
    /// have reported, what is known is too little to decide by.
    #[must_use]
    pub fn after_start(self, started_ns: u64) -> Self {
        Self { started_ns: Some(started_ns), ..self }
    }

    /// What the key is scaled by.
    pub fn settings(&self) -> &Arc<KeySettings> {
        &self.settings
    }

    /// Has the key scaled by other settings from now on. What its windows hold stays, as far as it fits.
    pub fn apply(&mut self, settings: Arc<KeySettings>) {
        let sizes = settings.windows();
        if sizes != self.settings.windows() {
            self.stable = self.stable.resized(sizes.stable_seconds);
            self.panic = self.panic.resized(sizes.panic_seconds);
        }
        self.settings = settings;
    }

    /// Whether this pod or gateway is one of the senders remembered.
    pub fn knows(&self, pod: &str) -> bool {
        self.pods.by_name.contains_key(pod)
    }

    /// The memory that the senders take, in bytes.
    pub fn sender_bytes(&self) -> usize {
        Pods::EMPTY_BYTES + self.pods.bytes
    }

    /// The memory that a report of an incarnation, or a stat, of this pod would take that is not taken yet.
    pub fn missing_bytes(&self, pod: &str, incarnation: Option<u64>) -> usize {
        self.pods.missing_bytes(pod, incarnation)
    }

    /// The most that [`Key::missing_bytes`] can be.
    pub fn most_missing_bytes(pod: &str) -> usize {
        Pods::pod_bytes(pod) + Pods::INCARNATION_BYTES
    }

    /// How many pods and gateways are remembered, those that have been silent for less than [`MEMORY_NS`] among them.
    pub fn senders(&self) -> usize {
        self.pods.by_name.len()
    }

    /// The receiver's unix time at the last report, in nanoseconds; 0 before the first.
    pub fn last_report_ns(&self) -> u64 {
        self.last_report_ns
    }

    /// Adds what a report says and was not known, at the receiver's unix time `now_ns`.
    ///
    /// # Errors
    /// [`CounterDecreased`]; nothing was changed.
    pub fn record(
        &mut self,
        pod: &str,
        incarnation: u64,
        report: &KeyReport,
        now_ns: u64,
    ) -> Result<Recorded, CounterDecreased> {
        let KeyReport { since, until, from_gateway, .. } = report;
        let known = self.pods.sender(pod, incarnation);
        let period = addition(known.map(|sender| &sender.last), since, until)?;
        let last = known.map(|sender| sender.last);
        let is_latest =
            last.is_none_or(|last| until.as_of_ns >= last.as_of_ns && until.holds_totals_of(&last));
        // What is new happened since the report before, or since a later `since`. A sender that found something that it had
        // missed says so with a `since` before its last one: then what is new is of all that time.
        let from_ns = match known {
            Some(sender) if since.as_of_ns >= sender.since_ns => sender.last.as_of_ns.max(since.as_of_ns),
            _ => since.as_of_ns,
        };
        // The latest report tells the sender's period; one that bridges a gap is corrected by the next. One of no length, as
        // a gateway's first of a key, tells nothing: until the next one any period may be its.
        let length_ns = match until.as_of_ns.saturating_sub(since.as_of_ns) {
            0 => known.map_or(LONGEST_PERIOD_NS / SILENT_PERIODS, |sender| sender.period_ns),
            length_ns => length_ns,
        };
        self.reported(now_ns);
        if !is_latest && period.is_empty() {
            self.pods.heard(pod, incarnation, now_ns);
            return Ok(Recorded::default());
        }
        let highest = last.map_or(*until, |last| last.ceiling(until));
        let latest = last.filter(|_| !is_latest).unwrap_or(*until);
        let Snapshot { in_flight, proxied_in_flight, .. } = latest;
        let now = Sender {
            last: Snapshot { in_flight, proxied_in_flight, ..highest },
            since_ns: since.as_of_ns,
            from_gateway: *from_gateway,
            period_ns: length_ns.clamp(SHORTEST_PERIOD_NS, LONGEST_PERIOD_NS),
            seen_ns: now_ns,
        };
        self.pods.put(pod, incarnation, now);
        // A gateway is in front of all; what it passed on comes to the pods as proxied.
        let (proxied, proxied_ns) =
            if *from_gateway { (0, 0) } else { (period.proxied_requests, period.proxied_request_ns) };
        self.requests_total = self.requests_total.saturating_add(period.requests.saturating_sub(proxied));
        // What took longer than a second goes evenly into the seconds that it took. A sender that does not say since
        // when (0) counts as a second.
        let seconds = match from_ns {
            0 => 1,
            _ => {
                let elapsed_ns = until.as_of_ns.saturating_sub(from_ns);
                (elapsed_ns.saturating_add(SECOND_NS / 2) / SECOND_NS).max(1)
            }
        };
        let a_second = |value: f64| value / seconds as f64;
        let added = PerSecond {
            concurrency: a_second(period.request_ns as f64 / SECOND_NS as f64),
            proxied_concurrency: a_second(proxied_ns as f64 / SECOND_NS as f64),
            requests: a_second(period.requests as f64),
            proxied_requests: a_second(proxied as f64),
        };
        // A gateway's first report of a key counts nothing yet: something in flight is traffic, too.
        let in_flight = is_latest && in_flight > if *from_gateway { 0 } else { proxied_in_flight };
        let woke = self.add(added.own(), seconds, in_flight, now_ns);
        Ok(Recorded { added: (!period.is_empty()).then_some(added), woke })
    }

    /// Adds a stat that came by the stream, at the receiver's unix time `now_ns`. As in Knative proxied is subtracted
    /// whoever sent it, and a stat is of the second in which it arrives.
    ///
    /// # Errors
    /// [`Implausible`]; nothing was changed.
    pub fn record_stat(&mut self, pod: &str, stat: &Stat, now_ns: u64) -> Result<Recorded, Implausible> {
        let added = PerSecond::of(stat)?;
        let own @ [concurrency, requests] = added.own();
        self.reported(now_ns);
        let from_gateway = is_activator(pod);
        self.pods.pod(pod).streamed = Some(Streamed { concurrency, seen_ns: now_ns, from_gateway });
        self.streamed_total += requests;
        let woke = self.add(own, 1, false, now_ns);
        Ok(Recorded { added: Some(added), woke })
    }

    /// Adds to the buckets of so many seconds, the present one being the last. Returns whether the key woke: whether there is
    /// something in it, or in flight, after a stable window without.
    fn add(&mut self, per_second: [f64; 2], seconds: u64, in_flight: bool, now_ns: u64) -> bool {
        let this = now_ns / SECOND_NS;
        for second in (this + 1).saturating_sub(seconds.min(self.stable.seconds() as u64))..=this {
            self.stable.record(second, per_second);
            self.panic.record(second, per_second);
        }
        let traffic = in_flight || per_second.into_iter().any(|value| value > 0.0);
        let woke = traffic && !self.has_traffic(now_ns);
        if traffic {
            self.last_traffic_second = self.last_traffic_second.max(Some(this));
        }
        woke
    }

    /// Whether anything came or was in flight within the stable window.
    fn has_traffic(&self, now_ns: u64) -> bool {
        let second = now_ns / SECOND_NS;
        self.last_traffic_second
            .is_some_and(|last| second.saturating_sub(last) < self.stable.seconds() as u64)
    }

    /// Whether the key should have any pod: it has traffic, or its decider wants one still.
    pub fn is_active(&self, now_ns: u64) -> bool {
        self.has_traffic(now_ns) || self.decision().desired_pods > 0 || self.settings.min_scale > 0
    }

    /// A report or a stat comes. What was decided after a start before the first of them, was decided by nothing.
    fn reported(&mut self, now_ns: u64) {
        self.last_report_ns = self.last_report_ns.max(now_ns);
        if self.first_report_ns.is_none() {
            self.first_report_ns = Some(now_ns);
            self.decided = self.decided.take().filter(|_| self.started_ns.is_none());
        }
    }

    /// Whether the receiver has just started, and senders may be missing of which it will yet hear: then less than there is
    /// must not be said. The others have reported a period after the first, if they can reach the receiver at all; a gateway that
    /// pods had requests from has, within the longest period that there is.
    pub fn is_starting(&self, now_ns: u64) -> bool {
        let Some(started_ns) = self.started_ns.filter(|_| self.decided.is_none()) else { return false };
        let since_ns = now_ns.saturating_sub(self.first_report_ns.unwrap_or(started_ns));
        if since_ns > LONGEST_PERIOD_NS + SECOND_NS {
            return false;
        }
        let reported = self.pods.by_name.values().flat_map(|pod| &pod.reported);
        let live = || reported.clone().filter(|(_, sender)| sender.is_live(now_ns)).map(|(_, sender)| sender);
        let proxied = live().any(|sender| !sender.from_gateway && sender.last.proxied_in_flight > 0);
        if self.first_report_ns.is_none() || (proxied && !live().any(|sender| sender.from_gateway)) {
            return true;
        }
        let longest = live().map(|sender| sender.period_ns).max().unwrap_or(0);
        since_ns < START_NS.max(longest + SECOND_NS)
    }

    /// How many pods the key wants, as of the last decision; `None` where that is not known.
    ///
    /// Traffic that came after it wants one at once. Before the first decision that is all that can be said, and only
    /// where one pod is not less than there may be: after a start, where no pod has reported and one is enough.
    pub fn desired_pods(&self, now_ns: u64) -> Option<u32> {
        let decided_second = self.decided.as_ref().map_or(0, |decided| decided.at_ns / SECOND_NS);
        let woke = self.has_traffic(now_ns) && self.last_traffic_second >= Some(decided_second);
        let at_once = || self.settings.bounded(1);
        match &self.decided {
            Some(Decided { decision, .. }) if woke => Some(decision.desired_pods.max(at_once())),
            Some(Decided { decision, .. }) => Some(decision.desired_pods),
            None if woke && (self.started_ns.is_none() || self.is_one_enough(now_ns)) => Some(at_once()),
            None => None,
        }
    }

    /// Whether gateways alone report, and no more than one pod takes.
    fn is_one_enough(&self, now_ns: u64) -> bool {
        let figures = self.figures(now_ns);
        let load = match self.settings.metric {
            Metric::Concurrency => figures.stable.concurrency.max(figures.in_flight as f64),
            Metric::Rps => figures.stable.requests_per_second,
        };
        figures.pods == 0 && load <= self.settings.decider().target
    }

    /// The metric to scale by, all pods together: the stable average, or the panic one where that is larger in panic.
    pub fn metric(&self, metric: Metric, now_ns: u64) -> f64 {
        let Figures { stable, panic, .. } = self.figures(now_ns);
        let (stable, panic) = (stable.of(metric), panic.of(metric));
        if self.decision().panic_mode { stable.max(panic) } else { stable }
    }

    /// The figures at the receiver's unix time `now_ns`.
    pub fn figures(&self, now_ns: u64) -> Figures {
        let second = now_ns / SECOND_NS;
        let (mut in_flight, mut pods) = (0.0, 0);
        for (live, is_pod) in self.pods.by_name.values().filter_map(|pod| pod.live(now_ns)) {
            in_flight += live;
            pods += u64::from(is_pod);
        }
        // A stat with more proxied requests than requests takes away, as in Knative; what is shown is not below zero.
        let averages = |window: &Window<2>| {
            let [concurrency, requests_per_second] = window.average(second).map(|value| value.max(0.0));
            Averages { concurrency, requests_per_second }
        };
        Figures {
            requests_total: self.requests_total.saturating_add(self.streamed_total.max(0.0).round() as u64),
            in_flight: in_flight.max(0.0).round() as u64,
            pods,
            stable: averages(&self.stable),
            panic: averages(&self.panic),
            last_report_age_ms: (self.last_report_ns > 0)
                .then(|| now_ns.saturating_sub(self.last_report_ns) / 1_000_000),
        }
    }

    /// Decides how many pods the key wants at the receiver's unix time `now_ns`, unless it [is
    /// starting](Self::is_starting); the figures to decide by.
    ///
    /// Ready are the pods that report. Where none does, because a gateway alone tells of the key, the last decision is
    /// taken as done: were it always one pod, panic would never end, and nothing would ever be scaled down. (Knative asks
    /// the endpoints, which nobody has to be for the stats server.)
    pub fn decide(&mut self, now_ns: u64) -> Figures {
        let figures = self.figures(now_ns);
        if self.is_starting(now_ns) {
            return figures;
        }
        let assumed = match figures.pods {
            0 => self.decision().desired_pods,
            reporting => u32::try_from(reporting).unwrap_or(u32::MAX),
        };
        let ready = self.settings.ready_pods.unwrap_or(assumed);
        let metric = self.settings.metric;
        let (stable, panic) = (figures.stable.of(metric), figures.panic.of(metric));
        let decided = self.decided.get_or_insert_with(|| Decided {
            decider: Decider::new(now_ns, ready),
            decision: Decision::default(),
            at_ns: now_ns,
        });
        let seen = Observation { now_ns, ready, stable, panic };
        let wanted = decided.decider.decide(&self.settings.decider(), &seen);
        decided.decision = Decision { desired_pods: self.settings.bounded(wanted.desired_pods), ..wanted };
        decided.at_ns = now_ns;
        figures
    }

    /// The last decision; before the first, none is wanted.
    pub fn decision(&self) -> Decision {
        self.decided.as_ref().map(|decided| decided.decision).unwrap_or_default()
    }

    /// Whether there is a decision.
    pub fn is_decided(&self) -> bool {
        self.decided.is_some()
    }

    /// Forgets senders that have been silent for [`MEMORY_NS`]; of a stat nothing needs to be remembered.
    pub fn forget(&mut self, now_ns: u64) {
        self.pods.forget(now_ns);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(recorded, Recorded { added: None, woke: true });
        assert!(key.is_active(NOW));
        let figures = key.figures(NOW + 59 * S);
        assert_eq!((figures.in_flight, figures.requests_total), (1, 0));
        let next = gateway(at(100, 7, 3, 0), at(101, 9, 5, 1));
        let recorded = key.record("gateway", 1, &next, NOW + S).unwrap();
        assert!(!recorded.woke, "it woke already");
        // The first report comes once more, late: it takes nothing.
        key.record("gateway", 1, &at_once, NOW + S).unwrap();
        let figures = key.figures(NOW + S);
        assert_eq!((figures.requests_total, figures.in_flight, figures.panic.concurrency), (2, 1, 1.0));
        assert_eq!(key.figures(NOW + 11 * S).in_flight, 1);
        assert_eq!(key.figures(NOW + 11 * S + 1).in_flight, 0);
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
            assert!(key.missing_bytes("pod", Some(incarnation)) <= Key::most_missing_bytes("pod"));
            key.record("pod", incarnation, &report(at(1, 0, 0, 0), at(2, 3, 1, 7)), at_ns).unwrap();
        }
        let figures = key.figures(NOW + S);
        assert_eq!((figures.pods, figures.requests_total, figures.in_flight), (1, 60_000, 28));
        // Those of which nobody will hear again went; the last are still known.
        key.record("pod", 19_997, &report(at(1, 0, 0, 0), at(2, 3, 1, 7)), NOW + S).unwrap();
        assert_eq!(key.figures(NOW + S).requests_total, 60_000);
        assert_eq!(key.missing_bytes("pod", Some(19_997)), 0);
        assert_eq!(key.pods.by_name["pod"].reported.capacity(), 4);
        let four = Pods::pod_bytes("pod") + 4 * Pods::INCARNATION_BYTES;
        assert_eq!((key.pods.bytes, key.sender_bytes()), (four, four + Pods::EMPTY_BYTES));
    }

    #[test]
    fn pods_that_are_forgotten_leave_no_memory_behind() {
        let mut key = Key::new(Arc::default());
        for pod in 0..10_000 {
            let name = format!("pod-{pod}");
            let missing = key.missing_bytes(&name, Some(1));
            assert_eq!(missing, Key::most_missing_bytes(&name));
            let before = key.sender_bytes();
            key.record(&name, 1, &report(at(1, 0, 0, 0), at(2, 1, 1, 1)), NOW).unwrap();
            key.record_stat(&name, &stat("", 1.0, 1.0), NOW).unwrap();
            assert_eq!((key.sender_bytes() - before, key.missing_bytes(&name, None)), (missing, 0));
        }
        assert!(key.pods.by_name.allocation_size() <= key.sender_bytes());
        key.forget(NOW + MEMORY_NS);
        assert_eq!((key.senders(), key.sender_bytes()), (0, Pods::EMPTY_BYTES));
        assert!(key.pods.by_name.allocation_size() <= Pods::EMPTY_BYTES + Pods::PLACE_BYTES);
    }

    /// What a gateway says each second: the totals, and what is in flight.
    fn gateway(second: u64, total: &mut u64, concurrency: u32) -> KeyReport {
        let since = at(second, 0, *total, concurrency);
        *total += u64::from(concurrency);
        KeyReport { from_gateway: true, ..report(since, at(second + 1, 0, *total, concurrency)) }
    }

    #[test]
    fn behind_a_gateway_alone_panic_ends_and_pods_go_in_the_end_all_of_them() {
        let told = serde_json::json!({"stable_window": "6s"});
        let mut key = Key::new(Arc::new(KeySettings::default().with(told, 200.0).unwrap()));
        let (mut total, mut counts) = (0, Vec::new());
        for second in 0..60 {
            let concurrency = match second {
                0..9 => 700,
                9..34 => 210,
                _ => 0,
            };
            let now = NOW + second * S;
            key.record("gateway", 1, &gateway(second + 1, &mut total, concurrency), now).unwrap();
            if second % 2 == 0 {
                key.decide(now);
                let Decision { desired_pods, panic_mode, .. } = key.decision();
                counts.push((desired_pods, panic_mode));
            }
        }
        let at = |second: usize| counts[second / 2];
        assert_eq!(at(4), (10, true));
        assert_eq!(at(32), (3, false), "{counts:?}");
        assert_eq!(at(58), (0, false), "{counts:?}");
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
        let told = |json| Arc::new(KeySettings::default().with(json, 200.0).unwrap());
        let said = |key: &Key| (key.desired_pods(NOW), key.is_active(NOW));
        let of_gateway = |concurrency| gateway(1, &mut 0, concurrency);
        for (concurrency, json, desired) in [
            (1, serde_json::json!({}), Some(1)),
            (1, serde_json::json!({"min_scale": 3}), Some(3)),
            // More than one pod takes: as if one were enough, that must not be said.
            (71, serde_json::json!({}), None),
        ] {
            let mut key = Key::new(told(json)).after_start(NOW);
            key.record("gateway", 1, &of_gateway(concurrency), NOW).unwrap();
            assert_eq!(said(&key), (desired, true), "{concurrency}");
        }
        // Where the server was there, whoever reports is all that there is; and no decision is waited for.
        let mut key = Key::new(Arc::default());
        key.record("pod", 1, &report(at(1, 0, 0, 0), at(2, 0, 0, 0)), NOW - 60 * S).unwrap();
        key.decide(NOW - 60 * S);
        assert_eq!(said(&key), (Some(0), false));
        key.record("pod", 1, &report(at(2, 0, 0, 0), at(3, 1, 1, 1)), NOW).unwrap();
        assert_eq!(said(&key), (Some(1), true));
    }

    #[test]
    fn no_key_wants_more_than_a_million_pods() {
        let told =
            serde_json::json!({"target": 0.01, "max_scale_up_rate": 1e30, "activation_scale": 1_000_000});
        let mut key = Key::new(Arc::new(KeySettings::default().with(told, 200.0).unwrap()));
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
        assert_eq!(key.record_stat("activator", &stat("", 0.0, -1.01), NOW), Err(Implausible));
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
        assert_eq!((key.senders(), key.pods.bytes), (0, 0));
    }

    #[test]
    fn a_stat_that_nobody_can_have_measured_changes_nothing() {
        let mut key = Key::new(Arc::default());
        for wrong in [f64::NAN, f64::INFINITY, -2.0, 1e300] {
            assert_eq!(key.record_stat("p", &stat("p", wrong, 0.0), NOW), Err(Implausible));
            assert_eq!(key.record_stat("p", &stat("p", 0.0, wrong), NOW), Err(Implausible));
        }
        assert_eq!((key.figures(NOW).pods, key.figures(NOW).last_report_age_ms), (0, None));
    }

    #[test]
    fn a_key_wakes_with_its_first_traffic_in_a_stable_window() {
        let mut key = Key::new(Arc::default());
        let mut at = |second: u64, requests| {
            let recorded = key.record_stat("p", &stat("p", 0.0, requests), NOW + second * S).unwrap();
            (recorded.woke, key.is_active(NOW + second * S))
        };
        assert_eq!([at(0, 0.0), at(1, 1.0), at(2, 1.0)], [(false, false), (true, true), (false, true)]);
        assert_eq!([at(61, 0.0), at(62, 0.0), at(63, 1.0)], [(false, true), (false, false), (true, true)]);
    }

    #[test]
    fn other_settings_keep_what_the_windows_hold() {
        let mut key = Key::new(Arc::default());
        for n in 0..10 {
            key.record_stat("p", &stat("p", 4.0, 300.0), NOW + n * S).unwrap();
        }
        let told = serde_json::json!({"metric": "rps", "stable_window": "30s", "min_scale": 3, "ready_pods": 1,
            "target": 100, "target_utilization_percentage": 100});
        key.apply(Arc::new(KeySettings::default().with(told, 200.0).unwrap()));
        assert_eq!(
            key.figures(NOW + 9 * S).stable,
            Averages { concurrency: 4.0, requests_per_second: 300.0 }
        );
        key.decide(NOW + 9 * S);
        assert_eq!((key.decision().desired_pods, key.metric(Metric::Rps, NOW + 9 * S)), (3, 300.0));
        assert!(key.is_active(NOW + 9000 * S), "it never goes below min_scale");
    }
}
