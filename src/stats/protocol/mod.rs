//! What crosses the network: Inflight's reports and Knative's stats.

pub mod frame;
pub mod gob;
pub mod key_name;
pub mod report;
pub mod report_delta;
pub mod stat;
