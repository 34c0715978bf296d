use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::response::Response;
use clap::Parser;
use http_body_util::BodyExt;
use inflight_stats::protocol::key_name::KeyName;
use inflight_stats::protocol::report::CONTENT_TYPE;
use inflight_stats::scaling::settings::DEFAULT_RPS_TARGET;
use inflight_stats::{KeyReport, Report, Snapshot};
use tokio::sync::Semaphore;
use tower::ServiceExt;

use crate::app::changes::Changes;
use crate::app::filter_module::FilterModule;
use crate::app::state::ServerState;
use crate::cli::flags::{AnonymousAccess, Flags};
use crate::http::router::router;
use crate::keys::capacity::Capacity;
use crate::keys::key_table::KeyTable;
use crate::keys::listing::Listing;
use crate::keys::settings_store::SettingsStore;
use crate::net::auth::{Access, Peer};
use crate::net::memory_budget::Budget;
use crate::net::shutdown::{DrainTrigger, new_drain};
use crate::os::clock::now_ns;
use crate::telemetry::log_limit::LogLimiter;
use crate::telemetry::refusals::RefusalLog;

fn state() -> Arc<ServerState> {
    state_with(Access::load(None, false, AnonymousAccess::Full).unwrap()).1
}

fn state_with(access: Access) -> (DrainTrigger, Arc<ServerState>) {
    state_of(access, None)
}

fn state_of(access: Access, module: Option<FilterModule>) -> (DrainTrigger, Arc<ServerState>) {
    let capacity = Capacity { keys: 1_000, keys_per_namespace: 100, pods_per_key: 100, bytes: 256 << 20 };
    let keys = Arc::new(KeyTable::new(Arc::default(), capacity, 0));
    let settings = Arc::new(SettingsStore::load(None, DEFAULT_RPS_TARGET, &keys).unwrap());
    let (trigger, drain) = new_drain();
    let state = ServerState {
        changes: Changes::Local { keys: Arc::clone(&keys), settings: Arc::clone(&settings), forwarder: None },
        settings,
        keys,
        access,
        module,
        limits: Flags::parse_from(["inflight-statserver"]).limits,
        budget: Budget::new(1 << 20),
        response_budget: Budget::new(1 << 20),
        calls: Arc::new(Semaphore::new(9)),
        listing: Arc::default(),
        metrics: Arc::default(),
        forwarder: None,
        rps_target: DEFAULT_RPS_TARGET,
        drain,
        unknown_keys: Default::default(),
        log_limiter: LogLimiter::default(),
        refusals: RefusalLog::default(),
    };
    (trigger, Arc::new(state))
}

async fn ask(state: &Arc<ServerState>, request: Request) -> (StatusCode, String) {
    let response = router(Arc::clone(state)).oneshot(request).await.unwrap();
    let status = response.status();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

async fn read(state: &Arc<ServerState>, path: &str) -> (StatusCode, String) {
    ask(state, Request::get(path).body(Body::empty()).unwrap()).await
}

async fn send(state: &Arc<ServerState>, body: Vec<u8>) -> (StatusCode, String) {
    let request = Request::post("/v1/reports").header("content-type", CONTENT_TYPE);
    ask(state, request.body(Body::from(body)).unwrap()).await
}

async fn put(state: &Arc<ServerState>, path: &str, json: &str) -> (StatusCode, String) {
    ask(state, Request::put(path).body(Body::from(json.to_owned())).unwrap()).await
}

fn count(state: &ServerState) -> usize {
    let all = state.access.check(None, Peer::default()).unwrap();
    state.keys.views(&all, &Listing::first(usize::MAX), now_ns()).1
}

fn sample(name: &str, requests: u64) -> Report {
    let since = Snapshot::starting_at(1_000_000_000);
    let until = Snapshot {
        as_of_ns: 2_000_000_000,
        requests,
        request_ns: 3_000_000_000,
        in_flight: 2,
        ..Snapshot::default()
    };
    Report {
        version: 1,
        pod: "pod".into(),
        incarnation: 1,
        messages: vec![KeyReport {
            namespace: "ns".into(),
            name: name.into(),
            from_gateway: false,
            since,
            until,
        }],
    }
}

#[tokio::test]
async fn a_report_shows_up_under_its_key() {
    let state = state();
    assert_eq!(send(&state, sample("rev", 7).encode().unwrap()).await, (StatusCode::ACCEPTED, String::new()));
    let (status, body) = read(&state, "/v1/keys/ns/rev").await;
    let value: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(status, StatusCode::OK);
    assert_eq!(value["requests_total"], 7);
    assert_eq!(value["in_flight"], 2);
    assert_eq!(value["pods"], 1);
    assert_eq!(value["stable"]["concurrency"], 3.0);
    assert_eq!(value["panic"]["requests_per_second"], 7.0);
    assert_eq!((&value["desired_pods"], &value["panic_mode"]), (&1.into(), &false.into()), "one at once");
    assert_eq!(value["excess_burst_capacity"], serde_json::Value::Null);
    put(&state, "/v1/keys/ns/rev/settings", r#"{"target": 1, "target_utilization_percentage": 100}"#).await;
    state.keys.decide(now_ns());
    let (_, body) = read(&state, "/v1/keys/ns/rev").await;
    let decided: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!((&decided["desired_pods"], &decided["panic_mode"]), (&3.into(), &true.into()));
    assert_eq!(decided["excess_burst_capacity"], 1 - 211 - 3);
    assert!(value["last_report_age_ms"].as_u64().unwrap() < 60_000);
    let (_, all) = read(&state, "/v1/keys").await;
    assert_eq!(serde_json::from_str::<serde_json::Value>(&all).unwrap()["keys"][0]["name"], "rev");
}

#[tokio::test]
async fn names_in_paths_are_percent_encoded() {
    let state = state();
    send(&state, sample("outbound|80||a/b", 1).encode().unwrap()).await;
    assert_eq!(read(&state, "/v1/keys/ns/outbound%7C80%7C%7Ca%2Fb").await.0, StatusCode::OK);
    assert_eq!(read(&state, "/v1/keys/ns/none").await.0, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn names_that_no_path_can_have_are_in_the_query() {
    let state = state();
    send(&state, sample("..", 1).encode().unwrap()).await;
    let (status, key) = read(&state, "/v1/key?namespace=ns&name=..").await;
    assert!(status == StatusCode::OK && key.contains(r#""name":"..""#), "{key}");
    assert_eq!(read(&state, "/v1/key/history?name=%2E%2E&namespace=ns").await.0, StatusCode::OK);
    let path = "/v1/key/settings?namespace=ns&name=a%2F%26b";
    assert_eq!(put(&state, path, r#"{"target": 7}"#).await.0, StatusCode::OK);
    assert!(read(&state, "/v1/keys/ns/a%2F&b").await.1.contains(r#""target":7.0"#));
    for (query, mistake) in [
        ("namespace=ns", "`name` is missing from the query"),
        ("name=a", "`namespace` is missing from the query"),
        ("namespace=ns&name=a&name=b", "`name` is in the query more than once"),
    ] {
        let expected = format!("{mistake}; expected ?namespace=NAMESPACE&name=NAME\n");
        assert_eq!(read(&state, &format!("/v1/key?{query}")).await, (StatusCode::BAD_REQUEST, expected));
    }
    let (status, text) = read(&state, "/v1/keys/%ff/a").await;
    assert!(status == 400 && text.starts_with("invalid path: ") && text.ends_with("UTF-8\n"), "{text}");
    assert_eq!(read(&state, "/v1/key?namespace=ns&name=none").await.0, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn a_key_shows_who_reports_it() {
    let state = state();
    for (pod, from_gateway) in [("pod-2", false), ("gateway", true), ("pod-1", false)] {
        let mut report = sample("rev", 4);
        report.pod = pod.into();
        report.messages[0].from_gateway = from_gateway;
        (report.messages[0].until.proxied_requests, report.messages[0].until.proxied_in_flight) = (3, 1);
        send(&state, report.encode().unwrap()).await;
    }
    let json = async |path: &str| {
        let (status, body) = read(&state, path).await;
        assert_eq!(status, StatusCode::OK, "{body}");
        serde_json::from_str::<serde_json::Value>(&body).unwrap()
    };
    let key = json("/v1/keys/ns/rev").await;
    assert_eq!((&key["pods"], &key["gateways"], &key["proxied_share"]), (&2.into(), &1.into(), &0.75.into()));
    let first = json("/v1/keys/ns/rev/senders?limit=2").await;
    assert_eq!((&first["found"], &first["next"]), (&3.into(), &"pod-1".into()));
    let mut gateway = first["senders"][0].clone();
    assert!(gateway["last_report_age_ms"].take().as_u64().unwrap() < 60_000);
    let expected = serde_json::json!({"name": "gateway", "role": "gateway", "live": true, "in_flight": 2,
        "proxied_in_flight": 0, "average_concurrency": 3.0, "last_report_age_ms": null});
    assert_eq!(gateway, expected);
    let second = json("/v1/key/senders?namespace=ns&name=rev&limit=2&after=pod-1").await;
    assert_eq!((second["senders"].as_array().unwrap().len(), &second["next"]), (1, &serde_json::Value::Null));
    let pod = &second["senders"][0];
    assert_eq!((&pod["name"], &pod["role"]), (&"pod-2".into(), &"pod".into()));
    assert_eq!((&pod["in_flight"], &pod["proxied_in_flight"]), (&1.into(), &1.into()));
    // A key may be named like the list.
    assert_eq!(read(&state, "/v1/keys/ns/senders").await.0, StatusCode::NOT_FOUND);
    assert_eq!(read(&state, "/v1/keys/ns/none/senders").await.0, StatusCode::NOT_FOUND);
    for wrong in
        ["/v1/keys/ns/senders?limit=1", "/v1/keys/ns/rev/senders?limit=x", "/v1/key/senders?search=a"]
    {
        assert_eq!(read(&state, wrong).await.0, StatusCode::BAD_REQUEST, "{wrong}");
    }
}

#[tokio::test]
async fn settings_for_which_there_is_no_room_change_nothing() {
    let state = state();
    for number in 0..100 {
        send(&state, sample(&number.to_string(), 1).encode().unwrap()).await;
    }
    let (status, text) = put(&state, "/v1/keys/ns/more/settings", r#"{"target": 7}"#).await;
    assert_eq!(status, StatusCode::INSUFFICIENT_STORAGE, "{text}");
    assert!(text.contains("settings not stored: ") && text.contains("100 keys"), "{text}");
    assert_eq!(read(&state, "/v1/keys/ns/more/settings").await.0, StatusCode::NOT_FOUND);
    assert_eq!(put(&state, "/v1/keys/ns/7/settings", r#"{"target": 7}"#).await.0, StatusCode::OK);
}

#[tokio::test]
async fn after_a_start_a_key_is_active_before_it_is_known_how_many_pods_it_wants() {
    let state = state();
    // As if it had not quite started: however slow this machine is.
    state.keys.begin(now_ns() + 3_600_000_000_000);
    send(&state, sample("rev", 7).encode().unwrap()).await;
    state.keys.decide(now_ns());
    let value: serde_json::Value = serde_json::from_str(&read(&state, "/v1/keys/ns/rev").await.1).unwrap();

    assert_eq!(
        (&value["desired_pods"], &value["excess_burst_capacity"]),
        (&serde_json::Value::Null, &serde_json::Value::Null)
    );
    let (_, text) = read(&state, "/metrics").await;
    assert!(text.contains("key_pods{") && !text.contains("key_desired_pods{"), "{text}");
    assert_eq!(state.keys.read(&KeyName::new("ns", "rev"), |key| key.is_active(now_ns())), Some(true));
}

#[tokio::test]
async fn what_is_refused_says_why_and_changes_nothing() {
    let state = state();
    let mut unknown_version = sample("rev", 7).encode().unwrap();
    unknown_version[0] = 9;
    let mut broken = sample("rev", 7).encode().unwrap();
    broken.pop();
    let cases = [
        (unknown_version, StatusCode::BAD_REQUEST, "version 9"),
        (broken, StatusCode::BAD_REQUEST, "ends early"),
        (vec![], StatusCode::BAD_REQUEST, "empty"),
        (vec![1; inflight_stats::protocol::report::MAX_BYTES + 1], StatusCode::PAYLOAD_TOO_LARGE, "1048576"),
    ];
    for (body, status, reason) in cases {
        let (got, text) = send(&state, body).await;
        assert_eq!(got, status, "{text}");
        assert!(text.contains(reason), "{text}");
    }
    let request = Request::post("/v1/reports").header("content-type", "application/json");
    let (status, text) =
        ask(&state, request.body(Body::from(sample("rev", 7).encode().unwrap())).unwrap()).await;
    assert_eq!(status, StatusCode::UNSUPPORTED_MEDIA_TYPE, "{text}");
    assert_eq!(count(&state), 0);
}

#[tokio::test]
async fn of_a_report_with_a_key_that_went_back_the_others_are_taken() {
    let state = state();
    send(&state, sample("b", 7).encode().unwrap()).await;
    let mut report = sample("a", 5);
    report.messages.extend(sample("b", 3).messages);
    report.messages.extend(sample("c", 4).messages);
    report.messages[1].until.as_of_ns += 1;
    let (status, text) = send(&state, report.encode().unwrap()).await;
    assert_eq!((status, count(&state)), (StatusCode::CONFLICT, 3), "{text}");
    assert!(text.contains("ns/b") && text.contains("a counter decreased"), "{text}");
    let total =
        |name: &str| state.keys.view(&KeyName::new("ns", name), now_ns()).unwrap().figures.requests_total;
    assert_eq!([total("a"), total("b"), total("c")], [5, 7, 4]);
}

#[tokio::test]
async fn of_a_report_the_keys_that_are_granted_are_taken() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokens");
    std::fs::write(&file, "reporter-of-ns-0123 ns\n").unwrap();
    let state = state_with(Access::load(Some(&file), false, AnonymousAccess::Denied).unwrap()).1;
    let send = async |report: &Report| {
        let request = Request::post("/v1/reports").header("authorization", "Bearer reporter-of-ns-0123");
        ask(&state, request.body(Body::from(report.encode().unwrap())).unwrap()).await.0
    };
    let mut report = sample("a", 5);
    report.messages.extend(sample("b", 3).messages);
    report.messages[0].namespace = "other".into();
    let is_there =
        |namespace: &str, name: &str| state.keys.view(&KeyName::new(namespace, name), now_ns()).is_some();
    assert_eq!(send(&report).await, StatusCode::ACCEPTED);
    assert_eq!((is_there("other", "a"), is_there("ns", "b")), (false, true));
    report.messages.pop();
    assert_eq!((send(&report).await, is_there("other", "a")), (StatusCode::FORBIDDEN, false));
    assert_eq!((state.metrics.report_keys_forbidden.get(), state.metrics.unauthorized.get()), (2, 1));
}

#[tokio::test]
async fn who_shows_no_token_is_told_so_and_who_shows_an_unknown_one_as_well() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokens");
    std::fs::write(&file, "reporter-of-ns-0123 ns\n").unwrap();
    let state = state_with(Access::load(Some(&file), false, AnonymousAccess::Denied).unwrap()).1;
    let unauthorized = |reason: &str| (StatusCode::UNAUTHORIZED, format!("{reason}\n"));
    assert_eq!(read(&state, "/v1/keys").await, unauthorized("no bearer token"));
    let request = Request::get("/v1/keys").header("authorization", "Bearer reporter-of-ns-0124");
    let answer = ask(&state, request.body(Body::empty()).unwrap()).await;
    assert_eq!(answer, unauthorized("unknown bearer token"));
}

#[tokio::test]
async fn of_a_report_that_names_a_key_twice_or_comes_from_the_future_nothing_is_taken() {
    let state = state();
    let mut report = sample("a", 5);
    report.messages.extend(sample("b", 3).messages);
    report.messages.extend(sample("a", 6).messages);
    let (status, text) = send(&state, report.encode().unwrap()).await;
    assert_eq!((status, count(&state)), (StatusCode::BAD_REQUEST, 0), "{text}");
    assert!(text.contains("ns/a more than once"), "{text}");
    let mut report = sample("a", 5);
    report.messages[0].until.as_of_ns = u64::MAX;
    let (status, text) = send(&state, report.encode().unwrap()).await;
    assert_eq!((status, count(&state)), (StatusCode::BAD_REQUEST, 0), "{text}");
    assert!(text.contains("ahead of the receiver's clock"), "{text}");
    let hour = 3600 * 1_000_000_000;
    report.messages[0].until.as_of_ns = now_ns() + hour;
    assert_eq!(send(&state, report.encode().unwrap()).await.0, StatusCode::ACCEPTED, "an hour is no future");
}

#[tokio::test]
async fn health_and_probes() {
    let (trigger, state) = state_with(Access::load(None, false, AnonymousAccess::Full).unwrap());
    assert_eq!(read(&state, "/healthz").await.0, StatusCode::OK);
    assert_eq!(read(&state, "/readyz").await.0, StatusCode::OK);
    trigger.drain(Duration::ZERO, Duration::ZERO).await.unwrap();
    assert_eq!(read(&state, "/readyz").await.0, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(read(&state, "/nothing").await.0, StatusCode::NOT_FOUND);
    let probe = Request::get("/nothing").header("user-agent", "kube-probe/1.33").body(Body::empty()).unwrap();
    assert_eq!(ask(&state, probe).await.0, StatusCode::OK);
}

#[tokio::test]
async fn metrics_count_reports_by_their_answer() {
    let state = state();
    send(&state, sample("rev", 7).encode().unwrap()).await;
    send(&state, vec![]).await;
    let (_, text) = read(&state, "/metrics").await;
    assert!(text.contains("inflight_statserver_reports_total{code=\"202\"} 1\n"), "{text}");
    assert!(text.contains("inflight_statserver_reports_total{code=\"400\"} 1\n"), "{text}");
    assert!(text.contains("inflight_statserver_keys 1\n"), "{text}");
    let of_key = r#"inflight_statserver_key_stable_concurrency{namespace="ns",name="rev"} 3.0"#;
    assert!(text.contains(of_key), "{text}");
    let build = format!("inflight_build_info{{version=\"{}\"", env!("CARGO_PKG_VERSION"));
    assert!(text.contains(&build), "{text}");
    assert!(text.contains("\nprocess_cpu_seconds_total ") && text.contains("\nprocess_open_fds "), "{text}");
    assert!(!text.contains("key_panic_mode{"), "no decision yet: {text}");
    put(&state, "/v1/keys/ns/rev/settings", r#"{"target": 1, "target_utilization_percentage": 50}"#).await;
    state.keys.decide(now_ns());
    let (_, text) = read(&state, "/metrics").await;
    for line in [
        "key_panic_mode{namespace=\"ns\",name=\"rev\"} 1.0\n",
        "key_target{namespace=\"ns\",name=\"rev\"} 0.5\n",
    ] {
        assert!(text.contains(line), "{line} {text}");
    }
}

#[tokio::test]
async fn a_key_is_told_its_settings_and_told_otherwise() {
    let state = state();
    let path = "/v1/keys/ns/rev/settings";
    assert_eq!(read(&state, path).await.0, StatusCode::NOT_FOUND);
    let (status, text) = put(&state, path, r#"{"target": 7, "min_scale": 2}"#).await;
    assert_eq!(status, StatusCode::OK, "{text}");
    assert_eq!(read(&state, path).await, (StatusCode::OK, text));
    state.keys.decide(now_ns());
    let (_, key) = read(&state, "/v1/keys/ns/rev").await;
    let key: serde_json::Value = serde_json::from_str(&key).unwrap();
    assert_eq!((&key["settings"]["target"], &key["desired_pods"]), (&7.0.into(), &2.into()));
    assert_eq!(key["last_report_age_ms"], serde_json::Value::Null, "nobody has reported");
    let history: serde_json::Value =
        serde_json::from_str(&read(&state, "/v1/keys/ns/rev/history").await.1).unwrap();
    assert_eq!((&history["seconds_between"], &history["points"][0]["desired_pods"]), (&2.into(), &2.into()));

    for (json, reason) in [
        (r#"{"target": 0}"#, "`target` is 0; expected a number from 0.01 to 1000000000"),
        (r#"{"tarjet": 1}"#, "unknown key `tarjet`; did you mean `target`?"),
        ("{", "not JSON"),
        (&format!("[{}]", "1,".repeat(20_000)), "expected at most 16384 bytes (--max-settings-bytes)"),
        (&format!("{}1{}", "[".repeat(5_000), "]".repeat(5_000)), "not JSON"),
    ] {
        let (status, text) = put(&state, path, json).await;
        assert!(status.is_client_error() && text.contains(reason), "{status} {text}");
    }
    let (_, unchanged) = read(&state, path).await;
    assert!(unchanged.contains(r#""target":7.0"#), "{unchanged}");

    let delete = Request::delete(path).body(Body::empty()).unwrap();
    assert_eq!(ask(&state, delete).await.0, StatusCode::NO_CONTENT);
    assert!(read(&state, path).await.1.contains(r#""target":100.0"#));
}

#[tokio::test]
async fn keys_are_found_by_a_part_of_their_name_and_no_more_than_asked_for() {
    let state = state();
    for name in ["b", "a", "ab"] {
        send(&state, sample(name, 1).encode().unwrap()).await;
    }
    let names = async |query: &str| {
        let (_, text) = read(&state, &format!("/v1/keys{query}")).await;
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        let names =
            value["keys"].as_array().unwrap().iter().map(|key| key["name"].as_str().unwrap().to_owned());
        (names.collect::<Vec<_>>().join(" "), value["found"].as_u64().unwrap())
    };
    assert_eq!(names("").await, ("a ab b".into(), 3));
    assert_eq!(names("?limit=1").await, ("a".into(), 3));
    assert_eq!(names("?search=s%2Fa").await, ("a ab".into(), 2));
    assert_eq!(read(&state, "/v1/keys?limit=-1").await.0, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn the_page_loads_nothing_from_elsewhere() {
    let state = state();
    for path in ["/", "/page.css", "/page.js"] {
        let (status, text) = read(&state, path).await;
        assert_eq!(status, StatusCode::OK);
        let outside = text.matches("//").count() - text.matches(r#""http://www.w3.org/2000/svg""#).count();
        let comments = text.lines().filter(|line| line.trim_start().starts_with("// ")).count();
        assert_eq!(outside, comments, "{path}");
    }
}

#[tokio::test]
async fn with_tokens_nobody_gets_beyond_theirs() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokens");
    std::fs::write(
        &file,
        "reporter-of-ns-0123 ns\nadmin-of-all-012345 * admin\nelsewhere-0123456789 other\n",
    )
    .unwrap();
    let state = state_with(Access::load(Some(&file), false, AnonymousAccess::Full).unwrap()).1;
    let ask_as = async |token: &str, method: &str, path: &str, body: Vec<u8>| {
        let mut request = Request::builder().method(method).uri(path);
        if !token.is_empty() {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        ask(&state, request.body(Body::from(body)).unwrap()).await
    };
    let report = sample("rev", 7).encode().unwrap();
    let settings = r#"{"target": 3}"#.as_bytes().to_vec();
    let (reporter, admin, elsewhere) = ("reporter-of-ns-0123", "admin-of-all-012345", "elsewhere-0123456789");
    for (token, method, path, body, code) in [
        ("", "POST", "/v1/reports", &report, 401),
        (elsewhere, "POST", "/v1/reports", &report, 403),
        (reporter, "POST", "/v1/reports", &report, 202),
        ("", "GET", "/v1/keys/ns/rev", &vec![], 401),
        (elsewhere, "GET", "/v1/keys/ns/rev", &vec![], 403),
        (elsewhere, "GET", "/v1/keys/ns/rev/history", &vec![], 403),
        (elsewhere, "GET", "/v1/keys/ns/rev/settings", &vec![], 403),
        (reporter, "GET", "/v1/keys/ns/rev", &vec![], 200),
        (reporter, "PUT", "/v1/keys/ns/rev/settings", &settings, 403),
        (reporter, "DELETE", "/v1/keys/ns/rev/settings", &vec![], 403),
        (admin, "PUT", "/v1/keys/ns/rev/settings", &settings, 200),
        ("", "GET", "/", &vec![], 401),
        ("", "GET", "/page.js", &vec![], 401),
        ("", "GET", "/metrics", &vec![], 401),
        ("", "GET", "/v1/keys", &vec![], 401),
        (reporter, "GET", "/", &vec![], 200),
        ("", "GET", "/healthz", &vec![], 200),
        ("", "GET", "/readyz", &vec![], 200),
        ("", "GET", "/module/sha256", &vec![], 404),
        ("", "GET", "/module/inflight_filter.wasm", &vec![], 404),
    ] {
        let (status, text) = ask_as(token, method, path, body.clone()).await;
        assert_eq!(status.as_u16(), code, "{token} {method} {path}: {text}");
    }
    assert!(ask_as(elsewhere, "GET", "/v1/keys", vec![]).await.1.contains(r#""found":0"#));
    assert!(ask_as(reporter, "GET", "/v1/keys", vec![]).await.1.contains(r#""found":1"#));
    assert!(!ask_as(elsewhere, "GET", "/metrics", vec![]).await.1.contains("name=\"rev\""));
    let (_, metrics) = ask_as(admin, "GET", "/metrics", vec![]).await;
    assert!(metrics.contains("inflight_statserver_unauthorized_total 12\n"), "{metrics}");
    assert!(!metrics.contains("0123"), "no secret");
}

#[tokio::test]
async fn what_is_misspelt_is_refused_with_what_is_allowed() {
    let state = state();
    for (path, reason) in [
        ("/v1/keys?serach=x", "unknown parameter \"serach\"; did you mean `search`?"),
        ("/v1/keys?colour=red", "unknown parameter \"colour\"; expected one of search, limit, sort, state"),
        ("/v1/keys/ns/rev?limit=1", "unknown parameter \"limit\"; this path takes no parameters"),
        ("/v1/keys?limit=abc", "`limit` is \"abc\"; expected a whole number from 0 to 10000"),
        ("/v1/keys?limit=10001", "`limit` is \"10001\"; expected a whole number from 0 to 10000"),
        ("/v1/keys?limit=", "`limit` is \"\"; expected a whole number from 0 to 10000"),
    ] {
        let (status, text) = read(&state, path).await;
        assert_eq!((status, text.trim_end()), (StatusCode::BAD_REQUEST, reason));
    }
    let (status, text) = read(&state, "/v2/keys").await;
    assert!(status == 404 && text.contains("unknown path; expected /, "), "{status} {text}");
    let (status, text) = put(&state, "/v1/keys", "").await;
    assert!(status == 405 && text.contains("PUT is not allowed here"), "{status} {text}");
    assert_eq!(read(&state, "/v1/keys?search=a%2Fb&limit=0").await.0, 200);
}

#[tokio::test]
async fn a_list_has_a_hundred_keys_unless_it_is_asked_for_more() {
    let state = state();
    for number in 0..101 {
        let mut report = sample("rev", 1);
        report.messages[0].namespace = format!("ns-{number}");
        assert_eq!(send(&state, report.encode().unwrap()).await.0, 202);
    }
    let count = async |path: &str| {
        let json: serde_json::Value = serde_json::from_str(&read(&state, path).await.1).unwrap();
        (json["keys"].as_array().unwrap().len(), json["found"].as_u64())
    };
    assert_eq!(count("/v1/keys").await, (100, Some(101)));
    assert_eq!(count("/v1/keys?limit=1000").await, (101, Some(101)));
}

#[tokio::test]
async fn a_page_of_another_site_changes_nothing() {
    let state = state();
    let body = sample("rev", 5).encode().unwrap();
    let from = async |headers: &[(&str, &str)], upgrade: bool| {
        let mut request = Request::post("/v1/reports").header("host", "localhost:8080");
        if upgrade {
            request = Request::get("/").header("host", "localhost:8080").header("upgrade", "websocket");
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        ask(&state, request.body(Body::from(body.clone())).unwrap()).await
    };
    for headers in [
        &[("origin", "http://evil.example")][..],
        &[("origin", "null")],
        &[("origin", "http://localhost:8081")],
        &[("sec-fetch-site", "cross-site")],
        &[("sec-fetch-site", "same-site"), ("origin", "http://localhost:8080")],
    ] {
        for upgrade in [false, true] {
            let (status, text) = from(headers, upgrade).await;
            let (header, given) = headers[0];
            let reason = format!("cross-site request refused: {header} is {given}; expected ");
            assert!(status == 403 && text.starts_with(&reason), "{status} {text}");
        }
    }
    assert_eq!(count(&state), 0);
    for headers in [
        &[][..],
        &[("origin", "http://localhost:8080")],
        &[("origin", "https://localhost:8080"), ("sec-fetch-site", "same-origin")],
    ] {
        assert_eq!(from(headers, false).await.0, 202, "{headers:?}");
        let (status, text) = from(headers, true).await;
        assert!(status == 400 && text.starts_with("not a websocket handshake: "), "{status} {text}");
    }
    let request = Request::get("/v1/keys").header("origin", "http://evil.example");
    assert_eq!(
        ask(&state, request.body(Body::empty()).unwrap()).await.0,
        200,
        "a browser shows it to nobody"
    );
}

#[tokio::test]
async fn the_module_is_handed_out_to_everybody_as_it_was_read() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("module.wasm");
    let bytes = [&b"\0asm\x01\0\0\0"[..], &vec![7; 2 << 20]].concat();
    std::fs::write(&file, &bytes).unwrap();
    let module = FilterModule::load(&file).unwrap();
    let sha256 = module.sha256.clone();
    let tokens = folder.path().join("tokens");
    std::fs::write(&tokens, "reporter-of-ns-0123 ns").unwrap();
    let access = Access::load(Some(&tokens), false, AnonymousAccess::Denied).unwrap();
    let (_, state) = state_of(access, Some(module));
    let ask = async |method: &str, known: Option<String>| {
        let mut request = Request::builder().method(method).uri("/module/inflight_filter.wasm");
        if let Some(known) = known {
            request = request.header("if-none-match", known);
        }
        let request = request.header("accept-encoding", "gzip, br").body(Body::empty()).unwrap();
        router(Arc::clone(&state)).oneshot(request).await.unwrap()
    };
    let header = |answer: &Response, name: &str| answer.headers()[name].to_str().unwrap().to_owned();
    let tag = format!("\"{sha256}\"");
    for method in ["GET", "HEAD"] {
        let answer = ask(method, Some("\"another\"".into())).await;
        assert_eq!(answer.status(), 200);
        assert_eq!(header(&answer, "content-type"), "application/wasm");
        assert_eq!(header(&answer, "content-length"), bytes.len().to_string());
        assert_eq!(header(&answer, "etag"), tag);
        assert!(!answer.headers().contains_key("content-encoding"));
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        assert!(if method == "GET" { body == bytes } else { body.is_empty() });
    }
    for known in [tag.clone(), format!("\"x\", W/{tag}"), "*".into()] {
        let answer = ask("GET", Some(known)).await;
        assert_eq!((answer.status(), header(&answer, "etag")), (StatusCode::NOT_MODIFIED, tag.clone()));
        assert!(answer.into_body().collect().await.unwrap().to_bytes().is_empty());
    }
    assert_eq!(read(&state, "/module/sha256").await, (StatusCode::OK, format!("{sha256}\n")));
    assert_eq!(ask("POST", None).await.status(), 405);
    // Many at once take no more memory than one, and nothing of what other answers may take.
    let mut unread = Vec::new();
    for _ in 0..100 {
        unread.push(ask("GET", None).await);
        assert_eq!(unread.last().unwrap().status(), 200);
    }
    assert_eq!(state.response_budget.available(), 1 << 20);
}

#[tokio::test]
async fn without_a_module_the_answer_says_what_is_missing() {
    let state = state();
    for path in ["/module/inflight_filter.wasm", "/module/sha256"] {
        let (status, text) = read(&state, path).await;
        let reason = "this server has no module to hand out: it was started without --module\n";
        assert_eq!((status, text.as_str()), (StatusCode::NOT_FOUND, reason));
    }
}

#[tokio::test]
async fn answers_that_nobody_reads_take_no_more_than_they_may() {
    let state = state();
    let mut report = sample("rev", 1);
    report.messages[0].name = "n".repeat(500);
    assert_eq!(send(&state, report.encode().unwrap()).await.0, 202);
    let ask = async || {
        let request = Request::get("/metrics").body(Body::empty()).unwrap();
        router(Arc::clone(&state)).oneshot(request).await.unwrap()
    };
    let (mut unread, mut refused) = (Vec::new(), None);
    while refused.is_none() {
        let answer = ask().await;
        match answer.status() {
            StatusCode::OK => unread.push(answer),
            _ => refused = Some(answer),
        }
        assert!(unread.len() < 1_000, "more than a MiB");
    }
    let refused = refused.unwrap();
    assert_eq!(refused.status(), 503);
    let text = refused.into_body().collect().await.unwrap().to_bytes();
    assert!(String::from_utf8_lossy(&text).contains("--max-answer-bytes"));
    unread.pop();
    assert_eq!(ask().await.status(), 200, "one was read");
}
