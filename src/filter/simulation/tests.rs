//! The properties that hold whatever happens.

use std::collections::BTreeMap;

use inflight_stats::breaker::rules::PATIENCE_NS;

use super::hold_tests::HOLD;
use super::world::{CALM, Faults, NETWORK, World};

/// Stalls are shorter than the breaker's patience, and than the longest step of the pod's clock.
pub const ROUGH: Faults = Faults {
    stalls: 60,
    longest_stall_ns: 1_500_000_000,
    panics: 500,
    reconfigurations: 400,
    network: 10,
    pods: 0,
};
const LIMIT: usize = 3;

macro_rules! sidecar {
    ($period:literal, $more:literal) => {
        concat!(
            r#"{"namespace": "ns", "revision": "rev", "pod": "pod", "reporting_period": ""#,
            $period,
            r#"", "statserver": {"cluster": "stats", "timeout": "100ms", "token_env": "TOKEN"}"#,
            $more,
            "}"
        )
    };
}

const PLAIN: &[&str] = &[sidecar!("100ms", ""), sidecar!("300ms", ""), sidecar!("200ms", "")];
const BREAKER: &[&str] = &[
    sidecar!("100ms", r#", "container_concurrency": 3, "queue_depth": 4, "queue_timeout": "150ms""#),
    sidecar!("200ms", r#", "container_concurrency": 3, "queue_depth": 2"#),
    sidecar!("100ms", r#", "container_concurrency": 2, "queue_timeout": "50ms""#),
];
const PROBED: &[&str] = &[
    sidecar!(
        "100ms",
        r#", "container_concurrency": 3, "answer_network_probe": true, "app_cluster": "app", "app_probe_path": "/ready""#
    ),
    sidecar!(
        "200ms",
        r#", "container_concurrency": 3, "queue_timeout": "150ms", "answer_network_probe": true,
        "app_cluster": "app", "app_probe_path": "/ready""#
    ),
    sidecar!("100ms", r#", "container_concurrency": 3"#),
];
const EXPORTER: &str = r#"{"role": "exporter", "namespace": "ns", "revision": "NAME", "pod": "pod"}"#;
const GATEWAY: &[&str] = &[
    r#"{"role": "gateway", "pod": "gw", "reporting_period": "100ms", "gateway": {"max_keys": 4},
        "statserver": {"cluster": "stats", "timeout": "100ms"}}"#,
    r#"{"role": "gateway", "pod": "gw", "reporting_period": "200ms",
        "statserver": {"cluster": "stats", "timeout": "100ms"}}"#,
];

const UNMARKED: &[&str] = &[r#"{"role": "gateway", "pod": "gw", "gateway": {"mark": false}}"#];

/// Runs a world to its end. The server must have every request and every nanosecond, once.
pub fn counts_everything(
    seed: u64,
    configurations: &'static [&'static str],
    faults: Faults,
) -> &'static World {
    let world = World::start(seed, configurations, faults);
    world.run(1_500, 8_000_000);
    world.settle();
    let truth = world.truth.borrow();
    let server = world.server.borrow();
    let counted: BTreeMap<_, _> =
        server.counted.clone().into_iter().filter(|(key, _)| truth.contains_key(key)).collect();
    assert_eq!(counted, *truth, "seed {seed}");
    drop(truth);
    world
}

#[test]
fn at_a_sidecar_the_server_gets_every_request_and_all_of_its_time_once() {
    for seed in 0..150 {
        let world = counts_everything(seed, PLAIN, ROUGH);
        let requests = world.truth.borrow().values().map(|(requests, _)| *requests).sum::<u64>();
        assert_eq!(world.stat("queue_requests_total"), requests as i64, "seed {seed}");
        world.end();
    }
}

#[test]
fn the_breaker_lets_no_more_into_the_app_than_it_may_and_nobody_waits_for_ever() {
    let (mut refused, mut timed_out) = (0, 0);
    for seed in 0..150 {
        let world = World::start(seed, BREAKER, Faults { panics: 0, ..ROUGH });
        for _ in 0..1_500 {
            world.run(1, 8_000_000);
            assert!(world.in_app() <= LIMIT, "seed {seed}: {} in the app", world.in_app());
        }
        world.settle();
        assert_eq!(world.server.borrow().counted, *world.truth.borrow(), "seed {seed}");
        refused += world.refused.get();
        timed_out += world.timed_out.get();
        world.end();
    }
    assert!(refused > 100 && timed_out > 100, "{refused} refused, {timed_out} timed out");
}

#[test]
fn a_vm_that_panics_leaves_its_permits_and_its_counts_to_the_others() {
    for seed in 0..150 {
        counts_everything(seed, BREAKER, Faults { panics: 100, network: 10, ..CALM }).end();
    }
}

#[test]
fn at_a_gateway_the_server_gets_every_request_of_every_key_once() {
    let mut over_limit = 0;
    for seed in 0..150 {
        let world = counts_everything(seed, GATEWAY, ROUGH);
        over_limit += world.stat("inflight_requests_over_key_limit_total");
        world.end();
    }
    assert!(over_limit > 0, "the limit of keys was reached");
}

#[test]
fn a_permit_goes_to_the_worker_that_has_waited_longest_by_a_message() {
    let world = World::by_hand(1, BREAKER);
    for _ in 0..LIMIT {
        world.request_to(1);
    }
    world.request_to(2);
    assert_eq!(world.in_app(), LIMIT);
    world.answer_at(1);
    assert_eq!(world.in_app(), LIMIT - 1);
    world.read_mail_of(2);
    assert_eq!(world.in_app(), LIMIT);
    world.settle();
    world.end();
}

#[test]
fn a_panic_gives_permits_back_at_once_and_lets_those_who_wait_go() {
    let world = World::by_hand(2, BREAKER);
    for _ in 0..LIMIT {
        world.request_to(1);
    }
    world.panic(1);
    world.request_to(2);
    assert_eq!(world.in_app(), 1);
    world.settle();
    world.end();
}

#[test]
fn the_permits_of_a_vm_that_trapped_come_back_when_it_has_been_silent_for_the_patience() {
    let world = World::by_hand(6, &BREAKER[1..]);
    for _ in 0..LIMIT {
        world.request_to(1);
    }
    world.pass(400_000_000);
    world.trap(1);
    world.request_to(2);
    let mut waited_ns = 0;
    while world.in_app() == 0 && waited_ns < 20_000_000_000 {
        world.pass(20_000_000);
        waited_ns += 20_000_000;
    }
    assert!((PATIENCE_NS..PATIENCE_NS + 2_000_000_000).contains(&waited_ns), "{waited_ns}");
    world.settle();
    world.end();
}

#[test]
fn a_configuration_that_goes_gives_its_limit_back_to_the_one_before() {
    let world = World::by_hand(3, &BREAKER[1..]);
    world.reconfigure();
    for _ in 0..3 {
        world.request_to(1);
    }
    assert_eq!(world.in_app(), 2, "the newest allows two");
    world.end_newest_roots();
    world.request_to(2);
    assert_eq!(world.in_app(), 2, "nobody overtakes the one that waits");
    world.pass(150_000_000);
    assert_eq!(world.in_app(), 3, "the one before allows three");
    world.answer_at(1);
    world.read_mail_of(2);
    assert_eq!(world.in_app(), 3, "messages come to the one that stayed");
    world.settle();
    world.end();
}

#[test]
fn when_all_ends_the_last_reports_hold_everything() {
    for seed in 0..50 {
        let world = World::by_hand(seed, if seed % 2 == 0 { PLAIN } else { GATEWAY });
        for _ in 0..=world.roll(20) {
            world.request_to(1 + world.roll(3) as usize);
            world.pass(world.roll(60_000_000));
        }
        for index in 1..4 {
            while world.in_app_at(index) > 0 {
                world.answer_at(index);
            }
        }
        world.end_newest_roots();
        world.deliver_all();
        assert_eq!(world.server.borrow().counted, *world.truth.borrow(), "seed {seed}");
        world.end();
    }
}

#[test]
fn a_sidecar_takes_a_request_as_proxied_only_under_its_own_key_and_removes_the_mark() {
    let world = World::by_hand(8, PLAIN);
    let proxied = ("k-proxy-request", "activator");
    for (headers, is_proxied) in [
        (vec![], 0),
        (vec![proxied], 1),
        (vec![proxied, ("x-inflight-key", "ns/rev")], 1),
        (vec![proxied, ("x-inflight-key", "ns/another")], 0),
        (vec![proxied, ("x-inflight-key", "")], 0),
        (vec![("k-proxy-request", "me")], 0),
    ] {
        let before = world.stat("queue_proxied_requests_total");
        assert!(world.request_with(1, &headers).is_empty(), "{headers:?}");
        world.answer_at(1);
        world.pass(200_000_000);
        assert_eq!(world.stat("queue_proxied_requests_total") - before, is_proxied, "{headers:?}");
    }
    world.settle();
    world.end();
}

/// Returns what a network probe is answered with if the app answers its probe with a status.
fn answer_to_network_probe(app_status: u16) -> (u16, String) {
    let world = World::by_hand(10, PROBED);
    world.app_status.set(app_status);
    world.request_with(1, &[NETWORK]);
    assert_eq!((world.in_app(), world.app_probes_sent()), (0, 0), "the root context is to make the call");
    world.read_mail_of(1);
    assert_eq!(world.app_probes_sent(), 1);
    world.deliver_all();
    world.end_answered_at(1);
    let answers = world.probe_answers.take();
    world.settle();
    assert_eq!(world.stat("queue_requests_total") + world.stat("revision_request_count"), 0);
    world.end();
    answers.into_iter().next().unwrap()
}

#[test]
fn a_network_probe_is_answered_as_by_queue_proxy_once_the_app_answers_ours() {
    for status in [200, 204, 301, 404, 405, 500] {
        assert_eq!(answer_to_network_probe(status), (200, "queue".to_owned()), "{status}");
    }
    for status in [502, 503, 504] {
        assert_eq!(answer_to_network_probe(status), (503, String::new()), "{status}");
    }
}

#[test]
fn network_probes_share_one_probe_of_the_app_and_need_no_permit() {
    let world = World::by_hand(11, PROBED);
    for _ in 0..LIMIT {
        world.request_to(1);
    }
    for _ in 0..5 {
        world.request_with(1, &[NETWORK]);
        world.read_mail_of(1);
    }
    // The one that asked first goes, and one more who asked.
    world.end_newest_at(1);
    assert_eq!(world.app_probes_sent(), 1);
    world.deliver_all();
    world.end_answered_at(1);
    assert_eq!(world.probe_answers.take(), vec![(200, "queue".to_owned()); 4]);
    assert_eq!(world.in_app(), LIMIT);
    // Each worker probes for itself, and later probes are answered by a later answer.
    world.app_status.set(503);
    world.request_with(1, &[NETWORK]);
    world.request_with(2, &[NETWORK]);
    world.read_mail_of(1);
    world.read_mail_of(2);
    assert_eq!(world.app_probes_sent(), 2);
    world.deliver_all();
    world.end_answered_at(1);
    world.end_answered_at(2);
    assert_eq!(world.probe_answers.take(), vec![(503, String::new()); 2]);
    // Nobody waits any more when the message arrives.
    world.request_with(1, &[NETWORK]);
    world.end_newest_at(1);
    world.read_mail_of(1);
    assert_eq!(world.app_probes_sent(), 0);
    world.settle();
    world.end();
}

#[test]
fn a_network_probe_waits_for_no_configuration_that_is_gone() {
    let world = World::by_hand(12, PROBED);
    world.reconfigure();
    world.request_with(1, &[NETWORK]);
    world.read_mail_of(1);
    // The context that made the call goes with it, and the one before makes another.
    world.end_newest_roots();
    world.read_mail_of(1);
    world.deliver_all();
    world.end_answered_at(1);
    assert_eq!(world.probe_answers.take(), [(200, "queue".to_owned())]);
    // A configuration that answers none replaces one that has promised an answer.
    world.request_with(1, &[NETWORK]);
    world.reconfigure();
    world.read_mail_of(1);
    world.deliver_all();
    world.end_answered_at(1);
    assert_eq!(world.probe_answers.take(), [(200, "queue".to_owned())]);
    world.settle();
    world.end();
}

#[test]
fn every_network_probe_is_answered_whatever_happens() {
    let (mut ready, mut not_ready) = (0, 0);
    for seed in 0..150 {
        let world = counts_everything(seed, PROBED, ROUGH);
        for (code, body) in world.probe_answers.take() {
            match (code, body.as_str()) {
                (200, "queue") => ready += 1,
                (503, "") => not_ready += 1,
                (503, "pending request queue full\n" | "pending request queue timeout\n") => {}
                other => panic!("{other:?}"),
            }
        }
        world.end();
    }
    assert!(ready > 100 && not_ready > 100, "{ready} ready, {not_ready} not ready");
}

#[test]
fn a_gateway_marks_with_the_key_that_it_counts_under_and_with_nothing_else() {
    let world = World::by_hand(9, GATEWAY);
    let claimed = [("k-proxy-request", "me"), ("x-inflight-key", "ns/mine")];
    let headers = world.request_with(1, &claimed);
    let (key, _) = world.truth.borrow().first_key_value().map(|(key, sum)| (key.clone(), *sum)).unwrap();
    assert_eq!(headers["k-proxy-request"], b"activator");
    assert_eq!(headers["x-inflight-key"], format!("{}/{}", key.0, key.1).into_bytes());
    let world = World::by_hand(9, UNMARKED);
    assert!(world.request_with(1, &claimed).is_empty());
    world.settle();
    world.end();
}

#[test]
fn the_first_request_of_a_key_is_reported_before_any_tick() {
    let world = World::by_hand(4, GATEWAY);
    for _ in 0..10 {
        world.request_to(1);
        world.request_to(2);
        assert_eq!(world.reports_sent(), world.truth.borrow().len());
    }
    assert_eq!(world.reports_sent(), 2);
    world.settle();
    world.end();
}

#[test]
fn a_report_that_is_too_large_for_the_server_is_split_and_nothing_is_dropped() {
    for seed in 0..50 {
        let world = World::start(seed, GATEWAY, ROUGH);
        world.server.borrow_mut().max_keys = 1;
        world.run(1_500, 8_000_000);
        world.settle();
        assert_eq!(world.server.borrow().counted, *world.truth.borrow(), "seed {seed}");
        assert_eq!(world.stat("inflight_reports_dropped_total"), 0, "seed {seed}");
        world.end();
    }
}

#[test]
fn keys_that_are_idle_and_acknowledged_make_room_for_others() {
    let world = World::by_hand(5, &GATEWAY[..1]);
    for _ in 0..100 {
        world.request_to(1);
        if world.in_app() > 0 {
            world.answer_at(1);
        }
        for _ in 0..3 {
            world.pass(10_000_000);
            world.deliver_all();
        }
    }
    assert_eq!(world.truth.borrow().len(), 6, "at most four at a time");
    world.end();
}

#[test]
fn without_faults_every_stat_says_what_happened() {
    let world = counts_everything(7, BREAKER, CALM);
    let (requests, _) = world.truth.borrow()[&("ns".into(), "rev".into())];
    let turned_away = i64::try_from(world.refused.get() + world.timed_out.get()).unwrap();
    let requests = i64::try_from(requests).unwrap();
    let metrics = |name: &str, code: u16| world.stat(&format!("{name}.response_code=.={code};"));
    assert_eq!(world.stat("revision_request_count"), requests);
    assert_eq!(world.stat("revision_request_latencies"), requests);
    assert_eq!(metrics("revision_app_request_count", 200), metrics("revision_request_count", 200));
    assert_eq!(metrics("revision_request_count", 503), turned_away);
    assert_eq!(metrics("revision_app_request_count", 503), 0);
    assert!(turned_away > 0);
    assert_eq!(world.stat("queue_requests_total"), requests);
    assert_eq!(world.stat("queue_in_flight_requests"), 0);
    assert_eq!(world.stat("revision_queue_depth"), 0);
    assert_eq!(world.stat("inflight_wasm_memory_bytes"), 4 * 65_536);
    let taken = i64::try_from(world.server.borrow().taken).unwrap();
    assert_eq!(world.stat("inflight_reports_sent_total"), taken);
    assert_eq!(world.stat("inflight_reports_failed_total"), 0);
    world.end();
}

#[test]
fn the_exporter_shows_what_the_pods_workers_published() {
    let world = counts_everything(11, PLAIN, CALM);
    let exporter = EXPORTER.replace("NAME", "rev");
    let text = world.scrape(&exporter);
    assert!(text.contains("queue_average_concurrent_requests{destination_namespace=\"ns\""), "{text}");
    // The figures of the last period, in a world that has fully_collected.
    assert!(text.contains("destination_pod=\"pod\"} 0\n"), "{text}");
    assert_eq!(world.scrape(&EXPORTER.replace("NAME", "another")), text.replace("\"rev\"", "\"another\""));
    world.end();
}

#[test]
fn a_refused_configuration_counts_nothing() {
    let world = World::start(1, PLAIN, CALM);
    assert!(!world.accepts(r#"{"namespace": "ns"}"#));
    assert!(!world.accepts(&PLAIN[0].replace("TOKEN", "NOT_SET")));
    assert!(world.accepts(PLAIN[1]));
    world.end();
}

#[test]
fn network_probes_are_answered_in_batches() {
    let world = World::by_hand(13, PROBED);
    for _ in 0..100 {
        world.request_with(1, &[NETWORK]);
    }
    world.read_mail_of(1);
    world.deliver_all();
    world.end_answered_at(1);
    assert!((1..100).contains(&world.probe_answers.borrow().len()));
    for _ in 0..10 {
        world.pass(1_000_000);
        world.end_answered_at(1);
    }
    assert_eq!(world.probe_answers.take(), vec![(200, "queue".to_owned()); 100]);
    world.settle();
    world.end();
}

#[test]
fn a_panic_leaves_nobody_behind_who_is_to_be_answered_in_a_later_batch() {
    let world = World::by_hand(14, PROBED);
    for _ in 0..100 {
        world.request_with(1, &[NETWORK]);
    }
    world.read_mail_of(1);
    world.deliver_all();
    world.panic(1);
    world.settle();
    world.end();
}

/// `docs/stats.md` has a row for each stat that the code defines, with its type, and no other.
#[test]
fn the_documented_stats_are_those_that_are_defined() {
    let mut defined = BTreeMap::new();
    for configurations in [BREAKER, GATEWAY, HOLD] {
        let world = counts_everything(3, configurations, Faults { pods: 20, ..ROUGH });
        for (kind, name) in world.stats() {
            let name = name.split('.').next().unwrap().to_owned();
            defined.insert(name, format!("{kind:?}").to_lowercase());
        }
        world.end();
    }
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/stats.md");
    let page = std::fs::read_to_string(page).unwrap();
    let (_, table) = page.split_once("<!-- reference: envoy-stats -->").unwrap();
    let (table, _) = table.split_once("<!-- end of reference -->").unwrap();
    let rows = table.lines().filter(|line| line.starts_with("| `"));
    let documented: BTreeMap<_, _> = rows
        .map(|row| {
            let mut cells = row.split('|').map(str::trim).skip(1);
            let name = cells.next().unwrap().trim_matches('`').to_owned();
            let kind = cells.next().unwrap().split(',').next().unwrap().to_owned();
            (name, kind)
        })
        .collect();
    assert_eq!(documented, defined);
}
