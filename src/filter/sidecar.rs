//! One request.

use std::cell::RefCell;
use std::rc::Rc;

use inflight_stats::breaker::rules::Line;
use inflight_stats::counting::request::{self, KUBELET_PROBE_HEADER, NETWORK_PROBE_HEADER};
use proxy_wasm::traits::{Context, HttpContext};
use proxy_wasm::types::Action;

use crate::host::{self, Headers};
use crate::local_breaker::{FULL, Pass, SharedPass, TEXT};
use crate::worker::Worker;

/// A stream: counted in when its headers reach the filter, out when it ends. A probe only passes the breaker.
pub struct Stream {
    id: u32,
    worker: Rc<RefCell<Worker>>,
    proxied_header: Rc<str>,
    counted: Option<Counted>,
    /// With the breaker off, none is needed.
    pass: Option<SharedPass>,
}

struct Counted {
    raw_ns: u64,
    proxied: bool,
}

impl Stream {
    pub fn new(id: u32, worker: Rc<RefCell<Worker>>, proxied_header: Rc<str>) -> Self {
        Self { id, worker, proxied_header, counted: None, pass: None }
    }

    /// In first, then the breaker, in the seed's order: so waiting is concurrency. A probe passes the count, and not the
    /// breaker: a header that anybody can send must not let more into the app than it can take.
    fn enter(&mut self, raw_ns: u64) -> Option<Pass> {
        let line = if is_probe() { Line::Probes } else { Line::Requests };
        // An app that passes its headers on would have its own calls counted as proxied.
        let mark = host::header(Headers::Request, &self.proxied_header);
        if mark.is_some() {
            host::remove_header(Headers::Request, &self.proxied_header);
        }
        let mut worker = self.worker.try_borrow_mut().ok()?;
        if line == Line::Requests {
            let proxied = mark.is_some_and(|value| request::is_proxied(&value));
            worker.request_in(raw_ns, proxied);
            self.counted = Some(Counted { raw_ns, proxied });
        }
        let gate = worker.gate.as_mut().filter(|gate| line == Line::Requests || !gate.lets_probes_by);
        self.pass = gate.map(|gate| gate.enter(self.id, line, raw_ns));
        self.pass.as_ref().map(|pass| pass.get())
    }

    /// The end of the stream. Nothing borrows the worker across a host call that could come back to
    /// us; should it be borrowed all the same, an uncounted request is better than a dead VM.
    fn leave(&mut self, code: impl FnOnce() -> u16) {
        let (counted, pass) = (self.counted.take(), self.pass.take());
        if counted.is_none() && pass.is_none() {
            return;
        }
        let now_ns = host::monotonic_ns();
        let Ok(mut worker) = self.worker.try_borrow_mut() else { return };
        let pass = pass.map(|pass| pass.get());
        if let Some(Counted { raw_ns, proxied }) = counted {
            let app_ns = match pass {
                None => Some(now_ns.saturating_sub(raw_ns)),
                Some(Pass::Admitted(since_ns)) => Some(now_ns.saturating_sub(since_ns)),
                Some(Pass::Waiting(_) | Pass::Refused) => None,
            };
            worker.request_out(now_ns, proxied, code(), now_ns.saturating_sub(raw_ns), app_ns);
        }
        // One that came before there was a breaker holds no permit.
        let turn = worker.gate.as_mut().zip(pass).map(|(gate, pass)| gate.leave(pass, now_ns));
        drop(worker);
        if let Some(turn) = turn {
            turn.take(self.id);
        }
    }
}

/// Whether the request at hand is a probe.
fn is_probe() -> bool {
    host::header(Headers::Request, "user-agent").is_some_and(|agent| request::is_kubelet_agent(&agent))
        || host::header(Headers::Request, KUBELET_PROBE_HEADER).is_some()
        || host::header(Headers::Request, NETWORK_PROBE_HEADER).is_some()
}

impl Context for Stream {}

impl HttpContext for Stream {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        #[cfg(feature = "fault-injection")]
        crate::fault_injection::of_request();
        // First of all, so that what is looked up here counts as part of the request.
        let raw_ns = host::monotonic_ns();
        if self.counted.is_some() || self.pass.is_some() {
            return Action::Continue;
        }
        match self.enter(raw_ns) {
            None | Some(Pass::Admitted(_)) => Action::Continue,
            Some(Pass::Waiting(_)) => Action::Pause,
            Some(Pass::Refused) => {
                host::respond(503, FULL, &[TEXT]);
                Action::Pause
            }
        }
    }

    /// Once a stream, however it ended: the only callback that comes for local replies, resets and
    /// clients that went away alike.
    fn on_log(&mut self) {
        self.leave(host::response_code);
    }
}

/// Should a host ever drop a stream without logging it, it is still no longer in flight.
impl Drop for Stream {
    fn drop(&mut self) {
        self.leave(|| 0);
    }
}
