//! What the stats server makes of reports: windows, totals and decisions by key.

pub mod answer;
pub mod decider;
pub mod exact_sum;
pub mod key;
pub mod memory;
pub mod mismatch;
pub mod sender;
pub mod settings;
pub mod windows;
