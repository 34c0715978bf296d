//! The report: what a sender POSTs to `/v1/reports`, as bincode 1.3 with fixed-width little-endian
//! integers. docs/report-format.md documents it byte by byte; the golden bytes below are its test.

use std::collections::HashSet;
use std::fmt;
use std::io;

use bincode::{ErrorKind, Options};
use serde::{Deserialize, Serialize};

use crate::counting::snapshot::Snapshot;

const SECOND_NS: u64 = 1_000_000_000;

/// The only version there is.
pub const VERSION: u8 = 1;
/// The content type of a report.
pub const CONTENT_TYPE: &str = "application/x-bincode";
/// The largest report in bytes: what a sender splits at and a receiver refuses beyond.
pub const MAX_BYTES: usize = 1 << 20;
/// How far a sender's clock may be ahead of the receiver's: a day.
const MAX_AHEAD_SECONDS: u64 = 24 * 3600;
/// No sender has as many requests in a second, or in flight.
const MAX_COUNT: u32 = 1_000_000_000;
/// The longest pod, namespace or name in bytes. Kubernetes allows 253; Envoy's cluster names may be
/// longer.
pub const MAX_NAME_BYTES: usize = 512;

/// What a receiver's answer means to the sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The report is known from now on.
    Acknowledged,
    /// It will never be taken: the sender goes on from there all the same.
    Refused,
    /// It may be taken another time: the next report begins where this one did.
    TryAgain,
}

impl Verdict {
    /// By the answer's status. Only those that a receiver of reports gives on the report's account
    /// are final: others, 401, 403, 404, 408 and 429 among them, may come from a proxy in between,
    /// or change with a token or a route.
    pub fn from_status(status: u16) -> Self {
        match status {
            202 => Self::Acknowledged,
            400 | 409 | 413 | 415 => Self::Refused,
            _ => Self::TryAgain,
        }
    }
}

/// One POST: what one Envoy has to say of one or more keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// [`VERSION`].
    pub version: u8,
    /// Who reports; together with the incarnation it tells senders apart.
    pub pod: String,
    /// Changes whenever the sender's counters restart at zero.
    pub incarnation: u64,
    /// One for each key.
    pub messages: Vec<KeyReport>,
}

/// What one sender counted for one key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyReport {
    /// The key's namespace.
    pub namespace: String,
    /// The key's name: a revision, or what the gateway's key gives.
    pub name: String,
    /// Whether a gateway counted this, in front of the pods.
    pub from_gateway: bool,
    /// The last snapshot that the receiver acknowledged.
    pub since: Snapshot,
    /// Now.
    pub until: Snapshot,
}

/// Why a report is refused. Nothing of a refused report is taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReportError {
    /// No bytes at all.
    Empty,
    /// More than [`MAX_BYTES`].
    TooLarge(usize),
    /// A version this receiver does not know.
    UnknownVersion(u8),
    /// The bytes end before the report does.
    EndsEarly,
    /// Not the bytes of a report; the decoder's reason.
    Malformed(String),
    /// A field that must be a name and is none.
    BadName(&'static str, NameError),
    /// Numbers that no sender can have counted: the key, and what does not fit.
    Implausible(String, &'static str),
    /// A key that the report has more than once.
    Repeated(String),
    /// A key whose `until` lies ahead of the receiver's clock: by how many seconds.
    Ahead(String, u64),
}

impl fmt::Display for ReportError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => write!(f, "the report is empty"),
            Self::TooLarge(bytes) => {
                write!(f, "the report has {bytes} bytes; expected at most {MAX_BYTES}")
            }
            Self::UnknownVersion(version) => {
                write!(f, "the report has version {version}; expected {VERSION}")
            }
            Self::EndsEarly => {
                write!(f, "the report ends early; expected a bincode report of version {VERSION}")
            }
            Self::Malformed(reason) => {
                write!(f, "the report is malformed: {reason}; expected a bincode report of version {VERSION}")
            }
            Self::BadName(field, error) => write!(f, "`{field}` {error}"),
            Self::Implausible(key, reason) => write!(f, "key {key}: {reason}"),
            Self::Repeated(key) => {
                write!(f, "the report has key {key} more than once; expected each key once")
            }
            Self::Ahead(key, seconds) => write!(
                f,
                "key {key}: `until` is {seconds} s ahead of the receiver's clock; expected at most \
                 {MAX_AHEAD_SECONDS} s"
            ),
        }
    }
}

impl std::error::Error for ReportError {}

fn wire() -> impl Options {
    bincode::DefaultOptions::new().with_fixint_encoding().with_limit(MAX_BYTES as u64)
}

impl Report {
    /// The report's bytes.
    ///
    /// # Errors
    /// [`ReportError::TooLarge`] beyond [`MAX_BYTES`].
    pub fn encode(&self) -> Result<Vec<u8>, ReportError> {
        wire().serialize(self).map_err(|_| {
            let size = bincode::serialized_size(self).unwrap_or(u64::MAX);
            ReportError::TooLarge(usize::try_from(size).unwrap_or(usize::MAX))
        })
    }

    /// Decodes and checks a report.
    ///
    /// # Errors
    /// Every variant of [`ReportError`], each naming what was wrong.
    pub fn decode(bytes: &[u8]) -> Result<Self, ReportError> {
        if bytes.len() > MAX_BYTES {
            return Err(ReportError::TooLarge(bytes.len()));
        }
        match bytes.first() {
            None => return Err(ReportError::Empty),
            Some(&VERSION) => {}
            Some(&version) => return Err(ReportError::UnknownVersion(version)),
        }
        let report: Self =
            wire().reject_trailing_bytes().deserialize(bytes).map_err(|error| match *error {
                // A length beyond the limit is one beyond the bytes.
                ErrorKind::SizeLimit => ReportError::EndsEarly,
                ErrorKind::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    ReportError::EndsEarly
                }
                error => ReportError::Malformed(error.to_string()),
            })?;
        report.check()?;
        Ok(report)
    }

    fn check(&self) -> Result<(), ReportError> {
        check_field("pod", &self.pod)?;
        self.messages.iter().try_for_each(KeyReport::check)?;
        let mut names = HashSet::with_capacity(self.messages.len());
        match self.messages.iter().find(|message| !names.insert((&message.namespace, &message.name))) {
            Some(message) => Err(ReportError::Repeated(message.key())),
            None => Ok(()),
        }
    }

    /// Checks the instants against the receiver's unix time: one far ahead would make all that its
    /// sender says later look old.
    ///
    /// # Errors
    /// [`ReportError::Ahead`].
    pub fn check_clock(&self, now_ns: u64) -> Result<(), ReportError> {
        self.messages.iter().try_for_each(|message| {
            let ahead = message.until.as_of_ns.saturating_sub(now_ns) / 1_000_000_000;
            if ahead > MAX_AHEAD_SECONDS { Err(ReportError::Ahead(message.key(), ahead)) } else { Ok(()) }
        })
    }
}

impl KeyReport {
    fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    fn check(&self) -> Result<(), ReportError> {
        check_field("namespace", &self.namespace)?;
        check_field("name", &self.name)?;
        let implausible = |reason| Err(ReportError::Implausible(self.key(), reason));
        for snapshot in [&self.since, &self.until] {
            if snapshot.proxied_requests > snapshot.requests
                || snapshot.proxied_request_ns > snapshot.request_ns
                || snapshot.proxied_in_flight > snapshot.in_flight
            {
                return implausible("more proxied requests than requests");
            }
        }
        if self.until.as_of_ns < self.since.as_of_ns {
            return implausible("`until` is before `since`");
        }
        let Some(period) = self.until.since(&self.since) else {
            return implausible("a counter decreased between `since` and `until`");
        };
        if period.proxied_requests > period.requests || period.proxied_request_ns > period.request_ns {
            return implausible("more proxied requests than requests between `since` and `until`");
        }
        if self.until.in_flight > MAX_COUNT || self.since.in_flight > MAX_COUNT {
            return implausible("more than 1,000,000,000 requests in flight");
        }
        // A sender that does not say since when (0) means the last second.
        let elapsed_ns = match self.since.as_of_ns {
            0 => SECOND_NS,
            _ => period.elapsed_ns,
        };
        if period.request_ns > u128::from(elapsed_ns) * u128::from(MAX_COUNT) {
            return implausible("more request time than the period can hold");
        }
        let requests_ns = u128::from(period.requests) * u128::from(SECOND_NS);
        if requests_ns > u128::from(elapsed_ns.max(SECOND_NS)) * u128::from(MAX_COUNT) {
            return implausible("more than 1,000,000,000 requests a second");
        }
        Ok(())
    }
}

fn check_field(field: &'static str, value: &str) -> Result<(), ReportError> {
    check_name(value).map_err(|error| ReportError::BadName(field, error))
}

/// Why a pod, a namespace or a key cannot have a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameError {
    /// It has no bytes.
    Empty,
    /// It has more than [`MAX_NAME_BYTES`]: how many.
    TooLong(usize),
    /// It has a control character.
    ControlCharacter,
}

impl fmt::Display for NameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => write!(f, "is empty; expected 1 to {MAX_NAME_BYTES} bytes"),
            Self::TooLong(bytes) => write!(f, "has {bytes} bytes; expected at most {MAX_NAME_BYTES}"),
            Self::ControlCharacter => f.write_str("has a control character; expected none"),
        }
    }
}

impl std::error::Error for NameError {}

/// Checks whether a pod, a namespace or a key may have this name.
///
/// # Errors
/// [`NameError`].
pub fn check_name(value: &str) -> Result<(), NameError> {
    if value.is_empty() {
        Err(NameError::Empty)
    } else if value.len() > MAX_NAME_BYTES {
        Err(NameError::TooLong(value.len()))
    } else if value.chars().any(char::is_control) {
        Err(NameError::ControlCharacter)
    } else {
        Ok(())
    }
}

/// Returns whether a pod, a namespace or a key may have this name.
pub fn is_name(value: &str) -> bool {
    check_name(value).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_receiver_says_of_the_report_itself_is_final() {
        assert_eq!(Verdict::from_status(202), Verdict::Acknowledged);
        for refused in [400, 409, 413, 415] {
            assert_eq!(Verdict::from_status(refused), Verdict::Refused);
        }
        for other in [0, 200, 302, 401, 403, 404, 408, 429, 500, 503, 507] {
            assert_eq!(Verdict::from_status(other), Verdict::TryAgain);
        }
    }

    fn sample() -> Report {
        let since = Snapshot { as_of_ns: 1, requests: 2, request_ns: 4, ..Snapshot::default() };
        Report {
            version: VERSION,
            pod: "pod".into(),
            incarnation: 0x0102_0304_0506_0708,
            messages: vec![KeyReport {
                namespace: "ns".into(),
                name: "rev".into(),
                from_gateway: true,
                since,
                until: Snapshot {
                    as_of_ns: 0x11,
                    requests: 0x12,
                    proxied_requests: 3,
                    request_ns: 0x14,
                    proxied_request_ns: 5,
                    in_flight: 0x16,
                    proxied_in_flight: 7,
                },
            }],
        }
    }

    /// Written out by hand from the table in docs/report-format.md, so that another encoder can be
    /// held to it.
    fn golden() -> Vec<u8> {
        let mut bytes = vec![1];
        bytes.extend(b"\x03\0\0\0\0\0\0\0pod");
        bytes.extend([8, 7, 6, 5, 4, 3, 2, 1]);
        bytes.extend([1, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend(b"\x02\0\0\0\0\0\0\0ns");
        bytes.extend(b"\x03\0\0\0\0\0\0\0rev");
        bytes.push(1);
        for snapshot in [[1u8, 2, 0, 4, 0, 0, 0], [0x11, 0x12, 3, 0x14, 5, 0x16, 7]] {
            for (value, width) in snapshot.into_iter().zip([8, 8, 8, 16, 16, 4, 4]) {
                bytes.push(value);
                bytes.resize(bytes.len() + width - 1, 0);
            }
        }
        bytes
    }

    #[test]
    fn the_bytes_are_the_documented_ones() {
        assert_eq!(sample().encode().unwrap(), golden());
        assert_eq!(Report::decode(&golden()).unwrap(), sample());
    }

    #[test]
    fn every_truncation_and_every_trailing_byte_is_refused() {
        let golden = golden();
        assert_eq!(Report::decode(&[]), Err(ReportError::Empty));
        for length in 1..golden.len() {
            assert_eq!(Report::decode(&golden[..length]), Err(ReportError::EndsEarly), "{length} bytes");
        }
        let mut longer = golden;
        longer.push(0);
        assert!(matches!(Report::decode(&longer), Err(ReportError::Malformed(_))));
    }

    #[test]
    fn another_version_is_named() {
        let mut bytes = golden();
        bytes[0] = 2;
        let error = Report::decode(&bytes).unwrap_err();
        assert_eq!(error.to_string(), "the report has version 2; expected 1");
    }

    #[test]
    fn a_length_that_promises_the_moon_allocates_nothing() {
        for position in [1, 20, 28] {
            let mut bytes = golden();
            bytes[position..position + 8].copy_from_slice(&u64::MAX.to_le_bytes());
            assert_eq!(Report::decode(&bytes), Err(ReportError::EndsEarly));
        }
    }

    #[test]
    fn what_is_wrong_with_a_name_is_said() {
        for (pod, reason) in [
            (String::new(), "`pod` is empty; expected 1 to 512 bytes"),
            ("p".repeat(600), "`pod` has 600 bytes; expected at most 512"),
            ("a\nb".into(), "`pod` has a control character; expected none"),
        ] {
            let bytes = Report { pod, ..sample() }.encode().unwrap();
            assert_eq!(Report::decode(&bytes).unwrap_err().to_string(), reason);
        }
    }

    #[test]
    fn too_many_bytes_are_refused_on_both_sides() {
        assert_eq!(Report::decode(&vec![1; MAX_BYTES + 1]), Err(ReportError::TooLarge(MAX_BYTES + 1)));
        let mut report = sample();
        let message = report.messages[0].clone();
        report.messages = vec![message; 10_000];
        assert!(matches!(report.encode(), Err(ReportError::TooLarge(bytes)) if bytes > MAX_BYTES));
    }

    #[test]
    fn numbers_that_nobody_can_have_counted_are_refused() {
        type Change = fn(&mut Report);
        let changes: [Change; 9] = [
            |r| r.pod.clear(),
            |r| r.messages[0].namespace = "a\nb".into(),
            |r| r.messages[0].name = "n".repeat(MAX_NAME_BYTES + 1),
            |r| r.messages[0].until.as_of_ns = 0,
            |r| r.messages[0].until.requests = 1,
            |r| r.messages[0].until.proxied_requests = 0x13,
            |r| r.messages[0].until.proxied_in_flight = 0x17,
            |r| r.messages[0].since.proxied_request_ns = 5,
            |r| r.messages[0].until.request_ns = u128::MAX,
        ];
        for (number, change) in changes.into_iter().enumerate() {
            let mut report = sample();
            change(&mut report);
            assert!(Report::decode(&report.encode().unwrap()).is_err(), "change {number}");
        }
    }
}
