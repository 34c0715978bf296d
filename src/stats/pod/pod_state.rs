//! What all workers of a pod agree on, as one value in the store.

use serde::{Deserialize, Serialize};

use crate::counting::grid::Grid;
use crate::counting::snapshot::Snapshot;
use crate::counting::time::{MonotonicNs, PodNs};
use crate::pod::store::{ATTEMPTS, Attempt, Expect, Store, StoreError, encode, read, update};

/// What all workers of a pod agree on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodState {
    /// Changes whenever the counters restart at zero.
    pub incarnation: u64,
    /// The pod's time minus the monotonic clock, wrapping.
    pub clock_offset_ns: u64,
    /// The boundaries that all workers close at.
    pub grid: Grid,
    /// The last published figure, and the one before it (`PodState::publish`): the gauges are their
    /// difference.
    pub published: [Snapshot; 2],
    /// The last figure that the stats server acknowledged.
    pub acknowledged: Snapshot,
    /// When the counters began.
    pub started_ns: u64,
    /// Workers that are no longer members, and whose other values are still to be cleared up by the
    /// leader ([`PodStore::forget_departed`]).
    pub departed: Vec<u64>,
    /// The instant of the newest figure that a worker took at its end.
    pub(super) last_figure_ns: u64,
    /// The sum over the workers that are gone.
    pub(super) ledger: Snapshot,
    pub(super) lease: Lease,
    /// Whose slots count.
    pub(super) members: Vec<Membership>,
    /// Whose slots are in the last published figure.
    pub(super) summed: Vec<Membership>,
    late: Option<Late>,
    pub(super) last_worker: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Lease {
    pub holder: u64,
    pub renewed_ns: u64,
}

/// What a figure has of a worker that was not in the one before, although it had counted already:
/// one that had been declared dead, or has just come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Late {
    from_ns: u64,
    published_ns: u64,
}

/// A worker during one membership: after a seal the same worker joins again under the next epoch.
/// Worker 0 is nobody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Membership {
    pub worker: u64,
    pub epoch: u32,
}

/// A worker's snapshots, written by itself and sealed by itself or by the leader.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Slot {
    pub member: Membership,
    pub sealed: bool,
    /// Whether requests have come to this worker: not so on Envoy's main thread.
    pub serves: bool,
    /// How often this worker is to report, by its configurations.
    pub period_ns: u64,
    pub born_ns: u64,
    /// Oldest first.
    pub closed: Vec<Snapshot>,
}

impl Slot {
    pub fn latest(&self) -> Snapshot {
        self.closed.last().copied().unwrap_or(Snapshot::starting_at(self.born_ns))
    }

    /// Returns the slot at a boundary; `None` if its worker has not come so far, or is much
    /// further.
    pub fn at(&self, boundary_ns: u64) -> Option<Snapshot> {
        if boundary_ns <= self.born_ns {
            return Some(Snapshot::starting_at(boundary_ns));
        }
        self.closed.iter().find(|s| s.as_of_ns == boundary_ns).copied()
    }
}

impl PodState {
    fn starting_at(start: PodNs, clock_offset_ns: u64, period_ns: u64, incarnation: u64) -> Self {
        let zero = Snapshot::starting_at(start.0);
        Self {
            incarnation,
            clock_offset_ns,
            grid: Grid { anchor_ns: start.0, period_ns },
            published: [zero; 2],
            acknowledged: zero,
            started_ns: start.0,
            departed: Vec::new(),
            last_figure_ns: start.0,
            ledger: zero,
            lease: Lease::default(),
            members: Vec::new(),
            summed: Vec::new(),
            late: None,
            last_worker: 0,
        }
    }

    /// Returns the members' ids.
    pub fn workers(&self) -> impl Iterator<Item = u64> {
        self.members.iter().map(|member| member.worker)
    }

    /// Returns the instant up to which a leader has lived, by its clock.
    pub fn led_until(&self) -> PodNs {
        PodNs(self.lease.renewed_ns)
    }

    /// Returns what a report begins with: what is acknowledged, as of the instant at which began
    /// what is new. That lies before the last report where a worker was late.
    pub fn reported_since(&self) -> Snapshot {
        let late_ns = self.late.map_or(u64::MAX, |late| late.from_ns);
        Snapshot { as_of_ns: self.acknowledged.as_of_ns.min(late_ns), ..self.acknowledged }
    }

    /// Takes over a new figure. Returns the one before, with the time that requests took until then
    /// in workers that were not in it: so the difference is the average between both. Their counts
    /// stay out of it: each is in one difference.
    pub(super) fn publish(&mut self, latest: Snapshot, live: &[Slot]) -> Snapshot {
        let [_, mut previous] = self.published;
        for slot in live.iter().filter(|slot| !self.summed.contains(&slot.member)) {
            if slot.born_ns < previous.as_of_ns {
                let from_ns = self.late.map_or(u64::MAX, |late| late.from_ns).min(slot.born_ns);
                self.late = Some(Late { from_ns, published_ns: latest.as_of_ns });
                let Some(before) = slot.at(previous.as_of_ns) else { continue };
                previous = previous.plus(&Snapshot { requests: 0, proxied_requests: 0, ..before.finished() });
            }
        }
        self.summed = live.iter().map(|slot| slot.member).collect();
        self.published = [previous, latest];
        previous
    }

    pub(super) fn depart(&mut self, worker: u64) {
        if !self.departed.contains(&worker) {
            self.departed.push(worker);
        }
    }
}

/// One pod's values in the store, under a prefix of its own.
#[derive(Clone, Debug)]
pub struct PodStore {
    prefix: String,
    state_key: String,
}

impl PodStore {
    /// The pod that `domain` names; equal names share their figures. The prefix holds the version
    /// of the stored format, so that an old and a new module in one Envoy do not misread each
    /// other.
    pub fn new(domain: &str) -> Self {
        let prefix = format!("inflight/3/{domain}");
        Self { state_key: format!("{prefix}/state"), prefix }
    }

    /// Reads the state, or creates it as of `wall_ns` by the wall clock and `now` by the monotonic
    /// one. An existing state with a longer period gets a new grid, which every worker takes over
    /// at its next tick. One with a shorter period keeps it: that is the leader's to change, when
    /// no worker asks for it any more.
    ///
    /// # Errors
    /// [`StoreError::Contended`].
    pub fn open(
        &self,
        store: &impl Store,
        now: MonotonicNs,
        wall_ns: u64,
        period_ns: u64,
        incarnation: u64,
    ) -> Result<PodState, StoreError> {
        update(store, &self.state_key, ATTEMPTS, |found: Option<PodState>| match found {
            Some(state) if state.grid.period_ns <= period_ns => Attempt::Keep(state),
            Some(mut state) => {
                let anchor_ns = now.0.wrapping_add(state.clock_offset_ns);
                state.grid = Grid { anchor_ns, period_ns };
                Attempt::Write(state.clone(), state)
            }
            // An unreadable value under our own key cannot be waited for; it is replaced.
            None => {
                let offset_ns = wall_ns.wrapping_sub(now.0);
                let state = PodState::starting_at(PodNs(wall_ns), offset_ns, period_ns, incarnation);
                Attempt::Write(state.clone(), state)
            }
        })
    }

    /// Returns the state as it is now.
    ///
    /// # Errors
    /// [`StoreError::NoState`].
    pub fn state(&self, store: &impl Store) -> Result<PodState, StoreError> {
        read(store, &self.state_key).ok_or(StoreError::NoState)
    }

    /// Notes that the stats server acknowledged everything up to `until`. Whoever sent the report:
    /// an acknowledgement never goes back.
    ///
    /// # Errors
    /// [`StoreError`], after which the same figures are reported again; the receiver knows them.
    pub fn acknowledge(
        &self,
        store: &impl Store,
        incarnation: u64,
        until: &Snapshot,
    ) -> Result<(), StoreError> {
        self.update(store, |state| {
            if state.incarnation == incarnation && until.as_of_ns > state.acknowledged.as_of_ns {
                state.acknowledged = *until;
                state.late = state.late.filter(|late| late.published_ns > until.as_of_ns);
            }
        })
    }

    /// Takes workers off the list of the departed, when everything of theirs is cleared up.
    ///
    /// # Errors
    /// [`StoreError`]; they are then cleared up again, which changes nothing.
    pub fn forget_departed(&self, store: &impl Store, workers: &[u64]) -> Result<(), StoreError> {
        self.update(store, |state| state.departed.retain(|worker| !workers.contains(worker)))
    }

    /// Returns the key of another value of this pod.
    pub fn key(&self, name: &str) -> String {
        format!("{}/{name}", self.prefix)
    }

    /// Returns the key of the pod's breaker.
    pub fn breaker_key(&self) -> String {
        self.key("breaker")
    }

    pub(super) fn state_key(&self) -> &str {
        &self.state_key
    }

    pub(super) fn slot_key(&self, worker: u64) -> String {
        self.key(&format!("slot/{worker:016x}"))
    }

    /// Changes the state, if the change changes anything.
    pub(super) fn update<R>(
        &self,
        store: &impl Store,
        mut change: impl FnMut(&mut PodState) -> R,
    ) -> Result<R, StoreError> {
        update(store, &self.state_key, ATTEMPTS, |found: Option<PodState>| {
            let Some(before) = found else { return Attempt::Keep(Err(StoreError::NoState)) };
            let mut state = before.clone();
            let result = change(&mut state);
            if state == before { Attempt::Keep(Ok(result)) } else { Attempt::Write(state, Ok(result)) }
        })?
    }

    /// Returns a worker's slot, if it has written one, and what a write there must expect.
    pub(super) fn read_slot(&self, store: &impl Store, worker: u64) -> (Option<Slot>, Expect) {
        let Some((bytes, version)) = store.get(&self.slot_key(worker)) else {
            return (None, Expect::Absent);
        };
        (bincode::deserialize(&bytes).ok(), Expect::Version(version))
    }

    pub(super) fn write_slot(&self, store: &impl Store, slot: &Slot, expect: Expect) -> bool {
        encode(slot).is_some_and(|bytes| store.set(&self.slot_key(slot.member.worker), &bytes, expect))
    }

    /// Brings a sealed slot into the ledger, if that has not been done.
    pub(super) fn fold(&self, store: &impl Store, slot: &Slot) -> Result<(), StoreError> {
        self.update(store, |state| {
            let members = state.members.len();
            state.members.retain(|member| *member != slot.member);
            if state.members.len() < members {
                state.ledger = state.ledger.plus(&slot.latest().finished());
                state.depart(slot.member.worker);
            }
        })
    }
}
