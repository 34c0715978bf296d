//! The listener, and its orderly end: `/readyz` says 503 first, the listener closes after a delay,
//! open requests are finished.

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::response::Response;
use futures_util::future::Either;
use http_body_util::BodyExt;
use hyper::HeaderMap;
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, HeaderValue};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use inflight_stats::scaling::decider::DECISION_PERIOD_NS;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Status;
use tonic::service::Routes;
use tower::ServiceExt;
use tracing::{debug, info, warn};

use crate::cli::flags::Flags;
use crate::cli::limits::{Limit, Limits};
use crate::forward::Forward;
use crate::http::{App, now_ns, router};
use crate::keda::{ExternalScalerServer, Scaler};
use crate::key_table::{Keys, Room};
use crate::memory;
use crate::net::auth::{Access, Grant, Unknown};
use crate::net::guard::{Budget, FREE_BYTES, Guard, Share, Strangers, Unread};
use crate::net::listener::{Door, House, Knock, Link, Peer};
use crate::net::tls::{Protocol, Tls};
use crate::settings_store::Told;
use crate::stat_stream::Seldom;

/// How long open requests may take once the listener is closed.
const LAST_REQUESTS: Duration = Duration::from_secs(10);
/// How often a gRPC client that says nothing is asked whether it is there, and how long it may take to answer.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
/// Calls that HTTP/2 lets through beyond the limit, so that they can be told why they are refused: a client
/// that keeps to HTTP/2's own limit would wait, and nobody would know for what.
const SPARE_STREAMS: usize = 64;
/// What a gRPC message has before it: whether it is compressed, and its length.
const GRPC_PREFIX_BYTES: usize = 5;
/// What a gRPC connection may send before any of it is read; a call's message has its own limit.
const GRPC_WINDOW_BYTES: u32 = 65_535;
/// How often files that may change are read again.
const RELOAD_EVERY: Duration = Duration::from_secs(2);
const FORGET_EVERY: Duration = Duration::from_secs(60);
const GIVE_BACK_EVERY: Duration = Duration::from_secs(15);

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
        Access::load(flags.token_file.as_deref(), flags.tls_client_ca.is_some(), flags.anonymous_access())
            .map_err(io::Error::other)?;
    let limits = flags.limits;
    let Limits { max_keys, max_keys_per_namespace, max_pods_per_key, max_table_bytes, .. } = limits;
    let room = Room {
        keys: max_keys,
        keys_per_namespace: max_keys_per_namespace,
        pods_per_key: max_pods_per_key,
        bytes: max_table_bytes,
    };
    let keys = Keys::new(Arc::new(flags.key_settings()), room, now_ns());
    let told = Told::load(flags.settings.as_deref(), flags.rps_target, &keys)?;
    let tls = Tls::load(flags).map_err(io::Error::other)?.map(Arc::new);
    let house = House {
        limits,
        tls: tls.clone(),
        strangers: (!access.is_open())
            .then(|| Arc::new(Strangers::new(limits.max_unauthenticated_connections))),
        budget: Budget::new(limits.max_bytes_in_flight),
        metrics: Arc::default(),
    };
    let door = async |flag, address, protocol| {
        let listener = TcpListener::bind(address).await.map_err(at(flag, address))?;
        Ok::<_, io::Error>(Arc::new(Door::new(listener, protocol, house.clone())))
    };
    let http = door("--listen", flags.listen, Protocol::Http).await?;
    let grpc = door("--grpc-listen", flags.grpc_listen, Protocol::Grpc).await?;
    info!(address = %http.address()?, grpc = %grpc.address()?, tls = tls.is_some(), "listening");
    let House { budget, metrics, .. } = house;
    let app = Arc::new(App {
        keys,
        access,
        told,
        forward: flags.forward.as_deref().map(|url| Arc::new(Forward::new(url, Arc::clone(&metrics)))),
        limits,
        budget,
        answers: Budget::new(limits.max_answer_bytes),
        calls: Arc::new(Semaphore::new(limits.max_grpc_streams)),
        listing: tokio::sync::Mutex::default(),
        metrics,
        rps_target: flags.rps_target,
        draining: AtomicBool::new(false),
        ending: CancellationToken::new(),
        connections: TaskTracker::new(),
        seldom: Seldom::default(),
    });
    let mut tasks = JoinSet::new();
    tasks.spawn(forget(Arc::clone(&app)));
    tasks.spawn(give_back());
    tasks.spawn(decide(Arc::clone(&app)));
    tasks.spawn(reload(Arc::clone(&app), tls));
    if let Some(forward) = &app.forward {
        tasks.spawn(Arc::clone(forward).run(app.ending.clone()));
    }
    let scaler =
        ExternalScalerServer::new(Scaler(Arc::clone(&app))).max_decoding_message_size(limits.max_grpc_bytes);
    let calls = Routes::new(scaler).into_axum_router();
    let requests = router(Arc::clone(&app));
    for (door, router) in [(http, requests), (grpc, calls)] {
        tasks.spawn(take_in(door, router, Arc::clone(&app)));
    }
    terminated.await;
    info!("draining");
    app.draining.store(true, Ordering::Relaxed);
    tokio::time::sleep(flags.drain_delay).await;
    app.ending.cancel();
    app.connections.close();
    if tokio::time::timeout(LAST_REQUESTS, app.connections.wait()).await.is_err() {
        warn!("some requests were not finished");
    }
    Ok(())
}

/// Serves whoever comes, until the end. Handshakes go on beside each other: one that hangs holds nobody up.
async fn take_in(door: Arc<Door>, router: Router, app: Arc<App>) {
    loop {
        tokio::select! {
            knock = door.knock() => serve(knock, &door, router.clone(), &app),
            // Who is told to connect again must find somebody else: the listener closes with the door.
            () = app.ending.cancelled() => return,
        }
    }
}

/// One connection.
fn serve(knock: Knock, door: &Arc<Door>, router: Router, app: &Arc<App>) {
    let (door, app) = (Arc::clone(door), Arc::clone(app));
    app.clone().connections.spawn(async move {
        let opened = tokio::select! {
            opened = door.open(knock) => opened,
            () = app.ending.cancelled() => None,
        };
        let protocol = door.protocol();
        drop(door);
        let Some(link) = opened else { return };
        let guard = link.guard();
        // Boxed: idle connections, of which there are the most, hold only the one that they need.
        let served = match protocol {
            Protocol::Http => Either::Left(Box::pin(serve_http(link, router, app))),
            Protocol::Grpc => Either::Right(Box::pin(serve_grpc(link, router, app))),
        };
        tokio::select! {
            () = served => {}
            () = guard.ended() => {}
        }
    });
}

/// A client that closes its side after a request is answered all the same: an Envoy that ends sends its last report so.
async fn serve_http(link: Link, router: Router, app: Arc<App>) {
    let mut http = http1::Builder::new();
    // The head is timed by the link.
    http.half_close(true).timer(TokioTimer::new()).header_read_timeout(None);
    http.max_buf_size(app.limits.max_head_bytes);
    let (peer, guard) = (link.peer(), link.guard());
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        guard.request();
        request.extensions_mut().insert(peer);
        request.extensions_mut().insert(Arc::clone(&guard));
        let (answer, guard) = (router.clone().oneshot(request), Arc::clone(&guard));
        async move {
            let answer = answer.await;
            guard.answered();
            answer
        }
    });
    let mut connection = pin!(http.serve_connection(TokioIo::new(link), service).with_upgrades());
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = app.ending.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        debug!(%error, "a connection ended");
        if error.is_parse_too_large() {
            app.metrics.refused(Limit::HeadBytes);
        }
    }
}

/// KEDA's scaler. Its keep-alive finds clients that are gone.
async fn serve_grpc(link: Link, router: Router, app: Arc<App>) {
    let Limits { max_grpc_streams, max_head_bytes, head_timeout, write_timeout, .. } = app.limits;
    let most = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
    let mut http = http2::Builder::new(TokioExecutor::new());
    http.timer(TokioTimer::new()).keep_alive_interval(KEEP_ALIVE).keep_alive_timeout(KEEP_ALIVE);
    http.max_concurrent_streams(most(max_grpc_streams.saturating_add(SPARE_STREAMS)));
    http.initial_connection_window_size(GRPC_WINDOW_BYTES).initial_stream_window_size(GRPC_WINDOW_BYTES);
    http.max_header_list_size(most(max_head_bytes));
    let (peer, guard) = (link.peer(), link.guard());
    let service = {
        let (app, guard) = (Arc::clone(&app), Arc::clone(&guard));
        service_fn(move |request: hyper::Request<Incoming>| {
            // Before anything of the call is kept.
            let answer = match admit(&app, peer, &guard, request.headers()) {
                Ok((grant, call)) => {
                    let (app, guard) = (Arc::clone(&app), Arc::clone(&guard));
                    Either::Left(Box::pin(answer(request, router.clone(), app, guard, grant, call)))
                }
                Err(refused) => Either::Right(std::future::ready(refused.into_http())),
            };
            async { Ok::<_, Infallible>(answer.await) }
        })
    };
    let mut connection = pin!(http.serve_connection(TokioIo::new(link), service));
    let mut is_ending = false;
    let mut looks = tokio::time::interval(write_timeout.min(head_timeout) / 2);
    let until = tokio::time::Instant::now() + head_timeout;
    loop {
        tokio::select! {
            ended = poll_fn(|cx| {
                guard.turn();
                connection.as_mut().poll(cx)
            }) => {
                if let Err(error) = ended {
                    debug!(%error, "a connection ended");
                }
                return;
            }
            () = app.ending.cancelled(), if !is_ending => {
                is_ending = true;
                connection.as_mut().graceful_shutdown();
            }
            now = looks.tick() => {
                let late = if guard.has_stranger() && now >= until {
                    Some(Limit::HeadTimeout)
                } else if guard.has_unread(write_timeout) {
                    Some(Limit::WriteTimeout)
                } else {
                    None
                };
                if let Some(limit) = late {
                    app.metrics.refused(limit);
                    return;
                }
            }
        }
    }
}

/// Whether somebody may make a call: with a token or a certificate, and if there are not too many already.
fn admit(
    app: &App,
    peer: Peer,
    guard: &Guard,
    headers: &HeaderMap,
) -> Result<(Grant, OwnedSemaphorePermit), Status> {
    guard.call();
    let authorization = headers.get(AUTHORIZATION).map(HeaderValue::as_bytes);
    let grant = app.access.check(authorization, peer).map_err(|Unknown| {
        app.metrics.unauthorized.inc();
        guard.stranger_called();
        Status::unauthenticated("authorization: no token, or one that is not known")
    })?;
    guard.known();
    let call = Arc::clone(&app.calls).try_acquire_owned().map_err(|_| {
        app.metrics.refused(Limit::GrpcStreams);
        let most = app.limits.max_grpc_streams;
        Status::resource_exhausted(format!("{most} calls go on, and --max-grpc-streams allows no more"))
    })?;
    Ok((grant, call))
}

/// A call; it ends with its answer's body.
async fn answer(
    request: hyper::Request<Incoming>,
    router: Router,
    app: Arc<App>,
    guard: Arc<Guard>,
    grant: Grant,
    call: OwnedSemaphorePermit,
) -> Response {
    let (mut parts, body) = request.into_parts();
    let mut share = Share::default();
    let message = match message(&app, body, &mut share).await {
        Ok(message) => message,
        Err(refused) => return refused.into_http(),
    };
    parts.extensions.insert(grant);
    let Ok(response) = router.oneshot(hyper::Request::from_parts(parts, Body::from(message))).await;
    drop(share);
    response.map(|body| Body::new(Unread::new(body, guard, call)))
}

/// A call's message, which no call has more than one of, as it lies in the body.
async fn message(app: &App, mut body: Incoming, share: &mut Share) -> Result<Vec<u8>, Status> {
    let Limits { max_grpc_bytes: most, body_timeout, .. } = app.limits;
    let read = async {
        let mut message = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| Status::cancelled(error.to_string()))?;
            let Ok(data) = frame.into_data() else { continue };
            let bytes = message.len().saturating_add(data.len());
            if bytes > most.saturating_add(GRPC_PREFIX_BYTES) {
                app.metrics.refused(Limit::GrpcBytes);
                let reason = format!("the message has more than the allowed {most} bytes (--max-grpc-bytes)");
                return Err(Status::out_of_range(reason));
            }
            // Unlike connections there are many calls: nothing of them is free.
            app.budget.cover(share, bytes + FREE_BYTES).map_err(|_| {
                app.metrics.refused(Limit::BytesInFlight);
                Status::resource_exhausted("more bytes are being received than --max-bytes-in-flight allows")
            })?;
            message.extend_from_slice(&data);
        }
        Ok(message)
    };
    tokio::time::timeout(body_timeout, read).await.unwrap_or_else(|_| {
        app.metrics.refused(Limit::BodyTimeout);
        Err(Status::deadline_exceeded(format!(
            "the message took longer than {body_timeout:?} (--body-timeout)"
        )))
    })
}

async fn decide(app: Arc<App>) {
    let mut ticks = tokio::time::interval(Duration::from_nanos(DECISION_PERIOD_NS));
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

/// The allocator keeps what was freed for what may come. After many connections or large bodies that would be much, for ever.
async fn give_back() {
    let mut ticks = tokio::time::interval(GIVE_BACK_EVERY);
    loop {
        ticks.tick().await;
        let _ = tokio::task::spawn_blocking(memory::give_back).await;
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
