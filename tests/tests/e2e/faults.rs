//! The counts when a part dies, hangs or gives wrong answers.

use std::cell::Cell;
use std::collections::HashSet;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use inflight_e2e::app::App;
use inflight_e2e::bootstrap::Bootstrap;
use inflight_e2e::envoy::{Envoy, Version};
use inflight_e2e::load::{Load, Plan};
use inflight_e2e::statserver::StatServer;
use inflight_e2e::tap::{Mode, Recorded, Tap};
use inflight_e2e::{http, process, wait};
use inflight_stats::{KeyReport, Report};
use serde_json::json;

const SETTLED: Duration = Duration::from_secs(15);
const STEADY: Plan =
    Plan { requests: u64::MAX, connections: 8, average_ms: 10.0, mixed: true, seed: 2, path: "/work" };

/// Both versions and every supported number of workers. `count.rs` has every pair of them.
const MATRIX: [(Version, u32); 3] = [(Version::Oldest, 1), (Version::Newest, 2), (Version::Oldest, 4)];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stats_server_that_is_away_for_fifteen_seconds_misses_nothing() {
    join_all(MATRIX.map(|(version, concurrency)| away_for_fifteen_seconds(version, concurrency))).await;
}

async fn away_for_fifteen_seconds(version: Version, concurrency: u32) {
    let (app, mut server) = (App::start().await, StatServer::start(None).await);
    let tap = Tap::start(Some(server.address)).await;
    let envoy = Envoy::start(version, &Bootstrap::sidecar(app.address, tap.address), concurrency).await;
    let load = Load::start(STEADY, envoy.address, &app.counts);
    wait::until("reports arrive", SETTLED, || async {
        let total = server.total().await;
        if total > 1_000 { Ok(()) } else { Err(total) }
    })
    .await;

    let (before, began) = (load.sent(), Instant::now());
    tokio::time::sleep(Duration::from_secs(3)).await;
    let rate = (load.sent() - before) as f64 / began.elapsed().as_secs_f64();

    // Killed between two reports, so that the counts that the first incarnation acknowledged can be
    // read from it.
    tap.set_mode(Mode::Refuse);
    let refused = tap.recorded().len();
    wait::until("a report is refused", SETTLED, || async {
        if tap.recorded().len() > refused { Ok(()) } else { Err(()) }
    })
    .await;
    let first = server.total().await;
    assert_eq!(first, tap.requests());
    server.process.kill();
    tap.set_mode(Mode::Forward);
    let memory = || envoy.stat("inflight_wasm_memory_bytes", &[]);
    let (resident, wasm) = (envoy.process.resident_bytes(), memory().await);
    let (before, began) = (load.sent(), Instant::now());
    tokio::time::sleep(Duration::from_secs(15)).await;
    let away = load.sent() - before;
    let ratio = away as f64 / began.elapsed().as_secs_f64() / rate;
    let grown = envoy.process.resident_bytes().saturating_sub(resident);
    assert!(away > 1_000, "requests went on: {away}");
    assert!(grown < 8 << 20, "Envoy grew by {grown} bytes while the stats server was away");
    // A worker's heap may grow by one page (64 KiB) for other reasons.
    let pages = (memory().await - wasm) / 65_536.0;
    assert!(pages <= f64::from(concurrency), "the filter's memory grew by {pages} pages");

    let server = StatServer::start(Some(server.address)).await;
    load.stop();
    let sent = load.finish().await;
    wait::until_equal("what both incarnations acknowledged", SETTLED, sent, || async {
        first + server.total().await
    })
    .await;
    assert_eq!(tap.requests(), sent);
    let failed = envoy.stat("inflight_reports_failed_total", &[]).await;
    assert!(failed >= 12.0, "{failed} failed reports were counted");
    println!(
        "{version:?} concurrency {concurrency}: {sent} requests, {away} while the stats server was away, at {ratio:.2} of \
         the rate before; Envoy grew by {grown} bytes, the filter by {pages} pages"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_answer_counts_nothing_twice() {
    join_all(MATRIX.map(|(version, concurrency)| losing_answers(version, concurrency))).await;
}

async fn losing_answers(version: Version, concurrency: u32) {
    let (app, server) = (App::start().await, StatServer::start(None).await);
    let tap = Tap::start(Some(server.address)).await;
    let mut bootstrap = Bootstrap::sidecar(app.address, tap.address);
    bootstrap.configure("reporting_period", "200ms".into());
    let envoy = Envoy::start(version, &bootstrap, concurrency).await;
    let load = Load::start(STEADY, envoy.address, &app.counts);
    for _ in 0..10 {
        for mode in [Mode::Forward, Mode::LoseAnswer, Mode::LoseAnswer] {
            tap.set_mode(mode);
            let seen = tap.recorded().len();
            wait::until("a report comes", SETTLED, || async {
                if tap.recorded().len() > seen { Ok(()) } else { Err(()) }
            })
            .await;
        }
    }
    tap.set_mode(Mode::Forward);
    load.stop();
    let sent = load.finish().await;
    wait::until_equal("the server's count", SETTLED, sent, || server.total()).await;
    let lost = tap.recorded().iter().filter(|r| r.answered.is_none()).count();
    assert!(lost >= 20, "{lost} answers were lost");
    assert_eq!(tap.requests(), sent);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hanging_stats_server_holds_up_neither_requests_nor_counts() {
    let (app, server) = (App::start().await, StatServer::start(None).await);
    let tap = Tap::start(Some(server.address)).await;
    let mut bootstrap = Bootstrap::sidecar(app.address, tap.address);
    bootstrap.configure("reporting_period", "200ms".into());
    let envoy = Envoy::start(Version::Newest, &bootstrap, 2).await;
    tap.set_mode(Mode::Hang);
    let load = Load::start(Plan { requests: 2_000, ..STEADY }, envoy.address, &app.counts);
    let sent = load.finish().await;
    wait::until("reports time out", SETTLED, || async {
        let failed = envoy.stat("inflight_reports_failed_total", &[]).await;
        if failed >= 2.0 { Ok(()) } else { Err(failed) }
    })
    .await;
    tap.set_mode(Mode::Forward);
    wait::until_equal("the server's count", SETTLED, sent, || server.total()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_the_stats_server_answers_no_request_fails_and_no_count_is_lost() {
    const MODES: [Mode; 9] = [
        Mode::Slow(400),
        Mode::Slow(2_000),
        Mode::Hang,
        Mode::Refuse,
        Mode::Answer(500),
        Mode::Answer(302),
        Mode::Garbage,
        Mode::EndlessHead,
        Mode::EndlessBody,
    ];
    for version in [Version::Oldest, Version::Newest] {
        let (app, server) = (App::start().await, StatServer::start(None).await);
        let tap = Tap::start(Some(server.address)).await;
        let mut bootstrap = Bootstrap::sidecar(app.address, tap.address);
        bootstrap.configure("reporting_period", "200ms".into());
        let envoy = Envoy::start(version, &bootstrap, 2).await;
        let load = Load::start(STEADY, envoy.address, &app.counts);
        let stat = async |name| envoy.stat(name, &[]).await;
        let resident = envoy.process.resident_bytes();
        let largest = Cell::new(0);
        for mode in MODES {
            let (sent, acknowledged) = (load.sent(), stat("inflight_reports_sent_total").await);
            let failed = stat("inflight_reports_failed_total").await;
            tap.set_mode(mode);
            wait::until(&format!("{mode:?} is noticed"), SETTLED, || async {
                largest.set(largest.get().max(envoy.process.resident_bytes()));
                let failed_now = stat("inflight_reports_failed_total").await;
                let acknowledged_now = stat("inflight_reports_sent_total").await;
                // A slow answer within the timeout is not a failure.
                let enough = if mode == Mode::Slow(400) {
                    acknowledged_now - acknowledged
                } else {
                    failed_now - failed
                };
                if enough >= 3.0 && load.sent() >= sent + 200 { Ok(()) } else { Err((enough, load.sent())) }
            })
            .await;
            // Between two modes everything works again.
            let acknowledged = stat("inflight_reports_sent_total").await;
            tap.set_mode(Mode::Forward);
            wait::until("it is well again", SETTLED, || async {
                let now = stat("inflight_reports_sent_total").await;
                if now > acknowledged { Ok(()) } else { Err(now) }
            })
            .await;
        }
        load.stop();
        let sent = load.finish().await;
        wait::until_equal("the server's count", SETTLED, sent, || server.total()).await;
        assert!(largest.get() < resident + (256 << 20), "{} MiB", largest.get() >> 20);
        println!(
            "{version:?}: {sent} requests through nine kinds of trouble; Envoy grew from {} to at most {} MiB",
            resident >> 20,
            largest.get() >> 20
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_stats_servers_each_knows_its_part_and_one_may_die() {
    for version in [Version::Oldest, Version::Newest] {
        let app = App::start().await;
        let [mut first, second] = [StatServer::start(None).await, StatServer::start(None).await];
        let taps = [Tap::start(Some(first.address)).await, Tap::start(Some(second.address)).await];
        let mut bootstrap = Bootstrap::sidecar(app.address, taps[0].address);
        bootstrap.endpoints("inflight-statserver", &[taps[0].address, taps[1].address]);
        bootstrap.configure("reporting_period", "200ms".into());
        let envoy = Envoy::start(version, &bootstrap, 2).await;
        let load = Load::start(STEADY, envoy.address, &app.counts);
        let more = async |taps: &[&Tap]| {
            for tap in taps {
                tap.reports(5, SETTLED).await;
            }
        };
        more(&[&taps[0], &taps[1]]).await;
        // The server is killed at an arbitrary moment.
        first.process.kill();
        more(&[&taps[1]]).await;
        let by_first = taps[0].requests();
        let again = StatServer::start(Some(first.address)).await;
        more(&[&taps[0], &taps[1]]).await;
        load.stop();
        let sent = load.finish().await;
        wait::until_equal("what both acknowledged", SETTLED, sent, async || {
            taps[0].requests() + taps[1].requests()
        })
        .await;
        let parts = (again.total().await, second.total().await);
        assert_eq!(parts, (taps[0].requests() - by_first, taps[1].requests()));
        println!("{version:?}: {sent} requests: {by_first} to the one that died, then {parts:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_report_that_is_refused_for_good_is_not_sent_again() {
    let app = App::start().await;
    let tap = Tap::start(None).await;
    let mut bootstrap = Bootstrap::sidecar(app.address, tap.address);
    bootstrap.configure("reporting_period", "200ms".into());
    let envoy = Envoy::start(Version::Newest, &bootstrap, 1).await;
    tap.set_mode(Mode::Answer(400));
    wait::until("a report is refused", SETTLED, || async {
        if tap.recorded().len() >= 3 { Ok(()) } else { Err(()) }
    })
    .await;
    let recorded = tap.recorded();
    for pair in recorded.windows(2) {
        assert_eq!(pair[1].report.messages[0].since, pair[0].report.messages[0].until);
    }
    assert!(
        envoy.process.log().contains("refused a report for good with 400: as asked"),
        "{}",
        envoy.process.log()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_proxy_in_between_refuses_is_sent_again() {
    let (app, server) = (App::start().await, StatServer::start(None).await);
    let tap = Tap::start(Some(server.address)).await;
    let mut bootstrap = Bootstrap::sidecar(app.address, tap.address);
    bootstrap.configure("reporting_period", "200ms".into());
    let envoy = Envoy::start(Version::Newest, &bootstrap, 1).await;
    let mut sent = 0;
    for status in [401, 403, 404, 408, 429] {
        tap.set_mode(Mode::Answer(status));
        http::get(envoy.address, "/work").await.expect("an answer");
        sent += 1;
        wait::until("the report with it is refused", SETTLED, || async {
            let has_it = |r: &Recorded| r.report.messages.iter().any(|m| m.until.requests == sent);
            let recorded = tap.recorded();
            let refused = recorded.iter().any(|r| r.answered == Some(status) && has_it(r));
            if refused { Ok(()) } else { Err(recorded.len()) }
        })
        .await;
    }
    tap.set_mode(Mode::Forward);
    wait::until_equal("the server's count", SETTLED, sent, || {
        server.number("default", "hello-00001", "requests_total")
    })
    .await;
}

/// A gateway in front of a sidecar, both under load, with one tap for the reports of both.
struct Pair {
    app: App,
    server: StatServer,
    tap: Tap,
    pod: Envoy,
    front: Envoy,
}

/// The names under which the two of a [`Pair`] report.
const SENDERS: [&str; 2] = ["hello-00001-pod-1", "gateway-1"];

impl Pair {
    async fn start(version: Version) -> Self {
        let (app, server) = (App::start().await, StatServer::start(None).await);
        let tap = Tap::start(Some(server.address)).await;
        let start = async |mut bootstrap: Bootstrap| {
            bootstrap.configure("reporting_period", "200ms".into());
            // No answer of the tap may come too late on a busy machine.
            bootstrap.configure("statserver", json!({"cluster": "inflight-statserver", "timeout": "20s"}));
            Envoy::start(version, &bootstrap, 2).await
        };
        let pod = start(Bootstrap::sidecar(app.address, tap.address)).await;
        let front = start(Bootstrap::gateway(pod.address, tap.address)).await;
        Self { app, server, tap, pod, front }
    }

    /// Starts a load through the gateway, and one on the sidecar alone.
    fn load(&self) -> [Load; 2] {
        let through = Plan { connections: 4, mixed: false, seed: 5, ..STEADY };
        let direct = Plan { connections: 4, ..STEADY };
        [(through, &self.front), (direct, &self.pod)]
            .map(|(plan, envoy)| Load::start(plan, envoy.address, &self.app.counts))
    }

    /// Returns the reports of a sender that got this answer. A gateway's report of a first request
    /// counts nothing, and is left out.
    fn answered(&self, sender: &str, status: u16) -> Vec<Report> {
        let recorded = self.tap.recorded().into_iter().filter(|r| r.answered == Some(status));
        let counts = |m: &KeyReport| m.until.as_of_ns > m.since.as_of_ns;
        recorded
            .map(|recorded| recorded.report)
            .filter(|report| report.pod == sender && report.messages.iter().any(counts))
            .collect()
    }

    /// Waits until both senders have had this answer that often.
    async fn both_answered(&self, status: u16, times: [usize; 2]) {
        wait::until(&format!("both are answered {status}"), SETTLED, || async {
            let answered = SENDERS.map(|sender| self.answered(sender, status).len());
            if answered[0] >= times[0] && answered[1] >= times[1] { Ok(()) } else { Err(answered) }
        })
        .await;
    }

    /// Passes reports on, and waits until one of each sender was acknowledged.
    async fn recovers(&self) {
        let times = SENDERS.map(|sender| self.answered(sender, 202).len() + 1);
        self.tap.set_mode(Mode::Forward);
        self.both_answered(202, times).await;
    }

    /// Ends both loads. Returns the requests sent by each.
    async fn finish(loads: [Load; 2]) -> [u64; 2] {
        let [through, direct] = loads;
        through.stop();
        direct.stop();
        [through.finish().await, direct.finish().await]
    }
}

/// Returns the requests, and how many of them are proxied, that reports add up to.
fn sum(reports: &[Report]) -> (u64, u64) {
    let messages = reports.iter().flat_map(|report| &report.messages);
    messages.fold((0, 0), |(requests, proxied), KeyReport { since, until, .. }| {
        let (all, of_gateway) =
            (until.requests - since.requests, until.proxied_requests - since.proxied_requests);
        (requests + all, proxied + of_gateway)
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_refused_for_five_seconds_is_counted_in_the_end() {
    join_all([Version::Oldest, Version::Newest].map(refused_for_five_seconds)).await;
}

async fn refused_for_five_seconds(version: Version) {
    let pair = Pair::start(version).await;
    let loads = pair.load();
    pair.recovers().await;
    for status in [401, 403, 404, 408, 429, 500] {
        pair.tap.set_mode(Mode::Answer(status));
        tokio::time::sleep(Duration::from_secs(5)).await;
        pair.both_answered(status, [3, 3]).await;
        pair.recovers().await;
    }
    let [through, direct] = Pair::finish(loads).await;
    wait::until_equal("the server's count", SETTLED, through + direct, || pair.server.total()).await;
    let refused = [401, 403, 404, 408, 429, 500].map(|status| {
        let [of_pod, of_gateway] = SENDERS.map(|sender| pair.answered(sender, status).len());
        of_pod + of_gateway
    });
    for envoy in [&pair.pod, &pair.front] {
        assert_eq!(envoy.stat("inflight_reports_dropped_total", &[]).await, 0.0);
        let log = envoy.process.log();
        assert!(!log.contains("for good"), "{log}");
    }
    println!(
        "{version:?}: {through} requests through the gateway and {direct} others, all counted; reports \
         refused with 401, 403, 404, 408, 429, 500: {refused:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_refused_for_good_is_logged_and_counted_and_nothing_else_is_lost() {
    join_all([Version::Oldest, Version::Newest].map(refused_for_good)).await;
}

async fn refused_for_good(version: Version) {
    let pair = Pair::start(version).await;
    let loads = pair.load();
    pair.recovers().await;
    for status in [400, 409] {
        pair.tap.set_mode(Mode::Answer(status));
        pair.both_answered(status, [5, 5]).await;
        pair.recovers().await;
    }
    let [through, direct] = Pair::finish(loads).await;
    let dropped = SENDERS.map(|sender| [400, 409].map(|status| pair.answered(sender, status)).concat());
    let [of_pod, of_gateway] = [sum(&dropped[0]), sum(&dropped[1])];
    let known = through - of_gateway.0 + direct - (of_pod.0 - of_pod.1);
    wait::until_equal("the server's count", SETTLED, known, || pair.server.total()).await;
    for (envoy, dropped) in [&pair.pod, &pair.front].into_iter().zip(&dropped) {
        let stat = || envoy.stat("inflight_reports_dropped_total", &[]);
        wait::until_equal("dropped reports", SETTLED, dropped.len() as f64, stat).await;
        let log = envoy.process.log();
        let lines: Vec<&str> =
            log.lines().filter(|line| line.contains("refused a report for good")).collect();
        // Each worker tells once. On a busy machine another one may become the leader.
        let mut told = HashSet::new();
        for line in &lines {
            let thread = line.split(['[', ']']).nth(3).expect("Envoy's thread");
            let status = [400, 409].into_iter().find(|status| {
                line.contains(&format!("with {status}: as asked; its counts stay in Envoy's stats only"))
            });
            let status = status.unwrap_or_else(|| panic!("{line}"));
            assert!(told.insert((thread, status)), "one line at the first of several: {log}");
        }
        for status in [400, 409] {
            assert!(told.iter().any(|(_, told)| *told == status), "{status}: {log}");
        }
    }
    // What was dropped is in Envoy's own counters.
    let counted = || pair.front.stat("activator_request_count", &[]);
    wait::until_equal("the gateway's own count", SETTLED, through as f64, counted).await;
    let counted = || pair.pod.stat("queue_requests_total", &[]);
    wait::until_equal("the sidecar's own count", SETTLED, (through + direct) as f64, counted).await;
    println!(
        "{version:?}: of {through} requests through the gateway and {direct} others {} and {} were in the {} and {} \
         reports that were dropped",
        of_gateway.0,
        of_pod.0 - of_pod.1,
        dropped[1].len(),
        dropped[0].len()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_websocket_counts_one_for_as_long_as_it_is_open() {
    join_all(MATRIX.map(|(version, concurrency)| open_websocket(version, concurrency))).await;
}

async fn open_websocket(version: Version, concurrency: u32) {
    let (app, server) = (App::start().await, StatServer::start(None).await);
    let envoy = Envoy::start(version, &Bootstrap::sidecar(app.address, server.address), concurrency).await;
    let socket = http::websocket(envoy.address).await;
    let figures = async || {
        let key = server.key("default", "hello-00001").await;
        key.map(|key| (key["in_flight"].as_u64(), key["requests_total"].as_u64()))
    };
    wait::until_equal("in flight", SETTLED, Some((Some(1), Some(1))), figures).await;
    // Its panic average is one as soon as whole seconds of it have been reported.
    wait::until("the average is one", SETTLED, || async {
        let key = server.key("default", "hello-00001").await.expect("the key");
        let average = key["panic"]["concurrency"].as_f64().expect("a number");
        if (0.99..=1.01).contains(&average) { Ok(()) } else { Err(average) }
    })
    .await;
    assert_eq!(figures().await, Some((Some(1), Some(1))));
    assert_eq!(envoy.stat("queue_in_flight_requests", &[]).await, 1.0);
    drop(socket);
    wait::until_equal("in flight", SETTLED, Some((Some(0), Some(1))), figures).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_counted_up_to_a_sigterm_is_reported() {
    for version in [Version::Oldest, Version::Newest] {
        let (app, server) = (App::start().await, StatServer::start(None).await);
        let mut bootstrap = Bootstrap::sidecar(app.address, server.address);
        bootstrap.configure("reporting_period", "2s".into());
        let mut envoy = Envoy::start(version, &bootstrap, 2).await;
        let plan = Plan { requests: 200, ..STEADY };
        let sent = Load::start(plan, envoy.address, &app.counts).finish().await;
        wait::until_equal("the server's count", SETTLED, sent, || server.total()).await;
        // From the second report on, Envoy's main thread leads, with an open connection to the
        // server.
        envoy.reports(2).await;
        let more = Load::start(plan, envoy.address, &app.counts).finish().await;
        envoy.process.signal(libc::SIGTERM);
        let status = envoy.process.wait(Duration::from_secs(30));
        assert!(process::is_clean(status), "{status:?}");
        wait::until_equal("the server's count", SETTLED, sent + more, || server.total()).await;
        assert_eq!(server.number("default", "hello-00001", "in_flight").await, 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_stats_server_drains_on_sigterm_and_exits_0() {
    let mut server = StatServer::start(None).await;
    assert_eq!(http::get(server.address, "/readyz").await.as_deref(), Ok("ok\n"));
    server.process.signal(libc::SIGTERM);
    let answer = wait::until("it says that it drains", SETTLED, || async {
        match http::get(server.address, "/readyz").await {
            Err(answer) => Ok(answer),
            Ok(answer) => Err(answer),
        }
    })
    .await;
    assert!(answer.contains("503") && answer.contains("draining"), "{answer}");
    let status = server.process.wait(Duration::from_secs(15));
    assert!(process::is_clean(status), "{status:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hanging_stats_server_holds_up_no_end() {
    for version in [Version::Oldest, Version::Newest] {
        let (app, tap) = (App::start().await, Tap::start(None).await);
        let mut bootstrap = Bootstrap::sidecar(app.address, tap.address);
        bootstrap.configure("statserver", json!({"cluster": "inflight-statserver", "timeout": "60s"}));
        let mut envoy = Envoy::start(version, &bootstrap, 2).await;
        tap.set_mode(Mode::Hang);
        Load::start(Plan { requests: 100, ..STEADY }, envoy.address, &app.counts).finish().await;
        wait::until("a report hangs", SETTLED, || async {
            if tap.recorded().iter().any(|r| r.answered.is_none()) { Ok(()) } else { Err(()) }
        })
        .await;
        envoy.process.signal(libc::SIGTERM);
        // Far less than the call's timeout.
        let status = envoy.process.wait(Duration::from_secs(20));
        assert!(process::is_clean(status), "{status:?}");
    }
}
