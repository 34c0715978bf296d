//! When the host ticks next.

use inflight_stats::counting::time::MonotonicNs;

use crate::host::Host;

/// When the next tick of the root context is due. There is always one.
#[derive(Debug, Default)]
pub struct TickTimer {
    due: MonotonicNs,
}

impl TickTimer {
    /// Notes when the next tick is due.
    pub fn is_due_at(&mut self, due: MonotonicNs) {
        self.due = due;
    }

    /// Forgets when the next tick was due, because it may be that of a context that ends.
    pub fn forget(&mut self) {
        self.due = MonotonicNs(u64::MAX);
    }

    /// Moves the next tick forward to `due`, if it is later than that. An overdue tick is left
    /// alone: setting the timer again would delay it, and under load would do so again and again.
    pub fn wake_at(&mut self, host: impl Host, due: MonotonicNs, now: MonotonicNs) {
        if due < self.due {
            host.tick_in(due.since(now).div_ceil(1_000_000));
            self.due = due;
        }
    }
}
