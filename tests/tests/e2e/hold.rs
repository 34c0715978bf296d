//! The hold on real Envoys: requests of a key without pods wait at the gateway, and every one of
//! them is answered once a pod can take it.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{HeaderMap, Request, StatusCode};
use inflight_e2e::app::App;
use inflight_e2e::bootstrap::{Bootstrap, CLUSTER, EndpointFile, NOBODY};
use inflight_e2e::envoy::{Envoy, How, Version};
use inflight_e2e::statserver::StatServer;
use inflight_e2e::{built, http, truth, wait};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

const SETTLED: Duration = Duration::from_secs(30);
const BOTH: [Version; 2] = [Version::Oldest, Version::Newest];
const SOME: [(Version, u32); 3] = [(Version::Oldest, 1), (Version::Newest, 2), (Version::Newest, 4)];
const KEY: &[(&str, &str)] = &[("namespace_name", "default"), ("revision_name", "hello-00001")];

/// The configuration of a gateway that holds, and the file with its endpoints.
fn holding(statserver: SocketAddr, hold: Value) -> (Bootstrap, EndpointFile) {
    let endpoints = EndpointFile::new();
    (Bootstrap::holding(&endpoints, statserver, hold), endpoints)
}

/// The same as a running Envoy, whose stats server is gone.
async fn gateway(version: Version, workers: u32, hold: Value) -> (Envoy, EndpointFile) {
    let (bootstrap, endpoints) = holding(NOBODY, hold);
    (Envoy::start(version, &bootstrap, workers).await, endpoints)
}

fn get(path: &str) -> Request<Full<Bytes>> {
    Request::get(path).header("host", "hello").body(Full::default()).expect("a request")
}

async fn held(envoy: &Envoy) -> f64 {
    envoy.stat("activator_held_requests", KEY).await
}

/// Returns the code of an answer. Nobody waits for ever.
async fn code(address: SocketAddr, request: Request<Full<Bytes>>) -> Result<StatusCode, String> {
    match tokio::time::timeout(SETTLED, http::ask(address, request)).await {
        Ok(answer) => answer.map(|(code, _)| code),
        Err(_) => Err(format!("no answer after {SETTLED:?}")),
    }
}

/// Clients with one request each.
struct Clients(JoinSet<Result<StatusCode, String>>);

impl Clients {
    fn start(count: usize, envoy: &Envoy, path: &str) -> Self {
        let mut clients = JoinSet::new();
        for _ in 0..count {
            clients.spawn(code(envoy.address, get(path)));
        }
        Self(clients)
    }

    /// Waits for all answers, which must be 200.
    async fn are_answered(self) {
        for answer in self.answers().await {
            assert_eq!(answer, Ok(StatusCode::OK));
        }
    }

    async fn answers(self) -> Vec<Result<StatusCode, String>> {
        self.0.join_all().await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_of_a_key_without_pods_wait_for_one_and_all_are_answered() {
    for version in BOTH {
        for workers in [1, 2, 4] {
            let hold = json!({"probe_period": "10ms", "trust": "200ms"});
            let (envoy, endpoints) = gateway(version, workers, hold).await;
            let mut added = Vec::new();
            let mut requests = 0;
            for cycle in 0..20 {
                // Pods start in 50 to 500 ms.
                let clients = Clients::start(5, &envoy, "/work");
                tokio::time::sleep(Duration::from_millis(50 + 450 * (cycle * 7 % 20) / 19)).await;
                let app = App::start().await;
                endpoints.set(CLUSTER, &[app.address]);
                let began = Instant::now();
                clients.are_answered().await;
                added.push(began.elapsed());
                requests += 5;
                endpoints.set(CLUSTER, &[]);
                // Trust ends, and the gateway knows that the pod is gone.
                tokio::time::sleep(Duration::from_millis(250)).await;
                wait::until("the endpoint is gone", SETTLED, || async {
                    let total = envoy.stat("envoy_cluster_membership_total", &[]).await;
                    // The stats server's cluster has the other one.
                    if total == 1.0 { Ok(()) } else { Err(total) }
                })
                .await;
            }
            wait::until_equal("held requests", SETTLED, 0.0, || held(&envoy)).await;
            let logged = envoy.requests_when(requests).await;
            assert!(logged.iter().all(|request| request.code == 200), "{:?}", truth::by_code(&logged));
            added.sort();
            println!(
                "{version:?}, {workers} workers: answered {:?} (median), {:?} (longest) after there was a pod",
                added[10], added[19]
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn depth_timeout_and_clients_that_leave_are_exact() {
    for (version, workers) in SOME {
        let hold = json!({"probe_period": "50ms", "timeout": "2s", "depth": 10});
        let (envoy, _endpoints) = gateway(version, workers, hold).await;
        let mut leaving = Vec::new();
        for _ in 0..4 {
            let mut client = TcpStream::connect(envoy.address).await.expect("a connection");
            client.write_all(b"GET /leaves HTTP/1.1\r\nhost: hello\r\n\r\n").await.expect("a request");
            leaving.push(client);
        }
        let clients = Clients::start(6, &envoy, "/stays");
        wait::until_equal("held requests", SETTLED, 10.0, || held(&envoy)).await;

        let (code, body) = http::ask(envoy.address, get("/full")).await.expect("an answer");
        let body = String::from_utf8_lossy(&body).into_owned();
        assert_eq!((code.as_u16(), body.as_str()), (503, "too many requests held for default/hello-00001\n"));
        leaving.clear();
        wait::until_equal("held requests", SETTLED, 6.0, || held(&envoy)).await;

        let began = Instant::now();
        let late = http::ask(envoy.address, get("/late"));
        let (answers, late) = tokio::join!(clients.answers(), late);
        assert!(answers.iter().all(|code| *code == Ok(StatusCode::SERVICE_UNAVAILABLE)), "{answers:?}");
        let (code, body) = late.expect("an answer");
        let body = String::from_utf8_lossy(&body).into_owned();
        assert_eq!(
            (code.as_u16(), body.as_str()),
            (503, "no capacity for default/hello-00001 within 2s\n"),
            "after {:?}",
            began.elapsed()
        );
        wait::until_equal("held, refused, timed out", SETTLED, (0.0, 1.0, 7.0), async || {
            let stat = async |name| envoy.stat(name, &[]).await;
            (
                held(&envoy).await,
                stat("inflight_hold_refused_total").await,
                stat("inflight_hold_timeouts_total").await,
            )
        })
        .await;
        let logged = envoy.requests_when(12).await;
        let mut seen: Vec<_> = logged.iter().map(|r| (&*r.path, r.code, &*r.details)).collect();
        seen.sort_unstable();
        let count = |path, code, details: &str| {
            seen.iter().filter(|(p, c, d)| (*p, *c) == (path, code) && d.starts_with(details)).count()
        };
        assert_eq!(count("/full", 503, "inflight_hold_full"), 1, "{seen:?}");
        assert_eq!(count("/late", 503, "inflight_hold_timeout"), 1, "{seen:?}");
        assert_eq!(count("/stays", 503, "inflight_hold_timeout"), 6, "{seen:?}");
        assert_eq!(count("/leaves", 0, "downstream"), 4, "{seen:?}");
        wait::until_equal("requests by their stats", SETTLED, 12.0, || {
            envoy.stat("activator_request_count", KEY)
        })
        .await;
        // The histogram has every hold that ended, however it ended.
        wait::until_equal("holds", SETTLED, 11.0, || envoy.stat("activator_hold_milliseconds_count", KEY))
            .await;
        let headers: HeaderMap = {
            let full = Clients::start(10, &envoy, "/again");
            wait::until_equal("held requests", SETTLED, 10.0, || held(&envoy)).await;
            let headers = http::headers(envoy.address, get("/full")).await.expect("an answer");
            full.answers().await;
            headers
        };
        assert_eq!(headers["retry-after"], "1");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_requests_that_time_out_or_fail_together_end_no_vm() {
    for version in BOTH {
        let (mut bootstrap, endpoints) =
            holding(NOBODY, json!({"probe_period": "50ms", "timeout": "3s", "release": 1000}));
        // Of the requests that are let through, Envoy itself answers most at once.
        let thresholds = json!([{"max_connections": 2, "max_pending_requests": 5}]);
        bootstrap.find_cluster(CLUSTER)["circuit_breakers"] = json!({"thresholds": thresholds});
        let envoy = Envoy::start(version, &bootstrap, 1).await;
        let clients = Clients::start(1_000, &envoy, "/work");
        let answers = clients.answers().await;
        assert!(answers.iter().all(|answer| *answer == Ok(StatusCode::SERVICE_UNAVAILABLE)), "{answers:?}");
        wait::until_equal("timeouts", SETTLED, 1_000.0, || envoy.stat("inflight_hold_timeouts_total", &[]))
            .await;

        let clients = Clients::start(1_000, &envoy, "/work?ms=100");
        wait::until_equal("held requests", SETTLED, 1_000.0, || held(&envoy)).await;
        let app = App::start().await;
        endpoints.set(CLUSTER, &[app.address]);
        let answers = clients.answers().await;
        let ok = answers.iter().filter(|answer| **answer == Ok(StatusCode::OK)).count();
        assert!(ok > 0 && answers.iter().all(Result::is_ok), "{answers:?}");
        println!("{version:?}: {ok} of 1,000 answered, the others found the circuit breaker open");
        wait::until_equal("requests", SETTLED, 2_000.0, || envoy.stat("activator_request_count", KEY)).await;
        assert!(!envoy.process.log().contains("call stack"), "{}", envoy.process.log());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_on_a_key_without_pods_goes_to_one_limited_pod_without_overloading_it() {
    burst(SOME).await;
}

async fn burst(envoys: impl IntoIterator<Item = (Version, u32)>) {
    for (version, workers) in envoys {
        let (envoy, endpoints) = gateway(version, workers, json!({"depth": 1000})).await;
        let began = Instant::now();
        let clients = Clients::start(1_000, &envoy, "/work?ms=10");
        wait::until_equal("held requests", SETTLED, 1_000.0, || held(&envoy)).await;
        tokio::time::sleep_until((began + Duration::from_secs(2)).into()).await;

        let app = App::start().await;
        let mut pod = Bootstrap::sidecar(app.address, NOBODY);
        pod.configure("container_concurrency", 10.into());
        pod.configure("queue_depth", 100.into());
        let pod = Envoy::start(version, &pod, 2).await;
        endpoints.set(CLUSTER, &[pod.address]);
        let began = Instant::now();
        let answers = clients.answers().await;
        let took = began.elapsed();
        let refused = answers.iter().filter(|answer| **answer == Ok(StatusCode::SERVICE_UNAVAILABLE)).count();
        let answered = answers.iter().filter(|answer| **answer == Ok(StatusCode::OK)).count();
        println!("{version:?}, {workers} workers: {answered} requests in {took:?} after there was a pod");
        assert_eq!(answered + refused, 1_000, "{answers:?}");
        // On a machine that takes longer, the gateway tries twice as many as the pod has places for.
        assert!(refused == 0 || took > Duration::from_secs(2), "{refused} were refused");
        assert_eq!(app.counts.most_answered(), 10);
        let logged = envoy.requests_when(1_000).await;
        assert_eq!(logged.len(), 1_000);
        assert_eq!(held(&envoy).await, 0.0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn held_requests_go_on_in_the_order_in_which_they_came() {
    for version in BOTH {
        let (envoy, endpoints) = gateway(version, 1, json!({"release": 1, "probe_period": "20ms"})).await;
        let mut clients = JoinSet::new();
        for number in 0..40 {
            clients.spawn(code(envoy.address, get(&format!("/work?ms=2&{number:02}"))));
            wait::until_equal("held requests", SETTLED, f64::from(number + 1), || held(&envoy)).await;
        }
        let app = App::start().await;
        let pod = Envoy::start(version, &Bootstrap::sidecar(app.address, NOBODY), 1).await;
        endpoints.set(CLUSTER, &[pod.address]);
        for answer in clients.join_all().await {
            assert_eq!(answer, Ok(StatusCode::OK));
        }
        // The pod's log has the gateway's probes, too.
        let mut seen = wait::until("40 of them are logged", SETTLED, || async {
            let mut seen = pod.requests();
            seen.retain(|request| request.path.starts_with("/work"));
            if seen.len() == 40 { Ok(seen) } else { Err(seen.len()) }
        })
        .await;
        seen.sort_by_key(|request| request.start_ns);
        let order: Vec<&str> = seen.iter().map(|request| &request.path["/work?ms=2&".len()..]).collect();
        let expected: Vec<String> = (0..40).map(|number| format!("{number:02}")).collect();
        assert_eq!(order, expected);
        assert_eq!(app.counts.most_answered(), 1, "one permit");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_steady_load_from_zero_is_let_through_while_pods_come() {
    steady_load(Version::Newest, 2).await;
}

/// `make e2e` runs these tests with some of the Envoys, because that takes minutes less.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
#[ignore = "takes minutes"]
async fn long_the_loads_on_each_envoy_with_each_number_of_workers() {
    let all = BOTH.into_iter().flat_map(|version| [1, 2, 4].map(|workers| (version, workers)));
    burst(all.clone()).await;
    for (version, workers) in all {
        steady_load(version, workers).await;
    }
}

async fn steady_load(version: Version, workers: u32) {
    let hold = json!({"depth": 20_000, "trust": "200ms", "timeout": "5m"});
    let (mut bootstrap, endpoints) = holding(NOBODY, hold);
    // By Envoy's default, 1,024.
    let thresholds =
        json!([{"max_connections": 10_000, "max_pending_requests": 10_000, "max_requests": 10_000}]);
    bootstrap.find_cluster(CLUSTER)["circuit_breakers"] = json!({"thresholds": thresholds});
    let envoy = Envoy::start(version, &bootstrap, workers).await;
    let mut apps = Vec::new();
    let mut clients = JoinSet::new();
    let began = Instant::now();
    let mut zero_since = None;
    for tick in 0..200_u32 {
        for _ in 0..50 {
            let address = envoy.address;
            clients.spawn(code(address, get("/work?ms=1000")));
        }
        // The first pod after one second, then one each half second, up to ten.
        if tick >= 10 && tick % 5 == 0 && apps.len() < 10 {
            apps.push(App::start().await);
            let addresses: Vec<SocketAddr> = apps.iter().map(|app| app.address).collect();
            endpoints.set(CLUSTER, &addresses);
        }
        tokio::time::sleep_until((began + Duration::from_millis(100) * (tick + 1)).into()).await;
        match held(&envoy).await {
            0.0 if tick > 10 => drop(zero_since.get_or_insert(began.elapsed())),
            _ => zero_since = None,
        }
    }
    let sent = clients.len();
    let answers = Clients(clients).answers().await;
    let logged = envoy.requests_when(sent as u64).await;
    let failed: Vec<_> =
        logged.iter().filter(|r| r.code != 200).map(|r| (r.code, &r.flags, &r.details)).collect();
    assert_eq!(failed.len(), 0, "{:?}", &failed[..failed.len().min(5)]);
    assert!(answers.iter().all(|answer| *answer == Ok(StatusCode::OK)));
    println!(
        "{version:?}, {workers} workers: {sent} requests, {} pods; none was held any more from {zero_since:?} on",
        apps.len()
    );
    assert!(zero_since.is_some(), "requests are still held");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_finds_no_pod_ends_the_trust_and_the_next_ones_wait() {
    for (version, workers) in [(Version::Oldest, 1), (Version::Newest, 4)] {
        let hold = json!({"probe_period": "20ms", "trust": "1m"});
        let (envoy, endpoints) = gateway(version, workers, hold).await;
        let first = Clients::start(20, &envoy, "/work");
        let app = App::start().await;
        endpoints.set(CLUSTER, &[app.address]);
        first.are_answered().await;
        drop(app);
        endpoints.set(CLUSTER, &[]);
        wait::until_equal("members", SETTLED, 1.0, || envoy.stat("envoy_cluster_membership_total", &[]))
            .await;
        // Trusted, though there is no pod any more.
        let (code, _) = http::ask(envoy.address, get("/lost")).await.expect("an answer");
        assert_eq!(code, 503);
        let clients = Clients::start(20, &envoy, "/work");
        wait::until_equal("held requests", SETTLED, 20.0, || held(&envoy)).await;
        let app = App::start().await;
        endpoints.set(CLUSTER, &[app.address]);
        clients.are_answered().await;
        wait::until_equal("lost requests", SETTLED, 1.0, || envoy.stat("inflight_hold_lost_total", &[]))
            .await;
        let logged = envoy.requests_when(41).await;
        let codes: Vec<(u16, u64)> = truth::by_code(&logged).into_iter().collect();
        assert_eq!(codes, [(200, 40), (503, 1)]);
        let lost = logged.iter().find(|request| request.code == 503).expect("it");
        assert_eq!((&*lost.path, &*lost.flags), ("/lost", "UH"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_refuses_connections_is_not_ready() {
    for version in BOTH {
        let (envoy, endpoints) = gateway(version, 2, json!({"probe_period": "20ms"})).await;
        // An endpoint of which the port is known, and nobody listens yet.
        let port = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = port.local_addr().expect("an address");
        drop(port);
        endpoints.set(CLUSTER, &[address]);
        let clients = Clients::start(10, &envoy, "/work");
        wait::until_equal("held requests", SETTLED, 10.0, || held(&envoy)).await;
        wait::until("it was probed", SETTLED, || async {
            let failed = envoy.stat("envoy_cluster_upstream_cx_connect_fail", &[]).await;
            if failed > 3.0 { Ok(()) } else { Err(failed) }
        })
        .await;
        assert_eq!(held(&envoy).await, 10.0);
        let app = App::start().await;
        endpoints.set(CLUSTER, &[app.address]);
        clients.are_answered().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn held_requests_are_in_flight_and_wake_the_key_at_once() {
    let server = StatServer::start(None).await;
    let (bootstrap, endpoints) = holding(server.address, json!({}));
    let envoy = Envoy::start(Version::Newest, &bootstrap, 2).await;
    let clients = Clients::start(3, &envoy, "/work");
    let began = Instant::now();
    wait::until("it is known to be in flight", SETTLED, || async {
        let in_flight = server.number("default", "hello-00001", "in_flight").await;
        if in_flight > 0 { Ok(()) } else { Err(in_flight) }
    })
    .await;
    println!("held requests are known to be in flight after {:?}", began.elapsed());
    wait::until_equal("in flight", SETTLED, 3, || server.number("default", "hello-00001", "in_flight")).await;
    let key = server.key("default", "hello-00001").await.expect("the key");
    assert!(key["desired_pods"].as_u64().is_some_and(|pods| pods >= 1), "{key}");
    let app = App::start().await;
    endpoints.set(CLUSTER, &[app.address]);
    clients.are_answered().await;
    wait::until_equal("requests", SETTLED, 3, || server.number("default", "hello-00001", "requests_total"))
        .await;
}

/// When a VM panics, its requests end at once. When it traps, no code of it runs any more, and Envoy
/// leaves them to its `stream_idle_timeout`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_ends_by_a_panic_or_a_trap_leaves_no_request_hanging() {
    for (version, fault) in BOTH.into_iter().flat_map(|version| [(version, "panic"), (version, "trap")]) {
        let (mut bootstrap, endpoints) = holding(NOBODY, json!({"probe_period": "20ms"}));
        bootstrap.module(&built("faulty/wasm32-wasip1/release/inflight_filter.wasm"));
        bootstrap.manager()["stream_idle_timeout"] = json!("20s");
        let envoy = Envoy::start(version, &bootstrap, 2).await;
        let clients = Clients::start(40, &envoy, "/work");
        wait::until_equal("held requests", SETTLED, 40.0, || held(&envoy)).await;
        let request = Request::get("/local").header("host", "hello").header("x-inflight-fault", fault);
        let _ = http::ask(envoy.address, request.body(Full::<Bytes>::default()).expect("a request")).await;
        // The other worker holds its requests, and probes even if the one that ended was the one.
        wait::until_equal("held requests", SETTLED, 20.0, || held(&envoy)).await;
        let app = App::start().await;
        endpoints.set(CLUSTER, &[app.address]);
        let answers = clients.answers().await;
        let ok = answers.iter().filter(|answer| **answer == Ok(StatusCode::OK)).count();
        let others: BTreeSet<u16> =
            answers.iter().flatten().map(|code| code.as_u16()).filter(|code| *code != 200).collect();
        println!("{version:?}, {fault}: {ok} answered with 200, the others with {others:?}");
        assert_eq!(ok, 20, "{answers:?}");
        assert!(answers.iter().all(Result::is_ok), "{answers:?}");
        assert!(fault == "trap" || others == BTreeSet::from([503]), "{others:?}");
        wait::until_equal("held requests", SETTLED, 0.0, || held(&envoy)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_configuration_that_is_replaced_leaves_no_request_hanging() {
    for (version, workers) in [(Version::Oldest, 1), (Version::Newest, 2)] {
        for next in [json!({}), json!({"hold": {"probe_period": "30ms"}})] {
            let (bootstrap, endpoints) = holding(NOBODY, json!({"probe_period": "20ms", "trust": "200ms"}));
            let how = How { concurrency: workers, dynamic: true, ..How::default() };
            let envoy = Envoy::with(version, &bootstrap, how).await;
            let clients = Clients::start(20, &envoy, "/work");
            wait::until_equal("held requests", SETTLED, 20.0, || held(&envoy)).await;
            let mut changed = bootstrap.clone();
            changed.configure("gateway", next.clone());
            envoy.replace(&changed, "access.log").await;
            let more = Clients::start(5, &envoy, "/more");
            tokio::time::sleep(Duration::from_millis(500)).await;
            let app = App::start().await;
            endpoints.set(CLUSTER, &[app.address]);
            clients.are_answered().await;
            let answers = more.answers().await;
            let held_too = next.get("hold").is_some();
            let expected = if held_too { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
            assert!(answers.iter().all(|answer| *answer == Ok(expected)), "{answers:?}");
            wait::until_equal("held requests", SETTLED, 0.0, || held(&envoy)).await;
        }
    }
}

/// A websocket ends hours after it was answered, and some uploads never get an answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_stay_open_let_the_others_through() {
    for (version, workers) in SOME {
        let hold = json!({"probe_period": "20ms", "release": 4, "timeout": "1m"});
        let (envoy, endpoints) = gateway(version, workers, hold).await;
        let mut uploads = Vec::new();
        for _ in 0..4 {
            let mut client = TcpStream::connect(envoy.address).await.expect("a connection");
            let head = b"POST /upload HTTP/1.1\r\nhost: hello\r\ncontent-length: 100\r\n\r\n";
            client.write_all(head).await.expect("a request");
            uploads.push(client);
        }
        wait::until_equal("held requests", SETTLED, 4.0, || held(&envoy)).await;
        let mut sockets = JoinSet::new();
        for _ in 0..12 {
            sockets.spawn(http::try_websocket(envoy.address));
        }
        wait::until_equal("held requests", SETTLED, 16.0, || held(&envoy)).await;
        let clients = Clients::start(3, &envoy, "/work");
        wait::until_equal("held requests", SETTLED, 19.0, || held(&envoy)).await;
        let app = App::start().await;
        endpoints.set(CLUSTER, &[app.address]);
        clients.are_answered().await;
        let open: Vec<_> = sockets.join_all().await.into_iter().map(|socket| socket.expect("it")).collect();
        assert_eq!((open.len(), held(&envoy).await), (12, 0.0));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_the_app_refuses_keeps_no_other_waiting() {
    // One other is at the other worker; of ten, some are at the same.
    for (version, others) in BOTH.into_iter().flat_map(|version| [(version, 1), (version, 10)]) {
        let (envoy, endpoints) = gateway(version, 2, json!({"probe_period": "20ms", "timeout": "20s"})).await;
        let asking = |host: &'static str| {
            let request = Request::get("/work").header("host", host).body(Full::default());
            code(envoy.address, request.expect("a request"))
        };
        let bad = tokio::spawn(asking("bad"));
        wait::until_equal("held requests", SETTLED, 1.0, || held(&envoy)).await;
        let good: JoinSet<_> = (0..others).map(|_| asking("good")).collect();
        wait::until_equal("held requests", SETTLED, f64::from(others + 1), || held(&envoy)).await;
        // An app that is there for all authorities but one.
        let app = App::start().await;
        let mut front = Bootstrap::sidecar(app.address, NOBODY);
        front.without_filter();
        let matches =
            json!({"prefix": "/", "headers": [{"name": ":authority", "string_match": {"exact": "bad"}}]});
        front.route(json!({"match": matches, "direct_response": {"status": 503}}));
        let front = Envoy::start(version, &front, 1).await;
        endpoints.set(CLUSTER, &[front.address]);
        for answer in good.join_all().await {
            assert_eq!(answer, Ok(StatusCode::OK));
        }
        assert_eq!(bad.await.expect("a client"), Ok(StatusCode::SERVICE_UNAVAILABLE));
    }
}
