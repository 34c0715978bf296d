//! A stats server, an app with varying latency, an Envoy in front of it, a load, and a live table
//! that compares what Envoy reported with what its access log says.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use inflight_e2e::app::App;
use inflight_e2e::bootstrap::Bootstrap;
use inflight_e2e::browser::Browser;
use inflight_e2e::envoy::{Envoy, Version};
use inflight_e2e::load::{Load, Plan};
use inflight_e2e::statserver::StatServer;
use inflight_e2e::tap::Tap;
use inflight_e2e::truth;
use inflight_stats::{KeyReport, Report};

use crate::interrupted;

/// Returns whether two figures agree: whether they are within the tests' tolerance for a single
/// second.
fn agree(reported: f64, logged: f64) -> bool {
    (reported - logged).abs() <= (logged * 0.05).max(0.2)
}

struct Table {
    shown: usize,
    worst: f64,
    disagreed: usize,
}

impl Table {
    /// Prints the seconds that have been reported and whose requests have certainly all been
    /// logged.
    fn show(&mut self, reports: &[Report], envoy: &Envoy, complete: bool) {
        // The truth about a second is known when the requests that were open in it have ended.
        // Those of this load take at most two hundred milliseconds, and the log is flushed every
        // two hundred milliseconds.
        let ready = if complete { reports.len() } else { reports.len().saturating_sub(1) };
        if ready <= self.shown {
            return;
        }
        let log = envoy.requests();
        for (second, report) in reports.iter().enumerate().take(ready).skip(self.shown) {
            let [KeyReport { since, until, .. }] = &report.messages[..] else { continue };
            let Some(period) = until.since(since) else { continue };
            let logged =
                truth::request_ns(&log, since.as_of_ns, until.as_of_ns) as f64 / period.elapsed_ns as f64;
            let reported = period.average();
            let off = if logged > 0.0 { (reported / logged - 1.0) * 100.0 } else { 0.0 };
            let verdict = if agree(reported, logged) { "" } else { "  <-- differs" };
            println!(
                "{:>6}  {:>8}  {reported:>11.3}  {logged:>10.3}  {off:>+9.2} %{verdict}",
                second + 1,
                period.requests
            );
            let _ = std::io::stdout().flush();
            self.worst = self.worst.max((reported - logged).abs());
            self.disagreed += usize::from(!verdict.is_empty());
        }
        self.shown = ready;
    }
}

/// Runs for some seconds, or until it is interrupted.
pub async fn run(duration: Option<u64>, concurrency: u32, screenshot: Option<&Path>) -> ExitCode {
    let (app, server) = (App::start().await, StatServer::start(None).await);
    let tap = Tap::start(Some(server.address)).await;
    let envoy = Envoy::start(Version::Any, &Bootstrap::sidecar(app.address, tap.address), concurrency).await;
    println!("live page     http://{}/", server.address);
    println!("traffic       http://{}/work?ms=20", envoy.address);
    println!("Envoy         http://{}/stats/prometheus", envoy.admin);
    println!("stats server  http://{}/v1/keys/default/hello-00001", server.address);
    println!();
    println!("second  requests  by reports  by the log  difference");
    let steady = Plan {
        requests: u64::MAX,
        connections: 8,
        average_ms: 25.0,
        mixed: false,
        seed: 7,
        ..Plan::default()
    };
    let burst = Plan { requests: 1_000, connections: 30, ..steady };
    let mut loads = vec![Load::start(steady, envoy.address, &app.counts)];
    let mut table = Table { shown: 0, worst: 0.0, disagreed: 0 };

    let ended = async {
        match duration {
            Some(seconds) => tokio::time::sleep(Duration::from_secs(seconds)).await,
            None => std::future::pending().await,
        }
    };
    let mut ended = std::pin::pin!(ended);
    let mut interruption = std::pin::pin!(interrupted());
    let mut ticks = tokio::time::interval(Duration::from_millis(250));
    let mut bursts = tokio::time::interval(Duration::from_secs(4));
    loop {
        tokio::select! {
            _ = ticks.tick() => table.show(&tap.acknowledged(), &envoy, false),
            _ = bursts.tick() => loads.push(Load::start(burst, envoy.address, &app.counts)),
            () = &mut ended => break,
            () = &mut interruption => break,
        }
    }

    if let Some(file) = screenshot {
        let mut browser = Browser::start(1100, 700).await;
        browser.open(&format!("http://{}/", server.address)).await;
        browser.until("document.querySelectorAll('svg path.stable').length", 1.into()).await;
        browser.screenshot(file).await;
    }
    let mut sent = 0;
    loads.iter().for_each(Load::stop);
    for load in loads {
        sent += load.finish().await;
    }
    // Waits for the reports up to the last request, and for its line in the log.
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    let count = async || server.number("default", "hello-00001", "requests_total").await;
    while count().await != sent && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let log = envoy.requests_when(sent).await;
    let reports = tap.acknowledged();
    table.show(&reports, &envoy, true);
    let counted = count().await;
    let reported_ns: u128 =
        reports.iter().flat_map(|r| &r.messages).map(|m| m.until.request_ns - m.since.request_ns).sum();
    let logged_ns = truth::request_ns(&log, 0, u64::MAX);
    let off = (reported_ns as f64 / logged_ns.max(1) as f64 - 1.0) * 100.0;
    println!();
    println!("requests: {sent} sent, {} in Envoy's access log, {counted} at the stats server", log.len());
    println!("concurrency over the run: reports and access log differ by {off:+.3} %");
    if counted == sent && log.len() as u64 == sent && off.abs() < 0.5 && table.disagreed == 0 {
        println!("they agree");
        ExitCode::SUCCESS
    } else {
        println!("they do NOT agree ({} of {} seconds differ)", table.disagreed, table.shown);
        ExitCode::FAILURE
    }
}
