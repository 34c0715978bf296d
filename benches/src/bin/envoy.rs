//! The filter's cost per request. One Envoy after the other runs on one core, everything else on
//! another. The Envoys take turns, so that changes in the machine's speed affect all of them.

use std::fmt::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use clap::Parser;
use inflight_benches::{cpu_seconds, machine, pin, quantile, spread, table};
use inflight_e2e::bootstrap::{Bootstrap, at};
use inflight_e2e::envoy::{Envoy, Version};
use inflight_e2e::statserver::StatServer;
use inflight_e2e::{built, debian, root};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Measures Envoy without and with the filter.
#[derive(Parser)]
struct Options {
    /// Rounds, of which the median counts.
    #[arg(long, default_value_t = 25)]
    rounds: usize,
    /// Seconds of each measurement: short, so that what is compared is close in time.
    #[arg(long, default_value_t = 1)]
    seconds: u64,
    /// Seconds of load before the first measurement, until V8 has compiled what is hot for good.
    #[arg(long, default_value_t = 3)]
    warm_up: u64,
    /// Measures the ticks alone.
    #[arg(long)]
    ticks: bool,
    /// Writes the tables into docs/benchmarks.md, and the picture beside it.
    #[arg(long)]
    write: bool,
}

const KEYS: usize = 1_000;
const CONNECTIONS: u32 = 32;

/// Starts an app that answers each request with two bytes, and a request for `/hold` never.
async fn app() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(answer(stream));
        }
    });
    address
}

async fn answer(mut stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let mut buffer = Vec::with_capacity(16 << 10);
    loop {
        while let Some(end) = buffer.windows(4).position(|four| four == b"\r\n\r\n") {
            if !buffer.starts_with(b"GET /hold")
                && stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.is_err()
            {
                return;
            }
            buffer.drain(..end + 4);
        }
        match stream.read_buf(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
    }
}

const MANAGER: &str = "/static_resources/listeners/0/filter_chains/0/filters/0/typed_config";

/// Returns the shipped sidecar configuration, without the exporter.
fn sidecar(app: SocketAddr, server: SocketAddr) -> Bootstrap {
    let mut bootstrap = Bootstrap::sidecar(app, server);
    at(&mut bootstrap.0, "/static_resources/listeners").as_array_mut().expect("listeners").truncate(1);
    bootstrap
}

fn bare(app: SocketAddr, server: SocketAddr) -> Bootstrap {
    let mut bootstrap = sidecar(app, server);
    at(&mut bootstrap.0, &format!("{MANAGER}/http_filters")).as_array_mut().expect("filters").remove(0);
    bootstrap
}

fn empty(app: SocketAddr, server: SocketAddr) -> Bootstrap {
    let mut bootstrap = sidecar(app, server);
    bootstrap.module(&built("wasm32-wasip1/release/inflight_empty.wasm"));
    bootstrap
}

fn breaker(app: SocketAddr, server: SocketAddr) -> Bootstrap {
    let mut bootstrap = sidecar(app, server);
    bootstrap.configure("container_concurrency", json!(CONNECTIONS));
    bootstrap
}

/// Returns the gateway of one key, with the hold. The key is warm after the first request.
fn holding(app: SocketAddr, server: SocketAddr) -> Bootstrap {
    let mut bootstrap = gateway(app, server, json!({"from": "cluster"}));
    bootstrap.configure("gateway", json!({"key": {"from": "cluster"}, "hold": {}}));
    bootstrap
}

/// Returns the sidecar's configuration with the role `gateway`. The routes are the same, so that
/// only the filter differs.
fn gateway(app: SocketAddr, server: SocketAddr, key: Value) -> Bootstrap {
    let mut bootstrap = sidecar(app, server);
    let config = json!({"role": "gateway", "namespace": "default", "pod": "gateway-1", "gateway": {"key": key},
        "statserver": {"cluster": "inflight-statserver"}});
    bootstrap.configuration(&config.to_string());
    bootstrap
}

struct Subject {
    name: &'static str,
    envoy: Envoy,
}

/// One measurement.
#[derive(Clone, Copy)]
struct Measured {
    /// CPU time of the Envoy process, in microseconds per request.
    cpu: f64,
    per_second: f64,
    p50_us: f64,
    p99_us: f64,
    p999_us: f64,
    resident_mib: f64,
}

#[derive(Clone, Copy, PartialEq)]
enum Protocol {
    Http1,
    Http2,
}

/// The files that a load needs.
struct Load {
    wrk: std::path::PathBuf,
    h2load: std::path::PathBuf,
    folder: tempfile::TempDir,
}

impl Load {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        // The same requests for all subjects: headers with one of a thousand keys, which only the
        // gateway reads.
        let script = format!(
            "local requests = {{}}\n\
             for i = 1, {KEYS} do\n\
               requests[i] = wrk.format(\"GET\", nil, {{[\"Host\"] = \"hello\", [\"Knative-Serving-Namespace\"] = \"team\",\n\
                 [\"Knative-Serving-Revision\"] = string.format(\"service-%04d-00001\", i)}})\n\
             end\n\
             local next = 0\n\
             request = function() next = next % {KEYS} + 1; return requests[next] end\n\
             done = function(summary, latency)\n\
               io.write(string.format(\"RESULT %d %d %d %d %d\\n\", summary.requests, summary.duration,\n\
                 latency:percentile(50), latency:percentile(99), latency:percentile(99.9)))\n\
               io.write(string.format(\"ERRORS %d\\n\", summary.errors.connect + summary.errors.read\n\
                 + summary.errors.write + summary.errors.status + summary.errors.timeout))\n\
             end\n"
        );
        std::fs::write(folder.path().join("keys.lua"), script).expect("a file");
        let h2load = debian("h2load", &["nghttp2-client"]);
        Self { wrk: debian("wrk", &["wrk"]), h2load, folder }
    }

    /// Runs `seconds` of load. Returns the requests, the requests per second, and the quantiles of
    /// the latency in microseconds.
    async fn run(&self, to: SocketAddr, protocol: Protocol, connections: u32, seconds: u64) -> [f64; 5] {
        let log = self.folder.path().join("h2.log");
        let mut command = Command::new("taskset");
        command.args(["-c", "1"]);
        match protocol {
            Protocol::Http1 => {
                command.arg(&self.wrk).args(["-t", "1", "-c", &connections.to_string()]);
                command
                    .arg("-d")
                    .arg(format!("{seconds}s"))
                    .arg("-s")
                    .arg(self.folder.path().join("keys.lua"));
            }
            Protocol::Http2 => {
                let _ = std::fs::remove_file(&log);
                command.arg(&self.h2load).args(["-t", "1", "-c", "4", "-m", &(connections / 4).to_string()]);
                command.arg("-D").arg(seconds.to_string()).arg(format!("--log-file={}", log.display()));
                command.args(["-H", "knative-serving-namespace: team"]);
                command.args(["-H", "knative-serving-revision: service-0001-00001"]);
            }
        }
        command.arg(format!("http://{to}/"));
        let output = tokio::process::Command::from(command).output().await.expect("a load");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        match protocol {
            Protocol::Http1 => {
                assert!(text.contains("ERRORS 0\n"), "{text}");
                let result = text.lines().find_map(|line| line.strip_prefix("RESULT ")).expect("a result");
                let n: Vec<f64> = result.split(' ').map(|n| n.parse().expect("a number")).collect();
                [n[0], n[0] / (n[1] / 1e6), n[2], n[3], n[4]]
            }
            Protocol::Http2 => {
                let log = std::fs::read_to_string(&log).expect("the log");
                let micros: Vec<f64> = log
                    .lines()
                    .map(|line| {
                        let mut fields = line.split('\t').skip(1);
                        assert_eq!(fields.next(), Some("200"), "{line}");
                        fields.next().and_then(|us| us.parse().ok()).expect("a duration")
                    })
                    .collect();
                let count = micros.len() as f64;
                let quantiles = [0.5, 0.99, 0.999].map(|share| quantile(&micros, share));
                [count, count / seconds as f64, quantiles[0], quantiles[1], quantiles[2]]
            }
        }
    }
}

async fn measure(load: &Load, envoy: &Envoy, protocol: Protocol, connections: u32, seconds: u64) -> Measured {
    let pid = envoy.process.id();
    let cpu = cpu_seconds(pid);
    let [requests, per_second, p50_us, p99_us, p999_us] =
        load.run(envoy.address, protocol, connections, seconds).await;
    let cpu = (cpu_seconds(pid) - cpu) / requests * 1e6;
    let resident_mib = envoy.process.resident_bytes() as f64 / f64::from(1 << 20);
    Measured { cpu, per_second, p50_us, p99_us, p999_us, resident_mib }
}

/// Returns the median of a figure over the rounds.
fn median(rounds: &[Measured], of: impl Fn(&Measured) -> f64) -> f64 {
    spread(&rounds.iter().map(of).collect::<Vec<_>>()).0
}

/// Returns what a subject adds to bare Envoy, as a share of something, computed for each round: the
/// median and the quartiles.
fn added(subject: &[Measured], bare: &[Measured], to: impl Fn(usize) -> f64) -> (f64, f64, f64) {
    let shares = subject.iter().zip(bare).enumerate().map(|(i, (s, b))| (s.cpu - b.cpu) / to(i));
    spread(&shares.collect::<Vec<_>>())
}

/// Measures each subject in turn, round after round.
async fn compare(
    options: &Options,
    load: &Load,
    subjects: &[Subject],
    protocol: Protocol,
) -> Vec<Vec<Measured>> {
    let mut rounds = vec![Vec::new(); subjects.len()];
    for subject in subjects {
        load.run(subject.envoy.address, protocol, CONNECTIONS, options.warm_up).await;
        subject.envoy.process.signal(libc::SIGSTOP);
    }
    for _ in 0..options.rounds {
        for (subject, rounds) in subjects.iter().zip(&mut rounds) {
            subject.envoy.process.signal(libc::SIGCONT);
            rounds.push(measure(load, &subject.envoy, protocol, CONNECTIONS, options.seconds).await);
            subject.envoy.process.signal(libc::SIGSTOP);
        }
    }
    for subject in subjects {
        subject.envoy.process.signal(libc::SIGCONT);
    }
    rounds
}

/// Returns a row for each subject, after a row with the columns' names.
fn rows(subjects: &[Subject], rounds: &[Vec<Measured>]) -> Vec<Vec<String>> {
    let header = [
        "",
        "CPU µs a request",
        "added",
        "of bare",
        "of empty's",
        "requests/s",
        "p50 µs",
        "p99 µs",
        "RSS MiB",
    ];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    let (bare, empty) = (&rounds[0], &rounds[1]);
    for (subject, own) in subjects.iter().zip(rounds) {
        let of_bare = added(own, bare, |i| bare[i].cpu / 100.0);
        // The empty filter adds little: its median is steadier than its single rounds.
        let empty_adds = added(empty, bare, |_| 1.0).0;
        let of_empty = added(own, bare, |_| empty_adds);
        let adds = added(own, bare, |_| 1.0).0;
        let unless = |absent: bool, text: String| if absent { String::new() } else { text };
        let is_bare = subject.name == "bare";
        rows.push(vec![
            subject.name.to_owned(),
            format!("{:.1}", median(own, |m| m.cpu)),
            unless(is_bare, format!("{adds:.1}")),
            unless(is_bare, format!("{:.0} % ({:.0} to {:.0})", of_bare.0, of_bare.1, of_bare.2)),
            unless(
                is_bare || subject.name == "empty filter",
                format!("{:.1}x ({:.1} to {:.1})", of_empty.0, of_empty.1, of_empty.2),
            ),
            format!("{:.0}", median(own, |m| m.per_second)),
            format!("{:.0}", median(own, |m| m.p50_us)),
            format!("{:.0}", median(own, |m| m.p99_us)),
            format!("{:.0}", median(own, |m| m.resident_mib)),
        ]);
    }
    rows
}

/// Draws bars of CPU time per request, with bare Envoy's share in a colour of its own.
fn picture(subjects: &[Subject], rounds: &[Vec<Measured>], note: &str) -> String {
    let (width, left, bar, gap) = (720.0, 170.0, 22.0, 12.0);
    let most = rounds.iter().map(|own| median(own, |m| m.cpu)).fold(1.0, f64::max);
    let bare = median(&rounds[0], |m| m.cpu);
    let scale = (width - left - 130.0) / most;
    let height = 40.0 + subjects.len() as f64 * (bar + gap) + 24.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" \
         font-size=\"13\">\n<style>text{{fill:#1b1f24}}.bare{{fill:#9aa7b4}}.added{{fill:#0b62c4}}\
         @media(prefers-color-scheme:dark){{text{{fill:#e7ebf0}}.added{{fill:#6cb2ff}}}}</style>\n\
         <text x=\"0\" y=\"18\" font-weight=\"600\">CPU of Envoy in microseconds a request, HTTP/1.1</text>\n"
    );
    for (i, (subject, own)) in subjects.iter().zip(rounds).enumerate() {
        let y = 34.0 + i as f64 * (bar + gap);
        let cpu = median(own, |m| m.cpu);
        let (base, more) = (cpu.min(bare) * scale, (cpu - bare).max(0.0) * scale);
        let _ = writeln!(
            svg,
            "<text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"end\">{}</text>\
             <rect class=\"bare\" x=\"{left}\" y=\"{y:.0}\" width=\"{base:.1}\" height=\"{bar}\"/>\
             <rect class=\"added\" x=\"{:.1}\" y=\"{y:.0}\" width=\"{more:.1}\" height=\"{bar}\"/>\
             <text x=\"{:.1}\" y=\"{:.0}\">{cpu:.1}{}</text>",
            left - 8.0,
            y + 16.0,
            subject.name,
            left + base,
            left + base + more + 8.0,
            y + 16.0,
            if i == 0 { String::new() } else { format!(" (+{:.0} %)", (cpu / bare - 1.0) * 100.0) },
        );
    }
    let _ = writeln!(svg, "<text x=\"0\" y=\"{:.0}\" font-size=\"11\">{note}</text>\n</svg>", height - 8.0);
    svg
}

/// Starts an Envoy with four workers and `keys` keys that each have an open request, for as long as
/// the connections exist.
async fn with_open_requests(app: SocketAddr, server: SocketAddr, keys: usize) -> (Envoy, Vec<TcpStream>) {
    let source = json!({"from": "headers"});
    let envoy = Envoy::quiet(Version::Any, &gateway(app, server, source), 4).await;
    let mut open = Vec::new();
    for key in 0..keys {
        let mut stream = TcpStream::connect(envoy.address).await.expect("a connection");
        let request = format!(
            "GET /hold HTTP/1.1\r\nhost: x\r\nknative-serving-namespace: team\r\n\
             knative-serving-revision: service-{key:06}-00001\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await.expect("sent");
        open.push(stream);
    }
    (envoy, open)
}

/// Returns the CPU time of both kinds of Envoy in milliseconds per second, measured for two seconds
/// of each in turn.
async fn tick_cost(app: SocketAddr, server: SocketAddr, keys: usize, rounds: usize) -> [(f64, f64, f64); 2] {
    let envoys = [with_open_requests(app, server, 0).await, with_open_requests(app, server, keys).await];
    tokio::time::sleep(Duration::from_secs(3)).await;
    let mut costs = [const { Vec::new() }; 2];
    for _ in 0..rounds {
        for ((envoy, _), costs) in envoys.iter().zip(&mut costs) {
            let (cpu, began) = (cpu_seconds(envoy.process.id()), Instant::now());
            tokio::time::sleep(Duration::from_secs(2)).await;
            costs.push((cpu_seconds(envoy.process.id()) - cpu) / began.elapsed().as_secs_f64() * 1e3);
        }
    }
    costs.map(|costs| spread(&costs))
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let options = Options::parse();
    let load = Load::new();
    pin(std::process::id(), "1");
    let (app, server) = (app().await, StatServer::start(None).await);
    let server = server.address;
    let headers = json!({"from": "headers"});
    if options.ticks {
        println!("{:.1?}", tick_cost(app, server, 5_000, options.rounds).await);
        return;
    }
    let bootstraps = [
        ("bare", bare(app, server)),
        ("empty filter", empty(app, server)),
        ("sidecar", sidecar(app, server)),
        ("sidecar, breaker", breaker(app, server)),
        ("gateway, 1 key", gateway(app, server, json!({"from": "cluster"}))),
        ("gateway, 1 key, hold", holding(app, server)),
        ("gateway, 1,000 keys", gateway(app, server, headers.clone())),
    ];
    let mut subjects = Vec::new();
    for (name, bootstrap) in bootstraps {
        let envoy = Envoy::quiet(Version::Any, &bootstrap, 1).await;
        pin(envoy.process.id(), "0");
        subjects.push(Subject { name, envoy });
    }
    let note = format!(
        "{}; Envoy with one worker on one core, load and app on another; medians of {} rounds of {} s in turn",
        machine(),
        options.rounds,
        options.seconds
    );
    let mut text = format!("{note} (first to third quartile).\n");
    println!("{text}");
    let mut svg = None;
    for (protocol, title) in [
        (Protocol::Http1, "HTTP/1.1, wrk, 32 connections"),
        (Protocol::Http2, "HTTP/2, h2load, 4 connections of 8 streams"),
    ] {
        // h2load sends only one key.
        let subjects = if protocol == Protocol::Http1 { &subjects[..] } else { &subjects[..6] };
        let rounds = compare(&options, &load, subjects, protocol).await;
        let part = format!("\n{title}:\n\n{}", table(&rows(subjects, &rounds)));
        println!("{part}");
        text.push_str(&part);
        if protocol == Protocol::Http1 {
            svg = Some(picture(subjects, &rounds, &note));
        }
    }

    // The latency of requests while ticks run: with few connections, so that the measurement is not
    // dominated by the load's own queue.
    let mut rare = gateway(app, server, headers);
    let text_of =
        at(rare.filter(), "/typed_config/config/configuration/value").as_str().expect("text").to_owned();
    let mut config: Value = serde_json::from_str(&text_of).expect("JSON");
    config["reporting_period"] = json!("60s");
    rare.configuration(&config.to_string());
    let rare = Subject { name: "", envoy: Envoy::quiet(Version::Any, &rare, 1).await };
    pin(rare.envoy.process.id(), "0");
    let [mut each_second, mut each_minute] = [const { Vec::new() }; 2];
    for _ in 0..options.rounds.div_ceil(3) {
        for (envoy, waits) in [(&subjects[6].envoy, &mut each_second), (&rare.envoy, &mut each_minute)] {
            waits.push(measure(&load, envoy, Protocol::Http1, 2, options.seconds + 2).await);
        }
    }
    let (with, without) = (median(&each_second, |m| m.p999_us), median(&each_minute, |m| m.p999_us));
    let _ = writeln!(
        text,
        "\np99.9 of a request through the gateway with 1,000 keys, 2 connections: {with:.0} µs with a tick each second, \
         {without:.0} µs with one each minute."
    );
    println!("{}", text.lines().last().unwrap_or_default());
    drop((subjects, rare));
    let [idle, busy] = tick_cost(app, server, 5_000, options.rounds.min(9)).await;
    let _ = writeln!(
        text,
        "\nTicks of a gateway with four workers, a request open on each of 5,000 keys: {:.1} ms of CPU a second ({:.1} to \
         {:.1}), of which {:.1} without a key.",
        busy.0, busy.1, busy.2, idle.0
    );
    println!("{}", text.lines().last().unwrap_or_default());
    if options.write {
        write(&root().join("docs"), &text, &svg.unwrap_or_default());
    }
}

/// Writes the tables between the two marks of `benchmarks.md`, and the picture into the same
/// folder.
fn write(docs: &Path, text: &str, svg: &str) {
    const MARKS: [&str; 2] = ["<!-- make bench -->\n", "<!-- end of make bench -->"];
    let page = docs.join("benchmarks.md");
    let old = std::fs::read_to_string(&page).expect("the page");
    let (before, rest) = old.split_once(MARKS[0]).expect("the first mark");
    let (_, after) = rest.split_once(MARKS[1]).expect("the second mark");
    std::fs::write(&page, format!("{before}{}{text}{}{after}", MARKS[0], MARKS[1])).expect("the page");
    std::fs::write(docs.join("bench.svg"), svg).expect("the picture");
}
