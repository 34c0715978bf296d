//! The breaker on a real Envoy, against an app that counts its own concurrency.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Request, StatusCode};
use inflight_e2e::app::App;
use inflight_e2e::bootstrap::Bootstrap;
use inflight_e2e::envoy::{Envoy, Version};
use inflight_e2e::load::{Load, Plan};
use inflight_e2e::tap::Tap;
use inflight_e2e::{built, http, wait};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

const SETTLED: Duration = Duration::from_secs(20);

fn limited(app: &App, tap: &Tap, concurrency: u64, queue_depth: u64) -> Bootstrap {
    let mut bootstrap = Bootstrap::sidecar(app.address, tap.address);
    bootstrap.configure("container_concurrency", concurrency.into());
    bootstrap.configure("queue_depth", queue_depth.into());
    bootstrap.configure("reporting_period", "200ms".into());
    bootstrap
}

async fn ask(envoy: &Envoy, path: &str) -> (StatusCode, Bytes) {
    let request = Request::get(path).header("host", "app").body(Full::default()).expect("a request");
    http::ask(envoy.address, request).await.expect("an answer")
}

/// Returns the status and the content type of the answer.
async fn content_type(envoy: &Envoy, path: &str) -> String {
    let request = Request::get(path).header("host", "app").body(Full::default()).expect("a request");
    let (status, headers) = http::head(envoy.address, request).await.expect("an answer");
    let value = headers.get("content-type").and_then(|value| value.to_str().ok());
    format!("{}, {}", status.as_u16(), value.unwrap_or("none"))
}

/// Waits until `wanted` requests and probes, in total, are waiting or in the app.
async fn depth(envoy: &Envoy, wanted: f64) {
    wait::until_equal("queue depth", SETTLED, wanted, || envoy.stat("revision_queue_depth", &[])).await;
}

async fn empties(envoy: &Envoy, app: &App) {
    wait::until_equal("queue depth, in flight, in the app", SETTLED, (0.0, 0.0, 0), async || {
        let depth = envoy.stat("revision_queue_depth", &[]).await;
        (depth, envoy.stat("queue_in_flight_requests", &[]).await, app.counts.now())
    })
    .await;
}

async fn the_app_never_sees_more_than_the_limit(version: Version, mixed: bool) {
    let (app, tap) = (App::start().await, Tap::start(None).await);
    let envoy = Envoy::start(version, &limited(&app, &tap, 7, 1000), 4).await;
    let plan =
        Plan { requests: 12_000, connections: 200, average_ms: 3.0, mixed, seed: 11, ..Plan::default() };
    let began = Instant::now();
    let sent = Load::start(plan, envoy.address, &app.counts).finish().await;
    println!(
        "{version:?}, mixed {mixed}: {sent} requests in {:?}, most in the app {}",
        began.elapsed(),
        app.counts.most()
    );
    assert_eq!(sent, plan.requests);
    assert_eq!(app.counts.most(), 7, "it is reached, and never exceeded");
    empties(&envoy, &app).await;
    wait::until_equal("the reported count", SETTLED, sent, async || {
        tap.acknowledged().last().map_or(0, |report| report.messages[0].until.requests)
    })
    .await;
    // All requests got through in the end. Seven at once still do.
    let mut clients = JoinSet::new();
    let envoy = Arc::new(envoy);
    for _ in 0..7 {
        let envoy = Arc::clone(&envoy);
        clients.spawn(async move { ask(&envoy, "/work?ms=500").await.0 });
    }
    wait::until_equal("in the app", SETTLED, 7, async || app.counts.now()).await;
    assert!(clients.join_all().await.iter().all(|status| *status == 200));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_clients_and_a_limit_of_seven_over_four_workers() {
    the_app_never_sees_more_than_the_limit(Version::Newest, false).await;
    the_app_never_sees_more_than_the_limit(Version::Oldest, false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_with_clients_that_abort_and_an_app_that_resets() {
    the_app_never_sees_more_than_the_limit(Version::Newest, true).await;
    the_app_never_sees_more_than_the_limit(Version::Oldest, true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_runs_ten_wait_thirty_nine_are_turned_away() {
    let (app, tap) = (App::start().await, Tap::start(None).await);
    let envoy = Arc::new(Envoy::start(Version::Newest, &limited(&app, &tap, 1, 10), 4).await);
    let mut clients = JoinSet::new();
    for _ in 0..50 {
        let envoy = Arc::clone(&envoy);
        clients.spawn(async move { ask(&envoy, "/work?ms=300").await });
    }
    let mut answers: BTreeMap<(u16, Bytes), u32> = BTreeMap::new();
    for (status, body) in clients.join_all().await {
        *answers.entry((status.as_u16(), body)).or_default() += 1;
    }
    let expected = [((200, Bytes::from("ok")), 11), ((503, Bytes::from("pending request queue full\n")), 39)];
    assert_eq!(answers, BTreeMap::from(expected));
    assert_eq!((app.counts.requests(), app.counts.most()), (11, 1));
    empties(&envoy, &app).await;
    // Both points of view: a request that was turned away never left the queue.
    let turned_away = [("response_code", "503"), ("response_code_class", "5xx")];
    assert_eq!(envoy.stat("revision_request_count", &[]).await, 50.0);
    assert_eq!(envoy.stat("revision_request_count", &turned_away).await, 39.0);
    assert_eq!(envoy.stat("revision_app_request_count", &[]).await, 11.0);
    assert_eq!(envoy.stat("revision_app_request_count", &turned_away).await, 0.0);
    // In the app each request took some 300 ms; from arrival, on average some 300 x (1 + ... + 11)
    // / 11.
    let sums = wait::until("histograms are flushed", SETTLED, || async {
        let stats = ["revision_request_latencies_sum", "revision_app_request_latencies_sum"];
        let mut sums = [0.0; 2];
        for (sum, stat) in sums.iter_mut().zip(stats) {
            *sum = envoy.stat(stat, &[("response_code", "200")]).await;
        }
        if sums[0] > 0.0 && sums[1] > 11.0 * 290.0 { Ok(sums) } else { Err(sums) }
    })
    .await;
    assert!(sums[0] > 4.0 * sums[1], "waiting is in the request's latency alone: {sums:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiting_client_that_leaves_frees_its_place_at_once() {
    let (app, tap) = (App::start().await, Tap::start(None).await);
    let envoy = Arc::new(Envoy::start(Version::Newest, &limited(&app, &tap, 1, 1), 2).await);
    let first = tokio::spawn({
        let envoy = Arc::clone(&envoy);
        async move { ask(&envoy, "/work?ms=3000").await.0 }
    });
    wait::until_equal("in the app", SETTLED, 1, async || app.counts.now()).await;
    let mut waiting = TcpStream::connect(envoy.address).await.expect("a connection");
    // A request with a body, which must wait, too.
    let request = b"POST /work HTTP/1.1\r\nhost: app\r\ncontent-length: 4\r\n\r\nbody";
    waiting.write_all(request).await.expect("a request");
    depth(&envoy, 2.0).await;
    assert_eq!(content_type(&envoy, "/work").await, "503, text/plain; charset=utf-8");
    drop(waiting);
    // There is capacity in the queue again: the next request waits instead of being turned away,
    // and gets the permit.
    let next = wait::until("the place is free", SETTLED, || async {
        match ask(&envoy, "/work").await.0 {
            StatusCode::SERVICE_UNAVAILABLE => Err("turned away"),
            status => Ok(status),
        }
    })
    .await;
    assert_eq!((next, first.await.expect("the first")), (StatusCode::OK, StatusCode::OK));
    assert_eq!(app.counts.requests(), 2, "the one that left never reached the app");
    empties(&envoy, &app).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_longer_than_the_timeout_gets_a_503() {
    let (app, tap) = (App::start().await, Tap::start(None).await);
    let mut bootstrap = limited(&app, &tap, 1, 10);
    bootstrap.configure("queue_timeout", "300ms".into());
    let envoy = Arc::new(Envoy::start(Version::Newest, &bootstrap, 2).await);
    let first = tokio::spawn({
        let envoy = Arc::clone(&envoy);
        async move { ask(&envoy, "/work?ms=3000").await.0 }
    });
    wait::until_equal("in the app", SETTLED, 1, async || app.counts.now()).await;
    let began = Instant::now();
    let (status, body) = ask(&envoy, "/work").await;
    assert_eq!((status.as_u16(), body), (503, Bytes::from("pending request queue timeout\n")));
    assert!(began.elapsed() >= Duration::from_millis(300), "{:?}", began.elapsed());
    assert_eq!(content_type(&envoy, "/work").await, "503, text/plain; charset=utf-8");
    assert_eq!(first.await.expect("the first"), StatusCode::OK);
    empties(&envoy, &app).await;
    assert_eq!(ask(&envoy, "/work").await.0, 200);
}

/// Ends a worker's VM whose requests hold permits. The permits must go to the others.
async fn slots_come_back_after(kind: &str) {
    let (app, tap) = (App::start().await, Tap::start(None).await);
    let mut bootstrap = limited(&app, &tap, 4, 100);
    bootstrap.module(&built("faulty/wasm32-wasip1/release/inflight_filter.wasm"));
    let envoy = Arc::new(Envoy::start(Version::Newest, &bootstrap, 2).await);
    let mut open = Vec::new();
    for _ in 0..4 {
        let mut stream = TcpStream::connect(envoy.address).await.expect("a connection");
        stream.write_all(b"GET /work?ms=60000 HTTP/1.1\r\nhost: app\r\n\r\n").await.expect("a request");
        open.push(stream);
    }
    wait::until_equal("in the app", SETTLED, 4, async || app.counts.now()).await;
    // Faults until both workers' VMs have ended. The kernel chooses which worker gets a connection.
    for _ in 0..12 {
        let request = Request::get("/local").header("host", "app").header("x-inflight-fault", kind);
        let _ = http::ask(envoy.address, request.body(Full::<Bytes>::default()).expect("a request")).await;
    }
    // All four permits were held by workers that are gone.
    let status = tokio::time::timeout(SETTLED, async {
        loop {
            // A worker whose VM was loaded a moment ago refuses requests until its back-off is
            // over.
            let status = ask(&envoy, "/work").await.0;
            if status == 200 {
                return status;
            }
        }
    })
    .await;
    assert_eq!(status.expect("a slot comes back"), StatusCode::OK);
    drop(open);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_slots_of_a_worker_that_panics_come_back() {
    slots_come_back_after("panic").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_slots_of_a_worker_that_traps_come_back() {
    slots_come_back_after("trap").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_queue_for_all_workers_and_no_slot_lies_idle() {
    let (app, tap) = (App::start().await, Tap::start(None).await);
    let envoy = Arc::new(Envoy::start(Version::Newest, &limited(&app, &tap, 1, 1000), 4).await);
    // The kernel spreads connections over the workers at random. Some workers get several times as
    // many as others.
    let (requests, work) = (60, Duration::from_millis(30));
    let began = Instant::now();
    let mut clients = JoinSet::new();
    for _ in 0..requests {
        let envoy = Arc::clone(&envoy);
        clients.spawn(async move {
            assert_eq!(ask(&envoy, "/work?ms=30").await.0, 200);
            began.elapsed()
        });
    }
    let longest = clients.join_all().await.into_iter().max().expect("a request");
    let mut gaps = app.counts.gaps();
    gaps.sort();
    let median = gaps[gaps.len() / 2];
    let ideal = work * requests;
    println!(
        "the longest wait {longest:?}, with one queue {ideal:?}; a free slot is taken after {median:?} (median)"
    );
    assert!(longest <= 2 * ideal, "{longest:?}");
    assert_eq!((app.counts.requests(), app.counts.most()), (u64::from(requests), 1));
}

/// A kubelet's probes, and requests that only claim to be probes.
const PROBES: [(&str, &str); 4] = [
    ("user-agent", "kube-probe/1.33"),
    ("k-network-probe", "queue"),
    ("k-kubelet-probe", "x"),
    ("user-agent", "kube-probe/"),
];

fn probe(path: &str, (name, value): (&str, &str)) -> Request<Full<Bytes>> {
    let request = Request::get(path).header("host", "app").header(name, value);
    request.body(Full::default()).expect("a request")
}

async fn opened(envoy: &Envoy, path: &str) -> TcpStream {
    let mut stream = TcpStream::connect(envoy.address).await.expect("a connection");
    let head = format!("GET {path} HTTP/1.1\r\nhost: app\r\n\r\n");
    stream.write_all(head.as_bytes()).await.expect("a request");
    stream
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn probes_take_permits_before_requests_and_a_fifth_that_waits_is_turned_away() {
    let (app, tap) = (App::start().await, Tap::start(None).await);
    let envoy = Arc::new(Envoy::start(Version::Newest, &limited(&app, &tap, 1, 1), 2).await);
    let first = opened(&envoy, "/work?ms=60000").await;
    wait::until_equal("in the app", SETTLED, 1, async || app.counts.now()).await;
    let ended = Arc::new(Mutex::new(Vec::new()));
    let mut clients = JoinSet::new();
    let mut send = |what, request| {
        let (envoy, ended) = (Arc::clone(&envoy), Arc::clone(&ended));
        clients.spawn(async move {
            let answer = http::ask(envoy.address, request).await.expect("an answer");
            ended.lock().expect("no panic under this lock").push((what, answer.0.as_u16()));
        });
    };
    let request = Request::get("/work?ms=200").header("host", "app").body(Full::default());
    send("request", request.expect("a request"));
    depth(&envoy, 2.0).await;
    assert_eq!(ask(&envoy, "/work").await.0, 503, "the queue is full");
    for mark in PROBES {
        send("probe", probe("/work?ms=200", mark));
    }
    depth(&envoy, 6.0).await;
    let fifth = http::ask(envoy.address, probe("/work", PROBES[0])).await.expect("an answer");
    assert_eq!(fifth, (StatusCode::SERVICE_UNAVAILABLE, Bytes::from("pending request queue full\n")));
    drop(first);
    clients.join_all().await;
    let expected = [("probe", 200), ("probe", 200), ("probe", 200), ("probe", 200), ("request", 200)];
    assert_eq!(*ended.lock().expect("no panic under this lock"), expected);
    assert_eq!(app.counts.most(), 1);
    empties(&envoy, &app).await;
    // Probes go through the breaker but are not counted.
    assert_eq!(envoy.stat("queue_requests_total", &[]).await, 3.0);
    assert_eq!(envoy.stat("revision_request_count", &[]).await, 3.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn probes_pass_a_breaker_that_is_told_so() {
    let (app, tap) = (App::start().await, Tap::start(None).await);
    let mut bootstrap = limited(&app, &tap, 1, 0);
    bootstrap.configure("probes_bypass_breaker", true.into());
    let envoy = Envoy::start(Version::Newest, &bootstrap, 2).await;
    let first = opened(&envoy, "/work?ms=60000").await;
    wait::until_equal("in the app", SETTLED, 1, async || app.counts.now()).await;
    for mark in PROBES {
        assert_eq!(http::ask(envoy.address, probe("/work", mark)).await.expect("an answer").0, 200);
    }
    assert_eq!(ask(&envoy, "/work").await.0, 503);
    assert_eq!(app.counts.requests(), 5);
    drop(first);
    empties(&envoy, &app).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_stalls_for_five_seconds_keeps_its_permits() {
    let (app, tap) = (App::start().await, Tap::start(None).await);
    let mut bootstrap = limited(&app, &tap, 3, 100);
    bootstrap.configure("reporting_period", "100ms".into());
    bootstrap.stalls();
    bootstrap.evenly();
    let envoy = Arc::new(Envoy::start(Version::Newest, &bootstrap, 2).await);
    // Each of the two workers has one request in the app.
    let open = [opened(&envoy, "/work?ms=60000").await, opened(&envoy, "/work?ms=60000").await];
    let in_flight = |wanted: f64| {
        let envoy = Arc::clone(&envoy);
        async move {
            let stat = || envoy.stat("queue_in_flight_requests", &[]);
            wait::until_equal("requests in flight", SETTLED, wanted, stat).await;
        }
    };
    in_flight(2.0).await;
    // The request with the third permit makes its worker stall.
    let stall = Request::get("/work").header("host", "app").header("x-stall", "5");
    let stall = tokio::spawn(http::ask(envoy.address, stall.body(Full::default()).expect("a request")));
    // The stalled worker's membership has ended, and its request in flight is no longer shown.
    in_flight(1.0).await;
    let mut clients = JoinSet::new();
    // Some of these go to the stalled worker, too; the kernel and Envoy choose.
    for _ in 0..20 {
        let envoy = Arc::clone(&envoy);
        clients.spawn(async move { ask(&envoy, "/work").await.0 });
    }
    wait::until("some wait at the other worker", SETTLED, || async {
        assert_eq!(app.counts.requests(), 2, "no permit of the worker that stalls goes to another request");
        let depth = envoy.stat("revision_queue_depth", &[]).await;
        if depth > 3.0 { Ok(()) } else { Err(depth) }
    })
    .await;
    assert!(!stall.is_finished(), "the stall was too short to show anything");
    assert_eq!(stall.await.expect("no panic").expect("an answer").0, 200);
    assert_eq!(app.counts.most(), 3);
    drop(open);
    assert!(clients.join_all().await.iter().all(|status| *status == 200));
    empties(&envoy, &app).await;
    app.counts.forget_most();
    // All three permits are there, and no fourth one.
    let mut clients = JoinSet::new();
    for _ in 0..9 {
        let envoy = Arc::clone(&envoy);
        clients.spawn(async move { ask(&envoy, "/work?ms=200").await.0 });
    }
    wait::until_equal("in the app", SETTLED, 3, async || app.counts.now()).await;
    assert!(clients.join_all().await.iter().all(|status| *status == 200));
    assert_eq!(app.counts.most(), 3);
    empties(&envoy, &app).await;
}
