//! The load of the scaling demo: requests that come in waves, and what became of them.

use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::Request;
use inflight_e2e::http::{self, Connection};
use tokio::task::JoinSet;

/// What became of the requests so far.
#[derive(Debug, Default)]
pub struct Tally {
    sent: AtomicU64,
    answered: AtomicU64,
    failures: Mutex<Vec<String>>,
    longest_wait: Mutex<Duration>,
}

impl Tally {
    /// Returns the number of requests that were sent.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::SeqCst)
    }

    /// Returns the number of requests that were answered with 200.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::SeqCst)
    }

    /// Returns what the requests that were not answered with 200 got instead.
    pub fn failures(&self) -> Vec<String> {
        self.failures.lock().expect("no panic under this lock").clone()
    }

    /// Returns the longest time that a request took beyond its time in the app.
    pub fn longest_wait(&self) -> Duration {
        *self.longest_wait.lock().expect("no panic under this lock")
    }

    fn note(&self, began: Instant, in_app: Duration, answer: Result<u16, String>) {
        let wait = began.elapsed().saturating_sub(in_app);
        let mut longest = self.longest_wait.lock().expect("no panic under this lock");
        *longest = wait.max(*longest);
        match answer {
            Ok(200) => drop(self.answered.fetch_add(1, Ordering::SeqCst)),
            other => {
                self.failures.lock().expect("no panic under this lock").push(format!("{other:?}"));
            }
        }
    }
}

fn request(in_app: Duration) -> Request<Full<Bytes>> {
    let path = format!("/work?ms={}", in_app.as_millis());
    Request::get(path).header("host", "hello").body(Full::default()).expect("a request")
}

/// Sends requests all at once, each over a connection of its own. Returns when all have ended.
pub async fn burst(tally: &Tally, to: SocketAddr, requests: u64, in_app: Duration) {
    let mut clients = JoinSet::new();
    let began = Instant::now();
    for _ in 0..requests {
        tally.sent.fetch_add(1, Ordering::SeqCst);
        clients.spawn(async move { http::ask(to, request(in_app)).await.map(|(code, _)| code.as_u16()) });
    }
    while let Some(answer) = clients.join_next().await {
        tally.note(began, in_app, answer.expect("a client"));
    }
}

/// Sends requests from some clients, each one after the other, for some time.
pub async fn plateau(tally: &Tally, to: SocketAddr, clients: u64, in_app: Duration, lasts: Duration) {
    let until = Instant::now() + lasts;
    let all = (0..clients).map(|_| one_after_the_other(tally, to, in_app, until));
    futures_util::future::join_all(all).await;
}

async fn one_after_the_other(tally: &Tally, to: SocketAddr, in_app: Duration, until: Instant) {
    let mut connection = None;
    while Instant::now() < until {
        tally.sent.fetch_add(1, Ordering::SeqCst);
        let began = Instant::now();
        let opened = match connection.take() {
            Some(opened) => Ok(opened),
            None => Connection::open(to).await,
        };
        let answer = match opened {
            Ok(mut opened) => {
                let answer = opened.ask(request(in_app)).await.map(|code| code.as_u16());
                connection = answer.is_ok().then_some(opened);
                answer
            }
            Err(error) => Err(error),
        };
        tally.note(began, in_app, answer);
    }
}
