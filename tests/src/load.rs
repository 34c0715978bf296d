//! A load of mixed requests, reproducible from its seed.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::Request;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::{JoinHandle, JoinSet};

use crate::app::Counts;
use crate::unix_time;

impl Default for Plan {
    /// A hundred plain requests of some ten milliseconds.
    fn default() -> Self {
        Self { requests: 100, connections: 10, average_ms: 10.0, mixed: false, seed: 1, path: "/work" }
    }
}

/// The parameters of a load.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// The number of requests; `u64::MAX` means to go on until stopped.
    pub requests: u64,
    /// The number of connections, each with one request at a time.
    pub connections: u64,
    /// The average time in the app, in milliseconds. Single requests take up to four times as long.
    pub average_ms: f64,
    /// Whether one request in eight is aborted, reset, refused or answered by Envoy itself.
    pub mixed: bool,
    /// The seed of the dice.
    pub seed: u64,
    /// The path of ordinary requests, for the access log.
    pub path: &'static str,
}

/// How many loads have started. Each has a number, so that two on one app know their requests apart.
static LOADS: AtomicU64 = AtomicU64::new(0);

#[derive(Debug)]
struct Progress {
    load: u64,
    started: AtomicU64,
    sent: AtomicU64,
    failures: Mutex<Vec<String>>,
    stop: AtomicBool,
}

/// A running load.
#[derive(Debug)]
pub struct Load {
    progress: Arc<Progress>,
    running: JoinHandle<()>,
}

impl Load {
    /// Starts a load on Envoy. `app` says whether a request that is to be aborted has arrived.
    pub fn start(plan: Plan, envoy: SocketAddr, app: &Arc<Counts>) -> Self {
        let progress = Arc::new(Progress {
            load: LOADS.fetch_add(1, Ordering::SeqCst),
            started: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            failures: Mutex::default(),
            stop: AtomicBool::new(false),
        });
        let mut clients = JoinSet::new();
        for number in 0..plan.connections {
            let client = Client {
                envoy,
                app: Arc::clone(app),
                progress: Arc::clone(&progress),
                dice: Dice::new(plan.seed.wrapping_mul(1_000_003).wrapping_add(number)),
                plan,
            };
            clients.spawn(client.run());
        }
        let running = tokio::spawn(async move { while clients.join_next().await.is_some() {} });
        Self { progress, running }
    }

    /// Returns the number of requests sent so far.
    pub fn sent(&self) -> u64 {
        self.progress.sent.load(Ordering::SeqCst)
    }

    /// Lets open requests finish, and begins no others.
    pub fn stop(&self) {
        self.progress.stop.store(true, Ordering::SeqCst);
    }

    /// Ends at once, when no Envoy is left to answer.
    pub async fn abandon(self) {
        self.running.abort();
        let _ = self.running.await;
    }

    /// Waits for the end. Returns the number of requests sent, all of which got an answer that they
    /// may get.
    ///
    /// # Panics
    /// If a request got another answer, or a client failed.
    pub async fn finish(self) -> u64 {
        let (sent, failures) = self.finish_with_failures().await;
        let first = &failures[..failures.len().min(20)];
        assert!(failures.is_empty(), "{} of {sent} requests failed, at first {first:#?}", failures.len());
        sent
    }

    /// Waits for the end. Returns the number of requests sent, and a description of each request
    /// that got an answer it may not get.
    ///
    /// # Panics
    /// If a client failed.
    pub async fn finish_with_failures(self) -> (u64, Vec<String>) {
        let Self { progress, running } = self;
        running.await.expect("the load's clients ran");
        let failures = std::mem::take(&mut *progress.failures.lock().expect("no panic under this lock"));
        (progress.sent.load(Ordering::SeqCst), failures)
    }
}

/// How a request goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Work,
    AbortBeforeAnswer,
    AbortInAnswer,
    Reset,
    Half,
    NoHosts,
    Local,
}

struct Client {
    envoy: SocketAddr,
    app: Arc<Counts>,
    progress: Arc<Progress>,
    dice: Dice,
    plan: Plan,
}

type Sender = SendRequest<Empty<Bytes>>;

impl Client {
    async fn run(mut self) {
        let mut sender = None;
        loop {
            if self.progress.stop.load(Ordering::SeqCst) {
                return;
            }
            let id = self.progress.started.fetch_add(1, Ordering::SeqCst);
            if id >= self.plan.requests {
                return;
            }
            sender = self.request(id, sender).await;
        }
    }

    /// Sends one request. Returns the connection if it can be used again.
    async fn request(&mut self, id: u64, sender: Option<Sender>) -> Option<Sender> {
        let kind = self.kind();
        let ms = self.dice.unit() * self.plan.average_ms * 2.0;
        // One request in three takes four times as long as the others, so that latencies vary.
        let ms = if self.dice.below(3) == 0 { ms * 2.0 } else { ms / 2.0 };
        let id = format!("{}-{id}", self.progress.load);
        let path = match kind {
            Kind::Work => format!("{}?ms={ms:.1}", self.plan.path),
            Kind::AbortBeforeAnswer => "/work?ms=30000".into(),
            Kind::AbortInAnswer => "/hang".into(),
            Kind::Reset => "/reset".into(),
            Kind::Half => format!("/half?ms={ms:.1}"),
            Kind::NoHosts => "/nohosts".into(),
            Kind::Local => "/local".into(),
        };
        let aborts = matches!(kind, Kind::AbortBeforeAnswer | Kind::AbortInAnswer);
        let mut request = Request::get(&path).header("host", "app");
        if aborts {
            request = request.header("x-id", &id);
        }
        let request = request.body(Empty::new()).expect("a request");
        let ready = match sender {
            Some(mut sender) => sender.ready().await.is_ok().then_some(sender),
            None => None,
        };
        let began = Instant::now();
        let again = ready.is_some();
        let mut sender = match ready {
            Some(sender) => sender,
            None => match connect(self.envoy).await {
                Ok(sender) => sender,
                Err(error) => {
                    self.fail(format!("no connection: {error}"));
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    return None;
                }
            },
        };
        let answer = sender.send_request(request);
        let (outcome, kept) = match kind {
            Kind::AbortBeforeAnswer => {
                // Only a request that has reached the app has certainly been sent.
                let abort = async {
                    self.seen(&id).await;
                    tokio::time::sleep(self.some_ms(ms)).await;
                };
                tokio::select! {
                    answer = answer => (Err(format!("{:?}", answer.map(|answer| answer.status()))), false),
                    () = abort => (Ok(()), false),
                }
            }
            Kind::AbortInAnswer => {
                let outcome = match answer.await {
                    Ok(response) => {
                        tokio::time::sleep(self.some_ms(ms)).await;
                        drop(response);
                        Ok(())
                    }
                    Err(error) => Err(format!("{error:?}")),
                };
                let _ = self.app.has_seen(&id);
                (outcome, false)
            }
            _ => complete(kind, answer.await).await,
        };
        if let Err(what) = outcome {
            let connection = if again { "an old" } else { "a new" };
            let took = began.elapsed();
            self.fail(format!("{path} over {connection} connection, after {took:?}: {what}"));
        }
        self.progress.sent.fetch_add(1, Ordering::SeqCst);
        kept.then_some(sender)
    }

    fn fail(&self, what: String) {
        // The time is in the format of the access log.
        let what = format!("{:.6} {what}", unix_time().as_secs_f64());
        self.progress.failures.lock().expect("no panic under this lock").push(what);
    }

    async fn seen(&self, id: &str) {
        while !self.app.has_seen(id) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    fn some_ms(&self, ms: f64) -> Duration {
        Duration::from_secs_f64(ms / 1000.0)
    }

    fn kind(&mut self) -> Kind {
        if !self.plan.mixed {
            return Kind::Work;
        }
        match self.dice.below(48) {
            0 => Kind::AbortBeforeAnswer,
            1 => Kind::AbortInAnswer,
            2 => Kind::Reset,
            3 => Kind::Half,
            4 => Kind::NoHosts,
            5 => Kind::Local,
            _ => Kind::Work,
        }
    }
}

/// Reads an answer to its end. Returns what is wrong with it, and whether the connection can be
/// used again.
async fn complete(
    kind: Kind,
    answer: hyper::Result<hyper::Response<hyper::body::Incoming>>,
) -> (Result<(), String>, bool) {
    let response = match answer {
        Ok(response) => response,
        Err(error) => return (Err(format!("{error:?}")), false),
    };
    let code = response.status().as_u16();
    let body = response.into_body().collect().await.map(|body| body.to_bytes());
    let expected = match kind {
        Kind::Reset | Kind::NoHosts => (503, true),
        Kind::Local => (403, true),
        Kind::Half => (200, false),
        _ => (200, true),
    };
    let whole = body.is_ok();
    let outcome = if (code, whole) == expected { Ok(()) } else { Err(format!("{code}, {body:?}")) };
    (outcome, whole)
}

async fn connect(to: SocketAddr) -> Result<Sender, String> {
    let stream = TcpStream::connect(to).await.map_err(|e| e.to_string())?;
    let _ = stream.set_nodelay(true);
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
    tokio::spawn(connection);
    Ok(sender)
}

/// A small random generator (splitmix64). The same seed gives the same load.
#[derive(Debug)]
pub struct Dice(u64);

impl Dice {
    /// Returns the generator of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Returns the next number.
    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Returns a number below `sides`.
    pub fn below(&mut self, sides: u64) -> u64 {
        self.roll() % sides
    }

    /// Returns a number from 0 to 1.
    pub fn unit(&mut self) -> f64 {
        (self.roll() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::app::App;

    #[tokio::test]
    async fn two_loads_of_one_seed_on_one_app_take_only_their_own_requests_for_arrived() {
        let app = App::start().await;
        let plan = Plan { requests: 300, connections: 1, average_ms: 0.0, mixed: true, ..Plan::default() };
        let loads = [(); 2].map(|()| Load::start(plan, app.address, &app.counts));
        let mut sent = 0;
        for load in loads {
            let (of_load, failures) = load.finish_with_failures().await;
            sent += of_load;
            // Without an Envoy, the app itself answers what Envoy would have to answer.
            let missed: Vec<_> = failures.iter().filter(|what| what.contains("ms=30000")).collect();
            assert!(missed.is_empty(), "arrived, and not known: {missed:?}");
        }
        assert_eq!((sent, app.counts.requests()), (600, 600));
    }
}
