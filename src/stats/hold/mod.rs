//! The hold: requests of a key that wait at a gateway until a pod can take them, over all workers.
//!
//! | module | contents |
//! |---|---|
//! | [`settings`] | what a configuration says of it |
//! | [`key_hold`] | the rules: one key's state, which all workers share |
//! | [`hold_store`] | these states in the shared store |
//! | [`worker_side`] | one worker: its held requests, and what it knows of each key |

pub mod hold_store;
pub mod key_hold;
pub mod settings;
pub mod worker_side;

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
