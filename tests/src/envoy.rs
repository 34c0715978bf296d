//! A running Envoy.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::bootstrap::Bootstrap;
use crate::process::Process;
use crate::prometheus::{self, Sample};
use crate::truth::{self, Request};
use crate::{http, root, wait};

/// Which Envoy to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// The oldest that is tested with.
    Oldest,
    /// The newest.
    Newest,
    /// Whatever is on PATH, else the newest.
    Any,
}

impl Version {
    /// Its binary, downloaded into the project's cache if need be.
    ///
    /// # Panics
    /// If it cannot be had.
    pub fn binary(self) -> PathBuf {
        let which = match self {
            Self::Oldest => "oldest",
            Self::Newest => "newest",
            Self::Any => "any",
        };
        let output = Command::new("python3").arg(root().join("tools/envoy.py")).arg(which).output();
        let output = output.expect("python3");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())
    }
}

/// A running Envoy with its first listener and its admin interface.
#[derive(Debug)]
pub struct Envoy {
    /// Where requests go.
    pub address: SocketAddr,
    /// The exporter's listener, if there is one.
    pub exporter: SocketAddr,
    /// The admin interface.
    pub admin: SocketAddr,
    /// The process.
    pub process: Process,
    folder: TempDir,
}

fn command(version: Version, bootstrap: &Bootstrap, concurrency: u32, folder: &Path) -> Command {
    let config = folder.join("envoy.json");
    std::fs::write(&config, bootstrap.0.to_string()).expect("a file");
    let mut command = Command::new(version.binary());
    command.arg("-c").arg(&config).arg("--admin-address-path").arg(folder.join("admin"));
    command.args(["--concurrency", &concurrency.to_string(), "--disable-hot-restart"]);
    command.args(["--file-flush-interval-msec", "200"]);
    command.args(["--log-level", "warning", "--component-log-level", "wasm:info"]);
    command
}

impl Envoy {
    /// Starts one and waits until it listens.
    pub async fn start(version: Version, bootstrap: &Bootstrap, concurrency: u32) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let mut bootstrap = bootstrap.clone();
        bootstrap.access_log(&folder.path().join("access.log"));
        Self::start_in(folder, version, &bootstrap, concurrency).await
    }

    /// Starts one without an access log, which has its own cost.
    pub async fn quiet(version: Version, bootstrap: &Bootstrap, concurrency: u32) -> Self {
        Self::start_in(tempfile::tempdir().expect("a folder"), version, bootstrap, concurrency).await
    }

    async fn start_in(folder: TempDir, version: Version, bootstrap: &Bootstrap, concurrency: u32) -> Self {
        let mut command = command(version, bootstrap, concurrency, folder.path());
        let mut process = Process::start(&mut command, &folder.path().join("log"));
        let admin_file = folder.path().join("admin");
        let limit = Duration::from_secs(60);
        let admin: SocketAddr = wait::until("Envoy's admin interface is up", limit, || {
            assert!(process.ended().is_none(), "Envoy ended at its start:\n{}", process.log());
            let text = std::fs::read_to_string(&admin_file);
            async move {
                text.map_err(|e| e.to_string())?.trim().parse().map_err(|_| "half an address".to_owned())
            }
        })
        .await;
        let address = wait::until("Envoy listens", limit, || listener(admin, 0)).await;
        let listeners = bootstrap.0["static_resources"]["listeners"].as_array().map_or(0, Vec::len);
        let exporter = match listeners {
            2.. => wait::until("the exporter listens", limit, || listener(admin, 1)).await,
            _ => address,
        };
        Self { address, exporter, admin, process, folder }
    }

    /// Runs one that is expected to refuse its configuration; how it ended and what it said.
    pub fn refusal(version: Version, bootstrap: &Bootstrap) -> (bool, String) {
        let folder = tempfile::tempdir().expect("a folder");
        let mut command = command(version, bootstrap, 1, folder.path());
        let mut process = Process::start(&mut command, &folder.path().join("log"));
        let status = process.wait(Duration::from_secs(60));
        (!status.success(), process.log())
    }

    /// All samples at `/stats/prometheus`.
    pub async fn stats(&self) -> Vec<Sample> {
        let text = http::get(self.admin, "/stats/prometheus").await.unwrap_or_else(|e| panic!("{e}"));
        prometheus::parse(&text)
    }

    /// The sum over one stat.
    pub async fn stat(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        prometheus::sum(&self.stats().await, name, labels)
    }

    /// The requests in the access log so far.
    pub fn requests(&self) -> Vec<Request> {
        truth::read(&self.folder.path().join("access.log"))
    }

    /// The requests in the access log, once there are `count`.
    pub async fn requests_when(&self, count: u64) -> Vec<Request> {
        wait::until(&format!("{count} requests are logged"), Duration::from_secs(30), || {
            let requests = self.requests();
            async move { if requests.len() as u64 >= count { Ok(requests) } else { Err(requests.len()) } }
        })
        .await
    }
}

async fn listener(admin: SocketAddr, number: usize) -> Result<SocketAddr, String> {
    let text = http::get(admin, "/listeners?format=json").await?;
    let value: Value = serde_json::from_str(&text).map_err(|e| e.to_string())?;
    let address = &value["listener_statuses"][number]["local_address"]["socket_address"];
    let (ip, port) = (address["address"].as_str(), address["port_value"].as_u64());
    match (ip, port) {
        (Some(ip), Some(port)) if http::get(admin, "/ready").await.is_ok() => {
            format!("{ip}:{port}").parse().map_err(|_| text)
        }
        _ => Err(text),
    }
}
