//! What the operating system gives: time, files, memory, locks, what the process uses.

pub mod clock;
pub mod files;
pub mod lock;
pub mod memory;
pub mod process;
