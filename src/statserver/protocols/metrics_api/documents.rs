//! The documents of the metrics APIs.

use axum::http::StatusCode;
use axum::response::{IntoResponse, Json, Response};
use inflight_stats::scaling::answer::Quantity;
use serde::Serialize;
use serde_json::{Value, json};

/// The group and version of external metrics.
pub const EXTERNAL: Api = Api { group: "external.metrics.k8s.io", version: "v1beta1" };
/// The group and version of custom metrics.
pub const CUSTOM: Api = Api { group: "custom.metrics.k8s.io", version: "v1beta2" };

/// A group of an API, and its only version.
#[derive(Clone, Copy, Debug)]
pub struct Api {
    group: &'static str,
    version: &'static str,
}

impl Api {
    fn group_version(self) -> String {
        format!("{}/{}", self.group, self.version)
    }

    /// Returns the path of the group.
    pub fn group_path(self) -> String {
        format!("/apis/{}", self.group)
    }

    /// Returns the path of the version.
    pub fn path(self) -> String {
        format!("/apis/{}", self.group_version())
    }

    /// Returns the document of the group.
    pub fn group_document(self) -> Value {
        let version = json!({"groupVersion": self.group_version(), "version": self.version});
        json!({
            "kind": "APIGroup", "apiVersion": "v1", "name": self.group,
            "versions": [version], "preferredVersion": version,
        })
    }

    /// Returns the document of the version. It lists no resources: of those that can be listed or
    /// deleted the namespace controller would wait for the end, and namespaces would never end.
    pub fn resources(self) -> Value {
        json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": self.group_version(), "resources": []})
    }
}

/// The metrics.
pub const METRICS: [(&str, Quantity); 4] = [
    ("inflight_concurrency", Quantity::Concurrency),
    ("inflight_requests_per_second", Quantity::RequestsPerSecond),
    ("inflight_desired_pods", Quantity::DesiredPods),
    ("inflight_in_flight", Quantity::InFlight),
];

/// An error as Kubernetes has it. There is no retry-after: the HPA controller would repeat the
/// request at once, and hold up others.
#[derive(Debug)]
pub struct Failure {
    code: StatusCode,
    reason: &'static str,
    message: String,
}

impl Failure {
    fn new(code: StatusCode, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into() }
    }

    /// The request is not one of this API.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BadRequest", message)
    }

    /// The caller is nobody.
    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "Unauthorized", message)
    }

    /// The caller is somebody else.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "Forbidden", message)
    }

    /// There is nothing to say.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "NotFound", message)
    }

    /// The server itself is at fault.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalError", message)
    }

    /// Everything can only be read.
    pub fn method_not_allowed() -> Self {
        let message = "only GET is allowed here, without watch";
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", message)
    }

    /// The answer would be too large.
    pub fn too_large(message: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "RequestEntityTooLarge", message)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let Self { code, reason, message } = self;
        let status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": message, "reason": reason, "code": code.as_u16(),
        });
        (code, Json(status)).into_response()
    }
}

/// A list of values.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct List<T> {
    kind: &'static str,
    api_version: String,
    metadata: Value,
    /// The values.
    pub items: Vec<T>,
}

/// A value of an external metric.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ExternalValue {
    /// The metric.
    pub metric_name: &'static str,
    /// The key, as labels.
    pub metric_labels: Value,
    /// When it was so, in RFC 3339.
    pub timestamp: String,
    /// The seconds that it is an average of; 0 if it is none. In this API it is just `window`.
    #[serde(rename = "window")]
    pub window_seconds: u64,
    /// A quantity.
    pub value: String,
}

/// A value of a custom metric.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CustomValue {
    /// What it is a value of.
    pub described_object: DescribedObject,
    /// The metric's name, and its selector as it was asked for.
    pub metric: Value,
    /// When it was so, in RFC 3339.
    pub timestamp: String,
    /// The seconds that it is an average of; 0 if it is none.
    pub window_seconds: u64,
    /// A quantity.
    pub value: String,
}

/// A reference to an object.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DescribedObject {
    kind: String,
    namespace: String,
    name: String,
    api_version: String,
}

/// The kinds of resources that autoscalers describe; nobody compares them with the question.
const KINDS: [(&str, &str, &str); 9] = [
    ("pods", "Pod", "v1"),
    ("services", "Service", "v1"),
    ("namespaces", "Namespace", "v1"),
    ("deployments.apps", "Deployment", "apps/v1"),
    ("statefulsets.apps", "StatefulSet", "apps/v1"),
    ("replicasets.apps", "ReplicaSet", "apps/v1"),
    ("ingresses.networking.k8s.io", "Ingress", "networking.k8s.io/v1"),
    ("services.serving.knative.dev", "Service", "serving.knative.dev/v1"),
    ("revisions.serving.knative.dev", "Revision", "serving.knative.dev/v1"),
];

impl DescribedObject {
    /// A reference to an object of a resource, named as in a path: `deployments.apps`.
    pub fn new(resource: &str, namespace: &str, name: &str) -> Self {
        let known = KINDS.iter().find(|(known, ..)| *known == resource);
        let (kind, api_version) = match known {
            Some((_, kind, api_version)) => (*kind, *api_version),
            None => resource.split_once('.').unwrap_or((resource, "v1")),
        };
        let [kind, namespace, name, api_version] = [kind, namespace, name, api_version].map(str::to_owned);
        Self { kind, namespace, name, api_version }
    }
}

/// Returns the list of an external metric.
pub fn external_list(items: Vec<ExternalValue>) -> List<ExternalValue> {
    List {
        kind: "ExternalMetricValueList",
        api_version: EXTERNAL.group_version(),
        metadata: json!({}),
        items,
    }
}

/// Returns the list of a custom metric.
pub fn custom_list(items: Vec<CustomValue>) -> List<CustomValue> {
    List { kind: "MetricValueList", api_version: CUSTOM.group_version(), metadata: json!({}), items }
}
