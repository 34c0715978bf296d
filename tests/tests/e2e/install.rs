//! A user's first steps: the shipped configurations, refusals, probes, tokens, hostile reports.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::Request;
use inflight_e2e::app::App;
use inflight_e2e::bootstrap::{Bootstrap, NOBODY, at};
use inflight_e2e::envoy::{Envoy, How, Version};
use inflight_e2e::load::{Load, Plan};
use inflight_e2e::statserver::StatServer;
use inflight_e2e::tap::Tap;
use inflight_e2e::{http, wait};
use inflight_stats::protocol::report::{CONTENT_TYPE, MAX_BYTES};
use serde_json::json;

const SETTLED: Duration = Duration::from_secs(15);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_envoyfilters_patch_counts_in_a_real_envoy() {
    for version in [Version::Oldest, Version::Newest] {
        let (app, server) = (App::start().await, StatServer::start(None).await);
        let envoy = Envoy::start(version, &Bootstrap::istio(app.address, server.address), 2).await;
        let plan =
            Plan { requests: 500, connections: 10, average_ms: 5.0, mixed: true, seed: 3, ..Plan::default() };
        let sent = Load::start(plan, envoy.address, &app.counts).finish().await;
        wait::until_equal("the server's count", SETTLED, sent, || {
            // The workload's name comes from the node's metadata.
            server.number("shop", "cart-v2", "requests_total")
        })
        .await;
        let scraped = http::get(envoy.exporter, "/metrics").await.expect("the exporter");
        assert!(scraped.contains("destination_pod=\"cart-v2-7d9f-x2x4p\""), "{scraped}");
        let forbidden = [("response_code", "403"), ("response_code_class", "4xx")];
        let logged = envoy.requests_when(sent).await.iter().filter(|r| r.code == 403).count();
        assert_eq!(envoy.stat("revision_request_count", &forbidden).await, logged as f64);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_configuration_is_refused_at_start_with_one_line() {
    let identity = r#""namespace": "ns", "pod": "pod""#;
    let cases = [
        (
            format!(r#"{{{identity}, "revision": "r", "reporting_perod": "1s"}}"#),
            "unknown key `reporting_perod`; did you mean `reporting_period`?",
        ),
        (
            format!(r#"{{{identity}, "revision": "r", "reporting_period": 1}}"#),
            "`reporting_period` is 1; expected a duration from 100ms to 60s",
        ),
        (
            format!(r#"{{{identity}, "revision": "r", "reporting_period": "50ms"}}"#),
            "`reporting_period` is \"50ms\"; expected a duration from 100ms to 60s",
        ),
        (
            format!(r#"{{{identity}, "revision": ""}}"#),
            "`revision` is \"\"; expected a string of 1 to 512 bytes",
        ),
        (
            format!(
                r#"{{{identity}, "revision": "r", "statserver": {{"cluster": "c", "token_env": "NONE"}}}}"#
            ),
            "`statserver.token_env` is \"NONE\"; expected the name of a variable",
        ),
        ("{".into(), "invalid configuration: not JSON"),
    ];
    for version in [Version::Oldest, Version::Newest] {
        for (configuration, expected) in &cases {
            let mut bootstrap = Bootstrap::sidecar(NOBODY, NOBODY);
            bootstrap.configuration(configuration);
            let (refused, log) = Envoy::refusal(version, &bootstrap);
            assert!(refused, "{configuration} was accepted:\n{log}");
            let ours: Vec<&str> = log.lines().filter(|line| line.contains("inflight: ")).collect();
            assert_eq!(ours.len(), 1, "one line about {configuration}:\n{log}");
            assert!(ours[0].contains(expected), "{}", ours[0]);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn probes_count_nowhere_and_proxied_requests_in_their_own_column() {
    let app = App::start().await;
    let tap = Tap::start(None).await;
    let envoy = Envoy::start(Version::Newest, &Bootstrap::sidecar(app.address, tap.address), 1).await;
    let headers: [&[(&str, &[u8])]; 7] = [
        &[("user-agent", b"kube-probe/1.33")],
        &[("k-kubelet-probe", b"queue")],
        &[("k-network-probe", b"probe")],
        &[("k-proxy-request", b"activator")],
        &[("k-proxy-request", b"something")],
        &[("user-agent", b"\xff\xfe not UTF-8"), ("k-proxy-request", b"\xff")],
        &[("user-agent", b"curl")],
    ];
    for headers in headers {
        let mut request = Request::get("/work").header("host", "app");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let (status, _) =
            http::ask(envoy.address, request.body(Full::<Bytes>::default()).expect("a request"))
                .await
                .expect("an answer");
        assert_eq!(status, 200);
    }
    wait::until_equal("requests and proxied requests", SETTLED, (4, 1), async || {
        tap.acknowledged().last().map_or((0, 0), |report| {
            let until = report.messages[0].until;
            (until.requests, until.proxied_requests)
        })
    })
    .await;
    assert_eq!(envoy.stat("queue_proxied_requests_total", &[]).await, 1.0);
    assert_eq!(envoy.stat("revision_request_count", &[]).await, 4.0);
    assert_eq!(app.counts.requests(), 7);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_token_comes_from_the_environment_and_only_key_values_show_it() {
    // As in the files for Istio, and as in those for Envoy Gateway.
    for (variables, is_shown) in [
        (json!({"key_values": {"INFLIGHT_TOKEN": "s3cret"}}), true),
        (json!({"host_env_keys": ["INFLIGHT_TOKEN"]}), false),
    ] {
        let app = App::start().await;
        let tap = Tap::start(None).await;
        let mut bootstrap = Bootstrap::sidecar(app.address, tap.address);
        bootstrap.configure(
            "statserver",
            json!({"cluster": "inflight-statserver", "token_env": "INFLIGHT_TOKEN"}),
        );
        at(bootstrap.filter(), "/typed_config/config/vm_config")["environment_variables"] = variables;
        let environment = match is_shown {
            true => Vec::new(),
            false => vec![("INFLIGHT_TOKEN", "s3cret".into())],
        };
        let how = How { environment, ..How::default() };
        let envoy = Envoy::with(Version::Newest, &bootstrap, how).await;
        let headers = wait::until("a report", SETTLED, || async {
            tap.recorded().first().map(|r| r.headers.clone()).ok_or("none")
        })
        .await;
        assert!(headers.contains(&("authorization".into(), "Bearer s3cret".into())), "{headers:?}");
        assert!(headers.contains(&("host".into(), "inflight-statserver".into())), "{headers:?}");
        let dump = http::get(envoy.admin, "/config_dump").await.expect("a dump");
        assert_eq!(dump.contains("s3cret"), is_shown);
        for page in ["/stats", "/clusters", "/listeners"] {
            let text = http::get(envoy.admin, page).await.expect("a page");
            assert!(!text.contains("s3cret"), "{page}");
        }
        assert!(!envoy.process.log().contains("s3cret"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hostile_report_is_refused_with_the_reason_and_changes_nothing() {
    let server = StatServer::start(None).await;
    let cases = [
        (Bytes::from_static(b""), "empty"),
        (Bytes::from_static(b"\x02rest"), "version 2; expected 1"),
        (Bytes::from_static(b"\x01\xff\xff\xff\xff\xff\xff\xff\xffpod"), "ends early"),
        (Bytes::from(vec![1; MAX_BYTES + 1]), "expected at most 1048576 bytes"),
    ];
    for (body, reason) in cases {
        let (status, text) =
            http::post(server.address, "/v1/reports", CONTENT_TYPE, body).await.expect("an answer");
        assert!(status.is_client_error() && text.contains(reason), "{status}: {text}");
    }
    assert_eq!(http::get(server.address, "/v1/keys").await.as_deref(), Ok("{\"keys\":[],\"found\":0}"));
    let metrics = http::get(server.address, "/metrics").await.expect("metrics");
    assert!(
        metrics.contains("reports_total{code=\"400\"} 3") && metrics.contains("{code=\"413\"} 1"),
        "{metrics}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_stats_server_the_stats_are_there_all_the_same() {
    let app = App::start().await;
    let mut bootstrap = Bootstrap::sidecar(app.address, app.address);
    bootstrap
        .configuration(r#"{"namespace": "ns", "revision": "r", "pod": "p", "reporting_period": "100ms"}"#);
    let envoy = Envoy::start(Version::Newest, &bootstrap, 2).await;
    let load = Load::start(
        Plan {
            requests: u64::MAX,
            connections: 5,
            average_ms: 20.0,
            mixed: false,
            seed: 4,
            ..Plan::default()
        },
        envoy.address,
        &app.counts,
    );
    wait::until("the gauges show it", SETTLED, || async {
        let average = envoy.stat("queue_average_concurrent_requests_milli", &[]).await;
        let rate = envoy.stat("queue_requests_per_second_milli", &[]).await;
        if (3_000.0..=5_000.0).contains(&average) && rate > 50_000.0 { Ok(()) } else { Err((average, rate)) }
    })
    .await;
    load.stop();
    let sent = load.finish().await;
    wait::until_equal("the counters", SETTLED, (sent, 0), async || {
        let (requests, now) = ("queue_requests_total", "queue_in_flight_requests");
        (envoy.stat(requests, &[]).await as u64, envoy.stat(now, &[]).await as u64)
    })
    .await;
    assert_eq!(envoy.stat("inflight_reports_sent_total", &[]).await, 0.0);
}
