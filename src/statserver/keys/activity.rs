//! Who waits for a key to become active, and is notified within the report that made it so.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};

use inflight_stats::protocol::key_name::KeyName;
use tokio::sync::watch::{Receiver, Sender, channel};

use crate::os::lock::lock;

/// What is said of a key: whether it is active; `None` while that is not certain.
pub type Activity = Option<bool>;

/// The keys whose activity is watched. Keys that nobody watches cost nothing.
#[derive(Default)]
pub struct ActivityWatchers(Mutex<HashMap<KeyName, Sender<Activity>>>);

impl ActivityWatchers {
    /// Subscribes to the changes of a key, beginning with what `activity` returns. No change is
    /// lost in between: [`ActivityWatchers::mark_active`] waits for the lock.
    pub fn subscribe(&self, name: KeyName, activity: impl FnOnce() -> Activity) -> Receiver<Activity> {
        let mut watched = self.watched();
        let sender = watched.entry(name).or_insert_with(|| channel(None).0);
        let receiver = sender.subscribe();
        set(sender, activity());
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
            set(sender, Some(true));
        }
    }

    /// Asks again for each key that is watched, under the lock as in
    /// [`ActivityWatchers::subscribe`]; keys that nobody watches any more are dropped.
    pub fn refresh(&self, activity: impl Fn(&KeyName) -> Activity) {
        self.watched().retain(|name, sender| {
            let is_watched = sender.receiver_count() > 0;
            if is_watched {
                set(sender, activity(name));
            }
            is_watched
        });
    }

    fn watched(&self) -> MutexGuard<'_, HashMap<KeyName, Sender<Activity>>> {
        lock(&self.0)
    }
}

fn set(sender: &Sender<Activity>, activity: Activity) {
    sender.send_if_modified(|was| std::mem::replace(was, activity) != activity);
}
