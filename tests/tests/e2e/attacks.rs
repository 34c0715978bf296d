//! The resources, above all the memory, that a client can take from the stats server merely by
//! reaching it. SECURITY.md has the table.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt, stream};
use http_body_util::{Full, StreamBody};
use hyper::Request;
use hyper::body::Frame;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use inflight_e2e::process::resident_bytes;
use inflight_e2e::statserver::StatServer;
use inflight_e2e::tls::Authority;
use inflight_e2e::{http, wait};
use inflight_stats::protocol::report::CONTENT_TYPE;
use inflight_stats::protocol::stat::{Stat, WireStatMessage, WireStatMessages};
use inflight_stats::{KeyReport, Report, Snapshot};
use prost::Message as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::connect_async;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

use crate::autoscalers::proto::ScaledObjectRef;
use crate::autoscalers::proto::external_scaler_client::ExternalScalerClient;

const SETTLED: Duration = Duration::from_secs(30);
const MIB: u64 = 1 << 20;
const TOKEN: &str = "valid-token-0123456789";
const METHOD: &str = "/externalscaler.ExternalScaler/GetMetricSpec";
/// The time within which the memory that an attack took is free again.
const BACK: Duration = Duration::from_secs(60);

/// The largest memory of a server while something happens.
struct Peak {
    most: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
}

impl Peak {
    fn watch(server: &StatServer) -> Self {
        let (id, most, over) = (server.process.id(), Arc::default(), Arc::new(AtomicBool::new(false)));
        let peak = Self { most: Arc::clone(&most), over: Arc::clone(&over) };
        std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                most.fetch_max(resident_bytes(id).unwrap_or(0), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        peak
    }

    fn mib(&self) -> u64 {
        self.most.load(Ordering::Relaxed) / MIB
    }
}

impl Drop for Peak {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

/// Runs one attack. Its result is what it leaves open. It may take at most `most` MiB, and the
/// memory must be free again afterwards.
async fn attack<T>(server: &StatServer, what: &str, most: u64, attack: impl Future<Output = T>) {
    let before = server.process.resident_bytes() / MIB;
    let peak = Peak::watch(server);
    let open = attack.await;
    // By now the server has read what was sent: it answers another client.
    assert!(http::get(server.address, "/healthz").await.is_ok(), "{what}");
    let held = peak.mib();
    drop(open);
    let after = wait::until(&format!("the memory of {what} is back"), BACK, || async {
        let now = server.process.resident_bytes() / MIB;
        if now <= before + 8 { Ok(now) } else { Err(format!("{now} MiB, {before} before")) }
    })
    .await;
    let most_seen = peak.mib();
    println!(
        "{what}: {before} MiB before, {most_seen} at the most ({held} when all was sent), {after} after"
    );
    assert!(most_seen <= before + most, "{what}: {most_seen} MiB, {before} before, {most} more are allowed");
}

/// Writes a file of tokens, with one token that grants everything.
fn tokens() -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("tokens");
    std::fs::write(&file, format!("{TOKEN} * admin\n")).expect("a file");
    let flag = format!("--token-file={}", file.display());
    (folder, flag)
}

/// Opens connections and writes the same bytes on each, as far as the server accepts them.
async fn connections(to: SocketAddr, count: usize, bytes: Vec<u8>) -> Vec<TcpStream> {
    let bytes = Bytes::from(bytes);
    let one = |_| {
        let bytes = bytes.clone();
        async move {
            let mut stream = timeout(Duration::from_secs(2), TcpStream::connect(to)).await.ok()?.ok()?;
            let _ = timeout(Duration::from_secs(1), stream.write_all(&bytes)).await;
            Some(stream)
        }
    };
    stream::iter(0..count).map(one).buffer_unordered(100).filter_map(std::future::ready).collect().await
}

/// Returns a frame of HTTP/2.
fn h2_frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a length").to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Returns the beginning of an HTTP/2 client's connection, with one setting or none.
fn h2_preface(settings: &[u8]) -> Vec<u8> {
    [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &h2_frame(4, 0, 0, settings)[..]].concat()
}

/// Returns the head of a call, without indexing.
fn h2_head(stream: u32) -> Vec<u8> {
    let mut block = vec![0x83, 0x86];
    for (name, value) in [(":path", METHOD), (":authority", "x"), ("content-type", "application/grpc")] {
        for text in [name, value] {
            if text == name {
                block.push(0);
            }
            block.push(u8::try_from(text.len()).expect("short"));
            block.extend_from_slice(text.as_bytes());
        }
    }
    h2_frame(1, 4, stream, &block)
}

/// Opens calls that announce 65,000 bytes each, send 60,000 and then send nothing.
async fn half_calls(to: SocketAddr, connections: usize, calls: usize) -> Vec<impl Sized> {
    let mut open = Vec::new();
    for _ in 0..connections {
        let stream = TcpStream::connect(to).await.expect("a connection");
        let handshake = http2::Builder::new(TokioExecutor::new()).handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.expect("a connection");
        let connection = tokio::spawn(connection);
        for _ in 0..calls {
            let message = [&[0, 0, 0, 0xfd, 0xe8][..], &[b'x'; 60_000]].concat();
            let frame = Ok::<_, std::io::Error>(Frame::data(Bytes::from(message)));
            let body = StreamBody::new(stream::iter([frame]).chain(stream::pending()));
            let request =
                Request::post(format!("http://x{METHOD}")).header("content-type", "application/grpc");
            if sender.ready().await.is_err() {
                break;
            }
            open.push(tokio::spawn(sender.send_request(request.body(Box::pin(body)).expect("a request"))));
        }
        // Until everything that the server accepts is sent.
        let _ = timeout(Duration::from_millis(500), sender.ready()).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        drop(connection);
    }
    open
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_token_nobody_takes_memory() {
    const MOST: u64 = 64;
    let (_folder, tokens) = tokens();
    // More gRPC connections than are allowed by default: memory is limited by more than their
    // number.
    let server = StatServer::with(None, &[&tokens, "--max-grpc-connections=100"]).await;
    let certificates = tempfile::tempdir().expect("a folder");
    let identity = Authority::new().issue(certificates.path(), "server");
    let (certificate, key) =
        (identity.certificate.to_str().expect("a path"), identity.key.to_str().expect("a path"));
    let over_tls = StatServer::with(None, &[&tokens, "--tls-cert", certificate, "--tls-key", key]).await;

    let calls = attack(&server, "2,500 half calls over gRPC", MOST, half_calls(server.grpc, 1, 2_500));
    // The first three quarters of the longest possible TLS hello, in four records.
    let mut hello = vec![0x16, 3, 1, 0x3e, 0x80, 1, 0, 0xff, 0xf0];
    hello.resize(16_005, 3);
    for _ in 0..2 {
        hello.extend([0x16, 3, 1, 0x3e, 0x80]);
        hello.resize(hello.len() + 16_000, 3);
    }
    let hellos = async {
        let before = over_tls.process.resident_bytes() / MIB;
        let peak = Peak::watch(&over_tls);
        let open = connections(over_tls.address, 700, hello).await;
        drop(open);
        let after = wait::until("the memory of the hellos is back", BACK, || async {
            let now = over_tls.process.resident_bytes() / MIB;
            if now <= before + 8 { Ok(now) } else { Err(now) }
        })
        .await;
        println!(
            "700 half TLS hellos of 48 KB: {before} MiB before, {} at the most, {after} after",
            peak.mib()
        );
        assert!(peak.mib() <= before + MOST, "{} MiB, {before} before", peak.mib());
    };
    tokio::join!(calls, hellos);

    let (http, grpc) = (server.address, server.grpc);
    let head = [b"GET / HTTP/1.1\r\nhost: x\r\nx-long: ", &[b'x'; 8_000][..]].concat();
    attack(&server, "700 half heads", MOST, connections(http, 700, head)).await;
    let requests =
        b"POST /v1/reports HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n123456789".repeat(3_000);
    let mut calls = h2_preface(&[]);
    (0..5_000).for_each(|call| calls.extend(h2_head(2 * call + 1)));
    let both = async {
        let requests = connections(http, 200, requests).await;
        (requests, connections(grpc, 50, calls).await)
    };
    attack(&server, "600,000 requests and 250,000 calls, no answer read", MOST, both).await;
}

fn websocket_head() -> Vec<u8> {
    format!(
        "GET / HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\nupgrade: websocket\r\nconnection: upgrade\r\n\
         sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    .into_bytes()
}

/// Returns a masked frame that announces `announced` bytes and has fewer. It may follow the head at
/// once.
fn websocket_frame(announced: u64, sent: usize) -> Vec<u8> {
    [&websocket_head()[..], &[0x82, 0xff], &announced.to_be_bytes(), &[0; 4], &vec![b'x'; sent]].concat()
}

async fn report_keys(server: &StatServer, count: usize) {
    let until = Snapshot { as_of_ns: 2_000_000_000, requests: 1, ..Snapshot::default() };
    let message = |number: usize| KeyReport {
        namespace: format!("ns-{}", number % 100),
        name: format!("revision-{number:05}"),
        from_gateway: true,
        since: Snapshot::starting_at(1_000_000_000),
        until,
    };
    for keys in (0..count).collect::<Vec<_>>().chunks(5_000) {
        let messages = keys.iter().map(|number| message(*number)).collect();
        let report = Report { version: 1, pod: "gateway".into(), incarnation: 1, messages };
        let body = Full::new(Bytes::from(report.encode().expect("a report")));
        let request = Request::post("/v1/reports").header("host", "x").header("content-type", CONTENT_TYPE);
        let request = request.header("authorization", format!("Bearer {TOKEN}")).body(body);
        let answer = http::ask(server.address, request.expect("a request")).await.expect("an answer");
        assert_eq!(answer.0, 202);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_a_token_nobody_takes_more_memory_than_the_limits_add_up_to() {
    let (_folder, tokens) = tokens();
    let flags =
        [&tokens, "--write-timeout=2s", "--max-bytes-in-flight=16777216", "--max-answer-bytes=12582912"];
    let server = StatServer::with(None, &flags).await;
    report_keys(&server, 10_000).await;
    // The deciders keep history from their first decision on. It is not part of an attack.
    wait::until("the first decisions", SETTLED, || async {
        let key = "/v1/keys?limit=1";
        let request =
            Request::get(key).header("host", "x").header("authorization", format!("Bearer {TOKEN}"));
        let (_, body) = http::ask(server.address, request.body(Full::default()).expect("a request")).await?;
        let list: serde_json::Value = serde_json::from_slice(&body).map_err(|error| error.to_string())?;
        if list["keys"][0]["excess_burst_capacity"].is_number() { Ok(()) } else { Err(list.to_string()) }
    })
    .await;
    // The figures of SECURITY.md for a connection, and for the bytes received and answered over all
    // connections.
    let of = |connections: u64| connections * 30 / 1024 + 1;
    let (received, answered) = (2 * 16 + 8, 12 + 24);

    let body = format!(
        "POST /v1/reports HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\ncontent-length: 1000000\r\n\r\n"
    );
    let body = [body.as_bytes(), &[b'x'; 900_000]].concat();
    let http = server.address;
    attack(&server, "200 half bodies of 1 MB", received + of(200), connections(http, 200, body)).await;
    let half = websocket_frame(1_000_000, 900_000);
    attack(&server, "200 half frames of 1 MB", received + of(200), connections(http, 200, half)).await;
    let whole = websocket_frame(1_000_000, 1_000_000);
    attack(&server, "200 frames of 1 MB, then nothing", received + of(200), connections(http, 200, whole))
        .await;
    let list =
        format!("GET /v1/keys?limit=10000 HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\n\r\n");
    let unread = async {
        let open = connections(http, 100, list.into_bytes()).await;
        // The server closes these connections although the client keeps them.
        wait::until("nothing is left to be read", SETTLED, || async {
            let request = Request::get("/v1/keys?limit=10000").header("host", "x");
            let request = request.header("authorization", format!("Bearer {TOKEN}"));
            match http::ask(http, request.body(Full::default()).expect("a request")).await?.0.as_u16() {
                200 => Ok(()),
                status => Err(status.to_string()),
            }
        })
        .await;
        open
    };
    attack(&server, "100 lists of 6 MB, none read", answered + of(100), unread).await;

    let channel =
        tonic::transport::Channel::from_shared(format!("http://{}", server.grpc)).expect("an address");
    let channel = channel.connect().await.expect("a connection");
    let watch = async {
        let calls = (0..1_500).map(|number| {
            let mut client = ExternalScalerClient::new(channel.clone());
            let mut request = tonic::Request::new(ScaledObjectRef {
                name: format!("{number:0>500}"),
                namespace: "n".repeat(500),
                ..ScaledObjectRef::default()
            });
            request.metadata_mut().insert("authorization", format!("Bearer {TOKEN}").parse().expect("ASCII"));
            async move { client.stream_is_active(request).await.expect("a stream").into_inner() }
        });
        stream::iter(calls).buffer_unordered(50).collect::<Vec<_>>().await
    };
    attack(&server, "1,500 keys watched over gRPC", 1_500 * 16 / 1024 + of(1) + 8, watch).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_to_be_forwarded_keeps_nothing_of_its_frame() {
    let nobody =
        std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address");
    let forward = format!("--forward=ws://{nobody}");
    let server = StatServer::with(None, &[&forward]).await;
    let (mut socket, _) = connect_async(format!("ws://{}/", server.address)).await.expect("a websocket");
    let stat = Stat { pod_name: "pod".into(), request_count: 1.0, ..Stat::default() };
    let message = WireStatMessage { namespace: "ns".into(), name: "rev".into(), stat: Some(stat) };
    let mut frame = WireStatMessages { messages: vec![message] }.encode_to_vec();
    // A field of a later version, with 1,000,000 bytes.
    frame.extend([0x4a, 0xc0, 0x84, 0x3d]);
    frame.resize(frame.len() + 1_000_000, b'x');
    let before = server.process.resident_bytes() / MIB;
    for _ in 0..100 {
        socket.send(Message::Binary(frame.clone().into())).await.expect("sent");
    }
    wait::until_equal("requests", SETTLED, 100, || server.number("ns", "rev", "requests_total")).await;
    let after = server.process.resident_bytes() / MIB;
    println!("100 stats that wait, in frames of 1 MB: {before} MiB before, {after} after");
    assert!(after < before + 16, "{before} MiB before, {after} after");
}

/// Returns how often a limit was reached.
async fn refused(server: &StatServer, limit: &str) -> u64 {
    let text = http::get(server.address, "/metrics").await.expect("metrics");
    let line = format!("inflight_statserver_refused_total{{limit=\"{limit}\"}} ");
    let count = text.lines().find_map(|text| text.strip_prefix(&line)).expect("the limit");
    count.parse().expect("a number")
}

/// Reads until the server closes the connection in whatever way.
async fn closed(what: &str, mut stream: TcpStream) {
    let mut bytes = [0; 65_536];
    let end = async { while matches!(stream.read(&mut bytes).await, Ok(1..)) {} };
    assert!(timeout(SETTLED, end).await.is_ok(), "{what} is still open");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_read_is_closed() {
    let server = StatServer::with(None, &["--write-timeout=1s", "--max-answer-bytes=1073741824"]).await;
    report_keys(&server, 10_000).await;
    let closes = async |what: &str, count: u64| {
        wait::until(what, SETTLED, || async {
            let refused = refused(&server, "write-timeout").await;
            if refused >= count { Ok(()) } else { Err(refused) }
        })
        .await;
    };
    let mut http = TcpStream::connect(server.address).await.expect("a connection");
    // Several requests, so that the kernel's buffers cannot hold the answers.
    let list = b"GET /v1/keys?limit=10000 HTTP/1.1\r\nhost: x\r\n\r\n".repeat(10);
    http.write_all(&list).await.expect("sent");
    closes("an answer is not read", 1).await;
    closed("the connection", http).await;

    // Pongs that the client does not read.
    let (socket, _) = connect_async(format!("ws://{}/", server.address)).await.expect("a websocket");
    let (mut to, _from) = socket.split();
    let pinging = async {
        let ping = || Message::Ping(vec![b'p'; 125].into());
        while to.send(ping()).await.is_ok() {}
    };
    assert!(timeout(SETTLED * 2, pinging).await.is_ok(), "still open");
    closes("a websocket does not read", 2).await;

    // A call whose answer cannot even begin: the window is empty, and remains so.
    let mut grpc = TcpStream::connect(server.grpc).await.expect("a connection");
    let window = [0, 4, 0, 0, 0, 0];
    let object =
        ScaledObjectRef { name: "rev".into(), namespace: "ns".into(), ..Default::default() }.encode_to_vec();
    let length = u8::try_from(object.len()).expect("short");
    let message = [&[0, 0, 0, 0, length], &object[..]].concat();
    let call = [h2_preface(&window), h2_head(1), h2_frame(0, 1, 1, &message)].concat();
    grpc.write_all(&call).await.expect("sent");
    closes("a call's answer is not read", 3).await;
    closed("the call's connection", grpc).await;
    assert_eq!(refused(&server, "write-timeout").await, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_may_be_idle_for_longer_than_a_head_may_take() {
    let server = StatServer::with(None, &["--head-timeout=300ms", "--idle-timeout=5s"]).await;
    let mut stream = TcpStream::connect(server.address).await.expect("a connection");
    let ask = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n";
    let mut answer = [0; 4096];
    for _ in 0..2 {
        stream.write_all(ask).await.expect("sent");
        let length = timeout(SETTLED, stream.read(&mut answer)).await.expect("in time").expect("an answer");
        assert!(answer[..length].starts_with(b"HTTP/1.1 200 "), "{:?}", String::from_utf8_lossy(&answer));
        tokio::time::sleep(Duration::from_millis(900)).await;
    }
    assert_eq!(refused(&server, "head-timeout").await, 0, "it was not its head that was waited for");
    // But not for ever.
    let length = timeout(SETTLED, stream.read(&mut answer)).await.expect("in time").expect("no error");
    assert_eq!(length, 0);
    assert_eq!(refused(&server, "head-timeout").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_say_half_a_word_cost_nothing() {
    let server = StatServer::with(None, &["--head-timeout=60s", "--max-grpc-connections=1000"]).await;
    let open = connections(server.grpc, 600, b"P".to_vec()).await;
    assert_eq!(open.len(), 600);
    assert!(http::get(server.address, "/healthz").await.is_ok());
    let threads = || {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", server.process.id())).expect("threads");
        let of = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("schedstat")).ok();
        let cpu =
            tasks.flatten().filter_map(of).filter_map(|stat| stat.split(' ').next()?.parse::<u64>().ok());
        Duration::from_nanos(cpu.sum())
    };
    let (before, began) = (threads(), Instant::now());
    tokio::time::sleep(Duration::from_secs(2)).await;
    let share = (threads() - before).as_secs_f64() / began.elapsed().as_secs_f64();
    println!("600 connections with one byte each: {:.2} % of a core", share * 100.0);
    assert!(share < 0.03, "{share} of a core");
    drop(open);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_that_is_taken_out_of_the_file_ends_what_was_opened_with_it() {
    let (folder, flag) = tokens();
    let file = folder.path().join("tokens");
    let other = "other-token-0123456789 *\n";
    std::fs::write(&file, format!("{TOKEN} *\n{other}")).expect("a file");
    let server = StatServer::with(None, &[&flag]).await;
    let websocket = async |token: &str| {
        let mut request = format!("ws://{}/", server.address).into_client_request().expect("a request");
        request.headers_mut().insert("authorization", format!("Bearer {token}").parse().expect("ASCII"));
        connect_async(request).await.expect("a websocket").0
    };
    let mut socket = websocket(TOKEN).await;
    let mut stays = websocket("other-token-0123456789").await;
    let mut client =
        ExternalScalerClient::connect(format!("http://{}", server.grpc)).await.expect("a connection");
    let mut request = tonic::Request::new(ScaledObjectRef {
        name: "a".into(),
        namespace: "ns".into(),
        ..Default::default()
    });
    request.metadata_mut().insert("authorization", format!("Bearer {TOKEN}").parse().expect("ASCII"));
    let mut active = client.stream_is_active(request).await.expect("a stream").into_inner();

    std::fs::write(&file, other).expect("a file");
    match timeout(SETTLED, socket.next()).await.expect("in time") {
        Some(Ok(Message::Close(Some(close)))) => assert_eq!(u16::from(close.code), 1008),
        other => panic!("{other:?}"),
    }
    let ended = timeout(SETTLED, active.next()).await.expect("in time").expect("a status");
    assert_eq!(ended.expect_err("the end").code(), tonic::Code::Unauthenticated);
    stays.send(Message::Ping(Bytes::new())).await.expect("sent");
    let pong = timeout(SETTLED, stays.next()).await.expect("in time");
    assert!(matches!(pong, Some(Ok(Message::Pong(_)))), "{pong:?}");
}

/// Returns the most that the kernel keeps of what one connection of a server has yet to deliver.
fn largest_send_queue(server: SocketAddr) -> u64 {
    let port = format!(":{:04X}", server.port());
    let table = std::fs::read_to_string("/proc/net/tcp").expect("the connections");
    let queue = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let is_ours = fields.get(1).is_some_and(|local| local.ends_with(&port));
        let sending = fields.get(4)?.split(':').next()?;
        is_ours.then(|| u64::from_str_radix(sending, 16).ok()).flatten()
    };
    table.lines().skip(1).filter_map(queue).max().unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_module_that_nobody_reads_takes_no_more_than_its_connections() {
    let (folder, tokens) = tokens();
    let module = folder.path().join("module.wasm");
    std::fs::write(&module, [&b"\0asm\x01\0\0\0"[..], &vec![0; 8 << 20]].concat()).expect("a file");
    let flags = [&*tokens, "--write-timeout=3s", "--module", module.to_str().expect("a path")];
    let server = StatServer::with(None, &flags).await;
    let get = b"GET /module/inflight_filter.wasm HTTP/1.1\r\nhost: x\r\n\r\n".to_vec();
    attack(&server, "400 modules of 8 MiB, none read, without a token", 16, async {
        let open = connections(server.address, 400, get).await;
        assert_eq!(open.len(), 400);
        let kept = largest_send_queue(server.address);
        assert!((1..=256 << 10).contains(&kept), "{kept} bytes");
        let ended = async || {
            let request = Request::get("/metrics").header("host", "x");
            let request = request.header("authorization", format!("Bearer {TOKEN}"));
            let request = request.body(Full::<Bytes>::default()).map_err(|e| e.to_string())?;
            let (_, text) = http::ask(server.address, request).await?;
            let text = String::from_utf8_lossy(&text).into_owned();
            let line = "inflight_statserver_refused_total{limit=\"write-timeout\"} 400\n";
            if text.contains(line) { Ok(()) } else { Err(text) }
        };
        wait::until("all of them are closed", SETTLED, ended).await;
        open
    })
    .await;
}
