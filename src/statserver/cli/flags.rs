//! The command line. Each flag is also a variable `INFLIGHT_*`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use inflight_stats::scaling::settings::{
    BURST, Bound, DEFAULT_RPS_TARGET, KeySettings, LONGEST_DELAY, MOST_PODS, PERCENTAGE, RATE, STABLE_WINDOW,
    TARGET, THRESHOLD,
};
use tokio_tungstenite::tungstenite::http::Uri;
use tracing::level_filters::LevelFilter;

use crate::cli::limits::Limits;
use crate::net::auth::Without;

/// Takes the reports of Inflight's filters and answers autoscalers.
#[derive(Clone, Debug, Parser)]
#[command(version)]
pub struct Flags {
    /// Where to listen for HTTP.
    #[arg(long, env = "INFLIGHT_LISTEN", default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,

    /// Where to listen for KEDA's gRPC.
    #[arg(long, env = "INFLIGHT_GRPC_LISTEN", default_value = "127.0.0.1:8081")]
    pub grpc_listen: SocketAddr,

    /// The file with the tokens that may report and ask: `TOKEN NAMESPACES [admin]` a line, `*` or a list with commas.
    #[arg(long, env = "INFLIGHT_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,

    /// The server's certificate chain in PEM; with it, both addresses speak TLS alone.
    #[arg(long, env = "INFLIGHT_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,

    /// The certificate's private key in PEM.
    #[arg(long, env = "INFLIGHT_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,

    /// The CA, in PEM, whose clients may report and ask for every namespace without a token.
    #[arg(long, env = "INFLIGHT_TLS_CLIENT_CA", value_name = "FILE", requires = "tls_cert")]
    pub tls_client_ca: Option<PathBuf>,

    /// Lets everybody in who reaches the address, also if it is not a loopback one: to report and to ask for every namespace. Only on
    /// loopback they may also tell keys their settings.
    #[arg(long, env = "INFLIGHT_INSECURE")]
    pub insecure: bool,

    /// The file that keeps what single keys were told; without it, a restart forgets.
    #[arg(long, env = "INFLIGHT_SETTINGS", value_name = "FILE")]
    pub settings: Option<PathBuf>,

    /// A Knative autoscaler to which every stat is sent on, such as ws://autoscaler.knative-serving:8080.
    #[arg(long, env = "INFLIGHT_FORWARD", value_name = "URL", value_parser = websocket)]
    pub forward: Option<String>,

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

    /// The concurrency that one pod can have.
    #[arg(long, env = "INFLIGHT_TARGET", default_value_t = 100.0, value_parser = positive)]
    pub target: f64,

    /// The requests a second that one pod can have, for keys that scale by these.
    #[arg(long, env = "INFLIGHT_RPS_TARGET", default_value_t = DEFAULT_RPS_TARGET, value_parser = positive)]
    pub rps_target: f64,

    /// How much of the target one pod should have, in percent.
    #[arg(long, env = "INFLIGHT_TARGET_UTILIZATION_PERCENTAGE", default_value_t = 70.0, value_parser = percentage)]
    pub target_utilization_percentage: f64,

    /// Panic begins when the panic window wants so many percent of the ready pods.
    #[arg(long, env = "INFLIGHT_PANIC_THRESHOLD_PERCENTAGE", default_value_t = 200.0, value_parser = threshold)]
    pub panic_threshold_percentage: f64,

    /// At most so many times the ready pods at once.
    #[arg(long, env = "INFLIGHT_MAX_SCALE_UP_RATE", default_value_t = 1000.0, value_parser = rate)]
    pub max_scale_up_rate: f64,

    /// At least the ready pods divided by this.
    #[arg(long, env = "INFLIGHT_MAX_SCALE_DOWN_RATE", default_value_t = 2.0, value_parser = rate)]
    pub max_scale_down_rate: f64,

    /// Concurrency to be kept free; 0: none; -1: there is never enough.
    #[arg(long, env = "INFLIGHT_TARGET_BURST_CAPACITY", default_value_t = 211.0, value_parser = burst, allow_negative_numbers = true)]
    pub target_burst_capacity: f64,

    /// Fewer pods only after they were enough for so long.
    #[arg(long, env = "INFLIGHT_SCALE_DOWN_DELAY", default_value = "0s", value_parser = duration)]
    pub scale_down_delay: Duration,

    /// If any pod is needed, so many are.
    #[arg(long, env = "INFLIGHT_ACTIVATION_SCALE", default_value_t = 1, value_parser = pods)]
    pub activation_scale: u32,

    /// How much is taken from a network.
    #[command(flatten)]
    pub limits: Limits,
}

impl Flags {
    /// Whether nobody can get in who should not.
    ///
    /// # Errors
    /// In one line, what to do.
    pub fn check_access(&self) -> Result<(), String> {
        if self.token_file.is_some() || self.tls_client_ca.is_some() || self.insecure {
            return Ok(());
        }
        let open = [("--listen", self.listen), ("--grpc-listen", self.grpc_listen)];
        match open.into_iter().find(|(_, address)| !address.ip().is_loopback()) {
            None => Ok(()),
            Some((flag, address)) => Err(format!(
                "{flag} was {address}, allowed without --token-file or --tls-client-ca is a loopback address; --insecure lets \
                 everybody in"
            )),
        }
    }

    /// What somebody may do who shows nothing, if nothing is asked for. Settings are told over HTTP.
    pub fn without(&self) -> Without {
        if self.listen.ip().is_loopback() { Without::Loopback } else { Without::Insecure }
    }

    /// What keys are scaled by that were told nothing.
    pub fn key_settings(&self) -> KeySettings {
        KeySettings {
            target: self.target,
            target_utilization_percentage: self.target_utilization_percentage,
            stable_window: self.stable_window,
            panic_window_percentage: self.panic_window_percentage,
            panic_threshold_percentage: self.panic_threshold_percentage,
            max_scale_up_rate: self.max_scale_up_rate,
            max_scale_down_rate: self.max_scale_down_rate,
            target_burst_capacity: self.target_burst_capacity,
            scale_down_delay: self.scale_down_delay,
            activation_scale: self.activation_scale,
            ..KeySettings::default()
        }
    }
}

fn number(text: &str, (fits, allowed): Bound) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|n: &f64| n.is_finite() && fits(*n))
        .ok_or_else(|| format!("allowed is {allowed}"))
}

fn positive(text: &str) -> Result<f64, String> {
    number(text, TARGET)
}

fn threshold(text: &str) -> Result<f64, String> {
    number(text, THRESHOLD)
}

fn rate(text: &str) -> Result<f64, String> {
    number(text, RATE)
}

fn burst(text: &str) -> Result<f64, String> {
    number(text, BURST)
}

fn percentage(text: &str) -> Result<f64, String> {
    number(text, PERCENTAGE)
}

fn pods(text: &str) -> Result<u32, String> {
    let pods = text.parse().ok().filter(|pods| *pods <= MOST_PODS);
    pods.ok_or_else(|| format!("allowed is a whole number from 0 to {MOST_PODS}"))
}

fn duration(text: &str) -> Result<Duration, String> {
    let duration = inflight_stats::config::parse_duration(text);
    duration.filter(|d| *d <= LONGEST_DELAY).ok_or_else(|| "allowed is 0s to 60m".into())
}

fn window(text: &str) -> Result<Duration, String> {
    let [shortest, longest] = STABLE_WINDOW;
    let duration = inflight_stats::config::parse_duration(text);
    duration
        .filter(|d| (shortest..=longest).contains(d) && d.subsec_nanos() == 0)
        .ok_or_else(|| "allowed is 6s to 60m, in whole seconds".into())
}

fn websocket(text: &str) -> Result<String, String> {
    let url = text.parse::<Uri>().ok().filter(|url| url.scheme_str() == Some("ws") && url.host().is_some());
    url.map(|_| text.to_owned()).ok_or_else(|| "allowed is ws://HOST[:PORT][/PATH]".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_the_documented_ones() {
        let flags = Flags::parse_from(["inflight-statserver"]);
        assert_eq!(flags.listen.to_string(), "127.0.0.1:8080");
        assert_eq!(flags.grpc_listen.to_string(), "127.0.0.1:8081");
        assert_eq!(flags.key_settings(), KeySettings::default());
    }

    #[test]
    fn an_open_address_takes_tokens_or_the_word_insecure() {
        let check =
            |more: &[&str]| Flags::parse_from(["inflight-statserver"].iter().chain(more)).check_access();
        assert_eq!(check(&[]), Ok(()));
        assert_eq!(check(&["--listen", "[::1]:0"]), Ok(()));
        for flag in ["--listen", "--grpc-listen"] {
            let error = check(&[flag, "0.0.0.0:80"]).unwrap_err();
            assert!(error.contains(flag) && error.contains("0.0.0.0:80"), "{error}");
            assert_eq!(check(&[flag, "0.0.0.0:80", "--insecure"]), Ok(()));
            assert_eq!(check(&[flag, "0.0.0.0:80", "--token-file", "x"]), Ok(()));
            let tls = ["--tls-cert", "x", "--tls-key", "x"];
            assert!(
                check(&[&[flag, "0.0.0.0:80"], &tls[..]].concat()).is_err(),
                "says who serves, not who asks"
            );
            assert_eq!(check(&[&[flag, "0.0.0.0:80", "--tls-client-ca", "x"], &tls[..]].concat()), Ok(()));
        }
    }

    #[test]
    fn insecure_gives_no_settings_to_other_machines() {
        let without = |more: &[&str]| Flags::parse_from(["inflight-statserver"].iter().chain(more)).without();
        assert_eq!(without(&[]), Without::Loopback);
        assert_eq!(without(&["--insecure", "--listen", "[::1]:0"]), Without::Loopback);
        assert_eq!(without(&["--insecure", "--grpc-listen", "0.0.0.0:0"]), Without::Loopback);
        assert_eq!(without(&["--insecure", "--listen", "[::]:80"]), Without::Insecure);
    }

    #[test]
    fn a_wrong_value_is_refused_with_what_is_allowed() {
        assert!(Flags::try_parse_from(["inflight-statserver", "--target-burst-capacity", "-1"]).is_ok());
        for wrong in [
            ["--target", "0"],
            ["--max-scale-up-rate", "1"],
            ["--target-burst-capacity", "NaN"],
            ["--stable-window", "5s"],
            ["--panic-window-percentage", "0"],
            ["--drain-delay", "2h"],
            ["--forward", "http://autoscaler"],
            ["--forward", "ws:autoscaler"],
            ["--max-connections", "0"],
            ["--max-report-bytes", "1048577"],
            ["--body-timeout", "0s"],
            ["--max-depth", "65"],
            ["--activation-scale", "1000001"],
        ] {
            let error = Flags::try_parse_from(["inflight-statserver", wrong[0], wrong[1]]).unwrap_err();
            assert!(error.to_string().contains("allowed is"), "{error}");
        }
    }
}
