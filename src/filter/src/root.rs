//! The root context: one for each configuration in each VM.

use std::cell::RefCell;
use std::rc::Rc;

use inflight_stats::Config;
use inflight_stats::config::{Identity, StatServer};
use inflight_stats::report::CONTENT_TYPE;
use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::ContextType;

use crate::host::{self, Headers};
use crate::stream::Stream;
use crate::worker::Worker;

/// A configured plugin. Without a configuration (before `on_configure`) it counts nothing.
#[derive(Default)]
pub struct Root {
    plugin: Option<Plugin>,
}

struct Plugin {
    config: Config,
    token: Option<String>,
    proxied_header: Rc<str>,
    worker: Rc<RefCell<Worker>>,
}

impl Root {
    fn configure(&self) -> Result<Plugin, String> {
        let json = self.get_plugin_configuration().unwrap_or_default();
        let config = Config::parse(&json, &Identity::default()).map_err(|error| error.to_string())?;
        let token = match config.statserver.as_ref().and_then(|server| server.token_env.as_ref()) {
            None => None,
            Some(name) => Some(std::env::var(name).map_err(|_| {
                format!(
                    "configuration key `statserver.token_env` was \"{name}\", allowed is the name of a variable \
                     that vm_config.environment_variables sets"
                )
            })?),
        };
        let worker =
            Worker::of(&config).map_err(|trouble| format!("the shared data is of no use ({trouble:?})"))?;
        Ok(Plugin { token, proxied_header: config.proxied_header.as_str().into(), worker, config })
    }

    fn send(&self, plugin: &Plugin, report: &[u8]) {
        let Some(StatServer { cluster, authority, path, timeout, .. }) = &plugin.config.statserver else {
            return;
        };
        let authorization = plugin.token.as_ref().map(|token| format!("Bearer {token}"));
        let mut headers = vec![
            (":method", "POST"),
            (":path", path.as_str()),
            (":authority", authority.as_str()),
            ("content-type", CONTENT_TYPE),
        ];
        headers.extend(authorization.as_ref().map(|value| ("authorization", value.as_str())));
        if let Err(status) = self.dispatch_http_call(cluster, headers, Some(report), vec![], *timeout)
            && let Ok(mut worker) = plugin.worker.try_borrow_mut()
        {
            worker.not_sent(&format!("cannot be called: cluster \"{cluster}\", {status:?}"));
        }
    }
}

impl Context for Root {
    fn on_http_call_response(&mut self, _: u32, _: usize, body: usize, _: usize) {
        let Some(plugin) = &self.plugin else { return };
        let status = host::header(Headers::CallResponse, ":status")
            .and_then(|value| std::str::from_utf8(&value).ok()?.parse().ok())
            .unwrap_or(0);
        if let Ok(mut worker) = plugin.worker.try_borrow_mut() {
            worker.answered(status, || {
                String::from_utf8_lossy(&host::call_response_body(body.min(200)))
                    .replace(char::is_control, " ")
            });
        }
    }

    fn on_done(&mut self) -> bool {
        if let Some(plugin) = &self.plugin {
            let report = plugin.worker.try_borrow_mut().ok().and_then(|mut w| w.root_done(&plugin.config));
            if let Some(report) = report {
                self.send(plugin, &report);
            }
        }
        true
    }
}

impl RootContext for Root {
    fn on_configure(&mut self, _: usize) -> bool {
        match self.configure() {
            Ok(plugin) => {
                self.plugin = Some(plugin);
                // The first tick sets the pace.
                host::tick_in(1);
                true
            }
            Err(error) => {
                log::error!("inflight: {error}");
                false
            }
        }
    }

    fn on_tick(&mut self) {
        let Some(plugin) = &self.plugin else { return };
        let Ok(mut worker) = plugin.worker.try_borrow_mut() else { return };
        let tick = worker.tick(&plugin.config);
        drop(worker);
        host::tick_in(tick.next_ms);
        if let Some(report) = tick.report {
            self.send(plugin, &report);
        }
        #[cfg(feature = "fault-injection")]
        if tick.leads {
            crate::fault::of_leader();
        }
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }

    fn create_http_context(&self, _: u32) -> Option<Box<dyn HttpContext>> {
        match &self.plugin {
            Some(plugin) => {
                Some(Box::new(Stream::new(Rc::clone(&plugin.worker), Rc::clone(&plugin.proxied_header))))
            }
            // A stream before a configuration: the SDK would panic on None.
            None => Some(Box::new(Uncounted)),
        }
    }
}

struct Uncounted;

impl Context for Uncounted {}

impl HttpContext for Uncounted {}
