//! What the hold adds to a request of a key without pods, from the moment on at which the pod could
//! have answered. A second listener of the same Envoy, without the filter, is asked each
//! millisecond: its first 200 says when that is.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::Parser;
use http_body_util::Full;
use hyper::{Request, StatusCode};
use inflight_benches::{machine, quantile, table};
use inflight_e2e::app::App;
use inflight_e2e::bootstrap::{Bootstrap, CLUSTER, EndpointFile, NOBODY, at};
use inflight_e2e::envoy::{Envoy, Version};
use inflight_e2e::{http, wait};
use serde_json::json;
use tokio::task::JoinSet;

/// Measures what the hold adds once there is a pod.
#[derive(Parser)]
struct Options {
    /// How often a workload comes from zero, for each Envoy and number of workers.
    #[arg(long, default_value_t = 50)]
    cycles: u32,
}

const PROBE_PERIOD: Duration = Duration::from_millis(10);
const TRUST: Duration = Duration::from_millis(200);
const CLIENTS: usize = 5;
const LONGEST: Duration = Duration::from_secs(30);

fn request() -> Request<Full<Bytes>> {
    Request::get("/work").header("host", "hello").body(Full::default()).expect("a request")
}

/// Returns a gateway that holds, with a second listener that lacks the filter. No stats server is
/// there.
fn bootstrap(endpoints: &EndpointFile) -> Bootstrap {
    let hold = json!({"probe_period": format!("{}ms", PROBE_PERIOD.as_millis()),
        "trust": format!("{}ms", TRUST.as_millis())});
    let mut bootstrap = Bootstrap::holding(endpoints, NOBODY, hold);
    let mut without = bootstrap.clone();
    without.without_filter();
    let mut listener = at(&mut without.0, "/static_resources/listeners/0").take();
    listener["name"] = json!("without");
    let listeners = at(&mut bootstrap.0, "/static_resources/listeners");
    listeners.as_array_mut().expect("listeners").push(listener);
    bootstrap
}

/// Sends a request. Returns when it was answered.
///
/// # Panics
/// If the answer is not 200, or does not come.
async fn answered(to: SocketAddr) -> Instant {
    let answer = tokio::time::timeout(LONGEST, http::ask(to, request())).await;
    let (code, _) = answer.expect("an answer in time").expect("an answer");
    assert_eq!(code, StatusCode::OK, "what a held request is answered with");
    Instant::now()
}

/// Asks until there is a pod. Returns when the first answer came that is not Envoy's own.
async fn first_without(to: SocketAddr) -> Instant {
    let mut connection = http::Connection::open(to).await.expect("a connection");
    let end = Instant::now() + LONGEST;
    loop {
        let code = connection.ask(request()).await.expect("an answer");
        let now = Instant::now();
        if code == StatusCode::OK {
            return now;
        }
        assert!(now < end, "no pod after {LONGEST:?}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Returns what the hold added to the requests of each cycle, in milliseconds.
async fn measure(version: Version, workers: u32, cycles: u32) -> Vec<f64> {
    let endpoints = EndpointFile::new();
    let envoy = Envoy::quiet(version, &bootstrap(&endpoints), workers).await;
    let (holding, without) = (envoy.address, envoy.exporter);
    let mut added = Vec::new();
    for cycle in 0..cycles {
        let mut clients = JoinSet::new();
        for _ in 0..CLIENTS {
            clients.spawn(answered(holding));
        }
        let first = tokio::spawn(first_without(without));
        // Pods start in 50 to 500 ms, and at no fixed phase of the probes' period.
        tokio::time::sleep(Duration::from_micros(50_000 + u64::from(cycle) * 77_773 % 450_000)).await;
        let app = App::start().await;
        endpoints.set(CLUSTER, &[app.address]);
        let first = first.await.expect("an answer");
        for at in clients.join_all().await {
            added.push(at.saturating_duration_since(first).as_secs_f64() * 1e3);
        }
        endpoints.set(CLUSTER, &[]);
        drop(app);
        tokio::time::sleep(TRUST + PROBE_PERIOD).await;
        wait::until("the pod is gone", LONGEST, || async {
            match http::ask(without, request()).await {
                Ok((StatusCode::SERVICE_UNAVAILABLE, _)) => Ok(()),
                other => Err(other),
            }
        })
        .await;
    }
    added
}

#[tokio::main]
async fn main() {
    let options = Options::parse();
    let head = ["", "requests", "p50 ms", "p99 ms", "longest ms"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for version in [Version::Oldest, Version::Newest] {
        for workers in [1, 2, 4] {
            let added = measure(version, workers, options.cycles).await;
            let figure = |share| format!("{:.1}", quantile(&added, share));
            let name = format!("{version:?} Envoy, workers: {workers}");
            rows.push(vec![name, added.len().to_string(), figure(0.5), figure(0.99), figure(1.0)]);
        }
    }
    println!(
        "{}; from no pods {} times, {CLIENTS} requests each, all answered with 200. What the hold with a probe_period \
         of {} ms adds after there is a pod:\n\n{}",
        machine(),
        options.cycles,
        PROBE_PERIOD.as_millis(),
        table(&rows)
    );
}
