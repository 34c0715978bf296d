//! The options of the plugin's configuration: the one table from which the parser has its names and
//! its words, and the reference page is generated.

/// One key of the configuration.
#[derive(Clone, Copy, Debug)]
pub struct ConfigKey {
    /// The object that it is in, with a dot; empty for the document itself.
    pub object: &'static str,
    /// Its name in that object.
    pub name: &'static str,
    /// Its default as JSON, or in words.
    pub default: &'static str,
    /// What is allowed, in words.
    pub expected: &'static str,
    /// What it means.
    pub help: &'static str,
}

pub(super) const A_NAME: &str = "a string of 1 to 512 bytes without control characters";
pub(super) const A_LABEL: &str = "a string of at most 512 bytes without control characters";
pub(super) const A_PATH: &str = "an absolute URL path without spaces";
pub(super) const AN_OBJECT: &str = "a JSON object";
pub(super) const A_BOOLEAN: &str = "true or false";
pub(super) const A_TIMEOUT: &str = r#"a duration from 10ms to 60m, such as "1s" or "250ms"; units ms, s, m"#;
pub(super) const A_LIMIT: &str = "a whole number from 1 to 100000";
pub(super) const A_VARIABLE: &str = "the name of a variable that vm_config.environment_variables sets";
pub(super) const A_VARIABLE_WITH_A_NAME: &str =
    "the variable to hold a string of 1 to 512 bytes without control characters";
pub(super) const A_HEADER: &str = "the name of an HTTP header";

pub(super) const ROLE: ConfigKey = ConfigKey {
    object: "",
    name: "role",
    default: r#""sidecar""#,
    expected: r#""sidecar", "gateway" or "exporter""#,
    help: "What the filter does: `sidecar` counts for the pod that it is in front of, `gateway` counts \
           per destination, `exporter` shows the pod's figures at `/metrics`",
};
pub(super) const NAMESPACE: ConfigKey = ConfigKey {
    object: "",
    name: "namespace",
    default: "Istio's node metadata",
    expected: A_NAME,
    help: "Namespace of the workload. Required for the roles `sidecar` and `exporter`; at a gateway it \
           completes clusters that name no namespace",
};
pub(super) const SERVICE: ConfigKey = ConfigKey {
    object: "",
    name: "service",
    default: "Istio's node metadata",
    expected: A_LABEL,
    help: "Service of the workload",
};
pub(super) const CONFIGURATION: ConfigKey = ConfigKey {
    object: "",
    name: "configuration",
    default: "Istio's node metadata",
    expected: A_LABEL,
    help: "Knative configuration of the workload, for labels",
};
pub(super) const REVISION: ConfigKey = ConfigKey {
    object: "",
    name: "revision",
    default: "Istio's node metadata",
    expected: A_NAME,
    help: "Name under which the workload is scaled. Required for the roles `sidecar` and `exporter`",
};
pub(super) const NAME_FROM: ConfigKey = ConfigKey {
    object: "",
    name: "name_from",
    default: r#""revision""#,
    expected: r#""revision" or "service""#,
    help: "Role `sidecar`: the name under which the pod reports. `service`, which must not be empty, is \
           what a gateway reports for a Service of that name; all its versions are then one key",
};
pub(super) const POD: ConfigKey = ConfigKey {
    object: "",
    name: "pod",
    default: "Istio's node metadata",
    expected: A_NAME,
    help: "Name of the pod that reports. Required",
};
pub(super) const POD_ENV: ConfigKey = ConfigKey {
    object: "",
    name: "pod_env",
    default: "none",
    expected: A_VARIABLE,
    help: "Variable of the VM's environment (`vm_config.environment_variables`) that holds `pod`, where \
           `pod` itself is not given",
};
pub(super) const REPORTING_PERIOD: ConfigKey = ConfigKey {
    object: "",
    name: "reporting_period",
    default: r#""1s""#,
    expected: r#"a duration from 100ms to 60s, such as "1s" or "250ms"; units ms, s, m"#,
    help: "Time between two reports",
};
pub(super) const PROXIED_HEADER: ConfigKey = ConfigKey {
    object: "",
    name: "proxied_header",
    default: r#""K-Proxy-Request""#,
    expected: A_HEADER,
    help: "Header that marks a request as proxied, with the value `activator`",
};
pub(super) const CONTAINER_CONCURRENCY: ConfigKey = ConfigKey {
    object: "",
    name: "container_concurrency",
    default: "0",
    expected: "a whole number from 0 to 100000",
    help: "Maximum number of requests in the app at once, over all workers; 0: no limit",
};
pub(super) const QUEUE_DEPTH: ConfigKey = ConfigKey {
    object: "",
    name: "queue_depth",
    default: "10 times `container_concurrency`",
    expected: "a whole number from 0 to 100000",
    help: "Maximum number of requests that wait for the app; one more is answered with 503 `pending \
           request queue full`",
};
pub(super) const QUEUE_TIMEOUT: ConfigKey = ConfigKey {
    object: "",
    name: "queue_timeout",
    default: "none",
    expected: A_TIMEOUT,
    help: "Longest wait for the app; then the request is answered with 503 `pending request queue \
           timeout`",
};
pub(super) const PROBES_BYPASS_BREAKER: ConfigKey = ConfigKey {
    object: "",
    name: "probes_bypass_breaker",
    default: "false",
    expected: A_BOOLEAN,
    help: "Role `sidecar`: whether probes skip the breaker instead of taking permits",
};

pub(super) const ANSWER_NETWORK_PROBE: ConfigKey = ConfigKey {
    object: "",
    name: "answer_network_probe",
    default: "false",
    expected: A_BOOLEAN,
    help: "Role `sidecar`: whether a request with `K-Network-Probe: queue` is answered here, as Knative's \
           queue-proxy does: with 200 `queue` if the app answers a probe, else with 503",
};

pub(super) const APP_CLUSTER: ConfigKey = ConfigKey {
    object: "",
    name: "app_cluster",
    default: "none",
    expected: A_NAME,
    help: "Envoy cluster of the app. Required with `answer_network_probe`",
};

pub(super) const APP_PROBE_PATH: ConfigKey = ConfigKey {
    object: "",
    name: "app_probe_path",
    default: r#""/""#,
    expected: A_PATH,
    help: "`:path` of the probe that the app gets with `answer_network_probe`",
};

pub(super) const STATSERVER: ConfigKey = ConfigKey {
    object: "",
    name: "statserver",
    default: "none",
    expected: AN_OBJECT,
    help: "Where reports go; without it, only Envoy stats are kept",
};
pub(super) const STATSERVER_CLUSTER: ConfigKey = ConfigKey {
    object: "statserver.",
    name: "cluster",
    default: "required",
    expected: A_NAME,
    help: "Envoy cluster of the stats server",
};
pub(super) const STATSERVER_AUTHORITY: ConfigKey = ConfigKey {
    object: "statserver.",
    name: "authority",
    default: "the cluster's name",
    expected: A_NAME,
    help: "`:authority` of the calls",
};
pub(super) const STATSERVER_PATH: ConfigKey = ConfigKey {
    object: "statserver.",
    name: "path",
    default: r#""/v1/reports""#,
    expected: A_PATH,
    help: "`:path` of the calls",
};
pub(super) const STATSERVER_TIMEOUT: ConfigKey = ConfigKey {
    object: "statserver.",
    name: "timeout",
    default: r#""1s""#,
    expected: r#"a duration from 10ms to 60s, such as "1s" or "250ms"; units ms, s, m"#,
    help: "How long to wait for an answer",
};
pub(super) const STATSERVER_TOKEN_ENV: ConfigKey = ConfigKey {
    object: "statserver.",
    name: "token_env",
    default: "none",
    expected: A_VARIABLE,
    help: "Variable of the VM's environment (`vm_config.environment_variables`) that holds the bearer \
           token, which is sent as `authorization: Bearer`",
};
pub(super) const GATEWAY: ConfigKey = ConfigKey {
    object: "",
    name: "gateway",
    default: "{}",
    expected: AN_OBJECT,
    help: "Settings of the role `gateway`",
};
pub(super) const GATEWAY_KEY: ConfigKey = ConfigKey {
    object: "gateway.",
    name: "key",
    default: r#"{"from": "cluster"}"#,
    expected: AN_OBJECT,
    help: "Where the key of a request comes from",
};
pub(super) const GATEWAY_KEY_FROM: ConfigKey = ConfigKey {
    object: "gateway.key.",
    name: "from",
    default: r#""cluster""#,
    expected: r#""cluster" or "headers""#,
    help: "`cluster`: the name of the Envoy cluster; Istio's names give namespace and service. `headers`: \
           two request headers",
};
pub(super) const GATEWAY_KEY_NAMESPACE: ConfigKey = ConfigKey {
    object: "gateway.key.",
    name: "namespace",
    default: r#""Knative-Serving-Namespace""#,
    expected: A_HEADER,
    help: "Header with the key's namespace, if the key comes from headers",
};
pub(super) const GATEWAY_KEY_NAME: ConfigKey = ConfigKey {
    object: "gateway.key.",
    name: "name",
    default: r#""Knative-Serving-Revision""#,
    expected: A_HEADER,
    help: "Header with the key's name, if the key comes from headers",
};
pub(super) const GATEWAY_MAX_KEYS: ConfigKey = ConfigKey {
    object: "gateway.",
    name: "max_keys",
    default: "10000",
    expected: "a whole number from 0 to 1000000",
    help: "Maximum number of keys tracked at once; requests for other keys are not counted by key. Only \
           the first so many names get Envoy stats",
};
pub(super) const GATEWAY_MARK: ConfigKey = ConfigKey {
    object: "gateway.",
    name: "mark",
    default: "true",
    expected: A_BOOLEAN,
    help: "Whether requests go on with the proxied header",
};

pub(super) const GATEWAY_HOLD: ConfigKey = ConfigKey {
    object: "gateway.",
    name: "hold",
    default: "none",
    expected: AN_OBJECT,
    help: "Holds requests until a pod can take them; without it, Envoy answers 503 while there is none",
};

pub(super) const HOLD_TIMEOUT: ConfigKey = ConfigKey {
    object: "gateway.hold.",
    name: "timeout",
    default: r#""60s""#,
    expected: A_TIMEOUT,
    help: "Longest time that a request is held; then it is answered with 503 `no capacity for \
           NAMESPACE/NAME within TIMEOUT`",
};

pub(super) const HOLD_DEPTH: ConfigKey = ConfigKey {
    object: "gateway.hold.",
    name: "depth",
    default: "1000",
    expected: A_LIMIT,
    help: "Maximum number of held requests of one key, over all workers; one more is answered with 503 \
           `too many requests held for NAMESPACE/NAME`",
};

pub(super) const HOLD_PROBE_PATH: ConfigKey = ConfigKey {
    object: "gateway.hold.",
    name: "probe_path",
    default: r#""/""#,
    expected: A_PATH,
    help: "`:path` of the probes by which the gateway finds out whether a cluster has a pod that answers",
};

pub(super) const HOLD_PROBE_PERIOD: ConfigKey = ConfigKey {
    object: "gateway.hold.",
    name: "probe_period",
    default: r#""100ms""#,
    expected: r#"a duration from 5ms to 60s, such as "1s" or "250ms"; units ms, s, m"#,
    help: "Time between two probes of a cluster for which requests are held",
};

pub(super) const HOLD_TRUST: ConfigKey = ConfigKey {
    object: "gateway.hold.",
    name: "trust",
    default: r#""30s""#,
    expected: A_TIMEOUT,
    help: "How long after its last answer a cluster is taken to have a pod. Must be shorter than the time \
           after which an autoscaler may remove the last pod",
};

pub(super) const HOLD_RELEASE: ConfigKey = ConfigKey {
    object: "gateway.hold.",
    name: "release",
    default: "100",
    expected: A_LIMIT,
    help: "Maximum number of requests of one key in the app at once while others of it are held; doubles \
           every 2 s in which the app answers without 503",
};

/// All keys, in the order of the reference page.
pub const CONFIG_KEYS: [ConfigKey; 37] = [
    ROLE,
    NAMESPACE,
    SERVICE,
    CONFIGURATION,
    REVISION,
    NAME_FROM,
    POD,
    POD_ENV,
    REPORTING_PERIOD,
    PROXIED_HEADER,
    CONTAINER_CONCURRENCY,
    QUEUE_DEPTH,
    QUEUE_TIMEOUT,
    PROBES_BYPASS_BREAKER,
    ANSWER_NETWORK_PROBE,
    APP_CLUSTER,
    APP_PROBE_PATH,
    STATSERVER,
    STATSERVER_CLUSTER,
    STATSERVER_AUTHORITY,
    STATSERVER_PATH,
    STATSERVER_TIMEOUT,
    STATSERVER_TOKEN_ENV,
    GATEWAY,
    GATEWAY_KEY,
    GATEWAY_KEY_FROM,
    GATEWAY_KEY_NAMESPACE,
    GATEWAY_KEY_NAME,
    GATEWAY_MAX_KEYS,
    GATEWAY_MARK,
    GATEWAY_HOLD,
    HOLD_TIMEOUT,
    HOLD_DEPTH,
    HOLD_PROBE_PATH,
    HOLD_PROBE_PERIOD,
    HOLD_TRUST,
    HOLD_RELEASE,
];

/// The names of the document's own keys.
pub(super) const DOCUMENT_KEYS: [&str; 19] = names_in("");
/// Those of `statserver`.
pub(super) const STATSERVER_KEYS: [&str; 5] = names_in("statserver.");
/// Those of `gateway`.
pub(super) const GATEWAY_KEYS: [&str; 4] = names_in("gateway.");
/// Those of `gateway.hold`.
pub(super) const HOLD_KEYS: [&str; 6] = names_in("gateway.hold.");
/// Those of `gateway.key`, if it comes from headers.
pub(super) const GATEWAY_KEY_KEYS: [&str; 3] = names_in("gateway.key.");

/// Returns the names of an object's keys, of which there must be `N`.
#[allow(clippy::indexing_slicing, reason = "at compile time, where an index out of bounds is an error")]
const fn names_in<const N: usize>(object: &str) -> [&'static str; N] {
    let (mut names, mut count, mut index) = ([""; N], 0, 0);
    while index < CONFIG_KEYS.len() {
        if is_same(CONFIG_KEYS[index].object, object) {
            names[count] = CONFIG_KEYS[index].name;
            count += 1;
        }
        index += 1;
    }
    assert!(count == N);
    names
}

#[allow(clippy::indexing_slicing, reason = "at compile time, where an index out of bounds is an error")]
const fn is_same(one: &str, other: &str) -> bool {
    let (one, other) = (one.as_bytes(), other.as_bytes());
    let mut index = 0;
    while index < one.len() && index < other.len() && one[index] == other[index] {
        index += 1;
    }
    index == one.len() && index == other.len()
}
