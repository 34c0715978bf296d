//! Several stats servers with one state. Every change is an entry of one log in a store that they
//! share, and each server applies all entries in the log's order.

pub mod appender;
pub mod entry;
pub mod follower;
pub mod format;
pub mod leader;
pub mod log_clock;
pub mod machine;
pub mod progress;
pub mod replica;
pub mod snapshot;
pub mod stream_id;
pub mod tasks;
pub mod valkey;
