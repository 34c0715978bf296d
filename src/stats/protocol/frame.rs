//! A frame of Knative's stat stream: stats as protobuf, or as gob from an older Knative.

use bytes::Bytes;
use prost::Message;
use prost::encoding::DecodeContext;

use crate::protocol::gob;
use crate::protocol::stat::{WireStatMessage, WireStatMessages};

/// How much of a frame is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameLimits {
    /// Maximum size in bytes; an activator with 5,000 revisions sends half of the default.
    pub bytes: usize,
    /// Maximum number of stats: an empty one takes two bytes of the frame and two hundred in
    /// memory.
    pub messages: usize,
    /// How deep the values of a gob stream may be nested.
    pub depth: usize,
}

impl Default for FrameLimits {
    fn default() -> Self {
        Self { bytes: 1 << 20, messages: 10_000, depth: gob::MAX_DEPTH }
    }
}

/// Why a frame was dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// More bytes than allowed: how many, and the limit.
    TooLarge(usize, usize),
    /// More stats than allowed: how many, and the limit.
    TooMany(usize, usize),
    /// Neither of the two: the protobuf decoder's reason.
    Protobuf(String),
    /// A gob stream, and not of a `StatMessage`.
    Gob(gob::GobError),
    /// A name that is not UTF-8: its field.
    NotUtf8(&'static str),
}

impl std::fmt::Display for FrameError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::TooLarge(bytes, max) => write!(f, "the frame has {bytes} bytes; expected at most {max}"),
            Self::TooMany(stats, max) => write!(f, "the frame has {stats} stats; expected at most {max}"),
            Self::Protobuf(reason) => write!(f, "the frame is no WireStatMessages: {reason}"),
            Self::Gob(error) => write!(f, "the frame is no gob StatMessage: {error}"),
            Self::NotUtf8(field) => write!(f, "`{field}` of a stat is not UTF-8"),
        }
    }
}

impl std::error::Error for FrameError {}

/// Decodes a frame of either kind. A protobuf frame begins with the tag of field 1, or (being from
/// a later version) of a field that is skipped; a gob stream begins with the definition of a type.
///
/// # Errors
/// Every variant of [`FrameError`]. A frame is taken as a whole or not at all.
pub fn decode(frame: Bytes, limits: &FrameLimits) -> Result<Vec<WireStatMessage>, FrameError> {
    if frame.len() > limits.bytes {
        return Err(FrameError::TooLarge(frame.len(), limits.bytes));
    }
    if gob::begins_one(&frame) {
        let decoded = gob::decode(&frame, limits.depth).map_err(FrameError::Gob)?;
        return Ok(vec![decoded.message]);
    }
    let protobuf = |error: prost::DecodeError| FrameError::Protobuf(error.to_string());
    let stats = count(&frame).map_err(protobuf)?;
    if stats > limits.messages {
        return Err(FrameError::TooMany(stats, limits.messages));
    }
    let messages = WireStatMessages::decode(frame).map_err(protobuf)?.messages;
    match messages.iter().find_map(field_that_is_not_utf8) {
        None => Ok(messages),
        Some(field) => Err(FrameError::NotUtf8(field)),
    }
}

fn field_that_is_not_utf8(message: &WireStatMessage) -> Option<&'static str> {
    let pod = message.stat.as_ref().map(|stat| &stat.pod_name);
    let names = [("namespace", Some(&message.namespace)), ("name", Some(&message.name)), ("pod_name", pod)];
    let is_utf8 = |name: &Bytes| std::str::from_utf8(name).is_ok();
    names.into_iter().find(|(_, name)| !name.is_none_or(is_utf8)).map(|(field, _)| field)
}

/// Returns how many fields a protobuf message has, without decoding any: of a frame, its stats.
fn count(mut frame: &[u8]) -> Result<usize, prost::DecodeError> {
    let mut fields = 0;
    while !frame.is_empty() {
        let (tag, wire_type) = prost::encoding::decode_key(&mut frame)?;
        prost::encoding::skip_field(wire_type, tag, &mut frame, DecodeContext::default())?;
        fields += 1;
    }
    Ok(fields)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::stat::Stat;

    fn decode(frame: Bytes) -> Result<Vec<WireStatMessage>, FrameError> {
        super::decode(frame, &FrameLimits::default())
    }

    fn message(namespace: &'static [u8]) -> WireStatMessage {
        let stat = Stat { pod_name: Bytes::from_static(b"pod"), request_count: 2.0, ..Stat::default() };
        WireStatMessage {
            namespace: Bytes::from_static(namespace),
            name: Bytes::from_static(b"rev"),
            stat: Some(stat),
        }
    }

    fn frame(messages: Vec<WireStatMessage>) -> Bytes {
        WireStatMessages { messages }.encode_to_vec().into()
    }

    #[test]
    fn a_frame_is_taken_as_a_whole_or_not_at_all() {
        assert_eq!(decode(frame(vec![message(b"a"), message(b"b")])).unwrap().len(), 2);
        assert_eq!(
            decode(frame(vec![message(b"a"), message(b"\xff")])),
            Err(FrameError::NotUtf8("namespace"))
        );
        let whole = frame(vec![message(b"a"), message(b"b")]);
        let cut = whole.slice(..whole.len() - 1);
        assert!(matches!(decode(cut), Err(FrameError::Protobuf(_))));
        let max = FrameLimits::default().bytes;
        let large = decode(Bytes::from(vec![0; max + 1]));
        assert_eq!(large, Err(FrameError::TooLarge(max + 1, max)));
    }

    #[test]
    fn stats_are_counted_before_they_take_memory() {
        let max = FrameLimits::default().messages;
        let empty = |count| Bytes::from([10, 0].repeat(count));
        assert_eq!(decode(empty(max)).unwrap().len(), max);
        assert_eq!(decode(empty(max + 1)), Err(FrameError::TooMany(max + 1, max)));
        // A field that is skipped takes its bytes all the same.
        assert_eq!(decode(Bytes::from([0x4a, 0].repeat(max + 1))), Err(FrameError::TooMany(max + 1, max)));
    }

    #[test]
    fn fields_of_a_later_version_are_skipped() {
        // Field 9, length-delimited, in front of a message.
        let mut bytes = vec![0x4a, 2, 1, 2];
        bytes.extend(frame(vec![message(b"a")]));
        assert_eq!(decode(bytes.into()).unwrap(), [message(b"a")]);
    }

    #[test]
    fn names_are_parts_of_the_frame() {
        let frame = frame(vec![message(b"namespace")]);
        let within = frame.as_ptr_range();
        let decoded = decode(frame.clone()).unwrap();
        assert!(within.contains(&decoded[0].namespace.as_ptr()), "a copy");
    }
}
