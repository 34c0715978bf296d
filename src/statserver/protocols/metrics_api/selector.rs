//! Label selectors, as Kubernetes' queries have them: `name=web,zone in (a,b),!canary`.

use std::fmt;

use serde_json::{Map, Value, json};

/// Maximum number of requirements, and of values in one of them.
const MAX_REQUIREMENTS: usize = 32;
const MAX_VALUES: usize = 32;

/// What a label has to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Requirement {
    /// This value, by `=`.
    Equals(String),
    /// One of these values, by `in`.
    In(Vec<String>),
    /// None of these values, or no such label: by `notin` or `!=`.
    NotIn(Vec<String>),
    /// Any value.
    Exists,
    /// No such label.
    DoesNotExist,
}

impl Requirement {
    /// Returns the values that are allowed; `None` if they are not listed.
    pub fn allowed(&self) -> Option<&[String]> {
        match self {
            Self::Equals(value) => Some(std::slice::from_ref(value)),
            Self::In(values) => Some(values),
            _ => None,
        }
    }

    /// Returns whether a label with this value, or (`None`) a missing one, fulfils it.
    pub fn fits(&self, value: Option<&str>) -> bool {
        let is_one_of = |values: &[String]| value.is_some_and(|value| values.iter().any(|one| one == value));
        match self {
            Self::Equals(wanted) => value == Some(wanted),
            Self::In(values) => is_one_of(values),
            Self::NotIn(values) => !is_one_of(values),
            Self::Exists => value.is_some(),
            Self::DoesNotExist => value.is_none(),
        }
    }
}

/// All of these have to be fulfilled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector(pub Vec<(String, Requirement)>);

/// A text that is no selector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidSelector(String);

impl fmt::Display for InvalidSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for InvalidSelector {}

impl Selector {
    /// Parses a selector; an empty one selects everything.
    ///
    /// # Errors
    /// [`InvalidSelector`].
    pub fn parse(text: &str) -> Result<Self, InvalidSelector> {
        let mut rest = text.trim();
        let mut requirements = Vec::new();
        while !rest.is_empty() {
            if requirements.len() == MAX_REQUIREMENTS {
                return Err(InvalidSelector(format!(
                    "the selector has more than {MAX_REQUIREMENTS} requirements"
                )));
            }
            let (requirement, after) = requirement(rest).ok_or_else(|| {
                let at: String = rest.chars().take(100).collect();
                InvalidSelector(format!(
                    "the selector is invalid at {at:?}; expected KEY=VALUE, KEY!=VALUE, \
                     KEY in (VALUE,...), KEY notin (VALUE,...), KEY or !KEY, at most {MAX_VALUES} values"
                ))
            })?;
            requirements.push(requirement);
            rest = after;
        }
        Ok(Self(requirements))
    }

    /// Returns the selector as a `LabelSelector`; null if it has no requirement.
    pub fn to_json(&self) -> Value {
        if self.0.is_empty() {
            return Value::Null;
        }
        let (mut labels, mut expressions) = (Map::new(), Vec::new());
        for (key, requirement) in &self.0 {
            let mut expression = |operator: &str, values: &[String]| {
                expressions.push(match values {
                    [] => json!({"key": key, "operator": operator}),
                    values => json!({"key": key, "operator": operator, "values": values}),
                });
            };
            match requirement {
                Requirement::Equals(value) => drop(labels.insert(key.clone(), json!(value))),
                Requirement::In(values) => expression("In", values),
                Requirement::NotIn(values) => expression("NotIn", values),
                Requirement::Exists => expression("Exists", &[]),
                Requirement::DoesNotExist => expression("DoesNotExist", &[]),
            }
        }
        let mut selector = Map::new();
        if !labels.is_empty() {
            selector.insert("matchLabels".into(), labels.into());
        }
        if !expressions.is_empty() {
            selector.insert("matchExpressions".into(), expressions.into());
        }
        selector.into()
    }
}

/// Takes the first requirement and the comma after it off a text.
fn requirement(text: &str) -> Option<((String, Requirement), &str)> {
    let (requirement, rest) = match text.strip_prefix('!') {
        Some(rest) => {
            let (key, rest) = word(rest)?;
            ((key.to_owned(), Requirement::DoesNotExist), rest)
        }
        None => {
            let (key, rest) = word(text)?;
            let (requirement, rest) = condition(rest)?;
            ((key.to_owned(), requirement), rest)
        }
    };
    let rest = rest.trim_start();
    match rest.strip_prefix(',') {
        // A comma has another requirement after it.
        Some(rest) => Some(rest.trim_start()).filter(|rest| !rest.is_empty()).map(|rest| (requirement, rest)),
        None => rest.is_empty().then_some((requirement, rest)),
    }
}

/// What follows a key.
fn condition(text: &str) -> Option<(Requirement, &str)> {
    let text = text.trim_start();
    if text.is_empty() || text.starts_with(',') {
        return Some((Requirement::Exists, text));
    }
    for equals in ["==", "="] {
        if let Some(rest) = text.strip_prefix(equals) {
            let (value, rest) = value(rest);
            return Some((Requirement::Equals(value.to_owned()), rest));
        }
    }
    if let Some(rest) = text.strip_prefix("!=") {
        let (value, rest) = value(rest);
        return Some((Requirement::NotIn(vec![value.to_owned()]), rest));
    }
    let (operator, rest) = word(text)?;
    let (list, rest) = rest.trim_start().strip_prefix('(')?.split_once(')')?;
    let values: Vec<String> = list.split(',').map(|value| value.trim().to_owned()).collect();
    let are_words = values.len() <= MAX_VALUES && values.iter().all(|one| one.chars().all(is_of_word));
    match operator {
        "in" if are_words => Some((Requirement::In(values), rest)),
        "notin" if are_words => Some((Requirement::NotIn(values), rest)),
        _ => None,
    }
}

fn is_of_word(c: char) -> bool {
    !c.is_whitespace() && !c.is_control() && !",()=!<>".contains(c)
}

/// Takes a value, which may be empty, off a text.
fn value(text: &str) -> (&str, &str) {
    let text = text.trim_start();
    text.split_at(text.find(|c| !is_of_word(c)).unwrap_or(text.len()))
}

fn word(text: &str) -> Option<(&str, &str)> {
    Some(value(text)).filter(|(word, _)| !word.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Vec<(String, Requirement)>, String> {
        Selector::parse(text).map(|selector| selector.0).map_err(|error| error.to_string())
    }

    #[test]
    fn a_selector_is_read_as_kubernetes_writes_it() {
        use Requirement::{DoesNotExist, Equals, Exists, In, NotIn};
        let list = |values: &[&str]| values.iter().map(|value| (*value).to_owned()).collect::<Vec<_>>();
        let of = |key: &str, requirement| (key.to_owned(), requirement);
        // As the HPA controller was seen to send it.
        assert_eq!(
            parsed("!canary,model in (x,y),service=web,zone=a").unwrap(),
            [
                of("canary", DoesNotExist),
                of("model", In(list(&["x", "y"]))),
                of("service", Equals("web".into())),
                of("zone", Equals("a".into()))
            ]
        );
        assert_eq!(
            parsed("service.name/x=a.b_c-d").unwrap(),
            [of("service.name/x", Equals("a.b_c-d".into()))]
        );
        assert_eq!(
            parsed(" a == b , c != d,e notin ( f , g ),h, i=").unwrap(),
            [
                of("a", Equals("b".into())),
                of("c", NotIn(list(&["d"]))),
                of("e", NotIn(list(&["f", "g"]))),
                of("h", Exists),
                of("i", Equals(String::new()))
            ]
        );
        assert_eq!(parsed(""), Ok(vec![]));
    }

    #[test]
    fn what_is_no_selector_is_refused() {
        for wrong in [
            ",", "a=b,", ",a=b", "=b", "!", "a b", "a in", "a in (b", "a in b", "a>1", "a=b c", "a=(b)",
            "!a=b", "a\u{7}",
        ] {
            assert!(parsed(wrong).unwrap_err().starts_with("the selector is invalid at "), "{wrong}");
        }
        let many = |count: usize| vec!["a=b"; count].join(",");
        assert_eq!(parsed(&many(32)).unwrap().len(), 32);
        assert_eq!(parsed(&many(33)).unwrap_err(), "the selector has more than 32 requirements");
        let values = |count: usize| format!("a in ({})", vec!["b"; count].join(","));
        assert!(parsed(&values(32)).is_ok() && parsed(&values(33)).is_err());
        // Whatever comes, it ends.
        let mut seed = 1_u64;
        for _ in 0..100_000 {
            let text: String = (0..12)
                .map(|_| {
                    seed =
                        seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    ["a", "in", "notin", " ", "(", ")", ",", "=", "!", "é", "==", "!="]
                        [(seed >> 33) as usize % 12]
                })
                .collect();
            let _ = Selector::parse(&text).map(|selector| selector.to_json());
        }
    }

    #[test]
    fn a_label_fits_or_not() {
        let fits =
            |text: &str, value| parsed(text).unwrap().iter().all(|(_, requirement)| requirement.fits(value));
        let values = [Some("b"), Some("x"), None];
        for (text, fit) in [
            ("a=b", [true, false, false]),
            ("a in (b,c)", [true, false, false]),
            ("a!=b", [false, true, true]),
            ("a notin (b,c)", [false, true, true]),
            ("a", [true, true, false]),
            ("!a", [false, false, true]),
        ] {
            assert_eq!(values.map(|value| fits(text, value)), fit, "{text}");
        }
    }

    #[test]
    fn a_selector_is_shown_as_an_object() {
        let shown = |text| Selector::parse(text).unwrap().to_json();
        assert_eq!(shown(""), Value::Null);
        assert_eq!(
            shown("a=b,c in (d),!e"),
            json!({"matchLabels": {"a": "b"}, "matchExpressions": [
                {"key": "c", "operator": "In", "values": ["d"]}, {"key": "e", "operator": "DoesNotExist"}]})
        );
    }
}
