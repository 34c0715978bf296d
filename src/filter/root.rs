//! The root context: one for each configuration in each VM.

use std::cell::RefCell;
use std::rc::Rc;

use inflight_stats::config::{self, StatServer};
use inflight_stats::pod::Pod;
use inflight_stats::protocol::report::CONTENT_TYPE;
use inflight_stats::{Config, Identity};
use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::ContextType;

use crate::exporter::{Exporter, Scrape};
use crate::gateway::{Gateway, Passage};
use crate::host::{self, Headers};
use crate::sidecar::Stream;
use crate::worker::{Outgoing, Worker};

/// A configured plugin. Without a configuration (before `on_configure`) it counts nothing.
pub struct Root {
    id: u32,
    role: Role,
    /// Its configuration is gone; it lives on for the answers to these calls, its last reports.
    last_calls: Vec<u32>,
}

enum Role {
    Unconfigured,
    Sidecar(Box<Plugin>),
    Gateway(Rc<Gateway>),
    Exporter(Rc<Exporter>),
}

struct Plugin {
    config: Config,
    token: Option<String>,
    proxied_header: Rc<str>,
    worker: Rc<RefCell<Worker>>,
}

/// What the roles that count have in common.
struct Counting<'a> {
    config: &'a Config,
    token: Option<&'a str>,
    worker: &'a Rc<RefCell<Worker>>,
}

impl Role {
    fn counting(&self) -> Option<Counting<'_>> {
        match self {
            Self::Sidecar(plugin) => {
                let Plugin { config, token, worker, .. } = &**plugin;
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

impl Root {
    pub fn new(id: u32) -> Self {
        Self { id, role: Role::Unconfigured, last_calls: Vec::new() }
    }

    fn configure(&self) -> Result<Role, String> {
        let json = self.get_plugin_configuration().unwrap_or_default();
        let config =
            Config::parse(&json, &Identity::from_istio(node_metadata)).map_err(|error| error.to_string())?;
        if config.role == config::Role::Exporter {
            return Ok(Role::Exporter(Rc::new(Exporter { pod: Pod::new(&config.domain()), config })));
        }
        let token = match config.statserver.as_ref().and_then(|server| server.token_env.as_ref()) {
            None => None,
            Some(name) => Some(std::env::var(name).map_err(|_| {
                format!(
                    "configuration key `statserver.token_env` was \"{name}\", allowed is the name of a variable \
                     that vm_config.environment_variables sets"
                )
            })?),
        };
        let worker = Worker::of(self.id, &config)
            .map_err(|trouble| format!("the shared data is of no use ({trouble:?})"))?;
        if config.role == config::Role::Gateway {
            return Ok(Role::Gateway(Rc::new(Gateway { root: self.id, config, token, worker })));
        }
        let proxied_header = config.proxied_header.as_str().into();
        Ok(Role::Sidecar(Box::new(Plugin { token, proxied_header, worker, config })))
    }

    /// Sends reports; the calls that were made.
    fn send(&self, Counting { config, token, worker }: Counting, reports: Vec<Outgoing>) -> Vec<u32> {
        let mut calls = Vec::new();
        let Some(server) = &config.statserver else { return calls };
        for report in reports {
            let call = call(server, token, &report.bytes);
            let Ok(mut worker) = worker.try_borrow_mut() else { break };
            match call {
                Ok(call) => {
                    worker.sent(call, report, config);
                    calls.push(call);
                }
                Err(why) => worker.not_sent(&why),
            }
        }
        calls
    }
}

/// Calls the stats server from the context in effect; the call's number.
pub fn call(server: &StatServer, token: Option<&str>, report: &[u8]) -> Result<u32, String> {
    let StatServer { cluster, authority, path, timeout, .. } = server;
    let authorization = token.map(|token| format!("Bearer {token}"));
    let mut headers = vec![
        (":method", "POST"),
        (":path", path.as_str()),
        (":authority", authority.as_str()),
        ("content-type", CONTENT_TYPE),
    ];
    headers.extend(authorization.as_ref().map(|value| ("authorization", value.as_str())));
    proxy_wasm::hostcalls::dispatch_http_call(cluster, headers, Some(report), vec![], *timeout)
        .map_err(|status| format!("cannot be called: cluster \"{cluster}\", {status:?}"))
}

impl Context for Root {
    fn on_http_call_response(&mut self, call: u32, _: usize, body: usize, _: usize) {
        let Some(Counting { worker, .. }) = self.role.counting() else { return };
        let status = host::header(Headers::CallResponse, ":status")
            .and_then(|value| std::str::from_utf8(&value).ok()?.parse().ok())
            .unwrap_or(0);
        if let Ok(mut worker) = worker.try_borrow_mut() {
            worker.answered(call, status, || {
                String::from_utf8_lossy(&host::call_response_body(body.min(200)))
                    .replace(char::is_control, " ")
            });
        }
        if !self.last_calls.is_empty() {
            self.last_calls.retain(|last| *last != call);
            if self.last_calls.is_empty() {
                host::done();
            }
        }
    }

    /// A call ends with the context that made it. So where a configuration goes and Envoy stays, the context asks for time until
    /// its last report is answered, or given up by Envoy after the call's timeout. Where Envoy itself ends, nobody waits.
    fn on_done(&mut self) -> bool {
        let Some(counting) = self.role.counting() else { return true };
        let reports = counting.worker.try_borrow_mut().map(|mut w| w.root_done(self.id, counting.config));
        self.last_calls = self.send(counting, reports.unwrap_or_default());
        self.last_calls.is_empty()
    }
}

impl RootContext for Root {
    fn on_configure(&mut self, _: usize) -> bool {
        match self.configure() {
            Ok(role) => {
                if role.counting().is_some() {
                    // The first tick sets the pace.
                    host::tick_in(1);
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

    fn on_tick(&mut self) {
        if !self.last_calls.is_empty() {
            return;
        }
        let Some(counting) = self.role.counting() else { return };
        let Ok(mut worker) = counting.worker.try_borrow_mut() else { return };
        let tick = worker.tick(counting.config);
        drop(worker);
        host::tick_in(tick.next_ms);
        tick.turn.take(self.id);
        self.send(counting, tick.reports);
        #[cfg(feature = "fault-injection")]
        if tick.leads {
            crate::fault_injection::of_leader();
        }
    }

    fn on_queue_ready(&mut self, _: u32) {
        let Role::Sidecar(plugin) = &self.role else { return };
        let Ok(mut worker) = plugin.worker.try_borrow_mut() else { return };
        let turn = worker.gate.as_mut().map(|gate| gate.read_mailbox(host::monotonic_ns()));
        drop(worker);
        if let Some(turn) = turn {
            turn.take(self.id);
        }
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }

    fn create_http_context(&self, id: u32) -> Option<Box<dyn HttpContext>> {
        match &self.role {
            Role::Sidecar(plugin) => {
                let (worker, header) = (Rc::clone(&plugin.worker), Rc::clone(&plugin.proxied_header));
                Some(Box::new(Stream::new(id, worker, header)))
            }
            Role::Gateway(gateway) => Some(Box::new(Passage::new(id, Rc::clone(gateway)))),
            Role::Exporter(exporter) => Some(Box::new(Scrape(Rc::clone(exporter)))),
            // A stream before a configuration: the SDK would panic on None.
            Role::Unconfigured => Some(Box::new(Uncounted)),
        }
    }
}

/// A string of the node's metadata; empty if it is not there.
fn node_metadata(path: &[&str]) -> String {
    let value = host::property(&format!("xds\0node\0metadata\0{}", path.join("\0")));
    value.and_then(|bytes| String::from_utf8(bytes).ok()).unwrap_or_default()
}

struct Uncounted;

impl Context for Uncounted {}

impl HttpContext for Uncounted {}
