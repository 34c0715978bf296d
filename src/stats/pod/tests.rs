use std::cell::RefCell;

use crate::counting::grid::Grid;
use crate::counting::recorder::Recorder;
use crate::counting::request::Origin;
use crate::counting::snapshot::Snapshot;
use crate::counting::time::{MonotonicNs, PodNs};
use crate::pod::leader::LeaderStep;
use crate::pod::member::Member;
use crate::pod::pod_state::{PodStore, Slot};
use crate::pod::store::{Expect, Store, StoreError};
use crate::protocol::report_delta::addition;
use crate::testing::{Dice, Map};

const PERIOD: u64 = 1_000;
const START: u64 = 1_000_000;

struct Worker {
    recorder: Recorder,
    member: Member,
    /// The part of its counts that is known if it dies without sealing its slot.
    posted: Snapshot,
}

impl Worker {
    fn new(store: &impl Store, now: u64) -> Self {
        let pod = PodStore::new("test");
        let state = pod.open(store, MonotonicNs(now), now, PERIOD, 7).unwrap();
        Self {
            recorder: Recorder::new(PodNs(now), state.grid),
            member: Member::new(pod, PodNs(now), PERIOD),
            posted: Snapshot::default(),
        }
    }

    fn tick(&mut self, store: &impl Store, now: u64) -> LeaderStep {
        self.recorder.advance(PodNs(now));
        self.member.post(store, &self.recorder).unwrap();
        self.posted = *self.recorder.closed().next_back().unwrap_or(&self.posted);
        self.member.lead(store, PodNs(now), 0).unwrap()
    }
}

fn published(step: LeaderStep) -> Snapshot {
    match step {
        LeaderStep::Published { latest, .. } => latest,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_pod_is_the_sum_of_its_workers_at_one_instant() {
    let store = Map::default();
    let (mut a, mut b) = (Worker::new(&store, START), Worker::new(&store, START));
    a.recorder.request_in(PodNs(START + 100), Origin::Direct);
    b.recorder.request_in(PodNs(START + 200), Origin::Proxied);
    b.recorder.request_out(PodNs(START + 300), Origin::Proxied);
    let first = published(a.tick(&store, START + PERIOD + 1));
    assert_eq!(first.requests, 1, "b has not joined yet");
    assert_eq!(b.tick(&store, START + PERIOD + 900), LeaderStep::Follow);
    a.recorder.advance(PodNs(START + 2 * PERIOD + 1));
    assert_eq!(
        a.tick(&store, START + 2 * PERIOD + 1),
        LeaderStep::Wait,
        "b has not closed the second boundary"
    );
    b.tick(&store, START + 2 * PERIOD + 400);
    let second = published(a.tick(&store, START + 2 * PERIOD + 401));
    assert_eq!(second.as_of_ns, START + 2 * PERIOD);
    assert_eq!((second.requests, second.proxied_requests, second.in_flight), (2, 1, 1));
    assert_eq!(second.request_ns, 1_900 + 100);
    assert_eq!(a.tick(&store, START + 2 * PERIOD + 500), LeaderStep::UpToDate);
}

#[test]
fn another_worker_leads_within_three_periods_of_the_leaders_death() {
    let store = Map::default();
    let (mut leader, mut other) = (Worker::new(&store, START), Worker::new(&store, START));
    leader.recorder.request_in(PodNs(START + 1), Origin::Direct);
    other.tick(&store, START + PERIOD);
    leader.tick(&store, START + PERIOD);
    drop(leader);
    let death = START + PERIOD;
    let mut now = death;
    let figure = loop {
        now += PERIOD / 10;
        if let LeaderStep::Published { latest, .. } = other.tick(&store, now) {
            break latest;
        }
        assert!(now <= death + 3 * PERIOD);
    };
    assert_eq!(
        (figure.requests, figure.in_flight),
        (1, 0),
        "its finished count stays, its request in flight is gone"
    );
    assert!(now > death + PERIOD, "not before it could know");
}

#[test]
fn a_leader_that_serves_hands_over_to_one_that_does_not() {
    let store = Map::default();
    let (mut busy, mut idle) = (Worker::new(&store, START), Worker::new(&store, START));
    published(busy.tick(&store, START + PERIOD));
    assert_eq!(idle.tick(&store, START + PERIOD), LeaderStep::Follow, "the first to come leads");
    busy.recorder.request_in(PodNs(START + PERIOD + 1), Origin::Direct);
    idle.tick(&store, START + 2 * PERIOD);
    published(busy.tick(&store, START + 2 * PERIOD));
    busy.tick(&store, START + 3 * PERIOD);
    assert_eq!(published(idle.tick(&store, START + 3 * PERIOD)).requests, 1);
    assert_eq!(busy.tick(&store, START + 3 * PERIOD + 1), LeaderStep::Follow);
    // This stays so. When the idle worker is gone, there is no worker to pass the lease to.
    drop(idle);
    for tenth in 31..60 {
        if let LeaderStep::Published { latest, .. } = busy.tick(&store, START + tenth * PERIOD / 10) {
            assert_eq!(latest.requests, 1);
            return;
        }
    }
    panic!("nobody led");
}

#[test]
fn a_worker_that_was_only_slow_loses_and_doubles_nothing() {
    let store = Map::default();
    let (mut slow, mut other) = (Worker::new(&store, START), Worker::new(&store, START));
    slow.recorder.request_in(PodNs(START), Origin::Direct);
    for k in 1..=2 {
        slow.tick(&store, START + k * PERIOD);
        other.tick(&store, START + k * PERIOD);
    }
    slow.recorder.request_in(PodNs(START + 2 * PERIOD + 500), Origin::Direct);
    for k in 3..=9 {
        other.tick(&store, START + k * PERIOD);
    }
    assert_eq!(other.member.pod.state(&store).unwrap().published[1].requests, 1);
    let mut third = Worker::new(&store, START + 9 * PERIOD);
    third.recorder.request_in(PodNs(START + 9 * PERIOD), Origin::Direct);
    for k in 10..=12 {
        slow.tick(&store, START + k * PERIOD);
        third.tick(&store, START + k * PERIOD);
        other.tick(&store, START + k * PERIOD);
    }
    let state = other.member.pod.state(&store).unwrap();
    let figure = state.published[1];
    assert_eq!((figure.requests, figure.in_flight), (3, 3));
    let truth = slow.recorder.closed().find(|s| s.as_of_ns == figure.as_of_ns).unwrap().request_ns
        + third.recorder.closed().find(|s| s.as_of_ns == figure.as_of_ns).unwrap().request_ns;
    assert_eq!(figure.request_ns, truth);
}

#[test]
fn what_a_slow_worker_counted_is_said_to_be_of_the_time_that_it_covers_and_the_gauges_of_the_last_period() {
    let store = Map::default();
    let (mut slow, mut other) = (Worker::new(&store, START), Worker::new(&store, START));
    for k in 1..=2 {
        slow.tick(&store, START + k * PERIOD);
        other.tick(&store, START + k * PERIOD);
    }
    for _ in 0..4 {
        slow.recorder.request_in(PodNs(START + 2 * PERIOD), Origin::Direct);
    }
    let pod = other.member.pod.clone();
    for k in 3..=9 {
        if let LeaderStep::Published { latest, .. } = other.tick(&store, START + k * PERIOD) {
            pod.acknowledge(&store, 7, &latest).unwrap();
        }
    }
    slow.tick(&store, START + 10 * PERIOD);
    let LeaderStep::Published { previous, latest, since, .. } = other.tick(&store, START + 10 * PERIOD)
    else {
        panic!("nothing published")
    };
    assert_eq!(latest.since(&previous).unwrap().average_milli(), 4_000);
    assert_eq!((since.as_of_ns, since.request_ns), (START + 2 * PERIOD, 0));
    assert_eq!(latest.since(&since).unwrap().average_milli(), 4_000);
    // The report begins there until it is acknowledged.
    assert_eq!(pod.state(&store).unwrap().reported_since(), since);
    pod.acknowledge(&store, 7, &latest).unwrap();
    assert_eq!(pod.state(&store).unwrap().reported_since(), latest);
}

#[test]
fn a_seal_that_nobody_folded_is_folded_once() {
    let store = Map::default();
    let mut worker = Worker::new(&store, START);
    worker.recorder.request_in(PodNs(START), Origin::Direct);
    worker.tick(&store, START + PERIOD);
    // A leader seals the slot and dies before it writes the state.
    let state = worker.member.pod.state(&store).unwrap();
    let (slot, expect) = worker.member.pod.read_slot(&store, state.members[0].worker);
    let sealed = Slot { sealed: true, ..slot.unwrap() };
    assert!(worker.member.pod.write_slot(&store, &sealed, expect));
    worker.recorder.request_in(PodNs(START + PERIOD + 1), Origin::Direct);
    let figure = published(worker.tick(&store, START + 2 * PERIOD));
    assert_eq!((figure.requests, figure.in_flight), (2, 2));
}

#[test]
fn a_worker_that_ends_leaves_its_counts_and_the_lease() {
    let store = Map::default();
    let (mut leader, mut other) = (Worker::new(&store, START), Worker::new(&store, START));
    leader.tick(&store, START + PERIOD);
    other.tick(&store, START + PERIOD);
    leader.recorder.request_in(PodNs(START + PERIOD + 10), Origin::Direct);
    leader.recorder.request_in(PodNs(START + PERIOD + 10), Origin::Direct);
    leader.recorder.request_out(PodNs(START + PERIOD + 20), Origin::Direct);
    leader.member.seal(&store, &leader.recorder).unwrap();
    let (last, _) = leader.member.last_figure(&store, PodNs(START + PERIOD + 30)).unwrap();
    assert_eq!((last.requests, last.in_flight, last.as_of_ns), (2, 0, START + PERIOD + 30));
    let figure = published(other.tick(&store, START + 2 * PERIOD));
    assert_eq!((figure.requests, figure.in_flight), (2, 0));
    // If it does go on counting (the same VM gets the filter again), nothing is counted twice.
    leader.recorder.request_in(PodNs(START + 2 * PERIOD + 1), Origin::Direct);
    leader.tick(&store, START + 3 * PERIOD);
    let figure = published(other.tick(&store, START + 3 * PERIOD));
    assert_eq!((figure.requests, figure.in_flight), (3, 2));
}

#[test]
fn an_acknowledgement_never_goes_back_and_belongs_to_its_incarnation() {
    let store = Map::default();
    let pod = PodStore::new("test");
    pod.open(&store, MonotonicNs(0), START, PERIOD, 7).unwrap();
    let at = |ns, requests| Snapshot { as_of_ns: START + ns, requests, ..Snapshot::default() };
    pod.acknowledge(&store, 7, &at(20, 2)).unwrap();
    pod.acknowledge(&store, 7, &at(10, 1)).unwrap();
    pod.acknowledge(&store, 8, &at(30, 3)).unwrap();
    assert_eq!(pod.state(&store).unwrap().acknowledged, at(20, 2));
}

#[test]
fn an_unreadable_state_is_replaced_and_another_period_changes_the_grid() {
    let store = Map::default();
    let pod = PodStore::new("test");
    store.set("inflight/1/test/state", b"junk", Expect::Absent);
    assert_eq!(pod.state(&store), Err(StoreError::NoState));
    let state = pod.open(&store, MonotonicNs(5), START, PERIOD, 7).unwrap();
    assert_eq!(state.grid, Grid { anchor_ns: START, period_ns: PERIOD });
    let state = pod.open(&store, MonotonicNs(5 + 42), START + 999, PERIOD / 2, 8).unwrap();
    assert_eq!(state.grid, Grid { anchor_ns: START + 42, period_ns: PERIOD / 2 });
    assert_eq!(state.incarnation, 7);
}

#[test]
fn the_period_is_the_shortest_that_a_live_worker_asks_for() {
    let store = Map::default();
    let (mut stays, mut changes) = (Worker::new(&store, START), Worker::new(&store, START));
    let mut now = START;
    // Returns the period in effect after `periods` periods of ticks, and the age of the last figure
    // then.
    let mut pass = |workers: &mut [&mut Worker], periods: u64| {
        for tenth in 1..=periods * 10 {
            for worker in workers.iter_mut() {
                worker.recorder.advance(PodNs(now + tenth * PERIOD / 10));
                worker.recorder.set_grid(worker.member.pod.state(&store).unwrap().grid);
                worker.tick(&store, now + tenth * PERIOD / 10);
            }
        }
        now += periods * PERIOD;
        let state = workers[0].member.pod.state(&store).unwrap();
        (state.grid.period_ns, now - state.published[1].as_of_ns)
    };
    assert_eq!(pass(&mut [&mut stays, &mut changes], 5).0, PERIOD);
    changes.member.set_period_ns(4 * PERIOD);
    assert_eq!(pass(&mut [&mut stays, &mut changes], 5).0, PERIOD, "one of them asks for it still");
    stays.member.set_period_ns(4 * PERIOD);
    assert_eq!(pass(&mut [&mut stays, &mut changes], 10).0, 4 * PERIOD);
    // A worker that opens the pod with a shorter period takes effect at once, and is not overruled
    // before it has posted.
    let opened = changes.member.pod.open(&store, MonotonicNs(START + 20 * PERIOD), 0, PERIOD, 8).unwrap();
    changes.member.set_period_ns(PERIOD);
    assert_eq!(opened.grid, Grid { anchor_ns: START + 20 * PERIOD, period_ns: PERIOD });
    let (period_ns, age_ns) = pass(&mut [&mut stays, &mut changes], 3);
    assert_eq!(period_ns, PERIOD);
    assert!(age_ns <= PERIOD, "{age_ns}");
    // When that worker ends, its period ends, too.
    changes.member.seal(&store, &changes.recorder).unwrap();
    assert_eq!(pass(&mut [&mut stays], 10).0, 4 * PERIOD);
}

/// A store in which other workers act between any two steps of one worker.
struct Interleaved<'a> {
    map: &'a Map,
    dice: RefCell<Dice>,
    fail: u64,
}

impl Store for Interleaved<'_> {
    fn get(&self, key: &str) -> Option<(Vec<u8>, u32)> {
        self.map.get(key)
    }

    fn set(&self, key: &str, value: &[u8], expect: Expect) -> bool {
        // Acts as if another worker had written in between: the version changes, the value does
        // not.
        if self.dice.borrow_mut().roll(self.fail) == 0
            && let Some((value, version)) = self.map.get(key)
        {
            self.map.set(key, &value, Expect::Version(version));
        }
        self.map.set(key, value, expect)
    }
}

#[test]
fn whatever_dies_or_hangs_every_posted_count_is_in_the_sum_exactly_once() {
    for seed in 0..300 {
        let mut dice = Dice(seed);
        let map = Map::default();
        let store = Interleaved { map: &map, dice: RefCell::new(Dice(seed ^ 0xabcd)), fail: 6 };
        let mut workers: Vec<Worker> = (0..4).map(|_| Worker::new(&store, START)).collect();
        let mut gone = Snapshot::default();
        let mut last = Snapshot::starting_at(START);
        for step in 1..=60u64 {
            let boundary = START + step * PERIOD;
            for worker in &mut workers {
                for event in 0..dice.roll(4) {
                    let at = boundary - PERIOD + event * 100 + dice.roll(100);
                    let origin = if dice.roll(2) == 0 { Origin::Proxied } else { Origin::Direct };
                    worker.recorder.request_in(PodNs(at), origin);
                    if dice.roll(3) > 0 {
                        worker.recorder.request_out(PodNs(at + dice.roll(100)), origin);
                    }
                }
            }
            match dice.roll(12) {
                // A worker dies at any moment: what it posted stays.
                0 if workers.len() > 1 => {
                    let dead = workers.swap_remove(dice.roll(workers.len() as u64) as usize);
                    gone = gone.plus(&dead.posted.finished());
                }
                // A worker ends, or panics: all its counts stay.
                1 if workers.len() > 1 => {
                    let mut ending = workers.swap_remove(dice.roll(workers.len() as u64) as usize);
                    ending.member.seal(&store, &ending.recorder).unwrap();
                    gone = gone.plus(&ending.recorder.current().finished());
                }
                2 => {
                    workers.push(Worker::new(&store, boundary - 1));
                }
                _ => {}
            }
            // Some ticks are skipped, so that now and then a live worker is sealed as silent.
            for worker in &mut workers {
                if dice.roll(3) > 0
                    && let LeaderStep::Published { previous, latest, .. } =
                        worker.tick(&store, boundary + dice.roll(300))
                {
                    // Equal except for the request time of workers that were not in the last
                    // figure.
                    let Snapshot { request_ns, proxied_request_ns, .. } = previous;
                    assert_eq!(
                        previous,
                        Snapshot { request_ns, proxied_request_ns, ..last },
                        "seed {seed} step {step}"
                    );
                    assert!(previous.holds_totals_of(&last), "seed {seed} step {step}");
                    assert!(latest.since(&previous).is_some(), "seed {seed} step {step}: went back");
                    last = latest;
                }
            }
        }
        // Quiet phase: all workers tick until everything is published.
        for step in 61..=70u64 {
            for worker in &mut workers {
                worker.tick(&store, START + step * PERIOD);
            }
        }
        let figure = workers[0].member.pod.state(&store).unwrap().published[1];
        let truth = workers.iter().fold(gone, |sum, worker| {
            sum.plus(worker.recorder.closed().find(|s| s.as_of_ns == figure.as_of_ns).unwrap())
        });
        assert_eq!(figure, Snapshot { as_of_ns: figure.as_of_ns, ..truth }, "seed {seed}");
    }
}

#[test]
fn workers_on_threads_agree() {
    let map = Map::default();
    let figures: Vec<Snapshot> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let map = &map;
                scope.spawn(move || {
                    let mut worker = Worker::new(map, START);
                    for step in 1..=200u64 {
                        worker.recorder.request_in(PodNs(START + step * PERIOD - 1), Origin::Direct);
                        worker.recorder.request_out(PodNs(START + step * PERIOD - 1), Origin::Direct);
                        // Contention may postpone counts, but never lose them.
                        worker.recorder.advance(PodNs(START + step * PERIOD));
                        let _ = worker.member.post(map, &worker.recorder);
                        let _ = worker.member.lead(map, PodNs(START + step * PERIOD), 0);
                    }
                    worker.member.seal(map, &worker.recorder).unwrap();
                    *worker.recorder.current()
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let mut auditor = Worker::new(&map, START + 200 * PERIOD);
    let figure = published(auditor.tick(&map, START + 220 * PERIOD));
    assert_eq!(figure.requests, figures.iter().map(|f| f.requests).sum::<u64>());
    assert_eq!(figure.requests, 800);
}

#[test]
fn in_whatever_order_workers_end_their_last_reports_together_hold_everything() {
    for seed in 0..500 {
        let (store, mut dice) = (Map::default(), Dice(seed));
        let mut workers: Vec<Worker> = (0..3).map(|_| Worker::new(&store, START)).collect();
        let mut truth = 0;
        for worker in &mut workers {
            worker.tick(&store, START + PERIOD);
            for _ in 0..dice.roll(4) {
                worker.recorder.request_in(PodNs(START + PERIOD + 1), Origin::Direct);
                truth += 1;
            }
        }
        // Each worker seals its slot and then takes the figure. Others act in between, and their
        // clocks differ slightly.
        let mut ending: Vec<(usize, Option<u64>)> = (0..3).map(|worker| (worker, None)).collect();
        let mut sent: Vec<(Snapshot, Snapshot)> = Vec::new();
        let (mut known, mut counted) = (None, 0);
        while !ending.is_empty() || !sent.is_empty() {
            if !ending.is_empty() && (sent.is_empty() || dice.roll(2) == 0) {
                let turn = dice.roll(ending.len() as u64) as usize;
                let (worker, sealed_ns) = ending[turn];
                let worker = &mut workers[worker];
                match sealed_ns {
                    None => {
                        let now = START + PERIOD + 10 + dice.roll(3);
                        worker.recorder.advance(PodNs(now));
                        worker.member.seal(&store, &worker.recorder).unwrap();
                        ending[turn].1 = Some(now);
                    }
                    Some(now) => {
                        let (until, state) = worker.member.last_figure(&store, PodNs(now)).unwrap();
                        sent.push((state.acknowledged, until));
                        ending.swap_remove(turn);
                    }
                }
            } else {
                let (since, until) = sent.swap_remove(dice.roll(sent.len() as u64) as usize);
                counted += addition(known.as_ref(), &since, &until).unwrap().requests;
                known = Some(known.map_or(until, |known: Snapshot| known.ceiling(&until)));
                // Some answers are lost.
                if dice.roll(3) > 0 {
                    PodStore::new("test").acknowledge(&store, 7, &until).unwrap();
                }
            }
        }
        assert_eq!(counted, truth, "seed {seed}");
    }
}
