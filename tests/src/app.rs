//! The app: it keeps its own counts, and misbehaves on request.
//!
//! | path | what it does |
//! |---|---|
//! | `/work?ms=N` | answers 200 after N milliseconds; anything after an `&` is for the access log |
//! | `/reset` | closes the connection without an answer |
//! | `/half?ms=N` | sends the head and a part of the body, then closes after N milliseconds |
//! | `/hang` | sends the head and a part of the body, then nothing for a minute |
//! | `/redirect?/PATH` | answers 302 with this path at the host `app` |
//! | `/upload` | reads the body, then answers 200 with the number of its bytes |
//! | `/headers` | answers 200 with the names and values of the request's headers, one per line |
//! | `/ws` | accepts a websocket and leaves it open until the client closes |
//! | any, over HTTP/2 | sends back what it receives, and `grpc-status: 0` at the end |

use std::collections::HashSet;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Body, Frame, Incoming};
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::unix_time;

/// The app's counts.
#[derive(Debug, Default)]
pub struct Counts {
    requests: AtomicU64,
    now: AtomicU64,
    most: AtomicU64,
    seen: Mutex<HashSet<String>>,
    idle_since: Mutex<Option<Instant>>,
    gaps: Mutex<Vec<Duration>>,
    arrivals: Mutex<Vec<u64>>,
    answered: Mutex<Vec<(u64, u64)>>,
}

impl Counts {
    /// Returns the number of requests that have reached the app.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::SeqCst)
    }

    /// Returns the number of requests in the app now.
    pub fn now(&self) -> u64 {
        self.now.load(Ordering::SeqCst)
    }

    /// Returns the largest number of requests that were in the app at once.
    pub fn most(&self) -> u64 {
        self.most.load(Ordering::SeqCst)
    }

    /// Returns the largest number of requests that were in the app at once, among those that the
    /// app answered completely. When the app notices that a request was broken off depends on how
    /// busy the machine is. The requests counted here leave the app before any other process can
    /// know that they do.
    pub fn most_answered(&self) -> i64 {
        let answered = self.answered.lock().expect("no panic under this lock");
        let mut steps: Vec<(u64, i64)> =
            answered.iter().flat_map(|(from, to)| [(*from, 1), (*to, -1)]).collect();
        // At the same instant, requests that leave come before requests that arrive.
        steps.sort_unstable();
        let inside = steps.iter().scan(0, |now, (_, step)| {
            *now += step;
            Some(*now)
        });
        inside.max().unwrap_or(0)
    }

    /// Returns whether a request with this `x-id` has arrived. Returns `true` only once for each.
    pub fn has_seen(&self, id: &str) -> bool {
        self.seen.lock().expect("no panic under this lock").remove(id)
    }

    /// Resets the largest number to the requests in the app now.
    pub fn forget_most(&self) {
        self.most.store(self.now(), Ordering::SeqCst);
    }

    /// Returns how long the app was empty, for each time between two requests.
    pub fn gaps(&self) -> Vec<Duration> {
        self.gaps.lock().expect("no panic under this lock").clone()
    }

    /// Returns the number of requests that had reached the app at an instant, given in nanoseconds
    /// of unix time.
    pub fn arrived_by(&self, ns: u64) -> u64 {
        self.arrivals.lock().expect("no panic under this lock").iter().filter(|at| **at <= ns).count() as u64
    }

    fn enter(self: &Arc<Self>, id: Option<String>) -> Inside {
        self.requests.fetch_add(1, Ordering::SeqCst);
        let from = unix_time().as_nanos() as u64;
        self.arrivals.lock().expect("no panic under this lock").push(from);
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        if let Some(since) = self.idle_since.lock().expect("no panic under this lock").take() {
            self.gaps.lock().expect("no panic under this lock").push(since.elapsed());
        }
        if let Some(id) = id {
            self.seen.lock().expect("no panic under this lock").insert(id);
        }
        Inside { counts: Arc::clone(self), from, answered: false }
    }
}

/// A request in the app, until its answer is complete or dropped.
struct Inside {
    counts: Arc<Counts>,
    from: u64,
    answered: bool,
}

impl Drop for Inside {
    fn drop(&mut self) {
        if self.answered {
            let to = unix_time().as_nanos() as u64;
            self.counts.answered.lock().expect("no panic under this lock").push((self.from, to));
        }
        if self.counts.now.fetch_sub(1, Ordering::SeqCst) == 1 {
            *self.counts.idle_since.lock().expect("no panic under this lock") = Some(Instant::now());
        }
    }
}

/// A running app.
#[derive(Debug)]
pub struct App {
    /// Where it listens for HTTP/1.1.
    pub address: SocketAddr,
    /// Where it listens for HTTP/2, for gRPC streams.
    pub grpc: SocketAddr,
    /// The counts of both.
    pub counts: Arc<Counts>,
    serving: [JoinHandle<()>; 2],
}

impl App {
    /// Starts the app.
    ///
    /// # Panics
    /// If there is no port.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let streams = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let grpc = streams.local_addr().expect("an address");
        let counts = Arc::new(Counts::default());
        let serving = [
            tokio::spawn(accept(listener, Arc::clone(&counts))),
            tokio::spawn(accept_streams(streams, Arc::clone(&counts))),
        ];
        Self { address, grpc, counts, serving }
    }
}

impl Drop for App {
    fn drop(&mut self) {
        self.serving.iter().for_each(JoinHandle::abort);
    }
}

async fn accept_streams(listener: TcpListener, counts: Arc<Counts>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let _ = stream.set_nodelay(true);
        let counts = Arc::clone(&counts);
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let inside = counts.enter(None);
                async move { echo(request, inside) }
            });
            let served = http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service)
                .await;
            // This also ends the open streams of the connection. The message tells a failed test
            // why.
            if let Err(error) = served {
                eprintln!("{:.6} the app's HTTP/2 connection ended: {error:?}", unix_time().as_secs_f64());
            }
        });
    }
}

/// Sends back what it receives, frame by frame, and the status at the end. The request is in the
/// app until then.
fn echo(
    request: Request<Incoming>,
    mut inside: Inside,
) -> Result<Response<impl Body<Data = Bytes, Error = hyper::Error>>, Infallible> {
    // A request often ends in an empty frame. If these were sent back, two in a row, from streams
    // that end at the same time, would look like a flood to Envoy: it would close the connection,
    // and break off every stream on it.
    let frames = request.into_body().into_data_stream().map_ok(Frame::data);
    let frames =
        frames.try_filter(|frame| std::future::ready(frame.data_ref().is_some_and(|data| !data.is_empty())));
    let end = futures_util::stream::once(async move {
        inside.answered = true;
        drop(inside);
        let status = (HeaderName::from_static("grpc-status"), HeaderValue::from_static("0"));
        Ok(Frame::trailers(HeaderMap::from_iter([status])))
    });
    let mut response = Response::new(StreamBody::new(frames.chain(end)));
    response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    Ok(response)
}

async fn accept(listener: TcpListener, counts: Arc<Counts>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let _ = stream.set_nodelay(true);
        let counts = Arc::clone(&counts);
        tokio::spawn(async move {
            let service = service_fn(move |request| answer(request, Arc::clone(&counts)));
            // A connection that ends with an error is the purpose of `/reset`.
            let _ =
                http1::Builder::new().serve_connection(TokioIo::new(stream), service).with_upgrades().await;
        });
    }
}

/// Answers a request. An error closes the connection.
async fn answer(request: Request<Incoming>, counts: Arc<Counts>) -> Result<Response<Answer>, &'static str> {
    let id = request.headers().get("x-id").and_then(|v| v.to_str().ok()).map(str::to_owned);
    let inside = counts.enter(id);
    let delay = query_ms(request.uri().query());
    match request.uri().path() {
        "/reset" => Err("as asked"),
        "/half" => Ok(Response::new(Answer { inside: Some(inside), left: Left::Half(delay) })),
        "/hang" => {
            Ok(Response::new(Answer { inside: Some(inside), left: Left::Half(Duration::from_secs(60)) }))
        }
        "/headers" => {
            let lines = request.headers().iter().map(|(name, value)| format!("{name}: {value:?}\n"));
            let text = lines.collect::<String>();
            Ok(Response::new(Answer { inside: Some(inside), left: Left::Text(text.into()) }))
        }
        "/redirect" => {
            let to = format!("http://app{}", request.uri().query().unwrap_or("/"));
            let to = HeaderValue::try_from(to).map_err(|_| "no path")?;
            let mut response = Response::new(Answer { inside: Some(inside), left: Left::Nothing });
            *response.status_mut() = StatusCode::FOUND;
            response.headers_mut().insert("location", to);
            Ok(response)
        }
        "/ws" => Ok(websocket(request, inside)),
        "/upload" => {
            let mut body = request.into_body().into_data_stream();
            let mut bytes = 0;
            while let Some(data) = body.next().await {
                bytes += data.map_err(|_| "the body was cut short")?.len();
            }
            let text = Left::Text(bytes.to_string().into());
            Ok(Response::new(Answer { inside: Some(inside), left: text }))
        }
        _ => {
            tokio::time::sleep(delay).await;
            let text = Left::Text(Bytes::from_static(b"ok"));
            Ok(Response::new(Answer { inside: Some(inside), left: text }))
        }
    }
}

fn query_ms(query: Option<&str>) -> Duration {
    let ms = query.and_then(|q| q.strip_prefix("ms=")).and_then(|q| q.split('&').next());
    let ms = ms.and_then(|n| n.parse::<f64>().ok()).unwrap_or(0.0);
    Duration::from_secs_f64(ms / 1000.0)
}

fn websocket(request: Request<Incoming>, inside: Inside) -> Response<Answer> {
    tokio::spawn(async move {
        let _open = inside;
        if let Ok(upgraded) = hyper::upgrade::on(request).await {
            let mut io = TokioIo::new(upgraded);
            let _ = tokio::io::copy(&mut io, &mut tokio::io::sink()).await;
        }
    });
    let mut response = Response::new(Answer { inside: None, left: Left::Nothing });
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert("upgrade", hyper::header::HeaderValue::from_static("websocket"));
    headers.insert("connection", hyper::header::HeaderValue::from_static("upgrade"));
    response
}

/// A body that keeps its request in the app's count until the body is complete.
struct Answer {
    inside: Option<Inside>,
    left: Left,
}

enum Left {
    Text(Bytes),
    Half(Duration),
    /// Hyper writes its buffer when its body has no more data for now, and writes nothing once the
    /// body has failed. Without this step, a delay of zero would cut the answer before its head.
    Flush(Duration),
    Cut(Pin<Box<tokio::time::Sleep>>),
    Nothing,
}

impl Body for Answer {
    type Data = Bytes;
    type Error = &'static str;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
        match std::mem::replace(&mut self.left, Left::Nothing) {
            Left::Text(text) => Poll::Ready(Some(Ok(Frame::data(text)))),
            Left::Half(delay) => {
                self.left = Left::Flush(delay);
                Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"half of")))))
            }
            Left::Flush(delay) => {
                self.left = Left::Cut(Box::pin(tokio::time::sleep(delay)));
                context.waker().wake_by_ref();
                Poll::Pending
            }
            Left::Cut(mut sleep) => match sleep.as_mut().poll(context) {
                Poll::Ready(()) => Poll::Ready(Some(Err("cut as asked"))),
                Poll::Pending => {
                    self.left = Left::Cut(sleep);
                    Poll::Pending
                }
            },
            Left::Nothing => {
                // The request leaves the app before the last byte does.
                if let Some(mut inside) = self.inside.take() {
                    inside.answered = true;
                }
                Poll::Ready(None)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    #[tokio::test]
    async fn an_echo_has_no_empty_frames() {
        let app = App::start().await;
        // The bytes from the app are read on the way, because the client would not show them.
        let (mut from_app, mut to_app) =
            TcpStream::connect(app.grpc).await.expect("a connection").into_split();
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        let (mut from_client, mut to_client) = tokio::io::split(theirs);
        tokio::spawn(async move {
            let _ = tokio::io::copy(&mut from_client, &mut to_app).await;
        });
        let sent = tokio::spawn(async move {
            let (mut all, mut some) = (Vec::new(), [0; 4096]);
            while let Ok(count @ 1..) = from_app.read(&mut some).await {
                all.extend_from_slice(&some[..count]);
                let _ = to_client.write_all(&some[..count]).await;
            }
            all
        });
        let client = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(ours));
        let (mut sender, connection) = client.await.expect("HTTP/2");
        let connection = tokio::spawn(connection);
        let hello = futures_util::stream::once(async {
            Ok::<_, Infallible>(Frame::data(Bytes::from_static(b"hello")))
        });
        let request = Request::post("http://app/").body(StreamBody::new(Box::pin(hello)));
        let answer = sender.send_request(request.expect("a request")).await.expect("an answer");
        assert_eq!(answer.into_body().collect().await.expect("a body").to_bytes(), "hello");
        drop(sender);
        let _ = connection.await;

        let sent = sent.await.expect("what the app sent");
        let (mut rest, mut data) = (&sent[..], Vec::new());
        while let [a, b, c, kind, flags, _, _, _, _, frame @ ..] = rest {
            let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
            if *kind == 0 {
                data.push((length, *flags));
            }
            rest = &frame[length..];
        }
        assert_eq!(data, [(5, 0)], "lengths and flags of the frames with data");
    }
}
