//! The shipped gateways that hold, on real Envoys: every kind of request waits for the first pod, and
//! Envoy's own timeouts and windows do what `docs/scale-to-zero.md` says of them.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2::{self, SendRequest};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use inflight_e2e::app::App;
use inflight_e2e::bootstrap::{Bootstrap, CLUSTER, EndpointFile, NOBODY, at};
use inflight_e2e::envoy::{Envoy, How, Version};
use inflight_e2e::statserver::StatServer;
use inflight_e2e::{http, root, truth, wait};
use inflight_stats::config::parse_duration;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

const SETTLED: Duration = Duration::from_secs(20);
const KEY: &[(&str, &str)] = &[("namespace_name", "default"), ("revision_name", "hello-00001")];

/// An app that reads the whole body of a request and answers with its length, to a path with `slow`
/// after two seconds.
struct Reader {
    address: SocketAddr,
    requests: Arc<AtomicU64>,
    serving: JoinHandle<()>,
}

impl Reader {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let requests = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&requests);
        let serving = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let counter = Arc::clone(&counter);
                let service = service_fn(move |request: Request<Incoming>| {
                    counter.fetch_add(1, Ordering::SeqCst);
                    async move {
                        let is_slow = request.uri().path().contains("slow");
                        let bytes = request.into_body().collect().await?.to_bytes().len();
                        if is_slow {
                            tokio::time::sleep(Duration::from_secs(2)).await;
                        }
                        Ok::<_, hyper::Error>(Response::new(Full::new(Bytes::from(bytes.to_string()))))
                    }
                });
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        Self { address, requests, serving }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

fn request(path: &str, bytes: usize) -> Request<Full<Bytes>> {
    let request = Request::post(format!("http://hello{path}")).header("host", "hello");
    request.body(Full::new(Bytes::from(vec![7; bytes]))).expect("a request")
}

/// An HTTP/2 connection for many requests at once.
async fn connection(to: SocketAddr) -> SendRequest<Full<Bytes>> {
    let stream = TcpStream::connect(to).await.expect("a connection");
    let handshake = http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
    let (sender, connection) = handshake.await.expect("HTTP/2");
    tokio::spawn(connection);
    sender
}

/// Sends a request over an HTTP/2 connection. Returns status and body of the answer.
async fn ask(
    mut sender: SendRequest<Full<Bytes>>,
    request: Request<Full<Bytes>>,
) -> Result<(u16, Bytes), String> {
    let response = sender.send_request(request).await.map_err(|e| format!("{e:?}"))?;
    let status = response.status().as_u16();
    Ok((status, response.into_body().collect().await.map_err(|e| format!("{e:?}"))?.to_bytes()))
}

async fn until_held(envoy: &Envoy, requests: f64) {
    wait::until_equal("held requests", SETTLED, requests, || envoy.stat("activator_held_requests", KEY))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_shipped_gateways_hold_every_kind_of_request_until_there_is_a_pod() {
    const BODY: usize = 1_000_000;
    type Shipped = fn(&EndpointFile, SocketAddr) -> Bootstrap;
    let files: [(&str, Shipped); 2] =
        [("plain", Bootstrap::scale_to_zero), ("Istio", Bootstrap::istio_scale_to_zero)];
    for version in [Version::Oldest, Version::Newest] {
        for (name, shipped) in files {
            let server = StatServer::start(None).await;
            let endpoints = EndpointFile::new();
            let envoy = Envoy::start(version, &shipped(&endpoints, server.address), 2).await;
            let address = envoy.address;
            let mut clients = JoinSet::new();
            let sender = connection(address).await;
            for bytes in [0, 10, BODY, BODY] {
                let sender = sender.clone();
                clients.spawn(ask(sender, request("/work", bytes)));
                clients.spawn(async move {
                    let (status, body) = http::ask(address, request("/work", bytes)).await?;
                    Ok((status.as_u16(), body))
                });
            }
            until_held(&envoy, 8.0).await;
            let key = async || {
                let key = server.key("default", "hello-00001").await?;
                Some((key["in_flight"].as_u64()?, key["desired_pods"].as_u64()?))
            };
            wait::until_equal("in flight and desired", SETTLED, Some((8, 1)), key).await;
            let app = Reader::start().await;
            endpoints.set(CLUSTER, &[app.address]);
            let mut lengths = Vec::new();
            while let Some(answer) = clients.join_next().await {
                let (status, body) = answer.expect("a client").expect("an answer");
                assert_eq!(status, 200, "{name}: {body:?}");
                lengths.push(String::from_utf8_lossy(&body).parse::<usize>().expect("a length"));
            }
            lengths.sort_unstable();
            assert_eq!(lengths, [0, 0, 10, 10, BODY, BODY, BODY, BODY], "{name}");
            // More than eight: the probes.
            assert!(app.requests.load(Ordering::SeqCst) > 8);
            endpoints.set(CLUSTER, &[]);
            // A websocket, too. The request before it finds no pod, which ends the trust.
            let upgrading = App::start().await;
            wait::until("a request finds no pod", SETTLED, || async {
                match http::get(address, "/lost").await {
                    Ok(answer) => Err(answer),
                    Err(_) => Ok(()),
                }
            })
            .await;
            assert_eq!(envoy.stat("inflight_hold_lost_total", &[]).await, 1.0);
            let socket = tokio::spawn(async move { http::try_websocket(address).await });
            until_held(&envoy, 1.0).await;
            endpoints.set(CLUSTER, &[upgrading.address]);
            socket.await.expect("a client").expect("a websocket");
        }
    }
}

#[test]
fn the_shipped_trust_is_shorter_than_kedas_cooldown() {
    let endpoints = EndpointFile::new();
    let gateways =
        [Bootstrap::scale_to_zero(&endpoints, NOBODY), Bootstrap::istio_scale_to_zero(&endpoints, NOBODY)];
    let trusts = gateways.map(|mut bootstrap| {
        let text = at(bootstrap.filter(), "/typed_config/config/configuration/value").take();
        let config: Value = serde_json::from_str(text.as_str().expect("a string")).expect("JSON");
        parse_duration(config["gateway"]["hold"]["trust"].as_str().expect("a trust")).expect("a duration")
    });
    for file in ["keda.yaml", "scale-to-zero.yaml"] {
        let path = root().join("deploy/examples").join(file);
        let text = std::fs::read_to_string(path).expect("a file");
        let cooldown = text.lines().find_map(|line| line.trim().strip_prefix("cooldownPeriod: "));
        let cooldown = Duration::from_secs(cooldown.and_then(|n| n.parse().ok()).expect("seconds"));
        assert!(trusts.iter().all(|trust| *trust < cooldown), "{trusts:?}, {file}: {cooldown:?}");
    }
}

/// Returns the shipped gateway with a second cluster, under `/warm`.
fn with_warm(endpoints: &EndpointFile, warm: SocketAddr) -> Bootstrap {
    let mut bootstrap = Bootstrap::scale_to_zero(endpoints, NOBODY);
    bootstrap.cluster("warm", Some(warm));
    bootstrap.route(json!({"match": {"prefix": "/warm"}, "route": {"cluster": "warm", "timeout": "0s"}}));
    bootstrap
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn held_bodies_take_the_window_of_their_own_connection_and_of_no_other() {
    const BODY: usize = 1_000_000;
    for version in [Version::Oldest, Version::Newest] {
        let app = Reader::start().await;
        for (uploads, is_full) in [(7, false), (20, true)] {
            let endpoints = EndpointFile::new();
            let envoy = Envoy::start(version, &with_warm(&endpoints, app.address), 1).await;
            let (shared, other) = (connection(envoy.address).await, connection(envoy.address).await);
            let mut held = JoinSet::new();
            for _ in 0..uploads {
                held.spawn(ask(shared.clone(), request("/work", BODY)));
            }
            until_held(&envoy, f64::from(uploads)).await;
            let warm = |sender: &SendRequest<Full<Bytes>>, bytes, limit| {
                let asked = ask(sender.clone(), request("/warm", bytes));
                async move { tokio::time::timeout(limit, asked).await.ok() }
            };
            let in_vain = Duration::from_secs(3);
            let code = |answer: Option<Result<(u16, Bytes), String>>| {
                answer.map(|answer| answer.map(|(code, _)| code))
            };
            let results = [
                code(warm(&shared, 0, SETTLED).await),
                code(warm(&other, BODY, SETTLED).await),
                code(warm(&shared, BODY, if is_full { in_vain } else { SETTLED }).await),
            ];
            println!("{version:?}, {uploads} held uploads on a connection: {results:?}");
            let ok = Some(Ok(200));
            assert_eq!(results, [ok.clone(), ok.clone(), if is_full { None } else { ok }]);
            endpoints.set(CLUSTER, &[app.address]);
            while let Some(answer) = held.join_next().await {
                assert_eq!(answer.expect("a client").expect("an answer").0, 200);
            }
        }
    }
}

/// Returns path, code and details of the requests in an access log.
fn logged(log: &Path) -> Vec<String> {
    let line = |request: &truth::Request| format!("{} {} {}", request.path, request.code, request.details);
    let mut lines: Vec<String> = truth::read(log).iter().map(line).collect();
    lines.sort_unstable();
    lines
}

/// Sends a request whose body is complete only at a later time. Returns the answer's status.
async fn ask_slowly(to: SocketAddr, path: &str, until: Instant) -> Result<u16, String> {
    let exchange = async {
        let mut stream = TcpStream::connect(to).await?;
        let head = format!("POST {path} HTTP/1.1\r\nhost: hello\r\ncontent-length: 10\r\n\r\nfirst");
        stream.write_all(head.as_bytes()).await?;
        tokio::time::sleep_until(until.into()).await;
        stream.write_all(b"later").await?;
        let mut status = [0; 12];
        stream.read_exact(&mut status).await?;
        Ok::<_, std::io::Error>(String::from_utf8_lossy(&status).into_owned())
    };
    let status = exchange.await.map_err(|error| error.to_string())?;
    status.strip_prefix("HTTP/1.1 ").and_then(|code| code.parse().ok()).ok_or(status)
}

/// Returns the shipped gateway's route to its one cluster under a prefix, with changes.
fn route(prefix: &str, changes: &Value) -> Value {
    let mut action = json!({"cluster": CLUSTER, "timeout": "0s"});
    for (key, value) in changes.as_object().expect("an object") {
        action[key] = value.clone();
    }
    json!({"match": {"prefix": prefix}, "route": action})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn envoys_timeouts_run_while_a_request_is_held_but_that_of_the_route() {
    // Each route has a timeout of its own, in a listener without one, and in a listener with two.
    let routes = [
        route("/plain", &json!({})),
        route("/second", &json!({"timeout": "1s"})),
        route("/short", &json!({"timeout": "0.2s"})),
        route("/idle", &json!({"idle_timeout": "1s"})),
        route("/duration", &json!({"max_stream_duration": {"max_stream_duration": "1s"}})),
        route("/grpc", &json!({"max_stream_duration": {"grpc_timeout_header_max": "0s"}})),
        route("/none", &json!({"idle_timeout": "0s"})),
    ];
    // The path, the size of the body, the code, its details, and whether it ends before the hold.
    let without = [
        ("/plain", 0, 200, "via_upstream", false),
        ("/plain?grpc", 0, 200, "via_upstream", false),
        ("/second", 0, 200, "via_upstream", false),
        ("/second?slow", 0, 200, "via_upstream", false),
        ("/short/slow", 0, 504, "response_timeout", false),
        ("/idle", 0, 504, "stream_idle_timeout", true),
        ("/idle?body", 10_000_000, 408, "stream_idle_timeout", true),
        ("/duration", 0, 504, "max_duration_timeout", true),
        ("/grpc", 0, 504, "max_duration_timeout", true),
    ];
    let with = [
        ("/plain", 0, 504, "stream_idle_timeout", true),
        ("/none", 0, 504, "request_overall_timeout", true),
        ("/none?body", 10_000_000, 408, "request_overall_timeout", true),
    ];
    for version in [Version::Oldest, Version::Newest] {
        let (endpoints, folder) = (EndpointFile::new(), TempDir::new().expect("a folder"));
        let mut bootstrap = Bootstrap::scale_to_zero(&endpoints, NOBODY);
        let log = folder.path().join("details.log");
        *at(bootstrap.manager(), "/route_config/virtual_hosts/0/routes") = json!(routes);
        bootstrap.access_log(&log);
        let mut second = at(&mut bootstrap.0, "/static_resources/listeners/0").clone();
        second["name"] = json!("second");
        let manager = at(&mut second, "/filter_chains/0/filters/0/typed_config");
        (manager["stream_idle_timeout"], manager["request_timeout"]) = (json!("1s"), json!("2s"));
        at(&mut bootstrap.0, "/static_resources/listeners").as_array_mut().expect("listeners").push(second);
        let how = How { concurrency: 1, quiet: true, ..How::default() };
        let envoy = Envoy::with(version, &bootstrap, how).await;
        let mut clients = JoinSet::new();
        let began = Instant::now();
        // Envoy calls the second listener's address the exporter's.
        let slow = "/second?slow";
        let cases = without.iter().map(|case| (envoy.address, *case)).filter(|(_, case)| case.0 != slow);
        for (address, (path, bytes, ..)) in cases.chain(with.map(|case| (envoy.exporter, case))) {
            let request = Request::post(path).header("host", "hello").header("grpc-timeout", "1S");
            let request = request.body(Full::new(Bytes::from(vec![7; bytes]))).expect("a request");
            clients.spawn(async move {
                let answer = http::ask(address, request).await;
                (path, answer.map(|(status, _)| status.as_u16()), began.elapsed())
            });
        }
        // The route's timeout begins when the body is complete, two seconds after the release.
        let (address, complete) = (envoy.address, began + Duration::from_secs(6));
        clients.spawn(async move { (slow, ask_slowly(address, slow, complete).await, began.elapsed()) });
        tokio::time::sleep_until((began + Duration::from_secs(4)).into()).await;
        let app = Reader::start().await;
        endpoints.set(CLUSTER, &[app.address]);
        let released = began.elapsed();
        let mut outcomes = Vec::new();
        while let Some(outcome) = clients.join_next().await {
            let (path, code, took) = outcome.expect("a client");
            outcomes.push((path, code.expect("an answer"), took < released));
        }
        outcomes.sort_unstable();
        let all = || without.iter().chain(&with);
        let mut expected: Vec<_> = all().map(|(path, _, code, _, early)| (*path, *code, *early)).collect();
        expected.sort_unstable();
        assert_eq!(outcomes, expected, "{version:?}");
        let mut expected: Vec<_> =
            all().map(|(path, _, code, details, _)| format!("{path} {code} {details}")).collect();
        expected.sort_unstable();
        wait::until_equal("the log", SETTLED, expected, async || logged(&log)).await;
    }
}

/// Sends a request, as gRPC does or not. Returns status, some headers and body of the answer.
async fn told(to: SocketAddr, grpc: bool) -> (u16, [String; 3], String) {
    let kind = if grpc { "application/grpc" } else { "text/plain" };
    let request = Request::post("/work").header("host", "hello").header("content-type", kind);
    let request = request.body(Full::<Bytes>::default()).expect("a request");
    let stream = TcpStream::connect(to).await.expect("a connection");
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.expect("HTTP/1.1");
    tokio::spawn(connection);
    let response = sender.send_request(request).await.expect("an answer");
    let header = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
    let headers =
        ["retry-after", "grpc-status", "grpc-message"].map(|name| header(name).unwrap_or("").into());
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.expect("a body").to_bytes();
    (status, headers, String::from_utf8_lossy(&body).into_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_is_turned_away_is_told_why_and_when_to_come_back() {
    for version in [Version::Oldest, Version::Newest] {
        let (endpoints, folder) = (EndpointFile::new(), TempDir::new().expect("a folder"));
        let mut bootstrap = Bootstrap::scale_to_zero(&endpoints, NOBODY);
        bootstrap.configure("gateway", json!({"hold": {"timeout": "1500ms", "depth": 2}}));
        let log = folder.path().join("details.log");
        bootstrap.access_log(&log);
        let how = How { concurrency: 2, quiet: true, ..How::default() };
        let envoy = Envoy::with(version, &bootstrap, how).await;
        let address = envoy.address;
        let began = Instant::now();
        let held = [false, true].map(|grpc| tokio::spawn(told(address, grpc)));
        until_held(&envoy, 2.0).await;
        let plain = |text: &str| (503, ["1".to_owned(), String::new(), String::new()], format!("{text}\n"));
        let full = "too many requests held for default/hello-00001";
        let late = "no capacity for default/hello-00001 within 1.5s";
        assert_eq!(told(address, false).await, plain(full));
        let (status, [retry, code, message], _) = told(address, true).await;
        assert_eq!((status, retry.as_str(), code.as_str()), (200, "1", "14"));
        assert!(message.starts_with(full), "{message}");
        let [one, other] = held;
        assert_eq!(one.await.expect("a client"), plain(late));
        let (status, [retry, code, message], _) = other.await.expect("a client");
        assert_eq!((status, retry.as_str(), code.as_str()), (200, "1", "14"));
        assert!(message.starts_with(late), "{message}");
        assert!(began.elapsed() >= Duration::from_millis(1500), "{:?}", began.elapsed());
        let [full, late] = ["inflight_hold_full", "inflight_hold_timeout"];
        let mut expected =
            [full, late].map(|details| [200, 503].map(|code| format!("/work {code} {details}")));
        expected.as_flattened_mut().sort_unstable();
        wait::until_equal("the log", SETTLED, expected.as_flattened().to_vec(), async || logged(&log)).await;
        let stats = ["inflight_hold_refused_total", "inflight_hold_timeouts_total"];
        for name in stats {
            assert_eq!(envoy.stat(name, &[]).await, 2.0, "{name}");
        }
    }
}
