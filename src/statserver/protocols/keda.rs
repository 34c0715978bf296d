//! KEDA's external scaler, over gRPC.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt, future, stream};
use inflight_stats::protocol::key_name::KeyName;
use inflight_stats::protocol::report::is_name;
use inflight_stats::scaling::settings::{KeySettings, METRIC, METRICS, Metric, TARGET};
use tokio_stream::wrappers::{IntervalStream, WatchStream};
use tonic::{Extensions, Request, Response, Status};

use crate::app::state::ServerState;
use crate::net::auth::{Grant, NOT_COVERED, Peer, Unauthenticated, not_covered};
use crate::os::clock::now_ns;

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

/// The scaler, which answers from the keys of the stats server.
pub struct Scaler(pub Arc<ServerState>);

/// What a call is about.
struct Query {
    key: KeyName,
    grant: Grant,
    target: Option<f64>,
    metric: Option<Metric>,
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

    /// Of the metadata, `namespace`, `name`, `target` and `metric` are ours; KEDA passes its own,
    /// too.
    fn parse(object: ScaledObjectRef, grant: Grant) -> Result<Self, Status> {
        let ScaledObjectRef { name, namespace, scaler_metadata } = object;
        let metadata_or = |key: &str, fallback: String| match scaler_metadata.get(key) {
            Some(value) if !value.is_empty() => value.clone(),
            _ => fallback,
        };
        let key = KeyName { namespace: metadata_or("namespace", namespace), name: metadata_or("name", name) };
        for (what, value) in [("namespace", &key.namespace), ("name", &key.name)] {
            if !is_name(value) {
                return Err(invalid(what, value, "a name of 1 to 512 bytes without control characters"));
            }
        }
        let target = optional(&scaler_metadata, TARGET.name, TARGET.expected, |text| {
            text.parse().ok().filter(|n: &f64| n.is_finite() && (TARGET.fits)(*n))
        })?;
        let metric = optional(&scaler_metadata, METRIC.name, METRIC.expected, |text| {
            METRICS.iter().find(|(name, _)| *name == text).map(|(_, metric)| *metric)
        })?;
        Ok(Self { key, grant, target, metric })
    }

    fn settings(&self, state: &ServerState) -> Arc<KeySettings> {
        let of_key = state.keys.read(&self.key, |key| Arc::clone(key.settings()));
        of_key.unwrap_or_else(|| Arc::clone(state.keys.defaults()))
    }

    fn metric(&self, settings: &KeySettings) -> Metric {
        self.metric.unwrap_or(settings.metric)
    }

    fn is_active(&self, state: &ServerState) -> bool {
        state.keys.read(&self.key, |key| key.is_active(now_ns())).unwrap_or(false)
    }

    /// Refuses to answer right after a start, when some senders of a key have not reported yet: it
    /// is active with the first that has traffic, but the sum of all is not known.
    fn check_started(&self, state: &ServerState) -> Result<(), Status> {
        if is_starting(state, &self.key) {
            return Err(Status::unavailable(
                "the stats server has just started, and not all senders have reported yet",
            ));
        }
        Ok(())
    }

    fn spec(&self, state: &ServerState) -> GetMetricSpecResponse {
        let settings = self.settings(state);
        let metric = self.metric(&settings);
        let target = self.target.unwrap_or_else(|| settings.target_of(metric, state.rps_target));
        let metric_specs = vec![MetricSpec {
            metric_name: metric_name(metric).into(),
            target_size: target.ceil() as i64,
            target_size_float: target,
        }];
        GetMetricSpecResponse { metric_specs }
    }
}

fn is_starting(state: &ServerState, key: &KeyName) -> bool {
    state.keys.read(key, |key| key.is_starting(now_ns())).unwrap_or(false)
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

fn metric_name(metric: Metric) -> &'static str {
    match metric {
        Metric::Concurrency => "inflight-concurrency",
        Metric::Rps => "inflight-rps",
    }
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
    ) -> Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>> {
        let state = Arc::clone(&self.0);
        let end = async move {
            tokio::select! {
                () = state.drain.closing() => Err(Status::unavailable("the stats server is restarting")),
                () = state.access.revoked(&grant) => {
                    Err(Status::unauthenticated("the bearer token is no longer known"))
                }
            }
        };
        // A call ends with its first error.
        Box::pin(stream::select(stream.map(Ok), stream::once(end)))
    }
}

/// A subscription to a key's activity, which ends with its drop.
struct Subscription(Arc<ServerState>, KeyName);

impl Drop for Subscription {
    fn drop(&mut self) {
        self.0.keys.activity.unsubscribed(&self.1);
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
        let result = query.is_active(&self.0);
        if !result {
            query.check_started(&self.0)?;
        }
        Ok(Response::new(IsActiveResponse { result }))
    }

    async fn stream_is_active(
        &self,
        request: Request<ScaledObjectRef>,
    ) -> Result<Response<Self::StreamIsActiveStream>, Status> {
        let query = self.query(request)?;
        let changes = self.0.keys.activity.subscribe(query.key.clone(), || query.is_active(&self.0));
        let subscription = Subscription(Arc::clone(&self.0), query.key);
        // Right after a start a key is not called idle: some senders may have yet to report it.
        let responses = WatchStream::new(changes).filter_map(move |result| {
            let Subscription(state, key) = &subscription;
            let is_known = result || !is_starting(state, key);
            future::ready(is_known.then_some(IsActiveResponse { result }))
        });
        Ok(Response::new(self.until_closed(query.grant, responses)))
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
        query.check_started(&self.0)?;
        let metric = query.metric(&query.settings(&self.0));
        let value = self.0.keys.read(&query.key, |key| key.metric(metric, now_ns())).unwrap_or(0.0);
        let metric_values = vec![MetricValue {
            metric_name: if wanted.is_empty() { metric_name(metric).into() } else { wanted },
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
        Ok(Response::new(self.until_closed(grant, changes)))
    }
}
