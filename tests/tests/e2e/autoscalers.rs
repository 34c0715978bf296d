//! What autoscalers and people request from the stats server: KEDA over gRPC, settings over HTTP,
//! the live page in a browser.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use http_body_util::Full;
use hyper::{Method, Request};
use inflight_e2e::reports::{Sender, send};
use inflight_e2e::statserver::StatServer;
use inflight_e2e::{http, prometheus, root, wait};
use inflight_stats::{KeyReport, Report, Snapshot};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tonic::Code;
use tonic::transport::Channel;

/// KEDA's side of the protocol.
pub mod proto {
    #![allow(missing_docs, clippy::all, reason = "generated")]
    tonic::include_proto!("externalscaler");
}
use proto::external_scaler_client::ExternalScalerClient;
use proto::{GetMetricsRequest, ScaledObjectRef};

const SETTLED: Duration = Duration::from_secs(20);
const SECOND: u64 = 1_000_000_000;

/// Reports one second of one pod, with `concurrency` requests throughout.
async fn report(server: SocketAddr, name: &str, incarnation: u64, concurrency: u64) {
    let since = Snapshot::starting_at(SECOND);
    let until = Snapshot {
        as_of_ns: 2 * SECOND,
        requests: concurrency,
        request_ns: u128::from(concurrency * SECOND),
        ..Snapshot::default()
    };
    let message = KeyReport { namespace: "ns".into(), name: name.into(), from_gateway: false, since, until };
    send(server, &Report { version: 1, pod: "pod".into(), incarnation, messages: vec![message] }).await;
}

/// Reports that the pod of [`report`] had nothing in the second after.
async fn report_idle(server: SocketAddr, name: &str) {
    let since =
        Snapshot { as_of_ns: 2 * SECOND, requests: 1, request_ns: u128::from(SECOND), ..Snapshot::default() };
    let until = Snapshot { as_of_ns: 3 * SECOND, ..since };
    let message = KeyReport { namespace: "ns".into(), name: name.into(), from_gateway: false, since, until };
    send(server, &Report { version: 1, pod: "pod".into(), incarnation: 1, messages: vec![message] }).await;
}

/// Reports what a gateway reports at once of a key's first request: in flight, and no time passed.
async fn report_first_request(server: SocketAddr, name: &str) {
    let since = Snapshot::starting_at(5 * SECOND);
    let until = Snapshot { in_flight: 1, ..since };
    let message = KeyReport { namespace: "ns".into(), name: name.into(), from_gateway: true, since, until };
    send(server, &Report { version: 1, pod: "gateway".into(), incarnation: 1, messages: vec![message] })
        .await;
}

fn object(name: &str, metadata: &[(&str, &str)]) -> ScaledObjectRef {
    let scaler_metadata = metadata.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
    ScaledObjectRef { name: name.into(), namespace: "ns".into(), scaler_metadata }
}

async fn keda(server: &StatServer) -> ExternalScalerClient<Channel> {
    ExternalScalerClient::connect(format!("http://{}", server.grpc)).await.expect("a connection")
}

/// Returns a key's metric, as soon as the server has run for long enough to answer.
async fn value(client: &mut ExternalScalerClient<Channel>, object: ScaledObjectRef) -> f64 {
    let asked = || GetMetricsRequest { scaled_object_ref: Some(object.clone()), metric_name: String::new() };
    let metrics = wait::until("metrics", SETTLED, || {
        let mut client = client.clone();
        async move {
            match client.get_metrics(asked()).await {
                Err(status) if status.code() != Code::Unavailable => panic!("{status:?}"),
                answer => answer.map_err(|status| status.message().to_owned()),
            }
        }
    });
    metrics.await.into_inner().metric_values[0].metric_value_float
}

#[tokio::test]
async fn keda_gets_what_a_key_has_and_what_a_pod_should_have() {
    let server = StatServer::start(None).await;
    let mut client = keda(&server).await;
    // Nobody has reported it, which is not zero.
    let unknown = object("nobody", &[]);
    let asked = GetMetricsRequest { scaled_object_ref: Some(unknown.clone()), metric_name: String::new() };
    for _ in 0..3 {
        let status = client.get_metrics(asked.clone()).await.expect_err("unknown");
        assert_eq!(status.code(), Code::Unavailable);
        assert_eq!(status.message(), "key ns/nobody: no pod or gateway has reported it");
        assert_eq!(client.is_active(unknown.clone()).await.expect_err("unknown").code(), Code::Unavailable);
    }
    let log = server.process.log();
    assert_eq!(log.matches("asks for a key that no pod or gateway has reported").count(), 1, "{log}");

    let _reports = Sender::pod("pod", "ns", "rev").report_every(5, server.address, 30);
    assert_eq!(value(&mut client, object("rev", &[])).await, 30.0);
    // The key's name may differ from the ScaledObject's.
    let elsewhere =
        object("other", &[("name", "rev"), ("namespace", "ns"), ("metric", "rps"), ("scalerAddress", "x")]);
    assert_eq!(value(&mut client, elsewhere.clone()).await, 30.0);
    let mut spec = async |object| {
        let spec = client.get_metric_spec(object).await?.into_inner().metric_specs.remove(0);
        Ok::<_, tonic::Status>((spec.metric_name, spec.target_size_float, spec.target_size))
    };
    assert_eq!(spec(object("rev", &[])).await.expect("a spec"), ("inflight-concurrency".into(), 70.0, 70));
    assert_eq!(spec(elsewhere).await.expect("a spec"), ("inflight-rps".into(), 140.0, 140));
    let own = object("rev", &[("target", "2.5")]);
    assert_eq!(spec(own).await.expect("a spec"), ("inflight-concurrency".into(), 2.5, 3));
    for (key, wrong) in [("target", "0"), ("target", "many"), ("metric", "cpu"), ("name", "a\nb")] {
        let refused = spec(object("rev", &[(key, wrong)])).await.expect_err("refused");
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().contains(&format!("`{key}` is ")), "{}", refused.message());
    }
    // What is neither ours nor KEDA's.
    let of_keda =
        ["enableTLS", "unsafeSsl", "caCert", "tlsClientCert", "tlsClientKey", "tlsCertFile", "aFromEnv"];
    let of_keda = of_keda.map(|key| (key, "x"));
    assert_eq!(spec(object("rev", &of_keda)).await.expect("a spec").1, 70.0);
    for (wrong, message) in [
        ("tarjet", "unknown metadata `tarjet`; did you mean `target`?"),
        ("xyz", "unknown metadata `xyz`; expected namespace, name, metric, target, or KEDA's own"),
    ] {
        let refused = spec(object("rev", &[(wrong, "1"), ("name", "rev")])).await.expect_err("refused");
        assert_eq!((refused.code(), refused.message()), (Code::InvalidArgument, message));
    }
}

#[tokio::test]
async fn keda_follows_the_decision_if_it_is_told_to() {
    let flags = ["--stable-window", "6s", "--target", "10", "--target-utilization-percentage", "100"];
    let server = StatServer::with(None, &flags).await;
    let mut client = keda(&server).await;
    let desired_pods = object("rev", &[("metric", "desired_pods")]);
    let spec = client.get_metric_spec(desired_pods.clone()).await.expect("a spec").into_inner();
    let spec = &spec.metric_specs[0];
    assert_eq!((&*spec.metric_name, spec.target_size_float), ("inflight-desired-pods", 1.0));
    let refused = object("rev", &[("metric", "desired_pods"), ("target", "70")]);
    let refused = client.get_metric_spec(refused).await.expect_err("refused");
    assert_eq!(
        (refused.code(), refused.message()),
        (Code::InvalidArgument, "metadata `target` is \"70\"; expected 1, or none, with metric desired_pods")
    );

    // 200 in flight want 20 pods, of which the bounds allow 5; then none.
    let put = Request::put("/v1/keys/ns/rev/settings").header("host", "x");
    let put = put.body(Full::from(r#"{"max_scale": 5}"#)).expect("a request");
    assert_eq!(http::ask(server.address, put).await.expect("an answer").0, 200);
    let since = Snapshot::starting_at(SECOND);
    let mut said = Vec::new();
    for second in 1..30_u64 {
        let concurrency = if second < 8 { 200 } else { 0 };
        let totals = |second: u64| Snapshot {
            as_of_ns: (second + 1) * SECOND,
            request_ns: u128::from(second.min(7) * 200 * SECOND),
            ..since
        };
        let until = Snapshot { in_flight: concurrency, ..totals(second) };
        let since = totals(second - 1);
        let (namespace, name) = ("ns".into(), "rev".into());
        let messages = vec![KeyReport { namespace, name, from_gateway: true, since, until }];
        let report = Report { version: 1, pod: "gateway".into(), incarnation: 1, messages };
        send(server.address, &report).await;
        let asked =
            GetMetricsRequest { scaled_object_ref: Some(desired_pods.clone()), metric_name: String::new() };
        let shown = server.key("ns", "rev").await.expect("the key")["desired_pods"].clone();
        match client.get_metrics(asked).await {
            Ok(metrics) => {
                let value = metrics.into_inner().metric_values[0].metric_value_float;
                let after = server.key("ns", "rev").await.expect("the key")["desired_pods"].clone();
                // A decision may have come in between.
                assert!([json!(value as u64), shown.clone()].contains(&after), "{shown}, {value}, {after}");
                said.push(value);
            }
            Err(status) => assert_eq!(status.code(), Code::Unavailable, "{status:?}"),
        }
        if said.last() == Some(&0.0) {
            break;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    println!("desired pods by KEDA: {said:?}");
    assert_eq!(said.iter().copied().fold(0.0, f64::max), 5.0, "{said:?}");
    assert_eq!(said.last(), Some(&0.0), "{said:?}");
    let active = client.is_active(desired_pods).await.expect("an answer").into_inner().result;
    assert!(!active, "to zero, too");
}

#[tokio::test]
async fn the_first_request_of_an_idle_key_is_decided_on_at_once() {
    let server = StatServer::start(None).await;
    let desired = async |name: &str| {
        let key = server.key("ns", name).await.expect("a key");
        (key["desired_pods"].as_u64(), key["excess_burst_capacity"].is_number())
    };
    let names: Vec<String> = (0..20).map(|number| format!("rev-{number}")).collect();
    for name in &names {
        report(server.address, name, 1, 0).await;
    }
    for name in &names {
        wait::until_equal("desired pods", SETTLED, (Some(0), true), || desired(name)).await;
    }
    let mut waits = Vec::new();
    for name in &names {
        let sent = Instant::now();
        report_first_request(server.address, name).await;
        wait::until_equal("desired pods", SETTLED, (Some(1), true), || desired(name)).await;
        waits.push(sent.elapsed());
    }
    waits.sort();
    println!("0 -> 1 desired after {:?} (median of 20), at most {:?}", waits[10], waits[19]);
}

#[tokio::test]
async fn a_key_becomes_active_with_its_first_report_and_stays_so_for_a_stable_window() {
    let server = StatServer::with(None, &["--stable-window", "6s"]).await;
    let mut client = keda(&server).await;
    let mut waits = Vec::new();
    let mut last = None;
    for number in 0..20 {
        let name = format!("rev-{number}");
        // Of a key that nobody has reported nothing is said.
        let mut active = client.stream_is_active(object(&name, &[])).await.expect("a stream").into_inner();
        let sent = Instant::now();
        report(server.address, &name, 1, 1).await;
        assert!(active.next().await.expect("a change").expect("a change").result);
        waits.push(sent.elapsed());
        last = Some(active);
    }
    waits.sort();
    println!(
        "0 -> 1 pushed after {:?} (median of 20, with the report's own way), at most {:?}",
        waits[10], waits[19]
    );
    // The server pushed this. Polling every two seconds would take one second on average.
    assert!(waits[10] < Duration::from_millis(500), "{:?}", waits[10]);
    let mut active = last.expect("a stream");
    report_idle(server.address, "rev-19").await;
    let ended = tokio::time::timeout(SETTLED, active.next()).await.expect("within the window and a decision");
    assert!(!ended.expect("a change").expect("a change").result);
}

#[tokio::test]
async fn a_key_whose_requests_are_all_proxied_is_active_while_they_last() {
    let server = StatServer::with(None, &["--stable-window", "6s"]).await;
    let mut client = keda(&server).await;
    let mut active = client.stream_is_active(object("rev", &[])).await.expect("a stream").into_inner();
    // Ten requests that a gateway counted under another key.
    let proxied = |second: u64, in_flight: u32| Snapshot {
        as_of_ns: second * SECOND,
        requests: 10,
        proxied_requests: 10,
        request_ns: u128::from(second * 10 * SECOND),
        proxied_request_ns: u128::from(second * 10 * SECOND),
        in_flight,
        proxied_in_flight: in_flight,
    };
    for second in 1..10 {
        let in_flight = if second < 9 { 10 } else { 0 };
        let (since, until) = (proxied(second, in_flight), proxied(second + 1, in_flight));
        let message =
            KeyReport { namespace: "ns".into(), name: "rev".into(), from_gateway: false, since, until };
        let report = Report { version: 1, pod: "pod".into(), incarnation: 1, messages: vec![message] };
        send(server.address, &report).await;
        let is_active = client.is_active(object("rev", &[])).await.map(|answer| answer.into_inner().result);
        match second {
            1 => assert!(active.next().await.expect("a change").expect("a change").result),
            9 => {
                let ended = tokio::time::timeout(SETTLED, active.next()).await.expect("with a decision");
                assert!(!ended.expect("a change").expect("a change").result);
            }
            _ => assert!(is_active.expect("an answer"), "{second}"),
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

#[tokio::test]
async fn the_spec_follows_what_a_key_is_told_and_streams_end_with_the_server() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("settings.json");
    let flags = ["--settings", file.to_str().expect("a path"), "--drain-delay", "0s"];
    let mut server = StatServer::with(None, &flags).await;
    let mut client = keda(&server).await;
    let mut specs = client.stream_metric_spec(object("rev", &[])).await.expect("a stream").into_inner();
    let mut active = client.stream_is_active(object("rev", &[])).await.expect("a stream").into_inner();
    let mut next =
        async || specs.next().await.expect("a spec").map(|spec| spec.metric_specs[0].target_size_float);
    assert_eq!(next().await.expect("at once"), 70.0);
    let change_settings = async |server: &StatServer, method: Method, json: Value| {
        let request = Request::builder().method(method).uri("/v1/keys/ns/rev/settings").header("host", "x");
        let request = request.body(Full::from(json.to_string())).expect("a request");
        http::ask(server.address, request).await.expect("an answer").0.as_u16()
    };
    let settings =
        json!({"target": 10, "target_utilization_percentage": 50, "min_scale": 1, "metric": "rps"});
    assert_eq!(change_settings(&server, Method::PUT, settings).await, 200);
    assert_eq!(next().await.expect("the change"), 5.0);

    server.process.signal(libc::SIGTERM);
    assert_eq!(next().await.expect_err("the end").code(), Code::Unavailable);
    let end = async {
        loop {
            match active.next().await {
                Some(Ok(_)) => {}
                end => return end.is_none(),
            }
        }
    };
    let without_error = tokio::time::timeout(SETTLED, end).await.expect("the end of the other stream");
    assert!(without_error, "KEDA's retry grows after errors");
    assert!(server.process.wait(Duration::from_secs(30)).success());

    let server = StatServer::with(Some(server.address), &flags).await;
    let target = async || server.key("ns", "rev").await.map(|key| key["settings"]["target"].clone());
    assert_eq!(target().await, Some(json!(10.0)), "after a restart, before any report");
    let mut client = keda(&server).await;
    assert!(
        client.is_active(object("rev", &[])).await.expect("an answer").into_inner().result,
        "by min_scale"
    );
    // No sender reports the key. That is certain once the longest possible period has passed.
    let certain = Duration::from_secs(90);
    wait::until_equal("desired pods", certain, 1, || server.number("ns", "rev", "desired_pods")).await;
    assert_eq!(change_settings(&server, Method::DELETE, json!(null)).await, 204);
    assert_eq!(target().await, Some(json!(100.0)));
}

#[tokio::test]
async fn after_a_start_traffic_is_told_at_once_and_less_when_all_can_have_reported() {
    let server = StatServer::start(None).await;
    let mut client = keda(&server).await;
    let mut said = Vec::new();
    for pod in 0..10 {
        let since = Snapshot::starting_at(SECOND);
        let load = Snapshot { requests: 70, request_ns: u128::from(70 * SECOND), in_flight: 70, ..since };
        let until = Snapshot { as_of_ns: 2 * SECOND, ..load };
        let (namespace, name) = ("ns".into(), "rev".into());
        let messages = vec![KeyReport { namespace, name, from_gateway: false, since, until }];
        let report = Report { version: 1, pod: format!("pod-{pod}"), incarnation: 1, messages };
        send(server.address, &report).await;
        let active = client.is_active(object("rev", &[])).await.expect("an answer").into_inner();
        assert!(active.result, "with the first report");
        said.push(server.key("ns", "rev").await.expect("the key")["desired_pods"].clone());
    }
    let desired = wait::until("a decision", SETTLED, || async {
        let key = server.key("ns", "rev").await.ok_or("no key")?;
        key["desired_pods"].as_u64().ok_or("none")
    })
    .await;
    assert!(said.iter().all(|desired| desired.is_null()) && desired == 10, "{said:?}, then {desired}");
    assert!(value(&mut client, object("rev", &[])).await > 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_only_gateways_report_comes_down_as_one_that_pods_report() {
    // 70 requests for each pod, and a panic window of three seconds: one of a single second holds
    // no report at times.
    let flags = ["--target=100", "--target-utilization-percentage=70", "--stable-window=6s"];
    let flags = [&flags[..], &["--panic-window-percentage=50"]].concat();
    let server = StatServer::with(None, &flags).await;
    let address = server.address;
    let told = Request::put("/v1/keys/ns/told/settings").header("host", "x");
    let told = told.body(Full::from(json!({"ready_pods": 10}).to_string())).expect("a request");
    assert_eq!(http::ask(address, told).await.expect("an answer").0, 200);
    let load = Arc::new(AtomicU32::new(700));
    let decided = async |name: &str| {
        let key = server.key("ns", name).await.unwrap_or_default();
        (key["desired_pods"].as_u64(), key["panic_mode"].as_bool())
    };
    let mut reports = JoinSet::new();
    for name in ["gateway", "told"] {
        let load = Arc::clone(&load);
        reports.spawn(async move {
            let mut sender = Sender::gateway(&format!("gateway-of-{name}"), "ns", name);
            let mut seconds = tokio::time::interval(Duration::from_secs(1));
            loop {
                seconds.tick().await;
                sender.report(address, load.load(Ordering::SeqCst), 1).await;
            }
        });
    }
    // As many pods as the key wants share its requests.
    let of_pods = Arc::clone(&load);
    let wanted = Arc::new(AtomicU32::new(10));
    let pods = Arc::clone(&wanted);
    reports.spawn(async move {
        let mut senders: Vec<Sender> =
            (0..10).map(|number| Sender::pod(&format!("pod-{number}"), "ns", "pods")).collect();
        let mut seconds = tokio::time::interval(Duration::from_secs(1));
        loop {
            seconds.tick().await;
            let pods = pods.load(Ordering::SeqCst);
            for sender in senders.iter_mut().take(pods as usize) {
                sender.report(address, of_pods.load(Ordering::SeqCst) / pods, 1).await;
            }
        }
    });
    let mut seen = Vec::new();
    for (requests, wanted_pods, panics) in [(700, 10, true), (210, 3, false)] {
        load.store(requests, Ordering::SeqCst);
        let began = Instant::now();
        for name in ["gateway", "told", "pods"] {
            // All its pods are there from the beginning: nothing exceeds what they can take.
            let panics = panics && name != "pods";
            wait::until(
                &format!("{name}: {wanted_pods} pods, panic {panics}"),
                Duration::from_secs(60),
                || async {
                    let ready = decided("pods").await.0.map_or(10, |pods| pods.clamp(1, 10) as u32);
                    wanted.store(ready, Ordering::SeqCst);
                    let now = decided(name).await;
                    if now == (Some(wanted_pods), Some(panics)) { Ok(()) } else { Err(now) }
                },
            )
            .await;
            seen.push((name, wanted_pods, began.elapsed()));
        }
    }
    // It stays so.
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(6) {
        for name in ["gateway", "told", "pods"] {
            assert_eq!(decided(name).await, (Some(3), Some(false)), "{name}");
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    println!("700 requests in flight, then 210, 70 for each pod: {seen:?}");
}

/// Returns the output of a tool of the repository.
fn printed(command: &mut Command) -> String {
    let output = command.current_dir(root()).output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {error}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pythons_grpcio_drives_all_five_methods() {
    let server = StatServer::start(None).await;
    let python = printed(&mut Command::new("tools/python.sh"));
    let _reports = Sender::pod("pod", "ns", "rev").report_every(5, server.address, 30);
    assert_eq!(value(&mut keda(&server).await, object("rev", &[])).await, 30.0, "no longer starting");
    let proto = "src/statserver/proto/externalscaler.proto";
    let answers = printed(Command::new(python).args(["tests/keda.py", &server.grpc.to_string(), proto]));
    let answers: Value = serde_json::from_str(&answers).unwrap_or_else(|e| panic!("{e}: {answers}"));
    let wanted = json!({
        "is_active": true,
        "stream_is_active": true,
        "metric": "inflight-concurrency",
        "target": 2.5,
        "target_rounded": 3,
        "stream_target": 2.5,
        "value": 30.0,
        "unknown_active": "UNAVAILABLE: key ns/nobody: no pod or gateway has reported it",
        "unknown_value": "UNAVAILABLE: key ns/nobody: no pod or gateway has reported it",
        "desired_metric": "inflight-desired-pods",
        "desired_target": 1.0,
        "desired": 1.0,
        "misspelt": "INVALID_ARGUMENT: unknown metadata `tarjet`; did you mean `target`?",
        "refused": "INVALID_ARGUMENT: metadata `target` is \"many\"; expected a number from 0.01 to 1000000000",
    });
    assert_eq!(answers, wanted);
}

#[tokio::test]
async fn the_shipped_scaled_object_and_adapter_rule_say_what_the_server_understands() {
    let server = StatServer::start(None).await;
    let mut client = keda(&server).await;
    for (file, target) in [("keda.yaml", 70.0), ("keda-desired-pods.yaml", 1.0)] {
        let text = std::fs::read_to_string(root().join("deploy/examples").join(file)).expect("the file");
        let shipped: Value = serde_norway::from_str(&text).expect("YAML");
        let metadata = shipped["spec"]["triggers"][0]["metadata"].as_object().expect("metadata");
        let metadata: Vec<(&str, &str)> =
            metadata.iter().map(|(key, value)| (key.as_str(), value.as_str().expect("a string"))).collect();
        let spec = client.get_metric_spec(object("hello", &metadata)).await.expect("a spec").into_inner();
        assert_eq!(spec.metric_specs[0].target_size_float, target, "{file}");
    }

    let text = std::fs::read_to_string(root().join("deploy/examples/hpa.yaml")).expect("the file");
    let query = text.lines().find_map(|line| line.trim().strip_prefix("metricsQuery: ")).expect("a query");
    let query = query.replace("<<.LabelMatchers>>", r#"namespace="ns",name="hello-00001""#);
    let _reports = Sender::pod("pod", "ns", "hello-00001").report_every(5, server.address, 30);
    let prometheus = prometheus::Prometheus::start(&[("statserver", server.address, "/metrics")]).await;
    wait::until_equal("Prometheus' answer", SETTLED, 30.0, || prometheus.query(&query)).await;
}
