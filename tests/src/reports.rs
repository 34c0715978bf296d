//! Reports of pods and gateways that are not there, as their filters would send them.

use std::net::SocketAddr;
use std::time::Duration;

use inflight_stats::{KeyReport, Report, Snapshot};
use tokio::task::JoinSet;

use crate::http;

const SECOND_NS: u64 = 1_000_000_000;
const CONTENT_TYPE: &str = "application/x-bincode";

/// Sends a report to a stats server.
///
/// # Panics
/// If the server does not take it.
pub async fn send(server: SocketAddr, report: &Report) {
    let body = report.encode().expect("a report").into();
    let (status, answer) = http::post(server, "/v1/reports", CONTENT_TYPE, body).await.expect("an answer");
    assert_eq!(status, 202, "{answer}");
}

/// A pod or a gateway that reports one key, second by second.
#[derive(Debug)]
pub struct Sender {
    pod: String,
    namespace: String,
    name: String,
    from_gateway: bool,
    until: Snapshot,
}

impl Sender {
    /// Returns a pod that reports the key `namespace`/`name`.
    #[must_use]
    pub fn pod(pod: &str, namespace: &str, name: &str) -> Self {
        let (pod, namespace, name) = (pod.into(), namespace.into(), name.into());
        Self { pod, namespace, name, from_gateway: false, until: Snapshot::starting_at(SECOND_NS) }
    }

    /// Returns a gateway that reports the key `namespace`/`name`.
    #[must_use]
    pub fn gateway(pod: &str, namespace: &str, name: &str) -> Self {
        Self { from_gateway: true, ..Self::pod(pod, namespace, name) }
    }

    /// Reports some seconds in which `in_flight` requests came each second, and as many were in
    /// flight throughout.
    pub async fn report(&mut self, server: SocketAddr, in_flight: u32, seconds: u64) {
        let since = self.until;
        let requests = seconds * u64::from(in_flight);
        self.until = Snapshot {
            as_of_ns: since.as_of_ns + seconds * SECOND_NS,
            requests: since.requests + requests,
            request_ns: since.request_ns + u128::from(requests * SECOND_NS),
            in_flight,
            ..since
        };
        let (namespace, name) = (self.namespace.clone(), self.name.clone());
        let message =
            KeyReport { namespace, name, from_gateway: self.from_gateway, since, until: self.until };
        let report = Report { version: 1, pod: self.pod.clone(), incarnation: 1, messages: vec![message] };
        send(server, &report).await;
    }

    /// Reports the same at once and every `period` seconds, until what is returned is dropped: a
    /// sender that falls silent in the midst of traffic has no figures after a while, and a machine
    /// may take long to start a program that asks for them. With a period of several seconds the
    /// figures are exact although reports come a little late.
    #[must_use]
    pub fn report_every(mut self, period: u64, server: SocketAddr, in_flight: u32) -> JoinSet<()> {
        let mut reports = JoinSet::new();
        reports.spawn(async move {
            let mut periods = tokio::time::interval(Duration::from_secs(period));
            loop {
                periods.tick().await;
                self.report(server, in_flight, period).await;
            }
        });
        reports
    }
}
