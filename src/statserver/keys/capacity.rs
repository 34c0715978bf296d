//! How much is kept of keys.

use std::fmt;

use crate::cli::limits::{Limit, Limits};

/// How much is kept.
#[derive(Clone, Copy, Debug)]
pub struct Capacity {
    /// Keys in all.
    pub keys: usize,
    /// Keys of one namespace.
    pub keys_per_namespace: usize,
    /// Pods and gateways of one key.
    pub pods_per_key: usize,
    /// Bytes that keys, their windows and their senders take, histories apart.
    pub bytes: usize,
}

impl From<&Limits> for Capacity {
    fn from(limits: &Limits) -> Self {
        Self {
            keys: limits.max_keys,
            keys_per_namespace: limits.max_keys_per_namespace,
            pods_per_key: limits.max_pods_per_key,
            bytes: limits.max_table_bytes,
        }
    }
}

/// A new key, or another sender of one, would exceed a limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CapacityExceeded {
    /// Which limit.
    pub limit: Limit,
    /// What there is of it already.
    pub reason: String,
    /// How much it allows.
    pub max: usize,
}

impl fmt::Display for CapacityExceeded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; --{} allows {}", self.reason, self.limit.flag(), self.max)
    }
}

impl std::error::Error for CapacityExceeded {}
