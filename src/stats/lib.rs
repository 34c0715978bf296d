//! The rules of Inflight, without any I/O: how it counts, merges, reports and decides. The same
//! code runs inside Envoy's wasm VMs (the filter) and in the stats server, and every rule is tested
//! natively here.
//!
//! The layers, lowest first. A module imports only modules of its own layer or of lower layers, and
//! no two modules import each other.
//!
//! | layer | contents |
//! |---|---|
//! | [`counting`] | one worker: events in, cumulative snapshots out; the pod's clock |
//! | [`protocol`] | what crosses the network: reports, Knative's stats |
//! | [`pod`] | many workers, one figure: slots, the leader's lease, the ledger |
//! | [`breaker`] | a limit on the requests in the app, with one queue for all workers |
//! | [`gateway`] | a gateway's keys: which ones are tracked, and their totals |
//! | [`hold`] | requests that wait at a gateway until a pod can take them |
//! | [`config`] | the plugin's JSON configuration, and which workload an Envoy serves |
//! | [`exporter`] | the role `exporter`: the answers to a scrape |
//! | [`scaling`] | the receiver: windows, totals and decisions per key |
//!
//! The whole idea in a few lines:
//!
//! ```
//! use inflight_stats::Snapshot;
//! use inflight_stats::counting::request::Origin;
//!
//! let second = 1_000_000_000;
//! let mut now = Snapshot::starting_at(10 * second);
//! let before = now;
//! now.request_in(10 * second, Origin::Direct);
//! now.request_out(10 * second + second / 2, Origin::Direct);
//! now.advance(11 * second);
//!
//! let period = now.since(&before).expect("time went on");
//! assert_eq!(period.requests, 1);
//! assert_eq!(period.average_milli(), 500); // one request for half of the second
//! ```
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic))]

pub mod breaker;
pub mod config;
pub mod counting;
pub mod exporter;
pub mod gateway;
pub mod hold;
pub mod pod;
pub mod protocol;
pub mod scaling;

pub use config::Config;
pub use config::identity::Identity;
pub use counting::grid::Grid;
pub use counting::recorder::Recorder;
pub use counting::snapshot::{Period, Snapshot};
pub use protocol::report::{KeyReport, Report};

#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod vectors;
