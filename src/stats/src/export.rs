//! The exporter's answers, as queue-proxy's metrics port gives them: Knative's `Stat` as protobuf, and
//! Prometheus text (knative/serving, `pkg/queue/protobuf_stats_reporter.go`; the seed's Prometheus reporter).

use std::fmt::Write;

use crate::identity::Identity;
use crate::shared::State;

/// The content type that Knative's autoscaler insists on.
pub const PROTOBUF: &str = "application/protobuf";
/// The Prometheus text format's.
pub const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Knative's `metrics.Stat`, as far as a scrape fills it: the receiver sets the time.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stat {
    /// The pod.
    pub pod_name: String,
    /// Requests in flight, on average over the last period.
    pub average_concurrent_requests: f64,
    /// Of these, proxied ones.
    pub average_proxied_concurrent_requests: f64,
    /// Requests that came in, a second.
    pub request_count: f64,
    /// Of these, proxied ones.
    pub proxied_request_count: f64,
    /// Seconds since the counters began.
    pub process_uptime: f64,
}

impl Stat {
    /// A pod's figures of the last period; all zero before the first one.
    pub fn of(pod_name: &str, state: Option<&State>, now_ns: u64) -> Self {
        let pod_name = pod_name.to_owned();
        let Some(state) = state else { return Self { pod_name, ..Self::default() } };
        let [before, latest] = state.published;
        let Some(period) = latest.since(&before).filter(|period| period.elapsed_ns > 0) else {
            return Self { pod_name, ..Self::default() };
        };
        let seconds = period.elapsed_ns as f64 / 1e9;
        Self {
            pod_name,
            average_concurrent_requests: period.average(),
            average_proxied_concurrent_requests: period.proxied_average(),
            request_count: period.requests as f64 / seconds,
            proxied_request_count: period.proxied_requests as f64 / seconds,
            process_uptime: now_ns.saturating_sub(state.started_ns) as f64 / 1e9,
        }
    }

    /// The protobuf bytes (proto3: a zero is left out). At most 336 bytes are read by Knative: a
    /// pod's name has at most 253.
    pub fn protobuf(&self) -> Vec<u8> {
        const LENGTH_DELIMITED: u8 = 2;
        const FIXED64: u8 = 1;
        let mut bytes = Vec::with_capacity(self.pod_name.len() + 50);
        if !self.pod_name.is_empty() {
            bytes.push(1 << 3 | LENGTH_DELIMITED);
            let mut length = self.pod_name.len();
            while length >= 0x80 {
                bytes.push(length as u8 | 0x80);
                length >>= 7;
            }
            bytes.push(length as u8);
            bytes.extend_from_slice(self.pod_name.as_bytes());
        }
        let doubles = [
            (2, self.average_concurrent_requests),
            (3, self.average_proxied_concurrent_requests),
            (4, self.request_count),
            (5, self.proxied_request_count),
            (6, self.process_uptime),
        ];
        for (field, value) in doubles {
            if value != 0.0 {
                bytes.push(field << 3 | FIXED64);
                bytes.extend_from_slice(&value.to_le_bytes());
            }
        }
        bytes
    }

    /// The same as Prometheus text, with the gauges of the seed's reporter.
    pub fn prometheus(&self, identity: &Identity) -> String {
        let labels = format!(
            "destination_namespace=\"{}\",destination_configuration=\"{}\",destination_revision=\"{}\",\
             destination_pod=\"{}\"",
            escape(&identity.namespace),
            escape(&identity.configuration),
            escape(&identity.revision),
            escape(&identity.pod)
        );
        let gauges = [
            ("queue_requests_per_second", "Number of requests received since last Stat", self.request_count),
            (
                "queue_proxied_operations_per_second",
                "Number of proxied requests received since last Stat",
                self.proxied_request_count,
            ),
            (
                "queue_average_concurrent_requests",
                "Number of requests currently being handled by this pod",
                self.average_concurrent_requests,
            ),
            (
                "queue_average_proxied_concurrent_requests",
                "Number of proxied requests currently being handled by this pod",
                self.average_proxied_concurrent_requests,
            ),
        ];
        let mut text = String::new();
        for (name, help, value) in gauges {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge\n{name}{{{labels}}} {value}");
        }
        text
    }
}

fn escape(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// What a request to the exporter gets.
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

/// Decides by method, path (a query is ignored) and Accept header.
pub fn route(method: &[u8], path: &[u8], accept: Option<&[u8]>) -> Route {
    let path = path.split(|b| *b == b'?').next().unwrap_or_default();
    if path != b"/metrics" {
        return Route::NotFound;
    }
    if method != b"GET" && method != b"HEAD" {
        return Route::MethodNotAllowed;
    }
    // As queue-proxy: the header contains the type, whatever else it lists.
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

    /// From the .proto as Knative has it, decoded by a protobuf library.
    #[derive(Clone, PartialEq, Message)]
    struct Theirs {
        #[prost(string, tag = "1")]
        pod_name: String,
        #[prost(double, tag = "2")]
        average_concurrent_requests: f64,
        #[prost(double, tag = "3")]
        average_proxied_concurrent_requests: f64,
        #[prost(double, tag = "4")]
        request_count: f64,
        #[prost(double, tag = "5")]
        proxied_request_count: f64,
        #[prost(double, tag = "6")]
        process_uptime: f64,
        #[prost(int64, tag = "7")]
        timestamp: i64,
    }

    #[test]
    fn a_protobuf_library_reads_what_we_write() {
        let ours = Stat {
            pod_name: "p".repeat(253),
            average_concurrent_requests: 1.25,
            average_proxied_concurrent_requests: 0.5,
            request_count: 1e9,
            proxied_request_count: 3.0,
            process_uptime: 86_400.5,
        };
        let bytes = ours.protobuf();
        assert!(bytes.len() <= 336, "{} bytes", bytes.len());
        let theirs = Theirs::decode(bytes.as_slice()).unwrap();
        assert_eq!(theirs.encode_to_vec(), bytes);
        assert_eq!((theirs.pod_name, theirs.timestamp), (ours.pod_name, 0));
        assert_eq!((theirs.average_concurrent_requests, theirs.request_count), (1.25, 1e9));
        let empty = Stat { pod_name: "pod".into(), ..Stat::default() }.protobuf();
        assert_eq!(empty, b"\x0a\x03pod");
    }

    #[test]
    fn labels_are_escaped() {
        let identity = Identity { namespace: "a\"b\\c".into(), ..Identity::default() };
        let text = Stat::default().prometheus(&identity);
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
