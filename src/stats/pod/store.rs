//! The store that all workers of an Envoy share: a key-value map whose writes can be conditional on
//! a version (compare-and-swap, CAS). A read-modify-write goes through
//! [`update`] or [`update_bytes`], apart from those that need only one attempt.

use std::fmt;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Attempts at a change before it is put off to the next tick. Each failed attempt means that
/// another worker's change went through, and an Envoy seldom has more workers than this.
pub const ATTEMPTS: usize = 64;

/// Attempts at a change that a request depends on. To give up would turn it away, or keep it or a permit
/// until the next tick, so the number is high enough that this hardly ever happens.
pub const REQUEST_ATTEMPTS: usize = 4096;

/// The encoded size of a small value. A larger value grows the buffer.
const ENCODED_BYTES: usize = 256;

/// What a conditional write expects to find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// The key does not exist.
    Absent,
    /// The value is the one that was read with this version.
    Version(u32),
}

/// The store: Envoy's shared data in the filter, a map in tests.
pub trait Store {
    /// Returns the value and its version, if there is one and it can be read.
    fn get(&self, key: &str) -> Option<(Vec<u8>, u32)>;
    /// Writes the value if the expectation holds. Returns whether it did.
    fn set(&self, key: &str, value: &[u8], expect: Expect) -> bool;
}

/// Why a change of the shared state was not made. The state did not change; the next tick tries
/// again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreError {
    /// There is no state of this pod, or it cannot be decoded.
    NoState,
    /// At every attempt, another worker wrote between the read and the write.
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

/// The result of one attempt at a change.
pub enum Attempt<T, R> {
    /// Write the new value. If nobody else wrote in between, the change returns the result.
    Write(T, R),
    /// Leave the value as it is and return the result.
    Keep(R),
    /// Start again with a fresh read.
    Retry,
}

/// Changes a value by compare-and-swap. `change` gets the current value (`None` if there is none,
/// or none that decodes) and is called again whenever another worker wrote first.
///
/// # Errors
/// [`StoreError::Contended`] after `attempts` attempts.
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

/// Like [`update`], for values that borrow from their bytes or are encoded together with others.
///
/// # Errors
/// [`StoreError::Contended`] after `attempts` attempts.
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

/// Returns a value's bytes. The size is not measured first, because the breaker encodes twice per
/// request.
pub fn encode<T: Serialize + ?Sized>(value: &T) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(ENCODED_BYTES);
    bincode::serialize_into(&mut bytes, value).ok().map(|()| bytes)
}

/// Returns a value, if it exists and decodes.
pub fn read<T: DeserializeOwned>(store: &impl Store, key: &str) -> Option<T> {
    let (bytes, _) = store.get(key)?;
    bincode::deserialize(&bytes).ok()
}

/// Writes a value that only this worker writes. Returns whether the write succeeded.
pub fn write<T: Serialize + ?Sized>(store: &impl Store, key: &str, value: &T) -> bool {
    let expect = store.get(key).map_or(Expect::Absent, |(_, version)| Expect::Version(version));
    encode(value).is_some_and(|bytes| store.set(key, &bytes, expect))
}
