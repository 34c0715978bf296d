//! The plugin's configuration: JSON, of which every key is checked. Every mistake is reported with
//! its key, what was given and what was expected.

pub(crate) mod fields;
pub mod identity;
pub mod options;
pub mod suggestion;

use std::borrow::Cow;
use std::ops::RangeInclusive;
use std::time::Duration;

use serde_json::{Map, Value};

use crate::breaker::rules::BreakerLimits;
use crate::config::fields::Fields;
pub use crate::config::fields::{ConfigError, parse_duration};
use crate::config::identity::Identity;
use crate::hold::settings::HoldSettings;
use crate::protocol::report::is_name;

/// What a filter does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Counts for the pod it stands in.
    Sidecar,
    /// Counts per destination, in front of the pods.
    Gateway,
    /// Shows the pod's figures at `/metrics`, on a listener of its own.
    Exporter,
}

/// Where reports go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatServerConfig {
    /// The Envoy cluster to call.
    pub cluster: String,
    /// The `:authority` of the call.
    pub authority: String,
    /// The `:path` of the call.
    pub path: String,
    /// How long to wait for the answer.
    pub timeout: Duration,
    /// The variable of the VM's environment that holds the bearer token.
    pub token_env: Option<String>,
}

/// Where a gateway's key comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeySource {
    /// The cluster that the request goes to ([`crate::gateway::key_name::KeyName::from_cluster`]).
    Cluster,
    /// Two headers, in lower case.
    Headers {
        /// The one with the namespace.
        namespace: String,
        /// The one with the name.
        name: String,
    },
}

/// What is particular to the role `gateway`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GatewayConfig {
    /// Where the key comes from.
    pub key: KeySource,
    /// Maximum number of keys tracked at once; only the first so many names get Envoy stats.
    pub max_keys: u32,
    /// Whether requests go on marked as proxied.
    pub mark: bool,
    /// How requests are held until a pod can take them; `None` if they are not.
    pub hold: Option<HoldSettings>,
}

/// How a sidecar answers the network probes of Knative's activator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkProbeConfig {
    /// The Envoy cluster of the app.
    pub app_cluster: String,
    /// The `:path` of the probe that the app gets.
    pub path: String,
}

/// Where a sidecar's key has its name from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameFrom {
    /// The revision.
    Revision,
    /// The service alone.
    Service,
}

/// A checked configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// What the filter does.
    pub role: Role,
    /// Who it serves.
    pub identity: Identity,
    /// Which of its names a sidecar reports under.
    pub name_from: NameFrom,
    /// The distance between two reports.
    pub reporting_period: Duration,
    /// The header that marks a proxied request, in lower case.
    pub proxied_header: String,
    /// For the role `gateway`.
    pub gateway: GatewayConfig,
    /// What the breaker lets through; without it, everything.
    pub limits: Option<BreakerLimits>,
    /// The longest wait in the breaker's queue.
    pub queue_timeout: Option<Duration>,
    /// Whether probes pass by the breaker instead of through it; for the role `sidecar`.
    pub probes_bypass_breaker: bool,
    /// How network probes are answered; `None` if they go on to the app; for the role `sidecar`.
    pub network_probe: Option<NetworkProbeConfig>,
    /// Where reports go; without it, only Envoy stats are kept.
    pub statserver: Option<StatServerConfig>,
}

/// Knative's own limit of a revision's containerConcurrency is 1000.
const MAX_CONCURRENCY: u32 = 100_000;
/// Each request that comes or goes while others wait reads and writes the whole queue.
const MAX_QUEUE_DEPTH: u32 = 100_000;
/// How long a request may be made to wait. [`options::A_TIMEOUT`] says so.
const TIMEOUTS: RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_secs(3600);
const MINUTE: Duration = Duration::from_secs(60);
/// Each key costs Envoy some ten stats, which it cannot delete.
const MAX_KEYS: u32 = 1_000_000;
/// As in knative/serving, `cmd/queue`.
const QUEUE_DEPTH_FACTOR: u32 = 10;

impl Config {
    /// Reads and checks a configuration; none at all is an empty one. What it leaves out of the
    /// identity is taken from `node`. `environment` returns a variable of the VM's environment.
    ///
    /// # Errors
    /// [`ConfigError`], for the first mistake. Unknown keys are reported before missing ones: a key
    /// is often missing because it is misspelt.
    pub fn parse(
        json: &[u8],
        node: &Identity,
        environment: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, ConfigError> {
        const DOCUMENT: &str = "configuration";
        let parsed = match json.is_empty() {
            true => Ok(Value::Object(Map::new())),
            false => serde_json::from_slice(json),
        };
        let document = parsed.map_err(|error| ConfigError::not_json(DOCUMENT, &error))?;
        let mut fields = Fields::new(DOCUMENT, "", document, &options::DOCUMENT_KEYS)?;
        let statserver = fields.object(options::STATSERVER.name, &options::STATSERVER_KEYS)?;
        let gateway = fields.object(options::GATEWAY.name, &options::GATEWAY_KEYS)?;
        let gateway = gateway.map(GatewayConfig::parse).transpose()?.unwrap_or_default();
        let roles = [("sidecar", Role::Sidecar), ("gateway", Role::Gateway), ("exporter", Role::Exporter)];
        let role =
            fields.one_of(options::ROLE.name, options::ROLE.expected, &roles)?.unwrap_or(Role::Sidecar);
        let names = [("revision", NameFrom::Revision), ("service", NameFrom::Service)];
        let name_from = fields.one_of(options::NAME_FROM.name, options::NAME_FROM.expected, &names)?;
        let name_from = name_from.unwrap_or(NameFrom::Revision);
        let needs_service = role != Role::Gateway && name_from == NameFrom::Service;
        let service = if needs_service { Fields::name } else { Fields::label };
        // A gateway stands for no revision; its namespace only completes clusters that name none.
        let name = if role == Role::Gateway { Fields::label } else { Fields::name };
        let pod = match variable(&mut fields, options::POD_ENV)? {
            None => Cow::Borrowed(&node.pod),
            Some(name) => match environment(&name) {
                Some(pod) if is_name(&pod) => Cow::Owned(pod),
                given => {
                    let expected =
                        if given.is_some() { options::A_VARIABLE_WITH_A_NAME } else { options::A_VARIABLE };
                    return Err(fields.error(options::POD_ENV.name, format!("{name:?}"), expected));
                }
            },
        };
        Ok(Self {
            role,
            identity: Identity {
                namespace: name(&mut fields, options::NAMESPACE.name, &node.namespace)?,
                service: service(&mut fields, options::SERVICE.name, &node.service)?,
                configuration: fields.label(options::CONFIGURATION.name, &node.configuration)?,
                revision: name(&mut fields, options::REVISION.name, &node.revision)?,
                pod: fields.name(options::POD.name, &pod)?,
            },
            name_from,
            gateway,
            reporting_period: duration(
                &mut fields,
                options::REPORTING_PERIOD,
                Duration::from_millis(100)..=MINUTE,
            )?
            .unwrap_or(Duration::from_secs(1)),
            proxied_header: fields
                .header(options::PROXIED_HEADER.name)?
                .unwrap_or_else(|| "k-proxy-request".into()),
            limits: limits(&mut fields)?,
            queue_timeout: duration(&mut fields, options::QUEUE_TIMEOUT, TIMEOUTS)?,
            probes_bypass_breaker: fields.boolean(options::PROBES_BYPASS_BREAKER.name)?.unwrap_or(false),
            network_probe: network_probe(&mut fields)?,
            statserver: statserver.map(StatServerConfig::parse).transpose()?,
        })
    }

    /// Returns the key that a sidecar reports: `NAMESPACE/NAME`.
    pub fn key(&self) -> String {
        format!("{}/{}", self.identity.namespace, self.name())
    }

    /// Returns the name that a sidecar reports under.
    pub fn name(&self) -> &str {
        match self.name_from {
            NameFrom::Revision => &self.identity.revision,
            NameFrom::Service => &self.identity.service,
        }
    }

    /// What tells this pod's figures from those of another plugin in the same VM.
    pub fn domain(&self) -> String {
        let Identity { namespace, revision, pod, .. } = &self.identity;
        match self.role {
            Role::Gateway => format!("gateway/{pod}"),
            Role::Sidecar | Role::Exporter => format!("{namespace}/{revision}/{pod}"),
        }
    }
}

impl Default for GatewayConfig {
    fn default() -> Self {
        Self { key: KeySource::Cluster, max_keys: 10_000, mark: true, hold: None }
    }
}

impl GatewayConfig {
    fn parse(mut fields: Fields) -> Result<Self, ConfigError> {
        let default = Self::default();
        let key = fields.object(options::GATEWAY_KEY.name, &options::GATEWAY_KEY_KEYS)?;
        let key = key.map(KeySource::parse).transpose()?;
        let hold = fields.object(options::GATEWAY_HOLD.name, &options::HOLD_KEYS)?;
        let hold = hold.map(HoldSettings::parse).transpose()?;
        let max_keys =
            fields.integer(options::GATEWAY_MAX_KEYS.name, options::GATEWAY_MAX_KEYS.expected, |n| {
                n <= MAX_KEYS
            })?;
        Ok(Self {
            key: key.unwrap_or(default.key),
            max_keys: max_keys.unwrap_or(default.max_keys),
            mark: fields.boolean(options::GATEWAY_MARK.name)?.unwrap_or(default.mark),
            hold,
        })
    }
}

impl HoldSettings {
    fn parse(mut fields: Fields) -> Result<Self, ConfigError> {
        let default = Self::default();
        let timeout = duration(&mut fields, options::HOLD_TIMEOUT, TIMEOUTS)?;
        let probe_period =
            duration(&mut fields, options::HOLD_PROBE_PERIOD, Duration::from_millis(5)..=MINUTE)?;
        let trust = duration(&mut fields, options::HOLD_TRUST, TIMEOUTS)?;
        let mut number = |key: options::ConfigKey| {
            fields.integer(key.name, key.expected, |n| (1..=MAX_QUEUE_DEPTH).contains(&n))
        };
        Ok(Self {
            timeout: timeout.unwrap_or(default.timeout),
            depth: number(options::HOLD_DEPTH)?.unwrap_or(default.depth),
            probe_period: probe_period.unwrap_or(default.probe_period),
            trust: trust.unwrap_or(default.trust),
            release: number(options::HOLD_RELEASE)?.unwrap_or(default.release),
            probe_path: fields.url_path(options::HOLD_PROBE_PATH.name)?.unwrap_or(default.probe_path),
        })
    }
}

impl KeySource {
    fn parse(mut fields: Fields) -> Result<Self, ConfigError> {
        let sources = [("cluster", false), ("headers", true)];
        let from =
            fields.one_of(options::GATEWAY_KEY_FROM.name, options::GATEWAY_KEY_FROM.expected, &sources)?;
        let [namespace, name] = [options::GATEWAY_KEY_NAMESPACE.name, options::GATEWAY_KEY_NAME.name];
        if !from.unwrap_or(false) {
            fields.absent(namespace, FROM_HEADERS)?;
            fields.absent(name, FROM_HEADERS)?;
            return Ok(Self::Cluster);
        }
        Ok(Self::Headers {
            namespace: fields.header(namespace)?.unwrap_or_else(|| "knative-serving-namespace".into()),
            name: fields.header(name)?.unwrap_or_else(|| "knative-serving-revision".into()),
        })
    }
}

/// When a gateway's key names headers.
const FROM_HEADERS: &str = r#"it only with "from": "headers""#;

/// When the network probe's keys are allowed.
const WITH_NETWORK_PROBE: &str = r#"it only with "answer_network_probe": true"#;

fn network_probe(fields: &mut Fields) -> Result<Option<NetworkProbeConfig>, ConfigError> {
    let [app_cluster, path] = [options::APP_CLUSTER.name, options::APP_PROBE_PATH.name];
    if !fields.boolean(options::ANSWER_NETWORK_PROBE.name)?.unwrap_or(false) {
        fields.absent(app_cluster, WITH_NETWORK_PROBE)?;
        fields.absent(path, WITH_NETWORK_PROBE)?;
        return Ok(None);
    }
    Ok(Some(NetworkProbeConfig {
        app_cluster: fields.name(app_cluster, "")?,
        path: fields.url_path(path)?.unwrap_or_else(|| "/".into()),
    }))
}

/// Takes a duration, if there is one.
fn duration(
    fields: &mut Fields,
    key: options::ConfigKey,
    allowed: RangeInclusive<Duration>,
) -> Result<Option<Duration>, ConfigError> {
    fields.duration(key.name, key.expected, |given| allowed.contains(&given))
}

/// Takes the name of a variable of the VM's environment, if there is one.
fn variable(fields: &mut Fields, key: options::ConfigKey) -> Result<Option<String>, ConfigError> {
    let is_letter = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    fields.string(key.name, key.expected, |name| !name.is_empty() && name.bytes().all(is_letter))
}

fn limits(fields: &mut Fields) -> Result<Option<BreakerLimits>, ConfigError> {
    let key = options::CONTAINER_CONCURRENCY;
    let concurrency = fields.integer(key.name, key.expected, |n| n <= MAX_CONCURRENCY)?.unwrap_or(0);
    let key = options::QUEUE_DEPTH;
    let queue_depth = fields.integer(key.name, key.expected, |n| n <= MAX_QUEUE_DEPTH)?;
    let queue_depth =
        queue_depth.unwrap_or(concurrency.saturating_mul(QUEUE_DEPTH_FACTOR).min(MAX_QUEUE_DEPTH));
    Ok((concurrency > 0).then_some(BreakerLimits { concurrency, queue_depth }))
}

impl StatServerConfig {
    fn parse(mut fields: Fields) -> Result<Self, ConfigError> {
        let cluster = fields.name(options::STATSERVER_CLUSTER.name, "")?;
        Ok(Self {
            authority: fields.name(options::STATSERVER_AUTHORITY.name, &cluster)?,
            path: fields.url_path(options::STATSERVER_PATH.name)?.unwrap_or_else(|| "/v1/reports".into()),
            timeout: duration(&mut fields, options::STATSERVER_TIMEOUT, Duration::from_millis(10)..=MINUTE)?
                .unwrap_or(Duration::from_secs(1)),
            token_env: variable(&mut fields, options::STATSERVER_TOKEN_ENV)?,
            cluster,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = r#"{"namespace": "ns", "revision": "rev", "pod": "pod"}"#;

    fn parse(json: &str) -> Result<Config, ConfigError> {
        Config::parse(json.as_bytes(), &Identity::default(), |_| None)
    }

    fn refused(change: &str) -> String {
        let json = format!(r#"{{"namespace": "ns", "revision": "rev", "pod": "pod", {change}}}"#);
        parse(&json).unwrap_err().to_string()
    }

    #[test]
    fn a_pod_may_be_named_by_the_environment() {
        let environment = |name: &str| (name == "POD_NAME").then(|| "pod-7".to_owned());
        let parse = |keys: &str| {
            let json = format!(r#"{{"namespace": "ns", "revision": "rev", {keys}}}"#);
            let parsed = Config::parse(json.as_bytes(), &Identity::default(), environment);
            parsed.map(|config| config.identity.pod).map_err(|error| error.to_string())
        };
        assert_eq!(parse(r#""pod_env": "POD_NAME""#).as_deref(), Ok("pod-7"));
        assert_eq!(parse(r#""pod_env": "POD_NAME", "pod": "mine""#).as_deref(), Ok("mine"));
        let error = parse(r#""pod_env": "NONE""#).unwrap_err();
        assert!(
            error.starts_with(r#"invalid configuration: `pod_env` is "NONE"; expected the name of a"#),
            "{error}"
        );
        let error = Config::parse(br#"{"pod_env": "A"}"#, &Identity::default(), |_| Some("a\nb".into()));
        let error = error.unwrap_err().to_string();
        assert!(error.contains(r#"`pod_env` is "A"; expected the variable to hold "#), "{error}");
    }

    #[test]
    fn the_defaults_are_the_documented_ones() {
        let config = parse(MINIMAL).unwrap();
        assert_eq!(config.role, Role::Sidecar);
        assert_eq!(config.reporting_period, Duration::from_secs(1));
        assert_eq!(config.proxied_header, "k-proxy-request");
        assert_eq!((config.statserver, config.probes_bypass_breaker), (None, false));
        let config =
            parse(r#"{"namespace": "n", "revision": "r", "pod": "p", "statserver": {"cluster": "stats"}}"#)
                .unwrap();
        let server = config.statserver.unwrap();
        assert_eq!((server.authority.as_str(), server.path.as_str()), ("stats", "/v1/reports"));
        assert_eq!((server.timeout, server.token_env), (Duration::from_secs(1), None));
    }

    #[test]
    fn the_breakers_queue_is_ten_times_its_concurrency_unless_said_otherwise() {
        let limits = |more: &str| {
            let json = format!(r#"{{"namespace": "n", "revision": "r", "pod": "p", {more}}}"#);
            parse(&json).unwrap().limits.map(|l| (l.concurrency, l.queue_depth))
        };
        assert_eq!(limits(r#""queue_depth": 5"#), None);
        assert_eq!(limits(r#""container_concurrency": 7"#), Some((7, 70)));
        assert_eq!(limits(r#""container_concurrency": 7.0, "queue_depth": 0"#), Some((7, 0)));
    }

    #[test]
    fn a_gateway_needs_no_revision_and_has_its_own_keys() {
        let config = parse(r#"{"role": "gateway", "pod": "gw-1"}"#).unwrap();
        assert_eq!((config.gateway, config.identity.namespace.as_str()), (GatewayConfig::default(), ""));
        let key = r#"{"from": "headers", "namespace": "Knative-Serving-Namespace"}"#;
        let json =
            format!(r#"{{"role": "gateway", "pod": "gw-1", "gateway": {{"key": {key}, "mark": false}}}}"#);
        let gateway = parse(&json).unwrap().gateway;
        let (namespace, name) = ("knative-serving-namespace".into(), "knative-serving-revision".into());
        assert_eq!(
            gateway,
            GatewayConfig {
                key: KeySource::Headers { namespace, name },
                max_keys: 10_000,
                mark: false,
                hold: None
            }
        );
    }

    #[test]
    fn a_gateway_holds_only_if_it_is_told_to() {
        let hold = |hold: &str| {
            let json = format!(r#"{{"role": "gateway", "pod": "gw-1", "gateway": {{{hold}}}}}"#);
            parse(&json).unwrap().gateway.hold
        };
        assert_eq!(hold(""), None);
        assert_eq!(hold(r#""hold": {}"#), Some(HoldSettings::default()));
        let given = r#""hold": {"timeout": "5s", "depth": 7, "probe_path": "/ready", "probe_period": "10ms",
            "trust": "200ms", "release": 3}"#;
        let expected = HoldSettings {
            timeout: Duration::from_secs(5),
            depth: 7,
            probe_path: "/ready".into(),
            probe_period: Duration::from_millis(10),
            trust: Duration::from_millis(200),
            release: 3,
        };
        assert_eq!(hold(given), Some(expected));
    }

    #[test]
    fn a_sidecar_reports_its_revision_or_its_service() {
        let parse =
            |more: &str| parse(&format!(r#"{{"namespace": "n", "revision": "r", "pod": "p"{more}}}"#));
        assert_eq!(parse("").unwrap().key(), "n/r");
        assert_eq!(parse(r#", "name_from": "revision", "service": "s""#).unwrap().key(), "n/r");
        assert_eq!(parse(r#", "name_from": "service", "service": "s""#).unwrap().key(), "n/s");
        let error = parse(r#", "name_from": "service""#).unwrap_err().to_string();
        assert!(error.contains("`service` is missing; expected a string of 1 to 512 bytes"), "{error}");
    }

    #[test]
    fn what_is_left_out_comes_from_the_node() {
        let node = Identity {
            namespace: "mesh".into(),
            revision: "v1".into(),
            pod: "pod-1".into(),
            ..Identity::default()
        };
        let config = Config::parse(br#"{"revision": "v2"}"#, &node, |_| None).unwrap();
        assert_eq!(config.domain(), "mesh/v2/pod-1");
        assert_eq!(Config::parse(b"", &node, |_| None).unwrap().domain(), "mesh/v1/pod-1");
    }

    #[test]
    fn every_mistake_names_the_key_what_it_was_and_what_is_allowed() {
        let cases = [
            (r#""reporting_perod": "1s""#, "unknown key `reporting_perod`; did you mean `reporting_period`?"),
            (r#""colour": "red""#, "unknown key `colour`; expected one of role, namespace, service,"),
            (
                r#""reporting_period": "10ms""#,
                r#"`reporting_period` is "10ms"; expected a duration from 100ms to 60s"#,
            ),
            (r#""reporting_period": "61s""#, r#"`reporting_period` is "61s""#),
            (r#""reporting_period": 1"#, "`reporting_period` is 1;"),
            (r#""reporting_period": "-1s""#, r#"`reporting_period` is "-1s""#),
            (r#""reporting_period": "1h""#, r#"`reporting_period` is "1h""#),
            (r#""reporting_period": "1e1s""#, r#"`reporting_period` is "1e1s""#),
            (r#""role": "router""#, r#"`role` is "router"; expected "sidecar", "gateway" or "exporter""#),
            (r#""gateway": {"mark": "yes"}"#, r#"`gateway.mark` is "yes"; expected true or false"#),
            (
                r#""gateway": {"key": {"from": "path"}}"#,
                r#"`gateway.key.from` is "path"; expected "cluster" or "headers""#,
            ),
            (
                r#""gateway": {"key": {"name": "x"}}"#,
                r#"`gateway.key.name` is "x"; expected it only with "from": "headers""#,
            ),
            (
                r#""gateway": {"key": {"form": "headers"}}"#,
                "unknown key `gateway.key.form`; expected one of from, namespace, name",
            ),
            (
                r#""container_concurrency": -1"#,
                "`container_concurrency` is -1; expected a whole number from 0 to 100000",
            ),
            (r#""container_concurrency": 1.5"#, "`container_concurrency` is 1.5"),
            (r#""queue_depth": "10""#, r#"`queue_depth` is "10""#),
            (r#""queue_depth": 4294967296"#, "`queue_depth` is 4294967296"),
            (
                r#""queue_timeout": "1ms""#,
                r#"`queue_timeout` is "1ms"; expected a duration from 10ms to 60m"#,
            ),
            (
                r#""probes_bypass_breaker": "no""#,
                r#"`probes_bypass_breaker` is "no"; expected true or false"#,
            ),
            (
                r#""app_cluster": "app""#,
                r#"`app_cluster` is "app"; expected it only with "answer_network_probe": true"#,
            ),
            (
                r#""answer_network_probe": true"#,
                "`app_cluster` is missing; expected a string of 1 to 512 bytes",
            ),
            (
                r#""gateway": {"hold": {"timeout": "0s"}}"#,
                r#"`gateway.hold.timeout` is "0s"; expected a duration from 10ms to 60m"#,
            ),
            (
                r#""gateway": {"hold": {"relase": 5}}"#,
                "unknown key `gateway.hold.relase`; did you mean `gateway.hold.release`?",
            ),
            (r#""role": ["sidecar"]"#, r#"`role` is ["sidecar"]"#),
            (
                r#""proxied_header": "a b""#,
                r#"`proxied_header` is "a b"; expected the name of an HTTP header"#,
            ),
            (r#""statserver": "stats""#, r#"`statserver` is "stats"; expected a JSON object"#),
            (r#""statserver": {}"#, "`statserver.cluster` is missing; expected a string of 1 to 512 bytes"),
            (
                r#""statserver": {"cluster": "c", "tiemout": "1s"}"#,
                "unknown key `statserver.tiemout`; did you mean `statserver.timeout`?",
            ),
            (r#""statserver": {"cluster": "c", "path": "v1"}"#, r#"`statserver.path` is "v1""#),
            (r#""statserver": {"cluster": "c", "token_env": "A-B"}"#, r#"`statserver.token_env` is "A-B""#),
        ];
        for (change, expected) in cases {
            let error = refused(change);
            assert!(
                error.starts_with("invalid configuration: ") && error.contains(expected),
                "{change}: {error}"
            );
        }
    }

    #[test]
    fn a_misspelt_key_is_reported_before_the_one_that_is_missing() {
        let error = |json| parse(json).unwrap_err().to_string();
        assert_eq!(
            error(r#"{"namespace": "ns", "revision": "r", "pod_name": "p"}"#),
            "invalid configuration: unknown key `pod_name`; expected one of role, namespace, service, \
             configuration, revision, name_from, pod, pod_env, reporting_period, proxied_header, \
             container_concurrency, queue_depth, queue_timeout, probes_bypass_breaker, \
             answer_network_probe, app_cluster, app_probe_path, statserver, gateway"
        );
        assert_eq!(
            error(r#"{"statserver": {"clutser": "c"}}"#),
            "invalid configuration: unknown key `statserver.clutser`; did you mean `statserver.cluster`?"
        );
    }

    #[test]
    fn an_identity_must_not_end_up_empty() {
        let error = |json| parse(json).unwrap_err().to_string();
        let empty = error(r#"{"namespace": "ns", "revision": "", "pod": "pod"}"#);
        assert!(empty.contains(r#"`revision` is ""; expected a string of 1 to 512 bytes"#), "{empty}");
        let missing = error(r#"{"namespace": "ns", "revision": "rev"}"#);
        assert!(missing.contains("`pod` is missing; expected a string of 1 to 512 bytes"), "{missing}");
    }

    /// A document that is good but for `value` at one key.
    fn with(key: &options::ConfigKey, value: Value) -> Value {
        let from = if key.name == options::GATEWAY_KEY_FROM.name { Value::Null } else { "headers".into() };
        let answers = key.name != options::ANSWER_NETWORK_PROBE.name;
        let mut document = serde_json::json!({
            "namespace": "ns", "revision": "rev", "pod": "pod",
            "answer_network_probe": answers,
            "statserver": {"cluster": "c"},
            "gateway": {"key": {"from": from}, "hold": {}},
        });
        if answers {
            document["app_cluster"] = "app".into();
        }
        let object = key.object.split_terminator('.').fold(&mut document, |object, name| &mut object[name]);
        object[key.name] = value;
        document
    }

    #[test]
    fn every_key_of_the_table_is_read_and_what_the_table_says_of_it_holds() {
        let parse = |document: Value| parse(&document.to_string());
        for key in &options::CONFIG_KEYS {
            // Nothing allows an array.
            let error = parse(with(key, serde_json::json!([]))).unwrap_err().to_string();
            let expected = format!(
                "invalid configuration: `{}{}` is []; expected {}",
                key.object, key.name, key.expected
            );
            assert_eq!(error, expected);
            if let Ok(default) = serde_json::from_str::<Value>(key.default) {
                let mut without = with(key, Value::Null);
                let object =
                    key.object.split_terminator('.').fold(&mut without, |object, name| &mut object[name]);
                object.as_object_mut().unwrap().remove(key.name);
                assert_eq!(parse(with(key, default)).unwrap(), parse(without).unwrap(), "{}", key.name);
            }
        }
    }

    #[test]
    fn the_bounds_are_those_that_the_table_names() {
        let is_taken = |key: &options::ConfigKey, value: Value| parse(&with(key, value).to_string()).is_ok();
        for key in &options::CONFIG_KEYS {
            let range = key.expected.split(',').next().unwrap();
            let words: Vec<&str> = range.split(' ').collect();
            let ([.., "from", min, "to", max], is_duration) = (&words[..], words.get(1) == Some(&"duration"))
            else {
                continue;
            };
            for (bound, beyond) in [(min, -1), (max, 1)] {
                let unit = bound.trim_start_matches(|c: char| c.is_ascii_digit());
                let number: i64 = bound.trim_end_matches(unit).parse().unwrap();
                let value = |number: i64| match is_duration {
                    true => Value::from(format!("{number}{unit}")),
                    false => Value::from(number),
                };
                assert!(is_taken(key, value(number)), "{} {number}", key.name);
                assert!(!is_taken(key, value(number + beyond)), "{} {}", key.name, number + beyond);
            }
        }
    }

    #[test]
    fn what_is_no_object_is_refused_without_a_panic() {
        for json in ["", "null", "[]", "\"x\"", "{", "{\"a\":", &"[".repeat(100_000)] {
            assert!(parse(json).is_err());
        }
        let error = refused(&format!(r#""role": "{}""#, "ä".repeat(10_000)));
        assert!(error.len() < 400, "{error}");
    }

    #[test]
    fn durations_have_a_unit() {
        assert_eq!(parse_duration("1.5s"), Some(Duration::from_millis(1500)));
        assert_eq!(parse_duration("250ms"), Some(Duration::from_millis(250)));
        assert_eq!(parse_duration("2m"), Some(Duration::from_secs(120)));
        for wrong in ["", "s", "1", "1 s", "1.2.3s", "999999999999999999999999s", "ms1"] {
            assert_eq!(parse_duration(wrong), None, "{wrong}");
        }
    }
}
