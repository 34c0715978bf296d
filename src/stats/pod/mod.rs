//! Many workers, one pod figure.
//!
//! Envoy's workers share nothing but a key-value store with conditional writes ([`store`]). This
//! protocol on top of it stays correct whichever worker crashes, and when:
//!
//! * Each worker owns a *slot*: its snapshots at the last boundaries. Only the owner writes it,
//!   apart from the leader's seal. Its key is the worker's alone, so that nobody ever finds
//!   another's there.
//! * One value, [`pod_state::PodState`], holds whose slots count (the *members*), the *ledger* (the
//!   sum over workers that are gone), the leader's lease, the last published figure and the last
//!   acknowledged one.
//! * The *leader* sums ledger and slots at the newest boundary that every live member has closed.
//! * A slot is *sealed* before it is folded into the ledger: by its owner at the end (also from a
//!   panic), or by the leader with a CAS when it is silent for [`leader::SILENT_PERIODS_X2`] half
//!   periods. What is sealed no longer changes, and one write of the state both adds it to the
//!   ledger and ends the membership. An owner that was only slow sees the seal, and joins again
//!   with what it did not cover.
//!
//! So every request is in exactly one place at any time: in one member's slot or in the ledger.

pub mod leader;
pub mod member;
pub mod pod_state;
pub mod store;

#[cfg(test)]
pub(crate) mod tests;
