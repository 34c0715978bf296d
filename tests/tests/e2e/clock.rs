//! The wall clock is changed under Envoy and under the stats server.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use inflight_e2e::app::App;
use inflight_e2e::bootstrap::Bootstrap;
use inflight_e2e::envoy::{Envoy, How, Version};
use inflight_e2e::load::{Load, Plan};
use inflight_e2e::statserver::StatServer;
use inflight_e2e::tap::Tap;
use inflight_e2e::{http, root, wait};
use tokio::net::TcpStream;

const SETTLED: Duration = Duration::from_secs(20);
const STEADY: Plan =
    Plan { requests: u64::MAX, connections: 8, average_ms: 10.0, mixed: true, seed: 9, path: "/work" };
/// The wall clock after each step, in seconds from the true time.
const STEPS: [i64; 4] = [3600, 0, -3600, 0];

/// A wall clock that a test can set.
pub struct WallClock {
    file: File,
    /// The environment of a process that is to have this clock.
    pub environment: Vec<(&'static str, OsString)>,
}

impl WallClock {
    /// Returns a clock that shows the true time, by `tests/clock.c`.
    pub fn new(folder: &Path, name: &str) -> Self {
        let (library, path) = (folder.join("clock.so"), folder.join(name));
        let source = root().join("tests/clock.c");
        let mut compiler = Command::new("cc");
        let compiled = compiler.args(["-O2", "-shared", "-fPIC", "-o"]).arg(&library).arg(source).status();
        assert!(compiled.expect("cc").success());
        let file = File::create(&path).expect("a file");
        let environment = vec![("LD_PRELOAD", library.into()), ("WALL_CLOCK_OFFSET", path.into())];
        let clock = Self { file, environment };
        clock.set(0);
        clock
    }

    /// Sets the clock to `seconds` from the true time, from now on.
    pub fn set(&self, seconds: i64) {
        let ns = seconds * 1_000_000_000;
        self.file.write_all_at(&ns.to_ne_bytes(), 0).expect("written");
    }
}

async fn figure(server: &StatServer, window: &str, of: &str) -> f64 {
    let key = server.key("default", "hello-00001").await.expect("the key");
    key[window][of].as_f64().expect("a number")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wall_clock_that_is_set_by_an_hour_changes_neither_counts_nor_averages() {
    tokio::join!(set_by_an_hour(Version::Oldest), set_by_an_hour(Version::Newest));
}

async fn set_by_an_hour(version: Version) {
    let folder = tempfile::tempdir().expect("a folder");
    let [of_envoy, of_server] = ["envoy", "server"].map(|name| WallClock::new(folder.path(), name));
    let app = App::start().await;
    let server = StatServer::launch(None, &[], &of_server.environment).await;
    let tap = Tap::start(Some(server.address)).await;
    let how = How { concurrency: 2, environment: of_envoy.environment.clone(), ..How::default() };
    let envoy = Envoy::with(version, &Bootstrap::sidecar(app.address, tap.address), how).await;

    let load = Load::start(STEADY, envoy.address, &app.counts);
    tap.reports(2, SETTLED).await;
    for step in STEPS {
        of_envoy.set(step);
        tap.reports(2, SETTLED).await;
        of_server.set(step);
        tap.reports(2, SETTLED).await;
    }
    load.stop();
    let sent = load.finish().await;
    wait::until_equal("the server's count", SETTLED, sent, || server.total()).await;

    // Five websockets are a concurrency of five, whatever the clock says.
    let mut open: Vec<TcpStream> = Vec::new();
    for _ in 0..5 {
        open.push(http::websocket(envoy.address).await);
    }
    let panic = async || figure(&server, "panic", "concurrency").await;
    let is_five = || async {
        let average = panic().await;
        // Two reports may fall into one of the server's six seconds, and none into another.
        if (4.1..=5.9).contains(&average) { Ok(()) } else { Err(average) }
    };
    wait::until("the average is five", SETTLED, is_five).await;
    // The periods in which the websockets were opened are over.
    tap.reports(2, SETTLED).await;
    let from = tap.acknowledged().len();
    for step in STEPS {
        of_envoy.set(step);
        tap.reports(2, SETTLED).await;
        of_server.set(step);
        tap.reports(2, SETTLED).await;
        wait::until("the average is five", SETTLED, is_five).await;
        assert_eq!(server.number("default", "hello-00001", "in_flight").await, 5);
        assert_eq!(server.number("default", "hello-00001", "pods").await, 1);
    }
    for report in &tap.acknowledged()[from..] {
        let message = &report.messages[0];
        let period = message.until.since(&message.since).expect("time goes on");
        let average = period.average();
        assert!((4.999..=5.001).contains(&average), "{average} in {} ns", period.elapsed_ns);
        assert!((900_000_000..=5_000_000_000).contains(&period.elapsed_ns), "{} ns", period.elapsed_ns);
    }
    // The access log shows that Envoy's wall clock did jump.
    let starts: Vec<u64> = envoy.requests().iter().map(|request| request.start_ns).collect();
    let spread = starts.iter().max().expect("a request") - starts.iter().min().expect("a request");
    assert!(spread > 7_000_000_000_000, "{spread} ns between the first and the last by that clock");
    println!("{version:?}: {sent} requests over eight steps of an hour");
}
