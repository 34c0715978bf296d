//! Go's gob, as far as a `StatMessage` needs it: what an older Knative's queue-proxies sent to its
//! autoscaler. The format is documented with Go's `encoding/gob`.
//!
//! A gob stream describes itself: messages that define types come first, then one with a value.
//! Fields are matched by name, as in Go: their order does not matter, a missing one is zero, an
//! unknown one is skipped, one of another type is an error. Only the stream's first value is read.
//!
//! Every step takes at least one byte of the input, and values nest no deeper than is allowed, so
//! time and memory are bounded by the frame's length.

use std::collections::HashMap;

use bytes::Bytes;

use crate::protocol::stat::{Stat, WireStatMessage};

/// How deep the values of a skipped field may be nested, by default.
pub const MAX_DEPTH: usize = 16;
/// Maximum number of types that a stream may define; a `StatMessage` needs four.
pub const MAX_TYPES: usize = 64;
/// Seconds from Go's zero time (year 1) to 1970.
const YEAR_ONE_TO_1970: i64 = 62_135_596_800;

/// Why a gob stream is not a `StatMessage`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GobError {
    /// The bytes end before the value does.
    Ends,
    /// A number, a length or a field that gob does not allow.
    Malformed(&'static str),
    /// A type that the stream did not define.
    UndefinedType(i64),
    /// A type that the stream defined twice.
    RedefinedType(i64),
    /// More than [`MAX_TYPES`] types.
    TooManyTypes,
    /// Values nested deeper than allowed: the limit.
    TooDeep(usize),
    /// A field of `StatMessage` has another type here: which field, its type, and that of
    /// `StatMessage`.
    Mismatch(&'static str, &'static str, &'static str),
}

impl std::fmt::Display for GobError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ends => f.write_str("the stream ends before the value does"),
            Self::Malformed(what) => write!(f, "{what}"),
            Self::UndefinedType(id) => write!(f, "type {id} is not defined"),
            Self::RedefinedType(id) => write!(f, "type {id} is defined twice"),
            Self::TooManyTypes => write!(f, "more types than {MAX_TYPES}"),
            Self::TooDeep(max) => write!(f, "nested deeper than {max}"),
            Self::Mismatch(field, found, wanted) => write!(f, "{field} is {found}; expected {wanted}"),
        }
    }
}

impl std::error::Error for GobError {}

/// Nanosecond within a unix second; Go's zero time is the year 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Time {
    /// Unix seconds.
    pub seconds: i64,
    /// Nanoseconds of that second.
    pub nanoseconds: u32,
}

/// A decoded `StatMessage`.
#[derive(Clone, Debug, PartialEq)]
pub struct StatMessage {
    /// In today's form; its timestamp is 0 for Go's zero time.
    pub message: WireStatMessage,
    /// `Stat.Time`.
    pub time: Time,
}

/// Returns whether the bytes begin as a gob stream does: with a message that defines a type, being
/// long enough for one with a name. No `WireStatMessages` of today begins so: its first byte is the
/// tag of field 1, 10.
pub fn begins_one(bytes: &[u8]) -> bool {
    let mut reader = Reader(bytes);
    let message = reader.length().and_then(|length| reader.take(length));
    let id = message.and_then(|message| Reader(message).int());
    bytes.first() != Some(&10) && id.is_ok_and(|id| id < 0)
}

/// Decodes the first value of a gob stream as a `StatMessage`; what is skipped may lie `max_depth`
/// deep.
///
/// # Errors
/// Every variant of [`GobError`].
pub fn decode(bytes: &[u8], max_depth: usize) -> Result<StatMessage, GobError> {
    let mut stream = Reader(bytes);
    let mut types = Types { by_id: HashMap::new(), max_depth };
    loop {
        let length = stream.length()?;
        let mut message = Reader(stream.take(length)?);
        let id = message.int()?;
        if id >= 0 {
            return types.stat_message(&mut message, id);
        }
        types.define(&mut message, id.checked_neg().ok_or(GobError::UndefinedType(id))?)?;
    }
}

/// What is left to read.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], GobError> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(GobError::Ends)?;
        self.0 = rest;
        Ok(taken)
    }

    /// Below 128 the byte itself; else the negated count of bytes, then these, the highest first.
    fn uint(&mut self) -> Result<u64, GobError> {
        let &[first] = self.take(1)? else { return Err(GobError::Ends) };
        if first < 0x80 {
            return Ok(first.into());
        }
        let count = usize::from(first.wrapping_neg());
        if count > 8 {
            return Err(GobError::Malformed("a number has more than 8 bytes"));
        }
        Ok(self.take(count)?.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    /// The lowest bit says whether the others are complemented.
    fn int(&mut self) -> Result<i64, GobError> {
        let bits = self.uint()?;
        let half = (bits >> 1) as i64;
        Ok(if bits & 1 == 1 { !half } else { half })
    }

    /// The bytes of the double, in reverse: most doubles end in zeros.
    fn float(&mut self) -> Result<f64, GobError> {
        Ok(f64::from_bits(self.uint()?.swap_bytes()))
    }

    fn length(&mut self) -> Result<usize, GobError> {
        usize::try_from(self.uint()?).map_err(|_| GobError::Ends)
    }

    fn bytes(&mut self) -> Result<&'a [u8], GobError> {
        let length = self.length()?;
        self.take(length)
    }

    fn text(&mut self) -> Result<&'a str, GobError> {
        std::str::from_utf8(self.bytes()?).map_err(|_| GobError::Malformed("a string is not UTF-8"))
    }

    /// The fields of a struct: each with its number, until a zero.
    fn fields(
        &mut self,
        mut field: impl FnMut(&mut Self, usize) -> Result<(), GobError>,
    ) -> Result<(), GobError> {
        let mut next = 0_usize;
        loop {
            let step = self.length()?;
            if step == 0 {
                return Ok(());
            }
            next = next.checked_add(step).ok_or(GobError::Malformed("a field's number is too high"))?;
            field(self, next - 1)?;
        }
    }

    fn elements(
        &mut self,
        mut element: impl FnMut(&mut Self) -> Result<(), GobError>,
    ) -> Result<(), GobError> {
        let count = self.length()?;
        // No element has less than one byte.
        if count > self.0.len() {
            return Err(GobError::Ends);
        }
        (0..count).try_for_each(|_| element(self))
    }
}

const BOOL: i64 = 1;
const INT: i64 = 2;
const UINT: i64 = 3;
const FLOAT: i64 = 4;
const BYTES: i64 = 5;
const STRING: i64 = 6;
const COMPLEX: i64 = 7;
const INTERFACE: i64 = 8;

const A_STRING: &str = "a string";
const A_FLOAT: &str = "a float";
const A_STRUCT: &str = "a struct";

/// What is known of a type that the stream defined.
#[derive(Clone, Debug)]
enum Type {
    /// Arrays and slices: a count, then elements.
    List(i64),
    Struct(Vec<(String, i64)>),
    Map(i64, i64),
    /// A type that encodes itself, such as `time.Time`: bytes.
    Opaque,
}

struct Types {
    by_id: HashMap<i64, Type>,
    max_depth: usize,
}

impl Types {
    /// A definition is itself a gob value, of Go's `wireType`: one of seven fields is set, each a
    /// struct whose first field holds the type's own name and id.
    fn define(&mut self, reader: &mut Reader<'_>, id: i64) -> Result<(), GobError> {
        if self.by_id.len() >= MAX_TYPES {
            return Err(GobError::TooManyTypes);
        }
        let mut defined = None;
        reader.fields(|reader, kind| {
            let (mut ids, mut members) = ([0_i64; 2], Vec::new());
            reader.fields(|reader, field| match (kind, field) {
                (0..=6, 0) => common_type(reader),
                (0 | 1, 1) | (3, 1) => {
                    ids[0] = reader.int()?;
                    Ok(())
                }
                (3, 2) => {
                    ids[1] = reader.int()?;
                    Ok(())
                }
                (0, 2) => reader.int().map(|_| ()),
                (2, 1) => reader.elements(|reader| {
                    members.push(member(reader)?);
                    Ok(())
                }),
                _ => Err(GobError::Malformed("a type's definition has an unknown field")),
            })?;
            let [first, second] = ids;
            defined = Some(match kind {
                0 | 1 => Type::List(first),
                2 => Type::Struct(members),
                3 => Type::Map(first, second),
                _ => Type::Opaque,
            });
            Ok(())
        })?;
        let defined = defined.ok_or(GobError::Malformed("a type's definition is empty"))?;
        match self.by_id.insert(id, defined) {
            None => Ok(()),
            Some(_) => Err(GobError::RedefinedType(id)),
        }
    }

    fn members(&self, id: i64, of: &'static str) -> Result<&[(String, i64)], GobError> {
        match self.by_id.get(&id) {
            Some(Type::Struct(members)) => Ok(members),
            _ => Err(self.mismatch(of, id, A_STRUCT)),
        }
    }

    /// Returns why a field of this type is not `wanted`.
    fn mismatch(&self, field: &'static str, id: i64, wanted: &'static str) -> GobError {
        let found = match (id, self.by_id.get(&id)) {
            (BOOL, _) => "a boolean",
            (INT, _) => "an integer",
            (UINT, _) => "an unsigned integer",
            (FLOAT, _) => A_FLOAT,
            (BYTES, _) => "a byte slice",
            (STRING, _) => A_STRING,
            (COMPLEX, _) => "a complex number",
            (INTERFACE, _) => "an interface",
            (_, Some(Type::List(_))) => "a list",
            (_, Some(Type::Struct(_))) => A_STRUCT,
            (_, Some(Type::Map(..))) => "a map",
            (_, Some(Type::Opaque)) => "a type that encodes itself",
            (_, None) => return GobError::UndefinedType(id),
        };
        GobError::Mismatch(field, found, wanted)
    }

    fn text(
        &self,
        reader: &mut Reader<'_>,
        id: i64,
        field: &'static str,
        to: &mut Bytes,
    ) -> Result<(), GobError> {
        if id != STRING {
            return Err(self.mismatch(field, id, A_STRING));
        }
        *to = Bytes::copy_from_slice(reader.text()?.as_bytes());
        Ok(())
    }

    fn float(
        &self,
        reader: &mut Reader<'_>,
        id: i64,
        field: &'static str,
        to: &mut f64,
    ) -> Result<(), GobError> {
        if id != FLOAT {
            return Err(self.mismatch(field, id, A_FLOAT));
        }
        *to = reader.float()?;
        Ok(())
    }

    /// Hands each field of a struct to `known` by its name and type; what `known` does not know is
    /// skipped.
    fn read<'a>(
        &self,
        reader: &mut Reader<'a>,
        id: i64,
        of: &'static str,
        mut known: impl FnMut(&mut Reader<'a>, &str, i64) -> Option<Result<(), GobError>>,
    ) -> Result<(), GobError> {
        let members = self.members(id, of)?;
        reader.fields(|reader, number| {
            let (name, id) =
                members.get(number).ok_or(GobError::Malformed("a struct has no field of that number"))?;
            known(reader, name, *id).unwrap_or_else(|| self.skip(reader, *id, 0))
        })
    }

    fn stat_message(&self, reader: &mut Reader<'_>, id: i64) -> Result<StatMessage, GobError> {
        let (mut namespace, mut name) = (Bytes::new(), Bytes::new());
        let mut stat = Stat::default();
        let mut time = Time { seconds: -YEAR_ONE_TO_1970, nanoseconds: 0 };
        self.read(reader, id, "StatMessage", |reader, field, id| match field {
            "Key" => Some(self.read(reader, id, "Key", |reader, field, id| match field {
                "Namespace" => Some(self.text(reader, id, "Key.Namespace", &mut namespace)),
                "Name" => Some(self.text(reader, id, "Key.Name", &mut name)),
                _ => None,
            })),
            "Stat" => Some(self.read(reader, id, "Stat", |reader, field, id| match field {
                "Time" => Some(self.time(reader, id, &mut time)),
                "PodName" => Some(self.text(reader, id, "Stat.PodName", &mut stat.pod_name)),
                "AverageConcurrentRequests" => Some(self.float(
                    reader,
                    id,
                    "Stat.AverageConcurrentRequests",
                    &mut stat.average_concurrent_requests,
                )),
                "AverageProxiedConcurrentRequests" => Some(self.float(
                    reader,
                    id,
                    "Stat.AverageProxiedConcurrentRequests",
                    &mut stat.average_proxied_concurrent_requests,
                )),
                "RequestCount" => Some(self.float(reader, id, "Stat.RequestCount", &mut stat.request_count)),
                "ProxiedRequestCount" => {
                    Some(self.float(reader, id, "Stat.ProxiedRequestCount", &mut stat.proxied_request_count))
                }
                _ => None,
            })),
            _ => None,
        })?;
        if time.seconds != -YEAR_ONE_TO_1970 {
            stat.timestamp = time.seconds;
        }
        Ok(StatMessage { message: WireStatMessage { namespace, name, stat: Some(stat) }, time })
    }

    /// `time.Time` marshals itself: a version, seconds since the year 1, nanoseconds, the zone's
    /// offset.
    fn time(&self, reader: &mut Reader<'_>, id: i64, time: &mut Time) -> Result<(), GobError> {
        if !matches!(self.by_id.get(&id), Some(Type::Opaque)) {
            return Err(self.mismatch("Stat.Time", id, "a time.Time"));
        }
        let bytes = reader.bytes()?;
        let (Some((version @ (1 | 2), rest)), 15 | 16) = (bytes.split_first(), bytes.len()) else {
            return Err(GobError::Malformed("Stat.Time is of an unknown version"));
        };
        let (seconds, rest) = rest.split_first_chunk().ok_or(GobError::Ends)?;
        let (nanoseconds, zone) = rest.split_first_chunk().ok_or(GobError::Ends)?;
        if zone.len() != usize::from(*version) + 1 {
            return Err(GobError::Malformed("Stat.Time is of an unknown version"));
        }
        *time = Time {
            seconds: i64::from_be_bytes(*seconds).saturating_sub(YEAR_ONE_TO_1970),
            nanoseconds: u32::from_be_bytes(*nanoseconds),
        };
        Ok(())
    }

    fn skip(&self, reader: &mut Reader<'_>, id: i64, depth: usize) -> Result<(), GobError> {
        if depth > self.max_depth {
            return Err(GobError::TooDeep(self.max_depth));
        }
        match id {
            BOOL | INT | UINT | FLOAT => reader.uint().map(|_| ()),
            BYTES | STRING => reader.bytes().map(|_| ()),
            COMPLEX => reader.uint().and_then(|_| reader.uint()).map(|_| ()),
            INTERFACE => {
                // A nil one has no name and nothing more; any other says how long it is.
                if reader.bytes()?.is_empty() {
                    return Ok(());
                }
                reader.int()?;
                reader.bytes().map(|_| ())
            }
            _ => match self.by_id.get(&id).ok_or(GobError::UndefinedType(id))? {
                Type::Opaque => reader.bytes().map(|_| ()),
                Type::List(element) => reader.elements(|reader| self.skip(reader, *element, depth + 1)),
                Type::Map(key, value) => reader.elements(|reader| {
                    self.skip(reader, *key, depth + 1)?;
                    self.skip(reader, *value, depth + 1)
                }),
                Type::Struct(members) => reader.fields(|reader, number| {
                    let (_, id) = members
                        .get(number)
                        .ok_or(GobError::Malformed("a struct has no field of that number"))?;
                    self.skip(reader, *id, depth + 1)
                }),
            },
        }
    }
}

/// Go's `CommonType`: the type's name and id, which the definition's message says, too.
fn common_type(reader: &mut Reader<'_>) -> Result<(), GobError> {
    reader.fields(|reader, field| match field {
        0 => reader.bytes().map(|_| ()),
        1 => reader.int().map(|_| ()),
        _ => Err(GobError::Malformed("a type's definition has an unknown field")),
    })
}

fn member(reader: &mut Reader<'_>) -> Result<(String, i64), GobError> {
    let (mut name, mut id) = (String::new(), 0);
    reader.fields(|reader, field| {
        match field {
            0 => name = reader.text()?.to_owned(),
            1 => id = reader.int()?,
            _ => return Err(GobError::Malformed("a field's definition has an unknown field")),
        }
        Ok(())
    })?;
    Ok((name, id))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(bytes: &[u8]) -> Result<StatMessage, GobError> {
        super::decode(bytes, MAX_DEPTH)
    }

    fn uint(n: u64) -> Vec<u8> {
        if n < 128 {
            return vec![n as u8];
        }
        let bytes: Vec<u8> = n.to_be_bytes().into_iter().skip_while(|b| *b == 0).collect();
        [vec![(bytes.len() as u8).wrapping_neg()], bytes].concat()
    }

    fn int(n: i64) -> Vec<u8> {
        uint(if n < 0 { (!n as u64) << 1 | 1 } else { (n as u64) << 1 })
    }

    fn string(s: &str) -> Vec<u8> {
        [uint(s.len() as u64), s.as_bytes().to_vec()].concat()
    }

    fn message(id: i64, body: &[u8]) -> Vec<u8> {
        let body = [&int(id), body].concat();
        [uint(body.len() as u64), body].concat()
    }

    /// A struct type's definition.
    fn structure(id: i64, name: &str, members: &[(&str, i64)]) -> Vec<u8> {
        let mut body = vec![3, 1, 1];
        body.extend([string(name), vec![1], int(id), vec![0, 1], uint(members.len() as u64)].concat());
        for (name, id) in members {
            body.extend([vec![1], string(name), vec![1], int(*id), vec![0]].concat());
        }
        body.extend([0, 0]);
        message(-id, &body)
    }

    /// A slice (kind 2) or an opaque type (kind 5).
    fn other(id: i64, kind: u8, element: Option<i64>) -> Vec<u8> {
        let mut body = [vec![kind, 1, 2], int(id), vec![0]].concat();
        if let Some(element) = element {
            body.extend([vec![1], int(element)].concat());
        }
        body.extend([0, 0]);
        message(-id, &body)
    }

    /// With fields in another order, some missing, some that nobody knows.
    fn another_order() -> Vec<u8> {
        [
            structure(65, "StatMessage", &[("Stat", 66), ("Extra", 68), ("Key", 67)]),
            structure(66, "Stat", &[("RequestCount", FLOAT), ("Labels", 69), ("PodName", STRING)]),
            structure(67, "Key", &[("Name", STRING), ("Namespace", STRING)]),
            structure(68, "Extra", &[("A", INT), ("Any", INTERFACE), ("C", COMPLEX), ("T", 70)]),
            other(69, 2, Some(68)),
            other(70, 5, None),
            message(
                65,
                &[
                    // Stat: RequestCount 2.5, Labels [{A: -1}, {}], PodName.
                    vec![1, 1, 0xfe, 0x04, 0x40, 1, 2, 1, 1, 0, 0, 1],
                    string("pod"),
                    vec![0],
                    // Extra: Any nil, C, T.
                    vec![1, 2, 0, 1, 0, 0, 1],
                    string("opaque"),
                    vec![0],
                    // Key.
                    vec![1, 1],
                    string("rev"),
                    vec![1],
                    string("ns"),
                    vec![0, 0],
                ]
                .concat(),
            ),
        ]
        .concat()
    }

    #[test]
    fn fields_are_matched_by_name_whatever_their_order_and_company() {
        let bytes = another_order();
        assert!(begins_one(&bytes));
        let decoded = decode(&bytes).unwrap();
        let stat = decoded.message.stat.unwrap();
        assert_eq!((&decoded.message.namespace[..], &decoded.message.name[..]), (&b"ns"[..], &b"rev"[..]));
        assert_eq!(
            (&stat.pod_name[..], stat.request_count, stat.average_concurrent_requests),
            (&b"pod"[..], 2.5, 0.0)
        );
        assert_eq!(stat.timestamp, 0);
    }

    #[test]
    fn every_truncation_is_an_error() {
        let bytes = another_order();
        for length in 0..bytes.len() {
            assert!(decode(&bytes[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn a_field_of_another_type_is_named() {
        let bytes = [
            structure(65, "StatMessage", &[("Key", 66)]),
            structure(66, "Key", &[("Name", INT)]),
            message(65, &[1, 1, 2, 0, 0]),
        ]
        .concat();
        assert_eq!(decode(&bytes), Err(GobError::Mismatch("Key.Name", "an integer", "a string")));
        let list = [other(65, 2, Some(INT)), message(65, &[0, 1, 2])].concat();
        assert_eq!(decode(&list), Err(GobError::Mismatch("StatMessage", "a list", "a struct")));
    }

    #[test]
    fn a_type_that_contains_itself_ends_at_the_depth_allowed() {
        let nested = [vec![1], vec![1; 40], vec![0; 42]].concat();
        let bytes =
            [structure(65, "StatMessage", &[("Self", 66)]), other(66, 2, Some(66)), message(65, &nested)]
                .concat();
        assert_eq!(decode(&bytes), Err(GobError::TooDeep(MAX_DEPTH)));
    }

    #[test]
    fn counts_and_lengths_that_promise_the_moon_allocate_nothing() {
        let huge = [0xf8, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
        assert_eq!(decode(&huge), Err(GobError::Ends));
        assert_eq!(decode(&[0xf7]), Err(GobError::Malformed("a number has more than 8 bytes")));
        let bytes = [
            structure(65, "StatMessage", &[("List", 66)]),
            other(66, 2, Some(BOOL)),
            message(65, &[&[1][..], &huge].concat()),
        ]
        .concat();
        assert_eq!(decode(&bytes), Err(GobError::Ends));
    }

    #[test]
    fn a_stream_may_define_only_so_many_types_and_each_once() {
        let many: Vec<u8> = (65..200).flat_map(|id| other(id, 5, None)).collect();
        assert_eq!(decode(&many), Err(GobError::TooManyTypes));
        let twice = [other(65, 5, None), other(65, 5, None)].concat();
        assert_eq!(decode(&twice), Err(GobError::RedefinedType(65)));
        assert_eq!(decode(&message(70, &[0])), Err(GobError::UndefinedType(70)));
        assert_eq!(decode(&message(i64::MIN, &[0])), Err(GobError::UndefinedType(i64::MIN)));
    }

    #[test]
    fn what_begins_a_gob_stream() {
        for no in [&b""[..], b"\x0a\x52\x0a", b"\x2b", b"\x02\x04\x00", b"\xff"] {
            assert!(!begins_one(no), "{no:?}");
        }
    }
}
