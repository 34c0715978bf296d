//! A connection, plain or within TLS: what both listeners serve.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_rustls::server::TlsStream;

use crate::cli::limits::Limit;
use crate::net::auth::Peer;
use crate::net::connection_limits::ConnectionGuard;
use crate::net::front_proxy::ClientCertificates;
use crate::net::tls::Protocol;

/// Maximum number of calls of an HTTP/2 connection that begin before the responses to others are
/// written.
const MAX_UNWRITTEN_CALLS: usize = 256;

/// What the bytes go over.
pub enum Transport {
    /// TCP.
    Plain(TcpStream),
    /// TLS over TCP.
    Tls(Box<TlsStream<TcpStream>>),
}

impl Transport {
    fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

/// A connection with its permit, which returns to the listener on drop. It keeps the deadlines of
/// its [`ConnectionGuard`], and ends when a client does not read.
pub struct Connection {
    transport: Transport,
    peer: Peer,
    certificates: Option<ClientCertificates>,
    guard: Arc<ConnectionGuard>,
    is_grpc: bool,
    /// Fires at the guard's deadline; made when it is first needed.
    read_timer: Option<Pin<Box<Sleep>>>,
    /// Fires when what is written has waited for too long; `blocked` says whether it waits.
    write_timer: Option<Pin<Box<Sleep>>>,
    blocked: bool,
    _permit: OwnedSemaphorePermit,
}

impl Connection {
    /// A connection after its handshake.
    pub fn new(
        transport: Transport,
        protocol: Protocol,
        (peer, certificates): (Peer, Option<ClientCertificates>),
        guard: ConnectionGuard,
        permit: OwnedSemaphorePermit,
    ) -> Self {
        Self {
            transport,
            peer,
            certificates,
            guard: Arc::new(guard),
            is_grpc: matches!(protocol, Protocol::Grpc),
            read_timer: None,
            write_timer: None,
            blocked: false,
            _permit: permit,
        }
    }

    /// Returns what is known of the client.
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// Returns the certificates that the client has shown, where they are asked for by requests.
    pub fn certificates(&self) -> Option<ClientCertificates> {
        self.certificates.clone()
    }

    /// Returns what keeps it to its limits.
    pub fn guard(&self) -> Arc<ConnectionGuard> {
        Arc::clone(&self.guard)
    }

    /// Nothing was received. Resolves once something should have been.
    fn poll_read_deadline(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(deadline) = self.guard.deadline() else { return Poll::Pending };
        ready!(timer(&mut self.read_timer, deadline.at).poll(cx));
        Poll::Ready(match deadline.limit {
            // As if the client had closed the connection.
            None => Ok(()),
            Some(limit) => {
                self.guard.refused(limit);
                Err(io::Error::new(io::ErrorKind::TimedOut, limit.flag()))
            }
        })
    }

    /// Passes on the result of a write. A client that keeps writes waiting has a limited time until
    /// everything is written, however little it reads meanwhile.
    fn after_write<T>(&mut self, cx: &mut Context<'_>, result: Poll<T>) -> Poll<Result<T, io::Error>> {
        if let Poll::Ready(result) = result {
            return Poll::Ready(Ok(result));
        }
        if !self.blocked {
            self.blocked = true;
            timer(&mut self.write_timer, Instant::now() + self.guard.write_timeout());
        }
        if let Some(timer) = &mut self.write_timer {
            ready!(timer.as_mut().poll(cx));
        }
        self.guard.refused(Limit::WriteTimeout);
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, Limit::WriteTimeout.flag())))
    }
}

/// Returns a timer that is set to this time.
fn timer(timer: &mut Option<Pin<Box<Sleep>>>, at: Instant) -> Pin<&mut Sleep> {
    let timer = timer.get_or_insert_with(|| Box::pin(sleep_until(at)));
    if timer.deadline() != at {
        timer.as_mut().reset(at);
    }
    timer.as_mut()
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let connection = self.get_mut();
        if connection.guard.is_closed() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        // Nothing is read of a client that does not read: its responses would have to be kept. The
        // write wakes this task.
        if connection.is_grpc && connection.blocked {
            return Poll::Pending;
        }
        if connection.is_grpc && connection.guard.unwritten_calls() > MAX_UNWRITTEN_CALLS {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buf.filled().len();
        let read = if connection.is_grpc {
            let max = buf.remaining().min(connection.guard.readable_in_poll());
            if max == 0 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let mut part = ReadBuf::new(buf.initialize_unfilled_to(max));
            let read = connection.transport.poll_read(cx, &mut part);
            let bytes = part.filled().len();
            buf.advance(bytes);
            read
        } else {
            connection.transport.poll_read(cx, buf)
        };
        match read {
            Poll::Ready(Ok(())) => {
                let bytes = buf.filled().len().saturating_sub(before);
                if bytes > 0 {
                    connection.guard.received(bytes)?;
                }
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => connection.poll_read_deadline(cx),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let connection = self.get_mut();
        let written = match &mut connection.transport {
            Transport::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Transport::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        };
        connection.after_write(cx, written).map(Result::flatten)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let connection = self.get_mut();
        let flushed = match &mut connection.transport {
            Transport::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Transport::Tls(stream) => Pin::new(stream).poll_flush(cx),
        };
        if flushed.is_ready() {
            // A flush comes after everything was handed over.
            connection.blocked = false;
            connection.guard.all_written();
        }
        connection.after_write(cx, flushed).map(Result::flatten)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let connection = self.get_mut();
        let shut = match &mut connection.transport {
            Transport::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Transport::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        };
        connection.after_write(cx, shut).map(Result::flatten)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let connection = self.get_mut();
        let written = match &mut connection.transport {
            Transport::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Transport::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        };
        connection.after_write(cx, written).map(Result::flatten)
    }

    fn is_write_vectored(&self) -> bool {
        match &self.transport {
            Transport::Plain(stream) => stream.is_write_vectored(),
            Transport::Tls(stream) => stream.is_write_vectored(),
        }
    }
}
