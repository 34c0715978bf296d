//! One request.

use std::cell::RefCell;
use std::rc::Rc;

use inflight_stats::request::{self, KUBELET_PROBE_HEADER, NETWORK_PROBE_HEADER};
use proxy_wasm::traits::{Context, HttpContext};
use proxy_wasm::types::Action;

use crate::host::{self, Headers};
use crate::worker::Worker;

/// A stream: counted in when its headers reach the filter, out when it ends.
pub struct Stream {
    worker: Rc<RefCell<Worker>>,
    proxied_header: Rc<str>,
    counted: Option<Counted>,
}

struct Counted {
    raw_ns: u64,
    proxied: bool,
}

impl Stream {
    pub fn new(worker: Rc<RefCell<Worker>>, proxied_header: Rc<str>) -> Self {
        Self { worker, proxied_header, counted: None }
    }

    fn is_probe() -> bool {
        host::header(Headers::Request, "user-agent").is_some_and(|agent| request::is_kubelet_agent(&agent))
            || host::header(Headers::Request, KUBELET_PROBE_HEADER).is_some()
            || host::header(Headers::Request, NETWORK_PROBE_HEADER).is_some()
    }

    /// The end of the stream. Nothing borrows the worker across a host call that could come back to
    /// us; should it be borrowed all the same, an uncounted request is better than a dead VM.
    fn count_out(&mut self, code: impl FnOnce() -> u16) {
        if let Some(Counted { raw_ns, proxied }) = self.counted.take() {
            let now_ns = host::monotonic_ns();
            if let Ok(mut worker) = self.worker.try_borrow_mut() {
                worker.request_out(now_ns, now_ns.saturating_sub(raw_ns), proxied, code());
            }
        }
    }
}

impl Context for Stream {}

impl HttpContext for Stream {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        #[cfg(feature = "fault-injection")]
        crate::fault::of_request();
        // First of all, so that what is looked up here counts as part of the request.
        let raw_ns = host::monotonic_ns();
        if self.counted.is_none() && !Self::is_probe() {
            let proxied = host::header(Headers::Request, &self.proxied_header)
                .is_some_and(|value| request::is_proxied(&value));
            if let Ok(mut worker) = self.worker.try_borrow_mut() {
                worker.request_in(raw_ns, proxied);
                self.counted = Some(Counted { raw_ns, proxied });
            }
        }
        Action::Continue
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
