//! The command line and its environment variables.

pub mod environment;
pub mod flags;
pub mod limits;
