//! The state of one VM, that is, of one worker of Envoy.

pub mod code_stats;
pub mod config_stack;
pub mod key_stats;
pub mod keyed_worker;
pub mod local_breaker;
pub mod pod_stats;
pub mod report_sender;
pub mod worker;
pub mod workers;
