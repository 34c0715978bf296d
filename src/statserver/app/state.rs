//! The state of the server, which all requests share.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::task::JoinError;

use crate::app::changes::Changes;
use crate::app::filter_module::FilterModule;
use crate::cli::limits::Limits;
use crate::forward::forwarder::Forwarder;
use crate::keys::key_table::KeyTable;
use crate::keys::settings_store::SettingsStore;
use crate::keys::unknown_keys::UnknownKeys;
use crate::net::auth::{Access, Peer};
use crate::net::memory_budget::Budget;
use crate::net::shutdown::DrainWatcher;
use crate::telemetry::log_limit::LogLimiter;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::refusals::RefusalLog;

/// What all requests share.
pub struct ServerState {
    /// The keys.
    pub keys: Arc<KeyTable>,
    /// Who may do what.
    pub access: Access,
    /// The settings of single keys.
    pub settings: Arc<SettingsStore>,
    /// Where keys and settings change.
    pub changes: Changes,
    /// The module that Envoys can fetch.
    pub module: Option<FilterModule>,
    /// How much is accepted.
    pub limits: Limits,
    /// Bytes that are being received.
    pub budget: Budget,
    /// Bytes of responses that have yet to be read.
    pub response_budget: Budget,
    /// A permit for each concurrent gRPC call.
    pub calls: Arc<Semaphore>,
    /// Held while keys, senders or pods are [listed](Self::list): one list is made at a time.
    pub listing: Arc<tokio::sync::Mutex<()>>,
    /// The server's own metrics.
    pub metrics: Arc<Metrics>,
    /// Where stats are forwarded to.
    pub forwarder: Option<Arc<Forwarder>>,
    /// The target of keys that are scaled by requests per second and have no target of their own.
    pub rps_target: f64,
    /// Follows the shutdown.
    pub drain: DrainWatcher,
    /// For log lines that clients cause.
    pub log_limiter: LogLimiter,
    /// Logs keys that autoscalers ask for and nobody reports.
    pub unknown_keys: UnknownKeys,
    /// Logs callers that may not do what they ask for.
    pub refusals: RefusalLog,
}

impl ServerState {
    /// Lists keys, senders or pods, which may take long: reports do not wait for it. One list is made at
    /// a time, also if those who asked for them leave.
    ///
    /// # Errors
    /// It panicked.
    pub async fn list<T: Send + 'static>(
        self: &Arc<Self>,
        list: impl FnOnce(&Self) -> T + Send + 'static,
    ) -> Result<T, JoinError> {
        let one_at_a_time = Arc::clone(&self.listing).lock_owned().await;
        let state = Arc::clone(self);
        let listed = tokio::task::spawn_blocking(move || {
            let listed = list(&state);
            drop(one_at_a_time);
            listed
        });
        listed.await
    }

    /// Counts and logs a caller that may not do what it asks for.
    pub fn refuse(&self, peer: Peer, reason: &'static str) {
        self.metrics.unauthorized.inc();
        self.refusals.refused(peer.address, reason);
    }
}
