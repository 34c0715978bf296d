//! The role `gateway`: one request through a gateway.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use inflight_stats::config::KeySource;
use inflight_stats::counting::request::{
    KEY_HEADER, KUBELET_PROBE_HEADER, NETWORK_HASH_HEADER, NETWORK_PROBE_HEADER, PROXIED_VALUE,
    is_routing_probe,
};
use inflight_stats::counting::time::MonotonicNs;
use inflight_stats::gateway::key_name::KeyName;
use inflight_stats::gateway::key_totals;
use inflight_stats::hold::worker_side::Passage;
use inflight_stats::protocol::report::{Report, VERSION};
use inflight_stats::{Config, KeyReport, Snapshot};
use proxy_wasm::types::Action;

use crate::host::{HeaderMap, Host};
use crate::vm::keyed_worker::KeyedRequest;
use crate::vm::local_hold::{HoldDecision, HoldState, SharedHoldState};
use crate::vm::report_sender::send_report;
use crate::vm::worker_registry::SharedWorker;

/// The data that all requests through one gateway share.
pub struct Gateway<H: Host> {
    pub host: H,
    pub root: u32,
    pub config: Config,
    pub token: Option<String>,
    pub worker: SharedWorker<H>,
    pub keys: ClusterKeys,
}

/// How many clusters' keys are remembered. A gateway that has more forgets all of them now and then.
const MAX_CLUSTERS: usize = 10_000;

/// The keys of clusters. Reading a key out of a cluster's name costs a tenth of the request.
#[derive(Default)]
pub struct ClusterKeys(RefCell<BTreeMap<Vec<u8>, KeyName>>);

impl ClusterKeys {
    fn of(&self, cluster: &[u8], namespace: &str) -> Option<KeyName> {
        let mut keys = self.0.try_borrow_mut().ok()?;
        if let Some(key) = keys.get(cluster) {
            return Some(key.clone());
        }
        let key = KeyName::from_cluster(std::str::from_utf8(cluster).ok()?, namespace)?;
        if keys.len() >= MAX_CLUSTERS {
            keys.clear();
        }
        keys.insert(cluster.to_vec(), key.clone());
        Some(key)
    }
}

/// A stream. Its request counts under its key while the stream lasts.
pub struct GatewayStream<H: Host> {
    id: u32,
    gateway: Rc<Gateway<H>>,
    counted: Option<(KeyName, MonotonicNs)>,
    /// `None` without a hold.
    held: Option<StreamHold>,
}

/// What the hold made of a stream's request.
enum StreamHold {
    /// It was let through at once.
    Passed(Passage),
    /// It was paused.
    Paused(SharedHoldState),
}

impl<H: Host> GatewayStream<H> {
    pub fn new(id: u32, gateway: Rc<Gateway<H>>) -> Self {
        Self { id, gateway, counted: None, held: None }
    }

    /// Counts the request when its headers arrive, and lets it go on or holds it.
    pub fn on_request_headers(&mut self) -> Action {
        let host = self.gateway.host;
        let now = host.monotonic();
        if self.counted.is_some() {
            return Action::Continue;
        }
        // What the client claims about the request is removed: by these headers the sidecar would
        // take it for a probe, and it is proxied only if it is counted here. The key is read first,
        // because Envoy chooses the route anew when a header changes.
        let kubelet_probe = host.header(HeaderMap::Request, KUBELET_PROBE_HEADER).is_some();
        let network_probe = host.header(HeaderMap::Request, NETWORK_PROBE_HEADER);
        let routing_probe = network_probe.as_deref().is_some_and(|value| self.is_routing_probe(value));
        let mut cluster = None;
        if routing_probe {
            self.pass_probe();
        } else {
            cluster = self.count_in(now);
        }
        if kubelet_probe {
            host.remove_header(HeaderMap::Request, KUBELET_PROBE_HEADER);
        }
        if network_probe.is_some() && !routing_probe {
            host.remove_header(HeaderMap::Request, NETWORK_PROBE_HEADER);
        }
        self.mark();
        match cluster {
            Some(cluster) => self.hold(&cluster, now),
            None => Action::Continue,
        }
    }

    /// Holds a counted request until a pod of its cluster can take it.
    fn hold(&mut self, cluster: &[u8], now: MonotonicNs) -> Action {
        let (Some((key, _)), Ok(cluster)) = (&self.counted, std::str::from_utf8(cluster)) else {
            return Action::Continue;
        };
        let Ok(mut worker) = self.gateway.worker.try_borrow_mut() else { return Action::Continue };
        let decision = worker.hold_in(key, cluster, self.id, now);
        drop(worker);
        match decision {
            HoldDecision::Pass(passage) => {
                self.held = Some(StreamHold::Passed(passage));
                Action::Continue
            }
            HoldDecision::Unheld => Action::Continue,
            HoldDecision::Pause(state) => {
                self.held = Some(StreamHold::Paused(state));
                Action::Pause
            }
            HoldDecision::Refuse(refusal) => {
                refusal.send(self.gateway.host);
                Action::Pause
            }
        }
    }

    /// Marks a counted request with the key that it is counted under. Of any other request it
    /// removes the marks that the client may have sent.
    fn mark(&self) {
        let Gateway { host, config, .. } = &*self.gateway;
        match &self.counted {
            Some((key, _)) if config.gateway.mark => {
                host.set_header(HeaderMap::Request, &config.proxied_header, PROXIED_VALUE);
                host.set_header(HeaderMap::Request, KEY_HEADER, &key_header(key));
            }
            _ => {
                host.remove_header(HeaderMap::Request, &config.proxied_header);
                host.remove_header(HeaderMap::Request, KEY_HEADER);
            }
        }
    }

    /// Returns the request's key, and the cluster that it goes to if the hold needs to know.
    fn key(&self) -> Option<(KeyName, Option<Vec<u8>>)> {
        let Gateway { host, config, keys, .. } = &*self.gateway;
        let cluster = || host.property("xds\0cluster_name");
        let holds = config.gateway.hold.is_some();
        match &config.gateway.key {
            KeySource::Cluster => {
                let cluster = cluster()?;
                let key = keys.of(&cluster, &config.identity.namespace)?;
                Some((key, holds.then_some(cluster)))
            }
            KeySource::Headers { namespace, name } => {
                let value = |header: &str| String::from_utf8(host.header(HeaderMap::Request, header)?).ok();
                let key = KeyName::checked(&value(namespace)?, &value(name)?)?;
                Some((key, if holds { cluster() } else { None }))
            }
        }
    }

    /// Counts a probe that is passed on as a request without a key.
    fn pass_probe(&self) {
        if let Ok(mut worker) = self.gateway.worker.try_borrow_mut() {
            worker.request_without_key();
        }
    }

    /// Returns whether this is a probe by which Knative's ingress controller checks its routes, at
    /// a gateway that has such routes.
    fn is_routing_probe(&self, network_probe: &[u8]) -> bool {
        let Gateway { host, config, .. } = &*self.gateway;
        matches!(config.gateway.key, KeySource::Headers { .. })
            && is_routing_probe(network_probe, host.header(HeaderMap::Request, NETWORK_HASH_HEADER).is_some())
    }

    /// Counts the request, if it has a key for which there is capacity. Returns the cluster at which
    /// it may have to be held.
    fn count_in(&mut self, now: MonotonicNs) -> Option<Vec<u8>> {
        let key = self.key();
        let Ok(mut worker) = self.gateway.worker.try_borrow_mut() else { return None };
        let Some((key, cluster)) = key else {
            worker.request_without_key();
            return None;
        };
        let incarnation = worker.incarnation;
        match worker.key_request_in(&key, now) {
            KeyedRequest::OverKeyLimit => return None,
            KeyedRequest::Counted => {}
            KeyedRequest::First(floor) => {
                drop(worker);
                let until = Snapshot { in_flight: 1, ..floor };
                self.report_first(incarnation, key_totals::message(&key, floor, until));
            }
        }
        self.counted = Some((key, now));
        cluster
    }

    /// Sends a report without waiting for the answer. The report says that something is in flight
    /// and counts nothing, so it does not matter whether it arrives, or when. The root context
    /// sends it, because a call of this stream would end with the stream.
    fn report_first(&self, incarnation: u64, message: KeyReport) {
        let Gateway { host, root, config, token, .. } = &*self.gateway;
        let Some(server) = &config.statserver else { return };
        let report = Report {
            version: VERSION,
            pod: config.identity.pod.clone(),
            incarnation,
            messages: vec![message],
        };
        if let Ok(bytes) = report.encode() {
            host.in_context(*root, self.id, || {
                let _ = send_report(*host, server, token.as_deref(), &bytes);
            });
        }
    }

    /// Called once at the end of the stream, however it ended.
    pub fn on_log(&mut self) {
        let host = self.gateway.host;
        self.count_out(|| host.response_code());
    }

    fn count_out(&mut self, code: impl FnOnce() -> u16) {
        let Some((key, since)) = self.counted.take() else { return };
        let now = self.gateway.host.monotonic();
        let held = self.held.take();
        if let Ok(mut worker) = self.gateway.worker.try_borrow_mut() {
            let code = code();
            worker.key_request_out(&key, now, code, now.since(since));
            match held {
                None => {}
                Some(StreamHold::Passed(passage)) => worker.hold_out(&key, &passage, code, now),
                Some(StreamHold::Paused(state)) => match state.replace(HoldState::Outside) {
                    HoldState::Waiting(number) => worker.hold_abandon(&key, number, now),
                    HoldState::Passed(passage) => worker.hold_out(&key, &passage, code, now),
                    HoldState::Outside => {}
                },
            }
        }
    }
}

/// Returns the value of the header that names a key. Formatting would cost a fifth of the request.
fn key_header(key: &KeyName) -> Vec<u8> {
    let mut value = Vec::with_capacity(key.namespace.len() + 1 + key.name.len());
    value.extend_from_slice(key.namespace.as_bytes());
    value.push(b'/');
    value.extend_from_slice(key.name.as_bytes());
    value
}

/// If a host ever drops a stream without logging it, the request still stops being in flight.
impl<H: Host> Drop for GatewayStream<H> {
    fn drop(&mut self) {
        self.count_out(|| 0);
    }
}
