//! A simulated Envoy, to run the whole plugin natively: several VMs over one shared data, each with
//! root contexts, streams and a timer, a stats server behind a network that loses and repeats.
//! Between any two of a VM's accesses to the shared data other VMs act, stall, panic and come back.
//! Everything follows from a seed, so a failing run can be repeated.

mod host;
mod tests;
mod world;
