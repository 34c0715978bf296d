//! Every limit of the stats server. A client over a limit gets an answer that says so, and is
//! counted under the flag's name.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http_body_util::Full;
use hyper::Request;
use inflight_e2e::statserver::StatServer;
use inflight_e2e::{http, wait};
use inflight_stats::protocol::report::CONTENT_TYPE;
use inflight_stats::protocol::stat::{Stat, WireStatMessage, WireStatMessages};
use inflight_stats::{KeyReport, Report, Snapshot};
use prost::Message as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::connect_async;
use tokio_tungstenite::tungstenite::Message;

use crate::autoscalers::proto;

const SETTLED: Duration = Duration::from_secs(20);

fn report(pod: &str, names: &[&str]) -> Bytes {
    let message = |name: &&str| KeyReport {
        namespace: "ns".into(),
        name: (*name).into(),
        from_gateway: false,
        since: Snapshot::starting_at(1_000_000_000),
        until: Snapshot { as_of_ns: 2_000_000_000, requests: 1, ..Snapshot::default() },
    };
    let messages = names.iter().map(message).collect();
    Report { version: 1, pod: pod.into(), incarnation: 1, messages }.encode().expect("a report").into()
}

fn frame(stats: usize, padding: usize) -> Message {
    let stat = Stat { pod_name: "pod".into(), request_count: 1.0, ..Stat::default() };
    let name = format!("a{}", "-".repeat(padding)).into_bytes().into();
    let message = WireStatMessage { namespace: "ns".into(), name, stat: Some(stat) };
    Message::Binary(WireStatMessages { messages: vec![message; stats] }.encode_to_vec().into())
}

/// Writes bytes on a connection. Returns the whole answer, up to the end of the connection.
async fn raw(to: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(to).await.expect("a connection");
    stream.write_all(bytes).await.expect("sent");
    let mut answer = Vec::new();
    let ended = tokio::time::timeout(SETTLED, stream.read_to_end(&mut answer)).await;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    assert!(ended.is_ok(), "still open after {answer:?}");
    answer
}

/// Returns how often each limit was reached, from the server's metrics.
fn refused(text: &str) -> BTreeMap<String, u64> {
    let lines =
        text.lines().filter_map(|line| line.strip_prefix("inflight_statserver_refused_total{limit=\""));
    lines
        .map(|line| {
            let (limit, count) = line.split_once("\"} ").expect("a sample");
            (limit.to_owned(), count.parse().expect("a number"))
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_goes_beyond_a_limit_is_told_so_and_counted() {
    let flags = [
        "--max-connections=5",
        "--max-head-bytes=8192",
        "--head-timeout=1s",
        "--body-timeout=1s",
        "--max-report-bytes=1024",
        "--max-frame-bytes=2048",
        "--max-settings-bytes=256",
        "--max-grpc-bytes=1024",
        "--max-grpc-streams=2",
        "--max-messages=2",
        "--max-depth=2",
        "--max-keys-per-namespace=2",
        "--max-pods-per-key=2",
    ];
    let server = StatServer::with(None, &flags).await;
    let to = server.address;
    let post = async |body| http::post(to, "/v1/reports", CONTENT_TYPE, body).await.expect("an answer");
    let put = async |json: String| {
        let request = Request::put("/v1/keys/ns/a/settings").header("host", "test");
        let request = request.body(Full::new(Bytes::from(json))).expect("a request");
        let (status, body) = http::ask(to, request).await.expect("an answer");
        (status.as_u16(), String::from_utf8_lossy(&body).into_owned())
    };
    let metrics = http::get(to, "/metrics").await.expect("metrics");
    assert!(refused(&metrics).values().all(|count| *count == 0), "all are there from the beginning");
    assert_eq!(post(report("one", &["a", "b"])).await.0, 202);

    let (status, reason) = post(report("one", &["a", "b", "c"])).await;
    assert!(
        status == 413 && reason.contains("3 keys; expected at most 2 (--max-messages)"),
        "{status} {reason}"
    );
    let (status, reason) = post(report("one", &["c"])).await;
    assert!(status == 507 && reason.contains("namespace ns has 2 keys"), "{status} {reason}");
    assert_eq!(post(report("two", &["a"])).await.0, 202);
    let (status, reason) = post(report("three", &["a"])).await;
    assert!(status == 507 && reason.contains("key ns/a has 2 pods"), "{status} {reason}");
    let (status, reason) =
        post(report(&"long".repeat(100), &[&"long".repeat(100), &"name".repeat(100)])).await;
    assert!(status == 413 && reason.contains("--max-report-bytes"), "{status} {reason}");
    let (status, reason) = put(format!("{{\"target\": 1{}}}", " ".repeat(300))).await;
    assert!(status == 413 && reason.contains("--max-settings-bytes"), "{status} {reason}");
    let (status, reason) = put("{\"target\": [[1]]}".into()).await;
    assert!(status == 400 && reason.contains("--max-depth"), "{status} {reason}");

    let head = "POST /v1/reports HTTP/1.1\r\nhost: x\r\n";
    let answer = raw(to, format!("{head}x-long: {}\r\n\r\n", "x".repeat(20_000)).as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    let answer = raw(to, head.as_bytes()).await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 408 "), "{answer}");
    let answer = raw(to, format!("{head}content-length: 100\r\n\r\nhalf").as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("--body-timeout"), "{answer}");
    // Over gRPC a silent connection is closed, too. The server first sends the beginning of HTTP/2.
    raw(server.grpc, b"").await;

    let (mut stream, _) = connect_async(format!("ws://{to}/")).await.expect("a websocket");
    stream.send(frame(3, 0)).await.expect("sent");
    stream.send(frame(1, 0)).await.expect("sent");
    stream.send(frame(2, 1_500)).await.expect("sent");
    match stream.next().await.expect("a frame").expect("a frame") {
        Message::Close(Some(close)) => assert_eq!(u16::from(close.code), 1009),
        other => panic!("{other:?}"),
    }
    drop(stream);

    let client =
        proto::external_scaler_client::ExternalScalerClient::connect(format!("http://{}", server.grpc));
    let mut client = client.await.expect("a channel");
    let asked =
        proto::ScaledObjectRef { name: "a".repeat(2_000), namespace: "ns".into(), ..Default::default() };
    let status = client.is_active(asked).await.expect_err("too large");
    assert_eq!(status.code(), tonic::Code::OutOfRange, "{status:?}");

    // The unary call is over, so two streams are accepted. A third is accepted when one of them has
    // ended.
    let asked = || proto::ScaledObjectRef { name: "a".into(), namespace: "ns".into(), ..Default::default() };
    let first = client.stream_is_active(asked()).await.expect("a stream");
    let second = client.stream_is_active(asked()).await.expect("a stream");
    let status = client.stream_is_active(asked()).await.expect_err("too many");
    assert_eq!(status.code(), tonic::Code::ResourceExhausted, "{status:?}");
    assert!(status.message().contains("--max-grpc-streams"), "{status:?}");
    drop(first);
    wait::until("a place is free", SETTLED, || {
        let mut client = client.clone();
        async move { client.stream_is_active(asked()).await.map_err(|status| status.to_string()) }
    })
    .await;
    drop(second);

    // These connections are silent, so they are closed after a second. Until then no other client
    // gets in.
    let mut open = Vec::new();
    let full = loop {
        let mut stream = TcpStream::connect(to).await.expect("a connection");
        let mut answer = Vec::new();
        let closed = tokio::time::timeout(Duration::from_millis(100), stream.read_to_end(&mut answer)).await;
        if closed.is_ok() && !answer.is_empty() {
            break String::from_utf8_lossy(&answer).into_owned();
        }
        open.push(stream);
        assert!(open.len() < 100, "more than five places");
    };
    assert!(full.starts_with("HTTP/1.1 503 ") && full.contains("--max-connections"), "{full}");

    // As soon as one of them has timed out, there is capacity again.
    let counts = wait::until("a place is free", SETTLED, || async {
        http::get(to, "/metrics").await.map(|metrics| refused(&metrics))
    })
    .await;
    let once = |limit: &str| counts.get(limit).copied();
    for limit in [
        "head-bytes",
        "report-bytes",
        "frame-bytes",
        "settings-bytes",
        "grpc-bytes",
        "depth",
        "keys-per-namespace",
    ] {
        assert_eq!(once(&format!("max-{limit}")), Some(1), "{limit} in {counts:?}");
    }
    assert_eq!(once("max-messages"), Some(2), "a report and a frame: {counts:?}");
    assert_eq!(once("body-timeout"), Some(1), "{counts:?}");
    assert!(once("max-pods-per-key") >= Some(1), "{counts:?}");
    assert!(once("max-grpc-streams") >= Some(1), "{counts:?}");
    assert!(once("head-timeout") >= Some(2), "{counts:?}");
    assert!(once("max-connections") >= Some(1), "{counts:?}");
    assert_eq!(counts.len(), 20, "{counts:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_clients_than_connections_are_all_heard() {
    let server = StatServer::with(None, &["--max-connections=3"]).await;
    let mut connections = Vec::new();
    for number in 0..10 {
        let mut connection = http::Connection::open(server.address).await.expect("a connection");
        let request =
            Request::post("/v1/reports").header("host", "test").header("content-type", CONTENT_TYPE);
        let body = Full::new(report(&format!("pod-{number}"), &["a"]));
        let status = connection.ask(request.body(body).expect("a request")).await;
        assert_eq!(status.expect("an answer"), 202, "{number}");
        // The connection stays open, as an Envoy's does.
        connections.push(connection);
    }
    assert_eq!(server.number("ns", "a", "pods").await, 10);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_and_their_pods_take_no_more_memory_than_they_may() {
    const MIB: u64 = 1 << 20;
    let flags = ["--max-keys=5000", "--max-table-bytes=33554432"];
    let server = StatServer::with(None, &flags).await;
    let before = server.process.resident_bytes();
    let mut connection = http::Connection::open(server.address).await.expect("a connection");
    let mut post = async |pod: &str, keys: std::ops::Range<usize>| {
        let names: Vec<String> = keys.map(|number| format!("service-{number:06}-00001")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let body = report(pod, &names);
        let request =
            Request::post("/v1/reports").header("host", "test").header("content-type", CONTENT_TYPE);
        connection.ask(request.body(Full::new(body)).expect("a request")).await.expect("an answer")
    };
    // The largest number of keys, then pods that report them.
    for thousand in 0..5 {
        assert_eq!(post("pod", thousand * 1_000..(thousand + 1) * 1_000).await, 202);
    }
    assert_eq!(post("pod", 5_000..5_001).await, 507);
    let mut pods = 0;
    while post(&format!("pod-{pods}"), 0..1_000).await == 202 {
        pods += 1;
    }
    let grown = server.process.resident_bytes().saturating_sub(before);
    println!("5,000 keys and {pods},000 pods: {} MiB more, of 32 allowed", grown / MIB);
    assert!((20..200).contains(&pods), "{pods}");
    // In addition, the history of 2,000 keys takes 16 MiB, and the buffers for reports take some
    // memory.
    assert!(grown < (32 + 16 + 8) * MIB, "{grown}");
    let metrics = http::get(server.address, "/metrics").await.expect("metrics");
    let counts = refused(&metrics);
    assert_eq!((counts["max-keys"], counts["max-table-bytes"]), (1, 1), "{counts:?}");
    // A known pod can still report.
    assert_eq!(post("pod-0", 0..1_000).await, 202);
}

#[tokio::test]
async fn who_is_refused_is_told_why_and_logged() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("tokens");
    std::fs::write(&file, "reporter-of-ns-0123 ns\n").expect("written");
    let server = StatServer::with(None, &["--token-file", file.to_str().expect("a path")]).await;
    let ask = async |token: Option<&str>| {
        let mut request = Request::post("/v1/reports").header("host", "test");
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let request = request.body(Full::new(report("pod", &["a"]))).expect("a request");
        let (status, body) = http::ask(server.address, request).await.expect("an answer");
        (status.as_u16(), String::from_utf8_lossy(&body).into_owned())
    };
    for _ in 0..5 {
        assert_eq!(ask(None).await, (401, "no bearer token\n".into()));
        assert_eq!(ask(Some("reporter-of-ns-0124")).await, (401, "unknown bearer token\n".into()));
    }
    assert_eq!(ask(Some("reporter-of-ns-0123")).await.0, 202);
    let log = server.process.log();
    let refused: Vec<&str> = log.lines().filter(|line| line.contains("refused a caller")).collect();
    // The others of this minute are counted at its end.
    assert_eq!(refused.len(), 2, "{log}");
    for (line, reason) in refused.iter().zip(["no bearer token", "unknown bearer token"]) {
        assert!(line.contains("127.0.0.1") && line.contains(reason), "{line}");
    }
    assert!(!log.contains("reporter-of-ns"), "no secret: {log}");
}
