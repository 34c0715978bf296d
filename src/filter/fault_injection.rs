//! Faults on request, for tests of what happens after. Not part of a shipped module.

use inflight_stats::pod::{Expect, Store};

use crate::host::{self, Headers, SharedData};

const KEY: &str = "inflight/fault";

/// `x-inflight-fault: panic` and `trap` end this worker's VM; `panic-leader` and `trap-leader` leave a note
/// that ends the leader's.
pub fn of_request() {
    match host::header(Headers::Request, "x-inflight-fault").as_deref() {
        Some(b"panic") => boom(),
        Some(b"trap") => trap(),
        Some(note @ (b"panic-leader" | b"trap-leader")) => {
            let expect = SharedData.get(KEY).map_or(Expect::Absent, |(_, version)| Expect::Version(version));
            SharedData.set(KEY, note, expect);
        }
        _ => {}
    }
}

/// Called by the leader after its report.
pub fn of_leader() {
    let Some((note, version)) = SharedData.get(KEY) else { return };
    if note.is_empty() || !SharedData.set(KEY, b"", Expect::Version(version)) {
        return;
    }
    match note.as_slice() {
        b"panic-leader" => boom(),
        b"trap-leader" => trap(),
        _ => {}
    }
}

#[allow(clippy::panic)]
fn boom() {
    panic!("a fault was asked for");
}

fn trap() {
    #[cfg(target_arch = "wasm32")]
    core::arch::wasm32::unreachable();
}
