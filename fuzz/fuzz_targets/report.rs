//! An accepted report encodes to the bytes that it was decoded from, and a key records it or says
//! why not.
#![no_main]

use std::sync::Arc;

use inflight_stats::Report;
use inflight_stats::scaling::key::Key;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(report) = Report::decode(bytes) {
        assert_eq!(report.encode().expect("what was decoded is not too large"), bytes);
        let mut key = Key::new(Arc::default());
        let now_ns = 1_700_000_000_000_000_000;
        for message in &report.messages {
            // In a real report each message has a key of its own. Here they all go to one key, so
            // its counters may go back.
            let _ = key.record(&report.pod, report.incarnation, message, now_ns);
        }
        let figures = key.decide(now_ns);
        assert!(figures.stable.concurrency >= 0.0 && figures.stable.concurrency.is_finite());
    }
});
