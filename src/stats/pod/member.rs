//! A worker as a member of its pod: it writes its slot, and seals the slot when it ends.

use crate::counting::recorder::Recorder;
use crate::counting::snapshot::Snapshot;
use crate::counting::time::PodNs;
use crate::pod::pod_state::{Lease, Membership, PodState, PodStore, Slot};
use crate::pod::store::{ATTEMPTS, Attempt, Store, StoreError, update};

/// One worker's part in the pod's figure. How a member leads is in [`crate::pod::leader`].
#[derive(Debug)]
pub struct Member {
    pub(super) pod: PodStore,
    pub(super) membership: Membership,
    period_ns: u64,
    born: PodNs,
    /// The part of the recorder's totals that was sealed under earlier memberships.
    base: Snapshot,
    /// The newest boundary written during this membership.
    posted_ns: Option<u64>,
}

impl Member {
    /// Returns the member for a worker of `pod` whose recorder starts at `born` and that is to
    /// report every `period_ns`.
    pub fn new(pod: PodStore, born: PodNs, period_ns: u64) -> Self {
        let (membership, base) = (Membership::default(), Snapshot::default());
        Self { pod, membership, period_ns, born, base, posted_ns: None }
    }

    /// Returns the pod that this worker belongs to.
    pub fn pod(&self) -> &PodStore {
        &self.pod
    }

    /// Sets the period at which this worker is to report from now on. The pod reports at the
    /// shortest period of its live workers.
    pub fn set_period_ns(&mut self, period_ns: u64) {
        self.period_ns = period_ns;
    }

    /// Returns this worker's id, which the first call assigns.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn id(&mut self, store: &impl Store) -> Result<u64, StoreError> {
        if self.membership.worker == 0 {
            self.membership.worker = self.pod.update(store, |state| {
                state.last_worker += 1;
                state.last_worker
            })?;
        }
        Ok(self.membership.worker)
    }

    /// Writes the closed boundaries to this worker's slot, and joins the pod if this worker is not
    /// a member. Returns `true` if the slot had been sealed because the worker was silent. Then its
    /// clock may be behind ([`crate::counting::clock::Clock::advance_to`]).
    ///
    /// # Errors
    /// [`StoreError`]; the next post includes everything.
    pub fn post(&mut self, store: &impl Store, recorder: &Recorder) -> Result<bool, StoreError> {
        let newest = recorder.closed().next_back().map(|s| s.as_of_ns);
        if self.posted_ns.is_some() && newest <= self.posted_ns {
            return Ok(false);
        }
        self.write_slot(store, recorder, false)
    }

    /// Ends this worker: everything that it has counted goes into its slot, sealed, with nothing in
    /// flight. A panic calls this, too. If the worker goes on counting, the rest goes into its slot
    /// under a new membership.
    ///
    /// # Errors
    /// [`StoreError`]; whatever was not posted before is then lost with the worker.
    pub fn seal(&mut self, store: &impl Store, recorder: &Recorder) -> Result<(), StoreError> {
        self.write_slot(store, recorder, true)?;
        self.end_membership(&self.rest_of(recorder.current()));
        let worker = self.membership.worker;
        self.pod.update(store, |state| {
            if state.lease.holder == worker {
                state.lease = Lease::default();
            }
        })
    }

    /// Returns the figure as of now, summed over the last posts of all workers, and the state. The
    /// report that a worker sends at its end has this figure. Workers end together, their clocks
    /// differ slightly, and a receiver goes by the instant. Each figure is taken in one write of
    /// the state, so the figure that holds more also has the later instant.
    ///
    /// # Errors
    /// [`StoreError`]; nothing was changed.
    pub fn last_figure(&self, store: &impl Store, now: PodNs) -> Result<(Snapshot, PodState), StoreError> {
        self.pod.update(store, |state| {
            let mut sum = state.ledger;
            for member in &state.members {
                let (slot, _) = self.pod.read_slot(store, member.worker);
                if let Some(slot) = slot.filter(|slot| slot.member == *member) {
                    sum = sum.plus(&slot.latest());
                }
            }
            let taken_ns = state.published[1].as_of_ns.max(state.last_figure_ns).saturating_add(1);
            state.last_figure_ns = sum.as_of_ns.max(now.0).max(taken_ns);
            (Snapshot { as_of_ns: state.last_figure_ns, ..sum }, state.clone())
        })
    }

    fn write_slot(
        &mut self,
        store: &impl Store,
        recorder: &Recorder,
        sealed: bool,
    ) -> Result<bool, StoreError> {
        self.id(store)?;
        let mut rejoined = false;
        let key = self.pod.slot_key(self.membership.worker);
        update(store, &key, ATTEMPTS, |found: Option<Slot>| {
            if let Some(found) = found.filter(|slot| slot.sealed) {
                // Only a slot that is in the ledger may be overwritten.
                if let Err(error) = self.pod.add_to_ledger(store, &found) {
                    return Attempt::Keep(Err(error));
                }
                if found.member == self.membership {
                    self.end_membership(&found.latest());
                    rejoined = true;
                }
            }
            Attempt::Write(self.slot(recorder, sealed), Ok(()))
        })??;
        // The slot is written before the membership, so a member always has a slot.
        if self.posted_ns.is_none() {
            let member = self.membership;
            self.pod.update(store, |state| {
                if !state.members.contains(&member) {
                    state.members.push(member);
                }
                state.departed.retain(|worker| *worker != member.worker);
            })?;
        }
        self.posted_ns = Some(recorder.closed().next_back().map_or(0, |s| s.as_of_ns));
        Ok(rejoined)
    }

    fn end_membership(&mut self, sealed: &Snapshot) {
        self.base = self.base.plus(sealed);
        self.born = PodNs(sealed.as_of_ns);
        self.membership.epoch = self.membership.epoch.wrapping_add(1);
        self.posted_ns = None;
    }

    /// Returns the part of the recorder's totals that is not sealed under an earlier membership.
    fn rest_of(&self, snapshot: &Snapshot) -> Snapshot {
        snapshot.less_totals_of(&self.base)
    }

    fn slot(&self, recorder: &Recorder, sealed: bool) -> Slot {
        let closed = if sealed {
            vec![self.rest_of(recorder.current()).finished()]
        } else {
            recorder.closed().filter(|s| s.as_of_ns > self.born.0).map(|s| self.rest_of(s)).collect()
        };
        Slot {
            member: self.membership,
            sealed,
            serves: recorder.current().requests > 0,
            period_ns: self.period_ns,
            born_ns: self.born.0,
            closed,
        }
    }
}
