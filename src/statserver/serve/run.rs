//! From the start to the orderly end.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use futures_util::future::Either;
use inflight_stats::protocol::key_name::KeyName;
use serde_json::Value;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::app::background;
use crate::app::changes::Changes;
use crate::app::filter_module::FilterModule;
use crate::app::state::ServerState;
use crate::cli::flags::Flags;
use crate::forward::forwarder::Forwarder;
use crate::http::router::router;
use crate::keys::capacity::Capacity;
use crate::keys::key_table::KeyTable;
use crate::keys::settings_store::SettingsStore;
use crate::keys::unknown_keys::UnknownKeys;
use crate::net::auth::Access;
use crate::net::listener::{Accepted, Listener, Shared};
use crate::net::memory_budget::Budget;
use crate::net::shutdown::{DrainWatcher, new_drain};
use crate::net::tls::{ClientCa, NamedFile, Protocol, Tls, TlsFiles};
use crate::net::unauthenticated::UnauthenticatedConnections;
use crate::os::clock::now_ns;
use crate::replication::replica::Replica;
use crate::replication::valkey::Valkey;
use crate::serve::metrics_api::{self, MetricsApi};
use crate::serve::{grpc, http1};
use crate::telemetry::log_limit::LogLimiter;
use crate::telemetry::refusals::RefusalLog;

/// How long open requests may take once the listeners are closed.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);

/// Serves until `terminated` resolves and everything is drained.
///
/// # Errors
/// If the flags do not allow a start, an address cannot be listened on, or a file is wrong.
pub async fn run(flags: &Flags, terminated: impl Future<Output = ()>) -> io::Result<()> {
    flags.check_access().map_err(io::Error::other)?;
    let access = Access::load(flags.token_file.as_deref(), flags.has_client_ca(), flags.anonymous_access())
        .map_err(io::Error::other)?;
    let keys = KeyTable::new(Arc::new(flags.key_settings()), Capacity::from(&flags.limits), now_ns())
        .with_stale_after(flags.stale_after);
    let keys = Arc::new(keys);
    let store = store(flags, &keys)?;
    let settings = Arc::new(match &store {
        Some(_) => SettingsStore::shared(flags.rps_target),
        None => SettingsStore::load(flags.settings.as_deref(), flags.rps_target, &keys)?,
    });
    let module = flags.module.as_deref().map(FilterModule::load).transpose().map_err(io::Error::other)?;
    let load = |files: Option<TlsFiles>| {
        files.map(Tls::load).transpose().map_err(io::Error::other).map(|tls| tls.map(Arc::new))
    };
    let (tls, own_grpc_tls) = (load(tls_files(flags))?, load(grpc_tls_files(flags))?);
    let grpc_tls = own_grpc_tls.clone().or_else(|| tls.clone());
    let shared = shared(flags, &access, tls.clone());
    let metrics_api = match flags.metrics_listen {
        Some(address) => Some(metrics_api::bind(flags, address, &shared).await?),
        None => None,
    };
    let http = bind("--listen", flags.listen, Protocol::Http, &shared).await?;
    let of_grpc = Shared { tls: grpc_tls.clone(), ..shared.clone() };
    let grpc = bind("--grpc-listen", flags.grpc_listen, Protocol::Grpc, &of_grpc).await?;
    info!(
        address = %http.address()?,
        grpc = %grpc.address()?,
        tls = tls.is_some(),
        grpc_tls = grpc_tls.is_some(),
        "listening"
    );
    if let Some(FilterModule { bytes, sha256 }) = &module {
        info!(bytes = bytes.len(), sha256, "handing out the module");
    }

    let (trigger, drain) = new_drain();
    let state = Arc::new(state(flags, access, (keys, settings, store), module, shared, drain));
    let of_metrics_api = metrics_api.as_ref().map(MetricsApi::tls);
    let certificates = tls.into_iter().chain(own_grpc_tls).chain(of_metrics_api).collect();
    let mut background = background::start(&state, certificates);
    let mut listeners = JoinSet::new();
    listeners.spawn(accept(http, router(Arc::clone(&state)), Arc::clone(&state)));
    listeners.spawn(accept(grpc, grpc::router(Arc::clone(&state)), Arc::clone(&state)));
    if let Some(metrics_api) = metrics_api {
        let (listener, routes) = metrics_api.start(&state, &mut background);
        listeners.spawn(accept(listener, routes, Arc::clone(&state)));
    }
    terminated.await;
    info!("draining");
    if let Some(replica) = state.changes.replica() {
        replica.resign().await;
    }
    if trigger.drain(flags.drain_delay, DRAIN_DEADLINE).await.is_err() {
        warn!(deadline = ?DRAIN_DEADLINE, "connections still open at the drain deadline were closed");
    }
    if let Some(replica) = state.changes.replica() {
        replica.leave().await;
    }
    Ok(())
}

/// The store of a shared state.
struct Store {
    valkey: Valkey,
    /// The settings that an empty one begins with.
    seeds: Vec<(KeyName, Value)>,
}

fn store(flags: &Flags, keys: &KeyTable) -> io::Result<Option<Store>> {
    let Some(url) = &flags.store else { return Ok(None) };
    let certificate = flags.store_tls_cert.clone().zip(flags.store_tls_key.clone());
    let valkey = Valkey {
        url: url.clone(),
        password_file: flags.store_password_file.clone(),
        ca: flags.store_tls_ca.clone(),
        certificate,
    };
    let seeds = flags
        .settings
        .as_deref()
        .map(|path| SettingsStore::seeds(path, flags.rps_target, keys.defaults()))
        .transpose()?;
    info!(store = %valkey.url, "the state is shared through a store");
    Ok(Some(Store { valkey, seeds: seeds.unwrap_or_default() }))
}

/// Returns what the listeners share.
fn shared(flags: &Flags, access: &Access, tls: Option<Arc<Tls>>) -> Shared {
    let limits = flags.limits;
    let unauthenticated = UnauthenticatedConnections::new(limits.max_unauthenticated_connections);
    Shared {
        limits,
        tls,
        unauthenticated: (!access.is_open()).then(|| Arc::new(unauthenticated)),
        budget: Budget::new(limits.max_bytes_in_flight),
        metrics: Arc::default(),
    }
}

/// Returns what TLS is made of, if it is.
fn tls_files(flags: &Flags) -> Option<TlsFiles> {
    Some(TlsFiles {
        certificate: file("--tls-cert", &flags.tls_cert)?,
        key: file("--tls-key", &flags.tls_key)?,
        client_ca: file("--tls-client-ca", &flags.tls_client_ca).map(ClientCa::File),
    })
}

/// Returns what the TLS of gRPC alone is made of, if it has one.
fn grpc_tls_files(flags: &Flags) -> Option<TlsFiles> {
    Some(TlsFiles {
        certificate: file("--grpc-tls-cert", &flags.grpc_tls_cert)?,
        key: file("--grpc-tls-key", &flags.grpc_tls_key)?,
        client_ca: file("--grpc-tls-client-ca", &flags.grpc_tls_client_ca).map(ClientCa::File),
    })
}

fn file(flag: &'static str, path: &Option<PathBuf>) -> Option<NamedFile> {
    path.clone().map(|path| NamedFile { flag, path })
}

async fn bind(
    flag: &str,
    address: SocketAddr,
    protocol: Protocol,
    shared: &Shared,
) -> io::Result<Arc<Listener>> {
    let listener = Listener::bind(address, protocol, shared.clone()).await;
    let listener = listener.map_err(|error| {
        io::Error::new(error.kind(), format!("cannot listen on {flag} {address}: {error}"))
    })?;
    Ok(Arc::new(listener))
}

fn state(
    flags: &Flags,
    access: Access,
    (keys, settings, store): (Arc<KeyTable>, Arc<SettingsStore>, Option<Store>),
    module: Option<FilterModule>,
    shared: Shared,
    drain: DrainWatcher,
) -> ServerState {
    let Shared { limits, budget, metrics, .. } = shared;
    let forwarder = flags.forward.as_deref().map(|url| Arc::new(Forwarder::new(url, Arc::clone(&metrics))));
    let changes = match store {
        Some(Store { valkey, seeds }) => {
            let (forwarder, metrics) = (forwarder.clone(), Arc::clone(&metrics));
            Changes::Shared(Arc::new(Replica::new(valkey, (&keys, &settings), seeds, forwarder, metrics)))
        }
        None => {
            let (keys, settings) = (Arc::clone(&keys), Arc::clone(&settings));
            Changes::Local { keys, settings, forwarder: forwarder.clone() }
        }
    };
    ServerState {
        keys,
        access,
        settings,
        changes,
        module,
        limits,
        budget,
        response_budget: Budget::new(limits.max_answer_bytes),
        calls: Arc::new(Semaphore::new(limits.max_grpc_streams)),
        listing: Arc::default(),
        metrics,
        forwarder,
        rps_target: flags.rps_target,
        drain,
        log_limiter: LogLimiter::default(),
        unknown_keys: UnknownKeys::default(),
        refusals: RefusalLog::default(),
    }
}

/// Accepts connections until the shutdown. Handshakes run beside each other: one that hangs delays
/// nobody.
async fn accept(listener: Arc<Listener>, router: Router, state: Arc<ServerState>) {
    loop {
        tokio::select! {
            accepted = listener.accept() => serve(accepted, &listener, router.clone(), &state),
            // Clients that reconnect must reach another server, so the socket closes.
            () = state.drain.closing() => return,
        }
    }
}

/// Serves one connection, in a task of its own.
fn serve(accepted: Accepted, listener: &Arc<Listener>, router: Router, state: &Arc<ServerState>) {
    let (listener, state) = (Arc::clone(listener), Arc::clone(state));
    let drain = state.drain.clone();
    drain.spawn(async move {
        let connection = tokio::select! {
            connection = listener.handshake(accepted) => connection,
            () = state.drain.closing() => None,
        };
        let protocol = listener.protocol();
        // The listener closes when no handshake needs it any more.
        drop(listener);
        let Some(connection) = connection else { return };
        let guard = connection.guard();
        // Boxed: idle connections, of which there are the most, hold only the one that they need.
        let served = match protocol {
            Protocol::Http | Protocol::MetricsApi => {
                Either::Left(Box::pin(http1::serve(connection, router, state)))
            }
            Protocol::Grpc => Either::Right(Box::pin(grpc::serve(connection, router, state))),
        };
        tokio::select! {
            () = served => {}
            () = guard.closed() => {}
        }
    });
}
