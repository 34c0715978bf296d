//! The leader: one member, by a lease, sums the pod's figure at each boundary.

use crate::counting::grid::Grid;
use crate::counting::snapshot::Snapshot;
use crate::counting::time::PodNs;
use crate::pod::member::Member;
use crate::pod::pod_state::{Lease, PodState, Slot};
use crate::pod::store::{ATTEMPTS, Attempt, Store, StoreError, update};

/// A worker that closed no boundary for five half periods is declared dead: early enough for
/// another to report within three periods of the death.
pub const SILENT_PERIODS_X2: u64 = 5;
/// The lease runs out a little before the second boundary without a sign of the leader.
const LEASE_PERIODS_X10: u64 = 19;

/// What a worker found when it tried to lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaderStep {
    /// Another worker leads.
    Follow,
    /// This worker leads, and a live worker is still to close the newest boundary.
    Wait,
    /// This worker leads, and the newest boundary is published already.
    UpToDate,
    /// This worker leads and has published a new figure.
    Published {
        /// The figure before.
        previous: Snapshot,
        /// The new one.
        latest: Snapshot,
        /// What a report begins with ([`PodState::reported_since`]).
        since: Snapshot,
        /// The incarnation of the counters.
        incarnation: u64,
    },
}

impl Member {
    /// Leads if no other worker does and this one has posted: sums the pod at the newest boundary
    /// that every live worker has closed, folds sealed slots, and publishes. `clock_offset_ns` is
    /// this worker's ([`crate::counting::clock::Clock::offset_ns`]); while it leads, its time is
    /// the pod's. A leader that serves requests hands over to a worker that does not.
    ///
    /// # Errors
    /// [`StoreError`]; nothing was changed.
    pub fn lead(
        &self,
        store: &impl Store,
        now: PodNs,
        clock_offset_ns: u64,
    ) -> Result<LeaderStep, StoreError> {
        let mut attempt = 0;
        update(store, self.pod.state_key(), ATTEMPTS, |found: Option<PodState>| {
            attempt += 1;
            let Some(mut state) = found else { return Attempt::Keep(Err(StoreError::NoState)) };
            if !self.may_lead(&state, now) {
                return Attempt::Keep(Ok(LeaderStep::Follow));
            }
            let (live, missing_slot) = self.remove_dead_members(store, &mut state, now);
            // A member without its slot: this state is out of date. If it stays so, the slot is
            // corrupt.
            if missing_slot && attempt <= ATTEMPTS / 2 {
                return Attempt::Retry;
            }
            if live.is_empty() {
                return Attempt::Keep(Ok(LeaderStep::Wait));
            }
            let step = publish(&mut state, &live, now);
            let holder = self.next_leader(&live, state.grid.at_or_before(now.0));
            state.lease = Lease { holder, renewed_ns: now.0 };
            state.clock_offset_ns = clock_offset_ns;
            agree_on_a_period(&mut state, &live, now);
            Attempt::Write(state, Ok(step))
        })?
    }

    /// Whether this worker holds the lease, or nobody does.
    fn may_lead(&self, state: &PodState, now: PodNs) -> bool {
        let lease_ns = state.grid.period_ns.max(1).saturating_mul(LEASE_PERIODS_X10) / 10;
        let expired = now.0 >= state.lease.renewed_ns.saturating_add(lease_ns);
        let worker = self.membership.worker;
        worker != 0 && (state.lease.holder == worker || expired)
    }

    /// Moves every sealed slot into the ledger of `state`, sealing those of silent workers first.
    /// Returns the others, and whether a member had no slot. Takes effect only when the caller's
    /// write of `state` succeeds; until then a sealed slot is just found sealed again.
    fn remove_dead_members(&self, store: &impl Store, state: &mut PodState, now: PodNs) -> (Vec<Slot>, bool) {
        let patience_ns = state.grid.period_ns.max(1).saturating_mul(SILENT_PERIODS_X2) / 2;
        let mut live = Vec::with_capacity(state.members.len());
        let mut missing_slot = false;
        let mut gone = Vec::new();
        let ledger = &mut state.ledger;
        state.members.retain(|member| {
            let (found, expect) = self.pod.read_slot(store, member.worker);
            let Some(mut slot) = found.filter(|slot| slot.member == *member) else {
                missing_slot = true;
                return false;
            };
            if !slot.sealed && slot.latest().as_of_ns.saturating_add(patience_ns) <= now.0 {
                let sealed = Slot { sealed: true, closed: vec![slot.latest()], ..slot.clone() };
                // If the write fails, it wrote just now: it lives, and what it wrote is read the
                // next time.
                if self.pod.write_slot(store, &sealed, expect) {
                    slot = sealed;
                }
            }
            if slot.sealed {
                *ledger = ledger.plus(&slot.latest().finished());
                gone.push(member.worker);
                return false;
            }
            live.push(slot);
            true
        });
        gone.into_iter().for_each(|worker| state.depart(worker));
        (live, missing_slot)
    }

    /// Returns who leads from now on: this worker, or rather one without requests of its own. That
    /// is Envoy's main thread, which is the last to end and so can report what all others left.
    fn next_leader(&self, live: &[Slot], newest_ns: u64) -> u64 {
        let worker = self.membership.worker;
        let serves = live.iter().any(|slot| slot.member == self.membership && slot.serves);
        let idle = |slot: &&Slot| !slot.serves && slot.latest().as_of_ns >= newest_ns;
        match live.iter().find(idle) {
            Some(slot) if serves => slot.member.worker,
            _ => worker,
        }
    }
}

/// Publishes the figure at the newest boundary that all of `live` have closed, if it is new.
fn publish(state: &mut PodState, live: &[Slot], now: PodNs) -> LeaderStep {
    let newest_ns = live.iter().map(|slot| slot.latest().as_of_ns).min().unwrap_or(0);
    let step =
        if newest_ns < state.grid.at_or_before(now.0) { LeaderStep::Wait } else { LeaderStep::UpToDate };
    // A worker that has just come has closed no boundary yet; its beginning is none.
    // Nor has what a worker took at its end a later instant and less than this.
    let last_ns = state.published[1].as_of_ns.max(state.last_figure_ns);
    if newest_ns <= last_ns || newest_ns != state.grid.at_or_before(newest_ns) {
        return step;
    }
    let sum = live.iter().try_fold(state.ledger, |sum, slot| Some(sum.plus(&slot.at(newest_ns)?)));
    let Some(sum) = sum else { return step };
    // The ledger may hold counts from after the boundary; the figure is still as of it.
    let latest = Snapshot { as_of_ns: newest_ns, ..sum };
    LeaderStep::Published {
        previous: state.publish(latest, live),
        latest,
        since: state.reported_since(),
        incarnation: state.incarnation,
    }
}

/// Takes over the shortest period that a live worker asks for. A worker that has just shortened it
/// has not said so in its slot yet: a new grid stays for as long as that may take.
fn agree_on_a_period(state: &mut PodState, live: &[Slot], now: PodNs) {
    let Grid { anchor_ns, period_ns } = state.grid;
    let settled_ns = anchor_ns.saturating_add(period_ns.saturating_mul(SILENT_PERIODS_X2) / 2);
    if let Some(asked_ns) = live.iter().map(|slot| slot.period_ns).min()
        && asked_ns != period_ns
        && now.0 >= settled_ns
    {
        state.grid = Grid { anchor_ns: now.0, period_ns: asked_ns };
    }
}
