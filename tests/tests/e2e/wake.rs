//! From zero: the first request of an idle key at a real gateway, until both autoscalers want a
//! pod.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use http_body_util::Full;
use hyper::Request;
use inflight_e2e::app::App;
use inflight_e2e::bootstrap::Bootstrap;
use inflight_e2e::envoy::{Envoy, Version};
use inflight_e2e::statserver::StatServer;
use inflight_e2e::{http, wait};
use inflight_stats::protocol::stat::{Stat, WireStatMessages};
use prost::Message as _;
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_tungstenite::WebSocketStream;

use crate::stream::autoscaler;

const SETTLED: Duration = Duration::from_secs(30);

/// The stats that an autoscaler received: when, of which key, and what.
type Received = Arc<Mutex<Vec<(Instant, String, Stat)>>>;

/// Collects what an autoscaler is sent.
fn collect(mut autoscaler: WebSocketStream<TcpStream>) -> (Received, JoinHandle<()>) {
    let received = Received::default();
    let collected = Arc::clone(&received);
    let task = tokio::spawn(async move {
        while let Some(Ok(frame)) = autoscaler.next().await {
            let at = Instant::now();
            let frame = WireStatMessages::decode(frame.into_data()).expect("protobuf");
            let stats = frame.messages.into_iter().map(|message| {
                let name = String::from_utf8_lossy(&message.name).into_owned();
                (at, name, message.stat.expect("a stat"))
            });
            collected.lock().expect("no panic under this lock").extend(stats);
        }
    });
    (received, task)
}

/// Returns the stats of a key that were received after an instant.
fn stats_since(received: &Received, name: &str, since: Instant) -> Vec<(Instant, Stat)> {
    let received = received.lock().expect("no panic under this lock");
    let of_key = received.iter().filter(|(at, key, _)| key == name && *at >= since);
    of_key.map(|(at, _, stat)| (*at, stat.clone())).collect()
}

fn request(name: &str) -> Request<Full<Bytes>> {
    let request =
        Request::get("/work?ms=300").header("host", "app").header("knative-serving-namespace", "ns");
    request.header("knative-serving-revision", name).body(Full::default()).expect("a request")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_request_of_an_idle_key_reaches_both_autoscalers_at_once() {
    for version in [Version::Oldest, Version::Newest] {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("ws://{}/", listener.local_addr().expect("an address"));
        let app = App::start().await;
        let server = StatServer::with(None, &["--forward", &url, "--stable-window", "6s"]).await;
        let (received, collecting) = collect(autoscaler(&listener).await);
        let mut bootstrap = Bootstrap::gateway(app.address, server.address);
        bootstrap.configure("gateway", json!({"key": {"from": "headers"}}));
        let envoy = Envoy::start(version, &bootstrap, 2).await;
        let began = Instant::now();
        let names: Vec<String> = (0..20).map(|number| format!("rev-{number}")).collect();
        for name in &names {
            let answer = http::ask(envoy.address, request(name)).await;
            assert_eq!(answer.expect("an answer").0, 200);
        }
        for name in &names {
            wait::until_equal("desired pods of an idle key", SETTLED, Some(0), async || {
                server.key("ns", name).await?["desired_pods"].as_u64()
            })
            .await;
        }
        let (mut wanted, mut forwarded) = (Vec::new(), Vec::new());
        for name in &names {
            let sent = Instant::now();
            let answer = tokio::spawn(http::ask(envoy.address, request(name)));
            let until_wanted = async {
                while server.number("ns", name, "desired_pods").await == 0 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                sent.elapsed()
            };
            wanted.push(tokio::time::timeout(SETTLED, until_wanted).await.expect("a pod is wanted"));
            let (at, first) = wait::until("the first stat is forwarded", SETTLED, || async {
                stats_since(&received, name, sent).first().cloned().ok_or("none")
            })
            .await;
            assert!(first.average_concurrent_requests > 0.0, "{first:?}");
            forwarded.push(at - sent);
            assert_eq!(answer.await.expect("the client").expect("an answer").0, 200);
        }
        // What was said early is not said again.
        for name in &names {
            wait::until("the request has ended", SETTLED, async || {
                let key = server.key("ns", name).await.ok_or_else(|| "no key".to_owned())?;
                let is_over = key["requests_total"] == 2 && key["in_flight"] == 0;
                if is_over { Ok(()) } else { Err(key.to_string()) }
            })
            .await;
        }
        for name in &names {
            let stats = stats_since(&received, name, began);
            let requests: f64 = stats.iter().map(|(_, stat)| stat.request_count).sum();
            // Less than 2, if a worker stood still: of longer reports the average is forwarded.
            assert!(requests <= 2.0, "{stats:?}");
        }
        wanted.sort();
        forwarded.sort();
        println!(
            "{version:?}: a pod is wanted {:?} after the first request of an idle key (median of 20), at most \
             {:?}; forwarded after {:?}, at most {:?}",
            wanted[10], wanted[19], forwarded[10], forwarded[19]
        );
        collecting.abort();
    }
}
