//! TLS and mutual TLS of the stats server.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use http_body_util::Full;
use hyper::Request;
use inflight_e2e::app::App;
use inflight_e2e::bootstrap::{Bootstrap, at};
use inflight_e2e::envoy::{Envoy, Version};
use inflight_e2e::load::{Load, Plan};
use inflight_e2e::process::{Process, is_clean};
use inflight_e2e::statserver::StatServer;
use inflight_e2e::tls::{Authority, Client, Identity};
use inflight_e2e::{http, root, statserver_program, wait};
use inflight_stats::{KeyReport, Report, Snapshot};
use serde_json::{Value, json};

const SETTLED: Duration = Duration::from_secs(20);
const PLAN: Plan =
    Plan { requests: 300, connections: 8, average_ms: 5.0, mixed: true, seed: 3, path: "/work" };

fn text(path: &Path) -> &str {
    path.to_str().expect("a path")
}

fn flags<'a>(server: &'a Identity, client_ca: &'a Path) -> [&'a str; 6] {
    let Identity { certificate, key } = server;
    ["--tls-cert", text(certificate), "--tls-key", text(key), "--tls-client-ca", text(client_ca)]
}

/// Makes Envoy call the stats server over TLS, with a certificate of its own.
fn over_tls(bootstrap: &mut Bootstrap, ca: &Path, client: &Identity) {
    let clusters = bootstrap.0["static_resources"]["clusters"].as_array_mut().expect("clusters");
    let cluster = clusters.iter_mut().find(|c| c["name"] == "inflight-statserver").expect("the cluster");
    let file = |path: &Path| json!({"filename": path});
    cluster["transport_socket"] = json!({"name": "tls", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "common_tls_context": {
            "tls_certificates": [{"certificate_chain": file(&client.certificate), "private_key": file(&client.key)}],
            "validation_context": {"trusted_ca": file(ca)},
        },
    }});
}

async fn total(client: &Client, server: &StatServer) -> Option<u64> {
    let (_, text) = client.get(server.address, "/v1/keys/default/hello-00001").await.ok()?;
    serde_json::from_str::<Value>(&text).ok()?["requests_total"].as_u64()
}

fn keda(server: &StatServer, files: [&Path; 3]) -> (bool, String) {
    let python = Command::new(root().join("tools/python.sh")).output().expect("a shell").stdout;
    let python = String::from_utf8(python).expect("a path");
    let mut command = Command::new(python.trim());
    command.current_dir(root()).args(["tests/keda.py", &server.grpc.to_string()]);
    let output =
        command.arg("src/statserver/proto/externalscaler.proto").args(files).output().expect("Python");
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_mutual_tls_envoy_reports_and_keda_asks_and_nobody_else() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let (authority, stranger) = (Authority::new(), Authority::new());
    let ca = folder.join("ca.pem");
    std::fs::write(&ca, &authority.pem).expect("a file");
    let [of_server, of_envoy] = ["server", "envoy"].map(|name| authority.issue(folder, name));
    let of_stranger = stranger.issue(folder, "stranger");
    for version in [Version::Oldest, Version::Newest] {
        let server = StatServer::with(None, &flags(&of_server, &ca)).await;
        let app = App::start().await;
        let mut bootstrap = Bootstrap::sidecar(app.address, server.address);
        over_tls(&mut bootstrap, &ca, &of_envoy);
        let mut envoy = Envoy::start(version, &bootstrap, 2).await;
        let client = authority.client(Some(&of_envoy));
        let sent = Load::start(PLAN, envoy.address, &app.counts).finish().await;
        wait::until_equal("the server's count", SETTLED, Some(sent), || total(&client, &server)).await;
        // Envoy sends the last report at its end, over an open connection.
        envoy.reports(2).await;
        let more = Load::start(PLAN, envoy.address, &app.counts).finish().await;
        envoy.process.signal(libc::SIGTERM);
        assert!(is_clean(envoy.process.wait(Duration::from_secs(30))));
        wait::until_equal("the server's count", SETTLED, Some(sent + more), || total(&client, &server)).await;

        let nobody = authority.client(None);
        let status = async |client: &Client, path| {
            client.get(server.address, path).await.map(|(status, _)| status.as_u16())
        };
        assert_eq!(status(&nobody, "/v1/keys").await, Ok(401));
        assert_eq!(status(&nobody, "/healthz").await, Ok(200), "a kubelet has no certificate");
        assert_eq!(status(&client, "/metrics").await, Ok(200));
        let put = Request::put("/v1/keys/default/hello-00001/settings").header("host", "test");
        let put =
            client.ask(server.address, put.body(Full::from("{\"target\": 1}")).expect("a request")).await;
        assert_eq!(put.expect("an answer").0, 403, "settings take a token that is marked admin");
        let unknown = authority.client(Some(&of_stranger));
        assert!(status(&unknown, "/healthz").await.is_err(), "a certificate of somebody else's");
        assert!(http::get(server.address, "/healthz").await.is_err(), "without TLS");

        let Identity { certificate, key } = &of_envoy;
        let since = Snapshot::starting_at(1_000_000_000);
        let until = Snapshot { as_of_ns: 2_000_000_000, requests: 5, request_ns: 5_000_000_000, ..since };
        let (namespace, name) = ("ns".into(), "rev".into());
        let messages = vec![KeyReport { namespace, name, from_gateway: false, since, until }];
        let report = Report { version: 1, pod: "pod".into(), incarnation: 1, messages };
        let post = Request::post("/v1/reports").header("host", "test");
        let body = report.encode().expect("a report").into();
        let answer = client.ask(server.address, post.body(Full::new(body)).expect("a request")).await;
        assert_eq!(answer.expect("an answer").0, 202);
        let missing = async || {
            let (_, text) = client.get(server.address, "/v1/keys/ns/rev").await.ok()?;
            Some(serde_json::from_str::<Value>(&text).ok()?["missing"].clone())
        };
        wait::until_equal("all is known", SETTLED, Some(Value::Null), missing).await;
        let (asked, said) = keda(&server, [&ca, certificate, key]);
        assert!(asked && said.contains("\"refused\": \"INVALID_ARGUMENT"), "{said}");
        let Identity { certificate, key } = &of_stranger;
        assert!(!keda(&server, [&ca, certificate, key]).0, "a certificate of somebody else's");
        let (_, metrics) = client.get(server.address, "/metrics").await.expect("metrics");
        let failed = metrics
            .lines()
            .find_map(|line| line.strip_prefix("inflight_statserver_tls_handshakes_failed_total "));
        assert!(failed.and_then(|n| n.parse::<u64>().ok()).is_some_and(|n| n >= 3), "{failed:?}");
    }
}

/// The files of `deploy/keda`: what reports over HTTP needs no certificate.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grpc_alone_may_speak_tls_and_http_stays_as_it_is() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let (authority, stranger) = (Authority::new(), Authority::new());
    let (ca, tokens) = (folder.join("ca.pem"), folder.join("tokens"));
    std::fs::write(&ca, &authority.pem).expect("a file");
    std::fs::write(&tokens, "token-of-the-envoys *\n").expect("a file");
    let [of_server, of_keda] = ["server", "keda"].map(|name| authority.issue(folder, name));
    let of_stranger = stranger.issue(folder, "stranger");
    let tls = ["--grpc-tls-cert", text(&of_server.certificate), "--grpc-tls-key", text(&of_server.key)];
    let flags = [&tls[..], &["--grpc-tls-client-ca", text(&ca), "--token-file", text(&tokens)]].concat();
    let server = StatServer::with(None, &flags).await;
    http::get(server.address, "/healthz").await.expect("without TLS");
    let keys = async |token: &str| {
        let keys = Request::get("/v1/keys").header("host", "x").header("authorization", token);
        let keys = http::ask(server.address, keys.body(Full::default()).expect("a request")).await;
        keys.expect("an answer").0.as_u16()
    };
    assert_eq!(keys("Bearer token-of-the-envoys").await, 200);
    assert_eq!(keys("Bearer another-token-0123").await, 401, "a certificate is none of HTTP");

    let app = App::start().await;
    let mut bootstrap = Bootstrap::sidecar(app.address, server.address);
    bootstrap.configure("statserver", json!({"cluster": "inflight-statserver", "token_env": "TOKEN"}));
    at(bootstrap.filter(), "/typed_config/config/vm_config")["environment_variables"] =
        json!({"key_values": {"TOKEN": "token-of-the-envoys"}});
    bootstrap.configure("namespace", "ns".into());
    bootstrap.configure("revision", "rev".into());
    let envoy = Envoy::start(Version::Newest, &bootstrap, 1).await;
    envoy.reports(2).await;

    let Identity { certificate, key } = &of_keda;
    let (_, said) = keda(&server, [&ca, certificate, key]);
    assert!(said.contains("ns/rev") || said.contains("\"misspelt\""), "{said}");
    let Identity { certificate, key } = &of_stranger;
    let (asked, said) = keda(&server, [&ca, certificate, key]);
    assert!(!asked && !said.contains("misspelt") && !said.contains("ns/rev"), "{said}");
    // The files are read again.
    stranger.issue(folder, "server");
    let new_ca = folder.join("stranger-ca.pem");
    std::fs::write(&new_ca, &stranger.pem).expect("a file");
    std::fs::write(&ca, &stranger.pem).expect("a file");
    wait::until("the new certificate", SETTLED, || async {
        let (_, said) = keda(&server, [&new_ca, certificate, key]);
        if said.contains("ns/rev") || said.contains("misspelt") { Ok(()) } else { Err(said) }
    })
    .await;
}

#[tokio::test]
async fn certificates_are_taken_over_when_the_files_change_and_wrong_ones_are_not() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let (old, new) = (Authority::new(), Authority::new());
    let ca = folder.join("ca.pem");
    std::fs::write(&ca, &old.pem).expect("a file");
    let identity = old.issue(folder, "server");
    let server = StatServer::with(None, &flags(&identity, &ca)).await;
    let healthy = async |authority: &Authority| {
        let answer = authority.client(None).get(server.address, "/healthz").await;
        answer.map(|(status, _)| status.as_u16())
    };
    assert_eq!(healthy(&old).await, Ok(200));
    assert!(healthy(&new).await.is_err());
    // The same names, issued by another authority.
    new.issue(folder, "server");
    wait::until_equal("the new certificate", SETTLED, Ok(200), || healthy(&new)).await;
    std::fs::write(&identity.certificate, "no certificate").expect("a file");
    wait::until("the wrong file is found", SETTLED, || {
        let log = server.process.log();
        async move {
            if log.contains("cannot load the changed certificates; keeping the old ones") {
                Ok(())
            } else {
                Err(log)
            }
        }
    })
    .await;
    assert_eq!(healthy(&new).await, Ok(200));
    assert!(!server.process.log().contains("PRIVATE KEY"));
}

#[test]
fn wrong_certificates_are_refused_at_the_start_in_one_line() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let authority = Authority::new();
    let (one, other) = (authority.issue(folder, "one"), authority.issue(folder, "other"));
    let (cert, key) = (text(&one.certificate), text(&one.key));
    for (flags, reason) in [
        (vec!["--tls-cert", cert, "--tls-key", text(&other.key)], "--tls-cert "),
        (vec!["--tls-cert", cert, "--tls-key", cert], "expected a private key in PEM"),
        (vec!["--tls-cert", key, "--tls-key", key], "expected a certificate in PEM"),
        (vec!["--tls-cert", "/nowhere", "--tls-key", key], "--tls-cert /nowhere: No such file"),
        (vec!["--tls-cert", cert, "--tls-key", key, "--tls-client-ca", key], "--tls-client-ca "),
    ] {
        let mut command = Command::new(statserver_program());
        command.args(["--listen", "127.0.0.1:0", "--grpc-listen", "127.0.0.1:0"]).args(&flags);
        let mut process = Process::start(&mut command, &folder.join("log"));
        assert!(!process.wait(SETTLED).success(), "{flags:?}");
        let log = process.log();
        assert!(log.contains(reason) && log.lines().count() == 1, "{flags:?}: {log}");
    }
}
