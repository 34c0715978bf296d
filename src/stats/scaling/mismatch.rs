//! Whether what a key's pods and its gateways count fits together.

use std::fmt;

use serde::{Deserialize, Serialize};

const SECOND_NS: u64 = 1_000_000_000;
/// The counts are compared over windows of this length.
const WINDOW_NS: u64 = 30 * SECOND_NS;
/// Windows in a row in which no gateway reported: longer than the longest period of a gateway.
const WINDOWS_WITHOUT_GATEWAY: u8 = 3;
/// Windows in a row in which gateways agreed. By chance they do so in one window of nine, and in
/// eight in a row once in decades.
const WINDOWS_OF_AGREEMENT: u8 = 8;
/// A window in which gateways had fewer requests tells nothing.
const MIN_REQUESTS: f64 = 500.0;

/// Counts of one key that do not fit together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mismatch {
    /// All requests of its pods are proxied, and no gateway reports it: they count nowhere.
    NoGateway,
    /// Its gateways count the same requests: each counts twice.
    GatewaysInARow,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoGateway => {
                "all requests of the key's pods are marked as counted by a gateway, and no gateway reports \
                 the key: they count nowhere"
            }
            Self::GatewaysInARow => {
                "gateways report the same number of requests of the key all the time: if one is behind the \
                 other, each request counts twice"
            }
        })
    }
}

/// Requests that pods reported.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct PodRequests {
    all: f64,
    proxied: f64,
}

/// What gateways reported in one window.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct GatewayRequests {
    /// Gateways that are live.
    pub(super) gateways: u64,
    /// Requests of all of them.
    pub(super) all: u64,
    /// Requests of the one with the most.
    pub(super) busiest: u64,
}

impl GatewayRequests {
    /// Returns whether the busiest gateway had as many requests as all others together, as one
    /// behind or in front of them has; `None` if there are too few requests to tell.
    ///
    /// Gateways that share `n` requests each by chance differ by `sqrt(2n)` on average, so only a
    /// seventh of that passes as the same. Reports that are not of the same instants make hardly
    /// more over such a window. If pods have the requests of all gateways as proxied ones, each
    /// was counted once, however evenly they are shared.
    fn agree(&self, proxied: f64) -> Option<bool> {
        let (busiest, others) = (self.busiest as f64, self.all.saturating_sub(self.busiest) as f64);
        let fewer = busiest.min(others);
        if busiest < MIN_REQUESTS {
            return None;
        }
        let is_same = fewer >= MIN_REQUESTS && (busiest - others).abs() <= fewer.sqrt() / 5.0;
        let are_shared = proxied > 1.5 * busiest;
        Some(is_same && !are_shared)
    }
}

/// Finds the [`Mismatch`]es of one key.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct MismatchDetector {
    /// When the present window began; 0 before the first.
    began_ns: u64,
    current: PodRequests,
    previous: PodRequests,
    without_gateway: u8,
    of_agreement: u8,
    is_no_gateway_logged: bool,
    is_in_a_row_logged: bool,
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

    /// Ends the present window, in which gateways reported this.
    pub(super) fn end_window(&mut self, now_ns: u64, reported: GatewayRequests) {
        let GatewayRequests { gateways, .. } = reported;
        let PodRequests { all, proxied } = self.current;
        // A window without requests tells nothing.
        if all > 0.0 || gateways > 0 {
            let is_without = gateways == 0 && proxied >= all;
            self.without_gateway = if is_without { self.without_gateway.saturating_add(1) } else { 0 };
        }
        if let Some(agree) = reported.agree(proxied) {
            self.of_agreement = if agree { self.of_agreement.saturating_add(1) } else { 0 };
        }
        self.began_ns = now_ns;
        self.previous = std::mem::take(&mut self.current);
    }

    /// Returns a mismatch that was found and not yet logged.
    pub(super) fn found(&self) -> Option<Mismatch> {
        if self.without_gateway >= WINDOWS_WITHOUT_GATEWAY && !self.is_no_gateway_logged {
            Some(Mismatch::NoGateway)
        } else if self.of_agreement >= WINDOWS_OF_AGREEMENT && !self.is_in_a_row_logged {
            Some(Mismatch::GatewaysInARow)
        } else {
            None
        }
    }

    /// Notes that a mismatch was logged: once is enough.
    pub(super) fn logged(&mut self, mismatch: Mismatch) {
        match mismatch {
            Mismatch::NoGateway => self.is_no_gateway_logged = true,
            Mismatch::GatewaysInARow => self.is_in_a_row_logged = true,
        }
    }
}
