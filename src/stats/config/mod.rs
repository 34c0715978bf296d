//! The plugin's configuration: JSON, every key checked, every mistake named with its key, what it
//! was and what is allowed.

pub(crate) mod fields;
pub mod identity;

use std::time::Duration;

use serde_json::{Map, Value};

use crate::breaker::rules::Limits;
use crate::config::fields::Fields;
pub use crate::config::fields::{ConfigError, parse_duration};
use crate::config::identity::Identity;

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
pub struct StatServer {
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
    /// The cluster that the request goes to ([`crate::gateway::key_name::KeyName::of_cluster`]).
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
pub struct Gateway {
    /// Where the key comes from.
    pub key: KeySource,
    /// The most keys that are told apart in the life of an Envoy.
    pub max_keys: u32,
    /// Whether requests go on marked as proxied.
    pub mark: bool,
}

/// A checked configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// What the filter does.
    pub role: Role,
    /// Who it serves.
    pub identity: Identity,
    /// The distance between two reports.
    pub reporting_period: Duration,
    /// The header that marks a proxied request, in lower case.
    pub proxied_header: String,
    /// For the role `gateway`.
    pub gateway: Gateway,
    /// What the breaker lets through; without it, everything.
    pub limits: Option<Limits>,
    /// The longest wait in the breaker's queue.
    pub queue_timeout: Option<Duration>,
    /// Whether probes pass by the breaker instead of through it; for the role `sidecar`.
    pub probes_bypass_breaker: bool,
    /// Where reports go; without it, only Envoy stats are kept.
    pub statserver: Option<StatServer>,
}

/// Knative's own limit of a revision's containerConcurrency is 1000.
const MOST_CONCURRENCY: u32 = 100_000;
/// Each request that comes or goes while others wait reads and writes the whole queue.
const MOST_QUEUE_DEPTH: u32 = 100_000;
/// Each key costs Envoy some ten stats, which it cannot delete.
const MOST_KEYS: u32 = 1_000_000;
/// As in knative/serving, `cmd/queue`.
const QUEUE_DEPTH_FACTOR: u32 = 10;
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

impl Config {
    /// Reads and checks a configuration; none at all is an empty one. What it leaves out of the identity is
    /// taken from `node`.
    ///
    /// # Errors
    /// [`ConfigError`], for the first mistake.
    pub fn parse(json: &[u8], node: &Identity) -> Result<Self, ConfigError> {
        let parsed = match json.is_empty() {
            true => Ok(Value::Object(Map::new())),
            false => serde_json::from_slice(json),
        };
        let document = parsed.map_err(|error| ConfigError {
            key: String::new(),
            was: format!("not JSON ({error})"),
            allowed: "a JSON object".into(),
        })?;
        let mut fields = Fields::new("", document)?;
        let roles = [("sidecar", Role::Sidecar), ("gateway", Role::Gateway), ("exporter", Role::Exporter)];
        let role = fields.one_of("role", &roles)?.unwrap_or(Role::Sidecar);
        // A gateway stands for no revision; its namespace only completes clusters that name none.
        let name = if role == Role::Gateway { Fields::label } else { Fields::name };
        let config = Self {
            role,
            identity: Identity {
                namespace: name(&mut fields, "namespace", &node.namespace)?,
                service: fields.label("service", &node.service)?,
                configuration: fields.label("configuration", &node.configuration)?,
                revision: name(&mut fields, "revision", &node.revision)?,
                pod: fields.name("pod", &node.pod)?,
            },
            gateway: fields.object("gateway")?.map(Gateway::parse).transpose()?.unwrap_or_default(),
            reporting_period: fields
                .duration("reporting_period", Duration::from_millis(100), Duration::from_secs(60))?
                .unwrap_or(Duration::from_secs(1)),
            proxied_header: fields.header("proxied_header")?.unwrap_or_else(|| "k-proxy-request".into()),
            limits: limits(&mut fields)?,
            queue_timeout: fields.duration("queue_timeout", Duration::from_millis(10), LONGEST_WAIT)?,
            probes_bypass_breaker: fields.boolean("probes_bypass_breaker")?.unwrap_or(false),
            statserver: fields.object("statserver")?.map(StatServer::parse).transpose()?,
        };
        fields.finish()?;
        Ok(config)
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

impl Default for Gateway {
    fn default() -> Self {
        Self { key: KeySource::Cluster, max_keys: 10_000, mark: true }
    }
}

impl Gateway {
    fn parse(mut fields: Fields) -> Result<Self, ConfigError> {
        let default = Self::default();
        let key = fields.object("key")?.map(KeySource::parse).transpose()?;
        let max_keys = fields.integer("max_keys", MOST_KEYS)?;
        let gateway = Self {
            key: key.unwrap_or(default.key),
            max_keys: max_keys.unwrap_or(default.max_keys),
            mark: fields.boolean("mark")?.unwrap_or(default.mark),
        };
        fields.finish()?;
        Ok(gateway)
    }
}

impl KeySource {
    fn parse(mut fields: Fields) -> Result<Self, ConfigError> {
        let source = if fields.one_of("from", &[("cluster", false), ("headers", true)])?.unwrap_or(false) {
            Self::Headers {
                namespace: fields.header("namespace")?.unwrap_or_else(|| "knative-serving-namespace".into()),
                name: fields.header("name")?.unwrap_or_else(|| "knative-serving-revision".into()),
            }
        } else {
            Self::Cluster
        };
        fields.finish()?;
        Ok(source)
    }
}

fn limits(fields: &mut Fields) -> Result<Option<Limits>, ConfigError> {
    let concurrency = fields.integer("container_concurrency", MOST_CONCURRENCY)?.unwrap_or(0);
    let queue_depth = fields.integer("queue_depth", MOST_QUEUE_DEPTH)?;
    let queue_depth =
        queue_depth.unwrap_or(concurrency.saturating_mul(QUEUE_DEPTH_FACTOR).min(MOST_QUEUE_DEPTH));
    Ok((concurrency > 0).then_some(Limits { concurrency, queue_depth }))
}

impl StatServer {
    fn parse(mut fields: Fields) -> Result<Self, ConfigError> {
        let cluster = fields.name("cluster", "")?;
        let server = Self {
            authority: fields.name("authority", &cluster)?,
            path: fields.path("path")?.unwrap_or_else(|| "/v1/reports".into()),
            timeout: fields
                .duration("timeout", Duration::from_millis(10), Duration::from_secs(60))?
                .unwrap_or(Duration::from_secs(1)),
            token_env: fields.string("token_env", "the name of a variable", |name| {
                !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
            })?,
            cluster,
        };
        fields.finish()?;
        Ok(server)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = r#"{"namespace": "ns", "revision": "rev", "pod": "pod"}"#;

    fn parse(json: &str) -> Result<Config, ConfigError> {
        Config::parse(json.as_bytes(), &Identity::default())
    }

    fn refused(change: &str) -> String {
        let json = format!(r#"{{"namespace": "ns", "revision": "rev", "pod": "pod", {change}}}"#);
        parse(&json).unwrap_err().to_string()
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
        assert_eq!((config.gateway, config.identity.namespace.as_str()), (Gateway::default(), ""));
        let key = r#"{"from": "headers", "namespace": "Knative-Serving-Namespace"}"#;
        let json =
            format!(r#"{{"role": "gateway", "pod": "gw-1", "gateway": {{"key": {key}, "mark": false}}}}"#);
        let gateway = parse(&json).unwrap().gateway;
        let (namespace, name) = ("knative-serving-namespace".into(), "knative-serving-revision".into());
        assert_eq!(
            gateway,
            Gateway { key: KeySource::Headers { namespace, name }, max_keys: 10_000, mark: false }
        );
    }

    #[test]
    fn what_is_left_out_comes_from_the_node() {
        let node = Identity {
            namespace: "mesh".into(),
            revision: "v1".into(),
            pod: "pod-1".into(),
            ..Identity::default()
        };
        let config = Config::parse(br#"{"revision": "v2"}"#, &node).unwrap();
        assert_eq!(config.domain(), "mesh/v2/pod-1");
        assert_eq!(Config::parse(b"", &node).unwrap().domain(), "mesh/v1/pod-1");
    }

    #[test]
    fn every_mistake_names_the_key_what_it_was_and_what_is_allowed() {
        let cases = [
            (
                r#""reporting_perod": "1s""#,
                "`reporting_perod` was an unknown key, allowed is one of role, namespace,",
            ),
            (
                r#""reporting_period": "10ms""#,
                r#"`reporting_period` was "10ms", allowed is a duration from 100ms to 60s"#,
            ),
            (r#""reporting_period": "61s""#, r#"`reporting_period` was "61s""#),
            (r#""reporting_period": 1"#, "`reporting_period` was 1,"),
            (r#""reporting_period": "-1s""#, r#"`reporting_period` was "-1s""#),
            (r#""reporting_period": "1h""#, r#"`reporting_period` was "1h""#),
            (r#""reporting_period": "1e1s""#, r#"`reporting_period` was "1e1s""#),
            (
                r#""role": "router""#,
                r#"`role` was "router", allowed is "sidecar" or "gateway" or "exporter""#,
            ),
            (r#""gateway": {"mark": "yes"}"#, r#"`gateway.mark` was "yes", allowed is true or false"#),
            (
                r#""gateway": {"key": {"from": "path"}}"#,
                r#"`gateway.key.from` was "path", allowed is "cluster" or "headers""#,
            ),
            (
                r#""gateway": {"key": {"name": "x"}}"#,
                "`gateway.key.name` was an unknown key, allowed is one of from",
            ),
            (
                r#""container_concurrency": -1"#,
                "`container_concurrency` was -1, allowed is a whole number from 0 to",
            ),
            (r#""container_concurrency": 1.5"#, "`container_concurrency` was 1.5"),
            (r#""queue_depth": "10""#, r#"`queue_depth` was "10""#),
            (r#""queue_depth": 4294967296"#, "`queue_depth` was 4294967296"),
            (
                r#""queue_timeout": "1ms""#,
                r#"`queue_timeout` was "1ms", allowed is a duration from 10ms to 3600s"#,
            ),
            (
                r#""probes_bypass_breaker": "no""#,
                r#"`probes_bypass_breaker` was "no", allowed is true or false"#,
            ),
            (r#""role": ["sidecar"]"#, r#"`role` was ["sidecar"]"#),
            (
                r#""proxied_header": "a b""#,
                r#"`proxied_header` was "a b", allowed is the name of an HTTP header"#,
            ),
            (r#""statserver": "stats""#, r#"`statserver` was "stats", allowed is a JSON object"#),
            (r#""statserver": {}"#, "`statserver.cluster` was not set"),
            (r#""statserver": {"cluster": "c", "tiemout": "1s"}"#, "`statserver.tiemout` was an unknown key"),
            (r#""statserver": {"cluster": "c", "path": "v1"}"#, r#"`statserver.path` was "v1""#),
            (r#""statserver": {"cluster": "c", "token_env": "A-B"}"#, r#"`statserver.token_env` was "A-B""#),
        ];
        for (change, expected) in cases {
            let error = refused(change);
            assert!(error.contains(expected), "{change}: {error}");
        }
    }

    #[test]
    fn an_identity_must_not_end_up_empty() {
        let error = parse(r#"{"namespace": "ns", "revision": "", "pod": "pod"}"#).unwrap_err();
        assert_eq!((error.key.as_str(), error.was.as_str()), ("revision", "\"\""));
        let error = parse(r#"{"namespace": "ns", "revision": "rev"}"#).unwrap_err();
        assert_eq!((error.key.as_str(), error.was.as_str()), ("pod", "not set"));
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
