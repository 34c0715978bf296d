//! The common name of a certificate's subject. Only certificates are read that were verified, so
//! that they are well-formed; whatever is not leads to no name.

/// The tags of DER that are read here.
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const OBJECT_IDENTIFIER: u8 = 0x06;
const UTF8_STRING: u8 = 0x0c;
const PRINTABLE_STRING: u8 = 0x13;
const IA5_STRING: u8 = 0x16;
const EXPLICIT_VERSION: u8 = 0xa0;
/// 2.5.4.3
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];

/// Returns the subject's common name; `None` if it has none, or more than one.
pub fn common_name(certificate: &[u8]) -> Option<String> {
    let (certificate, _) = value(certificate, SEQUENCE)?;
    let (mut fields, _) = value(certificate, SEQUENCE)?;
    if let Some((_, rest)) = value(fields, EXPLICIT_VERSION) {
        fields = rest;
    }
    // Serial number, signature, issuer, validity.
    for _ in 0..4 {
        (_, _, fields) = any(fields)?;
    }
    let (mut subject, _) = value(fields, SEQUENCE)?;
    let mut found = None;
    while !subject.is_empty() {
        let (mut attributes, rest) = value(subject, SET)?;
        while !attributes.is_empty() {
            let (attribute, others) = value(attributes, SEQUENCE)?;
            let (kind, text) = value(attribute, OBJECT_IDENTIFIER)?;
            if kind == COMMON_NAME {
                let (tag, text, _) = any(text)?;
                let is_text = matches!(tag, UTF8_STRING | PRINTABLE_STRING | IA5_STRING);
                let text = std::str::from_utf8(text).ok().filter(|_| is_text)?;
                if found.replace(text.to_owned()).is_some() {
                    return None;
                }
            }
            attributes = others;
        }
        subject = rest;
    }
    found
}

/// Returns a value of this tag, and what follows it.
fn value(der: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (found, value, rest) = any(der)?;
    (found == tag).then_some((value, rest))
}

/// Returns a tag, its value, and what follows it.
fn any(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (tag, der) = der.split_first()?;
    let (length, der) = der.split_first()?;
    let (length, der) = match *length {
        short @ 0..0x80 => (usize::from(short), der),
        long => {
            let (bytes, der) = der.split_at_checked(usize::from(long & 0x7f))?;
            if bytes.is_empty() || bytes.len() > 4 {
                return None;
            }
            (bytes.iter().fold(0, |length, byte| length << 8 | usize::from(*byte)), der)
        }
    };
    let (value, rest) = der.split_at_checked(length)?;
    Some((*tag, value, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn der(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
        let value = parts.concat();
        let length = match value.len() {
            short @ 0..0x80 => vec![short as u8],
            long => vec![0x82, (long >> 8) as u8, long as u8],
        };
        [&[tag][..], &length, &value].concat()
    }

    fn certificate(names: &[(&[u8], u8, &str)]) -> Vec<u8> {
        let names: Vec<Vec<u8>> = names
            .iter()
            .map(|(kind, tag, text)| {
                let kind = der(OBJECT_IDENTIFIER, &[kind]);
                der(SET, &[&der(SEQUENCE, &[&kind, &der(*tag, &[text.as_bytes()])])])
            })
            .collect();
        let subject = der(SEQUENCE, &[&names.concat()]);
        let (version, number, empty) =
            (der(EXPLICIT_VERSION, &[&[2, 1, 2]]), der(2, &[&[7]]), der(SEQUENCE, &[]));
        // Long enough for a length of two bytes.
        let issuer = der(SEQUENCE, &[&[0; 300]]);
        let fields = der(SEQUENCE, &[&version, &number, &empty, &issuer, &empty, &subject, &empty]);
        der(SEQUENCE, &[&fields, &empty])
    }

    #[test]
    fn the_common_name_is_the_subjects_only_one() {
        let organization: &[u8] = &[0x55, 0x04, 0x0a];
        let of = |names: &[(&[u8], u8, &str)]| common_name(&certificate(names));
        let name = Some("front-proxy-client".to_owned());
        assert_eq!(of(&[(COMMON_NAME, UTF8_STRING, "front-proxy-client")]), name);
        assert_eq!(
            of(&[(organization, UTF8_STRING, "x"), (COMMON_NAME, PRINTABLE_STRING, "front-proxy-client")]),
            name
        );
        assert_eq!(of(&[(organization, UTF8_STRING, "front-proxy-client")]), None);
        assert_eq!(of(&[(COMMON_NAME, UTF8_STRING, "a"), (COMMON_NAME, UTF8_STRING, "b")]), None);
        assert_eq!(of(&[(COMMON_NAME, 0x1e, "a")]), None, "another kind of text");
        // No byte that is missing or wrong is read beyond.
        let whole = certificate(&[(COMMON_NAME, UTF8_STRING, "front-proxy-client")]);
        for end in 0..whole.len() {
            let _ = common_name(&whole[..end]);
            for byte in [0, 0x7f, 0x80, 0x84, 0xff] {
                let mut wrong = whole.clone();
                wrong[end] = byte;
                let _ = common_name(&wrong);
            }
        }
    }
}
