//! Kubernetes' metrics APIs, asked as the kube-apiserver and the HPA controller were seen to ask.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use inflight_e2e::process::Process;
use inflight_e2e::reports::send;
use inflight_e2e::statserver::StatServer;
use inflight_e2e::tls::{Authority, Client, Identity};
use inflight_e2e::{http, statserver_program, wait};
use inflight_stats::{KeyReport, Report, Snapshot};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

const SETTLED: Duration = Duration::from_secs(40);
const SECOND: u64 = 1_000_000_000;
const EXTERNAL: &str = "/apis/external.metrics.k8s.io/v1beta1";
const CUSTOM: &str = "/apis/custom.metrics.k8s.io/v1beta2";
const HPA: &str = "system:serviceaccount:kube-system:horizontal-pod-autoscaler";

fn text(path: &Path) -> &str {
    path.to_str().expect("a path")
}

/// A cluster's two authorities: of the stats server's certificate, and of the front proxy's.
struct Cluster {
    folder: TempDir,
    serving: Authority,
    front_proxy: Authority,
    server: Identity,
    front_proxy_ca: PathBuf,
}

impl Cluster {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let (serving, front_proxy) = (Authority::new(), Authority::new());
        let server = serving.issue(folder.path(), "server");
        let front_proxy_ca = folder.path().join("front-proxy-ca.pem");
        std::fs::write(&front_proxy_ca, &front_proxy.pem).expect("a file");
        Self { folder, serving, front_proxy, server, front_proxy_ca }
    }

    fn flags(&self) -> Vec<&str> {
        let Identity { certificate, key } = &self.server;
        vec![
            "--stable-window",
            "10s",
            "--metrics-listen",
            "127.0.0.1:0",
            "--metrics-tls-cert",
            text(certificate),
            "--metrics-tls-key",
            text(key),
        ]
    }

    /// Starts a server that is told by flags who the front proxy is.
    async fn start(&self) -> StatServer {
        let ca = text(&self.front_proxy_ca);
        let front_proxy = ["--requestheader-client-ca-file", ca, "--requestheader-allowed-names"];
        let flags = [self.flags(), front_proxy.to_vec(), vec!["front-proxy-client,other-proxy"]].concat();
        StatServer::with(None, &flags).await
    }

    /// Returns a client with a certificate of this authority with this name.
    fn client(&self, authority: &Authority, name: &str) -> Client {
        self.serving.client(Some(&authority.issue(self.folder.path(), name)))
    }

    fn kube_apiserver(&self) -> Client {
        self.client(&self.front_proxy, "front-proxy-client")
    }
}

fn request(method: Method, path: &str) -> Request<Full<Bytes>> {
    // As the kube-apiserver sends it for the HPA controller.
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "inflight-statserver.inflight.svc")
        .header("x-remote-user", HPA)
        .header("x-remote-group", "system:serviceaccounts")
        .header("x-remote-group", "system:serviceaccounts:kube-system")
        .header("x-remote-group", "system:authenticated")
        .header("x-remote-uid", "b1d2")
        .header("x-remote-extra-authentication.kubernetes.io%2fcredential-id", "JTI=1")
        .header("accept", "application/vnd.kubernetes.protobuf, */*")
        .header("accept-encoding", "gzip")
        .header("user-agent", "kube-controller-manager/v1.36.2");
    request.body(Full::default()).expect("a request")
}

/// Returns the status and the document of an answer. Every answer is JSON, and names no time to try
/// again after.
async fn answer(client: &Client, to: SocketAddr, request: Request<Full<Bytes>>) -> (u16, Value) {
    let (head, body) = client.answer(to, request).await.expect("an answer").into_parts();
    assert_eq!(head.headers["content-type"], "application/json");
    assert!(!head.headers.contains_key("retry-after"), "{:?}", head.headers);
    let json = serde_json::from_slice(&body).unwrap_or_else(|e| panic!("{e}: {body:?}"));
    (head.status.as_u16(), json)
}

async fn get(client: &Client, to: SocketAddr, path: &str) -> (u16, Value) {
    answer(client, to, request(Method::GET, path)).await
}

/// Two pods with 20 and 15 requests in flight, and 40 and 60 requests a second, of the key tg/web.
/// The first has five more that a gateway counts under another key. They report each two seconds,
/// and the gateway does, which has none of this key.
fn report_web(server: SocketAddr, first_tick: u64) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(Duration::from_secs(2));
        for tick in first_tick.. {
            ticks.tick().await;
            for (pod, concurrency, requests, proxied) in
                [("pod-a", 20, 40, 5), ("pod-b", 15, 60, 0), ("gateway", 0, 0, 0)]
            {
                let snapshot = |tick: u64| Snapshot {
                    as_of_ns: (1 + tick * 2) * SECOND,
                    requests: tick * 2 * (requests + proxied),
                    proxied_requests: tick * 2 * proxied,
                    request_ns: u128::from(tick * 2 * (concurrency + proxied) * SECOND),
                    proxied_request_ns: u128::from(tick * 2 * proxied * SECOND),
                    in_flight: (concurrency + proxied) as u32,
                    proxied_in_flight: proxied as u32,
                };
                let (namespace, name) = ("tg".into(), "web".into());
                let (since, until) = (snapshot(tick), snapshot(tick + 1));
                let from_gateway = pod == "gateway";
                let messages = vec![KeyReport { namespace, name, from_gateway, since, until }];
                let report = Report { version: 1, pod: pod.into(), incarnation: 1, messages };
                send(server, &report).await;
            }
        }
    })
}

/// Takes the timestamps out of the items of a list, each of which is about now.
fn without_timestamps(mut list: Value) -> Value {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_secs();
    for item in list["items"].as_array_mut().expect("items") {
        let stamp = item.as_object_mut().expect("an item").remove("timestamp").expect("a timestamp");
        let stamp = stamp.as_str().expect("a text");
        let output = Command::new("date").args(["-u", "-d", stamp, "+%s"]).output().expect("date");
        let seconds: u64 = String::from_utf8_lossy(&output.stdout).trim().parse().expect("a time");
        assert!(now.abs_diff(seconds) <= 2 && stamp.len() == 20 && stamp.ends_with('Z'), "{stamp}");
    }
    list
}

async fn until_answered(client: &Client, to: SocketAddr, path: &str) -> Value {
    wait::until("an answer", SETTLED, || async move {
        let (status, json) = get(client, to, path).await;
        assert!(status == 200 || status == 404, "{json}");
        if status == 200 { Ok(json) } else { Err(json) }
    })
    .await
}

fn status(code: u16, reason: &str, message: &str) -> (u16, Value) {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code,
    });
    (code, status)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_request_of_an_hpa_is_answered_field_by_field() {
    let cluster = Cluster::new();
    let server = cluster.start().await;
    let (client, to) = (cluster.kube_apiserver(), server.metrics_api());

    // What the aggregator asks by itself.
    for (group, version) in [("external.metrics.k8s.io", "v1beta1"), ("custom.metrics.k8s.io", "v1beta2")] {
        let group_version = format!("{group}/{version}");
        let document = json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": []});
        assert_eq!(get(&client, to, &format!("/apis/{group_version}")).await, (200, document));
        let version = json!({"groupVersion": group_version, "version": version});
        let document = json!({"kind": "APIGroup", "apiVersion": "v1", "name": group, "versions": [version], "preferredVersion": version});
        assert_eq!(get(&client, to, &format!("/apis/{group}")).await, (200, document));
    }
    for path in ["/apis", "/openapi/v2", "/openapi/v3", "/", "/metrics", "/v1/keys", "/healthz"] {
        assert_eq!(get(&client, to, path).await, status(404, "NotFound", "there is nothing at this path"));
    }

    // Nothing is known of the key, then not enough.
    let concurrency = format!("{EXTERNAL}/namespaces/tg/inflight_concurrency?labelSelector=name%3Dweb");
    let message = "key tg/web: no pod or gateway has reported it";
    assert_eq!(get(&client, to, &concurrency).await, status(404, "NotFound", message));
    let reports = report_web(server.address, 0);
    wait::until("the first report", SETTLED, || async {
        server.key("tg", "web").await.map(drop).ok_or("no key")
    })
    .await;
    let message = "key tg/web: it was first reported less than a stable window ago, and pods or gateways may not have \
         reported it yet";
    assert_eq!(get(&client, to, &concurrency).await, status(404, "NotFound", message));
    until_answered(&client, to, &concurrency).await;

    let external = |metric: &str, window: u64, value: &str| {
        let labels = json!({"name": "web", "namespace": "tg"});
        let item = json!({"metricName": metric, "metricLabels": labels, "window": window, "value": value});
        json!({
            "kind": "ExternalMetricValueList", "apiVersion": "external.metrics.k8s.io/v1beta1",
            "metadata": {}, "items": [item],
        })
    };
    let list = async |path: String| {
        let (code, list) = get(&client, to, &path).await;
        assert_eq!(code, 200, "{path}: {list}");
        without_timestamps(list)
    };
    for (metric, window, value) in [
        ("inflight_concurrency", 10, "35"),
        ("inflight_requests_per_second", 10, "100"),
        ("inflight_in_flight", 0, "35"),
    ] {
        let path = format!("{EXTERNAL}/namespaces/tg/{metric}?labelSelector=name%3Dweb");
        assert_eq!(list(path).await, external(metric, window, value));
    }
    let desired = format!("{EXTERNAL}/namespaces/tg/inflight_desired_pods?labelSelector=name%3Dweb");
    wait::until_equal("desired pods", SETTLED, external("inflight_desired_pods", 0, "1"), || {
        list(desired.clone())
    })
    .await;
    // All kinds of requirements, as the HPA controller encodes them.
    for selector in [
        "name+in+%28web%29",
        "%21canary%2Cname%3Dweb%2Cnamespace%3Dtg",
        "model+notin+%28x%2Cy%29%2Cname%3Dweb%2Cnamespace+in+%28tg%2Cother%29%2Czone%21%3Da",
    ] {
        let path = format!("{EXTERNAL}/namespaces/tg/inflight_concurrency?labelSelector={selector}");
        assert_eq!(list(path).await, external("inflight_concurrency", 10, "35"), "{selector}");
    }

    let custom = |object: Value, selector: Value, metric: &str, window: u64, value: &str| {
        let metric = json!({"name": metric, "selector": selector});
        json!({"describedObject": object, "metric": metric, "windowSeconds": window, "value": value})
    };
    let custom_list = |items: Value| {
        json!({
            "kind": "MetricValueList", "apiVersion": "custom.metrics.k8s.io/v1beta2", "metadata": {},
            "items": items,
        })
    };
    let object = |kind: &str, name: &str, version: &str| json!({"kind": kind, "namespace": "tg", "name": name, "apiVersion": version});
    let by_name = json!({"matchLabels": {"name": "web"}});
    for (path, described, selector) in [
        ("services/web/inflight_concurrency", object("Service", "web", "v1"), Value::Null),
        ("deployments.apps/web/inflight_concurrency", object("Deployment", "web", "apps/v1"), Value::Null),
        (
            "ingresses.networking.k8s.io/main/inflight_concurrency?metricLabelSelector=name%3Dweb",
            object("Ingress", "main", "networking.k8s.io/v1"),
            by_name.clone(),
        ),
        (
            "metrics/inflight_concurrency?metricLabelSelector=name%3Dweb",
            object("Namespace", "tg", "v1"),
            by_name.clone(),
        ),
        (
            "rollouts.argoproj.io/web/inflight_concurrency",
            object("rollouts", "web", "argoproj.io"),
            Value::Null,
        ),
    ] {
        let item = custom(described, selector, "inflight_concurrency", 10, "35");
        assert_eq!(
            list(format!("{CUSTOM}/namespaces/tg/{path}")).await,
            custom_list(json!([item])),
            "{path}"
        );
    }
    // Pods: all of their requests, those that a gateway counts included.
    for (metric, values) in [
        ("inflight_concurrency", ["25", "15"]),
        ("inflight_requests_per_second", ["45", "60"]),
        ("inflight_in_flight", ["25", "15"]),
    ] {
        let path = format!(
            "{CUSTOM}/namespaces/tg/pods/%2A/{metric}?labelSelector=app%3Dt6&metricLabelSelector=name%3Dweb"
        );
        let item = |pod, value| custom(object("Pod", pod, "v1"), by_name.clone(), metric, 0, value);
        let items = json!([item("pod-a", values[0]), item("pod-b", values[1])]);
        assert_eq!(list(path).await, custom_list(items));
        let path = format!("{CUSTOM}/namespaces/tg/pods/pod-b/{metric}?metricLabelSelector=name%3Dweb");
        assert_eq!(list(path).await, custom_list(json!([item("pod-b", values[1])])));
    }

    // Everything else is an error that says what is wrong, and never a value.
    let known =
        "inflight_concurrency, inflight_requests_per_second, inflight_desired_pods, inflight_in_flight";
    let not_named = "the metric's selector names no key; expected name=KEY";
    let no_model = "no key has a label \"model\"; the labels of a key are name and namespace";
    let elsewhere = "the selector is about another namespace; the path has tg";
    for (path, code, reason, message) in [
        ("EXT/inflight_concurrency", 404, "NotFound", not_named.to_owned()),
        ("EXT/inflight_concurrency?labelSelector=", 404, "NotFound", not_named.to_owned()),
        ("EXT/inflight_concurrency?labelSelector=name", 404, "NotFound", not_named.to_owned()),
        (
            "EXT/inflight_concurrency?labelSelector=model+in+%28x%2Cy%29%2Cname%3Dweb",
            404,
            "NotFound",
            no_model.to_owned(),
        ),
        (
            "EXT/inflight_concurrency?labelSelector=name%3Dweb%2Cnamespace%3Dother",
            403,
            "Forbidden",
            elsewhere.to_owned(),
        ),
        (
            "EXT/queue?labelSelector=name%3Dweb",
            404,
            "NotFound",
            format!("unknown metric \"queue\"; expected one of {known}"),
        ),
        (
            "EXT/inflight_concurrency?labelSelector=name%3Dnobody",
            404,
            "NotFound",
            "key tg/nobody: no pod or gateway has reported it".into(),
        ),
        (
            "EXT/inflight_concurrency?labelSelector=name+in+%28nobody%2Cweb%29",
            404,
            "NotFound",
            "key tg/nobody: no pod or gateway has reported it".into(),
        ),
        (
            "CUS/services/nobody/inflight_concurrency",
            404,
            "NotFound",
            "key tg/nobody: no pod or gateway has reported it".into(),
        ),
        (
            "CUS/ingresses.networking.k8s.io/main/p99.latency?metricLabelSelector=route%3Dr1",
            404,
            "NotFound",
            format!("unknown metric \"p99.latency\"; expected one of {known}"),
        ),
        ("CUS/metrics/inflight_concurrency", 404, "NotFound", not_named.to_owned()),
        ("CUS/pods/%2A/inflight_concurrency?labelSelector=app%3Dt6", 404, "NotFound", not_named.to_owned()),
        (
            "CUS/pods/%2A/inflight_desired_pods?metricLabelSelector=name%3Dweb",
            404,
            "NotFound",
            "inflight_desired_pods is no metric of a pod".into(),
        ),
        (
            "CUS/pods/pod-c/inflight_in_flight?metricLabelSelector=name%3Dweb",
            404,
            "NotFound",
            "key tg/web: no such pod reports it".into(),
        ),
        (
            "CUS/services/web/inflight_concurrency?watch=true",
            405,
            "MethodNotAllowed",
            "only GET is allowed here, without watch".into(),
        ),
    ] {
        let path = path.replace("EXT", &format!("{EXTERNAL}/namespaces/tg"));
        let path = path.replace("CUS", &format!("{CUSTOM}/namespaces/tg"));
        assert_eq!(get(&client, to, &path).await, status(code, reason, &message), "{path}");
    }
    let (code, json) = get(&client, to, &format!("{concurrency}%2C%2C")).await;
    assert_eq!((code, &json["reason"]), (400, &json!("BadRequest")), "{json}");
    let (code, _) = get(&client, to, &format!("{EXTERNAL}/namespaces/%ff/inflight_concurrency")).await;
    assert_eq!(code, 400);
    for method in [Method::POST, Method::PUT, Method::DELETE, Method::PATCH] {
        let refused = answer(&client, to, request(method.clone(), &concurrency)).await;
        let message = "only GET is allowed here, without watch";
        assert_eq!(refused, status(405, "MethodNotAllowed", message), "{method}");
    }

    // Reports stop: that is an error, not a zero. They come back.
    reports.abort();
    let silent = Instant::now();
    wait::until("it is stale", SETTLED, || async {
        let (code, json) = get(&client, to, &concurrency).await;
        match json["message"].as_str().filter(|_| code == 404) {
            Some(message) => {
                assert!(message.starts_with("key tg/web: its pods and gateways fell silent "), "{message}");
                Ok(())
            }
            None => {
                // A pod may have reported a second before the other.
                let value = json["items"][0]["value"].as_str().and_then(|value| value.parse::<f64>().ok());
                assert!(value.is_some_and(|value| value > 30.0), "not less in between: {json}");
                Err(json)
            }
        }
    })
    .await;
    println!("stale after {:?}", silent.elapsed());
    for path in ["services/web/inflight_in_flight", "services/web/inflight_desired_pods"] {
        assert_eq!(get(&client, to, &format!("{CUSTOM}/namespaces/tg/{path}")).await.0, 404);
    }
    let pods = format!("{CUSTOM}/namespaces/tg/pods/%2A/inflight_in_flight?metricLabelSelector=name%3Dweb");
    assert_eq!(get(&client, to, &pods).await.0, 404);
    let reports = report_web(server.address, 20);
    let list = until_answered(&client, to, &concurrency).await;
    assert_eq!(without_timestamps(list), external("inflight_concurrency", 10, "35"));
    reports.abort();
}

async fn counted(server: &StatServer, metric: &str) -> u64 {
    let metrics = http::get(server.address, "/metrics").await.expect("metrics");
    let line = metrics.lines().find_map(|line| line.strip_prefix(metric)?.strip_prefix("_total "));
    line.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("{metric} in\n{metrics}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_but_the_front_proxy_is_answered() {
    let cluster = Cluster::new();
    let server = cluster.start().await;
    let (path, to) = (format!("{EXTERNAL}/namespaces/tg/inflight_concurrency"), server.metrics_api());
    let unauthorized = async || counted(&server, "inflight_statserver_unauthorized").await;
    let known = cluster.kube_apiserver();
    assert_eq!(get(&known, to, &path).await.0, 404, "authenticated");
    assert_eq!(get(&cluster.client(&cluster.front_proxy, "other-proxy"), to, &path).await.0, 404);
    assert_eq!(unauthorized().await, 0);

    // Headers mean nothing without a certificate.
    let nobody = cluster.serving.client(None);
    let message = "no client certificate of the request-header CA";
    assert_eq!(get(&nobody, to, &path).await, status(401, "Unauthorized", message));
    assert_eq!(unauthorized().await, 1);
    let other_name = cluster.client(&cluster.front_proxy, "somebody");
    let message = "the common name of the client certificate is not allowed";
    assert_eq!(get(&other_name, to, &path).await, status(403, "Forbidden", message));
    let without_user = || {
        let mut request = request(Method::GET, &path);
        request.headers_mut().remove("x-remote-user");
        request
    };
    let refused = answer(&known, to, without_user()).await;
    assert_eq!(refused, status(401, "Unauthorized", "no X-Remote-User header"));
    let mut empty = without_user();
    empty.headers_mut().insert("x-remote-user", "".parse().expect("a value"));
    assert_eq!(answer(&known, to, empty).await.0, 401);
    assert_eq!(unauthorized().await, 4);

    // Another authority's certificates end the handshake, whatever their names.
    let failed = counted(&server, "inflight_statserver_tls_handshakes_failed").await;
    for authority in [&cluster.serving, &Authority::new()] {
        let stranger = cluster.client(authority, "front-proxy-client");
        assert!(stranger.answer(to, request(Method::GET, &path)).await.is_err());
    }
    wait::until_equal("failed handshakes", SETTLED, failed + 2, || {
        counted(&server, "inflight_statserver_tls_handshakes_failed")
    })
    .await;
    assert!(http::get(to, &path).await.is_err(), "without TLS");
    // A certificate for this address is none for the others.
    assert_eq!(http::get(server.address, &path).await.map_err(|error| error.starts_with("404")), Err(true));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_the_front_proxys_authority_takes_effect_on_open_connections_too() {
    let cluster = Cluster::new();
    let server = cluster.start().await;
    let (path, to) = (format!("{EXTERNAL}/namespaces/tg/inflight_concurrency"), server.metrics_api());
    let known = cluster.kube_apiserver();
    let open = known.connect(to).await.expect("a connection");
    let (mut sender, connection) = http1::handshake(TokioIo::new(open)).await.expect("HTTP");
    let connection = tokio::spawn(connection);
    let mut ask = async || {
        let response = sender.send_request(request(Method::GET, &path)).await.expect("an answer");
        let status = response.status().as_u16();
        response.into_body().collect().await.expect("a body");
        status
    };
    assert_eq!(ask().await, 404);
    // As kubeadm does it: first both, then the new one alone.
    let new = Authority::new();
    let client = cluster.client(&new, "front-proxy-client");
    let allowed =
        async || client.answer(to, request(Method::GET, &path)).await.map(|answer| answer.status().as_u16());
    assert!(allowed().await.is_err());
    std::fs::write(&cluster.front_proxy_ca, cluster.front_proxy.pem.clone() + &new.pem).expect("a file");
    wait::until_equal("the new authority", SETTLED, Ok(404), allowed).await;
    assert_eq!(ask().await, 404, "the old one still");
    std::fs::write(&cluster.front_proxy_ca, &new.pem).expect("a file");
    let old = async || known.answer(to, request(Method::GET, &path)).await.is_err();
    wait::until_equal("the old authority is refused", SETTLED, true, old).await;
    assert_eq!(ask().await, 401);
    // A wrong file changes nothing.
    std::fs::write(&cluster.front_proxy_ca, "nothing").expect("a file");
    wait::until("the wrong file is found", SETTLED, || {
        let log = server.process.log();
        async move {
            let found = log.contains("cannot load the changed certificates; keeping the old ones");
            if found { Ok(()) } else { Err(log) }
        }
    })
    .await;
    assert_eq!(allowed().await, Ok(404));
    connection.abort();
}

/// A kube-apiserver that has one ConfigMap, for whoever shows the token.
async fn serve_config_map(identity: &Identity, token: &str, data: Arc<Mutex<Value>>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let (acceptor, token) = (identity.acceptor(), format!("Bearer {token}"));
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.expect("a connection");
            let (acceptor, token, data) = (acceptor.clone(), token.clone(), Arc::clone(&data));
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(stream).await else { return };
                let service = service_fn(move |request: Request<hyper::body::Incoming>| {
                    let path = "/api/v1/namespaces/kube-system/configmaps/extension-apiserver-authentication";
                    let is_allowed =
                        request.headers().get("authorization").is_some_and(|sent| *sent == *token);
                    let (code, body) = match request.uri().path() == path && request.method() == Method::GET {
                        _ if !is_allowed => (StatusCode::UNAUTHORIZED, json!({"kind": "Status"})),
                        true => {
                            let data = data.lock().expect("data").clone();
                            (StatusCode::OK, json!({"kind": "ConfigMap", "apiVersion": "v1", "data": data}))
                        }
                        false => (StatusCode::FORBIDDEN, json!({"kind": "Status"})),
                    };
                    let response =
                        Response::builder().status(code).header("content-type", "application/json");
                    let response = response.body(Full::new(Bytes::from(body.to_string())));
                    std::future::ready(response)
                });
                let _ = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_a_cluster_the_front_proxy_is_known_by_the_config_map() {
    let cluster = Cluster::new();
    let folder = cluster.folder.path().join("service-account");
    std::fs::create_dir(&folder).expect("a folder");
    let of_cluster = Authority::new();
    let data = |authority: &Authority, names: &str| {
        json!({
            "client-ca-file": "of users",
            "requestheader-client-ca-file": authority.pem,
            "requestheader-allowed-names": names,
            "requestheader-extra-headers-prefix": "[\"X-Remote-Extra-\"]",
            "requestheader-group-headers": "[\"X-Remote-Group\"]",
            "requestheader-username-headers": "[\"X-Remote-User\"]",
        })
    };
    let shown = Arc::new(Mutex::new(data(&cluster.front_proxy, "[\"front-proxy-client\"]")));
    let api = serve_config_map(&of_cluster.issue(&folder, "api"), "pod-token", Arc::clone(&shown)).await;
    std::fs::write(folder.join("ca.crt"), &cluster.serving.pem).expect("a file");
    std::fs::write(folder.join("token"), "old-token\n").expect("a file");
    let flags = [cluster.flags(), vec!["--service-account-dir", text(&folder)]].concat();
    let environment = [
        ("KUBERNETES_SERVICE_HOST", api.ip().to_string().into()),
        ("KUBERNETES_SERVICE_PORT", api.port().to_string().into()),
    ];
    let server = StatServer::launch(None, &flags, &environment).await;
    let (path, to) = (format!("{EXTERNAL}/namespaces/tg/inflight_concurrency"), server.metrics_api());
    let known = cluster.kube_apiserver();
    let status_of = async |client: &Client| {
        client.answer(to, request(Method::GET, &path)).await.ok().map(|answer| answer.status().as_u16())
    };
    let logged = async |text: &str| {
        wait::until(text, SETTLED, || {
            let log = server.process.log();
            async move { if log.contains(text) { Ok(()) } else { Err(log) } }
        })
        .await;
    };
    // The server's certificate is not of the cluster's CA, then the token is wrong: nobody is known.
    logged("invalid peer certificate").await;
    assert_eq!(status_of(&known).await, Some(401));
    std::fs::write(folder.join("ca.crt"), &of_cluster.pem).expect("a file");
    logged("the answer is 401 Unauthorized; expected 200").await;
    assert_eq!(status_of(&known).await, Some(401));
    std::fs::write(folder.join("token"), "pod-token\n").expect("a file");
    wait::until_equal("the front proxy", SETTLED, Some(404), || status_of(&known)).await;
    let other = cluster.client(&cluster.front_proxy, "somebody");
    assert_eq!(status_of(&other).await, Some(403));
    assert!(!server.process.log().contains("-token"), "no secret in the log");

    // Both change while it runs.
    *shown.lock().expect("data") = data(&cluster.front_proxy, "[]");
    wait::until_equal("any name", SETTLED, Some(404), || status_of(&other)).await;
    let new = Authority::new();
    *shown.lock().expect("data") = data(&new, "[\"front-proxy-client\"]");
    let of_new = cluster.client(&new, "front-proxy-client");
    wait::until_equal("the new authority", SETTLED, Some(404), || status_of(&of_new)).await;
    assert_eq!(status_of(&known).await, None);
    // What is wrong changes nothing.
    *shown.lock().expect("data") = json!({});
    logged("missing field").await;
    assert_eq!(status_of(&of_new).await, Some(404));
}

#[test]
fn without_tls_or_a_front_proxy_the_server_does_not_start() {
    let cluster = Cluster::new();
    let (listen, ca) = (["--metrics-listen", "127.0.0.1:0"], text(&cluster.front_proxy_ca));
    for (flags, reason) in [
        (listen.to_vec(), "--metrics-listen requires TLS"),
        (
            [listen.to_vec(), vec!["--requestheader-client-ca-file", ca]].concat(),
            "--metrics-listen requires TLS",
        ),
        (cluster.flags(), "--metrics-listen has to know the kube-apiserver's front proxy"),
        (
            [cluster.flags(), vec!["--requestheader-client-ca-file", "/nowhere"]].concat(),
            "--requestheader-client-ca-file /nowhere: No such file",
        ),
        (
            [cluster.flags(), vec!["--requestheader-client-ca-file", text(&cluster.server.key)]].concat(),
            "expected a certificate in PEM",
        ),
    ] {
        let mut command = Command::new(statserver_program());
        command.args(["--listen", "127.0.0.1:0", "--grpc-listen", "127.0.0.1:0"]).args(&flags);
        let mut process = Process::start(&mut command, &cluster.folder.path().join("log"));
        assert!(!process.wait(SETTLED).success(), "{flags:?}");
        let log = process.log();
        assert!(log.contains(reason) && log.lines().count() == 1, "{flags:?}: {log}");
    }
}
