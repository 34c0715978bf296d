//! The name of a key: what is counted, reported and scaled as one.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Namespace and name of a key. The gateway shares the strings (`Rc<str>`), the receiver owns them.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct KeyName<S = String> {
    /// The key's namespace.
    pub namespace: S,
    /// The key's name within it.
    pub name: S,
}

impl KeyName {
    /// An owned name.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.to_owned(), name: name.to_owned() }
    }
}

impl<S: fmt::Display> fmt::Display for KeyName<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}
