//! A report that is taken is the one that its bytes say, and a key takes it or says why not.
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
            // Each key of a report is one of its own; here they are all one, so counters may go
            // back.
            let _ = key.record(&report.pod, report.incarnation, message, now_ns);
        }
        let figures = key.decide(now_ns);
        assert!(figures.stable.concurrency >= 0.0 && figures.stable.concurrency.is_finite());
    }
});
