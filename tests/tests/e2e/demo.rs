//! The scaling demo: it shows what it is to show, and leaves nothing behind.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use inflight_e2e::envoy::Version;
use inflight_e2e::process::{Process, is_clean};
use inflight_e2e::{built, statserver_program, wait};
use tempfile::TempDir;

/// A quarter of it is enough on an idle machine.
const RUN: Duration = Duration::from_secs(150);

/// Starts the demo, with a version of Envoy as the one on PATH.
fn start(version: Version, folder: &TempDir) -> Process {
    // What it starts must be there.
    statserver_program();
    built("wasm32-wasip1/release/inflight_filter.wasm");
    let envoy = version.binary();
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(env!("CARGO_BIN_EXE_inflight-demo"));
    command.arg("--scale");
    command.env("PATH", format!("{}:{path}", envoy.parent().expect("a folder").display()));
    Process::start(&mut command, &folder.path().join("log"))
}

/// Returns the processes that a process has started and that run.
fn children(of: u32) -> Vec<u32> {
    let all = std::fs::read_dir("/proc").expect("/proc").flatten();
    let ids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    ids.filter(|id| parent(*id).is_some_and(|(state, parent)| state != 'Z' && parent == of)).collect()
}

/// Returns the state and the parent of a process; `None` if the process is gone.
fn parent(id: u32) -> Option<(char, u32)> {
    let stat = std::fs::read_to_string(PathBuf::from(format!("/proc/{id}/stat"))).ok()?;
    // The name before may have spaces in it.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

async fn until_gone(processes: &[u32]) {
    wait::until("what the demo started has ended", Duration::from_secs(10), async || {
        let left: Vec<u32> = processes
            .iter()
            .copied()
            .filter(|id| parent(*id).is_some_and(|(state, _)| state != 'Z'))
            .collect();
        if left.is_empty() { Ok(()) } else { Err(left) }
    })
    .await;
}

/// Returns the columns of the table's lines: second, requests, held, failed, in flight, desired,
/// pods.
fn table(log: &str) -> Vec<Vec<String>> {
    let lines = log.lines().skip_while(|line| !line.starts_with("second ")).skip(1);
    let lines = lines.take_while(|line| !line.is_empty());
    lines.map(|line| line.split_whitespace().take(7).map(str::to_owned).collect()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_scaling_demo_goes_from_no_pods_to_some_and_back_without_a_failed_request() {
    for version in [Version::Oldest, Version::Newest] {
        let folder = TempDir::new().expect("a folder");
        let began = Instant::now();
        let mut demo = start(version, &folder);
        let mut started = Vec::new();
        let status = loop {
            started.extend(children(demo.id()));
            if let Some(status) = demo.ended() {
                break status;
            }
            assert!(began.elapsed() < RUN, "the demo does not end:\n{}", demo.log());
            tokio::time::sleep(Duration::from_millis(100)).await;
        };
        let log = demo.log();
        println!("{version:?}, after {:?}:\n{log}", began.elapsed());
        assert!(is_clean(status), "{status}");
        started.sort_unstable();
        started.dedup();
        // A stats server, the gateway, and at least one pod.
        assert!(started.len() >= 3, "{started:?}");
        until_gone(&started).await;
        let table = table(&log);
        let number = |line: &[String], column: usize| line[column].parse::<u64>().unwrap_or(0);
        let pods: Vec<u64> = table.iter().map(|line| number(line, 6)).collect();
        let most = pods.iter().max().copied().expect("a line");
        assert!(pods.first() == Some(&0) && most >= 1 && pods.last() == Some(&0), "{pods:?}");
        assert!(table.iter().any(|line| number(line, 5) >= 2), "more than one pod was wanted");
        assert!(log.contains(&format!("pods: 0 -> {most} -> 0\n")));
        let sent: u64 = table.iter().map(|line| number(line, 1)).sum();
        let total = format!("{sent} sent, {sent} answered, 0 failed, {sent} in the gateway's access log");
        assert!(log.contains(&total), "{total}");
        // The burst came when there was no pod, and a pod takes half a second to start.
        let before = table.iter().take_while(|line| number(line, 1) == 0);
        assert!(before.map(|line| number(line, 6)).all(|pods| pods == 0));
        let (_, waited) = log.split_once("longest wait beyond the app's own time: ").expect("a wait");
        let waited = waited.split(' ').next().and_then(|seconds| seconds.parse::<f64>().ok());
        assert!(waited >= Some(0.5), "{waited:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_scaling_demo_leaves_nothing_behind_when_it_is_broken_off() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGKILL] {
        let folder = TempDir::new().expect("a folder");
        let mut demo = start(Version::Newest, &folder);
        // The stats server, the gateway, and a pod that starts.
        let started = wait::until("a pod has started", Duration::from_secs(90), async || {
            let started = children(demo.id());
            if started.len() >= 3 { Ok(started) } else { Err(demo.log()) }
        })
        .await;
        demo.signal(signal);
        let status = demo.wait(Duration::from_secs(20));
        assert!(!status.success(), "{status}");
        until_gone(&started).await;
    }
}
