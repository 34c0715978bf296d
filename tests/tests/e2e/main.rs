//! All end-to-end tests, in one binary: linking one binary takes as long as running some of the
//! tests.

mod attacks;
mod autoscalers;
mod breaker;
mod changes;
mod clock;
mod count;
mod disk;
mod documents;
mod exporter;
mod faults;
mod gateway;
mod headers;
mod hold;
mod hold_bodies;
mod install;
mod keys;
mod limits;
mod network_probe;
mod page;
mod routes;
mod soak;
mod stream;
mod tls;
mod vm;
mod wake;
