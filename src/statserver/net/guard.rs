//! What one connection may hold and how long it may take; and how many may be there of which nobody has shown a token.
//!
//! The connection's bytes ([`crate::net::listener::Link`]) and what is made of them (requests, frames, calls) share a [`Guard`].

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::cli::limits::{Limit, Limits};
use crate::metrics::Metrics;

/// So much of a body, a frame or an answer takes nothing of a budget: it is a part of what a connection costs.
pub const FREE_BYTES: usize = 4 << 10;
/// What an HTTP/2 client begins with, whatever it says.
const PREFACE_BYTES: usize = 24;
/// A websocket that once needed a large buffer keeps it. One that has not needed it for so long is asked to connect again.
const LARGE_FOR: Duration = Duration::from_secs(60);
/// What a control frame of a client has before its payload.
const CONTROL_HEAD_BYTES: usize = 6;
/// A connection of which nobody has shown a token makes room for another one after so long.
const PATIENCE: Duration = Duration::from_secs(2);
/// The most bytes of HTTP/2 that are read before what they say is dealt with.
const BYTES_IN_A_TURN: usize = 2 << 10;
/// The most calls without a token over such a connection.
const MOST_CALLS_OF_STRANGERS: usize = 32;

/// Bytes that all connections share.
#[derive(Clone, Debug)]
pub struct Budget(Arc<Semaphore>);

/// A part of a [`Budget`], which takes it back when this is dropped.
#[derive(Debug, Default)]
pub struct Share(Option<OwnedSemaphorePermit>);

impl Budget {
    /// So many bytes.
    pub fn new(bytes: usize) -> Self {
        Self(Arc::new(Semaphore::new(bytes)))
    }

    /// Has a share grow until it is good for so many bytes, of which the first [`FREE_BYTES`] take nothing.
    ///
    /// # Errors
    /// If the others have the rest.
    pub fn cover(&self, share: &mut Share, bytes: usize) -> Result<(), Exhausted> {
        let wanted = bytes.saturating_sub(FREE_BYTES);
        let more = wanted.saturating_sub(share.0.as_ref().map_or(0, OwnedSemaphorePermit::num_permits));
        if more == 0 {
            return Ok(());
        }
        let more = u32::try_from(more).map_err(|_| Exhausted)?;
        let permit = Arc::clone(&self.0).try_acquire_many_owned(more).map_err(|_| Exhausted)?;
        match &mut share.0 {
            Some(have) => have.merge(permit),
            None => share.0 = Some(permit),
        }
        Ok(())
    }
}

/// Nothing is left of a [`Budget`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exhausted;

/// What a connection is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// A request's head, or HTTP/2's preface, has begun to come, or should have.
    Head(Instant),
    /// A request, whose body has a timeout of its own; or HTTP/2.
    Request,
    /// Between two requests.
    Idle(Instant),
    /// A websocket, and since when a message of it is coming.
    Stream(Option<Instant>),
}

#[derive(Debug)]
struct State {
    phase: Phase,
    /// Bytes of the head, or of the message, that is coming.
    read: usize,
    /// The most that were ever kept at once: buffers do not shrink.
    share: Share,
    large_at: Option<Instant>,
}

/// Watches over a connection.
#[derive(Debug)]
pub struct Guard {
    state: Mutex<State>,
    stranger: Mutex<Option<Stranger>>,
    calls_of_stranger: AtomicUsize,
    /// Calls that began since everything was last written.
    unwritten: AtomicUsize,
    /// Bytes that were read since the connection's task last had its turn.
    in_turn: AtomicUsize,
    answers: Mutex<Answers>,
    over_budget: AtomicBool,
    is_grpc: bool,
    limits: Limits,
    budget: Budget,
    metrics: Arc<Metrics>,
    /// Ends the connection at once.
    ended: CancellationToken,
    /// Its place among those that are between two requests.
    idle: Mutex<Option<Place>>,
    idlers: Arc<Idlers>,
}

/// When a read has to have brought something, and what follows if not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline {
    /// When.
    pub at: Instant,
    /// The limit that it is; `None` for one that simply ends.
    pub limit: Option<Limit>,
}

impl Guard {
    /// Over a new connection.
    pub fn new(
        is_grpc: bool,
        limits: Limits,
        budget: Budget,
        metrics: Arc<Metrics>,
        idlers: Arc<Idlers>,
    ) -> Self {
        let phase = Phase::Head(Instant::now());
        Self {
            state: Mutex::new(State { phase, read: 0, share: Share::default(), large_at: None }),
            stranger: Mutex::default(),
            calls_of_stranger: AtomicUsize::new(0),
            unwritten: AtomicUsize::new(0),
            in_turn: AtomicUsize::new(0),
            answers: Mutex::default(),
            over_budget: AtomicBool::new(false),
            is_grpc,
            limits,
            budget,
            metrics,
            ended: CancellationToken::new(),
            idle: Mutex::default(),
            idlers,
        }
    }

    /// Nobody has shown a token over it yet.
    pub fn is_strangers(&self, stranger: Stranger) {
        *lock(&self.stranger) = Some(stranger);
    }

    /// Somebody has shown a token or a certificate.
    pub fn known(&self) {
        drop(lock(&self.stranger).take());
    }

    /// Whether nobody has.
    pub fn has_stranger(&self) -> bool {
        lock(&self.stranger).is_some()
    }

    /// A call without a token: after some of them the connection ends.
    pub fn stranger_called(&self) {
        if self.calls_of_stranger.fetch_add(1, Ordering::Relaxed) >= MOST_CALLS_OF_STRANGERS
            && self.has_stranger()
        {
            self.ended.cancel();
        }
    }

    /// Whether it has to end.
    pub fn is_ended(&self) -> bool {
        self.ended.is_cancelled()
    }

    /// Resolves when it has to end: for another's sake, or for what it did.
    pub async fn ended(&self) {
        let evicted = lock(&self.stranger).as_ref().map(|stranger| stranger.evicted.clone());
        let evicted = async {
            match evicted {
                Some(evicted) => {
                    evicted.cancelled().await;
                    // Who has become known meanwhile has no place to give.
                    if !self.has_stranger() {
                        std::future::pending::<()>().await;
                    }
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.ended.cancelled() => {}
            () = evicted => {}
        }
    }

    /// A request's head is complete.
    pub fn request(&self) {
        let mut state = lock(&self.state);
        if !matches!(state.phase, Phase::Stream(_)) {
            state.phase = Phase::Request;
        }
    }

    /// It has its answer.
    pub fn answered(&self) {
        let mut state = lock(&self.state);
        if state.phase == Phase::Request {
            state.phase = Phase::Idle(Instant::now());
            *lock(&self.idle) = Some(self.idlers.enter(self.ended.clone()));
        }
    }

    /// From now on it is a websocket.
    pub fn upgraded(&self) {
        let mut state = lock(&self.state);
        (state.phase, state.read) = (Phase::Stream(None), 0);
    }

    /// So many bytes have come.
    ///
    /// # Errors
    /// If they go beyond what all connections may keep.
    pub fn received(&self, bytes: usize) -> io::Result<()> {
        let mut state = lock(&self.state);
        let State { phase, read, share, .. } = &mut *state;
        self.in_turn.fetch_add(bytes, Ordering::Relaxed);
        *read = read.saturating_add(bytes);
        match phase {
            Phase::Head(_) if self.is_grpc => {
                if *read >= PREFACE_BYTES {
                    *phase = Phase::Request;
                }
            }
            Phase::Head(_) | Phase::Request => {}
            Phase::Idle(_) => {
                *phase = Phase::Head(Instant::now());
                drop(lock(&self.idle).take());
            }
            Phase::Stream(since) => {
                since.get_or_insert_with(Instant::now);
                if self.budget.cover(share, *read).is_err() {
                    self.metrics.refused(Limit::BytesInFlight);
                    self.over_budget.store(true, Ordering::Relaxed);
                    return Err(io::Error::other("more bytes than --max-bytes-in-flight allows"));
                }
            }
        }
        Ok(())
    }

    /// Whether it had to end because of the budget.
    pub fn is_over_budget(&self) -> bool {
        self.over_budget.load(Ordering::Relaxed)
    }

    /// A websocket's message was dealt with.
    pub fn dealt_with(&self) {
        let mut state = lock(&self.state);
        if state.read > FREE_BYTES {
            state.large_at = Some(Instant::now());
        }
        (state.phase, state.read) = (Phase::Stream(None), 0);
    }

    /// A control frame came, maybe in the middle of a message.
    pub fn control_frame(&self, payload: usize) {
        let mut state = lock(&self.state);
        state.read = state.read.saturating_sub(payload + CONTROL_HEAD_BYTES);
        if state.read == 0 {
            state.phase = Phase::Stream(None);
        }
    }

    /// Whether a websocket keeps a large buffer that it has not needed for long.
    pub fn wastes(&self) -> bool {
        lock(&self.state).large_at.is_some_and(|at| at.elapsed() > LARGE_FOR)
    }

    /// Until when something has to come.
    pub fn deadline(&self) -> Option<Deadline> {
        let Limits { head_timeout, idle_timeout, body_timeout, .. } = self.limits;
        let (at, limit) = match lock(&self.state).phase {
            Phase::Head(since) => (since + head_timeout, Some(Limit::HeadTimeout)),
            Phase::Idle(since) => (since + idle_timeout, None),
            Phase::Stream(Some(since)) => (since + body_timeout, Some(Limit::BodyTimeout)),
            Phase::Request | Phase::Stream(None) => return None,
        };
        Some(Deadline { at, limit })
    }

    /// How long what is written may wait for the client.
    pub fn write_timeout(&self) -> Duration {
        self.limits.write_timeout
    }

    /// A limit was reached.
    pub fn refused(&self, limit: Limit) {
        self.metrics.refused(limit);
    }

    /// Whether the client has not read an answer for so long.
    pub fn has_unread(&self, timeout: Duration) -> bool {
        lock(&self.answers).unread.values().any(|since| since.elapsed() >= timeout)
    }

    /// A call begins.
    pub fn call(&self) {
        self.unwritten.fetch_add(1, Ordering::Relaxed);
    }

    /// The connection's task has its turn.
    pub fn turn(&self) {
        self.in_turn.store(0, Ordering::Relaxed);
    }

    /// How many more bytes may be read before its next one. HTTP/2 reads all that there is before it hands over the first call,
    /// and a call's head may be ten bytes of that.
    pub fn left_in_turn(&self) -> usize {
        BYTES_IN_A_TURN.saturating_sub(self.in_turn.load(Ordering::Relaxed))
    }

    /// Everything has been written.
    pub fn written(&self) {
        self.unwritten.store(0, Ordering::Relaxed);
    }

    /// Calls that began since then.
    pub fn unwritten(&self) -> usize {
        self.unwritten.load(Ordering::Relaxed)
    }
}

/// The body of an answer to a call. HTTP/2 asks for more of it whenever the client has room for some; a client that makes none does
/// not read.
#[derive(Debug)]
pub struct Unread {
    body: Body,
    guard: Arc<Guard>,
    number: u64,
    _call: OwnedSemaphorePermit,
}

impl Unread {
    /// This body, which the client over this connection has to read.
    pub fn new(body: Body, guard: Arc<Guard>, call: OwnedSemaphorePermit) -> Self {
        let number = {
            let mut answers = lock(&guard.answers);
            answers.next += 1;
            let number = answers.next;
            answers.unread.insert(number, Instant::now());
            number
        };
        Self { body, guard, number, _call: call }
    }
}

impl HttpBody for Unread {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let unread = self.get_mut();
        let frame = Pin::new(&mut unread.body).poll_frame(cx);
        let mut answers = lock(&unread.guard.answers);
        if frame.is_ready() {
            answers.unread.insert(unread.number, Instant::now());
        } else {
            answers.unread.remove(&unread.number);
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        lock(&self.guard.answers).unread.remove(&self.number);
    }
}

/// Answers to calls, and since when the client has not asked for more of them.
#[derive(Debug, Default)]
struct Answers {
    next: u64,
    unread: HashMap<u64, Instant>,
}

/// The connections that are between two requests, in the order in which they came to be so. Where there is no place for another
/// connection, the first of them gives its own: every pod keeps one, and more pods than places must not keep each other out, nor
/// a probe.
#[derive(Debug, Default)]
pub struct Idlers(Mutex<Idle>);

#[derive(Debug, Default)]
struct Idle {
    next: u64,
    ends: BTreeMap<u64, CancellationToken>,
}

/// A place among [`Idlers`].
#[derive(Debug)]
struct Place {
    number: u64,
    of: Arc<Idlers>,
}

impl Idlers {
    fn enter(self: &Arc<Self>, end: CancellationToken) -> Place {
        let mut idle = lock(&self.0);
        let number = idle.next;
        idle.next += 1;
        idle.ends.insert(number, end);
        Place { number, of: Arc::clone(self) }
    }

    /// Ends the one that has been idle for longest; `false` if there is none.
    pub fn end_one(&self) -> bool {
        let first = lock(&self.0).ends.pop_first();
        first.inspect(|(_, end)| end.cancel()).is_some()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.of.0).ends.remove(&self.number);
    }
}

/// The connections of which nobody has shown a token or a certificate: so many at once. One more waits, and then takes the place
/// of the oldest: whoever has a token shows it with its first request, in much less than [`PATIENCE`].
#[derive(Debug)]
pub struct Strangers {
    most: usize,
    places: Mutex<Places>,
    left: Notify,
}

#[derive(Debug, Default)]
struct Places {
    next: u64,
    /// In order of arrival.
    taken: BTreeMap<u64, (Instant, CancellationToken)>,
}

/// A place among them.
#[derive(Debug)]
pub struct Stranger {
    number: u64,
    evicted: CancellationToken,
    of: Arc<Strangers>,
}

impl Strangers {
    /// So many.
    pub fn new(most: usize) -> Self {
        Self { most, places: Mutex::default(), left: Notify::new() }
    }

    /// A place; maybe that of one who had it for long, which is told so. The caller counts these.
    pub async fn enter(self: &Arc<Self>) -> (Stranger, bool) {
        loop {
            let left = self.left.notified();
            let until = {
                let mut places = lock(&self.places);
                let mut evicts = false;
                if places.taken.len() >= self.most
                    && let Some(oldest) = places.taken.first_entry()
                    && oldest.get().0.elapsed() >= PATIENCE
                {
                    oldest.remove().1.cancel();
                    evicts = true;
                }
                if places.taken.len() < self.most {
                    let (number, evicted) = (places.next, CancellationToken::new());
                    places.next += 1;
                    places.taken.insert(number, (Instant::now(), evicted.clone()));
                    return (Stranger { number, evicted, of: Arc::clone(self) }, evicts);
                }
                places.taken.first_key_value().map_or_else(Instant::now, |(_, (since, _))| *since + PATIENCE)
            };
            let _ = timeout_at(until, left).await;
        }
    }
}

impl Stranger {
    /// Resolves when another takes its place.
    pub async fn evicted(&self) {
        self.evicted.cancelled().await;
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        if lock(&self.of.places).taken.remove(&self.number).is_some() {
            self.of.left.notify_one();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn guard(budget: &Budget) -> Guard {
        let limits = crate::cli::flags::Flags::parse_from(["inflight-statserver"]).limits;
        Guard::new(false, limits, budget.clone(), Arc::default(), Arc::default())
    }

    #[test]
    fn a_websocket_keeps_what_it_needed_most_until_it_ends() {
        let budget = Budget::new(10_000);
        let first = guard(&budget);
        first.upgraded();
        first.received(FREE_BYTES).unwrap();
        first.dealt_with();
        assert_eq!(budget.0.available_permits(), 10_000);
        first.received(FREE_BYTES + 9_000).unwrap();
        first.dealt_with();
        assert_eq!(budget.0.available_permits(), 1_000);
        first.received(FREE_BYTES + 5_000).unwrap();
        let second = guard(&budget);
        second.upgraded();
        second.received(FREE_BYTES + 1_000).unwrap();
        assert!(!second.is_over_budget());
        second.received(1).unwrap_err();
        assert!(second.is_over_budget());
        drop((first, second));
        assert_eq!(budget.0.available_permits(), 10_000);
    }

    #[test]
    fn the_connection_that_is_idle_for_longest_gives_its_place() {
        let idlers = Arc::new(Idlers::default());
        let limits = crate::cli::flags::Flags::parse_from(["inflight-statserver"]).limits;
        let open = || Guard::new(false, limits, Budget::new(1), Arc::default(), Arc::clone(&idlers));
        let guards = [open(), open(), open(), open()];
        assert!(!idlers.end_one(), "they have yet to ask for anything");
        for guard in &guards {
            guard.request();
            guard.answered();
        }
        guards[0].received(1).unwrap();
        let [_, second, third, gone] = &guards;
        assert!(idlers.end_one());
        assert_eq!([second.is_ended(), third.is_ended()], [true, false]);
        assert!(idlers.end_one() && third.is_ended() && !gone.is_ended());
        drop(guards);
        assert!(!idlers.end_one());
    }

    #[test]
    fn control_frames_neither_begin_nor_end_a_message() {
        let guard = guard(&Budget::new(10_000));
        guard.upgraded();
        assert_eq!(guard.deadline(), None);
        guard.received(CONTROL_HEAD_BYTES + 4).unwrap();
        guard.control_frame(4);
        assert_eq!(guard.deadline(), None);
        guard.received(100).unwrap();
        let deadline = guard.deadline();
        assert_eq!(deadline.and_then(|deadline| deadline.limit), Some(Limit::BodyTimeout));
        guard.received(CONTROL_HEAD_BYTES + 4).unwrap();
        guard.control_frame(4);
        assert_eq!(guard.deadline(), deadline);
        guard.dealt_with();
        assert_eq!(guard.deadline(), None);
    }

    #[tokio::test]
    async fn a_stranger_too_many_takes_the_place_of_the_oldest_after_a_while() {
        let strangers = Arc::new(Strangers::new(2));
        let (first, _) = strangers.enter().await;
        let (second, evicts) = strangers.enter().await;
        assert!(!evicts);
        let began = Instant::now();
        let (_third, evicts) = strangers.enter().await;
        assert!(evicts && began.elapsed() >= PATIENCE);
        first.evicted().await;
        // One that leaves makes room at once.
        drop(second);
        let (_fourth, evicts) = strangers.enter().await;
        assert!(!evicts);
    }
}
