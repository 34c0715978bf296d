//! A simulated Envoy that runs the whole plugin natively. It has several VMs over one shared data,
//! each with root contexts, streams and a timer, and a stats server behind a network that loses and
//! repeats messages. Between any two accesses of a VM to the shared data, other VMs act, stall,
//! panic and come back. Everything is derived from a seed, so a failing run can be repeated.

mod by_hand;
mod hold_tests;
mod host;
mod network;
mod tests;
mod world;
