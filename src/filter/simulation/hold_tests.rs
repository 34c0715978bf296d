//! A gateway that holds, whatever happens.

use super::network::Pods;
use super::tests::{ROUGH, counts_everything};
use super::world::{Faults, World, cluster_of};

macro_rules! gateway {
    ($period:literal, $hold:literal) => {
        concat!(
            r#"{"role": "gateway", "pod": "gw", "reporting_period": ""#,
            $period,
            r#"", "statserver": {"cluster": "stats", "timeout": "100ms"}, "gateway": {"#,
            $hold,
            "}}"
        )
    };
}

const SHORT: &str = gateway!(
    "100ms",
    r#""hold": {"timeout": "400ms", "depth": 3, "probe_period": "20ms", "trust": "200ms", "release": 2}"#
);
const LONG: &str = gateway!("200ms", r#""hold": {"depth": 8, "trust": "1s", "release": 1}"#);
const PLAIN: &str = gateway!("100ms", r#""hold": {}"#);
const SELDOM: &str = gateway!("60s", r#""hold": {"timeout": "2s"}"#);
const WITHOUT: &str = gateway!("100ms", "");

/// Also without a hold, in between.
pub const HOLD: &[&str] = &[SHORT, WITHOUT, LONG];
const HOLD_ALWAYS: &[&str] = &[SHORT, LONG];

const PODS_COME_AND_GO: Faults = Faults { pods: 20, ..ROUGH };

const MILLISECOND: u64 = 1_000_000;

#[test]
fn every_request_that_is_held_ends_and_counts_as_any_other() {
    let mut paused = 0;
    for seed in 0..100 {
        let world = counts_everything(seed, HOLD, PODS_COME_AND_GO);
        assert_eq!(held(world), 0, "seed {seed}");
        paused += world.paused.get();
        world.end();
    }
    assert!(paused > 5_000, "{paused}");
}

#[test]
fn the_stats_of_the_hold_say_what_happened() {
    let mut sums = [0; 4];
    for seed in 0..100 {
        let world = counts_everything(seed, HOLD_ALWAYS, Faults { panics: 0, ..PODS_COME_AND_GO });
        let counts = [&world.paused, &world.timed_out, &world.refused, &world.without_pod];
        let counts = counts.map(|count| i64::try_from(count.get()).unwrap());
        let stats = [
            "activator_hold_milliseconds",
            "inflight_hold_timeouts_total",
            "inflight_hold_refused_total",
            "inflight_hold_lost_total",
        ];
        assert_eq!(stats.map(|stat| world.stat(stat)), counts, "seed {seed}");
        assert_eq!(held(world), 0, "seed {seed}");
        sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
        world.end();
    }
    assert!(sums[0] > 5_000 && sums.iter().all(|sum| *sum > 200), "{sums:?}");
}

/// Returns a world in which nothing happens but what the test does, with one key and these pods.
fn by_hand(seed: u64, configurations: &'static [&'static str], pods: Pods) -> &'static World {
    let world = World::by_hand(seed, configurations);
    world.key.set(Some(0));
    set_pods(world, pods);
    world
}

fn set_pods(world: &World, pods: Pods) {
    world.clusters.set(&cluster_of(0, 80), pods);
}

/// Returns the number of requests that are held.
fn held(world: &World) -> i64 {
    world.stat("activator_held_requests")
}

#[test]
fn a_held_request_wakes_its_key_at_once_and_counts_from_its_arrival() {
    let world = by_hand(1, HOLD_ALWAYS, Pods::Gone);
    world.request_to(1);
    assert_eq!((world.reports_sent(), world.in_app(), held(world)), (1, 0, 1));
    world.live(300 * MILLISECOND);
    set_pods(world, Pods::Serving);
    world.live(25 * MILLISECOND);
    assert_eq!((world.in_app(), held(world)), (1, 0));
    world.answer_at(1);
    world.settle();
    let took_ns: u128 = world.truth.borrow().values().map(|(_, ns)| *ns).sum();
    assert_eq!(took_ns, 325_000_000);
    assert_eq!(world.server.borrow().counted, *world.truth.borrow());
    world.end();
}

#[test]
fn one_worker_probes_and_all_that_are_held_go_on_by_its_word() {
    let world = by_hand(2, &HOLD_ALWAYS[1..], Pods::Refusing);
    let read_all = || (1..4).for_each(|index| world.read_mail_of(index));
    (1..4).for_each(|index| world.request_to(index));
    world.read_mail_of(2);
    let probes = world.probes_sent();
    assert_eq!(probes, [(2, cluster_of(0, 80))]);
    read_all();
    assert_eq!(world.probes_sent(), probes, "the others wait");
    set_pods(world, Pods::Serving);
    world.deliver_all();
    assert_eq!((world.in_app(), held(world)), (0, 2), "in a callback of its own");
    for left in [2, 1, 0] {
        read_all();
        assert_eq!((world.in_app(), held(world)), (1, left));
        let at = (1..4).find(|index| world.in_app_at(*index) > 0).unwrap();
        world.answer_at(at);
    }
    world.settle();
    world.end();
}

#[test]
fn a_cluster_that_envoy_does_not_have_holds_nobody() {
    let world = by_hand(3, HOLD_ALWAYS, Pods::Unknown);
    world.request_to(1);
    world.live(2 * MILLISECOND);
    assert_eq!((world.without_pod.get(), held(world)), (1, 0));
    assert_eq!(world.stat("inflight_hold_lost_total"), 0);
    world.settle();
    world.end();
}

#[test]
fn a_panic_lets_the_held_go_and_leaves_the_probing_to_others() {
    let world = by_hand(4, HOLD_ALWAYS, Pods::Gone);
    (0..3).for_each(|_| world.request_to(1));
    world.live(30 * MILLISECOND);
    world.request_to(2);
    world.live(MILLISECOND);
    assert_eq!((world.refused.get(), held(world)), (1, 3));
    world.panic(1);
    assert_eq!(held(world), 0);
    world.request_to(2);
    world.live(30 * MILLISECOND);
    set_pods(world, Pods::Serving);
    world.live(25 * MILLISECOND);
    assert_eq!((world.in_app_at(2), held(world)), (1, 0));
    world.settle();
    world.end();
}

#[test]
fn a_vm_that_trapped_loses_the_probing_within_a_second_and_its_places_after_the_patience() {
    // Also before anybody else has heard of the key.
    for lived_ms in [0, 500] {
        let world = by_hand(5, &[PLAIN], Pods::Gone);
        (0..3).for_each(|_| world.request_to(1));
        world.live(lived_ms * MILLISECOND);
        world.trap(1);
        world.live(100 * MILLISECOND);
        assert_eq!(held(world), 3);
        if lived_ms > 0 {
            world.request_to(2);
            set_pods(world, Pods::Serving);
            world.live(1_100 * MILLISECOND);
            assert_eq!((world.in_app_at(2), held(world)), (1, 0));
        }
        world.live(9_000 * MILLISECOND);
        assert_eq!(held(world), 0, "after {lived_ms} ms");
        world.settle();
        world.end();
    }
}

#[test]
fn a_configuration_without_a_hold_keeps_its_word_to_those_who_are_held() {
    let world = by_hand(6, HOLD, Pods::Gone);
    world.request_to(1);
    world.live(50 * MILLISECOND);
    world.reconfigure();
    world.request_to(1);
    world.live(50 * MILLISECOND);
    assert_eq!((world.without_pod.get(), held(world)), (1, 1), "new ones are not held");
    world.request_to(2);
    set_pods(world, Pods::Serving);
    world.live(25 * MILLISECOND);
    assert_eq!((world.without_pod.get(), world.in_app_at(1), held(world)), (2, 1, 0));
    set_pods(world, Pods::Gone);
    world.reconfigure();
    world.answer_at(1);
    world.live(1_000 * MILLISECOND);
    world.request_to(1);
    world.live(20_000 * MILLISECOND);
    assert_eq!(held(world), 1, "for as long as this configuration says");
    world.end_newest_roots();
    world.live(MILLISECOND);
    assert_eq!((held(world), world.timed_out.get()), (1, 0));
    set_pods(world, Pods::Serving);
    world.live(110 * MILLISECOND);
    assert_eq!((world.in_app_at(1), held(world)), (1, 0));
    world.settle();
    world.end();
}

#[test]
fn when_the_newest_configuration_goes_those_held_under_the_one_before_are_still_looked_after() {
    let world = by_hand(7, &[SELDOM, SELDOM], Pods::Gone);
    world.live(1_000 * MILLISECOND);
    world.reconfigure();
    world.live(1_000 * MILLISECOND);
    world.request_to(1);
    world.to_older.set(1);
    world.request_to(1);
    world.end_one_at(1);
    world.end_newest_roots();
    world.to_older.set(0);
    world.live(2_010 * MILLISECOND);
    assert_eq!((world.timed_out.get(), held(world)), (1, 0));
    world.settle();
    world.end();
}

#[test]
fn a_worker_that_was_taken_for_dead_hears_of_lost_pods_again() {
    let world = by_hand(8, &HOLD_ALWAYS[1..], Pods::Serving);
    let request_to = |index| {
        world.request_to(index);
        world.live(10 * MILLISECOND);
        world.answer_at(index);
    };
    request_to(1);
    request_to(2);
    world.live_but(1_500 * MILLISECOND, Some(2));
    world.live(500 * MILLISECOND);
    request_to(1);
    request_to(2);
    set_pods(world, Pods::Gone);
    world.request_to(1);
    world.live(MILLISECOND);
    assert_eq!((world.without_pod.get(), held(world)), (1, 0));
    world.request_to(2);
    assert_eq!((world.without_pod.get(), held(world)), (1, 1), "it knows");
    world.settle();
    world.end();
}
