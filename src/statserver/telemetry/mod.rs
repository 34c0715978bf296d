//! What the server tells its operators of itself: log lines, metrics.

pub mod log_limit;
pub mod metrics;
pub mod refusals;
pub mod store_metrics;
