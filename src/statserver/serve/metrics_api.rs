//! The metrics APIs over a listener of their own, with a TLS of its own.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use axum::Router;
use axum::middleware::from_fn_with_state;
use tokio::task::JoinSet;
use tracing::info;

use crate::app::state::ServerState;
use crate::cli::flags::Flags;
use crate::http::body;
use crate::net::front_proxy::{AllowedNames, FrontProxy};
use crate::net::listener::{Listener, MAX_UNAUTHENTICATED_METRICS, Shared};
use crate::net::service_account::{FetchedTrust, ServiceAccount};
use crate::net::tls::{ClientCa, NamedFile, Protocol, Tls, TlsFiles};
use crate::net::unauthenticated::UnauthenticatedConnections;
use crate::protocols::metrics_api::routes;

/// The metrics APIs, before they are served.
pub struct MetricsApi {
    listener: Arc<Listener>,
    tls: Arc<Tls>,
    names: AllowedNames,
    /// Who reads the CA and the names from the cluster, unless flags give them.
    fetching: Option<(ServiceAccount, FetchedTrust)>,
}

/// Listens for the metrics APIs.
///
/// # Errors
/// If a file is wrong or missing, or the address cannot be listened on.
pub async fn bind(flags: &Flags, address: SocketAddr, shared: &Shared) -> io::Result<MetricsApi> {
    let file = |flag, path: &Option<PathBuf>| path.clone().map(|path| NamedFile { flag, path });
    let own = file("--metrics-tls-cert", &flags.metrics_tls_cert)
        .zip(file("--metrics-tls-key", &flags.metrics_tls_key));
    let servers = || file("--tls-cert", &flags.tls_cert).zip(file("--tls-key", &flags.tls_key));
    let (certificate, key) = own.or_else(servers).ok_or_else(|| {
        io::Error::other(
            "--metrics-listen requires TLS; expected --metrics-tls-cert and --metrics-tls-key, or \
             --tls-cert and --tls-key",
        )
    })?;
    let given = file("--requestheader-client-ca-file", &flags.requestheader_client_ca_file);
    let (client_ca, names, fetching) = match given {
        Some(file) => {
            let names = AllowedNames::new(flags.requestheader_allowed_names.clone());
            (ClientCa::File(file), names, None)
        }
        None => {
            let account = ServiceAccount::of_pod(&flags.service_account_dir, |name| std::env::var(name).ok());
            let account = account.ok_or_else(|| {
                io::Error::other(
                    "--metrics-listen has to know the kube-apiserver's front proxy; expected \
                     --requestheader-client-ca-file, or a pod with a service account's token",
                )
            })?;
            let trust = FetchedTrust::default();
            let client_ca = ClientCa::Fetched(Arc::clone(&trust.client_ca));
            (client_ca, trust.names.clone(), Some((account, trust)))
        }
    };
    let files = TlsFiles { certificate, key, client_ca: Some(client_ca) };
    let tls = Arc::new(Tls::load(files).map_err(io::Error::other)?);
    // Everybody has to authenticate here, whatever the other addresses allow.
    let unauthenticated = UnauthenticatedConnections::new(MAX_UNAUTHENTICATED_METRICS);
    let shared = Shared {
        tls: Some(Arc::clone(&tls)),
        unauthenticated: Some(Arc::new(unauthenticated)),
        ..shared.clone()
    };
    let listener = Listener::bind(address, Protocol::MetricsApi, shared).await;
    let listener = listener.map_err(|error| {
        io::Error::new(error.kind(), format!("cannot listen on --metrics-listen {address}: {error}"))
    })?;
    info!(metrics = %listener.address()?, "listening for the kube-apiserver");
    Ok(MetricsApi { listener: Arc::new(listener), tls, names, fetching })
}

impl MetricsApi {
    /// Returns its TLS.
    pub fn tls(&self) -> Arc<Tls> {
        Arc::clone(&self.tls)
    }

    /// Starts to follow who the front proxy is. Returns the listener, and what to serve on it.
    pub fn start(self, state: &Arc<ServerState>, background: &mut JoinSet<()>) -> (Arc<Listener>, Router) {
        let Self { listener, tls, names, fetching } = self;
        if let Some((account, trust)) = fetching {
            background.spawn(account.follow(trust, Arc::clone(&tls), state.drain.clone()));
        }
        let front_proxy = Arc::new(FrontProxy::new(tls, names));
        let routes = routes::router(Arc::clone(state), front_proxy)
            .layer(from_fn_with_state(Arc::clone(state), body::reserve_response));
        (listener, routes)
    }
}
