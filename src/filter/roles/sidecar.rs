//! The role `sidecar`: one request to the pod.

use std::rc::Rc;

use inflight_stats::Config;
use inflight_stats::breaker::rules::Queue;
use inflight_stats::counting::request::{
    KEY_HEADER, KUBELET_PROBE_HEADER, NETWORK_PROBE_HEADER, Origin, QUEUE_PROBE_VALUE, is_kubelet_agent,
};
use inflight_stats::counting::time::MonotonicNs;
use proxy_wasm::types::Action;

use crate::host::{HeaderMap, Host};
use crate::vm::local_breaker::{PermitState, QUEUE_FULL, SharedPermitState};
use crate::vm::stream_actions::ProbeReply;
use crate::vm::worker::Latency;
use crate::vm::worker_registry::SharedWorker;

/// The data that all requests to one sidecar share.
pub struct Sidecar<H: Host> {
    pub host: H,
    pub config: Config,
    pub token: Option<String>,
    /// The key that the pod reports, as a gateway names it in its mark.
    pub key: String,
    pub worker: SharedWorker<H>,
}

/// A stream. Its request counts from when the headers reach the filter until the stream ends. A
/// probe is not counted; it only goes through the breaker. A network probe that is answered here
/// does neither.
pub struct SidecarStream<H: Host> {
    id: u32,
    sidecar: Rc<Sidecar<H>>,
    counted: Option<CountedRequest>,
    /// `None` while the breaker is off.
    permit: Option<SharedPermitState>,
    /// Whether it is a network probe that was answered here, or waits for the app's answer.
    is_answered_here: bool,
}

/// What a request is by its headers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Request,
    Probe,
    /// A network probe that is answered here.
    AnsweredProbe,
}

struct CountedRequest {
    since: MonotonicNs,
    origin: Origin,
}

impl<H: Host> SidecarStream<H> {
    pub fn new(id: u32, sidecar: Rc<Sidecar<H>>) -> Self {
        Self { id, sidecar, counted: None, permit: None, is_answered_here: false }
    }

    /// Counts the request and admits it, pauses it or refuses it, when its headers arrive.
    pub fn on_request_headers(&mut self) -> Action {
        // The clock is read first, so that the time of the lookups below counts as part of the
        // request.
        let host = self.sidecar.host;
        let now = host.monotonic();
        if self.counted.is_some() || self.permit.is_some() || self.is_answered_here {
            return Action::Continue;
        }
        let queue = match self.kind() {
            Kind::Request => Queue::Requests,
            Kind::Probe => Queue::Probes,
            Kind::AnsweredProbe => {
                self.answer_probe();
                return Action::Pause;
            }
        };
        match self.enter(queue, now) {
            None | Some(PermitState::Held(_)) => Action::Continue,
            Some(PermitState::Waiting(_)) => Action::Pause,
            Some(PermitState::Refused) => {
                QUEUE_FULL.send(host);
                Action::Pause
            }
        }
    }

    /// Counts the request before it enters the breaker, as queue-proxy does, so that queued
    /// requests are part of concurrency. A probe is not counted but enters the breaker: a header
    /// that any client can send must not admit more requests than the app can take.
    fn enter(&mut self, queue: Queue, now: MonotonicNs) -> Option<PermitState> {
        let origin = self.take_mark();
        let mut worker = self.sidecar.worker.try_borrow_mut().ok()?;
        if queue == Queue::Requests {
            worker.request_in(now, origin);
            self.counted = Some(CountedRequest { since: now, origin });
        }
        let breaker = worker.breaker.as_mut();
        let breaker = breaker.filter(|breaker| queue == Queue::Requests || !breaker.probes_bypass);
        self.permit = breaker.map(|breaker| breaker.enter(self.id, queue, now));
        self.permit.as_ref().map(|permit| permit.get())
    }

    /// Returns the request's origin by the headers with which a gateway marks it, and removes these
    /// headers: an app that passes its headers on would have its own calls counted as proxied. Only
    /// of a marked request is a second header looked up.
    fn take_mark(&self) -> Origin {
        let Sidecar { host, config, key, .. } = &*self.sidecar;
        let Some(proxied) = host.header(HeaderMap::Request, &config.proxied_header) else {
            return Origin::Direct;
        };
        host.remove_header(HeaderMap::Request, &config.proxied_header);
        let counted_key = host.header(HeaderMap::Request, KEY_HEADER);
        if counted_key.is_some() {
            host.remove_header(HeaderMap::Request, KEY_HEADER);
        }
        Origin::from_headers(Some(&proxied), counted_key.as_deref(), key)
    }

    /// Returns what the request is. If network probes are answered here, the kubelet's are too: it
    /// sends them to queue-proxy with the same header. Then that header is looked up first.
    fn kind(&self) -> Kind {
        let Sidecar { host, config, .. } = &*self.sidecar;
        let header = |name| host.header(HeaderMap::Request, name);
        let answers = config.network_probe.is_some();
        let network_probe = if answers { header(NETWORK_PROBE_HEADER) } else { None };
        if network_probe.as_deref() == Some(QUEUE_PROBE_VALUE.as_bytes()) {
            return Kind::AnsweredProbe;
        }
        let is_probe = network_probe.is_some()
            || header("user-agent").is_some_and(|agent| is_kubelet_agent(&agent))
            || header(KUBELET_PROBE_HEADER).is_some()
            || (!answers && header(NETWORK_PROBE_HEADER).is_some());
        if is_probe { Kind::Probe } else { Kind::Request }
    }

    /// Makes a network probe wait for the app's answer to ours.
    fn answer_probe(&mut self) {
        let Sidecar { host, worker, .. } = &*self.sidecar;
        let worker = worker.try_borrow_mut();
        let waits =
            worker.is_ok_and(|mut worker| worker.app_probe.as_mut().is_some_and(|probe| probe.ask(self.id)));
        if !waits {
            ProbeReply::NotReady.send(*host);
        }
        self.is_answered_here = true;
    }

    /// Called once at the end of the stream, however it ended. It is the only callback that comes
    /// for local replies, resets and disconnected clients alike.
    pub fn on_log(&mut self) {
        let host = self.sidecar.host;
        self.leave(|| host.response_code());
    }

    /// Counts the end of the request and releases its permit. Nothing borrows the worker across a
    /// host call that could call back into this VM. If the worker is borrowed all the same, an
    /// uncounted request is better than a dead VM.
    fn leave(&mut self, code: impl FnOnce() -> u16) {
        if std::mem::take(&mut self.is_answered_here)
            && let Ok(mut worker) = self.sidecar.worker.try_borrow_mut()
            && let Some(probe) = &mut worker.app_probe
        {
            probe.leave(self.id);
        }
        if self.counted.is_none() && self.permit.is_none() {
            return;
        }
        let now = self.sidecar.host.monotonic();
        let permit = self.permit.take().map(|permit| permit.get());
        let Ok(mut worker) = self.sidecar.worker.try_borrow_mut() else { return };
        if let Some(CountedRequest { since, origin }) = self.counted.take() {
            let total_ns = now.since(since);
            let app_ns = match permit {
                None => Some(total_ns),
                Some(PermitState::Held(since)) => Some(now.since(since)),
                Some(PermitState::Waiting(_) | PermitState::Refused) => None,
            };
            worker.request_out(now, origin, code(), &Latency { total_ns, app_ns });
        }
        // A request that came before there was a breaker holds no permit.
        let breaker = worker.breaker.as_mut();
        let actions = breaker.zip(permit).map(|(breaker, permit)| breaker.leave(permit, now));
        let actions = actions.map(|actions| if actions.is_empty() { actions } else { worker.batch(actions) });
        drop(worker);
        if let Some(actions) = actions {
            actions.apply(self.sidecar.host, self.id);
        }
    }
}

/// If a host ever drops a stream without logging it, the request still stops being in flight.
impl<H: Host> Drop for SidecarStream<H> {
    fn drop(&mut self) {
        self.leave(|| 0);
    }
}
