//! The boundary to the host: every host call that the plugin makes, as one trait. [`Host`] is Envoy
//! in the shipped module (`envoy`), and a simulated host in this crate's tests.

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

/// A mailbox: a message queue of one worker, to which other workers post.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mailbox(pub u32);

impl Mailbox {
    /// Stands for a mailbox where the host gave none. No message arrives in it; grants are then
    /// found at the tick.
    pub const NONE: Self = Self(u32::MAX);
}

/// An HTTP call to be made.
pub struct HttpCall<'a> {
    /// The Envoy cluster to call.
    pub cluster: &'a str,
    pub headers: Vec<(&'a str, &'a str)>,
    pub body: &'a [u8],
    pub timeout: Duration,
}

/// An answer to a client that comes from here.
pub struct LocalReply<'a> {
    pub status: u32,
    /// The response code's details, as the access log shows them.
    pub details: &'a str,
    pub body: &'a [u8],
    pub headers: &'a [(&'a str, &'a str)],
}

/// The response code's details of answers that need no more than that.
pub const DETAILS: &str = "inflight";

/// Why the host refused an HTTP call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallError {
    /// Envoy has no cluster of that name (its status `BadArgument`).
    UnknownCluster,
    /// The cluster has no host to call (its status `InternalFailure`).
    NoHost,
}

/// The host. No call panics. A call that fails returns a value that says so, or has no effect.
///
/// Contexts, including streams, are identified by the numbers that the host gave them. A call
/// concerns the context in effect: the one that the host called, or the one that was set last.
pub trait Host: Store + Copy + 'static {
    /// Returns the process's monotonic clock, the same for all its threads.
    fn monotonic(self) -> MonotonicNs;

    /// Returns nanoseconds since 1970 by the wall clock; 0 if the host has none.
    fn wall_ns(self) -> u64;

    /// Sets the next tick of this root context to `milliseconds` from now (at least one), and
    /// further ticks to that interval. Called from a tick, it re-arms the timer.
    fn tick_in(self, milliseconds: u64);

    /// Returns the configuration of the plugin whose root context is in effect.
    fn plugin_configuration(self) -> Vec<u8>;

    /// Returns a variable of the VM's environment.
    fn environment(self, name: &str) -> Option<String>;

    /// Puts another context into effect. Returns `false` if there is no such context, or no longer.
    fn set_effective_context(self, context: u32) -> bool;

    /// Completes a deferred `on_done` of the root context in effect.
    fn complete_done(self);

    /// Returns the value of a header, if the header exists. `name` is in lower case.
    fn header(self, map: HeaderMap, name: &str) -> Option<Vec<u8>>;

    /// Sets a header to one value, whatever its value was.
    fn set_header(self, map: HeaderMap, name: &str, value: &[u8]);

    /// Removes a header, if it exists.
    fn remove_header(self, map: HeaderMap, name: &str);

    /// Returns a property; `path` has a zero byte between its parts.
    fn property(self, path: &str) -> Option<Vec<u8>>;

    /// Resumes the paused request in effect, after this callback has returned.
    fn continue_request(self);

    /// Answers the request in effect.
    fn respond(self, reply: &LocalReply);

    /// Makes an HTTP call from the context in effect. Returns the call's number. The answer comes
    /// to the context that made the call, and only while that context exists.
    ///
    /// # Errors
    /// Why the host refused the call.
    fn http_call(self, call: HttpCall) -> Result<u32, CallError>;

    /// Returns the beginning of the body of the answer to an HTTP call.
    fn call_response_body(self, max_bytes: usize) -> Vec<u8>;

    /// Returns the mailbox with a name, which is created if need be, or [`Mailbox::NONE`]. The host
    /// calls this VM's root context when there is a message in it.
    fn mailbox(self, name: &str) -> Mailbox;

    /// Posts a message to another worker's mailbox. Returns whether that succeeded.
    fn send_message(self, mailbox: Mailbox, message: &[u8]) -> bool;

    /// Takes the next message out of a mailbox, if there is one.
    fn next_message(self, mailbox: Mailbox) -> Option<Vec<u8>>;

    /// Returns the number of a stat, if the host accepts its definition.
    fn define_metric(self, kind: MetricKind, name: &str) -> Option<u32>;

    /// Sets a gauge, or adds a value to a histogram.
    fn record_metric(self, metric: u32, value: u64);

    /// Adds to a counter, or to a gauge.
    fn increment_metric(self, metric: u32, by: i64);

    /// Returns the size of this VM's memory in bytes; it never shrinks.
    fn memory_bytes(self) -> u64;

    /// Performs an action in the context of each of several streams, then goes back to `home`. A
    /// stream that no longer exists is skipped; otherwise the action would concern whichever
    /// context is in effect.
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

    /// Performs an action in another context than the present one, `home`.
    fn in_context(self, context: u32, home: u32, action: impl FnMut()) {
        self.for_each_stream(&[context], home, action);
    }

    /// Resumes paused requests. Called in the context `home`.
    fn resume(self, streams: &[u32], home: u32) {
        self.for_each_stream(streams, home, || self.continue_request());
    }

    /// Returns the code that the client was sent; 0 if the stream ended before any response. At the
    /// end of a stream, the response's headers are those that were sent, including local replies.
    /// Reading a header costs a tenth of the property `response.code`.
    fn response_code(self) -> u16 {
        let status = self.header(HeaderMap::Response, ":status");
        status.and_then(|text| std::str::from_utf8(&text).ok()?.parse().ok()).unwrap_or(0)
    }

    /// Returns whether Envoy or the client ended the stream while the app may still have been
    /// working on it, by Envoy's response flags.
    fn was_aborted(self) -> bool {
        // Timeouts of the upstream (UT) and of the stream (SI) and flags added to Envoy later, a
        // local reset (LR), a client that disconnected (DC). All other flags mean that the app
        // ended the stream, or never had it.
        const UT: u64 = 0x4;
        const LR: u64 = 0x8;
        const DC: u64 = 0x4000;
        const FROM_SI_ON: u64 = !0xffff;
        self.response_flags() & (UT | LR | DC | FROM_SI_ON) != 0
    }

    /// Returns whether Envoy had no host to send the request to, or could not connect to the one
    /// that it chose.
    fn had_no_upstream(self) -> bool {
        const UH: u64 = 0x2;
        const UF: u64 = 0x20;
        self.response_flags() & (UH | UF) != 0
    }

    /// Returns Envoy's response flags, by the numbers of its `CoreResponseFlag`; 0 if there are none.
    fn response_flags(self) -> u64 {
        let value = self.property("response\0flags").and_then(|bytes| <[u8; 8]>::try_from(bytes).ok());
        value.map_or(0, u64::from_le_bytes)
    }
}
