//! Between Envoy and the stats server: records reports, loses answers, plays dead.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use inflight_stats::Report;
use inflight_stats::report::CONTENT_TYPE;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::http;

/// What the tap does with a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Passes it on, and the answer back.
    Forward,
    /// Passes it on, and closes the connection instead of answering.
    LoseAnswer,
    /// Closes the connection without passing it on.
    Refuse,
    /// Neither passes it on nor answers.
    Hang,
    /// Answers this code without passing it on.
    Answer(u16),
}

/// A report that came by.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// The report.
    pub report: Report,
    /// The code that the sender got.
    pub answered: Option<u16>,
    /// When it came.
    pub at: Instant,
    /// The request's headers.
    pub headers: Vec<(String, String)>,
}

#[derive(Debug)]
struct Shared {
    backend: Option<SocketAddr>,
    mode: Mode,
    recorded: Vec<Recorded>,
}

/// A running tap.
#[derive(Debug)]
pub struct Tap {
    /// Where it listens.
    pub address: SocketAddr,
    shared: Arc<Mutex<Shared>>,
    serving: JoinHandle<()>,
}

impl Tap {
    /// Starts one in front of a stats server, or of nothing: then it acknowledges by itself.
    ///
    /// # Panics
    /// If there is no port.
    pub async fn start(backend: Option<SocketAddr>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let shared = Arc::new(Mutex::new(Shared { backend, mode: Mode::Forward, recorded: Vec::new() }));
        let serving = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Self { address, shared, serving }
    }

    fn locked<T>(&self, f: impl FnOnce(&mut Shared) -> T) -> T {
        f(&mut self.shared.lock().expect("no panic under this lock"))
    }

    /// From the next report on, do this.
    pub fn set_mode(&self, mode: Mode) {
        self.locked(|shared| shared.mode = mode);
    }

    /// From the next report on, pass them on to another.
    pub fn set_backend(&self, backend: SocketAddr) {
        self.locked(|shared| shared.backend = Some(backend));
    }

    /// All reports so far.
    pub fn recorded(&self) -> Vec<Recorded> {
        self.locked(|shared| shared.recorded.clone())
    }

    /// The reports that were acknowledged, in order.
    pub fn acknowledged(&self) -> Vec<Report> {
        self.recorded().into_iter().filter(|r| r.answered == Some(202)).map(|r| r.report).collect()
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Mutex<Shared>>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let service = service_fn(move |request| take(request, Arc::clone(&shared)));
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

/// An error closes the connection.
async fn take(
    request: Request<Incoming>,
    shared: Arc<Mutex<Shared>>,
) -> Result<Response<Full<Bytes>>, &'static str> {
    let at = Instant::now();
    let headers = request.headers().iter();
    let headers =
        headers.map(|(k, v)| (k.to_string(), String::from_utf8_lossy(v.as_bytes()).into_owned())).collect();
    let path = request.uri().path().to_owned();
    let body = request.into_body().collect().await.map_err(|_| "half a report")?.to_bytes();
    let report = Report::decode(&body).map_err(|_| "no report")?;
    let (backend, mode) = {
        let shared = shared.lock().expect("no panic under this lock");
        (shared.backend, shared.mode)
    };
    let answer = match (mode, backend) {
        (Mode::Refuse | Mode::Hang, _) => Err("as asked"),
        (Mode::Answer(code), _) => Ok((StatusCode::from_u16(code).expect("a code"), "as asked".into())),
        (Mode::Forward | Mode::LoseAnswer, None) => Ok((StatusCode::ACCEPTED, String::new())),
        (Mode::Forward | Mode::LoseAnswer, Some(backend)) => {
            http::post(backend, &path, CONTENT_TYPE, body).await.map_err(|_| "the stats server is away")
        }
    };
    let answer = if mode == Mode::LoseAnswer { Err("lost as asked") } else { answer };
    let answered = answer.as_ref().ok().map(|(code, _)| code.as_u16());
    shared.lock().expect("no panic under this lock").recorded.push(Recorded {
        report,
        answered,
        at,
        headers,
    });
    if mode == Mode::Hang {
        tokio::time::sleep(Duration::from_secs(600)).await;
    }
    let (status, body) = answer?;
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    Ok(response)
}
