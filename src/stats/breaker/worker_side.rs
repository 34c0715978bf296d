//! One worker's side of the breaker: how many permits its requests hold, and which of its requests
//! wait.
//!
//! With every operation on the breaker, the worker passes its own view of itself. So a worker that
//! was declared dead and forgotten, because it was slow for longer than [`PATIENCE_NS`], needs no
//! special step to come back: its first operation makes a new entry with the permits that its
//! requests do hold. Messages under the previous entry are void: their permits went to others.

use std::collections::BTreeMap;

use crate::breaker::rules::{
    Breaker, EnterOutcome, LocalView, PATIENCE_NS, PermitGrant, Queue, Update, Waiter,
};
use crate::counting::time::MonotonicNs;
use crate::pod::store::{Store, StoreError};

/// A worker's side of the breaker. `W` is the owner's data about a waiting request.
#[derive(Debug)]
pub struct WorkerSide<W> {
    /// The breaker that this side belongs to.
    pub breaker: Breaker,
    /// The worker's mailbox: its message queue.
    pub mailbox: u32,
    worker: u64,
    entry_number: u32,
    permits: u32,
    waiting: BTreeMap<u64, Waiter<W>>,
    next_number: u64,
    reconciled: MonotonicNs,
}

/// The outcome of an operation: requests of this worker that go on, and permits of other workers'
/// requests, of which those workers have to be informed.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome<W> {
    /// The requests that hold permits now.
    pub admitted: Vec<W>,
    /// Granting to post to the mailboxes of their workers ([`PermitGrant::message`]). If a message
    /// is lost, its worker finds the permit at its next [`WorkerSide::reconcile`].
    pub grants: Vec<PermitGrant>,
}

impl<W> Default for Outcome<W> {
    fn default() -> Self {
        Self { admitted: Vec::new(), grants: Vec::new() }
    }
}

impl PermitGrant {
    /// Returns the message for the worker of the request.
    pub fn message(&self) -> [u8; 12] {
        let mut message = [0; 12];
        let (number, entry_number) = message.split_at_mut(8);
        number.copy_from_slice(&self.ticket.number.to_le_bytes());
        entry_number.copy_from_slice(&self.entry_number.to_le_bytes());
        message
    }
}

impl<W> WorkerSide<W> {
    /// Returns the side of `worker` ([`crate::pod::member::Member`]).
    pub fn new(breaker: Breaker, worker: u64, mailbox: u32) -> Self {
        Self {
            breaker,
            mailbox,
            worker,
            entry_number: 0,
            permits: 0,
            waiting: BTreeMap::new(),
            next_number: 0,
            reconciled: MonotonicNs::default(),
        }
    }

    /// Admits a request, or queues it, or turns it away. If the request has to wait, the result of
    /// `waiter` for its number is kept.
    pub fn enter(
        &mut self,
        store: &impl Store,
        queue: Queue,
        now: MonotonicNs,
        waiter: impl FnOnce(u64) -> W,
    ) -> EnterOutcome {
        let number = self.next_number;
        self.next_number += 1;
        // If the store does not answer, nobody knows whether there is capacity.
        let Ok(done) = self.breaker.enter(store, &self.local(), queue, number) else {
            return EnterOutcome::Full;
        };
        let answer = done.result;
        self.take_over(Ok(done));
        match answer {
            EnterOutcome::Admitted => self.permits = self.permits.saturating_add(1),
            EnterOutcome::Queued => {
                self.waiting.insert(number, Waiter { queue, since: now, data: waiter(number) });
            }
            EnterOutcome::Full => {}
        }
        answer
    }

    /// Releases the permit of a finished request. Returns the outcome, and whether the permit stays
    /// taken for now ([`Breaker::leave`]). Other requests may be admitted in that case, too.
    pub fn leave(&mut self, store: &impl Store, must_linger: impl FnMut() -> bool) -> (Outcome<W>, bool) {
        if self.permits == 0 {
            // This worker has ended and has released everything.
            return (Outcome::default(), false);
        }
        let left = self.breaker.leave(store, &self.local(), must_linger);
        let lingers = matches!(left, Ok(Update { result: false, .. }));
        if !lingers {
            self.permits = self.permits.saturating_sub(1);
        }
        (self.take_over(left), lingers)
    }

    /// Ends the wait of a request. Returns its data, unless the request had already been admitted.
    pub fn abandon(&mut self, store: &impl Store, number: u64) -> Option<(W, Outcome<W>)> {
        if !self.waiting.contains_key(&number) {
            return None;
        }
        let abandoned = self.breaker.abandon(store, &self.local(), number);
        let waiter = self.waiting.remove(&number)?;
        Some((waiter.data, self.take_over(abandoned)))
    }

    /// Handles a message. Returns the request that it admits.
    pub fn receive(&mut self, message: &[u8]) -> Option<W> {
        let (number, entry_number) = message.split_first_chunk()?;
        let entry_number = <[u8; 4]>::try_from(entry_number).ok()?;
        // If the number is unknown here, its permit has been released already, or is released when
        // this side is reconciled.
        if u32::from_le_bytes(entry_number) == self.entry_number {
            self.admit(u64::from_le_bytes(*number))
        } else {
            None
        }
    }

    /// Reconciles this side with the breaker. To be called at each tick, and before messages are
    /// read if [`WorkerSide::may_be_forgotten`]. Finds permits whose messages were lost, and
    /// releases those that no request here holds.
    pub fn reconcile(&mut self, store: &impl Store, now: MonotonicNs) -> Outcome<W> {
        self.reconciled = now;
        if self.entry_number == 0 {
            return Outcome::default();
        }
        let Ok(mut done) = self.breaker.reconcile(store, &self.local()) else { return Outcome::default() };
        let granted = std::mem::take(&mut done.result);
        let mut outcome = self.take_over(Ok(done));
        outcome.admitted.extend(granted.into_iter().filter_map(|number| self.admit(number)));
        outcome
    }

    /// Returns whether this worker may have been forgotten since it reconciled.
    pub fn may_be_forgotten(&self, now: MonotonicNs) -> bool {
        now.since(self.reconciled) >= PATIENCE_NS
    }

    /// Forgets another worker that is believed to be gone ([`Breaker::forget_if_silent`]). Returns
    /// `None` while it is too early.
    pub fn forget_if_silent(
        &mut self,
        store: &impl Store,
        worker: u64,
        now: MonotonicNs,
    ) -> Option<Outcome<W>> {
        let grants = self.breaker.forget_if_silent(store, worker, now).ok()??;
        Some(self.deliver(grants))
    }

    /// Ends this worker: its permits go to others at once. Returns its waiting requests.
    pub fn close(&mut self, store: &impl Store) -> (Vec<W>, Vec<PermitGrant>) {
        let grants = match self.entry_number {
            0 => Vec::new(),
            // If this fails, the leader does it later.
            _ => self.breaker.forget(store, self.worker).unwrap_or_default(),
        };
        self.permits = 0;
        let waiting = std::mem::take(&mut self.waiting);
        (waiting.into_values().map(|waiter| waiter.data).collect(), grants)
    }

    /// Returns when the oldest waiting request began to wait.
    pub fn oldest(&self) -> Option<MonotonicNs> {
        self.waiting.values().next().map(|waiter| waiter.since)
    }

    /// Returns the numbers of the requests that began to wait at `latest` or before.
    pub fn waiting_since(&self, latest: MonotonicNs) -> Vec<u64> {
        self.waiting.iter().take_while(|(_, w)| w.since <= latest).map(|(number, _)| *number).collect()
    }

    fn local(&self) -> LocalView<'_, W> {
        LocalView {
            worker: self.worker,
            mailbox: self.mailbox,
            entry_number: self.entry_number,
            permits: self.permits,
            waiting: &self.waiting,
        }
    }

    /// Applies the outcome of a change. If the store did not take the change, the breaker's value
    /// has a permit or a waiting request too many for this worker until the side is reconciled.
    fn take_over<R>(&mut self, change: Result<Update<R>, StoreError>) -> Outcome<W> {
        let Ok(done) = change else { return Outcome::default() };
        if done.new_entry {
            self.entry_number = self.entry_number.wrapping_add(1);
        }
        self.deliver(done.grants)
    }

    fn deliver(&mut self, grants: Vec<PermitGrant>) -> Outcome<W> {
        let mut outcome = Outcome::default();
        for grant in grants {
            if grant.ticket.worker == self.worker {
                outcome.admitted.extend(self.admit(grant.ticket.number));
            } else {
                outcome.grants.push(grant);
            }
        }
        outcome
    }

    fn admit(&mut self, number: u64) -> Option<W> {
        let waiter = self.waiting.remove(&number)?;
        self.permits = self.permits.saturating_add(1);
        Some(waiter.data)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::breaker::rules::BreakerLimits;
    use crate::testing::{Dice, Map};

    const SECOND: u64 = 1_000_000_000;
    const LIMITS: BreakerLimits = BreakerLimits { concurrency: 3, queue_depth: 8 };

    fn breaker() -> Breaker {
        Breaker::new("b".into(), LIMITS)
    }

    /// A worker whose side is right if it knows of as many permits as the worker has requests in
    /// the app.
    struct Worker {
        side: WorkerSide<u64>,
        mail: Vec<[u8; 12]>,
        in_app: u32,
        waiting: BTreeSet<u64>,
        stalled_ns: Option<u64>,
        /// Whether it is no longer a member and has not ticked since.
        departed: bool,
    }

    struct World {
        dice: Dice,
        store: Map,
        now_ns: u64,
        workers: Vec<Worker>,
        /// Permits that were given to others although their requests were in the app.
        beyond: u32,
        seed: u64,
    }

    impl World {
        fn new(seed: u64) -> Self {
            let mut world = Self {
                dice: Dice(seed),
                store: Map::default(),
                now_ns: SECOND,
                workers: Vec::new(),
                beyond: 0,
                seed,
            };
            for id in 0..3 {
                world.workers.push(world.worker(id));
            }
            world
        }

        fn worker(&self, id: u64) -> Worker {
            Worker {
                side: WorkerSide::new(breaker(), id + 1, id as u32),
                mail: Vec::new(),
                in_app: 0,
                waiting: BTreeSet::new(),
                stalled_ns: None,
                departed: false,
            }
        }

        fn take(&mut self, at: usize, outcome: Outcome<u64>) {
            for number in outcome.admitted {
                assert!(
                    self.workers[at].waiting.remove(&number),
                    "seed {}: {number} did not wait",
                    self.seed
                );
                self.workers[at].in_app += 1;
            }
            for grant in outcome.grants {
                self.workers[grant.mailbox as usize].mail.push(grant.message());
            }
        }

        fn tick(&mut self, at: usize) {
            self.workers[at].departed = false;
            let outcome = self.workers[at].side.reconcile(&self.store, MonotonicNs(self.now_ns));
            self.take(at, outcome);
        }

        fn read_mail(&mut self, at: usize, message: [u8; 12]) {
            if self.workers[at].side.may_be_forgotten(MonotonicNs(self.now_ns)) {
                self.tick(at);
            }
            let admitted = self.workers[at].side.receive(&message);
            self.take(at, Outcome { admitted: admitted.into_iter().collect(), ..Outcome::default() });
        }

        fn finish(&mut self, at: usize, linger: bool) {
            let (outcome, lingers) = self.workers[at].side.leave(&self.store, || linger);
            self.workers[at].in_app -= u32::from(!lingers);
            self.take(at, outcome);
        }

        /// Lets one worker do something.
        fn act(&mut self, at: usize) {
            match self.dice.roll(8) {
                0..3 => {
                    let queue = if self.dice.roll(5) == 0 { Queue::Probes } else { Queue::Requests };
                    let worker = &mut self.workers[at];
                    let waiting = &mut worker.waiting;
                    let waiter = |number| {
                        assert!(waiting.insert(number));
                        number
                    };
                    let now = MonotonicNs(self.now_ns);
                    if worker.side.enter(&self.store, queue, now, waiter) == EnterOutcome::Admitted {
                        worker.in_app += 1;
                    }
                }
                3..5 if self.workers[at].in_app > 0 => {
                    let linger = self.dice.roll(4) == 0;
                    self.finish(at, linger);
                }
                5 if !self.workers[at].waiting.is_empty() => {
                    let number = *self.workers[at].waiting.first().unwrap();
                    if let Some((gone, outcome)) = self.workers[at].side.abandon(&self.store, number) {
                        assert!(self.workers[at].waiting.remove(&gone));
                        self.take(at, outcome);
                    }
                }
                6 if !self.workers[at].mail.is_empty() => {
                    let which = self.dice.roll(self.workers[at].mail.len() as u64) as usize;
                    let message = self.workers[at].mail.remove(which);
                    // Some messages are lost.
                    if self.dice.roll(8) > 0 {
                        self.read_mail(at, message);
                    }
                }
                7 => self.tick(at),
                _ => {}
            }
            self.check();
        }

        /// Lets the leader clean up after departed workers.
        fn lead(&mut self, leader: usize) {
            for at in 0..self.workers.len() {
                let worker = &self.workers[at];
                if !worker.departed || at == leader {
                    continue;
                }
                let (id, in_app) = (at as u64 + 1, worker.in_app);
                let had_entry = self.workers[leader].side.breaker.has_entry(&self.store, id);
                let now = MonotonicNs(self.now_ns);
                if let Some(outcome) = self.workers[leader].side.forget_if_silent(&self.store, id, now) {
                    self.beyond += if had_entry { in_app } else { 0 };
                    self.take(leader, outcome);
                }
            }
        }

        fn check(&self) {
            let in_app: u32 = self.workers.iter().map(|worker| worker.in_app).sum();
            let most = LIMITS.concurrency + self.beyond;
            assert!(in_app <= most, "seed {}: {in_app} in the app, {} beyond", self.seed, self.beyond);
            let (running, _) = self.workers[0].side.breaker.depth(&self.store);
            assert!(self.beyond > 0 || running <= LIMITS.concurrency.into(), "seed {}", self.seed);
        }

        /// Lets workers act, stall for at most `longest_stall_ns`, lose their membership, and come
        /// back.
        fn run(&mut self, steps: u32, longest_stall_ns: u64) {
            for _ in 0..steps {
                self.now_ns += self.dice.roll(SECOND / 20);
                let at = self.dice.roll(3) as usize;
                match self.workers[at].stalled_ns {
                    Some(since_ns) => {
                        let stalled_ns = self.now_ns - since_ns;
                        self.workers[at].departed |= stalled_ns > SECOND / 4;
                        if stalled_ns + SECOND / 5 > longest_stall_ns {
                            self.wake(at);
                        }
                    }
                    None if longest_stall_ns > 0 && self.dice.roll(60) == 0 => {
                        self.tick(at);
                        self.workers[at].stalled_ns = Some(self.now_ns);
                    }
                    None => self.act(at),
                }
                let leader = self.dice.roll(3) as usize;
                if self.workers[leader].stalled_ns.is_none() {
                    self.lead(leader);
                }
                let late = |w: &Worker| {
                    w.stalled_ns.is_some_and(|at| self.now_ns - at + SECOND / 5 > longest_stall_ns)
                };
                let late: Vec<usize> = (0..3).filter(|at| late(&self.workers[*at])).collect();
                late.into_iter().for_each(|at| self.wake(at));
            }
            for at in 0..3 {
                self.wake(at);
            }
        }

        /// Wakes a stalled worker. Its timer is overdue, so it ticks only after a few events from
        /// its sockets.
        fn wake(&mut self, at: usize) {
            if self.workers[at].stalled_ns.take().is_some() {
                for _ in 0..self.dice.roll(4) {
                    self.act(at);
                }
                self.tick(at);
            }
        }

        /// Lets everything end: no request waits for ever, and no permit is left.
        fn drain(&mut self) {
            for _ in 0..1_000 {
                for at in 0..3 {
                    for message in std::mem::take(&mut self.workers[at].mail) {
                        self.read_mail(at, message);
                    }
                    self.tick(at);
                    if self.workers[at].in_app > 0 {
                        self.finish(at, false);
                    }
                }
                self.check();
            }
            let left: Vec<_> = self.workers.iter().map(|w| (w.in_app, w.waiting.len())).collect();
            assert_eq!(left, [(0, 0); 3], "seed {}", self.seed);
            assert_eq!(breaker().depth(&self.store), (0, 0), "seed {}", self.seed);
            self.beyond = 0;
        }
    }

    #[test]
    fn a_worker_that_stalls_for_less_than_the_patience_keeps_its_permits() {
        for seed in 0..150 {
            let mut world = World::new(seed);
            world.run(1_500, PATIENCE_NS);
            assert_eq!(world.beyond, 0, "seed {seed}");
            world.drain();
        }
    }

    #[test]
    fn a_worker_that_comes_back_after_it_was_forgotten_loses_and_doubles_no_permit() {
        let mut forgotten = 0;
        for seed in 0..150 {
            let mut world = World::new(seed);
            world.run(1_500, 3 * PATIENCE_NS);
            forgotten += world.beyond;
            world.drain();
            // From here on, as if nothing had happened.
            world.run(300, 0);
            world.drain();
        }
        assert!(forgotten > 100, "{forgotten} permits were given away");
    }

    #[test]
    fn the_permits_of_a_dead_worker_come_back() {
        for seed in 0..50 {
            let mut world = World::new(seed);
            world.run(300, 0);
            // A trap: the worker informs nobody.
            world.workers[2].departed = true;
            world.workers[2].in_app = 0;
            world.workers[2].waiting.clear();
            world.lead(0);
            world.now_ns += PATIENCE_NS - 1;
            world.lead(1);
            let entry = |world: &World| breaker().has_entry(&world.store, 3);
            let had_entry = entry(&world);
            world.now_ns += 1;
            world.lead(1);
            assert!(!entry(&world), "seed {seed}");
            assert!(had_entry || seed > 0, "it is waited for");
            world.workers[2] = world.worker(2);
            world.workers[2].side = WorkerSide::new(breaker(), 4, 2);
            world.drain();
        }
    }

    #[test]
    fn a_message_under_an_entry_that_is_gone_admits_nobody() {
        let store = Map::default();
        let mut first = WorkerSide::new(breaker(), 1, 0);
        let mut second = WorkerSide::new(breaker(), 2, 1);
        for _ in 0..3 {
            assert_eq!(first.enter(&store, Queue::Requests, MonotonicNs(0), |n| n), EnterOutcome::Admitted);
        }
        assert_eq!(second.enter(&store, Queue::Requests, MonotonicNs(0), |n| n), EnterOutcome::Queued);
        let granted = first.leave(&store, || false).0.grants;
        // The message has not been read; its worker is forgotten, and the permit goes to another
        // request.
        assert_eq!(first.forget_if_silent(&store, 2, MonotonicNs(SECOND)), None);
        assert!(first.forget_if_silent(&store, 2, MonotonicNs(SECOND + PATIENCE_NS)).is_some());
        assert_eq!(first.enter(&store, Queue::Requests, MonotonicNs(0), |n| n), EnterOutcome::Admitted);
        assert_eq!(second.reconcile(&store, MonotonicNs(SECOND + PATIENCE_NS)), Outcome::default());
        assert_eq!(second.receive(&granted[0].message()), None);
        assert_eq!(second.receive(b"too short"), None);
        assert_eq!(breaker().depth(&store), (3, 1));
        let granted = first.leave(&store, || false).0.grants;
        assert_eq!(second.receive(&granted[0].message()), Some(0));
        second.leave(&store, || false);
        assert_eq!(breaker().depth(&store), (2, 0));
    }

    #[test]
    fn a_permit_that_lingers_keeps_no_free_one_from_those_who_wait() {
        let store = Map::default();
        let mut side = WorkerSide::new(breaker(), 1, 0);
        for _ in 0..3 {
            assert_eq!(side.enter(&store, Queue::Requests, MonotonicNs(0), |n| n), EnterOutcome::Admitted);
        }
        assert_eq!(side.enter(&store, Queue::Requests, MonotonicNs(0), |n| n), EnterOutcome::Queued);
        // Another configuration allows more. The first operation that sees it is the end of a
        // request that was broken off.
        side.breaker.limits.concurrency = 4;
        let (outcome, lingers) = side.leave(&store, || true);
        assert_eq!((outcome.admitted, lingers), (vec![3], true));
        for _ in 0..4 {
            assert!(!side.leave(&store, || false).1);
        }
        assert_eq!(breaker().depth(&store), (0, 0));
    }

    #[test]
    fn a_permit_that_nobody_knows_of_is_given_back() {
        let store = Map::default();
        let mut lost = WorkerSide::new(breaker(), 1, 0);
        let mut other = WorkerSide::new(breaker(), 2, 1);
        for _ in 0..4 {
            lost.enter(&store, Queue::Requests, MonotonicNs(0), |n| n);
        }
        other.enter(&store, Queue::Requests, MonotonicNs(0), |n| n);
        assert_eq!(breaker().depth(&store), (3, 2));
        // This worker forgets what it had, as after a change that the store did not take.
        lost.permits = 1;
        lost.waiting.clear();
        let outcome = lost.reconcile(&store, MonotonicNs(1));
        assert_eq!(outcome.grants.iter().map(|g| g.ticket.worker).collect::<Vec<_>>(), [2]);
        assert_eq!(breaker().depth(&store), (2, 0));
    }

    #[test]
    fn the_one_that_has_waited_longest_is_known() {
        let store = Map::default();
        let mut side = WorkerSide::new(breaker(), 1, 0);
        for now_ns in 0..6 {
            side.enter(&store, Queue::Requests, MonotonicNs(now_ns), |n| n);
        }
        assert_eq!((side.oldest(), side.waiting_since(MonotonicNs(4))), (Some(MonotonicNs(3)), vec![3, 4]));
        assert_eq!(side.close(&store).0, [3, 4, 5]);
        assert_eq!((side.oldest(), breaker().depth(&store)), (None, (0, 0)));
    }
}
