//! Files that are read whole: tokens, certificates, settings.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

/// Returns a file's bytes, of which there may be at most `max`. A device does not know its length
/// beforehand, so no more is read than one byte beyond. A pipe is refused: whoever reads it may wait
/// for ever.
///
/// # Errors
/// The system's, what it is instead of a file, or how many bytes are allowed.
pub fn read(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    if fs::metadata(path)?.file_type().is_fifo() {
        return Err(io::Error::other("it is a pipe; expected a file"));
    }
    read_from(File::open(path)?, max)
}

/// The same of what is open already.
///
/// # Errors
/// The system's, or how many bytes are allowed.
pub fn read_from(source: impl Read, max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    source.take(max.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max {
        return Err(io::Error::other(format!("the file is too large; expected at most {max} bytes")));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_read_than_allowed_whatever_the_length_says() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        let too_large = |max| format!("the file is too large; expected at most {max} bytes");
        std::fs::write(&file, "12345").unwrap();
        assert_eq!(read(&file, 5).unwrap(), b"12345");
        assert_eq!(read(&file, 4).unwrap_err().to_string(), too_large(4));
        let pipe = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        assert_eq!(read(&pipe, 5).unwrap_err().to_string(), "it is a pipe; expected a file");
        // It has no end, and its length is 0.
        assert_eq!(read(Path::new("/dev/zero"), 9).unwrap_err().to_string(), too_large(9));
    }
}
