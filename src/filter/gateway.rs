//! One request through a gateway.

use std::cell::RefCell;
use std::rc::Rc;

use inflight_stats::config::KeySource;
use inflight_stats::counting::request::{
    KUBELET_PROBE_HEADER, NETWORK_HASH_HEADER, NETWORK_PROBE_HEADER, PROXIED_VALUE, is_routing_probe,
};
use inflight_stats::gateway::key_name::KeyName;
use inflight_stats::gateway::key_totals;
use inflight_stats::protocol::report::{Report, VERSION};
use inflight_stats::{Config, KeyReport, Snapshot};
use proxy_wasm::traits::{Context, HttpContext};
use proxy_wasm::types::Action;

use crate::host::{self, Headers};
use crate::keyed_worker::Counted;
use crate::root::call;
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

    /// Counts a probe that is passed on.
    fn count_probe(&self) {
        if let Ok(mut worker) = self.gateway.worker.try_borrow_mut() {
            worker.keyless();
        }
    }

    /// Whether Knative's ingress controller asks for its routes, and the gateway is one that has them.
    fn is_routing_probe(&self, network_probe: &[u8]) -> bool {
        matches!(self.gateway.config.gateway.key, KeySource::Headers { .. })
            && is_routing_probe(network_probe, host::header(Headers::Request, NETWORK_HASH_HEADER).is_some())
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
        crate::fault_injection::of_request();
        let raw_ns = host::monotonic_ns();
        if self.counted.is_some() {
            return Action::Continue;
        }
        // Whatever the client said of itself goes: a request is a probe to the sidecar by its headers, and proxied only if
        // it is counted here. First the key, because Envoy looks for another route when a header changes.
        let kubelet_probe = host::header(Headers::Request, KUBELET_PROBE_HEADER).is_some();
        let network_probe = host::header(Headers::Request, NETWORK_PROBE_HEADER);
        let routing_probe = network_probe.as_deref().is_some_and(|value| self.is_routing_probe(value));
        let counted = if routing_probe {
            self.count_probe();
            false
        } else {
            self.count_in(raw_ns)
        };
        if kubelet_probe {
            host::remove_header(Headers::Request, KUBELET_PROBE_HEADER);
        }
        if network_probe.is_some() && !routing_probe {
            host::remove_header(Headers::Request, NETWORK_PROBE_HEADER);
        }
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

/// As for [`crate::sidecar::Stream`].
impl Drop for Passage {
    fn drop(&mut self) {
        self.count_out(|| 0);
    }
}
