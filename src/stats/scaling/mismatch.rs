//! Whether what a key's pods and its gateways count fits together.

use std::fmt;

const SECOND_NS: u64 = 1_000_000_000;
/// The counts are compared over windows of this length.
const WINDOW_NS: u64 = 30 * SECOND_NS;
/// Windows in a row in which no gateway reported: longer than the longest period of a gateway.
const WINDOWS_WITHOUT_GATEWAY: u8 = 3;

/// Counts of one key that do not fit together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mismatch {
    /// All requests of its pods are proxied, and no gateway reports it: they count nowhere.
    NoGateway,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoGateway => {
                "all requests of the key's pods are marked as counted by a gateway, and no gateway reports \
                 the key: they count nowhere"
            }
        })
    }
}

/// Requests that pods reported.
#[derive(Clone, Copy, Debug, Default)]
struct PodRequests {
    all: f64,
    proxied: f64,
}

/// Finds the [`Mismatch`]es of one key.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct MismatchDetector {
    /// When the present window began; 0 before the first.
    began_ns: u64,
    current: PodRequests,
    previous: PodRequests,
    without_gateway: u8,
    is_no_gateway_logged: bool,
}

impl MismatchDetector {
    /// Adds what pods reported.
    pub(super) fn add_pod_requests(&mut self, all: f64, proxied: f64) {
        self.current.all += all;
        self.current.proxied += proxied;
    }

    /// Returns the share of proxied requests among those that pods reported in the present window
    /// and the one before; `None` if they reported none.
    pub(super) fn proxied_share(&self) -> Option<f64> {
        let all = self.current.all + self.previous.all;
        (all > 0.0).then(|| ((self.current.proxied + self.previous.proxied) / all).clamp(0.0, 1.0))
    }

    /// Returns whether the present window is over.
    pub(super) fn is_window_over(&mut self, now_ns: u64) -> bool {
        if self.began_ns == 0 {
            self.began_ns = now_ns;
        }
        now_ns.saturating_sub(self.began_ns) >= WINDOW_NS
    }

    /// Ends the present window, in which so many gateways reported.
    pub(super) fn end_window(&mut self, now_ns: u64, gateways: u64) {
        let PodRequests { all, proxied } = self.current;
        // A window without requests tells nothing.
        if all > 0.0 || gateways > 0 {
            let is_without = gateways == 0 && proxied >= all;
            self.without_gateway = if is_without { self.without_gateway.saturating_add(1) } else { 0 };
        }
        self.began_ns = now_ns;
        self.previous = std::mem::take(&mut self.current);
    }

    /// Returns a mismatch that was found and not yet logged.
    pub(super) fn found(&self) -> Option<Mismatch> {
        let is_without_gateway = self.without_gateway >= WINDOWS_WITHOUT_GATEWAY;
        (is_without_gateway && !self.is_no_gateway_logged).then_some(Mismatch::NoGateway)
    }

    /// Notes that a mismatch was logged: once is enough.
    pub(super) fn logged(&mut self, mismatch: Mismatch) {
        match mismatch {
            Mismatch::NoGateway => self.is_no_gateway_logged = true,
        }
    }
}
