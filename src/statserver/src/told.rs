//! What single keys were told to be scaled by, in one file that survives a restart.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::Mutex;

use crate::files;
use crate::keys::{KeyName, Keys};

/// The most keys that can be told something.
const MOST: usize = 10_000;
/// The largest file that is read: what [`MOST`] keys can have.
const MOST_BYTES: u64 = 64 << 20;

/// One key in the file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    namespace: String,
    name: String,
    settings: Value,
}

/// What is told, and where it is kept.
pub struct Told {
    file: Option<PathBuf>,
    rps_target: f64,
    keys: Mutex<BTreeMap<KeyName, Value>>,
}

/// Why a key cannot be told something. Nothing was changed.
#[derive(Debug)]
pub enum TellError {
    /// It makes no settings.
    Invalid(String),
    /// [`MOST`] keys were told something.
    TooMany,
    /// The file cannot be written.
    File(io::Error),
}

impl Told {
    /// Reads the file, if there is one, and tells the keys. A file that is not there yet is an empty one.
    ///
    /// # Errors
    /// In one line: the file cannot be read, or what is wrong in it.
    pub fn load(file: Option<&Path>, rps_target: f64, keys: &Keys) -> io::Result<Self> {
        let mut told = BTreeMap::new();
        if let Some(path) = file {
            let wrong = |reason: String| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("settings file {}: {reason}", path.display()),
                )
            };
            let lines = read(path).map_err(|error| wrong(error.to_string()))?;
            for Line { namespace, name, settings } in lines {
                let effective = keys.defaults().with(settings.clone(), rps_target);
                let effective =
                    effective.map_err(|error| wrong(format!("key {namespace}/{name}: {error}")))?;
                keys.tell(&(namespace.clone(), name.clone()), Some(Arc::new(effective)));
                told.insert((namespace, name), settings);
            }
        }
        Ok(Self { file: file.map(Path::to_owned), rps_target, keys: Mutex::new(told) })
    }

    /// Tells a key, or (`None`) takes back what it was told. The file is written first: what it cannot hold is not
    /// done.
    ///
    /// # Errors
    /// [`TellError`].
    pub async fn tell(&self, keys: &Keys, name: KeyName, json: Option<Value>) -> Result<(), TellError> {
        let effective = match &json {
            Some(json) => {
                let effective = keys.defaults().with(json.clone(), self.rps_target);
                Some(Arc::new(effective.map_err(|error| TellError::Invalid(error.to_string()))?))
            }
            None => None,
        };
        let mut told = self.keys.lock().await;
        let mut next = told.clone();
        match json {
            Some(json) => next.insert(name.clone(), json),
            None => next.remove(&name),
        };
        if next.len() > MOST {
            return Err(TellError::TooMany);
        }
        if next != *told
            && let Some(path) = self.file.clone()
        {
            let lines = next.iter().map(|((namespace, name), settings)| Line {
                namespace: namespace.clone(),
                name: name.clone(),
                settings: settings.clone(),
            });
            let lines: Vec<Line> = lines.collect();
            let written = tokio::task::spawn_blocking(move || write(&path, &lines)).await;
            written.unwrap_or_else(|error| Err(io::Error::other(error))).map_err(TellError::File)?;
        }
        *told = next;
        keys.tell(&name, effective);
        Ok(())
    }
}

fn read(path: &Path) -> io::Result<Vec<Line>> {
    let bytes = match files::read(path, MOST_BYTES) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
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

/// Whole or not at all, whenever the power fails: a new file beside the old one, on disk before it takes its name.
fn write(path: &Path, lines: &[Line]) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    serde_json::to_writer_pretty(&mut file, lines)?;
    file.write_all(b"\n")?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    std::fs::File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn no_keys() -> Keys {
        Keys::new(Arc::default(), crate::keys::Room { keys_per_namespace: 9, pods_per_key: 9 })
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
        let file = folder.path().join("gone").join("settings.json");
        let keys = no_keys();
        let told = Told::load(Some(&file), 200.0, &keys).unwrap();
        let error = told.tell(&keys, name(), Some(json!({"target": 7}))).await;
        assert!(matches!(error, Err(TellError::File(_))), "{error:?}");
        assert!(keys.view("ns", "rev", 0).is_none());
        let error = told.tell(&keys, name(), Some(json!({"target": -7}))).await;
        assert!(matches!(error, Err(TellError::Invalid(_))), "{error:?}");
    }

    #[test]
    fn a_wrong_file_is_refused_in_one_line() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("settings.json");
        for (text, reason) in [
            ("[{", "EOF"),
            (
                r#"[{"namespace": "a", "name": "b", "settings": {"target": 0}}]"#,
                "key a/b: configuration key `target`",
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
