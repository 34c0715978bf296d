//! Log lines about callers that are refused: one at once, and then one a minute.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Mutex;
use std::time::Duration;

use tracing::warn;

use crate::os::lock::lock;

/// How often [`RefusalLog::log_counts`] is to be called.
pub const LOG_PERIOD: Duration = Duration::from_secs(60);
/// Maximum number of callers that are told apart within a period.
const MAX_CALLERS: usize = 50;

/// A caller, and why it is refused.
type Caller = (Option<IpAddr>, &'static str);

/// Counts refused callers, and logs each at most twice a minute.
#[derive(Debug, Default)]
pub struct RefusalLog(Mutex<Refused>);

#[derive(Debug, Default)]
struct Refused {
    /// Refusals that were not logged yet.
    counts: HashMap<Caller, u64>,
    /// Refusals of callers beyond [`MAX_CALLERS`].
    others: u64,
}

impl RefusalLog {
    /// Counts a refusal. Logs it if the caller was not refused for this reason in the last period.
    pub fn refused(&self, peer: Option<IpAddr>, reason: &'static str) {
        if lock(&self.0).is_first((peer, reason)) {
            log((peer, reason), 1);
        }
    }

    /// Logs what was counted in the last period.
    pub fn log_counts(&self) {
        let (counts, others) = lock(&self.0).take();
        counts.into_iter().for_each(|(caller, count)| log(caller, count));
        if others > 0 {
            warn!(count = others, "refused other callers");
        }
    }
}

fn log((peer, reason): Caller, count: u64) {
    let peer = peer.map_or_else(|| "unknown".to_owned(), |peer| peer.to_string());
    warn!(peer, reason, count, "refused a caller");
}

impl Refused {
    /// Returns whether a refusal is the first of its caller.
    fn is_first(&mut self, caller: Caller) -> bool {
        if let Some(count) = self.counts.get_mut(&caller) {
            *count += 1;
            return false;
        }
        let is_first = self.counts.len() < MAX_CALLERS;
        if is_first {
            self.counts.insert(caller, 0);
        } else {
            self.others += 1;
        }
        is_first
    }

    /// Returns the refusals that were not logged yet. Callers without any are forgotten.
    fn take(&mut self) -> (Vec<(Caller, u64)>, u64) {
        let mut counts = Vec::new();
        self.counts.retain(|caller, count| {
            let count = std::mem::take(count);
            if count > 0 {
                counts.push((*caller, count));
            }
            count > 0
        });
        (counts, std::mem::take(&mut self.others))
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn a_caller_is_logged_at_once_and_then_once_a_period_by_reason() {
        let mut refused = Refused::default();
        let peer = |number| Some(IpAddr::V4(Ipv4Addr::new(10, 0, 0, number)));
        assert!(refused.is_first((peer(1), "no token")));
        assert!(refused.is_first((peer(1), "unknown token")));
        assert_eq!(refused.take(), (vec![], 0));
        assert!(refused.is_first((peer(1), "no token")), "a period without a refusal");
        assert!(!refused.is_first((peer(1), "no token")) && !refused.is_first((peer(1), "no token")));
        assert_eq!(refused.take(), (vec![((peer(1), "no token"), 2)], 0));
        assert!(!refused.is_first((peer(1), "no token")), "goes on");
        // Too many callers are counted together.
        let first = (2..=100).filter(|number| refused.is_first((peer(*number), "no token")));
        assert_eq!(first.count(), MAX_CALLERS - 1);
        assert_eq!(refused.take(), (vec![((peer(1), "no token"), 1)], 50));
    }
}
