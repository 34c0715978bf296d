//! KEDA's external scaler, over gRPC.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt, future, stream};
use inflight_stats::config::suggestion::closest;
use inflight_stats::protocol::key_name::KeyName;
use inflight_stats::protocol::report::is_name;
use inflight_stats::scaling::answer::{Missing, Quantity};
use inflight_stats::scaling::settings::{KeySettings, METRICS, Metric, TARGET};
use tokio_stream::wrappers::{IntervalStream, WatchStream};
use tonic::{Extensions, Request, Response, Status};

use crate::app::state::ServerState;
use crate::net::auth::{Grant, NOT_COVERED, Peer, Unauthenticated, not_covered};

/// Generated from `proto/externalscaler.proto`.
#[allow(missing_docs, clippy::all, reason = "generated")]
mod proto {
    tonic::include_proto!("externalscaler");
}

use proto::external_scaler_server::ExternalScaler;
pub use proto::external_scaler_server::ExternalScalerServer;
use proto::{
    GetMetricSpecResponse, GetMetricsRequest, GetMetricsResponse, IsActiveResponse, MetricSpec, MetricValue,
    ScaledObjectRef,
};

/// The time between two looks for a change of a key's settings.
const SPEC_PERIOD: Duration = Duration::from_secs(1);

/// The metadata that is the scaler's.
const NAMESPACE: &str = "namespace";
const NAME: &str = "name";
const METRIC: &str = "metric";
const OWN_METADATA: [&str; 4] = [NAMESPACE, NAME, METRIC, TARGET.name];
/// KEDA passes all metadata of a trigger, its own included.
const METADATA_OF_KEDA: [&str; 7] =
    ["scalerAddress", "enableTLS", "unsafeSsl", "caCert", "tlsClientCert", "tlsClientKey", "tlsCertFile"];
/// What its names of environment variables end with.
const FROM_ENVIRONMENT: &str = "FromEnv";
/// The value of [`METRIC`] by which KEDA follows the decision.
const DESIRED_PODS: &str = "desired_pods";
/// The target of desired pods: one pod for each.
const DESIRED_PODS_TARGET: f64 = 1.0;

/// The scaler, which answers from the keys of the stats server.
pub struct Scaler(pub Arc<ServerState>);

/// What a call is about.
struct Query {
    key: KeyName,
    grant: Grant,
    target: Option<f64>,
    metric: Option<Scaled>,
}

/// What KEDA scales by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scaled {
    /// A metric, which KEDA divides by the target.
    By(Metric),
    /// The decision.
    DesiredPods,
}

impl Scaled {
    fn parse(text: &str) -> Option<Self> {
        let metric = METRICS.iter().find(|(name, _)| *name == text).map(|(_, metric)| Self::By(*metric));
        metric.or_else(|| (text == DESIRED_PODS).then_some(Self::DesiredPods))
    }

    fn metric_name(self) -> &'static str {
        match self {
            Self::By(Metric::Concurrency) => "inflight-concurrency",
            Self::By(Metric::Rps) => "inflight-rps",
            Self::DesiredPods => "inflight-desired-pods",
        }
    }

    fn quantity(self) -> Quantity {
        match self {
            Self::By(metric) => metric.into(),
            Self::DesiredPods => Quantity::DesiredPods,
        }
    }
}

impl Query {
    /// Reads what a call is about, and checks that its caller may ask for it.
    fn authorized(
        state: &ServerState,
        extensions: &Extensions,
        object: ScaledObjectRef,
    ) -> Result<Self, Status> {
        let grant = extensions.get::<Grant>().cloned();
        let grant = grant.ok_or_else(|| Status::unauthenticated(Unauthenticated::NoToken.reason()))?;
        let query = Self::parse(object, grant)?;
        let namespace = &query.key.namespace;
        if !query.grant.covers(namespace) {
            state.refuse(extensions.get::<Peer>().copied().unwrap_or_default(), NOT_COVERED);
            return Err(Status::permission_denied(not_covered(namespace)));
        }
        Ok(query)
    }

    fn parse(object: ScaledObjectRef, grant: Grant) -> Result<Self, Status> {
        let ScaledObjectRef { name, namespace, scaler_metadata } = object;
        check_names(&scaler_metadata)?;
        let metadata_or = |key: &str, fallback: String| match scaler_metadata.get(key) {
            Some(value) if !value.is_empty() => value.clone(),
            _ => fallback,
        };
        let key = KeyName { namespace: metadata_or(NAMESPACE, namespace), name: metadata_or(NAME, name) };
        for (what, value) in [(NAMESPACE, &key.namespace), (NAME, &key.name)] {
            if !is_name(value) {
                return Err(invalid(what, value, "a name of 1 to 512 bytes without control characters"));
            }
        }
        let target = optional(&scaler_metadata, TARGET.name, TARGET.expected, |text| {
            text.parse().ok().filter(|n: &f64| n.is_finite() && (TARGET.fits)(*n))
        })?;
        let expected = r#""concurrency", "rps" or "desired_pods""#;
        let metric = optional(&scaler_metadata, METRIC, expected, Scaled::parse)?;
        // Another target would scale to a multiple of the decision.
        if metric == Some(Scaled::DesiredPods)
            && let Some(target) = target.filter(|target| *target != DESIRED_PODS_TARGET)
        {
            return Err(invalid(TARGET.name, &target.to_string(), "1, or none, with metric desired_pods"));
        }
        Ok(Self { key, grant, target, metric })
    }

    fn settings(&self, state: &ServerState) -> Arc<KeySettings> {
        let of_key = state.keys.read(&self.key, |key| Arc::clone(key.settings()));
        of_key.unwrap_or_else(|| Arc::clone(state.keys.defaults()))
    }

    fn scaled(&self, settings: &KeySettings) -> Scaled {
        self.metric.unwrap_or(Scaled::By(settings.metric))
    }

    /// Returns the error for a key of which nothing is said. KEDA then keeps the pods, or takes its
    /// fallback.
    fn unavailable(&self, state: &ServerState, missing: Missing) -> Status {
        state.unknown_keys.asked(&self.key, missing);
        Status::unavailable(format!("key {}: {missing}", self.key))
    }

    fn spec(&self, state: &ServerState) -> GetMetricSpecResponse {
        let settings = self.settings(state);
        let scaled = self.scaled(&settings);
        let target = self.target.unwrap_or_else(|| match scaled {
            Scaled::By(metric) => settings.target_of(metric, state.rps_target),
            Scaled::DesiredPods => DESIRED_PODS_TARGET,
        });
        let metric_specs = vec![MetricSpec {
            metric_name: scaled.metric_name().into(),
            target_size: target.ceil() as i64,
            target_size_float: target,
        }];
        GetMetricSpecResponse { metric_specs }
    }
}

/// Refuses metadata that is neither the scaler's nor KEDA's: a misspelt key would be ignored
/// silently.
fn check_names(metadata: &HashMap<String, String>) -> Result<(), Status> {
    let is_known = |key: &str| {
        OWN_METADATA.contains(&key) || METADATA_OF_KEDA.contains(&key) || key.ends_with(FROM_ENVIRONMENT)
    };
    // The first by name, so that the answer is the same each time.
    let Some(unknown) = metadata.keys().filter(|key| !is_known(key)).min() else { return Ok(()) };
    let advice = match closest(unknown, OWN_METADATA) {
        Some(meant) => format!("did you mean `{meant}`?"),
        None => format!("expected {}, or KEDA's own", OWN_METADATA.join(", ")),
    };
    let unknown: String = unknown.chars().take(100).collect();
    Err(Status::invalid_argument(format!("unknown metadata `{unknown}`; {advice}")))
}

fn optional<T>(
    metadata: &HashMap<String, String>,
    key: &str,
    expected: &str,
    parse: impl Fn(&str) -> Option<T>,
) -> Result<Option<T>, Status> {
    let value = metadata.get(key).filter(|value| !value.is_empty());
    value.map(|value| parse(value).ok_or_else(|| invalid(key, value, expected))).transpose()
}

fn invalid(key: &str, given: &str, expected: &str) -> Status {
    let given: String = given.chars().take(100).collect();
    Status::invalid_argument(format!("metadata `{key}` is {given:?}; expected {expected}"))
}

impl Scaler {
    /// Reads what a call is about, and checks that its caller may ask for it.
    fn query(&self, request: Request<ScaledObjectRef>) -> Result<Query, Status> {
        let (_, extensions, object) = request.into_parts();
        Query::authorized(&self.0, &extensions, object)
    }

    /// Returns a stream that also ends with the server, so that nobody waits for it, and with the
    /// grant of its caller.
    fn until_closed<T: Send + 'static>(
        &self,
        grant: Grant,
        stream: impl Stream<Item = T> + Send + 'static,
        at_shutdown: Option<Status>,
    ) -> Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>> {
        let state = Arc::clone(&self.0);
        let end = async move {
            tokio::select! {
                () = state.drain.closing() => at_shutdown.map(Err),
                () = state.access.revoked(&grant) => {
                    Some(Err(Status::unauthenticated("the bearer token is no longer known")))
                }
            }
        };
        let responses = stream::select(stream.map(|response| Some(Ok(response))), stream::once(end));
        // A call ends with its first error.
        Box::pin(responses.take_while(|response| future::ready(response.is_some())).filter_map(future::ready))
    }
}

/// A subscription to a key's activity, which ends with its drop.
struct Subscription(Arc<ServerState>, KeyName);

impl Drop for Subscription {
    fn drop(&mut self) {
        self.0.keys.watchers.unsubscribed(&self.1);
    }
}

#[tonic::async_trait]
impl ExternalScaler for Scaler {
    type StreamIsActiveStream = Pin<Box<dyn Stream<Item = Result<IsActiveResponse, Status>> + Send>>;
    type StreamMetricSpecStream = Pin<Box<dyn Stream<Item = Result<GetMetricSpecResponse, Status>> + Send>>;

    async fn is_active(
        &self,
        request: Request<ScaledObjectRef>,
    ) -> Result<Response<IsActiveResponse>, Status> {
        let query = self.query(request)?;
        let activity = self.0.keys.activity(&query.key, self.0.keys.now_ns());
        let result = activity.map_err(|missing| query.unavailable(&self.0, missing))?;
        Ok(Response::new(IsActiveResponse { result }))
    }

    async fn stream_is_active(
        &self,
        request: Request<ScaledObjectRef>,
    ) -> Result<Response<Self::StreamIsActiveStream>, Status> {
        let query = self.query(request)?;
        let activity = || {
            let activity = self.0.keys.activity(&query.key, self.0.keys.now_ns());
            activity.map_err(|missing| self.0.unknown_keys.asked(&query.key, missing)).ok()
        };
        let changes = self.0.keys.watchers.subscribe(query.key.clone(), activity);
        let subscription = Subscription(Arc::clone(&self.0), query.key);
        let mut said = None;
        // Of a key of which nothing is certain nothing is said; what was said before stays.
        let responses = WatchStream::new(changes).filter_map(move |activity| {
            let _open = &subscription;
            let change = activity.filter(|_| activity != said);
            said = activity.or(said);
            future::ready(change.map(|result| IsActiveResponse { result }))
        });
        // KEDA waits longer and longer, up to a minute, before it opens a stream again that ended
        // with an error.
        Ok(Response::new(self.until_closed(query.grant, responses, None)))
    }

    async fn get_metric_spec(
        &self,
        request: Request<ScaledObjectRef>,
    ) -> Result<Response<GetMetricSpecResponse>, Status> {
        Ok(Response::new(self.query(request)?.spec(&self.0)))
    }

    async fn get_metrics(
        &self,
        request: Request<GetMetricsRequest>,
    ) -> Result<Response<GetMetricsResponse>, Status> {
        let (_, extensions, GetMetricsRequest { scaled_object_ref, metric_name: wanted }) =
            request.into_parts();
        let object = scaled_object_ref.unwrap_or_default();
        let query = Query::authorized(&self.0, &extensions, object)?;
        let scaled = query.scaled(&query.settings(&self.0));
        let answer = self.0.keys.answer(&query.key, scaled.quantity(), self.0.keys.now_ns());
        let value = answer.map_err(|missing| query.unavailable(&self.0, missing))?;
        let metric_values = vec![MetricValue {
            metric_name: if wanted.is_empty() { scaled.metric_name().into() } else { wanted },
            metric_value: value.ceil() as i64,
            metric_value_float: value,
        }];
        Ok(Response::new(GetMetricsResponse { metric_values }))
    }

    async fn stream_metric_spec(
        &self,
        request: Request<ScaledObjectRef>,
    ) -> Result<Response<Self::StreamMetricSpecStream>, Status> {
        let query = self.query(request)?;
        let state = Arc::clone(&self.0);
        let grant = query.grant.clone();
        let mut last = None;
        let changes = IntervalStream::new(tokio::time::interval(SPEC_PERIOD)).filter_map(move |_| {
            let spec = query.spec(&state);
            let changed = last.as_ref() != Some(&spec);
            last = Some(spec.clone());
            future::ready(changed.then_some(spec))
        });
        let restarting = Status::unavailable("the stats server is restarting");
        Ok(Response::new(self.until_closed(grant, changes, Some(restarting))))
    }
}
