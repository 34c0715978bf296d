//! Accepting connections, no more at once than allowed.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::{debug, warn};

use crate::cli::limits::{Limit, Limits};
use crate::net::auth::Peer;
use crate::net::connection::{Connection, Transport};
use crate::net::connection_limits::ConnectionGuard;
use crate::net::front_proxy::ClientCertificates;
use crate::net::idle::IdleConnections;
use crate::net::memory_budget::Budget;
use crate::net::tls::{Protocol, Tls};
use crate::net::unauthenticated::{UnauthenticatedConnection, UnauthenticatedConnections};
use crate::telemetry::log_limit::LogLimiter;
use crate::telemetry::metrics::Metrics;

/// How long an idle connection may take to end that is closed in favour of another one.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long to wait after an error of the system.
const RETRY_AFTER: Duration = Duration::from_millis(100);
/// Maximum number of connections for the metrics APIs over which the front proxy has not asked yet;
/// it may have as many besides. It keeps a few connections open, and nobody else should come.
pub const MAX_UNAUTHENTICATED_METRICS: usize = 64;
/// The response to an excess connection.
const TOO_MANY: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain\r\n\
    content-length: 64\r\nconnection: close\r\n\r\n\
    more connections than --max-connections allows; try again later\n";

/// What the kernel keeps of an answer that a client has yet to read; it allows itself twice as much.
/// By default it would keep some megabytes, for everybody who fetches the module or a list and does
/// not read it.
const SEND_BUFFER_BYTES: u32 = 64 << 10;
/// Connections that wait to be accepted, as in Rust's own library.
const BACKLOG: u32 = 1024;

/// What all listeners share.
#[derive(Clone)]
pub struct Shared {
    /// How much is accepted.
    pub limits: Limits,
    /// The server's certificates, if it has any.
    pub tls: Option<Arc<Tls>>,
    /// Connections that have not authenticated; `None` if nobody has to.
    pub unauthenticated: Option<Arc<UnauthenticatedConnections>>,
    /// Bytes that are being received.
    pub budget: Budget,
    /// Where refusals are counted.
    pub metrics: Arc<Metrics>,
}

/// A listening socket, and the permits of its connections.
pub struct Listener {
    socket: TcpListener,
    permits: Arc<Semaphore>,
    idle_connections: Arc<IdleConnections>,
    protocol: Protocol,
    shared: Shared,
    failures: LogLimiter,
}

/// A connection before its handshake.
pub struct Accepted {
    stream: TcpStream,
    permit: OwnedSemaphorePermit,
    unauthenticated: Option<UnauthenticatedConnection>,
}

impl Listener {
    /// Listens on an address. Where there is no IPv6, all its interfaces are those of IPv4.
    ///
    /// # Errors
    /// The system's.
    pub async fn bind(address: SocketAddr, protocol: Protocol, shared: Shared) -> io::Result<Self> {
        let socket = match listen(address) {
            Err(_) if address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) && !has_ipv6().await => {
                listen((Ipv4Addr::UNSPECIFIED, address.port()).into())?
            }
            socket => socket?,
        };
        let max = match protocol {
            Protocol::Http => shared.limits.max_connections,
            Protocol::MetricsApi => 2 * MAX_UNAUTHENTICATED_METRICS,
            Protocol::Grpc => shared.limits.max_grpc_connections,
        };
        let (permits, idle_connections) = (Arc::new(Semaphore::new(max)), Arc::default());
        Ok(Self { socket, permits, idle_connections, protocol, shared, failures: LogLimiter::default() })
    }

    /// Returns the address that it listens on.
    ///
    /// # Errors
    /// The system's.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Returns what is spoken over its connections.
    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// Accepts the next connection within the limit, which may be that of an idle connection.
    /// Excess connections are closed, after a 503 where plain HTTP allows one.
    pub async fn accept(&self) -> Accepted {
        loop {
            let stream = match self.socket.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Most likely out of file descriptors: the open connections go on, and end.
                    warn!(%error, "cannot accept a connection; trying again");
                    tokio::time::sleep(RETRY_AFTER).await;
                    continue;
                }
            };
            match self.permit().await {
                Some(permit) => {
                    return Accepted { stream, permit, unauthenticated: self.admit().await };
                }
                None => self.refuse(&stream),
            }
        }
    }

    /// Returns a permit: a free one, or that of the connection which has been idle for longest.
    async fn permit(&self) -> Option<OwnedSemaphorePermit> {
        let permits = || Arc::clone(&self.permits);
        if let Ok(permit) = permits().try_acquire_owned() {
            return Some(permit);
        }
        if !self.idle_connections.close_oldest() {
            return None;
        }
        tokio::time::timeout(CLOSE_TIMEOUT, permits().acquire_owned()).await.ok()?.ok()
    }

    /// Counts a connection among the unauthenticated ones, if clients have to authenticate.
    async fn admit(&self) -> Option<UnauthenticatedConnection> {
        let (connection, evicts) = self.shared.unauthenticated.as_ref()?.admit().await;
        if evicts {
            self.shared.metrics.refused(Limit::UnauthenticatedConnections);
        }
        Some(connection)
    }

    fn refuse(&self, stream: &TcpStream) {
        match self.protocol {
            Protocol::Http | Protocol::MetricsApi => {
                self.shared.metrics.refused(Limit::Connections);
                if self.shared.tls.is_none() {
                    let _ = stream.try_write(TOO_MANY);
                }
            }
            Protocol::Grpc => self.shared.metrics.refused(Limit::GrpcConnections),
        }
    }

    /// Shakes hands over TLS, if the server has certificates. Returns `None` if that failed.
    pub async fn handshake(&self, accepted: Accepted) -> Option<Connection> {
        let Accepted { stream, permit, unauthenticated } = accepted;
        // Responses are small and written whole; waiting for more to send would only delay them.
        let _ = stream.set_nodelay(true);
        let address = stream.peer_addr().ok().map(|address| address.ip().to_canonical());
        let (transport, certificates) = match &self.shared.tls {
            None => (Transport::Plain(stream), None),
            Some(tls) => self.tls_handshake(tls, stream, unauthenticated.as_ref()).await?,
        };
        let peer = Peer { has_certificate: certificates.is_some(), address };
        let Shared { limits, budget, metrics, .. } = &self.shared;
        let is_grpc = matches!(self.protocol, Protocol::Grpc);
        let idle_connections = Arc::clone(&self.idle_connections);
        let guard =
            ConnectionGuard::new(is_grpc, *limits, budget.clone(), Arc::clone(metrics), idle_connections);
        // The front proxy is known by each of its requests.
        let is_known = peer.has_certificate && !matches!(self.protocol, Protocol::MetricsApi);
        if let Some(unauthenticated) = unauthenticated.filter(|_| !is_known) {
            guard.set_unauthenticated(unauthenticated);
        }
        let is_kept = matches!(self.protocol, Protocol::MetricsApi);
        let certificates = certificates.filter(|_| is_kept);
        Some(Connection::new(transport, self.protocol, (peer, certificates), guard, permit))
    }

    /// Returns the certificates that the client has shown, too.
    async fn tls_handshake(
        &self,
        tls: &Tls,
        stream: TcpStream,
        unauthenticated: Option<&UnauthenticatedConnection>,
    ) -> Option<(Transport, Option<ClientCertificates>)> {
        let Shared { limits, metrics, .. } = &self.shared;
        let peer = stream.peer_addr().map_or_else(|_| "unknown".to_owned(), |peer| peer.ip().to_string());
        let handshake = tokio::time::timeout(limits.head_timeout, tls.handshake(stream, self.protocol));
        let evicted = async {
            match unauthenticated {
                Some(unauthenticated) => unauthenticated.evicted().await,
                None => std::future::pending().await,
            }
        };
        let handshake = tokio::select! {
            handshake = handshake => handshake,
            () = evicted => return None,
        };
        match handshake {
            Ok(Ok(stream)) => {
                let certificates = stream.get_ref().1.peer_certificates();
                let certificates = certificates.map(|certificates| ClientCertificates(certificates.into()));
                Some((Transport::Tls(Box::new(stream)), certificates))
            }
            Ok(Err(error)) => {
                metrics.handshakes_failed.inc();
                // Health checks of load balancers connect, and say nothing.
                if error.kind() == io::ErrorKind::UnexpectedEof {
                    debug!(peer, %error, "TLS handshake failed");
                } else {
                    self.failures.log(|suppressed| warn!(peer, %error, suppressed, "TLS handshake failed"));
                }
                None
            }
            Err(_) => {
                metrics.refused(Limit::HeadTimeout);
                None
            }
        }
    }
}

/// Listens on an address. The sockets that it accepts have its send buffer.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.set_send_buffer_size(SEND_BUFFER_BYTES)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Returns whether the system has IPv6.
async fn has_ipv6() -> bool {
    TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).await.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_kernel_keeps_little_for_a_client_that_does_not_read() {
        let socket = listen((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let client = TcpSocket::new_v4().unwrap();
        client.set_recv_buffer_size(4096).unwrap();
        let client = client.connect(socket.local_addr().unwrap()).await.unwrap();
        let (server, _) = socket.accept().await.unwrap();
        let mut kept = 0;
        // Until nothing more is taken for a while.
        while tokio::time::timeout(Duration::from_millis(200), server.writable()).await.is_ok() {
            kept += server.try_write(&[0; 4096]).unwrap_or(0);
        }
        assert!((16 << 10..256 << 10).contains(&kept), "{kept}");
        drop(client);
    }

    #[test]
    fn an_excess_connection_is_answered_in_whole() {
        let response = std::str::from_utf8(TOO_MANY).unwrap();
        let (head, body) = response.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("content-length: {}\r\n", body.len())), "{response}");
    }
}
