//! What the operating system gives: time, files, memory, locks.

pub mod clock;
pub mod files;
pub mod lock;
pub mod memory;
