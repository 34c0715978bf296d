//! The plugin's configuration is accepted, or refused with a short error.
#![no_main]

use inflight_stats::{Config, Identity};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    match Config::parse(bytes, &Identity::default(), |_| None) {
        Ok(config) => assert!(!config.identity.pod.is_empty()),
        Err(error) => assert!(error.to_string().len() < 4096),
    }
});
