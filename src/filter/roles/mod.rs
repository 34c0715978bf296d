//! One file a role: what happens to one request.

pub mod exporter;
pub mod gateway;
pub mod sidecar;
