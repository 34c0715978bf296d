//! `docs/openapi.yaml` against running servers.

use std::collections::BTreeSet;
use std::process::Command;

use inflight_e2e::statserver::StatServer;
use inflight_e2e::{built, root, statserver_program};
use serde_json::Value;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_answer_is_as_the_document_says() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).to_str().expect("a path").to_owned();
    std::fs::write(path("tokens"), "admin-of-all-012345 * admin\nelsewhere-0123456789 other admin\n")
        .expect("a file");
    std::fs::create_dir(path("read-only")).expect("a folder");
    std::fs::write(path("read-only/settings.json"), "[]").expect("a file");
    let module = built("wasm32-wasip1/release/inflight_filter.wasm");
    let open = StatServer::with(None, &["--module", module.to_str().expect("a path")]).await;
    let with_tokens = StatServer::with(None, &["--token-file", &path("tokens")]).await;
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-ec"]);
    let mount =
        "mount --bind \"$0\" \"$0\"; mount -o remount,bind,ro,nosuid,nodev,noexec \"$0\"; exec \"$@\"";
    command.arg(mount).arg(path("read-only")).arg(statserver_program());
    let read_only = StatServer::run(command, None, &["--settings", &path("read-only/settings.json")]).await;

    let python = Command::new(root().join("tools/python.sh")).output().expect("a shell").stdout;
    let python = String::from_utf8(python).expect("a path");
    let mut command = Command::new(python.trim());
    command.arg(root().join("tests/openapi.py"));
    for server in [&open, &with_tokens, &read_only] {
        command.arg(server.address.to_string());
    }
    let output = command.output().expect("Python");
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{said}");
}

#[test]
fn every_route_is_in_the_document_and_nothing_else() {
    let text = std::fs::read_to_string(root().join("docs/openapi.yaml")).expect("the document");
    let document: Value = serde_norway::from_str(&text).expect("YAML");
    let documented: BTreeSet<&str> =
        document["paths"].as_object().expect("paths").keys().map(String::as_str).collect();
    let router = std::fs::read_to_string(root().join("src/statserver/http/router.rs")).expect("the router");
    let routes: BTreeSet<&str> =
        router.split(".route(\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    assert!(routes.len() > 10, "{routes:?}");
    assert_eq!(documented, routes);
}
