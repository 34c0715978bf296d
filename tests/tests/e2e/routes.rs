//! What a gateway counts, and under which key, where Envoy makes several requests of one or chooses
//! between clusters: mirrors, retries, internal redirects, hedging, weighted clusters, and a second
//! gateway. The truth is what the apps and the access logs count.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::Request;
use inflight_e2e::app::App;
use inflight_e2e::bootstrap::Bootstrap;
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

/// Returns a gateway whose only route goes as `route` says, with Istio's clusters for these
/// Services.
fn gateway(statserver: SocketAddr, services: &[(&str, SocketAddr)], route: Value) -> Bootstrap {
    let mut bootstrap = Bootstrap::gateway(statserver, statserver);
    for (name, upstream) in services {
        bootstrap.cluster(&service(name), Some(*upstream));
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

/// Sends requests to an Envoy over ten connections. Each must be answered with `status`.
async fn send(envoy: SocketAddr, path: &'static str, requests: u64, status: u16) {
    let mut clients = JoinSet::new();
    for client in 0..10 {
        clients.spawn(async move {
            let mut connection = Connection::open(envoy).await.expect("a connection");
            for _ in (client..requests).step_by(10) {
                let request = Request::get(path).header("host", "app").body(Full::<Bytes>::default());
                let answer = connection.ask(request.expect("a request")).await.expect("an answer");
                assert_eq!(answer.as_u16(), status);
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
