//! The building blocks of the end-to-end tests and the demo. Everything listens on 127.0.0.1, on
//! ports that the system assigns, and ends when the value that started it is dropped.
//!
//! | module | contents |
//! |---|---|
//! | [`app`] | an app that keeps its own counts, and misbehaves on request |
//! | [`bootstrap`] | the shipped Envoy configuration, with the addresses of a test in it |
//! | [`browser`] | a headless Chromium |
//! | [`envoy`] | a running Envoy |
//! | [`load`] | a load of mixed requests, reproducible from its seed |
//! | [`process`] | child processes that cannot outlive us |
//! | [`prometheus`] | a reader of the Prometheus text format; a real Prometheus |
//! | [`redis`] | a real Redis, its sentinel, and a link to it that a test can cut |
//! | [`reports`] | reports of pods and gateways that are not there |
//! | [`statserver`] | a running `inflight-statserver` |
//! | [`streams`] | a load of long-lived and multiplexed requests |
//! | [`tap`] | a tap between Envoy and the stats server: it records reports and loses answers |
//! | [`tls`] | a certificate authority of a test's own |
//! | [`truth`] | counts and concurrency from Envoy's own access log |
//! | [`wait`] | waiting for a condition, with a deadline |

pub mod app;
pub mod bootstrap;
pub mod browser;
pub mod envoy;
pub mod http;
#[cfg(test)]
mod layers;
pub mod load;
pub mod process;
pub mod prometheus;
pub mod redis;
pub mod reports;
pub mod statserver;
pub mod streams;
pub mod tap;
pub mod tls;
pub mod truth;
pub mod wait;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Returns the repository's root.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the repository")
}

/// Returns a built file below the target folder.
///
/// # Panics
/// If it does not exist; the message has the command that builds it.
pub fn built(path: &str) -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let path = target.join(path);
    assert!(path.exists(), "{} is not there: run `make build-tests`", path.display());
    path
}

/// Returns the stats server. By default it is the one built like the tests, with overflow checks,
/// which takes minutes less than a release build. The variable `STATSERVER` names another one, for
/// measurements and long runs.
///
/// # Panics
/// If there is no such program.
pub fn statserver_program() -> PathBuf {
    std::env::var_os("STATSERVER").map_or_else(|| built("e2e/inflight-statserver"), PathBuf::from)
}

/// Returns the time since 1970.
///
/// # Panics
/// If the clock is before 1970.
pub fn unix_time() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock past 1970")
}

/// Returns a program from Debian's packages, installed if need be.
///
/// # Panics
/// If it is not available.
pub fn debian(program: &str, packages: &[&str]) -> PathBuf {
    let output = Command::new(root().join("tools/debian.sh")).arg(program).args(packages).output();
    let output = output.expect("a shell");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())
}
