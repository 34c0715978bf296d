//! The filter's module, which the server hands out to Envoys.

use std::fmt::Write;
use std::path::Path;

use bytes::Bytes;
use ring::digest::{SHA256, digest};

use crate::os::files;

/// The largest module that is read. It stays in memory.
const MAX_BYTES: u64 = 16 << 20;
/// What every WebAssembly module begins with.
const MAGIC: &[u8] = b"\0asm";

/// A module, as it was when the server started.
#[derive(Clone, Debug)]
pub struct FilterModule {
    /// Its bytes, of which all answers share one copy.
    pub bytes: Bytes,
    /// Its SHA-256, in lower-case hexadecimal digits.
    pub sha256: String,
}

impl FilterModule {
    /// Reads a file.
    ///
    /// # Errors
    /// In one line: it cannot be read, is too large, or is no module.
    pub fn load(path: &Path) -> Result<Self, String> {
        let invalid = |reason: String| format!("--module {}: {reason}", path.display());
        let bytes = files::read(path, MAX_BYTES).map_err(|error| invalid(error.to_string()))?;
        if !bytes.starts_with(MAGIC) {
            let given = match bytes.get(..MAGIC.len()) {
                None => format!("the file has {} bytes", bytes.len()),
                Some(start) => format!("the file begins with \"{}\"", start.escape_ascii()),
            };
            let expected = "expected a WebAssembly module, which begins with \"\\x00asm\"";
            return Err(invalid(format!("{given}; {expected}")));
        }
        let sha256 = digest(&SHA256, &bytes).as_ref().iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        });
        // Without what reading has allocated beyond the end.
        Ok(Self { bytes: bytes.into_boxed_slice().into(), sha256 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_webassembly_module_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("module.wasm");
        let load = || FilterModule::load(&path);
        let error = load().unwrap_err();
        assert!(error.starts_with(&format!("--module {}: No such file", path.display())), "{error}");
        for (bytes, reason) in [
            (&b""[..], "the file has 0 bytes; expected a WebAssembly module, which begins with \"\\x00asm\""),
            (b"\0as", "the file has 3 bytes; expected a WebAssembly module"),
            (b"\x7fELF\x02", "the file begins with \"\\x7fELF\"; expected a WebAssembly module"),
        ] {
            std::fs::write(&path, bytes).unwrap();
            let error = load().unwrap_err();
            assert!(
                error.contains(reason) && error.contains("module.wasm") && !error.contains('\n'),
                "{error}"
            );
        }
        let mut large = MAGIC.to_vec();
        large.resize(MAX_BYTES as usize + 1, 0);
        std::fs::write(&path, &large).unwrap();
        assert!(load().unwrap_err().ends_with("the file is too large; expected at most 16777216 bytes"));
        large.pop();
        std::fs::write(&path, &large).unwrap();
        assert_eq!(load().unwrap().bytes, large);
    }

    #[test]
    fn the_digest_is_that_of_sha256sum() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("module.wasm");
        // The empty module.
        std::fs::write(&path, b"\0asm\x01\0\0\0").unwrap();
        let expected = "93a44bbb96c751218e4c00d479e4c14358122a389acca16205b1e4d0dc5f9476";
        assert_eq!(FilterModule::load(&path).unwrap().sha256, expected);
    }
}
