//! What all requests share, the module that is handed out, and the tasks that keep it current.

pub mod background;
pub mod changes;
pub mod filter_module;
pub mod state;
