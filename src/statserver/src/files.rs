//! Files that are read whole: tokens, certificates, settings.

use std::io;
use std::path::Path;

/// A file's bytes, of which there may be at most so many.
///
/// # Errors
/// The system's, or how many bytes there are and how many are allowed.
pub fn read(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let size = std::fs::metadata(path)?.len();
    if size > most {
        return Err(io::Error::other(format!("{size} bytes, allowed are {most}")));
    }
    std::fs::read(path)
}
