//! Connections: accepting them, TLS, who may do what, how much one may hold.

pub mod auth;
pub mod guard;
pub mod listener;
pub mod tls;
