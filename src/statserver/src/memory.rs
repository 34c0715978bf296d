//! Memory that was freed, given back to the system.

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
