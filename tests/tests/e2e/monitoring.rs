//! The dashboard and the alerts of `deploy/monitoring`: each query has data on a real Prometheus, each alert
//! fires, and two stats servers with one state are not counted twice.

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
use inflight_e2e::redis::Redis;
use inflight_e2e::statserver::StatServer;

use inflight_e2e::{http, root, wait};
use serde_json::{Value, json};

const SETTLED: Duration = Duration::from_secs(60);

/// What the names of all figures of keys begin with.
const OF_KEYS: &str = "inflight_statserver_key_";

/// Returns all expressions of the dashboard, with values for Grafana's variables, and what its variables
/// ask for.
fn dashboard() -> [Vec<String>; 2] {
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
    [expressions.map(filled).collect(), asked.map(filled).collect()]
}

/// Returns what prometheus-adapter asks for an HPA, without its selector.
fn adapter_rule() -> String {
    let rule = deployed("examples/hpa.yaml", "ConfigMap");
    let rule = rule["data"]["config.yaml"].as_str().expect("a configuration").to_owned();
    let query = rule.split("metricsQuery: ").nth(1).expect("a query");
    query.trim().replace("<<.LabelMatchers>>", "")
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
    let (app, store) = (App::start().await, Redis::start(&[]).await);
    let shared = store.url();
    let flags = ["--store", shared.as_str()];
    let server = StatServer::with(None, &flags).await;
    // The Envoys report to the first. Both have the same figures.
    let other = StatServer::with(None, &flags).await;
    let mut sidecar = Bootstrap::sidecar(app.address, server.address);
    sidecar.configure("container_concurrency", json!(50));
    let sidecar = Envoy::start(Version::Newest, &sidecar, 1).await;
    let endpoints = EndpointFile::new();
    let hold = json!({"timeout": "1s", "probe_period": "50ms"});
    let gateway = Bootstrap::holding(&endpoints, server.address, hold);
    let gateway = Envoy::start(Version::Newest, &gateway, 1).await;
    let prometheus = Prometheus::start(&[
        ("statserver", server.address, "/metrics"),
        ("other", other.address, "/metrics"),
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
    let [panels, asked] = dashboard();
    assert!(panels.len() > 40, "{panels:#?}");
    let mut queries = [panels.clone(), asked, vec![adapter_rule()]].concat();
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
    let all = prometheus.values("inflight_statserver_key_pods").await.len();
    let keys = prometheus.values("group by (namespace, name) (inflight_statserver_key_pods)").await.len();
    assert_eq!(all, 2 * keys, "both servers have the same keys");
    for panel in panels.iter().filter(|panel| panel.contains(OF_KEYS)) {
        let lines = prometheus.values(panel).await.len();
        assert!(lines <= keys, "{panel}: {lines} lines for {keys} keys");
    }
    let figure = prometheus.query("max(inflight_statserver_key_stable_concurrency)").await;
    let told = prometheus.query(&format!("max({})", adapter_rule())).await;
    assert!(figure > 0.0 && told < 1.5 * figure, "an HPA is told {told} of {figure}");
    holding.abort();
    load.stop();
    load.finish().await;
}

#[test]
fn of_several_servers_the_figures_of_keys_are_never_added() {
    let [panels, _] = dashboard();
    let alerts = alerts().into_iter().map(|(_, expression)| expression);
    for expression in panels.into_iter().chain(alerts).chain([adapter_rule()]) {
        let parts: Vec<&str> = expression.split(OF_KEYS).collect();
        let (_, before) = parts.split_last().expect("a part");
        for part in before {
            let part = part.trim_end_matches("(min_over_time(").trim_end_matches("(max_over_time(");
            let part = part.trim_end_matches('(').trim_end();
            let ends = ["max", "max by (namespace, name)", "min by (namespace, name)"];
            assert!(
                ends.iter().any(|end| part.ends_with(end)),
                "{expression}: a key's figure of each server"
            );
        }
        assert!(before.is_empty() || !expression.contains("sum"), "{expression}");
    }
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
