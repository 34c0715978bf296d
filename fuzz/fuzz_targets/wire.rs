//! A frame of the stat stream, of either kind, is decoded or refused, and a key records its stats.
#![no_main]

use std::sync::Arc;

use inflight_stats::scaling::key::Key;
use inflight_stats::protocol::frame::{self, FrameLimits};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(messages) = frame::decode(bytes.to_vec().into(), &FrameLimits::default()) {
        let mut key = Key::new(Arc::default());
        let now_ns = 1_700_000_000_000_000_000;
        for message in messages {
            let Some(stat) = message.stat else { continue };
            let pod = std::str::from_utf8(&stat.pod_name).expect("checked");
            let _ = key.record_stat(pod, &stat, now_ns);
        }
        let figures = key.decide(now_ns);
        assert!(figures.stable.concurrency >= 0.0 && figures.stable.concurrency.is_finite());
    }
});
