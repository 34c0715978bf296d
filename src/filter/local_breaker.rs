//! The breaker at this worker: which of its requests are in the app, and which wait, paused.

use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;

use inflight_stats::Config;
use inflight_stats::breaker::rules::{Answer, Breaker, Limits, Line};
use inflight_stats::breaker::worker_side::{Desk, Outcome};
use inflight_stats::pod::Pod;

use crate::host::{self, SharedData};

/// What Knative's queue-proxy says (knative/serving, `pkg/queue/breaker.go`), with the newline of Go's `http.Error`.
pub const FULL: &[u8] = b"pending request queue full\n";
/// What a request is told that has waited for `queue_timeout`.
pub const TIMED_OUT: &[u8] = b"pending request queue timeout\n";
/// The content type of both, as Go's `http.Error` sets it.
pub const TEXT: (&str, &str) = ("content-type", "text/plain; charset=utf-8");

/// How long a permit stays taken when Envoy broke a request off that was in the app: a client went away, a
/// timeout struck. The app learns of it by a closed connection, a moment after Envoy's stream has ended; to let
/// another request in at once would show the app one too many.
const LINGER_NS: u64 = 10_000_000;

/// Requests that wait are looked at no more often than this, however many time out one after the other.
const SHORTEST_LOOK_NS: u64 = 5_000_000;

/// A mailbox that nobody has: where the host gave none, grants are found at the tick.
const NO_MAILBOX: u32 = u32::MAX;

/// How a request stands to the breaker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Paused, under this number.
    Waiting(u64),
    /// In the app since then (raw clock).
    Admitted(u64),
    /// Turned away.
    Refused,
}

/// Shared between the stream and the gate, which may admit it while another callback runs.
pub type SharedPass = Rc<Cell<Pass>>;

#[derive(Debug)]
struct Paused {
    stream: u32,
    pass: SharedPass,
}

/// This worker's side of the breaker.
pub struct Gate {
    desk: Desk<Paused>,
    mailbox_name: String,
    timeout_ns: Option<u64>,
    /// Whether probes need no permit.
    pub lets_probes_by: bool,
    /// When permits of requests that were broken off come back; the earliest first.
    lingering: VecDeque<u64>,
    /// When the next tick is due, by the raw clock. There is always one.
    next_tick_ns: u64,
}

/// Streams of this worker that something is to be done with, when nothing is borrowed any more.
#[derive(Default)]
pub struct Turn {
    pub resume: Vec<u32>,
    pub time_out: Vec<u32>,
}

impl Turn {
    /// Does it, from the context `home`.
    pub fn take(self, home: u32) {
        host::resume(&self.resume, home);
        host::respond_to(&self.time_out, home, 503, TIMED_OUT, &[TEXT]);
    }
}

impl Gate {
    /// The gate of a configured breaker, if there is one; `worker` is this worker's id in the pod.
    pub fn new(config: &Config, pod: &Pod, worker: u64) -> Option<Self> {
        let breaker = Breaker::new(pod.breaker_key(), config.limits?);
        let mailbox_name = format!("{}/{worker}", pod.breaker_key());
        Some(Self {
            desk: Desk::new(breaker, worker, host::mailbox(&mailbox_name).unwrap_or(NO_MAILBOX)),
            mailbox_name,
            timeout_ns: timeout_ns(config),
            lets_probes_by: config.probes_bypass_breaker,
            lingering: VecDeque::new(),
            next_tick_ns: 0,
        })
    }

    /// Takes over another configuration's limits. The mailbox is registered anew, because the host calls
    /// the root context that registered it last.
    pub fn configure(&mut self, config: &Config) {
        const NONE: Limits = Limits { concurrency: u32::MAX, queue_depth: u32::MAX };
        // If there are more permits now, those who wait get them at the tick.
        self.desk.breaker.limits = config.limits.unwrap_or(NONE);
        self.timeout_ns = timeout_ns(config);
        self.lets_probes_by = config.probes_bypass_breaker;
        self.desk.mailbox = host::mailbox(&self.mailbox_name).unwrap_or(NO_MAILBOX);
    }

    /// A request comes, counted in already, or a probe: what it is told.
    pub fn enter(&mut self, stream: u32, line: Line, now_ns: u64) -> SharedPass {
        let pass = Rc::new(Cell::new(Pass::Refused));
        let paused = |number| {
            pass.set(Pass::Waiting(number));
            Paused { stream, pass: Rc::clone(&pass) }
        };
        if self.desk.enter(&SharedData, line, now_ns, paused) == Answer::Admitted {
            pass.set(Pass::Admitted(now_ns));
        }
        if let (Pass::Waiting(_), Some(timeout_ns)) = (pass.get(), self.timeout_ns) {
            self.look_at(now_ns.saturating_add(timeout_ns), now_ns);
        }
        pass
    }

    /// A request ends. Which others go on.
    pub fn leave(&mut self, pass: Pass, now_ns: u64) -> Turn {
        let outcome = match pass {
            Pass::Refused => None,
            Pass::Waiting(number) => self.desk.abandon(&SharedData, number).map(|(_, outcome)| outcome),
            Pass::Admitted(_) => {
                let (outcome, lingers) = self.desk.leave(&SharedData, host::was_broken_off);
                if lingers {
                    let due_ns = now_ns.saturating_add(LINGER_NS);
                    self.lingering.push_back(due_ns);
                    self.look_at(due_ns, now_ns);
                }
                Some(outcome)
            }
        };
        let mut turn = Turn::default();
        deliver(outcome.unwrap_or_default(), now_ns, &mut turn);
        turn
    }

    /// Messages have come: some of this worker's waiting requests have permits.
    pub fn read_mailbox(&mut self, now_ns: u64) -> Turn {
        let mut turn = Turn::default();
        if self.desk.is_late(now_ns) {
            deliver(self.desk.settle(&SharedData, now_ns), now_ns, &mut turn);
        }
        while let Some(message) = host::next_message(self.desk.mailbox) {
            if let Some(paused) = self.desk.receive(&message) {
                admit(&paused, now_ns, &mut turn);
            }
        }
        turn
    }

    /// What time brings: permits that linger no more, messages that were lost, requests that waited too long.
    pub fn tick(&mut self, now_ns: u64) -> Turn {
        let mut turn = Turn::default();
        while self.lingering.front().is_some_and(|due_ns| *due_ns <= now_ns) {
            self.lingering.pop_front();
            deliver(self.desk.leave(&SharedData, || false).0, now_ns, &mut turn);
        }
        deliver(self.desk.settle(&SharedData, now_ns), now_ns, &mut turn);
        if let Some(latest_ns) = self.timeout_ns.and_then(|timeout_ns| now_ns.checked_sub(timeout_ns)) {
            for number in self.desk.waiting_since(latest_ns) {
                if let Some((paused, outcome)) = self.desk.abandon(&SharedData, number) {
                    paused.pass.set(Pass::Refused);
                    turn.time_out.push(paused.stream);
                    deliver(outcome, now_ns, &mut turn);
                }
            }
        }
        turn
    }

    /// How soon time should be looked at, in nanoseconds; `None` if nothing here waits for it.
    pub fn next_look_ns(&self, now_ns: u64) -> Option<u64> {
        let until = |due_ns: u64| due_ns.saturating_sub(now_ns);
        let oldest_ns = self.desk.oldest_ns().zip(self.timeout_ns);
        let timeout = oldest_ns
            .map(|(since_ns, timeout_ns)| until(since_ns.saturating_add(timeout_ns)).max(SHORTEST_LOOK_NS));
        let linger = self.lingering.front().map(|due_ns| until(*due_ns));
        timeout.into_iter().chain(linger).min()
    }

    /// The next tick comes then.
    pub fn ticks_at(&mut self, due_ns: u64) {
        self.next_tick_ns = due_ns;
    }

    /// Has the tick come earlier, if that is later than `due_ns`. One that is overdue is left alone: to set the timer
    /// again would put it off, and again and again under load.
    fn look_at(&mut self, due_ns: u64, now_ns: u64) {
        if due_ns < self.next_tick_ns {
            host::tick_in(due_ns.saturating_sub(now_ns).div_ceil(1_000_000));
            self.next_tick_ns = due_ns;
        }
    }

    /// Another worker lost its seat. Whether it is forgotten, and its permits have gone to those who wait; until then
    /// it may be just slow.
    pub fn forget_late(&mut self, worker: u64, now_ns: u64) -> Option<Turn> {
        let outcome = self.desk.forget_late(&SharedData, worker, now_ns)?;
        let mut turn = Turn::default();
        deliver(outcome, now_ns, &mut turn);
        Some(turn)
    }

    /// This worker ends: what it holds goes to the others. Its streams that waited.
    pub fn close(&mut self) -> Vec<u32> {
        let (waiting, grants) = self.desk.close(&SharedData);
        deliver(Outcome { admitted: Vec::new(), grants }, 0, &mut Turn::default());
        waiting.iter().map(|paused| paused.stream).collect()
    }

    /// Requests in the app plus requests that wait, over all workers.
    pub fn depth(&self) -> u64 {
        let (running, waiting) = self.desk.breaker.depth(&SharedData);
        running.saturating_add(waiting)
    }
}

/// Tells the workers whose requests have permits now; the streams of this one go on.
fn deliver(outcome: Outcome<Paused>, now_ns: u64, turn: &mut Turn) {
    for paused in outcome.admitted {
        admit(&paused, now_ns, turn);
    }
    for grant in outcome.grants {
        // If it cannot be told, it finds out at its tick.
        host::post(grant.mailbox, &grant.message());
    }
}

fn admit(paused: &Paused, now_ns: u64, turn: &mut Turn) {
    paused.pass.set(Pass::Admitted(now_ns));
    turn.resume.push(paused.stream);
}

fn timeout_ns(config: &Config) -> Option<u64> {
    config.queue_timeout.map(|timeout| u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX))
}
