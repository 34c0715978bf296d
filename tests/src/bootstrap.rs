//! The shipped Envoy configuration, with the addresses of a test in it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::{built, root, truth};

/// The cluster of the one service behind the shipped gateways.
pub const CLUSTER: &str = "outbound|80||hello-00001.default.svc.cluster.local";

/// The cluster that Istio makes for the stats server's Service.
const ISTIO_STATSERVER: &str = "outbound|8080||inflight-statserver.inflight.svc.cluster.local";

/// The cluster that Envoy Gateway makes for the HTTPRoute `hello` in the namespace `default`.
const HTTP_ROUTE: &str = "httproute/default/hello/rule/0";

/// The token that stands in the shipped files, to be replaced.
pub const TOKEN: &str = "the-token-of-the-envoys";

/// Nobody listens here.
pub const NOBODY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9);

/// An Envoy bootstrap that is changed step by step.
#[derive(Clone, Debug)]
pub struct Bootstrap(pub Value);

/// Returns a YAML document below `envoy/`, as JSON.
///
/// # Panics
/// If it does not exist or is not YAML.
pub fn shipped(name: &str) -> Value {
    let path = root().join("envoy").join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_norway::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Returns the first document of a kind in a file below `deploy/`.
///
/// # Panics
/// If there is none.
pub fn deployed(file: &str, kind: &str) -> Value {
    let path = root().join("deploy").join(file);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let documents = text.split("\n---\n").map(|document| {
        serde_norway::from_str(document).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    });
    let mut documents = documents.filter(|document: &Value| document["kind"] == kind);
    documents.next().unwrap_or_else(|| panic!("{} has no {kind}", path.display()))
}

/// Returns the value at a JSON pointer.
///
/// # Panics
/// If there is none.
pub fn at<'a>(value: &'a mut Value, pointer: &str) -> &'a mut Value {
    value.pointer_mut(pointer).unwrap_or_else(|| panic!("nothing at {pointer}"))
}

/// Returns the value that an EnvoyFilter inserts.
fn patch(document: &Value, apply_to: &str) -> Value {
    let patches = document["spec"]["configPatches"].as_array().expect("configPatches");
    let patch = patches.iter().find(|p| p["applyTo"] == apply_to).expect("the patch");
    patch["patch"]["value"].clone()
}

/// Returns the stats configuration in the bootstrap of an Istio proxy (istio/istio,
/// `tools/packaging/common/envoy_bootstrap.json` and `pkg/bootstrap/config.go`) whose pod has these
/// annotations.
fn istio_stats_config(annotations: &Value) -> Value {
    let annotation = |name| annotations[name].as_str().expect("a string");
    let mut tags = vec![
        json!({"tag_name": "cluster_name", "regex": r"^cluster\.((.+?(\..+?\.svc\.cluster\.local)?)\.)"}),
        json!({"tag_name": "response_code", "regex": r"_rq(_(\d{3}))$"}),
        json!({"tag_name": "response_code_class", "regex": r"_rq(_(\dxx))$"}),
    ];
    for name in annotation("sidecar.istio.io/extraStatTags").split(',') {
        tags.push(json!({"tag_name": name, "regex": format!(r"({name}=\.=(.*?);\.;)")}));
    }
    for name in ["cache", "component", "wasm_filter"] {
        tags.push(json!({"tag_name": name, "regex": format!(r"({name}\.(.+?)\.)")}));
    }
    let buckets: Value =
        serde_json::from_str(annotation("sidecar.istio.io/statsHistogramBuckets")).expect("JSON");
    let buckets = buckets.as_object().expect("an object").iter();
    let buckets: Vec<Value> =
        buckets.map(|(prefix, buckets)| json!({"match": {"prefix": prefix}, "buckets": buckets})).collect();
    json!({"use_all_default_tags": false, "stats_tags": tags, "histogram_bucket_settings": buckets})
}

/// Merges a value into another, as an EnvoyFilter's `MERGE` does.
fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key.as_str()).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from.clone(),
    }
}

/// Returns the endpoints of a cluster, as Envoy has them.
fn assignment(cluster: &str, endpoints: &[SocketAddr]) -> Value {
    let endpoints: Vec<Value> = endpoints
        .iter()
        .map(|a| {
            let address = json!({"address": a.ip().to_string(), "port_value": a.port()});
            json!({"lb_endpoints": [{"endpoint": {"address": {"socket_address": address}}}]})
        })
        .collect();
    json!({"cluster_name": cluster, "endpoints": endpoints})
}

/// Replaces a file with a configuration. Envoy reads it when another file is renamed to its name.
fn replace(path: &Path, document: &Value) {
    let new = path.with_extension("new");
    std::fs::write(&new, document.to_string()).expect("a file");
    std::fs::rename(&new, path).expect("a file");
}

/// A file with the endpoints of a cluster, in a folder of its own.
#[derive(Debug)]
pub struct EndpointFile {
    path: PathBuf,
    _folder: TempDir,
}

impl EndpointFile {
    /// Returns a file that does not exist yet ([`Bootstrap::endpoints_from`]).
    ///
    /// # Panics
    /// If there can be no folder.
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        Self { path: folder.path().join("endpoints.json"), _folder: folder }
    }

    /// Sets the endpoints of the cluster.
    ///
    /// # Panics
    /// If the file cannot be written.
    pub fn set(&self, cluster: &str, endpoints: &[SocketAddr]) {
        let mut resource = assignment(cluster, endpoints);
        resource["@type"] = json!("type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment");
        self.write(&json!({"resources": [resource]}));
    }

    fn write(&self, document: &Value) {
        replace(&self.path, document);
    }
}

impl Default for EndpointFile {
    fn default() -> Self {
        Self::new()
    }
}

const MANAGER: &str = "/static_resources/listeners/0/filter_chains/0/filters/0/typed_config";

impl Bootstrap {
    /// Returns `envoy/envoy.yaml`, on free ports, with the built module and an access log in
    /// [`truth::FORMAT`].
    pub fn sidecar(app: SocketAddr, statserver: SocketAddr) -> Self {
        let mut bootstrap = Self(shipped("envoy.yaml"));
        bootstrap.on_free_ports();
        bootstrap.cluster("app", Some(app));
        bootstrap.cluster("inflight-statserver", Some(statserver));
        bootstrap.cluster("nohosts", None);
        bootstrap.module(&built("wasm32-wasip1/release/inflight_filter.wasm"));
        // Without this, a response that was cut short would occupy its client for another second.
        at(&mut bootstrap.0, MANAGER)["delayed_close_timeout"] = json!("0s");
        // Two more ways for a request to end, which need Envoy's help.
        bootstrap.local_route();
        let nohosts = json!({"match": {"prefix": "/nohosts"}, "route": {"cluster": "nohosts"}});
        bootstrap.route(nohosts);
        bootstrap
    }

    /// Returns [`Bootstrap::sidecar`] with the filter of an EnvoyFilter, Istio's cluster of the stats
    /// server and Istio's stats tags.
    ///
    /// # Panics
    /// If the EnvoyFilters do not have them.
    pub fn istio(app: SocketAddr, statserver: SocketAddr) -> Self {
        let mut bootstrap = Self::sidecar(app, statserver);
        let mut exporter = patch(&shipped("istio/exporter.yaml"), "LISTENER");
        *at(&mut exporter, "/address/socket_address") = json!({"address": "127.0.0.1", "port_value": 0});
        *at(&mut bootstrap.0, "/static_resources/listeners/1") = exporter;
        bootstrap.patch_in("istio/sidecar.yaml", statserver);
        bootstrap.0["node"] = json!({"id": "sidecar", "cluster": "cart.shop", "metadata": {
            "NAMESPACE": "shop",
            "NAME": "cart-v2-7d9f-x2x4p",
            "WORKLOAD_NAME": "cart-v2",
            "LABELS": {"service.istio.io/canonical-name": "cart", "service.istio.io/canonical-revision": "v2"},
        }});
        bootstrap
    }

    /// Returns [`Bootstrap::istio`] with the module from where the EnvoyFilters fetch it: the stats
    /// server, which must have one of this digest.
    ///
    /// # Panics
    /// If the EnvoyFilters fetch it from different places.
    pub fn istio_fetching(app: SocketAddr, statserver: SocketAddr, sha256: &str) -> Self {
        let mut bootstrap = Self::istio(app, statserver);
        let code = "/typed_config/config/vm_config/code";
        let filter = "/filter_chains/0/filters/0/typed_config/http_filters/0";
        let mut fetched = at(&mut patch(&shipped("istio/sidecar.yaml"), "HTTP_FILTER"), code).take();
        let mut exporter = patch(&shipped("istio/exporter.yaml"), "LISTENER");
        assert_eq!(fetched, *at(&mut exporter, &format!("{filter}{code}")), "one VM has one module");
        *at(&mut fetched, "/remote/sha256") = json!(sha256);
        for listener in at(&mut bootstrap.0, "/static_resources/listeners").as_array_mut().expect("listeners")
        {
            *at(listener, &format!("{filter}{code}")) = fetched.clone();
        }
        bootstrap
    }

    /// Gives a cluster one endpoint or none. Adds the cluster if the configuration does not have
    /// it.
    pub fn cluster(&mut self, name: &str, endpoint: Option<SocketAddr>) {
        self.endpoints(name, endpoint.as_slice());
    }

    /// Gives a cluster these endpoints.
    pub fn endpoints(&mut self, name: &str, endpoints: &[SocketAddr]) {
        let assignment = assignment(name, endpoints);
        let clusters = at(&mut self.0, "/static_resources/clusters").as_array_mut().expect("clusters");
        match clusters.iter_mut().find(|cluster| cluster["name"] == name) {
            Some(cluster) => cluster["load_assignment"] = assignment,
            None => clusters.push(json!({"name": name, "type": "STATIC", "load_assignment": assignment})),
        }
    }

    /// Returns a cluster.
    ///
    /// # Panics
    /// If there is none of that name.
    pub fn find_cluster(&mut self, name: &str) -> &mut Value {
        let clusters = at(&mut self.0, "/static_resources/clusters").as_array_mut().expect("clusters");
        clusters.iter_mut().find(|cluster| cluster["name"] == name).expect("the cluster")
    }

    /// Returns the first listener's HTTP connection manager.
    pub fn manager(&mut self) -> &mut Value {
        at(&mut self.0, MANAGER)
    }

    /// Makes Envoy read the endpoints of a cluster from a file, and again whenever the file is
    /// replaced.
    pub fn endpoints_from(&mut self, name: &str, endpoints: &EndpointFile) {
        let fields = self.find_cluster(name).as_object_mut().expect("an object");
        fields.remove("load_assignment");
        fields.insert("type".into(), json!("EDS"));
        let config = json!({"path_config_source": {"path": endpoints.path}});
        fields.insert("eds_cluster_config".into(), json!({"service_name": name, "eds_config": config}));
        endpoints.set(name, &[]);
        self.with_a_node();
    }

    /// Returns `envoy/gateway.yaml`, on free ports, with the built module, and with its one service
    /// at `upstream`.
    pub fn gateway(upstream: SocketAddr, statserver: SocketAddr) -> Self {
        let mut bootstrap = Self(shipped("gateway.yaml"));
        bootstrap.on_free_ports();
        bootstrap.cluster(CLUSTER, Some(upstream));
        bootstrap.cluster("inflight-statserver", Some(statserver));
        bootstrap.module(&built("wasm32-wasip1/release/inflight_filter.wasm"));
        bootstrap.local_route();
        bootstrap
    }

    /// Returns [`Bootstrap::gateway`] that holds requests. The endpoints of its one service are read
    /// from `endpoints`, at first none.
    pub fn holding(endpoints: &EndpointFile, statserver: SocketAddr, hold: Value) -> Self {
        let mut bootstrap = Self::gateway(NOBODY, statserver);
        bootstrap.endpoints_from(CLUSTER, endpoints);
        bootstrap.configure("gateway", json!({"hold": hold}));
        bootstrap.evenly();
        bootstrap
    }

    /// Returns [`Bootstrap::gateway`] with the filter of the EnvoyFilter for an Istio ingress gateway,
    /// Istio's cluster of the stats server and Istio's stats tags.
    ///
    /// # Panics
    /// If the EnvoyFilters do not have them.
    pub fn istio_gateway(upstream: SocketAddr, statserver: SocketAddr) -> Self {
        let mut bootstrap = Self::gateway(upstream, statserver);
        bootstrap.patch_in("istio/gateway.yaml", statserver);
        bootstrap.0["node"] =
            json!({"id": "gw", "cluster": "gw", "metadata": {"NAMESPACE": "mesh", "NAME": "gw-7"}});
        bootstrap
    }

    /// Returns `envoy/scale-to-zero.yaml`, on free ports, with the built module. The endpoints of its
    /// one service are read from `endpoints`, at first `envoy/endpoints.yaml`.
    pub fn scale_to_zero(endpoints: &EndpointFile, statserver: SocketAddr) -> Self {
        let mut bootstrap = Self(shipped("scale-to-zero.yaml"));
        bootstrap.on_free_ports();
        endpoints.write(&shipped("endpoints.yaml"));
        let path = "/static_resources/clusters/0/eds_cluster_config/eds_config/path_config_source/path";
        *at(&mut bootstrap.0, path) = json!(endpoints.path);
        bootstrap.cluster("inflight-statserver", Some(statserver));
        bootstrap.module(&built("wasm32-wasip1/release/inflight_filter.wasm"));
        bootstrap
    }

    /// Returns [`Bootstrap::istio_gateway`] with the EnvoyFilter that holds, and the endpoints of its
    /// one service from `endpoints`, at first none.
    ///
    /// # Panics
    /// If the EnvoyFilter does not have what it is to have.
    pub fn istio_scale_to_zero(endpoints: &EndpointFile, statserver: SocketAddr) -> Self {
        let mut bootstrap = Self::istio_gateway(statserver, statserver);
        let file = "istio/scale-to-zero.yaml";
        bootstrap.patch_in(file, statserver);
        let document = shipped(file);
        merge(at(&mut bootstrap.0, "/static_resources/listeners/0"), &patch(&document, "LISTENER"));
        let manager = patch(&document, "NETWORK_FILTER");
        merge(at(&mut bootstrap.0, MANAGER), &manager["typed_config"]);
        bootstrap.endpoints_from(CLUSTER, endpoints);
        bootstrap
    }

    fn local_route(&mut self) {
        self.route(json!({"match": {"prefix": "/local"}, "direct_response": {"status": 403}}));
    }

    /// Adds a route in front of all others.
    pub fn route(&mut self, route: Value) {
        let routes = at(&mut self.0, &format!("{MANAGER}/route_config/virtual_hosts/0/routes"));
        routes.as_array_mut().expect("routes").insert(0, route);
    }

    /// Replaces the filter by that of an EnvoyFilter, with the module from the disk.
    fn patch_in(&mut self, envoy_filter: &str, statserver: SocketAddr) {
        let module = self.code()["local"]["filename"].clone();
        *self.filter() = patch(&shipped(envoy_filter), "HTTP_FILTER");
        self.module(Path::new(module.as_str().expect("a path")));
        self.in_istio(statserver);
    }

    /// Replaces the filter by what Istio makes of a TrafficExtension or a WasmPlugin below `deploy/`
    /// (istio/istio, `pilot/pkg/model/extensions.go`) once its agent has fetched the module.
    pub fn extend(&mut self, file: &str, kind: &str, statserver: SocketAddr) {
        let code = self.code().clone();
        let document = deployed(file, kind);
        let spec = &document["spec"];
        let wasm = if kind == "WasmPlugin" { spec } else { &spec["wasm"] };
        let variables = wasm["vmConfig"]["env"].as_array().expect("variables").iter();
        let variables: Map<String, Value> = variables
            .map(|variable| {
                (variable["name"].as_str().expect("a name").to_owned(), variable["value"].clone())
            })
            .collect();
        *self.filter() = json!({"name": "default.inflight", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.wasm.v3.Wasm",
            "config": {
                "name": "default.inflight",
                "root_id": wasm.get("pluginName").cloned().unwrap_or_default(),
                "configuration": {
                    "@type": "type.googleapis.com/google.protobuf.StringValue",
                    "value": wasm["pluginConfig"].to_string(),
                },
                "failure_policy": wasm["failStrategy"],
                "vm_config": {
                    "runtime": "envoy.wasm.runtime.v8",
                    "code": code,
                    "environment_variables": {"key_values": variables},
                },
            },
        }});
        self.in_istio(statserver);
    }

    /// Adds Istio's cluster of the stats server instead of the shipped one, and Istio's stats tags.
    fn in_istio(&mut self, statserver: SocketAddr) {
        let clusters = at(&mut self.0, "/static_resources/clusters").as_array_mut().expect("clusters");
        clusters.retain(|cluster| cluster["name"] != "inflight-statserver");
        self.cluster(ISTIO_STATSERVER, Some(statserver));
        let annotations = &shipped("istio/labels.yaml")["spec"]["template"]["metadata"]["annotations"];
        *at(&mut self.0, "/stats_config") = istio_stats_config(annotations);
    }

    /// Returns [`Bootstrap::istio_gateway`] as a waypoint, with the extension for it: the cluster of its
    /// one service has a waypoint's name.
    ///
    /// # Panics
    /// If the extension does not have what it is to have.
    pub fn waypoint(upstream: SocketAddr, statserver: SocketAddr) -> Self {
        const CLUSTER: &str = "inbound-vip|80|http|hello-00001.default.svc.cluster.local";
        let mut bootstrap = Self::istio_gateway(upstream, statserver);
        bootstrap.extend("istio-gateway/waypoint.yaml", "TrafficExtension", statserver);
        bootstrap.cluster(CLUSTER, Some(upstream));
        bootstrap.route(json!({"match": {"prefix": "/"}, "route": {"cluster": CLUSTER, "timeout": "0s"}}));
        bootstrap
    }

    /// Returns [`Bootstrap::gateway`] as Envoy Gateway makes it of an EnvoyExtensionPolicy and the
    /// EnvoyProxy below `deploy/envoy-gateway` (envoyproxy/gateway, `internal/xds/translator/wasm.go`),
    /// with an HTTPRoute `default/hello`. The filter is off but on the routes that enable it.
    ///
    /// # Panics
    /// If they do not have what they are to have.
    pub fn envoy_gateway(policy: &str, upstream: SocketAddr, statserver: SocketAddr) -> Self {
        const NAME: &str = "envoy.filters.http.wasm/envoyextensionpolicy/default/inflight/wasm/0";
        let mut bootstrap = Self::gateway(upstream, statserver);
        let code = bootstrap.code().clone();
        let document = deployed(policy, "EnvoyExtensionPolicy");
        let wasm = &document["spec"]["wasm"][0];
        *bootstrap.filter() = json!({"name": NAME, "disabled": true, "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.wasm.v3.Wasm",
            "config": {
                "name": wasm["name"],
                "root_id": wasm["rootID"],
                "configuration": {
                    "@type": "type.googleapis.com/google.protobuf.StringValue",
                    "value": wasm["config"].to_string(),
                },
                "vm_config": {
                    "vm_id": "envoyextensionpolicy/default/inflight/wasm/0",
                    "runtime": "envoy.wasm.runtime.v8",
                    "code": code,
                    "environment_variables": {"host_env_keys": wasm["env"]["hostKeys"]},
                },
            },
        }});
        bootstrap.cluster(HTTP_ROUTE, Some(upstream));
        let enabled =
            json!({NAME: {"@type": "type.googleapis.com/envoy.config.route.v3.FilterConfig", "config": {}}});
        let target = json!({"cluster": HTTP_ROUTE, "timeout": "0s"});
        bootstrap
            .route(json!({"match": {"prefix": "/"}, "route": target, "typed_per_filter_config": enabled}));
        bootstrap.local_route();

        let proxy = deployed("envoy-gateway/envoy-proxy.yaml", "EnvoyProxy");
        let text = proxy["spec"]["bootstrap"]["value"].as_str().expect("a bootstrap");
        let mut merged: Value = serde_norway::from_str(text).expect("YAML");
        bootstrap.0["stats_config"] = merged["stats_config"].take();
        let mut cluster = at(&mut merged, "/static_resources/clusters/0").take();
        let address = "/load_assignment/endpoints/0/lb_endpoints/0/endpoint/address/socket_address";
        *at(&mut cluster, address) =
            json!({"address": statserver.ip().to_string(), "port_value": statserver.port()});
        let clusters = at(&mut bootstrap.0, "/static_resources/clusters").as_array_mut().expect("clusters");
        clusters.retain(|other| other["name"] != cluster["name"]);
        clusters.push(cluster);
        bootstrap
    }

    /// Returns `envoy/knative/envoy.yaml`, on free ports, with the built module.
    pub fn knative(app: SocketAddr) -> Self {
        let mut bootstrap = Self(shipped("knative/envoy.yaml"));
        bootstrap.on_free_ports();
        bootstrap.cluster("app", Some(app));
        bootstrap.module(&built("wasm32-wasip1/release/inflight_filter.wasm"));
        bootstrap
    }

    /// Envoy needs a node to read configuration from a file.
    fn with_a_node(&mut self) {
        if self.0["node"].is_null() {
            self.0["node"] = json!({"id": "test", "cluster": "test"});
        }
    }

    fn on_free_ports(&mut self) {
        *at(&mut self.0, "/admin/address/socket_address/port_value") = json!(0);
        for listener in at(&mut self.0, "/static_resources/listeners").as_array_mut().expect("listeners") {
            *at(listener, "/address/socket_address") = json!({"address": "127.0.0.1", "port_value": 0});
        }
    }

    /// Writes the listeners to a file of their own. Envoy reads them from it, and reads them again
    /// when the file is replaced.
    pub fn listeners_from(&mut self, path: &Path) {
        let listeners = at(&mut self.0, "/static_resources/listeners").take();
        let resources: Vec<Value> = listeners
            .as_array()
            .expect("listeners")
            .iter()
            .map(|listener| {
                let mut listener = listener.clone();
                listener["@type"] = json!("type.googleapis.com/envoy.config.listener.v3.Listener");
                listener
            })
            .collect();
        replace(path, &json!({"resources": resources}));
        at(&mut self.0, "/static_resources").as_object_mut().expect("an object").remove("listeners");
        self.0["dynamic_resources"] = json!({"lds_config": {"path_config_source": {"path": path}}});
        self.with_a_node();
    }

    /// Sends gRPC to an app's other address, over HTTP/2.
    pub fn grpc(&mut self, app: SocketAddr) {
        self.cluster("streams", Some(app));
        self.find_cluster("streams")["typed_extension_protocol_options"] = json!({
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http2_protocol_options": {}},
            },
        });
        let grpc =
            json!({"match": {"prefix": "/", "grpc": {}}, "route": {"cluster": "streams", "timeout": "0s"}});
        self.route(grpc);
    }

    /// Makes a worker block for the seconds in a request's header `x-stall`, after the filter has
    /// seen the request.
    pub fn stalls(&mut self) {
        const SOURCE: &str = r#"
            function envoy_on_request(handle)
                local seconds = handle:headers():get("x-stall")
                if seconds then os.execute("sleep " .. seconds) end
            end
        "#;
        let filters = at(&mut self.0, &format!("{MANAGER}/http_filters"));
        let stall = json!({"name": "stall", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua",
            "default_source_code": {"inline_string": SOURCE},
        }});
        filters.as_array_mut().expect("filters").insert(1, stall);
    }

    /// Removes the filter.
    pub fn without_filter(&mut self) {
        at(&mut self.0, &format!("{MANAGER}/http_filters")).as_array_mut().expect("filters").remove(0);
    }

    /// Makes the first listener spread its connections evenly over the workers.
    pub fn evenly(&mut self) {
        let listener = at(&mut self.0, "/static_resources/listeners/0");
        listener["connection_balance_config"] = json!({"exact_balance": {}});
    }

    /// Puts the first listener on a given port, one that a hot restart finds again.
    pub fn listen_on(&mut self, address: SocketAddr) {
        let (ip, port) = (address.ip().to_string(), address.port());
        *at(&mut self.0, "/static_resources/listeners/0/address/socket_address") =
            json!({"address": ip, "port_value": port});
    }

    /// Adds the access log.
    pub fn access_log(&mut self, path: &Path) {
        at(&mut self.0, MANAGER)["access_log"] = json!([{
            "name": "file",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
                "path": path,
                "log_format": {"text_format_source": {"inline_string": truth::FORMAT}},
            },
        }]);
    }

    /// Returns the first HTTP filter.
    pub fn filter(&mut self) -> &mut Value {
        at(&mut self.0, &format!("{MANAGER}/http_filters/0"))
    }

    /// Returns where the first HTTP filter's module comes from.
    fn code(&mut self) -> &mut Value {
        at(self.filter(), "/typed_config/config/vm_config/code")
    }

    /// Uses another module, in all listeners.
    pub fn module(&mut self, path: &Path) {
        let filter = "/filter_chains/0/filters/0/typed_config/http_filters/0";
        let code = "/typed_config/config/vm_config/code";
        for listener in at(&mut self.0, "/static_resources/listeners").as_array_mut().expect("listeners") {
            *at(listener, &format!("{filter}{code}")) = json!({"local": {"filename": path}});
        }
    }

    /// Makes all listeners fetch the module from the stats server, by this SHA-256, and again as often
    /// as `retries` says; `None` is Envoy's default, once.
    pub fn fetched_module(&mut self, sha256: &str, retries: Option<u32>) {
        let uri = "http://inflight-statserver/module/inflight_filter.wasm";
        let mut remote = json!({
            "http_uri": {"uri": uri, "cluster": "inflight-statserver", "timeout": "5s"},
            "sha256": sha256,
        });
        if let Some(retries) = retries {
            let back_off = json!({"base_interval": "0.2s", "max_interval": "1s"});
            remote["retry_policy"] = json!({"num_retries": retries, "retry_back_off": back_off});
        }
        let filter = "/filter_chains/0/filters/0/typed_config/http_filters/0";
        let code = "/typed_config/config/vm_config/code";
        for listener in at(&mut self.0, "/static_resources/listeners").as_array_mut().expect("listeners") {
            *at(listener, &format!("{filter}{code}")) = json!({"remote": remote.clone()});
        }
    }

    /// Sets a key of the plugin's configuration.
    ///
    /// # Panics
    /// If the configuration is not JSON.
    pub fn configure(&mut self, key: &str, value: Value) {
        let text = at(self.filter(), "/typed_config/config/configuration/value");
        let mut plugin: Value = serde_json::from_str(text.as_str().expect("a string")).expect("JSON");
        plugin[key] = value;
        *text = json!(plugin.to_string());
    }

    /// Replaces the plugin's configuration.
    pub fn configuration(&mut self, text: &str) {
        *at(self.filter(), "/typed_config/config/configuration/value") = json!(text);
    }
}
