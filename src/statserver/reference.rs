//! The tables of the reference pages, made from the code. `make reference` writes them.

use std::path::Path;

use clap::Arg;
use clap::builder::Resettable;
use inflight_stats::config::options::CONFIG_KEYS;
use inflight_stats::protocol::key_name::KeyName;
use inflight_stats::scaling::decider::Decision;
use inflight_stats::scaling::key::Figures;
use inflight_stats::scaling::settings::{KeySettings, READY_PODS, SETTINGS};
use serde_json::Value;

use crate::cli::flags::Flags;
use crate::http::prometheus;
use crate::keys::key_view::KeyView;
use crate::os::process;
use crate::telemetry::metrics::{DropReason, Metrics};

const END: &str = "<!-- end of reference -->";

/// A Markdown table.
fn table<const N: usize>(head: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let line = |cells: &[String; N]| {
        let cells: Vec<String> = cells.iter().map(|cell| cell.replace('|', "\\|")).collect();
        format!("| {} |\n", cells.join(" | ")).replace("|  |", "| |")
    };
    let head = line(&head.map(str::to_owned)) + "|" + &"---|".repeat(N) + "\n";
    rows.into_iter().fold(head, |table, row| table + &line(&row))
}

fn code(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!("`{text}`") }
}

/// A default: as code if it is a JSON value, else in words.
fn default_of(text: &str) -> String {
    if serde_json::from_str::<Value>(text).is_ok() { code(text) } else { text.to_owned() }
}

/// What is allowed: the strings in it as code.
fn accepts(expected: &str) -> String {
    let parts = expected.split('"').enumerate();
    let parts: Vec<String> = parts
        .map(|(number, part)| if number % 2 == 1 { format!("`\"{part}\"`") } else { part.to_owned() })
        .collect();
    parts.concat()
}

fn plugin_configuration() -> String {
    let rows = CONFIG_KEYS.iter().map(|key| {
        let name = code(&format!("{}{}", key.object, key.name));
        [name, default_of(key.default), accepts(key.expected), key.help.into()]
    });
    table(["key", "default", "accepts", "meaning"], rows)
}

/// What a flag accepts, as the error about a wrong value has it.
fn expected_by(flag: &Arg) -> String {
    if !flag.get_action().takes_values() {
        return "no value; the variable takes `true` or `false`".into();
    }
    let argument = format!("--{}=\u{1}", flag.get_long().unwrap());
    // What the variables of this shell say has no part in it.
    let command = Flags::command_line().mut_args(|flag| flag.env(Resettable::Reset));
    let error = command.try_get_matches_from(["inflight-statserver", &argument]).err();
    let error = error.map(|error| error.to_string()).unwrap_or_default();
    match error.split_once("expected ") {
        Some((_, expected)) => accepts(expected.lines().next().unwrap()),
        None => "a file".into(),
    }
}

fn flags() -> String {
    let command = Flags::command_line();
    let rows = command.get_arguments().map(|flag| {
        let variable = flag.get_env().unwrap().to_str().unwrap();
        let names = format!("`--{}`<br>`{variable}`", flag.get_long().unwrap());
        let default = match flag.get_default_values() {
            [value] if flag.get_action().takes_values() => code(value.to_str().unwrap()),
            _ if flag.get_action().takes_values() => "none".into(),
            _ => "off".into(),
        };
        [names, default, expected_by(flag), flag.get_help().unwrap().to_string()]
    });
    table(["flag", "default", "accepts", "meaning"], rows)
}

fn key_settings() -> String {
    let defaults = serde_json::to_value(KeySettings::DEFAULT).unwrap();
    let command = Flags::command_line();
    let rows = SETTINGS.iter().map(|setting| {
        let long = setting.name.replace('_', "-");
        let flag = command.get_arguments().find(|flag| flag.get_long() == Some(&long));
        let default = match &defaults[setting.name] {
            Value::Null if setting.name == READY_PODS.name => "the pods that report".into(),
            default => code(default.to_string().trim_end_matches(".0")),
        };
        let flag = flag.map_or(String::new(), |_| code(&format!("--{long}")));
        [code(setting.name), flag, default, accepts(setting.expected), setting.help.into()]
    });
    table(["key", "flag", "default", "accepts", "meaning"], rows)
}

/// Read from what a scrape answers, with a sample of each metric.
fn server_metrics() -> String {
    let metrics = Metrics::default();
    metrics.report(202, 1);
    metrics.frame_dropped(DropReason::Text);
    metrics.store().append_seconds.observe(0.0);
    let view = KeyView {
        name: KeyName::default(),
        figures: Figures::default(),
        desired_pods: Some(0),
        ready_pods: Some(0),
        decision: Some(Decision { desired_pods: 0, excess_burst_capacity: 0, panic_mode: false }),
        settings: Default::default(),
        missing: None,
        stale_since_ns: None,
    };
    let text = prometheus::text(&metrics, process::figures(), vec![view], 1).unwrap();
    let (mut help, mut kind) = ("", "");
    let mut rows: Vec<[String; 4]> = Vec::new();
    for line in text.lines().filter(|line| *line != "# EOF") {
        if let Some(described) = line.strip_prefix("# HELP ") {
            help = described.split_once(' ').unwrap().1.trim_end_matches('.');
        } else if let Some(typed) = line.strip_prefix("# TYPE ") {
            kind = typed.split_once(' ').unwrap().1;
        } else {
            let name = code(line.split(['{', ' ']).next().unwrap());
            let labels = line.split_once('{').map_or("", |(_, rest)| rest.split_once('}').unwrap().0);
            let labels = labels.split(',').filter(|label| !label.is_empty());
            let labels: Vec<String> = labels.map(|label| code(label.split('=').next().unwrap())).collect();
            if rows.last().is_none_or(|[last, ..]| *last != name) {
                rows.push([name, kind.into(), labels.join(", "), help.into()]);
            }
        }
    }
    table(["metric", "type", "labels", "meaning"], rows)
}

#[test]
fn the_reference_pages_have_the_tables_that_the_code_makes() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    let is_update = std::env::var_os("UPDATE_REFERENCE").is_some();
    for (page, name, table) in [
        ("configuration.md", "plugin-configuration", plugin_configuration()),
        ("statserver.md", "flags", flags()),
        ("statserver.md", "key-settings", key_settings()),
        ("statserver.md", "server-metrics", server_metrics()),
    ] {
        let path = docs.join(page);
        let text = std::fs::read_to_string(&path).unwrap();
        let begin = format!("<!-- reference: {name} -->\n");
        let (before, rest) = text.split_once(&begin).unwrap_or_else(|| panic!("docs/{page} has no {begin}"));
        let (written, after) = rest.split_once(END).unwrap_or_else(|| panic!("docs/{page} has no {END}"));
        if is_update {
            std::fs::write(&path, format!("{before}{begin}{table}{END}{after}")).unwrap();
        } else {
            assert!(
                written == table,
                "docs/{page}, {name}: not what the code makes; run `make reference`. It makes:\n{table}"
            );
        }
    }
}
