//! Knative's stats as protobuf: what its autoscaler scrapes, and what its activators stream to it
//! (knative/serving, `pkg/autoscaler/metrics/stat.proto`, package `metrics`).
//!
//! Strings are declared as bytes. They are the same on the wire, but a decoded one is a part of the
//! frame instead of a copy, so that a stat costs no allocation. [`crate::protocol::frame::decode`]
//! checks that they are UTF-8, as every proto3 reader must.

use bytes::Bytes;
use prost::Message;

/// What one pod had to do in one period.
#[derive(Clone, PartialEq, Message)]
pub struct Stat {
    /// The pod, or the activator.
    #[prost(bytes = "bytes", tag = "1")]
    pub pod_name: Bytes,
    /// Requests in flight, on average.
    #[prost(double, tag = "2")]
    pub average_concurrent_requests: f64,
    /// Of these, proxied ones.
    #[prost(double, tag = "3")]
    pub average_proxied_concurrent_requests: f64,
    /// Requests that came in, a second.
    #[prost(double, tag = "4")]
    pub request_count: f64,
    /// Of these, proxied ones.
    #[prost(double, tag = "5")]
    pub proxied_request_count: f64,
    /// Seconds since the sender's counters began.
    #[prost(double, tag = "6")]
    pub process_uptime: f64,
    /// Unix seconds; receivers use their own clock.
    #[prost(int64, tag = "7")]
    pub timestamp: i64,
}

/// A stat and the key it is of.
#[derive(Clone, PartialEq, Message)]
pub struct WireStatMessage {
    /// The key's namespace.
    #[prost(bytes = "bytes", tag = "1")]
    pub namespace: Bytes,
    /// The key's name.
    #[prost(bytes = "bytes", tag = "2")]
    pub name: Bytes,
    /// A message without a stat is skipped.
    #[prost(message, optional, tag = "3")]
    pub stat: Option<Stat>,
}

/// A frame of the stream.
#[derive(Clone, PartialEq, Message)]
pub struct WireStatMessages {
    /// One for each key, or more.
    #[prost(message, repeated, tag = "1")]
    pub messages: Vec<WireStatMessage>,
}
