//! Who waits for a key to become active, and is notified within the report that made it so.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};

use inflight_stats::protocol::key_name::KeyName;
use tokio::sync::watch::{Receiver, Sender, channel};

use crate::os::lock::lock;

/// The keys whose activity is watched. Keys that nobody watches cost nothing.
#[derive(Default)]
pub struct ActivityWatchers(Mutex<HashMap<KeyName, Sender<bool>>>);

impl ActivityWatchers {
    /// Subscribes to the changes of a key, beginning with what `is_active` returns. No change is
    /// lost in between: [`ActivityWatchers::mark_active`] waits for the lock.
    pub fn subscribe(&self, name: KeyName, is_active: impl FnOnce() -> bool) -> Receiver<bool> {
        let mut watched = self.watched();
        let sender = watched.entry(name).or_insert_with(|| channel(false).0);
        let receiver = sender.subscribe();
        set(sender, is_active());
        receiver
    }

    /// Forgets a key if its last receiver was dropped.
    pub fn unsubscribed(&self, name: &KeyName) {
        let mut watched = self.watched();
        if watched.get(name).is_some_and(|sender| sender.receiver_count() == 0) {
            watched.remove(name);
        }
    }

    /// Notifies those who watch a key that it has traffic again.
    pub fn mark_active(&self, namespace: &str, name: &str) {
        let watched = self.watched();
        if !watched.is_empty()
            && let Some(sender) = watched.get(&KeyName::new(namespace, name))
        {
            set(sender, true);
        }
    }

    /// Asks again for each key that is watched, under the lock as in
    /// [`ActivityWatchers::subscribe`]; keys that nobody watches any more are dropped.
    pub fn refresh(&self, is_active: impl Fn(&KeyName) -> bool) {
        self.watched().retain(|name, sender| {
            let is_watched = sender.receiver_count() > 0;
            if is_watched {
                set(sender, is_active(name));
            }
            is_watched
        });
    }

    fn watched(&self) -> MutexGuard<'_, HashMap<KeyName, Sender<bool>>> {
        lock(&self.0)
    }
}

fn set(sender: &Sender<bool>, active: bool) {
    sender.send_if_modified(|was| std::mem::replace(was, active) != active);
}
