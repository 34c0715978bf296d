//! The running server: its listeners, what is served over their connections, and its end.

pub mod grpc;
pub mod http1;
pub mod metrics_api;
pub mod run;
