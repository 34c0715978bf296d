//! The parts of which the end-to-end tests and the demo are made. Everything listens on 127.0.0.1,
//! on ports that the system gives, and ends with the value that started it.
//!
//! | module | what it is |
//! |---|---|
//! | [`app`] | an app that counts for itself, and misbehaves on request |
//! | [`bootstrap`] | the shipped Envoy configuration, with the test's addresses in it |
//! | [`browser`] | a headless Chromium |
//! | [`envoy`] | a running Envoy |
//! | [`load`] | a load of mixed requests, reproducible from its seed |
//! | [`process`] | child processes that cannot outlive us |
//! | [`prometheus`] | reading the Prometheus text format; a real Prometheus |
//! | [`statserver`] | a running `inflight-statserver` |
//! | [`streams`] | a load of long-lived and multiplexed requests |
//! | [`tap`] | between Envoy and the stats server: records reports, loses answers |
//! | [`tls`] | a certificate authority of a test's own |
//! | [`truth`] | counts and concurrency out of Envoy's own access log |
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
pub mod statserver;
pub mod streams;
pub mod tap;
pub mod tls;
pub mod truth;
pub mod wait;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The repository's root.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the repository")
}

/// A built file below the target folder.
///
/// # Panics
/// If it is not there, with the command that builds it.
pub fn built(path: &str) -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let path = target.join(path);
    assert!(path.exists(), "{} is not there: run `make build-tests`", path.display());
    path
}

/// The stats server: built like the tests, with checks for overflows, which takes minutes less than
/// a release build; or the one that the variable `STATSERVER` names, for what measures it or runs
/// it for long.
///
/// # Panics
/// If there is neither.
pub fn statserver_program() -> PathBuf {
    std::env::var_os("STATSERVER").map_or_else(|| built("e2e/inflight-statserver"), PathBuf::from)
}

/// Now, since 1970.
///
/// # Panics
/// If the clock says that it is earlier.
pub fn unix_time() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock past 1970")
}

/// A program out of Debian's packages, installed if need be.
///
/// # Panics
/// If it cannot be had.
pub fn debian(program: &str, packages: &[&str]) -> PathBuf {
    let output = Command::new(root().join("tools/debian.sh")).arg(program).args(packages).output();
    let output = output.expect("a shell");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())
}
