//! Every end-to-end test, in one binary: to link one takes as long as some of them run.

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
mod install;
mod limits;
mod page;
mod soak;
mod stream;
mod tls;
mod vm;
