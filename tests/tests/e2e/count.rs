//! The main job on a real Envoy: exact counts, and averages that are integrals.

use std::collections::BTreeMap;
use std::time::Duration;

use inflight_e2e::app::App;
use inflight_e2e::bootstrap::Bootstrap;
use inflight_e2e::envoy::{Envoy, Version};
use inflight_e2e::load::{Load, Plan};
use inflight_e2e::prometheus::{self, Sample};
use inflight_e2e::statserver::StatServer;
use inflight_e2e::tap::Tap;
use inflight_e2e::{truth, unix_time, wait};
use inflight_stats::Report;

const SETTLED: Duration = Duration::from_secs(15);

/// Returns the totals of one sender's reports. Each report must begin where the acknowledged one
/// before it ended.
fn totals(reports: &[Report]) -> (u64, u128) {
    let mut sum = (0, 0);
    let mut last = None;
    for report in reports {
        let message = &report.messages[0];
        if let Some(last) = last {
            assert_eq!(message.since, last, "a report goes on where the acknowledged one ended");
        }
        let period = message.until.since(&message.since).expect("time goes on");
        sum.0 += period.requests;
        sum.1 += period.request_ns;
        last = Some(message.until);
    }
    sum
}

/// Returns a stat by its label `response_code`. Each code must have the class that belongs to it.
fn by_code(stats: &[Sample], name: &str) -> BTreeMap<u16, u64> {
    let samples = stats.iter().filter(|sample| sample.name == name);
    samples
        .map(|sample| {
            let code: u16 = sample.labels["response_code"].parse().expect("a code");
            assert_eq!(sample.labels["response_code_class"], format!("{}xx", code / 100));
            assert_eq!(sample.labels.len(), 2, "no other labels: {sample:?}");
            (code, sample.value as u64)
        })
        .collect()
}

/// Checks everything: a load of mixed requests, with every figure compared with the access log.
async fn the_numbers_are_right(version: Version, concurrency: u32) {
    let plan = Plan {
        requests: 100_000,
        connections: 120,
        average_ms: 25.0,
        mixed: true,
        seed: 1,
        ..Plan::default()
    };
    let (app, server) = (App::start().await, StatServer::start(None).await);
    let tap = Tap::start(Some(server.address)).await;
    let envoy = Envoy::start(version, &Bootstrap::sidecar(app.address, tap.address), concurrency).await;
    let load = Load::start(plan, envoy.address, &app.counts);

    // rate(queue_request_milliseconds_total[20s]). Each end is sampled as soon as all workers have
    // ticked: the counter has increased and is constant again.
    let milliseconds = "queue_request_milliseconds_total";
    let sample = async || {
        let before = envoy.stat(milliseconds, &[]).await;
        let last = std::cell::Cell::new(before);
        let value = wait::until("the counter moves and stands still", SETTLED, || async {
            let now = envoy.stat(milliseconds, &[]).await;
            if now > before && now == last.replace(now) { Ok(now) } else { Err(now) }
        })
        .await;
        (unix_time().as_nanos() as u64, value)
    };
    let first = sample().await;
    let mut second = sample().await;
    while load.sent() < plan.requests * 9 / 10 && second.0 < first.0 + 20_000_000_000 {
        second = sample().await;
    }
    let sent = load.finish().await;
    assert_eq!(sent, plan.requests);

    let all = envoy.requests_when(sent).await;
    let counted = wait::until("the counter stands still", SETTLED, || async {
        // The gauge first: workers add to the counter before their leader sets the gauge.
        let in_flight = envoy.stat("queue_in_flight_requests", &[]).await;
        if in_flight == 0.0 { Ok(envoy.stat(milliseconds, &[]).await) } else { Err(in_flight) }
    })
    .await;
    let true_ms = truth::request_ns(&all, 0, u64::MAX) as f64 / 1e6;
    assert!((counted / true_ms - 1.0).abs() < 0.005, "{counted} ms counted, {true_ms} by the access log");

    // All requests have ended and were reported.
    wait::until_equal("the server's in_flight", SETTLED, (sent, 0), || async {
        let key = server.key("default", "hello-00001").await.expect("the key");
        (key["requests_total"].as_u64().unwrap(), key["in_flight"].as_u64().unwrap())
    })
    .await;
    let log = envoy.requests_when(sent).await;
    assert_eq!(log.len() as u64, sent, "Envoy logged every request once");
    let stats = envoy.stats().await;
    let stat = |name| prometheus::sum(&stats, name, &[]) as u64;
    assert_eq!(stat("queue_requests_total"), sent);
    assert_eq!(stat("queue_in_flight_requests"), 0);
    // Envoy shows a histogram's values only after its flush interval.
    let codes = truth::by_code(&log);
    for name in ["revision_request_count", "revision_request_latencies_count"] {
        wait::until_equal(name, SETTLED, codes.clone(), || async { by_code(&envoy.stats().await, name) })
            .await;
    }

    let reports = tap.acknowledged();
    let (requests, request_ns) = totals(&reports);
    assert_eq!(requests, sent, "the sum over the reports");
    assert_eq!(reports.last().unwrap().messages[0].until.in_flight, 0);
    let true_ns = truth::request_ns(&log, 0, u64::MAX);
    let off = request_ns as f64 / true_ns as f64 - 1.0;
    assert!(off.abs() < 0.005, "the integral over the run is off by {:.3} %", off * 100.0);

    // Each second, according to its report.
    let mut worst: f64 = 0.0;
    let mut seconds = 0;
    for report in &reports {
        let message = &report.messages[0];
        let (since, until) = (message.since.as_of_ns, message.until.as_of_ns);
        let true_average = truth::request_ns(&log, since, until) as f64 / (until - since) as f64;
        let average = message.until.since(&message.since).unwrap().average();
        let allowed = (true_average * 0.05).max(0.2);
        assert!(
            (average - true_average).abs() <= allowed,
            "second {seconds}: {average:.3} reported, {true_average:.3} by the access log"
        );
        if true_average > 1.0 {
            worst = worst.max((average / true_average - 1.0).abs());
        }
        seconds += 1;
    }

    // At either end a tick may be late by part of a second, out of twenty seconds.
    let rate = (second.1 - first.1) / 1000.0 / ((second.0 - first.0) as f64 / 1e9);
    let true_rate = truth::request_ns(&log, first.0, second.0) as f64 / (second.0 - first.0) as f64;
    assert!((rate / true_rate - 1.0).abs() < 0.05, "rate gives {rate:.3}, the access log {true_rate:.3}");
    println!(
        "{version:?} concurrency {concurrency}: {sent} requests, integral off by {:+.4} %, worst of {seconds} \
         seconds {:.2} %, rate off by {:+.2} %",
        off * 100.0,
        worst * 100.0,
        (rate / true_rate - 1.0) * 100.0
    );
}

macro_rules! matrix {
    ($($name:ident: $version:ident, $concurrency:literal;)*) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            the_numbers_are_right(Version::$version, $concurrency).await;
        }
    )*};
}

matrix! {
    the_numbers_are_right_on_the_oldest_envoy_with_1_worker: Oldest, 1;
    the_numbers_are_right_on_the_oldest_envoy_with_2_workers: Oldest, 2;
    the_numbers_are_right_on_the_oldest_envoy_with_4_workers: Oldest, 4;
    the_numbers_are_right_on_the_newest_envoy_with_1_worker: Newest, 1;
    the_numbers_are_right_on_the_newest_envoy_with_2_workers: Newest, 2;
    the_numbers_are_right_on_the_newest_envoy_with_4_workers: Newest, 4;
}
