//! Several stats servers with one state, over a real Redis: whatever dies or stalls, all of them say
//! what was sent, and the same.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use http_body_util::Full;
use hyper::Request;
use inflight_e2e::app::App;
use inflight_e2e::bootstrap::Bootstrap;
use inflight_e2e::envoy::{Envoy, Version};
use inflight_e2e::load::{Load, Plan};
use inflight_e2e::redis::{self, DURABLE, Link, Redis, Sentinel};
use inflight_e2e::reports::Sender;
use inflight_e2e::statserver::StatServer;
use inflight_e2e::tls::Authority;
use inflight_e2e::{built, http, prometheus, wait};
use inflight_stats::protocol::stat::{Stat, WireStatMessage, WireStatMessages};
use prost::Message as _;
use serde_json::Value;
use tokio::task::{JoinHandle, JoinSet};
use tokio_tungstenite::connect_async;
use tokio_tungstenite::tungstenite::Message;

use crate::autoscalers::proto::ScaledObjectRef;
use crate::autoscalers::proto::external_scaler_client::ExternalScalerClient;
use crate::clock::WallClock;

const SETTLED: Duration = Duration::from_secs(40);
const KEY: &str = "/v1/keys/default/hello-00001";
/// As many mixed requests as the numbers without a store are checked with.
const MIXED: Plan =
    Plan { requests: 100_000, connections: 60, average_ms: 10.0, mixed: true, seed: 18, path: "/work" };
/// Goes on until it is stopped.
const ENDLESS: Plan = Plan { requests: u64::MAX, connections: 24, ..MIXED };
const STEADY: Plan = Plan { mixed: false, connections: 12, average_ms: 20.0, ..ENDLESS };

/// Servers that share one store.
struct Servers {
    servers: Vec<StatServer>,
    flags: Vec<String>,
}

impl Servers {
    async fn start(count: usize, store: &str) -> Self {
        Self::with(count, store, &[]).await
    }

    async fn with(count: usize, store: &str, flags: &[&str]) -> Self {
        let flags = [&["--store", store, "--stable-window", "6s"], flags].concat();
        let flags: Vec<String> = flags.into_iter().map(str::to_owned).collect();
        let mut servers = Self { servers: Vec::new(), flags };
        for _ in 0..count {
            let server = StatServer::with(None, &servers.flags()).await;
            servers.servers.push(server);
        }
        servers.ready().await;
        servers
    }

    fn flags(&self) -> Vec<&str> {
        self.flags.iter().map(String::as_str).collect()
    }

    fn addresses(&self) -> Vec<SocketAddr> {
        self.servers.iter().map(|server| server.address).collect()
    }

    async fn ready(&self) {
        for server in &self.servers {
            wait::until("the server has caught up", SETTLED, || http::get(server.address, "/readyz")).await;
        }
    }

    /// Kills a server, and starts it again on its address after `away`.
    async fn restart(&mut self, which: usize, away: Duration) {
        self.servers[which].process.kill();
        tokio::time::sleep(away).await;
        let address = self.servers[which].address;
        self.servers[which] = StatServer::with(Some(address), &self.flags()).await;
    }

    /// Waits until all servers say the same of a key, to the last digit, and so many requests.
    async fn agree(&self, path: &str, requests: u64) -> Value {
        let addresses = self.addresses();
        wait::until(&format!("all servers say {requests} requests, and the same"), SETTLED, || async {
            let said = join_all(addresses.iter().map(|address| http::get(*address, path))).await;
            let said = said.into_iter().collect::<Result<Vec<String>, String>>()?;
            let view: Value = serde_json::from_str(&said[0]).map_err(|error| error.to_string())?;
            let is_same = said.iter().all(|one| *one == said[0]);
            if is_same && view["requests_total"] == requests { Ok(view) } else { Err(said.join("\n")) }
        })
        .await
    }

    /// Returns a metric of each server.
    async fn metric(&self, name: &str) -> Vec<f64> {
        let read = |address| async move {
            let text = http::get(address, "/metrics").await.expect("metrics");
            let samples = prometheus::parse(&text);
            samples.iter().find(|sample| sample.name == name).map_or(f64::NAN, |sample| sample.value)
        };
        join_all(self.addresses().into_iter().map(read)).await
    }

    /// Returns the time within which 99 of 100 reports were applied, by the buckets of all servers.
    async fn lag_p99(&self) -> f64 {
        let mut buckets: Vec<(f64, f64)> = Vec::new();
        for address in self.addresses() {
            let text = http::get(address, "/metrics").await.expect("metrics");
            for sample in prometheus::parse(&text) {
                if sample.name != "inflight_statserver_store_lag_seconds_bucket" {
                    continue;
                }
                let le = sample.labels.iter().find(|(name, _)| *name == "le").expect("a bound").1;
                let bound = le.parse().unwrap_or(f64::INFINITY);
                match buckets.iter_mut().find(|(known, _)| *known == bound) {
                    Some((_, count)) => *count += sample.value,
                    None => buckets.push((bound, sample.value)),
                }
            }
        }
        buckets.sort_by(|one, other| one.0.total_cmp(&other.0));
        let all = buckets.last().map_or(0.0, |(_, count)| *count);
        buckets.iter().find(|(_, count)| *count >= 0.99 * all).map_or(f64::NAN, |(bound, _)| *bound)
    }
}

/// An Envoy whose reports go to several servers in turn.
async fn envoy(version: Version, app: &App, servers: &[SocketAddr]) -> Envoy {
    let mut bootstrap = Bootstrap::sidecar(app.address, servers[0]);
    bootstrap.endpoints("inflight-statserver", servers);
    bootstrap.configure("reporting_period", "200ms".into());
    Envoy::quiet(version, &bootstrap, 2).await
}

/// Watches what servers say at the same time. Whenever two of them have come equally far, they must
/// say the same. What the decider said last may be older at one of them: a tick does not show in the
/// totals. That may be so only for the lag after a tick.
struct Watch {
    stop: Arc<AtomicBool>,
    compared: JoinHandle<usize>,
}

impl Watch {
    fn start(addresses: Vec<SocketAddr>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let is_over = Arc::clone(&stop);
        let compared = tokio::spawn(async move {
            let mut said: HashMap<(u64, u64), (Value, Vec<Value>)> = HashMap::new();
            let (mut compared, mut between_ticks) = (0, 0);
            while !is_over.load(Ordering::Relaxed) {
                for text in join_all(addresses.iter().map(|a| http::get(*a, KEY))).await.into_iter().flatten()
                {
                    let mut view: Value = serde_json::from_str(&text).expect("JSON");
                    let at = (&view["requests_total"], &view["last_report_age_ms"]);
                    let at = (at.0.as_u64().expect("a number"), at.1.as_u64().expect("a number"));
                    let decided = ["desired_pods", "excess_burst_capacity", "panic_mode"];
                    let decided: Vec<Value> = decided.iter().map(|name| view[*name].take()).collect();
                    match said.get(&at) {
                        Some((before, decided_before)) => {
                            assert_eq!(*before, view, "two servers that are equally far");
                            compared += 1;
                            between_ticks += usize::from(*decided_before != decided);
                        }
                        None => drop(said.insert(at, (view, decided))),
                    }
                }
            }
            assert!(between_ticks * 50 <= compared, "{between_ticks} decisions of {compared} differ");
            compared
        });
        Self { stop, compared }
    }

    async fn compared(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        self.compared.await.expect("no two servers differ")
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_servers_behind_one_cluster_say_the_same() {
    let redis = Redis::start(&[]).await;
    let servers = Servers::start(3, &redis.url()).await;
    let app = App::start().await;
    let envoys = [
        envoy(Version::Oldest, &app, &servers.addresses()).await,
        envoy(Version::Newest, &app, &servers.addresses()).await,
    ];
    let plan = Plan { requests: 50_000, ..MIXED };
    let loads = envoys.each_ref().map(|envoy| Load::start(plan, envoy.address, &app.counts));
    // Both have the same name, and so are one sender with two incarnations.
    wait::until("the key is known", SETTLED, || http::get(servers.servers[2].address, KEY)).await;
    let watch = Watch::start(servers.addresses());
    // While each report has more requests, these and the report's age tell how far a server is.
    wait::until("half of the requests are sent", Duration::from_secs(120), || async {
        let sent: Vec<u64> = loads.iter().map(Load::sent).collect();
        if sent.iter().any(|sent| *sent > 40_000) { Ok(()) } else { Err(sent) }
    })
    .await;
    let compared = watch.compared().await;
    let mut sent = 0;
    for load in loads {
        sent += load.finish().await;
    }
    let view = servers.agree(KEY, sent).await;
    let taken = servers.metric("inflight_statserver_store_lag_seconds_count").await;
    assert!(taken.iter().all(|reports| *reports > 5.0), "each got reports: {taken:?}");
    assert!(compared > 10, "{compared} comparisons");
    let p99 = servers.lag_p99().await;
    println!(
        "{sent} requests at all three, desired_pods {}; {compared} answers compared while it went on; reports {taken:?}, \
         99 of 100 applied within {p99} s",
        view["desired_pods"]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_that_are_killed_every_ten_seconds_lose_nothing() {
    let redis = Redis::start(&[]).await;
    // Twelve connections keep some twelve requests in flight, and on a busy machine some fewer: two pods
    // for all from eight to twelve.
    let mut servers =
        Servers::with(3, &redis.url(), &["--target", "7", "--target-utilization-percentage", "100"]).await;
    let app = App::start().await;
    let envoy = envoy(Version::Newest, &app, &servers.addresses()).await;
    let load = Load::start(STEADY, envoy.address, &app.counts);
    let desired = |view: &Value| view["desired_pods"].as_u64();
    let first = wait::until("the windows are full", SETTLED, || async {
        let text = http::get(servers.servers[0].address, KEY).await?;
        let view: Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
        let full = view["stable"]["concurrency"].as_f64().is_some_and(|average| average > 9.0);
        let sent = load.sent() > 5_000;
        desired(&view).filter(|_| full && sent).ok_or(text)
    })
    .await;
    let (stop, addresses) = (Arc::new(AtomicBool::new(false)), servers.addresses());
    let is_over = Arc::clone(&stop);
    let least = tokio::spawn(async move {
        let mut least = u64::MAX;
        while !is_over.load(Ordering::Relaxed) {
            for text in join_all(addresses.iter().map(|a| http::get(*a, KEY))).await.into_iter().flatten() {
                let view: Value = serde_json::from_str(&text).expect("JSON");
                // One that has just started may have none yet. It says so, and not that it wants less.
                least = least.min(desired(&view).unwrap_or(u64::MAX));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        least
    });
    for which in [0, 1, 2] {
        servers.restart(which, Duration::from_secs(2)).await;
        servers.ready().await;
        tokio::time::sleep(Duration::from_secs(8)).await;
    }
    stop.store(true, Ordering::Relaxed);
    let least = least.await.expect("no panic");
    load.stop();
    let sent = load.finish().await;
    servers.agree(KEY, sent).await;
    assert!(least >= first, "{least} pods wanted, {first} before the first kill");
    println!("{sent} requests over three kills; at least {least} pods wanted, {first} before");
}

/// A client of KEDA's stream that comes again when it loses its server.
async fn active(grpc: SocketAddr, key: &str) -> bool {
    loop {
        let one = async {
            let channel = tonic::transport::Channel::from_shared(format!("http://{grpc}"))
                .ok()?
                .connect()
                .await
                .ok()?;
            let metadata = HashMap::from([("namespace".into(), "ns".into()), ("name".into(), key.into())]);
            let scaled =
                ScaledObjectRef { name: key.into(), namespace: "ns".into(), scaler_metadata: metadata };
            let mut answers =
                ExternalScalerClient::new(channel).stream_is_active(scaled).await.ok()?.into_inner();
            while let Ok(Some(answer)) = answers.message().await {
                if answer.result {
                    return Some(());
                }
            }
            None
        };
        if one.await.is_some() {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_wakes_is_told_at_every_server_also_after_kills() {
    let redis = Redis::start(&[]).await;
    let mut servers = Servers::start(3, &redis.url()).await;
    let mut times = Vec::new();
    for round in 0..12 {
        // Ports of gRPC differ after a restart.
        let grpc: Vec<SocketAddr> = servers.servers.iter().map(|server| server.grpc).collect();
        let key = format!("key-{round}");
        let mut waiting = JoinSet::new();
        for address in grpc {
            let key = key.clone();
            waiting.spawn(async move {
                active(address, &key).await;
                Instant::now()
            });
        }
        tokio::time::sleep(Duration::from_millis(150)).await;
        let began = Instant::now();
        Sender::gateway("gateway", "ns", &key).report(servers.servers[round % 3].address, 1, 1).await;
        while let Some(told) = waiting.join_next().await {
            times.push(told.expect("told").duration_since(began));
        }
        if round % 4 == 3 {
            servers.restart(round % 3, Duration::ZERO).await;
            servers.ready().await;
        }
    }
    times.sort();
    let median = times[times.len() / 2];
    println!("{} streams told after {median:?} (median), at most {:?}", times.len(), times[times.len() - 1]);
    assert!(median < Duration::from_secs(2), "{median:?}: it waits for a tick");
}

/// Streams stats of one second each to a server, as Knative's activator does. Returns how many requests
/// they had.
async fn stream_stats(to: SocketAddr, stats: usize) -> u64 {
    let (mut socket, _) = connect_async(format!("ws://{to}/")).await.expect("a websocket");
    let mut requests = 0;
    for number in 0..stats {
        let stat = Stat {
            pod_name: "activator-1".into(),
            average_concurrent_requests: 1.0,
            request_count: (number % 7) as f64,
            ..Stat::default()
        };
        requests += number as u64 % 7;
        let message =
            WireStatMessage { namespace: "default".into(), name: "streamed".into(), stat: Some(stat) };
        let frame = WireStatMessages { messages: vec![message] }.encode_to_vec();
        futures_util::SinkExt::send(&mut socket, Message::Binary(frame.into())).await.expect("it is sent");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let _ = socket.close(None).await;
    // Until the server has read all, and closes, too.
    while let Some(Ok(_)) = futures_util::StreamExt::next(&mut socket).await {}
    requests
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_answers_and_senders_that_change_servers_count_once() {
    let redis = Redis::start(&[]).await;
    let links = join_all((0..3).map(|_| Link::to(redis.address))).await;
    let mut servers = Servers { servers: Vec::new(), flags: Vec::new() };
    for link in &links {
        servers.servers.append(&mut Servers::start(1, &link.url()).await.servers);
    }
    links.iter().zip([3, 5, 7]).for_each(|(link, every)| link.cut_every(every));
    let app = App::start().await;
    let envoy = envoy(Version::Oldest, &app, &servers.addresses()).await;
    let load = Load::start(MIXED, envoy.address, &app.counts);
    let streamed = join_all(servers.addresses().into_iter().map(|to| stream_stats(to, 300))).await;
    let sent = load.finish().await;
    servers.agree(KEY, sent).await;
    let streamed: u64 = streamed.into_iter().sum();
    servers.agree("/v1/keys/default/streamed", streamed).await;
    let cuts: Vec<usize> = links.iter().map(Link::cuts).collect();
    assert!(cuts.iter().all(|cuts| *cuts > 3), "{cuts:?}");
    println!("{sent} requests and {streamed} streamed ones counted once; lost answers {cuts:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_is_killed_and_comes_back_loses_nothing() {
    let mut redis = Redis::start(&DURABLE).await;
    let servers = Servers::start(3, &redis.url()).await;
    let app = App::start().await;
    let envoy = envoy(Version::Newest, &app, &servers.addresses()).await;
    let load = Load::start(ENDLESS, envoy.address, &app.counts);
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_secs(3)).await;
        redis.restart(Duration::from_millis(1_500)).await;
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    load.stop();
    let sent = load.finish().await;
    servers.agree(KEY, sent).await;
    println!("{sent} requests, with three kills of the store");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_stands_still_or_is_slow_costs_no_request_and_no_memory() {
    let redis = Redis::start(&[]).await;
    let link = Link::to(redis.address).await;
    let servers = Servers::start(3, &link.url()).await;
    let app = App::start().await;
    let envoy = envoy(Version::Oldest, &app, &servers.addresses()).await;
    let load = Load::start(ENDLESS, envoy.address, &app.counts);
    tokio::time::sleep(Duration::from_secs(3)).await;
    let before: Vec<u64> = servers.servers.iter().map(|server| server.process.resident_bytes()).collect();
    redis.process.signal(libc::SIGSTOP);
    tokio::time::sleep(Duration::from_secs(10)).await;
    redis.process.signal(libc::SIGCONT);
    let after: Vec<u64> = servers.servers.iter().map(|server| server.process.resident_bytes()).collect();
    link.delay(Duration::from_millis(20));
    tokio::time::sleep(Duration::from_secs(5)).await;
    link.delay(Duration::ZERO);
    load.stop();
    let sent = load.finish().await;
    servers.agree(KEY, sent).await;
    for (before, after) in before.iter().zip(&after) {
        assert!(after.saturating_sub(*before) < 24 << 20, "{before} bytes, then {after}");
    }
    println!("{sent} requests, ten seconds without the store and five with a slow one");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_lost_acknowledged_entries_gets_them_back() {
    let (mut master, app) = (Redis::start(&[]).await, App::start().await);
    let replica = Redis::replica_of(&master).await;
    let link = Link::to(master.address).await;
    let servers = Servers::start(3, &link.url()).await;
    let envoy = envoy(Version::Newest, &app, &servers.addresses()).await;
    let load = Load::start(ENDLESS, envoy.address, &app.counts);
    tokio::time::sleep(Duration::from_secs(4)).await;
    // From now on the replica lacks what the master acknowledges.
    replica.promote().await;
    let known = servers.servers[0].total().await;
    wait::until("more is acknowledged", SETTLED, || async {
        let total = servers.servers[1].total().await;
        if total > known + 1_000 { Ok(()) } else { Err(total) }
    })
    .await;
    link.lead_to(replica.address);
    master.process.kill();
    tokio::time::sleep(Duration::from_secs(4)).await;
    // And all that a store has in memory.
    redis::command(replica.address, &["FLUSHALL"]).await.expect("it forgets");
    link.lead_to(replica.address);
    tokio::time::sleep(Duration::from_secs(4)).await;
    load.stop();
    let sent = load.finish().await;
    servers.agree(KEY, sent).await;
    let recoveries = servers.metric("inflight_statserver_store_recoveries_total").await;
    assert!(recoveries.iter().sum::<f64>() >= 2.0, "{recoveries:?}");
    println!("{sent} requests, the store lost entries twice: {recoveries:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_vanishes_under_connected_servers_comes_back_also_for_newcomers() {
    let (redis, app) = (Redis::start(&[]).await, App::start().await);
    let mut servers = Servers::start(2, &redis.url()).await;
    let envoy = envoy(Version::Newest, &app, &servers.addresses()).await;
    let load = Load::start(ENDLESS, envoy.address, &app.counts);
    let flags = servers.flags.clone();
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    for (done, loss) in
        [&["FLUSHALL"][..], &["DEL", "inflight:log"], &["DEL", "inflight:snapshot"]].iter().enumerate()
    {
        tokio::time::sleep(Duration::from_secs(2)).await;
        redis::command(redis.address, loss).await.expect("it forgets");
        servers.servers.push(StatServer::with(None, &flags).await);
        wait::until("the log is back", SETTLED, || async {
            let recoveries = servers.metric("inflight_statserver_store_recoveries_total").await;
            let recoveries = recoveries.iter().sum::<f64>();
            if recoveries > done as f64 { Ok(()) } else { Err(recoveries) }
        })
        .await;
        servers.ready().await;
    }
    load.stop();
    let sent = load.finish().await;
    servers.agree(KEY, sent).await;
    println!("{sent} requests, three losses under open connections, five servers");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_adds_what_a_lost_store_had_to_a_log_that_goes_on() {
    let (mut master, app) = (Redis::start(&[]).await, App::start().await);
    let replica = Redis::replica_of(&master).await;
    let [link, other_link] = [Link::to(master.address).await, Link::to(master.address).await];
    let mut servers = Servers::start(1, &link.url()).await;
    let others = servers_flags(&other_link.url());
    servers
        .servers
        .push(StatServer::with(None, &others.iter().map(String::as_str).collect::<Vec<_>>()).await);
    servers.ready().await;
    let [one, other] = [servers.servers[0].address, servers.servers[1].address];
    let envoys = [envoy(Version::Newest, &app, &[one]).await, envoy(Version::Oldest, &app, &[other]).await];
    let loads = envoys.each_ref().map(|envoy| Load::start(ENDLESS, envoy.address, &app.counts));
    tokio::time::sleep(Duration::from_secs(3)).await;
    // Two stores take entries for a while, one of each server.
    replica.promote().await;
    other_link.lead_to(replica.address);
    for server in &servers.servers {
        let known = server.total().await;
        wait::until("more is acknowledged", SETTLED, || async {
            let total = server.total().await;
            if total > known + 1_000 { Ok(()) } else { Err(total) }
        })
        .await;
    }
    // Every answer comes late, so the log has gone on whenever the server looks.
    link.delay(Duration::from_millis(20));
    master.process.kill();
    link.lead_to(replica.address);
    tokio::time::sleep(Duration::from_secs(8)).await;
    link.delay(Duration::ZERO);
    let mut sent = 0;
    for load in loads {
        load.stop();
        sent += load.finish().await;
    }
    servers.agree(KEY, sent).await;
    println!("{sent} requests at two servers with a store each, then with one");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sentinels_name_the_master() {
    let mut master = Redis::start(&[]).await;
    let replica = Redis::replica_of(&master).await;
    let sentinel = Sentinel::start(&master).await;
    let servers = Servers::start(2, &sentinel.url()).await;
    let mut pod = Sender::pod("pod", "ns", "key");
    let [one, other] = [0, 1].map(|which| servers.servers[which].address);
    pod.report(one, 5, 2).await;
    servers.agree("/v1/keys/ns/key", 10).await;
    master.process.kill();
    wait::until("the replica is the master", SETTLED, || async {
        let role = redis::command(replica.address, &["ROLE"]).await?;
        if role.contains("master") { Ok(()) } else { Err(role) }
    })
    .await;
    wait::until("a server takes settings again", SETTLED, || async {
        let put = Request::delete("/v1/keys/ns/none/settings").header("host", "x");
        let (status, answer) = http::ask(other, put.body(Full::default()).expect("a request")).await?;
        if status == 204 { Ok(()) } else { Err(format!("{status} {answer:?}")) }
    })
    .await;
    wait::until("the other server is there, too", SETTLED, || async {
        let put = Request::delete("/v1/keys/ns/none/settings").header("host", "x");
        let (status, _) = http::ask(one, put.body(Full::default()).expect("a request")).await?;
        if status == 204 { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
    pod.report(other, 5, 2).await;
    servers.agree("/v1/keys/ns/key", 20).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_was_away_for_two_minutes_or_starts_empty_catches_up() {
    let redis = Redis::start(&[]).await;
    let mut servers = Servers::start(3, &redis.url()).await;
    let put = Request::put("/v1/keys/ns/key/settings").header("host", "x");
    let put = put.body(Full::from(r#"{"target": 7, "stable_window": "30s"}"#)).expect("a request");
    assert_eq!(http::ask(servers.servers[0].address, put).await.expect("an answer").0, 200);
    let away = servers.servers.remove(2);
    away.process.signal(libc::SIGSTOP);
    let (mut pod, mut sent) = (Sender::pod("pod", "ns", "key"), 0);
    let began = Instant::now();
    let mut turn = 0;
    while began.elapsed() < Duration::from_secs(120) {
        pod.report(servers.servers[turn % 2].address, 40 + turn as u32 % 9, 1).await;
        sent += 40 + turn as u64 % 9;
        turn += 1;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let snapshots = servers.metric("inflight_statserver_store_snapshot_timestamp_seconds").await;
    assert!(snapshots.iter().all(|at| *at > 0.0), "{snapshots:?}");
    away.process.signal(libc::SIGCONT);
    let address = away.address;
    wait::until("the server that was away knows all", SETTLED, || async {
        let total = away.number("ns", "key", "requests_total").await;
        if total == sent { Ok(()) } else { Err(total) }
    })
    .await;
    servers.servers.push(away);
    let flags = servers.flags.clone();
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    servers.servers.push(StatServer::with(None, &flags).await);
    servers.ready().await;
    pod.report(address, 40, 1).await;
    let view = servers.agree("/v1/keys/ns/key", sent + 40).await;
    let settings = join_all(
        servers
            .addresses()
            .into_iter()
            .map(|a| async move { http::get(a, "/v1/keys/ns/key/settings").await.expect("settings") }),
    )
    .await;
    assert!(settings.iter().all(|one| *one == settings[0] && one.contains("\"target\":7")), "{settings:?}");
    println!("{} requests: {view}", sent + 40);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_of_two_versions_run_beside_each_other() {
    let redis = Redis::start(&[]).await;
    let store = redis.url();
    let mut servers = Servers::start(2, &store).await;
    let app = App::start().await;
    let envoy = envoy(Version::Newest, &app, &servers.addresses()).await;
    let load = Load::start(ENDLESS, envoy.address, &app.counts);
    let next = |address| {
        let (flags, mut command) =
            (servers_flags(&store), std::process::Command::new(built("e2e/inflight-statserver-next")));
        command.env_remove("INFLIGHT_STORE");
        async move {
            StatServer::run(command, Some(address), &flags.iter().map(String::as_str).collect::<Vec<_>>())
                .await
        }
    };
    let writes = |server: &StatServer, version: u8| {
        let log = server.process.log();
        let last = log
            .lines()
            .rev()
            .find_map(|line| line.split_once("writes version=").map(|(_, v)| v.trim().to_owned()));
        let is_it = last.as_deref() == Some(&version.to_string());
        async move { if is_it { Ok(()) } else { Err(last) } }
    };
    for which in [0, 1] {
        tokio::time::sleep(Duration::from_secs(2)).await;
        let address = servers.servers[which].address;
        servers.servers[which].process.kill();
        servers.servers[which] = next(address).await;
        servers.ready().await;
    }
    // Once no old server is left, both write the new version.
    for server in &servers.servers {
        wait::until("the new version is written", SETTLED, || writes(server, 2)).await;
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    // Back: an old server waits until it can read what is written.
    let address = servers.servers[0].address;
    servers.servers[0].process.kill();
    servers.servers[0] = StatServer::with(Some(address), &servers.flags()).await;
    wait::until("the new server writes the old version", SETTLED, || writes(&servers.servers[1], 1)).await;
    wait::until("the old server has caught up", Duration::from_secs(90), || http::get(address, "/readyz"))
        .await;
    load.stop();
    let sent = load.finish().await;
    servers.agree(KEY, sent).await;
    println!("{sent} requests, up to the next version and back");
}

fn servers_flags(store: &str) -> Vec<String> {
    ["--store", store, "--stable-window", "6s"].map(str::to_owned).to_vec()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_step_of_a_wall_clock_moves_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let redis = Redis::start(&[]).await;
    let clocks = ["one", "other"].map(|name| WallClock::new(folder.path(), name));
    let mut servers = Servers { servers: Vec::new(), flags: servers_flags(&redis.url()) };
    for clock in &clocks {
        let flags = servers.flags.clone();
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        servers.servers.push(StatServer::launch(None, &flags, &clock.environment).await);
    }
    servers.ready().await;
    let (mut pod, mut sent) = (Sender::pod("pod", "ns", "key"), 0);
    for (turn, steps) in [[0, 0], [3600, 0], [3600, -3600], [0, 3600], [0, 0]].into_iter().enumerate() {
        clocks.iter().zip(steps).for_each(|(clock, seconds)| clock.set(seconds));
        if turn == 2 {
            // A server that starts with a wrong clock takes the time from the others.
            let address = servers.servers[0].address;
            servers.servers[0].process.kill();
            let flags = servers.flags.clone();
            let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
            servers.servers[0] = StatServer::launch(Some(address), &flags, &clocks[0].environment).await;
            servers.ready().await;
        }
        for second in 0..4 {
            pod.report(servers.servers[second % 2].address, 10, 1).await;
            sent += 10;
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        let view = servers.agree("/v1/keys/ns/key", sent).await;
        if turn > 1 {
            // Ten at a time, as far as reports come in time.
            let average = view["stable"]["concurrency"].as_f64().expect("a number");
            assert!((6.0..13.0).contains(&average), "{steps:?}: {view}");
        }
        assert_eq!(view["pods"], 1, "{steps:?}: {view}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_its_store_a_server_answers_from_what_it_knows() {
    let redis = Redis::start(&[]).await;
    let link = Link::to(redis.address).await;
    let servers = Servers::start(2, &link.url()).await;
    let [one, other] = [0, 1].map(|which| servers.servers[which].address);
    let mut pod = Sender::pod("pod", "ns", "key");
    pod.report(one, 5, 2).await;
    let mut idle = Sender::gateway("gateway", "ns", "idle");
    idle.report(one, 0, 1).await;
    servers.agree("/v1/keys/ns/key", 10).await;
    let watching = tokio::spawn({
        let grpc = servers.servers[1].grpc;
        async move { active(grpc, "idle").await }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    link.refuse(true);
    // A first request: the server cannot record it, and wakes the key all the same.
    let report = report_of("gateway", "idle", 1);
    let status = wait::until("reports are not taken", SETTLED, || async {
        let (status, _) =
            http::post(other, "/v1/reports", inflight_stats::protocol::report::CONTENT_TYPE, report.clone())
                .await?;
        if status == 503 { Ok(status) } else { Err(status.to_string()) }
    })
    .await;
    assert_eq!(status, 503);
    wait::until("the key is woken", SETTLED, || async {
        if watching.is_finished() { Ok(()) } else { Err(()) }
    })
    .await;
    for address in [one, other] {
        assert!(http::get(address, "/readyz").await.is_ok());
        wait::until("the key is stale", SETTLED, || async {
            let text = http::get(address, "/v1/keys/ns/key").await?;
            let view: Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
            if view["stale"] == true || !view["stale_since"].is_null() { Ok(()) } else { Err(text) }
        })
        .await;
    }
    link.refuse(false);
    wait::until("reports are taken again", SETTLED, || async {
        let (status, _) =
            http::post(other, "/v1/reports", inflight_stats::protocol::report::CONTENT_TYPE, report.clone())
                .await?;
        if status == 202 { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
    pod.report(other, 5, 2).await;
    servers.agree("/v1/keys/ns/key", 20).await;
    servers.agree("/v1/keys/ns/idle", 1).await;
}

/// A gateway's report of one request of a key.
fn report_of(pod: &str, name: &str, requests: u64) -> bytes::Bytes {
    let since = inflight_stats::Snapshot { as_of_ns: 2_000_000_000, ..Default::default() };
    let until = inflight_stats::Snapshot { as_of_ns: 3_000_000_000, requests, in_flight: 1, ..since };
    let message = inflight_stats::KeyReport {
        namespace: "ns".into(),
        name: name.into(),
        from_gateway: true,
        since,
        until,
    };
    let report =
        inflight_stats::Report { version: 1, pod: pod.into(), incarnation: 1, messages: vec![message] };
    report.encode().expect("a report").into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_takes_passwords_and_certificates_and_begins_with_a_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let (authority, ca) = (Authority::new(), folder.path().join("ca.pem"));
    std::fs::write(&ca, &authority.pem).expect("a file");
    let [of_store, of_server] = ["store", "server"].map(|name| authority.issue(folder.path(), name));
    let redis = Redis::over_tls("secret", &of_store, &ca).await;
    let [password, settings] = ["password", "settings.json"].map(|name| folder.path().join(name));
    std::fs::write(&password, "secret\n").expect("a file");
    let seed = r#"[{"namespace": "ns", "name": "key", "settings": {"target": 12}}]"#;
    std::fs::write(&settings, seed).expect("a file");
    let path = |path: &std::path::Path| path.display().to_string();
    let (ca, certificate, key) = (path(&ca), path(&of_server.certificate), path(&of_server.key));
    let (password, settings) = (path(&password), path(&settings));
    let mut flags = vec!["--store-password-file", &password, "--store-tls-ca", &ca, "--settings", &settings];
    flags.extend(["--store-tls-cert", &certificate, "--store-tls-key", &key]);
    let servers = Servers::with(2, &redis.url().replace("redis://", "rediss://"), &flags).await;
    let target = |address, wanted: &'static str| async move {
        wait::until("the setting is there", SETTLED, || async {
            let text = http::get(address, "/v1/keys/ns/key/settings").await?;
            if text.contains(wanted) { Ok(()) } else { Err(text) }
        })
        .await;
    };
    for address in servers.addresses() {
        target(address, "\"target\":12").await;
    }
    let put = Request::put("/v1/keys/ns/key/settings").header("host", "x");
    let put = put.body(Full::from(r#"{"target": 3}"#)).expect("a request");
    assert_eq!(http::ask(servers.servers[1].address, put).await.expect("an answer").0, 200);
    for address in servers.addresses() {
        target(address, "\"target\":3").await;
    }
    let wrong = Request::put("/v1/keys/ns/key/settings").header("host", "x");
    let wrong = wrong.body(Full::from(r#"{"target": -3}"#)).expect("a request");
    assert_eq!(http::ask(servers.servers[1].address, wrong).await.expect("an answer").0, 400);
}
