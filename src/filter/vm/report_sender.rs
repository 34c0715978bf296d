//! The report sender: the content of reports, the reports on their way, and the meaning of an
//! answer.

use inflight_stats::config::StatServerConfig;
use inflight_stats::counting::time::{PodNs, nanoseconds};
use inflight_stats::gateway::key_name::KeyName;
use inflight_stats::gateway::key_totals::{IdleKeys, KeyTotals};
use inflight_stats::protocol::report::{CONTENT_TYPE, VERSION, Verdict};
use inflight_stats::{Config, KeyReport, Report, Snapshot};

use crate::host::metric::Counter;
use crate::host::{CallError, Host, HttpCall};
use crate::vm::config_stack::period_ns;

/// The status by which a server says that a report is too large for its limits.
const TOO_LARGE: u16 = 413;

/// A report that is ready to be sent.
pub struct EncodedReport {
    pub bytes: Vec<u8>,
    scope: ReportScope,
}

/// What a report covers. This decides what its acknowledgement means.
pub enum ReportScope {
    /// The pod: the incarnation of its counters, and the figure.
    Pod(u64, Snapshot),
    /// Keys of a gateway, up to these snapshots.
    Keys(Vec<(KeyName, Snapshot)>),
}

impl ReportScope {
    /// Returns how many keys the report has.
    fn keys(&self) -> usize {
        match self {
            Self::Pod(..) => 1,
            Self::Keys(known) => known.len(),
        }
    }
}

/// A report that has not been answered yet.
struct PendingReport {
    call: u32,
    scope: ReportScope,
    /// When to stop waiting: the root context that would get the answer may be gone.
    deadline: PodNs,
}

/// The report sender of one worker.
pub struct ReportSender<H> {
    host: H,
    pending: Vec<PendingReport>,
    /// Whether the last report failed. A failure is logged once.
    failing: bool,
    /// Whether the last answer dropped a report.
    dropping: bool,
    /// How many keys a report of a gateway may have: fewer after a server with lower limits has
    /// refused one as too large.
    max_keys: usize,
    sent: Counter,
    failed: Counter,
    dropped: Counter,
}

impl<H: Host> ReportSender<H> {
    pub fn new(host: H) -> Self {
        Self {
            host,
            pending: Vec::new(),
            failing: false,
            dropping: false,
            max_keys: usize::MAX,
            sent: Counter::define(host, "inflight_reports_sent_total"),
            failed: Counter::define(host, "inflight_reports_failed_total"),
            dropped: Counter::define(host, "inflight_reports_dropped_total"),
        }
    }

    /// Returns whether a report may be sent. Only one is sent at a time, because the next report
    /// includes everything in this one. Gives up reports whose answers are overdue.
    pub fn may_send(&mut self, config: &Config, now: PodNs) -> bool {
        self.pending.retain(|report| now < report.deadline);
        config.statserver.is_some() && self.pending.is_empty()
    }

    /// Returns how many keys a report of a gateway may have.
    pub fn max_keys(&self) -> usize {
        self.max_keys
    }

    /// Notes a report that is on its way.
    pub fn on_dispatched(&mut self, call: u32, report: EncodedReport, config: &Config, now: PodNs) {
        let timeout_ns = config.statserver.as_ref().map_or(0, |server| nanoseconds(server.timeout));
        let wait_ns = timeout_ns.saturating_add(period_ns(config));
        let deadline = PodNs(now.0.saturating_add(wait_ns));
        self.pending.push(PendingReport { call, scope: report.scope, deadline });
    }

    /// Notes that a call could not be made.
    pub fn on_dispatch_error(&mut self, reason: &str) {
        self.count_failure(|| format!("could not report: {reason}; the counts go out with a later report"));
    }

    /// Handles the stats server's answer. Returns what the server knows from now on, or has refused
    /// for good. In both cases the figures continue from there.
    pub fn on_response(
        &mut self,
        call: u32,
        status: u16,
        body: impl FnOnce() -> String,
    ) -> Option<ReportScope> {
        let position = self.pending.iter().position(|report| report.call == call)?;
        let scope = self.pending.swap_remove(position).scope;
        match Verdict::from_status(status) {
            Verdict::Acknowledged => {
                self.sent.add(self.host, 1);
                self.dropping = false;
                if std::mem::take(&mut self.failing) {
                    log::info!("inflight: the stats server acknowledges reports again");
                }
                Some(scope)
            }
            Verdict::Refused => match scope.keys() {
                keys @ 2.. if status == TOO_LARGE => {
                    self.max_keys = self.max_keys.min(keys / 2);
                    let max_keys = self.max_keys;
                    self.count_failure(|| {
                        format!(
                            "the stats server refused a report of {keys} keys as too large with {status}: \
                             {}; reports have at most {max_keys} keys from now on",
                            body()
                        )
                    });
                    None
                }
                _ => {
                    self.count_dropped(status, body);
                    Some(scope)
                }
            },
            Verdict::TryAgain => {
                self.count_failure(|| {
                    format!(
                        "could not report: the stats server answered {status}: {}; the counts go out with \
                         a later report",
                        body()
                    )
                });
                None
            }
        }
    }

    /// Counts a report that will never be taken. The log has the first of several in a row.
    fn count_dropped(&mut self, status: u16, body: impl FnOnce() -> String) {
        self.failed.add(self.host, 1);
        self.dropped.add(self.host, 1);
        if !std::mem::replace(&mut self.dropping, true) {
            log::warn!(
                "inflight: the stats server refused a report for good with {status}: {}; its counts stay \
                 in Envoy's stats only",
                body()
            );
        }
    }

    /// Counts a failure. The log has the first of several: the counter has the rest.
    fn count_failure(&mut self, message: impl FnOnce() -> String) {
        self.failed.add(self.host, 1);
        if !std::mem::replace(&mut self.failing, true) {
            log::warn!("inflight: {}", message());
        }
    }
}

/// Returns the report of a pod.
pub fn pod_report(
    config: &Config,
    incarnation: u64,
    since: Snapshot,
    until: Snapshot,
) -> Option<EncodedReport> {
    let (namespace, name) = (config.identity.namespace.clone(), config.name().to_owned());
    let message = KeyReport { namespace, name, from_gateway: false, since, until };
    let report =
        Report { version: VERSION, pod: config.identity.pod.clone(), incarnation, messages: vec![message] };
    encode(&report, ReportScope::Pod(incarnation, until))
}

/// Returns the reports of a gateway, each of at most `max_keys` keys.
pub fn key_reports(
    config: &Config,
    incarnation: u64,
    totals: &KeyTotals,
    idle: &IdleKeys,
    max_keys: usize,
) -> Vec<EncodedReport> {
    let reports = totals.reports(idle, &config.identity.pod, incarnation, max_keys).into_iter();
    reports.filter_map(|(report, known)| encode(&report, ReportScope::Keys(known))).collect()
}

fn encode(report: &Report, scope: ReportScope) -> Option<EncodedReport> {
    let bytes =
        report.encode().inspect_err(|error| log::error!("inflight: cannot encode a report: {error}")).ok()?;
    Some(EncodedReport { bytes, scope })
}

/// Calls the stats server with a report from the context in effect. Returns the call's number.
///
/// # Errors
/// Why the host refused the call.
pub fn send_report(
    host: impl Host,
    server: &StatServerConfig,
    token: Option<&str>,
    report: &[u8],
) -> Result<u32, String> {
    let StatServerConfig { cluster, authority, path, timeout, .. } = server;
    let authorization = token.map(|token| format!("Bearer {token}"));
    let mut headers = vec![
        (":method", "POST"),
        (":path", path.as_str()),
        (":authority", authority.as_str()),
        ("content-type", CONTENT_TYPE),
    ];
    headers.extend(authorization.as_ref().map(|value| ("authorization", value.as_str())));
    let call = HttpCall { cluster, headers, body: report, timeout: *timeout };
    host.http_call(call).map_err(|error| match error {
        CallError::UnknownCluster => format!("Envoy has no cluster \"{cluster}\""),
        CallError::NoHost => format!("cluster \"{cluster}\" has no hosts"),
    })
}
