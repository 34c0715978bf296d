//! `POST /v1/reports`.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use inflight_stats::Report;
use inflight_stats::counting::time::nanoseconds;
use inflight_stats::protocol::report::CONTENT_TYPE;
use tracing::{debug, warn};

use crate::app::state::ServerState;
use crate::cli::limits::Limit;
use crate::http::body::{self, ReceivedBody};
use crate::http::extract::forbidden;
use crate::keys::key_table::RecordError;
use crate::net::auth::{Grant, Peer};
use crate::os::clock::{now_ns, wall_time};

/// Records a report.
pub async fn post_report(
    State(state): State<Arc<ServerState>>,
    grant: Grant,
    peer: Peer,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let (code, reason, bytes) = match record(&state, (peer, &grant), &headers, body).await {
        Ok(bytes) => (StatusCode::ACCEPTED, String::new(), bytes),
        Err((code, reason)) => (code, reason, 0),
    };
    state.metrics.report(code.as_u16(), bytes);
    if !reason.is_empty() {
        debug!(%code, reason, "answered a report with an error");
    }
    (code, reason).into_response()
}

/// Returns how many bytes the report had.
async fn record(
    state: &ServerState,
    (peer, grant): (Peer, &Grant),
    headers: &HeaderMap,
    body: Body,
) -> Result<usize, (StatusCode, String)> {
    let content_type = headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    if let Some(given) = content_type.filter(|given| *given != CONTENT_TYPE.as_bytes()) {
        let given = String::from_utf8_lossy(given);
        let reason = format!("content-type is {given}; expected {CONTENT_TYPE}\n");
        return Err((StatusCode::UNSUPPORTED_MEDIA_TYPE, reason));
    }
    let body = body::receive(state, body, Limit::ReportBytes, state.limits.max_report_bytes).await?;
    let ReceivedBody { bytes, .. } = &body;
    let invalid = |error| (StatusCode::BAD_REQUEST, format!("{error}\n"));
    let mut report = Report::decode(bytes).map_err(invalid)?;
    // By the wall clock as it is now: at the server's start it may have been wrong.
    let wall_ns = nanoseconds(wall_time());
    report.check_clock(wall_ns.max(now_ns())).map_err(invalid)?;
    let (keys, max) = (report.messages.len(), state.limits.max_messages);
    if keys > max {
        state.metrics.refused(Limit::Messages);
        let reason = format!("the report has {keys} keys; expected at most {max} (--max-messages)\n");
        // A sender splits a report on this answer, and drops it on a 400.
        return Err((StatusCode::PAYLOAD_TOO_LARGE, reason));
    }
    remove_forbidden(state, peer, grant, &mut report)?;
    let (pod, length) = (report.pod.clone(), bytes.len());
    let recorded = state.changes.report(report, length).await.map_err(|(unavailable, report)| {
        // Whoever waits for a key's first request need not wait for the store.
        state.keys.wake(&report);
        (StatusCode::SERVICE_UNAVAILABLE, format!("{unavailable}\n"))
    })?;
    match recorded {
        Ok(()) => Ok(length),
        Err(RecordError::CounterDecreased(name, error)) => {
            Err((StatusCode::CONFLICT, format!("key {name}: {error}\n")))
        }
        // Not a 4xx: the sender sends it again, and is recorded once there is capacity.
        Err(RecordError::CapacityExceeded(exceeded)) => {
            state.metrics.refused(exceeded.limit);
            state.log_limiter.log(|suppressed| {
                warn!(reason = %exceeded, pod, suppressed, "left out keys of a report");
            });
            Err((StatusCode::INSUFFICIENT_STORAGE, format!("{exceeded}\n")))
        }
    }
}

/// Leaves out the keys whose namespace is not granted. A gateway whose clients name the keys may
/// report some; if they had the whole report refused, it would have to send them for ever, and all
/// others with them.
fn remove_forbidden(
    state: &ServerState,
    peer: Peer,
    grant: &Grant,
    report: &mut Report,
) -> Result<(), (StatusCode, String)> {
    let forbidden_key = report.messages.iter().find(|message| !grant.covers(&message.namespace));
    let Some(namespace) = forbidden_key.map(|message| message.namespace.clone()) else { return Ok(()) };
    let keys = report.messages.len();
    report.messages.retain(|message| grant.covers(&message.namespace));
    let left_out = keys - report.messages.len();
    state.metrics.report_keys_forbidden.inc_by(left_out as u64);
    if report.messages.is_empty() {
        return Err(forbidden(state, peer, &namespace));
    }
    state.log_limiter.log(|suppressed| {
        warn!(
            namespace,
            pod = report.pod,
            left_out,
            suppressed,
            "left out keys of a namespace that the token does not cover"
        );
    });
    Ok(())
}
