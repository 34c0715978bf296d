//! `--forward`: every stat is sent on to a real Knative autoscaler, as its activator would.

pub mod forwarder;
pub mod queue;
