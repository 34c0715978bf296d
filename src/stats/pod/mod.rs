//! The pod: many workers, one figure.
//!
//! Envoy's workers share nothing but a key-value store with conditional writes ([`store`]). The
//! protocol on top of it stays correct whichever worker crashes, and whenever it does:
//!
//! * Each worker owns a *slot*: its snapshots at the last boundaries. Only the owner writes it,
//!   except that the leader may seal it. The slot's key belongs to that worker alone, so no worker
//!   ever finds another's slot there.
//! * One value, [`pod_state::PodState`], holds the list of workers whose slots count (the
//!   *members*), the *ledger* (the sum over the workers that are gone), the leader's lease, the
//!   last published figure and the last acknowledged one.
//! * The *leader* sums the ledger and the slots at the newest boundary that every live member has
//!   closed.
//! * A slot is *sealed* before it is added to the ledger: by its owner at its end (a panic
//!   included), or by the leader with a compare-and-swap when the slot has been silent for
//!   [`leader::SILENT_PERIODS_X2`] half periods. A sealed slot no longer changes. One write of the
//!   state both adds it to the ledger and ends the membership. An owner that was only slow finds
//!   the seal, and joins again with the counts that the sealed slot does not cover.
//!
//! So at any time every request is in exactly one member's slot or in the ledger.

pub mod leader;
pub mod member;
pub mod pod_state;
pub mod store;

#[cfg(test)]
pub(crate) mod tests;
