//! Inflight's Envoy plugin: glue between proxy-wasm's callbacks and `inflight-stats`, where the
//! rules are. All of it runs over the trait [`Host`](host::Host), and so natively in this crate's
//! tests. What only Envoy can show is tested in `tests/tests/e2e`.
//!
//! The layers, lowest first. A module imports only modules of its own layer or of lower layers, and
//! no two modules import each other.
//!
//! | layer | contents |
//! |---|---|
//! | `host` | the host calls as a trait, its implementation for Envoy, handles of stats |
//! | `fault_injection` | faults on request; never in a shipped module |
//! | `vm` | what one VM keeps: counters, its part in the pod's figure, the local breaker, reports |
//! | `roles` | one request: at a sidecar, at a gateway, at the exporter |
//! | `root` | the root context: configuration, ticks, the answers of the stats server |
//! | `panic_hook` | what is saved when a VM panics |
//! | `entry` | the callbacks that Envoy calls |
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic))]
// In a native build nothing calls the entry.
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
