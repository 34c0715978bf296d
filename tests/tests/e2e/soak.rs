//! Half an hour of everything at once: nothing is counted wrongly, and no memory grows.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use inflight_e2e::app::App;
use inflight_e2e::bootstrap::Bootstrap;
use inflight_e2e::envoy::{Envoy, Version};
use inflight_e2e::load::{Load, Plan};
use inflight_e2e::statserver::StatServer;
use inflight_e2e::streams::Streams;
use inflight_e2e::{http, prometheus, wait};

const SETTLED: Duration = Duration::from_secs(60);
const LIMIT: i64 = 40;
/// Until then buffers and caches reach their size.
const WARM_UP: Duration = Duration::from_secs(300);
/// Growth below this, in half an hour, is noise of the allocators.
const FLAT_BYTES: f64 = 16.0 * 1_048_576.0;

/// Times, and the memory of a process or of the VMs then.
#[derive(Default)]
struct Series(Vec<(f64, f64)>);

impl Series {
    /// Returns the slope in bytes per minute, by least squares.
    fn slope(&self) -> f64 {
        let count = self.0.len() as f64;
        let mean = |of: fn(&(f64, f64)) -> f64| self.0.iter().map(of).sum::<f64>() / count;
        let (time, bytes) = (mean(|p| p.0), mean(|p| p.1));
        let above: f64 = self.0.iter().map(|(t, b)| (t - time) * (b - bytes)).sum();
        let below: f64 = self.0.iter().map(|(t, _)| (t - time).powi(2)).sum();
        above / below
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "half an hour: make soak"]
async fn half_an_hour_of_everything_miscounts_nothing_and_nothing_grows() {
    let minutes =
        std::env::var("SOAK_MINUTES").map_or(30.0, |text| text.parse().expect("a number of minutes"));
    let (app, server) = (App::start().await, StatServer::start(None).await);
    let mut bootstrap = Bootstrap::sidecar(app.address, server.address);
    bootstrap.grpc(app.grpc);
    bootstrap.configure("container_concurrency", LIMIT.into());
    bootstrap.configure("queue_depth", 10_000.into());
    let envoy = Envoy::start(Version::Newest, &bootstrap, 4).await;
    let plan =
        Plan { requests: u64::MAX, connections: 40, average_ms: 20.0, mixed: true, seed: 13, path: "/work" };
    let load = Load::start(plan, envoy.address, &app.counts);
    let streams = Streams::start(envoy.address, 6, 17);

    let (began, mut printed) = (Instant::now(), Instant::now());
    let mut series = [Series::default(), Series::default(), Series::default()];
    let warm_up = WARM_UP.as_secs_f64().min(minutes * 30.0);
    while began.elapsed().as_secs_f64() < minutes * 60.0 {
        tokio::time::sleep(Duration::from_secs(5)).await;
        let at = began.elapsed().as_secs_f64();
        // What also happens in a cluster: scrapes, and somebody who looks at the page.
        let stats = envoy.stats().await;
        http::get(server.address, "/metrics").await.expect("metrics");
        let wasm = prometheus::sum(&stats, "inflight_wasm_memory_bytes", &[]);
        let now = [envoy.process.resident_bytes() as f64, wasm, server.process.resident_bytes() as f64];
        if at >= warm_up {
            series.iter_mut().zip(now).for_each(|(series, bytes)| series.0.push((at / 60.0, bytes)));
        }
        if printed.elapsed() >= Duration::from_secs(60) {
            printed = Instant::now();
            let [envoy, wasm, server] = now.map(|bytes| bytes / 1_048_576.0);
            println!(
                "{at:.0} s: {} requests; Envoy {envoy:.1}, its VMs {wasm:.1}, the server {server:.1} MiB",
                load.sent()
            );
        }
    }
    load.stop();
    let tally = streams.finish().await;
    let (sent, mut failures) = load.finish_with_failures().await;
    failures.extend(tally.failures());
    if !failures.is_empty() {
        // Envoy's own stats say why it closed connections.
        let ended = http::get(envoy.admin, "/stats?filter=protocol_error|flood|cx_destroy&usedonly").await;
        let first = &failures[..failures.len().min(20)];
        panic!("{} requests failed, at first {first:#?}; connections: {ended:?}", failures.len());
    }
    let count = |of: &std::sync::atomic::AtomicU64| of.load(Ordering::SeqCst);

    wait::until_equal("in flight, waiting, in the app", SETTLED, (0.0, 0.0, 0), async || {
        let (open, depth) = ("queue_in_flight_requests", "revision_queue_depth");
        (envoy.stat(open, &[]).await, envoy.stat(depth, &[]).await, app.counts.now())
    })
    .await;
    let counted = envoy.stat("queue_requests_total", &[]).await as u64;
    wait::until_equal("the access log", SETTLED, counted, async || envoy.requests_by_path().values().sum())
        .await;
    wait::until_equal("the server's count, and in flight", SETTLED, (counted, 0), async || {
        let number = async |field| server.number("default", "hello-00001", field).await;
        (number("requests_total").await, number("in_flight").await)
    })
    .await;
    let paths = envoy.requests_by_path();
    let of = |path: &str| paths.get(path).copied().unwrap_or(0);
    assert_eq!(of("/ws"), count(&tally.websockets));
    let (http2, grpc) = (of("/h2"), of("/echo.Echo/Stream"));
    let whole = count(&tally.http2) + count(&tally.grpc);
    assert!((whole..=whole + count(&tally.aborted)).contains(&(http2 + grpc)), "{http2} {grpc} {tally:?}");
    assert_eq!(counted - of("/ws") - http2 - grpc, sent);
    assert!(app.counts.most_answered() <= LIMIT, "{} in the app", app.counts.most_answered());

    println!(
        "{minutes} minutes: {counted} requests, all of them counted: {sent} over HTTP/1.1, {http2} over HTTP/2, {grpc} gRPC \
         streams, {} websockets; {} broken off; most in the app {}",
        of("/ws"),
        count(&tally.aborted),
        app.counts.most_answered()
    );
    for (name, series) in ["Envoy", "its VMs", "the server"].iter().zip(&series) {
        let slope = series.slope();
        println!("{name}: {:+.1} KiB a minute after the first {:.0} s", slope / 1024.0, warm_up);
        assert!(
            slope * minutes.max(30.0) < FLAT_BYTES || minutes < 30.0,
            "{name} grows: {slope} bytes a minute"
        );
    }
}
