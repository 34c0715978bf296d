//! `GET /v1/keys`, and a key's figures, senders and history.

use std::sync::Arc;

use axum::extract::{RawQuery, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use inflight_stats::protocol::key_name::KeyName;
use inflight_stats::scaling::decider::DECISION_PERIOD_NS;
use inflight_stats::scaling::key::Averages;
use inflight_stats::scaling::sender::{Role, SenderFigures, SenderPage};
use inflight_stats::scaling::settings::{KeySettings, Metric};
use serde::Serialize;
use tokio::task::JoinError;

use crate::app::state::ServerState;
use crate::http::extract::KeyPath;
use crate::keys::history::{History, HistoryPoint};
use crate::keys::key_view::KeyView;
use crate::keys::listing::{KeyState, Listing, Order};
use crate::net::auth::Grant;
use crate::os::clock::rfc3339;

/// How many keys or senders one `GET` lists if its query does not say, and at most.
const DEFAULT_LISTED: usize = 100;
const MAX_LISTED: usize = 10_000;
/// The largest list in bytes: names may be long.
const MAX_LIST_BYTES: usize = 8 << 20;

/// The parameters of `GET /v1/keys`.
pub const LIST_PARAMETERS: &[&str] = &["search", "limit", "sort", "state"];
/// The parameters of `GET /v1/keys/NAMESPACE/NAME/senders`.
pub const SENDER_PARAMETERS: &[&str] = &["limit", "after"];
/// The parameters of `GET /v1/key/senders`, which names the key, too.
pub const KEY_AND_SENDER_PARAMETERS: &[&str] = &["namespace", "name", "limit", "after"];

/// A key as JSON.
#[derive(Serialize)]
struct KeyJson {
    namespace: String,
    name: String,
    requests_total: u64,
    in_flight: u64,
    pods: u64,
    gateways: u64,
    /// `null` where pods reported no request.
    proxied_share: Option<f64>,
    stable: AveragesJson,
    panic: AveragesJson,
    /// `null` where it is not known yet.
    desired_pods: Option<u32>,
    /// `null` before the first decision.
    ready_pods: Option<u32>,
    /// `null` where no pod is ready.
    load: Option<f64>,
    panic_mode: bool,
    /// `null` before the first decision.
    excess_burst_capacity: Option<i64>,
    /// `null` before the first report.
    last_report_age_ms: Option<u64>,
    stale: bool,
    /// `null` unless it is stale.
    stale_since: Option<String>,
    /// `null` where autoscalers are answered.
    missing: Option<String>,
    settings: Arc<KeySettings>,
}

#[derive(Serialize)]
struct AveragesJson {
    concurrency: f64,
    requests_per_second: f64,
}

impl From<Averages> for AveragesJson {
    fn from(averages: Averages) -> Self {
        Self { concurrency: averages.concurrency, requests_per_second: averages.requests_per_second }
    }
}

impl From<KeyView> for KeyJson {
    fn from(view: KeyView) -> Self {
        let load = view.load();
        let KeyView { name, figures, desired_pods, ready_pods, decision, settings, missing, stale_since_ns } =
            view;
        let KeyName { namespace, name } = name;
        Self {
            namespace,
            name,
            requests_total: figures.requests_total,
            in_flight: figures.in_flight,
            pods: figures.pods,
            gateways: figures.gateways,
            proxied_share: figures.proxied_share,
            stable: figures.stable.into(),
            panic: figures.panic.into(),
            desired_pods,
            ready_pods,
            load,
            panic_mode: decision.is_some_and(|decision| decision.panic_mode),
            excess_burst_capacity: decision.map(|decision| decision.excess_burst_capacity),
            last_report_age_ms: figures.last_report_age_ms,
            stale: stale_since_ns.is_some(),
            stale_since: stale_since_ns.map(rfc3339),
            missing: missing.map(|missing| missing.to_string()),
            settings,
        }
    }
}

/// A key's history as JSON.
#[derive(Serialize)]
struct HistoryJson {
    seconds_between: u64,
    metric: Metric,
    points: Vec<HistoryPointJson>,
}

#[derive(Serialize)]
struct HistoryPointJson {
    at: String,
    /// `null` where nobody was heard, like the next two.
    stable: Option<f32>,
    panic: Option<f32>,
    in_flight: Option<u32>,
    target: f32,
    ready_pods: u32,
    desired_pods: u32,
}

impl From<&HistoryPoint> for HistoryPointJson {
    fn from(point: &HistoryPoint) -> Self {
        let heard = point.heard();
        Self {
            at: rfc3339(point.at_ns()),
            stable: heard.map(|(stable, ..)| stable),
            panic: heard.map(|(_, panic, _)| panic),
            in_flight: heard.map(|(.., in_flight)| in_flight),
            target: point.target,
            ready_pods: point.ready_pods,
            desired_pods: point.desired_pods,
        }
    }
}

fn parse_listing(query: &str) -> Result<Listing, (StatusCode, String)> {
    let mut listing = Listing::first(DEFAULT_LISTED);
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        let wrong = |expected: String| wrong_parameter(&name, &value, &expected);
        match &*name {
            "search" => listing.search = value.into_owned(),
            "limit" => listing.max = parse_limit(&value)?,
            "sort" => listing.order = Order::parse(&value).map_err(wrong)?,
            "state" => listing.state = Some(KeyState::parse(&value).map_err(wrong)?),
            _ => {}
        }
    }
    Ok(listing)
}

fn parse_limit(value: &str) -> Result<usize, (StatusCode, String)> {
    let limit = value.parse().ok().filter(|limit| *limit <= MAX_LISTED);
    limit.ok_or_else(|| wrong_parameter("limit", value, &format!("a whole number from 0 to {MAX_LISTED}")))
}

fn wrong_parameter(name: &str, value: &str, expected: &str) -> (StatusCode, String) {
    let given: String = value.chars().take(100).collect();
    (StatusCode::BAD_REQUEST, format!("`{name}` is {given:?}; expected {expected}\n"))
}

/// Which senders to list.
struct SenderQuery {
    /// Those whose names come after this one.
    after: String,
    limit: usize,
}

impl SenderQuery {
    fn parse(query: &str) -> Result<Self, (StatusCode, String)> {
        let mut senders = Self { after: String::new(), limit: DEFAULT_LISTED };
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            if name == "after" {
                senders.after = value.into_owned();
            } else if name == "limit" {
                senders.limit = parse_limit(&value)?;
            }
        }
        Ok(senders)
    }
}

/// A sender as JSON.
#[derive(Serialize)]
struct SenderJson<'a> {
    name: &'a str,
    role: &'static str,
    live: bool,
    in_flight: u64,
    proxied_in_flight: u64,
    average_concurrency: f64,
    last_report_age_ms: u64,
}

impl<'a> From<&'a SenderFigures> for SenderJson<'a> {
    fn from(sender: &'a SenderFigures) -> Self {
        Self {
            name: &sender.name,
            role: match sender.role {
                Role::Pod => "pod",
                Role::Gateway => "gateway",
            },
            live: sender.is_live,
            in_flight: sender.in_flight,
            proxied_in_flight: sender.proxied_in_flight,
            average_concurrency: sender.average_concurrency,
            last_report_age_ms: sender.last_report_age_ms,
        }
    }
}

/// Appends items as the elements of a JSON array, as many as fit into [`MAX_LIST_BYTES`]. Returns
/// how many did.
fn write_elements<T: Serialize>(text: &mut Vec<u8>, items: impl Iterator<Item = T>) -> usize {
    let mut written = 0;
    for item in items {
        let before = text.len();
        if written > 0 {
            text.push(b',');
        }
        if serde_json::to_writer(&mut *text, &item).is_err() || text.len() > MAX_LIST_BYTES {
            text.truncate(before);
            break;
        }
        written += 1;
    }
    written
}

fn json(mut text: Vec<u8>) -> Response {
    text.shrink_to_fit();
    ([(header::CONTENT_TYPE, "application/json")], text).into_response()
}

/// Lists the first keys that match, and in `found` how many there are, also beyond the limit.
pub async fn list_keys(
    State(state): State<Arc<ServerState>>,
    grant: Grant,
    RawQuery(query): RawQuery,
) -> Result<Response, (StatusCode, String)> {
    let listing = parse_listing(query.as_deref().unwrap_or_default())?;
    let listed = state.list(move |state| {
        let (views, found) = state.keys.views(&grant, &listing, state.keys.now_ns());
        let mut text = b"{\"keys\":[".to_vec();
        write_elements(&mut text, views.into_iter().map(KeyJson::from));
        text.extend_from_slice(format!("],\"found\":{found}}}").as_bytes());
        text
    });
    listed.await.map(json).map_err(|error| not_listed(&error))
}

fn not_listed(error: &JoinError) -> (StatusCode, String) {
    (StatusCode::INTERNAL_SERVER_ERROR, format!("cannot list: {error}\n"))
}

/// Lists a key's senders in order of their names, in `found` how many it has, and in `next` what to
/// ask for as `after` to get those that follow.
pub async fn list_senders(
    State(state): State<Arc<ServerState>>,
    KeyPath { name, .. }: KeyPath,
    RawQuery(query): RawQuery,
) -> Result<Response, (StatusCode, String)> {
    let SenderQuery { after, limit } = SenderQuery::parse(query.as_deref().unwrap_or_default())?;
    let listed = state.list(move |state| {
        let Some(page) = state.keys.read(&name, |key| key.senders(&after, limit, state.keys.now_ns())) else {
            return unknown_key(&name);
        };
        let SenderPage { senders, found, has_more } = page;
        let mut text = b"{\"senders\":[".to_vec();
        let written = write_elements(&mut text, senders.iter().map(SenderJson::from));
        let last = written.checked_sub(1).and_then(|last| senders.get(last));
        let next = last.filter(|_| has_more || written < senders.len()).map(|last| &last.name);
        let end = format!("],\"found\":{found},\"next\":{}}}", serde_json::json!(next));
        text.extend_from_slice(end.as_bytes());
        json(text)
    });
    listed.await.map_err(|error| not_listed(&error))
}

/// Returns the response for a key that is not known.
pub fn unknown_key(name: &KeyName) -> Response {
    (StatusCode::NOT_FOUND, format!("key {name} is unknown: it has neither reports nor settings\n"))
        .into_response()
}

/// Shows a key's figures.
pub async fn get_key(State(state): State<Arc<ServerState>>, KeyPath { name, .. }: KeyPath) -> Response {
    let view = state.keys.view(&name, state.keys.now_ns());
    view.map_or_else(|| unknown_key(&name), |view| Json(KeyJson::from(view)).into_response())
}

/// Shows a key's last decisions.
pub async fn get_history(State(state): State<Arc<ServerState>>, KeyPath { name, .. }: KeyPath) -> Response {
    let seconds_between = DECISION_PERIOD_NS / 1_000_000_000;
    let Some(History { metric, points }) = state.keys.history(&name) else { return unknown_key(&name) };
    let points = points.iter().map(HistoryPointJson::from).collect();
    Json(HistoryJson { seconds_between, metric, points }).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_ends_before_it_is_too_large() {
        let mut text = b"[".to_vec();
        let written = write_elements(&mut text, std::iter::repeat_n("x".repeat(1 << 20), 20));
        assert_eq!(written, 7);
        text.push(b']');
        assert!(text.len() <= MAX_LIST_BYTES);
        assert_eq!(serde_json::from_slice::<Vec<String>>(&text).unwrap().len(), 7);
    }
}
