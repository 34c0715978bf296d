//! Where the state changes: in this process, or, with a store, through the log that servers share.

use std::sync::Arc;

use inflight_stats::Report;
use inflight_stats::protocol::key_name::KeyName;
use inflight_stats::protocol::stat::{WireStatMessage, WireStatMessages};
use prost::Message as _;
use serde_json::Value;

use crate::forward::forwarder::Forwarder;
use crate::keys::key_table::{KeyStat, KeyTable, RecordError, StatError};
use crate::keys::settings_store::{SetError, SettingsStore};
use crate::replication::entry::Change;
use crate::replication::machine::Outcome;
use crate::replication::replica::{Replica, Unavailable};

/// Where the state changes.
pub enum Changes {
    /// In this process alone.
    Local {
        /// The keys.
        keys: Arc<KeyTable>,
        /// Their settings.
        settings: Arc<SettingsStore>,
        /// Where stats are forwarded to.
        forwarder: Option<Arc<Forwarder>>,
    },
    /// Through the log of a store.
    Shared(Arc<Replica>),
}

impl Changes {
    /// Returns this server's part of a shared state, if it is shared.
    pub fn replica(&self) -> Option<&Arc<Replica>> {
        match self {
            Self::Local { .. } => None,
            Self::Shared(replica) => Some(replica),
        }
    }

    /// Records a report of so many bytes.
    ///
    /// # Errors
    /// [`Unavailable`]: it may be recorded or not, and its sender sends it again. Those who watch its
    /// keys have been notified all the same.
    pub async fn report(
        &self,
        report: Report,
        bytes: usize,
    ) -> Result<Result<(), RecordError>, (Unavailable, Report)> {
        let replica = match self {
            Self::Local { keys, forwarder, .. } => {
                return Ok(keys.record(&report, keys.now_ns(), |message, stat| {
                    if let Some(forwarder) = forwarder {
                        forwarder.queue_report(&report.pod, message, stat);
                    }
                }));
            }
            Self::Shared(replica) => replica,
        };
        match replica.submit(Change::Report(report.clone()), bytes).await {
            Ok(Outcome::Report(recorded)) => Ok(recorded),
            Ok(_) | Err(Unavailable) => Err((Unavailable, report)),
        }
    }

    /// Records valid stats. Returns how many were recorded, and why the first that was not was not.
    ///
    /// # Errors
    /// [`Unavailable`]: they may be recorded or not.
    pub async fn stats(
        &self,
        mut stats: Vec<WireStatMessage>,
    ) -> Result<(usize, Option<StatError>), Unavailable> {
        match self {
            Self::Local { keys, forwarder, .. } => {
                let (now_ns, mut failed) = (keys.now_ns(), None);
                stats.retain(|message| {
                    let recorded = KeyStat::check(message).and_then(|stat| keys.record_stat(stat, now_ns));
                    recorded.map_err(|error| failed.get_or_insert(error).clone()).is_ok()
                });
                let recorded = stats.len();
                if let Some(forwarder) = forwarder {
                    forwarder.queue_stats(stats);
                }
                Ok((recorded, failed))
            }
            Self::Shared(_) if stats.is_empty() => Ok((0, None)),
            Self::Shared(replica) => {
                let bytes = WireStatMessages { messages: stats }.encode_to_vec();
                let length = bytes.len();
                match replica.submit_patiently(Change::Stats(bytes), length).await? {
                    Outcome::Stats(recorded, failed) => Ok((recorded, failed)),
                    _ => Err(Unavailable),
                }
            }
        }
    }

    /// Sets a key's settings, or (`None`) has it scaled by the defaults again.
    ///
    /// # Errors
    /// [`SetError`].
    pub async fn settings(&self, name: KeyName, json: Option<Value>) -> Result<(), SetError> {
        match (self, json) {
            (Self::Local { keys, settings, .. }, Some(json)) => settings.set(keys, name, json).await,
            (Self::Local { keys, settings, .. }, None) => settings.clear(keys, name).await,
            (Self::Shared(replica), json) => {
                let change = match json {
                    Some(json) => Change::SetSettings(name, replica.check_settings(json)?.to_string()),
                    None => Change::ClearSettings(name),
                };
                match replica.submit(change, 1 << 10).await {
                    Ok(Outcome::Settings(set)) => set,
                    Ok(_) | Err(Unavailable) => Err(SetError::Unavailable),
                }
            }
        }
    }
}
