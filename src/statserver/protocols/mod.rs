//! The protocols of others: Knative's stat stream, KEDA's external scaler, Kubernetes' metrics APIs.

pub mod keda;
pub mod metrics_api;
pub mod stat_stream;
