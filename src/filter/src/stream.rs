//! One request.

use std::cell::RefCell;
use std::rc::Rc;

use inflight_stats::request::{self, KUBELET_PROBE_HEADER, NETWORK_PROBE_HEADER};
use proxy_wasm::traits::{Context, HttpContext};
use proxy_wasm::types::Action;

use crate::gate::{FULL, Pass, SharedPass};
use crate::host::{self, Headers};
use crate::worker::Worker;

/// A stream: counted in when its headers reach the filter, out when it ends.
pub struct Stream {
    id: u32,
    worker: Rc<RefCell<Worker>>,
    proxied_header: Rc<str>,
    counted: Option<Counted>,
}

struct Counted {
    raw_ns: u64,
    proxied: bool,
    /// With the breaker off, none is needed.
    pass: Option<SharedPass>,
}

impl Stream {
    pub fn new(id: u32, worker: Rc<RefCell<Worker>>, proxied_header: Rc<str>) -> Self {
        Self { id, worker, proxied_header, counted: None }
    }

    /// In first, then the breaker, in the seed's order: so waiting is concurrency.
    fn count_in(&mut self, raw_ns: u64) -> Option<Pass> {
        let proxied =
            host::header(Headers::Request, &self.proxied_header).is_some_and(|v| request::is_proxied(&v));
        let mut worker = self.worker.try_borrow_mut().ok()?;
        worker.request_in(raw_ns, proxied);
        let pass = worker.gate.as_mut().map(|gate| gate.enter(self.id, raw_ns));
        let now = pass.as_ref().map(|pass| pass.get());
        self.counted = Some(Counted { raw_ns, proxied, pass });
        now
    }

    /// The end of the stream. Nothing borrows the worker across a host call that could come back to
    /// us; should it be borrowed all the same, an uncounted request is better than a dead VM.
    fn count_out(&mut self, code: impl FnOnce() -> u16) {
        let Some(Counted { raw_ns, proxied, pass }) = self.counted.take() else { return };
        let now_ns = host::monotonic_ns();
        let Ok(mut worker) = self.worker.try_borrow_mut() else { return };
        let pass = pass.map(|pass| pass.get());
        let app_ns = match pass {
            None => Some(now_ns.saturating_sub(raw_ns)),
            Some(Pass::Admitted(since_ns)) => Some(now_ns.saturating_sub(since_ns)),
            Some(Pass::Waiting(_) | Pass::Refused) => None,
        };
        worker.request_out(now_ns, proxied, code(), now_ns.saturating_sub(raw_ns), app_ns);
        // One that came before there was a breaker holds no slot.
        let turn = worker.gate.as_mut().zip(pass).map(|(gate, pass)| gate.leave(pass, now_ns));
        drop(worker);
        if let Some(turn) = turn {
            turn.take(self.id);
        }
    }
}

/// Whether the request at hand is a probe.
pub fn is_probe() -> bool {
    host::header(Headers::Request, "user-agent").is_some_and(|agent| request::is_kubelet_agent(&agent))
        || host::header(Headers::Request, KUBELET_PROBE_HEADER).is_some()
        || host::header(Headers::Request, NETWORK_PROBE_HEADER).is_some()
}

impl Context for Stream {}

impl HttpContext for Stream {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        #[cfg(feature = "fault-injection")]
        crate::fault::of_request();
        // First of all, so that what is looked up here counts as part of the request.
        let raw_ns = host::monotonic_ns();
        if self.counted.is_some() || is_probe() {
            return Action::Continue;
        }
        match self.count_in(raw_ns) {
            None | Some(Pass::Admitted(_)) => Action::Continue,
            Some(Pass::Waiting(_)) => Action::Pause,
            Some(Pass::Refused) => {
                host::respond(503, FULL, &[]);
                Action::Pause
            }
        }
    }

    /// Once a stream, however it ended: the only callback that comes for local replies, resets and
    /// clients that went away alike.
    fn on_log(&mut self) {
        self.count_out(host::response_code);
    }
}

/// Should a host ever drop a stream without logging it, it is still no longer in flight.
impl Drop for Stream {
    fn drop(&mut self) {
        self.count_out(|| 0);
    }
}
