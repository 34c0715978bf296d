//! A key that comes from a cluster's name is one that a report can carry.
#![no_main]

use inflight_stats::gateway::key_name::KeyName;
use inflight_stats::protocol::report::is_name;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|names: (&str, &str)| {
    if let Some(key) = KeyName::from_cluster(names.0, names.1) {
        assert!(is_name(&key.namespace) && is_name(&key.name));
    }
});
