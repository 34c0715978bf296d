//! What one VM, that is one worker of Envoy, keeps.

pub mod code_stats;
pub mod config_stack;
pub mod key_stats;
pub mod keyed_worker;
pub mod local_breaker;
pub mod pod_stats;
pub mod report_sender;
pub mod worker;
pub mod workers;
