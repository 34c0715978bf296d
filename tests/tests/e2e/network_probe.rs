//! Network probes that a sidecar answers in the app's place, on real Envoys: what the activator gets,
//! what the app sees, and a gateway that holds in front of it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::Request;
use inflight_e2e::app::App;
use inflight_e2e::bootstrap::{Bootstrap, CLUSTER, EndpointFile, NOBODY};
use inflight_e2e::envoy::{Envoy, Version};
use inflight_e2e::tap::Tap;
use inflight_e2e::{http, wait};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};

const SETTLED: Duration = Duration::from_secs(15);
const KEY: &[(&str, &str)] = &[("namespace_name", "default"), ("revision_name", "hello-00001")];

/// An app of a few lines: it answers as it is told to, and keeps the heads of all requests.
struct Probed {
    address: SocketAddr,
    said: Arc<Said>,
    serving: JoinHandle<()>,
}

#[derive(Default)]
struct Said {
    status: AtomicU64,
    delay_ms: AtomicU64,
    heads: Mutex<Vec<String>>,
}

impl Probed {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let said = Arc::new(Said::default());
        let shared = Arc::clone(&said);
        let serving = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let said = Arc::clone(&shared);
                tokio::spawn(async move {
                    let mut head = Vec::new();
                    while let Ok(byte) = stream.read_u8().await {
                        head.push(byte);
                        if head.ends_with(b"\r\n\r\n") {
                            let text = String::from_utf8_lossy(&std::mem::take(&mut head)).into_owned();
                            said.heads.lock().expect("no panic under this lock").push(text);
                            tokio::time::sleep(Duration::from_millis(said.delay_ms.load(Ordering::SeqCst)))
                                .await;
                            let status = said.status.load(Ordering::SeqCst);
                            let answer = format!("HTTP/1.1 {status} X\r\ncontent-length: 2\r\n\r\nok");
                            let _ = stream.write_all(answer.as_bytes()).await;
                        }
                    }
                });
            }
        });
        Self { address, said, serving }
    }

    fn answers(&self, status: u64, delay_ms: u64) {
        self.said.status.store(status, Ordering::SeqCst);
        self.said.delay_ms.store(delay_ms, Ordering::SeqCst);
    }

    fn heads(&self) -> Vec<String> {
        std::mem::take(&mut *self.said.heads.lock().expect("no panic under this lock"))
    }
}

impl Drop for Probed {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// Returns a network probe as Knative's activator sends it.
fn network_probe() -> Request<Full<Bytes>> {
    let request = Request::get("/healthz").header("host", "10.0.0.7:8012");
    let request = request.header("user-agent", "Knative-Activator-Probe").header("k-network-probe", "queue");
    request.body(Full::default()).expect("a request")
}

/// Sends a network probe. Returns status and body of the answer.
async fn probed(envoy: &Envoy) -> (u16, Bytes) {
    let (status, body) = http::ask(envoy.address, network_probe()).await.expect("an answer");
    (status.as_u16(), body)
}

const READY: (u16, Bytes) = (200, Bytes::from_static(b"queue"));
const NOT_READY: (u16, Bytes) = (503, Bytes::new());

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_probe_gets_queue_while_the_app_answers_and_counts_nowhere() {
    for version in [Version::Oldest, Version::Newest] {
        let (app, tap) = (Probed::start().await, Tap::start(None).await);
        let mut bootstrap = Bootstrap::knative(app.address);
        bootstrap.cluster("inflight-statserver", Some(tap.address));
        bootstrap.configure("statserver", json!({"cluster": "inflight-statserver"}));
        bootstrap.configure("app_probe_path", json!("/ready?x"));
        let envoy = Envoy::start(version, &bootstrap, 2).await;
        for (status, expected) in [
            (200, READY),
            (404, READY),
            (500, READY),
            (301, READY),
            (502, NOT_READY),
            (503, NOT_READY),
            (504, NOT_READY),
        ] {
            app.answers(status, 0);
            assert_eq!(probed(&envoy).await, expected, "{version:?}, the app answers {status}");
            let heads = app.heads();
            let [head] = &heads[..] else { panic!("one probe: {heads:?}") };
            let head = head.to_lowercase();
            assert!(head.starts_with("get /ready?x http/1.1\r\nhost: localhost\r\n"), "{head}");
            assert!(head.contains("user-agent: inflight-probe/1\r\n"), "{head}");
        }
        // The kubelet's with that header too; without it, and with another value, it is the app's.
        app.answers(200, 0);
        for (agent, header, expected) in [
            ("kube-probe/1.33", Some("queue"), "queue"),
            ("kube-probe/1.33", None, "ok"),
            ("x", Some("probe"), "ok"),
        ] {
            let mut request = Request::get("/app").header("host", "app").header("user-agent", agent);
            if let Some(value) = header {
                request = request.header("k-network-probe", value);
            }
            let request = request.body(Full::default()).expect("a request");
            let (status, body) = http::ask(envoy.address, request).await.expect("an answer");
            assert_eq!((status.as_u16(), &body[..]), (200, expected.as_bytes()), "{agent} {header:?}");
            let is_ours = app.heads()[0].starts_with("GET /ready?x");
            assert_eq!(is_ours, expected == "queue", "{agent} {header:?}");
        }
        let headers = http::headers(envoy.address, network_probe()).await.expect("an answer");
        assert_eq!(headers["content-type"], "text/plain; charset=utf-8");
        envoy.reports(2).await;
        let reported: u64 =
            tap.acknowledged().iter().flat_map(|report| &report.messages).map(|m| m.until.requests).sum();
        let stats = ["queue_requests_total", "revision_request_count", "revision_app_request_count"];
        for name in stats {
            assert_eq!(envoy.stat(name, &[]).await, 0.0, "{name}");
        }
        assert_eq!(reported, 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_probe_gets_503_while_there_is_no_app() {
    for version in [Version::Oldest, Version::Newest] {
        let gone = App::start().await.address;
        let started = |change: fn(&mut Bootstrap)| {
            let mut bootstrap = Bootstrap::knative(gone);
            change(&mut bootstrap);
            async move { Envoy::start(version, &bootstrap, 2).await }
        };
        // It refuses, or it has no endpoint.
        for change in [|_: &mut Bootstrap| {}, |bootstrap: &mut Bootstrap| bootstrap.cluster("app", None)] {
            let envoy = started(change).await;
            for _ in 0..10 {
                assert_eq!(probed(&envoy).await, NOT_READY);
            }
            assert!(!envoy.process.log().contains("inflight: "), "{}", envoy.process.log());
        }
        // Envoy has no such cluster: the log says so once for each worker.
        let envoy = started(|bootstrap| bootstrap.configure("app_cluster", json!("apps"))).await;
        for _ in 0..10 {
            assert_eq!(probed(&envoy).await, NOT_READY);
        }
        let log = envoy.process.log();
        let lines = log.lines().filter(|line| line.contains("Envoy has no cluster \"apps\"")).count();
        assert!((1..=2).contains(&lines), "{lines} lines:\n{log}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_app_is_found_ready_by_who_asks_meanwhile_and_a_hanging_one_is_not() {
    for version in [Version::Oldest, Version::Newest] {
        let app = Probed::start().await;
        let mut bootstrap = Bootstrap::knative(app.address);
        bootstrap.configure("container_concurrency", json!(1));
        let envoy = Envoy::start(version, &bootstrap, 1).await;
        // Those who ask leave after 300 ms, as the activator does, and the app takes 700 ms.
        app.answers(200, 700);
        let began = Instant::now();
        let answers = wait::until("an answer within 300 ms", SETTLED, || async {
            let asked = tokio::time::timeout(Duration::from_millis(300), probed(&envoy)).await;
            asked.map_err(|_| "none")
        });
        assert_eq!(answers.await, READY);
        assert!(began.elapsed() >= Duration::from_millis(700), "{:?}", began.elapsed());
        assert_eq!(app.heads().len(), 1, "three asked and the app got one probe");
        // The only permit is taken, and nothing waits for it.
        app.answers(200, 2_000);
        let address = envoy.address;
        let busy = tokio::spawn(async move { http::get(address, "/busy").await });
        wait::until("the app is busy", SETTLED, || async {
            let heads = app.said.heads.lock().expect("no panic under this lock").clone();
            if heads.iter().any(|head| head.starts_with("GET /busy")) { Ok(()) } else { Err(heads) }
        })
        .await;
        app.answers(200, 0);
        assert_eq!(probed(&envoy).await, READY);
        app.answers(200, 60_000);
        let began = Instant::now();
        let mut asked = JoinSet::new();
        for _ in 0..600 {
            asked.spawn(async move { http::ask(address, network_probe()).await });
        }
        while let Some(answer) = asked.join_next().await {
            let (status, body) = answer.expect("a client").expect("an answer");
            assert_eq!((status.as_u16(), body), NOT_READY);
        }
        let took = began.elapsed();
        println!("{version:?}: a hanging app is not ready after {took:?}");
        assert!((Duration::from_millis(900)..Duration::from_secs(5)).contains(&took), "{took:?}");
        assert_eq!(busy.await.expect("a client").as_deref(), Ok("ok"));
        let log = envoy.process.log();
        assert!(!log.contains("panicked") && !log.contains("Wasm VM"), "{log}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_holds_waits_for_the_app_behind_a_sidecar() {
    for version in [Version::Oldest, Version::Newest] {
        let app = Probed::start().await;
        app.answers(503, 0);
        let mut bootstrap = Bootstrap::knative(app.address);
        bootstrap.configure("app_probe_path", json!("/ready"));
        let sidecar = Envoy::start(version, &bootstrap, 1).await;
        let endpoints = EndpointFile::new();
        let hold = json!({"probe_period": "20ms", "trust": "200ms"});
        let bootstrap = Bootstrap::holding(&endpoints, NOBODY, hold);
        let gateway = Envoy::start(version, &bootstrap, 2).await;
        endpoints.set(CLUSTER, &[sidecar.address]);
        let mut clients = JoinSet::new();
        for _ in 0..20 {
            let address = gateway.address;
            clients.spawn(async move { http::get(address, "/work").await });
        }
        // The sidecar is there, and the app answers that it is not ready.
        wait::until_equal("held requests", SETTLED, 20.0, || gateway.stat("activator_held_requests", KEY))
            .await;
        wait::until("the app was probed often", SETTLED, || async {
            let heads = app.said.heads.lock().expect("no panic under this lock").clone();
            if heads.len() >= 10 { Ok(()) } else { Err(heads) }
        })
        .await;
        let early = app.heads();
        assert!(early.iter().all(|head| head.starts_with("GET /ready HTTP/1.1\r\n")), "{early:?}");
        assert_eq!(gateway.stat("activator_held_requests", KEY).await, 20.0);
        app.answers(200, 0);
        while let Some(answer) = clients.join_next().await {
            assert_eq!(answer.expect("a client").as_deref(), Ok("ok"));
        }
        let work = app.heads().iter().filter(|head| head.starts_with("GET /work ")).count();
        assert_eq!(work, 20);
        wait::until_equal("requests without probes", SETTLED, 20.0, || {
            sidecar.stat("queue_requests_total", &[])
        })
        .await;
    }
}
