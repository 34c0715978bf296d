//! A gateway: many keys come and go.

pub mod key_admission;
pub mod key_name;
pub mod key_totals;
pub mod keyed_member;
pub mod keyed_recorder;
