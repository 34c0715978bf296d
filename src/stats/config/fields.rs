//! A JSON object read key by key: every mistake is named with its key, what it was and what is allowed.

use std::fmt;
use std::time::Duration;

use serde_json::{Map, Value};

use crate::protocol::report::{MAX_NAME_BYTES, is_name};

/// A configuration that is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The key, with dots between levels; empty for the document itself.
    pub key: String,
    /// What it was.
    pub was: String,
    /// What is allowed.
    pub allowed: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.key.as_str() {
            "" => write!(f, "the configuration was {}, allowed is {}", self.was, self.allowed),
            key => write!(f, "configuration key `{key}` was {}, allowed is {}", self.was, self.allowed),
        }
    }
}

impl std::error::Error for ConfigError {}

const NAME: &str = "a string of 1 to 512 bytes without control characters";

/// One JSON object on its way into a structure: what was read is taken out, what is left is unknown.
pub(crate) struct Fields {
    prefix: String,
    left: Map<String, Value>,
    known: Vec<&'static str>,
}

impl Fields {
    pub(crate) fn new(key: &str, value: Value) -> Result<Self, ConfigError> {
        let prefix = if key.is_empty() { String::new() } else { format!("{key}.") };
        match value {
            Value::Object(left) => Ok(Self { prefix, left, known: Vec::new() }),
            other => {
                Err(ConfigError { key: key.into(), was: shown(&other), allowed: "a JSON object".into() })
            }
        }
    }

    pub(crate) fn take(&mut self, key: &'static str) -> Option<Value> {
        self.known.push(key);
        self.left.remove(key)
    }

    pub(crate) fn error(&self, key: &str, was: String, allowed: impl Into<String>) -> ConfigError {
        ConfigError { key: format!("{}{key}", self.prefix), was, allowed: allowed.into() }
    }

    pub(crate) fn finish(self) -> Result<(), ConfigError> {
        match self.left.keys().next() {
            None => Ok(()),
            Some(key) => {
                let allowed = format!("one of {}", self.known.join(", "));
                Err(self.error(&key.chars().take(100).collect::<String>(), "an unknown key".into(), allowed))
            }
        }
    }

    pub(crate) fn string(
        &mut self,
        key: &'static str,
        allowed: &str,
        fits: impl Fn(&str) -> bool,
    ) -> Result<Option<String>, ConfigError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(value)) if fits(&value) => Ok(Some(value)),
            Some(other) => Err(self.error(key, shown(&other), allowed)),
        }
    }

    /// A string that must not end up empty.
    pub(crate) fn name(&mut self, key: &'static str, fallback: &str) -> Result<String, ConfigError> {
        match self.string(key, NAME, is_name)? {
            Some(value) => Ok(value),
            None if is_name(fallback) => Ok(fallback.into()),
            None => Err(self.error(key, "not set".into(), NAME)),
        }
    }

    /// A string that may be empty.
    pub(crate) fn label(&mut self, key: &'static str, fallback: &str) -> Result<String, ConfigError> {
        let allowed = "a string of at most 512 bytes without control characters";
        let value =
            self.string(key, allowed, |v| v.len() <= MAX_NAME_BYTES && !v.chars().any(char::is_control))?;
        Ok(value.unwrap_or_else(|| fallback.into()))
    }

    pub(crate) fn header(&mut self, key: &'static str) -> Result<Option<String>, ConfigError> {
        let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
        let value = self.string(key, "the name of an HTTP header", |v| {
            !v.is_empty() && v.len() <= MAX_NAME_BYTES && v.bytes().all(token)
        })?;
        Ok(value.map(|v| v.to_ascii_lowercase()))
    }

    pub(crate) fn path(&mut self, key: &'static str) -> Result<Option<String>, ConfigError> {
        self.string(key, "an absolute URL path without spaces", |v| {
            v.starts_with('/') && v.len() <= MAX_NAME_BYTES && v.bytes().all(|b| b.is_ascii_graphic())
        })
    }

    pub(crate) fn one_of<T: Copy>(
        &mut self,
        key: &'static str,
        values: &[(&str, T)],
    ) -> Result<Option<T>, ConfigError> {
        let names: Vec<String> = values.iter().map(|(name, _)| format!("{name:?}")).collect();
        let value = self.string(key, &names.join(" or "), |v| values.iter().any(|(name, _)| *name == v))?;
        Ok(value.and_then(|v| values.iter().find(|(name, _)| *name == v).map(|(_, value)| *value)))
    }

    pub(crate) fn duration(
        &mut self,
        key: &'static str,
        least: Duration,
        most: Duration,
    ) -> Result<Option<Duration>, ConfigError> {
        let Some(value) = self.take(key) else {
            return Ok(None);
        };
        match value.as_str().and_then(parse_duration).filter(|d| (least..=most).contains(d)) {
            Some(duration) => Ok(Some(duration)),
            None => {
                let allowed = format!("a duration from {least:?} to {most:?}, such as \"1s\" or \"250ms\"");
                Err(self.error(key, shown(&value), allowed))
            }
        }
    }

    pub(crate) fn boolean(&mut self, key: &'static str) -> Result<Option<bool>, ConfigError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(self.error(key, shown(&other), "true or false")),
        }
    }

    pub(crate) fn integer(&mut self, key: &'static str, most: u32) -> Result<Option<u32>, ConfigError> {
        let Some(value) = self.take(key) else { return Ok(None) };
        // A google.protobuf.Struct has only floating-point numbers.
        let whole = value
            .as_u64()
            .or_else(|| value.as_f64().filter(|n| n.fract() == 0.0 && *n >= 0.0).map(|n| n as u64));
        match whole.and_then(|n| u32::try_from(n).ok()).filter(|n| *n <= most) {
            Some(number) => Ok(Some(number)),
            None => Err(self.error(key, shown(&value), format!("a whole number from 0 to {most}"))),
        }
    }

    pub(crate) fn number(
        &mut self,
        key: &'static str,
        allowed: &str,
        fits: impl Fn(f64) -> bool,
    ) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.take(key) else { return Ok(None) };
        match value.as_f64().filter(|n| n.is_finite() && fits(*n)) {
            Some(number) => Ok(Some(number)),
            None => Err(self.error(key, shown(&value), allowed)),
        }
    }

    pub(crate) fn object(&mut self, key: &'static str) -> Result<Option<Fields>, ConfigError> {
        let Some(value) = self.take(key) else {
            return Ok(None);
        };
        Fields::new(&format!("{}{key}", self.prefix), value).map(Some)
    }
}

/// A value as an error shows it: as JSON, and not all of it if it is long.
fn shown(value: &Value) -> String {
    const MOST: usize = 100;
    let text = value.to_string();
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text,
    }
}

/// A number and a unit: `ms`, `s` or `m`.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let unit = text.find(|c: char| c.is_ascii_alphabetic())?;
    let (number, unit) = text.split_at_checked(unit)?;
    if !number.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        return None;
    }
    let number: f64 = number.parse().ok()?;
    let seconds = match unit {
        "ms" => number / 1000.0,
        "s" => number,
        "m" => number * 60.0,
        _ => return None,
    };
    Duration::try_from_secs_f64(seconds).ok()
}
