//! `keys`: the keys of a server as a table, or one of them with those who report it.

use std::time::Duration;

use hyper::Method;
use inflight_stats::protocol::key_name::KeyName;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::cli::commands::KeysCommand;
use crate::client::ask::{Server, path_of};
use crate::client::output::{clear, print, table};

/// The time between two looks.
const PERIOD: Duration = Duration::from_secs(2);
/// How many keys or senders are asked for, at most.
const MAX_LISTED: usize = 10_000;

#[derive(Deserialize)]
struct Keys {
    keys: Vec<Key>,
    found: usize,
}

/// What is shown of a key.
#[derive(Deserialize)]
struct Key {
    namespace: String,
    name: String,
    requests_total: u64,
    in_flight: u64,
    pods: u64,
    gateways: u64,
    proxied_share: Option<f64>,
    stable: Averages,
    panic: Averages,
    desired_pods: Option<u32>,
    panic_mode: bool,
    excess_burst_capacity: Option<i64>,
    last_report_age_ms: Option<u64>,
    stale: bool,
    missing: Option<String>,
    settings: Settings,
}

#[derive(Deserialize)]
struct Averages {
    concurrency: f64,
    requests_per_second: f64,
}

#[derive(Deserialize)]
struct Settings {
    metric: String,
    target: f64,
    target_utilization_percentage: f64,
}

#[derive(Deserialize)]
struct Senders {
    senders: Vec<Sender>,
    found: usize,
}

#[derive(Deserialize)]
struct Sender {
    name: String,
    role: String,
    live: bool,
    in_flight: u64,
    proxied_in_flight: u64,
    average_concurrency: f64,
    last_report_age_ms: u64,
}

/// Prints the keys, or one of them; with `--watch` again and again.
///
/// # Errors
/// In one line. While it watches, only the first look is one: servers restart.
pub async fn keys(command: &KeysCommand, variable: impl Fn(&str) -> Option<String>) -> Result<(), String> {
    let server = Server::new(&command.server, variable)?;
    let look = async || match &command.key {
        Some(key) => one(&server, key).await,
        None => all(&server).await,
    };
    print(&look().await?)?;
    if !command.watch {
        return Ok(());
    }
    loop {
        tokio::time::sleep(PERIOD).await;
        let text = look().await.unwrap_or_else(|reason| format!("{reason}\n"));
        clear()?;
        print(&text)?;
    }
}

async fn get<T: DeserializeOwned>(server: &Server, path: &str) -> Result<T, String> {
    let answer = server.ask(Method::GET, path, String::new()).await?;
    serde_json::from_str(&answer)
        .map_err(|error| format!("GET {path}: the answer is not what a stats server says: {error}"))
}

async fn all(server: &Server) -> Result<String, String> {
    let Keys { keys, found } = get(server, &format!("/v1/keys?limit={MAX_LISTED}")).await?;
    if found == 0 {
        return Ok("no key has been reported\n".into());
    }
    let mut text = keys_table(&keys);
    if keys.len() < found {
        text.push_str(&format!("{} of {found} keys\n", keys.len()));
    }
    Ok(text)
}

fn keys_table(keys: &[Key]) -> String {
    let head = ["NAMESPACE", "NAME", "CONCURRENCY", "REQUESTS/S", "IN FLIGHT", "TARGET", "PODS", "DESIRED"];
    let head = head.into_iter().chain(["LAST REPORT", "STATE"]);
    let row = |key: &Key| {
        vec![
            key.namespace.clone(),
            key.name.clone(),
            decimal(key.stable.concurrency),
            decimal(key.stable.requests_per_second),
            key.in_flight.to_string(),
            target(&key.settings),
            key.pods.to_string(),
            or_dash(key.desired_pods),
            key.last_report_age_ms.map_or("-".into(), age),
            state(key).into(),
        ]
    };
    let rows: Vec<Vec<String>> =
        std::iter::once(head.map(str::to_owned).collect()).chain(keys.iter().map(row)).collect();
    table(&rows, &[false, false, true, true, true, true, true, true, true])
}

async fn one(server: &Server, name: &KeyName) -> Result<String, String> {
    let key: Key = get(server, &path_of(name, "")).await?;
    let path = format!("{}&limit={MAX_LISTED}", path_of(name, "/senders"));
    let Senders { senders, found } = get(server, &path).await?;
    let mut text = key_text(&key);
    if found > 0 {
        text.push('\n');
        text.push_str(&senders_table(&senders));
    }
    Ok(text)
}

fn key_text(key: &Key) -> String {
    let share = |share: f64| format!("{}%", decimal(share * 100.0));
    let both = |averages: &Averages| {
        let Averages { concurrency, requests_per_second } = averages;
        format!("{} ({} requests/s)", decimal(*concurrency), decimal(*requests_per_second))
    };
    let rows = [
        ("key", format!("{}/{}", key.namespace, key.name)),
        ("state", key.missing.clone().unwrap_or_else(|| state(key).into())),
        ("desired pods", or_dash(key.desired_pods)),
        ("pods that report", key.pods.to_string()),
        ("gateways that report", key.gateways.to_string()),
        ("concurrency, stable window", both(&key.stable)),
        ("concurrency, panic window", both(&key.panic)),
        ("target of one pod", target(&key.settings)),
        ("in flight", key.in_flight.to_string()),
        ("requests", key.requests_total.to_string()),
        ("proxied share", key.proxied_share.map_or("-".into(), share)),
        ("excess burst capacity", or_dash(key.excess_burst_capacity)),
        ("last report", key.last_report_age_ms.map_or("-".into(), |ms| format!("{} ago", age(ms)))),
    ];
    let rows: Vec<Vec<String>> = rows.into_iter().map(|(name, value)| vec![name.to_owned(), value]).collect();
    table(&rows, &[])
}

fn senders_table(senders: &[Sender]) -> String {
    let head = ["SENDER", "ROLE", "LIVE", "CONCURRENCY", "IN FLIGHT", "PROXIED", "LAST REPORT"];
    let row = |sender: &Sender| {
        vec![
            sender.name.clone(),
            sender.role.clone(),
            if sender.live { "yes" } else { "no" }.into(),
            decimal(sender.average_concurrency),
            sender.in_flight.to_string(),
            sender.proxied_in_flight.to_string(),
            age(sender.last_report_age_ms),
        ]
    };
    let rows: Vec<Vec<String>> =
        std::iter::once(head.map(str::to_owned).to_vec()).chain(senders.iter().map(row)).collect();
    table(&rows, &[false, false, false, true, true, true, true])
}

/// Returns what a pod is to have at most, with its unit if it is not concurrency.
fn target(settings: &Settings) -> String {
    let Settings { metric, target, target_utilization_percentage } = settings;
    let unit = if metric == "rps" { "/s" } else { "" };
    format!("{}{unit}", decimal(target * target_utilization_percentage / 100.0))
}

/// Returns what autoscalers are told, in a word or two. Why they are told nothing is a sentence, and
/// is shown of a single key.
fn state(key: &Key) -> &'static str {
    match &key.missing {
        _ if key.stale => "stale",
        Some(_) => "unknown yet",
        None if key.panic_mode => "panic",
        None => "ok",
    }
}

fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or("-".into(), |value| value.to_string())
}

fn decimal(number: f64) -> String {
    format!("{number:.2}")
}

fn age(milliseconds: u64) -> String {
    match milliseconds {
        0..60_000 => format!("{:.1}s", milliseconds as f64 / 1000.0),
        60_000..3_600_000 => format!("{}m", milliseconds / 60_000),
        _ => format!("{}h", milliseconds / 3_600_000),
    }
}
