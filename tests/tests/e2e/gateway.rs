//! The role `gateway` on real Envoys: one figure per destination, nothing counted twice, the first
//! request reported at once.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
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
use inflight_e2e::tap::Tap;
use inflight_e2e::{built, prometheus, truth, wait};
use inflight_stats::protocol::report_delta::addition;
use inflight_stats::{KeyReport, Report, Snapshot};
use serde_json::{Value, json};
use tokio::task::JoinSet;

const SETTLED: Duration = Duration::from_secs(20);

fn by_headers(app: &App, statserver: SocketAddr, period: &str) -> Bootstrap {
    let mut bootstrap = Bootstrap::gateway(app.address, statserver);
    bootstrap.configure("gateway", json!({"key": {"from": "headers"}}));
    bootstrap.configure("reporting_period", period.into());
    bootstrap
}

fn request(path: &str, name: &str) -> Request<Full<Bytes>> {
    let request = Request::get(path).header("host", "app").header("knative-serving-namespace", "ns");
    request.header("knative-serving-revision", name).body(Full::default()).expect("a request")
}

/// Returns all reports of a key.
fn said_of(tap: &Tap, name: &str) -> Vec<KeyReport> {
    let reports = tap.acknowledged().into_iter().flat_map(|report| report.messages);
    reports.filter(|message| message.name == name).collect()
}

async fn all_keys(server: &StatServer) -> BTreeMap<String, u64> {
    let text = http::get(server.address, "/v1/keys?limit=10000").await.expect("the keys");
    let keys: Value = serde_json::from_str(&text).expect("JSON");
    let keys = keys["keys"].as_array().expect("keys").iter();
    keys.map(|k| {
        (k["name"].as_str().expect("a name").into(), k["requests_total"].as_u64().expect("a number"))
    })
    .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_and_sidecar_together_count_once() {
    for version in [Version::Oldest, Version::Newest] {
        let (app, server) = (App::start().await, StatServer::start(None).await);
        let tap = Tap::start(Some(server.address)).await;
        let sidecar = Envoy::start(version, &Bootstrap::sidecar(app.address, tap.address), 2).await;
        let gateway = Envoy::start(version, &Bootstrap::gateway(sidecar.address, tap.address), 2).await;
        // All requests through the gateway, then none, then half of them.
        let plan = Plan { requests: 3_000, connections: 20, average_ms: 20.0, ..Plan::default() };
        let direct = Plan { path: "/direct", ..plan };
        let mut sent = Load::start(plan, gateway.address, &app.counts).finish().await;
        sent += Load::start(direct, sidecar.address, &app.counts).finish().await;
        let halves = (
            Load::start(plan, gateway.address, &app.counts),
            Load::start(direct, sidecar.address, &app.counts),
        );
        sent += halves.0.finish().await + halves.1.finish().await;
        assert_eq!(sent, 12_000);
        wait::until_equal("requests, in flight, pods", SETTLED, Some((12_000, 0, 1)), async || {
            let key = server.key("default", "hello-00001").await?;
            Some((key["requests_total"].as_u64()?, key["in_flight"].as_u64()?, key["pods"].as_u64()?))
        })
        .await;
        let reported: u128 = tap
            .acknowledged()
            .iter()
            .flat_map(|report| &report.messages)
            .map(|message| {
                let period = message.until.since(&message.since).expect("a period");
                period.request_ns - if message.from_gateway { 0 } else { period.proxied_request_ns }
            })
            .sum();
        let through = gateway.requests_when(6_000).await;
        let mut straight = sidecar.requests_when(12_000).await;
        straight.retain(|request| request.path.starts_with("/direct"));
        assert_eq!(straight.len(), 6_000);
        let logged = truth::request_ns(&through, 0, u64::MAX) + truth::request_ns(&straight, 0, u64::MAX);
        let off = reported as f64 / logged as f64 - 1.0;
        println!("{version:?}: concurrency of gateway and sidecar together is off by {:+.3} %", off * 100.0);
        assert!(off.abs() < 0.01, "{off}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_servers_figure_is_the_true_concurrency_whichever_way_the_traffic_goes() {
    let (app, server) = (App::start().await, StatServer::start(None).await);
    let sidecar = Envoy::start(Version::Newest, &Bootstrap::sidecar(app.address, server.address), 2).await;
    let gateway =
        Envoy::start(Version::Newest, &Bootstrap::gateway(sidecar.address, server.address), 2).await;
    for (through, straight) in [(12, 0), (0, 12), (6, 6)] {
        let plan = Plan { requests: u64::MAX, average_ms: 50.0, ..Plan::default() };
        let load = |connections, address| Load::start(Plan { connections, ..plan }, address, &app.counts);
        let loads = [load(through, gateway.address), load(straight, sidecar.address)];
        // Twelve clients, each nearly always with one open request. If all were counted twice, the
        // figure would be 24; if only the six that go through the gateway were, 18.
        let concurrency = wait::until("the panic window is full of it", SETTLED, || async {
            let key = server.key("default", "hello-00001").await.ok_or("no key".to_owned())?;
            let figure = key["panic"]["concurrency"].as_f64().expect("a number");
            if (9.0..=13.0).contains(&figure) { Ok(figure) } else { Err(figure.to_string()) }
        })
        .await;
        println!("{through} clients through the gateway, {straight} straight: concurrency {concurrency:.2}");
        for load in loads {
            load.stop();
            load.finish().await;
        }
        wait::until("the panic window is empty", SETTLED, || async {
            let key = server.key("default", "hello-00001").await.ok_or(0.0)?;
            let figure = key["panic"]["concurrency"].as_f64().expect("a number");
            if figure == 0.0 { Ok(()) } else { Err(figure) }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_request_of_a_key_is_reported_at_once_and_once() {
    for concurrency in [1, 2, 4] {
        let (app, server) = (App::start().await, StatServer::start(None).await);
        let tap = Tap::start(Some(server.address)).await;
        let envoy =
            Arc::new(Envoy::start(Version::Newest, &by_headers(&app, tap.address, "5s"), concurrency).await);
        let mut delays = Vec::new();
        for number in 0..20 {
            let name = format!("single-{number}");
            let began = Instant::now();
            let answer = tokio::spawn(http::ask(envoy.address, request("/work?ms=300", &name)));
            let first = wait::until("the first report", SETTLED, || async {
                said_of(&tap, &name).first().cloned().ok_or("none")
            })
            .await;
            let arrived =
                tap.recorded().into_iter().find(|r| r.report.messages.iter().any(|m| m.name == name));
            delays.push(arrived.expect("the report").at - began);
            assert_eq!(first.until, Snapshot { in_flight: 1, ..first.since }, "it counts nothing");
            assert!(first.from_gateway);
            answer.await.expect("the client").expect("an answer");
        }
        delays.sort();
        println!("concurrency {concurrency}: a first request is known after {:?} (median of 20)", delays[10]);
        // Far less than a period: the report did not wait for the tick.
        assert!(delays[10] < Duration::from_secs(1), "{delays:?}");

        // Fifty requests at once, over all workers: one report before the tick, and the tick does
        // not repeat it.
        let mut clients = JoinSet::new();
        for _ in 0..50 {
            clients.spawn(http::ask(envoy.address, request("/work?ms=1000", "many")));
        }
        wait::until_equal("in the app", SETTLED, 50, async || app.counts.now()).await;
        wait::until("the first report", SETTLED, || async {
            said_of(&tap, "many").first().cloned().ok_or("none")
        })
        .await;
        let answers = clients.join_all().await;
        assert!(answers.iter().all(|answer| answer.as_ref().is_ok_and(|(status, _)| *status == 200)));
        let at_once = |m: &&KeyReport| m.until.as_of_ns == m.since.as_of_ns;
        assert_eq!(said_of(&tap, "many").iter().filter(at_once).count(), 1);
        wait::until_equal("the server's count", SETTLED, 50, || {
            server.number("ns", "many", "requests_total")
        })
        .await;
        assert_eq!(server.number("ns", "single-3", "requests_total").await, 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_thousand_keys_and_every_sum_is_exact() {
    let (app, server) = (App::start().await, StatServer::start(None).await);
    let tap = Tap::start(Some(server.address)).await;
    let envoy = Arc::new(Envoy::start(Version::Newest, &by_headers(&app, tap.address, "1s"), 4).await);
    let before = envoy.process.resident_bytes();
    let began = Instant::now();
    let mut clients = JoinSet::new();
    for client in 0..40_u64 {
        let envoy = Arc::clone(&envoy);
        clients.spawn(async move {
            let mut connection = Connection::open(envoy.address).await.expect("a connection");
            for number in 0..500 {
                let key = (client * 500 + number) * 7919 % 5_000;
                let status = connection.ask(request("/work?ms=2", &format!("key-{key}"))).await;
                assert_eq!(status.expect("an answer"), 200);
            }
        });
    }
    clients.join_all().await;
    println!("20,000 requests of 5,000 keys in {:?}", began.elapsed());
    let expected: BTreeMap<String, u64> = (0..5_000).map(|key| (format!("key-{key}"), 4)).collect();
    wait::until("every key has its four requests", SETTLED, || async {
        let keys = all_keys(&server).await;
        let wrong = keys.iter().filter(|(name, count)| expected.get(*name) != Some(count)).count();
        if keys == expected { Ok(()) } else { Err((keys.len(), wrong, keys.values().sum::<u64>())) }
    })
    .await;
    let largest = tap.recorded().iter().map(|r| r.report.messages.len()).max();
    let grown = envoy.process.resident_bytes() - before;
    println!("largest report {largest:?} keys; Envoy grew by {} MiB", grown >> 20);
    // Idle keys are reported as idle, and then a part of them each second: all of them twice a minute.
    wait::until("reports have few keys", SETTLED, || async {
        let before = tap.recorded().len();
        tokio::time::sleep(Duration::from_millis(2_500)).await;
        let most = tap.recorded()[before..].iter().map(|r| r.report.messages.len()).max().unwrap_or(0);
        if most < 600 { Ok(()) } else { Err(most) }
    })
    .await;
    assert_eq!(all_keys(&server).await, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn beyond_max_keys_requests_flow_uncounted_until_other_keys_are_idle() {
    let (app, server) = (App::start().await, StatServer::start(None).await);
    // The period is longer than the requests below take, so that no key is idle for a whole period
    // before all of them have come.
    let mut bootstrap = by_headers(&app, server.address, "4s");
    bootstrap.configure("gateway", json!({"key": {"from": "headers"}, "max_keys": 300}));
    let envoy = Arc::new(Envoy::start(Version::Newest, &bootstrap, 4).await);
    let mut clients = JoinSet::new();
    for client in 0..10 {
        let envoy = Arc::clone(&envoy);
        clients.spawn(async move {
            let mut connection = Connection::open(envoy.address).await.expect("a connection");
            for key in (client..301).step_by(10) {
                let status = connection.ask(request("/work", &format!("made-up-{key}"))).await;
                assert_eq!(status.expect("an answer"), 200);
            }
        });
    }
    clients.join_all().await;
    // A request without the headers has no key at all.
    let plain = Request::get("/work").header("host", "app").body(Full::default()).expect("a request");
    http::ask(envoy.address, plain).await.expect("an answer");
    wait::until_equal("requests over the limit and without a key", SETTLED, (1.0, 1.0), async || {
        let (over_limit, without_key) =
            ("inflight_requests_over_key_limit_total", "inflight_requests_without_key_total");
        (envoy.stat(over_limit, &[]).await, envoy.stat(without_key, &[]).await)
    })
    .await;
    wait::until_equal("keys and their requests", SETTLED, (300, 300), async || {
        let keys = all_keys(&server).await;
        (keys.len(), keys.values().sum::<u64>())
    })
    .await;
    assert_eq!(app.counts.requests(), 302, "all of them flowed");
    // Those names are idle now, so there is capacity again. Only the first `max_keys` names get
    // stats of their own.
    let counted = wait::until("another key is counted", Duration::from_secs(60), || async {
        http::ask(envoy.address, request("/work", "real")).await.expect("an answer");
        let counted = server.number("ns", "real", "requests_total").await;
        if counted > 0 { Ok(counted) } else { Err(counted) }
    })
    .await;
    assert!(counted >= 1);
    let made_up = envoy.stat("activator_request_count", &[("revision_name", "made-up-7")]).await;
    let real = envoy.stat("activator_request_count", &[("revision_name", "real")]).await;
    assert_eq!((made_up, real), (1.0, 0.0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_worker_that_panics_leaves_its_counts_and_nothing_in_flight() {
    let (app, server) = (App::start().await, StatServer::start(None).await);
    let mut bootstrap = by_headers(&app, server.address, "500ms");
    bootstrap.module(&built("faulty/wasm32-wasip1/release/inflight_filter.wasm"));
    let envoy = Envoy::start(Version::Newest, &bootstrap, 1).await;
    let open = tokio::spawn(http::ask(envoy.address, request("/work?ms=60000", "kept")));
    wait::until_equal("in the app", SETTLED, 1, async || app.counts.now()).await;
    let figures = async || {
        let key = server.key("ns", "kept").await?;
        Some((key["requests_total"].as_u64()?, key["in_flight"].as_u64()?))
    };
    wait::until_equal("requests and in flight", SETTLED, Some((1, 1)), figures).await;
    for _ in 0..9 {
        http::ask(envoy.address, request("/work", "kept")).await.expect("an answer");
    }
    let mut fault = request("/work", "kept");
    fault.headers_mut().insert("x-inflight-fault", "panic".parse().expect("a value"));
    let _ = http::ask(envoy.address, fault).await;
    wait::until_equal("requests and in flight", SETTLED, Some((10, 0)), figures).await;
    // The new VM continues to count the key.
    wait::until("requests are served again", SETTLED, || async {
        match http::ask(envoy.address, request("/work", "kept")).await {
            Ok((status, _)) if status == 200 => Ok(()),
            other => Err(other),
        }
    })
    .await;
    wait::until_equal("requests and in flight", SETTLED, Some((11, 0)), figures).await;
    open.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_gateway_counted_up_to_a_sigterm_is_reported() {
    let (app, server) = (App::start().await, StatServer::start(None).await);
    let mut envoy = Envoy::start(Version::Newest, &by_headers(&app, server.address, "1s"), 2).await;
    let warm_up = || async {
        // Keys in two reports in a row: Envoy's main thread leads, with an open connection to the
        // server.
        http::ask(envoy.address, request("/work", "before")).await.expect("an answer");
        let sent = envoy.stat("inflight_reports_sent_total", &[]).await;
        if sent >= 3.0 { Ok(()) } else { Err(sent) }
    };
    wait::until("three reports", SETTLED, warm_up).await;
    for _ in 0..20 {
        http::ask(envoy.address, request("/work", "last")).await.expect("an answer");
    }
    envoy.process.signal(libc::SIGTERM);
    envoy.process.wait(Duration::from_secs(30));
    wait::until_equal("the server's count", SETTLED, 20, || server.number("ns", "last", "requests_total"))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_short_request_and_never_another_is_counted_then_idle_then_forgotten() {
    let app = App::start().await;
    let tap = Tap::start(None).await;
    let envoy = Envoy::start(Version::Newest, &by_headers(&app, tap.address, "300ms"), 2).await;
    http::ask(envoy.address, request("/work?ms=1", "once.with.dots")).await.expect("an answer");
    let idle = wait::until("it is reported as idle", SETTLED, || async {
        let said = said_of(&tap, "once.with.dots");
        let last = said.last().cloned().ok_or(said.len())?;
        let idle = last.since.requests == last.until.requests && last.until.in_flight == 0;
        if idle { Ok(said) } else { Err(said.len()) }
    })
    .await;
    assert_eq!(idle.last().expect("a report").until.requests, 1);
    let reports = tap.recorded().len();
    wait::until("five reports in a row are without the key", SETTLED, || async {
        // A key without changes is in no report, but for a reminder each 25 s. Requests of another key
        // cause reports.
        http::ask(envoy.address, request("/work", "other")).await.expect("an answer");
        let later = tap.recorded().split_off(reports);
        let is_without = |report: &Report| report.messages.iter().all(|said| said.name != "once.with.dots");
        let in_a_row = later.iter().rev().take_while(|recorded| is_without(&recorded.report)).count();
        if in_a_row >= 5 { Ok(()) } else { Err(later.len()) }
    })
    .await;
    let later = said_of(&tap, "once.with.dots").split_off(idle.len());
    assert!(
        later.iter().all(|said| said.since.requests == said.until.requests && said.until.in_flight == 0),
        "forgotten: {later:#?}"
    );
    // The key's stats have the documented labels.
    let labels = [("namespace_name", "ns"), ("revision_name", "once.with.dots")];
    let codes = [labels[0], labels[1], ("response_code", "200"), ("response_code_class", "2xx")];
    assert_eq!(envoy.stat("activator_request_count", &codes).await, 1.0);
    wait::until_equal("the histogram", SETTLED, 1.0, || {
        envoy.stat("activator_request_latencies_count", &codes)
    })
    .await;
    let stats = envoy.stats().await;
    assert_eq!(prometheus::sum(&stats, "activator_request_concurrency_milli", &labels), 0.0);
    assert!(stats.iter().any(|s| s.name == "activator_request_concurrency_milli" && s.labels.len() == 2));
    assert!(!stats.iter().any(|s| s.name.starts_with("queue_")), "a gateway is no pod");
    // A name that has what ends a label is one label all the same.
    for (name, label) in [("a;.;revision_name=.=b", "a%3B.%3Brevision_name%3D.%3Db"), ("a.", "a%2E")] {
        http::ask(envoy.address, request("/work?ms=1", name)).await.expect("an answer");
        let labels = [labels[0], ("revision_name", label), codes[2], codes[3]];
        wait::until_equal(name, SETTLED, 1.0, || envoy.stat("activator_request_count", &labels)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_outside_can_pass_for_the_gateway() {
    let (app, server) = (App::start().await, StatServer::start(None).await);
    let mut bootstrap = Bootstrap::sidecar(app.address, server.address);
    bootstrap.configure("reporting_period", "200ms".into());
    let sidecar = Envoy::start(Version::Newest, &bootstrap, 1).await;
    let faked = |path: &str| {
        let request = Request::get(path).header("host", "app").header("k-proxy-request", "activator");
        request.body(Full::<Bytes>::default()).expect("a request")
    };
    let gateway = |mark: bool| {
        let mut bootstrap = Bootstrap::gateway(sidecar.address, server.address);
        bootstrap.configure("reporting_period", "200ms".into());
        bootstrap.configure("gateway", json!({"mark": mark}));
        bootstrap
    };
    let marking = Envoy::start(Version::Newest, &gateway(true), 1).await;
    http::ask(marking.address, faked("/work")).await.expect("an answer");
    // Counted at the gateway and passed on as proxied: counted once.
    wait::until_equal("the server's count", SETTLED, 1, || {
        server.number("default", "hello-00001", "requests_total")
    })
    .await;
    wait::until_equal("proxied at the sidecar", SETTLED, 1.0, || {
        sidecar.stat("queue_proxied_requests_total", &[])
    })
    .await;
    let silent = Envoy::start(Version::Newest, &gateway(false), 1).await;
    http::ask(silent.address, faked("/work")).await.expect("an answer");
    wait::until_equal("at the sidecar", SETTLED, 2.0, || sidecar.stat("queue_requests_total", &[])).await;
    assert_eq!(sidecar.stat("queue_proxied_requests_total", &[]).await, 1.0, "what the client said is gone");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_ingress_gateways_envoyfilter_counts_in_a_real_envoy() {
    let (app, server) = (App::start().await, StatServer::start(None).await);
    let envoy =
        Envoy::start(Version::Newest, &Bootstrap::istio_gateway(app.address, server.address), 2).await;
    let sent = Load::start(Plan::default(), envoy.address, &app.counts).finish().await;
    let local = Request::get("/local").header("host", "app").body(Full::default()).expect("a request");
    http::ask(envoy.address, local).await.expect("an answer");
    wait::until_equal("the server's count", SETTLED, sent, || {
        server.number("default", "hello-00001", "requests_total")
    })
    .await;
    let labels = [("namespace_name", "default"), ("revision_name", "hello-00001"), ("response_code", "200")];
    wait::until_equal("the count by code", SETTLED, sent as f64, || {
        envoy.stat("activator_request_count", &labels)
    })
    .await;
    // A direct response goes to no cluster, so it has no key.
    wait::until_equal("a request without a key", SETTLED, 1.0, || {
        envoy.stat("inflight_requests_without_key_total", &[])
    })
    .await;
}

/// Sends requests of one key one after the other, until `stop` is set.
async fn ask_on_and_on(envoy: SocketAddr, name: String, ms: u64, stop: Arc<AtomicBool>) {
    let path = format!("/work?ms={ms}&key={name}");
    let mut connection = Connection::open(envoy).await.expect("a connection");
    while !stop.load(Ordering::Relaxed) {
        assert_eq!(connection.ask(request(&path, &name)).await.expect("an answer"), 200);
    }
}

/// Returns what a receiver of these reports counts for each key: requests and the integral of
/// concurrency. No total of a key may be lower at a later instant.
fn received(reports: &[Report]) -> BTreeMap<String, (u64, u128)> {
    let mut known: BTreeMap<&str, (Snapshot, u64, u128)> = BTreeMap::new();
    let mut said: BTreeMap<&str, Vec<Snapshot>> = BTreeMap::new();
    for KeyReport { name, since, until, .. } in reports.iter().flat_map(|report| &report.messages) {
        said.entry(name).or_default().push(*until);
        let (last, requests, request_ns) = known
            .get(name.as_str())
            .map_or((None, 0, 0), |(last, requests, ns)| (Some(*last), *requests, *ns));
        let added = addition(last.as_ref(), since, until).expect("no counter went back");
        let last = last.map_or(*until, |last| last.ceiling(until));
        known.insert(name, (last, requests + added.requests, request_ns + added.request_ns));
    }
    for (name, mut said) in said {
        said.sort_by_key(|until| (until.as_of_ns, until.requests, until.request_ns));
        for pair in said.windows(2) {
            assert!(pair[1].holds_totals_of(&pair[0]), "the totals of {name} went back: {pair:?}");
        }
    }
    known.into_iter().map(|(name, (_, requests, ns))| (name.to_owned(), (requests, ns))).collect()
}

/// STALLS="period:seconds ..." replaces the two stalls of `make test` by others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_stalls_loses_and_doubles_no_request_of_any_key() {
    let stalls = std::env::var("STALLS").unwrap_or_else(|_| "100ms:1 1s:7".into());
    for (period, seconds) in stalls.split(' ').map(|stall| stall.split_once(':').expect("period:seconds")) {
        let (app, server) = (App::start().await, StatServer::start(None).await);
        let tap = Tap::start(Some(server.address)).await;
        let mut bootstrap = by_headers(&app, tap.address, period);
        bootstrap.stalls();
        let envoy = Envoy::start(Version::Newest, &bootstrap, 2).await;
        let stop = Arc::new(AtomicBool::new(false));
        let mut clients = JoinSet::new();
        for client in 0..24 {
            let (name, ms) = match client % 3 {
                0 => (format!("long-{}", client % 4), 1_500 + client * 40),
                _ => (format!("short-{}", client % 5), 20 + client),
            };
            clients.spawn(ask_on_and_on(envoy.address, name, ms, Arc::clone(&stop)));
        }
        // A key that is in flight all the time, from connections at both workers.
        for _ in 0..20 {
            let ms = 9_000.0 + 1_000.0 * seconds.parse::<f64>().expect("seconds");
            let path = format!("/work?ms={ms}&key=steady");
            clients.spawn(async move { drop(http::ask(envoy.address, request(&path, "steady")).await) });
        }
        wait::until("the steady key is known", SETTLED, || async {
            let in_flight = server.number("ns", "steady", "in_flight").await;
            if in_flight == 20 { Ok(()) } else { Err(in_flight) }
        })
        .await;
        let mut stall = request("/work?ms=1&key=stall", "stall");
        stall.headers_mut().insert("x-stall", seconds.parse().expect("a value"));
        let stalled = tokio::spawn(http::ask(envoy.address, stall));
        // During the stall and for some time after, the server must never show more requests than
        // there are.
        let (mut most, began) = (0.0_f64, Instant::now());
        let mut after = None;
        while after.is_none_or(|after: Instant| after.elapsed() < Duration::from_secs(4)) {
            let key = server.key("ns", "steady").await.expect("the key");
            most = most.max(key["panic"]["concurrency"].as_f64().expect("a number"));
            if after.is_none() && stalled.is_finished() {
                after = Some(Instant::now());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let stood = after.map(|after| after - began);
        stop.store(true, Ordering::Relaxed);
        assert_eq!(stalled.await.expect("the client").expect("an answer").0, 200);
        clients.join_all().await;
        let expected = |requests: &[truth::Request]| {
            let mut counts: BTreeMap<String, (u64, u128)> = BTreeMap::new();
            for request in requests {
                let key = request.path.split_once("key=").expect("a key").1;
                let count = counts.entry(key.to_owned()).or_default();
                *count = (count.0 + 1, count.1 + u128::from(request.end_ns - request.start_ns));
            }
            counts
        };
        let logged = envoy.requests_when(app.counts.requests()).await;
        let expected = expected(&logged);
        let counts: BTreeMap<String, u64> =
            expected.iter().map(|(name, (requests, _))| (name.clone(), *requests)).collect();
        wait::until_equal("the server's counts", SETTLED, counts.clone(), async || all_keys(&server).await)
            .await;
        // This stays so when all keys are idle.
        wait::until_equal("keys in flight", SETTLED, 0, || server.number("ns", "steady", "in_flight")).await;
        let recorded = tap.recorded();
        let refused: Vec<_> =
            recorded.iter().filter(|r| r.answered.is_some_and(|code| code >= 400)).collect();
        assert!(refused.is_empty(), "{refused:?}");
        assert_eq!(all_keys(&server).await, counts);
        for (name, requests) in &counts {
            let labels = [("revision_name", name.as_str())];
            let stat = envoy.stat("activator_request_count", &labels).await;
            assert_eq!(stat, *requests as f64, "Envoy's own count of {name}");
        }
        let received = received(&tap.acknowledged());
        let sum = |of: &BTreeMap<String, (u64, u128)>| of.values().map(|(_, ns)| *ns).sum::<u128>() as f64;
        let off = sum(&received) / sum(&expected) - 1.0;
        println!(
            "period {period}, a worker stood still for {stood:?}: {} requests of {} keys, integral off by {:+.3} %, most \
             in a panic window {most:.2} of 20",
            logged.len(),
            counts.len(),
            off * 100.0
        );
        assert!(off.abs() < 0.005, "{off}");
        // On a busy machine, several reports come within one second, a sixth of the window. Seven
        // seconds of ten requests within one second would be more than that.
        assert!(most < 20.0 * 1.5, "what came late looked like a burst: {most}");
    }
}
