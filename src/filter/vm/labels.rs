//! The labels in the names of stats. Envoy has no labels for the stats of a filter: it cuts them out of
//! the names, by the regular expressions in its bootstrap (`stats_config.stats_tags`).

use std::borrow::Cow;
use std::fmt::Display;

use inflight_stats::gateway::key_name::KeyName;

/// Returns a label's value without what would end it: `;`, `=`, and a dot at its end, which Envoy cuts
/// off. They are percent-encoded, so that two values stay two. Most have none of them.
fn escaped(value: &str) -> Cow<'_, str> {
    let ends = value.ends_with('.');
    if !ends && !value.contains([';', '=', '%']) {
        return Cow::Borrowed(value);
    }
    let value = value.strip_suffix('.').unwrap_or(value);
    let value = value.replace('%', "%25").replace(';', "%3B").replace('=', "%3D");
    Cow::Owned(if ends { value + "%2E" } else { value })
}

/// Returns a label as Istio's own stats have it. So the expressions that Istio's bootstrap has for the
/// labels named in `extraStatTags` serve these stats, too.
fn label(name: &str, value: impl Display) -> String {
    format!("{name}=.={value};.;")
}

/// Returns the labels of a response code, as the end of a stat's name. Code 0 means that the stream
/// ended before any response.
pub fn of_code(code: u16) -> String {
    let class = format!("{}xx", code / 100);
    label("response_code", code) + &label("response_code_class", class)
}

/// Returns the labels of a key, as the end of a stat's name.
pub fn of_key(key: &KeyName) -> String {
    label("namespace_name", escaped(&key.namespace)) + &label("revision_name", escaped(&key.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_have_istios_separators() {
        assert_eq!(of_code(503), "response_code=.=503;.;response_code_class=.=5xx;.;");
        assert_eq!(of_code(0), "response_code=.=0;.;response_code_class=.=0xx;.;");
        let key = KeyName::checked("shop", "cart").unwrap();
        assert_eq!(of_key(&key), "namespace_name=.=shop;.;revision_name=.=cart;.;");
    }

    #[test]
    fn a_value_cannot_end_before_its_end() {
        for (value, expected) in [
            ("outbound|80|v2|a.b", "outbound|80|v2|a.b"),
            ("a;.;revision_name=.=b", "a%3B.%3Brevision_name%3D.%3Db"),
            ("a%3B", "a%253B"),
            ("a..", "a.%2E"),
            (".", "%2E"),
        ] {
            assert_eq!(escaped(value), expected);
        }
    }
}
