//! The stats server under load, on one core; the load runs on the other. Prints the CPU seconds per
//! million stats, the resident memory, and the duration of a `GET` of one key under this load.

use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::Parser;
use http_body_util::Full;
use hyper::Request;
use inflight_benches::{cpu_seconds, machine, pin, quantile, spread};
use inflight_e2e::http;
use inflight_e2e::http::Connection;
use inflight_e2e::statserver::StatServer;
use inflight_stats::protocol::stat::{Stat, WireStatMessage, WireStatMessages};
use inflight_stats::{KeyReport, Report, Snapshot};
use prost::Message;
use tokio::io::AsyncWriteExt;
use tokio::task::JoinSet;

/// Drives the stats server as a large cluster does.
#[derive(Parser)]
struct Options {
    /// Pods, each of which reports once a second.
    #[arg(long, default_value_t = 100_000)]
    pods: usize,
    /// Seconds that are measured, after as many to warm up as the windows need to be in use.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Rounds of each measurement of which the median counts.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
}

const CONNECTIONS: usize = 10;
const WARM_UP: Duration = Duration::from_secs(4);

fn key(number: usize) -> String {
    format!("service-{number:06}-00001")
}

fn stat(pod: usize, keys: usize) -> WireStatMessage {
    let text = |text: String| text.into_bytes().into();
    WireStatMessage {
        namespace: text(format!("team-{:02}", pod % keys % 50)),
        name: text(key(pod % keys)),
        stat: Some(Stat {
            pod_name: text(format!("{}-deployment-6d4cf56db6-{pod:06}", key(pod % keys))),
            average_concurrent_requests: 3.25,
            average_proxied_concurrent_requests: 1.25,
            request_count: 40.0,
            proxied_request_count: 15.0,
            process_uptime: 1000.0,
            timestamp: 1_700_000_000,
        }),
    }
}

/// Returns a masked binary frame, as a client must send it.
fn frame(messages: Vec<WireStatMessage>) -> Vec<u8> {
    let payload = WireStatMessages { messages }.encode_to_vec();
    let mut frame = vec![0x82, 0x80 | 127];
    frame.extend((payload.len() as u64).to_be_bytes());
    let mask = [0x37, 0xfa, 0x21, 0x3d];
    frame.extend(mask);
    frame.extend(payload.iter().zip(mask.into_iter().cycle()).map(|(byte, mask)| byte ^ mask));
    frame
}

async fn taken(server: &StatServer) -> u64 {
    let text = http::get(server.address, "/metrics").await.expect("metrics");
    let line = text.lines().find_map(|line| line.strip_prefix("inflight_statserver_stream_stats_total "));
    line.and_then(|value| value.parse().ok()).unwrap_or(0)
}

/// The results of a run.
struct Measured {
    /// CPU seconds per million stats.
    per_million: f64,
    /// CPU seconds per second.
    cores: f64,
    resident_mib: u64,
    /// Quantiles of the duration of a GET of one key, in milliseconds.
    p50: f64,
    p99: f64,
}

/// All pods report once a second over ten websockets, with `to_a_frame` stats in each frame.
async fn by_websocket(options: &Options, keys: usize, to_a_frame: usize) -> Measured {
    let server = StatServer::start(None).await;
    pin(server.process.id(), "0");
    let mut senders = JoinSet::new();
    for connection in 0..CONNECTIONS {
        let pods: Vec<usize> = (connection..options.pods).step_by(CONNECTIONS).collect();
        let frames: Vec<Vec<u8>> = pods
            .chunks(to_a_frame)
            .map(|pods| frame(pods.iter().map(|pod| stat(*pod, keys)).collect()))
            .collect();
        let mut stream = http::websocket(server.address).await;
        senders.spawn(async move {
            // Sends a hundredth of the frames every hundredth of a second.
            let mut ticks = tokio::time::interval(Duration::from_millis(10));
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Burst);
            for part in (0..100).cycle() {
                ticks.tick().await;
                let [from, to] = [part, part + 1].map(|part| part * frames.len() / 100);
                if stream.write_all(&frames[from..to].concat()).await.is_err() {
                    return;
                }
            }
        });
    }
    let measured = measure(options, &server, keys).await;
    senders.shutdown().await;
    measured
}

/// Lets the load run for a while, and requests keys all the time.
async fn measure(options: &Options, server: &StatServer, keys: usize) -> Measured {
    tokio::time::sleep(WARM_UP).await;
    let (stats, cpu, began) = (taken(server).await, cpu_seconds(server.process.id()), Instant::now());
    let mut connection = Connection::open(server.address).await.expect("a connection");
    let mut waits = Vec::new();
    while began.elapsed() < Duration::from_secs(options.seconds) {
        let number = waits.len() * 7919 % keys;
        let path = format!("/v1/keys/team-{:02}/{}", number % 50, key(number));
        let request =
            Request::get(path).header("host", "x").body(Full::<Bytes>::default()).expect("a request");
        let asked = Instant::now();
        assert_eq!(connection.ask(request).await.expect("an answer"), 200);
        waits.push(asked.elapsed().as_secs_f64() * 1e3);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let cpu = cpu_seconds(server.process.id()) - cpu;
    let elapsed = began.elapsed().as_secs_f64();
    let stats = taken(server).await - stats;
    assert!(
        stats as f64 >= 0.9 * options.pods as f64 * elapsed,
        "the load was not reached: {stats} in {elapsed} s"
    );
    Measured {
        per_million: cpu / stats as f64 * 1e6,
        cores: cpu / elapsed,
        resident_mib: server.process.resident_bytes() >> 20,
        p50: quantile(&waits, 0.5),
        p99: quantile(&waits, 0.99),
    }
}

/// Sends reports of one pod each over kept-alive connections, as fast as one core handles them.
/// Returns (reports per second, CPU seconds per million).
async fn by_http(options: &Options, keys: usize) -> (f64, f64) {
    let server = StatServer::start(None).await;
    pin(server.process.id(), "0");
    let mut senders = JoinSet::new();
    let end = Instant::now() + Duration::from_secs(options.seconds);
    for connection in 0..32_u64 {
        let address = server.address;
        senders.spawn(async move {
            let mut http = Connection::open(address).await.expect("a connection");
            let mut sent = 0_u64;
            let mut since = Snapshot::starting_at(1);
            while Instant::now() < end {
                let number = sent as usize * 32 % keys;
                let until = Snapshot {
                    as_of_ns: since.as_of_ns + 1_000_000_000,
                    requests: since.requests + 40,
                    request_ns: since.request_ns + 3_000_000_000,
                    ..since
                };
                let message = KeyReport {
                    namespace: format!("team-{:02}", number % 50),
                    name: key(number),
                    from_gateway: false,
                    since,
                    until,
                };
                let pod = format!("pod-{connection}-{number}");
                let report = Report { version: 1, pod, incarnation: sent, messages: vec![message] };
                let body = Full::from(report.encode().expect("a report"));
                let request = Request::post("/v1/reports").header("host", "x").body(body).expect("a request");
                assert_eq!(http.ask(request).await.expect("an answer"), 202);
                sent += 1;
                since = until;
            }
            sent
        });
    }
    let began = Instant::now();
    let mut sent = 0;
    while let Some(count) = senders.join_next().await {
        sent += count.expect("a sender");
    }
    let cpu = cpu_seconds(server.process.id());
    (sent as f64 / began.elapsed().as_secs_f64(), cpu / sent as f64 * 1e6)
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let options = Options::parse();
    pin(std::process::id(), "1");
    println!("{}", machine());
    println!("{} pods, each once a second; the server on one core, the load on another", options.pods);
    println!();
    println!("stats to a frame    keys  CPU s per million  cores  resident MiB  GET p50 ms  GET p99 ms");
    for (to_a_frame, keys) in [(100, 1_000), (1, 1_000)] {
        let m = by_websocket(&options, keys, to_a_frame).await;
        println!(
            "{to_a_frame:>16}  {keys:>6}  {:>17.3}  {:>5.2}  {:>12}  {:>10.2}  {:>10.2}",
            m.per_million, m.cores, m.resident_mib, m.p50, m.p99
        );
    }
    println!();
    println!("cost by the number of keys, 100 stats to a frame, {} rounds in turn:", options.rounds);
    let counts = [10, 1_000, 100_000];
    let mut costs = [const { Vec::new() }; 3];
    let mut resident = [0; 3];
    for _ in 0..options.rounds {
        for (keys, (costs, resident)) in counts.into_iter().zip(costs.iter_mut().zip(&mut resident)) {
            let measured = by_websocket(&options, keys, 100).await;
            costs.push(measured.per_million);
            *resident = measured.resident_mib.max(*resident);
        }
    }
    for (i, keys) in counts.into_iter().enumerate() {
        let (median, lowest, highest) = spread(&costs[i]);
        let ratios: Vec<f64> = costs[i].iter().zip(&costs[0]).map(|(cost, first)| cost / first).collect();
        let ratio = spread(&ratios);
        println!(
            "{keys:>7} keys  {median:.3} CPU s per million ({lowest:.3} to {highest:.3}), {:.2} of 10 keys \
             ({:.2} to {:.2}), {} MiB",
            ratio.0, ratio.1, ratio.2, resident[i]
        );
    }
    println!();
    let (rate, per_million) = by_http(&options, 1_000).await;
    println!(
        "HTTP, a report of one key each, 32 connections: {rate:.0} a second, {per_million:.2} CPU s per million"
    );
}
