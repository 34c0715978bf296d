//! The settings of single keys, in one file that survives a restart.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use inflight_stats::protocol::key_name::KeyName;
use inflight_stats::protocol::report::check_name;
use inflight_stats::scaling::settings::KeySettings;
use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize, Serializer as _};
use serde_json::Value;
use tokio::sync::Mutex;
use tracing::{error, info, warn};

use crate::keys::capacity::CapacityExceeded;
use crate::keys::key_table::KeyTable;
use crate::os::files;

/// Maximum number of keys with settings of their own.
const MAX_KEYS: usize = 10_000;
/// The largest file that is read, and so the largest that is written: twice what [`MAX_KEYS`] keys
/// can have.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// One key in the file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    namespace: String,
    name: String,
    settings: Value,
}

/// The same, to be written.
#[derive(Serialize)]
struct RecordRef<'a> {
    namespace: &'a str,
    name: &'a str,
    settings: &'a Value,
}

/// The settings of single keys, as they were put, and the file that they are kept in.
pub struct SettingsStore {
    file: Option<PathBuf>,
    rps_target: f64,
    by_key: Arc<Mutex<BTreeMap<KeyName, Value>>>,
    /// What was seen of a file that others write; `None` where it is ours.
    read_only: Option<Mutex<FileSeen>>,
}

/// Who writes the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// We do.
    Own,
    /// Others do.
    ReadOnly,
}

/// What was last seen of a file that others write.
#[derive(Debug)]
struct FileSeen {
    /// The digest of what is in force.
    digest: [u8; 32],
    /// Why the file as it is now is not in force.
    refused: Option<String>,
    /// How many keys of it exceed a limit. They are tried again.
    beyond_limit: usize,
}

/// Why settings were not stored; nothing was changed.
#[derive(Debug)]
pub enum SetError {
    /// The file is read-only.
    ReadOnly(PathBuf),
    /// The JSON is not valid settings.
    Invalid(String),
    /// [`MAX_KEYS`] keys have settings of their own.
    TooMany,
    /// The key, or its windows, would exceed a limit.
    CapacityExceeded(CapacityExceeded),
    /// The file cannot be written.
    File(io::Error),
    /// The store of a shared state is away.
    Unavailable,
}

impl fmt::Display for SetError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ReadOnly(path) => write!(
                f,
                "settings not changed: the file {} is read-only; change it where it comes from, for \
                 example in its ConfigMap, and the server reads it again",
                path.display()
            ),
            Self::Invalid(reason) => f.write_str(reason),
            Self::Unavailable => f.write_str(
                "settings possibly not changed: the store of the shared state (--store) is away; try again later",
            ),
            Self::TooMany => {
                write!(
                    f,
                    "settings not stored: {MAX_KEYS} keys already have settings; \
                     expected at most {MAX_KEYS}"
                )
            }
            Self::CapacityExceeded(exceeded) => write!(f, "settings not stored: {exceeded}"),
            Self::File(error) => {
                write!(f, "settings not changed: the settings file cannot be written: {error}")
            }
        }
    }
}

impl std::error::Error for SetError {}

impl SettingsStore {
    /// Reads the file, if there is one, and applies its settings to the keys. A file that does not
    /// exist yet is an empty one, if it can be created. One that exists and cannot be replaced, such
    /// as that of a ConfigMap, is somebody else's: it is read again when it changes, and settings
    /// cannot be set in any other way.
    ///
    /// # Errors
    /// In one line: the file can be neither read nor created, or what is wrong in it.
    pub fn load(file: Option<&Path>, rps_target: f64, keys: &KeyTable) -> io::Result<Self> {
        let Some(path) = file else { return Ok(Self::new(None, rps_target)) };
        let source = if is_read_only(path) { Source::ReadOnly } else { Source::Own };
        Self::load_from(path, source, rps_target, keys)
    }

    fn new(file: Option<PathBuf>, rps_target: f64) -> Self {
        Self { file, rps_target, by_key: Arc::default(), read_only: None }
    }

    /// Returns a store without a file, for a state that is shared: it changes by [`Self::apply`] alone.
    pub fn shared(rps_target: f64) -> Self {
        Self::new(None, rps_target)
    }

    /// Reads the settings of a file, as those that a shared state begins with.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn seeds(path: &Path, rps_target: f64, defaults: &KeySettings) -> io::Result<Vec<(KeyName, Value)>> {
        let parsed = files::read(path, MAX_FILE_BYTES).and_then(|bytes| parse(&bytes, defaults, rps_target));
        let parsed = parsed.map_err(|error| {
            let reason = format!("--settings {}: {error}", path.display());
            io::Error::new(io::ErrorKind::InvalidData, reason)
        })?;
        Ok(parsed.into_iter().map(|(name, (json, _))| (name, json)).collect())
    }

    /// Returns settings as they are stored.
    ///
    /// # Errors
    /// [`SetError::Invalid`].
    pub fn check(&self, keys: &KeyTable, json: Value) -> Result<Value, SetError> {
        accept(keys.defaults(), json, self.rps_target).map(|(json, _)| json).map_err(SetError::Invalid)
    }

    /// Applies a change of a shared state: a key's settings, or (`None`) the defaults again. Must not be
    /// called in a task.
    ///
    /// # Errors
    /// [`SetError`]; nothing was changed.
    pub fn apply(&self, keys: &KeyTable, name: &KeyName, json: Option<Value>) -> Result<(), SetError> {
        let accepted = json.map(|json| accept(keys.defaults(), json, self.rps_target)).transpose();
        let (json, settings) =
            accepted.map_err(SetError::Invalid)?.map(|(json, settings)| (json, Arc::new(settings))).unzip();
        let mut by_key = self.by_key.blocking_lock();
        check_room(keys, &by_key, name, settings.as_ref())?;
        replace_entry(&mut by_key, name, json);
        set_settings(keys, name, settings);
        Ok(())
    }

    /// Returns the settings of all keys, for a snapshot. Must not be called in a task.
    pub fn all(&self) -> Vec<(KeyName, Value)> {
        self.by_key.blocking_lock().iter().map(|(name, json)| (name.clone(), json.clone())).collect()
    }

    /// Replaces the settings of all keys by those of a snapshot. Whoever calls it replaces the keys, too.
    /// Must not be called in a task.
    ///
    /// # Errors
    /// A key's settings are not valid here; nothing was changed.
    pub fn replace_all(&self, keys: &KeyTable, settings: Vec<(KeyName, Value)>) -> Result<(), String> {
        let (mut by_key, mut accepted) = (BTreeMap::new(), HashMap::new());
        for (name, json) in settings {
            let (json, settings) = accept(keys.defaults(), json, self.rps_target)
                .map_err(|reason| format!("key {name}: {reason}"))?;
            accepted.insert(name.clone(), Arc::new(settings));
            by_key.insert(name, json);
        }
        *self.by_key.blocking_lock() = by_key;
        keys.replace_settings(accepted);
        Ok(())
    }

    fn load_from(path: &Path, source: Source, rps_target: f64, keys: &KeyTable) -> io::Result<Self> {
        let invalid = |error: io::Error| {
            let reason = format!("--settings {}: {error}", path.display());
            io::Error::new(io::ErrorKind::InvalidData, reason)
        };
        let bytes = read(path).map_err(invalid)?;
        let parsed = parse(&bytes, keys.defaults(), rps_target).map_err(invalid)?;
        let mut by_key = BTreeMap::new();
        let beyond_limit = apply(keys, &mut by_key, parsed);
        warn_of(&beyond_limit);
        let mut store = Self::new(Some(path.to_owned()), rps_target);
        if let Source::ReadOnly = source {
            info!(file = %path.display(), "the settings file is read-only; it is read again when it changes");
            by_key.retain(|name, _| !beyond_limit.contains(name));
            let (digest, beyond_limit) = (digest_of(&bytes), beyond_limit.len());
            store.read_only = Some(Mutex::new(FileSeen { digest, refused: None, beyond_limit }));
        }
        store.by_key = Arc::new(Mutex::new(by_key));
        Ok(store)
    }

    /// Reads a read-only file again, if it has changed. What is not in it any more is scaled by the
    /// defaults. A file that is wrong changes nothing. Must not be called in a task.
    pub fn reload(&self, keys: &KeyTable) {
        let (Some(path), Some(seen)) = (&self.file, &self.read_only) else { return };
        let mut seen = seen.blocking_lock();
        let read = files::read(path, MAX_FILE_BYTES).and_then(|bytes| {
            let digest = digest_of(&bytes);
            if seen.digest == digest && seen.beyond_limit == 0 {
                return Ok(None);
            }
            parse(&bytes, keys.defaults(), self.rps_target).map(|parsed| Some((digest, parsed)))
        });
        match read {
            Ok(None) => seen.refused = None,
            Ok(Some((digest, parsed))) => {
                if seen.digest != digest {
                    info!(file = %path.display(), keys = parsed.len(), "loaded the changed settings");
                }
                let mut by_key = self.by_key.blocking_lock();
                let beyond_limit = apply(keys, &mut by_key, parsed);
                by_key.retain(|name, _| !beyond_limit.contains(name));
                // Not each time that they are tried.
                if seen.digest != digest || beyond_limit.len() > seen.beyond_limit {
                    warn_of(&beyond_limit);
                }
                *seen = FileSeen { digest, refused: None, beyond_limit: beyond_limit.len() };
            }
            // Once for each mistake, and not each time that it is seen.
            Err(error) => {
                let reason = error.to_string();
                if seen.refused.as_ref() != Some(&reason) {
                    error!(
                        file = %path.display(),
                        reason,
                        "cannot load the changed settings; keeping the old ones"
                    );
                    seen.refused = Some(reason);
                }
            }
        }
    }

    fn check_own(&self) -> Result<(), SetError> {
        match (&self.file, &self.read_only) {
            (Some(path), Some(_)) => Err(SetError::ReadOnly(path.clone())),
            _ => Ok(()),
        }
    }

    /// Sets a key's settings, which replace all that it had. The file is written first: what it
    /// cannot hold is not applied.
    ///
    /// # Errors
    /// [`SetError`].
    pub async fn set(&self, keys: &KeyTable, name: KeyName, json: Value) -> Result<(), SetError> {
        self.check_own()?;
        let (json, settings) = accept(keys.defaults(), json, self.rps_target).map_err(SetError::Invalid)?;
        self.replace(keys, name, Some((json, Arc::new(settings)))).await
    }

    /// Has a key scaled by the defaults again.
    ///
    /// # Errors
    /// [`SetError`].
    pub async fn clear(&self, keys: &KeyTable, name: KeyName) -> Result<(), SetError> {
        self.check_own()?;
        self.replace(keys, name, None).await
    }

    async fn replace(
        &self,
        keys: &KeyTable,
        name: KeyName,
        new: Option<(Value, Arc<KeySettings>)>,
    ) -> Result<(), SetError> {
        // Held until the end: nobody else changes or writes meanwhile.
        let mut by_key = Arc::clone(&self.by_key).lock_owned().await;
        let (json, settings) = new.unzip();
        let is_new_key = check_room(keys, &by_key, &name, settings.as_ref())?;
        let before = replace_entry(&mut by_key, &name, json);
        if let Some(path) = self.file.clone()
            && by_key.get(&name) != before.as_ref()
        {
            let key = name.clone();
            let writing = tokio::task::spawn_blocking(move || {
                let written = write(&path, &by_key);
                if written.is_err() {
                    replace_entry(&mut by_key, &key, before);
                }
                written.map(|()| by_key)
            });
            by_key = match writing.await.unwrap_or_else(|error| Err(io::Error::other(error))) {
                Ok(by_key) => by_key,
                Err(error) => {
                    if is_new_key {
                        keys.release_key(&name);
                    }
                    return Err(SetError::File(error));
                }
            };
        }
        set_settings(keys, &name, settings);
        drop(by_key);
        Ok(())
    }
}

/// Reserves what new settings of a key need. Returns whether the key is new.
fn check_room(
    keys: &KeyTable,
    by_key: &BTreeMap<KeyName, Value>,
    name: &KeyName,
    settings: Option<&Arc<KeySettings>>,
) -> Result<bool, SetError> {
    match settings {
        Some(_) if by_key.len() >= MAX_KEYS && !by_key.contains_key(name) => Err(SetError::TooMany),
        Some(settings) => keys.reserve_key(name, settings).map_err(SetError::CapacityExceeded),
        None => Ok(false),
    }
}

fn set_settings(keys: &KeyTable, name: &KeyName, settings: Option<Arc<KeySettings>>) {
    if let Err(exceeded) = keys.set_settings(name, settings) {
        warn!(%exceeded, key = %name, "a key exceeds a limit; its settings take effect when capacity is free");
    }
}

fn replace_entry(
    by_key: &mut BTreeMap<KeyName, Value>,
    name: &KeyName,
    json: Option<Value>,
) -> Option<Value> {
    match json {
        Some(json) => by_key.insert(name.clone(), json),
        None => by_key.remove(name),
    }
}

/// Returns the JSON as it is stored, and the settings that it makes. They are those of the stored
/// JSON, which must be valid when it is read again.
fn accept(defaults: &KeySettings, json: Value, rps_target: f64) -> Result<(Value, KeySettings), String> {
    let settings = defaults.with(json.clone(), rps_target).map_err(|error| error.to_string())?;
    let short = settings.shortened(json);
    let text = serde_json::to_vec(&short).map_err(|error| error.to_string())?;
    let stored: Value = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    let settings = defaults.with(stored.clone(), rps_target).map_err(|error| error.to_string())?;
    Ok((stored, settings))
}

/// Returns what is in the file; a file that does not exist has no settings, if it can be created.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    match files::read(path, MAX_FILE_BYTES) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            // Now, and not when the first settings are put.
            create_beside(path)?;
            Ok(b"[]".to_vec())
        }
        bytes => bytes,
    }
}

/// Returns whether a file exists that may not be replaced. A full disk does not make it so.
fn is_read_only(path: &Path) -> bool {
    let refused = [io::ErrorKind::PermissionDenied, io::ErrorKind::ReadOnlyFilesystem];
    path.exists() && create_beside(path).is_err_and(|error| refused.contains(&error.kind()))
}

/// The settings of each key in a file: as they are stored, and what they make.
type Parsed = BTreeMap<KeyName, (Value, KeySettings)>;

fn parse(bytes: &[u8], defaults: &KeySettings, rps_target: f64) -> io::Result<Parsed> {
    let records: Vec<Record> =
        serde_json::from_slice(bytes).map_err(|error| io::Error::other(invalid_json(&error)))?;
    let mut by_key = BTreeMap::new();
    for Record { namespace, name, settings } in records {
        for (what, value) in [("namespace", &namespace), ("name", &name)] {
            let check = check_name(value);
            check.map_err(|error| io::Error::other(format!("a key's `{what}` {error}")))?;
        }
        let name = KeyName { namespace, name };
        let accepted = accept(defaults, settings, rps_target)
            .map_err(|error| io::Error::other(format!("key {name}: {error}")))?;
        by_key.insert(name, accepted);
    }
    Ok(by_key)
}

/// Has the keys scaled by what was parsed, and those of `by_key` that are not in it by the defaults.
/// Returns those that exceed a limit.
fn apply(keys: &KeyTable, by_key: &mut BTreeMap<KeyName, Value>, parsed: Parsed) -> BTreeSet<KeyName> {
    for gone in by_key.keys().filter(|name| !parsed.contains_key(name)) {
        // Less is needed without settings, so this cannot exceed a limit.
        let _ = keys.set_settings(gone, None);
    }
    let mut beyond_limit = BTreeSet::new();
    let mut applied = BTreeMap::new();
    for (name, (json, settings)) in parsed {
        if by_key.get(&name) != Some(&json) && keys.set_settings(&name, Some(Arc::new(settings))).is_err() {
            beyond_limit.insert(name.clone());
        }
        applied.insert(name, json);
    }
    *by_key = applied;
    beyond_limit
}

fn warn_of(beyond_limit: &BTreeSet<KeyName>) {
    if !beyond_limit.is_empty() {
        warn!(
            keys = beyond_limit.len(),
            "keys of the settings file exceed a limit; their settings take effect when capacity is free"
        );
    }
}

fn digest_of(bytes: &[u8]) -> [u8; 32] {
    let mut copy = [0; 32];
    copy.copy_from_slice(digest(&SHA256, bytes).as_ref());
    copy
}

fn invalid_json(error: &serde_json::Error) -> String {
    let (line, column, text) = (error.line(), error.column(), error.to_string());
    // The text ends in the position, and may say what the decoder expected.
    let reason = text.strip_suffix(&format!(" at line {line} column {column}")).unwrap_or(&text);
    let reason = reason.split_once(", expected ").map_or(reason, |(given, _)| given);
    let given = match reason.strip_prefix("invalid type: ").unwrap_or(reason) {
        "map" => "an object",
        "sequence" => "a list",
        other => other,
    };
    format!(
        "invalid JSON at line {line}, column {column}: {given}; expected a list of {{\"namespace\": …, \
         \"name\": …, \"settings\": {{…}}}}. Restore a backup, or remove the file"
    )
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Creates a file that can replace another one.
fn create_beside(path: &Path) -> io::Result<tempfile::NamedTempFile> {
    let folder = folder_of(path);
    tempfile::NamedTempFile::new_in(folder).map_err(|error| {
        // What follows is the name of the temporary file, which says nothing to the operator.
        let text = error.to_string();
        let reason =
            text.split_once(" (os error ").or(text.split_once(" at path ")).map(|(reason, _)| reason);
        let reason = format!("cannot create a file in {}: {}", folder.display(), reason.unwrap_or(&text));
        io::Error::new(error.kind(), reason)
    })
}

/// Writes the file as a whole or not at all, even if the power fails: a new file beside the old one
/// is on disk before it replaces it.
fn write(path: &Path, by_key: &BTreeMap<KeyName, Value>) -> io::Result<()> {
    let records =
        by_key.iter().map(|(KeyName { namespace, name }, settings)| RecordRef { namespace, name, settings });
    let mut file = BufWriter::new(create_beside(path)?);
    serde_json::Serializer::pretty(&mut file).collect_seq(records)?;
    file.write_all(b"\n")?;
    let file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
    let bytes = file.as_file().metadata()?.len();
    if bytes > MAX_FILE_BYTES {
        return Err(io::Error::other(format!(
            "it would have {bytes} bytes; expected at most {MAX_FILE_BYTES}"
        )));
    }
    file.as_file().sync_all()?;
    file.persist(path)?;
    std::fs::File::open(folder_of(path))?.sync_all()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::cli::limits::Limit;
    use crate::keys::capacity::Capacity;

    fn no_keys() -> KeyTable {
        capacity_for(9)
    }

    fn capacity_for(keys: usize) -> KeyTable {
        let capacity = Capacity { keys, keys_per_namespace: keys, pods_per_key: 9, bytes: 256 << 20 };
        KeyTable::new(Arc::default(), capacity, 0)
    }

    fn name() -> KeyName {
        KeyName::new("ns", "rev")
    }

    fn target(keys: &KeyTable) -> f64 {
        keys.view(&name(), 0).map_or(0.0, |view| view.settings.target)
    }

    #[tokio::test]
    async fn what_a_key_was_told_survives_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("settings.json");
        let keys = no_keys();
        let store = SettingsStore::load(Some(&file), 200.0, &keys).unwrap();
        store.set(&keys, name(), json!({"target": 7})).await.unwrap();
        assert_eq!(target(&keys), 7.0, "before the first report");

        let again = no_keys();
        let store = SettingsStore::load(Some(&file), 200.0, &again).unwrap();
        assert_eq!(target(&again), 7.0);
        store.clear(&again, name()).await.unwrap();
        assert_eq!(target(&again), 100.0);
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "[]\n");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing left beside it");
    }

    #[tokio::test]
    async fn what_cannot_be_written_is_not_done() {
        let folder = tempfile::tempdir().unwrap();
        let gone = folder.path().join("gone");
        let file = gone.join("settings.json");
        let keys = no_keys();
        let error = SettingsStore::load(Some(&file), 200.0, &keys).err().unwrap().to_string();
        let expected = format!(
            "--settings {}: cannot create a file in {}: No such file or directory",
            file.display(),
            gone.display()
        );
        assert_eq!(error, expected);
        std::fs::create_dir(&gone).unwrap();
        let store = SettingsStore::load(Some(&file), 200.0, &keys).unwrap();
        assert_eq!(std::fs::read_dir(&gone).unwrap().count(), 0, "made when there is something to keep");
        std::fs::remove_dir(&gone).unwrap();
        let error = store.set(&keys, name(), json!({"target": 7})).await;
        assert!(matches!(error, Err(SetError::File(_))), "{error:?}");
        assert!(keys.view(&name(), 0).is_none());
        let error = store.set(&keys, name(), json!({"target": -7})).await;
        assert!(matches!(error, Err(SetError::Invalid(_))), "{error:?}");
    }

    #[tokio::test]
    async fn a_read_only_file_is_read_again_and_nothing_else_sets_anything() {
        let folder = tempfile::tempdir().unwrap();
        // As Kubernetes mounts a ConfigMap.
        let write = |version: &str, text: &str| {
            std::fs::create_dir(folder.path().join(version)).unwrap();
            std::fs::write(folder.path().join(version).join("settings.json"), text).unwrap();
            let new = folder.path().join("..data_tmp");
            std::os::unix::fs::symlink(version, &new).unwrap();
            std::fs::rename(&new, folder.path().join("..data")).unwrap();
        };
        let file = folder.path().join("settings.json");
        std::os::unix::fs::symlink("..data/settings.json", &file).unwrap();
        let of = |name: &str, target: u32| json!({"namespace": "ns", "name": name, "settings": {"target": target}});
        write("..1", &json!([of("rev", 7), of("other", 9)]).to_string());
        let keys = Arc::new(no_keys());
        let store = SettingsStore::load_from(&file, Source::ReadOnly, 200.0, &keys).unwrap();
        let store = Arc::new(store);
        let reload = async || {
            let (keys, store) = (Arc::clone(&keys), Arc::clone(&store));
            tokio::task::spawn_blocking(move || store.reload(&keys)).await.unwrap();
        };
        let other = KeyName::new("ns", "other");
        let target_of = |name: &KeyName| keys.view(name, 0).unwrap().settings.target;
        assert_eq!((target_of(&name()), target_of(&other)), (7.0, 9.0));

        for error in [store.set(&keys, name(), json!({})).await, store.clear(&keys, name()).await] {
            let error = error.unwrap_err();
            assert!(matches!(error, SetError::ReadOnly(_)), "{error:?}");
            let expected = format!("settings not changed: the file {} is read-only; ", file.display());
            assert!(error.to_string().starts_with(&expected), "{error}");
        }
        assert_eq!(target_of(&name()), 7.0);

        write("..2", &json!([of("rev", 8)]).to_string());
        reload().await;
        assert_eq!((target_of(&name()), target_of(&other)), (8.0, 100.0));
        for (version, wrong) in [("..3", "[{"), ("..4", &json!([of("rev", 0)]).to_string())] {
            write(version, wrong);
            reload().await;
            assert_eq!(target_of(&name()), 8.0);
        }
        std::fs::remove_file(folder.path().join("..data")).unwrap();
        reload().await;
        assert_eq!(target_of(&name()), 8.0);
        write("..5", &json!([of("rev", 6)]).to_string());
        reload().await;
        assert_eq!(target_of(&name()), 6.0);
    }

    #[tokio::test]
    async fn keys_of_a_read_only_file_that_exceed_a_limit_are_tried_again() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("settings.json");
        let of = |name: &str| json!({"namespace": "ns", "name": name, "settings": {"target": 7}});
        std::fs::write(&file, json!([of("another"), of("rev")]).to_string()).unwrap();
        let keys = Arc::new(capacity_for(1));
        // Somebody else has the only place.
        let other = KeyName::new("ns", "other");
        assert!(keys.reserve_key(&other, keys.defaults()).unwrap());
        let store = SettingsStore::load_from(&file, Source::ReadOnly, 200.0, &keys).unwrap();
        let store = Arc::new(store);
        let reload = async || {
            let (keys, store) = (Arc::clone(&keys), Arc::clone(&store));
            tokio::task::spawn_blocking(move || store.reload(&keys)).await.unwrap();
        };
        reload().await;
        assert_eq!(target(&keys), 0.0);
        keys.release_key(&other);
        reload().await;
        let known = keys.view(&KeyName::new("ns", "another"), 0).map(|view| view.settings.target);
        assert_eq!((known, target(&keys)), (Some(7.0), 0.0), "the first of them");
    }

    #[tokio::test]
    async fn a_file_of_our_own_is_not_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("settings.json");
        std::fs::write(&file, "[]").unwrap();
        let keys = Arc::new(no_keys());
        let store = Arc::new(SettingsStore::load(Some(&file), 200.0, &keys).unwrap());
        store.set(&keys, name(), json!({"target": 7})).await.unwrap();
        std::fs::write(&file, "[]").unwrap();
        let (of_task, task_keys) = (Arc::clone(&store), Arc::clone(&keys));
        tokio::task::spawn_blocking(move || of_task.reload(&task_keys)).await.unwrap();
        assert_eq!(target(&keys), 7.0);
    }

    #[tokio::test]
    async fn a_key_for_which_there_is_no_room_is_told_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("settings.json");
        let keys = capacity_for(1);
        let store = SettingsStore::load(Some(&file), 200.0, &keys).unwrap();
        store.set(&keys, name(), json!({"target": 7})).await.unwrap();
        let kept = std::fs::read_to_string(&file).unwrap();
        let another = KeyName::new("ns", "another");
        let error = store.set(&keys, another.clone(), json!({"target": 7})).await.unwrap_err();
        assert!(
            matches!(&error, SetError::CapacityExceeded(exceeded) if exceeded.limit == Limit::Keys),
            "{error:?}"
        );
        assert!(keys.view(&another, 0).is_none());
        assert_eq!(std::fs::read_to_string(&file).unwrap(), kept);
        // After a restart with a lower limit the file is read all the same, and everything in it
        // can be taken back.
        store.clear(&keys, name()).await.unwrap();
        let more = capacity_for(2);
        let store = SettingsStore::load(Some(&file), 200.0, &more).unwrap();
        store.set(&more, name(), json!({"target": 7})).await.unwrap();
        store.set(&more, another.clone(), json!({"target": 8})).await.unwrap();
        let less = capacity_for(1);
        let store = SettingsStore::load(Some(&file), 200.0, &less).unwrap();
        store.clear(&less, another).await.unwrap();
        store.clear(&less, name()).await.unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "[]\n");
    }

    #[tokio::test]
    async fn what_was_written_can_be_read_again_at_any_length_and_number() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("settings.json");
        // More than can be put, and each as long as a PUT may be: by hand.
        let long = format!("{}60s", "0".repeat(4_000));
        let lines: Vec<Value> = (0..MAX_KEYS + 1)
            .map(|n| {
                let settings = json!({"stable_window": long});
                json!({"namespace": "ns", "name": format!("rev-{n}"), "settings": settings})
            })
            .collect();
        std::fs::write(&file, serde_json::to_vec(&lines).unwrap()).unwrap();
        let keys = capacity_for(MAX_KEYS + 2);
        let store = SettingsStore::load(Some(&file), 200.0, &keys).unwrap();
        let key = |n: usize| KeyName::new("ns", &format!("rev-{n}"));
        let error = store.set(&keys, key(MAX_KEYS + 1), json!({})).await.unwrap_err();
        assert!(matches!(error, SetError::TooMany), "{error:?}");
        store
            .set(&keys, key(0), json!({"scale_down_delay": format!("{}1s", "0".repeat(4_000))}))
            .await
            .unwrap();
        store.clear(&keys, key(1)).await.unwrap();
        let bytes = std::fs::metadata(&file).unwrap().len();
        assert!(bytes < 200 * MAX_KEYS as u64, "{bytes}");
        let again = capacity_for(MAX_KEYS + 2);
        SettingsStore::load(Some(&file), 200.0, &again).unwrap();
        let delay = |n: usize| again.view(&key(n), 0).map(|view| view.settings.scale_down_delay.as_secs());
        assert_eq!((delay(0), delay(1), delay(MAX_KEYS)), (Some(1), None, Some(0)));
    }

    #[test]
    fn a_wrong_file_is_refused_in_one_line() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("settings.json");
        for (text, reason) in [
            ("[{", "expected a list of"),
            ("{}", "invalid JSON at line 1, column 0: an object; expected a list of {"),
            (
                r#"[{"namespace": "a", "name": "b", "settings": {"target": 0}}]"#,
                "key a/b: invalid settings: `target` is 0",
            ),
            (r#"[{"namespace": "a", "name": "b"}]"#, "missing field `settings`"),
        ] {
            std::fs::write(&file, text).unwrap();
            let error = SettingsStore::load(Some(&file), 200.0, &no_keys()).err().unwrap().to_string();
            assert!(
                error.contains(reason) && error.contains("settings.json") && !error.contains('\n'),
                "{error}"
            );
        }
    }
}
