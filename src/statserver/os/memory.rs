//! What the allocator keeps of memory that was freed.

/// Larger blocks come from the system, and return to it when they are freed. glibc would raise this
/// threshold whenever a larger block is freed, up to 32 MiB; then a list of all keys or a large
/// report would leave a hole in a heap for good.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const MMAP_THRESHOLD_BYTES: i32 = 256 << 10;
/// glibc's heaps: without a limit eight for each core, each with holes of its own.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const MAX_ARENAS: i32 = 4;

/// Has the allocator keep little of what is freed. Must be called before threads are started.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code, reason = "the only way to configure glibc")]
pub fn limit_retention() {
    // SAFETY: may be called at any time; glibc takes its own lock. What it refuses stays as it is.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES);
        libc::mallopt(libc::M_ARENA_MAX, MAX_ARENAS);
    }
}

/// Nothing to do.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn limit_retention() {}

/// Returns freed memory to the system. glibc does so by itself only at the end of its heaps; this
/// is its own call for the rest, and takes some milliseconds with hundreds of megabytes. Other C
/// libraries need no call.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code, reason = "the only way to ask glibc")]
pub fn trim() {
    // SAFETY: may be called at any time from any thread.
    unsafe { libc::malloc_trim(0) };
}

/// Nothing to do.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn trim() {}
