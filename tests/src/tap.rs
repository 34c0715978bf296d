//! The tap: a proxy between Envoy and the stats server that records reports, loses answers, or does
//! not answer at all.

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
use inflight_stats::protocol::report::CONTENT_TYPE;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::{http, wait};

/// How the tap treats a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Passes the report on, and the answer back.
    Forward,
    /// Passes the report on, and closes the connection instead of answering.
    LoseAnswer,
    /// Closes the connection without passing the report on.
    Refuse,
    /// Neither passes the report on nor answers.
    Hang,
    /// Answers with this code without passing the report on.
    Answer(u16),
    /// Passes the report on, and the answer back after this many milliseconds.
    Slow(u64),
    /// Writes bytes that are not HTTP.
    Garbage,
    /// Writes a head with 202 that never ends.
    EndlessHead,
    /// Answers 202 with a body that never ends, as fast as it can.
    EndlessBody,
}

impl Mode {
    /// Returns the bytes to write to every client that connects, and those to repeat after that.
    fn raw(self) -> Option<(&'static [u8], Option<&'static [u8]>)> {
        const NONSENSE: &[u8] = b"\x16\x03\x01 this is not HTTP \x00\xff\r\n\r\n";
        const HEAD: &[u8] = b"HTTP/1.1 202 Accepted\r\ncontent-type: text/plain\r\n";
        const BODY: &[u8] = b"HTTP/1.1 202 Accepted\r\ncontent-length: 1000000000000\r\n\r\n";
        match self {
            Self::Garbage => Some((NONSENSE, None)),
            Self::EndlessHead => Some((HEAD, Some(b"x-more: and more and more and more\r\n"))),
            Self::EndlessBody => Some((BODY, Some(&[b'x'; 64 << 10]))),
            _ => None,
        }
    }
}

/// A report that the tap received.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// The report.
    pub report: Report,
    /// The code that the sender received.
    pub answered: Option<u16>,
    /// When the report arrived.
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
    /// Starts a tap in front of a stats server. Without one, the tap itself acknowledges reports.
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

    /// Sets the mode, from the next report on.
    pub fn set_mode(&self, mode: Mode) {
        self.locked(|shared| shared.mode = mode);
    }

    /// Sets another backend, from the next report on.
    pub fn set_backend(&self, backend: SocketAddr) {
        self.locked(|shared| shared.backend = Some(backend));
    }

    /// Returns all reports so far.
    pub fn recorded(&self) -> Vec<Recorded> {
        self.locked(|shared| shared.recorded.clone())
    }

    /// Returns the reports that were acknowledged, in order.
    pub fn acknowledged(&self) -> Vec<Report> {
        self.recorded().into_iter().filter(|r| r.answered == Some(202)).map(|r| r.report).collect()
    }
}

impl Tap {
    /// Waits until `more` more reports were acknowledged. Returns these reports.
    ///
    /// # Panics
    /// If that takes longer than `limit`.
    pub async fn reports(&self, more: usize, limit: Duration) -> Vec<Report> {
        let before = self.acknowledged().len();
        wait::until("reports come", limit, || async {
            let reports = self.acknowledged().split_off(before);
            if reports.len() >= more { Ok(reports) } else { Err(reports.len()) }
        })
        .await
    }

    /// Returns the requests that the acknowledged reports of one key add up to.
    pub fn requests(&self) -> u64 {
        let reports = self.acknowledged();
        reports.iter().map(|r| r.messages[0].until.requests - r.messages[0].since.requests).sum()
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
            let mode = shared.lock().expect("no panic under this lock").mode;
            if let Some((once, more)) = mode.raw() {
                return write(stream, once, more).await;
            }
            let service = service_fn(move |request| take(request, Arc::clone(&shared)));
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

/// When a request arrives, writes `once`, and then repeats `more` until the other side closes.
async fn write(mut stream: TcpStream, once: &[u8], more: Option<&[u8]>) {
    let _ = stream.readable().await;
    let _ = stream.write_all(once).await;
    if let Some(more) = more {
        while stream.write_all(more).await.is_ok() {}
    }
}

/// Handles a report. An error closes the connection.
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
        // These modes take effect only on a new connection.
        (Mode::Garbage | Mode::EndlessHead | Mode::EndlessBody, _) => Err("as asked"),
        (Mode::Answer(code), _) => Ok((StatusCode::from_u16(code).expect("a code"), "as asked".into())),
        (Mode::Forward | Mode::LoseAnswer | Mode::Slow(_), None) => Ok((StatusCode::ACCEPTED, String::new())),
        (Mode::Forward | Mode::LoseAnswer | Mode::Slow(_), Some(backend)) => {
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
    match mode {
        Mode::Hang => tokio::time::sleep(Duration::from_secs(600)).await,
        Mode::Slow(ms) => tokio::time::sleep(Duration::from_millis(ms)).await,
        _ => {}
    }
    let (status, body) = answer?;
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    Ok(response)
}
