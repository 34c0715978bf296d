//! The worker: what this VM has counted for one pod, and its part in the pod's figure. All root and
//! stream contexts of the VM that serve the same pod share one [`Worker`], even across a change of
//! configuration.

use inflight_stats::config::Role;
use inflight_stats::counting::clock::{Clock, longest_step_ns};
use inflight_stats::counting::request::Origin;
use inflight_stats::counting::time::{MonotonicNs, PodNs};
use inflight_stats::gateway::key_name::KeyName;
use inflight_stats::gateway::key_totals::IdleKeys;
use inflight_stats::hold::worker_side::Passage;
use inflight_stats::pod::leader::LeaderStep;
use inflight_stats::pod::member::Member;
use inflight_stats::pod::pod_state::{PodState, PodStore};
use inflight_stats::pod::store::StoreError;
use inflight_stats::{Config, Recorder, Snapshot};

use crate::host::Host;
use crate::vm::app_probe::AppProbe;
use crate::vm::config_stack::{ConfigStack, period_ns};
use crate::vm::keyed_worker::{KeyedRequest, KeyedWorker};
use crate::vm::local_breaker::LocalBreaker;
use crate::vm::local_hold::{HoldDecision, LocalHold};
use crate::vm::pod_stats::PodStats;
use crate::vm::report_sender::{EncodedReport, ReportScope, ReportSender, key_reports, pod_report};
use crate::vm::stream_actions::StreamActions;

/// How long after a boundary workers tick: one millisecond for the timer's resolution, and one to
/// spare.
const TICK_DELAY_NS: u64 = 2_000_000;

/// This VM's counters for one pod.
pub struct Worker<H> {
    host: H,
    clock: Clock,
    recorder: Recorder,
    member: Member,
    stats: PodStats,
    /// The local breaker, for the role `sidecar`.
    pub breaker: Option<LocalBreaker<H>>,
    /// The probe of the app, for the role `sidecar`.
    pub app_probe: Option<AppProbe<H>>,
    /// The local hold, for the role `gateway`.
    hold: Option<LocalHold<H>>,
    /// The counters per key, for the role `gateway`.
    keyed: Option<KeyedWorker<H>>,
    /// The incarnation of the pod's counters.
    pub incarnation: u64,
    /// The configurations. When the last one goes, this worker ends.
    configs: ConfigStack,
    reports: ReportSender<H>,
    /// What could not be done with streams in the callbacks so far.
    deferred: StreamActions,
}

/// What the root context has to do after a tick.
pub struct Tick {
    pub reports: Vec<EncodedReport>,
    pub actions: StreamActions,
    pub next_ms: u64,
    /// Whether this worker leads, for the tests that end the leader.
    #[cfg(feature = "fault-injection")]
    pub leads: bool,
}

/// The latencies of a request.
pub struct Latency {
    /// The time since its arrival.
    pub total_ns: u64,
    /// The time in the app: since the request left the breaker's queue, if it ever did.
    pub app_ns: Option<u64>,
}

impl<H: Host> Worker<H> {
    /// Returns a worker of the pod in `state`, without a configuration yet.
    pub fn new(host: H, config: &Config, pod: PodStore, state: &PodState, now: MonotonicNs) -> Self {
        let period_ns = period_ns(config);
        let mut clock = Clock::new(state.clock_offset_ns, now, longest_step_ns(period_ns));
        let now = clock.read(now);
        Self {
            host,
            clock,
            recorder: Recorder::new(now, state.grid),
            member: Member::new(pod, now, period_ns),
            stats: PodStats::define(host, config.role),
            breaker: None,
            app_probe: None,
            hold: None,
            keyed: None,
            incarnation: state.incarnation,
            configs: ConfigStack::default(),
            reports: ReportSender::new(host),
            deferred: StreamActions::default(),
        }
    }

    /// Adds a root context, for a pod in `state`. The context's configuration is in effect now.
    ///
    /// # Errors
    /// [`StoreError`]; the worker is as it was.
    pub fn join(&mut self, root: u32, config: &Config, state: &PodState) -> Result<(), StoreError> {
        self.recorder.set_grid(state.grid);
        self.configure(config)?;
        self.configs.join(root, config);
        self.follow_shortest_period();
        Ok(())
    }

    /// Applies a configuration. If the configuration has no breaker any more, the breaker lets
    /// everything through, including the waiting requests.
    fn configure(&mut self, config: &Config) -> Result<(), StoreError> {
        if config.role == Role::Gateway {
            let grid = self.recorder.grid();
            match &mut self.keyed {
                Some(keyed) => keyed.configure(config, grid),
                None => {
                    let worker = self.member.id(&self.host)?;
                    let now = PodNs(self.recorder.current().as_of_ns);
                    let pod = self.member.pod();
                    let state = pod.state(&self.host)?;
                    self.keyed = Some(KeyedWorker::new(self.host, config, pod, &state, worker, now));
                }
            }
            return self.configure_hold(config);
        }
        match &mut self.breaker {
            Some(breaker) => breaker.configure(config),
            None if config.limits.is_some() => {
                let worker = self.member.id(&self.host)?;
                self.breaker = LocalBreaker::new(self.host, config, self.member.pod(), worker);
            }
            None => {}
        }
        match (&mut self.app_probe, &config.network_probe) {
            (Some(probe), network_probe) => probe.configure(network_probe.as_ref()),
            (None, Some(network_probe)) => {
                let worker = self.member.id(&self.host)?;
                let mailbox = self.member.pod().key(&format!("app-probe/{worker}"));
                self.app_probe = Some(AppProbe::new(self.host, network_probe.clone(), mailbox));
            }
            (None, None) => {}
        }
        Ok(())
    }

    /// Applies the hold's settings. A configuration without a hold changes nothing: its streams do
    /// not use the hold, and the requests that are held already keep what they were promised.
    fn configure_hold(&mut self, config: &Config) -> Result<(), StoreError> {
        match (&mut self.hold, &config.gateway.hold) {
            (Some(hold), Some(settings)) => hold.configure(settings.clone()),
            (None, Some(settings)) => {
                let worker = self.member.id(&self.host)?;
                let pod = self.member.pod();
                self.hold = Some(LocalHold::new(self.host, settings.clone(), pod, worker, self.incarnation));
            }
            // The root context that registered the mailbox may be gone.
            (Some(hold), None) => hold.register(),
            (None, None) => {}
        }
        Ok(())
    }

    fn follow_shortest_period(&mut self) {
        if let Some(period_ns) = self.configs.shortest_period_ns() {
            self.member.set_period_ns(period_ns);
            self.clock.set_longest_step_ns(longest_step_ns(period_ns));
        }
    }

    /// Returns the pod's time.
    fn pod_time(&mut self, now: MonotonicNs) -> PodNs {
        if self.clock.cuts(now) {
            self.catch_up();
        }
        self.clock.read(now)
    }

    /// Catches up after a silence of which the clock would count only a part. The time that the
    /// other workers have lived through meanwhile counts in full, because only this worker was
    /// stalled.
    #[cold]
    fn catch_up(&mut self) {
        if let Ok(state) = self.member.pod().state(&self.host) {
            self.clock.catch_up(state.led_until(), state.clock_offset_ns);
        }
    }

    /// Counts a request that came to the sidecar.
    pub fn request_in(&mut self, now: MonotonicNs, origin: Origin) {
        let now = self.pod_time(now);
        self.recorder.request_in(now, origin);
    }

    /// Counts the end of a request that came to the sidecar.
    pub fn request_out(&mut self, now: MonotonicNs, origin: Origin, code: u16, latency: &Latency) {
        let now = self.pod_time(now);
        self.recorder.request_out(now, origin);
        self.stats.request_done(self.host, code, latency.total_ns, latency.app_ns);
    }

    /// Counts a request that came to the gateway without a key.
    pub fn request_without_key(&mut self) {
        if let Some(keyed) = &mut self.keyed {
            keyed.without_key();
        }
    }

    /// Counts a request of a key that came to the gateway. The recorder has the gateway's total, by
    /// which the leader is chosen.
    pub fn key_request_in(&mut self, key: &KeyName, now: MonotonicNs) -> KeyedRequest {
        let now = self.pod_time(now);
        let Some(keyed) = &mut self.keyed else { return KeyedRequest::OverKeyLimit };
        let request = keyed.request_in(key, now);
        if !matches!(request, KeyedRequest::OverKeyLimit) {
            self.recorder.request_in(now, Origin::Direct);
        }
        request
    }

    /// Counts the end of a request that was counted at the gateway.
    pub fn key_request_out(&mut self, key: &KeyName, now: MonotonicNs, code: u16, latency_ns: u64) {
        let now = self.pod_time(now);
        self.recorder.request_out(now, Origin::Direct);
        if let Some(keyed) = &mut self.keyed {
            keyed.request_out(key, now, code, latency_ns);
        }
    }

    /// Lets a request that was counted at the gateway through, holds it, or turns it away.
    pub fn hold_in(&mut self, key: &KeyName, cluster: &str, stream: u32, now: MonotonicNs) -> HoldDecision {
        let Some(hold) = &mut self.hold else { return HoldDecision::Unheld };
        let decision = hold.arrive(key, cluster, stream, now);
        self.show_hold();
        decision
    }

    /// Ends a request that the hold let through.
    pub fn hold_out(&mut self, key: &KeyName, passage: &Passage, code: u16, now: MonotonicNs) {
        if let Some(hold) = &mut self.hold {
            hold.leave(key, passage, code, now);
            self.show_hold();
        }
    }

    /// Ends a request that is still held.
    pub fn hold_abandon(&mut self, key: &KeyName, number: u64, now: MonotonicNs) {
        if let Some(hold) = &mut self.hold {
            hold.abandon(key, number, now);
            self.show_hold();
        }
    }

    /// Returns what of these actions, after earlier ones, is to be done in this callback. The rest
    /// follows in a millisecond.
    pub fn batch(&mut self, actions: StreamActions) -> StreamActions {
        self.deferred.extend(actions);
        let batch = self.deferred.take_batch();
        if !self.deferred.is_empty() {
            self.host.tick_in(1);
            self.ticks_at(self.host.monotonic().plus(1_000_000));
        }
        batch
    }

    /// Notes when the next tick is due.
    fn ticks_at(&mut self, due: MonotonicNs) {
        if let Some(breaker) = &mut self.breaker {
            breaker.timer.is_due_at(due);
        }
        if let Some(hold) = &mut self.hold {
            hold.timer.is_due_at(due);
        }
    }

    /// Reads the messages that have come from other workers.
    pub fn on_messages(&mut self) -> StreamActions {
        let now = self.host.monotonic();
        let mut actions = self.breaker.as_mut().map(|breaker| breaker.read_mailbox(now)).unwrap_or_default();
        if let Some(hold) = &mut self.hold {
            actions.extend(hold.read_mailbox(now));
            self.show_hold();
        }
        if let Some(probe) = &mut self.app_probe {
            actions.extend(probe.read_mailbox(now));
        }
        self.batch(actions)
    }

    fn show_hold(&mut self) {
        if let (Some(hold), Some(keyed)) = (&mut self.hold, &mut self.keyed)
            && hold.has_news()
        {
            keyed.hold_news(&hold.take_news());
        }
    }

    /// Posts this worker's snapshots, and leads the pod if this worker holds the lease or may take
    /// it.
    pub fn tick(&mut self, config: &Config) -> Tick {
        let reading = self.host.monotonic();
        let now = self.advance();
        let mut actions = self.breaker.as_mut().map(|breaker| breaker.tick(reading)).unwrap_or_default();
        let step = self.step(now).unwrap_or_else(|error| {
            log::warn!(
                "inflight: could not publish this period's figures, retrying at the next tick: {error}"
            );
            LeaderStep::Follow
        });
        let (mut reports, mut leads) = (Vec::new(), false);
        match step {
            LeaderStep::Published { previous, latest, since, incarnation } => {
                let departed = self.departed();
                let fully_collected;
                (reports, fully_collected) = if self.keyed.is_some() {
                    self.lead_keys(config, incarnation, latest, departed, now)
                } else {
                    (self.lead_pod(config, incarnation, [previous, since, latest], now), departed)
                };
                actions.resume.extend(self.clear_up(fully_collected, reading));
                leads = true;
            }
            LeaderStep::Follow => {
                if let Some(keyed) = &mut self.keyed {
                    keyed.follow();
                }
            }
            LeaderStep::Wait | LeaderStep::UpToDate => {}
        }
        if let Some(hold) = &mut self.hold {
            actions.extend(hold.tick(leads, reading));
            self.show_hold();
        }
        if let Some(probe) = &mut self.app_probe {
            // In case a message or an answer was lost.
            actions.extend(probe.probe(reading));
        }
        let next_ms = self.next_tick_ms(step, reading, now);
        self.deferred.extend(actions);
        let actions = self.deferred.take_batch();
        let next_ms = if self.deferred.is_empty() { next_ms } else { 1 };
        self.ticks_at(reading.plus(next_ms.saturating_mul(1_000_000)));
        Tick {
            reports,
            actions,
            next_ms,
            #[cfg(feature = "fault-injection")]
            leads: step != LeaderStep::Follow,
        }
    }

    /// At the leader of a pod: sets the gauges, and returns the reports to send.
    fn lead_pod(
        &mut self,
        config: &Config,
        incarnation: u64,
        [previous, since, latest]: [Snapshot; 3],
        now: PodNs,
    ) -> Vec<EncodedReport> {
        if let Some(period) = latest.since(&previous) {
            self.stats.publish(self.host, &period, &latest);
        }
        if let Some(breaker) = &self.breaker {
            self.stats.set_queue_depth(self.host, breaker.depth());
        }
        if !self.reports.may_send(config, now) {
            return Vec::new();
        }
        pod_report(config, incarnation, since, latest).into_iter().collect()
    }

    /// At the leader of a gateway: returns the reports to send, and the departed workers that have
    /// nothing left to collect.
    fn lead_keys(
        &mut self,
        config: &Config,
        incarnation: u64,
        latest: Snapshot,
        departed: Vec<u64>,
        now: PodNs,
    ) -> (Vec<EncodedReport>, Vec<u64>) {
        let (may_send, max_keys) = (self.reports.may_send(config, now), self.reports.max_keys());
        let state = self.member.pod().state(&self.host);
        let workers: Vec<u64> = state.map(|state| state.workers().collect()).unwrap_or_default();
        let Some(keyed) = &mut self.keyed else { return (Vec::new(), departed) };
        let Some((totals, fully_collected)) = keyed.lead(&workers, &departed, latest.as_of_ns) else {
            return (Vec::new(), Vec::new());
        };
        if config.statserver.is_none() {
            // Without a stats server, nobody else has to know these totals: the stats show
            // everything.
            let known: Vec<_> = totals.keys().map(|(key, total)| (key.clone(), total.until)).collect();
            keyed.acknowledged(known);
            return (Vec::new(), fully_collected);
        }
        if !may_send {
            return (Vec::new(), fully_collected);
        }
        let Some((idle, totals)) = keyed.figures() else { return (Vec::new(), fully_collected) };
        (key_reports(config, incarnation, totals, &idle, max_keys), fully_collected)
    }

    fn next_tick_ms(&self, step: LeaderStep, reading: MonotonicNs, now: PodNs) -> u64 {
        let grid = self.recorder.grid();
        let boundary_ns = grid.after(now.0).saturating_add(TICK_DELAY_NS);
        let wait_ns = boundary_ns.saturating_sub(now.0);
        let wait_ns = match step {
            // Another worker is about to close this boundary, or is dead. Look again soon.
            LeaderStep::Wait => wait_ns.min((grid.period_ns / 20).clamp(5_000_000, 50_000_000)),
            _ => wait_ns,
        };
        let breaker = self.breaker.as_ref().and_then(|breaker| breaker.next_wake_ns(reading));
        let hold = self.hold.as_ref().and_then(|hold| hold.next_wake_ns(reading));
        let wake_ns = breaker.into_iter().chain(hold).fold(wait_ns, u64::min);
        wake_ns.div_ceil(1_000_000)
    }

    fn advance(&mut self) -> PodNs {
        let now = self.pod_time(self.host.monotonic());
        self.recorder.advance(now);
        self.stats.flush(self.host, self.recorder.current());
        self.stats.show_memory(self.host, self.host.memory_bytes());
        now
    }

    fn step(&mut self, now: PodNs) -> Result<LeaderStep, StoreError> {
        let state = self.member.pod().state(&self.host)?;
        self.recorder.set_grid(state.grid);
        if let Some(keyed) = &mut self.keyed {
            // Before the pod's snapshots, so that a worker that finds those also finds these.
            keyed.set_grid(state.grid);
            keyed.post(now);
        }
        if self.member.post(&self.host, &self.recorder)? {
            log::warn!(
                "inflight: this worker stalled for more than 2.5 periods, was declared dead and has rejoined"
            );
            self.clock.advance_to(state.clock_offset_ns);
        }
        self.member.lead(&self.host, now, self.clock.offset_ns())
    }

    fn departed(&self) -> Vec<u64> {
        self.member.pod().state(&self.host).map(|state| state.departed).unwrap_or_default()
    }

    /// At the leader: releases the permits of departed workers, once they have been gone for long
    /// enough. Returns the streams of this worker that get these permits.
    fn clear_up(&mut self, departed: Vec<u64>, now: MonotonicNs) -> Vec<u32> {
        let mut resume = Vec::new();
        let mut done = Vec::new();
        for worker in departed {
            let actions = match &mut self.breaker {
                Some(breaker) => breaker.forget_if_silent(worker, now),
                None => Some(StreamActions::default()),
            };
            if let Some(actions) = actions {
                if let Some(hold) = &self.hold {
                    hold.forget(worker);
                }
                resume.extend(actions.resume);
                done.push(worker);
            }
        }
        if !done.is_empty() {
            // If this fails, the next tick repeats it, which changes nothing.
            let _ = self.member.pod().forget_departed(&self.host, &done);
        }
        resume
    }

    /// Notes a report that is on its way.
    pub fn on_dispatched(&mut self, call: u32, report: EncodedReport, config: &Config) {
        let now = PodNs(self.recorder.current().as_of_ns);
        self.reports.on_dispatched(call, report, config, now);
    }

    /// Notes that a report could not be sent.
    pub fn on_dispatch_error(&mut self, reason: &str) {
        self.reports.on_dispatch_error(reason);
    }

    /// Handles the answer to a call: to a probe of the hold, the app's to its probe, or the stats
    /// server's to a report.
    /// Returns what is to be done with streams.
    pub fn on_response(&mut self, call: u32, status: u16, body: impl FnOnce() -> String) -> StreamActions {
        let now = self.host.monotonic();
        if let Some(actions) = self.hold.as_mut().and_then(|hold| hold.on_response(call, status, now)) {
            self.show_hold();
            return self.batch(actions);
        }
        if let Some(actions) = self.app_probe.as_mut().and_then(|probe| probe.on_response(call, status)) {
            return self.batch(actions);
        }
        self.on_report_answer(call, status, body);
        StreamActions::default()
    }

    fn on_report_answer(&mut self, call: u32, status: u16, body: impl FnOnce() -> String) {
        match self.reports.on_response(call, status, body) {
            Some(ReportScope::Keys(known)) => {
                if let Some(keyed) = &mut self.keyed {
                    keyed.acknowledged(known);
                }
            }
            Some(ReportScope::Pod(incarnation, until)) => {
                let pod = self.member.pod();
                if let Err(error) = pod.acknowledge(&self.host, incarnation, &until) {
                    log::warn!(
                        "inflight: could not store an acknowledgement, so the report goes out again: {error}"
                    );
                }
            }
            None => {}
        }
    }

    /// Ends a root context. When the last one ends, everything counted here goes into the pod's
    /// figure, and a last report is made, whether this worker led or not: no worker knows which one
    /// is the last of all.
    pub fn root_done(&mut self, root: u32, config: &Config) -> Vec<EncodedReport> {
        if let Some((newest, config)) = self.configs.leave(root) {
            // In the context of the root that stays: the breaker's messages must not go to the root
            // that ends.
            self.host.in_context(newest, root, || {
                if let Err(error) = self.configure(&config) {
                    log::warn!("inflight: could not return to the configuration before: {error}");
                }
            });
        }
        if !self.configs.is_empty() {
            self.follow_shortest_period();
            return Vec::new();
        }
        let _ = self.close_queues();
        let Some(now) = self.seal() else { return Vec::new() };
        let Ok((until, state)) = self.member.last_figure(&self.host, now) else { return Vec::new() };
        let max_keys = self.reports.max_keys();
        if let Some(keyed) = &mut self.keyed {
            // The leader may have removed this worker just now, and may end, too, before it
            // collects.
            let all: Vec<u64> = state.workers().chain(state.departed.iter().copied()).collect();
            let totals = keyed.collect_last(&all, until.as_of_ns);
            return totals
                .map(|totals| key_reports(config, state.incarnation, totals, &IdleKeys::default(), max_keys))
                .unwrap_or_default();
        }
        pod_report(config, state.incarnation, state.reported_since(), until).into_iter().collect()
    }

    /// Releases this worker's permits to the other workers at once. Returns its streams that wait,
    /// in the breaker's queue, in the hold or for the app's answer to its probe.
    pub fn close_queues(&mut self) -> Vec<u32> {
        let mut waiting = self.breaker.as_mut().map(LocalBreaker::close).unwrap_or_default();
        if let Some(hold) = &mut self.hold {
            waiting.extend(hold.close(self.host.monotonic()));
            self.show_hold();
        }
        waiting.extend(self.app_probe.iter_mut().flat_map(AppProbe::close));
        // Nobody would do later what was to be done in another callback.
        waiting.extend(std::mem::take(&mut self.deferred).streams());
        waiting
    }

    /// Leaves everything counted up to now to the other workers. Returns the instant.
    pub fn seal(&mut self) -> Option<PodNs> {
        let now = self.advance();
        self.stats.show_memory(self.host, 0);
        if let Some(keyed) = &mut self.keyed {
            keyed.end(now);
        }
        self.member.seal(&self.host, &self.recorder).ok().map(|()| now)
    }
}
