//! The command line. Each flag can also be given as an environment variable `INFLIGHT_*`.

use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Command, CommandFactory, Parser};
use inflight_stats::config::parse_duration;
use inflight_stats::scaling::key::STALE_AFTER;
use inflight_stats::scaling::settings::{
    ACTIVATION_SCALE, DEFAULT_RPS_TARGET, KeySettings, MAX_SCALE_DOWN_RATE, MAX_SCALE_UP_RATE,
    PANIC_THRESHOLD_PERCENTAGE, PANIC_WINDOW_PERCENTAGE, SCALE_DOWN_DELAY, STABLE_WINDOW, Setting, TARGET,
    TARGET_BURST_CAPACITY, TARGET_UTILIZATION_PERCENTAGE,
};
use tokio_tungstenite::tungstenite::http::Uri;
use tracing::level_filters::LevelFilter;

use crate::cli::environment::variable_of;
use crate::cli::limits::Limits;
use crate::cli::store_url::StoreUrl;

const DEFAULTS: KeySettings = KeySettings::DEFAULT;

/// Receives the reports of Inflight's filters and answers autoscalers.
#[derive(Clone, Debug, Parser)]
#[command(version)]
pub struct Flags {
    /// Address to serve HTTP on; :PORT is all interfaces.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080", value_parser = address)]
    pub listen: SocketAddr,

    /// Address to serve KEDA's gRPC on; :PORT is all interfaces.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8081", value_parser = address)]
    pub grpc_listen: SocketAddr,

    /// File of the bearer tokens that may report and read, one per line: `TOKEN NAMESPACES
    /// [admin]`, where NAMESPACES is `*` or a list separated by commas.
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,

    /// Certificate chain of the server, in PEM; with it, --listen and --grpc-listen accept TLS only.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,

    /// Private key of the certificate, in PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,

    /// CA certificates, in PEM; clients with a certificate signed by one of them may report and
    /// read for every namespace without a token.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_client_ca: Option<PathBuf>,

    /// Certificate chain for --grpc-listen, in PEM, so that it alone accepts TLS only; without it,
    /// that of --tls-cert.
    #[arg(long, value_name = "FILE", requires = "grpc_tls_key")]
    pub grpc_tls_cert: Option<PathBuf>,

    /// Private key of that certificate, in PEM.
    #[arg(long, value_name = "FILE", requires = "grpc_tls_cert")]
    pub grpc_tls_key: Option<PathBuf>,

    /// CA certificates, in PEM, of the clients of --grpc-listen, as --tls-client-ca.
    #[arg(long, value_name = "FILE", requires = "grpc_tls_cert")]
    pub grpc_tls_client_ca: Option<PathBuf>,

    /// Address to serve Kubernetes' metrics APIs on, over TLS, for the kube-apiserver alone; :PORT is
    /// all interfaces.
    #[arg(long, value_name = "ADDRESS", value_parser = address)]
    pub metrics_listen: Option<SocketAddr>,

    /// Certificate chain for --metrics-listen, in PEM; without it, that of --tls-cert.
    #[arg(long, value_name = "FILE", requires_all = ["metrics_tls_key", "metrics_listen"])]
    pub metrics_tls_cert: Option<PathBuf>,

    /// Private key of that certificate, in PEM.
    #[arg(long, value_name = "FILE", requires = "metrics_tls_cert")]
    pub metrics_tls_key: Option<PathBuf>,

    /// CA certificates of the kube-apiserver's front proxy, in PEM, for --metrics-listen; without it,
    /// they and the names are read from the cluster.
    #[arg(long, value_name = "FILE", requires = "metrics_listen")]
    pub requestheader_client_ca_file: Option<PathBuf>,

    /// Common names that the front proxy's certificate may have; without them, any that the CA
    /// signed.
    #[arg(long, value_name = "NAMES", value_delimiter = ',', value_parser = common_name,
        requires = "requestheader_client_ca_file")]
    pub requestheader_allowed_names: Vec<String>,

    /// Folder of the pod's service account, by which the ConfigMap
    /// kube-system/extension-apiserver-authentication is read.
    #[arg(long, value_name = "FOLDER", default_value = "/var/run/secrets/kubernetes.io/serviceaccount",
        value_parser = folder)]
    pub service_account_dir: PathBuf,

    /// Allow unauthenticated access on non-loopback addresses: to report and read for every
    /// namespace, but not to change settings.
    #[arg(long)]
    pub insecure: bool,

    /// File in which per-key settings are persisted; without it, a restart forgets them. One that is
    /// there and cannot be replaced is read again when it changes, and nothing else sets settings.
    #[arg(long, value_name = "FILE")]
    pub settings: Option<PathBuf>,

    /// The filter's module, which Envoys can fetch from /module/inflight_filter.wasm.
    #[arg(long, value_name = "FILE")]
    pub module: Option<PathBuf>,

    /// Forwards every stat to this Knative autoscaler, for example
    /// ws://autoscaler.knative-serving:8080.
    #[arg(long, value_name = "URL", value_parser = websocket_url)]
    pub forward: Option<String>,

    /// Valkey or Redis (6.2 or later) by which several servers share one state, for example
    /// valkey://HOST:6379/0; settings of --settings are then those that an empty store begins with.
    #[arg(long, value_name = "URL")]
    pub store: Option<StoreUrl>,

    /// File whose first line is the password for --store.
    #[arg(long, value_name = "FILE", requires = "store")]
    pub store_password_file: Option<PathBuf>,

    /// CA certificates of the store, in PEM; without it, the system's.
    #[arg(long, value_name = "FILE", requires = "store")]
    pub store_tls_ca: Option<PathBuf>,

    /// Certificate chain that the store is shown, in PEM.
    #[arg(long, value_name = "FILE", requires_all = ["store_tls_key", "store"])]
    pub store_tls_cert: Option<PathBuf>,

    /// Private key of that certificate, in PEM.
    #[arg(long, value_name = "FILE", requires = "store_tls_cert")]
    pub store_tls_key: Option<PathBuf>,

    /// How long a key keeps its decision, and autoscalers their pods, when its pods and gateways fall
    /// silent in the midst of traffic.
    #[arg(long, value_name = "DURATION", default_value = in_minutes(STALE_AFTER), value_parser = stale_after)]
    pub stale_after: Duration,

    /// What to log: off, error, warn, info, debug or trace.
    #[arg(long, value_name = "LEVEL", default_value = "info", value_parser = log_level)]
    pub log_level: LevelFilter,

    /// How long to keep serving after SIGTERM, with /readyz at 503, before the listeners close.
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = drain_delay)]
    pub drain_delay: Duration,

    #[arg(long, help_heading = SCALING, value_name = "DURATION", help = STABLE_WINDOW.help,
        default_value = in_seconds(DEFAULTS.stable_window), value_parser = duration(&STABLE_WINDOW))]
    pub stable_window: Duration,

    #[arg(long, help_heading = SCALING, value_name = "PERCENT", help = PANIC_WINDOW_PERCENTAGE.help,
        default_value_t = DEFAULTS.panic_window_percentage, value_parser = number(&PANIC_WINDOW_PERCENTAGE))]
    pub panic_window_percentage: f64,

    /// Concurrency that one pod can handle.
    #[arg(long, help_heading = SCALING, value_name = "NUMBER",
        default_value_t = DEFAULTS.target, value_parser = number(&TARGET))]
    pub target: f64,

    /// Requests per second that one pod can handle, for keys with the metric rps.
    #[arg(long, help_heading = SCALING, value_name = "NUMBER",
        default_value_t = DEFAULT_RPS_TARGET, value_parser = number(&TARGET))]
    pub rps_target: f64,

    #[arg(long, help_heading = SCALING, value_name = "PERCENT", help = TARGET_UTILIZATION_PERCENTAGE.help,
        default_value_t = DEFAULTS.target_utilization_percentage,
        value_parser = number(&TARGET_UTILIZATION_PERCENTAGE))]
    pub target_utilization_percentage: f64,

    #[arg(long, help_heading = SCALING, value_name = "PERCENT", help = PANIC_THRESHOLD_PERCENTAGE.help,
        default_value_t = DEFAULTS.panic_threshold_percentage,
        value_parser = number(&PANIC_THRESHOLD_PERCENTAGE))]
    pub panic_threshold_percentage: f64,

    #[arg(long, help_heading = SCALING, value_name = "FACTOR", help = MAX_SCALE_UP_RATE.help,
        default_value_t = DEFAULTS.max_scale_up_rate, value_parser = number(&MAX_SCALE_UP_RATE))]
    pub max_scale_up_rate: f64,

    #[arg(long, help_heading = SCALING, value_name = "FACTOR", help = MAX_SCALE_DOWN_RATE.help,
        default_value_t = DEFAULTS.max_scale_down_rate, value_parser = number(&MAX_SCALE_DOWN_RATE))]
    pub max_scale_down_rate: f64,

    #[arg(long, help_heading = SCALING, value_name = "NUMBER", help = TARGET_BURST_CAPACITY.help,
        default_value_t = DEFAULTS.target_burst_capacity, value_parser = number(&TARGET_BURST_CAPACITY),
        allow_negative_numbers = true)]
    pub target_burst_capacity: f64,

    #[arg(long, help_heading = SCALING, value_name = "DURATION", help = SCALE_DOWN_DELAY.help,
        default_value = in_seconds(DEFAULTS.scale_down_delay), value_parser = duration(&SCALE_DOWN_DELAY))]
    pub scale_down_delay: Duration,

    #[arg(long, help_heading = SCALING, value_name = "PODS", help = ACTIVATION_SCALE.help,
        default_value_t = DEFAULTS.activation_scale, value_parser = pods(&ACTIVATION_SCALE))]
    pub activation_scale: u32,

    /// How much is accepted.
    #[command(flatten)]
    pub limits: Limits,
}

/// The heading of the flags whose names a key's settings have, too.
const SCALING: &str = "Scaling, for keys without settings of their own";

/// What somebody may do who shows neither a token nor a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnonymousAccess {
    /// Nothing: there are tokens, or a client CA.
    Denied,
    /// Everything: only this machine can connect.
    Full,
    /// Report and read, for every namespace: others can connect, by `--insecure`.
    WithoutSettings,
}

impl Flags {
    /// Returns the command line with all flags, each of which is also an environment variable.
    pub fn command_line() -> Command {
        Self::command().mut_args(|arg| match arg.get_long().map(variable_of) {
            Some(variable) => arg.env(variable),
            None => arg,
        })
    }

    /// Returns the variables of all flags.
    pub fn variables() -> Vec<String> {
        let flags = Self::command_line();
        flags.get_arguments().filter_map(|flag| flag.get_long()).map(variable_of).collect()
    }

    /// Checks that nobody has access who should not.
    ///
    /// # Errors
    /// In one line: what to do.
    pub fn check_access(&self) -> Result<(), String> {
        if self.token_file.is_some() || self.insecure {
            return Ok(());
        }
        let addresses = [
            ("--listen", self.listen, "--tls-client-ca", self.tls_client_ca.is_some()),
            ("--grpc-listen", self.grpc_listen, "--grpc-tls-client-ca", self.grpc_client_ca().is_some()),
        ];
        let is_open =
            |address: &SocketAddr, has_client_ca: bool| !address.ip().is_loopback() && !has_client_ca;
        match addresses.into_iter().find(|(_, address, _, has_client_ca)| is_open(address, *has_client_ca)) {
            None => Ok(()),
            Some((flag, address, client_ca, _)) => Err(format!(
                "{flag} is {address}, which other machines can reach; expected a loopback address, \
                 --token-file or {client_ca} (--insecure allows access without either)"
            )),
        }
    }

    /// Returns the CA of the clients of gRPC. With a certificate of its own it also has a CA of its own.
    fn grpc_client_ca(&self) -> Option<&PathBuf> {
        match self.grpc_tls_cert {
            Some(_) => self.grpc_tls_client_ca.as_ref(),
            None => self.tls_client_ca.as_ref(),
        }
    }

    /// Returns whether a certificate authenticates a client of any address.
    pub fn has_client_ca(&self) -> bool {
        self.tls_client_ca.is_some() || self.grpc_tls_client_ca.is_some()
    }

    /// Returns what somebody may do who shows nothing, if nothing is asked for. Settings are
    /// changed over HTTP.
    pub fn anonymous_access(&self) -> AnonymousAccess {
        if self.listen.ip().is_loopback() { AnonymousAccess::Full } else { AnonymousAccess::WithoutSettings }
    }

    /// Returns what keys are scaled by that have no settings of their own.
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
            ..DEFAULTS
        }
    }
}

fn in_seconds(duration: Duration) -> String {
    format!("{}s", duration.as_secs_f64())
}

/// Parses an address. `:PORT` is all interfaces, of IPv6 and IPv4.
fn address(text: &str) -> Result<SocketAddr, String> {
    let port = text.strip_prefix(':').and_then(|port| port.parse().ok());
    let address = match port {
        Some(port) => Some(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))),
        None => text.parse().ok(),
    };
    address.ok_or_else(|| {
        "expected IP:PORT, for example 127.0.0.1:8080 or [::1]:8080, or :PORT for all interfaces".into()
    })
}

fn common_name(text: &str) -> Result<String, String> {
    let is_name = !text.is_empty() && !text.chars().any(char::is_control);
    if is_name { Ok(text.to_owned()) } else { Err("expected names, separated by commas".into()) }
}

fn folder(text: &str) -> Result<PathBuf, String> {
    let is_path = !text.is_empty() && !text.chars().any(char::is_control);
    if is_path { Ok(text.into()) } else { Err("expected a folder".into()) }
}

fn number(setting: &'static Setting<f64>) -> impl Fn(&str) -> Result<f64, String> + Clone {
    move |text: &str| {
        let number = text.parse().ok().filter(|n: &f64| n.is_finite() && (setting.fits)(*n));
        number.ok_or_else(|| format!("expected {}", setting.expected))
    }
}

fn pods(setting: &'static Setting<u32>) -> impl Fn(&str) -> Result<u32, String> + Clone {
    move |text: &str| {
        let pods = text.parse().ok().filter(|pods| (setting.fits)(*pods));
        pods.ok_or_else(|| format!("expected {}", setting.expected))
    }
}

fn duration(setting: &'static Setting<Duration>) -> impl Fn(&str) -> Result<Duration, String> + Clone {
    move |text: &str| {
        let duration = parse_duration(text).filter(|duration| (setting.fits)(*duration));
        duration.ok_or_else(|| format!("expected {}", setting.expected))
    }
}

fn in_minutes(duration: Duration) -> String {
    format!("{}m", duration.as_secs() / 60)
}

fn stale_after(text: &str) -> Result<Duration, String> {
    let range = Duration::from_secs(1)..=Duration::from_secs(24 * 3600);
    let duration = parse_duration(text).filter(|duration| range.contains(duration));
    duration.ok_or_else(|| {
        r#"expected a duration from 1s to 1440m, such as "15m" or "90s"; units ms, s, m"#.into()
    })
}

fn drain_delay(text: &str) -> Result<Duration, String> {
    let delay = parse_duration(text).filter(|delay| *delay <= Duration::from_secs(3600));
    delay.ok_or_else(|| {
        r#"expected a duration from 0s to 60m, such as "1s" or "250ms"; units ms, s, m"#.into()
    })
}

fn log_level(text: &str) -> Result<LevelFilter, String> {
    text.parse().map_err(|_| "expected off, error, warn, info, debug or trace".into())
}

fn websocket_url(text: &str) -> Result<String, String> {
    let url = text.parse::<Uri>().ok().filter(|url| url.scheme_str() == Some("ws") && url.host().is_some());
    url.map(|_| text.to_owned()).ok_or_else(|| "expected ws://HOST[:PORT][/PATH]".into())
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
    fn every_flag_has_a_variable_and_a_help_text() {
        Flags::command_line().debug_assert();
        for flag in Flags::command_line().get_arguments() {
            let (name, variable) = (flag.get_long().unwrap(), flag.get_env().unwrap().to_str().unwrap());
            assert_eq!(variable.to_ascii_lowercase().replace('_', "-"), format!("inflight-{name}"));
            assert!(flag.get_help().is_some(), "{name}");
        }
    }

    #[test]
    fn a_port_alone_is_all_interfaces_and_no_loopback_address() {
        let flags = Flags::parse_from(["inflight-statserver", "--listen", ":8080"]);
        assert_eq!(flags.listen.to_string(), "[::]:8080");
        assert!(flags.check_access().is_err());
        for wrong in ["8080", "localhost:8080", ":", ":65536", "", "1.2.3.4"] {
            let error = Flags::try_parse_from(["inflight-statserver", "--listen", wrong]).unwrap_err();
            assert!(error.to_string().contains("expected IP:PORT, for example"), "{error}");
        }
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
        // A certificate for gRPC alone says nothing of who may report.
        let tls = ["--grpc-tls-cert", "x", "--grpc-tls-key", "x", "--grpc-tls-client-ca", "x"];
        let with_tls = |flag| check(&[&[flag, "0.0.0.0:80"], &tls[..]].concat());
        assert_eq!(with_tls("--grpc-listen"), Ok(()));
        assert!(with_tls("--listen").is_err());
        // Nor does the CA of HTTP of who may ask gRPC, which has a TLS of its own.
        let tls = ["--tls-cert", "x", "--tls-key", "x", "--tls-client-ca", "x"];
        let own = ["--grpc-tls-cert", "x", "--grpc-tls-key", "x", "--grpc-listen", "0.0.0.0:80"];
        assert!(check(&[tls, own].concat()).unwrap_err().contains("--grpc-tls-client-ca"));
    }

    #[test]
    fn insecure_gives_no_settings_to_other_machines() {
        let access =
            |more: &[&str]| Flags::parse_from(["inflight-statserver"].iter().chain(more)).anonymous_access();
        assert_eq!(access(&[]), AnonymousAccess::Full);
        assert_eq!(access(&["--insecure", "--listen", "[::1]:0"]), AnonymousAccess::Full);
        assert_eq!(access(&["--insecure", "--grpc-listen", "0.0.0.0:0"]), AnonymousAccess::Full);
        assert_eq!(access(&["--insecure", "--listen", "[::]:80"]), AnonymousAccess::WithoutSettings);
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
            ["--stale-after", "0s"],
            ["--log-level", "loud"],
            ["--forward", "http://autoscaler"],
            ["--forward", "ws:autoscaler"],
            ["--max-connections", "0"],
            ["--max-report-bytes", "1048577"],
            ["--body-timeout", "0s"],
            ["--max-depth", "65"],
            ["--activation-scale", "1000001"],
        ] {
            let error = Flags::try_parse_from(["inflight-statserver", wrong[0], wrong[1]]).unwrap_err();
            assert!(error.to_string().contains(": expected "), "{error}");
        }
    }
}
