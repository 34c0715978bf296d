//! The root context: one for each configuration in each VM.

use std::rc::Rc;

use inflight_stats::config;
use inflight_stats::pod::pod_state::PodStore;
use inflight_stats::{Config, Identity};

use crate::host::{HeaderMap, Host};
use crate::roles::exporter::Exporter;
use crate::roles::gateway::{ClusterKeys, Gateway};
use crate::roles::sidecar::Sidecar;
use crate::vm::report_sender::{EncodedReport, send_report};
use crate::vm::worker_registry::{SharedWorker, WorkerRegistry};

/// A configured plugin. Before `on_configure` it has no configuration and counts nothing.
pub struct Root<H: Host> {
    host: H,
    id: u32,
    workers: Rc<WorkerRegistry<H>>,
    role: ActiveRole<H>,
    /// Calls that carry the final reports. While any of them is unanswered, `on_done` has returned
    /// false and this context is kept alive.
    last_calls: Vec<u32>,
}

/// The role for which a root context is configured.
pub enum ActiveRole<H: Host> {
    Unconfigured,
    Sidecar(Rc<Sidecar<H>>),
    Gateway(Rc<Gateway<H>>),
    Exporter(Rc<Exporter<H>>),
}

/// The data that the counting roles have in common.
struct Counting<'a, H: Host> {
    config: &'a Config,
    token: Option<&'a str>,
    worker: &'a SharedWorker<H>,
}

impl<H: Host> ActiveRole<H> {
    fn counting(&self) -> Option<Counting<'_, H>> {
        match self {
            Self::Sidecar(sidecar) => {
                let Sidecar { config, token, worker, .. } = &**sidecar;
                Some(Counting { config, token: token.as_deref(), worker })
            }
            Self::Gateway(gateway) => {
                let Gateway { config, token, worker, .. } = &**gateway;
                Some(Counting { config, token: token.as_deref(), worker })
            }
            Self::Unconfigured | Self::Exporter(_) => None,
        }
    }
}

impl<H: Host> Root<H> {
    /// Returns a root context of the VM that has these workers.
    pub fn new(host: H, id: u32, workers: Rc<WorkerRegistry<H>>) -> Self {
        Self { host, id, workers, role: ActiveRole::Unconfigured, last_calls: Vec::new() }
    }

    /// Returns the role of this root context, which is also the role of its streams.
    pub fn role(&self) -> &ActiveRole<H> {
        &self.role
    }

    /// Applies the plugin's configuration. Returns `false` if it is refused.
    pub fn on_configure(&mut self) -> bool {
        match self.configure() {
            Ok(role) => {
                if role.counting().is_some() {
                    // The first tick sets the interval.
                    self.host.tick_in(1);
                }
                self.role = role;
                true
            }
            Err(error) => {
                log::error!("inflight: {error}");
                false
            }
        }
    }

    fn configure(&self) -> Result<ActiveRole<H>, String> {
        let host = self.host;
        let node = Identity::from_istio(|path| self.node_metadata(path));
        let config = Config::parse(&host.plugin_configuration(), &node, |name| host.environment(name));
        let config = config.map_err(|error| error.to_string())?;
        if config.role == config::Role::Exporter {
            let pod = PodStore::new(&config.domain());
            return Ok(ActiveRole::Exporter(Rc::new(Exporter { host, config, pod })));
        }
        let token = self.token(&config)?;
        let worker = self
            .workers
            .worker_for(self.id, &config)
            .map_err(|error| format!("cannot apply the configuration: {error}"))?;
        if config.role == config::Role::Gateway {
            let root = self.id;
            return Ok(ActiveRole::Gateway(Rc::new(Gateway {
                host,
                root,
                config,
                token,
                worker,
                keys: ClusterKeys::default(),
            })));
        }
        let key = config.key();
        Ok(ActiveRole::Sidecar(Rc::new(Sidecar { host, config, token, key, worker })))
    }

    /// Returns the bearer token for the stats server, if one is configured.
    fn token(&self, config: &Config) -> Result<Option<String>, String> {
        let name = config.statserver.as_ref().and_then(|server| server.token_env.as_ref());
        let Some(name) = name else { return Ok(None) };
        let token = self.host.environment(name).ok_or_else(|| {
            format!(
                "invalid configuration: `statserver.token_env` is \"{name}\"; expected the name of a \
                 variable that vm_config.environment_variables sets"
            )
        })?;
        // A Secret that was made of a file ends as the file does, in a line break.
        let token = token.trim_end_matches(['\r', '\n']);
        if token.is_empty() || token.contains(|c: char| c.is_control()) {
            return Err(format!(
                "invalid configuration: `statserver.token_env` is \"{name}\"; expected the variable to hold \
                 a token in one line without control characters"
            ));
        }
        Ok(Some(token.to_owned()))
    }

    /// Returns a string of the node's metadata; empty if there is none.
    fn node_metadata(&self, path: &[&str]) -> String {
        let value = self.host.property(&format!("xds\0node\0metadata\0{}", path.join("\0")));
        value.and_then(|bytes| String::from_utf8(bytes).ok()).unwrap_or_default()
    }

    /// Runs the worker's tick, when the timer is due.
    pub fn on_tick(&mut self) {
        if !self.last_calls.is_empty() {
            return;
        }
        let Some(counting) = self.role.counting() else { return };
        let Ok(mut worker) = counting.worker.try_borrow_mut() else { return };
        let tick = worker.tick(counting.config);
        drop(worker);
        self.host.tick_in(tick.next_ms);
        tick.actions.apply(self.host, self.id);
        self.send(counting, tick.reports);
        #[cfg(feature = "fault-injection")]
        if tick.leads {
            crate::fault_injection::on_leader(self.host);
        }
    }

    /// Reads the messages that have come from other workers.
    pub fn on_queue_ready(&mut self) {
        let Some(Counting { worker, .. }) = self.role.counting() else { return };
        let Ok(mut worker) = worker.try_borrow_mut() else { return };
        let actions = worker.on_messages();
        drop(worker);
        actions.apply(self.host, self.id);
    }

    /// Handles the answer to a call, from the stats server or from Envoy in its place.
    pub fn on_http_call_response(&mut self, call: u32, body_bytes: usize) {
        let host = self.host;
        let Some(Counting { worker, .. }) = self.role.counting() else { return };
        let status = host
            .header(HeaderMap::CallResponse, ":status")
            .and_then(|value| std::str::from_utf8(&value).ok()?.parse().ok())
            .unwrap_or(0);
        if let Ok(mut worker) = worker.try_borrow_mut() {
            let actions = worker.on_response(call, status, || {
                let body = host.call_response_body(body_bytes.min(200));
                String::from_utf8_lossy(&body).replace(char::is_control, " ")
            });
            drop(worker);
            actions.apply(host, self.id);
        }
        if !self.last_calls.is_empty() {
            self.last_calls.retain(|last| *last != call);
            if self.last_calls.is_empty() {
                host.complete_done();
            }
        }
    }

    /// Ends this context. A call ends with the context that made it. So when a configuration ends
    /// and Envoy stays, the context asks for more time (`false`) until its last report is answered,
    /// or until Envoy gives it up after the call's timeout. When Envoy itself ends, nothing waits
    /// for the answer.
    pub fn on_done(&mut self) -> bool {
        let Some(counting) = self.role.counting() else { return true };
        let worker = counting.worker.try_borrow_mut();
        let reports = worker.map(|mut worker| worker.root_done(self.id, counting.config));
        self.last_calls = self.send(counting, reports.unwrap_or_default());
        self.last_calls.is_empty()
    }

    /// Sends reports. Returns the calls that were made.
    fn send(&self, counting: Counting<'_, H>, reports: Vec<EncodedReport>) -> Vec<u32> {
        let Counting { config, token, worker } = counting;
        let mut calls = Vec::new();
        let Some(server) = &config.statserver else { return calls };
        for report in reports {
            let call = send_report(self.host, server, token, &report.bytes);
            let Ok(mut worker) = worker.try_borrow_mut() else { break };
            match call {
                Ok(call) => {
                    worker.on_dispatched(call, report, config);
                    calls.push(call);
                }
                Err(reason) => worker.on_dispatch_error(&reason),
            }
        }
        calls
    }
}
