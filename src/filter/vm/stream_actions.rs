//! What is to be done with paused streams once nothing is borrowed any more.

use std::borrow::Cow;

use crate::host::{DETAILS, Host, LocalReply};

/// The content type of all answers of this filter to clients, as Go's `http.Error` sets it.
pub const PLAIN_TEXT: (&str, &str) = ("content-type", "text/plain; charset=utf-8");

/// An answer of this filter to a client: 503 and a line of text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The response code's details, as the access log shows them.
    pub details: &'static str,
    /// The text.
    pub body: Cow<'static, str>,
    /// Whether the client may try again after a second.
    pub retry: bool,
}

impl Refusal {
    /// Answers the request in effect.
    pub fn send(&self, host: impl Host) {
        const RETRY: (&str, &str) = ("retry-after", "1");
        let headers: &[(&str, &str)] = if self.retry { &[PLAIN_TEXT, RETRY] } else { &[PLAIN_TEXT] };
        host.respond(&LocalReply { status: 503, details: self.details, body: self.body.as_bytes(), headers });
    }
}

/// The answer to a network probe, as Knative's queue-proxy gives it (knative/serving,
/// `pkg/queue/health/handler.go`). The activator expects status and body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeReply {
    /// The app answers.
    Ready,
    /// It does not.
    NotReady,
}

impl ProbeReply {
    /// Answers the request in effect.
    pub fn send(self, host: impl Host) {
        let (status, body): (u32, &[u8]) = match self {
            Self::Ready => (200, b"queue"),
            Self::NotReady => (503, b""),
        };
        host.respond(&LocalReply { status, details: DETAILS, body, headers: &[PLAIN_TEXT] });
    }
}

/// How many streams are resumed or answered in one callback. Envoy acts on them when the callback
/// has returned, one after the other. Where that ends a stream at once, because a circuit breaker is
/// open or because the stream was answered, Envoy calls this VM for the stream's end, and acts on
/// the next stream before that call returns. So the depth of its stack grows with the number of
/// streams: with some hundreds, V8 finds the stack too large, and the VM ends.
const STREAMS_AT_ONCE: usize = 32;

/// What to do with streams of this worker once nothing is borrowed any more.
#[derive(Debug, Default)]
pub struct StreamActions {
    pub resume: Vec<u32>,
    pub refuse: Vec<(u32, Refusal)>,
    /// Network probes to answer.
    pub probes: Vec<(u32, ProbeReply)>,
}

impl StreamActions {
    /// Adds other actions.
    pub fn extend(&mut self, other: Self) {
        self.resume.extend(other.resume);
        self.refuse.extend(other.refuse);
        self.probes.extend(other.probes);
    }

    /// Returns whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.resume.is_empty() && self.refuse.is_empty() && self.probes.is_empty()
    }

    /// Returns all streams to which something is to be done.
    pub fn streams(self) -> impl Iterator<Item = u32> {
        let refused = self.refuse.into_iter().map(|(stream, _)| stream);
        self.resume.into_iter().chain(refused).chain(self.probes.into_iter().map(|(stream, _)| stream))
    }

    /// Takes the first actions out, at most [`STREAMS_AT_ONCE`].
    pub fn take_batch(&mut self) -> Self {
        let resumed = self.resume.len().min(STREAMS_AT_ONCE);
        let refused = self.refuse.len().min(STREAMS_AT_ONCE - resumed);
        let probes = self.probes.len().min(STREAMS_AT_ONCE - resumed - refused);
        Self {
            resume: self.resume.drain(..resumed).collect(),
            refuse: self.refuse.drain(..refused).collect(),
            probes: self.probes.drain(..probes).collect(),
        }
    }

    /// Performs the actions, from the context `home`.
    pub fn apply(self, host: impl Host, home: u32) {
        host.resume(&self.resume, home);
        for (stream, refusal) in &self.refuse {
            host.in_context(*stream, home, || refusal.send(host));
        }
        for (stream, reply) in &self.probes {
            host.in_context(*stream, home, || reply.send(host));
        }
    }
}
