//! The time, in the two senses that the server needs.

use std::sync::LazyLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Returns unix time in nanoseconds as of this process's first call, and from then on by the
/// monotonic clock: a step of the wall clock must not move what is in the windows.
pub fn now_ns() -> u64 {
    static START: LazyLock<(Instant, Duration)> = LazyLock::new(|| (Instant::now(), wall_time()));
    let (started, wall_time) = *START;
    u64::try_from((wall_time + started.elapsed()).as_nanos()).unwrap_or(u64::MAX)
}

/// Returns unix time, as the wall clock has it now.
pub fn wall_time() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
