//! A connection, plain or within TLS: what both listeners serve.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;
use tracing::{debug, warn};

use crate::limits::Limit;
use crate::metrics::Metrics;
use crate::tls::{Protocol, Tls};

/// What is known of who connected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// It showed a certificate that the client CA signed.
    pub certified: bool,
}

/// A connection; with it ends its place among those that are allowed.
pub struct Link {
    stream: Stream,
    peer: Peer,
    _place: OwnedSemaphorePermit,
}

enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// Takes connections, no more at once than allowed.
pub struct Door {
    listener: TcpListener,
    places: Arc<Semaphore>,
    metrics: Arc<Metrics>,
    protocol: Protocol,
    tls: Option<Arc<Tls>>,
    handshake: Duration,
}

/// A connection that has yet to shake hands.
pub struct Knock {
    stream: TcpStream,
    place: OwnedSemaphorePermit,
}

impl Door {
    /// Behind a listener; `most` connections at once, each with `handshake` to begin TLS.
    pub fn new(
        listener: TcpListener,
        protocol: Protocol,
        tls: Option<Arc<Tls>>,
        (most, handshake): (usize, Duration),
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { listener, places: Arc::new(Semaphore::new(most)), metrics, protocol, tls, handshake }
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The system's.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// The next connection for which there is a place; the others are told so, as far as that goes, and closed.
    pub async fn knock(&self) -> Knock {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => match Arc::clone(&self.places).try_acquire_owned() {
                    Ok(place) => return Knock { stream, place },
                    Err(_) => {
                        self.metrics.refused(Limit::Connections);
                        if self.tls.is_none() && matches!(self.protocol, Protocol::Http) {
                            let _ = stream.try_write(FULL);
                        }
                    }
                },
                Err(error) => {
                    // Out of file descriptors, most likely: the others go on, and end.
                    warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// Begins TLS, if that is spoken here; `None` if it did not come about.
    pub async fn open(&self, Knock { stream, place }: Knock) -> Option<Link> {
        // Answers are small and whole; waiting for more to send would only delay them.
        let _ = stream.set_nodelay(true);
        let Some(tls) = &self.tls else {
            // HTTP/1.1 is timed from its head on; HTTP/2 would wait for its first words for ever.
            if matches!(self.protocol, Protocol::Grpc)
                && tokio::time::timeout(self.handshake, has_preface(&stream)).await.is_err()
            {
                self.metrics.refused(Limit::HeadTimeout);
                return None;
            }
            return Some(Link { stream: Stream::Plain(stream), peer: Peer::default(), _place: place });
        };
        match tokio::time::timeout(self.handshake, tls.accept(stream, self.protocol)).await {
            Ok(Ok(stream)) => {
                let peer = Peer { certified: stream.get_ref().1.peer_certificates().is_some() };
                Some(Link { stream: Stream::Tls(Box::new(stream)), peer, _place: place })
            }
            Ok(Err(error)) => {
                debug!(%error, "no handshake");
                self.metrics.handshakes_failed.inc();
                None
            }
            Err(_) => {
                self.metrics.refused(Limit::HeadTimeout);
                None
            }
        }
    }
}

/// Waits for as many bytes as an HTTP/2 client begins with, whatever they are, or for the end.
async fn has_preface(stream: &TcpStream) {
    let mut preface = [0; 24];
    while !matches!(stream.peek(&mut preface).await, Ok(0 | 24) | Err(_)) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// What is written to a connection for which there is no place.
const FULL: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain\r\ncontent-length: 58\r\nconnection: close\r\n\r\n\
                      more connections than --max-connections allows: try later\n";

impl Link {
    /// Who it is.
    pub fn peer(&self) -> Peer {
        self.peer
    }
}

/// Who makes a gRPC call, and over what.
#[derive(Clone, Debug, Default)]
pub struct Caller {
    /// Who it is.
    pub peer: Peer,
    open: Arc<AtomicUsize>,
}

/// A call that goes on over a connection.
pub struct Call(Arc<AtomicUsize>);

impl Caller {
    /// One more call over this connection, if that are at most so many then.
    pub fn call(&self, most: usize) -> Option<Call> {
        let one_more = |open| (open < most).then_some(open + 1);
        self.open.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).ok()?;
        Some(Call(Arc::clone(&self.open)))
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Connected for Link {
    type ConnectInfo = Caller;

    /// Asked for once, when the connection begins.
    fn connect_info(&self) -> Caller {
        Caller { peer: self.peer, ..Caller::default() }
    }
}

impl AsyncRead for Link {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Stream::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Stream::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Link {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Stream::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Stream::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Stream::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Stream::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Stream::Plain(stream) => stream.is_write_vectored(),
            Stream::Tls(stream) => stream.is_write_vectored(),
        }
    }
}
