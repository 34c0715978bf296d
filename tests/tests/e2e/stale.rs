//! No data is not zero traffic: what autoscalers are told while no report comes.

use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};

use futures_util::StreamExt;
use inflight_e2e::app::App;
use inflight_e2e::bootstrap::Bootstrap;
use inflight_e2e::envoy::{Envoy, Version};
use inflight_e2e::reports::send;
use inflight_e2e::statserver::StatServer;
use inflight_e2e::{http, wait};
use inflight_stats::{KeyReport, Report, Snapshot};
use serde_json::{Value, json};
use tokio::time::Interval;
use tonic::Code;
use tonic::transport::Channel;

use crate::autoscalers::proto::external_scaler_client::ExternalScalerClient;
use crate::autoscalers::proto::{GetMetricsRequest, ScaledObjectRef};

const SETTLED: Duration = Duration::from_secs(30);
const SECOND: u64 = 1_000_000_000;
const PODS: u32 = 5;
const CONCURRENCY: u32 = 60;
/// Windows are shortened. The silence is many times as long.
const FLAGS: [&str; 4] = ["--stable-window", "10s", "--drain-delay", "0s"];

/// Five pods with 60 requests in flight each, whose reports say since when, as the filter's do.
struct Pods {
    began: Instant,
    acknowledged: Vec<Snapshot>,
}

impl Pods {
    fn new() -> Self {
        let start = Snapshot { in_flight: CONCURRENCY, ..Snapshot::starting_at(SECOND) };
        Self { began: Instant::now(), acknowledged: vec![start; PODS as usize] }
    }

    async fn report(&mut self, server: SocketAddr, pods: std::ops::Range<usize>) {
        for pod in pods {
            let since = self.acknowledged[pod];
            let as_of_ns = SECOND + u64::try_from(self.began.elapsed().as_nanos()).expect("not so long");
            let elapsed = as_of_ns - since.as_of_ns;
            let until = Snapshot {
                as_of_ns,
                request_ns: since.request_ns + u128::from(elapsed) * u128::from(CONCURRENCY),
                requests: since.requests + elapsed / 100_000_000,
                ..since
            };
            let (namespace, name) = ("ns".into(), "rev".into());
            let messages = vec![KeyReport { namespace, name, from_gateway: false, since, until }];
            let report = Report { version: 1, pod: format!("pod-{pod}"), incarnation: 1, messages };
            send(server, &report).await;
            self.acknowledged[pod] = until;
        }
    }
}

/// What every autoscaler is told at one time.
#[derive(Debug)]
struct Said {
    key: Value,
    value: Result<f64, Code>,
    desired: Result<f64, Code>,
    active: Result<bool, Code>,
    prometheus: bool,
}

async fn said(server: &StatServer) -> Said {
    let mut client = ExternalScalerClient::<Channel>::connect(format!("http://{}", server.grpc))
        .await
        .expect("a connection");
    let object = |metric: &str| ScaledObjectRef {
        name: "rev".into(),
        namespace: "ns".into(),
        scaler_metadata: [("metric".into(), metric.into())].into(),
    };
    let mut value = async |metric| {
        let asked = GetMetricsRequest { scaled_object_ref: Some(object(metric)), metric_name: String::new() };
        let answer = client.get_metrics(asked).await;
        let answer = answer.map(|metrics| metrics.into_inner().metric_values[0].metric_value_float);
        answer.map_err(|status| status.code())
    };
    let (value, desired) = (value("concurrency").await, value("desired_pods").await);
    let spec = client.get_metric_spec(object("concurrency")).await;
    assert!(spec.is_ok(), "an error here yields no spec");
    let active = client.is_active(object("concurrency")).await.map(|answer| answer.into_inner().result);
    let metrics = http::get(server.address, "/metrics").await.expect("metrics");
    Said {
        key: server.key("ns", "rev").await.unwrap_or_default(),
        value,
        desired,
        active: active.map_err(|status| status.code()),
        prometheus: metrics.contains("inflight_statserver_key_stable_concurrency{"),
    }
}

/// Fails if what is said would scale five pods down.
fn assert_not_less(said: &Said) {
    let kept = |value: &Result<f64, Code>, least: f64| match value {
        Ok(value) => *value >= least,
        Err(code) => *code == Code::Unavailable,
    };
    // One pod takes 70: with more than 280 there are five of them.
    assert!(kept(&said.value, 280.1) && kept(&said.desired, 5.0), "{said:?}");
    assert!(matches!(said.active, Ok(true) | Err(Code::Unavailable)), "{said:?}");
    assert!(said.key.is_null() || said.key["desired_pods"].as_u64().is_none_or(|pods| pods >= 5), "{said:?}");
}

/// Ticks in the middle of each of the server's seconds, so that none is left out.
fn half_seconds() -> Interval {
    let unix_time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970");
    let to_half = Duration::from_millis(u64::from(1_500 - unix_time.subsec_millis()));
    tokio::time::interval_at(tokio::time::Instant::now() + to_half, Duration::from_secs(1))
}

async fn settle(server: &StatServer, pods: &mut Pods) {
    let deadline = Instant::now() + SETTLED;
    let mut ticks = half_seconds();
    loop {
        ticks.tick().await;
        pods.report(server.address, 0..PODS as usize).await;
        let now = said(server).await;
        assert_not_less(&now);
        if now.value.is_ok_and(|value| (value - 300.0).abs() < 10.0) && now.desired == Ok(5.0) {
            assert_eq!((&now.key["stale"], &now.key["missing"]), (&json!(false), &Value::Null));
            return;
        }
        assert!(Instant::now() < deadline, "{now:?}");
    }
}

#[tokio::test]
async fn reports_that_stop_under_load_scale_nothing_down_and_come_back_as_if_nothing_had_been() {
    let server = StatServer::with(None, &FLAGS).await;
    let mut pods = Pods::new();
    settle(&server, &mut pods).await;
    let mut client = ExternalScalerClient::connect(format!("http://{}", server.grpc)).await.expect("KEDA");
    let object = ScaledObjectRef { name: "rev".into(), namespace: "ns".into(), ..Default::default() };
    let mut pushed = client.stream_is_active(object).await.expect("a stream").into_inner();
    assert!(pushed.next().await.expect("at once").expect("at once").result);

    // To this window that is as long as five minutes to the default one.
    let silent = Instant::now();
    let mut stale = 0;
    while silent.elapsed() < Duration::from_secs(50) {
        let now = said(&server).await;
        assert_not_less(&now);
        assert_eq!(now.key["desired_pods"], 5, "the decision stays");
        if now.key["stale"] == true {
            assert_eq!(now.value, Err(Code::Unavailable), "{now:?}");
            assert_eq!(now.desired, Err(Code::Unavailable), "{now:?}");
            assert_eq!(now.active, Err(Code::Unavailable), "{now:?}");
            assert!(now.key["stale_since"].is_string() && now.key["missing"].is_string(), "{now:?}");
            assert!(!now.prometheus, "an HPA may ask there");
            stale += 1;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert!(stale > 20, "{stale}");

    // One comes back, then the others: not a pod less in between.
    let mut ticks = half_seconds();
    for second in 0..12 {
        ticks.tick().await;
        let back = if second < 5 { 1 } else { PODS as usize };
        pods.report(server.address, 0..back).await;
        let now = said(&server).await;
        assert_not_less(&now);
        assert_eq!((&now.key["stale"], &now.key["desired_pods"]), (&json!(false), &json!(5)), "{now:?}");
        if second > 5 {
            assert!(now.value.is_ok_and(|value| (value - 300.0).abs() < 40.0), "{now:?}");
        }
    }
    let more = tokio::time::timeout(Duration::from_millis(100), pushed.next()).await;
    assert!(more.is_err(), "the stream is open and had nothing to say");
}

#[tokio::test]
async fn a_restart_of_the_server_scales_nothing_down_either() {
    let mut server = StatServer::with(None, &FLAGS).await;
    let mut pods = Pods::new();
    settle(&server, &mut pods).await;
    server.process.signal(libc::SIGTERM);
    assert!(server.process.wait(SETTLED).success());
    let server = StatServer::with(Some(server.address), &FLAGS).await;
    for _ in 0..3 {
        let now = said(&server).await;
        let nothing = (now.value, now.desired, now.active);
        assert_eq!(nothing, (Err(Code::Unavailable), Err(Code::Unavailable), Err(Code::Unavailable)));
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    // Active with the first report, and with nothing less than the truth after it.
    pods.report(server.address, 0..1).await;
    assert_eq!(said(&server).await.active, Ok(true));
    settle(&server, &mut pods).await;
}

#[tokio::test]
async fn a_key_that_is_stale_for_too_long_is_unknown() {
    let server = StatServer::with(None, &[&FLAGS[..], &["--stale-after", "12s"]].concat()).await;
    let mut pods = Pods::new();
    settle(&server, &mut pods).await;
    let deadline = Duration::from_secs(40);
    let desired = async || server.key("ns", "rev").await.map(|key| key["desired_pods"].clone());
    wait::until_equal("desired pods", deadline, Some(Value::Null), desired).await;
    let now = said(&server).await;
    assert_eq!(now.key["stale"], false);
    assert_eq!(now.key["missing"], "its pods and gateways have been silent for too long");
    assert_eq!((now.value, now.active), (Err(Code::Unavailable), Err(Code::Unavailable)));
}

/// A gateway reports a key that is idle: that is a zero, but not before a stable window has passed.
#[tokio::test]
async fn zero_is_said_after_a_start_when_a_gateway_says_so_and_not_at_once() {
    let server = StatServer::with(None, &FLAGS).await;
    let idle = |second: u64| {
        let snapshot = |second: u64| Snapshot { as_of_ns: second * SECOND, ..Snapshot::starting_at(SECOND) };
        let (since, until) = (snapshot(second), snapshot(second + 1));
        let (namespace, name) = ("ns".into(), "rev".into());
        let messages = vec![KeyReport { namespace, name, from_gateway: true, since, until }];
        Report { version: 1, pod: "gateway".into(), incarnation: 1, messages }
    };
    let began = Instant::now();
    for second in 1.. {
        send(server.address, &idle(second)).await;
        let Said { value, desired, active, .. } = said(&server).await;
        if value.is_ok() {
            assert_eq!((value, desired, active), (Ok(0.0), Ok(0.0), Ok(false)));
            assert!(began.elapsed() > Duration::from_secs(9), "{:?}", began.elapsed());
            return;
        }
        assert_eq!((desired, active), (Err(Code::Unavailable), Err(Code::Unavailable)));
        assert!(began.elapsed() < SETTLED);
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// The filter's part: a gateway reports the keys that it knows although they are idle.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_an_idle_key_of_a_gateway_zero_is_said_within_a_minute_of_the_servers_restart() {
    for (version, workers) in [(Version::Oldest, 1), (Version::Newest, 4)] {
        let app = App::start().await;
        let mut server = StatServer::with(None, &FLAGS).await;
        let bootstrap = Bootstrap::gateway(app.address, server.address);
        let envoy = Envoy::start(version, &bootstrap, workers).await;
        for _ in 0..3 {
            http::get(envoy.address, "/work").await.expect("an answer");
        }
        wait::until_equal("requests", SETTLED, Some(3), || requests(&server)).await;
        server.process.signal(libc::SIGTERM);
        assert!(server.process.wait(SETTLED).success());
        let server = StatServer::with(Some(server.address), &FLAGS).await;
        let client =
            ExternalScalerClient::connect(format!("http://{}", server.grpc)).await.expect("a connection");
        let object =
            ScaledObjectRef { name: "hello-00001".into(), namespace: "default".into(), ..Default::default() };
        let began = Instant::now();
        wait::until("zero is said", Duration::from_secs(100), || {
            let (mut client, object) = (client.clone(), object.clone());
            async move {
                match client.is_active(object).await {
                    Ok(answer) if !answer.get_ref().result => Ok(()),
                    other => Err(format!("{other:?}")),
                }
            }
        })
        .await;
        println!("{version:?}: an idle key is zero {:?} after a restart", began.elapsed());
        let key = server.key("default", "hello-00001").await.expect("the key");
        assert_eq!((&key["requests_total"], &key["in_flight"]), (&json!(0), &json!(0)), "{key}");
        // It comes back as it does without that.
        let slow = tokio::spawn(http::get(envoy.address, "/work?ms=3000"));
        wait::until("the key is awake", SETTLED, || {
            let (mut client, object) = (client.clone(), object.clone());
            async move { client.is_active(object).await.ok().filter(|answer| answer.get_ref().result).ok_or(()) }
        })
        .await;
        assert!(!slow.is_finished(), "the first report, at its arrival");
        slow.await.expect("a client").expect("an answer");
        wait::until_equal("requests", SETTLED, Some(1), || requests(&server)).await;
    }
}

async fn requests(server: &StatServer) -> Option<u64> {
    server.key("default", "hello-00001").await?["requests_total"].as_u64()
}
