//! The command line, its commands, and its environment variables.

pub mod commands;
pub mod environment;
pub mod flags;
pub mod limits;
pub mod store_url;
