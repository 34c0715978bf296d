//! Every key's figures, settings and history, in memory; the settings also in a file.

pub mod activity;
pub mod capacity;
pub mod history;
pub mod key_table;
pub mod key_view;
pub mod listing;
pub mod settings_store;
pub mod unknown_keys;
