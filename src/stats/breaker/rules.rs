//! The breaker's rules: a limit on the requests in the app at once, across all workers of a pod,
//! with one queue for all of them (knative/serving, `pkg/queue/breaker.go`).
//!
//! The breaker's state is one value in the shared store, changed by compare-and-swap. It holds the
//! number of permits of each worker, and the waiting requests in order of arrival. A released
//! permit goes, in the same write, to the request that has waited longest, whichever worker has
//! that request; no other request can take the permit in between. Probes wait in a short queue of
//! their own, which is served first. They take permits like requests; otherwise any client could
//! bypass the breaker by calling its requests probes. But a full queue must not make a healthy pod
//! look dead.
//!
//! A worker whose release passes a permit to another worker's request informs that worker by a
//! message ([`PermitGrant`]). A worker's permits and waiting requests are recorded twice: here, and
//! in its [`WorkerSide`](crate::breaker::worker_side::WorkerSide). The worker reconciles the two at
//! each tick ([`Breaker::reconcile`]), and so recovers from lost messages. If its entry is gone,
//! its next change of any kind makes a new entry.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::counting::time::MonotonicNs;
use crate::pod::store::{self, Attempt, REQUEST_ATTEMPTS, Store, StoreError};

/// The largest number of waiting probes.
pub const MAX_WAITING_PROBES: usize = 4;

/// How long a worker keeps its permits after its membership has ended. The worker may only be slow,
/// with its requests in the app all the time. The time is longer than for a membership: a worker
/// that comes back finds its counts, but it would find its permits with others. Five seconds, plus
/// one that a busy machine may need to let the worker tick.
pub const PATIENCE_NS: u64 = 6_000_000_000;

/// The limits of a breaker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BreakerLimits {
    /// The largest number of requests in the app at once.
    pub concurrency: u32,
    /// The largest number of waiting requests, probes not included.
    pub queue_depth: u32,
}

/// The queue in which a request waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// The queue of the probes.
    Probes,
    /// The queue of all other requests.
    Requests,
}

/// A waiting request: the worker that has it, and the worker's number for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket {
    /// The worker's id ([`crate::pod::member::Member`]).
    pub worker: u64,
    /// A number that the worker assigns, counting up.
    pub number: u64,
}

/// A permit that was passed on to a waiting request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PermitGrant {
    /// The request that received the permit.
    pub ticket: Ticket,
    /// The entry_number of its worker's entry. When that entry is gone, so is the permit.
    pub entry_number: u32,
    /// The mailbox of its worker, as the worker's entry has it.
    pub mailbox: u32,
}

/// The answer to an arriving request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EnterOutcome {
    /// The request has a permit and goes on.
    Admitted,
    /// The request waits for a grant.
    Queued,
    /// Too many requests are waiting already.
    Full,
}

/// A waiting request, as its worker knows it.
#[derive(Clone, Debug)]
pub struct Waiter<W> {
    /// The queue in which it waits.
    pub queue: Queue,
    /// When it began to wait.
    pub since: MonotonicNs,
    /// The worker's own data about it.
    pub data: W,
}

/// A worker's own view of its part in the breaker.
#[derive(Clone, Copy, Debug)]
pub struct LocalView<'a, W> {
    /// Its id.
    pub worker: u64,
    /// Its mailbox: the message queue on which it receives grants.
    pub mailbox: u32,
    /// The entry_number of its entry. A new entry has the next one.
    pub entry_number: u32,
    /// The number of permits that its requests hold.
    pub permits: u32,
    /// Its waiting requests, as far as it knows, by their numbers: in order of arrival.
    pub waiting: &'a BTreeMap<u64, Waiter<W>>,
}

/// The outcome of a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Update<R> {
    /// The change's own result.
    pub result: R,
    /// The permits that the change passed on to waiting requests.
    pub grants: Vec<PermitGrant>,
    /// Whether the worker's entry had to be made first. Then messages under an earlier entry are
    /// void.
    pub new_entry: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct BreakerState {
    entries: Vec<WorkerEntry>,
    probes: VecDeque<Ticket>,
    waiting: VecDeque<Ticket>,
}

/// An entry: one worker's part of the breaker's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct WorkerEntry {
    worker: u64,
    entry_number: u32,
    mailbox: u32,
    permits: u32,
    /// Since when the worker is believed to be gone, by the monotonic clock.
    gone_since: Option<MonotonicNs>,
}

impl BreakerState {
    /// Decodes the state. A value that does not decode will never become readable, so the state
    /// then starts empty.
    fn decode(bytes: &[u8]) -> Self {
        bincode::deserialize(bytes).unwrap_or_default()
    }

    fn taken(&self) -> u32 {
        self.entries.iter().fold(0, |sum, entry| sum.saturating_add(entry.permits))
    }

    fn entry(&mut self, worker: u64) -> Option<&mut WorkerEntry> {
        self.entries.iter_mut().find(|entry| entry.worker == worker)
    }

    /// Finds or makes the entry of a worker. The worker is alive, since it is doing something. A
    /// new entry takes the permits that the worker's requests hold, beyond the limit if need be,
    /// and the worker's waiting requests go to the end of the queues.
    fn ensure_entry<W>(&mut self, local: &LocalView<'_, W>) -> EntryState {
        if let Some(entry) = self.entry(local.worker) {
            entry.mailbox = local.mailbox;
            let believed_gone = entry.gone_since.take().is_some();
            return if believed_gone { EntryState::Returned } else { EntryState::Present };
        }
        self.entries.push(WorkerEntry {
            worker: local.worker,
            entry_number: local.entry_number.wrapping_add(1),
            mailbox: local.mailbox,
            permits: local.permits,
            gone_since: None,
        });
        for (&number, waiter) in local.waiting {
            self.queue(waiter.queue).push_back(Ticket { worker: local.worker, number });
        }
        EntryState::Created
    }

    fn queue(&mut self, queue: Queue) -> &mut VecDeque<Ticket> {
        match queue {
            Queue::Probes => &mut self.probes,
            Queue::Requests => &mut self.waiting,
        }
    }

    fn release(&mut self, worker: u64) {
        if let Some(entry) = self.entry(worker) {
            entry.permits = entry.permits.saturating_sub(1);
        }
    }

    fn remove(&mut self, worker: u64) {
        self.entries.retain(|entry| entry.worker != worker);
        self.keep_tickets(|ticket| ticket.worker != worker);
    }

    fn keep_tickets(&mut self, mut which: impl FnMut(&Ticket) -> bool) {
        self.probes.retain(&mut which);
        self.waiting.retain(&mut which);
    }

    /// Gives free permits to the requests that have waited longest, probes first.
    fn grant(&mut self, concurrency: u32) -> Vec<PermitGrant> {
        let mut grants = Vec::new();
        let mut running = self.taken();
        while running < concurrency
            && let Some(ticket) = self.probes.pop_front().or_else(|| self.waiting.pop_front())
        {
            if let Some(entry) = self.entry(ticket.worker) {
                entry.permits = entry.permits.saturating_add(1);
                running = running.saturating_add(1);
                grants.push(PermitGrant { ticket, entry_number: entry.entry_number, mailbox: entry.mailbox });
            }
        }
        grants
    }
}

/// How the entry of a worker was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum EntryState {
    Present,
    /// The worker had been believed to be gone.
    Returned,
    Created,
}

/// Whether a change altered the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Changed {
    Yes,
    No,
}

/// Which permits a change gives to waiting requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Granting {
    /// All permits that are free after the change.
    FreePermits,
    Nothing,
}

/// A pod's breaker.
#[derive(Clone, Debug)]
pub struct Breaker {
    key: String,
    /// Its limits.
    pub limits: BreakerLimits,
}

impl Breaker {
    /// Returns the breaker whose state is stored under `key`.
    pub fn new(key: String, limits: BreakerLimits) -> Self {
        Self { key, limits }
    }

    /// Admits a request, or queues it in `queue` as `number`, or turns it away.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn enter<W>(
        &self,
        store: &impl Store,
        local: &LocalView<'_, W>,
        queue: Queue,
        number: u64,
    ) -> Result<Update<EnterOutcome>, StoreError> {
        let BreakerLimits { concurrency, queue_depth } = self.limits;
        let capacity = if queue == Queue::Probes { MAX_WAITING_PROBES } else { queue_depth as usize };
        // No grants: joining the queue gives no permit, even where there is capacity for both.
        self.update_local(store, local, Granting::Nothing, |state| {
            // Only probes overtake waiting requests.
            let first = state.probes.is_empty() && (queue == Queue::Probes || state.waiting.is_empty());
            if first && state.taken() < concurrency {
                if let Some(entry) = state.entry(local.worker) {
                    entry.permits = entry.permits.saturating_add(1);
                }
                return (EnterOutcome::Admitted, Changed::Yes);
            }
            if state.queue(queue).len() >= capacity {
                return (EnterOutcome::Full, Changed::No);
            }
            state.queue(queue).push_back(Ticket { worker: local.worker, number });
            (EnterOutcome::Queued, Changed::Yes)
        })
    }

    /// Releases the permit of a finished request, for other requests, and returns `true`. If
    /// `must_linger` says that the app may still be working on the request, the permit stays taken,
    /// and the result is `false`: call again later. `must_linger` is called only while requests
    /// wait or more than half of the permits are taken; otherwise the app is far from seeing one
    /// request too many.
    ///
    /// # Errors
    /// [`StoreError`]; the permit is still taken.
    pub fn leave<W>(
        &self,
        store: &impl Store,
        local: &LocalView<'_, W>,
        mut must_linger: impl FnMut() -> bool,
    ) -> Result<Update<bool>, StoreError> {
        self.update_local(store, local, Granting::FreePermits, |state| {
            let wait = !state.waiting.is_empty() || !state.probes.is_empty();
            let crowded = wait || state.taken() > self.limits.concurrency / 2;
            if crowded && must_linger() {
                return (false, Changed::No);
            }
            state.release(local.worker);
            (true, Changed::Yes)
        })
    }

    /// Ends the wait of a request. If the request has meanwhile received a permit, the permit goes
    /// to other requests.
    ///
    /// # Errors
    /// [`StoreError`]; the request still waits.
    pub fn abandon<W>(
        &self,
        store: &impl Store,
        local: &LocalView<'_, W>,
        number: u64,
    ) -> Result<Update<()>, StoreError> {
        let ticket = Ticket { worker: local.worker, number };
        self.update_local(store, local, Granting::FreePermits, |state| {
            let before = state.probes.len() + state.waiting.len();
            state.keep_tickets(|waiting| *waiting != ticket);
            if state.probes.len() + state.waiting.len() == before {
                state.release(local.worker);
            }
            ((), Changed::Yes)
        })
    }

    /// Makes the worker's entry match the worker's own view: a request that the worker does not
    /// know of holds no permit and does not wait. Returns the numbers of the requests that the
    /// worker takes to be waiting but that have permits.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn reconcile<W>(
        &self,
        store: &impl Store,
        local: &LocalView<'_, W>,
    ) -> Result<Update<Vec<u64>>, StoreError> {
        self.update_local(store, local, Granting::FreePermits, |state| {
            let mut still = Vec::new();
            let mut unknown = false;
            for ticket in state.probes.iter().chain(&state.waiting).filter(|t| t.worker == local.worker) {
                match local.waiting.contains_key(&ticket.number) {
                    true => still.push(ticket.number),
                    false => unknown = true,
                }
            }
            if unknown {
                state.keep_tickets(|ticket| {
                    ticket.worker != local.worker || local.waiting.contains_key(&ticket.number)
                });
            }
            still.sort_unstable();
            let granted: Vec<u64> =
                local.waiting.keys().filter(|number| still.binary_search(number).is_err()).copied().collect();
            let running = local.permits.saturating_add(u32::try_from(granted.len()).unwrap_or(u32::MAX));
            let differs = state.entry(local.worker).is_some_and(|entry| entry.permits != running);
            if let Some(entry) = state.entry(local.worker) {
                entry.permits = running;
            }
            (granted, if differs || unknown { Changed::Yes } else { Changed::No })
        })
    }

    /// Removes a worker that ends: its permits go to others, its tickets are void.
    ///
    /// # Errors
    /// [`StoreError`]; the caller has to try again.
    pub fn forget(&self, store: &impl Store, worker: u64) -> Result<Vec<PermitGrant>, StoreError> {
        let (_, grants) = self.update(store, Granting::FreePermits, |state| {
            state.remove(worker);
            ((), Changed::Yes)
        })?;
        Ok(grants)
    }

    /// Removes the entry of another worker that is believed to be gone, if that worker has done
    /// nothing here for [`PATIENCE_NS`] since the first such call. `now` is the monotonic time.
    /// Returns `None` while it is too early.
    ///
    /// # Errors
    /// [`StoreError`]; the caller has to try again.
    pub fn forget_if_silent(
        &self,
        store: &impl Store,
        worker: u64,
        now: MonotonicNs,
    ) -> Result<Option<Vec<PermitGrant>>, StoreError> {
        let (gone, grants) = self.update(store, Granting::FreePermits, |state| {
            let Some(entry) = state.entry(worker) else { return (true, Changed::No) };
            match entry.gone_since {
                Some(since) if now.since(since) < PATIENCE_NS => (false, Changed::No),
                Some(_) => {
                    state.remove(worker);
                    (true, Changed::Yes)
                }
                None => {
                    entry.gone_since = Some(now);
                    (false, Changed::Yes)
                }
            }
        })?;
        Ok(gone.then_some(grants))
    }

    /// Returns whether a worker has an entry.
    #[cfg(test)]
    pub(crate) fn has_entry(&self, store: &impl Store, worker: u64) -> bool {
        self.read(store).entry(worker).is_some()
    }

    /// Returns the numbers of requests in the app and of waiting requests, probes included.
    pub fn depth(&self, store: &impl Store) -> (u64, u64) {
        let state = self.read(store);
        (u64::from(state.taken()), (state.probes.len() + state.waiting.len()) as u64)
    }

    fn read(&self, store: &impl Store) -> BreakerState {
        store.get(&self.key).map(|(bytes, _)| BreakerState::decode(&bytes)).unwrap_or_default()
    }

    fn update_local<R, W>(
        &self,
        store: &impl Store,
        local: &LocalView<'_, W>,
        which: Granting,
        mut change: impl FnMut(&mut BreakerState) -> (R, Changed),
    ) -> Result<Update<R>, StoreError> {
        let ((result, new_entry), grants) = self.update(store, which, |state| {
            let found = state.ensure_entry(local);
            let (result, changed) = change(state);
            let changed = if found == EntryState::Present { changed } else { Changed::Yes };
            ((result, found == EntryState::Created), changed)
        })?;
        Ok(Update { result, grants, new_entry })
    }

    /// Changes the state, and grants permits in the same write.
    fn update<R>(
        &self,
        store: &impl Store,
        which: Granting,
        mut change: impl FnMut(&mut BreakerState) -> (R, Changed),
    ) -> Result<(R, Vec<PermitGrant>), StoreError> {
        store::update_bytes(store, &self.key, REQUEST_ATTEMPTS, |found| {
            let mut state = found.map(BreakerState::decode).unwrap_or_default();
            let (result, changed) = change(&mut state);
            let grants = match which {
                Granting::FreePermits => state.grant(self.limits.concurrency),
                Granting::Nothing => Vec::new(),
            };
            if changed == Changed::No && grants.is_empty() {
                return Attempt::Keep((result, grants));
            }
            match store::encode(&state) {
                Some(bytes) => Attempt::Write(bytes, (result, grants)),
                None => Attempt::Retry,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::testing::{Dice, Map};

    const ONE: BreakerLimits = BreakerLimits { concurrency: 1, queue_depth: 2 };

    fn breaker(limits: BreakerLimits) -> Breaker {
        Breaker::new("b".into(), limits)
    }

    /// A worker that has nothing beyond its entry. Its mailbox is its id plus a hundred.
    fn local(worker: u64) -> LocalView<'static, ()> {
        static NOBODY: BTreeMap<u64, Waiter<()>> = BTreeMap::new();
        let mailbox = u32::try_from(worker).unwrap() + 100;
        LocalView { worker, mailbox, entry_number: 0, permits: 0, waiting: &NOBODY }
    }

    fn enter(breaker: &Breaker, store: &Map, worker: u64, number: u64) -> EnterOutcome {
        breaker.enter(store, &local(worker), Queue::Requests, number).unwrap().result
    }

    fn leave(breaker: &Breaker, store: &Map, worker: u64) -> Vec<PermitGrant> {
        breaker.leave(store, &local(worker), || false).unwrap().grants
    }

    fn abandon(breaker: &Breaker, store: &Map, ticket: Ticket) -> Vec<PermitGrant> {
        breaker.abandon(store, &local(ticket.worker), ticket.number).unwrap().grants
    }

    #[test]
    fn one_runs_some_wait_in_order_and_one_more_is_turned_away() {
        let (store, breaker) = (Map::default(), breaker(ONE));
        let enter = |worker, number| enter(&breaker, &store, worker, number);
        assert_eq!(enter(1, 0), EnterOutcome::Admitted);
        assert_eq!(enter(2, 0), EnterOutcome::Queued);
        assert_eq!(enter(1, 1), EnterOutcome::Queued);
        assert_eq!(enter(3, 0), EnterOutcome::Full);
        assert_eq!(breaker.depth(&store), (1, 2));
        let second = PermitGrant { ticket: Ticket { worker: 2, number: 0 }, entry_number: 1, mailbox: 102 };
        assert_eq!(leave(&breaker, &store, 1), [second]);
        assert_eq!(enter(3, 0), EnterOutcome::Queued, "a place in the queue, not the permit");
        let third = PermitGrant { ticket: Ticket { worker: 1, number: 1 }, entry_number: 1, mailbox: 101 };
        assert_eq!(leave(&breaker, &store, 2), [third]);
    }

    #[test]
    fn probes_take_permits_and_are_served_first_and_a_fifth_is_turned_away() {
        let (store, breaker) = (Map::default(), breaker(ONE));
        let probe =
            |worker, number| breaker.enter(&store, &local(worker), Queue::Probes, number).unwrap().result;
        assert_eq!(probe(1, 0), EnterOutcome::Admitted);
        assert_eq!(enter(&breaker, &store, 2, 0), EnterOutcome::Queued, "the probe has the permit");
        assert_eq!(enter(&breaker, &store, 2, 1), EnterOutcome::Queued);
        assert_eq!(enter(&breaker, &store, 2, 2), EnterOutcome::Full);
        for number in 1..=4 {
            assert_eq!(probe(1, number), EnterOutcome::Queued, "a full queue keeps no probe out");
        }
        assert_eq!(probe(1, 5), EnterOutcome::Full);
        assert_eq!(breaker.depth(&store), (1, 6));
        let mut served = Vec::new();
        for _ in 0..6 {
            let running = served.last().map_or(1, |ticket: &Ticket| ticket.worker);
            served.extend(leave(&breaker, &store, running).iter().map(|grant| grant.ticket));
        }
        let numbers: Vec<_> = served.iter().map(|ticket| (ticket.worker, ticket.number)).collect();
        assert_eq!(numbers, [(1, 1), (1, 2), (1, 3), (1, 4), (2, 0), (2, 1)]);
    }

    #[test]
    fn who_gives_up_frees_the_place_or_the_permit() {
        let (store, breaker) = (Map::default(), breaker(ONE));
        for number in 0..3 {
            enter(&breaker, &store, 1, number);
        }
        let ticket = |number| Ticket { worker: 1, number };
        assert_eq!(abandon(&breaker, &store, ticket(1)), []);
        assert_eq!(breaker.depth(&store), (1, 1));
        // Number 2 receives a permit, and gives up before it knows.
        assert_eq!(leave(&breaker, &store, 1).len(), 1);
        assert_eq!(abandon(&breaker, &store, ticket(2)), []);
        assert_eq!(breaker.depth(&store), (0, 0));
    }

    #[test]
    fn the_permits_of_a_worker_that_ends_go_to_others_at_once() {
        let (store, breaker) = (Map::default(), breaker(BreakerLimits { concurrency: 2, queue_depth: 10 }));
        for (worker, number) in [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1)] {
            enter(&breaker, &store, worker, number);
        }
        let granted: Vec<_> = breaker.forget(&store, 1).unwrap().iter().map(|g| g.ticket).collect();
        assert_eq!(granted, [Ticket { worker: 2, number: 0 }, Ticket { worker: 2, number: 1 }]);
        assert_eq!(breaker.depth(&store), (2, 0));
    }

    #[test]
    fn who_shows_a_sign_of_life_is_waited_for_anew() {
        let (store, breaker) = (Map::default(), breaker(ONE));
        enter(&breaker, &store, 1, 0);
        let gone = |ns| breaker.forget_if_silent(&store, 1, MonotonicNs(ns)).unwrap().is_some();
        assert!(!gone(5) && !gone(4 + PATIENCE_NS));
        let permits = LocalView { permits: 1, ..local(1) };
        assert_eq!(breaker.reconcile(&store, &permits).unwrap().grants, []);
        assert!(!gone(5 + PATIENCE_NS) && !gone(4 + 2 * PATIENCE_NS));
        assert_eq!(breaker.depth(&store), (1, 0));
        assert!(gone(5 + 2 * PATIENCE_NS) && gone(6 + 2 * PATIENCE_NS));
        assert_eq!(breaker.depth(&store), (0, 0));
    }

    #[test]
    fn a_permit_lingers_only_while_the_app_is_half_full() {
        let (store, breaker) = (Map::default(), breaker(BreakerLimits { concurrency: 4, queue_depth: 0 }));
        for number in 0..3 {
            enter(&breaker, &store, 1, number);
        }
        let left = |lingers: bool| breaker.leave(&store, &local(1), || lingers).unwrap().result;
        assert!(!left(true));
        assert_eq!(breaker.depth(&store), (3, 0));
        assert!(left(false));
        assert!(left(true), "not asked with two of four");
        assert_eq!(breaker.depth(&store), (1, 0));
    }

    #[test]
    fn a_larger_limit_lets_several_go_at_once() {
        let store = Map::default();
        for number in 0..3 {
            enter(&breaker(ONE), &store, 1, number);
        }
        let wider = breaker(BreakerLimits { concurrency: 3, queue_depth: 2 });
        assert_eq!(leave(&wider, &store, 1).len(), 2);
    }

    /// Random requests on four workers, compared with one queue in plain memory: the same requests
    /// are admitted in the same order, and never one more than the limit.
    #[test]
    fn it_does_what_one_queue_would_do() {
        for seed in 0..200 {
            let mut dice = Dice(seed);
            let (store, breaker) =
                (Map::default(), breaker(BreakerLimits { concurrency: 3, queue_depth: 5 }));
            let (mut running, mut queue) = (Vec::new(), VecDeque::new());
            let mut pending = HashMap::new();
            for number in 0..400 {
                let worker = dice.roll(4);
                if dice.roll(2) == 0 {
                    let expected = match (running.len(), queue.len()) {
                        (..3, 0) => EnterOutcome::Admitted,
                        (_, ..5) => EnterOutcome::Queued,
                        _ => EnterOutcome::Full,
                    };
                    assert_eq!(enter(&breaker, &store, worker, number), expected, "seed {seed}");
                    match expected {
                        EnterOutcome::Admitted => running.push(worker),
                        EnterOutcome::Queued => {
                            queue.push_back(Ticket { worker, number });
                            pending.insert(number, worker);
                        }
                        EnterOutcome::Full => {}
                    }
                    continue;
                }
                let granted = if dice.roll(3) == 0 && !queue.is_empty() {
                    let ticket = queue.remove(dice.roll(queue.len() as u64) as usize).unwrap();
                    abandon(&breaker, &store, ticket)
                } else if running.is_empty() {
                    continue;
                } else {
                    let worker = running.swap_remove(dice.roll(running.len() as u64) as usize);
                    leave(&breaker, &store, worker)
                };
                let mut expected = Vec::new();
                while running.len() < 3
                    && let Some(ticket) = queue.pop_front()
                {
                    running.push(ticket.worker);
                    expected.push(ticket);
                }
                let granted: Vec<_> = granted.iter().map(|grant| grant.ticket).collect();
                assert_eq!(granted, expected, "seed {seed}");
                assert_eq!(breaker.depth(&store), (running.len() as u64, queue.len() as u64), "seed {seed}");
            }
        }
    }

    #[test]
    fn threads_never_exceed_the_limit() {
        use std::sync::atomic::{AtomicU32, Ordering};
        let (store, now, done) = (Map::default(), AtomicU32::new(0), AtomicU32::new(0));
        let limits = BreakerLimits { concurrency: 3, queue_depth: 0 };
        std::thread::scope(|scope| {
            for worker in 0..4 {
                let (store, now, done) = (&store, &now, &done);
                scope.spawn(move || {
                    let breaker = breaker(limits);
                    for number in 0..2_000 {
                        if enter(&breaker, store, worker, number) == EnterOutcome::Admitted {
                            assert!(now.fetch_add(1, Ordering::SeqCst) < 3);
                            now.fetch_sub(1, Ordering::SeqCst);
                            done.fetch_add(1, Ordering::SeqCst);
                            leave(&breaker, store, worker);
                        }
                    }
                });
            }
        });
        assert!(done.load(Ordering::SeqCst) > 0);
        assert_eq!(breaker(limits).depth(&store), (0, 0));
    }
}
