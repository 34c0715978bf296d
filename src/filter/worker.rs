//! What this VM counted for one pod. All root and stream contexts of the VM that serve the same pod
//! share one [`Worker`], also across a change of configuration.

use std::cell::RefCell;
use std::rc::Rc;

use inflight_stats::config::Role;
use inflight_stats::counting::clock::{Clock, longest_step_ns};
use inflight_stats::gateway::key_name::KeyName;
use inflight_stats::gateway::key_totals::KeyTotals;
use inflight_stats::pod::{Member, Pod, Stock, Trouble};
use inflight_stats::protocol::report::{VERSION, Verdict};
use inflight_stats::{Config, Identity, KeyReport, Recorder, Report, Snapshot};

use crate::host::{self, SharedData};
use crate::keyed_worker::{Counted, KeyedWorker};
use crate::local_breaker::{Gate, Turn};
use crate::metrics::Metrics;

/// Workers tick this long after a boundary: the timer's millisecond, and one to spare.
const SETTLE_NS: u64 = 2_000_000;

/// The context to go back to where nothing is called any more.
const NO_CONTEXT: u32 = 0;

thread_local! {
    static WORKERS: RefCell<Vec<(String, Rc<RefCell<Worker>>)>> = const { RefCell::new(Vec::new()) };
}

/// This VM's counters for one pod, and its part in the pod's figure.
pub struct Worker {
    clock: Clock,
    recorder: Recorder,
    member: Member,
    pub metrics: Metrics,
    pub gate: Option<Gate>,
    keys: Option<KeyedWorker>,
    pub incarnation: u64,
    /// The root contexts that use this worker and their configurations, the newest last: that one is in force. With the
    /// last of them this worker ends.
    roots: Vec<(u32, Config)>,
    sending: Vec<Sending>,
    failing: bool,
}

/// A report on its way out.
pub struct Outgoing {
    pub bytes: Vec<u8>,
    said: Said,
}

/// What a report says, and so what an acknowledgement means.
enum Said {
    Pod(u64, Snapshot),
    Keys(Vec<(KeyName, Snapshot)>),
}

/// A report that was not answered yet.
struct Sending {
    call: u32,
    said: Said,
    /// When to stop waiting: the root context that would get the answer may be gone.
    deadline_ns: u64,
}

/// What a tick asks the root context to do.
pub struct Tick {
    pub reports: Vec<Outgoing>,
    pub turn: Turn,
    pub next_ms: u64,
    /// Whether this worker leads, for the tests that end the leader.
    #[cfg(feature = "fault-injection")]
    pub leads: bool,
}

impl Worker {
    /// The worker of the pod that this root context is configured for, new or as it is.
    pub fn of(root: u32, config: &Config) -> Result<Rc<RefCell<Self>>, Trouble> {
        let domain = config.domain();
        let found = WORKERS.with(|workers| {
            let workers = workers.try_borrow().ok()?;
            workers.iter().find(|(name, _)| *name == domain).map(|(_, worker)| Rc::clone(worker))
        });
        let period_ns = period_ns(config);
        let (raw_ns, wall_ns) = (host::monotonic_ns(), host::wall_ns());
        let pod = Pod::new(&domain);
        let incarnation = wall_ns ^ raw_ns.rotate_left(32);
        let state = pod.open(&SharedData, raw_ns, wall_ns, period_ns, incarnation)?;
        if let Some(worker) = found {
            if let Ok(mut worker) = worker.try_borrow_mut() {
                worker.recorder.set_grid(state.grid);
                worker.join(root, config)?;
            }
            return Ok(worker);
        }
        let mut clock = Clock::new(state.clock_offset_ns, raw_ns, longest_step_ns(period_ns));
        let now_ns = clock.read(raw_ns);
        let mut worker = Self {
            clock,
            recorder: Recorder::new(now_ns, state.grid),
            member: Member::new(pod, now_ns, period_ns),
            metrics: Metrics::define(config.role),
            gate: None,
            keys: None,
            incarnation: state.incarnation,
            roots: Vec::new(),
            sending: Vec::new(),
            failing: false,
        };
        worker.join(root, config)?;
        let worker = Rc::new(RefCell::new(worker));
        WORKERS.with(|workers| {
            if let Ok(mut workers) = workers.try_borrow_mut() {
                workers.push((domain, Rc::clone(&worker)));
            }
        });
        Ok(worker)
    }

    /// The pod's time. After a silence of which the clock would count only a part, the time that the other workers have lived
    /// through meanwhile counts whole: it was only this one that stood still.
    fn now_ns(&mut self, raw_ns: u64) -> u64 {
        if self.clock.cuts(raw_ns)
            && let Ok(state) = self.member.pod().state(&SharedData)
        {
            self.clock.catch_up(state.led_until_ns(), state.clock_offset_ns);
        }
        self.clock.read(raw_ns)
    }

    pub fn request_in(&mut self, raw_ns: u64, proxied: bool) {
        let now_ns = self.now_ns(raw_ns);
        self.recorder.request_in(now_ns, proxied);
    }

    pub fn request_out(
        &mut self,
        raw_ns: u64,
        proxied: bool,
        code: u16,
        latency_ns: u64,
        app_ns: Option<u64>,
    ) {
        let now_ns = self.now_ns(raw_ns);
        self.recorder.request_out(now_ns, proxied);
        self.metrics.request_done(code, latency_ns, app_ns);
    }

    /// A request without a key came to the gateway.
    pub fn keyless(&mut self) {
        if let Some(keys) = &mut self.keys {
            keys.keyless();
        }
    }

    /// A request of a key came to the gateway. The recorder's own total decides who leads.
    pub fn key_in(&mut self, key: &KeyName, raw_ns: u64) -> Counted {
        let now_ns = self.now_ns(raw_ns);
        let counted = self.keys.as_mut().map_or(Counted::No, |keys| keys.request_in(key, now_ns));
        if !matches!(counted, Counted::No) {
            self.recorder.request_in(now_ns, false);
        }
        counted
    }

    pub fn key_out(&mut self, key: &KeyName, raw_ns: u64, code: u16, latency_ns: u64) {
        let now_ns = self.now_ns(raw_ns);
        self.recorder.request_out(now_ns, false);
        if let Some(keys) = &mut self.keys {
            keys.request_out(key, now_ns, code, latency_ns);
        }
    }

    /// A root context comes: its configuration is in force.
    fn join(&mut self, root: u32, config: &Config) -> Result<(), Trouble> {
        self.configure(config)?;
        self.roots.retain(|(other, _)| *other != root);
        self.roots.push((root, config.clone()));
        self.keep_time();
        Ok(())
    }

    /// A root context goes, and others stay. Where its configuration was in force, the one before is so again: Envoy says
    /// nothing to a root context whose configuration comes back while it is still there.
    fn part(&mut self, root: u32) {
        let before = self.roots.last().map(|(newest, _)| *newest);
        self.roots.retain(|(other, _)| *other != root);
        let Some((newest, config)) = self.roots.last().cloned() else { return };
        if before != Some(newest) {
            // In the name of the one that stays: the breaker's messages must not come to the one that goes.
            host::in_context(newest, root, || {
                if let Err(trouble) = self.configure(&config) {
                    log::warn!(
                        "inflight: a configuration that is in force again was not taken ({trouble:?})"
                    );
                }
            });
        }
        self.keep_time();
    }

    /// By the shortest period of all its configurations.
    fn keep_time(&mut self) {
        if let Some(period_ns) = self.roots.iter().map(|(_, config)| period_ns(config)).min() {
            self.member.set_period_ns(period_ns);
            self.clock.set_longest_step_ns(longest_step_ns(period_ns));
        }
    }

    /// Takes over a configuration. A breaker that it does not have any more lets everything through, those who
    /// wait included.
    fn configure(&mut self, config: &Config) -> Result<(), Trouble> {
        if config.role == Role::Gateway {
            let grid = self.recorder.grid();
            match &mut self.keys {
                Some(keys) => keys.configure(config, grid),
                None => {
                    let (id, now_ns) = (self.member.id(&SharedData)?, self.recorder.current().as_of_ns);
                    let state = self.member.pod().state(&SharedData)?;
                    self.keys = Some(KeyedWorker::new(config, self.member.pod(), &state, id, now_ns));
                }
            }
            return Ok(());
        }
        match &mut self.gate {
            Some(gate) => gate.configure(config),
            None if config.limits.is_some() => {
                let id = self.member.id(&SharedData)?;
                self.gate = Gate::new(config, self.member.pod(), id);
            }
            None => {}
        }
        Ok(())
    }

    /// Posts this worker's books, and leads the pod if it falls to this worker.
    pub fn tick(&mut self, config: &Config) -> Tick {
        let raw_ns = host::monotonic_ns();
        let now_ns = self.advance();
        let mut turn = self.gate.as_mut().map(|gate| gate.tick(raw_ns)).unwrap_or_default();
        let stock = self.step(now_ns).unwrap_or_else(|trouble| {
            log::warn!("inflight: this tick's figures wait for the next one ({trouble:?})");
            Stock::Follow
        });
        let mut reports = Vec::new();
        if let Stock::Published { previous, latest, since, incarnation } = stock {
            self.sending.retain(|sending| now_ns < sending.deadline_ns);
            let departed = self.departed();
            let settled = if self.keys.is_some() {
                let (of_keys, settled) = self.lead_keys(config, incarnation, latest.as_of_ns, departed);
                reports = of_keys;
                settled
            } else {
                if let Some(period) = latest.since(&previous) {
                    self.metrics.publish(&period, &latest);
                }
                if self.may_send(config) {
                    reports.extend(of_pod(config, incarnation, since, latest));
                }
                departed
            };
            if let Some(gate) = &self.gate {
                self.metrics.queue_depth(gate.depth());
            }
            turn.resume.extend(self.clear_up(settled, raw_ns));
        }
        if stock == Stock::Follow
            && let Some(keys) = &mut self.keys
        {
            keys.follow();
        }
        let boundary_ns = self.recorder.grid().after(now_ns).saturating_add(SETTLE_NS);
        let wait_ns = boundary_ns.saturating_sub(now_ns);
        let wait_ns = match stock {
            // Another worker is about to close this boundary, or dead; look again soon.
            Stock::Wait => wait_ns.min((self.recorder.grid().period_ns / 20).clamp(5_000_000, 50_000_000)),
            _ => wait_ns,
        };
        let look_ns = self.gate.as_ref().and_then(|gate| gate.next_look_ns(raw_ns));
        let next_ms = look_ns.map_or(wait_ns, |look_ns| wait_ns.min(look_ns)).div_ceil(1_000_000);
        if let Some(gate) = &mut self.gate {
            gate.ticks_at(raw_ns.saturating_add(next_ms.saturating_mul(1_000_000)));
        }
        Tick {
            reports,
            turn,
            next_ms,
            #[cfg(feature = "fault-injection")]
            leads: stock != Stock::Follow,
        }
    }

    /// One report at a time: the next one says what this one did, and more.
    fn may_send(&self, config: &Config) -> bool {
        config.statserver.is_some() && self.sending.is_empty()
    }

    /// The leader of a gateway: what is to be sent, and which of the departed have nothing left to collect.
    fn lead_keys(
        &mut self,
        config: &Config,
        incarnation: u64,
        as_of_ns: u64,
        departed: Vec<u64>,
    ) -> (Vec<Outgoing>, Vec<u64>) {
        let may_send = self.may_send(config);
        let state = self.member.pod().state(&SharedData);
        let workers: Vec<u64> = state.map(|state| state.workers().collect()).unwrap_or_default();
        let Some(keys) = &mut self.keys else { return (Vec::new(), departed) };
        let Some((totals, settled)) = keys.lead(&workers, &departed, as_of_ns) else {
            return (Vec::new(), Vec::new());
        };
        if config.statserver.is_none() {
            // Nobody else is to know: what the stats show is all there is.
            let known: Vec<_> = totals.keys().map(|(key, total)| (key.clone(), total.until)).collect();
            keys.acknowledged(known);
            return (Vec::new(), settled);
        }
        let reports = if may_send { of_keys(config, incarnation, totals) } else { Vec::new() };
        (reports, settled)
    }

    fn advance(&mut self) -> u64 {
        let now_ns = self.now_ns(host::monotonic_ns());
        self.recorder.advance(now_ns);
        self.metrics.flush(self.recorder.current());
        self.metrics.show_memory(host::memory_bytes());
        now_ns
    }

    fn step(&mut self, now_ns: u64) -> Result<Stock, Trouble> {
        let state = self.member.pod().state(&SharedData)?;
        self.recorder.set_grid(state.grid);
        if let Some(keys) = &mut self.keys {
            // Before the books of the pod are closed, so that whoever finds the one finds the other.
            keys.set_grid(state.grid);
            keys.post(now_ns);
        }
        if self.member.post(&SharedData, &self.recorder)? {
            log::warn!("inflight: this worker was silent for so long that it was counted out; it is back");
            self.clock.follow(state.clock_offset_ns);
        }
        self.member.take_stock(&SharedData, now_ns, self.clock.offset_ns())
    }

    fn departed(&self) -> Vec<u64> {
        self.member.pod().state(&SharedData).map(|state| state.departed).unwrap_or_default()
    }

    /// The leader gives back what workers that are gone held in the breaker, when they have been gone for long enough.
    fn clear_up(&mut self, departed: Vec<u64>, raw_ns: u64) -> Vec<u32> {
        let mut resume = Vec::new();
        let mut done = Vec::new();
        for id in departed {
            let turn = match &mut self.gate {
                Some(gate) => gate.forget_late(id, raw_ns),
                None => Some(Turn::default()),
            };
            if let Some(turn) = turn {
                resume.extend(turn.resume);
                done.push(id);
            }
        }
        if !done.is_empty() {
            // Otherwise it is done again at the next tick, which changes nothing.
            let _ = self.member.pod().cleared_up(&SharedData, &done);
        }
        resume
    }

    /// A report is on its way.
    pub fn sent(&mut self, call: u32, report: Outgoing, config: &Config) {
        let timeout = config.statserver.as_ref().map_or(0, |server| server.timeout.as_nanos());
        let wait_ns = u64::try_from(timeout).unwrap_or(u64::MAX).saturating_add(period_ns(config));
        let deadline_ns = self.recorder.current().as_of_ns.saturating_add(wait_ns);
        self.sending.push(Sending { call, said: report.said, deadline_ns });
    }

    /// The stats server's answer. Where it refuses a report for good, the figures go on from there, too.
    pub fn answered(&mut self, call: u32, status: u16, reason: impl FnOnce() -> String) {
        let Some(position) = self.sending.iter().position(|sending| sending.call == call) else { return };
        let said = self.sending.swap_remove(position).said;
        let verdict = Verdict::of_status(status);
        if verdict != Verdict::TryAgain {
            match said {
                Said::Keys(known) => {
                    if let Some(keys) = &mut self.keys {
                        keys.acknowledged(known);
                    }
                }
                Said::Pod(incarnation, until) => {
                    if let Err(trouble) = self.member.pod().acknowledge(&SharedData, incarnation, &until) {
                        log::warn!("inflight: an acknowledged report will be sent again ({trouble:?})");
                    }
                }
            }
        }
        if verdict == Verdict::Acknowledged {
            self.metrics.report_sent();
            if std::mem::take(&mut self.failing) {
                log::info!("inflight: the stats server acknowledges reports again");
            }
        } else {
            self.failed(|| format!("answered {status}: {}", reason()));
        }
    }

    /// The call could not be made.
    pub fn not_sent(&mut self, why: &str) {
        self.failed(|| why.to_owned());
    }

    /// Logged once when it begins; the counter has the rest.
    fn failed(&mut self, why: impl FnOnce() -> String) {
        self.metrics.report_failed();
        if !std::mem::replace(&mut self.failing, true) {
            log::warn!("inflight: the stats server {}; what it missed goes into a later report", why());
        }
    }

    /// A root context ends. With the last one, everything counted here goes into the pod's figure, and a
    /// last report is made, whether this worker led or not: nobody knows who is the last of all.
    pub fn root_done(&mut self, root: u32, config: &Config) -> Vec<Outgoing> {
        self.part(root);
        if !self.roots.is_empty() {
            return Vec::new();
        }
        self.close_gate();
        let Some(now_ns) = self.seal() else { return Vec::new() };
        let Ok((until, state)) = self.member.last_figure(&SharedData, now_ns) else { return Vec::new() };
        if let Some(keys) = &mut self.keys {
            // The leader may have taken this worker's seat away just now, and end, too, before it collects.
            let all: Vec<u64> = state.workers().chain(state.departed.iter().copied()).collect();
            let totals = keys.collect_last(&all, until.as_of_ns);
            return totals.map(|totals| of_keys(config, state.incarnation, totals)).unwrap_or_default();
        }
        of_pod(config, state.incarnation, state.reported_since(), until).into_iter().collect()
    }

    /// Gives what this worker holds of the breaker to the others, at once; its streams that wait.
    fn close_gate(&mut self) -> Vec<u32> {
        self.gate.as_mut().map(Gate::close).unwrap_or_default()
    }

    /// Leaves everything counted up to now to the others.
    fn seal(&mut self) -> Option<u64> {
        let now_ns = self.advance();
        self.metrics.show_memory(0);
        if let Some(keys) = &mut self.keys {
            keys.end(now_ns);
        }
        self.member.seal(&SharedData, &self.recorder).ok().map(|()| now_ns)
    }
}

/// The report of a pod.
fn of_pod(config: &Config, incarnation: u64, since: Snapshot, until: Snapshot) -> Option<Outgoing> {
    let Identity { namespace, revision, pod, .. } = config.identity.clone();
    let message = KeyReport { namespace, name: revision, from_gateway: false, since, until };
    encoded(
        &Report { version: VERSION, pod, incarnation, messages: vec![message] },
        Said::Pod(incarnation, until),
    )
}

/// The reports of a gateway.
fn of_keys(config: &Config, incarnation: u64, totals: &KeyTotals) -> Vec<Outgoing> {
    let reports = totals.reports(&config.identity.pod, incarnation).into_iter();
    reports.filter_map(|(report, known)| encoded(&report, Said::Keys(known))).collect()
}

fn encoded(report: &Report, said: Said) -> Option<Outgoing> {
    let bytes = report.encode().inspect_err(|error| log::error!("inflight: {error}")).ok()?;
    Some(Outgoing { bytes, said })
}

fn period_ns(config: &Config) -> u64 {
    u64::try_from(config.reporting_period.as_nanos()).unwrap_or(u64::MAX)
}

/// Makes a panic leave this VM's counts behind: the hook runs before the VM stops, and host calls work in
/// it. Only a worker that was being changed at that very moment keeps to its last tick. Requests that wait are let go: nobody
/// could ever do that later, and they share the fate of those that are in the app already.
pub fn seal_on_panic() {
    let log = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        log(info);
        WORKERS.with(|workers| {
            for (_, worker) in workers.try_borrow().iter().flat_map(|workers| workers.iter()) {
                if let Ok(mut worker) = worker.try_borrow_mut() {
                    let waiting = worker.close_gate();
                    worker.seal();
                    drop(worker);
                    host::resume(&waiting, NO_CONTEXT);
                }
            }
        });
    }));
}
