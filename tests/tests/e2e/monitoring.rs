//! The dashboard and the alerts of `deploy/monitoring`: each query has data on a real Prometheus, and each
//! alert fires.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::Request;
use inflight_e2e::app::App;
use inflight_e2e::bootstrap::{Bootstrap, EndpointFile, deployed};
use inflight_e2e::envoy::{Envoy, Version};
use inflight_e2e::load::{Load, Plan};
use inflight_e2e::prometheus::{self, Prometheus};
use inflight_e2e::statserver::StatServer;
use inflight_e2e::{http, root, wait};
use serde_json::{Value, json};

const SETTLED: Duration = Duration::from_secs(60);

/// Returns all expressions of the dashboard, with values for Grafana's variables, and what its variables
/// ask for.
fn dashboard() -> Vec<String> {
    let text = std::fs::read_to_string(root().join("deploy/monitoring/dashboard.json")).expect("a file");
    let dashboard: Value = serde_json::from_str(&text).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels").iter();
    let targets = panels.filter_map(|panel| panel["targets"].as_array()).flatten();
    let expressions = targets.map(|target| target["expr"].as_str().expect("an expression").to_owned());
    let variables = dashboard["templating"]["list"].as_array().expect("variables").iter();
    let asked = variables.filter_map(|variable| {
        let (series, _) = variable["definition"].as_str()?.strip_prefix("label_values(")?.rsplit_once(',')?;
        Some(series.to_owned())
    });
    let filled = |expression: String| {
        [("$__rate_interval", "10s"), ("$namespace", ".*"), ("$name", ".*")]
            .iter()
            .fold(expression, |text, (variable, value)| text.replace(variable, value))
    };
    expressions.chain(asked).map(filled).collect()
}

/// Returns the name and the expression of each alert.
fn alerts() -> Vec<(String, String)> {
    let rules = deployed("monitoring/rules.yaml", "PrometheusRule");
    let groups = rules["spec"]["groups"].as_array().expect("groups").iter();
    let rules = groups.flat_map(|group| group["rules"].as_array().expect("rules"));
    let text = |value: &Value| value.as_str().expect("a string").to_owned();
    rules.map(|rule| (text(&rule["alert"]), text(&rule["expr"]))).collect()
}

/// Returns the names of series in an expression.
fn series(expression: &str) -> BTreeSet<&str> {
    let words = expression.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words.filter(|word| word.contains('_') && word.starts_with("inflight")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_query_of_the_dashboard_and_of_the_alerts_has_data_on_a_real_prometheus() {
    let (app, server) = (App::start().await, StatServer::start(None).await);
    let mut sidecar = Bootstrap::sidecar(app.address, server.address);
    sidecar.configure("container_concurrency", json!(50));
    let sidecar = Envoy::start(Version::Newest, &sidecar, 1).await;
    let endpoints = EndpointFile::new();
    let hold = json!({"timeout": "1s", "probe_period": "50ms"});
    let gateway = Bootstrap::holding(&endpoints, server.address, hold);
    let gateway = Envoy::start(Version::Newest, &gateway, 1).await;
    let prometheus = Prometheus::start(&[
        ("statserver", server.address, "/metrics"),
        ("sidecar", sidecar.admin, "/stats/prometheus"),
        ("gateway", gateway.admin, "/stats/prometheus"),
    ])
    .await;
    let plan = Plan { requests: u64::MAX, connections: 4, average_ms: 20.0, seed: 6, ..Plan::default() };
    let load = Load::start(plan, sidecar.address, &app.counts);
    // Without a pod, each of these is held until its time is over.
    let held = gateway.address;
    let holding = tokio::spawn(async move {
        loop {
            let request = Request::get("/work").header("host", "hello");
            let request = request.body(Full::<Bytes>::default()).expect("a request");
            drop(http::ask(held, request).await);
        }
    });
    let without_threshold = |expression: &str| {
        let (query, threshold) = expression.rsplit_once(['>', '=']).expect("a threshold");
        assert!(threshold.trim().parse::<f64>().is_ok(), "{expression}");
        query.trim_end_matches(['=', ' ']).to_owned()
    };
    let mut queries = dashboard();
    assert!(queries.len() > 40, "{queries:#?}");
    for (_, expression) in alerts() {
        queries.push(without_threshold(&expression));
        queries.extend(series(&expression).into_iter().map(str::to_owned));
    }
    wait::until("every query has data", SETTLED, || async {
        let mut without = Vec::new();
        for query in &queries {
            let values = prometheus.values(query).await;
            if values.is_empty() || values.iter().all(|value| value.is_nan()) {
                without.push(query);
            }
        }
        if without.is_empty() { Ok(()) } else { Err(without) }
    })
    .await;
    // What happens here makes one of them fire.
    let (_, timeouts) =
        alerts().into_iter().find(|(name, _)| name == "InflightHoldTimeouts").expect("the alert");
    assert!(!prometheus.values(&timeouts).await.is_empty(), "{timeouts}");
    holding.abort();
    load.stop();
    load.finish().await;
}

#[test]
fn each_alert_fires_for_what_it_is_for_and_none_while_all_is_well() {
    let file = root().join("tests/alerts.yaml");
    let rules = deployed("monitoring/rules.yaml", "PrometheusRule");
    prometheus::promtool_test(&file, &rules["spec"]);
    let tests = std::fs::read_to_string(file).expect("a file");
    for (alert, _) in alerts() {
        assert!(tests.contains(&format!("alertname=\"{alert}\"")), "no test makes {alert} fire");
    }
}
