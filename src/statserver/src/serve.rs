//! The listener, and its orderly end: `/readyz` says 503 first, the listener closes after a delay,
//! open requests are finished.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use inflight_stats::decider::EVERY_NS;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Status;
use tonic::service::Routes;
use tower::ServiceExt;
use tracing::{debug, error, info, warn};

use crate::access::Access;
use crate::flags::Flags;
use crate::forward::Forward;
use crate::http::{App, now_ns, router};
use crate::keda::{ExternalScalerServer, Scaler};
use crate::keys::{Keys, Room};
use crate::limits::{Limit, Limits};
use crate::link::{Caller, Door, Knock};
use crate::metrics::Metrics;
use crate::stream::Seldom;
use crate::tls::{Protocol, Tls};
use crate::told::Told;

/// How long open requests may take once the listener is closed.
const LAST_REQUESTS: Duration = Duration::from_secs(10);
/// How often a gRPC client that says nothing is asked whether it is there, and how long it may take to answer.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
/// Connections that have shaken hands and are not yet served.
const WAITING_LINKS: usize = 16;
/// Calls that HTTP/2 lets through beyond the limit, so that they can be told why they are refused: a client
/// that keeps to HTTP/2's own limit would wait, and nobody would know for what.
const SPARE_STREAMS: usize = 64;
/// gRPC's code OUT_OF_RANGE.
const GRPC_OUT_OF_RANGE: &str = "11";
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
    let access =
        Access::load(flags.token_file.as_deref(), flags.tls_client_ca.is_some()).map_err(io::Error::other)?;
    let Limits { max_keys, max_keys_per_namespace, max_pods_per_key, max_table_bytes, .. } = flags.limits;
    let room = Room {
        keys: max_keys,
        keys_per_namespace: max_keys_per_namespace,
        pods_per_key: max_pods_per_key,
        bytes: max_table_bytes,
    };
    let keys = Keys::new(Arc::new(flags.key_settings()), room, now_ns());
    let told = Told::load(flags.settings.as_deref(), flags.rps_target, &keys)?;
    let tls = Tls::load(flags).map_err(io::Error::other)?.map(Arc::new);
    let metrics = Arc::new(Metrics::default());
    let door = async |flag, address, protocol| {
        let listener = TcpListener::bind(address).await.map_err(at(flag, address))?;
        let most = (flags.limits.max_connections, flags.limits.head_timeout);
        Ok::<_, io::Error>(Arc::new(Door::new(listener, protocol, tls.clone(), most, Arc::clone(&metrics))))
    };
    let http = door("--listen", flags.listen, Protocol::Http).await?;
    let grpc = door("--grpc-listen", flags.grpc_listen, Protocol::Grpc).await?;
    info!(address = %http.address()?, grpc = %grpc.address()?, tls = tls.is_some(), "listening");
    let app = Arc::new(App {
        keys,
        access,
        told,
        forward: flags.forward.as_deref().map(|url| Arc::new(Forward::new(url, Arc::clone(&metrics)))),
        limits: flags.limits,
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
    tasks.spawn(reload(Arc::clone(&app), tls));
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
            knock = http.knock() => serve(knock, &http, router.clone(), &app),
            () = &mut drained => break,
        }
    }
    // Who is told to connect again must find somebody else.
    drop(http);
    app.ending.cancel();
    app.connections.close();
    let last = async { tokio::join!(app.connections.wait(), scaler) };
    if tokio::time::timeout(LAST_REQUESTS, last).await.is_err() {
        warn!("some requests were not finished");
    }
    Ok(())
}

/// KEDA's scaler. Its keep-alive finds clients that are gone.
async fn serve_grpc(door: Arc<Door>, app: Arc<App>) {
    let ending = app.ending.clone();
    let Limits { max_grpc_bytes, max_grpc_streams, .. } = app.limits;
    let (opened, links) = tokio::sync::mpsc::channel(WAITING_LINKS);
    // Handshakes go on beside each other: one that hangs holds nobody up.
    let knocks = tokio::spawn(async move {
        loop {
            let knock = door.knock().await;
            let (door, opened) = (Arc::clone(&door), opened.clone());
            tokio::spawn(async move {
                if let Some(link) = door.open(knock).await {
                    let _ = opened.send(Ok::<_, io::Error>(link)).await;
                }
            });
        }
    });
    let scaler =
        ExternalScalerServer::new(Scaler(Arc::clone(&app))).max_decoding_message_size(max_grpc_bytes);
    let routes = Routes::new(scaler).into_axum_router().layer(from_fn_with_state(app, within_limits));
    let served = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE))
        .max_concurrent_streams(u32::try_from(max_grpc_streams.saturating_add(SPARE_STREAMS)).ok())
        .add_routes(routes.into())
        .serve_with_incoming_shutdown(ReceiverStream::new(links), ending.cancelled())
        .await;
    knocks.abort();
    if let Err(error) = served {
        error!(%error, "gRPC is no longer served");
    }
}

/// A gRPC call, if its connection has not too many already; it ends with its answer's body.
async fn within_limits(State(app): State<Arc<App>>, request: axum::extract::Request, next: Next) -> Response {
    let most = app.limits.max_grpc_streams;
    let caller = request.extensions().get::<Caller>().cloned().unwrap_or_default();
    let Some(call) = caller.call(most) else {
        app.metrics.refused(Limit::GrpcStreams);
        let reason =
            format!("{most} calls go on over this connection, and --max-grpc-streams allows no more");
        return Status::resource_exhausted(reason).into_http();
    };
    let response = next.run(request).await;
    // What tonic answers to a message that is too large.
    if response.headers().get("grpc-status").is_some_and(|code| code == GRPC_OUT_OF_RANGE) {
        app.metrics.refused(Limit::GrpcBytes);
    }
    response.map(|body| {
        axum::body::Body::new(body.map_frame(move |frame| {
            let _until_here = &call;
            frame
        }))
    })
}

/// One connection. A client that closes its side after a request is answered all the same: an Envoy that
/// ends sends its last report so.
fn serve(knock: Knock, door: &Arc<Door>, router: Router, app: &Arc<App>) {
    let (door, app) = (Arc::clone(door), Arc::clone(app));
    app.clone().connections.spawn(async move {
        let ending = app.ending.clone();
        let opened = tokio::select! {
            opened = door.open(knock) => opened,
            () = ending.cancelled() => None,
        };
        drop(door);
        let Some(link) = opened else { return };
        let mut http = http1::Builder::new();
        let Limits { head_timeout, max_head_bytes, .. } = app.limits;
        http.half_close(true).timer(TokioTimer::new());
        http.header_read_timeout(head_timeout).max_buf_size(max_head_bytes);
        let peer = link.peer();
        let service = service_fn(move |mut request: hyper::Request<Incoming>| {
            request.extensions_mut().insert(peer);
            router.clone().oneshot(request)
        });
        let mut connection = pin!(http.serve_connection(TokioIo::new(link), service).with_upgrades());
        let ended = tokio::select! {
            ended = &mut connection => ended,
            () = ending.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            debug!(%error, "a connection ended");
            if error.is_parse_too_large() {
                app.metrics.refused(Limit::HeadBytes);
            } else if error.is_timeout() {
                app.metrics.refused(Limit::HeadTimeout);
            }
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

async fn reload(app: Arc<App>, tls: Option<Arc<Tls>>) {
    let mut ticks = tokio::time::interval(RELOAD_EVERY);
    loop {
        ticks.tick().await;
        let (app, tls) = (Arc::clone(&app), tls.clone());
        let read = move || {
            app.access.reload();
            if let Some(tls) = tls {
                tls.reload();
            }
        };
        // A file system may hang.
        let _ = tokio::task::spawn_blocking(read).await;
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
