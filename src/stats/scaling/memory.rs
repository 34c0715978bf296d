//! What memory costs beyond the bytes asked for.

/// Returns what an allocation of so many bytes takes of the heap: an allocator adds a word and
/// rounds up.
pub fn heap_bytes(bytes: usize) -> usize {
    if bytes == 0 { 0 } else { bytes.saturating_add(size_of::<usize>()).next_multiple_of(16).max(32) }
}
