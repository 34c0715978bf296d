//! The budget of a request. A regression fails here, on any machine; after an improvement the
//! budget is lowered.

use std::path::PathBuf;

use inflight_budget::{Cost, Vm, compile};
use wasmi::Module;

fn module(name: &str) -> PathBuf {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..");
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let path = target.join("wasm32-wasip1/release").join(name);
    assert!(path.exists(), "{} is not there: run `make budget`", path.display());
    path
}

const SIDECAR: &str = r#"{"namespace": "ns", "revision": "rev", "pod": "pod"}"#;
const BREAKER: &str = r#"{"namespace": "ns", "revision": "rev", "pod": "pod", "container_concurrency": 32}"#;
const NETWORK_PROBE: &str = r#"{"namespace": "ns", "revision": "rev", "pod": "pod", "answer_network_probe": true,
    "app_cluster": "app"}"#;
const QUEUE_TIMEOUT: &str = r#"{"namespace": "ns", "revision": "rev", "pod": "pod", "container_concurrency": 32,
    "queue_timeout": "50ms"}"#;
const GATEWAY: &str = r#"{"role": "gateway", "pod": "gw"}"#;
const HOLD: &str = r#"{"role": "gateway", "pod": "gw", "gateway": {"hold": {}}}"#;
const PLAIN: &[(&str, &str)] = &[
    (":method", "GET"),
    (":path", "/"),
    (":authority", "hello"),
    ("user-agent", "Mozilla/5.0 (X11; Linux x86_64)"),
];

/// Returns the cost of a request that is not the first, with no tick in between.
fn steady(module: &Module, configuration: &str) -> Cost {
    let mut vm = Vm::start(module, configuration);
    // The first one may be held. It ends when the app has answered a probe.
    let first = vm.open(PLAIN);
    vm.deliver();
    vm.close(first);
    for _ in 0..10 {
        vm.request(PLAIN);
    }
    let (one, another) = (vm.request(PLAIN), vm.request(PLAIN));
    assert!(
        one.instructions.abs_diff(another.instructions) * 20 < one.instructions,
        "{one:?}, then {another:?}"
    );
    another
}

#[test]
fn a_request_stays_within_its_budget() {
    let [filter, empty] = ["inflight_filter.wasm", "inflight_empty.wasm"].map(|name| compile(&module(name)));
    let budgets = [
        ("empty filter", &empty, "", 1_350, 0),
        ("sidecar", &filter, SIDECAR, 6_000, 9),
        ("sidecar that answers network probes", &filter, NETWORK_PROBE, 6_000, 9),
        ("sidecar, breaker", &filter, BREAKER, 15_000, 13),
        ("gateway", &filter, GATEWAY, 9_500, 9),
        ("gateway, hold, warm key", &filter, HOLD, 11_500, 9),
    ];
    let mut over = Vec::new();
    for (name, module, configuration, instructions, host_calls) in budgets {
        let cost = steady(module, configuration);
        println!(
            "{name}: {} instructions of {instructions}, {} host calls of {host_calls}",
            cost.instructions,
            cost.host_calls()
        );
        for (call, times) in &cost.calls {
            println!("    {times} {call}");
        }
        if cost.instructions > instructions || cost.host_calls() > host_calls {
            over.push(name);
        }
    }
    assert!(over.is_empty(), "over budget: {over:?}");
}

#[test]
fn a_queue_timeout_costs_no_tick_while_nothing_waits() {
    let mut vm = Vm::start(&compile(&module("inflight_filter.wasm")), QUEUE_TIMEOUT);
    for _ in 0..3 {
        vm.request(PLAIN);
        vm.tick();
        // The rest of a period of one second.
        assert!(vm.next_tick_ms() > 900, "the next tick in {} ms", vm.next_tick_ms());
    }
}
