//! Faults on request, for tests of their consequences. Not part of a shipped module.

use inflight_stats::pod::store::Expect;

use crate::host::{HeaderMap, Host};

const KEY: &str = "inflight/fault";

/// Handles the header `x-inflight-fault`: `panic` and `trap` end this worker's VM; `panic-leader`
/// and `trap-leader` leave a note that ends the leader's VM.
pub fn on_request(host: impl Host) {
    match host.header(HeaderMap::Request, "x-inflight-fault").as_deref() {
        Some(b"panic") => panic_now(),
        Some(b"trap") => trap(),
        Some(note @ (b"panic-leader" | b"trap-leader")) => {
            let expect = host.get(KEY).map_or(Expect::Absent, |(_, version)| Expect::Version(version));
            host.set(KEY, note, expect);
        }
        _ => {}
    }
}

/// Acts on a note that [`of_request`] left. The leader calls this after its report.
pub fn on_leader(host: impl Host) {
    let Some((note, version)) = host.get(KEY) else { return };
    if note.is_empty() || !host.set(KEY, b"", Expect::Version(version)) {
        return;
    }
    match note.as_slice() {
        b"panic-leader" => panic_now(),
        b"trap-leader" => trap(),
        _ => {}
    }
}

#[allow(clippy::panic)]
fn panic_now() {
    panic!("a fault was asked for");
}

fn trap() {
    #[cfg(target_arch = "wasm32")]
    core::arch::wasm32::unreachable();
}
