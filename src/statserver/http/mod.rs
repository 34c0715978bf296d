//! The HTTP server: reports, keys, settings, health, metrics, the module, the live page.

pub mod body;
pub mod extract;
pub mod health;
pub mod keys;
pub mod middleware;
pub mod module;
pub mod page;
pub mod prometheus;
pub mod reports;
pub mod router;
pub mod server;
pub mod settings;

#[cfg(test)]
mod tests;
