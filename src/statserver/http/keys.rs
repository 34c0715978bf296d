//! `GET /v1/keys`, and a key's figures and history.

use std::sync::Arc;

use axum::extract::{RawQuery, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use inflight_stats::protocol::key_name::KeyName;
use inflight_stats::scaling::decider::DECISION_PERIOD_NS;
use inflight_stats::scaling::key::Averages;
use inflight_stats::scaling::settings::KeySettings;
use serde::Serialize;

use crate::app::state::ServerState;
use crate::http::extract::KeyPath;
use crate::keys::history::HistoryPoint;
use crate::keys::key_table::KeyView;
use crate::net::auth::Grant;
use crate::os::clock::now_ns;

/// How many keys one `GET` lists if its query does not say, and at most.
const DEFAULT_LISTED: usize = 100;
const MAX_LISTED: usize = 10_000;
/// The largest list in bytes: names may be long.
const MAX_LIST_BYTES: usize = 8 << 20;

/// The parameters of `GET /v1/keys`.
pub const LIST_PARAMETERS: &[&str] = &["search", "limit"];

/// A key as JSON.
#[derive(Serialize)]
struct KeyJson {
    namespace: String,
    name: String,
    requests_total: u64,
    in_flight: u64,
    pods: u64,
    stable: AveragesJson,
    panic: AveragesJson,
    /// `null` where it is not known yet.
    desired_pods: Option<u32>,
    panic_mode: bool,
    /// `null` before the first decision.
    excess_burst_capacity: Option<i64>,
    /// `null` before the first report.
    last_report_age_ms: Option<u64>,
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
        let KeyView { name: KeyName { namespace, name }, figures, desired_pods, decision, settings } = view;
        Self {
            namespace,
            name,
            requests_total: figures.requests_total,
            in_flight: figures.in_flight,
            pods: figures.pods,
            stable: figures.stable.into(),
            panic: figures.panic.into(),
            desired_pods,
            panic_mode: decision.is_some_and(|decision| decision.panic_mode),
            excess_burst_capacity: decision.map(|decision| decision.excess_burst_capacity),
            last_report_age_ms: figures.last_report_age_ms,
            settings,
        }
    }
}

/// A key's history as JSON.
#[derive(Serialize)]
struct HistoryJson {
    seconds_between: u64,
    points: Vec<HistoryPoint>,
}

/// Which keys to list.
struct ListQuery {
    /// A part of `namespace/name`.
    search: String,
    limit: usize,
}

impl ListQuery {
    fn parse(query: &str) -> Result<Self, (StatusCode, String)> {
        let mut list = Self { search: String::new(), limit: DEFAULT_LISTED };
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            if name == "search" {
                list.search = value.into_owned();
            } else if name == "limit" {
                list.limit = value.parse().ok().filter(|limit| *limit <= MAX_LISTED).ok_or_else(|| {
                    let given: String = value.chars().take(100).collect();
                    let reason =
                        format!("`limit` is {given:?}; expected a whole number from 0 to {MAX_LISTED}\n");
                    (StatusCode::BAD_REQUEST, reason)
                })?;
            }
        }
        Ok(list)
    }
}

/// Lists the first keys that match, and in `found` how many there are, also beyond the limit.
pub async fn list_keys(
    State(state): State<Arc<ServerState>>,
    grant: Grant,
    RawQuery(query): RawQuery,
) -> Result<Response, (StatusCode, String)> {
    let ListQuery { search, limit } = ListQuery::parse(query.as_deref().unwrap_or_default())?;
    let _one_at_a_time = state.listing.lock().await;
    let (views, found) = state.keys.views(&grant, &search, limit, now_ns());
    let mut text = b"{\"keys\":[".to_vec();
    for view in views {
        let before = text.len();
        if before > b"{\"keys\":[".len() {
            text.push(b',');
        }
        let written = serde_json::to_writer(&mut text, &KeyJson::from(view));
        if written.is_err() || text.len() > MAX_LIST_BYTES {
            text.truncate(before);
            break;
        }
    }
    text.extend_from_slice(format!("],\"found\":{found}}}").as_bytes());
    text.shrink_to_fit();
    Ok(([(header::CONTENT_TYPE, "application/json")], text).into_response())
}

/// Returns the response for a key that is not known.
pub fn unknown_key(name: &KeyName) -> Response {
    (StatusCode::NOT_FOUND, format!("key {name} is unknown: it has neither reports nor settings\n"))
        .into_response()
}

/// Shows a key's figures.
pub async fn get_key(State(state): State<Arc<ServerState>>, KeyPath { name, .. }: KeyPath) -> Response {
    let view = state.keys.view(&name, now_ns());
    view.map_or_else(|| unknown_key(&name), |view| Json(KeyJson::from(view)).into_response())
}

/// Shows a key's last decisions.
pub async fn get_history(State(state): State<Arc<ServerState>>, KeyPath { name, .. }: KeyPath) -> Response {
    let seconds_between = DECISION_PERIOD_NS / 1_000_000_000;
    let points = state.keys.history(&name);
    points.map_or_else(
        || unknown_key(&name),
        |points| Json(HistoryJson { seconds_between, points }).into_response(),
    )
}
