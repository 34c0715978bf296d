//! The time, in the two senses that the server needs.

use std::sync::LazyLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use inflight_stats::counting::time::nanoseconds;

/// Returns unix time in nanoseconds as of this process's first call, and from then on by the
/// monotonic clock: a step of the wall clock must not move what is in the windows.
pub fn now_ns() -> u64 {
    static START: LazyLock<(Instant, Duration)> = LazyLock::new(|| (Instant::now(), wall_time()));
    let (started, wall_time) = *START;
    nanoseconds(wall_time + started.elapsed())
}

/// Returns a unix time in nanoseconds as RFC 3339 has it, in UTC, without the fraction of a second.
pub fn rfc3339(unix_ns: u64) -> String {
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_nanos(unix_ns)).to_string()
}

/// Returns unix time, as the wall clock has it now.
pub fn wall_time() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
