//! Inflight's Envoy plugin: glue between proxy-wasm's callbacks and `inflight-stats`, where the
//! rules live. Nothing here could be tested without Envoy.
//!
//! | module | its one job |
//! |---|---|
//! | `host` | the host calls, with every error as a value: a panic would end this worker's VM |
//! | `exporter` | the role `exporter`: the pod's figures at `/metrics` |
//! | `gate` | the breaker at this worker: its requests in the app, its requests that wait |
//! | `keyed_worker` | the gateway's side of a worker: counts by key, and Envoy's stats of each |
//! | `passage` | one request through a gateway |
//! | `root` | the root context: configuration, ticks, the call to the stats server and its answer |
//! | `stream` | one request: in, out, what it was |
//! | `worker` | what this VM counted for one pod, shared by all its root and stream contexts |
//! | `metrics` | Envoy's stats |
#![deny(missing_docs)]

mod exporter;
#[cfg(feature = "fault-injection")]
mod fault_injection;
mod gateway;
mod host;
mod keyed_worker;
mod local_breaker;
mod metrics;
mod root;
mod sidecar;
mod worker;

/// What the host calls first. The macro's function carries no documentation of its own.
#[allow(missing_docs)]
mod entry {
    use proxy_wasm::types::LogLevel;

    proxy_wasm::main! {{
        // Envoy filters its component `wasm` too; this only keeps traces from being formatted.
        proxy_wasm::set_log_level(LogLevel::Info);
        crate::worker::seal_on_panic();
        proxy_wasm::set_root_context(|id| Box::new(crate::root::Root::new(id)));
    }}
}
