//! `settings get`, `set` and `delete`.

use hyper::Method;
use serde_json::Value;

use crate::cli::commands::{KeyCommand, SetCommand, SettingsCommand};
use crate::client::ask::{Server, path_of};
use crate::client::output::print;

/// Asks the server, and prints the settings that are in force then.
///
/// # Errors
/// In one line.
pub async fn settings(
    command: &SettingsCommand,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<(), String> {
    let (method, key, args, body) = match command {
        SettingsCommand::Get(KeyCommand { key, server }) => (Method::GET, key, server, String::new()),
        SettingsCommand::Set(SetCommand { key, json, server }) => (Method::PUT, key, server, json.clone()),
        SettingsCommand::Delete(KeyCommand { key, server }) => (Method::DELETE, key, server, String::new()),
    };
    let answer = Server::new(args, variable)?.ask(method, &path_of(key, "/settings"), body).await?;
    if answer.is_empty() {
        return print(&format!("{key} is scaled by the server's defaults"));
    }
    let settings: Value =
        serde_json::from_str(&answer).map_err(|error| format!("the answer is not JSON: {error}"))?;
    print(&format!("{settings:#}"))
}
