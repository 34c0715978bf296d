//! The pod's state: one value in the store that all workers of a pod agree on.

use serde::{Deserialize, Serialize};

use crate::counting::grid::Grid;
use crate::counting::snapshot::Snapshot;
use crate::counting::time::{MonotonicNs, PodNs};
use crate::pod::store::{ATTEMPTS, Attempt, Expect, Store, StoreError, encode, read, update};

/// The state that all workers of a pod agree on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodState {
    /// Changes whenever the counters restart at zero.
    pub incarnation: u64,
    /// The pod's time minus the monotonic time, wrapping.
    pub clock_offset_ns: u64,
    /// The boundaries at which all workers take snapshots.
    pub grid: Grid,
    /// The two last published figures, the newer one last (`PodState::publish`). The gauges show
    /// their difference.
    pub published: [Snapshot; 2],
    /// The last figure that the stats server acknowledged.
    pub acknowledged: Snapshot,
    /// When the counters began.
    pub started_ns: u64,
    /// Workers that are no longer members, and whose other values the leader still has to clean up
    /// ([`PodStore::forget_departed`]).
    pub departed: Vec<u64>,
    /// The instant of the newest figure that a worker has taken at its end.
    pub(super) last_figure_ns: u64,
    /// The sum over the workers that are gone.
    pub(super) ledger: Snapshot,
    pub(super) lease: Lease,
    /// The workers whose slots count.
    pub(super) members: Vec<Membership>,
    /// The workers whose slots are in the last published figure.
    pub(super) summed: Vec<Membership>,
    late: Option<Backdated>,
    pub(super) last_worker: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Lease {
    pub holder: u64,
    pub renewed_ns: u64,
}

/// Marks a figure that includes a worker that was not in the previous figure although it had
/// already counted: the worker had been declared dead, or has just joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Backdated {
    from_ns: u64,
    published_ns: u64,
}

/// A worker during one membership. After a seal, the same worker joins again under the next epoch.
/// No worker has the id 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Membership {
    pub worker: u64,
    pub epoch: u32,
}

/// A worker's snapshots: written by the worker, sealed by the worker or by the leader.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Slot {
    pub member: Membership,
    pub sealed: bool,
    /// Whether this worker has received requests. Envoy's main thread receives none.
    pub serves: bool,
    /// The period at which this worker is to report, by its configurations.
    pub period_ns: u64,
    pub born_ns: u64,
    /// Oldest first.
    pub closed: Vec<Snapshot>,
}

impl Slot {
    pub fn latest(&self) -> Snapshot {
        self.closed.last().copied().unwrap_or(Snapshot::starting_at(self.born_ns))
    }

    /// Returns the snapshot at a boundary. Returns `None` if the worker has not closed it yet, or
    /// no longer keeps it.
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

    /// Returns the last instant at which a leader renewed its lease, by the leader's clock.
    pub fn led_until(&self) -> PodNs {
        PodNs(self.lease.renewed_ns)
    }

    /// Returns the snapshot that a report begins with: the acknowledged totals, as of the instant
    /// at which the new counts began. If a worker was late, that instant is before the last report.
    pub fn reported_since(&self) -> Snapshot {
        let late_ns = self.late.map_or(u64::MAX, |late| late.from_ns);
        Snapshot { as_of_ns: self.acknowledged.as_of_ns.min(late_ns), ..self.acknowledged }
    }

    /// Publishes a new figure and returns the previous one. The previous figure gets, in addition,
    /// the request time until then of workers that were not in it; so the difference of the two
    /// figures is the average between them. The counts of these workers are not added to it, so
    /// that each count is in one difference.
    pub(super) fn publish(&mut self, latest: Snapshot, live: &[Slot]) -> Snapshot {
        let [_, mut previous] = self.published;
        for slot in live.iter().filter(|slot| !self.summed.contains(&slot.member)) {
            if slot.born_ns < previous.as_of_ns {
                let from_ns = self.late.map_or(u64::MAX, |late| late.from_ns).min(slot.born_ns);
                self.late = Some(Backdated { from_ns, published_ns: latest.as_of_ns });
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

/// The values of one pod in the store, under the pod's own prefix.
#[derive(Clone, Debug)]
pub struct PodStore {
    prefix: String,
    state_key: String,
}

impl PodStore {
    /// Returns the store of the pod that `domain` names; equal names share their figures. The
    /// prefix includes the version of the stored format, so that an old and a new module in one
    /// Envoy do not misread each other's values.
    pub fn new(domain: &str) -> Self {
        let prefix = format!("inflight/3/{domain}");
        Self { state_key: format!("{prefix}/state"), prefix }
    }

    /// Reads the state, or creates it as of `wall_ns` on the wall clock and `now` on the monotonic
    /// clock. An existing state with a longer period gets a new grid, which every worker adopts at
    /// its next tick. An existing state with a shorter period keeps its grid: the leader changes it
    /// when no worker asks for that period any more.
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
            // An unreadable value under our own key will not become readable, so it is replaced.
            None => {
                let offset_ns = wall_ns.wrapping_sub(now.0);
                let state = PodState::starting_at(PodNs(wall_ns), offset_ns, period_ns, incarnation);
                Attempt::Write(state.clone(), state)
            }
        })
    }

    /// Returns the current state.
    ///
    /// # Errors
    /// [`StoreError::NoState`].
    pub fn state(&self, store: &impl Store) -> Result<PodState, StoreError> {
        read(store, &self.state_key).ok_or(StoreError::NoState)
    }

    /// Records that the stats server acknowledged everything up to `until`. It does not matter
    /// which worker sent the report: an acknowledgement never goes back.
    ///
    /// # Errors
    /// [`StoreError`]; then the same figures are reported again, which the receiver already knows.
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

    /// Removes workers from the list of the departed, once all their values are cleaned up.
    ///
    /// # Errors
    /// [`StoreError`]; then they are cleaned up again, which changes nothing.
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

    /// Changes the state. Nothing is written if the change leaves the state as it was.
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

    /// Returns a worker's slot, if it has written one, and what a write to it must expect.
    pub(super) fn read_slot(&self, store: &impl Store, worker: u64) -> (Option<Slot>, Expect) {
        let Some((bytes, version)) = store.get(&self.slot_key(worker)) else {
            return (None, Expect::Absent);
        };
        (bincode::deserialize(&bytes).ok(), Expect::Version(version))
    }

    pub(super) fn write_slot(&self, store: &impl Store, slot: &Slot, expect: Expect) -> bool {
        encode(slot).is_some_and(|bytes| store.set(&self.slot_key(slot.member.worker), &bytes, expect))
    }

    /// Adds a sealed slot to the ledger, unless that was already done.
    pub(super) fn add_to_ledger(&self, store: &impl Store, slot: &Slot) -> Result<(), StoreError> {
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
