//! The breaker at this worker: which of its requests are in the app, and which wait, paused.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;

use inflight_stats::Config;
use inflight_stats::breaker::{Answer, Breaker, Contended, Grant, Limits, Ticket};
use inflight_stats::shared::Pod;

use crate::host::{self, SharedData};

/// What Knative's queue-proxy says (knative/serving, `pkg/queue/breaker.go`).
pub const FULL: &[u8] = b"pending request queue full";
/// What a request is told that has waited for `queue_timeout`.
pub const TIMED_OUT: &[u8] = b"pending request queue timeout";

/// How long a slot stays taken when Envoy broke a request off that was in the app: a client went away, a
/// timeout struck. The app learns of it by a closed connection, a moment after Envoy's stream has ended; to let
/// another request in at once would show the app one too many.
const LINGER_NS: u64 = 10_000_000;

/// No worker has this id.
const NOBODY: u64 = 0;

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

struct Waiter {
    stream: u32,
    since_ns: u64,
    pass: SharedPass,
}

/// Something that the store did not take; tried again at the tick.
enum Owed {
    Leave,
    Abandon(Ticket),
}

/// This worker's side of the breaker.
pub struct Gate {
    breaker: Breaker,
    mailbox_name: String,
    mailbox: Option<u32>,
    timeout_ns: Option<u64>,
    worker: u64,
    next_number: u64,
    running: u32,
    waiting: BTreeMap<u64, Waiter>,
    owed: Vec<Owed>,
    reconfigured: bool,
    /// When slots of requests that were broken off come back; the earliest first.
    lingering: VecDeque<u64>,
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
        host::respond_to(&self.time_out, home, 503, TIMED_OUT);
    }
}

impl Gate {
    /// The gate of a configured breaker, if there is one; `worker` is this worker's id in the pod.
    pub fn new(config: &Config, pod: &Pod, worker: u64) -> Option<Self> {
        let breaker = Breaker::new(pod.breaker_key(), config.limits?);
        let mailbox_name = format!("{}/{worker}", pod.breaker_key());
        Some(Self {
            mailbox: host::mailbox(&mailbox_name),
            mailbox_name,
            breaker,
            timeout_ns: timeout_ns(config),
            worker,
            next_number: 0,
            running: 0,
            waiting: BTreeMap::new(),
            owed: Vec::new(),
            reconfigured: false,
            lingering: VecDeque::new(),
        })
    }

    /// Takes over another configuration's limits. The mailbox is registered anew, because the host calls
    /// the root context that registered it last.
    pub fn configure(&mut self, config: &Config) {
        const NONE: Limits = Limits { concurrency: u32::MAX, queue_depth: u32::MAX };
        self.breaker.limits = config.limits.unwrap_or(NONE);
        self.reconfigured = true;
        self.timeout_ns = timeout_ns(config);
        self.mailbox = host::mailbox(&self.mailbox_name);
    }

    /// A request comes, counted in already: what it is told.
    pub fn enter(&mut self, stream: u32, now_ns: u64) -> SharedPass {
        let number = self.next_number;
        self.next_number += 1;
        let mailbox = self.mailbox.unwrap_or(u32::MAX);
        let pass = match self.breaker.enter(&SharedData, self.worker, mailbox, number) {
            Ok(Answer::Admitted) => {
                self.running = self.running.saturating_add(1);
                Pass::Admitted(now_ns)
            }
            Ok(Answer::Queued) => Pass::Waiting(number),
            // Without an answer nobody can say that there is room.
            Ok(Answer::Full) | Err(Contended) => Pass::Refused,
        };
        let pass = Rc::new(Cell::new(pass));
        if pass.get() == Pass::Waiting(number) {
            self.waiting.insert(number, Waiter { stream, since_ns: now_ns, pass: Rc::clone(&pass) });
        }
        pass
    }

    /// A request ends. Which others go on.
    pub fn leave(&mut self, pass: Pass, now_ns: u64) -> Turn {
        let resume = match pass {
            Pass::Refused => Vec::new(),
            Pass::Waiting(number) => {
                self.waiting.remove(&number);
                self.pay(Owed::Abandon(Ticket { worker: self.worker, number }), now_ns)
            }
            Pass::Admitted(_) => {
                match self.breaker.leave_unless(&SharedData, self.worker, host::was_broken_off) {
                    Ok(Some(grants)) => {
                        self.running = self.running.saturating_sub(1);
                        self.deliver(grants, now_ns)
                    }
                    Ok(None) => {
                        self.lingering.push_back(now_ns.saturating_add(LINGER_NS));
                        host::tick_in(LINGER_NS / 1_000_000);
                        Vec::new()
                    }
                    Err(Contended) => {
                        self.owed.push(Owed::Leave);
                        Vec::new()
                    }
                }
            }
        };
        Turn { resume, ..Turn::default() }
    }

    /// Messages have come: some of this worker's waiting requests have slots.
    pub fn read_mailbox(&mut self, now_ns: u64) -> Turn {
        let mut turn = Turn::default();
        let Some(mailbox) = self.mailbox else { return turn };
        while let Some(message) = host::next_message(mailbox) {
            let number = <[u8; 8]>::try_from(message.as_slice()).map(u64::from_le_bytes);
            turn.resume.extend(number.ok().and_then(|number| self.admit(number, now_ns)));
        }
        turn
    }

    /// What time brings: requests that waited too long, changes that the store did not take, messages that were
    /// lost, and slots that were taken from a worker believed dead.
    pub fn tick(&mut self, now_ns: u64) -> Turn {
        let mut turn = Turn::default();
        while self.lingering.front().is_some_and(|due_ns| *due_ns <= now_ns) {
            self.lingering.pop_front();
            self.owed.push(Owed::Leave);
        }
        for owed in std::mem::take(&mut self.owed) {
            turn.resume.extend(self.pay(owed, now_ns));
        }
        if std::mem::take(&mut self.reconfigured) {
            // Nobody's slots come back, but there may be more of them now.
            turn.resume.extend(self.forget(NOBODY, now_ns).unwrap_or_default().resume);
        }
        if self.running > 0 || !self.waiting.is_empty() {
            match self.breaker.waiting(&SharedData, self.worker) {
                Some(still) => {
                    let still: BTreeSet<u64> = still.into_iter().collect();
                    let granted: Vec<u64> =
                        self.waiting.keys().filter(|number| !still.contains(number)).copied().collect();
                    turn.resume.extend(granted.into_iter().filter_map(|number| self.admit(number, now_ns)));
                }
                None => {
                    let waiting: Vec<u64> = self.waiting.keys().copied().collect();
                    let mailbox = self.mailbox.unwrap_or(u32::MAX);
                    let restored =
                        self.breaker.restore(&SharedData, self.worker, mailbox, self.running, &waiting);
                    turn.resume.extend(self.deliver(restored.unwrap_or_default(), now_ns));
                }
            }
        }
        if let Some(timeout_ns) = self.timeout_ns {
            let late = |waiter: &Waiter| now_ns.saturating_sub(waiter.since_ns) >= timeout_ns;
            let numbers: Vec<u64> =
                self.waiting.iter().take_while(|(_, w)| late(w)).map(|(number, _)| *number).collect();
            for number in numbers {
                if let Some(waiter) = self.waiting.remove(&number) {
                    waiter.pass.set(Pass::Refused);
                    turn.time_out.push(waiter.stream);
                    let ticket = Ticket { worker: self.worker, number };
                    turn.resume.extend(self.pay(Owed::Abandon(ticket), now_ns));
                }
            }
        }
        turn
    }

    /// How soon time should be looked at, in nanoseconds.
    pub fn next_look_ns(&self, now_ns: u64) -> Option<u64> {
        let timeout = self.timeout_ns.map(|timeout_ns| (timeout_ns / 10).clamp(5_000_000, 100_000_000));
        let linger = self.lingering.front().map(|due_ns| due_ns.saturating_sub(now_ns));
        timeout.into_iter().chain(linger).min()
    }

    /// Another worker is gone: its slots go to those who wait.
    pub fn forget(&mut self, worker: u64, now_ns: u64) -> Option<Turn> {
        let grants = self.breaker.forget(&SharedData, worker).ok()?;
        Some(Turn { resume: self.deliver(grants, now_ns), ..Turn::default() })
    }

    /// The streams of this worker that wait.
    pub fn waiting(&self) -> Vec<u32> {
        self.waiting.values().map(|waiter| waiter.stream).collect()
    }

    /// This worker ends: what it holds goes to the others.
    pub fn close(&mut self) {
        if let Ok(grants) = self.breaker.forget(&SharedData, self.worker) {
            self.waiting.clear();
            self.deliver(grants, 0);
        }
        self.running = 0;
    }

    /// Requests in the app plus requests that wait, over all workers.
    pub fn depth(&self) -> u64 {
        let (running, waiting) = self.breaker.depth(&SharedData);
        running.saturating_add(waiting)
    }

    fn pay(&mut self, owed: Owed, now_ns: u64) -> Vec<u32> {
        let grants = match &owed {
            Owed::Leave => {
                let left = self.breaker.leave(&SharedData, self.worker);
                self.running = self.running.saturating_sub(u32::from(left.is_ok()));
                left
            }
            Owed::Abandon(ticket) => self.breaker.abandon(&SharedData, *ticket),
        };
        match grants {
            Ok(grants) => self.deliver(grants, now_ns),
            Err(Contended) => {
                self.owed.push(owed);
                Vec::new()
            }
        }
    }

    /// Tells the workers whose requests have slots now; the streams of this one that go on.
    fn deliver(&mut self, grants: Vec<Grant>, now_ns: u64) -> Vec<u32> {
        let mut own = Vec::new();
        for Grant { ticket, mailbox } in grants {
            if ticket.worker == self.worker {
                own.extend(self.admit(ticket.number, now_ns));
            } else {
                // If it cannot be told, it finds out at its tick.
                host::post(mailbox, &ticket.number.to_le_bytes());
            }
        }
        own
    }

    /// A waiting request has a slot. One that gave up meanwhile has passed it on already.
    fn admit(&mut self, number: u64, now_ns: u64) -> Option<u32> {
        let waiter = self.waiting.remove(&number)?;
        self.running = self.running.saturating_add(1);
        waiter.pass.set(Pass::Admitted(now_ns));
        Some(waiter.stream)
    }
}

fn timeout_ns(config: &Config) -> Option<u64> {
    config.queue_timeout.map(|timeout| u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX))
}
