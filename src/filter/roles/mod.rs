//! The roles, one file each: what happens to one request.

pub mod exporter;
pub mod gateway;
pub mod sidecar;
