//! The protocols of others: Knative's stat stream, KEDA's external scaler.

pub mod keda;
pub mod stat_stream;
