//! The simulated host: it answers as Envoy would.

use std::collections::BTreeMap;

use inflight_stats::counting::time::MonotonicNs;
use inflight_stats::pod::store::{Expect, Store};

use super::network::{CallRequest, Pods};
use super::world::World;
use crate::host::{CallError, HeaderMap, Host, HttpCall, LocalReply, Mailbox, MetricKind};

/// The host as one VM sees it.
#[derive(Clone, Copy)]
pub struct SimulatedHost {
    pub vm: usize,
    pub world: &'static World,
}

/// The host's knowledge of one VM.
#[derive(Default)]
pub struct HostSide {
    /// The context in effect.
    pub effective: u32,
    pub roots: BTreeMap<u32, RootSide>,
    pub streams: BTreeMap<u32, StreamSide>,
    /// The status of the answer to a call, while the callback runs.
    pub call_status: u16,
}

#[derive(Default)]
pub struct RootSide {
    pub configuration: String,
    pub due_ns: u64,
    pub period_ns: u64,
    /// Whether it asked for more time at its end, and needs no more.
    pub is_done: bool,
}

#[derive(Default)]
pub struct StreamSide {
    pub root: u32,
    pub headers: BTreeMap<String, Vec<u8>>,
    pub cluster: String,
    pub code: Option<u16>,
    /// Envoy's response flags.
    pub flags: u64,
    pub is_in_app: bool,
    pub body: Option<Vec<u8>>,
}

/// Returns the `:authority` of all requests to a cluster.
fn authority_of(cluster: &str) -> String {
    format!("{cluster}.example")
}

impl SimulatedHost {
    fn side<R>(self, look: impl FnOnce(&mut HostSide) -> R) -> R {
        look(&mut self.world.hosts[self.vm].borrow_mut())
    }

    fn stream<R>(self, look: impl FnOnce(&mut StreamSide) -> R) -> Option<R> {
        self.side(|side| side.streams.get_mut(&side.effective).map(look))
    }
}

impl Store for SimulatedHost {
    fn get(&self, key: &str) -> Option<(Vec<u8>, u32)> {
        self.world.between();
        self.world.map.get(key)
    }

    fn set(&self, key: &str, value: &[u8], expect: Expect) -> bool {
        self.world.between();
        self.world.map.set(key, value, expect)
    }
}

impl Host for SimulatedHost {
    fn monotonic(self) -> MonotonicNs {
        MonotonicNs(self.world.now_ns.get())
    }

    fn wall_ns(self) -> u64 {
        self.world.now_ns.get() + World::WALL_OFFSET_NS
    }

    fn tick_in(self, milliseconds: u64) {
        let period_ns = milliseconds.max(1) * 1_000_000;
        let due_ns = self.world.now_ns.get() + period_ns;
        self.side(|side| {
            // A stream's callback sets the timer of its root context.
            let root = side.streams.get(&side.effective).map_or(side.effective, |stream| stream.root);
            let root = side.roots.get_mut(&root).unwrap();
            (root.due_ns, root.period_ns) = (due_ns, period_ns);
        });
    }

    fn plugin_configuration(self) -> Vec<u8> {
        self.side(|side| side.roots[&side.effective].configuration.clone().into_bytes())
    }

    fn environment(self, name: &str) -> Option<String> {
        (name == "TOKEN").then(|| "secret".into())
    }

    fn set_effective_context(self, context: u32) -> bool {
        self.side(|side| {
            let exists = side.roots.contains_key(&context) || side.streams.contains_key(&context);
            if exists {
                side.effective = context;
            }
            exists
        })
    }

    fn complete_done(self) {
        self.side(|side| side.roots.get_mut(&side.effective).unwrap().is_done = true);
    }

    fn header(self, map: HeaderMap, name: &str) -> Option<Vec<u8>> {
        match map {
            HeaderMap::Request if name == ":authority" => {
                self.stream(|stream| authority_of(&stream.cluster).into_bytes())
            }
            HeaderMap::Request => self.stream(|stream| stream.headers.get(name).cloned())?,
            HeaderMap::Response => {
                assert_eq!(name, ":status");
                self.stream(|stream| stream.code.map(|code| code.to_string().into_bytes()))?
            }
            HeaderMap::CallResponse => {
                assert_eq!(name, ":status");
                Some(self.side(|side| side.call_status.to_string().into_bytes()))
            }
        }
    }

    fn set_header(self, map: HeaderMap, name: &str, value: &[u8]) {
        assert_eq!(map, HeaderMap::Request);
        self.stream(|stream| stream.headers.insert(name.into(), value.into()));
    }

    fn remove_header(self, map: HeaderMap, name: &str) {
        assert_eq!(map, HeaderMap::Request);
        self.stream(|stream| stream.headers.remove(name));
    }

    fn property(self, path: &str) -> Option<Vec<u8>> {
        match path {
            "xds\0cluster_name" => self.stream(|stream| stream.cluster.clone().into_bytes()),
            "response\0flags" => self.stream(|stream| stream.flags.to_le_bytes().to_vec()),
            _ => None,
        }
    }

    fn continue_request(self) {
        self.world.go_on(self.vm);
    }

    fn respond(self, reply: &LocalReply) {
        let code = u16::try_from(reply.status).unwrap();
        let has = |header: &str| reply.headers.iter().any(|(name, _)| *name == header);
        assert!(!reply.details.is_empty() && has("content-type"));
        assert_eq!(has("retry-after"), reply.details.starts_with("inflight_hold_"));
        self.stream(|stream| (stream.code, stream.body) = (Some(code), Some(reply.body.into())));
    }

    fn http_call(self, call: HttpCall) -> Result<u32, CallError> {
        let root = self.side(|side| side.effective);
        // The answer must come to a context that outlives the request.
        assert!(self.side(|side| side.roots.contains_key(&root)));
        if call.headers.contains(&(":path", "/v1/reports")) {
            assert_eq!((call.cluster, call.timeout.as_millis()), ("stats", 100));
            if self.world.network_fails() {
                let errors = [CallError::NoHost, CallError::UnknownCluster];
                return Err(errors[self.world.roll(2) as usize]);
            }
            return Ok(self.world.send(self.vm, root, CallRequest::Report(call.body.into())));
        }
        if call.cluster == "app" {
            assert!(call.headers.contains(&(":path", "/ready")) && call.timeout.as_millis() <= 1000);
            if self.world.network_fails() {
                let errors = [CallError::NoHost, CallError::UnknownCluster];
                return Err(errors[self.world.roll(2) as usize]);
            }
            return Ok(self.world.send(self.vm, root, CallRequest::AppProbe));
        }
        let expected = [
            (":method", "GET"),
            (":path", "/"),
            (":authority", &authority_of(call.cluster)),
            ("user-agent", "inflight-probe/1"),
            ("k-network-probe", "queue"),
        ];
        assert_eq!((call.headers.as_slice(), call.timeout.as_millis()), (expected.as_slice(), 300));
        match self.world.clusters.pods(call.cluster) {
            Pods::Unknown => Err(CallError::UnknownCluster),
            Pods::Gone => Err(CallError::NoHost),
            Pods::Serving | Pods::Refusing => {
                Ok(self.world.send(self.vm, root, CallRequest::Probe(call.cluster.into())))
            }
        }
    }

    fn call_response_body(self, _: usize) -> Vec<u8> {
        b"try\nagain".into()
    }

    fn mailbox(self, name: &str) -> Mailbox {
        let root = self.side(|side| side.effective);
        Mailbox(self.world.mailboxes.register(name, self.vm, root))
    }

    fn send_message(self, mailbox: Mailbox, message: &[u8]) -> bool {
        self.world.post(mailbox.0, message)
    }

    fn next_message(self, mailbox: Mailbox) -> Option<Vec<u8>> {
        self.world.mailboxes.next(mailbox.0)
    }

    fn define_metric(self, kind: MetricKind, name: &str) -> Option<u32> {
        Some(self.world.define_metric(kind, name))
    }

    fn record_metric(self, metric: u32, value: u64) {
        self.world.change_metric(metric, |kind, old| match kind {
            MetricKind::Gauge => i64::try_from(value).unwrap(),
            MetricKind::Histogram => old + 1,
            MetricKind::Counter => panic!("a counter is not set"),
        });
    }

    fn increment_metric(self, metric: u32, by: i64) {
        self.world.change_metric(metric, |kind, old| {
            assert!(kind == MetricKind::Gauge || (kind == MetricKind::Counter && by > 0));
            old + by
        });
    }

    fn memory_bytes(self) -> u64 {
        65_536
    }
}
