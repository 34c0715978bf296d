//! What the tests of this crate and of the filter are built on: a store, and reproducible dice.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::pod::store::{Expect, Store};

type Values = HashMap<String, (Vec<u8>, u32)>;

/// A store with the semantics of Envoy's shared data.
#[derive(Default)]
pub struct Map(Mutex<(u32, Values)>);

impl Map {
    /// Returns the names of all values.
    pub fn keys(&self) -> Vec<String> {
        self.values().1.keys().cloned().collect()
    }

    fn values(&self) -> MutexGuard<'_, (u32, Values)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store for Map {
    fn get(&self, key: &str) -> Option<(Vec<u8>, u32)> {
        self.values().1.get(key).cloned()
    }

    fn set(&self, key: &str, value: &[u8], expect: Expect) -> bool {
        let (last_version, values) = &mut *self.values();
        let found = values.get(key).map(|(_, version)| *version);
        let holds = match expect {
            Expect::Absent => found.is_none(),
            Expect::Version(version) => found == Some(version),
        };
        if holds {
            *last_version += 1;
            values.insert(key.into(), (value.into(), *last_version));
        }
        holds
    }
}

/// A small random generator (splitmix64). A failing run can be repeated from its seed.
pub struct Dice(pub u64);

impl Dice {
    /// Returns a number below `sides`.
    pub fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }
}
