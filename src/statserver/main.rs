//! `inflight-statserver`: takes the reports of Inflight's filters and answers autoscalers.
//!
//! | module | its one job |
//! |---|---|
//! | `access` | who may do what: tokens, certificates |
//! | `limits` | how much of everything is taken from a network |
//! | `guard` | what a connection may hold, and how long it may take |
//! | `link` | a connection, plain or within TLS |
//! | `tls` | the server's certificates |
//! | `files` | reading a file that may be too large |
//! | `flags` | the command line and its environment variables |
//! | `http` | the routes: reports, keys, settings, health, metrics, the live page |
//! | `stream` | Knative's stat stream: a websocket |
//! | `keda` | KEDA's external scaler: gRPC |
//! | `forward` | every stat on to a Knative autoscaler |
//! | `keys` | every key's figures, in memory, sharded |
//! | `told` | what single keys were told, in a file |
//! | `watch` | who waits for a key to become active |
//! | `memory` | what was freed, back to the system |
//! | `metrics` | what the server says of itself and of its keys |
//! | `serve` | the listeners, and their orderly end |
#![deny(missing_docs)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic))]

mod activity;
mod cli;
mod files;
mod forward;
mod http;
mod keda;
mod key_table;
mod memory;
mod metrics;
mod net;
mod serve;
mod settings_store;
mod stat_stream;

use std::process::ExitCode;

use tracing::{error, info, warn};

fn main() -> ExitCode {
    memory::keep_little();
    serve()
}

#[tokio::main]
async fn serve() -> ExitCode {
    let flags = cli::flags::Flags::read();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(flags.log_level.to_string()))
        .with_writer(std::io::stderr)
        .init();
    let known: Vec<String> = cli::flags::Flags::variables();
    let given = std::env::vars_os().map(|(name, _)| name.to_string_lossy().into_owned());
    for unknown in cli::environment::unknown_variables(given, &known) {
        warn!("{unknown}");
    }
    // Each connection takes a descriptor, and 1,024 of them are a common default.
    if let Err(error) = rlimit::increase_nofile_limit(u64::MAX) {
        warn!(%error, "the limit of open files stays");
    }
    match serve::run(&flags, serve::terminated()).await {
        Ok(()) => {
            info!("drained");
            ExitCode::SUCCESS
        }
        Err(reason) => {
            error!(%reason, "cannot serve");
            ExitCode::FAILURE
        }
    }
}
