//! A load of long-lived and multiplexed requests: HTTP/2, gRPC streams, websockets, some of them broken off.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

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

use crate::http;
use crate::load::Dice;

/// What was sent, and how it went.
#[derive(Debug, Default)]
pub struct Tally {
    /// Requests over HTTP/2 that were answered.
    pub http2: AtomicU64,
    /// gRPC streams that went to their end.
    pub grpc: AtomicU64,
    /// Websockets that were opened.
    pub websockets: AtomicU64,
    /// HTTP/2 requests and gRPC streams that were broken off: whether one had left is Envoy's to say.
    pub aborted: AtomicU64,
    /// What went otherwise than it should.
    pub failed: AtomicU64,
}

/// A running load of streams.
pub struct Streams {
    /// How it goes.
    pub tally: Arc<Tally>,
    stop: Arc<AtomicBool>,
    clients: JoinSet<()>,
}

impl Streams {
    /// Starts `clients` of each kind.
    pub fn start(envoy: SocketAddr, clients: u64, seed: u64) -> Self {
        let (tally, stop) = (Arc::new(Tally::default()), Arc::new(AtomicBool::new(false)));
        let mut tasks = JoinSet::new();
        for number in 0..clients {
            for kind in [Kind::Http2, Kind::Grpc, Kind::Websocket] {
                let (tally, stop) = (Arc::clone(&tally), Arc::clone(&stop));
                let mut dice = Dice::new(seed.wrapping_mul(7_919).wrapping_add(number * 3 + kind as u64));
                tasks.spawn(async move {
                    while !stop.load(Ordering::SeqCst) {
                        if kind.some(envoy, &tally, &mut dice).await.is_err() {
                            tally.failed.fetch_add(1, Ordering::SeqCst);
                        }
                    }
                });
            }
        }
        Self { tally, stop, clients: tasks }
    }

    /// Lets what is open go to its end.
    pub async fn finish(mut self) -> Arc<Tally> {
        self.stop.store(true, Ordering::SeqCst);
        while self.clients.join_next().await.is_some() {}
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
    async fn some(self, envoy: SocketAddr, tally: &Tally, dice: &mut Dice) -> Result<(), String> {
        match self {
            Self::Http2 => http2_requests(envoy, tally, dice).await,
            Self::Grpc => grpc_streams(envoy, tally, dice).await,
            Self::Websocket => {
                let mut socket = http::websocket(envoy).await;
                tally.websockets.fetch_add(1, Ordering::SeqCst);
                for _ in 0..dice.below(20) {
                    socket.write_all(b"\x82\x84abcdwxyz").await.map_err(|e| e.to_string())?;
                    tokio::time::sleep(Duration::from_millis(dice.below(100))).await;
                }
                Ok(())
            }
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
    let (sender, connection) = handshake.map_err(|e| e.to_string())?;
    tokio::spawn(connection);
    Ok(sender)
}

/// Ten times ten requests at once over one connection; one in twenty is broken off.
async fn http2_requests(envoy: SocketAddr, tally: &Tally, dice: &mut Dice) -> Result<(), String> {
    let sender = connect(envoy).await?;
    for _ in 0..10 {
        let mut requests = JoinSet::new();
        for _ in 0..10 {
            let (mut sender, ms, aborts) = (sender.clone(), dice.below(40), dice.below(20) == 0);
            let request = Request::get(format!("http://app/h2?ms={ms}")).body(Empty::<Bytes>::new());
            let request = request.map_err(|e| e.to_string())?;
            requests.spawn(async move {
                let answer = async {
                    let response = sender.send_request(request).await.map_err(|e| e.to_string())?;
                    let status = response.status();
                    response.into_body().collect().await.map_err(|e| e.to_string())?;
                    if status == 200 { Ok(true) } else { Err(status.to_string()) }
                };
                if !aborts {
                    return answer.await;
                }
                tokio::select! {
                    answer = answer => answer,
                    () = tokio::time::sleep(Duration::from_millis(ms / 2)) => Ok(false),
                }
            });
        }
        while let Some(answered) = requests.join_next().await {
            let answered = answered.map_err(|e| e.to_string())??;
            if answered { &tally.http2 } else { &tally.aborted }.fetch_add(1, Ordering::SeqCst);
        }
    }
    Ok(())
}

/// Five streams one after the other, each of up to twenty messages; one in five is broken off.
async fn grpc_streams(envoy: SocketAddr, tally: &Tally, dice: &mut Dice) -> Result<(), String> {
    let mut sender = connect(envoy).await?;
    for _ in 0..5 {
        let (messages, pause, aborts) = (dice.below(20), dice.below(100), dice.below(5) == 0);
        let body = stream::unfold(0, move |sent| async move {
            if sent == messages {
                return None;
            }
            tokio::time::sleep(Duration::from_millis(pause)).await;
            // Not compressed, five bytes long.
            Some((Ok::<_, std::io::Error>(Frame::data(Bytes::from_static(b"\0\0\0\0\x05hello"))), sent + 1))
        });
        let request = Request::post("http://app/echo.Echo/Stream").header("content-type", "application/grpc");
        let request = request.header("te", "trailers").body(StreamBody::new(Box::pin(body)));
        let answer = async {
            let response = sender.send_request(request.map_err(|e| e.to_string())?).await;
            let answer = response.map_err(|e| e.to_string())?.into_body().collect().await;
            let answer = answer.map_err(|e| e.to_string())?;
            let status = answer.trailers().and_then(|trailers| trailers.get("grpc-status")).cloned();
            let echoed = answer.to_bytes().len() as u64;
            if status.is_some_and(|status| status == "0") && echoed == messages * 10 {
                Ok(())
            } else {
                Err(format!("{echoed} bytes of {messages} messages"))
            }
        };
        if aborts {
            let half = Duration::from_millis(pause * messages / 2);
            let broken_off = tokio::time::timeout(half, answer).await.is_err();
            if broken_off { &tally.aborted } else { &tally.grpc }.fetch_add(1, Ordering::SeqCst);
        } else {
            answer.await?;
            tally.grpc.fetch_add(1, Ordering::SeqCst);
        }
    }
    Ok(())
}
