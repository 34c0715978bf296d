//! The disk with the settings file fills up, becomes read-only, or is read-only from the start.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::Request;
use inflight_e2e::app::App;
use inflight_e2e::bootstrap::Bootstrap;
use inflight_e2e::envoy::{Envoy, Version};
use inflight_e2e::load::{Load, Plan};
use inflight_e2e::statserver::StatServer;
use inflight_e2e::{http, statserver_program, wait};

const SETTLED: Duration = Duration::from_secs(20);

/// Starts a server whose settings are on a disk of its own of 16 KiB, in a mount namespace, which
/// needs no privileges.
async fn on_a_small_disk(folder: &Path) -> StatServer {
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-ec"]);
    command.arg("mount -t tmpfs -o size=16k tmpfs \"$0\"; exec \"$@\"").arg(folder);
    command.arg(statserver_program());
    let settings = folder.join("settings.json");
    StatServer::run(command, None, &["--settings", settings.to_str().expect("a path")]).await
}

/// Sends a PUT of a target. Returns the answer.
async fn put(server: &StatServer, target: u32) -> (u16, String) {
    let request = Request::put("/v1/keys/default/hello-00001/settings").header("host", "test");
    let body = Full::new(Bytes::from(format!("{{\"target\": {target}}}")));
    let (status, body) =
        http::ask(server.address, request.body(body).expect("a request")).await.expect("an answer");
    (status.as_u16(), String::from_utf8_lossy(&body).into_owned())
}

/// Checks the key's target and the file on that disk. The folder must hold `beside` other files.
async fn holds(server: &StatServer, disk: &Path, target: u32, beside: usize) {
    let key = server.key("default", "hello-00001").await.expect("the key");
    assert_eq!(key["settings"]["target"].as_f64(), Some(target.into()));
    let file = std::fs::read_to_string(disk.join("settings.json")).expect("the file");
    assert!(file.contains(&format!("\"target\": {target}\n")), "{file}");
    assert_eq!(std::fs::read_dir(disk).expect("the disk").count(), 1 + beside);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_and_a_read_only_disk_refuse_settings_and_nothing_else() {
    let folder = tempfile::tempdir().expect("a folder");
    let (app, server) = (App::start().await, on_a_small_disk(folder.path()).await);
    let envoy = Envoy::start(Version::Newest, &Bootstrap::sidecar(app.address, server.address), 2).await;
    let load = Load::start(Plan { requests: u64::MAX, ..Plan::default() }, envoy.address, &app.counts);
    let pid = server.process.id().to_string();
    let inside = folder.path().strip_prefix("/").expect("an absolute path");
    let disk = PathBuf::from(format!("/proc/{pid}/root")).join(inside);

    assert_eq!(put(&server, 7).await.0, 200);
    holds(&server, &disk, 7, 0).await;

    let filler = disk.join("filler");
    let full = std::fs::write(&filler, vec![0; 64 << 10]).expect_err("the disk is small");
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    let (status, reason) = put(&server, 8).await;
    assert!(status == 507 && reason.contains("settings not changed"), "{status} {reason}");
    holds(&server, &disk, 7, 1).await;

    std::fs::remove_file(&filler).expect("removed");
    assert_eq!(put(&server, 9).await.0, 200);
    holds(&server, &disk, 9, 0).await;

    let mut remount = Command::new("nsenter");
    remount.args(["-t", &pid, "--user", "--mount", "--preserve-credentials"]);
    remount.args(["mount", "-o", "remount,ro"]).arg(folder.path());
    assert!(remount.status().expect("nsenter").success());
    let (status, reason) = put(&server, 10).await;
    assert!(status == 507 && reason.contains("Read-only"), "{status} {reason}");
    holds(&server, &disk, 9, 0).await;

    load.stop();
    let sent = load.finish().await;
    wait::until_equal("the server's count", SETTLED, sent, || server.total()).await;
}

/// Starts a server with a folder that is read-only for it alone.
async fn on_a_read_only_disk(folder: &Path) -> StatServer {
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-ec"]);
    // An unprivileged user may not take off what the file system was mounted with, only add to it.
    let mount =
        "mount --bind \"$0\" \"$0\"; mount -o remount,bind,ro,nosuid,nodev,noexec \"$0\"; exec \"$@\"";
    command.arg(mount).arg(folder).arg(statserver_program());
    let settings = folder.join("settings.json");
    StatServer::run(command, None, &["--settings", settings.to_str().expect("a path")]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_settings_of_a_config_map_take_effect_when_they_change() {
    let folder = tempfile::tempdir().expect("a folder");
    let disk = folder.path();
    // As Kubernetes mounts a ConfigMap and changes it: by another folder that takes a name.
    let map = |version: &str, text: &str| {
        std::fs::create_dir(disk.join(version)).expect("a folder");
        std::fs::write(disk.join(version).join("settings.json"), text).expect("a file");
        std::os::unix::fs::symlink(version, disk.join("..data_tmp")).expect("a link");
        std::fs::rename(disk.join("..data_tmp"), disk.join("..data")).expect("a link");
    };
    let of = |target: u32| {
        format!(r#"[{{"namespace": "default", "name": "hello-00001", "settings": {{"target": {target}}}}}]"#)
    };
    std::os::unix::fs::symlink("..data/settings.json", disk.join("settings.json")).expect("a link");
    map("..1", &of(7));
    let server = on_a_read_only_disk(disk).await;
    let target = async || {
        server.key("default", "hello-00001").await.and_then(|key| key["settings"]["target"].as_f64())
    };
    assert_eq!(target().await, Some(7.0));

    let (status, reason) = put(&server, 8).await;
    assert!(
        status == 409 && reason.contains("settings.json is read-only; change it where"),
        "{status} {reason}"
    );
    let delete = Request::delete("/v1/keys/default/hello-00001/settings").header("host", "test");
    let delete = delete.body(Full::<Bytes>::default()).expect("a request");
    let (status, _) = http::ask(server.address, delete).await.expect("an answer");
    assert_eq!((status.as_u16(), target().await), (409, Some(7.0)));

    map("..2", &of(9));
    wait::until_equal("the target", SETTLED, Some(9.0), target).await;
    map("..3", &of(0));
    wait::until("the log refuses the wrong file", SETTLED, async || {
        let log = server.process.log();
        let lines = log.lines().filter(|line| line.contains("keeping the old ones")).count();
        if lines == 1 && log.contains("`target` is 0") { Ok(()) } else { Err(log) }
    })
    .await;
    assert_eq!(target().await, Some(9.0));
    map("..4", &of(10));
    wait::until_equal("the target", SETTLED, Some(10.0), target).await;
    let lines = server.process.log().lines().filter(|line| line.contains("keeping the old ones")).count();
    assert_eq!(lines, 1, "a mistake is logged once");
}
