//! The breaker: a limit on the requests in the app, across all workers of a pod.

pub mod rules;
pub mod worker_side;
