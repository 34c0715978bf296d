//! The headers by which clients describe their requests, and which of them are passed on.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::Request;
use inflight_e2e::app::App;
use inflight_e2e::bootstrap::Bootstrap;
use inflight_e2e::envoy::{Envoy, Version};
use inflight_e2e::tap::Tap;
use inflight_e2e::{http, wait};
use serde_json::json;

const SETTLED: Duration = Duration::from_secs(15);

/// Returns the headers that the app gets of a request with these headers.
async fn seen(envoy: &Envoy, headers: &[(&str, &str)]) -> Vec<String> {
    let request = Request::get("/headers").header("host", "app");
    let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
    let request = request.body(Full::<Bytes>::default()).expect("a request");
    let (status, body) = http::ask(envoy.address, request).await.expect("an answer");
    assert_eq!(status, 200, "{headers:?}");
    String::from_utf8_lossy(&body).lines().map(str::to_owned).collect()
}

fn has(seen: &[String], name: &str) -> bool {
    seen.iter().any(|line| line.starts_with(&format!("{name}:")))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_app_behind_a_sidecar_never_sees_the_proxied_header() {
    let (app, tap) = (App::start().await, Tap::start(None).await);
    for version in [Version::Oldest, Version::Newest] {
        let envoy = Envoy::start(version, &Bootstrap::sidecar(app.address, tap.address), 1).await;
        let cases: [&[(&str, &str)]; 4] = [
            &[("k-proxy-request", "activator"), ("x-mine", "1")],
            &[("k-proxy-request", "activator"), ("k-proxy-request", "activator"), ("x-mine", "1")],
            &[("k-proxy-request", "something"), ("x-mine", "1")],
            &[("k-proxy-request", "activator"), ("k-network-probe", "probe"), ("x-mine", "1")],
        ];
        for headers in cases {
            let seen = seen(&envoy, headers).await;
            assert!(!has(&seen, "k-proxy-request") && has(&seen, "x-mine"), "{headers:?}: {seen:?}");
        }
        // The filter read the header before it removed it.
        wait::until_equal("proxied requests", SETTLED, 2.0, || {
            envoy.stat("queue_proxied_requests_total", &[])
        })
        .await;
        assert_eq!(envoy.stat("queue_requests_total", &[]).await, 3.0, "the probe counts nowhere");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_takes_away_what_a_client_says_of_probes_and_counts_the_request() {
    let (app, tap) = (App::start().await, Tap::start(None).await);
    let envoy = Envoy::start(Version::Newest, &Bootstrap::gateway(app.address, tap.address), 1).await;
    let cases: [&[(&str, &str)]; 4] = [
        &[("k-kubelet-probe", "queue")],
        &[("k-network-probe", "queue")],
        &[("k-network-probe", "probe"), ("k-network-hash", "abc"), ("k-kubelet-probe", "x")],
        &[("user-agent", "kube-probe/1.33")],
    ];
    for headers in cases {
        let seen = seen(&envoy, headers).await;
        assert!(!has(&seen, "k-kubelet-probe") && !has(&seen, "k-network-probe"), "{headers:?}: {seen:?}");
        assert!(seen.contains(&"k-proxy-request: \"activator\"".to_owned()), "{headers:?}: {seen:?}");
        let agent = headers.iter().find(|(name, _)| *name == "user-agent");
        assert!(agent.is_none() || has(&seen, "user-agent"), "the agent is the client's: {seen:?}");
    }
    wait::until_equal("requests", SETTLED, 4.0, || envoy.stat("activator_request_count", &[])).await;
    assert_eq!(envoy.stat("inflight_requests_without_key_total", &[]).await, 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn knatives_routing_probe_passes_a_gateway_in_front_of_revisions_and_has_no_key() {
    let (app, tap) = (App::start().await, Tap::start(None).await);
    let mut bootstrap = Bootstrap::gateway(app.address, tap.address);
    bootstrap.configure("gateway", json!({"key": {"from": "headers"}}));
    let envoy = Envoy::start(Version::Newest, &bootstrap, 1).await;
    let key = [("knative-serving-namespace", "ns"), ("knative-serving-revision", "rev")];
    let with_key = |headers: &[(&'static str, &'static str)]| [&key[..], headers].concat();
    let routing = [("k-network-probe", "probe"), ("k-network-hash", "abc")];
    let passed = seen(&envoy, &with_key(&[&routing[..], &[("k-proxy-request", "activator")]].concat())).await;
    assert!(has(&passed, "k-network-probe") && has(&passed, "k-network-hash"), "{passed:?}");
    assert!(!has(&passed, "k-proxy-request"), "{passed:?}");
    for headers in [&routing[..1], &[("k-network-probe", "queue"), ("k-network-hash", "abc")]] {
        let seen = seen(&envoy, &with_key(headers)).await;
        assert!(!has(&seen, "k-network-probe") && has(&seen, "k-proxy-request"), "{headers:?}: {seen:?}");
    }
    wait::until_equal("with a key and without one", SETTLED, (2.0, 1.0), async || {
        let without_key = envoy.stat("inflight_requests_without_key_total", &[]).await;
        (envoy.stat("activator_request_count", &[]).await, without_key)
    })
    .await;
}
