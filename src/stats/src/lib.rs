//! What Inflight counts, merges, reports and decides, without any I/O: the same code runs inside
//! Envoy's wasm VMs (the filter) and in the stats server, and every rule is tested natively here.
//!
//! | module | its one job |
//! |---|---|
//! | [`snapshot`] | cumulative counters and the integral of concurrency; a [`Period`] is a difference of two |
//! | [`recorder`] | request events in, snapshots at the boundaries of the reporting period out |
//! | [`clock`] | the pod's time: from a monotonic clock, never back, never far ahead at once |
//! | [`shared`] | many workers, one pod figure: slots, the leader's lease, what was acknowledged |
//! | [`breaker`] | at most so many requests in the app, and one queue over all workers |
//! | [`desk`] | one worker's side of the breaker: what it holds, who waits |
//! | [`key_name`] | what a gateway tells apart: by cluster, or by headers |
//! | [`keyed_recorder`] | one gateway worker's counters per key |
//! | [`key_totals`] | all workers' counters per key, which never begin again and never go down |
//! | [`key_admission`] | which keys a gateway tracks, and who saw one first |
//! | [`keyed_member`] | a gateway worker's part in all that, over the store that the workers share |
//! | [`decider`] | how many pods a key wants: Knative's KPA |
//! | [`request`] | which requests are probes, which came through a proxy; code classes |
//! | [`settings`] | what a key can be told: target, windows, bounds |
//! | [`config`] | the plugin's JSON configuration and its errors |
//! | [`export`] | the exporter's answers: Knative's `Stat`, and Prometheus text |
//! | [`report`] | the report's bytes, and what makes a report invalid |
//! | [`identity`] | who an Envoy serves, also by Istio's node metadata |
//! | [`ingest`] | the receiver's side: what a report adds to what is already known |
//! | [`wire`] | Knative's stats as protobuf: the scrape and the stream |
//! | [`gob`] | the stream of an older Knative |
//! | [`window`] | averages over the stable and the panic window |
//!
//! The whole idea in a few lines:
//!
//! ```
//! use inflight_stats::Snapshot;
//!
//! let second = 1_000_000_000;
//! let mut now = Snapshot::starting_at(10 * second);
//! let before = now;
//! now.request_in(10 * second, false);
//! now.request_out(10 * second + second / 2, false);
//! now.advance(11 * second);
//!
//! let period = now.since(&before).expect("time went on");
//! assert_eq!(period.requests, 1);
//! assert_eq!(period.average_milli(), 500); // one request for half of the second
//! ```
#![deny(missing_docs)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic))]

pub mod breaker;
pub mod clock;
pub mod config;
pub mod decider;
pub mod desk;
pub mod export;
mod fields;
pub mod gob;
pub mod identity;
pub mod ingest;
pub mod key_admission;
pub mod key_name;
pub mod key_totals;
pub mod keyed_member;
pub mod keyed_recorder;
pub mod recorder;
pub mod report;
pub mod request;
pub mod settings;
pub mod shared;
pub mod snapshot;
pub mod window;
pub mod wire;

pub use config::Config;
pub use identity::Identity;
pub use recorder::{Grid, Recorder};
pub use report::{KeyReport, Report};
pub use snapshot::{Period, Snapshot};

#[cfg(test)]
mod vectors;
