//! What a shared state costs: receiving reports, applying them at every server, and the store, apart;
//! and a large state: its memory, and its snapshot.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use clap::Parser;
use http_body_util::Full;
use hyper::Request;
use inflight_benches::{cpu_seconds, machine, spread, table};
use inflight_e2e::http::Connection;
use inflight_e2e::redis::Redis;
use inflight_e2e::statserver::StatServer;
use inflight_e2e::{http, statserver_program, wait};
use inflight_stats::{KeyReport, Report, Snapshot};
use tokio::task::JoinSet;

/// Drives one, two and three servers with one state.
#[derive(Parser)]
struct Options {
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Rounds of each measurement, in turn, of which the median counts.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Connections, each of which sends a report when the one before is answered.
    #[arg(long, default_value_t = 600)]
    connections: usize,
    /// Pods of the large state, ten keys each with a tenth of the pods; 0: none.
    #[arg(long, default_value_t = 1_000_000)]
    pods: usize,
    /// Another build of the server, to compare with the one without a store.
    #[arg(long)]
    baseline: Option<PathBuf>,
}

const SETTLED: Duration = Duration::from_secs(120);

/// CPU of a process while reports were sent, per report in microseconds.
struct Cost {
    per_second: f64,
    /// Of each server: those that got reports, then the others.
    servers: Vec<f64>,
    store: f64,
}

fn report(pod: &str, keys: impl Iterator<Item = usize>, second: u64) -> Vec<u8> {
    let at = |second: u64| Snapshot {
        as_of_ns: second * 1_000_000_000,
        requests: second * 40,
        request_ns: u128::from(second) * 3_000_000_000,
        in_flight: 3,
        ..Snapshot::default()
    };
    let message = |key: usize| KeyReport {
        namespace: format!("team-{:02}", key % 50),
        name: format!("service-{key:06}-00001"),
        from_gateway: false,
        since: at(second),
        until: at(second + 1),
    };
    let report =
        Report { version: 1, pod: pod.into(), incarnation: 1, messages: keys.map(message).collect() };
    report.encode().expect("a report")
}

/// Sends reports of one pod and one key each to `to` in turn.
async fn send(options: &Options, to: &[SocketAddr]) -> u64 {
    let mut senders = JoinSet::new();
    let end = Instant::now() + Duration::from_secs(options.seconds);
    for connection in 0..options.connections {
        let address = to[connection % to.len()];
        senders.spawn(async move {
            let mut http = Connection::open(address).await.expect("a connection");
            let pod = format!("service-6d4cf56db6-{connection:06}");
            let mut sent = 0;
            while Instant::now() < end {
                let body = report(&pod, std::iter::once(connection % 1_000), sent + 1);
                let request = Request::post("/v1/reports").header("host", "x");
                let answer = http.ask(request.body(Full::from(body)).expect("a request")).await;
                assert_eq!(answer.expect("an answer"), 202);
                sent += 1;
            }
            sent
        });
    }
    let mut sent = 0;
    while let Some(count) = senders.join_next().await {
        sent += count.expect("a sender");
    }
    sent
}

async fn ready(servers: &[StatServer]) {
    for server in servers {
        wait::until("the server has caught up", SETTLED, || http::get(server.address, "/readyz")).await;
    }
}

/// Measures `receiving` servers that get reports, and as many more that only apply them.
async fn measure(options: &Options, receiving: usize, applying: usize) -> Cost {
    let redis = Redis::start(&[]).await;
    let store = redis.url();
    let mut servers = Vec::new();
    for _ in 0..receiving + applying {
        servers.push(StatServer::with(None, &["--store", &store]).await);
    }
    ready(&servers).await;
    let to: Vec<SocketAddr> = servers[..receiving].iter().map(|server| server.address).collect();
    let ids: Vec<u32> =
        servers.iter().map(|server| server.process.id()).chain([redis.process.id()]).collect();
    let before: Vec<f64> = ids.iter().map(|id| cpu_seconds(*id)).collect();
    let sent = send(options, &to).await as f64;
    let mut costs: Vec<f64> =
        ids.iter().zip(before).map(|(id, before)| (cpu_seconds(*id) - before) / sent * 1e6).collect();
    let store = costs.pop().unwrap_or(0.0);
    Cost { per_second: sent / options.seconds as f64, servers: costs, store }
}

/// Measures a server without a store.
async fn alone(options: &Options, program: PathBuf) -> Cost {
    let server = StatServer::run(Command::new(program), None, &[]).await;
    let before = cpu_seconds(server.process.id());
    let sent = send(options, &[server.address]).await as f64;
    let cost = (cpu_seconds(server.process.id()) - before) / sent * 1e6;
    Cost { per_second: sent / options.seconds as f64, servers: vec![cost], store: 0.0 }
}

fn shown(values: impl Iterator<Item = f64>) -> String {
    let values: Vec<f64> = values.collect();
    let (median, lowest, highest) = spread(&values);
    format!("{median:.1} ({lowest:.1} to {highest:.1})")
}

async fn costs(options: &Options) {
    let mut rows = vec![
        [
            "servers",
            "reports/s",
            "µs of CPU a report, at one that gets all or a part",
            "at one that only applies",
            "at the store",
        ]
        .map(str::to_owned)
        .to_vec(),
    ];
    let mut ratios = Vec::new();
    let (mut none, mut one, mut more) = (Vec::new(), Vec::new(), [const { Vec::new() }; 2]);
    for _ in 0..options.rounds {
        let without = alone(options, statserver_program()).await;
        if let Some(baseline) = &options.baseline {
            let baseline = alone(options, baseline.clone()).await;
            ratios.push(without.servers[0] / baseline.servers[0]);
        }
        none.push(without);
        one.push(measure(options, 1, 1).await);
        for (receiving, costs) in [2, 3].into_iter().zip(&mut more) {
            costs.push(measure(options, receiving, 0).await);
        }
    }
    let mut row = |name: &str, costs: &[Cost], receiving: usize| {
        let applying = costs.iter().filter_map(|cost| cost.servers.get(receiving).copied());
        rows.push(vec![
            name.into(),
            shown(costs.iter().map(|cost| cost.per_second)),
            shown(costs.iter().map(|cost| cost.servers[..receiving].iter().sum::<f64>() / receiving as f64)),
            if applying.clone().next().is_some() { shown(applying) } else { String::new() },
            shown(costs.iter().map(|cost| cost.store)),
        ]);
    };
    row("one, without a store", &none, 1);
    row("two, one of which gets all", &one, 1);
    row("two, each gets half", &more[0], 2);
    row("three, each gets a third", &more[1], 3);
    println!("{}", table(&rows));
    if !ratios.is_empty() {
        let (median, first, third) = spread(&ratios);
        println!("without a store, of the baseline: {median:.2} ({first:.2} to {third:.2})\n");
    }
}

async fn large(options: &Options) {
    let redis = Redis::start(&[]).await;
    let store = redis.url();
    let flags = ["--store", &store, "--max-table-bytes", "2147483648", "--max-pods-per-key", "1000000"];
    let server = StatServer::with(None, &flags).await;
    ready(std::slice::from_ref(&server)).await;
    let keys = (options.pods / 100).max(10);
    let mut senders = JoinSet::new();
    let (pods, tasks) = (options.pods / 10, 64);
    for task in 0..tasks {
        let address = server.address;
        senders.spawn(async move {
            let mut http = Connection::open(address).await.expect("a connection");
            for pod in (task..pods).step_by(tasks) {
                let body = report(&format!("pod-{pod:06}"), (0..10).map(|key| (pod * 10 + key) % keys), 1);
                let request = Request::post("/v1/reports").header("host", "x");
                let answer = http.ask(request.body(Full::from(body)).expect("a request")).await;
                assert_eq!(answer.expect("an answer"), 202);
            }
        });
    }
    while let Some(done) = senders.join_next().await {
        done.expect("a sender");
    }
    let log = |server: &StatServer, what: &str| {
        let log = server.process.log();
        let line = log.lines().rev().find(|line| line.contains(what)).map(str::to_owned);
        async move { line.and_then(|line| line.split_once(": ").map(|(_, rest)| rest.to_owned())).ok_or(()) }
    };
    // The one that has all.
    tokio::time::sleep(Duration::from_secs(35)).await;
    let wrote = wait::until("a snapshot", SETTLED, || log(&server, "wrote a snapshot")).await;
    let resident = server.process.resident_bytes() >> 20;
    println!("{} pods of {keys} keys: {resident} MiB; {wrote}", options.pods);
    let joined = StatServer::with(None, &flags).await;
    ready(std::slice::from_ref(&joined)).await;
    let loaded = wait::until("it is loaded", SETTLED, || log(&joined, "loaded the snapshot")).await;
    let (keys, resident) = (
        http::get(joined.address, "/metrics").await.expect("metrics"),
        joined.process.resident_bytes() >> 20,
    );
    let keys = keys.lines().find(|line| line.starts_with("inflight_statserver_keys ")).map(str::to_owned);
    println!("one that joins: {resident} MiB, {}; {loaded}", keys.unwrap_or_default());
}

#[tokio::main(worker_threads = 2)]
async fn main() {
    let options = Options::parse();
    println!("{}; servers, store and load share the cores; {} connections\n", machine(), options.connections);
    if options.rounds > 0 {
        costs(&options).await;
    }
    if options.pods > 0 {
        large(&options).await;
    }
}
