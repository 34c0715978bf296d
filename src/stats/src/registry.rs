//! Which keys a gateway tells apart: the first of a pod's workers to see a key draws it a place, as long as there
//! are any, and learns that it is the first, so that one report leaves at once.
//!
//! Each key has a value of its own in the shared store, which cannot delete: the number of places counts all
//! keys in the life of an Envoy, as its stats do.

use crate::keyed::KeyName;
use crate::shared::{Expect, Pod, Store};

const ACTIVE: &[u8] = b"active";
const IDLE: &[u8] = b"idle";
const ATTEMPTS: usize = 64;

/// What a worker learns of a key that it does not track.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nobody tracked it: its first request is to be reported at once.
    First,
    /// Another worker tracks it.
    Known,
    /// There is no place left; it goes uncounted.
    None,
}

/// A pod's keys.
#[derive(Clone, Debug)]
pub struct Registry {
    pod: Pod,
    places: u32,
}

impl Registry {
    /// With so many places.
    pub fn new(pod: Pod, places: u32) -> Self {
        Self { pod, places }
    }

    /// A key's first request at a worker.
    pub fn enter(&self, store: &impl Store, key: &KeyName) -> Place {
        let marker = self.marker(key);
        for _ in 0..ATTEMPTS {
            match store.get(&marker) {
                Some((value, _)) if value == ACTIVE => return Place::Known,
                Some((_, version)) => {
                    if store.set(&marker, ACTIVE, Expect::Version(version)) {
                        return Place::First;
                    }
                }
                None => {
                    if !self.draw(store, 1) {
                        return Place::None;
                    }
                    if store.set(&marker, ACTIVE, Expect::Absent) {
                        return Place::First;
                    }
                    // Another worker was faster with the same key: the place is not needed.
                    self.draw(store, -1);
                }
            }
        }
        Place::Known
    }

    /// A key is no longer in the books. Called after it was taken out: a key that is still in them must not be
    /// taken for a first one, whose counts begin at zero.
    pub fn leave(&self, store: &impl Store, key: &KeyName) {
        let marker = self.marker(key);
        if let Some((_, version)) = store.get(&marker) {
            // If that fails, somebody has just entered; then it is active.
            store.set(&marker, IDLE, Expect::Version(version));
        }
    }

    fn marker(&self, key: &KeyName) -> String {
        self.pod.key(&format!("key/{}/{}", key.namespace, key.name))
    }

    fn draw(&self, store: &impl Store, places: i64) -> bool {
        let key = self.pod.key("places");
        for _ in 0..ATTEMPTS {
            let (taken, expect) = match store.get(&key) {
                None => (0, Expect::Absent),
                Some((bytes, version)) => (
                    <[u8; 8]>::try_from(bytes.as_slice()).map_or(0, i64::from_le_bytes),
                    Expect::Version(version),
                ),
            };
            let now = taken.saturating_add(places);
            if now > i64::from(self.places) {
                return false;
            }
            if store.set(&key, &now.to_le_bytes(), expect) {
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shared::tests::Map;

    fn key(name: &str) -> KeyName {
        KeyName { namespace: "ns".into(), name: name.into() }
    }

    #[test]
    fn one_is_the_first_and_places_run_out() {
        let (store, registry) = (Map::default(), Registry::new(Pod::new("gw"), 2));
        assert_eq!(registry.enter(&store, &key("a")), Place::First);
        assert_eq!(registry.enter(&store, &key("a")), Place::Known);
        assert_eq!(registry.enter(&store, &key("b")), Place::First);
        assert_eq!(registry.enter(&store, &key("c")), Place::None);
        registry.leave(&store, &key("a"));
        assert_eq!(registry.enter(&store, &key("c")), Place::None, "a place is for good");
        assert_eq!(registry.enter(&store, &key("a")), Place::First);
    }

    #[test]
    fn of_many_threads_one_is_the_first() {
        let (store, registry) = (Map::default(), Registry::new(Pod::new("gw"), 1_000));
        let firsts: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    let (store, registry) = (&store, &registry);
                    scope.spawn(move || {
                        let first = |n: &u32| registry.enter(store, &key(&n.to_string())) == Place::First;
                        (0..500).filter(first).count()
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(firsts, 500);
        let left = Registry::new(Pod::new("gw"), 501);
        assert_eq!(left.enter(&store, &key("one more")), Place::First, "races gave their places back");
        assert_eq!(left.enter(&store, &key("two more")), Place::None);
    }
}
