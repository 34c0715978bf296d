//! The breaker: at most so many requests in the app at once, over all workers of a pod, and one queue
//! for them all (knative/serving, `pkg/queue/breaker.go`).
//!
//! Its state lies in the shared store as one value, changed by compare-and-swap: who holds how many
//! slots, and who waits, in the order of arrival. A slot that is given back goes straight to the one who
//! has waited longest, whichever worker has it; nobody can slip in between. The worker that gave it
//! tells the other by a message ([`Grant`]). Should a message be lost, the waiter finds out by itself
//! ([`Breaker::waiting`]).

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::shared::{Expect, Store};

/// Attempts at a conditional write. Each one that fails means that another worker's went through.
const ATTEMPTS: usize = 4096;

/// How much the breaker lets through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The most requests in the app at once.
    pub concurrency: u32,
    /// The most that wait.
    pub queue_depth: u32,
}

/// A waiting request: the worker that has it, and the worker's number for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket {
    /// The worker's id ([`crate::shared::Member`]).
    pub worker: u64,
    /// Counted by the worker.
    pub number: u64,
}

/// A slot that was passed on to a waiting request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// To whom.
    pub ticket: Ticket,
    /// The message queue of its worker, as that worker entered it.
    pub mailbox: u32,
}

/// What a request is told when it comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Go on; a slot is taken.
    Admitted,
    /// Wait for a grant.
    Queued,
    /// Too many wait already.
    Full,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    desks: Vec<Desk>,
    waiting: VecDeque<Ticket>,
}

/// One worker's part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Desk {
    worker: u64,
    mailbox: u32,
    running: u32,
}

impl State {
    fn running(&self) -> u32 {
        self.desks.iter().fold(0, |sum, desk| sum.saturating_add(desk.running))
    }

    fn desk(&mut self, worker: u64) -> Option<&mut Desk> {
        self.desks.iter_mut().find(|desk| desk.worker == worker)
    }

    /// The worker's desk, made if there is none.
    fn sit_down(&mut self, worker: u64, mailbox: u32) -> Option<&mut Desk> {
        if self.desk(worker).is_none() {
            self.desks.push(Desk { worker, mailbox, running: 0 });
        }
        let desk = self.desk(worker)?;
        desk.mailbox = mailbox;
        Some(desk)
    }

    /// Free slots go to those who have waited longest.
    fn grant(&mut self, concurrency: u32) -> Vec<Grant> {
        let mut grants = Vec::new();
        while self.running() < concurrency
            && let Some(ticket) = self.waiting.pop_front()
        {
            if let Some(desk) = self.desk(ticket.worker) {
                desk.running = desk.running.saturating_add(1);
                grants.push(Grant { ticket, mailbox: desk.mailbox });
            }
        }
        grants
    }
}

/// The store did not take a change. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contended;

/// A pod's breaker, as one worker sees it.
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

    /// A request of `worker` comes; should it have to wait, it is `number`.
    ///
    /// # Errors
    /// [`Contended`].
    pub fn enter(
        &self,
        store: &impl Store,
        worker: u64,
        mailbox: u32,
        number: u64,
    ) -> Result<Answer, Contended> {
        let Limits { concurrency, queue_depth } = self.limits;
        self.update(store, |state| {
            // Nobody overtakes those who wait.
            let answer = if state.waiting.is_empty() && state.running() < concurrency {
                Answer::Admitted
            } else if state.waiting.len() < queue_depth as usize {
                Answer::Queued
            } else {
                return Answer::Full;
            };
            if let Some(desk) = state.sit_down(worker, mailbox) {
                match answer {
                    Answer::Admitted => desk.running = desk.running.saturating_add(1),
                    _ => state.waiting.push_back(Ticket { worker, number }),
                }
            }
            answer
        })
    }

    /// As [`Breaker::leave`], unless `must_linger` says that the app may still be at work on the request: then
    /// the slot stays taken, and `None` asks for [`Breaker::leave`] later. It is asked only while more than
    /// half of the slots are taken: otherwise it would be long until the app could see one too many.
    ///
    /// # Errors
    /// [`Contended`]; the slot is still taken, so this must be tried again.
    pub fn leave_unless(
        &self,
        store: &impl Store,
        worker: u64,
        mut must_linger: impl FnMut() -> bool,
    ) -> Result<Option<Vec<Grant>>, Contended> {
        self.update(store, |state| {
            let crowded = !state.waiting.is_empty() || state.running() > self.limits.concurrency / 2;
            if crowded && must_linger() { None } else { Some(self.leave_desk(state, worker)) }
        })
    }

    /// A request of `worker` that had a slot is done. Who gets slots now.
    ///
    /// # Errors
    /// [`Contended`]; the slot is still taken, so this must be tried again.
    pub fn leave(&self, store: &impl Store, worker: u64) -> Result<Vec<Grant>, Contended> {
        self.update(store, |state| self.leave_desk(state, worker))
    }

    fn leave_desk(&self, state: &mut State, worker: u64) -> Vec<Grant> {
        if let Some(desk) = state.desk(worker) {
            desk.running = desk.running.saturating_sub(1);
        }
        state.grant(self.limits.concurrency)
    }

    /// A waiting request gives up. If it had been given a slot meanwhile, that goes to others.
    ///
    /// # Errors
    /// [`Contended`]; to be tried again.
    pub fn abandon(&self, store: &impl Store, ticket: Ticket) -> Result<Vec<Grant>, Contended> {
        self.update(store, |state| {
            match state.waiting.iter().position(|waiting| *waiting == ticket) {
                Some(position) => {
                    state.waiting.remove(position);
                }
                None => return self.leave_desk(state, ticket.worker),
            }
            state.grant(self.limits.concurrency)
        })
    }

    /// A worker is gone: its slots come back, its tickets are void.
    ///
    /// # Errors
    /// [`Contended`]; to be tried again.
    pub fn forget(&self, store: &impl Store, worker: u64) -> Result<Vec<Grant>, Contended> {
        self.update(store, |state| {
            state.desks.retain(|desk| desk.worker != worker);
            state.waiting.retain(|ticket| ticket.worker != worker);
            state.grant(self.limits.concurrency)
        })
    }

    /// A worker that was forgotten lives after all: the slots that its requests hold are taken again, beyond
    /// the limit if need be, and its waiting requests stand at the end of the queue.
    ///
    /// # Errors
    /// [`Contended`]; to be tried again.
    pub fn restore(
        &self,
        store: &impl Store,
        worker: u64,
        mailbox: u32,
        running: u32,
        waiting: &[u64],
    ) -> Result<Vec<Grant>, Contended> {
        self.update(store, |state| {
            if state.desk(worker).is_none()
                && let Some(desk) = state.sit_down(worker, mailbox)
            {
                desk.running = running;
                state.waiting.extend(waiting.iter().map(|&number| Ticket { worker, number }));
            }
            state.grant(self.limits.concurrency)
        })
    }

    /// The numbers of a worker's requests that still wait; what is not among them has been granted. `None`
    /// if the worker was forgotten.
    pub fn waiting(&self, store: &impl Store, worker: u64) -> Option<Vec<u64>> {
        let (state, _) = self.read(store);
        state.desks.iter().find(|desk| desk.worker == worker)?;
        let own = state.waiting.iter().filter(|ticket| ticket.worker == worker);
        Some(own.map(|ticket| ticket.number).collect())
    }

    /// Requests in the app and requests that wait.
    pub fn depth(&self, store: &impl Store) -> (u64, u64) {
        let (state, _) = self.read(store);
        (u64::from(state.running()), state.waiting.len() as u64)
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

    fn update<R>(&self, store: &impl Store, mut change: impl FnMut(&mut State) -> R) -> Result<R, Contended> {
        for _ in 0..ATTEMPTS {
            let (mut state, expect) = self.read(store);
            let before = (state.waiting.len(), state.running(), state.desks.len());
            let result = change(&mut state);
            let unchanged = before == (state.waiting.len(), state.running(), state.desks.len());
            // Equal sums with unequal parts only come about by passing a slot on, which changes the queue.
            if unchanged && expect != Expect::Absent {
                return Ok(result);
            }
            if bincode::serialize(&state).is_ok_and(|bytes| store.set(&self.key, &bytes, expect)) {
                return Ok(result);
            }
        }
        Err(Contended)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::shared::tests::{Dice, Map};

    const ONE: Limits = Limits { concurrency: 1, queue_depth: 2 };

    fn breaker(limits: Limits) -> Breaker {
        Breaker::new("b".into(), limits)
    }

    #[test]
    fn one_runs_some_wait_in_order_and_one_more_is_turned_away() {
        let (store, breaker) = (Map::default(), breaker(ONE));
        let enter = |worker, number| breaker.enter(&store, worker, worker as u32 + 100, number).unwrap();
        assert_eq!(enter(1, 0), Answer::Admitted);
        assert_eq!(enter(2, 0), Answer::Queued);
        assert_eq!(enter(1, 1), Answer::Queued);
        assert_eq!(enter(3, 0), Answer::Full);
        assert_eq!(breaker.depth(&store), (1, 2));
        let second = Grant { ticket: Ticket { worker: 2, number: 0 }, mailbox: 102 };
        assert_eq!(breaker.leave(&store, 1).unwrap(), [second]);
        assert_eq!(enter(3, 0), Answer::Queued, "a place in the queue, not the slot");
        let third = Grant { ticket: Ticket { worker: 1, number: 1 }, mailbox: 101 };
        assert_eq!(breaker.leave(&store, 2).unwrap(), [third]);
        assert_eq!(breaker.waiting(&store, 1), Some(vec![]), "number 1 has been granted");
        assert_eq!(breaker.waiting(&store, 3), Some(vec![0]));
        assert_eq!(breaker.waiting(&store, 9), None);
    }

    #[test]
    fn who_gives_up_frees_the_place_or_the_slot() {
        let (store, breaker) = (Map::default(), breaker(ONE));
        for number in 0..3 {
            breaker.enter(&store, 1, 7, number).unwrap();
        }
        let ticket = |number| Ticket { worker: 1, number };
        assert_eq!(breaker.abandon(&store, ticket(1)).unwrap(), []);
        assert_eq!(breaker.depth(&store), (1, 1));
        // Number 2 is granted, and gives up before it knows.
        assert_eq!(breaker.leave(&store, 1).unwrap().len(), 1);
        assert_eq!(breaker.abandon(&store, ticket(2)).unwrap(), []);
        assert_eq!(breaker.depth(&store), (0, 0));
    }

    #[test]
    fn the_slots_of_a_dead_worker_come_back() {
        let (store, breaker) = (Map::default(), breaker(Limits { concurrency: 2, queue_depth: 10 }));
        for (worker, number) in [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1)] {
            breaker.enter(&store, worker, 0, number).unwrap();
        }
        let granted: Vec<_> = breaker.forget(&store, 1).unwrap().iter().map(|g| g.ticket).collect();
        assert_eq!(granted, [Ticket { worker: 2, number: 0 }, Ticket { worker: 2, number: 1 }]);
        assert_eq!(breaker.depth(&store), (2, 0));
        // What it held can no longer be given back twice.
        assert_eq!(breaker.leave(&store, 1).unwrap(), []);
        assert_eq!(breaker.depth(&store), (2, 0));
        // It lives after all, with one request in the app and one that waits.
        breaker.restore(&store, 1, 0, 1, &[2]).unwrap();
        assert_eq!(breaker.depth(&store), (3, 1));
        assert_eq!(breaker.leave(&store, 2).unwrap(), [], "three minus one is not below two");
        assert_eq!(breaker.leave(&store, 2).unwrap().len(), 1);
    }

    #[test]
    fn a_slot_lingers_only_while_the_app_is_half_full() {
        let (store, breaker) = (Map::default(), breaker(Limits { concurrency: 4, queue_depth: 0 }));
        for number in 0..3 {
            breaker.enter(&store, 1, 0, number).unwrap();
        }
        assert_eq!(breaker.leave_unless(&store, 1, || true).unwrap(), None);
        assert_eq!(breaker.depth(&store), (3, 0));
        assert_eq!(breaker.leave_unless(&store, 1, || false).unwrap(), Some(vec![]));
        assert_eq!(
            breaker.leave_unless(&store, 1, || panic!("asked with two of four")).unwrap(),
            Some(vec![])
        );
        assert_eq!(breaker.depth(&store), (1, 0));
    }

    #[test]
    fn a_larger_limit_lets_several_go_at_once() {
        let store = Map::default();
        for number in 0..3 {
            breaker(ONE).enter(&store, 1, 0, number).unwrap();
        }
        let wider = breaker(Limits { concurrency: 3, queue_depth: 2 });
        assert_eq!(wider.leave(&store, 1).unwrap().len(), 2);
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
                    assert_eq!(breaker.enter(&store, worker, 0, number).unwrap(), expected, "seed {seed}");
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
                    breaker.abandon(&store, ticket).unwrap()
                } else if running.is_empty() {
                    continue;
                } else {
                    let worker = running.swap_remove(dice.roll(running.len() as u64) as usize);
                    breaker.leave(&store, worker).unwrap()
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
                        if breaker.enter(store, worker, 0, number).unwrap() == Answer::Admitted {
                            assert!(now.fetch_add(1, Ordering::SeqCst) < 3);
                            now.fetch_sub(1, Ordering::SeqCst);
                            done.fetch_add(1, Ordering::SeqCst);
                            breaker.leave(store, worker).unwrap();
                        }
                    }
                });
            }
        });
        assert!(done.load(Ordering::SeqCst) > 0);
        assert_eq!(breaker(limits).depth(&store), (0, 0));
    }
}
