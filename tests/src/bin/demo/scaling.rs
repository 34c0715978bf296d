//! A workload that goes from no pods to some and back, with a gateway that holds its requests while
//! there are none: a stats server, a gateway Envoy, a kubelet, a load in waves, and a live table.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Duration;

use http_body_util::Full;
use hyper::Request;
use inflight_e2e::bootstrap::{Bootstrap, EndpointFile};
use inflight_e2e::envoy::{Envoy, Version};
use inflight_e2e::http;
use inflight_e2e::statserver::StatServer;
use serde_json::json;

use crate::kubelet::{KEY, Kubelet, MOST_PODS, Pods};
use crate::picture::{Row, draw};
use crate::waves::{Tally, burst, plateau};

/// Before the burst.
const QUIET: Duration = Duration::from_secs(3);
/// After the burst.
const PLATEAU: Duration = Duration::from_secs(15);
/// How long going back to no pods may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Takes and prints the table's next line.
async fn show(rows: &mut Vec<Row>, tally: &Tally, gateway: &Envoy, server: &StatServer, pods: Pods) {
    let held = gateway.stat("activator_held_requests", &[]).await as u64;
    let key = server.key(KEY.0, KEY.1).await;
    let figure = |name: &str| key.as_ref().and_then(|key| key[name].as_u64());
    let before: u64 = rows.iter().map(|row| row.requests).sum();
    let row = Row {
        requests: tally.sent() - before,
        held,
        in_flight: figure("in_flight"),
        desired: figure("desired_pods"),
        pods: pods.ready as u64,
    };
    let or_dash = |figure: Option<u64>| figure.map_or("-".into(), |figure| figure.to_string());
    let changes = [(pods.starting, "starting"), (pods.draining, "draining")].into_iter();
    let changes: Vec<String> =
        changes.filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")).collect();
    let line = format!(
        "{:>6}  {:>8}  {held:>5}  {:>6}  {:>9}  {:>7}  {:>4}  {}",
        rows.len(),
        row.requests,
        tally.failures().len(),
        or_dash(row.in_flight),
        or_dash(row.desired),
        row.pods,
        changes.join(", ")
    );
    println!("{}", line.trim_end());
    let _ = std::io::stdout().flush();
    rows.push(row);
}

/// Sets the workload's settings at the stats server: windows that are as short as they may be, and
/// not more pods than the machine can run.
async fn settings(server: &StatServer) -> Result<(), String> {
    let settings = json!({
        "target": 10,
        "target_utilization_percentage": 100,
        "stable_window": "6s",
        "panic_window_percentage": 34,
        "max_scale": MOST_PODS,
    });
    let request = Request::put(format!("/v1/keys/{}/{}/settings", KEY.0, KEY.1)).header("host", "demo");
    let request = request.body(Full::from(settings.to_string())).map_err(|error| error.to_string())?;
    let (status, body) = http::ask(server.address, request).await?;
    if status == 200 { Ok(()) } else { Err(format!("{status}: {}", String::from_utf8_lossy(&body))) }
}

/// Runs until the workload is back at no pods. Returns success if no request failed and the workload
/// went from no pods to some and back.
pub async fn run(concurrency: u32, picture: Option<&Path>) -> ExitCode {
    let server = StatServer::start(None).await;
    if let Err(error) = settings(&server).await {
        println!("the stats server refused the settings: {error}");
        return ExitCode::FAILURE;
    }
    let endpoints = EndpointFile::new();
    let mut bootstrap = Bootstrap::scale_to_zero(&endpoints, server.address);
    // The trust is shorter than the time in which the stats server can take the last pod away.
    let hold = json!({"timeout": "60s", "probe_period": "50ms", "trust": "200ms"});
    bootstrap.configure("gateway", json!({"hold": hold}));
    let gateway = Envoy::start(Version::Any, &bootstrap, concurrency).await;
    println!("live page     http://{}/", server.address);
    println!("traffic       http://{}/work?ms=20", gateway.address);
    println!("Envoy         http://{}/stats/prometheus", gateway.admin);
    println!("stats server  http://{}/v1/keys/{}/{}", server.address, KEY.0, KEY.1);
    println!();
    println!("second  requests   held  failed  in flight  desired  pods");

    let (tally, pods) = (Tally::default(), Mutex::new(Pods::default()));
    let now = || *pods.lock().expect("no panic under this lock");
    let load = async {
        tokio::time::sleep(QUIET).await;
        burst(&tally, gateway.address, 80, Duration::from_millis(200)).await;
        plateau(&tally, gateway.address, 24, Duration::from_millis(200), PLATEAU).await;
    };
    let mut rows = Vec::new();
    let table = async {
        let mut seconds = tokio::time::interval(Duration::from_secs(1));
        loop {
            seconds.tick().await;
            show(&mut rows, &tally, &gateway, &server, now()).await;
        }
    };
    let idle = async {
        load.await;
        let is_idle = || {
            let Pods { starting, ready, draining } = now();
            starting + ready + draining == 0
        };
        let back = async {
            while !is_idle() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::time::timeout(PATIENCE, back).await.is_ok()
    };
    let kubelet = Kubelet::new(&server, &gateway, &endpoints, &pods);
    let is_back = tokio::select! {
        is_back = idle => is_back,
        () = table => false,
        () = kubelet.run() => false,
    };
    show(&mut rows, &tally, &gateway, &server, now()).await;

    let (sent, answered, failures) = (tally.sent(), tally.answered(), tally.failures());
    let logged = gateway.requests_when(sent).await.len();
    println!();
    println!(
        "requests: {sent} sent, {answered} answered, {} failed, {logged} in the gateway's access log",
        failures.len()
    );
    println!("longest wait beyond the app's own time: {:.2} s", tally.longest_wait().as_secs_f64());
    let most_pods = rows.iter().map(|row| row.pods).max().unwrap_or(0);
    println!("pods: 0 -> {most_pods} -> {}", now().ready);
    if let Some(file) = picture {
        std::fs::write(file, draw(&rows)).expect("the picture");
    }
    failures.iter().take(10).for_each(|failure| println!("failed: {failure}"));
    if sent > 0 && answered == sent && logged as u64 == sent && is_back && most_pods > 0 {
        println!("no request failed, and the workload is back at no pods");
        ExitCode::SUCCESS
    } else {
        println!("this is NOT what it should be");
        ExitCode::FAILURE
    }
}
