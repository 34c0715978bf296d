//! What one VM keeps: a [`Worker`](worker::Worker) for each pod that it counts for.

pub mod app_probe;
pub mod code_stats;
pub mod config_stack;
pub mod key_stats;
pub mod keyed_worker;
pub mod labels;
pub mod local_breaker;
pub mod local_hold;
pub mod pod_stats;
pub mod probe;
pub mod report_sender;
pub mod stream_actions;
pub mod tick_timer;
pub mod worker;
pub mod worker_registry;
