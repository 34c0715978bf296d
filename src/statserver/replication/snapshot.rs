//! Snapshots: the whole state as bytes, in pieces, so that no value of the store is large.

use inflight_stats::protocol::key_name::KeyName;
use inflight_stats::scaling::key::Key;
use ring::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};

use crate::keys::key_table::{KeyTable, TableTimes};
use crate::keys::settings_store::SettingsStore;
use crate::replication::format;
use crate::replication::progress::Progress;

/// A piece is closed when it has so many bytes before it is compressed. A key is in one piece.
const PIECE_BYTES: usize = 1 << 20;

/// A snapshot.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// How far the state is.
    pub progress: Progress,
    /// Its bytes.
    pub pieces: Vec<Vec<u8>>,
    /// The SHA-256 of the pieces, in hexadecimal digits.
    pub digest: String,
}

/// What is not in the keys: the first piece.
#[derive(Serialize, Deserialize)]
struct Header {
    progress: Progress,
    times: TableTimes,
    keys: u64,
    /// As JSON.
    settings: Vec<(KeyName, String)>,
}

/// What the version that the tests make up has in addition.
#[derive(Serialize, Deserialize)]
struct NextFormat {
    header: Header,
    comment: String,
}

/// Returns the digest of pieces.
pub fn digest(pieces: &[Vec<u8>]) -> String {
    let mut context = Context::new(&SHA256);
    pieces.iter().for_each(|piece| context.update(piece));
    context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Makes a snapshot. Must not be called in a task, nor beside anything that changes keys.
pub fn make(
    version: u8,
    progress: &Progress,
    keys: &KeyTable,
    settings: &SettingsStore,
) -> Result<Snapshot, String> {
    let (mut pieces, mut plain, mut count, mut failed) = (Vec::new(), Vec::new(), 0_u64, None);
    keys.visit(|name, key| {
        if let Err(error) = format::write(&mut plain, name).and_then(|()| format::write(&mut plain, key)) {
            failed.get_or_insert(error);
        }
        count += 1;
        if plain.len() >= PIECE_BYTES {
            pieces.push(format::compress(version, &plain));
            plain.clear();
        }
    });
    if !plain.is_empty() {
        pieces.push(format::compress(version, &plain));
        plain.clear();
    }
    let settings = settings.all().into_iter().map(|(name, json)| (name, json.to_string())).collect();
    let header = Header { progress: progress.clone(), times: keys.times(), keys: count, settings };
    let written = match version {
        1 => format::write(&mut plain, &header),
        _ => format::write(&mut plain, &NextFormat { header, comment: "from the next version".into() }),
    };
    if let Some(error) = failed.or(written.err()) {
        return Err(error.to_string());
    }
    pieces.insert(0, format::compress(version, &plain));
    let digest = digest(&pieces);
    Ok(Snapshot { progress: progress.clone(), pieces, digest })
}

/// Returns how far a snapshot is.
///
/// # Errors
/// It is malformed, or of another version.
pub fn progress(pieces: &[Vec<u8>]) -> Result<Progress, String> {
    header(pieces).map(|(header, _)| header.progress)
}

fn header(pieces: &[Vec<u8>]) -> Result<(Header, &[Vec<u8>]), String> {
    let (first, rest) = pieces.split_first().ok_or("the snapshot is empty")?;
    let (version, plain) = format::decompress(first).map_err(|error| error.to_string())?;
    let header = match version {
        1 => format::read(&plain),
        _ => format::read::<NextFormat>(&plain).map(|next| next.header),
    };
    Ok((header.map_err(|error| error.to_string())?, rest))
}

/// Replaces all keys and settings by those of a snapshot. Returns how far it is.
///
/// # Errors
/// It is malformed, or of another version; nothing was changed.
pub fn load(pieces: &[Vec<u8>], keys: &KeyTable, settings: &SettingsStore) -> Result<Progress, String> {
    let text = |error: format::FormatError| error.to_string();
    let (Header { progress, times, keys: count, settings: saved }, pieces) = header(pieces)?;
    let mut read: Vec<(KeyName, Key)> = Vec::new();
    for piece in pieces {
        let (_, plain) = format::decompress(piece).map_err(text)?;
        let mut rest = &plain[..];
        while !rest.is_empty() {
            let name = format::read_next(&mut rest).map_err(text)?;
            read.push((name, format::read_next(&mut rest).map_err(text)?));
        }
    }
    if read.len() as u64 != count {
        return Err(format!("the snapshot has {} keys; expected {count}", read.len()));
    }
    let json = |(name, text): (KeyName, String)| {
        serde_json::from_str(&text).map(|json| (name, json)).map_err(|error| error.to_string())
    };
    settings.replace_all(keys, saved.into_iter().map(json).collect::<Result<_, _>>()?)?;
    keys.replace(times, read);
    Ok(progress)
}
