//! What all requests share, and the tasks that keep it current.

pub mod background;
pub mod state;
