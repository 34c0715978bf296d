//! `inflight-statserver`: takes the reports of Inflight's filters and answers autoscalers.
//!
//! | module | its one job |
//! |---|---|
//! | `flags` | the command line and its environment variables |
//! | `http` | the routes: reports, keys, health, metrics |
//! | `keys` | every key's figures, in memory, sharded |
//! | `metrics` | what the server says of itself |
//! | `serve` | the listener, and its orderly end |
#![deny(missing_docs)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic))]

mod flags;
mod http;
mod keys;
mod metrics;
mod serve;

use std::process::ExitCode;

use clap::Parser;
use tracing::{error, info};

#[tokio::main]
async fn main() -> ExitCode {
    let flags = flags::Flags::parse();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(flags.log_level.to_string()))
        .with_writer(std::io::stderr)
        .init();
    match serve::run(&flags, serve::terminated()).await {
        Ok(()) => {
            info!("drained");
            ExitCode::SUCCESS
        }
        Err(reason) => {
            error!(listen = %flags.listen, %reason, "cannot serve");
            ExitCode::FAILURE
        }
    }
}
