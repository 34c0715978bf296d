//! The receiver's side: what a report adds to what is already known of a key.
//!
//! A sender's counters are cumulative, so the receiver keeps each sender's last snapshot and adds
//! differences. Whatever is repeated, late or overlapping, adds only what was not added before.

use std::collections::HashMap;

use crate::decider::{Decider, Decision, Observation, Settings};
use crate::{KeyReport, Period, Snapshot, window::Window};

const SECOND_NS: u64 = 1_000_000_000;
/// A sender that has not reported for this many of its periods no longer counts.
pub const SILENT_PERIODS: u64 = 10;
/// How long the last snapshot of a silent sender is kept, so that a report whose acknowledgement was
/// lost is recognised when it comes again.
pub const MEMORY_NS: u64 = 15 * 60 * SECOND_NS;
const SHORTEST_PERIOD_NS: u64 = SECOND_NS / 10;
const LONGEST_PERIOD_NS: u64 = 60 * SECOND_NS;

/// A report whose counters went back although its incarnation is the one already known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WentBack;

impl std::fmt::Display for WentBack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the counters went back under the same incarnation")
    }
}

/// What `since..until` adds for a sender of whom `known` is the last snapshot; `None` if nothing.
///
/// # Errors
/// [`WentBack`].
pub fn addition(
    known: Option<&Snapshot>,
    since: &Snapshot,
    until: &Snapshot,
) -> Result<Option<Period>, WentBack> {
    // A `since` ahead of what is known was acknowledged by another receiver: not ours to add.
    let base = match known {
        Some(known) if known.as_of_ns > since.as_of_ns => known,
        _ => since,
    };
    if until.as_of_ns <= base.as_of_ns && known.is_some() {
        return Ok(None);
    }
    until.since(base).map(Some).ok_or(WentBack)
}

/// Both windows of one quantity.
#[derive(Clone, Debug)]
struct Pair {
    stable: Window,
    panic: Window,
}

impl Pair {
    fn new(sizes: WindowSizes) -> Self {
        Self { stable: Window::new(sizes.stable_seconds), panic: Window::new(sizes.panic_seconds) }
    }

    fn record(&mut self, second: u64, value: f64) {
        self.stable.record(second, value);
        self.panic.record(second, value);
    }
}

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
    last: Snapshot,
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
    /// Since the last report of any sender, in milliseconds.
    pub last_report_age_ms: u64,
}

/// One key, as its senders' reports make it.
#[derive(Clone, Debug)]
pub struct Key {
    requests_total: u64,
    concurrency: Pair,
    requests: Pair,
    senders: HashMap<(String, u64), Sender>,
    last_report_ns: u64,
    decider: Option<Decider>,
    decision: Decision,
}

impl Key {
    /// A key of which nothing is known yet.
    pub fn new(sizes: WindowSizes) -> Self {
        Self {
            requests_total: 0,
            concurrency: Pair::new(sizes),
            requests: Pair::new(sizes),
            senders: HashMap::new(),
            last_report_ns: 0,
            decider: None,
            decision: Decision::default(),
        }
    }

    /// Whether [`Key::record`] would take the report.
    ///
    /// # Errors
    /// [`WentBack`].
    pub fn check(&self, pod: &str, incarnation: u64, report: &KeyReport) -> Result<(), WentBack> {
        let known = self.senders.get(&(pod.to_owned(), incarnation)).map(|sender| &sender.last);
        addition(known, &report.since, &report.until).map(|_| ())
    }

    /// Adds what a report says and was not known, at the receiver's unix time `now_ns`.
    ///
    /// # Errors
    /// [`WentBack`]; nothing was changed.
    pub fn record(
        &mut self,
        pod: &str,
        incarnation: u64,
        report: &KeyReport,
        now_ns: u64,
    ) -> Result<(), WentBack> {
        let sender_key = (pod.to_owned(), incarnation);
        let known = self.senders.get(&sender_key);
        let added = addition(known.map(|sender| &sender.last), &report.since, &report.until)?;
        self.last_report_ns = self.last_report_ns.max(now_ns);
        let Some(period) = added else {
            if let Some(sender) = self.senders.get_mut(&sender_key) {
                sender.seen_ns = now_ns;
            }
            return Ok(());
        };
        // The latest report tells the sender's period; one that bridges a gap is corrected by the next. A gateway's
        // first one leaves at once and tells nothing: until the next one any period may be its.
        let period_ns = match known {
            None if report.from_gateway => LONGEST_PERIOD_NS / SILENT_PERIODS,
            _ => report.until.as_of_ns.saturating_sub(report.since.as_of_ns),
        };
        let period_ns = period_ns.clamp(SHORTEST_PERIOD_NS, LONGEST_PERIOD_NS);
        self.senders.insert(
            sender_key,
            Sender { last: report.until, from_gateway: report.from_gateway, period_ns, seen_ns: now_ns },
        );
        // A gateway is in front of all; what it passed on comes to the pods as proxied.
        let (requests, request_ns) = if report.from_gateway {
            (period.requests, period.request_ns)
        } else {
            (
                period.requests - period.proxied_requests.min(period.requests),
                period.request_ns.saturating_sub(period.proxied_request_ns),
            )
        };
        self.requests_total = self.requests_total.saturating_add(requests);
        self.spread(&period, report.since.as_of_ns == 0, requests, request_ns, now_ns);
        Ok(())
    }

    /// Into the bucket of the present second; what took longer than a second, evenly into the
    /// seconds that it took. A sender that does not say since when (0) counts as a second.
    fn spread(&mut self, period: &Period, unknown_start: bool, requests: u64, request_ns: u128, now_ns: u64) {
        let seconds =
            if unknown_start { 1 } else { period.elapsed_ns.saturating_add(SECOND_NS / 2) / SECOND_NS }
                .max(1);
        let concurrency = request_ns as f64 / SECOND_NS as f64 / seconds as f64;
        let per_second = requests as f64 / seconds as f64;
        let this = now_ns / SECOND_NS;
        let kept = seconds.min(self.concurrency.stable.seconds() as u64);
        for second in (this + 1).saturating_sub(kept)..=this {
            self.concurrency.record(second, concurrency);
            self.requests.record(second, per_second);
        }
    }

    /// The figures at the receiver's unix time `now_ns`.
    pub fn figures(&self, now_ns: u64) -> Figures {
        let second = now_ns / SECOND_NS;
        let live = || self.senders.iter().filter(|(_, sender)| sender.is_live(now_ns));
        let in_flight = live()
            .map(|(_, sender)| {
                let proxied = if sender.from_gateway { 0 } else { sender.last.proxied_in_flight };
                u64::from(sender.last.in_flight.saturating_sub(proxied))
            })
            .sum();
        let mut pods: Vec<&str> =
            live().filter(|(_, s)| !s.from_gateway).map(|((pod, _), _)| pod.as_str()).collect();
        pods.sort_unstable();
        pods.dedup();
        Figures {
            requests_total: self.requests_total,
            in_flight,
            pods: pods.len() as u64,
            stable: Averages {
                concurrency: self.concurrency.stable.average(second),
                requests_per_second: self.requests.stable.average(second),
            },
            panic: Averages {
                concurrency: self.concurrency.panic.average(second),
                requests_per_second: self.requests.panic.average(second),
            },
            last_report_age_ms: now_ns.saturating_sub(self.last_report_ns) / 1_000_000,
        }
    }

    /// Decides how many pods the key wants at the receiver's unix time `now_ns`, taking the pods that report for the
    /// ready ones.
    pub fn decide(&mut self, settings: &Settings, now_ns: u64) {
        let figures = self.figures(now_ns);
        let ready = u32::try_from(figures.pods).unwrap_or(u32::MAX);
        let (stable, panic) = (figures.stable.concurrency, figures.panic.concurrency);
        let decider = self.decider.get_or_insert_with(|| Decider::new(now_ns, ready));
        self.decision = decider.decide(settings, &Observation { now_ns, ready, stable, panic });
    }

    /// The last decision.
    pub fn decision(&self) -> Decision {
        self.decision
    }

    /// Forgets senders that have been silent for [`MEMORY_NS`].
    pub fn forget(&mut self, now_ns: u64) {
        self.senders.retain(|_, sender| now_ns.saturating_sub(sender.seen_ns) < MEMORY_NS);
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
        let mut key = Key::new(WindowSizes::default());
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
        let mut key = Key::new(WindowSizes::default());
        key.record("pod", 1, &report(at(1, 0, 0, 0), at(3, 8, 4, 2)), NOW).unwrap();
        key.record("pod", 1, &report(at(1, 0, 0, 0), at(2, 5, 2, 9)), NOW).unwrap();
        let figures = key.figures(NOW);
        assert_eq!((figures.requests_total, figures.in_flight), (8, 2));
    }

    #[test]
    fn an_empty_receiver_goes_on_from_since() {
        let mut key = Key::new(WindowSizes::default());
        key.record("pod", 1, &report(at(100, 1_000, 500, 3), at(101, 1_010, 503, 3)), NOW).unwrap();
        assert_eq!(key.figures(NOW).requests_total, 10);
        // What another receiver acknowledged in between is not ours.
        key.record("pod", 1, &report(at(105, 1_050, 520, 3), at(106, 1_057, 523, 3)), NOW).unwrap();
        assert_eq!(key.figures(NOW).requests_total, 17);
    }

    #[test]
    fn counters_that_go_back_are_refused_and_change_nothing() {
        let mut key = Key::new(WindowSizes::default());
        key.record("pod", 1, &report(at(1, 0, 0, 0), at(3, 8, 4, 2)), NOW).unwrap();
        let back = report(at(1, 0, 0, 0), at(4, 7, 4, 9));
        assert_eq!(key.check("pod", 1, &back), Err(WentBack));
        assert_eq!(key.record("pod", 1, &back, NOW), Err(WentBack));
        assert_eq!(key.figures(NOW).in_flight, 2);
        assert_eq!(key.check("pod", 2, &back), Ok(()), "another incarnation is another sender");
    }

    #[test]
    fn proxied_requests_count_at_the_gateway_alone() {
        let mut key = Key::new(WindowSizes::default());
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
        let mut key = Key::new(WindowSizes::default());
        key.record("pod", 1, &report(at(1, 0, 0, 0), at(16, 30, 45, 3)), NOW).unwrap();
        let figures = key.figures(NOW);
        assert_eq!((figures.stable.concurrency, figures.panic.concurrency), (3.0, 3.0));
        assert_eq!(figures.stable.requests_per_second, 2.0);
    }

    #[test]
    fn ten_reports_of_a_tenth_of_a_second_make_one_second() {
        let mut key = Key::new(WindowSizes::default());
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
        let mut key = Key::new(WindowSizes::default());
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
    fn a_gateways_first_report_holds_until_its_next_whatever_its_period() {
        let mut key = Key::new(WindowSizes::default());
        let at_once =
            Snapshot { as_of_ns: 100 * S + 5_000_000, requests: 1, in_flight: 1, ..Snapshot::default() };
        let gateway = |until| KeyReport { from_gateway: true, ..report(at(100, 0, 0, 0), until) };
        key.record("gateway", 1, &gateway(at_once), NOW).unwrap();
        assert_eq!(key.figures(NOW + 59 * S).in_flight, 1);
        key.record("gateway", 1, &gateway(at(101, 1, 1, 1)), NOW + S).unwrap();
        assert_eq!(key.figures(NOW + 11 * S).in_flight, 1);
        assert_eq!(key.figures(NOW + 11 * S + 1).in_flight, 0);
        assert_eq!(key.figures(NOW + S).requests_total, 1);
    }

    #[test]
    fn a_key_wants_pods_by_what_its_pods_report() {
        let mut key = Key::new(WindowSizes::default());
        assert_eq!(key.decision(), Decision::default());
        key.record("pod", 1, &report(at(1, 0, 0, 0), at(2, 5, 140, 140)), NOW).unwrap();
        key.decide(&Settings::default(), NOW);
        let decision = key.decision();
        assert_eq!((decision.desired_pods, decision.panic_mode), (2, true));
        assert_eq!(decision.excess_burst_capacity, 100 - 211 - 140);
    }

    #[test]
    fn one_pod_in_two_incarnations_is_one_pod() {
        let mut key = Key::new(WindowSizes::default());
        for incarnation in [1, 2] {
            key.record("pod", incarnation, &report(at(1, 0, 0, 0), at(2, 3, 1, 1)), NOW).unwrap();
        }
        let figures = key.figures(NOW);
        assert_eq!((figures.pods, figures.requests_total, figures.in_flight), (1, 6, 2));
    }
}
