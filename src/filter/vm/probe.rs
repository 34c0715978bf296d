//! What all probes of an app have in common.

/// The user agent of probes.
pub const PROBE_AGENT: &str = "inflight-probe/1";

/// Returns whether a response code is the app's. These others are Envoy's own if it gets no answer
/// of the app; 0 is a call's without any response.
pub fn is_answer(code: u16) -> bool {
    !matches!(code, 0 | 502 | 503 | 504)
}
