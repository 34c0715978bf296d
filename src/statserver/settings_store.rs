//! What single keys were told to be scaled by, in one file that survives a restart.

use std::collections::BTreeMap;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use inflight_stats::protocol::report::is_name;
use inflight_stats::scaling::settings::KeySettings;
use serde::{Deserialize, Serialize, Serializer as _};
use serde_json::Value;
use tokio::sync::Mutex;
use tracing::warn;

use crate::files;
use crate::key_table::{Full, KeyName, Keys};

/// The most keys that can be told something.
const MOST: usize = 10_000;
/// The largest file that is read, and so the largest that is written: twice what [`MOST`] keys can have.
const MOST_BYTES: u64 = 64 << 20;

/// One key in the file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    namespace: String,
    name: String,
    settings: Value,
}

/// The same, of what is kept.
#[derive(Serialize)]
struct LineOf<'a> {
    namespace: &'a str,
    name: &'a str,
    settings: &'a Value,
}

/// What is told, and where it is kept.
pub struct Told {
    file: Option<PathBuf>,
    rps_target: f64,
    keys: Arc<Mutex<BTreeMap<KeyName, Value>>>,
}

/// Why a key cannot be told something. Nothing was changed.
#[derive(Debug)]
pub enum TellError {
    /// It makes no settings.
    Invalid(String),
    /// [`MOST`] keys were told something.
    TooMany,
    /// There is no room for the key, or for its windows.
    Full(Full),
    /// The file cannot be written.
    File(io::Error),
}

impl Told {
    /// Reads the file, if there is one, and tells the keys. A file that is not there yet is an empty one, if it can be made.
    ///
    /// # Errors
    /// In one line: the file can be neither read nor made, or what is wrong in it.
    pub fn load(file: Option<&Path>, rps_target: f64, keys: &Keys) -> io::Result<Self> {
        let mut told = BTreeMap::new();
        let mut no_room = 0;
        if let Some(path) = file {
            let wrong = |reason: String| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("settings file {}: {reason}", path.display()),
                )
            };
            let lines = read(path).map_err(|error| wrong(error.to_string()))?;
            for Line { namespace, name, settings } in lines {
                if !is_name(&namespace) || !is_name(&name) {
                    return Err(wrong(format!(
                        "a namespace or name was {} and {} bytes long, allowed are 1 to 512 without control characters",
                        namespace.len(),
                        name.len()
                    )));
                }
                let settings = accept(keys.defaults(), settings, rps_target);
                let (short, effective) =
                    settings.map_err(|error| wrong(format!("key {namespace}/{name}: {error}")))?;
                let name = (namespace, name);
                no_room += usize::from(keys.tell(&name, Some(Arc::new(effective))).is_err());
                told.insert(name, short);
            }
        }
        if no_room > 0 {
            warn!(no_room, "keys of the settings file that are beyond a limit, until there is room");
        }
        Ok(Self { file: file.map(Path::to_owned), rps_target, keys: Arc::new(Mutex::new(told)) })
    }

    /// Tells a key, or (`None`) takes back what it was told. The file is written first: what it cannot hold is not
    /// done.
    ///
    /// # Errors
    /// [`TellError`].
    pub async fn tell(&self, keys: &Keys, name: KeyName, json: Option<Value>) -> Result<(), TellError> {
        let given = match json {
            Some(json) => {
                let accepted = accept(keys.defaults(), json, self.rps_target);
                let (short, effective) = accepted.map_err(TellError::Invalid)?;
                Some((short, Arc::new(effective)))
            }
            None => None,
        };
        // Nobody else tells or writes meanwhile.
        let mut told = Arc::clone(&self.keys).lock_owned().await;
        let is_new_key = match &given {
            Some(_) if told.len() >= MOST && !told.contains_key(&name) => return Err(TellError::TooMany),
            Some((_, effective)) => keys.admit(&name, effective).map_err(TellError::Full)?,
            None => false,
        };
        let (short, effective) = given.unzip();
        let before = put(&mut told, &name, short);
        if let Some(path) = self.file.clone()
            && told.get(&name) != before.as_ref()
        {
            let of = name.clone();
            let writing = tokio::task::spawn_blocking(move || {
                let written = write(&path, &told);
                if written.is_err() {
                    put(&mut told, &of, before);
                }
                written.map(|()| told)
            });
            told = match writing.await.unwrap_or_else(|error| Err(io::Error::other(error))) {
                Ok(told) => told,
                Err(error) => {
                    if is_new_key {
                        keys.dismiss(&name);
                    }
                    return Err(TellError::File(error));
                }
            };
        }
        if let Err(full) = keys.tell(&name, effective) {
            warn!(%full, "a key gets its settings when there is room for it");
        }
        drop(told);
        Ok(())
    }
}

fn put(told: &mut BTreeMap<KeyName, Value>, name: &KeyName, settings: Option<Value>) -> Option<Value> {
    match settings {
        Some(settings) => told.insert(name.clone(), settings),
        None => told.remove(name),
    }
}

/// What is told as it is kept, and what it makes. What is kept must be good when it is read again.
fn accept(defaults: &KeySettings, json: Value, rps_target: f64) -> Result<(Value, KeySettings), String> {
    let settings = defaults.with(json.clone(), rps_target).map_err(|error| error.to_string())?;
    let short = settings.shortened(json);
    let text = serde_json::to_vec(&short).map_err(|error| error.to_string())?;
    let again: Value = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    let settings = defaults.with(again.clone(), rps_target).map_err(|error| error.to_string())?;
    Ok((again, settings))
}

fn read(path: &Path) -> io::Result<Vec<Line>> {
    let bytes = match files::read(path, MOST_BYTES) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            // Now, and not when the first key is told something.
            beside(path)
                .map_err(|error| io::Error::other(format!("it is not there, and cannot be made: {error}")))?;
            return Ok(Vec::new());
        }
        bytes => bytes?,
    };
    serde_json::from_slice(&bytes).map_err(|error| {
        let reason = format!(
            "not a list of {{\"namespace\": …, \"name\": …, \"settings\": {{…}}}} in JSON, which the server wrote here; put back a copy \
             of it, or take the file away and tell the keys again (line {}, column {}: {error})",
            error.line(),
            error.column()
        );
        io::Error::other(reason)
    })
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A new file that can take another one's name.
fn beside(path: &Path) -> io::Result<tempfile::NamedTempFile> {
    tempfile::NamedTempFile::new_in(folder_of(path))
}

/// Whole or not at all, whenever the power fails: a new file beside the old one, on disk before it takes its name.
fn write(path: &Path, told: &BTreeMap<KeyName, Value>) -> io::Result<()> {
    let lines = told.iter().map(|((namespace, name), settings)| LineOf { namespace, name, settings });
    let mut file = BufWriter::new(beside(path)?);
    serde_json::Serializer::pretty(&mut file).collect_seq(lines)?;
    file.write_all(b"\n")?;
    let file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
    let bytes = file.as_file().metadata()?.len();
    if bytes > MOST_BYTES {
        return Err(io::Error::other(format!("{bytes} bytes, and no more than {MOST_BYTES} are read")));
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

    fn no_keys() -> Keys {
        room_for(9)
    }

    fn room_for(keys: usize) -> Keys {
        let room =
            crate::key_table::Room { keys, keys_per_namespace: keys, pods_per_key: 9, bytes: 256 << 20 };
        Keys::new(Arc::default(), room, 0)
    }

    fn name() -> KeyName {
        ("ns".into(), "rev".into())
    }

    fn target(keys: &Keys) -> f64 {
        keys.view("ns", "rev", 0).map_or(0.0, |view| view.settings.target)
    }

    #[tokio::test]
    async fn what_a_key_was_told_survives_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("settings.json");
        let keys = no_keys();
        let told = Told::load(Some(&file), 200.0, &keys).unwrap();
        told.tell(&keys, name(), Some(json!({"target": 7}))).await.unwrap();
        assert_eq!(target(&keys), 7.0, "before the first report");

        let again = no_keys();
        let told = Told::load(Some(&file), 200.0, &again).unwrap();
        assert_eq!(target(&again), 7.0);
        told.tell(&again, name(), None).await.unwrap();
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
        let error = Told::load(Some(&file), 200.0, &keys).err().unwrap().to_string();
        assert!(error.contains("settings.json: it is not there, and cannot be made: "), "{error}");
        std::fs::create_dir(&gone).unwrap();
        let told = Told::load(Some(&file), 200.0, &keys).unwrap();
        assert_eq!(std::fs::read_dir(&gone).unwrap().count(), 0, "made when there is something to keep");
        std::fs::remove_dir(&gone).unwrap();
        let error = told.tell(&keys, name(), Some(json!({"target": 7}))).await;
        assert!(matches!(error, Err(TellError::File(_))), "{error:?}");
        assert!(keys.view("ns", "rev", 0).is_none());
        let error = told.tell(&keys, name(), Some(json!({"target": -7}))).await;
        assert!(matches!(error, Err(TellError::Invalid(_))), "{error:?}");
    }

    #[tokio::test]
    async fn a_key_for_which_there_is_no_room_is_told_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("settings.json");
        let keys = room_for(1);
        let told = Told::load(Some(&file), 200.0, &keys).unwrap();
        told.tell(&keys, name(), Some(json!({"target": 7}))).await.unwrap();
        let kept = std::fs::read_to_string(&file).unwrap();
        let another = ("ns".to_owned(), "another".to_owned());
        let error = told.tell(&keys, another.clone(), Some(json!({"target": 7}))).await.unwrap_err();
        assert!(matches!(&error, TellError::Full(full) if full.limit == Limit::Keys), "{error:?}");
        assert!(keys.view("ns", "another", 0).is_none());
        assert_eq!(std::fs::read_to_string(&file).unwrap(), kept);
        // After a restart with less room the file is read all the same, and everything in it can be taken back.
        told.tell(&keys, name(), None).await.unwrap();
        let more = room_for(2);
        let told = Told::load(Some(&file), 200.0, &more).unwrap();
        told.tell(&more, name(), Some(json!({"target": 7}))).await.unwrap();
        told.tell(&more, another.clone(), Some(json!({"target": 8}))).await.unwrap();
        let less = room_for(1);
        let told = Told::load(Some(&file), 200.0, &less).unwrap();
        told.tell(&less, another, None).await.unwrap();
        told.tell(&less, name(), None).await.unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "[]\n");
    }

    #[tokio::test]
    async fn what_was_written_can_be_read_again_at_any_length_and_number() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("settings.json");
        // More than can be told, and each as long as a PUT may be: by hand.
        let long = format!("{}60s", "0".repeat(4_000));
        let lines: Vec<Value> = (0..MOST + 1)
            .map(|n| json!({"namespace": "ns", "name": format!("rev-{n}"), "settings": {"stable_window": long}}))
            .collect();
        std::fs::write(&file, serde_json::to_vec(&lines).unwrap()).unwrap();
        let keys = room_for(MOST + 2);
        let told = Told::load(Some(&file), 200.0, &keys).unwrap();
        let key = |n: usize| ("ns".to_owned(), format!("rev-{n}"));
        let error = told.tell(&keys, key(MOST + 1), Some(json!({}))).await.unwrap_err();
        assert!(matches!(error, TellError::TooMany), "{error:?}");
        told.tell(&keys, key(0), Some(json!({"scale_down_delay": format!("{}1s", "0".repeat(4_000))})))
            .await
            .unwrap();
        told.tell(&keys, key(1), None).await.unwrap();
        let bytes = std::fs::metadata(&file).unwrap().len();
        assert!(bytes < 200 * MOST as u64, "{bytes}");
        let again = room_for(MOST + 2);
        Told::load(Some(&file), 200.0, &again).unwrap();
        let told = |n: usize| {
            again.view("ns", &format!("rev-{n}"), 0).map(|view| view.settings.scale_down_delay.as_secs())
        };
        assert_eq!((told(0), told(1), told(MOST)), (Some(1), None, Some(0)));
    }

    #[test]
    fn a_wrong_file_is_refused_in_one_line() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("settings.json");
        for (text, reason) in [
            ("[{", "not a list of"),
            (
                r#"[{"namespace": "a", "name": "b", "settings": {"target": 0}}]"#,
                "key a/b: invalid settings: `target` is 0",
            ),
            (r#"[{"namespace": "a", "name": "b"}]"#, "missing field `settings`"),
        ] {
            std::fs::write(&file, text).unwrap();
            let error = Told::load(Some(&file), 200.0, &no_keys()).err().unwrap().to_string();
            assert!(
                error.contains(reason) && error.contains("settings.json") && !error.contains('\n'),
                "{error}"
            );
        }
    }
}
