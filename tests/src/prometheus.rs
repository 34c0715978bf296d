//! A reader of the Prometheus text format, as far as Envoy writes it; and a real Prometheus.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::process::Process;
use crate::{http, root, wait};

/// One sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The metric's name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its value.
    pub value: f64,
}

/// Returns all samples in a text.
///
/// # Panics
/// On a line that is not a sample.
pub fn parse(text: &str) -> Vec<Sample> {
    text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).map(parse_line).collect()
}

fn parse_line(line: &str) -> Sample {
    let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no sample: {line}"));
    let (name, labels) = match series.split_once('{') {
        None => (series, ""),
        Some((name, rest)) => (name, rest.strip_suffix('}').unwrap_or_else(|| panic!("no sample: {line}"))),
    };
    let labels = labels
        .split("\",")
        .filter(|label| !label.is_empty())
        .map(|label| {
            let (key, value) = label.split_once("=\"").unwrap_or_else(|| panic!("no label: {line}"));
            (key.to_owned(), value.trim_end_matches('"').to_owned())
        })
        .collect();
    let value = value.parse().unwrap_or_else(|_| panic!("no number: {line}"));
    Sample { name: name.to_owned(), labels, value }
}

/// Returns the sum over all samples of a name whose labels contain `labels`.
pub fn sum(samples: &[Sample], name: &str, labels: &[(&str, &str)]) -> f64 {
    samples
        .iter()
        .filter(|sample| sample.name == name)
        .filter(|sample| labels.iter().all(|(k, v)| sample.labels.get(*k).is_some_and(|found| found == v)))
        .map(|sample| sample.value)
        .sum()
}

/// Runs `promtool check metrics` on a text.
///
/// # Errors
/// Promtool's complaint.
///
/// # Panics
/// If promtool is not available.
pub fn promtool_check(text: &str) -> Result<(), String> {
    let mut promtool = Command::new(tool("promtool"))
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool");
    let mut stdin = promtool.stdin.take().expect("its standard input");
    stdin.write_all(text.as_bytes()).expect("promtool reads");
    drop(stdin);
    let output = promtool.wait_with_output().expect("promtool's verdict");
    // Code 3 reports matters of style, and Knative's names are not ours to change.
    match output.status.code() {
        Some(0 | 3) => Ok(()),
        _ => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

/// Runs `promtool test rules` on a file in a folder, with these rules beside it as `rules.yaml`.
///
/// # Panics
/// If it fails, or promtool is not available.
pub fn promtool_test(file: &Path, rules: &Value) {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("rules.yaml"), rules.to_string()).expect("a file");
    std::fs::copy(file, folder.path().join("tests.yaml")).expect("a file");
    let mut promtool = Command::new(tool("promtool"));
    let output = promtool.args(["test", "rules", "tests.yaml"]).current_dir(folder.path()).output();
    let output = output.expect("promtool");
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}{}", said(&output.stdout), said(&output.stderr));
}

fn tool(name: &str) -> PathBuf {
    let output = Command::new(root().join("tools/prometheus.sh")).arg(name).output().expect("a shell");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())
}

/// A running Prometheus that scrapes every quarter of a second.
#[derive(Debug)]
pub struct Prometheus {
    address: SocketAddr,
    #[allow(dead_code, reason = "held for its Drop")]
    process: Process,
    #[allow(dead_code, reason = "held for its Drop")]
    folder: TempDir,
}

impl Prometheus {
    /// Starts a Prometheus with a job for each target: its name, address and path.
    ///
    /// # Panics
    /// If Prometheus is not available, or does not start.
    pub async fn start(targets: &[(&str, SocketAddr, &str)]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let jobs: Vec<Value> = targets
            .iter()
            .map(|(name, address, path)| {
                // A stats server's keys have namespace labels of their own.
                json!({"job_name": name, "metrics_path": path, "honor_labels": true,
                    "static_configs": [{"targets": [address.to_string()]}]})
            })
            .collect();
        let config = json!({"global": {"scrape_interval": "250ms", "scrape_timeout": "250ms"}, "scrape_configs": jobs});
        let file = folder.path().join("prometheus.yml");
        std::fs::write(&file, config.to_string()).expect("a file");
        let probe = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = probe.local_addr().expect("an address");
        drop(probe);
        let mut command = Command::new(tool("prometheus"));
        command.arg(format!("--config.file={}", file.display()));
        command.arg(format!("--storage.tsdb.path={}", folder.path().join("data").display()));
        command.arg(format!("--web.listen-address={address}"));
        let mut process = Process::start(&mut command, &folder.path().join("log"));
        wait::until("Prometheus is ready", Duration::from_secs(60), || {
            assert!(process.ended().is_none(), "Prometheus ended at its start:\n{}", process.log());
            http::get(address, "/-/ready")
        })
        .await;
        Self { address, process, folder }
    }

    /// Returns the value of a query that has one result; 0 if it has no result (yet).
    ///
    /// # Panics
    /// If Prometheus does not answer, or has several results.
    pub async fn query(&self, query: &str) -> f64 {
        let values = self.values(query).await;
        assert!(values.len() <= 1, "{query} has several results: {values:?}");
        values.first().copied().unwrap_or(0.0)
    }

    /// Returns the values of all results of a query.
    ///
    /// # Panics
    /// If Prometheus does not answer, or does not take the query.
    pub async fn values(&self, query: &str) -> Vec<f64> {
        let encoded: String = query.bytes().map(|b| format!("%{b:02x}")).collect();
        let answer = http::get(self.address, &format!("/api/v1/query?query={encoded}"))
            .await
            .unwrap_or_else(|error| panic!("{query}: {error}"));
        let answer: Value = serde_json::from_str(&answer).expect("JSON");
        let results = answer["data"]["result"].as_array().expect("results").iter();
        results
            .map(|result| result["value"][1].as_str().expect("a value").parse().expect("a number"))
            .collect()
    }
}
