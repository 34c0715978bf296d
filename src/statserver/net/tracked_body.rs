//! The body of a response to a gRPC call, which tracks whether the client reads it.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};
use tokio::sync::OwnedSemaphorePermit;

use crate::net::connection_limits::ConnectionGuard;

/// A body with the permit of its call. HTTP/2 polls it for more whenever the client's window has
/// room; a client that does not open its window does not read.
#[derive(Debug)]
pub struct TrackedBody {
    body: Body,
    guard: Arc<ConnectionGuard>,
    number: u64,
    _permit: OwnedSemaphorePermit,
}

impl TrackedBody {
    /// Tracks a body that the client over this connection has to read.
    pub fn new(body: Body, guard: Arc<ConnectionGuard>, permit: OwnedSemaphorePermit) -> Self {
        let number = guard.response_started();
        Self { body, guard, number, _permit: permit }
    }
}

impl HttpBody for TrackedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let tracked = self.get_mut();
        let frame = Pin::new(&mut tracked.body).poll_frame(cx);
        tracked.guard.response_polled(tracked.number, frame.is_ready());
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for TrackedBody {
    fn drop(&mut self) {
        self.guard.response_ended(self.number);
    }
}
