//! Connections: accepting them, TLS, who may do what, how much one may hold, and their orderly end.

pub mod auth;
pub mod common_name;
pub mod connection;
pub mod connection_limits;
pub mod front_proxy;
pub mod idle;
pub mod listener;
pub mod memory_budget;
pub mod service_account;
pub mod shutdown;
pub mod tls;
pub mod tracked_body;
pub mod unauthenticated;
