//! The labels in the names of stats. Envoy has no labels for the stats of a filter: it cuts them out of
//! the names, by the regular expressions in its bootstrap (`stats_config.stats_tags`).

use std::fmt::Display;

use inflight_stats::gateway::key_name::KeyName;

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
    label("namespace_name", &key.namespace) + &label("revision_name", &key.name)
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
}
