//! The hold on real Envoys, for requests with bodies, websockets and gRPC: they wait like any other,
//! their bodies stay with the clients, and Envoy's memory stays bounded.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use hyper::client::conn::{http1, http2};
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use inflight_e2e::app::App;
use inflight_e2e::bootstrap::{Bootstrap, CLUSTER, EndpointFile, NOBODY};
use inflight_e2e::envoy::{Envoy, Version};
use inflight_e2e::{http, wait};
use serde_json::json;
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;

const SETTLED: Duration = Duration::from_secs(60);
const CHUNK: &[u8] = &[b'x'; 64 * 1024];
/// 10 MiB.
const CHUNKS: usize = 160;

type Chunks = StreamBody<stream::Iter<std::vec::IntoIter<Result<Frame<Bytes>, std::convert::Infallible>>>>;

fn body(chunks: usize) -> Chunks {
    let chunk = || Ok(Frame::data(Bytes::from_static(CHUNK)));
    StreamBody::new(stream::iter((0..chunks).map(|_| chunk()).collect::<Vec<_>>()))
}

fn upload(uri: &str) -> Request<Chunks> {
    let request = Request::post(uri).header("host", "hello");
    request.header("content-length", CHUNKS * CHUNK.len()).body(body(CHUNKS)).expect("a request")
}

/// Returns the answer's code and body.
async fn read(response: Response<hyper::body::Incoming>) -> Result<(u16, String), String> {
    let code = response.status().as_u16();
    let body = response.into_body().collect().await.map_err(|e| e.to_string())?.to_bytes();
    Ok((code, String::from_utf8_lossy(&body).into_owned()))
}

/// Opens a connection whose socket keeps little of what Envoy does not read.
async fn connect(to: SocketAddr) -> Result<TokioIo<TcpStream>, String> {
    let socket = TcpSocket::new_v4().map_err(|e| e.to_string())?;
    socket.set_send_buffer_size(32 * 1024).map_err(|e| e.to_string())?;
    Ok(TokioIo::new(socket.connect(to).await.map_err(|e| e.to_string())?))
}

async fn over_http1(to: SocketAddr) -> Result<(u16, String), String> {
    let (mut sender, connection) = http1::handshake(connect(to).await?).await.map_err(|e| e.to_string())?;
    let connection = tokio::spawn(connection);
    let answer = sender.send_request(upload("/upload")).await.map_err(|e| e.to_string());
    let answer = read(answer?).await;
    connection.abort();
    answer
}

async fn over_http2(mut sender: http2::SendRequest<Chunks>) -> Result<(u16, String), String> {
    sender.ready().await.map_err(|e| e.to_string())?;
    read(sender.send_request(upload("http://hello/upload")).await.map_err(|e| e.to_string())?).await
}

fn holding(limited: bool) -> (Bootstrap, EndpointFile) {
    let endpoints = EndpointFile::new();
    let mut bootstrap = Bootstrap::holding(&endpoints, NOBODY, json!({"probe_period": "50ms"}));
    if limited {
        bootstrap.0["static_resources"]["listeners"][0]["per_connection_buffer_limit_bytes"] = json!(32_768);
        bootstrap.manager()["http2_protocol_options"] =
            json!({"initial_stream_window_size": 65_536, "initial_connection_window_size": 1_048_576});
    }
    (bootstrap, endpoints)
}

async fn held(envoy: &Envoy, name: &str) -> f64 {
    let labels = [("namespace_name", "default"), ("revision_name", name)];
    envoy.stat("activator_held_requests", &labels).await
}

/// Starts uploads of 10 MiB each, over HTTP/1.1 or over ten connections of HTTP/2.
async fn uploads(to: SocketAddr, count: usize, version: &str) -> JoinSet<Result<(u16, String), String>> {
    let mut uploads = JoinSet::new();
    for connection in 0..10 {
        if version == "HTTP/2" {
            let handshake = http2::handshake(TokioExecutor::new(), connect(to).await.expect("a connection"));
            let (sender, connection) = handshake.await.expect("a handshake");
            tokio::spawn(connection);
            for _ in 0..count / 10 {
                uploads.spawn(over_http2(sender.clone()));
            }
        } else {
            let first = connection * count / 10;
            for _ in first..first + count / 10 {
                uploads.spawn(over_http1(to));
            }
        }
    }
    uploads
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_held_uploads_of_ten_megabytes_take_little_memory() {
    const MIB: f64 = 1024.0 * 1024.0;
    for version in ["HTTP/1.1", "HTTP/2"] {
        for (limited, count) in [(true, 1_000), (false, 50)] {
            let (bootstrap, endpoints) = holding(limited);
            let envoy = Envoy::start(Version::Newest, &bootstrap, 2).await;
            let before = envoy.process.resident_bytes();
            let clients = uploads(envoy.address, count, version).await;
            wait::until_equal("held requests", SETTLED, count as f64, || held(&envoy, "hello-00001")).await;
            // Envoy reads until its buffers are full.
            wait::until("no more is read", SETTLED, || async {
                let received = envoy.stat("envoy_http_downstream_cx_rx_bytes_total", &[]).await;
                tokio::time::sleep(Duration::from_millis(500)).await;
                let later = envoy.stat("envoy_http_downstream_cx_rx_bytes_total", &[]).await;
                if later - received < MIB { Ok(()) } else { Err(later) }
            })
            .await;
            let grown = (envoy.process.resident_bytes() - before) as f64 / MIB;
            println!(
                "{version}, {}: {count} held uploads of 10 MiB take {grown:.0} MiB, {:.2} MiB each",
                if limited { "with the limits of envoy/" } else { "with Envoy's defaults" },
                grown / count as f64
            );
            assert!(!limited || grown < 300.0, "{grown} MiB");
            if !limited {
                continue;
            }
            // These leave, and others are answered.
            drop(clients);
            wait::until_equal("held requests", SETTLED, 0.0, || held(&envoy, "hello-00001")).await;
            let clients = uploads(envoy.address, 10, version).await;
            wait::until_equal("held requests", SETTLED, 10.0, || held(&envoy, "hello-00001")).await;
            let app = App::start().await;
            endpoints.set(CLUSTER, &[app.address]);
            for answer in clients.join_all().await {
                assert_eq!(answer, Ok((200, (CHUNKS * CHUNK.len()).to_string())));
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn websockets_and_grpc_streams_are_held_like_any_request() {
    for version in [Version::Oldest, Version::Newest] {
        let (mut bootstrap, endpoints) = holding(true);
        let grpc_endpoints = EndpointFile::new();
        bootstrap.grpc(NOBODY);
        bootstrap.endpoints_from("streams", &grpc_endpoints);
        let envoy = Envoy::start(version, &bootstrap, 2).await;
        let address = envoy.address;
        let mut websockets = JoinSet::new();
        for _ in 0..10 {
            websockets.spawn(async move { http::try_websocket(address).await });
        }
        let mut streams = JoinSet::new();
        let handshake = http2::handshake(TokioExecutor::new(), connect(address).await.expect("a connection"));
        let (sender, connection) = handshake.await.expect("a handshake");
        tokio::spawn(connection);
        for _ in 0..10 {
            let mut sender = sender.clone();
            streams.spawn(async move {
                let request = Request::post("http://hello/a.Service/Method")
                    .header("content-type", "application/grpc")
                    .header("te", "trailers");
                sender.ready().await.map_err(|e| e.to_string())?;
                let answer = sender.send_request(request.body(body(3)).expect("a request")).await;
                let answer = answer.map_err(|e| e.to_string())?.into_body().collect().await;
                let answer = answer.map_err(|e| e.to_string())?;
                let status = answer.trailers().and_then(|t| t.get("grpc-status")).cloned();
                Ok::<_, String>((answer.to_bytes().len(), status.map(|s| s.as_bytes().to_vec())))
            });
        }
        wait::until_equal("held websockets", SETTLED, 10.0, || held(&envoy, "hello-00001")).await;
        wait::until_equal("held streams", SETTLED, 10.0, || held(&envoy, "streams")).await;
        let app = App::start().await;
        endpoints.set(CLUSTER, &[app.address]);
        grpc_endpoints.set("streams", &[app.grpc]);
        let open: Vec<_> = websockets.join_all().await;
        assert!(open.iter().all(Result::is_ok), "{open:?}");
        for answer in streams.join_all().await {
            assert_eq!(answer, Ok((3 * CHUNK.len(), Some(b"0".to_vec()))));
        }
        wait::until_equal("websockets in the app", SETTLED, 10, async || app.counts.now()).await;
        drop(open);
        wait::until_equal("in the app", SETTLED, 0, async || app.counts.now()).await;
    }
}
