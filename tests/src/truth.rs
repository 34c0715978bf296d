//! Counts and concurrency from Envoy's own access log: the independent truth.

use std::collections::BTreeMap;
use std::io::BufRead;
use std::path::Path;

/// The format of each line that [`read`] expects.
pub const FORMAT: &str = "%START_TIME(%s.%6f)% %EMIT_TIME(%s.%6f)% %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %REQ(:PATH)%\n";

/// One request, as Envoy logged it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// When its stream began, in nanoseconds of unix time.
    pub start_ns: u64,
    /// When it ended.
    pub end_ns: u64,
    /// The code that the client was sent; 0 for none.
    pub code: u16,
    /// Envoy's response flags.
    pub flags: String,
    /// Envoy's details of the response code.
    pub details: String,
    /// The request's path.
    pub path: String,
}

/// Returns all requests in an access log. A line that Envoy is still writing is left out.
///
/// # Panics
/// On a line that is not in [`FORMAT`].
pub fn read(path: &Path) -> Vec<Request> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let complete = text.rfind('\n').map_or("", |end| &text[..end]);
    complete.lines().map(parse).collect()
}

/// Returns the number of requests in an access log for each path, without reading the log into
/// memory.
///
/// # Panics
/// If it cannot be read.
pub fn count(path: &Path) -> BTreeMap<String, u64> {
    let mut counts = BTreeMap::new();
    let mut log = std::io::BufReader::new(std::fs::File::open(path).expect("an access log"));
    let mut line = String::new();
    while log.read_line(&mut line).expect("UTF-8") > 0 && line.ends_with('\n') {
        let path = parse(line.trim_end()).path;
        let path = path.split('?').next().unwrap_or_default();
        match counts.get_mut(path) {
            Some(count) => *count += 1,
            None => drop(counts.insert(path.to_owned(), 1)),
        }
        line.clear();
    }
    counts
}

fn parse(line: &str) -> Request {
    let fields: Vec<&str> = line.splitn(6, ' ').collect();
    let [start, end, code, flags, details, path] = fields[..] else { panic!("no access log line: {line}") };
    Request {
        start_ns: nanoseconds(start),
        end_ns: nanoseconds(end),
        code: code.parse().unwrap_or_else(|_| panic!("no code: {line}")),
        flags: flags.into(),
        details: details.into(),
        path: path.into(),
    }
}

/// Converts `seconds.microseconds` to nanoseconds, without floating point.
fn nanoseconds(text: &str) -> u64 {
    let (seconds, micros) = text.split_once('.').unwrap_or_else(|| panic!("no time: {text}"));
    assert_eq!(micros.len(), 6, "no microseconds: {text}");
    seconds.parse::<u64>().expect("seconds") * 1_000_000_000 + micros.parse::<u64>().expect("micros") * 1_000
}

/// Returns the integral of concurrency between two instants, in request-nanoseconds.
pub fn request_ns(requests: &[Request], from_ns: u64, to_ns: u64) -> u128 {
    let overlap = |r: &Request| r.end_ns.min(to_ns).saturating_sub(r.start_ns.max(from_ns));
    requests.iter().map(|r| u128::from(overlap(r))).sum()
}

/// Returns the number of requests that ended with each code.
pub fn by_code(requests: &[Request]) -> BTreeMap<u16, u64> {
    let mut codes = BTreeMap::new();
    for request in requests {
        *codes.entry(request.code).or_default() += 1;
    }
    codes
}
