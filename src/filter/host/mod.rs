//! The boundary to the host: every call that the plugin makes of it, as one trait. [`Host`] is
//! Envoy in the shipped module (`envoy`) and a simulated one in this crate's tests.

#[cfg(target_arch = "wasm32")]
pub mod envoy;
pub mod metric;

use std::time::Duration;

use inflight_stats::counting::time::MonotonicNs;
use inflight_stats::pod::store::Store;

/// Header maps, by proxy-wasm's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum HeaderMap {
    Request = 0,
    Response = 2,
    CallResponse = 6,
}

/// Kinds of stats, by proxy-wasm's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MetricKind {
    Counter = 0,
    Gauge = 1,
    Histogram = 2,
}

/// A message queue between workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mailbox(pub u32);

impl Mailbox {
    /// What stands for a mailbox where the host gave none. Nothing arrives in it: grants are then
    /// found at the tick.
    pub const NONE: Self = Self(u32::MAX);
}

/// An HTTP call to make.
pub struct HttpCall<'a> {
    /// The Envoy cluster to call.
    pub cluster: &'a str,
    pub headers: Vec<(&'a str, &'a str)>,
    pub body: &'a [u8],
    pub timeout: Duration,
}

/// The host. No call panics; what fails is a value, or has no effect.
///
/// Contexts, streams among them, go by the numbers that the host gave them. A call concerns the
/// context in effect: the one that was called back, or the one that was set last.
pub trait Host: Store + Copy + 'static {
    /// Returns the process's monotonic clock, the same for all its threads.
    fn monotonic(self) -> MonotonicNs;

    /// Returns nanoseconds since 1970 by the wall clock; 0 if the host has none.
    fn wall_ns(self) -> u64;

    /// Sets the next tick of this root context to so many milliseconds from now (at least one), and
    /// those after it to that distance. Called from a tick, it re-arms the timer.
    fn tick_in(self, milliseconds: u64);

    /// Returns the configuration of the plugin whose root context is in effect.
    fn plugin_configuration(self) -> Vec<u8>;

    /// Returns a variable of the VM's environment.
    fn environment(self, name: &str) -> Option<String>;

    /// Puts another context into effect. Returns `false` if there is no such context (any more).
    fn set_effective_context(self, context: u32) -> bool;

    /// Completes a deferred `on_done` of the root context in effect.
    fn complete_done(self);

    /// Returns the value of a header, if it is there. `name` is in lower case.
    fn header(self, map: HeaderMap, name: &str) -> Option<Vec<u8>>;

    /// Sets a header to one value, whatever it was.
    fn set_header(self, map: HeaderMap, name: &str, value: &[u8]);

    /// Takes a header away, if it is there.
    fn remove_header(self, map: HeaderMap, name: &str);

    /// Returns a property; `path` has a zero byte between its parts.
    fn property(self, path: &str) -> Option<Vec<u8>>;

    /// Lets the paused request in effect go on, after this callback has returned.
    fn continue_request(self);

    /// Answers the request in effect.
    fn respond(self, status: u32, body: &[u8], headers: &[(&str, &str)]);

    /// Makes an HTTP call from the context in effect. Returns its number; the answer comes to the
    /// context that made the call, and only while that exists.
    ///
    /// # Errors
    /// Why the host refused the call.
    fn http_call(self, call: HttpCall) -> Result<u32, String>;

    /// Returns the beginning of the body of the answer to an HTTP call.
    fn call_response_body(self, max_bytes: usize) -> Vec<u8>;

    /// Returns the mailbox of a name, made or taken over: the host calls this VM's root context
    /// when there is something in it.
    fn mailbox(self, name: &str) -> Option<Mailbox>;

    /// Puts a message into another worker's mailbox. Returns whether that worked.
    fn post(self, mailbox: Mailbox, message: &[u8]) -> bool;

    /// Takes the next message, if there is one.
    fn next_message(self, mailbox: Mailbox) -> Option<Vec<u8>>;

    /// Returns the number of a stat, if the host defines it.
    fn define_metric(self, kind: MetricKind, name: &str) -> Option<u32>;

    /// Sets a gauge, or adds a value to a histogram.
    fn record_metric(self, metric: u32, value: u64);

    /// Adds to a counter, or to a gauge.
    fn increment_metric(self, metric: u32, by: i64);

    /// Returns the size of this VM's memory in bytes; it never shrinks.
    fn memory_bytes(self) -> u64;

    /// Does something in the context of each of several streams, then goes back to `home`. A stream
    /// that is gone is left out: what is done would happen to whichever context is in effect.
    fn for_each_stream(self, streams: &[u32], home: u32, mut action: impl FnMut()) {
        for &stream in streams {
            if self.set_effective_context(stream) {
                action();
            }
        }
        if !streams.is_empty() {
            self.set_effective_context(home);
        }
    }

    /// Does something in another context than the present one, `home`.
    fn in_context(self, context: u32, home: u32, action: impl FnMut()) {
        self.for_each_stream(&[context], home, action);
    }

    /// Lets paused requests go on. Called in the context `home`.
    fn resume(self, streams: &[u32], home: u32) {
        self.for_each_stream(streams, home, || self.continue_request());
    }

    /// Answers several paused requests. Called in the context `home`.
    fn respond_to(self, streams: &[u32], home: u32, status: u32, body: &[u8], headers: &[(&str, &str)]) {
        self.for_each_stream(streams, home, || self.respond(status, body, headers));
    }

    /// Returns the code that the client was sent; 0 if the stream ended before any response. At a
    /// stream's end the response's headers are those that were sent, local replies included; a
    /// header costs a tenth of the property `response.code`.
    fn response_code(self) -> u16 {
        let status = self.header(HeaderMap::Response, ":status");
        status.and_then(|text| std::str::from_utf8(&text).ok()?.parse().ok()).unwrap_or(0)
    }

    /// Whether Envoy or the client ended the stream while the app may still have been at work on
    /// it, by Envoy's response flags.
    fn was_aborted(self) -> bool {
        // Timeouts of the upstream (UT), of the stream (SI) and later additions, a local reset
        // (LR), a client that went away (DC). The others mean that the app ended it, or never had
        // it.
        const UT: u64 = 0x4;
        const LR: u64 = 0x8;
        const DC: u64 = 0x4000;
        const FROM_SI_ON: u64 = !0xffff;
        let value = self.property("response\0flags").and_then(|bytes| <[u8; 8]>::try_from(bytes).ok());
        value.is_some_and(|bytes| u64::from_le_bytes(bytes) & (UT | LR | DC | FROM_SI_ON) != 0)
    }
}
