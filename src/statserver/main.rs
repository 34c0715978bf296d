//! `inflight-statserver`: receives the reports of Inflight's filters and answers autoscalers.
//!
//! The layers, lowest first. A module imports only modules of its own layer or of lower layers, and
//! no two modules import each other.
//!
//! | layer | contents |
//! |---|---|
//! | `cli` | flags, commands, environment variables, limits |
//! | `os` | what the system gives: time, files, memory, locks |
//! | `client` | the commands for people, over HTTP or about a file |
//! | `telemetry` | metrics, limited log lines |
//! | `net` | connections: accepting them, TLS, who may do what, their limits, the shutdown |
//! | `keys` | every key's figures, history and settings, and the settings file |
//! | `forward` | every stat on to a Knative autoscaler |
//! | `replication` | one state of several servers: the log in a store, snapshots, who leads |
//! | `app` | the state that requests share, the module, and the tasks that keep all current |
//! | `protocols` | Knative's stat stream, KEDA's external scaler, Kubernetes' metrics APIs |
//! | `http` | the routes: reports, keys, settings, health, metrics, the module, the live page |
//! | `serve` | the running server: HTTP/1.1 and gRPC over connections, from start to end |
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic))]

mod app;
mod cli;
mod client;
mod forward;
mod http;
mod keys;
mod net;
mod os;
mod protocols;
#[cfg(test)]
mod reference;
mod replication;
mod serve;
mod telemetry;

use std::process::ExitCode;

use tracing::{error, info, warn};

use crate::cli::commands::CommandLine;
use crate::cli::environment::unknown_variables;
use crate::client::run::run_command;
use crate::net::shutdown::terminated;
use crate::os::memory;
use crate::serve::run::run;

fn main() -> ExitCode {
    memory::limit_retention();
    start()
}

#[tokio::main]
async fn start() -> ExitCode {
    let CommandLine { flags, command } = CommandLine::read();
    if let Some(command) = command {
        return run_command(&command).await;
    }
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(flags.log_level.to_string()))
        .with_writer(std::io::stderr)
        .init();
    let variables = std::env::vars_os().map(|(name, _)| name.to_string_lossy().into_owned());
    for unknown in unknown_variables(variables, &CommandLine::variables()) {
        warn!("{unknown}");
    }
    // Each connection takes a descriptor, and 1,024 of them are a common default.
    if let Err(error) = rlimit::increase_nofile_limit(u64::MAX) {
        warn!(%error, "cannot raise the limit of open files");
    }
    match run(&flags, terminated()).await {
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
