//! The breaker: a limit on the requests in the app, over all workers of a pod.

pub mod rules;
pub mod worker_side;
