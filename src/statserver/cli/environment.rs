//! Environment variables that look like flags and are none: misspelt ones would be ignored
//! silently.

use std::fmt;

use inflight_stats::config::suggestion::closest;

/// What the variables of all flags begin with.
pub const PREFIX: &str = "INFLIGHT_";

/// A variable that belongs to no flag.
#[derive(Debug, PartialEq, Eq)]
pub struct UnknownVariable {
    name: String,
    /// The variable that was probably meant.
    meant: Option<String>,
}

impl fmt::Display for UnknownVariable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unknown environment variable {}", self.name)?;
        match &self.meant {
            Some(meant) => write!(f, "; did you mean {meant}?"),
            None => f.write_str("; --help lists those that are known"),
        }
    }
}

/// Returns the variable of a flag, which is named without its dashes.
pub fn variable_of(flag: &str) -> String {
    format!("{PREFIX}{}", flag.to_ascii_uppercase().replace('-', "_"))
}

/// Returns those of `variables` that look like a flag's and are not in `known`.
pub fn unknown_variables(
    variables: impl IntoIterator<Item = String>,
    known: &[String],
) -> Vec<UnknownVariable> {
    let names = variables
        .into_iter()
        .filter(|name| name.starts_with(PREFIX) && !known.contains(name) && !is_set_by_kubernetes(name));
    let unknown = names.map(|name| {
        // The prefix that all share must not make names look alike.
        let known = known.iter().filter_map(|known| known.strip_prefix(PREFIX));
        let meant = closest(name.strip_prefix(PREFIX).unwrap_or(&name), known);
        let meant = meant.map(|meant| format!("{PREFIX}{meant}"));
        UnknownVariable { name, meant }
    });
    unknown.collect()
}

/// Returns whether Kubernetes sets such a variable in every container, for a Service whose name
/// begins with `inflight`: it describes the Service, in the style of Docker's links.
fn is_set_by_kubernetes(name: &str) -> bool {
    const SUFFIXES: [&str; 3] = ["_SERVICE_HOST", "_SERVICE_PORT", "_PORT"];
    let is_named_port = name.contains("_SERVICE_PORT_");
    is_named_port || SUFFIXES.iter().any(|suffix| name.ends_with(suffix)) || is_link_of_port(name)
}

/// Returns whether a name ends in `_PORT_<number>_<protocol>`, or in a part of that port's address.
fn is_link_of_port(name: &str) -> bool {
    let name = ["_ADDR", "_PORT", "_PROTO"].iter().find_map(|part| name.strip_suffix(part)).unwrap_or(name);
    let Some(name) = ["_TCP", "_UDP", "_SCTP"].iter().find_map(|protocol| name.strip_suffix(protocol)) else {
        return false;
    };
    name.rsplit_once("_PORT_")
        .is_some_and(|(_, number)| !number.is_empty() && number.bytes().all(|digit| digit.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variable_that_no_flag_has_is_named_with_the_one_that_was_meant() {
        let known = ["listen", "grpc-listen", "max-keys", "forward"].map(variable_of);
        let unknown = |name: &str| {
            let unknown = unknown_variables([name.to_owned()], &known);
            unknown.first().map(ToString::to_string).unwrap_or_default()
        };
        assert_eq!(unknown("INFLIGHT_MAX_KEYS"), "");
        assert_eq!(unknown("PATH"), "");
        assert_eq!(
            unknown("INFLIGHT_LISTENS"),
            "unknown environment variable INFLIGHT_LISTENS; did you mean INFLIGHT_LISTEN?"
        );
        assert_eq!(
            unknown("INFLIGHT_FOO"),
            "unknown environment variable INFLIGHT_FOO; --help lists those that are known"
        );
        assert_eq!(
            unknown("INFLIGHT_SOMETHING_ELSE_ALTOGETHER"),
            "unknown environment variable INFLIGHT_SOMETHING_ELSE_ALTOGETHER; --help lists those that are \
             known"
        );
    }

    #[test]
    fn what_kubernetes_sets_for_services_is_no_mistake() {
        for name in [
            "INFLIGHT_STATSERVER_SERVICE_HOST",
            "INFLIGHT_STATSERVER_SERVICE_PORT",
            "INFLIGHT_STATSERVER_SERVICE_PORT_GRPC",
            "INFLIGHT_SERVICE_HOST",
            "INFLIGHT_PORT",
            "INFLIGHT_STATSERVER_PORT",
            "INFLIGHT_STATSERVER_PORT_8080_TCP",
            "INFLIGHT_STATSERVER_PORT_8080_TCP_ADDR",
            "INFLIGHT_STATSERVER_PORT_8080_TCP_PORT",
            "INFLIGHT_STATSERVER_PORT_8080_TCP_PROTO",
            "INFLIGHT_STATSERVER_PORT_53_UDP_PROTO",
            "INFLIGHT_STATSERVER_PORT_9_SCTP",
        ] {
            assert_eq!(unknown_variables([name.to_owned()], &[]), [], "{name}");
        }
        for name in ["INFLIGHT_PORT_X_TCP", "INFLIGHT_PORTS", "INFLIGHT_SERVICE", "INFLIGHT_PORT_80_HTTP"] {
            assert_eq!(unknown_variables([name.to_owned()], &[]).len(), 1, "{name}");
        }
    }
}
