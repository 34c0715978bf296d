//! The store that all workers of an Envoy share: a key-value map whose writes can be conditional on
//! a version (compare-and-swap, CAS). Every read-modify-write of Inflight is [`update`].

use std::fmt;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Attempts at a change before giving up until the next tick. Each one that fails means that
/// another worker's change went through, and an Envoy seldom has more workers than this.
pub const ATTEMPTS: usize = 64;

/// What a small value takes encoded; a larger one grows the buffer.
const ENCODED_BYTES: usize = 256;

/// What a conditional write expects to find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// No such key.
    Absent,
    /// The value that was read with this version.
    Version(u32),
}

/// The store: Envoy's shared data in the filter, a map in tests.
pub trait Store {
    /// Returns the value and its version, if there is one and it can be read.
    fn get(&self, key: &str) -> Option<(Vec<u8>, u32)>;
    /// Writes if the expectation holds; returns whether it did.
    fn set(&self, key: &str, value: &[u8], expect: Expect) -> bool;
}

/// Why a change of the shared state was not made. Nothing was changed; the next tick tries again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreError {
    /// There is no state of this pod, or it cannot be decoded.
    NoState,
    /// Other workers wrote between each read and its write.
    Contended,
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoState => "the shared data has no readable state of this pod",
            Self::Contended => "other workers changed the shared data at every attempt",
        })
    }
}

impl std::error::Error for StoreError {}

/// What one attempt at a change comes to.
pub enum Attempt<T, R> {
    /// Write the new value; if nobody else wrote in between, the change returns the result.
    Write(T, R),
    /// Leave the value as it is and return the result.
    Keep(R),
    /// Begin again with a fresh read.
    Retry,
}

/// Changes a value by compare-and-swap. `change` gets what is there (`None` if nothing is, or
/// nothing that decodes) and is called again whenever another worker was faster.
///
/// # Errors
/// [`StoreError::Contended`] after so many attempts.
pub fn update<T: Serialize + DeserializeOwned, R>(
    store: &impl Store,
    key: &str,
    attempts: usize,
    mut change: impl FnMut(Option<T>) -> Attempt<T, R>,
) -> Result<R, StoreError> {
    update_bytes(store, key, attempts, |found| {
        match change(found.and_then(|bytes| bincode::deserialize(bytes).ok())) {
            Attempt::Write(value, result) => match encode(&value) {
                Some(bytes) => Attempt::Write(bytes, result),
                None => Attempt::Retry,
            },
            Attempt::Keep(result) => Attempt::Keep(result),
            Attempt::Retry => Attempt::Retry,
        }
    })
}

/// As [`update`], for values that borrow from their bytes or are encoded together with others.
///
/// # Errors
/// [`StoreError::Contended`] after so many attempts.
pub fn update_bytes<R>(
    store: &impl Store,
    key: &str,
    attempts: usize,
    mut change: impl FnMut(Option<&[u8]>) -> Attempt<Vec<u8>, R>,
) -> Result<R, StoreError> {
    for _ in 0..attempts {
        let found = store.get(key);
        let (bytes, expect) = match &found {
            Some((bytes, version)) => (Some(bytes.as_slice()), Expect::Version(*version)),
            None => (None, Expect::Absent),
        };
        match change(bytes) {
            Attempt::Write(bytes, result) if store.set(key, &bytes, expect) => return Ok(result),
            Attempt::Keep(result) => return Ok(result),
            Attempt::Write(..) | Attempt::Retry => {}
        }
    }
    Err(StoreError::Contended)
}

/// Returns a value's bytes. Not measured first: the breaker encodes twice a request.
pub fn encode<T: Serialize + ?Sized>(value: &T) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(ENCODED_BYTES);
    bincode::serialize_into(&mut bytes, value).ok().map(|()| bytes)
}

/// Returns a value, if it is there and decodes.
pub fn read<T: DeserializeOwned>(store: &impl Store, key: &str) -> Option<T> {
    let (bytes, _) = store.get(key)?;
    bincode::deserialize(&bytes).ok()
}

/// Writes a value that no other worker writes. Returns whether it was written.
pub fn write<T: Serialize + ?Sized>(store: &impl Store, key: &str, value: &T) -> bool {
    let expect = store.get(key).map_or(Expect::Absent, |(_, version)| Expect::Version(version));
    encode(value).is_some_and(|bytes| store.set(key, &bytes, expect))
}
