//! A gob stream, whatever it begins with, is decoded or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = inflight_stats::protocol::gob::begins_one(bytes);
    if let Ok(decoded) = inflight_stats::protocol::gob::decode(bytes, inflight_stats::protocol::gob::MAX_DEPTH) {
        let stat = decoded.message.stat.expect("a stat");
        assert!(std::str::from_utf8(&stat.pod_name).is_ok());
    }
});
