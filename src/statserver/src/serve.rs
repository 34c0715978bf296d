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
use hyper_util::service::TowerToHyperService;
use inflight_stats::decider::EVERY_NS;
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::server::TcpIncoming;
use tracing::{debug, error, info, warn};

use crate::access::Access;
use crate::flags::Flags;
use crate::forward::Forward;
use crate::http::{App, now_ns, router};
use crate::keda::{ExternalScalerServer, Scaler};
use crate::keys::Keys;
use crate::metrics::Metrics;
use crate::stream::Seldom;
use crate::told::Told;

/// How long open requests may take once the listener is closed.
const LAST_REQUESTS: Duration = Duration::from_secs(10);
/// How long a client may take to send a request's head.
const HEAD: Duration = Duration::from_secs(10);
/// How often a gRPC client that says nothing is asked whether it is there, and how long it may take to answer.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
/// The most calls at once over one gRPC connection: a KEDA has two open for each ScaledObject.
const MOST_STREAMS: u32 = 10_000;
const MOST_GRPC_BYTES: usize = 64 << 10;
/// How often files that may change are read again.
const RELOAD_EVERY: Duration = Duration::from_secs(2);
const FORGET_EVERY: Duration = Duration::from_secs(60);

/// Serves until `terminated` resolves and everything is drained.
///
/// # Errors
/// If an address cannot be listened on, or the settings file is wrong.
pub async fn run(flags: &Flags, terminated: impl Future<Output = ()>) -> io::Result<()> {
    let at = |what: &'static str, address| {
        move |error: io::Error| io::Error::new(error.kind(), format!("{what} {address}: {error}"))
    };
    flags.check_access().map_err(io::Error::other)?;
    let access = Access::load(flags.token_file.as_deref()).map_err(io::Error::other)?;
    let keys = Keys::new(Arc::new(flags.key_settings()));
    let told = Told::load(flags.settings.as_deref(), flags.rps_target, &keys)?;
    let listener = TcpListener::bind(flags.listen).await.map_err(at("--listen", flags.listen))?;
    let grpc = TcpListener::bind(flags.grpc_listen).await.map_err(at("--grpc-listen", flags.grpc_listen))?;
    info!(address = %listener.local_addr()?, grpc = %grpc.local_addr()?, "listening");
    let metrics = Arc::new(Metrics::default());
    let app = Arc::new(App {
        keys,
        access,
        told,
        forward: flags.forward.as_deref().map(|url| Arc::new(Forward::new(url, Arc::clone(&metrics)))),
        metrics,
        rps_target: flags.rps_target,
        draining: AtomicBool::new(false),
        ending: CancellationToken::new(),
        connections: TaskTracker::new(),
        seldom: Seldom::default(),
    });
    let mut tasks = JoinSet::new();
    tasks.spawn(forget(Arc::clone(&app)));
    tasks.spawn(decide(Arc::clone(&app)));
    tasks.spawn(reload(Arc::clone(&app)));
    if let Some(forward) = &app.forward {
        tasks.spawn(Arc::clone(forward).run(app.ending.clone()));
    }
    let scaler = tokio::spawn(serve_grpc(grpc, Arc::clone(&app)));
    let router = router(Arc::clone(&app));
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
                Ok((stream, _)) => serve(stream, router.clone(), &app),
                Err(error) => {
                    // Out of file descriptors, most likely: the others go on, and end.
                    warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            () = &mut drained => break,
        }
    }
    // Who is told to connect again must find somebody else.
    drop(listener);
    app.ending.cancel();
    app.connections.close();
    let last = async { tokio::join!(app.connections.wait(), scaler) };
    if tokio::time::timeout(LAST_REQUESTS, last).await.is_err() {
        warn!("some requests were not finished");
    }
    Ok(())
}

/// KEDA's scaler. Its keep-alive finds clients that are gone.
async fn serve_grpc(listener: TcpListener, app: Arc<App>) {
    let ending = app.ending.clone();
    let served = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE))
        .max_concurrent_streams(MOST_STREAMS)
        .add_service(ExternalScalerServer::new(Scaler(app)).max_decoding_message_size(MOST_GRPC_BYTES))
        .serve_with_incoming_shutdown(
            TcpIncoming::from(listener).with_nodelay(Some(true)),
            ending.cancelled(),
        )
        .await;
    if let Err(error) = served {
        error!(%error, "gRPC is no longer served");
    }
}

/// One connection. A client that closes its side after a request is answered all the same: an Envoy that
/// ends sends its last report so.
fn serve(stream: TcpStream, router: Router, app: &App) {
    // Answers are small and whole; waiting for more to send would only delay them.
    let _ = stream.set_nodelay(true);
    let mut http = http1::Builder::new();
    http.half_close(true).timer(TokioTimer::new()).header_read_timeout(HEAD);
    let connection = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let ending = app.ending.clone();
    app.connections.spawn(async move {
        let mut connection = pin!(connection.with_upgrades());
        let ended = tokio::select! {
            ended = &mut connection => ended,
            () = ending.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            debug!(%error, "a connection ended");
        }
    });
}

async fn decide(app: Arc<App>) {
    let mut ticks = tokio::time::interval(Duration::from_nanos(EVERY_NS));
    loop {
        ticks.tick().await;
        app.keys.decide(now_ns());
    }
}

async fn reload(app: Arc<App>) {
    let mut ticks = tokio::time::interval(RELOAD_EVERY);
    loop {
        ticks.tick().await;
        let app = Arc::clone(&app);
        // A file system may hang.
        let _ = tokio::task::spawn_blocking(move || app.access.reload()).await;
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
