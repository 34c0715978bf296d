//! What holds for several workers, whatever happens to them.

use std::time::Duration;

use crate::counting::time::MonotonicNs;
use crate::gateway::key_name::KeyName;
use crate::hold::key_hold::{Answer, LOSS_NS, PATIENCE_NS};
use crate::hold::settings::HoldSettings;
use crate::hold::simulation::{Faults, MILLISECOND, SECOND, SharedStore, Tally, World, settings};
use crate::hold::worker_side::{Arrival, Effects, ProbeResult, WorkerHold};
use crate::pod::pod_state::PodStore;

/// Everything goes wrong but that a worker is silent for the patience.
const ROUGH: Faults = Faults {
    stalls: 60,
    longest_stall_ns: 3 * SECOND,
    deaths: 400,
    closes: 400,
    settings: 4,
    losses: 8,
    conflicts: 4,
};

/// Runs a world until nothing is left of it.
fn nothing_is_left(seed: u64, faults: Faults) -> World {
    let mut world = World::new(seed, 4, 0, faults);
    world.run(1_500);
    let waited_ns = world.drain();
    assert!(waited_ns < PATIENCE_NS + 2 * SECOND, "seed {seed}: {} ms", waited_ns / MILLISECOND);
    // By then nothing is known of any key.
    world.now_ns += LOSS_NS + SECOND;
    world.sweep(0);
    let left: Vec<_> = world.store.sizes().into_iter().filter(|(_, size)| *size > 8).collect();
    assert_eq!(left, [], "seed {seed}");
    world
}

#[test]
fn whoever_waits_goes_on_once_in_order_within_the_limits_and_nothing_is_left() {
    let mut all = Tally::default();
    for seed in 0..50 {
        let tally = nothing_is_left(seed, ROUGH).tally;
        assert_eq!(tally.forgotten, 0, "seed {seed}");
        all.add(&tally);
    }
    let Tally {
        passed_at_once, passed, timed_out, refused, abandoned, without_pod, lost_with_worker, ..
    } = all;
    let least = [passed, passed_at_once, timed_out, refused, abandoned, without_pod, lost_with_worker];
    assert!(least.iter().all(|count| *count > 400), "{all:?}");
}

#[test]
fn a_worker_that_stalls_for_longer_than_the_patience_finds_its_way_back() {
    let mut forgotten = 0;
    for seed in 0..50 {
        let faults = Faults { longest_stall_ns: 3 * PATIENCE_NS, ..ROUGH };
        forgotten += nothing_is_left(seed, faults).tally.forgotten;
    }
    assert!(forgotten > 500, "{forgotten}");
}

/// Returns the longest time between two probes of a cluster.
fn longest_gap_ns(world: &World, cluster: usize) -> u64 {
    world.clusters[cluster].probed_ns.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap()
}

#[test]
fn the_workers_probe_in_turn_and_the_others_go_on_if_one_ends_or_dies_or_has_nobody_waiting() {
    let patient = HoldSettings { timeout: Duration::from_secs(60), ..settings(0) };
    for (ends, longest_gap_ms) in [("", 101), ("closes", 202), ("dies", 1_102), ("abandons", 202)] {
        let mut world = World::by_hand(4, &patient);
        (0..4).for_each(|at| world.arrive(at, 0));
        world.pass(5 * SECOND);
        match ends {
            "closes" => world.replace(0, true),
            "dies" => world.replace(0, false),
            "abandons" => world.abandon(0),
            _ => {}
        }
        world.pass(5 * SECOND);
        let probes = world.clusters[0].probed_ns.len();
        assert!((88..=105).contains(&probes), "{ends}: {probes} probes");
        let gap_ms = longest_gap_ns(&world, 0) / MILLISECOND;
        assert!(gap_ms <= longest_gap_ms, "{ends}: {gap_ms} ms");
        world.drain();
    }
}

/// An app may answer 503 to the authority of one held request, and nothing else to the others'.
#[test]
fn a_cluster_is_probed_for_each_of_its_held_requests_in_turn() {
    let store = SharedStore::default();
    let mut hold = WorkerHold::new(PodStore::new("gw"), 1, 7, settings(0));
    let key = KeyName::checked("ns", "name").unwrap();
    let mut now = MonotonicNs(SECOND);
    let mut held = Vec::new();
    for _ in 0..3 {
        match hold.arrive(&store, &key, "cluster", now, |_| (), &mut Effects::default()) {
            Arrival::Held(number) => held.push(number),
            other => panic!("{other:?}"),
        }
    }
    let mut probed = Vec::new();
    for _ in 0..5 {
        let mut effects = Effects::default();
        hold.look(&store, &[hold.store().bucket_of(&key)], now, &mut effects);
        let [probe] = &effects.probes[..] else { panic!("{:?}", effects.probes) };
        probed.push(probe.request);
        hold.probed(&store, probe.number, ProbeResult::NotReady, now, &mut Effects::default());
        if probed.len() == 4 {
            hold.abandon(&store, &key, held[1], now, &mut Effects::default());
        }
        now = now.plus(SECOND);
    }
    assert_eq!(probed, [held[0], held[1], held[2], held[0], held[2]]);
}

#[test]
fn requests_that_never_end_let_the_others_through_because_probes_are_answered() {
    let timeout = Duration::from_secs(60);
    let mut world = World::by_hand(2, &HoldSettings { depth: 100, timeout, ..settings(0) });
    world.set_pod(0, true);
    (0..20).for_each(|at| world.arrive(at % 2, 0));
    world.pass(20 * SECOND);
    assert_eq!((world.waiting(), world.running()), (0, 20));
}

#[test]
fn probes_are_a_period_apart_whatever_else_the_worker_looks_at() {
    for gap_ms in [3, 30, 60, 90, 99] {
        let mut world = World::by_hand(2, &HoldSettings { depth: 10_000, ..settings(0) });
        for turn in 0..3_000 / gap_ms {
            world.arrive(turn as usize % 2, 0);
            world.pass(gap_ms * MILLISECOND);
        }
        let longest_ms = longest_gap_ns(&world, 0) / MILLISECOND;
        assert!((96..=101).contains(&longest_ms), "a request each {gap_ms} ms: {longest_ms} ms");
    }
}

#[test]
fn a_warm_key_costs_no_look_into_the_store() {
    let mut world = World::by_hand(1, &settings(0));
    world.set_pod(0, true);
    world.arrive(0, 0);
    world.pass(10 * MILLISECOND);
    world.end(0, Answer::Answered);
    let before = world.store.accesses.get();
    for _ in 0..100 {
        world.arrive(0, 0);
        world.now_ns += MILLISECOND;
        world.end(0, Answer::Answered);
    }
    assert_eq!((world.store.accesses.get(), world.tally.passed_at_once), (before, 100));
}

#[test]
fn trust_lasts_from_the_last_answer_or_while_a_request_is_in_the_app() {
    let mut world = World::by_hand(1, &settings(0));
    world.set_pod(0, true);
    world.arrive(0, 0);
    world.pass(10 * MILLISECOND);
    world.end(0, Answer::Answered);
    world.pass(1_999 * MILLISECOND);
    world.arrive(0, 0);
    assert_eq!(world.tally.passed_at_once, 1);
    world.set_pod(0, false);
    world.pass(60 * SECOND);
    world.arrive(0, 0);
    assert_eq!(world.tally.passed_at_once, 2, "one is in the app");
    world.end(0, Answer::Neither);
    world.end(0, Answer::Unavailable);
    world.arrive(0, 0);
    assert_eq!((world.tally.passed_at_once, world.waiting()), (2, 1), "no answer for a minute");
    world.drain();
}

#[test]
fn a_request_that_finds_no_pod_ends_the_trust_of_all_workers() {
    let mut world = World::by_hand(3, &settings(0));
    world.set_pod(0, true);
    for at in 0..3 {
        world.arrive(at, 0);
        world.pass(10 * MILLISECOND);
        world.end(at, Answer::Answered);
    }
    world.set_pod(0, false);
    world.arrive(1, 0);
    world.arrive(2, 0);
    assert_eq!(world.waiting(), 0);
    world.lose(1);
    world.pass(MILLISECOND);
    (0..3).for_each(|at| world.arrive(at, 0));
    assert_eq!(world.waiting(), 3);
    world.end(2, Answer::Answered);
    world.pass(MILLISECOND);
    world.arrive(2, 0);
    assert_eq!(world.waiting(), 4, "it was sent before");
    world.drain();
}

#[test]
fn whoever_has_waited_for_the_timeout_is_told_so_in_time() {
    for held_by in [1, 3] {
        let mut world = World::by_hand(3, &settings(0));
        (0..held_by).for_each(|at| world.arrive(at, 0));
        world.pass(10 * SECOND - MILLISECOND);
        assert_eq!(world.tally.timed_out, 0);
        world.pass(2 * MILLISECOND);
        assert_eq!((world.tally.timed_out, world.waiting()), (held_by as u64, 0));
    }
}

#[test]
fn a_look_reads_each_bucket_once() {
    let store = SharedStore::default();
    let mut hold = WorkerHold::new(PodStore::new("gw"), 1, 7, settings(0));
    let now = MonotonicNs(SECOND);
    let keys: Vec<KeyName> = (0..500).map(|n| KeyName::checked("ns", &n.to_string()).unwrap()).collect();
    for key in &keys {
        let mut effects = Effects::<()>::default();
        assert!(matches!(hold.arrive(&store, key, "cluster", now, |_| (), &mut effects), Arrival::Held(_)));
        hold.look(&store, &[hold.store().bucket_of(key)], now, &mut effects);
        let probe = effects.probes[0].number;
        hold.probed(&store, probe, ProbeResult::Ready, now, &mut effects);
        hold.look(&store, &[hold.store().bucket_of(key)], now, &mut effects);
        let (_, passage) = effects.passed.remove(0);
        hold.leave(&store, key, &passage, (Answer::Answered, false), now, &mut effects);
    }
    let before = store.accesses.get();
    hold.look(&store, &(0..=255).collect::<Vec<u8>>(), now, &mut Effects::default());
    let accesses = store.accesses.get() - before;
    assert!(accesses <= 64, "{accesses}");
}

#[test]
fn the_leader_sweeps_every_two_seconds_and_then_reads_each_bucket_once() {
    let mut world = World::by_hand(2, &settings(0));
    world.arrive(1, 0);
    world.replace(1, false);
    world.now_ns += PATIENCE_NS + 1;
    let reads = |world: &mut World, after_ns: u64| {
        world.now_ns += after_ns;
        let before = world.store.accesses.get();
        world.sweep(0);
        world.store.accesses.get() - before
    };
    assert_eq!(reads(&mut world, 0), 65, "one is written, from which a worker is removed");
    assert_eq!(reads(&mut world, 2 * SECOND - 1), 0);
    assert_eq!(reads(&mut world, 1), 64);
    assert_eq!(world.store.sizes().values().max(), Some(&8));
}

#[test]
fn what_the_store_keeps_does_not_grow_with_the_names_that_were_ever_seen() {
    let store = SharedStore::default();
    let mut hold = WorkerHold::new(PodStore::new("gw"), 1, 7, settings(0));
    let mut largest = 0;
    for n in 0..5_000_u64 {
        let (now, mut effects) = (MonotonicNs(n * 100 * MILLISECOND), Effects::<()>::default());
        let key = KeyName::checked("ns", &format!("a-name-that-a-client-made-up-{n}")).unwrap();
        let Arrival::Held(number) = hold.arrive(&store, &key, "cluster", now, |_| (), &mut effects) else {
            panic!("not held");
        };
        hold.abandon(&store, &key, number, now, &mut effects);
        hold.tick(&store, now, &mut effects);
        hold.sweep(&store, now, &mut effects);
        largest = largest.max(store.sizes().values().sum::<usize>());
    }
    assert!(store.sizes().len() <= 64, "{}", store.sizes().len());
    // What was there in the last ten seconds.
    assert!(largest < 100 * 200, "{largest} bytes");
    assert!(hold.known_keys() <= 200, "{}", hold.known_keys());
}
