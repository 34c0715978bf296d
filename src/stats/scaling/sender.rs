//! The senders of one key: the pods and gateways that report it, or stream stats of it.

use std::fmt;
use std::hash::RandomState;

use hashbrown::HashMap;
use hashbrown::hash_map::EntryRef;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::counting::snapshot::Snapshot;
use crate::protocol::stat::Stat;
use crate::scaling::exact_sum::ExactSum;
use crate::scaling::memory::heap_bytes;
use crate::scaling::mismatch::GatewayRequests;
use crate::scaling::windows::Held;

const SECOND_NS: u64 = 1_000_000_000;
/// A sender with a longer period leaves seconds without a record between its reports.
const LONG_PERIOD_NS: u64 = 3 * SECOND_NS / 2;
/// A sender that has not reported for this many of its periods no longer counts.
pub const SILENT_PERIODS: u64 = 10;
/// How long the last snapshot of a silent sender is kept, so that a report whose acknowledgement
/// was lost is recognised when it is sent again.
pub const RETENTION_NS: u64 = 15 * 60 * SECOND_NS;
/// A stat does not contain its sender's period; Knative's is a second.
const STAT_PERIOD_NS: u64 = SECOND_NS;
/// The incarnations that are kept of a sender: one that ends, one that begins, and as many again.
pub(super) const MAX_INCARNATIONS: usize = 4;
/// No sender has so many requests in a second.
const MAX_PER_SECOND: f64 = 1e9;
/// A negative count takes back a request that was counted too early: Knative's activator reports 1
/// for a key's first request at once, and one less at its next tick, although that request may
/// already have been the last.
const MAX_TAKEN_BACK: f64 = 1.0;

/// A stat whose numbers are not finite, or out of all proportion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImplausibleStat;

impl fmt::Display for ImplausibleStat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number of the stat is not finite, or out of all proportion")
    }
}

impl std::error::Error for ImplausibleStat {}

/// What a sender adds per second; its bucket in the windows gets this.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PerSecond {
    /// Requests in flight, on average.
    pub concurrency: f64,
    /// Of these, proxied ones; always 0 for a gateway, which is in front of all.
    pub proxied_concurrency: f64,
    /// Requests that came in.
    pub requests: f64,
    /// Of these, proxied ones.
    pub proxied_requests: f64,
}

impl TryFrom<&Stat> for PerSecond {
    type Error = ImplausibleStat;

    fn try_from(stat: &Stat) -> Result<Self, ImplausibleStat> {
        let per_second = Self {
            concurrency: stat.average_concurrent_requests,
            proxied_concurrency: stat.average_proxied_concurrent_requests,
            requests: stat.request_count,
            proxied_requests: stat.proxied_request_count,
        };
        let Self { concurrency, proxied_concurrency, requests, proxied_requests } = per_second;
        let fits = |value: f64| (0.0..=MAX_PER_SECOND).contains(&value);
        let plausible = fits(concurrency)
            && fits(proxied_concurrency)
            && (-MAX_TAKEN_BACK..=MAX_PER_SECOND).contains(&requests)
            && fits(proxied_requests);
        if plausible { Ok(per_second) } else { Err(ImplausibleStat) }
    }
}

impl PerSecond {
    /// Returns concurrency and requests without those that a gateway has counted already.
    pub(super) fn unproxied(&self) -> [f64; 2] {
        [self.concurrency - self.proxied_concurrency, self.requests - self.proxied_requests]
    }
}

/// Returns whether a sender of stats is an activator instead of a pod. A stat does not contain
/// that; the sender's name does (as in older Knative's `pkg/autoscaler`, which distinguished them
/// by this prefix).
pub fn is_activator(pod_name: &str) -> bool {
    pod_name.starts_with("activator")
}

/// [`PerSecond`] as it is kept of each sender.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Rates {
    concurrency: f32,
    proxied_concurrency: f32,
    requests: f32,
    proxied_requests: f32,
}

impl From<PerSecond> for Rates {
    fn from(per_second: PerSecond) -> Self {
        let PerSecond { concurrency, proxied_concurrency, requests, proxied_requests } = per_second;
        Self {
            concurrency: concurrency as f32,
            proxied_concurrency: proxied_concurrency as f32,
            requests: requests as f32,
            proxied_requests: proxied_requests as f32,
        }
    }
}

impl Rates {
    pub(super) fn is_zero(self) -> bool {
        self == Self::default()
    }

    fn has_proxied(&self) -> bool {
        self.proxied_concurrency > 0.0 || self.proxied_requests > 0.0
    }

    fn unproxied(&self) -> [f64; 2] {
        let Self { concurrency, proxied_concurrency, requests, proxied_requests } = *self;
        [
            f64::from(concurrency) - f64::from(proxied_concurrency),
            f64::from(requests) - f64::from(proxied_requests),
        ]
    }
}

/// One life of a sender, in which its counters never decrease.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Incarnation {
    pub(super) id: u64,
    /// The highest totals that it has reported, and what was in flight at the latest instant.
    pub(super) last: Snapshot,
    /// The instant that its last report began at.
    pub(super) since_ns: u64,
    pub(super) from_gateway: bool,
    pub(super) period_ns: u64,
    pub(super) seen_ns: u64,
    /// The averages over its latest report.
    pub(super) rates: Rates,
    /// Whether its latest report was its last word: shorter than the ones before, and nothing was in
    /// flight any more.
    pub(super) has_ended: bool,
    pub(super) early: Early,
    /// Its requests at the beginning of the present window of [`crate::scaling::mismatch`].
    pub(super) window_requests: u64,
}

/// What was forwarded of a request before any time had passed, and is taken off the next stat.
/// Knative's activator does the same: its autoscaler reacts at once only to an average above 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Early {
    /// Nothing.
    #[default]
    Nothing,
    /// A concurrency of 1; the report had the request itself.
    Concurrency,
    /// A concurrency of 1, and a request that the next report has.
    Request,
}

impl Early {
    /// Returns what to forward of a first report of no length, and what of it was early.
    pub(super) fn say(added: PerSecond) -> (PerSecond, Self) {
        let early = if added.requests < 1.0 { Self::Request } else { Self::Concurrency };
        (PerSecond { concurrency: 1.0, requests: added.requests.max(1.0), ..added }, early)
    }

    /// Returns what is left to forward of the next report, which covers so many seconds.
    pub(super) fn take_off(self, added: PerSecond, seconds: u64) -> PerSecond {
        let (concurrency, requests) = match self {
            Self::Nothing => return added,
            Self::Concurrency => (1.0, 0.0),
            Self::Request => (1.0, 1.0),
        };
        let seconds = seconds as f64;
        PerSecond {
            concurrency: (added.concurrency - concurrency / seconds).max(0.0),
            requests: added.requests - requests / seconds,
            ..added
        }
    }
}

/// When a sender was heard last, and how often it reports.
#[derive(Clone, Copy, Debug)]
struct LastSeen {
    at_ns: u64,
    period_ns: u64,
}

impl LastSeen {
    /// Returns up to when the sender counts.
    fn live_until_ns(self) -> u64 {
        self.at_ns.saturating_add(self.period_ns.saturating_mul(SILENT_PERIODS))
    }

    fn is_live(self, now_ns: u64) -> bool {
        now_ns <= self.live_until_ns()
    }

    /// Returns whether the next report is not overdue, by up to a second.
    fn is_expected(self, now_ns: u64) -> bool {
        now_ns.saturating_sub(self.at_ns) <= self.period_ns.saturating_add(SECOND_NS)
    }

    /// Returns whether reports are further apart than the seconds of the windows.
    fn has_long_period(self) -> bool {
        self.period_ns > LONG_PERIOD_NS
    }

    /// Returns whether the sender is taken to be there: it reports in time, or the windows still show
    /// something of it.
    fn is_heard(self, now_ns: u64, window_ns: u64) -> bool {
        // The rates of a long period are held until its end.
        let held_ns = if self.has_long_period() { self.period_ns } else { 0 };
        let shown_until_ns = self.at_ns.saturating_add(held_ns);
        let lacking = (now_ns / SECOND_NS).saturating_sub(shown_until_ns / SECOND_NS);
        self.is_live(now_ns) && (self.is_expected(now_ns) || lacking < window_ns / SECOND_NS)
    }
}

impl Incarnation {
    fn last_seen(&self) -> LastSeen {
        LastSeen { at_ns: self.seen_ns, period_ns: self.period_ns }
    }

    pub(super) fn is_live(&self, now_ns: u64) -> bool {
        self.last_seen().is_live(now_ns)
    }

    /// Returns whether its reports are further apart than the seconds of the windows.
    pub(super) fn has_long_period(&self) -> bool {
        self.last_seen().has_long_period()
    }

    /// Returns the rates that count until its next report is due, a second late at most. A sender
    /// with a short period has none: its seconds are recorded as they come.
    fn held(&self) -> Option<Held<2>> {
        let values = self.rates.unproxied();
        let is_held = self.has_long_period() && values.iter().any(|value| *value != 0.0);
        is_held.then(|| Held {
            after: self.seen_ns / SECOND_NS,
            until: self.seen_ns.saturating_add(self.period_ns) / SECOND_NS + 1,
            values,
        })
    }
}

/// The last stat that a sender streamed.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Streamed {
    /// Without proxied requests.
    pub(super) concurrency: f64,
    pub(super) proxied_concurrency: f32,
    /// Requests that came in, proxied ones included.
    pub(super) requests: f32,
    pub(super) seen_ns: u64,
    pub(super) from_gateway: bool,
}

impl Streamed {
    fn last_seen(&self) -> LastSeen {
        LastSeen { at_ns: self.seen_ns, period_ns: STAT_PERIOD_NS }
    }
}

/// One pod, or one gateway.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Sender {
    /// Seldom more than one, never more than [`MAX_INCARNATIONS`].
    pub(super) incarnations: Vec<Incarnation>,
    pub(super) streamed: Option<Streamed>,
}

/// What an incarnation, a stat, or all of them show of a sender.
#[derive(Clone, Copy, Debug)]
struct Part {
    in_flight: f64,
    proxied_in_flight: f64,
    concurrency: f64,
    proxied_concurrency: f64,
    /// Proxied ones included.
    requests: f64,
    from_gateway: bool,
    /// Whether there was traffic by this word that no gateway counts.
    has_traffic: bool,
    /// Whether there was traffic that a gateway counts.
    has_proxied: bool,
    seen: LastSeen,
}

impl Incarnation {
    fn part(&self) -> Part {
        let Self { last, from_gateway, .. } = *self;
        // A gateway is in front of all: what it passed on is not proxied to it.
        let proxied = if from_gateway { 0 } else { last.proxied_in_flight };
        let unproxied = self.rates.unproxied().into_iter().any(|rate| rate > 0.0);
        Part {
            in_flight: last.in_flight.saturating_sub(proxied).into(),
            proxied_in_flight: proxied.into(),
            concurrency: self.rates.unproxied()[0],
            proxied_concurrency: self.rates.proxied_concurrency.into(),
            requests: self.rates.requests.into(),
            from_gateway,
            has_traffic: last.in_flight > proxied || (unproxied && !self.has_ended),
            has_proxied: proxied > 0 || (!from_gateway && self.rates.has_proxied() && !self.has_ended),
            seen: self.last_seen(),
        }
    }
}

impl Streamed {
    fn part(&self) -> Part {
        let Self { concurrency, proxied_concurrency, requests, from_gateway, .. } = *self;
        Part {
            in_flight: concurrency,
            proxied_in_flight: proxied_concurrency.into(),
            concurrency,
            proxied_concurrency: proxied_concurrency.into(),
            requests: requests.into(),
            from_gateway,
            has_traffic: concurrency > 0.0,
            has_proxied: proxied_concurrency > 0.0,
            seen: self.last_seen(),
        }
    }
}

impl Sender {
    fn parts(&self) -> impl Iterator<Item = Part> {
        self.incarnations.iter().map(Incarnation::part).chain(self.streamed.iter().map(Streamed::part))
    }

    /// Returns when the sender was heard last, as unix time in nanoseconds.
    fn latest_ns(&self) -> u64 {
        self.parts().map(|part| part.seen.at_ns).max().unwrap_or(0)
    }

    /// Returns the sum of what is live.
    fn live(&self, now_ns: u64) -> Option<Part> {
        self.parts().filter(|part| part.seen.is_live(now_ns)).reduce(|sum, part| Part {
            in_flight: sum.in_flight + part.in_flight,
            proxied_in_flight: sum.proxied_in_flight + part.proxied_in_flight,
            concurrency: sum.concurrency + part.concurrency,
            proxied_concurrency: sum.proxied_concurrency + part.proxied_concurrency,
            requests: sum.requests + part.requests,
            from_gateway: sum.from_gateway && part.from_gateway,
            ..sum
        })
    }

    /// Returns what the sender shows: the sum of what is live, or, if it is silent, what it showed
    /// last.
    fn figures(&self, name: &str, now_ns: u64) -> Option<SenderFigures> {
        let latest = self.parts().max_by_key(|part| part.seen.at_ns)?;
        let live = self.live(now_ns);
        let Part { in_flight, proxied_in_flight, concurrency, .. } = live.unwrap_or(latest);
        Some(SenderFigures {
            name: name.to_owned(),
            role: if latest.from_gateway { Role::Gateway } else { Role::Pod },
            is_live: live.is_some(),
            in_flight: rounded(in_flight),
            proxied_in_flight: rounded(proxied_in_flight),
            average_concurrency: concurrency.max(0.0),
            last_report_age_ms: now_ns.saturating_sub(latest.seen.at_ns) / 1_000_000,
        })
    }
}

/// Returns what is shown of a number of requests, which is never negative.
fn rounded(requests: f64) -> u64 {
    requests.max(0.0).round() as u64
}

/// What a sender is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It serves the key's requests.
    Pod,
    /// It is in front of the pods.
    Gateway,
}

/// What is known of one sender of a key at one time.
#[derive(Clone, Debug, PartialEq)]
pub struct SenderFigures {
    /// The pod's or the gateway's name.
    pub name: String,
    /// By its latest report.
    pub role: Role,
    /// Whether it counts: it has reported within ten of its periods.
    pub is_live: bool,
    /// Requests in flight as of its last report, proxied ones subtracted.
    pub in_flight: u64,
    /// Proxied requests in flight.
    pub proxied_in_flight: u64,
    /// The average over its last report, proxied requests subtracted.
    pub average_concurrency: f64,
    /// Milliseconds since its last report.
    pub last_report_age_ms: u64,
}

/// What one live pod has, all its requests included, whoever else counts them.
#[derive(Clone, Debug, PartialEq)]
pub struct PodFigures {
    /// The pod's name.
    pub name: String,
    /// Requests in flight, on average over its last report.
    pub concurrency: f64,
    /// Requests that came in per second, over its last report.
    pub requests_per_second: f64,
    /// Requests in flight as of its last report.
    pub in_flight: f64,
}

/// Some senders of a key, in order of their names.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SenderPage {
    /// The senders.
    pub senders: Vec<SenderFigures>,
    /// How many there are in all.
    pub found: usize,
    /// Whether more follow.
    pub has_more: bool,
}

/// What all live senders of a key show.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Live {
    /// Without proxied requests.
    pub(super) in_flight: f64,
    pub(super) pods: u64,
    pub(super) gateways: u64,
    /// Both; a sender may be either at once.
    pub(super) senders: u64,
    /// Whether anything is in flight, proxied or not.
    pub(super) is_busy: bool,
    /// Whether the report of any is overdue that had traffic by its last word.
    pub(super) is_overdue: bool,
    /// Whether rates of any sender may be [held](Senders::held).
    pub(super) has_long_periods: bool,
}

/// A key's senders by name, and the memory that they take.
#[derive(Clone, Debug, Default)]
pub(super) struct Senders {
    pub(super) by_name: HashMap<Box<str>, Sender, RandomState>,
    pub(super) bytes: usize,
}

/// In order of their names: the same senders are the same bytes.
impl Serialize for Senders {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut senders: Vec<(&str, &Sender)> =
            self.by_name.iter().map(|(name, sender)| (&**name, sender)).collect();
        senders.sort_unstable_by_key(|(name, _)| *name);
        senders.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Senders {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut senders = Self::default();
        for (name, mut sender) in Vec::<(Box<str>, Sender)>::deserialize(deserializer)? {
            sender.incarnations.truncate(MAX_INCARNATIONS);
            sender.incarnations.shrink_to_fit();
            senders.bytes += Self::sender_bytes(&name) + sender.incarnations.len() * Self::INCARNATION_BYTES;
            senders.by_name.insert(name, sender);
        }
        Ok(senders)
    }
}

impl Senders {
    /// A bucket of the map, which is at least 7/16 full once it has grown, and a control byte.
    pub(super) const BUCKET_BYTES: usize = (size_of::<(Box<str>, Sender)>() + 1) * 16 / 7;
    /// What the smallest map takes beyond its first bucket.
    pub(super) const EMPTY_BYTES: usize = 4 * size_of::<(Box<str>, Sender)>();
    pub(super) const INCARNATION_BYTES: usize = size_of::<Incarnation>() + 16;

    /// Returns what a sender takes without its incarnations.
    pub(super) fn sender_bytes(name: &str) -> usize {
        Self::BUCKET_BYTES + heap_bytes(name.len())
    }

    /// Returns what a report, or (without an incarnation) a stat would take that is not taken yet.
    pub(super) fn additional_bytes(&self, name: &str, incarnation: Option<u64>) -> usize {
        let sender = self.by_name.get(name);
        let known = sender.map_or(&[][..], |sender| &sender.incarnations);
        let is_new = incarnation
            .is_some_and(|id| known.len() < MAX_INCARNATIONS && !known.iter().any(|known| known.id == id));
        let of_sender = if sender.is_none() { Self::sender_bytes(name) } else { 0 };
        of_sender + if is_new { Self::INCARNATION_BYTES } else { 0 }
    }

    pub(super) fn incarnation(&self, name: &str, id: u64) -> Option<&Incarnation> {
        self.by_name.get(name)?.incarnations.iter().find(|incarnation| incarnation.id == id)
    }

    /// Returns all incarnations that have reported, of all senders.
    pub(super) fn incarnations(&self) -> impl Iterator<Item = &Incarnation> + Clone {
        self.by_name.values().flat_map(|sender| &sender.incarnations)
    }

    /// Returns what all live senders show.
    pub(super) fn live(&self, now_ns: u64) -> Live {
        let (mut live, mut in_flight) = (Live::default(), ExactSum::default());
        for sender in self.by_name.values() {
            let (mut is_pod, mut is_gateway) = (false, false);
            live.has_long_periods |= sender.incarnations.iter().any(Incarnation::has_long_period);
            for part in sender.parts().filter(|part| part.seen.is_live(now_ns)) {
                in_flight.add(part.in_flight);
                live.is_overdue |= part.has_traffic && !part.seen.is_expected(now_ns);
                live.is_busy |= part.in_flight > 0.0 || part.proxied_in_flight > 0.0;
                is_pod |= !part.from_gateway;
                is_gateway |= part.from_gateway;
            }
            live.pods += u64::from(is_pod);
            live.gateways += u64::from(is_gateway);
            live.senders += u64::from(is_pod || is_gateway);
        }
        Live { in_flight: in_flight.value(), ..live }
    }

    /// Returns when the senders fell silent whose traffic nobody reports any more; `None` if there are
    /// none. The windows of the key have so many seconds, and the last report with traffic came at
    /// `traffic_ns`.
    ///
    /// A sender that falls silent although it had traffic is taken to be gone, and its traffic to be
    /// with the others, if any of them has traffic after that. (Pods crash.) A gateway is not, as long
    /// as pods have traffic that a gateway counts, and no gateway reports it.
    pub(super) fn vanished(&self, now_ns: u64, window_ns: u64, traffic_ns: u64) -> Option<u64> {
        let (mut has_gateway, mut is_going_on, mut is_passed_on) = (false, false, false);
        // When those fell silent whose last word had traffic, proxied traffic, or who were gateways.
        let (mut busy, mut proxied, mut gateway) = (None, None, None);
        for sender in self.by_name.values() {
            let heard = || sender.parts().filter(|part| part.seen.is_heard(now_ns, window_ns));
            if heard().next().is_some() {
                has_gateway |= heard().any(|part| part.from_gateway);
                is_going_on |= heard().any(|part| part.has_traffic);
                is_passed_on |= heard().any(|part| part.has_proxied);
                continue;
            }
            let latest_ns = sender.latest_ns();
            for part in sender.parts().filter(|part| part.seen.is_live(latest_ns)) {
                let since_ns = Some(part.seen.at_ns);
                let was_last = part.seen.is_live(traffic_ns);
                busy = busy.max(since_ns.filter(|_| part.has_traffic && was_last));
                proxied = proxied.max(since_ns.filter(|_| part.has_proxied && was_last));
                gateway = gateway.max(since_ns.filter(|_| part.has_traffic && part.from_gateway));
            }
        }
        // A gateway that reports vouches for what it passes on.
        match (has_gateway, is_passed_on) {
            (false, true) => gateway,
            _ if is_going_on => None,
            (true, _) => busy,
            (false, false) => busy.max(proxied),
        }
    }

    /// Returns how many senders have reported at a time or since.
    pub(super) fn heard_since(&self, since_ns: u64) -> u64 {
        self.by_name.values().filter(|sender| sender.latest_ns() >= since_ns).count() as u64
    }

    /// Returns the rates that count until the next reports of their senders are due.
    pub(super) fn held(&self) -> impl Iterator<Item = Held<2>> + Clone {
        self.incarnations().filter_map(Incarnation::held)
    }

    /// Returns what each live pod has, in order of their names.
    pub(super) fn pods(&self, now_ns: u64) -> Vec<PodFigures> {
        let live = self.by_name.iter().filter_map(|(name, sender)| {
            let part = sender.live(now_ns).filter(|part| !part.from_gateway)?;
            Some(PodFigures {
                name: name.to_string(),
                concurrency: (part.concurrency + part.proxied_concurrency).max(0.0),
                requests_per_second: part.requests.max(0.0),
                in_flight: (part.in_flight + part.proxied_in_flight).max(0.0),
            })
        });
        let mut pods: Vec<PodFigures> = live.collect();
        pods.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        pods
    }

    /// Returns what live gateways reported since the last call.
    pub(super) fn take_gateway_requests(&mut self, now_ns: u64) -> GatewayRequests {
        let mut requests = GatewayRequests { gateways: self.live(now_ns).gateways, ..Default::default() };
        for incarnation in self.by_name.values_mut().flat_map(|sender| &mut sender.incarnations) {
            if incarnation.from_gateway && incarnation.is_live(now_ns) {
                let total = incarnation.last.requests;
                let more = total.saturating_sub(std::mem::replace(&mut incarnation.window_requests, total));
                requests.all = requests.all.saturating_add(more);
                requests.busiest = requests.busiest.max(more);
            }
        }
        requests
    }

    /// Returns the first `limit` senders whose names come after `after`, silent ones included.
    pub(super) fn page(&self, after: &str, limit: usize, now_ns: u64) -> SenderPage {
        let mut follow: Vec<(&str, &Sender)> = self
            .by_name
            .iter()
            .map(|(name, sender)| (&**name, sender))
            .filter(|(name, _)| *name > after)
            .collect();
        let has_more = follow.len() > limit;
        if has_more {
            follow.select_nth_unstable_by_key(limit, |(name, _)| *name);
            follow.truncate(limit);
        }
        follow.sort_unstable_by_key(|(name, _)| *name);
        let senders = follow.into_iter().filter_map(|(name, sender)| sender.figures(name, now_ns)).collect();
        SenderPage { senders, found: self.by_name.len(), has_more }
    }

    /// Stores what an incarnation reported. If there are too many, the one that was silent for
    /// longest is replaced.
    pub(super) fn store(&mut self, name: &str, now: Incarnation) {
        let incarnations = &mut self.sender_mut(name).incarnations;
        if let Some(known) = incarnations.iter_mut().find(|known| known.id == now.id) {
            *known = now;
        } else if incarnations.len() < MAX_INCARNATIONS {
            incarnations.reserve_exact(1);
            incarnations.push(now);
            self.bytes += Self::INCARNATION_BYTES;
        } else if let Some(oldest) = incarnations.iter_mut().min_by_key(|known| known.seen_ns) {
            *oldest = now;
        }
    }

    /// Notes that an incarnation reported, although nothing new.
    pub(super) fn touch(&mut self, name: &str, id: u64, now_ns: u64) {
        let incarnations = self.by_name.get_mut(name).map_or(&mut [][..], |sender| &mut sender.incarnations);
        if let Some(incarnation) = incarnations.iter_mut().find(|incarnation| incarnation.id == id) {
            incarnation.seen_ns = now_ns;
        }
    }

    /// Returns a sender by its name, which is copied only the first time.
    pub(super) fn sender_mut(&mut self, name: &str) -> &mut Sender {
        let Self { by_name, bytes } = self;
        match by_name.entry_ref(name) {
            EntryRef::Occupied(sender) => sender.into_mut(),
            EntryRef::Vacant(bucket) => {
                *bytes += Self::sender_bytes(name);
                bucket.insert_with_key(name.into(), Sender::default())
            }
        }
    }

    /// Forgets incarnations that have been silent for [`RETENTION_NS`]; of a stat nothing needs to
    /// be remembered.
    pub(super) fn forget(&mut self, now_ns: u64) {
        let mut bytes = 0;
        self.by_name.retain(|name, sender| {
            sender.incarnations.retain(|known| now_ns.saturating_sub(known.seen_ns) < RETENTION_NS);
            sender.incarnations.shrink_to_fit();
            sender.streamed = sender.streamed.filter(|streamed| streamed.last_seen().is_live(now_ns));
            let is_kept = !sender.incarnations.is_empty() || sender.streamed.is_some();
            if is_kept {
                bytes += Self::sender_bytes(name) + sender.incarnations.len() * Self::INCARNATION_BYTES;
            }
            is_kept
        });
        self.bytes = bytes;
        // A map keeps its buckets. Those that are counted for a sender are enough for one 7/16
        // full.
        if self.by_name.capacity() > self.by_name.len() * 2 {
            self.by_name.shrink_to(self.by_name.len());
        }
    }
}
