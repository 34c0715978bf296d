//! Accepted settings are accepted again in the form in which they are shown, and a decider works
//! with them.
#![no_main]

use std::sync::Arc;

use inflight_stats::scaling::key::Key;
use inflight_stats::scaling::settings::KeySettings;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(json) = serde_json::from_slice(bytes) else { return };
    if let Ok(settings) = KeySettings::default().with(json, 200.0) {
        let shown = serde_json::to_value(&settings).expect("settings are JSON");
        let again = KeySettings::default().with(shown, 200.0).expect("what is shown is accepted");
        assert_eq!(again.target_per_pod(), settings.target_per_pod());
        let mut key = Key::new(Arc::new(settings));
        key.decide(1_700_000_000_000_000_000);
        key.decide(1_700_000_002_000_000_000);
    }
});
