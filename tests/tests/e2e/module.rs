//! Envoys that fetch the module from the stats server: `code.remote`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use inflight_e2e::app::App;
use inflight_e2e::bootstrap::{Bootstrap, at};
use inflight_e2e::envoy::{Envoy, How, Version};
use inflight_e2e::load::{Load, Plan};
use inflight_e2e::statserver::StatServer;
use inflight_e2e::{built, http, wait};
use serde_json::json;

const SETTLED: Duration = Duration::from_secs(15);
/// How long two loads of the module may take on a busy machine.
const LOADED: Duration = Duration::from_secs(60);
/// More than there is time for.
const FOR_EVER: Option<u32> = Some(1_000_000);

fn module() -> PathBuf {
    built("wasm32-wasip1/release/inflight_filter.wasm")
}

/// Returns the module's SHA-256, by another program than the stats server.
fn sha256sum() -> String {
    let output = Command::new("sha256sum").arg(module()).output().expect("sha256sum");
    String::from_utf8_lossy(&output.stdout).split(' ').next().expect("a digest").to_owned()
}

/// Starts a stats server that hands out the module.
async fn server(address: Option<SocketAddr>) -> StatServer {
    StatServer::with(address, &["--module", module().to_str().expect("a path")]).await
}

/// Returns an address on which a stats server can be started.
async fn address_of_nobody() -> SocketAddr {
    let mut server = StatServer::start(None).await;
    server.process.kill();
    server.address
}

fn load(seed: u64) -> Plan {
    Plan { requests: 500, connections: 10, average_ms: 5.0, mixed: true, seed, ..Plan::default() }
}

/// Waits until the stats server knows of all requests in Envoy's access log.
async fn counts_exactly(envoy: &Envoy, server: &StatServer, app: &App, seed: u64) {
    let sent = Load::start(load(seed), envoy.address, &app.counts).finish().await;
    let logged = envoy.requests_when(sent).await.len() as u64;
    assert_eq!(logged, sent);
    wait::until_equal("the server's count", SETTLED, logged, || server.total()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_envoy_that_fetches_the_module_waits_for_the_server_and_counts_every_request() {
    for version in [Version::Oldest, Version::Newest] {
        let (app, address) = (App::start().await, address_of_nobody().await);
        let mut bootstrap = Bootstrap::sidecar(app.address, address);
        bootstrap.fetched_module(&sha256sum(), FOR_EVER);
        let how = How { concurrency: 2, early: true, ..How::default() };
        let envoy = Envoy::with(version, &bootstrap, how).await;
        // By then two retries of each of its two filters were in vain.
        let failed = async || {
            envoy
                .stat(
                    "envoy_cluster_upstream_cx_connect_fail",
                    &[("envoy_cluster_name", "inflight-statserver")],
                )
                .await
        };
        wait::until("some attempts were in vain", LOADED, async || {
            let failed = failed().await;
            if failed >= 6.0 { Ok(()) } else { Err(failed) }
        })
        .await;
        let ready = http::get(envoy.admin, "/ready").await;
        assert!(ready.as_ref().is_err_and(|answer| answer.contains("INITIALIZING")), "{ready:?}");
        let early = http::get(envoy.address, "/early").await;
        assert!(early.is_err() && envoy.requests().is_empty(), "{early:?}");

        let server = server(Some(address)).await;
        wait::until("Envoy is ready", LOADED, || http::get(envoy.admin, "/ready")).await;
        counts_exactly(&envoy, &server, &app, 5).await;
        let scraped = http::get(envoy.exporter, "/metrics").await.expect("the exporter");
        assert!(scraped.contains("destination_pod=\"hello-00001-pod-1\""), "{scraped}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_module_with_another_digest_is_not_run() {
    for (version, policy, expected) in [
        (Version::Oldest, "FAIL_RELOAD", 503),
        (Version::Newest, "FAIL_RELOAD", 503),
        (Version::Newest, "FAIL_OPEN", 200),
    ] {
        let (app, server) = (App::start().await, server(None).await);
        let mut bootstrap = Bootstrap::sidecar(app.address, server.address);
        bootstrap.fetched_module(&"0".repeat(64), None);
        let config = at(bootstrap.filter(), "/typed_config/config");
        config["failure_policy"] = json!(policy);
        if policy != "FAIL_RELOAD" {
            config.as_object_mut().expect("an object").remove("reload_config");
        }
        let envoy = Envoy::start(version, &bootstrap, 1).await;
        for _ in 0..3 {
            let answer = http::get(envoy.address, "/work").await;
            let code = answer.map_or_else(|reason| reason[..3].parse().unwrap_or(0), |_| 200);
            assert_eq!(code, expected, "{policy}");
        }
        assert_eq!(app.counts.requests(), if expected == 200 { 3 } else { 0 });
        assert_eq!(envoy.stat("queue_requests_total", &[]).await, 0.0);
        assert_eq!(server.total().await, 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_envoy_that_gave_up_answers_503_also_when_the_server_is_back() {
    let (app, address) = (App::start().await, address_of_nobody().await);
    let mut bootstrap = Bootstrap::sidecar(app.address, address);
    bootstrap.fetched_module(&sha256sum(), None);
    let envoy = Envoy::start(Version::Newest, &bootstrap, 1).await;
    let server = server(Some(address)).await;
    let fetched = async || envoy.stat("envoy_wasm_remote_load_fetch_successes", &[]).await;
    // Longer than Envoy remembers a failure, which is ten seconds.
    let until = tokio::time::Instant::now() + Duration::from_secs(12);
    while tokio::time::Instant::now() < until {
        let answer = http::get(envoy.address, "/work").await;
        assert!(answer.as_ref().is_err_and(|reason| reason.starts_with("503")), "{answer:?}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    assert_eq!((fetched().await, app.counts.requests(), server.total().await), (0.0, 0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_old_listener_serves_until_the_new_one_has_its_module() {
    let (app, address) = (App::start().await, address_of_nobody().await);
    let mut before = Bootstrap::sidecar(app.address, address);
    before.without_filter();
    let how = How { concurrency: 2, dynamic: true, ..How::default() };
    let envoy = Envoy::with(Version::Newest, &before, how).await;
    let mut after = Bootstrap::sidecar(app.address, address);
    after.fetched_module(&sha256sum(), FOR_EVER);
    // The same addresses: a new version of the same listeners.
    envoy.replace(&after, "access-2.log").await;
    let warming = async || envoy.stat("envoy_listener_manager_total_listeners_warming", &[]).await;
    assert_eq!(warming().await, 2.0);
    let served = http::get(envoy.address, "/work").await;
    assert!(served.is_ok() && app.counts.requests() == 1, "{served:?}");

    let server = server(Some(address)).await;
    wait::until_equal("listeners that warm", LOADED, 0.0, warming).await;
    let sent = Load::start(load(6), envoy.address, &app.counts).finish().await;
    wait::until_equal("the server's count", SETTLED, sent, || server.total()).await;
    assert_eq!(envoy.requests_in("access-2.log").len() as u64, sent);
}
