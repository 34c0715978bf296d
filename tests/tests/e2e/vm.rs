//! A worker's VM ends by a panic or by a trap.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Request, StatusCode};
use inflight_e2e::app::App;
use inflight_e2e::bootstrap::Bootstrap;
use inflight_e2e::envoy::{Envoy, Version};
use inflight_e2e::load::{Load, Plan};
use inflight_e2e::statserver::StatServer;
use inflight_e2e::tap::Tap;
use inflight_e2e::{built, http, wait};
use inflight_stats::Snapshot;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

const SETTLED: Duration = Duration::from_secs(15);
const STEADY: Plan =
    Plan { requests: u64::MAX, connections: 24, average_ms: 10.0, mixed: true, seed: 2, path: "/work" };

/// Returns a configuration with the module that panics or traps on request.
fn faulty(app: &App, tap: &Tap) -> Bootstrap {
    let mut bootstrap = Bootstrap::sidecar(app.address, tap.address);
    bootstrap.module(&built("faulty/wasm32-wasip1/release/inflight_filter.wasm"));
    bootstrap
}

/// Sets another failure policy. Without one, Envoy's default applies, which is also that of Istio's
/// WasmPlugin and TrafficExtension and of Envoy Gateway.
fn policy(bootstrap: &mut Bootstrap, policy: Option<&str>) {
    let config = bootstrap.filter()["typed_config"]["config"].as_object_mut().expect("a plugin");
    config.remove("failure_policy");
    config.remove("reload_config");
    if let Some(policy) = policy {
        config.insert("failure_policy".into(), policy.into());
    }
}

/// Sets Envoy's older key, which also lets the requests go on that are open in the VM when it ends.
/// The newer key, `failure_policy: FAIL_OPEN`, answers these with 503.
fn fail_open(bootstrap: &mut Bootstrap) {
    policy(bootstrap, None);
    bootstrap.filter()["typed_config"]["config"]["fail_open"] = true.into();
}

async fn fault(envoy: &Envoy, kind: &str) {
    let request = Request::get("/local").header("host", "app").header("x-inflight-fault", kind);
    let _ = http::ask(envoy.address, request.body(Full::<Bytes>::default()).expect("a request")).await;
}

/// Ends the leader's VM by `kind`. No count of an otherwise idle pod may be lost, and reports must
/// go on within three periods.
async fn another_leads_after(kind: &str) {
    let (app, server) = (App::start().await, StatServer::start(None).await);
    let tap = Tap::start(Some(server.address)).await;
    let envoy = Envoy::start(Version::Newest, &faulty(&app, &tap), 2).await;
    let load = Load::start(Plan { requests: 500, ..STEADY }, envoy.address, &app.counts);
    let sent = load.finish().await;
    wait::until_equal("the server's count", SETTLED, sent, || server.total()).await;
    fault(&envoy, kind).await;
    let fault_found = |log: &str| log.contains("a fault was asked for") || log.contains("unreachable");
    wait::until("the leader is gone", SETTLED, || {
        let log = envoy.process.log();
        async move { if fault_found(&log) { Ok(()) } else { Err(log) } }
    })
    .await;
    // The fault comes after a report, so the last report ends at most one tick before the death. That
    // report may still be on its way, and lack the request that asked for the fault. The one after it is
    // another leader's.
    let last = tap.acknowledged().len();
    let reports = wait::until("another leads", SETTLED, || async {
        let reports: Vec<_> = tap.acknowledged().iter().map(|report| report.messages[0].until).collect();
        let is_next = reports.len() >= last + 2 && reports.last().is_some_and(|until| until.requests > sent);
        if is_next { Ok(reports) } else { Err(reports) }
    })
    .await;
    let pairs = reports.windows(2).skip(last - 1);
    let longest =
        pairs.map(|pair| pair[1].as_of_ns.saturating_sub(pair[0].as_of_ns)).max().expect("two reports");
    assert!(longest <= 3_000_000_000, "{longest} ns");
    let reported = reports.last().expect("a report").requests;
    assert_eq!(reported, sent + 1, "the request that asked for the fault, and none lost");
    let load = Load::start(Plan { requests: 500, ..STEADY }, envoy.address, &app.counts);
    let more = load.finish().await;
    // The leader may have died before it read the answer to its last report, so the server's count
    // decides.
    wait::until_equal("the server's count", SETTLED, sent + 1 + more, || server.total()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_worker_leads_when_the_leader_panics() {
    another_leads_after("panic-leader").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_worker_leads_when_the_leaders_vm_traps() {
    another_leads_after("trap-leader").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_panics_leaves_its_counts_and_nothing_in_flight() {
    let app = App::start().await;
    let tap = Tap::start(None).await;
    let envoy = Envoy::start(Version::Newest, &faulty(&app, &tap), 1).await;
    // One request stays open in the worker that dies.
    let mut open = TcpStream::connect(envoy.address).await.expect("a connection");
    open.write_all(b"GET /work?ms=60000 HTTP/1.1\r\nhost: app\r\n\r\n").await.expect("a request");
    wait::until_equal("the app's requests", SETTLED, 1, async || app.counts.now()).await;
    let load = Load::start(Plan { requests: 300, ..STEADY }, envoy.address, &app.counts);
    let sent = load.finish().await + 1;
    fault(&envoy, "panic").await;
    // The request that panicked had not been counted: the fault comes first.
    let last = wait::until("its counts are reported", SETTLED, || async {
        let until = tap.acknowledged().last().map_or(Snapshot::default(), |r| r.messages[0].until);
        if (until.requests, until.in_flight) == (sent, 0) { Ok(until) } else { Err(until) }
    })
    .await;
    assert_eq!(envoy.stat("queue_requests_total", &[]).await as u64, sent);
    // The worker got a new VM, which continues to count.
    let load = Load::start(Plan { requests: 300, ..STEADY }, envoy.address, &app.counts);
    let more = load.finish().await;
    wait::until_equal("the count goes on", SETTLED, (last.requests + more, 0), async || {
        let until = tap.acknowledged().last().expect("a report").messages[0].until;
        (until.requests, until.in_flight)
    })
    .await;
}

/// Requests `path` in the background.
fn ask(envoy: &Envoy, path: &str) -> JoinHandle<Result<(StatusCode, Bytes), String>> {
    let (to, request) = (envoy.address, Request::get(path).header("host", "app").body(Full::default()));
    tokio::spawn(async move { http::ask(to, request.expect("a request")).await })
}

async fn status(answer: JoinHandle<Result<(StatusCode, Bytes), String>>) -> u16 {
    let answer = tokio::time::timeout(SETTLED, answer).await.expect("an answer in time");
    answer.expect("no panic").expect("an answer").0.as_u16()
}

/// One request is in the app, one waits for a permit, and the VM panics. Returns the parts of the
/// test, and the status codes of the two answers.
async fn open_and_waiting(
    version: Version,
    change: impl FnOnce(&mut Bootstrap),
) -> (Envoy, App, Tap, [u16; 2]) {
    let (app, tap) = (App::start().await, Tap::start(None).await);
    let mut bootstrap = faulty(&app, &tap);
    bootstrap.configure("container_concurrency", 1.into());
    change(&mut bootstrap);
    let envoy = Envoy::start(version, &bootstrap, 1).await;
    let open = ask(&envoy, "/work?ms=2000");
    wait::until_equal("in the app", SETTLED, 1, async || app.counts.now()).await;
    let waiting = ask(&envoy, "/work");
    wait::until("one waits", SETTLED, || async {
        let depth = envoy.stat("revision_queue_depth", &[]).await;
        if depth == 2.0 { Ok(()) } else { Err(depth) }
    })
    .await;
    fault(&envoy, "panic").await;
    let answers = [status(open).await, status(waiting).await];
    (envoy, app, tap, answers)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_fail_open_a_panic_fails_no_request_and_no_count_is_lost() {
    for version in [Version::Oldest, Version::Newest] {
        let (envoy, app, tap, answers) = open_and_waiting(version, fail_open).await;
        assert_eq!(answers, [200, 200], "the one in the app, the one that waited");
        // From now on this worker passes all requests on without counting them: there is no VM to
        // count.
        let plan = Plan { requests: 200, mixed: false, ..STEADY };
        assert_eq!(Load::start(plan, envoy.address, &app.counts).finish().await, 200);
        assert_eq!(app.counts.requests(), 202);
        wait::until_equal("what was reported", SETTLED, 2, async || tap.requests()).await;
        assert_eq!(envoy.stat("queue_requests_total", &[]).await, 2.0);
    }
}

/// Returns the answers to 50 requests after the panic, and how many of these requests the app has
/// seen.
async fn later(envoy: &Envoy, app: &App) -> (BTreeSet<u16>, u64) {
    let before = app.counts.requests();
    let mut answers = BTreeSet::new();
    for _ in 0..50 {
        answers.insert(status(ask(envoy, "/work")).await);
    }
    (answers, app.counts.requests() - before)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_fail_closed_which_is_the_default_a_worker_that_panicked_answers_nothing_but_503() {
    for (version, chosen) in [
        (Version::Oldest, None),
        (Version::Newest, None),
        (Version::Oldest, Some("FAIL_CLOSED")),
        (Version::Newest, Some("FAIL_CLOSED")),
    ] {
        let (envoy, app, tap, answers) = open_and_waiting(version, |b| policy(b, chosen)).await;
        assert_eq!(answers, [503, 503], "{chosen:?}: the one in the app, the one that waited");
        assert_eq!(later(&envoy, &app).await, (BTreeSet::from([503]), 0), "{version:?}, {chosen:?}");
        wait::until_equal("what was reported", SETTLED, 2, async || tap.requests()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_the_policy_fail_open_the_open_ones_fail_and_later_ones_pass_uncounted() {
    for version in [Version::Oldest, Version::Newest] {
        let (envoy, app, tap, answers) = open_and_waiting(version, |b| policy(b, Some("FAIL_OPEN"))).await;
        assert_eq!(answers, [503, 503]);
        assert_eq!(later(&envoy, &app).await, (BTreeSet::from([200]), 50), "{version:?}");
        wait::until_equal("what was reported", SETTLED, 2, async || tap.requests()).await;
        assert_eq!(envoy.stat("queue_requests_total", &[]).await, 2.0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_fail_reload_a_panic_answers_at_once_who_waited() {
    let (_envoy, app, _tap, answers) = open_and_waiting(Version::Newest, |_| ()).await;
    // Envoy fails every stream of a VM that is gone, unless `fail_open` is set. But no client waits
    // for ever.
    assert_eq!(answers, [503, 503]);
    assert_eq!(app.counts.requests(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_fail_reload_a_panic_under_load_fails_what_is_open_in_that_vm_alone() {
    for version in [Version::Oldest, Version::Newest] {
        let (app, server) = (App::start().await, StatServer::start(None).await);
        let tap = Tap::start(Some(server.address)).await;
        let envoy = Envoy::start(version, &faulty(&app, &tap), 2).await;
        let load = Load::start(Plan { mixed: false, ..STEADY }, envoy.address, &app.counts);
        let until = async |sent| {
            wait::until("the load goes on", SETTLED, || async {
                if load.sent() >= sent { Ok(()) } else { Err(load.sent()) }
            })
            .await;
        };
        until(1_000).await;
        fault(&envoy, "panic").await;
        until(load.sent() + 1_000).await;
        load.stop();
        let (sent, failures) = load.finish_with_failures().await;
        let failed = failures.len();
        assert!(failed as u64 <= STEADY.connections, "{failures:#?}");
        // The requests that failed were counted when they came. The request that caused the fault
        // was not.
        wait::until_equal("the server's count", SETTLED, sent, || server.total()).await;
        assert_eq!(tap.requests(), sent);
        println!("{version:?}: {sent} requests and a panic, {failed} of them failed, all counted");
    }
}
