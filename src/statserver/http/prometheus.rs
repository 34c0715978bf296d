//! `GET /metrics`: the server's own metrics, those of its process, and the figures of the keys.

use std::fmt;
use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use crate::app::state::ServerState;
use crate::keys::key_view::KeyView;
use crate::keys::listing::Listing;
use crate::net::auth::Grant;
use crate::os::process::{self, ProcessFigures};
use crate::telemetry::metrics::{Metrics, PREFIX};

/// Maximum number of keys that are shown.
const MAX_KEYS: usize = 10_000;
/// Maximum number of bytes that their lines take: each key has a line for each of its figures.
const MAX_KEY_BYTES: usize = 10 << 20;
/// What a line has beside its key's name, roughly.
const LINE_BYTES: usize = 80;

/// A figure of each key: its name, its help, and how to read it; a key of which it is not known has
/// none.
type KeyGauge = (&'static str, &'static str, fn(&KeyView) -> Option<f64>);

const KEY_GAUGES: [KeyGauge; 9] = [
    ("stable_concurrency", "Average concurrency over the stable window", |view| {
        known(view, view.figures.stable.concurrency)
    }),
    ("panic_concurrency", "Average concurrency over the panic window", |view| {
        known(view, view.figures.panic.concurrency)
    }),
    ("requests_per_second", "Average requests per second over the stable window", |view| {
        known(view, view.figures.stable.requests_per_second)
    }),
    ("in_flight", "Requests in flight", |view| known(view, view.figures.in_flight as f64)),
    ("pods", "Pods that report", |view| Some(view.figures.pods as f64)),
    ("desired_pods", "Pods that the key wants", |view| known(view, view.desired_pods?.into())),
    (
        "target",
        "Concurrency, or requests per second, that one pod is to have: its target times the utilization",
        |view| Some(view.settings.target_per_pod()),
    ),
    ("panic_mode", "Whether the decider is in panic mode (1) or not (0)", |view| {
        known(view, view.decision?.panic_mode.into())
    }),
    ("stale", "Whether pods or gateways of it fell silent in the midst of traffic (1) or not (0)", |view| {
        Some(view.stale_since_ns.is_some().into())
    }),
];

/// Returns a figure if autoscalers may be told it: one may ask Prometheus for it.
fn known(view: &KeyView, figure: f64) -> Option<f64> {
    view.missing.is_none().then_some(figure)
}

/// The keys of one scrape.
#[derive(Debug)]
struct KeyCollector(Vec<KeyView>);

impl KeyCollector {
    /// Takes as many keys as are shown.
    fn new(mut views: Vec<KeyView>) -> Self {
        let mut bytes = 0;
        let lines = |view: &KeyView| {
            KEY_GAUGES.len() * (view.name.namespace.len() + view.name.name.len() + LINE_BYTES)
        };
        let fits = |view: &KeyView| {
            bytes += lines(view);
            bytes <= MAX_KEY_BYTES
        };
        let count = views.iter().take(MAX_KEYS).map(fits).take_while(|fits| *fits).count();
        views.truncate(count);
        Self(views)
    }
}

impl Collector for KeyCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for (name, help, value) in KEY_GAUGES {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for view in &self.0 {
                let Some(value) = value(view) else { continue };
                let labels = [("namespace", view.name.namespace.as_str()), ("name", view.name.name.as_str())];
                ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

/// What the process uses, under the names that Prometheus' own libraries give.
#[derive(Debug)]
struct ProcessCollector(ProcessFigures);

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Self(figures) = self;
        let (counter, gauge) = (MetricType::Counter, MetricType::Gauge);
        let cpu =
            encoder.encode_descriptor("process_cpu_seconds", "User and system CPU time", None, counter)?;
        ConstCounter::new(figures.cpu_seconds).encode(cpu)?;
        for (name, help, value) in [
            ("process_resident_memory_bytes", "Resident memory", figures.resident_bytes as f64),
            ("process_open_fds", "Open file descriptors", figures.open_files as f64),
            ("process_max_fds", "File descriptors that may be open at once", figures.max_files as f64),
            ("process_start_time_seconds", "Start of the process, as unix time", figures.started_at_seconds),
        ] {
            ConstGauge::new(value).encode(encoder.encode_descriptor(name, help, None, gauge)?)?;
        }
        Ok(())
    }
}

/// Returns the metrics as text, with these keys, of which there are `found` in all.
///
/// # Errors
/// None that is known.
pub fn text(
    metrics: &Metrics,
    process: Option<ProcessFigures>,
    views: Vec<KeyView>,
    found: usize,
) -> Result<String, fmt::Error> {
    metrics.set_keys(found);
    let mut of_keys = Registry::with_prefix(format!("{PREFIX}_key"));
    of_keys.register_collector(Box::new(KeyCollector::new(views)));
    let mut text = String::new();
    metrics.write(&mut text)?;
    if let Some(process) = process {
        let mut of_process = Registry::default();
        of_process.register_collector(Box::new(ProcessCollector(process)));
        encode_registry(&mut text, &of_process)?;
    }
    encode_registry(&mut text, &of_keys)?;
    encode_eof(&mut text)?;
    Ok(text)
}

/// Answers a scrape.
pub async fn scrape(State(state): State<Arc<ServerState>>, grant: Grant) -> Response {
    let written = state.list(move |state| {
        let (views, found) = state.keys.views(&grant, &Listing::first(MAX_KEYS), state.keys.now_ns());
        text(&state.metrics, process::figures(), views, found).map_err(|error| error.to_string())
    });
    match written.await.unwrap_or_else(|error| Err(error.to_string())) {
        Ok(text) => {
            let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, content_type)], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}
