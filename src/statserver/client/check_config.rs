//! `check-config`: the filter's own parser, and what it makes of a file.

use std::cell::RefCell;
use std::path::Path;
use std::time::Duration;

use inflight_stats::breaker::rules::BreakerLimits;
use inflight_stats::config::identity::Identity;
use inflight_stats::config::{
    Config, GatewayConfig, KeySource, NameFrom, NetworkProbeConfig, Role, StatServerConfig,
};
use inflight_stats::hold::settings::HoldSettings;
use serde_json::{Map, Value, json};

use crate::cli::commands::CheckConfigCommand;
use crate::client::output::print;
use crate::os::files;

const MAX_BYTES: u64 = 1 << 20;

/// Checks a file, and prints the configuration with all defaults.
///
/// # Errors
/// In one line, as the filter logs it.
pub fn check_config(command: &CheckConfigCommand) -> Result<(), String> {
    print(&format!("{:#}", checked(command)?))
}

fn checked(command: &CheckConfigCommand) -> Result<Value, String> {
    let CheckConfigCommand { file, istio } = command;
    let bytes = read(file).map_err(|error| format!("{}: {error}", file.display()))?;
    let node = if *istio { istio_node() } else { Identity::default() };
    // The variables of the VM's environment are not known here.
    let pod_env = RefCell::new(None);
    let config = Config::parse(&bytes, &node, |name| {
        *pod_env.borrow_mut() = Some(name.to_owned());
        Some(format!("${name}"))
    });
    let config = config.map_err(|error| format!("{}: {error}", file.display()))?;
    let mut effective = effective(&config);
    // `pod` is preferred to it.
    if let (Some(name), Some(fields)) = (pod_env.take(), effective.as_object_mut())
        && fields["pod"] == format!("${name}")
    {
        fields.remove("pod");
        fields.insert("pod_env".into(), json!(name));
    }
    Ok(effective)
}

fn read(file: &Path) -> std::io::Result<Vec<u8>> {
    if file != Path::new("-") {
        return files::read(file, MAX_BYTES);
    }
    files::read_from(std::io::stdin(), MAX_BYTES)
}

/// Returns what stands for the names that a proxy of Istio has.
fn istio_node() -> Identity {
    let from_node = |what: &str| format!("(the {what} in the node metadata)");
    Identity {
        namespace: from_node("namespace"),
        service: from_node("service"),
        configuration: from_node("configuration"),
        revision: from_node("revision"),
        pod: from_node("pod"),
    }
}

/// Returns a configuration with nothing left to defaults, which the filter reads as the same.
fn effective(config: &Config) -> Value {
    let Config {
        role,
        identity: Identity { namespace, service, configuration, revision, pod },
        name_from,
        reporting_period,
        proxied_header,
        gateway,
        limits,
        queue_timeout,
        probes_bypass_breaker,
        network_probe,
        statserver,
    } = config;
    let mut document = Map::new();
    let mut set = |key: &str, value: Value| drop(document.insert(key.into(), value));
    set("role", json!(name_of(*role)));
    set("namespace", json!(namespace));
    set("service", json!(service));
    set("configuration", json!(configuration));
    set("revision", json!(revision));
    set("pod", json!(pod));
    set(
        "name_from",
        json!(match name_from {
            NameFrom::Revision => "revision",
            NameFrom::Service => "service",
        }),
    );
    set("reporting_period", duration(*reporting_period));
    set("proxied_header", json!(proxied_header));
    match limits {
        None => set("container_concurrency", json!(0)),
        Some(BreakerLimits { concurrency, queue_depth }) => {
            set("container_concurrency", json!(concurrency));
            set("queue_depth", json!(queue_depth));
        }
    }
    if let Some(timeout) = queue_timeout {
        set("queue_timeout", duration(*timeout));
    }
    set("probes_bypass_breaker", json!(probes_bypass_breaker));
    set("answer_network_probe", json!(network_probe.is_some()));
    if let Some(NetworkProbeConfig { app_cluster, path }) = network_probe {
        set("app_cluster", json!(app_cluster));
        set("app_probe_path", json!(path));
    }
    if *role == Role::Gateway || *gateway != GatewayConfig::default() {
        set("gateway", effective_gateway(gateway));
    }
    if let Some(StatServerConfig { cluster, authority, path, timeout, token_env }) = statserver {
        let mut statserver = json!({
            "cluster": cluster, "authority": authority, "path": path, "timeout": duration(*timeout),
        });
        if let (Some(variable), Some(fields)) = (token_env, statserver.as_object_mut()) {
            fields.insert("token_env".into(), json!(variable));
        }
        set("statserver", statserver);
    }
    Value::Object(document)
}

fn effective_gateway(gateway: &GatewayConfig) -> Value {
    let GatewayConfig { key, max_keys, mark, hold } = gateway;
    let key = match key {
        KeySource::Cluster => json!({"from": "cluster"}),
        KeySource::Headers { namespace, name } => {
            json!({"from": "headers", "namespace": namespace, "name": name})
        }
    };
    let mut fields = Map::new();
    fields.insert("key".into(), key);
    fields.insert("max_keys".into(), json!(max_keys));
    fields.insert("mark".into(), json!(mark));
    if let Some(HoldSettings { timeout, depth, probe_path, probe_period, trust, release }) = hold {
        let hold = json!({
            "timeout": duration(*timeout), "depth": depth, "probe_path": probe_path,
            "probe_period": duration(*probe_period), "trust": duration(*trust), "release": release,
        });
        fields.insert("hold".into(), hold);
    }
    Value::Object(fields)
}

fn name_of(role: Role) -> &'static str {
    match role {
        Role::Sidecar => "sidecar",
        Role::Gateway => "gateway",
        Role::Exporter => "exporter",
    }
}

fn duration(duration: Duration) -> Value {
    let text = match duration.subsec_nanos() {
        0 => format!("{}s", duration.as_secs()),
        _ => format!("{}ms", duration.as_secs_f64() * 1000.0),
    };
    json!(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_is_the_same_configuration() {
        for given in [
            json!({"namespace": "ns", "revision": "r", "pod": "p"}),
            json!({
                "namespace": "ns", "service": "s", "pod": "p", "revision": "r", "name_from": "service",
                "reporting_period": "250ms", "container_concurrency": 7, "queue_timeout": "1.5s",
                "proxied_header": "X-Proxied", "probes_bypass_breaker": true, "answer_network_probe": true,
                "app_cluster": "app", "app_probe_path": "/healthy",
                "statserver": {"cluster": "c", "token_env": "TOKEN", "timeout": "30s"},
            }),
            json!({"role": "gateway", "pod": "gw", "gateway": {
                "key": {"from": "headers"}, "max_keys": 5, "mark": false,
                "hold": {"timeout": "90s", "probe_period": "5ms", "release": 3},
            }}),
            json!({"role": "exporter", "namespace": "ns", "revision": "r", "pod": "p", "queue_depth": 3}),
        ] {
            let parse =
                |json: &Value| Config::parse(json.to_string().as_bytes(), &Identity::default(), |_| None);
            let config = parse(&given).unwrap();
            let printed = effective(&config);
            assert_eq!(parse(&printed).as_ref(), Ok(&config), "{printed}");
        }
    }

    #[test]
    fn a_variable_that_has_the_pods_name_stays_a_variable() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("config.json");
        let command = CheckConfigCommand { file: file.clone(), istio: false };
        for (given, pod, pod_env) in [
            (json!({"pod_env": "POD"}), Value::Null, json!("POD")),
            (json!({"pod_env": "POD", "pod": "p"}), json!("p"), Value::Null),
        ] {
            let mut document = json!({"namespace": "ns", "revision": "r"});
            document.as_object_mut().unwrap().extend(given.as_object().unwrap().clone());
            std::fs::write(&file, document.to_string()).unwrap();
            let printed = checked(&command).unwrap();
            assert_eq!((&printed["pod"], &printed["pod_env"]), (&pod, &pod_env), "{printed}");
        }
    }

    #[test]
    fn a_mistake_is_the_filters_own_line() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("config.json");
        std::fs::write(&file, r#"{"rol": "gateway"}"#).unwrap();
        let command = |istio| CheckConfigCommand { file: file.clone(), istio };
        let error = checked(&command(false)).unwrap_err();
        let expected = "unknown key `rol`; did you mean `role`?";
        assert!(error.ends_with(expected) && error.starts_with(&file.display().to_string()), "{error}");
        std::fs::write(&file, "{}").unwrap();
        assert!(checked(&command(false)).unwrap_err().contains("`namespace`"));
        assert!(checked(&command(true)).is_ok(), "the proxy has the names");
    }
}
