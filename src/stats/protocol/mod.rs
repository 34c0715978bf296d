//! What crosses the network: Inflight's reports, Knative's stats, the exporter's answers.

pub mod gob;
pub mod knative;
pub mod report;
