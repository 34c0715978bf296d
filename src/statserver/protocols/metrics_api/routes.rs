//! The requests of the metrics APIs.

use std::sync::Arc;

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, RawQuery, Request, State};
use axum::http::{HeaderMap, Method, header};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use axum::{Extension, Router};
use inflight_stats::counting::time::nanoseconds;
use inflight_stats::protocol::key_name::KeyName;
use inflight_stats::scaling::answer::{Missing, Quantity};
use serde_json::json;

use crate::app::state::ServerState;
use crate::net::auth::Peer;
use crate::net::connection_limits::ConnectionGuard;
use crate::net::front_proxy::{ClientCertificates, FrontProxy, NotFrontProxy};
use crate::os::clock::{rfc3339, wall_time};
use crate::protocols::metrics_api::documents::{
    Api, CUSTOM, CustomValue, DescribedObject, EXTERNAL, ExternalValue, Failure, METRICS, custom_list,
    external_list,
};
use crate::protocols::metrics_api::quantity::quantity;
use crate::protocols::metrics_api::selector::Selector;

/// The labels of a key.
const NAME: &str = "name";
const NAMESPACE: &str = "namespace";
/// Maximum number of keys that one request asks for.
const MAX_KEYS: usize = 32;
/// Maximum number of pods of which one answer has values.
const MAX_PODS: usize = 20_000;
/// The resource whose objects have values of their own.
const PODS: &str = "pods";

type Shared = State<Arc<ServerState>>;

/// Returns the routes, for the front proxy alone.
pub fn router(state: Arc<ServerState>, front_proxy: Arc<FrontProxy>) -> Router {
    let discovery = |api: Api| {
        Router::new()
            .route(&api.group_path(), get(move || async move { Json(api.group_document()) }))
            .route(&api.path(), get(move || async move { Json(api.resources()) }))
    };
    let of_external = format!("{}/namespaces/{{namespace}}/{{metric}}", EXTERNAL.path());
    let of_namespace = format!("{}/namespaces/{{namespace}}/metrics/{{metric}}", CUSTOM.path());
    let of_object = format!("{}/namespaces/{{namespace}}/{{resource}}/{{name}}/{{metric}}", CUSTOM.path());
    Router::new()
        .route(&of_external, get(external))
        .route(&of_namespace, get(custom_of_namespace))
        .route(&of_object, get(custom))
        .with_state(Arc::clone(&state))
        .merge(discovery(EXTERNAL))
        .merge(discovery(CUSTOM))
        .fallback(|| async { Failure::not_found("there is nothing at this path") })
        .layer(from_fn(only_get))
        .layer(from_fn_with_state((state, front_proxy), only_front_proxy))
}

/// Refuses whoever is not the front proxy with a user's request.
async fn only_front_proxy(
    State((state, front_proxy)): State<(Arc<ServerState>, Arc<FrontProxy>)>,
    Extension(peer): Extension<Peer>,
    certificates: Option<Extension<ClientCertificates>>,
    guard: Option<Extension<Arc<ConnectionGuard>>>,
    headers: HeaderMap,
    request: Request,
    next: Next,
) -> Response {
    let certificates = certificates.map(|Extension(certificates)| certificates);
    match front_proxy.check(certificates.as_ref(), &headers) {
        Ok(()) => {
            if let Some(Extension(guard)) = guard {
                guard.authenticated();
            }
            next.run(request).await
        }
        Err(refused) => {
            state.refuse(peer, refused.reason());
            let failure = match refused {
                NotFrontProxy::NotAllowed => Failure::forbidden(refused.reason()),
                _ => Failure::unauthorized(refused.reason()),
            };
            // Clients that are nobody keep no connection.
            ([(header::CONNECTION, "close")], failure).into_response()
        }
    }
}

/// The kube-apiserver passes on any method, and watches.
async fn only_get(request: Request, next: Next) -> Response {
    let query = request.uri().query().unwrap_or_default();
    let is_watch = form_urlencoded::parse(query.as_bytes())
        // As Go parses it (strconv.ParseBool).
        .any(|(name, value)| {
            name == "watch" && !matches!(&*value, "0" | "f" | "F" | "false" | "False" | "FALSE")
        });
    if *request.method() != Method::GET || is_watch {
        return Failure::method_not_allowed().into_response();
    }
    next.run(request).await
}

/// What is read of a path.
type PathOf<T> = Result<Path<T>, PathRejection>;

fn path<T>(path: PathOf<T>) -> Result<T, Failure> {
    let invalid = |error: PathRejection| Failure::bad_request(format!("invalid path: {}", error.body_text()));
    path.map(|Path(path)| path).map_err(invalid)
}

fn metric(name: &str) -> Result<(&'static str, Quantity), Failure> {
    METRICS.into_iter().find(|(known, _)| *known == name).ok_or_else(|| {
        let given: String = name.chars().take(100).collect();
        let known = METRICS.map(|(known, _)| known).join(", ");
        Failure::not_found(format!("unknown metric {given:?}; expected one of {known}"))
    })
}

/// Reads a selector of the query; one that is not there selects everything.
fn selector(query: Option<&str>, parameter: &str) -> Result<Selector, Failure> {
    let pairs = form_urlencoded::parse(query.unwrap_or_default().as_bytes());
    let mut values = pairs.filter(|(name, _)| name == parameter).map(|(_, value)| value);
    let text = values.next().unwrap_or_default();
    if values.next().is_some() {
        return Err(Failure::bad_request(format!("`{parameter}` is in the query more than once")));
    }
    Selector::parse(&text).map_err(|error| Failure::bad_request(format!("`{parameter}`: {error}")))
}

/// Returns the keys of a namespace that a selector means, or the one of that name if the selector
/// names none.
fn keys(selector: &Selector, namespace: &str, name: Option<&str>) -> Result<Vec<KeyName>, Failure> {
    let names = selector.0.iter().filter(|(label, _)| label == NAME);
    let listed = names.clone().find_map(|(_, requirement)| requirement.allowed());
    let own: Vec<String> = name.map(str::to_owned).into_iter().collect();
    let mut listed = listed.unwrap_or(&own).to_vec();
    listed.retain(|name| names.clone().all(|(_, requirement)| requirement.fits(Some(name))));
    listed.sort();
    listed.dedup();
    for (label, requirement) in &selector.0 {
        match label.as_str() {
            NAME => {}
            NAMESPACE if requirement.fits(Some(namespace)) => {}
            NAMESPACE => {
                let message = format!("the selector is about another namespace; the path has {namespace}");
                return Err(Failure::forbidden(message));
            }
            _ if requirement.fits(None) => {}
            other => {
                let message =
                    format!("no key has a label {other:?}; the labels of a key are name and namespace");
                return Err(Failure::not_found(message));
            }
        }
    }
    match listed.len() {
        0 => Err(Failure::not_found("the metric's selector names no key; expected name=KEY")),
        1..=MAX_KEYS => Ok(listed.iter().map(|name| KeyName::new(namespace, name)).collect()),
        _ => Err(Failure::bad_request(format!("the selector names more than {MAX_KEYS} keys"))),
    }
}

fn missing(state: &ServerState, key: &KeyName, missing: Missing) -> Failure {
    state.unknown_keys.asked(key, missing);
    Failure::not_found(format!("key {key}: {missing}"))
}

/// A key's value.
struct Sampled {
    value: String,
    window_seconds: u64,
    timestamp: String,
}

fn sample(state: &ServerState, key: &KeyName, asked: Quantity) -> Result<Sampled, Failure> {
    let now_ns = state.keys.now_ns();
    let known = state.keys.ask(key, |key| {
        let window = key.settings().windows().stable_seconds as u64;
        key.answer(asked, now_ns).map(|value| (value, window))
    });
    let (value, window) = known.map_err(|reason| missing(state, key, reason))?;
    let window_seconds = match asked {
        Quantity::Concurrency | Quantity::RequestsPerSecond => window,
        Quantity::DesiredPods | Quantity::InFlight => 0,
    };
    Ok(Sampled { value: quantity(value), window_seconds, timestamp: timestamp() })
}

fn timestamp() -> String {
    rfc3339(nanoseconds(wall_time()))
}

/// Answers an external metric: an item for each key, which the HPA adds up. One that is missing
/// makes the whole answer an error, for the sum of the others would be less than there is.
async fn external(
    State(state): Shared,
    names: PathOf<(String, String)>,
    RawQuery(query): RawQuery,
) -> Result<Response, Failure> {
    let (namespace, name) = path(names)?;
    let (metric_name, asked) = metric(&name)?;
    let selector = selector(query.as_deref(), "labelSelector")?;
    let items = keys(&selector, &namespace, None)?.into_iter().map(|key| {
        let Sampled { value, window_seconds, timestamp } = sample(&state, &key, asked)?;
        let metric_labels = json!({NAME: key.name, NAMESPACE: key.namespace});
        Ok(ExternalValue { metric_name, metric_labels, timestamp, window_seconds, value })
    });
    let items: Result<Vec<_>, Failure> = items.collect();
    Ok(Json(external_list(items?)).into_response())
}

/// Answers a custom metric of a namespace itself.
async fn custom_of_namespace(
    State(state): Shared,
    names: PathOf<(String, String)>,
    RawQuery(query): RawQuery,
) -> Result<Response, Failure> {
    let (namespace, metric_name) = path(names)?;
    let object = DescribedObject::new("namespaces", &namespace, &namespace);
    of_object(&state, &namespace, &metric_name, None, object, query.as_deref())
}

/// Answers a custom metric of an object, whose name is the key's unless the selector names one; or
/// of pods.
async fn custom(
    State(state): Shared,
    names: PathOf<(String, String, String, String)>,
    RawQuery(query): RawQuery,
) -> Result<Response, Failure> {
    let (namespace, resource, name, metric_name) = path(names)?;
    if resource == PODS {
        return of_pods(&state, namespace, name, &metric_name, query.as_deref()).await;
    }
    let object = DescribedObject::new(&resource, &namespace, &name);
    of_object(&state, &namespace, &metric_name, Some(&name), object, query.as_deref())
}

/// What is asked of an object: a metric of one key.
struct Asked {
    metric_name: &'static str,
    asked: Quantity,
    key: KeyName,
    /// The metric, as the answer repeats it.
    metric: serde_json::Value,
}

/// Reads a custom metric and its selector, which means a key of the namespace, or the one of that name if
/// it names none.
fn of_one_key(
    query: Option<&str>,
    namespace: &str,
    name: Option<&str>,
    metric_name: &str,
) -> Result<Asked, Failure> {
    let (metric_name, asked) = metric(metric_name)?;
    let selector = selector(query, "metricLabelSelector")?;
    // An object has one value.
    let [key] = <[KeyName; 1]>::try_from(keys(&selector, namespace, name)?)
        .map_err(|_| Failure::bad_request("the metric's selector names more than one key"))?;
    let metric = json!({"name": metric_name, "selector": selector.to_json()});
    Ok(Asked { metric_name, asked, key, metric })
}

fn of_object(
    state: &ServerState,
    namespace: &str,
    metric_name: &str,
    name: Option<&str>,
    described_object: DescribedObject,
    query: Option<&str>,
) -> Result<Response, Failure> {
    let Asked { asked, key, metric, .. } = of_one_key(query, namespace, name, metric_name)?;
    let Sampled { value, window_seconds, timestamp } = sample(state, &key, asked)?;
    let item = CustomValue { described_object, metric, timestamp, window_seconds, value };
    Ok(Json(custom_list(vec![item])).into_response())
}

/// Answers what each pod of a key has of all its requests; a name is that of one pod, or `*`. The
/// server knows no labels of pods, so the metric's selector says which key.
async fn of_pods(
    state: &Arc<ServerState>,
    namespace: String,
    name: String,
    metric_name: &str,
    query: Option<&str>,
) -> Result<Response, Failure> {
    let asked = of_one_key(query, &namespace, None, metric_name)?;
    let listed = state.list(move |state| list_pods(state, &namespace, &name, asked)).await;
    listed.unwrap_or_else(|error| Err(Failure::internal(format!("cannot list: {error}"))))
}

fn list_pods(state: &ServerState, namespace: &str, name: &str, asked: Asked) -> Result<Response, Failure> {
    let Asked { metric_name, asked, key, metric } = asked;
    let now_ns = state.keys.now_ns();
    let known = state.keys.ask(&key, |key| key.missing(now_ns).map_or_else(|| Ok(key.pods(now_ns)), Err));
    let mut pods = known.map_err(|reason| missing(state, &key, reason))?;
    if name != "*" {
        pods.retain(|pod| pod.name == name);
    }
    if pods.len() > MAX_PODS {
        return Err(Failure::too_large(format!("key {key} has more than {MAX_PODS} pods")));
    }
    if pods.is_empty() {
        return Err(Failure::not_found(format!("key {key}: no such pod reports it")));
    }
    let timestamp = timestamp();
    let items = pods.into_iter().map(|pod| {
        let value = match asked {
            Quantity::Concurrency => pod.concurrency,
            Quantity::RequestsPerSecond => pod.requests_per_second,
            Quantity::InFlight => pod.in_flight,
            Quantity::DesiredPods => {
                return Err(Failure::not_found(format!("{metric_name} is no metric of a pod")));
            }
        };
        Ok(CustomValue {
            described_object: DescribedObject::new(PODS, namespace, &pod.name),
            metric: metric.clone(),
            timestamp: timestamp.clone(),
            window_seconds: 0,
            value: quantity(value),
        })
    });
    let items: Result<Vec<_>, Failure> = items.collect();
    Ok(Json(custom_list(items?)).into_response())
}
