//! The states of all keys that are held or ready, in the store that all workers share.

use serde::{Deserialize, Serialize};

use crate::counting::time::MonotonicNs;
use crate::gateway::key_name::KeyName;
use crate::hold::key_hold::{KeyHold, View};
use crate::hold::settings::HoldSettings;
use crate::pod::pod_state::PodStore;
use crate::pod::store::{self, Attempt, REQUEST_ATTEMPTS, Store, StoreError};

/// Keys share this many values, because the store cannot delete a value and a client may make names
/// up.
const BUCKETS: u8 = 64;

/// The keys of one bucket.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Bucket(Vec<(String, String, KeyHold)>);

impl Bucket {
    /// Returns what a worker sees of a key; `None` if nothing is known of the key.
    pub fn view<'a>(
        &self,
        key: &KeyName,
        worker: u64,
        clusters: impl IntoIterator<Item = &'a str>,
    ) -> Option<View> {
        let (_, _, hold) = self.0.iter().find(|(namespace, name, _)| key.is(namespace, name))?;
        Some(hold.view(worker, clusters))
    }
}

/// The states of all keys of a gateway.
pub struct HoldStore {
    pod: PodStore,
    /// Differs from Envoy to Envoy, so that nobody can make names up that meet in one bucket.
    secret: u64,
}

/// The outcome of a change.
#[derive(Clone, Debug)]
pub struct Changed<R> {
    /// The change's own result.
    pub result: R,
    /// What the worker sees afterwards.
    pub view: View,
    /// The workers whose requests got permits.
    pub granted: Vec<u64>,
    /// How many more requests of the key wait than before.
    pub more_waiting: i64,
}

impl HoldStore {
    /// Returns the states of a gateway's keys.
    pub fn new(pod: PodStore, secret: u64) -> Self {
        Self { pod, secret }
    }

    /// Returns the number of a key's bucket.
    pub fn bucket_of(&self, key: &KeyName) -> u8 {
        u8::try_from(key.bucket(self.secret, u64::from(BUCKETS))).unwrap_or(0)
    }

    /// Returns the keys of a bucket.
    pub fn bucket(&self, store: &impl Store, number: u8) -> Bucket {
        store::read(store, &self.name(number)).unwrap_or_default()
    }

    /// Changes the state of a key, and does what is due ([`KeyHold::settle`]).
    ///
    /// # Errors
    /// [`StoreError`]; nothing changed.
    pub fn change<R>(
        &self,
        store: &impl Store,
        key: &KeyName,
        worker: u64,
        clusters: &[&str],
        (now, settings): (MonotonicNs, &HoldSettings),
        mut change: impl FnMut(&mut KeyHold) -> R,
    ) -> Result<Changed<R>, StoreError> {
        store::update(store, &self.name(self.bucket_of(key)), REQUEST_ATTEMPTS, |found: Option<Bucket>| {
            let mut bucket = found.unwrap_or_default();
            bucket
                .0
                .retain(|(namespace, name, hold)| key.is(namespace, name) || !hold.is_spent(now, settings));
            let mut hold = match bucket.0.iter().position(|(ns, name, _)| key.is(ns, name)) {
                Some(at) => bucket.0.swap_remove(at).2,
                None => KeyHold::new(now, settings),
            };
            let before = hold.waiting();
            let result = change(&mut hold);
            let granted = hold.settle(now, settings);
            let more_waiting = difference(hold.waiting(), before);
            let view = hold.view(worker, clusters.iter().copied());
            bucket.0.push((key.namespace.to_string(), key.name.to_string(), hold));
            Attempt::Write(bucket, Changed { result, view, granted, more_waiting })
        })
    }

    /// Removes silent workers from all keys that nobody else changes. Returns the keys that have
    /// fewer waiting requests now, how many fewer, and the workers whose requests got permits.
    pub fn sweep(
        &self,
        store: &impl Store,
        now: MonotonicNs,
        settings: &HoldSettings,
    ) -> Vec<(KeyName, i64, Vec<u64>)> {
        let mut all = Vec::new();
        for bucket in 0..BUCKETS {
            let name = self.name(bucket);
            let changed = store::update(store, &name, store::ATTEMPTS, |found: Option<Bucket>| {
                let Some(mut bucket) = found else { return Attempt::Keep(Vec::new()) };
                let mut differs = false;
                let mut changes = Vec::new();
                for (namespace, name, hold) in &mut bucket.0 {
                    let old = hold.clone();
                    let granted = hold.settle(now, settings);
                    differs |= *hold != old;
                    let more = difference(hold.waiting(), old.waiting());
                    if let Some(key) = KeyName::checked(namespace, name)
                        && (more != 0 || !granted.is_empty())
                    {
                        changes.push((key, more, granted));
                    }
                }
                let keys = bucket.0.len();
                bucket.0.retain(|(_, _, hold)| !hold.is_spent(now, settings));
                differs |= bucket.0.len() != keys;
                if differs { Attempt::Write(bucket, changes) } else { Attempt::Keep(changes) }
            });
            all.extend(changed.unwrap_or_default());
        }
        all
    }

    /// Notes the mailbox of a worker, or that it has none any more.
    ///
    /// # Errors
    /// [`StoreError`]; the list is as it was.
    pub fn set_mailbox(
        &self,
        store: &impl Store,
        worker: u64,
        mailbox: Option<u32>,
    ) -> Result<(), StoreError> {
        let name = self.pod.key("hold/mailboxes");
        store::update(store, &name, REQUEST_ATTEMPTS, |found: Option<Vec<(u64, u32)>>| {
            let mut all = found.unwrap_or_default();
            let before = all.clone();
            all.retain(|(other, _)| *other != worker);
            all.extend(mailbox.map(|mailbox| (worker, mailbox)));
            if all == before { Attempt::Keep(()) } else { Attempt::Write(all, ()) }
        })
    }

    /// Returns all workers with their mailboxes.
    pub fn mailboxes(&self, store: &impl Store) -> Vec<(u64, u32)> {
        store::read(store, &self.pod.key("hold/mailboxes")).unwrap_or_default()
    }

    fn name(&self, bucket: u8) -> String {
        self.pod.key(&format!("hold/{bucket:02x}"))
    }
}

fn difference(after: u32, before: u32) -> i64 {
    i64::from(after) - i64::from(before)
}
