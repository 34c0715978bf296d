//! Positions in the store's stream.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The id of an entry in the stream, which the store gives it: milliseconds, and a number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct StreamId(pub u64, pub u64);

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.0, self.1)
    }
}

/// No id of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoStreamId;

impl FromStr for StreamId {
    type Err = NoStreamId;

    fn from_str(text: &str) -> Result<Self, NoStreamId> {
        let (milliseconds, number) = text.split_once('-').ok_or(NoStreamId)?;
        let number_of = |text: &str| text.parse().map_err(|_| NoStreamId);
        Ok(Self(number_of(milliseconds)?, number_of(number)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_written_and_compared() {
        let id: StreamId = "1700000000000-12".parse().unwrap();
        assert_eq!((id, id.to_string().as_str()), (StreamId(1_700_000_000_000, 12), "1700000000000-12"));
        assert!(StreamId(5, 10) > StreamId(5, 9) && StreamId(6, 0) > StreamId(5, 10));
        for wrong in ["", "5", "5-", "a-1", "1-2-3"] {
            assert_eq!(wrong.parse::<StreamId>(), Err(NoStreamId));
        }
    }
}
