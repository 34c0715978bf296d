//! Many workers, one pod figure.
//!
//! Envoy's workers share nothing but a key-value store whose writes can be conditional on a version
//! (compare-and-swap, CAS). Over it lies this protocol, which owes nothing to who lives or dies:
//!
//! * Each worker owns a *slot*: its snapshots at the last boundaries. Only the owner writes it, apart
//!   from the leader's seal. Its key is the worker's alone, so that nobody ever finds a stranger there.
//! * One value, [`State`], holds whose slots count (the *seats*), the *ledger* (the sum over workers that
//!   are gone), the leader's lease, the last published figure and the last acknowledged one.
//! * The *leader* sums ledger and slots at the newest boundary that every live worker has closed.
//! * A slot is *sealed* before it is folded into the ledger: by its owner at the end (also from a
//!   panic), or by the leader with a CAS when it is silent for [`SILENT_PERIODS_X2`] half periods. What is
//!   sealed no longer changes, and one write of the state both adds it to the ledger and takes the
//!   seat away. An owner that was only slow sees the seal, and sits down anew with what it did not cover.
//!
//! So every request is in exactly one place at any time: in one seated slot or in the ledger.

use serde::{Deserialize, Serialize};

use crate::counting::grid::Grid;
use crate::counting::recorder::Recorder;
use crate::counting::snapshot::Snapshot;

/// A worker that closed no boundary for five half periods is taken for dead: early enough for
/// another to report within three periods of the death.
pub const SILENT_PERIODS_X2: u64 = 5;
/// The lease runs out a little before the second boundary without a sign of the leader.
const LEASE_PERIODS_X10: u64 = 19;
/// Attempts at a conditional write before giving up until the next tick.
const ATTEMPTS: usize = 64;

/// What a conditional write expects to find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// No such key.
    Absent,
    /// The value that was read with this version.
    Version(u32),
}

/// The store: Envoy's shared data in the filter, a map in tests.
pub trait Store {
    /// The value and its version, if there is one and it can be read.
    fn get(&self, key: &str) -> Option<(Vec<u8>, u32)>;
    /// Writes if the expectation holds; whether it did.
    fn set(&self, key: &str, value: &[u8], expect: Expect) -> bool;
}

/// Why a step of the protocol was not taken. The next tick tries again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// The store has no readable state of this pod.
    NoState,
    /// Others wrote each time in between.
    Contended,
}

/// What all workers of a pod agree on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Changes whenever the counters restart at zero.
    pub incarnation: u64,
    /// The pod's time minus the raw clock, wrapping.
    pub clock_offset_ns: u64,
    /// The boundaries that all workers close at.
    pub grid: Grid,
    /// The last published figure, and the one before (`State::publish`): the gauges are their difference.
    pub published: [Snapshot; 2],
    /// The last figure that the stats server acknowledged.
    pub acknowledged: Snapshot,
    /// When the counters began.
    pub started_ns: u64,
    /// Workers that lost their seats, and whose other belongings are still to be cleared up by the leader
    /// ([`Pod::cleared_up`]).
    pub departed: Vec<u64>,
    /// The instant of the newest figure that a worker took at its end.
    last_figure_ns: u64,
    ledger: Snapshot,
    lease: Lease,
    seats: Vec<Owner>,
    /// Whose slots are in the last published figure.
    summed: Vec<Owner>,
    late: Option<Late>,
    last_id: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Lease {
    holder: u64,
    renewed_ns: u64,
}

/// What a figure has of a worker that was not in the one before, although it had counted already: one that had been taken for
/// dead, or has just come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Late {
    from_ns: u64,
    published_ns: u64,
}

/// A worker under one seating: after a seal the same worker sits down anew. Id 0 is nobody's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Owner {
    id: u64,
    seating: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Slot {
    owner: Owner,
    sealed: bool,
    /// Whether requests have come to this worker: not so on Envoy's main thread.
    serves: bool,
    /// How often this worker is to report, by its configurations.
    period_ns: u64,
    born_ns: u64,
    /// Oldest first.
    closed: Vec<Snapshot>,
}

impl Slot {
    fn latest(&self) -> Snapshot {
        self.closed.last().copied().unwrap_or(Snapshot::starting_at(self.born_ns))
    }

    /// The slot at a boundary; `None` if its owner has not come so far, or is much further.
    fn at(&self, boundary_ns: u64) -> Option<Snapshot> {
        if boundary_ns <= self.born_ns {
            return Some(Snapshot::starting_at(boundary_ns));
        }
        self.closed.iter().find(|s| s.as_of_ns == boundary_ns).copied()
    }
}

impl State {
    /// The ids of the workers that have seats.
    pub fn workers(&self) -> impl Iterator<Item = u64> {
        self.seats.iter().map(|owner| owner.id)
    }

    /// The instant up to which a leader has lived, by its clock.
    pub fn led_until_ns(&self) -> u64 {
        self.lease.renewed_ns
    }

    /// What a report begins with: what is acknowledged, as of the instant at which began what is new. That lies before the
    /// last report where a worker was late.
    pub fn reported_since(&self) -> Snapshot {
        let late_ns = self.late.map_or(u64::MAX, |late| late.from_ns);
        Snapshot { as_of_ns: self.acknowledged.as_of_ns.min(late_ns), ..self.acknowledged }
    }

    /// Takes over a new figure. Returns the one before, with the time that requests took until then in workers that were not in
    /// it: so the difference is the average between both. Their counts stay out of it: each is in one difference.
    fn publish(&mut self, latest: Snapshot, live: &[Slot]) -> Snapshot {
        let [_, mut previous] = self.published;
        for slot in live.iter().filter(|slot| !self.summed.contains(&slot.owner)) {
            if slot.born_ns < previous.as_of_ns {
                let from_ns = self.late.map_or(u64::MAX, |late| late.from_ns).min(slot.born_ns);
                self.late = Some(Late { from_ns, published_ns: latest.as_of_ns });
                let Some(before) = slot.at(previous.as_of_ns) else { continue };
                previous = previous.plus(&Snapshot { requests: 0, proxied_requests: 0, ..before.finished() });
            }
        }
        self.summed = live.iter().map(|slot| slot.owner).collect();
        self.published = [previous, latest];
        previous
    }

    fn depart(&mut self, id: u64) {
        if !self.departed.contains(&id) {
            self.departed.push(id);
        }
    }
}

/// What the leader found when it took stock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stock {
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
        /// What a report begins with ([`State::reported_since`]).
        since: Snapshot,
        /// The incarnation of the counters.
        incarnation: u64,
    },
}

/// One pod's values in a store, under a prefix of its own.
#[derive(Clone, Debug)]
pub struct Pod {
    prefix: String,
    state_key: String,
}

impl Pod {
    /// The pod that `domain` names; equal names share their figures. The prefix holds the version
    /// of the stored format, so that an old and a new module in one Envoy do not misread each other.
    pub fn new(domain: &str) -> Self {
        let prefix = format!("inflight/3/{domain}");
        Self { state_key: format!("{prefix}/state"), prefix }
    }

    /// Reads the state, or creates it as of `wall_ns` by the raw clock's `raw_ns`; an existing state
    /// with a longer period gets a new grid, which every worker takes over at its next tick. One with a shorter
    /// period keeps it: that is the leader's to change, when no worker asks for it any more.
    ///
    /// # Errors
    /// [`Trouble::Contended`].
    pub fn open(
        &self,
        store: &impl Store,
        raw_ns: u64,
        wall_ns: u64,
        period_ns: u64,
        incarnation: u64,
    ) -> Result<State, Trouble> {
        for _ in 0..ATTEMPTS {
            let (state, expect) = match self.read(store) {
                Some((state, _)) if state.grid.period_ns <= period_ns => return Ok(state),
                Some((mut state, version)) => {
                    let now_ns = raw_ns.wrapping_add(state.clock_offset_ns);
                    state.grid = Grid { anchor_ns: now_ns, period_ns };
                    (state, Expect::Version(version))
                }
                None => {
                    let start = Snapshot::starting_at(wall_ns);
                    let state = State {
                        incarnation,
                        clock_offset_ns: wall_ns.wrapping_sub(raw_ns),
                        grid: Grid { anchor_ns: wall_ns, period_ns },
                        published: [start; 2],
                        acknowledged: start,
                        started_ns: wall_ns,
                        departed: Vec::new(),
                        last_figure_ns: wall_ns,
                        ledger: start,
                        lease: Lease::default(),
                        seats: Vec::new(),
                        summed: Vec::new(),
                        late: None,
                        last_id: 0,
                    };
                    // An unreadable value under our own key cannot be waited for; replace it.
                    let expect =
                        store.get(&self.state_key).map_or(Expect::Absent, |(_, v)| Expect::Version(v));
                    (state, expect)
                }
            };
            if self.write(store, &state, expect) {
                return Ok(state);
            }
        }
        Err(Trouble::Contended)
    }

    /// The state as it is now.
    ///
    /// # Errors
    /// [`Trouble::NoState`].
    pub fn state(&self, store: &impl Store) -> Result<State, Trouble> {
        self.read(store).map(|(state, _)| state).ok_or(Trouble::NoState)
    }

    /// Notes that the stats server acknowledged everything up to `until`. Whoever sent the report:
    /// an acknowledgement never goes back.
    ///
    /// # Errors
    /// [`Trouble`], after which the same figures are reported again; the receiver knows them.
    pub fn acknowledge(&self, store: &impl Store, incarnation: u64, until: &Snapshot) -> Result<(), Trouble> {
        self.update(store, |state| {
            if state.incarnation == incarnation && until.as_of_ns > state.acknowledged.as_of_ns {
                state.acknowledged = *until;
                state.late = state.late.filter(|late| late.published_ns > until.as_of_ns);
            }
        })
        .map(|_| ())
    }

    /// Takes workers off the list of those whose belongings are to be cleared up.
    ///
    /// # Errors
    /// [`Trouble`]; they are then cleared up again, which changes nothing.
    pub fn cleared_up(&self, store: &impl Store, ids: &[u64]) -> Result<(), Trouble> {
        self.update(store, |state| state.departed.retain(|id| !ids.contains(id)))
    }

    /// The key of another value of this pod.
    pub fn key(&self, name: &str) -> String {
        format!("{}/{name}", self.prefix)
    }

    /// The key of the pod's breaker ([`crate::breaker::rules`]).
    pub fn breaker_key(&self) -> String {
        self.key("breaker")
    }

    fn slot_key(&self, id: u64) -> String {
        self.key(&format!("slot/{id:016x}"))
    }

    fn read(&self, store: &impl Store) -> Option<(State, u32)> {
        let (bytes, version) = store.get(&self.state_key)?;
        Some((bincode::deserialize(&bytes).ok()?, version))
    }

    fn write(&self, store: &impl Store, state: &State, expect: Expect) -> bool {
        bincode::serialize(state).is_ok_and(|bytes| store.set(&self.state_key, &bytes, expect))
    }

    fn update<R>(&self, store: &impl Store, mut change: impl FnMut(&mut State) -> R) -> Result<R, Trouble> {
        for _ in 0..ATTEMPTS {
            let (mut state, version) = self.read(store).ok_or(Trouble::NoState)?;
            let before = state.clone();
            let result = change(&mut state);
            if state == before || self.write(store, &state, Expect::Version(version)) {
                return Ok(result);
            }
        }
        Err(Trouble::Contended)
    }

    /// A worker's slot, if it has written one, and what a write there must expect.
    fn read_slot(&self, store: &impl Store, id: u64) -> (Option<Slot>, Expect) {
        let Some((bytes, version)) = store.get(&self.slot_key(id)) else {
            return (None, Expect::Absent);
        };
        (bincode::deserialize(&bytes).ok(), Expect::Version(version))
    }

    fn write_slot(&self, store: &impl Store, slot: &Slot, expect: Expect) -> bool {
        bincode::serialize(slot).is_ok_and(|bytes| store.set(&self.slot_key(slot.owner.id), &bytes, expect))
    }

    /// Brings a sealed slot into the ledger, if that has not been done.
    fn fold(&self, store: &impl Store, slot: &Slot) -> Result<(), Trouble> {
        self.update(store, |state| {
            let seats = state.seats.len();
            state.seats.retain(|owner| *owner != slot.owner);
            if state.seats.len() < seats {
                state.ledger = state.ledger.plus(&slot.latest().finished());
                state.depart(slot.owner.id);
            }
        })
    }
}

/// One worker's part in the protocol.
#[derive(Debug)]
pub struct Member {
    pod: Pod,
    owner: Owner,
    period_ns: u64,
    born_ns: u64,
    /// What of the recorder's totals was sealed under earlier seats.
    base: Snapshot,
    /// The newest boundary written under this seating.
    posted_ns: Option<u64>,
}

impl Member {
    /// A worker of `pod` whose recorder starts at `born_ns`, and that is to report every `period_ns`.
    pub fn new(pod: Pod, born_ns: u64, period_ns: u64) -> Self {
        Self { pod, owner: Owner::default(), period_ns, born_ns, base: Snapshot::default(), posted_ns: None }
    }

    /// The pod this worker is of.
    pub fn pod(&self) -> &Pod {
        &self.pod
    }

    /// This worker is to report every `period_ns` from now on. The pod does so as often as any of its live workers is to.
    pub fn set_period_ns(&mut self, period_ns: u64) {
        self.period_ns = period_ns;
    }

    /// This worker's id, drawn the first time.
    ///
    /// # Errors
    /// [`Trouble`].
    pub fn id(&mut self, store: &impl Store) -> Result<u64, Trouble> {
        if self.owner.id == 0 {
            self.owner.id = self.pod.update(store, |state| {
                state.last_id += 1;
                state.last_id
            })?;
        }
        Ok(self.owner.id)
    }

    /// Writes the closed boundaries to this worker's slot, and takes a seat if it has none.
    /// `true` if it had been sealed as silent meanwhile: then its clock may be behind
    /// ([`crate::counting::clock::Clock::follow`]).
    ///
    /// # Errors
    /// [`Trouble`]; the next post brings everything.
    pub fn post(&mut self, store: &impl Store, recorder: &Recorder) -> Result<bool, Trouble> {
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
    /// [`Trouble`]; what was not posted before is then lost with the worker.
    pub fn seal(&mut self, store: &impl Store, recorder: &Recorder) -> Result<(), Trouble> {
        self.write_slot(store, recorder, true)?;
        self.leave_seat(&self.rest_of(recorder.current()));
        let id = self.owner.id;
        self.pod.update(store, |state| {
            if state.lease.holder == id {
                state.lease = Lease::default();
            }
        })
    }

    fn write_slot(&mut self, store: &impl Store, recorder: &Recorder, sealed: bool) -> Result<bool, Trouble> {
        self.id(store)?;
        let mut rejoined = false;
        for _ in 0..ATTEMPTS {
            let (found, expect) = self.pod.read_slot(store, self.owner.id);
            if let Some(found) = found.filter(|slot| slot.sealed) {
                // Only what is in the ledger may be overwritten.
                self.pod.fold(store, &found)?;
                if found.owner == self.owner {
                    self.leave_seat(&found.latest());
                    rejoined = true;
                }
            }
            if self.pod.write_slot(store, &self.slot(recorder, sealed), expect) {
                // The slot is there before the seat, so a seat always has a slot.
                if self.posted_ns.is_none() {
                    let owner = self.owner;
                    self.pod.update(store, |state| {
                        if !state.seats.contains(&owner) {
                            state.seats.push(owner);
                        }
                        state.departed.retain(|id| *id != owner.id);
                    })?;
                }
                self.posted_ns = Some(recorder.closed().next_back().map_or(0, |s| s.as_of_ns));
                return Ok(rejoined);
            }
        }
        Err(Trouble::Contended)
    }

    /// Leads if no other worker does and this one has posted: sums the pod at the newest boundary that every live worker
    /// has closed, folds sealed slots, and publishes. `clock_offset_ns` is this worker's
    /// ([`crate::counting::clock::Clock::offset_ns`]); while it leads, its time is the pod's. A leader that serves
    /// requests hands over to a worker that does not.
    ///
    /// # Errors
    /// [`Trouble`]; nothing was changed.
    pub fn take_stock(
        &self,
        store: &impl Store,
        now_ns: u64,
        clock_offset_ns: u64,
    ) -> Result<Stock, Trouble> {
        for attempt in 0..ATTEMPTS {
            let (mut state, version) = self.pod.read(store).ok_or(Trouble::NoState)?;
            let period = state.grid.period_ns.max(1);
            let lease_ends =
                state.lease.renewed_ns.saturating_add(period.saturating_mul(LEASE_PERIODS_X10) / 10);
            if self.owner.id == 0 || (state.lease.holder != self.owner.id && now_ns < lease_ends) {
                return Ok(Stock::Follow);
            }
            let (live, astray) = self.fold_the_gone(store, &mut state, now_ns);
            // A seat without its slot: this state is out of date. If it stays so, the slot is corrupt.
            if astray && attempt < ATTEMPTS / 2 {
                continue;
            }
            let Some(newest) = live.iter().map(|slot| slot.latest().as_of_ns).min() else {
                return Ok(Stock::Wait);
            };
            let mut stock =
                if newest < state.grid.at_or_before(now_ns) { Stock::Wait } else { Stock::UpToDate };
            // A worker that has just come has closed no boundary yet; its beginning is none.
            // Nor has what a worker took at its end a later instant and less than this.
            let last_ns = state.published[1].as_of_ns.max(state.last_figure_ns);
            if newest > last_ns && newest == state.grid.at_or_before(newest) {
                let sum = live.iter().try_fold(state.ledger, |sum, slot| Some(sum.plus(&slot.at(newest)?)));
                if let Some(sum) = sum {
                    // The ledger may hold counts from after the boundary; the figure is still as of it.
                    let latest = Snapshot { as_of_ns: newest, ..sum };
                    stock = Stock::Published {
                        previous: state.publish(latest, &live),
                        latest,
                        since: state.reported_since(),
                        incarnation: state.incarnation,
                    };
                }
            }
            state.lease =
                Lease { holder: self.heir(&live, state.grid.at_or_before(now_ns)), renewed_ns: now_ns };
            state.clock_offset_ns = clock_offset_ns;
            agree_on_a_period(&mut state, &live, now_ns);
            if self.pod.write(store, &state, Expect::Version(version)) {
                return Ok(stock);
            }
        }
        Err(Trouble::Contended)
    }

    /// The figure as of right now, from what every worker posted last, and what was acknowledged:
    /// for the report that leaves when this worker ends. Workers end together, by clocks that do not quite agree, and a
    /// receiver goes by the instant: one write of the state after the other makes a figure that holds more the later one.
    ///
    /// # Errors
    /// [`Trouble`]; nothing was changed.
    pub fn last_figure(&self, store: &impl Store, now_ns: u64) -> Result<(Snapshot, State), Trouble> {
        self.pod.update(store, |state| {
            let mut sum = state.ledger;
            for owner in &state.seats {
                if let Some(slot) = self.pod.read_slot(store, owner.id).0.filter(|slot| slot.owner == *owner)
                {
                    sum = sum.plus(&slot.latest());
                }
            }
            let taken_ns = state.published[1].as_of_ns.max(state.last_figure_ns).saturating_add(1);
            state.last_figure_ns = sum.as_of_ns.max(now_ns).max(taken_ns);
            (Snapshot { as_of_ns: state.last_figure_ns, ..sum }, state.clone())
        })
    }

    /// Moves every sealed slot into the ledger of `state` (sealing the silent ones first) and
    /// returns the others, and whether a seat had no slot. Takes effect only when the caller's write of
    /// `state` succeeds; until then a sealed slot is just found sealed again.
    fn fold_the_gone(&self, store: &impl Store, state: &mut State, now_ns: u64) -> (Vec<Slot>, bool) {
        let patience = state.grid.period_ns.max(1).saturating_mul(SILENT_PERIODS_X2) / 2;
        let mut live = Vec::with_capacity(state.seats.len());
        let mut astray = false;
        let mut gone = Vec::new();
        let ledger = &mut state.ledger;
        state.seats.retain(|owner| {
            let (found, expect) = self.pod.read_slot(store, owner.id);
            let Some(mut slot) = found.filter(|slot| slot.owner == *owner) else {
                astray = true;
                return false;
            };
            if !slot.sealed && slot.latest().as_of_ns.saturating_add(patience) <= now_ns {
                let sealed = Slot { sealed: true, closed: vec![slot.latest()], ..slot.clone() };
                // If the write fails, it wrote just now: it lives, and what it wrote is read the next time.
                if self.pod.write_slot(store, &sealed, expect) {
                    slot = sealed;
                }
            }
            if slot.sealed {
                *ledger = ledger.plus(&slot.latest().finished());
                gone.push(owner.id);
                return false;
            }
            live.push(slot);
            true
        });
        gone.into_iter().for_each(|id| state.depart(id));
        (live, astray)
    }

    /// Who leads from now on: this worker, or rather one without requests of its own. That is Envoy's main
    /// thread, which is the last to end and so can report what all others left.
    fn heir(&self, live: &[Slot], newest_ns: u64) -> u64 {
        let serves = |slot: &&Slot| slot.owner == self.owner && slot.serves;
        let idle = |slot: &&Slot| !slot.serves && slot.latest().as_of_ns >= newest_ns;
        match live.iter().find(serves) {
            Some(_) => live.iter().find(idle).map_or(self.owner.id, |slot| slot.owner.id),
            None => self.owner.id,
        }
    }

    fn leave_seat(&mut self, sealed: &Snapshot) {
        self.base = self.base.plus(sealed);
        self.born_ns = sealed.as_of_ns;
        self.owner.seating = self.owner.seating.wrapping_add(1);
        self.posted_ns = None;
    }

    /// What of the recorder's totals is not sealed under an earlier seat.
    fn rest_of(&self, snapshot: &Snapshot) -> Snapshot {
        snapshot.less_totals_of(&self.base)
    }

    fn slot(&self, recorder: &Recorder, sealed: bool) -> Slot {
        let closed = if sealed {
            vec![self.rest_of(recorder.current()).finished()]
        } else {
            recorder.closed().filter(|s| s.as_of_ns > self.born_ns).map(|s| self.rest_of(s)).collect()
        };
        Slot {
            owner: self.owner,
            sealed,
            serves: recorder.current().requests > 0,
            period_ns: self.period_ns,
            born_ns: self.born_ns,
            closed,
        }
    }
}

/// The shortest period that a live worker asks for. A worker that has just shortened it has not said so in its slot
/// yet: a new grid stays for as long as that may take.
fn agree_on_a_period(state: &mut State, live: &[Slot], now_ns: u64) {
    let Grid { anchor_ns, period_ns } = state.grid;
    let settled_ns = anchor_ns.saturating_add(period_ns.saturating_mul(SILENT_PERIODS_X2) / 2);
    if let Some(asked_ns) = live.iter().map(|slot| slot.period_ns).min()
        && asked_ns != period_ns
        && now_ns >= settled_ns
    {
        state.grid = Grid { anchor_ns: now_ns, period_ns: asked_ns };
    }
}

#[cfg(test)]
pub(crate) mod tests;
