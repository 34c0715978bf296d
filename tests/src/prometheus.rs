//! Reading the Prometheus text format, as far as Envoy writes it.

use std::collections::BTreeMap;

/// One sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The metric's name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its value.
    pub value: f64,
}

/// All samples of a text.
///
/// # Panics
/// On a line that is none.
pub fn parse(text: &str) -> Vec<Sample> {
    text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).map(parse_line).collect()
}

fn parse_line(line: &str) -> Sample {
    let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no sample: {line}"));
    let (name, labels) = match series.split_once('{') {
        None => (series, ""),
        Some((name, rest)) => (name, rest.strip_suffix('}').unwrap_or_else(|| panic!("no sample: {line}"))),
    };
    let labels = labels
        .split("\",")
        .filter(|label| !label.is_empty())
        .map(|label| {
            let (key, value) = label.split_once("=\"").unwrap_or_else(|| panic!("no label: {line}"));
            (key.to_owned(), value.trim_end_matches('"').to_owned())
        })
        .collect();
    let value = value.parse().unwrap_or_else(|_| panic!("no number: {line}"));
    Sample { name: name.to_owned(), labels, value }
}

/// The sum over all samples of a name whose labels contain `labels`.
pub fn sum(samples: &[Sample], name: &str, labels: &[(&str, &str)]) -> f64 {
    samples
        .iter()
        .filter(|sample| sample.name == name)
        .filter(|sample| labels.iter().all(|(k, v)| sample.labels.get(*k).is_some_and(|found| found == v)))
        .map(|sample| sample.value)
        .sum()
}
