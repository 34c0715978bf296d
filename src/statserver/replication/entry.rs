//! The entries of the log.

use inflight_stats::Report;
use inflight_stats::protocol::key_name::KeyName;
use serde::{Deserialize, Serialize};

use crate::replication::format::{self, FormatError};

/// One change of the state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Change {
    /// A report, without what its sender may not report.
    Report(Report),
    /// Stats of the stream, as protobuf (`WireStatMessages`), without what is not valid.
    Stats(Vec<u8>),
    /// A key's settings, as JSON.
    SetSettings(KeyName, String),
    /// A key is scaled by the defaults again.
    ClearSettings(KeyName),
    /// The deciders' turn. One that is not due does nothing.
    Tick,
    /// The store had lost entries. What follows continues the snapshot of this epoch.
    Recovered {
        /// How often the store has lost entries.
        epoch: u64,
    },
}

/// An entry of the log: changes that are made together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Which server wrote it.
    pub server: u64,
    /// Its number at that server. One that comes twice is ignored: a server that does not know whether
    /// its entry was stored stores it again.
    pub number: u64,
    /// The log's time by that server's estimate, in nanoseconds.
    pub at_ns: u64,
    /// The changes.
    pub changes: Vec<Change>,
}

/// What the version that the tests make up has in addition.
#[derive(Serialize, Deserialize)]
struct NextFormat {
    entry: Entry,
    comment: String,
}

impl Entry {
    /// Returns the bytes of an entry.
    ///
    /// # Errors
    /// It is too large.
    pub fn encode(&self, version: u8) -> Result<Vec<u8>, FormatError> {
        let mut plain = Vec::new();
        if version >= 2 {
            let comment = String::from("from the next version");
            format::write(&mut plain, &NextFormat { entry: self.clone(), comment })?;
        } else {
            format::write(&mut plain, self)?;
        }
        Ok(format::compress(version, &plain))
    }

    /// Reads an entry.
    ///
    /// # Errors
    /// [`FormatError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let (version, plain) = format::decompress(bytes)?;
        if version >= 2 {
            return format::read::<NextFormat>(&plain).map(|next| next.entry);
        }
        format::read(&plain)
    }
}

#[cfg(test)]
mod tests {
    use inflight_stats::{KeyReport, Snapshot};

    use super::*;

    fn entry() -> Entry {
        let key = KeyReport {
            namespace: "ns".into(),
            name: "rev".into(),
            from_gateway: true,
            since: Snapshot::starting_at(1),
            until: Snapshot { as_of_ns: 300, requests: 70_000, request_ns: 1 << 100, ..Snapshot::default() },
        };
        let report = Report { version: 1, pod: "pod".into(), incarnation: 9, messages: vec![key] };
        let name = KeyName::new("ns", "rev");
        let changes = vec![
            Change::Report(report),
            Change::Stats(vec![1, 2, 3]),
            Change::SetSettings(name.clone(), "{\"target\":7.0}".into()),
            Change::ClearSettings(name),
            Change::Tick,
            Change::Recovered { epoch: 3 },
        ];
        Entry { server: 1, number: 2, at_ns: 3, changes }
    }

    /// The bytes of version 1. Servers of other versions read them: whoever changes them makes a new
    /// version.
    #[test]
    fn the_first_format_stays_as_it_is() {
        let mut plain = Vec::new();
        format::write(&mut plain, &entry()).unwrap();
        let hex: String = plain.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, GOLDEN);
        let bytes = entry().encode(1).unwrap();
        assert_eq!((bytes[0], Entry::decode(&bytes)), (1, Ok(entry())));
    }

    const GOLDEN: &str = "01020306000103706f640901026e73037265760101000000000000fb2c01fc7011010000fe00000000000000000000000010000000\
                          000000010301020302026e73037265760e7b22746172676574223a372e307d03026e7303726576040503";

    #[test]
    fn bytes_of_nobody_are_refused() {
        let whole = entry().encode(1).unwrap();
        for position in 0..whole.len() {
            for flipped in [1, 128, 255] {
                let mut wrong = whole.clone();
                wrong[position] ^= flipped;
                // It may be another entry, but never a panic or much memory.
                let _ = Entry::decode(&wrong);
            }
            assert!(Entry::decode(&whole[..position]).is_err());
        }
        assert_eq!(Entry::decode(&[3, 0]), Err(FormatError::Version(3)));
    }
}
