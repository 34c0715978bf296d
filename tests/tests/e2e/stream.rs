//! Knative's stat stream, in and out.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use http_body_util::Full;
use hyper::Request;
use inflight_e2e::reports::send;
use inflight_e2e::statserver::StatServer;
use inflight_e2e::{http, root, wait};
use prost::Message as _;
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, accept_async, connect_async};

const SETTLED: Duration = Duration::from_secs(20);

type Client = WebSocketStream<MaybeTlsStream<TcpStream>>;

async fn client(server: &StatServer, path: &str) -> Client {
    connect_async(format!("ws://{}{path}", server.address)).await.expect("a websocket").0
}

/// Returns the hex and the JSON of each line of a file of vectors.
fn vectors(name: &str) -> Vec<(Vec<u8>, Value)> {
    let path = root().join("src/stats/vectors").join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let digit = |c: u8| u8::try_from(char::from(c).to_digit(16).expect("hex")).expect("a digit");
    let unhex =
        |hex: &str| hex.as_bytes().chunks(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect();
    text.lines()
        .map(|line| {
            let (hex, json) = line.split_once('\t').expect("two columns");
            (unhex(hex), serde_json::from_str(json).expect("JSON"))
        })
        .collect()
}

/// Adds up the vectors by key: the requests without the proxied ones.
fn expected(frames: &[(Vec<u8>, Value)], count: &str, proxied: &str, sums: &mut BTreeMap<String, f64>) {
    for message in frames.iter().flat_map(|(_, json)| match json {
        Value::Array(messages) => messages.clone(),
        one => vec![one.clone()],
    }) {
        let (key, stat) = (&message["Key"], &message["Stat"]);
        let name = |field: &str| key[field].as_str().unwrap_or_default().to_owned();
        let number = |field: &str| stat[field].as_f64().unwrap_or_default();
        // A key without a namespace is not accepted.
        if !name("Namespace").is_empty() {
            let sum = sums.entry(format!("{}/{}", name("Namespace"), name("Name"))).or_default();
            *sum += number(count) - number(proxied);
        }
    }
}

async fn totals(server: &StatServer) -> BTreeMap<String, f64> {
    let text = http::get(server.address, "/v1/keys").await.expect("keys");
    let keys: Value = serde_json::from_str(&text).expect("JSON");
    let text = |key: &Value, field: &str| key[field].as_str().expect("a string").to_owned();
    let keys = keys["keys"].as_array().expect("a list").iter();
    keys.map(|key| {
        let name = format!("{}/{}", text(key, "namespace"), text(key, "name"));
        (name, key["requests_total"].as_f64().expect("a number"))
    })
    .collect()
}

async fn metric(server: &StatServer, name: &str) -> f64 {
    let text = http::get(server.address, "/metrics").await.expect("metrics");
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|value| value.trim().parse().ok()).unwrap_or(0.0)
}

fn stat_frame(namespace: &str, name: &str, pod: &str, requests: f64) -> Message {
    use inflight_stats::protocol::stat::{Stat, WireStatMessage, WireStatMessages};
    let bytes = |text: &str| text.as_bytes().to_vec().into();
    let stat = Stat {
        pod_name: bytes(pod),
        average_concurrent_requests: 1.0,
        request_count: requests,
        ..Stat::default()
    };
    let message = WireStatMessage { namespace: bytes(namespace), name: bytes(name), stat: Some(stat) };
    Message::Binary(WireStatMessages { messages: vec![message] }.encode_to_vec().into())
}

#[tokio::test]
async fn every_vector_arrives_by_protobuf_and_by_gob_and_what_is_neither_is_dropped() {
    let server = StatServer::start(None).await;
    let mut client = client(&server, "/any/path").await;
    let (wire, gob) = (vectors("wire_stat_messages.tsv"), vectors("gob_stat_message.tsv"));
    for (frame, _) in wire.iter().chain(&gob) {
        client.send(Message::Binary(frame.clone().into())).await.expect("sent");
        // In between, frames that have to be dropped without an answer to the client.
        client.send(Message::Text("text".into())).await.expect("sent");
        client.send(Message::Binary(frame[..frame.len() * 2 / 3].to_vec().into())).await.expect("sent");
    }
    client.send(Message::Ping(b"there?"[..].into())).await.expect("sent");
    let pong = client.next().await.expect("an answer").expect("a frame");
    assert_eq!(pong, Message::Pong(b"there?"[..].into()), "answered, on the same connection");

    let mut sums = BTreeMap::new();
    expected(&wire, "request_count", "proxied_request_count", &mut sums);
    expected(&gob, "RequestCount", "ProxiedRequestCount", &mut sums);
    sums.values_mut().for_each(|sum| *sum = sum.max(0.0));
    wait::until_equal("the totals", SETTLED, sums, || totals(&server)).await;
    let dropped = "inflight_statserver_stream_frames_dropped_total{reason=";
    assert_eq!(metric(&server, &format!("{dropped}\"Text\"}}")).await, 48.0);
    // Two thirds of an empty frame are an empty frame, which decodes.
    let empty = wire.iter().filter(|(frame, _)| frame.is_empty()).count() as f64;
    assert_eq!(metric(&server, &format!("{dropped}\"Undecodable\"}}")).await, 48.0 - empty);
    let lines = server.process.log().matches("dropped a frame").count();
    assert!((1..=20).contains(&lines), "logged at most once a second: {lines} lines");
}

#[tokio::test]
async fn at_its_end_every_client_is_told_to_connect_again() {
    let mut server = StatServer::start(None).await;
    let mut clients = Vec::new();
    for _ in 0..20 {
        clients.push(client(&server, "/").await);
    }
    // One client that never reads, and one that only opened a connection.
    let _mute = client(&server, "/").await;
    let _idle = TcpStream::connect(server.address).await.expect("a connection");
    let probe = Request::get("/").header("host", "x").header("k-kubelet-probe", "1");
    let probe = http::ask(server.address, probe.body(Full::default()).expect("a request")).await;
    assert_eq!(probe.expect("an answer").0, 200);
    server.process.signal(libc::SIGTERM);
    for mut client in clients {
        match client.next().await.expect("a frame").expect("a frame") {
            Message::Close(Some(frame)) => {
                assert_eq!((u16::from(frame.code), frame.reason.as_str()), (1012, "Restarting"));
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(server.process.wait(Duration::from_secs(30)).success());
}

/// Returns the head of a masked frame of `length` bytes.
fn head(opcode: u8, length: u64) -> Vec<u8> {
    let mut head = vec![0x80 | opcode, 0x80 | 127];
    head.extend(length.to_be_bytes());
    head.extend([0; 4]);
    head
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_hostile_clients_take_bounded_memory_and_nothing_from_the_others() {
    const EACH: usize = 250;
    const HALF: usize = 200 << 10;
    let server = StatServer::start(None).await;
    let mut good = client(&server, "/").await;
    let before = server.process.resident_bytes();
    let mut held = Vec::new();
    let mut writing = tokio::task::JoinSet::new();
    for _ in 0..EACH {
        held.push(http::websocket(server.address).await);

        let mut half = http::websocket(server.address).await;
        half.write_all(&head(2, 2 * HALF as u64)).await.expect("sent");
        half.write_all(&vec![0; HALF]).await.expect("sent");
        held.push(half);

        let mut huge = http::websocket(server.address).await;
        writing.spawn(async move {
            // Writes until the server closes the connection.
            if huge.write_all(&head(2, 100 << 20)).await.is_ok() {
                let chunk = vec![0; 64 << 10];
                for _ in 0..(100 << 20) / chunk.len() {
                    if huge.write_all(&chunk).await.is_err() {
                        return true;
                    }
                }
            }
            false
        });

        let mut mute = http::websocket(server.address).await;
        writing.spawn(async move {
            // Requests answers that it never reads.
            let ping = [vec![0x89, 0x80 | 125, 0, 0, 0, 0], vec![7; 125]].concat().repeat(100);
            for _ in 0..200 {
                if !matches!(
                    tokio::time::timeout(Duration::from_secs(1), mute.write_all(&ping)).await,
                    Ok(Ok(()))
                ) {
                    break;
                }
            }
            held_open(mute).await
        });
    }
    let mut refused = 0;
    while refused < EACH {
        refused += usize::from(writing.join_next().await.expect("a client").expect("no panic"));
        let grown = server.process.resident_bytes().saturating_sub(before);
        assert!(grown < 256 << 20, "{} MiB", grown >> 20);
    }
    for _ in 0..50 {
        good.send(stat_frame("ns", "good", "pod", 2.0)).await.expect("sent");
    }
    wait::until_equal("the good one's requests", SETTLED, 100, || {
        server.number("ns", "good", "requests_total")
    })
    .await;
    let too_large = "inflight_statserver_stream_frames_dropped_total{reason=\"TooLarge\"}";
    wait::until_equal("frames refused", SETTLED, EACH as f64, || metric(&server, too_large)).await;
    let grown = server.process.resident_bytes().saturating_sub(before) >> 20;
    println!("1,000 hostile clients: {grown} MiB more, 750 of them still there");
    assert!(grown < 256, "{grown} MiB");
    drop((held, writing));
    wait::until_equal("streams", SETTLED, 1.0, || metric(&server, "inflight_statserver_streams")).await;
}

/// Keeps a connection open for as long as its task runs.
async fn held_open(_stream: TcpStream) -> bool {
    std::future::pending().await
}

/// Stands in for Knative's autoscaler: accepts one connection.
pub async fn autoscaler(listener: &TcpListener) -> WebSocketStream<TcpStream> {
    accept_async(listener.accept().await.expect("a connection").0).await.expect("a websocket")
}

#[tokio::test]
async fn the_first_request_of_a_key_reaches_an_autoscaler_with_an_average_above_zero() {
    use inflight_stats::protocol::stat::WireStatMessages;
    use inflight_stats::{KeyReport, Report, Snapshot};
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("ws://{}/", listener.local_addr().expect("an address"));
    let server = StatServer::with(None, &["--forward", &url]).await;
    let mut autoscaler = autoscaler(&listener).await;
    let second = 1_000_000_000;
    let begins = Snapshot::starting_at(5 * second);
    let next = Snapshot {
        as_of_ns: 6 * second,
        requests: 3,
        request_ns: 5_u128 * 500_000_000,
        ..Snapshot::default()
    };
    // A gateway's report of the first request, which has no length, and the one of its next tick.
    for (until, expected) in [(Snapshot { in_flight: 1, ..begins }, (1.0, 1.0)), (next, (1.5, 2.0))] {
        let message = KeyReport {
            namespace: "ns".into(),
            name: "rev".into(),
            from_gateway: true,
            since: begins,
            until,
        };
        let report = Report { version: 1, pod: "gateway".into(), incarnation: 1, messages: vec![message] };
        send(server.address, &report).await;
        let frame = tokio::time::timeout(SETTLED, autoscaler.next()).await.expect("a frame in time");
        let frame = frame.expect("a frame").expect("a frame").into_data();
        let messages = WireStatMessages::decode(frame).expect("protobuf").messages;
        let stats: Vec<(f64, f64)> = messages
            .into_iter()
            .filter_map(|message| message.stat)
            .map(|stat| (stat.average_concurrent_requests, stat.request_count))
            .collect();
        assert_eq!(stats, [expected]);
    }
}

#[tokio::test]
async fn every_stat_goes_on_to_an_autoscaler_also_when_that_was_away() {
    use inflight_stats::protocol::stat::WireStatMessages;
    use inflight_stats::{KeyReport, Report, Snapshot};
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("ws://{}/", listener.local_addr().expect("an address"));
    let server = StatServer::with(None, &["--forward", &url]).await;
    let mut source = client(&server, "/").await;
    let (mut sent, mut received) = (0.0, 0.0);
    let second = 1_000_000_000;
    for connection in 1..=2 {
        let mut autoscaler = autoscaler(&listener).await;
        for _ in 0..100 {
            source.send(stat_frame("ns", "streamed", "activator-1", 3.0)).await.expect("sent");
            sent += 3.0;
        }
        // A report of four seconds is forwarded as one stat for each of these seconds.
        let since = Snapshot::starting_at(second);
        let until = Snapshot {
            as_of_ns: 5 * second,
            requests: 20,
            proxied_requests: 8,
            request_ns: u128::from(12 * second),
            proxied_request_ns: u128::from(4 * second),
            ..Snapshot::default()
        };
        let message =
            KeyReport { namespace: "ns".into(), name: "reported".into(), from_gateway: false, since, until };
        let report =
            Report { version: 1, pod: "pod".into(), incarnation: connection, messages: vec![message] };
        send(server.address, &report).await;
        let mut reported = None;
        while received < sent || reported.is_none() {
            let frame = tokio::time::timeout(SETTLED, autoscaler.next()).await.expect("a frame in time");
            let frame = frame.expect("a frame").expect("a frame").into_data();
            for message in WireStatMessages::decode(frame).expect("protobuf").messages {
                let stat = message.stat.expect("a stat");
                match &message.name[..] {
                    b"streamed" => received += stat.request_count,
                    b"reported" => reported = Some(stat),
                    other => panic!("{other:?}"),
                }
            }
        }
        let stat = reported.expect("the report");
        assert_eq!(
            (&stat.pod_name[..], stat.request_count, stat.proxied_request_count),
            (&b"pod"[..], 5.0, 2.0)
        );
        assert_eq!((stat.average_concurrent_requests, stat.average_proxied_concurrent_requests), (3.0, 1.0));
        assert_eq!(received, sent);
        // The autoscaler ends without a close; messages wait until it is back.
        drop(autoscaler);
        wait::until_equal("connected", SETTLED, 0.0, || {
            metric(&server, "inflight_statserver_forward_connected")
        })
        .await;
    }
    assert_eq!(metric(&server, "inflight_statserver_forward_dropped_stats_total").await, 0.0);
    let mut autoscaler = autoscaler(&listener).await;
    autoscaler.close(None).await.expect("closed");
    wait::until_equal("connected", SETTLED, 0.0, || metric(&server, "inflight_statserver_forward_connected"))
        .await;
    drop(listener);
    // More messages than the queue holds. The oldest are dropped and counted.
    for _ in 0..110 {
        let WireStatMessages { messages } =
            WireStatMessages::decode(stat_frame("ns", "streamed", "activator-1", 1.0).into_data())
                .expect("one");
        let frame = WireStatMessages { messages: messages.into_iter().cycle().take(1_000).collect() };
        source.send(Message::Binary(frame.encode_to_vec().into())).await.expect("sent");
    }
    wait::until_equal("dropped", SETTLED, 10_000.0, || {
        metric(&server, "inflight_statserver_forward_dropped_stats_total")
    })
    .await;
}
