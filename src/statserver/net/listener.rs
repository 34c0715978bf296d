//! A connection, plain or within TLS: what both listeners serve.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_rustls::server::TlsStream;
use tracing::{debug, warn};

use crate::cli::limits::{Limit, Limits};
use crate::metrics::Metrics;
use crate::net::guard::{Budget, Guard, Idlers, Stranger, Strangers};
use crate::net::tls::{Protocol, Tls};

/// The most calls of an HTTP/2 connection that begin before what was answered to others is written.
const MOST_UNWRITTEN_CALLS: usize = 256;

/// How long a connection may take to end that gives its place to another.
const MOST_TO_END: Duration = Duration::from_secs(1);

/// What is known of who connected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// It showed a certificate that the client CA signed.
    pub certified: bool,
}

/// A connection; with it ends its place among those that are allowed. It keeps the times that its [`Guard`] says, and ends
/// when a client does not read.
pub struct Link {
    stream: Stream,
    peer: Peer,
    guard: Arc<Guard>,
    is_grpc: bool,
    /// Wakes when the guard's deadline has come; made when it is first needed.
    read_by: Option<Pin<Box<Sleep>>>,
    /// Wakes when what is written has waited for too long; `blocked` says whether it waits.
    written_by: Option<Pin<Box<Sleep>>>,
    blocked: bool,
    _place: OwnedSemaphorePermit,
}

enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Stream {
    fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

/// What both listeners share.
#[derive(Clone)]
pub struct House {
    /// How much is taken.
    pub limits: Limits,
    /// The server's certificates, if it has some.
    pub tls: Option<Arc<Tls>>,
    /// Places of those who have not shown a token; without tokens there are no strangers.
    pub strangers: Option<Arc<Strangers>>,
    /// Bytes that are being received.
    pub budget: Budget,
    /// Where it is counted.
    pub metrics: Arc<Metrics>,
}

/// Takes connections, no more at once than allowed.
pub struct Door {
    listener: TcpListener,
    places: Arc<Semaphore>,
    idlers: Arc<Idlers>,
    protocol: Protocol,
    house: House,
}

/// A connection that has yet to shake hands.
pub struct Knock {
    stream: TcpStream,
    place: OwnedSemaphorePermit,
    stranger: Option<Stranger>,
}

impl Door {
    /// Behind a listener.
    pub fn new(listener: TcpListener, protocol: Protocol, house: House) -> Self {
        let most = match protocol {
            Protocol::Http => house.limits.max_connections,
            Protocol::Grpc => house.limits.max_grpc_connections,
        };
        Self { listener, places: Arc::new(Semaphore::new(most)), idlers: Arc::default(), protocol, house }
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The system's.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// What is spoken behind it.
    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// The next connection for which there is a place, if need be that of one that is idle; the others are told so, as far as that
    /// goes, and closed.
    pub async fn knock(&self) -> Knock {
        let metrics = &self.house.metrics;
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => match self.place().await {
                    Some(place) => {
                        let stranger = match &self.house.strangers {
                            None => None,
                            Some(strangers) => {
                                let (stranger, evicts) = strangers.enter().await;
                                if evicts {
                                    metrics.refused(Limit::UnauthenticatedConnections);
                                }
                                Some(stranger)
                            }
                        };
                        return Knock { stream, place, stranger };
                    }
                    None => match self.protocol {
                        Protocol::Http => {
                            metrics.refused(Limit::Connections);
                            if self.house.tls.is_none() {
                                let _ = stream.try_write(FULL);
                            }
                        }
                        Protocol::Grpc => metrics.refused(Limit::GrpcConnections),
                    },
                },
                Err(error) => {
                    // Out of file descriptors, most likely: the others go on, and end.
                    warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// A place for a connection: a free one, or that of the one which has been idle for longest.
    async fn place(&self) -> Option<OwnedSemaphorePermit> {
        let places = || Arc::clone(&self.places);
        if let Ok(place) = places().try_acquire_owned() {
            return Some(place);
        }
        if !self.idlers.end_one() {
            return None;
        }
        tokio::time::timeout(MOST_TO_END, places().acquire_owned()).await.ok()?.ok()
    }

    /// Begins TLS, if that is spoken here; `None` if it did not come about.
    pub async fn open(&self, Knock { stream, place, stranger }: Knock) -> Option<Link> {
        // Answers are small and whole; waiting for more to send would only delay them.
        let _ = stream.set_nodelay(true);
        let is_grpc = matches!(self.protocol, Protocol::Grpc);
        let House { limits, tls, budget, metrics, .. } = &self.house;
        let (stream, peer) = match tls {
            None => (Stream::Plain(stream), Peer::default()),
            Some(tls) => {
                let handshake = tokio::time::timeout(limits.head_timeout, tls.accept(stream, self.protocol));
                let evicted = async {
                    match &stranger {
                        Some(stranger) => stranger.evicted().await,
                        None => std::future::pending().await,
                    }
                };
                let handshake = tokio::select! {
                    handshake = handshake => handshake,
                    () = evicted => return None,
                };
                match handshake {
                    Ok(Ok(stream)) => {
                        let peer = Peer { certified: stream.get_ref().1.peer_certificates().is_some() };
                        (Stream::Tls(Box::new(stream)), peer)
                    }
                    Ok(Err(error)) => {
                        debug!(%error, "no handshake");
                        metrics.handshakes_failed.inc();
                        return None;
                    }
                    Err(_) => {
                        metrics.refused(Limit::HeadTimeout);
                        return None;
                    }
                }
            }
        };
        let guard =
            Guard::new(is_grpc, *limits, budget.clone(), Arc::clone(metrics), Arc::clone(&self.idlers));
        if let Some(stranger) = stranger.filter(|_| !peer.certified) {
            guard.is_strangers(stranger);
        }
        Some(Link {
            stream,
            peer,
            guard: Arc::new(guard),
            is_grpc,
            read_by: None,
            written_by: None,
            blocked: false,
            _place: place,
        })
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

    /// Who watches over it.
    pub fn guard(&self) -> Arc<Guard> {
        Arc::clone(&self.guard)
    }

    /// Nothing has come: whether something should have by now.
    fn poll_read_deadline(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(deadline) = self.guard.deadline() else { return Poll::Pending };
        ready!(at(&mut self.read_by, deadline.at).poll(cx));
        Poll::Ready(match deadline.limit {
            // As if the client had closed.
            None => Ok(()),
            Some(limit) => {
                self.guard.refused(limit);
                Err(io::Error::new(io::ErrorKind::TimedOut, limit.flag()))
            }
        })
    }

    /// What a write came to. Whoever keeps it waiting has so long until everything is written, however little it reads meanwhile.
    fn written<T>(&mut self, cx: &mut Context<'_>, result: Poll<T>) -> Poll<Result<T, io::Error>> {
        if let Poll::Ready(result) = result {
            return Poll::Ready(Ok(result));
        }
        if !self.blocked {
            self.blocked = true;
            at(&mut self.written_by, Instant::now() + self.guard.write_timeout());
        }
        if let Some(timer) = &mut self.written_by {
            ready!(timer.as_mut().poll(cx));
        }
        self.guard.refused(Limit::WriteTimeout);
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, Limit::WriteTimeout.flag())))
    }
}

/// The timer, set to this time.
fn at(timer: &mut Option<Pin<Box<Sleep>>>, at: Instant) -> Pin<&mut Sleep> {
    let timer = timer.get_or_insert_with(|| Box::pin(sleep_until(at)));
    if timer.deadline() != at {
        timer.as_mut().reset(at);
    }
    timer.as_mut()
}

impl AsyncRead for Link {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let link = self.get_mut();
        if link.guard.is_ended() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        // Who does not read is not heard: what it would be answered would have to be kept. The write wakes us.
        if link.is_grpc && link.blocked {
            return Poll::Pending;
        }
        if link.is_grpc && link.guard.unwritten() > MOST_UNWRITTEN_CALLS {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buf.filled().len();
        let read = if link.is_grpc {
            let most = buf.remaining().min(link.guard.left_in_turn());
            if most == 0 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let mut part = ReadBuf::new(buf.initialize_unfilled_to(most));
            let read = link.stream.poll_read(cx, &mut part);
            let bytes = part.filled().len();
            buf.advance(bytes);
            read
        } else {
            link.stream.poll_read(cx, buf)
        };
        match read {
            Poll::Ready(Ok(())) => {
                let bytes = buf.filled().len().saturating_sub(before);
                if bytes > 0 {
                    link.guard.received(bytes)?;
                }
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => link.poll_read_deadline(cx),
        }
    }
}

impl AsyncWrite for Link {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let link = self.get_mut();
        let written = match &mut link.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Stream::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        };
        link.written(cx, written).map(Result::flatten)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let link = self.get_mut();
        let flushed = match &mut link.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(cx),
        };
        if flushed.is_ready() {
            // Whoever flushes has handed over all that there was before.
            link.blocked = false;
            link.guard.written();
        }
        link.written(cx, flushed).map(Result::flatten)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let link = self.get_mut();
        let shut = match &mut link.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        };
        link.written(cx, shut).map(Result::flatten)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let link = self.get_mut();
        let written = match &mut link.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Stream::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        };
        link.written(cx, written).map(Result::flatten)
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Stream::Plain(stream) => stream.is_write_vectored(),
            Stream::Tls(stream) => stream.is_write_vectored(),
        }
    }
}
