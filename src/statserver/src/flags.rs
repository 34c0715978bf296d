//! The command line. Each flag is also a variable `INFLIGHT_*`.

use std::net::SocketAddr;
use std::time::Duration;

use clap::Parser;
use tracing::level_filters::LevelFilter;

/// Takes the reports of Inflight's filters and answers autoscalers.
#[derive(Clone, Debug, Parser)]
#[command(version)]
pub struct Flags {
    /// Where to listen for HTTP.
    #[arg(long, env = "INFLIGHT_LISTEN", default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,

    /// What to log: error, warn, info, debug or trace.
    #[arg(long, env = "INFLIGHT_LOG_LEVEL", default_value = "info")]
    pub log_level: LevelFilter,

    /// How long to go on serving after SIGTERM, with /readyz at 503, before the listener closes.
    #[arg(long, env = "INFLIGHT_DRAIN_DELAY", default_value = "1s", value_parser = duration)]
    pub drain_delay: Duration,

    /// The window over which `stable` is averaged; whole seconds.
    #[arg(long, env = "INFLIGHT_STABLE_WINDOW", default_value = "60s", value_parser = window)]
    pub stable_window: Duration,

    /// The panic window, in percent of the stable one.
    #[arg(long, env = "INFLIGHT_PANIC_WINDOW_PERCENTAGE", default_value_t = 10.0, value_parser = percentage)]
    pub panic_window_percentage: f64,
}

impl Flags {
    /// The windows in seconds.
    pub fn windows(&self) -> inflight_stats::ingest::WindowSizes {
        let stable_seconds = usize::try_from(self.stable_window.as_secs()).unwrap_or(3600);
        let panic = stable_seconds as f64 * self.panic_window_percentage / 100.0;
        inflight_stats::ingest::WindowSizes { stable_seconds, panic_seconds: (panic.round() as usize).max(1) }
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    let duration = inflight_stats::config::parse_duration(text);
    duration.filter(|d| *d <= Duration::from_secs(3600)).ok_or_else(|| "allowed is 0s to 60m".into())
}

fn window(text: &str) -> Result<Duration, String> {
    duration(text)
        .ok()
        .filter(|d| d.as_secs() >= 6 && d.subsec_nanos() == 0)
        .ok_or_else(|| "allowed is 6s to 60m".into())
}

fn percentage(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|p| (1.0..=100.0).contains(p)).ok_or_else(|| "allowed is 1 to 100".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_the_documented_ones() {
        let flags = Flags::parse_from(["inflight-statserver"]);
        assert_eq!(flags.listen.to_string(), "127.0.0.1:8080");
        assert_eq!((flags.windows().stable_seconds, flags.windows().panic_seconds), (60, 6));
    }

    #[test]
    fn a_wrong_value_is_refused_with_what_is_allowed() {
        for wrong in [["--stable-window", "5s"], ["--panic-window-percentage", "0"], ["--drain-delay", "2h"]]
        {
            let error = Flags::try_parse_from(["inflight-statserver", wrong[0], wrong[1]]).unwrap_err();
            assert!(error.to_string().contains("allowed is"), "{error}");
        }
    }
}
