//! Kubernetes' metrics APIs, `external.metrics.k8s.io` and `custom.metrics.k8s.io`, as an aggregated
//! API server answers them: what a HorizontalPodAutoscaler asks for by way of the kube-apiserver.
//!
//! An answer must never scale by mistake. A controller takes no value for zero and what overflows
//! for anything, and keeps the replicas on any error. So each value is a number of the allowed
//! range, and whatever is not known is a 404 that says what is missing.

pub mod documents;
pub mod quantity;
pub mod routes;
pub mod selector;
