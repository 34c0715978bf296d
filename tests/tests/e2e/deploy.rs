//! The manifests of `deploy/`: kubectl renders them, schemas accept them, and what Istio and Envoy Gateway
//! make of them counts in real Envoys.

use std::process::Command;
use std::time::Duration;

use inflight_e2e::app::App;
use inflight_e2e::bootstrap::{Bootstrap, TOKEN, deployed};
use inflight_e2e::envoy::{Envoy, How, Version};
use inflight_e2e::load::{Load, Plan};
use inflight_e2e::statserver::StatServer;
use inflight_e2e::tap::Tap;
use inflight_e2e::{built, debian, http, root, wait};

const SETTLED: Duration = Duration::from_secs(20);

/// Returns the output of a tool of the repository.
fn printed(command: &mut Command) -> String {
    let output = command.current_dir(root()).output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {error}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

#[test]
fn kubectl_renders_every_folder_and_the_schemas_accept_what_comes_out() {
    let python = printed(&mut Command::new("tools/python.sh"));
    let kubectl = debian("kubectl", &["kubernetes-client"]);
    println!("{}", printed(Command::new(python).arg("tests/kubernetes.py").arg(kubectl)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_server_starts_with_the_flags_and_the_files_of_the_base() {
    let deployment = deployed("base/statserver.yaml", "Deployment");
    let container = &deployment["spec"]["template"]["spec"]["containers"][0];
    let settings = deployed("base/settings.yaml", "ConfigMap");
    let folder = tempfile::tempdir().expect("a folder");
    let files = [
        ("tokens", format!("{TOKEN} *\n")),
        ("settings.json", settings["data"]["settings.json"].as_str().expect("settings").to_owned()),
    ];
    for (name, text) in files {
        std::fs::write(folder.path().join(name), text).expect("a file");
    }
    let module = built("wasm32-wasip1/release/inflight_filter.wasm");
    std::fs::copy(&module, folder.path().join("inflight_filter.wasm")).expect("a file");
    let mut flags = Vec::new();
    for argument in container["args"].as_array().expect("arguments") {
        let (flag, value) = argument.as_str().and_then(|text| text.split_once('=')).expect("a flag");
        // The addresses are the test's own.
        if flag != "--listen" {
            let file = value.starts_with('/').then(|| value.rsplit_once('/').expect("a path").1);
            let value = file.map_or(value.to_owned(), |file| folder.path().join(file).display().to_string());
            flags.push(format!("{flag}={value}"));
        }
    }
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let server = StatServer::with(None, &flags).await;
    let probes =
        ["readinessProbe", "livenessProbe"].map(|probe| container[probe]["httpGet"]["path"].as_str());
    for path in probes.into_iter().flatten().chain(["/module/sha256"]) {
        http::get(server.address, path).await.unwrap_or_else(|error| panic!("{path}: {error}"));
    }
    let refused = http::get(server.address, "/v1/keys").await;
    assert!(refused.as_ref().is_err_and(|error| error.contains("401")), "{refused:?}");
}

/// Runs an Envoy whose reports pass a tap, sends it requests, and waits until the stats server has
/// counted each of them under the key.
///
/// # Panics
/// If it counts anything else, or the reports have another token or another `:authority` than they
/// should.
async fn assert_counts(
    version: Version,
    (namespace, name): (&str, &str),
    environment: &[(&'static str, &str)],
    bootstrap: impl Fn(&App, &Tap) -> Bootstrap,
) -> Envoy {
    let (app, server) = (App::start().await, StatServer::start(None).await);
    let tap = Tap::start(Some(server.address)).await;
    let environment = environment.iter().map(|(name, value)| (*name, (*value).into())).collect();
    let how = How { concurrency: 2, environment, ..How::default() };
    let envoy = Envoy::with(version, &bootstrap(&app, &tap), how).await;
    let plan = Plan { requests: 300, connections: 10, average_ms: 3.0, seed: 5, ..Plan::default() };
    let sent = Load::start(plan, envoy.address, &app.counts).finish().await;
    wait::until_equal("the server's count", SETTLED, sent, || {
        server.number(namespace, name, "requests_total")
    })
    .await;
    let headers = tap.recorded().first().map(|report| report.headers.clone()).expect("a report");
    for (name, value) in [
        ("host", "inflight-statserver.inflight.svc.cluster.local:8080".to_owned()),
        ("authorization", format!("Bearer {TOKEN}")),
    ] {
        assert!(headers.contains(&(name.to_owned(), value.clone())), "{name}: {value} is not in {headers:?}");
    }
    envoy
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_istio_makes_of_a_sidecars_extension_counts_in_a_real_envoy() {
    let ways = [("traffic-extension.yaml", "TrafficExtension"), ("wasm-plugin.yaml", "WasmPlugin")];
    for version in [Version::Oldest, Version::Newest] {
        for (file, kind) in ways {
            let envoy = assert_counts(version, ("shop", "cart-v2"), &[], |app, tap| {
                let mut bootstrap = Bootstrap::istio(app.address, tap.address);
                bootstrap.extend(&format!("istio-sidecar/{file}"), kind, tap.address);
                bootstrap
            })
            .await;
            let labels = [("response_code", "200"), ("response_code_class", "2xx")];
            assert_eq!(envoy.stat("revision_request_count", &labels).await, 300.0, "{file}");
        }
        assert_counts(version, ("shop", "cart-v2"), &[], |app, tap| {
            Bootstrap::istio(app.address, tap.address)
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_istio_makes_of_a_gateways_extension_counts_in_a_real_envoy() {
    let ways = [("traffic-extension.yaml", "TrafficExtension"), ("wasm-plugin.yaml", "WasmPlugin")];
    let key = ("default", "hello-00001");
    for version in [Version::Oldest, Version::Newest] {
        for (file, kind) in ways {
            assert_counts(version, key, &[], |app, tap| {
                let mut bootstrap = Bootstrap::istio_gateway(app.address, tap.address);
                bootstrap.extend(&format!("istio-gateway/{file}"), kind, tap.address);
                bootstrap
            })
            .await;
        }
        assert_counts(version, key, &[], |app, tap| Bootstrap::istio_gateway(app.address, tap.address)).await;
        let waypoint =
            assert_counts(version, key, &[], |app, tap| Bootstrap::waypoint(app.address, tap.address)).await;
        let labels =
            [("namespace_name", "default"), ("revision_name", "hello-00001"), ("response_code", "200")];
        assert_eq!(waypoint.stat("activator_request_count", &labels).await, 300.0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_envoy_gateway_makes_of_a_policy_counts_its_routes_in_a_real_envoy() {
    // The first is in each of its Envoys; the second comes from the EnvoyProxy.
    let environment = [("ENVOY_POD_NAME", "envoy-default-eg-1"), ("INFLIGHT_TOKEN", TOKEN)];
    for version in [Version::Oldest, Version::Newest] {
        for policy in ["extension-policy.yaml", "extension-policy-http.yaml"] {
            let envoy = assert_counts(version, ("default", "hello"), &environment, |app, tap| {
                let policy = format!("envoy-gateway/{policy}");
                Bootstrap::envoy_gateway(&policy, app.address, tap.address)
            })
            .await;
            let labels =
                [("namespace_name", "default"), ("revision_name", "hello"), ("response_code", "200")];
            assert_eq!(envoy.stat("activator_request_count", &labels).await, 300.0, "{policy}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_envoyfilters_module_comes_from_the_stats_server_that_it_reports_to() {
    let module = built("wasm32-wasip1/release/inflight_filter.wasm");
    for version in [Version::Oldest, Version::Newest] {
        let app = App::start().await;
        let server = StatServer::with(None, &["--module", module.to_str().expect("UTF-8")]).await;
        let sha256 = http::get(server.address, "/module/sha256").await.expect("a digest");
        let bootstrap = Bootstrap::istio_fetching(app.address, server.address, sha256.trim());
        let envoy = Envoy::start(version, &bootstrap, 2).await;
        let plan = Plan { requests: 300, connections: 10, average_ms: 3.0, seed: 7, ..Plan::default() };
        let sent = Load::start(plan, envoy.address, &app.counts).finish().await;
        wait::until_equal("the server's count", SETTLED, sent, || {
            server.number("shop", "cart-v2", "requests_total")
        })
        .await;
        let scraped = http::get(envoy.exporter, "/metrics").await.expect("the exporter");
        assert!(scraped.contains("destination_pod=\"cart-v2-7d9f-x2x4p\""), "{scraped}");
    }
}
