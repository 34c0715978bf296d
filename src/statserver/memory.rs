//! What the allocator keeps of memory that was freed.

/// Large blocks come from the system, and go back to it when they are freed. glibc would raise this limit whenever a larger
/// block is freed, up to 32 MiB; then a list of all keys or a large report leaves a hole in a heap, which stays.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const LARGE_BYTES: i32 = 256 << 10;
/// glibc's heaps: without a limit eight for each core, each with holes of its own.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const HEAPS: i32 = 4;

/// Has little kept. To be called before threads are started.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code, reason = "the only way to tell glibc")]
pub fn keep_little() {
    // SAFETY: they may be called at any time; glibc takes its own lock. What it refuses stays as it is.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE_BYTES);
        libc::mallopt(libc::M_ARENA_MAX, HEAPS);
    }
}

/// Nothing to do.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn keep_little() {}

/// Gives back what the allocator keeps. glibc does so by itself only at the end of its heaps; this is its own call for the
/// rest, and takes some milliseconds with hundreds of megabytes. Another C library gives back by itself.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code, reason = "the only way to ask glibc")]
pub fn give_back() {
    // SAFETY: it may be called at any time from any thread.
    unsafe { libc::malloc_trim(0) };
}

/// Nothing to do.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn give_back() {}
