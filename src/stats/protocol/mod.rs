//! What crosses the network: Inflight's reports, Knative's stats, the exporter's answers.

pub mod addition;
pub mod frame;
pub mod gob;
pub mod key_name;
pub mod report;
pub mod stat;
