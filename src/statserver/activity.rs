//! Who waits for a key to become active, and is told within the report that woke it.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch::{Receiver, Sender, channel};

use crate::key_table::KeyName;

/// The keys that somebody watches. Keys that nobody watches cost nothing.
#[derive(Default)]
pub struct Watch(Mutex<HashMap<KeyName, Sender<bool>>>);

impl Watch {
    /// From now on each change of a key. No change falls between asking `active` and subscribing: whoever wakes the
    /// key waits for the lock.
    pub fn key(&self, name: KeyName, active: impl FnOnce() -> bool) -> Receiver<bool> {
        let mut watched = self.watched();
        let sender = watched.entry(name).or_insert_with(|| channel(false).0);
        let receiver = sender.subscribe();
        set(sender, active());
        receiver
    }

    /// One who watched a key has gone: with the last of them goes what is kept for them.
    pub fn left(&self, name: &KeyName) {
        let mut watched = self.watched();
        if watched.get(name).is_some_and(|sender| sender.receiver_count() == 0) {
            watched.remove(name);
        }
    }

    /// A key has traffic again.
    pub fn woke(&self, namespace: &str, name: &str) {
        let watched = self.watched();
        if !watched.is_empty()
            && let Some(sender) = watched.get(&(namespace.to_owned(), name.to_owned()))
        {
            set(sender, true);
        }
    }

    /// Asks anew for each key that is watched, under the lock as in [`Watch::key`]; keys that nobody watches any more
    /// are dropped.
    pub fn refresh(&self, active: impl Fn(&str, &str) -> bool) {
        self.watched().retain(|(namespace, name), sender| {
            let is_watched = sender.receiver_count() > 0;
            if is_watched {
                set(sender, active(namespace, name));
            }
            is_watched
        });
    }

    fn watched(&self) -> MutexGuard<'_, HashMap<KeyName, Sender<bool>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn set(sender: &Sender<bool>, active: bool) {
    sender.send_if_modified(|was| std::mem::replace(was, active) != active);
}
