//! The names of keys and the marks of requests, on Envoys with Istio's node metadata: what a
//! gateway and a sidecar report together, whatever a client sends.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::Request;
use inflight_e2e::app::App;
use inflight_e2e::bootstrap::Bootstrap;
use inflight_e2e::envoy::{Envoy, Version};
use inflight_e2e::http::{self, Connection};
use inflight_e2e::load::{Load, Plan};
use inflight_e2e::statserver::StatServer;
use inflight_e2e::wait;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::autoscalers::proto::ScaledObjectRef;
use crate::autoscalers::proto::external_scaler_client::ExternalScalerClient;

const SETTLED: Duration = Duration::from_secs(20);
/// The cluster that Istio makes for the Service `reviews`.
const SERVICE: &str = "outbound|9080||reviews.bookinfo.svc.cluster.local";

/// Returns the sidecar of a pod of the workload `reviews-v2`, with the metadata that Istio gives
/// it.
fn sidecar(app: SocketAddr, statserver: SocketAddr) -> Bootstrap {
    let mut bootstrap = Bootstrap::istio(app, statserver);
    let labels =
        json!({"service.istio.io/canonical-name": "reviews", "service.istio.io/canonical-revision": "v2"});
    bootstrap.0["node"] = json!({"id": "sidecar", "cluster": "reviews.bookinfo", "metadata": {
        "NAMESPACE": "bookinfo",
        "NAME": "reviews-v2-6d4f-k8w2z",
        "WORKLOAD_NAME": "reviews-v2",
        "LABELS": labels,
    }});
    bootstrap.configure("reporting_period", "200ms".into());
    bootstrap
}

/// Returns an ingress gateway with one route, to the Service.
fn gateway(upstream: SocketAddr, statserver: SocketAddr) -> Bootstrap {
    let mut bootstrap = Bootstrap::istio_gateway(upstream, statserver);
    bootstrap.cluster(SERVICE, Some(upstream));
    bootstrap.route(json!({"match": {"prefix": "/"}, "route": {"cluster": SERVICE, "timeout": "0s"}}));
    bootstrap.configure("reporting_period", "200ms".into());
    bootstrap
}

/// Returns requests, in flight, gateways and pods of a key of the namespace `bookinfo`.
async fn figures(server: &StatServer, name: &str) -> Option<[u64; 4]> {
    let key = server.key("bookinfo", name).await?;
    let number = |field: &str| key[field].as_u64();
    Some([number("requests_total")?, number("in_flight")?, number("gateways")?, number("pods")?])
}

/// Returns requests and in flight of a key. A gateway that has no requests soon counts no longer.
async fn totals(server: &StatServer, name: &str) -> Option<[u64; 2]> {
    let [requests, in_flight, ..] = figures(server, name).await?;
    Some([requests, in_flight])
}

/// Returns name, role, in flight and proxied in flight of each sender of a key.
async fn senders(server: &StatServer, name: &str) -> Value {
    let text = http::get(server.address, &format!("/v1/keys/bookinfo/{name}/senders")).await;
    let answer: Value = serde_json::from_str(&text.expect("the senders")).expect("JSON");
    let senders = answer["senders"].as_array().expect("a list").iter();
    senders.map(|s| json!([s["name"], s["role"], s["in_flight"], s["proxied_in_flight"]])).collect()
}

/// Returns KEDA's view of keys of the namespace `bookinfo`: whether each is active.
async fn active(server: &StatServer, names: &[&str]) -> Result<Vec<bool>, String> {
    let client = ExternalScalerClient::connect(format!("http://{}", server.grpc)).await;
    let mut client = client.map_err(|e| e.to_string())?;
    let mut active = Vec::new();
    for name in names {
        let asked = ScaledObjectRef {
            name: (*name).into(),
            namespace: "bookinfo".into(),
            ..ScaledObjectRef::default()
        };
        active.push(client.is_active(asked).await.map_err(|e| e.to_string())?.into_inner().result);
    }
    Ok(active)
}

/// Opens ten requests through an Envoy, and waits until all of them are in the app.
async fn ten_open(envoy: SocketAddr, app: &App) -> JoinSet<()> {
    let mut open = JoinSet::new();
    for _ in 0..10 {
        let request = Request::get("/work?ms=600000").header("host", "app").body(Full::default());
        let request = request.expect("a request");
        open.spawn(async move { drop(http::ask(envoy, request).await) });
    }
    wait::until_equal("in the app", SETTLED, 10, async || app.counts.now()).await;
    open
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_at_the_gateway_and_a_workload_at_the_sidecar_are_two_complete_keys() {
    for version in [Version::Oldest, Version::Newest] {
        let app = App::start().await;
        let server = StatServer::with(None, &["--stable-window", "6s"]).await;
        let pod = Envoy::start(version, &sidecar(app.address, server.address), 2).await;
        let front = Envoy::start(version, &gateway(pod.address, server.address), 2).await;
        let open = ten_open(front.address, &app).await;
        wait::until_equal("the Service's figures", SETTLED, Some([10, 10, 1, 0]), || {
            figures(&server, "reviews")
        })
        .await;
        wait::until_equal("the workload's figures", SETTLED, Some([10, 10, 0, 1]), || {
            figures(&server, "reviews-v2")
        })
        .await;
        assert_eq!(senders(&server, "reviews").await, json!([["gw-7", "gateway", 10, 0]]));
        let of_pod = json!([["reviews-v2-6d4f-k8w2z", "pod", 10, 0]]);
        assert_eq!(senders(&server, "reviews-v2").await, of_pod, "nothing is subtracted");
        // For longer than a stable window.
        let (names, began) = (["reviews", "reviews-v2"], Instant::now());
        let mut answers = 0;
        while began.elapsed() < Duration::from_secs(9) {
            assert_eq!(active(&server, &names).await, Ok(vec![true, true]), "after {:?}", began.elapsed());
            answers += 1;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        for name in names {
            wait::until("the stable average is ten", SETTLED, || async {
                let key = server.key("bookinfo", name).await.expect("a key");
                let average = key["stable"]["concurrency"].as_f64().expect("a number");
                if (9.9..=10.1).contains(&average) { Ok(()) } else { Err((name, average)) }
            })
            .await;
        }

        drop(open);
        let plan = Plan { requests: 1_000, ..Plan::default() };
        let through = Load::start(plan, front.address, &app.counts);
        let direct = Load::start(plan, pod.address, &app.counts);
        assert_eq!(through.finish().await + direct.finish().await, 2_000);
        wait::until_equal("the Service's requests", SETTLED, Some([1_010, 0]), || totals(&server, "reviews"))
            .await;
        wait::until_equal("the workload's requests", SETTLED, Some([2_010, 0]), || {
            totals(&server, "reviews-v2")
        })
        .await;
        let idle = || active(&server, &names);
        wait::until_equal("active without requests", SETTLED, Ok(vec![false, false]), idle).await;
        println!(
            "{version:?}: ten requests in flight at both keys, both active in {answers} answers of nine seconds"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_names_from_the_service_gateway_and_sidecar_report_one_key() {
    for version in [Version::Oldest, Version::Newest] {
        let (app, server) = (App::start().await, StatServer::start(None).await);
        let mut bootstrap = sidecar(app.address, server.address);
        bootstrap.configure("name_from", "service".into());
        let pod = Envoy::start(version, &bootstrap, 2).await;
        let front = Envoy::start(version, &gateway(pod.address, server.address), 2).await;
        let open = ten_open(front.address, &app).await;
        wait::until_equal("the key's figures", SETTLED, Some([10, 10, 1, 1]), || figures(&server, "reviews"))
            .await;
        let both = json!([["gw-7", "gateway", 10, 0], ["reviews-v2-6d4f-k8w2z", "pod", 0, 10]]);
        wait::until_equal("the senders", SETTLED, both, || senders(&server, "reviews")).await;
        assert_eq!(active(&server, &["reviews"]).await, Ok(vec![true]));

        drop(open);
        let plan = Plan { requests: 3_000, connections: 20, average_ms: 5.0, ..Plan::default() };
        let through = Load::start(plan, front.address, &app.counts);
        let direct = Load::start(Plan { requests: 1_000, ..plan }, pod.address, &app.counts);
        let sent = 10 + through.finish().await + direct.finish().await;
        assert_eq!((sent, app.counts.requests()), (4_010, 4_010));
        wait::until_equal("the key's requests", SETTLED, Some([sent, 0]), || totals(&server, "reviews"))
            .await;
        wait::until("the share of proxied requests is right", SETTLED, || async {
            let share = server.key("bookinfo", "reviews").await.expect("the key")["proxied_share"].as_f64();
            let is_right = share.is_some_and(|share| (share - 3_010.0 / 4_010.0).abs() < 0.001);
            if is_right { Ok(()) } else { Err(share) }
        })
        .await;
        let keys = http::get(server.address, "/v1/keys").await.expect("the keys");
        let keys: Value = serde_json::from_str(&keys).expect("JSON");
        assert_eq!(keys["found"], 1, "{keys}");
        println!("{version:?}: {sent} requests, 3,010 of them through the gateway, under one key");
    }
}

/// Returns headers of a client, number by number: marks with honest and hostile values, and none.
fn marks(number: u64) -> Vec<(&'static str, Vec<u8>)> {
    const OWN: &[u8] = b"bookinfo/reviews";
    let (proxied, key) = ("K-Proxy-Request", "X-Inflight-Key");
    let mark = |name, value: &[u8]| (name, value.to_vec());
    match number % 20 {
        0 => vec![],
        1 => vec![mark(proxied, b"activator")],
        2 => vec![mark(key, OWN)],
        3 => vec![mark(proxied, b"activator"), mark(key, OWN)],
        4 => vec![mark(proxied, b"activator"), mark(key, b"bookinfo/reviews-v2")],
        5 => vec![mark(proxied, b"activator"), mark(key, b"elsewhere/other")],
        6 => vec![mark(proxied, b""), mark(key, b"")],
        7 => vec![mark(proxied, b"activator"), mark(key, b"")],
        8 => vec![mark(proxied, b""), mark(key, OWN)],
        9 => vec![mark(proxied, b"activator"), mark(proxied, b"activator")],
        10 => vec![mark(key, OWN), mark(key, OWN)],
        11 => vec![mark(key, b"elsewhere/other"), mark(key, OWN), mark(proxied, b"activator")],
        12 => vec![mark(proxied, b"something"), mark(proxied, b"activator"), mark(key, OWN), mark(key, b"")],
        13 => vec![mark(proxied, &[b'a'; 10_000]), mark(key, &[b'k'; 20_000])],
        14 => vec![mark(proxied, b"activator"), mark(key, b"\xff\xfe not UTF-8")],
        15 => vec![mark(proxied, b"\xff"), mark(key, b"bookinfo/reviews, elsewhere/other")],
        16 => vec![mark(proxied, b"activator"), mark(key, b"%2e%2e/..")],
        17 => vec![mark("Connection", b"K-Proxy-Request, X-Inflight-Key, keep-alive")],
        18 => vec![
            mark("Connection", b"X-Inflight-Key, keep-alive"),
            mark(proxied, b"activator"),
            mark(key, b"elsewhere/other"),
        ],
        _ => vec![mark("k-kubelet-probe", b"queue"), mark("k-network-probe", b"probe"), mark(key, OWN)],
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn marks_that_a_client_sends_through_a_gateway_change_nothing() {
    const REQUESTS: u64 = 10_000;
    for version in [Version::Oldest, Version::Newest] {
        let (app, server) = (App::start().await, StatServer::start(None).await);
        let mut bootstrap = sidecar(app.address, server.address);
        bootstrap.configure("name_from", "service".into());
        let pod = Envoy::start(version, &bootstrap, 2).await;
        let front = Envoy::start(version, &gateway(pod.address, server.address), 2).await;
        let mut clients = JoinSet::new();
        for client in 0..20 {
            let address = front.address;
            clients.spawn(async move {
                let mut connection = Connection::open(address).await.expect("a connection");
                for number in (client..REQUESTS).step_by(20) {
                    let mut request = Request::get("/headers").header("host", "app");
                    // All kinds of marks over each connection.
                    let sent = marks(number / 20 + client);
                    for (name, value) in &sent {
                        request = request.header(*name, &value[..]);
                    }
                    let request = request.body(Full::<Bytes>::default()).expect("a request");
                    let (status, body) = connection.ask_for_body(request).await.expect("an answer");
                    let seen = String::from_utf8_lossy(&body).to_lowercase();
                    assert_eq!(status, 200, "{sent:?}");
                    for header in ["k-proxy-request", "x-inflight-key"] {
                        assert!(!seen.contains(header), "{sent:?} reached the app as {seen}");
                    }
                }
            });
        }
        while let Some(client) = clients.join_next().await {
            client.expect("a client");
        }
        assert_eq!(app.counts.requests(), REQUESTS);
        wait::until_equal("the key's requests", SETTLED, Some([REQUESTS, 0]), || totals(&server, "reviews"))
            .await;
        let at_the_sidecar = async || {
            let stat = async |name| pod.stat(name, &[]).await as u64;
            (stat("queue_requests_total").await, stat("queue_proxied_requests_total").await)
        };
        let wanted = (REQUESTS, REQUESTS);
        wait::until_equal("requests and proxied ones at the sidecar", SETTLED, wanted, at_the_sidecar).await;
        // No client made a key of its own.
        let keys = http::get(server.address, "/v1/keys").await.expect("the keys");
        let keys: Value = serde_json::from_str(&keys).expect("JSON");
        assert_eq!(keys["found"], 1, "{keys}");
        println!("{version:?}: {REQUESTS} requests with twenty kinds of marks, counted once");
    }
}
