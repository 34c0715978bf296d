//! The breaker: at most so many requests in the app at once, over all workers of a pod, and one queue
//! for them all (knative/serving, `pkg/queue/breaker.go`).
//!
//! Its state lies in the shared store as one value, changed by compare-and-swap: who holds how many
//! permits, and who waits, in the order of arrival. A permit that is given back goes straight to the one who
//! has waited longest, whichever worker has it; nobody can slip in between. Probes have a short line of their own, which
//! is served first: they take permits as requests do, or anybody could pass the breaker by calling themselves a
//! probe, but a full queue must not make a healthy pod look dead.
//!
//! The worker that gave a permit back tells the other by a message ([`Grant`]). What a worker holds and who of it waits
//! is known twice, here and in its [`crate::breaker::worker_side::Desk`]. The worker settles the two at each tick
//! ([`Breaker::settle`]), and so finds lost messages; if its entry is gone, it makes a new one with its next change,
//! whatever that is.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::pod::{Expect, Store};

/// Attempts at a conditional write. Each one that fails means that another worker's went through.
const ATTEMPTS: usize = 4096;

/// What the state of a few workers takes without a queue; with one the buffer grows.
const ROOM: usize = 256;

/// The most probes that wait.
pub const MOST_WAITING_PROBES: usize = 4;

/// For so long after it lost its seat a worker keeps its permits: it may only be slow, with its requests in the app all
/// the time. Longer than a seat is kept, because one that comes back finds its counts, but its permits with others. Five
/// seconds, and one for what a busy machine takes to let it tick.
pub const PATIENCE_NS: u64 = 6_000_000_000;

/// How much the breaker lets through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The most requests in the app at once.
    pub concurrency: u32,
    /// The most that wait, probes apart.
    pub queue_depth: u32,
}

/// Where a request waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    /// The probes' own line.
    Probes,
    /// The queue.
    Requests,
}

/// A waiting request: the worker that has it, and the worker's number for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket {
    /// The worker's id ([`crate::pod::Member`]).
    pub worker: u64,
    /// Counted by the worker.
    pub number: u64,
}

/// A permit that was passed on to a waiting request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// To whom.
    pub ticket: Ticket,
    /// Under which of its worker's entries: with the entry the permit is gone, too.
    pub seating: u32,
    /// The message queue of its worker, as that worker entered it.
    pub mailbox: u32,
}

/// What a request is told when it comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Go on; a permit is taken.
    Admitted,
    /// Wait for a grant.
    Queued,
    /// Too many wait already.
    Full,
}

/// A request that waits, as its worker knows it.
#[derive(Clone, Debug)]
pub struct Waiter<W> {
    /// Where it waits.
    pub line: Line,
    /// Since when.
    pub since_ns: u64,
    /// What its worker keeps of it.
    pub of: W,
}

/// A worker as it knows itself.
#[derive(Clone, Copy, Debug)]
pub struct Own<'a, W> {
    /// Its id.
    pub worker: u64,
    /// Its message queue.
    pub mailbox: u32,
    /// Its entry's number; a new entry has the next one.
    pub seating: u32,
    /// The permits that its requests hold.
    pub holding: u32,
    /// Those of its requests that wait as far as it knows, by their numbers: in order of arrival.
    pub waiting: &'a BTreeMap<u64, Waiter<W>>,
}

/// What came of a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Done<R> {
    /// The change's own result.
    pub result: R,
    /// Who has permits now.
    pub grants: Vec<Grant>,
    /// Whether the worker's entry had to be made first: messages under an earlier one are void.
    pub new_entry: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    entries: Vec<Entry>,
    probes: VecDeque<Ticket>,
    waiting: VecDeque<Ticket>,
}

/// One worker's part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    worker: u64,
    seating: u32,
    mailbox: u32,
    running: u32,
    /// Since when the worker is believed to be gone, by the raw clock.
    gone_since_ns: Option<u64>,
}

impl State {
    fn running(&self) -> u32 {
        self.entries.iter().fold(0, |sum, entry| sum.saturating_add(entry.running))
    }

    fn entry(&mut self, worker: u64) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|entry| entry.worker == worker)
    }

    /// The worker does something, so it lives. If it has no entry, the permits that its requests hold are taken again, beyond
    /// the limit if need be, and those who wait stand at the end.
    fn sit_down<W>(&mut self, own: &Own<'_, W>) -> Seated {
        if let Some(entry) = self.entry(own.worker) {
            entry.mailbox = own.mailbox;
            let believed_gone = entry.gone_since_ns.take().is_some();
            return if believed_gone { Seated::Again } else { Seated::Already };
        }
        self.entries.push(Entry {
            worker: own.worker,
            seating: own.seating.wrapping_add(1),
            mailbox: own.mailbox,
            running: own.holding,
            gone_since_ns: None,
        });
        for (&number, waiter) in own.waiting {
            self.line(waiter.line).push_back(Ticket { worker: own.worker, number });
        }
        Seated::Anew
    }

    fn line(&mut self, line: Line) -> &mut VecDeque<Ticket> {
        match line {
            Line::Probes => &mut self.probes,
            Line::Requests => &mut self.waiting,
        }
    }

    fn release(&mut self, worker: u64) {
        if let Some(entry) = self.entry(worker) {
            entry.running = entry.running.saturating_sub(1);
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

    /// Free permits go to those who have waited longest, to probes first.
    fn grant(&mut self, concurrency: u32) -> Vec<Grant> {
        let mut grants = Vec::new();
        let mut running = self.running();
        while running < concurrency
            && let Some(ticket) = self.probes.pop_front().or_else(|| self.waiting.pop_front())
        {
            if let Some(entry) = self.entry(ticket.worker) {
                entry.running = entry.running.saturating_add(1);
                running = running.saturating_add(1);
                grants.push(Grant { ticket, seating: entry.seating, mailbox: entry.mailbox });
            }
        }
        grants
    }
}

/// The store did not take a change. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contended;

/// How a worker came by its entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seated {
    Already,
    /// It was believed to be gone.
    Again,
    Anew,
}

/// Whether a change left everything as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Changed {
    Yes,
    No,
}

/// Which permits a change gives to those who wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Grants {
    /// All that are free afterwards.
    Free,
    None,
}

/// A pod's breaker.
#[derive(Clone, Debug)]
pub struct Breaker {
    key: String,
    /// What it lets through.
    pub limits: Limits,
}

impl Breaker {
    /// The breaker whose state lies under `key`.
    pub fn new(key: String, limits: Limits) -> Self {
        Self { key, limits }
    }

    /// A request comes; should it have to wait, it does so in `line` as `number`.
    ///
    /// # Errors
    /// [`Contended`].
    pub fn enter<W>(
        &self,
        store: &impl Store,
        own: &Own<'_, W>,
        line: Line,
        number: u64,
    ) -> Result<Done<Answer>, Contended> {
        let Limits { concurrency, queue_depth } = self.limits;
        let places = if line == Line::Probes { MOST_WAITING_PROBES } else { queue_depth as usize };
        // Without grants: a place in the queue is no permit, not even where there is room for both.
        self.update_own(store, own, Grants::None, |state| {
            // Nobody overtakes those who wait, but for probes.
            let first = state.probes.is_empty() && (line == Line::Probes || state.waiting.is_empty());
            if first && state.running() < concurrency {
                if let Some(entry) = state.entry(own.worker) {
                    entry.running = entry.running.saturating_add(1);
                }
                return (Answer::Admitted, Changed::Yes);
            }
            if state.line(line).len() >= places {
                return (Answer::Full, Changed::No);
            }
            state.line(line).push_back(Ticket { worker: own.worker, number });
            (Answer::Queued, Changed::Yes)
        })
    }

    /// A request that held a permit is done: `true`, and the permit goes to others. Unless `must_linger` says that the app
    /// may still be at work on the request: then the permit stays taken, and `false` asks for another call later. It is asked
    /// only while more than half of the permits are taken: otherwise it would be long until the app could see one too many.
    ///
    /// # Errors
    /// [`Contended`]; the permit is still taken.
    pub fn leave<W>(
        &self,
        store: &impl Store,
        own: &Own<'_, W>,
        mut must_linger: impl FnMut() -> bool,
    ) -> Result<Done<bool>, Contended> {
        self.update_own(store, own, Grants::Free, |state| {
            let wait = !state.waiting.is_empty() || !state.probes.is_empty();
            let crowded = wait || state.running() > self.limits.concurrency / 2;
            if crowded && must_linger() {
                return (false, Changed::No);
            }
            state.release(own.worker);
            (true, Changed::Yes)
        })
    }

    /// A waiting request gives up. If it had been given a permit meanwhile, that goes to others.
    ///
    /// # Errors
    /// [`Contended`]; it still waits.
    pub fn abandon<W>(
        &self,
        store: &impl Store,
        own: &Own<'_, W>,
        number: u64,
    ) -> Result<Done<()>, Contended> {
        let ticket = Ticket { worker: own.worker, number };
        self.update_own(store, own, Grants::Free, |state| {
            let before = state.probes.len() + state.waiting.len();
            state.keep_tickets(|waiting| *waiting != ticket);
            if state.probes.len() + state.waiting.len() == before {
                state.release(own.worker);
            }
            ((), Changed::Yes)
        })
    }

    /// Makes the worker's entry say what the worker knows: what it does not know of holds no permit and does not wait. The
    /// numbers of those who wait, as it believes, and have permits.
    ///
    /// # Errors
    /// [`Contended`].
    pub fn settle<W>(&self, store: &impl Store, own: &Own<'_, W>) -> Result<Done<Vec<u64>>, Contended> {
        self.update_own(store, own, Grants::Free, |state| {
            let mut still = Vec::new();
            let mut strangers = false;
            for ticket in state.probes.iter().chain(&state.waiting).filter(|t| t.worker == own.worker) {
                match own.waiting.contains_key(&ticket.number) {
                    true => still.push(ticket.number),
                    false => strangers = true,
                }
            }
            if strangers {
                state.keep_tickets(|ticket| {
                    ticket.worker != own.worker || own.waiting.contains_key(&ticket.number)
                });
            }
            still.sort_unstable();
            let granted: Vec<u64> =
                own.waiting.keys().filter(|number| still.binary_search(number).is_err()).copied().collect();
            let running = own.holding.saturating_add(u32::try_from(granted.len()).unwrap_or(u32::MAX));
            let wrong = state.entry(own.worker).is_some_and(|entry| entry.running != running);
            if let Some(entry) = state.entry(own.worker) {
                entry.running = running;
            }
            (granted, if wrong || strangers { Changed::Yes } else { Changed::No })
        })
    }

    /// A worker ends: its permits go to others, its tickets are void.
    ///
    /// # Errors
    /// [`Contended`]; to be tried again.
    pub fn forget(&self, store: &impl Store, worker: u64) -> Result<Vec<Grant>, Contended> {
        let (_, grants) = self.update(store, Grants::Free, |state| {
            state.remove(worker);
            ((), Changed::Yes)
        })?;
        Ok(grants)
    }

    /// Another worker is believed to be gone, now by the raw clock. It is forgotten if it has done nothing here for
    /// [`PATIENCE_NS`] since this was said first; `None`: not yet.
    ///
    /// # Errors
    /// [`Contended`]; to be tried again.
    pub fn forget_late(
        &self,
        store: &impl Store,
        worker: u64,
        now_ns: u64,
    ) -> Result<Option<Vec<Grant>>, Contended> {
        let (gone, grants) = self.update(store, Grants::Free, |state| {
            let Some(entry) = state.entry(worker) else { return (true, Changed::No) };
            match entry.gone_since_ns {
                Some(since_ns) if now_ns.saturating_sub(since_ns) < PATIENCE_NS => (false, Changed::No),
                Some(_) => {
                    state.remove(worker);
                    (true, Changed::Yes)
                }
                None => {
                    entry.gone_since_ns = Some(now_ns);
                    (false, Changed::Yes)
                }
            }
        })?;
        Ok(gone.then_some(grants))
    }

    /// Whether a worker has an entry.
    #[cfg(test)]
    pub(crate) fn has_entry(&self, store: &impl Store, worker: u64) -> bool {
        self.read(store).0.entry(worker).is_some()
    }

    /// Requests in the app and requests that wait, probes included.
    pub fn depth(&self, store: &impl Store) -> (u64, u64) {
        let (state, _) = self.read(store);
        (u64::from(state.running()), (state.probes.len() + state.waiting.len()) as u64)
    }

    fn read(&self, store: &impl Store) -> (State, Expect) {
        match store.get(&self.key) {
            None => (State::default(), Expect::Absent),
            // What cannot be read cannot be waited for either: begin anew.
            Some((bytes, version)) => {
                (bincode::deserialize(&bytes).unwrap_or_default(), Expect::Version(version))
            }
        }
    }

    fn update_own<R, W>(
        &self,
        store: &impl Store,
        own: &Own<'_, W>,
        which: Grants,
        mut change: impl FnMut(&mut State) -> (R, Changed),
    ) -> Result<Done<R>, Contended> {
        let ((result, new_entry), grants) = self.update(store, which, |state| {
            let seated = state.sit_down(own);
            let (result, changed) = change(state);
            let changed = if seated == Seated::Already { changed } else { Changed::Yes };
            ((result, seated == Seated::Anew), changed)
        })?;
        Ok(Done { result, grants, new_entry })
    }

    /// Changes the state, and grants in the same write.
    fn update<R>(
        &self,
        store: &impl Store,
        which: Grants,
        mut change: impl FnMut(&mut State) -> (R, Changed),
    ) -> Result<(R, Vec<Grant>), Contended> {
        for _ in 0..ATTEMPTS {
            let (mut state, expect) = self.read(store);
            let (result, changed) = change(&mut state);
            let grants = match which {
                Grants::Free => state.grant(self.limits.concurrency),
                Grants::None => Vec::new(),
            };
            if changed == Changed::No && grants.is_empty() {
                return Ok((result, grants));
            }
            // Not measured first: this is done twice a request.
            let mut bytes = Vec::with_capacity(ROOM);
            let written = bincode::serialize_into(&mut bytes, &state).is_ok();
            if written && store.set(&self.key, &bytes, expect) {
                return Ok((result, grants));
            }
        }
        Err(Contended)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::pod::tests::{Dice, Map};

    const ONE: Limits = Limits { concurrency: 1, queue_depth: 2 };

    fn breaker(limits: Limits) -> Breaker {
        Breaker::new("b".into(), limits)
    }

    /// A worker that has nothing but what its entry has; its queue's number is its id and a hundred.
    fn own(worker: u64) -> Own<'static, ()> {
        static NOBODY: BTreeMap<u64, Waiter<()>> = BTreeMap::new();
        let mailbox = u32::try_from(worker).unwrap() + 100;
        Own { worker, mailbox, seating: 0, holding: 0, waiting: &NOBODY }
    }

    fn enter(breaker: &Breaker, store: &Map, worker: u64, number: u64) -> Answer {
        breaker.enter(store, &own(worker), Line::Requests, number).unwrap().result
    }

    fn leave(breaker: &Breaker, store: &Map, worker: u64) -> Vec<Grant> {
        breaker.leave(store, &own(worker), || false).unwrap().grants
    }

    fn abandon(breaker: &Breaker, store: &Map, ticket: Ticket) -> Vec<Grant> {
        breaker.abandon(store, &own(ticket.worker), ticket.number).unwrap().grants
    }

    #[test]
    fn one_runs_some_wait_in_order_and_one_more_is_turned_away() {
        let (store, breaker) = (Map::default(), breaker(ONE));
        let enter = |worker, number| enter(&breaker, &store, worker, number);
        assert_eq!(enter(1, 0), Answer::Admitted);
        assert_eq!(enter(2, 0), Answer::Queued);
        assert_eq!(enter(1, 1), Answer::Queued);
        assert_eq!(enter(3, 0), Answer::Full);
        assert_eq!(breaker.depth(&store), (1, 2));
        let second = Grant { ticket: Ticket { worker: 2, number: 0 }, seating: 1, mailbox: 102 };
        assert_eq!(leave(&breaker, &store, 1), [second]);
        assert_eq!(enter(3, 0), Answer::Queued, "a place in the queue, not the permit");
        let third = Grant { ticket: Ticket { worker: 1, number: 1 }, seating: 1, mailbox: 101 };
        assert_eq!(leave(&breaker, &store, 2), [third]);
    }

    #[test]
    fn probes_take_permits_and_are_served_first_and_a_fifth_is_turned_away() {
        let (store, breaker) = (Map::default(), breaker(ONE));
        let probe =
            |worker, number| breaker.enter(&store, &own(worker), Line::Probes, number).unwrap().result;
        assert_eq!(probe(1, 0), Answer::Admitted);
        assert_eq!(enter(&breaker, &store, 2, 0), Answer::Queued, "the probe has the permit");
        assert_eq!(enter(&breaker, &store, 2, 1), Answer::Queued);
        assert_eq!(enter(&breaker, &store, 2, 2), Answer::Full);
        for number in 1..=4 {
            assert_eq!(probe(1, number), Answer::Queued, "a full queue keeps no probe out");
        }
        assert_eq!(probe(1, 5), Answer::Full);
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
        // Number 2 is granted, and gives up before it knows.
        assert_eq!(leave(&breaker, &store, 1).len(), 1);
        assert_eq!(abandon(&breaker, &store, ticket(2)), []);
        assert_eq!(breaker.depth(&store), (0, 0));
    }

    #[test]
    fn the_permits_of_a_worker_that_ends_go_to_others_at_once() {
        let (store, breaker) = (Map::default(), breaker(Limits { concurrency: 2, queue_depth: 10 }));
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
        let gone = |now_ns| breaker.forget_late(&store, 1, now_ns).unwrap().is_some();
        assert!(!gone(5) && !gone(4 + PATIENCE_NS));
        let holding = Own { holding: 1, ..own(1) };
        assert_eq!(breaker.settle(&store, &holding).unwrap().grants, []);
        assert!(!gone(5 + PATIENCE_NS) && !gone(4 + 2 * PATIENCE_NS));
        assert_eq!(breaker.depth(&store), (1, 0));
        assert!(gone(5 + 2 * PATIENCE_NS) && gone(6 + 2 * PATIENCE_NS));
        assert_eq!(breaker.depth(&store), (0, 0));
    }

    #[test]
    fn a_permit_lingers_only_while_the_app_is_half_full() {
        let (store, breaker) = (Map::default(), breaker(Limits { concurrency: 4, queue_depth: 0 }));
        for number in 0..3 {
            enter(&breaker, &store, 1, number);
        }
        let left = |lingers: bool| breaker.leave(&store, &own(1), || lingers).unwrap().result;
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
        let wider = breaker(Limits { concurrency: 3, queue_depth: 2 });
        assert_eq!(leave(&wider, &store, 1).len(), 2);
    }

    /// Random requests on four workers against one queue in plain memory: the same requests get
    /// in, in the same order, never one more than allowed.
    #[test]
    fn it_does_what_one_queue_would_do() {
        for seed in 0..200 {
            let mut dice = Dice(seed);
            let (store, breaker) = (Map::default(), breaker(Limits { concurrency: 3, queue_depth: 5 }));
            let (mut running, mut queue) = (Vec::new(), VecDeque::new());
            let mut pending = HashMap::new();
            for number in 0..400 {
                let worker = dice.roll(4);
                if dice.roll(2) == 0 {
                    let expected = match (running.len(), queue.len()) {
                        (..3, 0) => Answer::Admitted,
                        (_, ..5) => Answer::Queued,
                        _ => Answer::Full,
                    };
                    assert_eq!(enter(&breaker, &store, worker, number), expected, "seed {seed}");
                    match expected {
                        Answer::Admitted => running.push(worker),
                        Answer::Queued => {
                            queue.push_back(Ticket { worker, number });
                            pending.insert(number, worker);
                        }
                        Answer::Full => {}
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
        let limits = Limits { concurrency: 3, queue_depth: 0 };
        std::thread::scope(|scope| {
            for worker in 0..4 {
                let (store, now, done) = (&store, &now, &done);
                scope.spawn(move || {
                    let breaker = breaker(limits);
                    for number in 0..2_000 {
                        if enter(&breaker, store, worker, number) == Answer::Admitted {
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
