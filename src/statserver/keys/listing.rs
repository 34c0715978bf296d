//! Which keys are listed, and in which order.

use std::cmp::Ordering;

use inflight_stats::protocol::key_name::KeyName;

use crate::keys::key_view::KeyView;

/// A number of each key, by which keys can be sorted; `None` where a key has none.
type SortKey = (&'static str, fn(&KeyView) -> Option<f64>);

/// What keys can be sorted by, beside their names.
const SORT_KEYS: [SortKey; 9] = [
    ("stable", |view| Some(view.figures.stable.value(view.settings.metric))),
    ("panic", |view| Some(view.figures.panic.value(view.settings.metric))),
    ("in_flight", |view| Some(view.figures.in_flight as f64)),
    ("requests_per_second", |view| Some(view.figures.stable.requests_per_second)),
    ("target", |view| Some(view.settings.target_per_pod())),
    ("load", KeyView::load),
    ("ready_pods", |view| view.ready_pods.map(f64::from)),
    ("desired_pods", |view| view.desired_pods.map(f64::from)),
    ("last_report_age", |view| view.figures.last_report_age_ms.map(|age| age as f64)),
];

/// The order of a listing: by a number, and where it is equal, by name. Keys without it come last.
#[derive(Clone, Copy, Debug)]
pub struct Order {
    value: fn(&KeyView) -> Option<f64>,
    is_descending: bool,
}

impl Order {
    /// Reads `stable` (the smallest first) or `-stable` (the largest first).
    ///
    /// # Errors
    /// What is expected.
    pub fn parse(text: &str) -> Result<Option<Self>, String> {
        let (is_descending, given) = match text.strip_prefix('-') {
            Some(given) => (true, given),
            None => (false, text),
        };
        if text == "name" {
            return Ok(None);
        }
        let found = SORT_KEYS.iter().find(|(name, _)| *name == given);
        found.map(|(_, value)| Some(Self { value: *value, is_descending })).ok_or_else(|| {
            let names = SORT_KEYS.map(|(name, _)| name).join(", ");
            format!("name, or one of {names}, with a - in front for the largest first")
        })
    }

    fn rank(&self, view: &KeyView) -> f64 {
        match (self.value)(view) {
            Some(value) if self.is_descending => -value,
            Some(value) => value,
            None => f64::INFINITY,
        }
    }
}

/// A state that keys can be filtered by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyState {
    /// It has requests in flight, or traffic in its stable window.
    Active,
    /// Its decider is in panic mode.
    Panic,
    /// Autoscalers are told nothing of it.
    Missing,
}

impl KeyState {
    const ALL: [(&str, Self); 3] =
        [("active", Self::Active), ("panic", Self::Panic), ("missing", Self::Missing)];

    /// Reads a state by its name.
    ///
    /// # Errors
    /// What is expected.
    pub fn parse(text: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|(name, _)| *name == text);
        let expected = || format!("one of {}", Self::ALL.map(|(name, _)| name).join(", "));
        found.map(|(_, state)| *state).ok_or_else(expected)
    }

    fn is_of(self, view: &KeyView) -> bool {
        let figures = &view.figures;
        match self {
            Self::Active => figures.in_flight > 0 || figures.stable.requests_per_second > 0.0,
            Self::Panic => view.decision.is_some_and(|decision| decision.panic_mode),
            Self::Missing => view.missing.is_some(),
        }
    }
}

/// Which keys are listed.
#[derive(Clone, Debug)]
pub struct Listing {
    /// A part of `namespace/name`.
    pub search: String,
    /// How many, at most.
    pub max: usize,
    /// In which order; `None`: by name.
    pub order: Option<Order>,
    /// Those in this state; `None`: all.
    pub state: Option<KeyState>,
}

impl Listing {
    /// All keys by name, at most `max` of them.
    pub fn first(max: usize) -> Self {
        Self { search: String::new(), max, order: None, state: None }
    }

    /// Returns whether a key is searched for.
    pub fn finds(&self, name: &KeyName) -> bool {
        self.search.is_empty() || name.to_string().contains(&self.search)
    }

    /// Returns where a key comes, and `None` if its state is not asked for. The view, which costs
    /// more than a name, is not asked for without need.
    pub fn rank(&self, view: impl FnOnce() -> KeyView) -> Option<f64> {
        if self.order.is_none() && self.state.is_none() {
            return Some(0.0);
        }
        let view = view();
        let is_wanted = self.state.is_none_or(|state| state.is_of(&view));
        is_wanted.then(|| self.order.map_or(0.0, |order| order.rank(&view)))
    }
}

/// A key of a listing.
#[derive(Debug)]
pub struct Listed {
    /// Where it comes.
    pub rank: f64,
    /// Its name, which decides among equal ranks.
    pub name: KeyName,
}

impl Listed {
    /// Returns whether it comes after a key of this rank and name.
    pub fn is_after(&self, rank: f64, name: &KeyName) -> bool {
        self.rank.total_cmp(&rank).then_with(|| self.name.cmp(name)).is_gt()
    }
}

impl Ord for Listed {
    fn cmp(&self, other: &Self) -> Ordering {
        self.rank.total_cmp(&other.rank).then_with(|| self.name.cmp(&other.name))
    }
}

impl PartialOrd for Listed {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Listed {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Listed {}
