//! The exporter's answers, as queue-proxy's metrics port gives them: Knative's `Stat` as protobuf
//! (knative/serving, `pkg/queue/protobuf_stats_reporter.go`), and Prometheus text (an older
//! Knative's `pkg/queue/prometheus_stats_reporter.go`).

use std::fmt::Write;

use crate::config::identity::Identity;
use crate::pod::pod_state::PodState;
use crate::protocol::stat::Stat;

/// The content type that Knative's autoscaler requires.
pub const PROTOBUF: &str = "application/protobuf";
/// The content type of the Prometheus text format.
pub const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Returns a pod's figures of the last period. The uptime is as of the end of the period, too, so a
/// scraper that tells periods apart by it sees each period once, however often it asks. All figures
/// are zero before the first period. The receiver sets the time.
pub fn knative_stat(pod_name: &str, state: Option<&PodState>) -> Stat {
    let stat = Stat { pod_name: pod_name.as_bytes().to_vec().into(), ..Stat::default() };
    let Some(state) = state else { return stat };
    let [before, latest] = state.published;
    let Some(period) = latest.since(&before).filter(|period| period.elapsed_ns > 0) else {
        return stat;
    };
    let seconds = period.elapsed_ns as f64 / 1e9;
    Stat {
        average_concurrent_requests: period.average(),
        average_proxied_concurrent_requests: period.proxied_average(),
        request_count: period.requests as f64 / seconds,
        proxied_request_count: period.proxied_requests as f64 / seconds,
        process_uptime: latest.as_of_ns.saturating_sub(state.started_ns) as f64 / 1e9,
        ..stat
    }
}

/// Returns the same figures as Prometheus text, with the gauges of Knative's
/// `prometheus_stats_reporter.go`.
pub fn prometheus(stat: &Stat, identity: &Identity) -> String {
    let labels = format!(
        "destination_namespace=\"{}\",destination_configuration=\"{}\",destination_revision=\"{}\",\
         destination_pod=\"{}\"",
        escape(&identity.namespace),
        escape(&identity.configuration),
        escape(&identity.revision),
        escape(&identity.pod)
    );
    let gauges = [
        ("queue_requests_per_second", "Requests per second over the last period", stat.request_count),
        (
            "queue_proxied_operations_per_second",
            "Proxied requests per second over the last period",
            stat.proxied_request_count,
        ),
        (
            "queue_average_concurrent_requests",
            "Average concurrent requests over the last period",
            stat.average_concurrent_requests,
        ),
        (
            "queue_average_proxied_concurrent_requests",
            "Average concurrent proxied requests over the last period",
            stat.average_proxied_concurrent_requests,
        ),
    ];
    let mut text = String::new();
    for (name, help, value) in gauges {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge\n{name}{{{labels}}} {value}");
    }
    text
}

fn escape(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// The answer to a request to the exporter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// The figures as protobuf.
    Protobuf,
    /// The figures as text.
    Text,
    /// 404.
    NotFound,
    /// 405.
    MethodNotAllowed,
}

/// Returns the answer by method, path (a query is ignored) and Accept header.
pub fn route(method: &[u8], path: &[u8], accept: Option<&[u8]>) -> Route {
    let path = path.split(|b| *b == b'?').next().unwrap_or_default();
    if path != b"/metrics" {
        return Route::NotFound;
    }
    if method != b"GET" && method != b"HEAD" {
        return Route::MethodNotAllowed;
    }
    // As in queue-proxy: the header contains the type, whatever else it lists.
    let accept = accept.unwrap_or_default();
    if accept.windows(PROTOBUF.len()).any(|part| part.eq_ignore_ascii_case(PROTOBUF.as_bytes())) {
        Route::Protobuf
    } else {
        Route::Text
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    /// Knative reads no more than this of the answer to a scrape.
    const READ_BYTES: usize = 336;

    #[test]
    fn the_longest_pod_name_fits_what_knative_reads() {
        let stat = Stat {
            pod_name: "p".repeat(253).into(),
            average_concurrent_requests: 1.25,
            average_proxied_concurrent_requests: 0.5,
            request_count: 1e9,
            proxied_request_count: 3.0,
            process_uptime: 86_400.5,
            timestamp: 0,
        };
        assert!(stat.encoded_len() <= READ_BYTES, "{} bytes", stat.encoded_len());
        assert_eq!(knative_stat("pod", None).encode_to_vec(), b"\x0a\x03pod");
    }

    #[test]
    fn labels_are_escaped() {
        let identity = Identity { namespace: "a\"b\\c".into(), ..Identity::default() };
        let text = prometheus(&Stat::default(), &identity);
        assert!(text.contains(r#"queue_requests_per_second{destination_namespace="a\"b\\c","#), "{text}");
    }

    #[test]
    fn what_a_request_gets() {
        let accept = Some(&b"text/html, application/protobuf;q=0.9"[..]);
        assert_eq!(route(b"GET", b"/metrics", accept), Route::Protobuf);
        assert_eq!(route(b"HEAD", b"/metrics?x=1", None), Route::Text);
        assert_eq!(route(b"POST", b"/metrics", None), Route::MethodNotAllowed);
        assert_eq!(route(b"POST", b"/metric", None), Route::NotFound);
        assert_eq!(route(b"GET", b"/metrics/", None), Route::NotFound);
        assert_eq!(route(b"GET", b"", Some(b"\xff")), Route::NotFound);
    }
}
