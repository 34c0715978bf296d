//! A load of long-lived and multiplexed requests: HTTP/2, gRPC streams, websockets. Some of them
//! are broken off.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, Empty, StreamBody};
use hyper::Request;
use hyper::body::{Body, Frame};
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::load::Dice;
use crate::{http, unix_time};

/// The results of a load of streams.
#[derive(Debug, Default)]
pub struct Tally {
    /// Requests over HTTP/2 that were answered.
    pub http2: AtomicU64,
    /// gRPC streams that ran to their end.
    pub grpc: AtomicU64,
    /// Websockets that were opened.
    pub websockets: AtomicU64,
    /// HTTP/2 requests and gRPC streams that were broken off. Only Envoy knows which of them had
    /// already left.
    pub aborted: AtomicU64,
    failures: Mutex<Vec<String>>,
}

impl Tally {
    /// Returns the failures: the time, the kind of stream, and what happened.
    ///
    /// # Panics
    /// If a client panicked.
    pub fn failures(&self) -> Vec<String> {
        self.failures.lock().expect("no panic under this lock").clone()
    }

    fn fail(&self, what: &str, began: Instant, why: &str) {
        // The time is in the format of the access log.
        let what = format!("{:.6} {what}, after {:?}: {why}", unix_time().as_secs_f64(), began.elapsed());
        self.failures.lock().expect("no panic under this lock").push(what);
    }
}

/// A running load of streams.
pub struct Streams {
    /// The results so far.
    pub tally: Arc<Tally>,
    stop: Arc<AtomicBool>,
    clients: JoinSet<()>,
}

impl Streams {
    /// Starts `clients` clients of each kind.
    pub fn start(envoy: SocketAddr, clients: u64, seed: u64) -> Self {
        let (tally, stop) = (Arc::new(Tally::default()), Arc::new(AtomicBool::new(false)));
        let mut tasks = JoinSet::new();
        for number in 0..clients {
            for kind in [Kind::Http2, Kind::Grpc, Kind::Websocket] {
                let (tally, stop) = (Arc::clone(&tally), Arc::clone(&stop));
                let mut dice = Dice::new(seed.wrapping_mul(7_919).wrapping_add(number * 3 + kind as u64));
                tasks.spawn(async move {
                    while !stop.load(Ordering::SeqCst) {
                        kind.some(envoy, &tally, &mut dice).await;
                    }
                });
            }
        }
        Self { tally, stop, clients: tasks }
    }

    /// Lets open streams run to their end. Returns the results.
    ///
    /// # Panics
    /// If a client panicked.
    pub async fn finish(mut self) -> Arc<Tally> {
        self.stop.store(true, Ordering::SeqCst);
        while let Some(client) = self.clients.join_next().await {
            client.expect("the client ran");
        }
        self.tally
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Http2,
    Grpc,
    Websocket,
}

impl Kind {
    async fn some(self, envoy: SocketAddr, tally: &Arc<Tally>, dice: &mut Dice) {
        let began = Instant::now();
        let (what, outcome) = match self {
            Self::Http2 => ("a connection for HTTP/2", http2_requests(envoy, tally, dice).await),
            Self::Grpc => ("a connection for gRPC", grpc_streams(envoy, tally, dice).await),
            Self::Websocket => ("a websocket", websocket(envoy, tally, dice).await),
        };
        if let Err(why) = outcome {
            tally.fail(what, began, &why);
            // Envoy may be away, so there is a pause before the next attempt.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

async fn connect<B>(envoy: SocketAddr) -> Result<SendRequest<B>, String>
where
    B: Body<Data = Bytes, Error: std::error::Error + Send + Sync> + Send + Unpin + 'static,
{
    let stream = TcpStream::connect(envoy).await.map_err(|e| e.to_string())?;
    let _ = stream.set_nodelay(true);
    let handshake = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
    let (sender, connection) = handshake.map_err(|e| format!("{e:?}"))?;
    tokio::spawn(connection);
    Ok(sender)
}

/// Opens a websocket and exchanges up to twenty messages.
async fn websocket(envoy: SocketAddr, tally: &Tally, dice: &mut Dice) -> Result<(), String> {
    let mut socket = http::try_websocket(envoy).await?;
    tally.websockets.fetch_add(1, Ordering::SeqCst);
    for number in 0..dice.below(20) {
        let sent = socket.write_all(b"\x82\x84abcdwxyz").await;
        sent.map_err(|e| format!("its message {number}: {e}"))?;
        tokio::time::sleep(Duration::from_millis(dice.below(100))).await;
    }
    Ok(())
}

/// Sends ten times ten concurrent requests over one connection. One in twenty is broken off.
async fn http2_requests(envoy: SocketAddr, tally: &Arc<Tally>, dice: &mut Dice) -> Result<(), String> {
    let sender = connect(envoy).await?;
    for round in 0..10 {
        let mut requests = JoinSet::new();
        for _ in 0..10 {
            let (mut sender, tally) = (sender.clone(), Arc::clone(tally));
            let (ms, aborts) = (dice.below(40), dice.below(20) == 0);
            let path = format!("/h2?ms={ms}");
            let request = Request::get(format!("http://app{path}")).body(Empty::<Bytes>::new());
            let request = request.map_err(|e| e.to_string())?;
            requests.spawn(async move {
                let began = Instant::now();
                let answer = async {
                    let response = sender.send_request(request).await.map_err(|e| format!("{e:?}"))?;
                    let status = response.status();
                    let body = response.into_body().collect().await.map(|body| body.to_bytes());
                    if status == 200 && body.is_ok() { Ok(()) } else { Err(format!("{status}, {body:?}")) }
                };
                let limit = if aborts { Duration::from_millis(ms / 2) } else { Duration::MAX };
                match tokio::time::timeout(limit, answer).await {
                    Ok(Ok(())) => tally.http2.fetch_add(1, Ordering::SeqCst),
                    Err(_) => tally.aborted.fetch_add(1, Ordering::SeqCst),
                    Ok(Err(why)) => {
                        tally.fail(&format!("{path} in round {round} of its connection"), began, &why);
                        0
                    }
                };
            });
        }
        while let Some(request) = requests.join_next().await {
            request.map_err(|e| e.to_string())?;
        }
    }
    Ok(())
}

/// Opens five streams one after the other, each with up to twenty messages. One in five is broken
/// off.
async fn grpc_streams(envoy: SocketAddr, tally: &Tally, dice: &mut Dice) -> Result<(), String> {
    let mut sender = connect(envoy).await?;
    for number in 0..5 {
        let (messages, pause, aborts) = (dice.below(20), dice.below(100), dice.below(5) == 0);
        let body = stream::unfold(0, move |sent| async move {
            if sent == messages {
                return None;
            }
            tokio::time::sleep(Duration::from_millis(pause)).await;
            // A gRPC message: not compressed, five bytes long.
            Some((Ok::<_, std::io::Error>(Frame::data(Bytes::from_static(b"\0\0\0\0\x05hello"))), sent + 1))
        });
        let request = Request::post("http://app/echo.Echo/Stream").header("content-type", "application/grpc");
        let request = request.header("te", "trailers").body(StreamBody::new(Box::pin(body)));
        let request = request.map_err(|e| e.to_string())?;
        let began = Instant::now();
        let answer = async {
            let response = sender.send_request(request).await.map_err(|e| format!("{e:?}"))?;
            let head = format!("{} {:?}", response.status(), response.headers());
            let answer = response.into_body().collect().await.map_err(|e| format!("{head}, then {e:?}"))?;
            let trailers = answer.trailers().cloned().unwrap_or_default();
            let echoed = answer.to_bytes().len() as u64;
            if trailers.get("grpc-status").is_some_and(|status| status == "0") && echoed == messages * 10 {
                Ok(())
            } else {
                Err(format!("{head}, {echoed} bytes of {messages} messages, {trailers:?}"))
            }
        };
        let half = Duration::from_millis(pause * messages / 2);
        match tokio::time::timeout(if aborts { half } else { Duration::MAX }, answer).await {
            Ok(Ok(())) => tally.grpc.fetch_add(1, Ordering::SeqCst),
            Err(_) => tally.aborted.fetch_add(1, Ordering::SeqCst),
            Ok(Err(why)) => {
                let what =
                    format!("gRPC stream {number} of its connection, {messages} messages {pause} ms apart");
                tally.fail(&what, began, &why);
                return Ok(());
            }
        };
    }
    Ok(())
}
