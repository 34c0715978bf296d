//! The local breaker: which requests of this worker are in the app, and which are paused and wait.

use std::borrow::Cow;
use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;

use inflight_stats::Config;
use inflight_stats::breaker::rules::{Breaker, BreakerLimits, EnterOutcome, Queue};
use inflight_stats::breaker::worker_side::{Outcome, WorkerSide};
use inflight_stats::counting::time::{MonotonicNs, nanoseconds};
use inflight_stats::pod::pod_state::PodStore;

use crate::host::{DETAILS, Host, Mailbox};
use crate::vm::stream_actions::{Refusal, StreamActions};
use crate::vm::tick_timer::TickTimer;

/// The answer when the queue is full, as Knative's queue-proxy gives it (knative/serving,
/// `pkg/queue/breaker.go`), with the newline of Go's `http.Error`.
pub const QUEUE_FULL: Refusal =
    Refusal { details: DETAILS, body: Cow::Borrowed("pending request queue full\n"), retry: false };
/// The answer to a request that has waited for `queue_timeout`.
pub const QUEUE_TIMEOUT: Refusal =
    Refusal { details: DETAILS, body: Cow::Borrowed("pending request queue timeout\n"), retry: false };

/// How long a permit stays taken when Envoy breaks off a request that is in the app, because the
/// client disconnected or a timeout expired. The app notices a closed connection a moment after
/// Envoy's stream has ended. To admit another request at once would let the app see one too many.
const LINGER_NS: u64 = 10_000_000;

/// Ticks for queue timeouts are at least this far apart, however many requests time out one after
/// the other.
const SHORTEST_WAKE_NS: u64 = 5_000_000;

/// The state of a request's permit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PermitState {
    /// The request is paused and waits for a permit, under this number.
    Waiting(u64),
    /// The request has held a permit since then, and is in the app.
    Held(MonotonicNs),
    /// The request got no permit and was answered.
    Refused,
}

/// Shared between the stream and the local breaker, which may admit the request while another
/// callback runs.
pub type SharedPermitState = Rc<Cell<PermitState>>;

#[derive(Debug)]
struct Paused {
    stream: u32,
    permit: SharedPermitState,
}

/// The local breaker: this worker's side of the breaker, and its paused streams.
pub struct LocalBreaker<H> {
    host: H,
    side: WorkerSide<Paused>,
    mailbox_name: String,
    timeout_ns: Option<u64>,
    /// Whether probes need no permit.
    pub probes_bypass: bool,
    /// When the permits of requests that were broken off are released, the earliest first.
    lingering: VecDeque<MonotonicNs>,
    /// When the worker ticks next.
    pub timer: TickTimer,
}

impl<H: Host> LocalBreaker<H> {
    /// Returns the local breaker, if the configuration has limits. `worker` is this worker's id in
    /// the pod.
    pub fn new(host: H, config: &Config, pod: &PodStore, worker: u64) -> Option<Self> {
        let breaker = Breaker::new(pod.breaker_key(), config.limits?);
        let mailbox_name = format!("{}/{worker}", pod.breaker_key());
        let mailbox = host.mailbox(&mailbox_name);
        Some(Self {
            host,
            side: WorkerSide::new(breaker, worker, mailbox.0),
            mailbox_name,
            timeout_ns: timeout_ns(config),
            probes_bypass: config.probes_bypass_breaker,
            lingering: VecDeque::new(),
            timer: TickTimer::default(),
        })
    }

    /// Applies another configuration's limits. Registers the mailbox anew, because the host calls
    /// the root context that registered it last.
    pub fn configure(&mut self, config: &Config) {
        const NONE: BreakerLimits = BreakerLimits { concurrency: u32::MAX, queue_depth: u32::MAX };
        // If there are more permits now, waiting requests get them at the tick.
        self.side.breaker.limits = config.limits.unwrap_or(NONE);
        self.timeout_ns = timeout_ns(config);
        self.probes_bypass = config.probes_bypass_breaker;
        self.side.mailbox = self.host.mailbox(&self.mailbox_name).0;
    }

    /// Admits, queues or refuses a probe, or a request that is already counted. Returns the state
    /// of its permit, which it may get later.
    pub fn enter(&mut self, stream: u32, queue: Queue, now: MonotonicNs) -> SharedPermitState {
        let permit = Rc::new(Cell::new(PermitState::Refused));
        let paused = |number| {
            permit.set(PermitState::Waiting(number));
            Paused { stream, permit: Rc::clone(&permit) }
        };
        if self.side.enter(&self.host, queue, now, paused) == EnterOutcome::Admitted {
            permit.set(PermitState::Held(now));
        }
        if let (PermitState::Waiting(_), Some(timeout_ns)) = (permit.get(), self.timeout_ns) {
            self.timer.wake_at(self.host, now.plus(timeout_ns), now);
        }
        permit
    }

    /// Ends a request. Returns the streams that go on.
    pub fn leave(&mut self, permit: PermitState, now: MonotonicNs) -> StreamActions {
        let outcome = match permit {
            PermitState::Refused => None,
            PermitState::Waiting(number) => self.side.abandon(&self.host, number).map(|(_, outcome)| outcome),
            PermitState::Held(_) => {
                let host = self.host;
                let (outcome, lingers) = self.side.leave(&self.host, || host.was_aborted());
                if lingers {
                    let due = now.plus(LINGER_NS);
                    self.lingering.push_back(due);
                    self.timer.wake_at(self.host, due, now);
                }
                Some(outcome)
            }
        };
        let mut actions = StreamActions::default();
        self.deliver(outcome.unwrap_or_default(), now, &mut actions);
        actions
    }

    /// Reads the messages that have come. They grant permits to waiting requests of this worker.
    pub fn read_mailbox(&mut self, now: MonotonicNs) -> StreamActions {
        let mut actions = StreamActions::default();
        if self.side.may_be_forgotten(now) {
            let outcome = self.side.reconcile(&self.host, now);
            self.deliver(outcome, now, &mut actions);
        }
        while let Some(message) = self.host.next_message(Mailbox(self.side.mailbox)) {
            if let Some(paused) = self.side.receive(&message) {
                admit(&paused, now, &mut actions);
            }
        }
        actions
    }

    /// Does what depends on time: releases lingering permits, recovers from lost messages, times
    /// out requests that have waited too long.
    pub fn tick(&mut self, now: MonotonicNs) -> StreamActions {
        let mut actions = StreamActions::default();
        while self.lingering.front().is_some_and(|due| *due <= now) {
            self.lingering.pop_front();
            let (outcome, _) = self.side.leave(&self.host, || false);
            self.deliver(outcome, now, &mut actions);
        }
        let outcome = self.side.reconcile(&self.host, now);
        self.deliver(outcome, now, &mut actions);
        if let Some(latest_ns) = self.timeout_ns.and_then(|timeout_ns| now.0.checked_sub(timeout_ns)) {
            for number in self.side.waiting_since(MonotonicNs(latest_ns)) {
                if let Some((paused, outcome)) = self.side.abandon(&self.host, number) {
                    paused.permit.set(PermitState::Refused);
                    actions.refuse.push((paused.stream, QUEUE_TIMEOUT));
                    self.deliver(outcome, now, &mut actions);
                }
            }
        }
        actions
    }

    /// Returns the nanoseconds until a tick is needed; `None` if nothing here depends on time.
    pub fn next_wake_ns(&self, now: MonotonicNs) -> Option<u64> {
        let oldest = self.side.oldest().zip(self.timeout_ns);
        let timeout =
            oldest.map(|(since, timeout_ns)| since.plus(timeout_ns).since(now).max(SHORTEST_WAKE_NS));
        let linger = self.lingering.front().map(|due| due.since(now));
        timeout.into_iter().chain(linger).min()
    }

    /// Forgets a worker that is no longer a member. Returns `None` as long as it may only be slow,
    /// and then the streams of this worker that get its permits.
    pub fn forget_if_silent(&mut self, worker: u64, now: MonotonicNs) -> Option<StreamActions> {
        let outcome = self.side.forget_if_silent(&self.host, worker, now)?;
        let mut actions = StreamActions::default();
        self.deliver(outcome, now, &mut actions);
        Some(actions)
    }

    /// Ends this worker: its permits go to the other workers. Returns its streams that waited.
    pub fn close(&mut self) -> Vec<u32> {
        let (waiting, grants) = self.side.close(&self.host);
        let outcome = Outcome { admitted: Vec::new(), grants };
        self.deliver(outcome, MonotonicNs::default(), &mut StreamActions::default());
        waiting.iter().map(|paused| paused.stream).collect()
    }

    /// Returns the number of requests in the app plus waiting requests, over all workers.
    pub fn depth(&self) -> u64 {
        let (running, waiting) = self.side.breaker.depth(&self.host);
        running.saturating_add(waiting)
    }

    /// Resumes the admitted streams of this worker, and posts grants to the workers of the others.
    fn deliver(&self, outcome: Outcome<Paused>, now: MonotonicNs, actions: &mut StreamActions) {
        for paused in outcome.admitted {
            admit(&paused, now, actions);
        }
        for grant in outcome.grants {
            // If the message cannot be posted, that worker finds the permit at its tick.
            self.host.send_message(Mailbox(grant.mailbox), &grant.message());
        }
    }
}

fn admit(paused: &Paused, now: MonotonicNs, actions: &mut StreamActions) {
    paused.permit.set(PermitState::Held(now));
    actions.resume.push(paused.stream);
}

fn timeout_ns(config: &Config) -> Option<u64> {
    config.queue_timeout.map(nanoseconds)
}
