//! Log lines about keys that autoscalers ask for and nobody reports: one for each.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::sync::Mutex;

use inflight_stats::protocol::key_name::KeyName;
use inflight_stats::scaling::answer::Missing;
use tracing::warn;

use crate::os::lock::lock;

/// Maximum number of keys that are remembered as logged, and so logged at all.
const MAX_KEYS: usize = 1_000;

/// The keys that were logged, by their hashes: names may be long.
#[derive(Debug, Default)]
pub struct UnknownKeys {
    hasher: RandomState,
    logged: Mutex<HashSet<u64>>,
}

impl UnknownKeys {
    /// Notes that an autoscaler asked for a key of which nothing is said. Logs it once if nobody has
    /// reported it: its name may be misspelt.
    pub fn asked(&self, name: &KeyName, missing: Missing) {
        if missing == Missing::NeverReported && self.is_first(name) {
            warn!(key = %name, "an autoscaler asks for a key that no pod or gateway has reported");
        }
    }

    fn is_first(&self, name: &KeyName) -> bool {
        let mut logged = lock(&self.logged);
        logged.len() < MAX_KEYS && logged.insert(self.hasher.hash_one(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_key_is_logged_once_and_not_too_many() {
        let keys = UnknownKeys::default();
        let logged = |range: std::ops::Range<usize>| {
            range.filter(|number| keys.is_first(&KeyName::new("ns", &number.to_string()))).count()
        };
        assert_eq!((logged(0..10), logged(0..10), logged(5..2_000)), (10, 0, 990));
        assert_eq!(lock(&keys.logged).len(), MAX_KEYS);
    }
}
