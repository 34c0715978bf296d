//! The listener, and its orderly end: `/readyz` says 503 first, the listener closes after a delay,
//! open requests are finished.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use inflight_stats::decider::{EVERY_NS, Settings};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{debug, info, warn};

use crate::flags::Flags;
use crate::http::{App, now_ns, router};
use crate::keys::Keys;
use crate::metrics::Metrics;

/// How long open requests may take once the listener is closed.
const LAST_REQUESTS: Duration = Duration::from_secs(10);
/// How long a client may take to send a request's head.
const HEAD: Duration = Duration::from_secs(10);
const FORGET_EVERY: Duration = Duration::from_secs(60);

/// Serves until `terminated` resolves and everything is drained.
///
/// # Errors
/// If the address cannot be listened on.
pub async fn run(flags: &Flags, terminated: impl Future<Output = ()>) -> io::Result<()> {
    let listener = TcpListener::bind(flags.listen).await?;
    info!(address = %listener.local_addr()?, "listening");
    let app = Arc::new(App {
        keys: Keys::new(flags.windows()),
        metrics: Metrics::default(),
        draining: AtomicBool::new(false),
    });
    let forgetting = tokio::spawn(forget(Arc::clone(&app)));
    let deciding = tokio::spawn(decide(Arc::clone(&app), flags.settings()));
    let router = router(Arc::clone(&app));
    let connections = GracefulShutdown::new();
    let drained = async {
        terminated.await;
        info!("draining");
        app.draining.store(true, Ordering::Relaxed);
        tokio::time::sleep(flags.drain_delay).await;
    };
    let mut drained = pin!(drained);
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => serve(stream, router.clone(), &connections),
                Err(error) => {
                    // Out of file descriptors, most likely: the others go on, and end.
                    warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            () = &mut drained => break,
        }
    }
    drop(listener);
    if tokio::time::timeout(LAST_REQUESTS, connections.shutdown()).await.is_err() {
        warn!("some requests were not finished");
    }
    forgetting.abort();
    deciding.abort();
    Ok(())
}

/// One connection. A client that closes its side after a request is answered all the same: an Envoy that
/// ends sends its last report so.
fn serve(stream: TcpStream, router: Router, connections: &GracefulShutdown) {
    // Answers are small and whole; waiting for more to send would only delay them.
    let _ = stream.set_nodelay(true);
    let mut http = http1::Builder::new();
    http.half_close(true).timer(TokioTimer::new()).header_read_timeout(HEAD);
    let connection = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let connection = connections.watch(connection);
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            debug!(%error, "a connection ended");
        }
    });
}

async fn decide(app: Arc<App>, settings: Settings) {
    let mut ticks = tokio::time::interval(Duration::from_nanos(EVERY_NS));
    loop {
        ticks.tick().await;
        app.keys.decide(&settings, now_ns());
    }
}

async fn forget(app: Arc<App>) {
    let mut ticks = tokio::time::interval(FORGET_EVERY);
    loop {
        ticks.tick().await;
        app.keys.forget(now_ns());
    }
}

/// Resolves on SIGTERM or SIGINT.
pub async fn terminated() {
    let wait = |kind| async move {
        match signal(kind) {
            Ok(mut signals) => {
                signals.recv().await;
            }
            // Without a handler the signal ends the process by itself.
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        () = wait(SignalKind::terminate()) => {}
        () = wait(SignalKind::interrupt()) => {}
    }
}
