//! Log lines that clients cause: at most one a second.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::os::clock::now_ns;

/// Logs at most once a second, and counts what it suppresses.
#[derive(Default)]
pub struct LogLimiter {
    last_second: AtomicU64,
    suppressed: AtomicU64,
}

impl LogLimiter {
    /// Calls `log` with the number of lines suppressed since the last one, unless it was called
    /// within this second.
    pub fn log(&self, log: impl FnOnce(u64)) {
        let second = now_ns() / 1_000_000_000;
        if self.last_second.swap(second, Ordering::Relaxed) == second {
            self.suppressed.fetch_add(1, Ordering::Relaxed);
        } else {
            log(self.suppressed.swap(0, Ordering::Relaxed));
        }
    }
}
