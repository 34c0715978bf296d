//! A running Envoy.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::bootstrap::Bootstrap;
use crate::process::Process;
use crate::prometheus::{self, Sample};
use crate::truth::{self, Request};
use crate::{http, root, wait};

/// The version of Envoy to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// The oldest version that is tested.
    Oldest,
    /// The newest version.
    Newest,
    /// The version on PATH, or else the newest.
    Any,
}

impl Version {
    /// Returns the binary, downloaded into the project's cache if need be.
    ///
    /// # Panics
    /// If it is not available.
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
    /// The address that requests go to.
    pub address: SocketAddr,
    /// The exporter's listener, if there is one.
    pub exporter: SocketAddr,
    /// The admin interface.
    pub admin: SocketAddr,
    /// The process.
    pub process: Process,
    folder: Arc<TempDir>,
}

/// The name of the main access log in Envoy's folder.
const ACCESS_LOG: &str = "access.log";
/// How long an Envoy lets its connections drain, in seconds.
const DRAIN: &str = "2";
/// The same for its listeners. Envoy's timers count from when its event loop woke up. So the time
/// that the main thread takes to load a module, which is seconds on a busy machine, is deducted,
/// and requests that are open at the end are cut off.
const LISTENERS_DRAIN: &str = "8";

/// How to start an Envoy, apart from its bootstrap.
#[derive(Clone, Debug, Default)]
pub struct How {
    /// The number of its workers; 0 counts as 1.
    pub concurrency: u32,
    /// Variables for its environment.
    pub environment: Vec<(&'static str, OsString)>,
    /// Whether listeners are read from a file that [`Envoy::replace`] changes.
    pub dynamic: bool,
    /// Whether to do without an access log, which itself has a cost.
    pub quiet: bool,
    /// Whether not to wait until Envoy is ready. Its listeners may not accept connections yet.
    pub early: bool,
    /// The base id and the epoch of an Envoy that takes part in hot restarts.
    pub epoch: Option<(u32, u32)>,
}

fn command(version: Version, bootstrap: &Bootstrap, how: &How, folder: &Path) -> Command {
    let number = how.epoch.map_or(0, |(_, epoch)| epoch);
    let config = folder.join(format!("envoy-{number}.json"));
    std::fs::write(&config, bootstrap.0.to_string()).expect("a file");
    let mut command = Command::new(version.binary());
    command.arg("-c").arg(&config).arg("--admin-address-path").arg(folder.join(format!("admin-{number}")));
    command.args(["--concurrency", &how.concurrency.max(1).to_string()]);
    command.args(["--file-flush-interval-msec", "200"]);
    command.args(["--log-level", "warning", "--component-log-level", "wasm:info"]);
    let drain = if how.dynamic { LISTENERS_DRAIN } else { DRAIN };
    command.args(["--drain-time-s", drain, "--drain-strategy", "immediate"]);
    match how.epoch {
        None => command.arg("--disable-hot-restart"),
        Some((base, epoch)) => command.args([
            "--base-id",
            &base.to_string(),
            "--restart-epoch",
            &epoch.to_string(),
            "--parent-shutdown-time-s",
            "4",
        ]),
    };
    command.envs(how.environment.iter().map(|(name, value)| (name, value)));
    command
}

impl Envoy {
    /// Starts an Envoy and waits until it listens.
    pub async fn start(version: Version, bootstrap: &Bootstrap, concurrency: u32) -> Self {
        Self::with(version, bootstrap, How { concurrency, ..How::default() }).await
    }

    /// Starts an Envoy without an access log.
    pub async fn quiet(version: Version, bootstrap: &Bootstrap, concurrency: u32) -> Self {
        Self::with(version, bootstrap, How { concurrency, quiet: true, ..How::default() }).await
    }

    /// Starts an Envoy as `how` says, and waits until it listens.
    pub async fn with(version: Version, bootstrap: &Bootstrap, how: How) -> Self {
        let folder = Arc::new(tempfile::tempdir().expect("a folder"));
        Self::start_in(folder, version, bootstrap, &how).await
    }

    /// Starts the next epoch of a hot restart. It takes over the sockets of this Envoy, and then
    /// makes this one end.
    ///
    /// # Panics
    /// If this Envoy was started without a base id.
    pub async fn next_epoch(&self, version: Version, bootstrap: &Bootstrap, how: &How) -> Self {
        let (base, epoch) = how.epoch.expect("an epoch");
        let how = How { epoch: Some((base, epoch + 1)), ..how.clone() };
        Self::start_in(Arc::clone(&self.folder), version, bootstrap, &how).await
    }

    async fn start_in(folder: Arc<TempDir>, version: Version, bootstrap: &Bootstrap, how: &How) -> Self {
        let mut bootstrap = bootstrap.clone();
        if !how.quiet {
            bootstrap.access_log(&folder.path().join(ACCESS_LOG));
        }
        let listeners = bootstrap.0["static_resources"]["listeners"].as_array().map_or(0, Vec::len);
        if how.dynamic {
            bootstrap.listeners_from(&folder.path().join("listeners.json"));
        }
        let number = how.epoch.map_or(0, |(_, epoch)| epoch);
        let mut command = command(version, &bootstrap, how, folder.path());
        let mut process = Process::start(&mut command, &folder.path().join(format!("log-{number}")));
        let admin_file = folder.path().join(format!("admin-{number}"));
        let limit = Duration::from_secs(60);
        let admin: SocketAddr = wait::until("Envoy's admin interface is up", limit, || {
            assert!(process.ended().is_none(), "Envoy ended at its start:\n{}", process.log());
            let text = std::fs::read_to_string(&admin_file);
            async move {
                text.map_err(|e| e.to_string())?.trim().parse().map_err(|_| "half an address".to_owned())
            }
        })
        .await;
        let ready = !how.early;
        let address = wait::until("Envoy listens", limit, || listener(admin, 0, ready)).await;
        let exporter = match listeners {
            2.. => wait::until("the exporter listens", limit, || listener(admin, 1, ready)).await,
            _ => address,
        };
        Self { address, exporter, admin, process, folder }
    }

    /// Makes a dynamic Envoy replace its listeners by those of `bootstrap`, which log to `log` in
    /// its folder, and waits until it has done so.
    pub async fn replace(&self, bootstrap: &Bootstrap, log: &str) {
        let mut bootstrap = bootstrap.clone();
        bootstrap.access_log(&self.folder.path().join(log));
        let taken = async || self.stat("envoy_listener_manager_lds_update_success", &[]).await;
        let before = taken().await;
        bootstrap.listeners_from(&self.folder.path().join("listeners.json"));
        wait::until("the listeners are taken", Duration::from_secs(20), || async {
            let now = taken().await;
            if now > before { Ok(()) } else { Err((now, self.process.log())) }
        })
        .await;
    }

    /// Waits until none of the replaced listeners and filter chains is left.
    pub async fn drained(&self) {
        let draining = async || {
            let stats = self.stats().await;
            let stat = |name| prometheus::sum(&stats, name, &[]);
            stat("envoy_listener_manager_total_listeners_draining")
                + stat("envoy_listener_manager_total_filter_chains_draining")
        };
        wait::until_equal("what drains", Duration::from_secs(30), 0.0, draining).await;
    }

    /// Runs an Envoy that is expected to refuse its configuration. Returns whether it did, and what
    /// it printed.
    pub fn refusal(version: Version, bootstrap: &Bootstrap) -> (bool, String) {
        let folder = tempfile::tempdir().expect("a folder");
        let mut command = command(version, bootstrap, &How::default(), folder.path());
        let mut process = Process::start(&mut command, &folder.path().join("log"));
        let status = process.wait(Duration::from_secs(60));
        (!status.success(), process.log())
    }

    /// Returns all samples at `/stats/prometheus`.
    pub async fn stats(&self) -> Vec<Sample> {
        let text = http::get(self.admin, "/stats/prometheus").await.unwrap_or_else(|e| panic!("{e}"));
        prometheus::parse(&text)
    }

    /// Returns the sum over one stat.
    pub async fn stat(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        prometheus::sum(&self.stats().await, name, labels)
    }

    /// Waits until `more` more reports were acknowledged.
    pub async fn reports(&self, more: u32) {
        let acknowledged = async || self.stat("inflight_reports_sent_total", &[]).await;
        let enough = acknowledged().await + f64::from(more);
        wait::until(&format!("{more} more reports"), Duration::from_secs(20), || async {
            let now = acknowledged().await;
            if now >= enough { Ok(()) } else { Err(now) }
        })
        .await;
    }

    /// Returns the requests in the access log so far.
    pub fn requests(&self) -> Vec<Request> {
        self.requests_in(ACCESS_LOG)
    }

    /// Returns the requests in a log that [`Envoy::replace`] named.
    pub fn requests_in(&self, log: &str) -> Vec<Request> {
        truth::read(&self.folder.path().join(log))
    }

    /// Returns the number of requests in the access log for each path.
    pub fn requests_by_path(&self) -> BTreeMap<String, u64> {
        truth::count(&self.folder.path().join(ACCESS_LOG))
    }

    /// Returns the requests in the access log, once there are `count`.
    pub async fn requests_when(&self, count: u64) -> Vec<Request> {
        wait::until(&format!("{count} requests are logged"), Duration::from_secs(30), || {
            let requests = self.requests();
            async move { if requests.len() as u64 >= count { Ok(requests) } else { Err(requests.len()) } }
        })
        .await
    }
}

/// Returns the address of a listener, if Envoy is as ready as it has to be.
async fn listener(admin: SocketAddr, number: usize, ready: bool) -> Result<SocketAddr, String> {
    let text = http::get(admin, "/listeners?format=json").await?;
    let value: Value = serde_json::from_str(&text).map_err(|e| e.to_string())?;
    let address = &value["listener_statuses"][number]["local_address"]["socket_address"];
    let (ip, port) = (address["address"].as_str(), address["port_value"].as_u64());
    match (ip, port) {
        (Some(ip), Some(port)) if !ready || http::get(admin, "/ready").await.is_ok() => {
            format!("{ip}:{port}").parse().map_err(|_| text)
        }
        _ => Err(text),
    }
}
