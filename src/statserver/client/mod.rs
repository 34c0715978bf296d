//! The commands for people: they ask a running server over HTTP, or check a file.

pub mod ask;
pub mod check_config;
pub mod keys;
pub mod output;
pub mod run;
pub mod settings;
