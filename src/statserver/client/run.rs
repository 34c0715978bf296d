//! Runs a command.

use std::process::ExitCode;

use crate::cli::commands::Command;
use crate::client::output::in_one_line;
use crate::client::{check_config, keys, settings};

/// Runs a command. What went wrong is printed in one line, and the exit code is 1 then.
pub async fn run_command(command: &Command) -> ExitCode {
    let variable = |name: &str| std::env::var(name).ok();
    let done = match command {
        Command::Keys(command) => keys::keys(command, variable).await,
        Command::Settings(command) => settings::settings(command, variable).await,
        Command::CheckConfig(command) => check_config::check_config(command),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("error: {}", in_one_line(&reason));
            ExitCode::FAILURE
        }
    }
}
