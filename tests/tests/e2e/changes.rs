//! Envoy is changed, restarted and killed under load.

use std::net::SocketAddr;
use std::time::Duration;

use inflight_e2e::app::App;
use inflight_e2e::bootstrap::Bootstrap;
use inflight_e2e::envoy::{Envoy, How, Version};
use inflight_e2e::load::{Load, Plan};
use inflight_e2e::process::is_clean;
use inflight_e2e::statserver::StatServer;
use inflight_e2e::tap::Tap;
use inflight_e2e::{built, wait};

const SETTLED: Duration = Duration::from_secs(30);
/// Longer than listeners take to drain. The counts of such a period are in a last report, or lost.
const LONG: &str = "12s";
const STEADY: Plan =
    Plan { requests: u64::MAX, connections: 16, average_ms: 10.0, mixed: true, seed: 5, path: "/work" };

async fn in_flight(server: &StatServer) -> u64 {
    server.number("default", "hello-00001", "in_flight").await
}

/// Waits until `more` more requests were sent.
async fn goes_on(load: &Load, more: u64) {
    let from = load.sent();
    wait::until("the load goes on", SETTLED, || async {
        let sent = load.sent();
        if sent >= from + more { Ok(()) } else { Err(sent) }
    })
    .await;
}

/// Waits until the server knows of `sent` requests, and of none that is still open.
async fn settles(server: &StatServer, sent: u64) {
    wait::until_equal("the server's count, and in flight", SETTLED, (sent, 0), || async {
        (server.total().await, in_flight(server).await)
    })
    .await;
}

/// Returns an Envoy under load whose reporting period is longer than its listeners take to drain,
/// the load, and the configuration without and with this period.
async fn slow(
    version: Version,
    concurrency: u32,
    app: &App,
    server: &StatServer,
) -> (Envoy, Load, Bootstrap, Bootstrap) {
    let bootstrap = Bootstrap::sidecar(app.address, server.address);
    let mut slow = bootstrap.clone();
    slow.configure("reporting_period", LONG.into());
    let how = How { concurrency, dynamic: true, ..How::default() };
    let envoy = Envoy::with(version, &slow, how).await;
    let load = Load::start(STEADY, envoy.address, &app.counts);
    goes_on(&load, 500).await;
    (envoy, load, bootstrap, slow)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_listener_that_is_replaced_under_load_loses_no_count() {
    for (version, concurrency) in [(Version::Oldest, 2), (Version::Newest, 4)] {
        let (app, server) = (App::start().await, StatServer::start(None).await);
        let (envoy, load, bootstrap, slow) = slow(version, concurrency, &app, &server).await;
        // Another module. Its VMs start beside the old ones, with the same shared data, and the old
        // ones end before they report.
        let mut other = slow.clone();
        other.module(&built("faulty/wasm32-wasip1/release/inflight_filter.wasm"));
        envoy.replace(&other, "access.log").await;
        envoy.drained().await;
        goes_on(&load, 500).await;
        // Another period, and now a breaker.
        let mut limited = bootstrap.clone();
        limited.configure("reporting_period", "300ms".into());
        limited.configure("container_concurrency", 100.into());
        envoy.replace(&limited, "access.log").await;
        goes_on(&load, 500).await;
        envoy.replace(&bootstrap, "access.log").await;
        goes_on(&load, 500).await;
        envoy.drained().await;
        goes_on(&load, 500).await;
        load.stop();
        let sent = load.finish().await;
        assert_eq!(envoy.requests_when(sent).await.len() as u64, sent);
        settles(&server, sent).await;
        assert_eq!(envoy.stat("queue_requests_total", &[]).await as u64, sent);
        println!("{version:?} concurrency {concurrency}: {sent} requests over four configurations");
    }
}

/// Envoy does not call a root context whose configuration comes back while the context still
/// exists.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_configuration_that_is_rolled_back_is_in_force_again() {
    const LIMIT: u64 = 3;
    for (version, concurrency) in [(Version::Oldest, 2), (Version::Newest, 4)] {
        let (app, server) = (App::start().await, StatServer::start(None).await);
        let tap = Tap::start(Some(server.address)).await;
        let mut limited = Bootstrap::sidecar(app.address, tap.address);
        let mut changed = limited.clone();
        limited.configure("container_concurrency", LIMIT.into());
        changed.configure("reporting_period", LONG.into());
        let how = How { concurrency, dynamic: true, ..How::default() };
        let envoy = Envoy::with(version, &limited, how).await;
        let load = Load::start(Plan { mixed: false, ..STEADY }, envoy.address, &app.counts);
        goes_on(&load, 200).await;
        assert_eq!(app.counts.most(), LIMIT);
        envoy.replace(&changed, "access.log").await;
        goes_on(&load, 500).await;
        assert!(app.counts.most() > LIMIT, "without a limit");
        envoy.replace(&limited, "access.log").await;
        // The period changes at once, because it is the shortest of all configurations.
        let reports = tap.reports(3, SETTLED).await;
        // The first report may be of the previous period.
        for report in &reports[1..] {
            let message = &report.messages[0];
            let period_ns = message.until.as_of_ns - message.since.as_of_ns;
            assert!(period_ns < 6_000_000_000, "a report of {period_ns} ns");
        }
        // The limit applies once the other configuration has ended; until then, some requests
        // belong to that one.
        envoy.drained().await;
        goes_on(&load, 200).await;
        wait::until("the others have left the app", SETTLED, || async {
            if app.counts.now() <= LIMIT { Ok(()) } else { Err(app.counts.now()) }
        })
        .await;
        app.counts.forget_most();
        goes_on(&load, 500).await;
        assert_eq!(app.counts.most(), LIMIT);
        load.stop();
        let sent = load.finish().await;
        settles(&server, sent).await;
        println!("{version:?} concurrency {concurrency}: {sent} requests, there and back");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_filter_that_is_taken_out_and_put_back_counts_what_passed_it() {
    for (version, concurrency) in [(Version::Oldest, 4), (Version::Newest, 2)] {
        let (app, server) = (App::start().await, StatServer::start(None).await);
        let (envoy, load, bootstrap, _) = slow(version, concurrency, &app, &server).await;
        let mut bare = bootstrap.clone();
        bare.without_filter();
        envoy.replace(&bare, "bare.log").await;
        envoy.drained().await;
        // The filter is gone, but none of its counts are.
        goes_on(&load, 500).await;
        let first = envoy.requests().len() as u64;
        settles(&server, first).await;
        envoy.replace(&bootstrap, "access.log").await;
        envoy.drained().await;
        goes_on(&load, 500).await;
        load.stop();
        let sent = load.finish().await;
        let (counted, past) = wait::until("every request is logged", SETTLED, || async {
            let logged = (envoy.requests().len() as u64, envoy.requests_in("bare.log").len() as u64);
            if logged.0 + logged.1 == sent { Ok(logged) } else { Err(logged) }
        })
        .await;
        assert!(counted >= first + 300 && past >= 300, "{counted} through the filter, {past} past it");
        settles(&server, counted).await;
        println!("{version:?} concurrency {concurrency}: {counted} through the filter, {past} past it");
    }
}

/// Returns a port that was free a moment ago.
fn free_port() -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hot_restart_loses_no_count_and_no_request() {
    for version in [Version::Oldest, Version::Newest] {
        let (app, server) = (App::start().await, StatServer::start(None).await);
        let mut bootstrap = Bootstrap::sidecar(app.address, server.address);
        bootstrap.listen_on(free_port());
        let how = How { concurrency: 2, epoch: Some((std::process::id() % 1_000_000, 0)), ..How::default() };
        let mut old = Envoy::with(version, &bootstrap, how.clone()).await;
        let load = Load::start(STEADY, old.address, &app.counts);
        goes_on(&load, 1_000).await;
        let new = old.next_epoch(version, &bootstrap, &how).await;
        let ended = tokio::task::block_in_place(|| old.process.wait(Duration::from_secs(30)));
        assert!(is_clean(ended), "{ended:?}");
        let before = server.total().await;
        goes_on(&load, 500).await;
        load.stop();
        let sent = load.finish().await;
        assert_eq!(new.requests_when(sent).await.len() as u64, sent);
        settles(&server, sent).await;
        println!("{version:?}: {sent} requests, {before} known when the old Envoy had ended");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_envoy_loses_what_it_had_not_reported_and_nothing_else() {
    let (app, server) = (App::start().await, StatServer::start(None).await);
    let tap = Tap::start(Some(server.address)).await;
    let mut bootstrap = Bootstrap::sidecar(app.address, tap.address);
    bootstrap.listen_on(free_port());
    let mut lost = Vec::new();
    let mut counted_before = 0;
    for round in 0..3 {
        let mut envoy = Envoy::start(Version::Newest, &bootstrap, 2).await;
        let arrived = app.counts.requests();
        let plan = Plan { requests: u64::MAX, mixed: false, seed: round, ..STEADY };
        let load = Load::start(plan, envoy.address, &app.counts);
        tap.reports(2, SETTLED).await;
        goes_on(&load, 300 * round).await;
        envoy.process.kill();
        load.abandon().await;
        let arrived = app.counts.requests() - arrived;
        let counted = server.total().await;
        let reports = tap.acknowledged();
        let last = reports.last().expect("a report").messages[0].until;
        assert_eq!(counted, counted_before + last.requests, "what was acknowledged is known, and no more");
        // The app's own count of arrivals up to the last report's instant. At least these must have
        // been counted.
        let by_then = app.counts.arrived_by(last.as_of_ns) - (app.counts.requests() - arrived);
        assert!(last.requests >= by_then, "{} counted, {by_then} had reached the app", last.requests);
        assert!(last.requests <= arrived + STEADY.connections);
        lost.push(arrived.saturating_sub(last.requests));
        counted_before = counted;
    }
    println!("lost with each SIGKILL, of one period at most: {lost:?} requests");
    // The requests of the three senders that are gone count as in flight until the senders have
    // been silent for ten of their periods.
    wait::until_equal("in flight", SETTLED, 0, || in_flight(&server)).await;
}
