//! The gateway: many keys that come and go, their admission and their totals.

pub mod key_admission;
pub mod key_name;
pub mod key_totals;
pub mod keyed_member;
pub mod keyed_recorder;
