//! A JSON object read key by key. Every mistake is reported with its key, what was given and what
//! was expected.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use serde_json::{Map, Value};

use crate::config::options::{A_BOOLEAN, A_HEADER, A_LABEL, A_NAME, A_PATH, AN_OBJECT};
use crate::config::suggestion::closest;
use crate::protocol::report::{MAX_NAME_BYTES, is_name};

/// Why a document was refused. Keys have dots between their levels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// What it is: a configuration, settings.
    document: &'static str,
    mistake: Mistake,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Mistake {
    NotJson(String),
    /// `key` is empty for the document itself.
    Value {
        key: String,
        given: String,
        expected: Cow<'static, str>,
    },
    Missing {
        key: String,
        expected: &'static str,
    },
    UnknownKey {
        prefix: String,
        key: String,
        meant: Option<&'static str>,
        known: &'static [&'static str],
    },
}

impl ConfigError {
    /// The document is not JSON.
    pub(crate) fn not_json(document: &'static str, reason: &serde_json::Error) -> Self {
        Self { document, mistake: Mistake::NotJson(reason.to_string()) }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("invalid ")?;
        f.write_str(self.document)?;
        f.write_str(": ")?;
        match &self.mistake {
            Mistake::NotJson(reason) => write!(f, "not JSON: {reason}"),
            Mistake::Value { key, given, expected } if key.is_empty() => {
                write!(f, "the document is {given}; expected {expected}")
            }
            Mistake::Value { key, given, expected } => write!(f, "`{key}` is {given}; expected {expected}"),
            Mistake::Missing { key, expected } => write!(f, "`{key}` is missing; expected {expected}"),
            Mistake::UnknownKey { prefix, key, meant: Some(meant), .. } => {
                write!(f, "unknown key `{prefix}{key}`; did you mean `{prefix}{meant}`?")
            }
            Mistake::UnknownKey { prefix, key, meant: None, known } => {
                write!(f, "unknown key `{prefix}{key}`; expected one of {}", known.join(", "))
            }
        }
    }
}

impl std::error::Error for ConfigError {}

/// One JSON object that is read into a structure. It has known keys alone.
pub(crate) struct Fields {
    document: &'static str,
    prefix: String,
    values: Map<String, Value>,
}

impl Fields {
    /// Begins to read `value`, which is at `key` of the document (empty: the document itself).
    pub(crate) fn new(
        document: &'static str,
        key: &str,
        value: Value,
        known: &'static [&'static str],
    ) -> Result<Self, ConfigError> {
        let prefix = if key.is_empty() { String::new() } else { format!("{key}.") };
        let values = match value {
            Value::Object(values) => values,
            other => {
                let (key, given) = (key.to_owned(), shown(&other));
                let mistake = Mistake::Value { key, given, expected: AN_OBJECT.into() };
                return Err(ConfigError { document, mistake });
            }
        };
        let fields = Self { document, prefix, values };
        match fields.values.keys().find(|key| !known.contains(&key.as_str())) {
            None => Ok(fields),
            Some(key) => {
                let meant = closest(key, known.iter().copied());
                let (prefix, key) =
                    (fields.prefix.clone(), key.chars().take(100).flat_map(char::escape_debug).collect());
                Err(ConfigError { document, mistake: Mistake::UnknownKey { prefix, key, meant, known } })
            }
        }
    }

    fn path(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    fn take(&mut self, key: &str) -> Option<Value> {
        self.values.remove(key)
    }

    pub(crate) fn error(
        &self,
        key: &str,
        given: String,
        expected: impl Into<Cow<'static, str>>,
    ) -> ConfigError {
        let mistake = Mistake::Value { key: self.path(key), given, expected: expected.into() };
        ConfigError { document: self.document, mistake }
    }

    /// Reads a value by `read`, which returns `None` for one that is not allowed.
    fn read<T>(
        &mut self,
        key: &str,
        expected: &'static str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        let Some(value) = self.take(key) else { return Ok(None) };
        match read(&value) {
            Some(read) => Ok(Some(read)),
            None => Err(self.error(key, shown(&value), expected)),
        }
    }

    pub(crate) fn string(
        &mut self,
        key: &str,
        expected: &'static str,
        fits: impl Fn(&str) -> bool,
    ) -> Result<Option<String>, ConfigError> {
        self.read(key, expected, |value| value.as_str().filter(|text| fits(text)).map(str::to_owned))
    }

    /// Reads a string that must not end up empty.
    pub(crate) fn name(&mut self, key: &str, fallback: &str) -> Result<String, ConfigError> {
        match self.string(key, A_NAME, is_name)? {
            Some(value) => Ok(value),
            None if is_name(fallback) => Ok(fallback.into()),
            None => {
                let mistake = Mistake::Missing { key: self.path(key), expected: A_NAME };
                Err(ConfigError { document: self.document, mistake })
            }
        }
    }

    /// Reads a string that may be empty.
    pub(crate) fn label(&mut self, key: &str, fallback: &str) -> Result<String, ConfigError> {
        let value =
            self.string(key, A_LABEL, |v| v.len() <= MAX_NAME_BYTES && !v.chars().any(char::is_control))?;
        Ok(value.unwrap_or_else(|| fallback.into()))
    }

    pub(crate) fn header(&mut self, key: &str) -> Result<Option<String>, ConfigError> {
        let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
        let value = self
            .string(key, A_HEADER, |v| !v.is_empty() && v.len() <= MAX_NAME_BYTES && v.bytes().all(token))?;
        Ok(value.map(|v| v.to_ascii_lowercase()))
    }

    pub(crate) fn url_path(&mut self, key: &str) -> Result<Option<String>, ConfigError> {
        self.string(key, A_PATH, |v| {
            v.starts_with('/') && v.len() <= MAX_NAME_BYTES && v.bytes().all(|b| b.is_ascii_graphic())
        })
    }

    pub(crate) fn one_of<T: Copy>(
        &mut self,
        key: &str,
        expected: &'static str,
        values: &[(&str, T)],
    ) -> Result<Option<T>, ConfigError> {
        self.read(key, expected, |value| {
            let text = value.as_str()?;
            values.iter().find(|(name, _)| *name == text).map(|(_, value)| *value)
        })
    }

    pub(crate) fn duration(
        &mut self,
        key: &str,
        expected: &'static str,
        fits: impl Fn(Duration) -> bool,
    ) -> Result<Option<Duration>, ConfigError> {
        self.read(key, expected, |value| parse_duration(value.as_str()?).filter(|d| fits(*d)))
    }

    pub(crate) fn boolean(&mut self, key: &str) -> Result<Option<bool>, ConfigError> {
        self.read(key, A_BOOLEAN, Value::as_bool)
    }

    pub(crate) fn integer(
        &mut self,
        key: &str,
        expected: &'static str,
        fits: impl Fn(u32) -> bool,
    ) -> Result<Option<u32>, ConfigError> {
        self.read(key, expected, |value| {
            // A google.protobuf.Struct has only floating-point numbers.
            let whole = value
                .as_u64()
                .or_else(|| value.as_f64().filter(|n| n.fract() == 0.0 && *n >= 0.0).map(|n| n as u64));
            whole.and_then(|n| u32::try_from(n).ok()).filter(|n| fits(*n))
        })
    }

    pub(crate) fn number(
        &mut self,
        key: &str,
        expected: &'static str,
        fits: impl Fn(f64) -> bool,
    ) -> Result<Option<f64>, ConfigError> {
        self.read(key, expected, |value| value.as_f64().filter(|n| n.is_finite() && fits(*n)))
    }

    /// Refuses a key that is only allowed beside others.
    pub(crate) fn absent(&mut self, key: &str, expected: &'static str) -> Result<(), ConfigError> {
        self.read(key, expected, |_| None::<()>).map(|_| ())
    }

    pub(crate) fn object(
        &mut self,
        key: &str,
        known: &'static [&'static str],
    ) -> Result<Option<Self>, ConfigError> {
        let Some(value) = self.take(key) else { return Ok(None) };
        Self::new(self.document, &self.path(key), value, known).map(Some)
    }
}

/// Returns a value as an error shows it: as JSON, cut short if it is long.
fn shown(value: &Value) -> String {
    const MAX_CHARS: usize = 100;
    let text = value.to_string();
    match text.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text,
    }
}

/// Parses a number and a unit: `ms`, `s` or `m`.
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
