//! The scrape on port 9090: by a protobuf library, by hand, and by a real Prometheus.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::Request;
use inflight_e2e::app::App;
use inflight_e2e::bootstrap::{Bootstrap, at};
use inflight_e2e::envoy::{Envoy, Version};
use inflight_e2e::load::{Load, Plan};
use inflight_e2e::tap::Tap;
use inflight_e2e::{http, prometheus, wait};
use prost::Message;
use serde_json::json;

const SETTLED: Duration = Duration::from_secs(15);

/// From Knative's .proto file.
#[derive(Clone, PartialEq, Message)]
struct Stat {
    #[prost(string, tag = "1")]
    pod_name: String,
    #[prost(double, tag = "2")]
    average_concurrent_requests: f64,
    #[prost(double, tag = "3")]
    average_proxied_concurrent_requests: f64,
    #[prost(double, tag = "4")]
    request_count: f64,
    #[prost(double, tag = "5")]
    proxied_request_count: f64,
    #[prost(double, tag = "6")]
    process_uptime: f64,
    #[prost(int64, tag = "7")]
    timestamp: i64,
}

async fn ask(envoy: &Envoy, method: &str, path: &str, accept: &str) -> (u16, Bytes) {
    let request = Request::builder().method(method).uri(path).header("host", "pod").header("accept", accept);
    let request = request.body(Full::<Bytes>::default()).expect("a request");
    let (status, body) = http::ask(envoy.exporter, request).await.expect("an answer");
    (status.as_u16(), body)
}

async fn scrape(envoy: &Envoy) -> Stat {
    let (status, body) = ask(envoy, "GET", "/metrics", "application/protobuf").await;
    assert_eq!(status, 200);
    assert!(body.len() <= 336, "Knative reads no more: {}", body.len());
    Stat::decode(body).expect("a Stat")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scrape_has_the_numbers_of_the_same_seconds_report() {
    for version in [Version::Oldest, Version::Newest] {
        let (app, tap) = (App::start().await, Tap::start(None).await);
        let envoy = Envoy::start(version, &Bootstrap::sidecar(app.address, tap.address), 2).await;
        let plan = Plan {
            requests: u64::MAX,
            connections: 10,
            average_ms: 10.0,
            mixed: true,
            seed: 5,
            ..Plan::default()
        };
        let load = Load::start(plan, envoy.address, &app.counts);
        // Twenty scrapes per second, of both kinds.
        let mut scraped = Vec::new();
        for _ in 0..60 {
            scraped.push(scrape(&envoy).await);
            let (status, _) = ask(&envoy, "GET", "/metrics", "*/*").await;
            assert_eq!(status, 200);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        load.stop();
        let sent = load.finish().await;
        wait::until_equal("the reported count", SETTLED, sent, async || {
            tap.acknowledged().last().map_or(0, |report| report.messages[0].until.requests)
        })
        .await;
        // Every figure of a scrape, including its instant, is also in a report.
        let reports = tap.acknowledged();
        let started_ns = reports[0].messages[0].since.as_of_ns;
        let reported: Vec<(f64, f64, f64)> = reports
            .iter()
            .map(|report| {
                let message = &report.messages[0];
                let period = message.until.since(&message.since).expect("a period");
                let rate = period.requests as f64 / (period.elapsed_ns as f64 / 1e9);
                (period.average(), rate, (message.until.as_of_ns - started_ns) as f64 / 1e9)
            })
            .collect();
        let mut matched = 0;
        for stat in scraped.iter().filter(|stat| stat.request_count > 0.0) {
            let figures = (stat.average_concurrent_requests, stat.request_count, stat.process_uptime);
            assert!(reported.contains(&figures), "{figures:?} is in no report: {reported:?}");
            assert_eq!((stat.pod_name.as_str(), stat.timestamp), ("hello-00001-pod-1", 0));
            matched += 1;
        }
        assert!(matched > 20, "{matched} scrapes had figures");
        // A scraper that tells periods apart by the uptime sees each period once.
        let mut uptimes: Vec<f64> = scraped.iter().map(|stat| stat.process_uptime).collect();
        assert!(uptimes.is_sorted(), "{uptimes:?}");
        uptimes.dedup();
        assert!(uptimes.len() <= reported.len() + 1, "{uptimes:?} in {} periods", reported.len());
        assert_eq!(envoy.stat("queue_requests_total", &[]).await as u64, sent, "a scrape is no request");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn before_the_first_tick_there_is_the_pods_name_and_nothing_else() {
    let app = App::start().await;
    let mut bootstrap = Bootstrap::sidecar(app.address, app.address);
    bootstrap.configure("reporting_period", "60s".into());
    let envoy = Envoy::start(Version::Newest, &bootstrap, 1).await;
    let stat = scrape(&envoy).await;
    assert_eq!(stat, Stat { pod_name: "hello-00001-pod-1".into(), ..Stat::default() });
    let (_, text) = ask(&envoy, "GET", "/metrics", "").await;
    let samples = prometheus::parse(std::str::from_utf8(&text).expect("text"));
    assert_eq!(samples.len(), 4);
    assert!(samples.iter().all(|sample| sample.value == 0.0), "{samples:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_paths_other_methods_and_head() {
    let app = App::start().await;
    let envoy = Envoy::start(Version::Newest, &Bootstrap::sidecar(app.address, app.address), 1).await;
    assert_eq!(ask(&envoy, "GET", "/", "").await.0, 404);
    assert_eq!(ask(&envoy, "GET", "/metrics/x", "").await.0, 404);
    assert_eq!(ask(&envoy, "POST", "/metrics", "").await.0, 405);
    assert_eq!(ask(&envoy, "DELETE", "/metrics", "").await.0, 405);
    assert_eq!(ask(&envoy, "HEAD", "/metrics", "application/protobuf").await, (200, Bytes::new()));
    let request = Request::get("/metrics").header("host", "pod").header("accept", "application/protobuf");
    let content_type =
        http::headers(envoy.exporter, request.body(Full::<Bytes>::default()).expect("a request"))
            .await
            .expect("an answer");
    assert_eq!(content_type.get("content-type").map(|v| v.as_bytes()), Some(&b"application/protobuf"[..]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_knative_configuration_limits_and_is_scraped() {
    let app = App::start().await;
    let mut bootstrap = Bootstrap::knative(app.address);
    bootstrap.configure("container_concurrency", json!(2));
    bootstrap.configure("reporting_period", json!("200ms"));
    let envoy = Envoy::start(Version::Newest, &bootstrap, 2).await;
    let plan = Plan {
        requests: u64::MAX,
        connections: 6,
        average_ms: 20.0,
        mixed: false,
        seed: 6,
        ..Plan::default()
    };
    let load = Load::start(plan, envoy.address, &app.counts);
    wait::until("the scrape shows those who wait, too", SETTLED, || async {
        let stat = scrape(&envoy).await;
        if (5.0..=6.1).contains(&stat.average_concurrent_requests) { Ok(()) } else { Err(stat) }
    })
    .await;
    load.stop();
    load.finish().await;
    assert_eq!(app.counts.most(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_prometheus_reads_the_exporter_and_envoy() {
    let (app, tap) = (App::start().await, Tap::start(None).await);
    let mut bootstrap = Bootstrap::sidecar(app.address, tap.address);
    bootstrap.configure("container_concurrency", json!(50));
    // So that promtool checks only our own names.
    at(&mut bootstrap.0, "/stats_config")["stats_matcher"] =
        json!({"inclusion_list": {"patterns": [{"prefix": "wasmcustom."}]}});
    let envoy = Envoy::start(Version::Newest, &bootstrap, 2).await;
    let plan =
        Plan { requests: 400, connections: 10, average_ms: 10.0, mixed: true, seed: 8, ..Plan::default() };
    let sent = Load::start(plan, envoy.address, &app.counts).finish().await;
    let targets = [("exporter", envoy.exporter, "/metrics"), ("envoy", envoy.admin, "/stats/prometheus")];
    for (name, address, path) in targets {
        let text = http::get(address, path).await.expect("metrics");
        prometheus::promtool_check(&text).unwrap_or_else(|complaint| panic!("{name}: {complaint}\n{text}"));
    }
    let prometheus = prometheus::Prometheus::start(&targets).await;
    wait::until_equal("every request, by Prometheus", SETTLED, sent as f64, async || {
        prometheus.query("sum(revision_request_count)").await
    })
    .await;
    wait::until_equal("the latencies' count", SETTLED, sent as f64, async || {
        prometheus.query("sum(revision_request_latencies_count)").await
    })
    .await;
    let forbidden = r#"revision_request_count{response_code="403",response_code_class="4xx",job="envoy"}"#;
    let logged = envoy.requests_when(sent).await.iter().filter(|r| r.code == 403).count();
    assert_eq!(prometheus.query(forbidden).await, logged as f64);
    assert_eq!(prometheus.query("queue_requests_total").await, sent as f64);
    assert_eq!(
        prometheus.query(r#"count(revision_app_request_latencies_bucket{response_code="200"})"#).await,
        27.0
    );
    assert_eq!(prometheus.query("revision_queue_depth").await, 0.0);
    let labels = r#"destination_namespace="default",destination_configuration="hello""#;
    let labels =
        format!(r#"{labels},destination_revision="hello-00001",destination_pod="hello-00001-pod-1""#);
    for gauge in [
        "queue_requests_per_second",
        "queue_proxied_operations_per_second",
        "queue_average_concurrent_requests",
        "queue_average_proxied_concurrent_requests",
    ] {
        let query = format!("count({gauge}{{{labels},job=\"exporter\"}})");
        wait::until_equal(gauge, SETTLED, 1.0, || prometheus.query(&query)).await;
    }
}
