//! The probe of the app: what network probes at a sidecar are answered by. A worker has at most one
//! on its way, and all who ask meanwhile get its answer, as at Knative's queue-proxy
//! (knative/serving, `pkg/queue/readiness/probe.go`). So nobody can put more than one request per
//! worker into the app this way, past the breaker.

use std::time::Duration;

use inflight_stats::config::NetworkProbeConfig;
use inflight_stats::counting::time::MonotonicNs;

use crate::host::{CallError, Host, HttpCall, Mailbox};
use crate::vm::probe::{PROBE_AGENT, is_answer};
use crate::vm::stream_actions::{ProbeReply, StreamActions};

/// How long the app may take. Kubernetes' probes have the same default.
const TIMEOUT: Duration = Duration::from_secs(1);

/// After this time nothing is expected of a call any more: Envoy answers all calls within their
/// timeout, but to a root context that is gone.
const OVERDUE_NS: u64 = 2_000_000_000;

/// The probe of the app, and the streams that wait for its answer.
///
/// A stream's own call would end with the stream, and so an app that takes longer to answer than
/// those who ask wait would never be found ready. The call is the root context's, which can make it
/// in a callback of its own alone: the SDK passes an answer to the context that was called last. So
/// the first stream that asks posts a message, and the call is made when the message arrives.
pub struct AppProbe<H> {
    host: H,
    config: NetworkProbeConfig,
    mailbox_name: String,
    mailbox: Mailbox,
    /// The streams that wait.
    waiting: Vec<u32>,
    /// The call that is on its way: the host's number of it, and since when.
    call: Option<(u32, MonotonicNs)>,
    /// Whether the log says that there is no such cluster.
    is_logged: bool,
}

impl<H: Host> AppProbe<H> {
    /// Returns the probe of a worker, whose mailbox has a name that no other has.
    pub fn new(host: H, config: NetworkProbeConfig, mailbox_name: String) -> Self {
        let mailbox = host.mailbox(&mailbox_name);
        Self { host, config, mailbox_name, mailbox, waiting: Vec::new(), call: None, is_logged: false }
    }

    /// Applies another configuration; without one, the streams that wait keep the one before. The
    /// mailbox is registered anew, because the host calls the root context that registered it last.
    /// That root context also makes a call of its own: the one that made the last may be gone.
    pub fn configure(&mut self, config: Option<&NetworkProbeConfig>) {
        if let Some(config) = config.filter(|config| **config != self.config) {
            self.config = config.clone();
            self.is_logged = false;
        }
        self.mailbox = self.host.mailbox(&self.mailbox_name);
        self.call = None;
        if !self.waiting.is_empty() {
            self.host.send_message(self.mailbox, &[]);
        }
    }

    /// Makes a stream wait for the app's answer. Returns `false` if nobody would answer it.
    pub fn ask(&mut self, stream: u32) -> bool {
        // If others wait already, the message is posted or the call is on its way.
        if self.waiting.is_empty() && self.call.is_none() && !self.host.send_message(self.mailbox, &[]) {
            return false;
        }
        self.waiting.push(stream);
        true
    }

    /// Forgets a stream that has ended.
    pub fn leave(&mut self, stream: u32) {
        self.waiting.retain(|waiting| *waiting != stream);
    }

    /// Reads the messages that have come. Called in a root context, which gets the app's answer.
    pub fn read_mailbox(&mut self, now: MonotonicNs) -> StreamActions {
        while self.host.next_message(self.mailbox).is_some() {}
        self.probe(now)
    }

    /// Probes the app if somebody waits for it. Called in a root context.
    pub fn probe(&mut self, now: MonotonicNs) -> StreamActions {
        let on_its_way = self.call.is_some_and(|(_, since)| now.since(since) < OVERDUE_NS);
        if self.waiting.is_empty() || on_its_way {
            return StreamActions::default();
        }
        let cluster = self.config.app_cluster.as_str();
        let headers = vec![
            (":method", "GET"),
            (":path", self.config.path.as_str()),
            // Not the cluster's name: some servers refuse one that cannot be a host's.
            (":authority", "localhost"),
            ("user-agent", PROBE_AGENT),
        ];
        match self.host.http_call(HttpCall { cluster, headers, body: &[], timeout: TIMEOUT }) {
            Ok(call) => {
                self.call = Some((call, now));
                return StreamActions::default();
            }
            Err(CallError::UnknownCluster) if !self.is_logged => {
                self.is_logged = true;
                log::warn!(
                    "inflight: cannot probe the app, and answer network probes with 503: Envoy has no \
                     cluster \"{cluster}\" (`app_cluster`)"
                );
            }
            Err(CallError::UnknownCluster | CallError::NoHost) => {}
        }
        self.reply(ProbeReply::NotReady)
    }

    /// Handles the answer to a call, if the call was the probe.
    pub fn on_response(&mut self, call: u32, status: u16) -> Option<StreamActions> {
        self.call.filter(|(number, _)| *number == call)?;
        self.call = None;
        Some(self.reply(if is_answer(status) { ProbeReply::Ready } else { ProbeReply::NotReady }))
    }

    /// Ends this worker. Returns its streams that wait.
    pub fn close(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.waiting)
    }

    fn reply(&mut self, reply: ProbeReply) -> StreamActions {
        let probes = std::mem::take(&mut self.waiting).into_iter().map(|stream| (stream, reply)).collect();
        StreamActions { probes, ..StreamActions::default() }
    }
}
