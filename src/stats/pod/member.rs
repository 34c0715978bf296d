//! One worker as a member of its pod: it writes its slot, and leaves it sealed when it ends.

use crate::counting::recorder::Recorder;
use crate::counting::snapshot::Snapshot;
use crate::counting::time::PodNs;
use crate::pod::pod_state::{Lease, Membership, PodState, PodStore, Slot};
use crate::pod::store::{ATTEMPTS, Attempt, Store, StoreError, update};

/// One worker's part in the pod's figure. How it leads is in [`crate::pod::leader`].
#[derive(Debug)]
pub struct Member {
    pub(super) pod: PodStore,
    pub(super) membership: Membership,
    period_ns: u64,
    born: PodNs,
    /// What of the recorder's totals was sealed under earlier memberships.
    base: Snapshot,
    /// The newest boundary written during this membership.
    posted_ns: Option<u64>,
}

impl Member {
    /// A worker of `pod` whose recorder starts at `born`, and that is to report every `period_ns`.
    pub fn new(pod: PodStore, born: PodNs, period_ns: u64) -> Self {
        let (membership, base) = (Membership::default(), Snapshot::default());
        Self { pod, membership, period_ns, born, base, posted_ns: None }
    }

    /// Returns the pod that this worker is of.
    pub fn pod(&self) -> &PodStore {
        &self.pod
    }

    /// This worker is to report every `period_ns` from now on. The pod does so as often as any of
    /// its live workers is to.
    pub fn set_period_ns(&mut self, period_ns: u64) {
        self.period_ns = period_ns;
    }

    /// Returns this worker's id, drawn the first time.
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

    /// Writes the closed boundaries to this worker's slot, and joins the pod if it is no member.
    /// Returns `true` if it had been sealed as silent meanwhile: then its clock may be behind
    /// ([`crate::counting::clock::Clock::follow`]).
    ///
    /// # Errors
    /// [`StoreError`]; the next post brings everything.
    pub fn post(&mut self, store: &impl Store, recorder: &Recorder) -> Result<bool, StoreError> {
        let newest = recorder.closed().next_back().map(|s| s.as_of_ns);
        if self.posted_ns.is_some() && newest <= self.posted_ns {
            return Ok(false);
        }
        self.write_slot(store, recorder, false)
    }

    /// The end of this worker: everything it counted up to now goes into its slot, sealed, with
    /// nothing in flight. Also called from a panic. Should it count on, that goes into a new slot.
    ///
    /// # Errors
    /// [`StoreError`]; what was not posted before is then lost with the worker.
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

    /// Returns the figure as of right now, from what every worker posted last, and the state: for
    /// the report that leaves when this worker ends. Workers end together, by clocks that do not
    /// quite agree, and a receiver goes by the instant: one write of the state after the other
    /// makes a figure that holds more the later one.
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
                // Only what is in the ledger may be overwritten.
                if let Err(error) = self.pod.fold(store, &found) {
                    return Attempt::Keep(Err(error));
                }
                if found.member == self.membership {
                    self.end_membership(&found.latest());
                    rejoined = true;
                }
            }
            Attempt::Write(self.slot(recorder, sealed), Ok(()))
        })??;
        // The slot is there before the membership, so a member always has a slot.
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

    /// Returns what of the recorder's totals is not sealed under an earlier membership.
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
