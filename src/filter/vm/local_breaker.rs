//! The breaker at this worker: which of its requests are in the app, and which wait, paused.

use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;

use inflight_stats::Config;
use inflight_stats::breaker::rules::{Answer, Breaker, Limits, Queue};
use inflight_stats::breaker::worker_side::{Outcome, WorkerSide};
use inflight_stats::counting::time::MonotonicNs;
use inflight_stats::pod::pod_state::PodStore;

use crate::host::{Host, Mailbox};

/// The body of the answer where the queue is full, as Knative's queue-proxy gives it
/// (knative/serving, `pkg/queue/breaker.go`), with the newline of Go's `http.Error`.
pub const QUEUE_FULL: &[u8] = b"pending request queue full\n";
/// The body of the answer to a request that has waited for `queue_timeout`.
pub const QUEUE_TIMEOUT: &[u8] = b"pending request queue timeout\n";
/// The content type of both, as Go's `http.Error` sets it.
pub const PLAIN_TEXT: (&str, &str) = ("content-type", "text/plain; charset=utf-8");

/// How long a permit stays taken when Envoy broke a request off that was in the app: a client went
/// away, a timeout struck. The app learns of it by a closed connection, a moment after Envoy's
/// stream has ended; to let another request in at once would show the app one too many.
const LINGER_NS: u64 = 10_000_000;

/// Ticks for queue timeouts come no more often than this, however many requests time out one after
/// the other.
const SHORTEST_WAKE_NS: u64 = 5_000_000;

/// A request's permit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PermitState {
    /// The request is paused and waits for one, under this number.
    Waiting(u64),
    /// It has held one since then, and is in the app.
    Held(MonotonicNs),
    /// It got none and was answered.
    Refused,
}

/// Shared between the stream and the local breaker, which may admit it while another callback runs.
pub type SharedPermitState = Rc<Cell<PermitState>>;

#[derive(Debug)]
struct Paused {
    stream: u32,
    permit: SharedPermitState,
}

/// This worker's side of the breaker.
pub struct LocalBreaker<H> {
    host: H,
    side: WorkerSide<Paused>,
    mailbox_name: String,
    timeout_ns: Option<u64>,
    /// Whether probes need no permit.
    pub probes_bypass: bool,
    /// When permits of requests that were broken off come back; the earliest first.
    lingering: VecDeque<MonotonicNs>,
    /// When the next tick is due. There is always one.
    next_tick: MonotonicNs,
}

/// What is to be done with streams of this worker when nothing is borrowed any more.
#[derive(Default)]
pub struct StreamActions {
    pub resume: Vec<u32>,
    pub time_out: Vec<u32>,
}

impl StreamActions {
    /// Does it, from the context `home`.
    pub fn apply(self, host: impl Host, home: u32) {
        host.resume(&self.resume, home);
        host.respond_to(&self.time_out, home, 503, QUEUE_TIMEOUT, &[PLAIN_TEXT]);
    }
}

impl<H: Host> LocalBreaker<H> {
    /// This worker's side of a configured breaker, if there is one; `worker` is its id in the pod.
    pub fn new(host: H, config: &Config, pod: &PodStore, worker: u64) -> Option<Self> {
        let breaker = Breaker::new(pod.breaker_key(), config.limits?);
        let mailbox_name = format!("{}/{worker}", pod.breaker_key());
        let mailbox = host.mailbox(&mailbox_name).unwrap_or(Mailbox::NONE);
        Some(Self {
            host,
            side: WorkerSide::new(breaker, worker, mailbox.0),
            mailbox_name,
            timeout_ns: timeout_ns(config),
            probes_bypass: config.probes_bypass_breaker,
            lingering: VecDeque::new(),
            next_tick: MonotonicNs::default(),
        })
    }

    /// Takes over another configuration's limits. The mailbox is registered anew, because the host
    /// calls the root context that registered it last.
    pub fn configure(&mut self, config: &Config) {
        const NONE: Limits = Limits { concurrency: u32::MAX, queue_depth: u32::MAX };
        // If there are more permits now, those who wait get them at the tick.
        self.side.breaker.limits = config.limits.unwrap_or(NONE);
        self.timeout_ns = timeout_ns(config);
        self.probes_bypass = config.probes_bypass_breaker;
        self.side.mailbox = self.host.mailbox(&self.mailbox_name).unwrap_or(Mailbox::NONE).0;
    }

    /// A request comes, counted in already, or a probe. Returns its permit, which it may get later.
    pub fn enter(&mut self, stream: u32, queue: Queue, now: MonotonicNs) -> SharedPermitState {
        let permit = Rc::new(Cell::new(PermitState::Refused));
        let paused = |number| {
            permit.set(PermitState::Waiting(number));
            Paused { stream, permit: Rc::clone(&permit) }
        };
        if self.side.enter(&self.host, queue, now, paused) == Answer::Admitted {
            permit.set(PermitState::Held(now));
        }
        if let (PermitState::Waiting(_), Some(timeout_ns)) = (permit.get(), self.timeout_ns) {
            self.wake_at(now.plus(timeout_ns), now);
        }
        permit
    }

    /// A request ends. Returns which others go on.
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
                    self.wake_at(due, now);
                }
                Some(outcome)
            }
        };
        let mut actions = StreamActions::default();
        self.deliver(outcome.unwrap_or_default(), now, &mut actions);
        actions
    }

    /// Messages have come: some of this worker's waiting requests have permits.
    pub fn read_mailbox(&mut self, now: MonotonicNs) -> StreamActions {
        let mut actions = StreamActions::default();
        if self.side.is_late(now) {
            let outcome = self.side.settle(&self.host, now);
            self.deliver(outcome, now, &mut actions);
        }
        while let Some(message) = self.host.next_message(Mailbox(self.side.mailbox)) {
            if let Some(paused) = self.side.receive(&message) {
                admit(&paused, now, &mut actions);
            }
        }
        actions
    }

    /// What time brings: permits that linger no more, messages that were lost, requests that waited
    /// too long.
    pub fn tick(&mut self, now: MonotonicNs) -> StreamActions {
        let mut actions = StreamActions::default();
        while self.lingering.front().is_some_and(|due| *due <= now) {
            self.lingering.pop_front();
            let (outcome, _) = self.side.leave(&self.host, || false);
            self.deliver(outcome, now, &mut actions);
        }
        let outcome = self.side.settle(&self.host, now);
        self.deliver(outcome, now, &mut actions);
        if let Some(latest_ns) = self.timeout_ns.and_then(|timeout_ns| now.0.checked_sub(timeout_ns)) {
            for number in self.side.waiting_since(MonotonicNs(latest_ns)) {
                if let Some((paused, outcome)) = self.side.abandon(&self.host, number) {
                    paused.permit.set(PermitState::Refused);
                    actions.time_out.push(paused.stream);
                    self.deliver(outcome, now, &mut actions);
                }
            }
        }
        actions
    }

    /// Returns in how many nanoseconds a tick is wanted; `None` if nothing here waits for time to
    /// pass.
    pub fn next_wake_ns(&self, now: MonotonicNs) -> Option<u64> {
        let oldest = self.side.oldest().zip(self.timeout_ns);
        let timeout =
            oldest.map(|(since, timeout_ns)| since.plus(timeout_ns).since(now).max(SHORTEST_WAKE_NS));
        let linger = self.lingering.front().map(|due| due.since(now));
        timeout.into_iter().chain(linger).min()
    }

    /// The next tick comes then.
    pub fn ticks_at(&mut self, due: MonotonicNs) {
        self.next_tick = due;
    }

    /// Has the tick come earlier, if that is later than `due`. One that is overdue is left alone:
    /// to set the timer again would put it off, and again and again under load.
    fn wake_at(&mut self, due: MonotonicNs, now: MonotonicNs) {
        if due < self.next_tick {
            self.host.tick_in(due.since(now).div_ceil(1_000_000));
            self.next_tick = due;
        }
    }

    /// Another worker is no member any more. Returns `None` until it is forgotten, for it may be
    /// just slow; then which requests have its permits.
    pub fn forget_late(&mut self, worker: u64, now: MonotonicNs) -> Option<StreamActions> {
        let outcome = self.side.forget_late(&self.host, worker, now)?;
        let mut actions = StreamActions::default();
        self.deliver(outcome, now, &mut actions);
        Some(actions)
    }

    /// This worker ends: what it holds goes to the others. Returns its streams that waited.
    pub fn close(&mut self) -> Vec<u32> {
        let (waiting, grants) = self.side.close(&self.host);
        let outcome = Outcome { admitted: Vec::new(), grants };
        self.deliver(outcome, MonotonicNs::default(), &mut StreamActions::default());
        waiting.iter().map(|paused| paused.stream).collect()
    }

    /// Returns the number of requests in the app plus requests that wait, over all workers.
    pub fn depth(&self) -> u64 {
        let (running, waiting) = self.side.breaker.depth(&self.host);
        running.saturating_add(waiting)
    }

    /// Tells the workers whose requests have permits now; the streams of this one go on.
    fn deliver(&self, outcome: Outcome<Paused>, now: MonotonicNs, actions: &mut StreamActions) {
        for paused in outcome.admitted {
            admit(&paused, now, actions);
        }
        for grant in outcome.grants {
            // If it cannot be told, it finds out at its tick.
            self.host.post(Mailbox(grant.mailbox), &grant.message());
        }
    }
}

fn admit(paused: &Paused, now: MonotonicNs, actions: &mut StreamActions) {
    paused.permit.set(PermitState::Held(now));
    actions.resume.push(paused.stream);
}

fn timeout_ns(config: &Config) -> Option<u64> {
    config.queue_timeout.map(|timeout| u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX))
}
