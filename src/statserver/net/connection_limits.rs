//! What one connection may hold, and how long it may take.
//!
//! The connection and what is made of its bytes (requests, frames, calls) share a
//! [`ConnectionGuard`].

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::cli::limits::{Limit, Limits};
use crate::net::idle::{IdleConnections, IdleEntry};
use crate::net::memory_budget::{Budget, FREE_BYTES, Reservation};
use crate::net::unauthenticated::UnauthenticatedConnection;
use crate::os::lock::lock;
use crate::telemetry::metrics::Metrics;

/// What every HTTP/2 client sends first.
const PREFACE_BYTES: usize = 24;
/// A websocket that once needed a large buffer keeps it. One that has not needed it for so long is
/// asked to connect again.
const MAX_BUFFER_AGE: Duration = Duration::from_secs(60);
/// What a control frame of a client has before its payload.
const CONTROL_HEADER_BYTES: usize = 6;
/// Maximum number of bytes of HTTP/2 that are read in one poll, before the calls in them are handled.
const MAX_BYTES_PER_POLL: usize = 2 << 10;
/// Maximum number of calls without a token over one connection.
const MAX_UNAUTHENTICATED_CALLS: usize = 32;

/// What a connection is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// It receives a request's head, or HTTP/2's preface, or should; since when.
    Head(Instant),
    /// A request, whose body has a timeout of its own; or HTTP/2.
    Request,
    /// It is between two requests; since when.
    Idle(Instant),
    /// It is a websocket; since when a message of it is being received.
    Websocket(Option<Instant>),
}

#[derive(Debug)]
struct ConnectionState {
    phase: Phase,
    /// Bytes of the head or message that is being received.
    read: usize,
    /// For the most that was ever held at once: buffers do not shrink.
    reservation: Reservation,
    large_at: Option<Instant>,
}

/// Keeps a connection to its limits.
#[derive(Debug)]
pub struct ConnectionGuard {
    state: Mutex<ConnectionState>,
    /// Until a token or a certificate was shown.
    unauthenticated: Mutex<Option<UnauthenticatedConnection>>,
    unauthenticated_calls: AtomicUsize,
    /// Calls that began since everything was last written.
    unwritten_calls: AtomicUsize,
    /// Bytes that were read in the present poll of the connection.
    polled_bytes: AtomicUsize,
    responses: Mutex<Responses>,
    over_budget: AtomicBool,
    is_grpc: bool,
    limits: Limits,
    budget: Budget,
    metrics: Arc<Metrics>,
    /// Closes the connection at once.
    close: CancellationToken,
    /// Its entry in `idle_connections`, while it is idle.
    idle: Mutex<Option<IdleEntry>>,
    idle_connections: Arc<IdleConnections>,
}

/// When a read has to have brought something, and what follows if not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline {
    /// When.
    pub at: Instant,
    /// The limit that it is; `None` where the connection simply ends.
    pub limit: Option<Limit>,
}

impl ConnectionGuard {
    /// Over a new connection.
    pub fn new(
        is_grpc: bool,
        limits: Limits,
        budget: Budget,
        metrics: Arc<Metrics>,
        idle_connections: Arc<IdleConnections>,
    ) -> Self {
        let phase = Phase::Head(Instant::now());
        Self {
            state: Mutex::new(ConnectionState {
                phase,
                read: 0,
                reservation: Reservation::default(),
                large_at: None,
            }),
            unauthenticated: Mutex::default(),
            unauthenticated_calls: AtomicUsize::new(0),
            unwritten_calls: AtomicUsize::new(0),
            polled_bytes: AtomicUsize::new(0),
            responses: Mutex::default(),
            over_budget: AtomicBool::new(false),
            is_grpc,
            limits,
            budget,
            metrics,
            close: CancellationToken::new(),
            idle: Mutex::default(),
            idle_connections,
        }
    }

    /// Marks the connection as unauthenticated.
    pub fn set_unauthenticated(&self, connection: UnauthenticatedConnection) {
        *lock(&self.unauthenticated) = Some(connection);
    }

    /// Notes that a token or a certificate was shown.
    pub fn authenticated(&self) {
        drop(lock(&self.unauthenticated).take());
    }

    /// Returns whether none was shown yet.
    pub fn is_unauthenticated(&self) -> bool {
        lock(&self.unauthenticated).is_some()
    }

    /// Counts a call without a token; after some of them the connection is closed.
    pub fn unauthenticated_call(&self) {
        if self.unauthenticated_calls.fetch_add(1, Ordering::Relaxed) >= MAX_UNAUTHENTICATED_CALLS
            && self.is_unauthenticated()
        {
            self.close.cancel();
        }
    }

    /// Returns whether the connection has to be closed.
    pub fn is_closed(&self) -> bool {
        self.close.is_cancelled()
    }

    /// Resolves when the connection has to be closed: in favour of another one, or for what its
    /// client did.
    pub async fn closed(&self) {
        let eviction = lock(&self.unauthenticated).as_ref().map(UnauthenticatedConnection::eviction);
        let evicted = async {
            match eviction {
                Some(eviction) => {
                    eviction.cancelled().await;
                    // A client that has authenticated meanwhile no longer counts.
                    if !self.is_unauthenticated() {
                        std::future::pending::<()>().await;
                    }
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.close.cancelled() => {}
            () = evicted => {}
        }
    }

    /// Notes that a request's head is complete.
    pub fn request_started(&self) {
        let mut state = lock(&self.state);
        if !matches!(state.phase, Phase::Websocket(_)) {
            state.phase = Phase::Request;
        }
    }

    /// Notes that the request has its response.
    pub fn response_ready(&self) {
        let mut state = lock(&self.state);
        if state.phase == Phase::Request {
            state.phase = Phase::Idle(Instant::now());
            *lock(&self.idle) = Some(self.idle_connections.add(self.close.clone()));
        }
    }

    /// Notes that the connection is a websocket from now on.
    pub fn upgraded(&self) {
        let mut state = lock(&self.state);
        (state.phase, state.read) = (Phase::Websocket(None), 0);
    }

    /// Notes that so many bytes were received.
    ///
    /// # Errors
    /// If they exceed what all connections together may hold.
    pub fn received(&self, bytes: usize) -> io::Result<()> {
        let mut state = lock(&self.state);
        let ConnectionState { phase, read, reservation, .. } = &mut *state;
        self.polled_bytes.fetch_add(bytes, Ordering::Relaxed);
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
            Phase::Websocket(since) => {
                since.get_or_insert_with(Instant::now);
                if self.budget.reserve(reservation, *read).is_err() {
                    self.metrics.refused(Limit::BytesInFlight);
                    self.over_budget.store(true, Ordering::Relaxed);
                    return Err(io::Error::other("more bytes in flight than --max-bytes-in-flight allows"));
                }
            }
        }
        Ok(())
    }

    /// Returns whether the connection had to end because of the budget.
    pub fn is_over_budget(&self) -> bool {
        self.over_budget.load(Ordering::Relaxed)
    }

    /// Notes that a websocket's message was handled.
    pub fn message_handled(&self) {
        let mut state = lock(&self.state);
        if state.read > FREE_BYTES {
            state.large_at = Some(Instant::now());
        }
        (state.phase, state.read) = (Phase::Websocket(None), 0);
    }

    /// Notes that a control frame came, maybe in the middle of a message.
    pub fn control_frame(&self, payload: usize) {
        let mut state = lock(&self.state);
        state.read = state.read.saturating_sub(payload + CONTROL_HEADER_BYTES);
        if state.read == 0 {
            state.phase = Phase::Websocket(None);
        }
    }

    /// Returns whether a websocket keeps a large buffer that it has not needed for long.
    pub fn has_unused_buffer(&self) -> bool {
        lock(&self.state).large_at.is_some_and(|at| at.elapsed() > MAX_BUFFER_AGE)
    }

    /// Returns until when something has to be received.
    pub fn deadline(&self) -> Option<Deadline> {
        let Limits { head_timeout, idle_timeout, body_timeout, .. } = self.limits;
        let (at, limit) = match lock(&self.state).phase {
            Phase::Head(since) => (since + head_timeout, Some(Limit::HeadTimeout)),
            Phase::Idle(since) => (since + idle_timeout, None),
            Phase::Websocket(Some(since)) => (since + body_timeout, Some(Limit::BodyTimeout)),
            Phase::Request | Phase::Websocket(None) => return None,
        };
        Some(Deadline { at, limit })
    }

    /// Returns how long what is written may wait for the client.
    pub fn write_timeout(&self) -> Duration {
        self.limits.write_timeout
    }

    /// Counts that a limit was reached.
    pub fn refused(&self, limit: Limit) {
        self.metrics.refused(limit);
    }

    /// Notes that a call began.
    pub fn call_started(&self) {
        self.unwritten_calls.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes that the connection is about to be polled.
    pub fn poll_started(&self) {
        self.polled_bytes.store(0, Ordering::Relaxed);
    }

    /// Returns how many more bytes may be read in this poll. HTTP/2 reads all that there is before
    /// it hands over the first call, and a call's head may be ten bytes of that.
    pub fn readable_in_poll(&self) -> usize {
        MAX_BYTES_PER_POLL.saturating_sub(self.polled_bytes.load(Ordering::Relaxed))
    }

    /// Notes that everything has been written.
    pub fn all_written(&self) {
        self.unwritten_calls.store(0, Ordering::Relaxed);
    }

    /// Returns how many calls began since everything was last written.
    pub fn unwritten_calls(&self) -> usize {
        self.unwritten_calls.load(Ordering::Relaxed)
    }

    /// Notes that a call has a response for the client to read. Returns the response's number.
    pub fn response_started(&self) -> u64 {
        let mut responses = lock(&self.responses);
        responses.last_number += 1;
        let number = responses.last_number;
        responses.unread_since.insert(number, Instant::now());
        number
    }

    /// Notes that the client has room for more of a response, and whether there was more of it.
    pub fn response_polled(&self, number: u64, is_ready: bool) {
        let mut responses = lock(&self.responses);
        if is_ready {
            responses.unread_since.insert(number, Instant::now());
        } else {
            responses.unread_since.remove(&number);
        }
    }

    /// Notes that a response was read, or dropped.
    pub fn response_ended(&self, number: u64) {
        lock(&self.responses).unread_since.remove(&number);
    }

    /// Returns whether the client has not read a response for so long.
    pub fn has_unread_response(&self, timeout: Duration) -> bool {
        lock(&self.responses).unread_since.values().any(|since| since.elapsed() >= timeout)
    }
}

/// The responses to calls, and since when the client has not asked for more of them.
#[derive(Debug, Default)]
struct Responses {
    last_number: u64,
    unread_since: HashMap<u64, Instant>,
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn guard(budget: &Budget) -> ConnectionGuard {
        let limits = crate::cli::flags::Flags::parse_from(["inflight-statserver"]).limits;
        ConnectionGuard::new(false, limits, budget.clone(), Arc::default(), Arc::default())
    }

    #[test]
    fn a_websocket_keeps_what_it_needed_most_until_it_ends() {
        let budget = Budget::new(10_000);
        let first = guard(&budget);
        first.upgraded();
        first.received(FREE_BYTES).unwrap();
        first.message_handled();
        assert_eq!(budget.available(), 10_000);
        first.received(FREE_BYTES + 9_000).unwrap();
        first.message_handled();
        assert_eq!(budget.available(), 1_000);
        first.received(FREE_BYTES + 5_000).unwrap();
        let second = guard(&budget);
        second.upgraded();
        second.received(FREE_BYTES + 1_000).unwrap();
        assert!(!second.is_over_budget());
        second.received(1).unwrap_err();
        assert!(second.is_over_budget());
        drop((first, second));
        assert_eq!(budget.available(), 10_000);
    }

    #[test]
    fn the_connection_that_is_idle_for_longest_gives_its_place() {
        let idle = Arc::new(IdleConnections::default());
        let limits = crate::cli::flags::Flags::parse_from(["inflight-statserver"]).limits;
        let open = || ConnectionGuard::new(false, limits, Budget::new(1), Arc::default(), Arc::clone(&idle));
        let guards = [open(), open(), open(), open()];
        assert!(!idle.close_oldest(), "they have yet to ask for anything");
        for guard in &guards {
            guard.request_started();
            guard.response_ready();
        }
        guards[0].received(1).unwrap();
        let [_, second, third, gone] = &guards;
        assert!(idle.close_oldest());
        assert_eq!([second.is_closed(), third.is_closed()], [true, false]);
        assert!(idle.close_oldest() && third.is_closed() && !gone.is_closed());
        drop(guards);
        assert!(!idle.close_oldest());
    }

    #[test]
    fn control_frames_neither_begin_nor_end_a_message() {
        let guard = guard(&Budget::new(10_000));
        guard.upgraded();
        assert_eq!(guard.deadline(), None);
        guard.received(CONTROL_HEADER_BYTES + 4).unwrap();
        guard.control_frame(4);
        assert_eq!(guard.deadline(), None);
        guard.received(100).unwrap();
        let deadline = guard.deadline();
        assert_eq!(deadline.and_then(|deadline| deadline.limit), Some(Limit::BodyTimeout));
        guard.received(CONTROL_HEADER_BYTES + 4).unwrap();
        guard.control_frame(4);
        assert_eq!(guard.deadline(), deadline);
        guard.message_handled();
        assert_eq!(guard.deadline(), None);
    }
}
