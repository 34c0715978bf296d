//! A running `inflight-statserver`.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::process::Process;
use crate::{http, statserver_program, wait};

/// A running stats server.
#[derive(Debug)]
pub struct StatServer {
    /// Where it listens for HTTP.
    pub address: SocketAddr,
    /// Where it listens for gRPC.
    pub grpc: SocketAddr,
    /// The process.
    pub process: Process,
    #[allow(dead_code, reason = "held for its Drop")]
    folder: TempDir,
}

impl StatServer {
    /// Starts a stats server on a free port, or again on `address`.
    pub async fn start(address: Option<SocketAddr>) -> Self {
        Self::with(address, &[]).await
    }

    /// Starts a stats server with more flags.
    pub async fn with(address: Option<SocketAddr>, flags: &[&str]) -> Self {
        Self::launch(address, flags, &[]).await
    }

    /// Starts a stats server with more flags and variables.
    pub async fn launch(
        address: Option<SocketAddr>,
        flags: &[&str],
        environment: &[(&'static str, OsString)],
    ) -> Self {
        let mut command = Command::new(statserver_program());
        command.envs(environment.iter().map(|(name, value)| (name, value)));
        Self::run(command, address, flags).await
    }

    /// Starts a stats server by a command that ends with the program. Adds the program's flags.
    ///
    /// # Panics
    /// If it does not listen.
    pub async fn run(mut command: Command, address: Option<SocketAddr>, flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let listen = address.map_or("127.0.0.1:0".into(), |a| a.to_string());
        command.args(["--listen", &listen, "--grpc-listen", "127.0.0.1:0"]).args(flags);
        let log_file = folder.path().join("log");
        let mut process = Process::start(&mut command, &log_file);
        let [address, grpc] = wait::until("the stats server listens", Duration::from_secs(30), || {
            let mut log = process.log();
            if process.ended().is_some() {
                // While a server was away, its port may have been lent to a client of another test.
                let is_lent = address.is_some() && log.contains("Address already in use");
                assert!(is_lent, "the stats server ended at its start:\n{log}");
                process = Process::start(&mut command, &log_file);
                log = String::new();
            }
            async move {
                let listens = |what| {
                    let address = log.split(what).nth(1).and_then(|rest| rest.split_whitespace().next());
                    address.and_then(|a| a.parse().ok())
                };
                listens("address=").zip(listens("grpc=")).map(|(http, grpc)| [http, grpc]).ok_or(log)
            }
        })
        .await;
        Self { address, grpc, process, folder }
    }

    /// Returns where it listens for the kube-apiserver.
    ///
    /// # Panics
    /// If it does not.
    pub fn metrics_api(&self) -> SocketAddr {
        let log = self.process.log();
        let address = log.split("metrics=").nth(1).and_then(|rest| rest.split_whitespace().next());
        address.and_then(|address| address.parse().ok()).unwrap_or_else(|| panic!("no metrics API:\n{log}"))
    }

    /// Returns its view of a key; `None` if it does not know the key.
    pub async fn key(&self, namespace: &str, name: &str) -> Option<Value> {
        let text = http::get(self.address, &format!("/v1/keys/{namespace}/{name}")).await.ok()?;
        serde_json::from_str(&text).ok()
    }

    /// Returns the number of requests that it knows of for the workload in `envoy/envoy.yaml`.
    pub async fn total(&self) -> u64 {
        self.number("default", "hello-00001", "requests_total").await
    }

    /// Returns a number of a key; 0 if the key is unknown.
    pub async fn number(&self, namespace: &str, name: &str, field: &str) -> u64 {
        self.key(namespace, name).await.and_then(|key| key[field].as_u64()).unwrap_or(0)
    }
}
