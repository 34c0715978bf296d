//! KEDA's external scaler over gRPC.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt, future, stream};
use inflight_stats::scaling::settings::{KeySettings, METRICS, Metric, TARGET};
use tokio_stream::wrappers::{IntervalStream, WatchStream};
use tonic::{Extensions, Request, Response, Status};

use crate::http::{App, now_ns};
use crate::key_table::KeyName;
use crate::net::auth::Grant;

/// What the build made of `proto/externalscaler.proto`.
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

/// How often a change of a key's settings is looked for.
const SPEC_EVERY: Duration = Duration::from_secs(1);

/// The scaler, over the keys of the stats server.
pub struct Scaler(pub Arc<App>);

/// What a ScaledObject asks for.
struct Asked {
    key: KeyName,
    grant: Grant,
    target: Option<f64>,
    metric: Option<Metric>,
}

impl Asked {
    /// What the call is about, if what its caller was granted is good for that.
    fn granted(app: &App, extensions: &Extensions, object: ScaledObjectRef) -> Result<Self, Status> {
        let grant = extensions.get::<Grant>().cloned();
        let grant = grant.ok_or_else(|| Status::unauthenticated("authorization: no token"))?;
        let asked = Self::of(object, grant)?;
        if !asked.grant.covers(&asked.key.0) {
            app.metrics.unauthorized.inc();
            return Err(Status::permission_denied(format!(
                "the token is not good for namespace {}",
                asked.key.0
            )));
        }
        Ok(asked)
    }

    /// Of the metadata `namespace`, `name`, `target` and `metric` are ours; KEDA hands over its own, too.
    fn of(object: ScaledObjectRef, grant: Grant) -> Result<Self, Status> {
        let ScaledObjectRef { name, namespace, scaler_metadata } = object;
        let own = |key: &str, fallback: String| match scaler_metadata.get(key) {
            Some(value) if !value.is_empty() => value.clone(),
            _ => fallback,
        };
        let key = (own("namespace", namespace), own("name", name));
        for (what, value) in [("namespace", &key.0), ("name", &key.1)] {
            if !inflight_stats::protocol::report::is_name(value) {
                return Err(refused(what, value, "a name of 1 to 512 bytes without control characters"));
            }
        }
        let target = parsed(&scaler_metadata, "target", TARGET.expected, |text| {
            text.parse().ok().filter(|n: &f64| n.is_finite() && (TARGET.fits)(*n))
        })?;
        let metric = parsed(&scaler_metadata, "metric", "concurrency or rps", |text| {
            METRICS.iter().find(|(name, _)| *name == text).map(|(_, metric)| *metric)
        })?;
        Ok(Self { key, grant, target, metric })
    }

    fn settings(&self, app: &App) -> Arc<KeySettings> {
        let (namespace, name) = &self.key;
        let of_key = app.keys.of(namespace, name, |key| Arc::clone(key.settings()));
        of_key.unwrap_or_else(|| Arc::clone(app.keys.defaults()))
    }

    fn metric(&self, settings: &KeySettings) -> Metric {
        self.metric.unwrap_or(settings.metric)
    }

    fn is_active(&self, app: &App) -> bool {
        let (namespace, name) = &self.key;
        app.keys.of(namespace, name, |key| key.is_active(now_ns())).unwrap_or(false)
    }

    /// Right after a start some senders of a key have not reported yet: it is active with the first that has traffic, but
    /// what they make together is not known.
    fn may_say_less(&self, app: &App) -> Result<(), Status> {
        let (namespace, name) = &self.key;
        if app.keys.of(namespace, name, |key| key.is_starting(now_ns())).unwrap_or(false) {
            return Err(Status::unavailable("the stats server has just started: not all have reported yet"));
        }
        Ok(())
    }

    fn spec(&self, app: &App) -> GetMetricSpecResponse {
        let settings = self.settings(app);
        let metric = self.metric(&settings);
        let target = self.target.unwrap_or_else(|| settings.target_of(metric, app.rps_target));
        let metric_specs = vec![MetricSpec {
            metric_name: metric_name(metric).into(),
            target_size: target.ceil() as i64,
            target_size_float: target,
        }];
        GetMetricSpecResponse { metric_specs }
    }
}

fn parsed<T>(
    metadata: &HashMap<String, String>,
    key: &str,
    allowed: &str,
    parse: impl Fn(&str) -> Option<T>,
) -> Result<Option<T>, Status> {
    let value = metadata.get(key).filter(|value| !value.is_empty());
    value.map(|value| parse(value).ok_or_else(|| refused(key, value, allowed))).transpose()
}

fn refused(key: &str, was: &str, allowed: &str) -> Status {
    let was: String = was.chars().take(100).collect();
    Status::invalid_argument(format!("metadata `{key}` was {was:?}, allowed is {allowed}"))
}

fn metric_name(metric: Metric) -> &'static str {
    match metric {
        Metric::Concurrency => "inflight-concurrency",
        Metric::Rps => "inflight-rps",
    }
}

impl Scaler {
    /// What a call is about, if its token is good for that.
    fn asked(&self, request: Request<ScaledObjectRef>) -> Result<Asked, Status> {
        let (_, extensions, object) = request.into_parts();
        Asked::granted(&self.0, &extensions, object)
    }

    /// A stream that ends with the server, so that nobody waits for it, or with what its caller was granted.
    fn until_the_end<T: Send + 'static>(
        &self,
        grant: Grant,
        stream: impl Stream<Item = T> + Send + 'static,
    ) -> Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>> {
        let app = Arc::clone(&self.0);
        let end = async move {
            tokio::select! {
                () = app.ending.cancelled() => Err(Status::unavailable("restarting")),
                () = app.access.revoked(&grant) => Err(Status::unauthenticated("the token is no longer known")),
            }
        };
        // The first error is the last that a call says.
        Box::pin(stream::select(stream.map(Ok), stream::once(end)))
    }
}

/// Whoever watches a key, to be forgotten with it.
struct Watching(Arc<App>, KeyName);

impl Drop for Watching {
    fn drop(&mut self) {
        self.0.keys.watch.left(&self.1);
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
        let asked = self.asked(request)?;
        let result = asked.is_active(&self.0);
        if !result {
            asked.may_say_less(&self.0)?;
        }
        Ok(Response::new(IsActiveResponse { result }))
    }

    async fn stream_is_active(
        &self,
        request: Request<ScaledObjectRef>,
    ) -> Result<Response<Self::StreamIsActiveStream>, Status> {
        let asked = self.asked(request)?;
        let changes = self.0.keys.watch.key(asked.key.clone(), || asked.is_active(&self.0));
        let watching = Watching(Arc::clone(&self.0), asked.key);
        // Right after a start a key that others have yet to report is not said to be idle.
        let answers = WatchStream::new(changes).filter_map(move |result| {
            let Watching(app, (namespace, name)) = &watching;
            let is_starting =
                || app.keys.of(namespace, name, |key| key.is_starting(now_ns())).unwrap_or(false);
            std::future::ready((result || !is_starting()).then_some(IsActiveResponse { result }))
        });
        Ok(Response::new(self.until_the_end(asked.grant, answers)))
    }

    async fn get_metric_spec(
        &self,
        request: Request<ScaledObjectRef>,
    ) -> Result<Response<GetMetricSpecResponse>, Status> {
        Ok(Response::new(self.asked(request)?.spec(&self.0)))
    }

    async fn get_metrics(
        &self,
        request: Request<GetMetricsRequest>,
    ) -> Result<Response<GetMetricsResponse>, Status> {
        let (_, extensions, GetMetricsRequest { scaled_object_ref, metric_name: wanted }) =
            request.into_parts();
        let object = scaled_object_ref.unwrap_or_default();
        let asked = Asked::granted(&self.0, &extensions, object)?;
        asked.may_say_less(&self.0)?;
        let metric = asked.metric(&asked.settings(&self.0));
        let (namespace, name) = &asked.key;
        let value = self.0.keys.of(namespace, name, |key| key.metric(metric, now_ns())).unwrap_or(0.0);
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
        let asked = self.asked(request)?;
        let app = Arc::clone(&self.0);
        let grant = asked.grant.clone();
        let mut last = None;
        let changes = IntervalStream::new(tokio::time::interval(SPEC_EVERY)).filter_map(move |_| {
            let spec = asked.spec(&app);
            let changed = last.as_ref() != Some(&spec);
            last = Some(spec.clone());
            future::ready(changed.then_some(spec))
        });
        Ok(Response::new(self.until_the_end(grant, changes)))
    }
}
