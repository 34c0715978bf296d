//! What one worker counts: events in, cumulative snapshots out.

pub mod clock;
pub mod grid;
pub mod recorder;
pub mod request;
pub mod snapshot;
pub mod time;
