//! What a gateway counts, and under which key, where Envoy makes several requests of one or chooses
//! between clusters: mirrors, retries, internal redirects, hedging, weighted clusters, and a second
//! gateway. The truth is what the apps and the access logs count.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::Request;
use inflight_e2e::app::App;
use inflight_e2e::bootstrap::{Bootstrap, at};
use inflight_e2e::envoy::{Envoy, Version};
use inflight_e2e::http::{self, Connection};
use inflight_e2e::statserver::StatServer;
use inflight_e2e::wait;
use serde_json::{Value, json};
use tokio::task::JoinSet;

const SETTLED: Duration = Duration::from_secs(20);
const VERSIONS: [Version; 2] = [Version::Oldest, Version::Newest];

/// A pod: an app behind a sidecar that reports the key `shop/NAME`.
struct Pod {
    app: App,
    sidecar: Envoy,
}

impl Pod {
    async fn start(version: Version, name: &str, statserver: SocketAddr) -> Self {
        let app = App::start().await;
        let mut bootstrap = Bootstrap::sidecar(app.address, statserver);
        bootstrap.configure("namespace", "shop".into());
        bootstrap.configure("revision", name.into());
        bootstrap.configure("pod", format!("{name}-pod").into());
        bootstrap.configure("reporting_period", "200ms".into());
        let sidecar = Envoy::start(version, &bootstrap, 2).await;
        Self { app, sidecar }
    }

    /// Returns the requests and the proxied requests that the sidecar counted, once it has as many
    /// as the app and the access log.
    async fn counted(&self) -> (u64, u64) {
        let requests = self.app.counts.requests();
        self.sidecar.requests_when(requests).await;
        let stat = async |name| self.sidecar.stat(name, &[]).await as u64;
        wait::until_equal("requests at the sidecar", SETTLED, requests, || stat("queue_requests_total"))
            .await;
        assert_eq!(self.sidecar.requests().len() as u64, requests, "the log and the app agree");
        (requests, stat("queue_proxied_requests_total").await)
    }
}

/// Returns the name of Istio's cluster for a Service of the namespace `shop`.
fn service(name: &str) -> String {
    format!("outbound|80||{name}.shop.svc.cluster.local")
}

/// Returns a gateway whose first route goes as `route` says, with Istio's clusters for these
/// Services.
fn gateway(statserver: SocketAddr, services: &[(&str, SocketAddr)], route: Value) -> Bootstrap {
    let mut bootstrap = Bootstrap::gateway(statserver, statserver);
    for (name, upstream) in services {
        bootstrap.cluster(&service(name), Some(*upstream));
    }
    // By default a cluster has at most three retries at once.
    for cluster in at(&mut bootstrap.0, "/static_resources/clusters").as_array_mut().expect("clusters") {
        cluster["circuit_breakers"] = json!({"thresholds": [{"max_retries": 1_000}]});
    }
    bootstrap.route(json!({"match": {"prefix": "/"}, "route": route}));
    bootstrap.configure("reporting_period", "200ms".into());
    bootstrap
}

/// Waits until the server has these requests, and nothing in flight, of keys of the namespace
/// `shop`, and of no other keys.
async fn counts(server: &StatServer, wanted: &[(&str, u64)]) {
    let counts = async || {
        let text = http::get(server.address, "/v1/keys").await.expect("the keys");
        let keys: Value = serde_json::from_str(&text).expect("JSON");
        let keys = keys["keys"].as_array().expect("a list").iter();
        keys.map(|key| json!([key["name"], key["requests_total"], key["in_flight"]])).collect::<Vec<_>>()
    };
    let wanted: Vec<Value> = wanted.iter().map(|(name, requests)| json!([name, requests, 0])).collect();
    wait::until_equal("requests and in flight of all keys", SETTLED, wanted, counts).await;
}

/// Sends requests to an Envoy over fifty connections. Each must be answered with `status`, and no
/// answer may name a mark.
async fn send(envoy: SocketAddr, path: &'static str, requests: u64, status: u16) {
    let mut clients = JoinSet::new();
    for client in 0..50 {
        clients.spawn(async move {
            let mut connection = Connection::open(envoy).await.expect("a connection");
            for _ in (client..requests).step_by(50) {
                let request = Request::get(path).header("host", "app").body(Full::<Bytes>::default());
                let answer = connection.ask_for_body(request.expect("a request")).await;
                let (code, body) = answer.expect("an answer");
                let body = String::from_utf8_lossy(&body).to_lowercase();
                let has_mark = body.contains("k-proxy-request") || body.contains("x-inflight-key");
                assert!(code.as_u16() == status && !has_mark, "{code}: {body}");
            }
        });
    }
    while let Some(client) = clients.join_next().await {
        client.expect("a client");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mirrored_requests_count_under_the_key_of_the_mirrors_sidecar() {
    for version in VERSIONS {
        let server = StatServer::start(None).await;
        let cart = Pod::start(version, "cart", server.address).await;
        let mirror = Pod::start(version, "mirror", server.address).await;
        let services = [("cart", cart.sidecar.address), ("shadow", mirror.sidecar.address)];
        let route = json!({
            "cluster": service("cart"),
            "timeout": "0s",
            "request_mirror_policies": [{"cluster": service("shadow")}],
        });
        let front = Envoy::start(version, &gateway(server.address, &services, route), 2).await;
        send(front.address, "/work?ms=5", 1_000, 200).await;
        let logged = front.requests_when(1_000).await.len();
        wait::until_equal("at the mirror", SETTLED, 1_000, async || mirror.app.counts.requests()).await;
        assert_eq!((logged, cart.app.counts.requests()), (1_000, 1_000));
        counts(&server, &[("cart", 1_000), ("mirror", 1_000)]).await;
        assert_eq!(cart.counted().await, (1_000, 1_000));
        assert_eq!(mirror.counted().await, (1_000, 0), "no gateway counted them");
        println!("{version:?}: 1,000 requests under the route's key, 1,000 mirrored ones under the mirror's");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_whose_pods_report_the_routes_own_key_counts_nothing() {
    let version = Version::Newest;
    let server = StatServer::start(None).await;
    let cart = Pod::start(version, "cart", server.address).await;
    let other = Pod::start(version, "cart", server.address).await;
    let services = [("cart", cart.sidecar.address), ("cart-next", other.sidecar.address)];
    let route = json!({
        "cluster": service("cart"),
        "request_mirror_policies": [{"cluster": service("cart-next")}],
    });
    let front = Envoy::start(version, &gateway(server.address, &services, route), 2).await;
    send(front.address, "/work", 200, 200).await;
    wait::until_equal("at the mirror", SETTLED, 200, async || other.app.counts.requests()).await;
    counts(&server, &[("cart", 200)]).await;
    assert_eq!((cart.counted().await, other.counted().await), ((200, 200), (200, 200)));
}

/// A gateway with two routes to one pod, whose key is `shop/cart`: `/same` goes to the Service of
/// that name, all other paths to another Service.
async fn two_routes(version: Version, server: &StatServer, options: Value) -> (Pod, Envoy) {
    let pod = Pod::start(version, "cart", server.address).await;
    let services = [("cart", pod.sidecar.address), ("shop-front", pod.sidecar.address)];
    let route = |name: &str| {
        let mut route = options.clone();
        route["cluster"] = service(name).into();
        route
    };
    let mut bootstrap = gateway(server.address, &services, route("shop-front"));
    bootstrap.route(json!({"match": {"prefix": "/same"}, "route": route("cart")}));
    let front = Envoy::start(version, &bootstrap, 2).await;
    (pod, front)
}

/// Sends 50 requests on either route, each of which takes `tries` tries. The gateway counts each
/// request once. The sidecar counts each try, as proxied if the mark has its own key. Returns the
/// most tries that were in the app at once.
async fn several_tries(
    version: Version,
    options: Value,
    path: [&'static str; 2],
    status: u16,
    tries: u64,
) -> u64 {
    let server = StatServer::start(None).await;
    let (pod, front) = two_routes(version, &server, options).await;
    let [same, other] = path;
    send(front.address, same, 50, status).await;
    counts(&server, &[("cart", 50)]).await;
    let (of_same, proxied) = pod.counted().await;
    assert_eq!(of_same, proxied, "each try has the mark");
    send(front.address, other, 50, status).await;
    let of_other = pod.app.counts.requests() - of_same;
    // On a busy machine a try may be late, and its successor with it.
    let few = 50 * (tries - 1);
    assert!(of_same.min(of_other) > few && of_same.max(of_other) <= 50 * tries, "{of_same} and {of_other}");
    // Nobody counted these tries under the pod's key.
    counts(&server, &[("cart", 50 + of_other), ("shop-front", 50)]).await;
    assert_eq!(pod.counted().await, (of_same + of_other, of_same));
    assert_eq!(front.requests_when(100).await.len(), 100);
    println!(
        "{version:?}: 50 requests of {tries} tries count 50 under the gateway's key, and {of_other} at a sidecar of \
         another"
    );
    pod.app.counts.most()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retried_request_counts_once_at_the_gateway_and_each_try_at_a_sidecar_of_another_key() {
    for version in VERSIONS {
        let options = json!({
            "timeout": "30s",
            "retry_policy": {
                "retry_on": "5xx",
                "num_retries": 2,
                "per_try_timeout": "0.5s",
                "retry_back_off": {"base_interval": "0.001s"},
            },
        });
        // No try is answered in time.
        several_tries(version, options, ["/same?ms=20000", "/other?ms=20000"], 504, 3).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hedged_request_counts_once_at_the_gateway_and_each_try_at_a_sidecar_of_another_key() {
    for version in VERSIONS {
        let options = json!({
            "timeout": "30s",
            "hedge_policy": {"hedge_on_per_try_timeout": true},
            "retry_policy": {"retry_on": "5xx", "num_retries": 1, "per_try_timeout": "0.5s"},
        });
        // The first try is answered, while the second is in the app as well.
        let most = several_tries(version, options, ["/same?ms=1500", "/other?ms=1500"], 200, 2).await;
        assert!(most > 50, "two tries of a request at once: {most}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_internal_redirect_counts_once_under_the_key_of_each_route() {
    for version in VERSIONS {
        let server = StatServer::start(None).await;
        let first = Pod::start(version, "first", server.address).await;
        let second = Pod::start(version, "second", server.address).await;
        let services = [("first", first.sidecar.address), ("second", second.sidecar.address)];
        let mut bootstrap = gateway(server.address, &services, json!({"cluster": service("second")}));
        bootstrap.route(json!({
            "match": {"prefix": "/redirect"},
            "route": {
                "cluster": service("first"),
                "internal_redirect_policy": {"max_internal_redirects": 1, "redirect_response_codes": [302]},
            },
        }));
        let front = Envoy::start(version, &bootstrap, 2).await;
        send(front.address, "/redirect?/headers", 500, 200).await;
        counts(&server, &[("first", 500), ("second", 500)]).await;
        assert_eq!((first.counted().await, second.counted().await), ((500, 500), (500, 500)));
        let logged = front.requests_when(500).await.len();
        println!(
            "{version:?}: 500 redirected requests count 500 under each key; {logged} lines in the gateway's log"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_weighted_clusters_each_request_counts_under_the_one_that_it_goes_to() {
    for version in VERSIONS {
        let server = StatServer::start(None).await;
        let [one, two] = [
            Pod::start(version, "cart-v1", server.address).await,
            Pod::start(version, "cart-v2", server.address).await,
        ];
        let subset = |name: &str| format!("outbound|80|{name}|cart.shop.svc.cluster.local");
        let route = json!({"weighted_clusters": {"clusters": [
            {"name": subset("v1"), "weight": 50},
            {"name": subset("v2"), "weight": 50},
        ]}});
        let mut bootstrap = gateway(server.address, &[], route);
        bootstrap.cluster(&subset("v1"), Some(one.sidecar.address));
        bootstrap.cluster(&subset("v2"), Some(two.sidecar.address));
        let front = Envoy::start(version, &bootstrap, 2).await;
        send(front.address, "/headers", 2_000, 200).await;
        let [of_one, of_two] = [&one, &two].map(|pod| pod.app.counts.requests());
        assert!(of_one + of_two == 2_000 && of_one > 500 && of_two > 500, "{of_one} and {of_two}");
        counts(&server, &[("cart-v1", of_one), ("cart-v2", of_two)]).await;
        let proxied = (one.counted().await, two.counted().await);
        assert_eq!(
            proxied,
            ((of_one, of_one), (of_two, of_two)),
            "each mark names the cluster that was taken"
        );
        println!("{version:?}: 2,000 requests to two clusters of equal weight count {of_one} and {of_two}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_gateways_in_a_row_count_twice_unless_the_inner_one_or_one_alone_has_the_filter() {
    for (outer, inner, times) in [
        ("counts", "counts", 2),
        ("none", "counts", 1),
        ("counts", "none", 1),
        ("silent", "counts", 1),
        // The inner one removes the marks of the outer one.
        ("counts", "silent", 2),
    ] {
        let server = StatServer::start(None).await;
        let pod = Pod::start(Version::Newest, "cart", server.address).await;
        let start = async |name: &str, how: &str, upstream: SocketAddr| {
            let route = json!({"cluster": service("cart")});
            let mut bootstrap = gateway(server.address, &[("cart", upstream)], route);
            bootstrap.configure("pod", name.into());
            match how {
                "none" => bootstrap.without_filter(),
                "silent" => {
                    let silent = json!({"role": "gateway", "pod": name, "gateway": {"mark": false}});
                    bootstrap.configuration(&silent.to_string());
                }
                _ => {}
            }
            Envoy::start(Version::Newest, &bootstrap, 2).await
        };
        let waypoint = start("waypoint", inner, pod.sidecar.address).await;
        let ingress = start("ingress", outer, waypoint.address).await;
        send(ingress.address, "/headers", 200, 200).await;
        counts(&server, &[("cart", times * 200)]).await;
        println!("outer gateway {outer}, inner {inner}: 200 requests count {}", times * 200);
    }
}
