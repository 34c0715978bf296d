//! The leader: the one member that holds the lease. It sums the pod's figure at each boundary.

use crate::counting::grid::Grid;
use crate::counting::snapshot::Snapshot;
use crate::counting::time::PodNs;
use crate::pod::member::Member;
use crate::pod::pod_state::{Lease, PodState, Slot};
use crate::pod::store::{ATTEMPTS, Attempt, Store, StoreError, update};

/// A worker that has closed no boundary for this many half periods is declared dead: early enough
/// for another worker to report within three periods of the death.
pub const SILENT_PERIODS_X2: u64 = 5;
/// The lease, in tenths of a period. It expires a little before the second boundary at which the
/// leader has not renewed it.
const LEASE_PERIODS_X10: u64 = 19;

/// The outcome of a worker's attempt to lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaderStep {
    /// Another worker leads.
    Follow,
    /// This worker leads, and a live worker has not closed the newest boundary yet.
    Wait,
    /// This worker leads, and the newest boundary is already published.
    UpToDate,
    /// This worker leads and has published a new figure.
    Published {
        /// The previous figure.
        previous: Snapshot,
        /// The new figure.
        latest: Snapshot,
        /// The snapshot that a report begins with ([`PodState::reported_since`]).
        since: Snapshot,
        /// The incarnation of the counters.
        incarnation: u64,
    },
}

impl Member {
    /// Leads the pod if no other worker does and this one has posted: sums the pod at the newest
    /// boundary that every live worker has closed, adds sealed slots to the ledger, and publishes
    /// the figure. `clock_offset_ns` is this worker's offset
    /// ([`crate::counting::clock::Clock::offset_ns`]); while this worker leads, its time is the
    /// pod's. A leader that serves requests passes the lease to a worker that does not.
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
            // A member has no slot, so this state is out of date. If that persists, the slot is
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

    /// Returns whether this worker holds the lease, or no worker does.
    fn may_lead(&self, state: &PodState, now: PodNs) -> bool {
        let lease_ns = state.grid.period_ns.max(1).saturating_mul(LEASE_PERIODS_X10) / 10;
        let expired = now.0 >= state.lease.renewed_ns.saturating_add(lease_ns);
        let worker = self.membership.worker;
        worker != 0 && (state.lease.holder == worker || expired)
    }

    /// Seals the slots of silent workers, then moves every sealed slot into the ledger of `state`.
    /// Returns the remaining slots, and whether a member had no slot. All of this takes effect only
    /// when the caller's write of `state` succeeds; until then, a sealed slot is merely found
    /// sealed again.
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
                // If this write fails, the worker has just written its slot: it is alive, and the
                // next round reads what it wrote.
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

    /// Returns the worker that leads from now on: preferably one without requests of its own,
    /// otherwise this worker. A worker without requests is Envoy's main thread. It is the last to
    /// end, and so can report what all the others left.
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
    // A worker that has just joined has closed no boundary yet, and its start is not a boundary.
    // And after a worker took a figure at its end, no figure of an earlier instant may follow.
    let last_ns = state.published[1].as_of_ns.max(state.last_figure_ns);
    if newest_ns <= last_ns || newest_ns != state.grid.at_or_before(newest_ns) {
        return step;
    }
    let sum = live.iter().try_fold(state.ledger, |sum, slot| Some(sum.plus(&slot.at(newest_ns)?)));
    let Some(sum) = sum else { return step };
    // The ledger may hold counts from after the boundary. The figure is still as of the boundary.
    let latest = Snapshot { as_of_ns: newest_ns, ..sum };
    LeaderStep::Published {
        previous: state.publish(latest, live),
        latest,
        since: state.reported_since(),
        incarnation: state.incarnation,
    }
}

/// Adopts the shortest period that a live worker asks for. A worker that has just shortened its
/// period has not written that into its slot yet, so a new grid stays for as long as that may take.
fn agree_on_a_period(state: &mut PodState, live: &[Slot], now: PodNs) {
    let Grid { anchor_ns, period_ns } = state.grid;
    let old_enough_ns = anchor_ns.saturating_add(period_ns.saturating_mul(SILENT_PERIODS_X2) / 2);
    if let Some(asked_ns) = live.iter().map(|slot| slot.period_ns).min()
        && asked_ns != period_ns
        && now.0 >= old_enough_ns
    {
        state.grid = Grid { anchor_ns: now.0, period_ns: asked_ns };
    }
}
