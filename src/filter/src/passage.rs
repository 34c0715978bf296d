//! One request through a gateway.

use std::cell::RefCell;
use std::rc::Rc;

use inflight_stats::config::KeySource;
use inflight_stats::key_name::KeyName;
use inflight_stats::key_totals;
use inflight_stats::report::{Report, VERSION};
use inflight_stats::request::PROXIED_VALUE;
use inflight_stats::{Config, KeyReport, Snapshot};
use proxy_wasm::traits::{Context, HttpContext};
use proxy_wasm::types::Action;

use crate::host::{self, Headers};
use crate::keyed_worker::Counted;
use crate::root::call;
use crate::stream;
use crate::worker::Worker;

/// What all requests through one gateway share.
pub struct Gateway {
    pub root: u32,
    pub config: Config,
    pub token: Option<String>,
    pub worker: Rc<RefCell<Worker>>,
}

/// A stream: counted under its key while it lasts.
pub struct Passage {
    id: u32,
    gateway: Rc<Gateway>,
    counted: Option<(KeyName, u64)>,
}

impl Passage {
    pub fn new(id: u32, gateway: Rc<Gateway>) -> Self {
        Self { id, gateway, counted: None }
    }

    fn key(&self) -> Option<KeyName> {
        match &self.gateway.config.gateway.key {
            KeySource::Cluster => {
                let cluster = host::property("xds\0cluster_name")?;
                KeyName::of_cluster(
                    std::str::from_utf8(&cluster).ok()?,
                    &self.gateway.config.identity.namespace,
                )
            }
            KeySource::Headers { namespace, name } => {
                let value = |header: &str| String::from_utf8(host::header(Headers::Request, header)?).ok();
                KeyName::checked(&value(namespace)?, &value(name)?)
            }
        }
    }

    /// Counts the request; whether it is.
    fn count_in(&mut self, raw_ns: u64) -> bool {
        let key = self.key();
        let Ok(mut worker) = self.gateway.worker.try_borrow_mut() else { return false };
        let Some(key) = key else {
            worker.keyless();
            return false;
        };
        let incarnation = worker.incarnation;
        match worker.key_in(&key, raw_ns) {
            Counted::No => return false,
            Counted::Yes => {}
            Counted::First(floor) => {
                drop(worker);
                let until = Snapshot { in_flight: 1, ..floor };
                self.report_first(incarnation, key_totals::message(&key, floor, until));
            }
        }
        self.counted = Some((key, raw_ns));
        true
    }

    /// Sent and forgotten: it says that something is in flight and counts nothing, so that it does not matter whether it
    /// arrives, or when. Sent by the root context, because a call of this stream's would end with the stream.
    fn report_first(&self, incarnation: u64, message: KeyReport) {
        let Gateway { root, config, token, .. } = &*self.gateway;
        let Some(server) = &config.statserver else { return };
        let report = Report {
            version: VERSION,
            pod: config.identity.pod.clone(),
            incarnation,
            messages: vec![message],
        };
        if let Ok(bytes) = report.encode() {
            host::in_context(*root, self.id, || {
                let _ = call(server, token.as_deref(), &bytes);
            });
        }
    }

    fn count_out(&mut self, code: impl FnOnce() -> u16) {
        let Some((key, raw_ns)) = self.counted.take() else { return };
        let now_ns = host::monotonic_ns();
        if let Ok(mut worker) = self.gateway.worker.try_borrow_mut() {
            worker.key_out(&key, now_ns, code(), now_ns.saturating_sub(raw_ns));
        }
    }
}

impl Context for Passage {}

impl HttpContext for Passage {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        #[cfg(feature = "fault-injection")]
        crate::fault::of_request();
        let raw_ns = host::monotonic_ns();
        if self.counted.is_some() {
            return Action::Continue;
        }
        // Only a request that is counted here may pass for one; whatever the client said of itself goes.
        let counted = !stream::is_probe() && self.count_in(raw_ns);
        let Gateway { config, .. } = &*self.gateway;
        if counted && config.gateway.mark {
            host::set_header(Headers::Request, &config.proxied_header, PROXIED_VALUE);
        } else {
            host::remove_header(Headers::Request, &config.proxied_header);
        }
        Action::Continue
    }

    fn on_log(&mut self) {
        self.count_out(host::response_code);
    }
}

/// As for [`stream::Stream`].
impl Drop for Passage {
    fn drop(&mut self) {
        self.count_out(|| 0);
    }
}
