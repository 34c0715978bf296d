//! Inflight's Envoy plugin: glue between proxy-wasm's callbacks and `inflight-stats`, where the
//! rules live. All of it runs over the trait [`Host`](host::Host), and so natively under this
//! crate's tests; what only Envoy can show is tested in `tests/e2e`.
//!
//! The layers, from the lowest: a module imports only modules of its own or of lower layers, and no
//! two import each other.
//!
//! | layer | what it has |
//! |---|---|
//! | `host` | the host calls as a trait, Envoy behind it, handles of stats |
//! | `fault_injection` | faults on request; never in a shipped module |
//! | `vm` | what one VM keeps: counters, its part in the pod's figure, the local breaker, reports |
//! | `roles` | one request: at a sidecar, a gateway, the exporter |
//! | `root` | the root context: configuration, ticks, the answers of the stats server |
//! | `panic_hook` | what a panic leaves behind |
//! | `entry` | what Envoy calls |
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic))]
// Natively there is nobody to call the entry.
#![cfg_attr(not(any(test, target_arch = "wasm32")), allow(dead_code))]

#[cfg(target_arch = "wasm32")]
#[allow(missing_docs)]
mod entry;
#[cfg(feature = "fault-injection")]
mod fault_injection;
mod host;
#[cfg(target_arch = "wasm32")]
mod panic_hook;
mod roles;
mod root;
#[cfg(test)]
mod simulation;
mod vm;
