//! What is said of a key to autoscalers: a value, or why there is none. KEDA, the metrics API, the
//! list of keys and Prometheus all ask here, so that they cannot disagree.
//!
//! No data is not zero traffic. Zero is said only when the senders said so, and nothing less than
//! there is while senders may be missing.

use std::fmt;

use crate::scaling::key::{Key, Silence};
use crate::scaling::settings::Metric;

const SECOND_NS: u64 = 1_000_000_000;
/// No value is larger: Kubernetes multiplies it by 1000 in 64 bits, and what overflows there scales a
/// workload to its maximum or to none.
pub const MAX_VALUE: f64 = 9e15;

/// What an autoscaler may ask of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantity {
    /// Requests in flight, on average over the stable window, or in panic over the panic window
    /// where that is larger; all pods together.
    Concurrency,
    /// Requests per second, likewise.
    RequestsPerSecond,
    /// The decision.
    DesiredPods,
    /// Requests in flight as of the last reports.
    InFlight,
}

impl Quantity {
    /// All of them.
    pub const ALL: [Self; 4] =
        [Self::Concurrency, Self::RequestsPerSecond, Self::DesiredPods, Self::InFlight];
}

impl From<Metric> for Quantity {
    fn from(metric: Metric) -> Self {
        match metric {
            Metric::Concurrency => Self::Concurrency,
            Metric::Rps => Self::RequestsPerSecond,
        }
    }
}

/// Why nothing is said of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// No sender has reported it since the receiver started.
    NeverReported,
    /// Its senders have been silent for too long.
    Forgotten,
    /// It was first reported just now. Senders may be missing, and what the others report wants fewer
    /// pods than there are; or nothing was decided yet.
    Starting,
    /// Senders fell silent that had traffic, and nobody else reports any.
    Stale {
        /// The receiver's unix time at their last report, in nanoseconds.
        since_ns: u64,
        /// How long ago that is.
        for_seconds: u64,
    },
    /// Its senders had fallen silent, and not all of them are back.
    Returning,
    /// A report is overdue from a sender that had traffic, and the others want fewer pods.
    Overdue,
    /// Its figures are no numbers.
    Implausible,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NeverReported => f.write_str("no pod or gateway has reported it"),
            Self::Forgotten => f.write_str("its pods and gateways have been silent for too long"),
            Self::Starting => f.write_str(
                "it was first reported less than a stable window ago, and pods or gateways may not have \
                 reported it yet",
            ),
            Self::Stale { for_seconds, .. } => {
                write!(f, "its pods and gateways fell silent {for_seconds} s ago, in the midst of traffic")
            }
            Self::Implausible => f.write_str("its figures are out of all proportion"),
            Self::Overdue => f.write_str("the report of a pod or gateway that had traffic is overdue"),
            Self::Returning => f.write_str("its pods and gateways fell silent, and not all are back"),
        }
    }
}

impl std::error::Error for Missing {}

impl Key {
    /// Returns why nothing is said of the key at the receiver's unix time `now_ns`; `None` if its
    /// figures are good.
    pub fn missing(&self, now_ns: u64) -> Option<Missing> {
        if self.last_report_ns() == 0 {
            return Some(Missing::NeverReported);
        }
        if let Some(Silence { since_ns, .. }) = self.silence(now_ns) {
            let for_seconds = now_ns.saturating_sub(since_ns) / SECOND_NS;
            return Some(match self.is_forgotten(now_ns) {
                true => Missing::Forgotten,
                false => Missing::Stale { since_ns, for_seconds },
            });
        }
        if self.is_starting(now_ns) || self.desired_pods(now_ns).is_none() {
            // From zero nothing is waited for, unless other gateways may take long to report.
            let is_from_zero = self.has_traffic_for_one(now_ns) && !self.has_long_periods(now_ns);
            return (!is_from_zero).then_some(Missing::Starting);
        }
        let (is_young, is_recovering) = (self.is_young(now_ns), self.is_recovering(now_ns));
        let is_overdue = self.is_overdue(now_ns);
        if !is_young && !is_recovering && !is_overdue {
            return None;
        }
        let (figures, decided) = (self.figures(now_ns), u64::from(self.decision().desired_pods));
        let wanted = self.wanted_pods(&figures);
        if is_young && wanted < figures.pods.max(1) {
            return Some(Missing::Starting);
        }
        if is_recovering && wanted <= decided {
            return Some(Missing::Returning);
        }
        if is_overdue && wanted < decided {
            return Some(Missing::Overdue);
        }
        None
    }

    /// Returns what an autoscaler is told: a number from 0 to [`MAX_VALUE`].
    ///
    /// # Errors
    /// [`Missing`].
    pub fn answer(&self, quantity: Quantity, now_ns: u64) -> Result<f64, Missing> {
        if let Some(missing) = self.missing(now_ns) {
            return Err(missing);
        }
        let figures = || self.figures(now_ns);
        let value = match quantity {
            Quantity::Concurrency => {
                let figures = figures();
                figures.or_in_flight(self.metric(Metric::Concurrency, &figures))
            }
            Quantity::RequestsPerSecond => self.metric(Metric::Rps, &figures()),
            Quantity::DesiredPods => self.desired_pods(now_ns).ok_or(Missing::Starting)?.into(),
            Quantity::InFlight => figures().in_flight as f64,
        };
        match value.is_nan() {
            true => Err(Missing::Implausible),
            // A negative zero becomes zero.
            false => Ok(value.clamp(0.0, MAX_VALUE) + 0.0),
        }
    }

    /// Returns whether the key should have any pod. That it should is said with the first report;
    /// that it should not, only when it is certain.
    ///
    /// # Errors
    /// [`Missing`].
    pub fn activity(&self, now_ns: u64) -> Result<bool, Missing> {
        match self.missing(now_ns) {
            Some(missing @ Missing::Stale { .. }) => Err(missing),
            Some(missing @ (Missing::NeverReported | Missing::Forgotten))
                if self.settings().min_scale == 0 =>
            {
                Err(missing)
            }
            _ if self.is_active(now_ns) => Ok(true),
            missing => missing.map_or(Ok(false), Err),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use serde_json::json;

    use super::*;
    use crate::counting::snapshot::Snapshot;
    use crate::protocol::report::KeyReport;
    use crate::protocol::stat::Stat;
    use crate::scaling::settings::KeySettings;

    const S: u64 = SECOND_NS;
    const NOW: u64 = 1_700_000_000 * S;

    fn key(stable_window: &str) -> Key {
        let json = json!({"stable_window": stable_window});
        Key::new(Arc::new(KeySettings::default().with(json, 200.0).unwrap()))
    }

    /// Some senders with so many requests in flight each, as long as they are told to report.
    struct Load {
        senders: u64,
        /// The number of the first one.
        first: u64,
        concurrency: u64,
        /// How many of these a gateway has counted.
        proxied: u64,
        /// How many are in flight when a report is made.
        in_flight: u64,
        from_gateway: bool,
        acknowledged: Vec<Snapshot>,
    }

    impl Load {
        fn new(senders: u64, concurrency: u64, from_gateway: bool) -> Self {
            let start = Snapshot { in_flight: concurrency as u32, ..Snapshot::starting_at(NOW) };
            let acknowledged = vec![start; senders as usize];
            Self {
                senders,
                first: 0,
                concurrency,
                proxied: 0,
                in_flight: concurrency,
                from_gateway,
                acknowledged,
            }
        }

        /// Has a sender report at a time, in milliseconds.
        fn report(&mut self, key: &mut Key, sender: u64, ms: u64) {
            let (now, since) = (NOW + ms * S / 1000, &mut self.acknowledged[sender as usize]);
            let elapsed = now - since.as_of_ns;
            let until = Snapshot {
                as_of_ns: now,
                requests: since.requests + elapsed * self.concurrency / S,
                request_ns: since.request_ns + u128::from(elapsed * self.concurrency),
                in_flight: self.in_flight.min(self.concurrency) as u32,
                proxied_requests: since.proxied_requests + elapsed * self.proxied / S,
                proxied_request_ns: since.proxied_request_ns + u128::from(elapsed * self.proxied),
                proxied_in_flight: self.proxied as u32,
            };
            let (namespace, name) = ("ns".into(), "rev".into());
            let report = KeyReport { namespace, name, from_gateway: self.from_gateway, since: *since, until };
            key.record(&format!("sender-{}", self.first + sender), 1, &report, now).unwrap();
            *since = until;
        }

        /// Has all senders report each second, and decides every two.
        fn run(&mut self, key: &mut Key, seconds: std::ops::Range<u64>) {
            for second in seconds {
                for sender in 0..self.senders {
                    self.report(key, sender, second * 1000 + (self.first + sender) * 7);
                }
                if second % 2 == 0 {
                    key.decide(NOW + second * S + S / 2);
                }
            }
        }
    }

    fn concurrency(key: &Key, second: u64) -> Result<f64, Missing> {
        key.answer(Quantity::Concurrency, NOW + second * S)
    }

    fn is_stale(key: &Key, second: u64) -> bool {
        let answers = Quantity::ALL.map(|quantity| key.answer(quantity, NOW + second * S));
        let stale = |missing: &Missing| matches!(missing, Missing::Stale { .. });
        let all = answers.iter().all(|answer| answer.as_ref().is_err_and(stale));
        all && key.activity(NOW + second * S).as_ref().is_err_and(stale)
    }

    #[test]
    fn a_key_whose_senders_fall_silent_under_load_keeps_its_decision_and_says_nothing() {
        for (stable_window, from_gateway) in [("60s", false), ("6s", false), ("60s", true), ("6s", true)] {
            let (mut key, mut load) = (key(stable_window), Load::new(5, 70, from_gateway));
            load.run(&mut key, 1..101);
            assert_eq!((concurrency(&key, 100), key.decision().desired_pods), (Ok(350.0), 5));
            for second in 101..=900 {
                key.decide(NOW + second * S);
                if second % 60 == 0 {
                    key.forget(NOW + second * S);
                }
                let now = NOW + second * S;
                assert_eq!(key.desired_pods(now), Some(5), "{stable_window}, {second}");
                match concurrency(&key, second) {
                    // Until it is known that they are silent, the last figures hold.
                    Ok(value) => {
                        assert!(second <= 111 && value > 290.0, "{stable_window}, {second}: {value}")
                    }
                    Err(_) => assert!(is_stale(&key, second)),
                }
                assert_eq!(key.stale_since_ns(now).is_some(), concurrency(&key, second).is_err());
            }
            assert_eq!(key.stale_since_ns(NOW + 900 * S), Some(NOW + 100 * S + 28 * S / 1000));

            // They come back one after the other, some seconds apart. Nothing is less meanwhile.
            for sender in 0..5 {
                for second in 901 + sender * 4..905 + sender * 4 {
                    for back in 0..=sender {
                        load.report(&mut key, back, second * 1000);
                    }
                    key.decide(NOW + second * S);
                    assert_eq!(key.desired_pods(NOW + second * S), Some(5), "{stable_window}, {second}");
                    match concurrency(&key, second) {
                        Ok(value) => assert!(
                            sender == 4 && (value - 350.0).abs() < 0.1,
                            "{stable_window}, {from_gateway}, {second}: {value}"
                        ),
                        Err(missing) => assert_eq!((sender < 4, missing), (true, Missing::Returning)),
                    }
                    assert_eq!(key.activity(NOW + second * S), Ok(true));
                    assert!(!key.decision().panic_mode);
                }
            }
            load.run(&mut key, 921..1_100);
            assert_eq!((concurrency(&key, 1_099), key.decision().desired_pods), (Ok(350.0), 5));
        }
    }

    #[test]
    fn senders_that_are_live_still_are_waited_for_if_they_were_not_heard_since() {
        let (mut key, mut load) = (key("6s"), Load::new(2, 30, false));
        let mut report = |key: &mut Key, second: u64, senders: u64| {
            (0..senders).for_each(|sender| load.report(key, sender, second * 1000));
            key.decide(NOW + second * S);
        };
        for second in (2..60).step_by(2) {
            report(&mut key, second, 2);
        }
        assert_eq!(concurrency(&key, 58), Ok(60.0));
        // After nine seconds the window is empty, and their ten periods are not over.
        key.decide(NOW + 70 * S);
        assert!(is_stale(&key, 70) && key.figures(NOW + 70 * S).pods == 2);
        report(&mut key, 72, 1);
        assert_eq!(concurrency(&key, 72), Err(Missing::Returning));
        report(&mut key, 73, 2);
        assert_eq!(concurrency(&key, 73), Ok(60.0));
    }

    #[test]
    fn a_key_that_is_stale_for_too_long_is_forgotten_and_begins_again() {
        let (mut key, mut load) =
            (key("6s").with_stale_after(Duration::from_secs(60)), Load::new(5, 70, false));
        load.run(&mut key, 1..31);
        key.decide(NOW + 90 * S);
        assert!(is_stale(&key, 90));
        key.decide(NOW + 91 * S);
        assert_eq!(concurrency(&key, 91), Err(Missing::Forgotten));
        assert_eq!(key.activity(NOW + 91 * S), Err(Missing::Forgotten));
        assert_eq!((key.desired_pods(NOW + 91 * S), key.stale_since_ns(NOW + 91 * S)), (None, None));
        // The first of its pods says that it is active, and not how many pods it wants.
        load.report(&mut key, 0, 100_000);
        key.decide(NOW + 100 * S);
        assert_eq!(concurrency(&key, 100), Err(Missing::Starting));
        assert_eq!((key.activity(NOW + 100 * S), key.desired_pods(NOW + 100 * S)), (Ok(true), None));
        load.run(&mut key, 101..120);
        assert_eq!((concurrency(&key, 119), key.desired_pods(NOW + 119 * S)), (Ok(350.0), Some(5)));
    }

    #[test]
    fn senders_that_said_zero_before_they_fell_silent_are_believed() {
        let (mut key, mut load) = (key("6s"), Load::new(5, 70, false));
        load.run(&mut key, 1..31);
        // One crashes, with 70 in flight; the others end in order.
        load.senders = 4;
        load.run(&mut key, 31..60);
        load.concurrency = 0;
        load.run(&mut key, 60..80);
        for second in 80..1_000 {
            key.decide(NOW + second * S);
            assert_eq!(concurrency(&key, second), Ok(0.0), "{second}");
        }
        assert_eq!((key.activity(NOW + 999 * S), key.desired_pods(NOW + 999 * S)), (Ok(false), Some(0)));
    }

    #[test]
    fn busy_senders_that_fall_silent_beside_idle_ones_are_no_zero() {
        // A gateway of which nothing of this goes through, or a pod that happens to be idle.
        for (stable_window, from_gateway) in [("60s", false), ("6s", false), ("60s", true), ("6s", true)] {
            let mut key = key(stable_window);
            let (mut load, mut idle) = (Load::new(5, 70, false), Load::new(1, 0, from_gateway));
            idle.first = 5;
            for second in 1..101 {
                idle.run(&mut key, second..second + 1);
                load.run(&mut key, second..second + 1);
            }
            for second in 101..900 {
                idle.run(&mut key, second..second + 1);
                let now = NOW + second * S;
                assert_eq!(key.desired_pods(now), Some(5), "{stable_window}, {second}");
                assert!(second <= 111 || is_stale(&key, second), "{stable_window}, {second}");
                let said = concurrency(&key, second);
                // A report is overdue when it is a second late.
                let is_less = said.is_ok_and(|value| value < 280.0);
                assert!(second <= 102 || !is_less, "{second}: {said:?}");
            }
            // The first one back has the traffic; they are waited for.
            load.senders = 1;
            load.run(&mut key, 900..901);
            idle.run(&mut key, 900..901);
            assert_eq!(concurrency(&key, 900), Err(Missing::Returning));
            load.senders = 5;
            for second in 901..1_000 {
                idle.run(&mut key, second..second + 1);
                load.run(&mut key, second..second + 1);
                assert_eq!(key.desired_pods(NOW + second * S), Some(5), "{stable_window}, {second}");
            }
            assert!((concurrency(&key, 999).unwrap() - 350.0).abs() < 0.1);
        }
    }

    #[test]
    fn short_requests_are_traffic_although_nothing_is_in_flight_when_it_is_reported() {
        let (mut key, mut load) = (key("6s"), Load::new(5, 70, false));
        load.in_flight = 0;
        load.run(&mut key, 1..31);
        for second in 31..100 {
            key.decide(NOW + second * S);
            assert_eq!(key.desired_pods(NOW + second * S), Some(5), "{second}");
        }
        assert!(is_stale(&key, 99));
        // But a pod that ends says so: its last report is shorter, and nothing is in flight.
        load.run(&mut key, 100..131);
        (0..5).for_each(|sender| load.report(&mut key, sender, 130_400 + sender * 7));
        for second in 131..200 {
            key.decide(NOW + second * S);
        }
        assert_eq!((concurrency(&key, 199), key.desired_pods(NOW + 199 * S)), (Ok(0.0), Some(0)));
    }

    #[test]
    fn a_gateway_that_falls_silent_while_pods_have_its_requests_is_no_zero() {
        for direct in [0, 10] {
            let mut key = key("60s");
            let (mut gateway, mut pods) = (Load::new(1, 350, true), Load::new(5, 70 + direct, false));
            (gateway.first, pods.proxied) = (5, 70);
            for second in 1..60 {
                gateway.run(&mut key, second..second + 1);
                pods.run(&mut key, second..second + 1);
            }
            let desired = key.desired_pods(NOW + 59 * S);
            for second in 60..200 {
                pods.run(&mut key, second..second + 1);
                assert_eq!(key.desired_pods(NOW + second * S), desired, "{second}");
                assert!(second <= 71 || is_stale(&key, second), "{second}");
            }
            for second in 200..202 {
                gateway.run(&mut key, second..second + 1);
                pods.run(&mut key, second..second + 1);
            }
            assert!((concurrency(&key, 201).unwrap() - 350.0 - 5.0 * direct as f64).abs() < 60.0);
            assert_eq!(key.desired_pods(NOW + 201 * S), desired);
            // If nothing comes through it any more, it has crashed, and the others go on, if they do.
            pods.proxied = 0;
            pods.concurrency = direct;
            pods.run(&mut key, 202..300);
            match direct {
                0 => assert!(is_stale(&key, 299)),
                _ => assert_eq!(concurrency(&key, 299), Ok(5.0 * direct as f64)),
            }
        }
    }

    #[test]
    fn a_pod_that_crashes_takes_its_requests_along_if_the_others_go_on() {
        let (mut key, mut load) = (key("6s"), Load::new(5, 70, false));
        load.run(&mut key, 1..61);
        load.senders = 3;
        for second in 61..100 {
            load.run(&mut key, second..second + 1);
            let missing = key.missing(NOW + second * S);
            assert!(missing.is_none() || (second < 72 && missing == Some(Missing::Overdue)), "{second}");
        }
        assert_eq!((concurrency(&key, 99), key.desired_pods(NOW + 99 * S)), (Ok(210.0), Some(3)));
    }

    #[test]
    fn after_a_start_nothing_less_is_said_for_a_stable_window() {
        // Idle pods, which may be those of a loaded workload whose others are missing.
        let (mut key, mut load) = (key("60s").after_start(NOW), Load::new(1, 0, false));
        assert_eq!(key.activity(NOW), Err(Missing::NeverReported));
        for second in 1..100 {
            load.run(&mut key, second..second + 1);
            let said = if second < 61 { Err(Missing::Starting) } else { Ok(0.0) };
            assert_eq!(concurrency(&key, second), said, "{second}");
            assert!(second >= 61 || key.activity(NOW + second * S) != Ok(false), "{second}");
        }
        assert_eq!(key.activity(NOW + 99 * S), Ok(false));
        // More is said as soon as all can have reported; and activity at once.
        let (mut key, mut load) = (self::key("60s").after_start(NOW), Load::new(3, 140, false));
        for second in 1..70 {
            load.run(&mut key, second..second + 1);
            match concurrency(&key, second) {
                Ok(value) => assert!(second >= 4 && (value - 420.0).abs() < 3.0, "{second}: {value}"),
                Err(missing) => assert_eq!((second < 4, missing), (true, Missing::Starting)),
            }
            assert_eq!(key.activity(NOW + second * S), Ok(true), "{second}");
        }
        // From zero one pod is wanted with the first report.
        let (mut key, mut load) = (self::key("60s").after_start(NOW), Load::new(1, 1, true));
        load.report(&mut key, 0, 1_000);
        assert_eq!(key.answer(Quantity::DesiredPods, NOW + S), Ok(1.0));
        assert_eq!((concurrency(&key, 1), key.activity(NOW + S)), (Ok(1.0), Ok(true)));
    }

    #[test]
    fn stats_that_stop_are_no_zeros_after_a_silence_within_the_window() {
        let mut key = key("60s");
        let stream = |key: &mut Key, seconds: std::ops::Range<u64>| {
            for second in seconds {
                for pod in ["a", "b"] {
                    let stat = Stat {
                        pod_name: pod.into(),
                        average_concurrent_requests: 70.0,
                        request_count: 10.0,
                        ..Stat::default()
                    };
                    key.record_stat(pod, &stat, NOW + second * S).unwrap();
                }
                key.decide(NOW + second * S);
            }
        };
        stream(&mut key, 0..100);
        for second in 100..140 {
            key.decide(NOW + second * S);
        }
        assert!(is_stale(&key, 139));
        stream(&mut key, 140..150);
        assert_eq!((concurrency(&key, 149), key.decision().desired_pods), (Ok(140.0), 2));
    }

    #[test]
    fn a_key_that_nobody_has_reported_is_active_only_by_its_smallest_count() {
        let with = |json| Key::new(Arc::new(KeySettings::default().with(json, 200.0).unwrap()));
        assert_eq!(with(json!({})).activity(NOW), Err(Missing::NeverReported));
        assert_eq!(with(json!({"min_scale": 1})).activity(NOW), Ok(true));
        let answers = Quantity::ALL.map(|quantity| with(json!({"min_scale": 1})).answer(quantity, NOW));
        assert_eq!(answers, [Err(Missing::NeverReported); 4]);
    }
}
