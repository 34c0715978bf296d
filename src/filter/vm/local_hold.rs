//! The local hold: the requests of this worker that wait until a pod can take them, the probes that
//! find out whether one can, and the messages between workers.

use std::borrow::Cow;
use std::cell::RefCell;
use std::rc::Rc;

use inflight_stats::counting::request::{NETWORK_PROBE_HEADER, QUEUE_PROBE_VALUE};
use inflight_stats::counting::time::MonotonicNs;
use inflight_stats::gateway::key_name::KeyName;
use inflight_stats::hold::key_hold::Answer;
use inflight_stats::hold::settings::HoldSettings;
use inflight_stats::hold::worker_side::{Arrival, Effects, Ended, Passage, Probe, ProbeResult, WorkerHold};
use inflight_stats::pod::pod_state::PodStore;

use crate::host::metric::Counter;
use crate::host::{CallError, HeaderMap, Host, HttpCall, Mailbox};
use crate::vm::probe::{PROBE_AGENT, is_answer};
use crate::vm::stream_actions::{Refusal, StreamActions};
use crate::vm::tick_timer::TickTimer;

/// The state of a request at a gateway that holds.
#[derive(Clone, Debug)]
pub enum HoldState {
    /// The request is paused, under this number.
    Waiting(u64),
    /// The request was let through.
    Passed(Passage),
    /// The request was answered here, or the hold has nothing to do with it.
    Outside,
}

/// Shared between the stream and the local hold, which lets the request through while another
/// callback runs.
pub type SharedHoldState = Rc<RefCell<HoldState>>;

/// What a stream is to do with its request.
pub enum HoldDecision {
    /// Let it go on.
    Pass(Passage),
    /// Let it go on, and do not tell the hold of its end.
    Unheld,
    /// Pause it.
    Pause(SharedHoldState),
    /// Answer it.
    Refuse(Refusal),
}

struct Paused {
    stream: u32,
    authority: String,
    state: SharedHoldState,
}

/// What the hold has to say to the stats of keys.
#[derive(Debug, Default)]
pub struct HoldNews {
    /// How many more requests of a key are held, over all workers.
    pub more_held: Vec<(KeyName, i64)>,
    /// For how many milliseconds a request of a key was held.
    pub held_ms: Vec<(KeyName, u64)>,
}

/// This worker's side of the hold, and its paused streams.
pub struct LocalHold<H> {
    host: H,
    side: WorkerHold<Paused>,
    worker: u64,
    mailbox_name: String,
    mailbox: Mailbox,
    /// The probes on their way: the host's numbers of the calls, and the hold's.
    calls: Vec<(u32, u64)>,
    news: HoldNews,
    timeouts: Counter,
    refused: Counter,
    lost: Counter,
    /// What this worker would have told itself, had there been a mailbox.
    undelivered: Vec<u8>,
    /// When the worker ticks next.
    pub timer: TickTimer,
}

impl<H: Host> LocalHold<H> {
    /// Returns the local hold of a worker. `secret` is the same for all workers of this Envoy, and
    /// unknown to clients.
    pub fn new(host: H, settings: HoldSettings, pod: &PodStore, worker: u64, secret: u64) -> Self {
        let mut hold = Self {
            host,
            side: WorkerHold::new(pod.clone(), worker, secret, settings.clone()),
            worker,
            mailbox_name: pod.key(&format!("hold/{worker}")),
            mailbox: Mailbox::NONE,
            calls: Vec::new(),
            news: HoldNews::default(),
            timeouts: Counter::define(host, "inflight_hold_timeouts_total"),
            refused: Counter::define(host, "inflight_hold_refused_total"),
            lost: Counter::define(host, "inflight_hold_lost_total"),
            undelivered: Vec::new(),
            timer: TickTimer::default(),
        };
        hold.configure(settings);
        hold
    }

    /// Applies other settings, in a root context that is to get the messages from now on: the host
    /// calls the one that registered the mailbox last.
    pub fn configure(&mut self, settings: HoldSettings) {
        self.side.settings = settings;
        self.register();
    }

    /// Registers the mailbox for the root context in effect. From now on this context's timer counts:
    /// the context whose tick would have come next may be the one that ends.
    pub fn register(&mut self) {
        self.mailbox = self.host.mailbox(&self.mailbox_name);
        self.note_mailbox();
        self.timer.forget();
        self.wake(self.host.monotonic());
    }

    /// Notes the mailbox where other workers look for it. If this fails, the worker finds at its
    /// ticks what others would have told it.
    fn note_mailbox(&self) {
        let _ = self.side.store().set_mailbox(&self.host, self.worker, Some(self.mailbox.0));
    }

    /// Lets a request to a cluster of a key through, holds it, or turns it away.
    pub fn arrive(&mut self, key: &KeyName, cluster: &str, stream: u32, now: MonotonicNs) -> HoldDecision {
        let host = self.host;
        let mut state = None;
        let paused = |number| {
            let held = Rc::new(RefCell::new(HoldState::Waiting(number)));
            state = Some(Rc::clone(&held));
            let authority = host.header(HeaderMap::Request, ":authority").unwrap_or_default();
            Paused { stream, authority: String::from_utf8_lossy(&authority).into_owned(), state: held }
        };
        let mut effects = Effects::default();
        let arrival = self.side.arrive(&self.host, key, cluster, now, paused, &mut effects);
        let decision = match (arrival, state) {
            (Arrival::Passed(passage), _) => return HoldDecision::Pass(passage),
            (Arrival::Held(_), Some(state)) => HoldDecision::Pause(state),
            (Arrival::Unheld, _) | (Arrival::Held(_), None) => HoldDecision::Unheld,
            (Arrival::Full, _) => {
                self.refused.add(self.host, 1);
                HoldDecision::Refuse(Refusal {
                    details: "inflight_hold_full",
                    body: Cow::Owned(format!("too many requests held for {key}\n")),
                    retry: true,
                })
            }
        };
        // Others may have got permits, even if this request is turned away.
        self.perform(effects, now);
        self.wake(now);
        decision
    }

    /// Ends a request that was let through.
    pub fn leave(&mut self, key: &KeyName, passage: &Passage, code: u16, now: MonotonicNs) {
        // Only a 503 can mean that there was no pod.
        let lost = code == 503 && self.host.had_no_upstream();
        let answer = match code {
            503 => Answer::Unavailable,
            code if is_answer(code) => Answer::Answered,
            _ => Answer::Neither,
        };
        let mut effects = Effects::default();
        self.side.leave(&self.host, key, passage, (answer, lost), now, &mut effects);
        self.lost.add(self.host, u64::from(lost));
        if !effects.is_empty() {
            self.perform(effects, now);
        }
    }

    /// Ends a request that is still held.
    pub fn abandon(&mut self, key: &KeyName, number: u64, now: MonotonicNs) {
        let mut effects = Effects::default();
        if let Some(since) = self.side.abandon(&self.host, key, number, now, &mut effects) {
            self.held_for(key, since, now);
        }
        self.perform(effects, now);
    }

    /// Reads the messages that have come, and looks at the keys that they name. Called in a root
    /// context, which gets the answers to probes.
    pub fn read_mailbox(&mut self, now: MonotonicNs) -> StreamActions {
        let mut buckets = Vec::new();
        while let Some(message) = self.host.next_message(self.mailbox) {
            for bucket in message {
                if !buckets.contains(&bucket) {
                    buckets.push(bucket);
                }
            }
        }
        self.look(&buckets, now)
    }

    fn look(&mut self, buckets: &[u8], now: MonotonicNs) -> StreamActions {
        let mut effects = Effects::default();
        self.side.look(&self.host, buckets, now, &mut effects);
        let actions = self.perform(effects, now);
        self.wake(now);
        actions
    }

    /// Does what depends on time. Called in a root context.
    pub fn tick(&mut self, leads: bool, now: MonotonicNs) -> StreamActions {
        // If the leader took this worker for dead, it has forgotten the mailbox.
        self.note_mailbox();
        let mut effects = Effects::default();
        self.side.tick(&self.host, now, &mut effects);
        if leads {
            self.side.sweep(&self.host, now, &mut effects);
        }
        let mut actions = self.perform(effects, now);
        let undelivered = std::mem::take(&mut self.undelivered);
        if !undelivered.is_empty() {
            actions.extend(self.look(&undelivered, now));
        }
        actions
    }

    /// Handles the answer to a call, if the call was a probe.
    pub fn on_response(&mut self, call: u32, status: u16, now: MonotonicNs) -> Option<StreamActions> {
        let position = self.calls.iter().position(|(probe, _)| *probe == call)?;
        let (_, number) = self.calls.swap_remove(position);
        let result = if is_answer(status) { ProbeResult::Ready } else { ProbeResult::NotReady };
        Some(self.probed(number, result, now))
    }

    /// Returns the nanoseconds until a tick is needed; `None` if nothing here depends on time.
    pub fn next_wake_ns(&self, now: MonotonicNs) -> Option<u64> {
        self.side.next_wake_ns(now)
    }

    /// Forgets a worker that is gone.
    pub fn forget(&self, worker: u64) {
        let _ = self.side.store().set_mailbox(&self.host, worker, None);
    }

    /// Ends this worker. Returns its streams that wait.
    pub fn close(&mut self, now: MonotonicNs) -> Vec<u32> {
        let mut effects = Effects::default();
        let held = self.side.close(&self.host, now, &mut effects);
        self.forget(self.worker);
        self.perform(effects, now);
        held.iter()
            .map(|paused| {
                paused.state.replace(HoldState::Outside);
                paused.stream
            })
            .collect()
    }

    /// Returns whether there is anything to say to the stats of keys.
    pub fn has_news(&self) -> bool {
        !self.news.more_held.is_empty() || !self.news.held_ms.is_empty()
    }

    /// Returns what there is to say to the stats of keys since the last call.
    pub fn take_news(&mut self) -> HoldNews {
        std::mem::take(&mut self.news)
    }

    /// Moves the next tick forward, if one is needed before.
    fn wake(&mut self, now: MonotonicNs) {
        if let Some(wake_ns) = self.side.next_wake_ns(now) {
            self.timer.wake_at(self.host, now.plus(wake_ns), now);
        }
    }

    /// Sends messages and probes. Returns what is to be done with streams.
    fn perform(&mut self, effects: Effects<Paused>, now: MonotonicNs) -> StreamActions {
        let mut actions = StreamActions::default();
        self.news.more_held.extend(effects.more_held);
        for (ended, passage) in effects.passed {
            self.held_for(&ended.key, ended.since, now);
            ended.data.state.replace(HoldState::Passed(passage));
            actions.resume.push(ended.data.stream);
        }
        for ended in effects.timed_out {
            self.timeouts.add(self.host, 1);
            self.held_for(&ended.key, ended.since, now);
            actions.refuse.push(self.timed_out(ended));
        }
        for probe in effects.probes {
            actions.extend(self.probe(&probe, now));
        }
        self.post(&effects.notify, &effects.notify_all);
        actions
    }

    fn timed_out(&self, ended: Ended<Paused>) -> (u32, Refusal) {
        let Ended { key, data: Paused { stream, state, .. }, .. } = ended;
        state.replace(HoldState::Outside);
        let timeout = self.side.settings.timeout;
        let body = Cow::Owned(format!("no capacity for {key} within {timeout:?}\n"));
        (stream, Refusal { details: "inflight_hold_timeout", body, retry: true })
    }

    fn held_for(&mut self, key: &KeyName, since: MonotonicNs, now: MonotonicNs) {
        self.news.held_ms.push((key.clone(), now.since(since) / 1_000_000));
    }

    /// Posts messages: numbers of buckets to look at, to some workers or to all.
    fn post(&mut self, notify: &[(u64, u8)], notify_all: &[u8]) {
        if notify.is_empty() && notify_all.is_empty() {
            return;
        }
        let only_me = notify_all.is_empty() && notify.iter().all(|(worker, _)| *worker == self.worker);
        let mailboxes = match only_me {
            true => vec![(self.worker, self.mailbox.0)],
            false => self.side.store().mailboxes(&self.host),
        };
        for (worker, mailbox) in mailboxes {
            let mine = notify.iter().filter(|(other, _)| *other == worker).map(|(_, bucket)| *bucket);
            let message: Vec<u8> = mine.chain(notify_all.iter().copied()).collect();
            if message.is_empty() || self.host.send_message(Mailbox(mailbox), &message) {
                continue;
            }
            // Another worker finds it at its tick.
            if worker == self.worker {
                self.undelivered.extend(message);
            }
        }
    }

    /// Sends a probe to the cluster of a held request, with that request's `:authority`.
    fn probe(&mut self, probe: &Probe, now: MonotonicNs) -> StreamActions {
        let Some(paused) = self.side.held(&probe.key, probe.request) else {
            // It has gone on meanwhile. The next probe has another request's authority.
            return self.probed(probe.number, ProbeResult::NotReady, now);
        };
        let settings = &self.side.settings;
        let headers = vec![
            (":method", "GET"),
            (":path", settings.probe_path.as_str()),
            (":authority", paused.authority.as_str()),
            ("user-agent", PROBE_AGENT),
            // As Knative's activator probes, so that its queue-proxy answers, too.
            (NETWORK_PROBE_HEADER, QUEUE_PROBE_VALUE),
        ];
        let timeout = settings.probe_timeout();
        let result =
            match self.host.http_call(HttpCall { cluster: &probe.cluster, headers, body: &[], timeout }) {
                Ok(call) => {
                    self.calls.push((call, probe.number));
                    return StreamActions::default();
                }
                // Envoy says what is wrong better than a timeout of the hold.
                Err(CallError::UnknownCluster) => ProbeResult::Ready,
                Err(CallError::NoHost) => ProbeResult::NotReady,
            };
        self.probed(probe.number, result, now)
    }

    fn probed(&mut self, number: u64, result: ProbeResult, now: MonotonicNs) -> StreamActions {
        let mut effects = Effects::default();
        self.side.probed(&self.host, number, result, now, &mut effects);
        self.perform(effects, now)
    }
}
