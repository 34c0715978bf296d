//! The whole command line: the server's flags, or a command for people.

use std::path::PathBuf;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use hyper::Uri;
use inflight_stats::protocol::key_name::KeyName;
use inflight_stats::protocol::report::check_name;

use crate::cli::environment::variable_of;
use crate::cli::flags::Flags;

/// The variable with the token of a command.
pub const TOKEN_VARIABLE: &str = "INFLIGHT_TOKEN";

/// Receives the reports of Inflight's filters and answers autoscalers. Without a command it serves.
#[derive(Clone, Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
pub struct CommandLine {
    /// How to serve.
    #[command(flatten)]
    pub flags: Flags,
    /// What else to do.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What the program does when it does not serve.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Shows the keys of a running server, or one key and who reports it.
    Keys(KeysCommand),
    /// Shows or changes what a key is scaled by.
    #[command(subcommand)]
    Settings(SettingsCommand),
    /// Checks a plugin configuration as the filter does, and prints what is in force.
    CheckConfig(CheckConfigCommand),
}

/// `keys`.
#[derive(Clone, Debug, Args)]
pub struct KeysCommand {
    /// The key; without one, all are listed.
    #[arg(value_name = "NAMESPACE/NAME", value_parser = key)]
    pub key: Option<KeyName>,
    /// Show them again every two seconds.
    #[arg(long)]
    pub watch: bool,
    /// The server.
    #[command(flatten)]
    pub server: ServerArgs,
}

/// `settings`.
#[derive(Clone, Debug, Subcommand)]
pub enum SettingsCommand {
    /// Shows the settings in force.
    Get(KeyCommand),
    /// Replaces all settings of the key.
    Set(SetCommand),
    /// Removes the settings of the key: the server's defaults are in force again.
    Delete(KeyCommand),
}

/// A command about one key.
#[derive(Clone, Debug, Args)]
pub struct KeyCommand {
    /// The key.
    #[arg(value_name = "NAMESPACE/NAME", value_parser = key)]
    pub key: KeyName,
    /// The server.
    #[command(flatten)]
    pub server: ServerArgs,
}

/// `settings set`.
#[derive(Clone, Debug, Args)]
pub struct SetCommand {
    /// The key.
    #[arg(value_name = "NAMESPACE/NAME", value_parser = key)]
    pub key: KeyName,
    /// The settings, for example '{"target": 10, "min_scale": 1}'.
    #[arg(value_name = "JSON", value_parser = json)]
    pub json: String,
    /// The server.
    #[command(flatten)]
    pub server: ServerArgs,
}

/// `check-config`.
#[derive(Clone, Debug, Args)]
pub struct CheckConfigCommand {
    /// File with the plugin's configuration, in JSON; - is the standard input.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// As in an Istio proxy, which has namespace, service, revision and pod from its node metadata.
    #[arg(long)]
    pub istio: bool,
}

/// The server that a command asks.
#[derive(Clone, Debug, Args)]
pub struct ServerArgs {
    /// URL of the server.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8080", value_parser = http_url)]
    pub server: Uri,
    /// File with the token, which is the first word in it; without it, the variable INFLIGHT_TOKEN.
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// CA certificates, in PEM, that the server's certificate is checked with; without it, those of
    /// the system.
    #[arg(long, value_name = "FILE")]
    pub cacert: Option<PathBuf>,
}

impl CommandLine {
    /// Returns the command line, with a variable for each of the server's flags.
    pub fn command_line() -> clap::Command {
        Self::command().mut_args(|arg| match arg.get_long().map(variable_of) {
            Some(variable) => arg.env(variable),
            None => arg,
        })
    }

    /// Reads the command line and the environment. Ends the process after `--help`, `--version` and
    /// mistakes.
    pub fn read() -> Self {
        let matches = Self::command_line().get_matches();
        Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
    }

    /// Returns the variables of all flags and commands.
    pub fn variables() -> Vec<String> {
        let mut variables = Flags::variables();
        variables.push(TOKEN_VARIABLE.into());
        variables
    }
}

fn key(text: &str) -> Result<KeyName, String> {
    let (namespace, name) = text.split_once('/').ok_or("expected NAMESPACE/NAME")?;
    for (what, value) in [("namespace", namespace), ("name", name)] {
        check_name(value).map_err(|error| format!("the {what} {error}; expected NAMESPACE/NAME"))?;
    }
    Ok(KeyName::new(namespace, name))
}

fn json(text: &str) -> Result<String, String> {
    let expected = r#"expected a JSON object, for example {"target": 10}"#;
    let object: serde_json::Map<String, serde_json::Value> =
        serde_json::from_str(text).map_err(|error| format!("{error}; {expected}"))?;
    Ok(serde_json::Value::Object(object).to_string())
}

fn http_url(text: &str) -> Result<Uri, String> {
    let url = text.parse::<Uri>().ok().filter(|url| {
        let after_host = url.authority().zip(url.host()).filter(|(_, host)| !host.is_empty());
        // Without a user, whose password errors would show.
        let after_host = after_host.and_then(|(authority, host)| authority.as_str().strip_prefix(host));
        matches!(url.scheme_str(), Some("http" | "https"))
            && after_host.is_some_and(|rest| rest.is_empty() || url.port_u16().is_some_and(|port| port > 0))
            && url.query().is_none()
    });
    url.ok_or_else(|| "expected http://HOST[:PORT] or https://HOST[:PORT]".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<CommandLine, clap::Error> {
        let matches =
            CommandLine::command().try_get_matches_from(["inflight-statserver"].iter().chain(args))?;
        CommandLine::from_arg_matches(&matches)
    }

    #[test]
    fn without_a_command_the_server_starts_with_its_flags() {
        CommandLine::command_line().debug_assert();
        let line = parse(&["--listen", "127.0.0.1:9"]).unwrap();
        assert!(line.command.is_none() && line.flags.listen.port() == 9);
    }

    #[test]
    fn a_command_has_a_key_and_a_server() {
        let line = parse(&["keys", "shop/a/b", "--server", "https://stats:8443", "--watch"]).unwrap();
        let Some(Command::Keys(keys)) = line.command else { panic!("{line:?}") };
        assert_eq!(keys.key, Some(KeyName::new("shop", "a/b")));
        assert_eq!((keys.server.server.to_string().as_str(), keys.watch), ("https://stats:8443/", true));
        let line = parse(&["settings", "set", "shop/cart", r#"{"target": 10}"#]).unwrap();
        let Some(Command::Settings(SettingsCommand::Set(set))) = line.command else { panic!("{line:?}") };
        assert_eq!(set.json, r#"{"target":10}"#);
        assert_eq!(set.server.server.to_string(), "http://127.0.0.1:8080/");
    }

    #[test]
    fn a_wrong_command_is_refused_with_what_is_expected() {
        for (args, expected) in [
            (&["keys", "shop"][..], "expected NAMESPACE/NAME"),
            (&["keys", "/x"], "expected NAMESPACE/NAME"),
            (&["settings", "set", "a/b", "[1]"], "expected a JSON object"),
            (&["settings", "set", "a/b", "{"], "expected a JSON object"),
            (&["keys", "--server", "stats:8080"], "expected http://HOST[:PORT]"),
            (&["keys", "--server", "ftp://stats"], "expected http://HOST[:PORT]"),
            (&["keys", "--server", "http://stats:99999"], "expected http://HOST[:PORT]"),
            (&["keys", "--server", "http://stats:0"], "expected http://HOST[:PORT]"),
            (&["keys", "--server", "http://me:secret@stats"], "expected http://HOST[:PORT]"),
            (&["key"], "'keys'"),
        ] {
            let error = parse(args).unwrap_err().to_string();
            assert!(error.contains(expected), "{args:?}: {error}");
        }
        assert!(parse(&["--insecure", "keys"]).is_err(), "a flag of the server is none of a command");
    }
}
