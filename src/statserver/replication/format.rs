//! The formats of entries and snapshots: their versions, and what they have in common.
//!
//! Bytes in the store begin with the version that they were written in. A server writes the oldest
//! version that any live server still needs, so servers of two versions can run beside each other.

use std::fmt;

use bincode::Options;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The oldest version that this server reads and writes.
pub const MIN_FORMAT: u8 = 1;
/// The newest version that this server reads and writes. The feature `next-format` makes up a version
/// that does not exist yet, with which the tests try a rolling upgrade.
pub const MAX_FORMAT: u8 = if cfg!(feature = "next-format") { 2 } else { 1 };
/// What one entry, or one piece of a snapshot, may have at most once it is decompressed.
const MAX_BYTES: usize = 1 << 30;

/// Why bytes of the store cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FormatError {
    /// They were written by a server that is too new, or too old.
    Version(u8),
    /// They are not what a server writes.
    Malformed(String),
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Version(version) => write!(
                f,
                "the store has format {version}; this server reads {MIN_FORMAT} to {MAX_FORMAT}: it is too \
                 old, or too new"
            ),
            Self::Malformed(reason) => write!(f, "the store's bytes are malformed: {reason}"),
        }
    }
}

impl std::error::Error for FormatError {}

/// Returns the version that bytes were written in.
///
/// # Errors
/// [`FormatError`]: this server does not read it.
pub fn version(bytes: &[u8]) -> Result<u8, FormatError> {
    match bytes.first() {
        Some(version) if (MIN_FORMAT..=MAX_FORMAT).contains(version) => Ok(*version),
        Some(version) => Err(FormatError::Version(*version)),
        None => Err(FormatError::Malformed("no bytes".into())),
    }
}

fn options() -> impl Options {
    bincode::DefaultOptions::new().with_limit(MAX_BYTES as u64)
}

/// Adds a value to what is to be [compressed](compress).
///
/// # Errors
/// It is too large.
pub fn write(to: &mut Vec<u8>, value: &impl Serialize) -> Result<(), FormatError> {
    options().serialize_into(to, value).map_err(malformed)
}

/// Returns the bytes that are stored for a value.
pub fn compress(version: u8, plain: &[u8]) -> Vec<u8> {
    let compressed = lz4_flex::compress_prepend_size(plain);
    let mut bytes = Vec::with_capacity(1 + compressed.len());
    bytes.push(version);
    bytes.extend_from_slice(&compressed);
    bytes
}

/// Returns what [`compress`] was given, and its version.
///
/// # Errors
/// [`FormatError`].
pub fn decompress(bytes: &[u8]) -> Result<(u8, Vec<u8>), FormatError> {
    let version = version(bytes)?;
    let (_, compressed) = bytes.split_at(1);
    let (size, _) = lz4_flex::block::uncompressed_size(compressed).map_err(malformed)?;
    // LZ4 makes no more than 255 bytes of one.
    if size > MAX_BYTES || size / 255 > compressed.len() {
        return Err(FormatError::Malformed(format!("{size} bytes are announced in {}", bytes.len())));
    }
    let plain = lz4_flex::decompress_size_prepended(compressed).map_err(malformed)?;
    if plain.len() != size {
        return Err(FormatError::Malformed(format!("{} bytes; expected {size}", plain.len())));
    }
    Ok((version, plain))
}

/// Reads one value, which must be all there is.
///
/// # Errors
/// [`FormatError::Malformed`].
pub fn read<T: DeserializeOwned>(plain: &[u8]) -> Result<T, FormatError> {
    options().deserialize(plain).map_err(malformed)
}

/// Reads the first of several values.
///
/// # Errors
/// [`FormatError::Malformed`].
pub fn read_next<T: DeserializeOwned>(plain: &mut &[u8]) -> Result<T, FormatError> {
    options().allow_trailing_bytes().deserialize_from(plain).map_err(malformed)
}

fn malformed(error: impl fmt::Display) -> FormatError {
    FormatError::Malformed(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_server_wrote_is_refused() {
        assert!(matches!(decompress(&[]), Err(FormatError::Malformed(_))));
        assert_eq!(decompress(&[0, 1, 2]), Err(FormatError::Version(0)));
        assert_eq!(decompress(&[99, 1, 2]), Err(FormatError::Version(99)));
        // A gigabyte in a few bytes.
        assert!(matches!(decompress(&[1, 255, 255, 255, 63, 0, 0]), Err(FormatError::Malformed(_))));
        let whole = compress(1, &[7; 1000]);
        assert_eq!(decompress(&whole), Ok((1, vec![7; 1000])));
        for end in 1..whole.len() {
            assert!(decompress(&whole[..end]).is_err(), "{end}");
        }
        assert!(read::<(u64, String)>(&[1, 250, 1]).is_err());
        assert!(read::<u64>(&[1, 2]).is_err(), "trailing bytes");
    }
}
