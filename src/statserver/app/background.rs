//! What is done at intervals, whatever is asked.

use std::sync::Arc;
use std::time::Duration;

use inflight_stats::scaling::decider::DECISION_PERIOD_NS;
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, interval_at};

use crate::app::state::ServerState;
use crate::net::tls::Tls;
use crate::os::clock::now_ns;
use crate::os::memory;
use crate::replication;
use crate::telemetry::refusals;

/// The time between two looks at files that may change.
const RELOAD_PERIOD: Duration = Duration::from_secs(2);
const FORGET_PERIOD: Duration = Duration::from_secs(60);
const TRIM_PERIOD: Duration = Duration::from_secs(15);

/// Starts all background tasks. They end when the set is dropped.
pub fn start(state: &Arc<ServerState>, tls: Vec<Arc<Tls>>) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    match state.changes.replica() {
        Some(replica) => replication::tasks::start(replica, &mut tasks),
        None => {
            tasks.spawn(decide(Arc::clone(state)));
            tasks.spawn(forget(Arc::clone(state)));
        }
    }
    tasks.spawn(log_refusals(Arc::clone(state)));
    tasks.spawn(reload(Arc::clone(state), tls));
    tasks.spawn(trim_memory());
    if let Some(forwarder) = &state.forwarder {
        tasks.spawn(Arc::clone(forwarder).run(state.drain.clone()));
    }
    tasks
}

async fn decide(state: Arc<ServerState>) {
    let mut ticks = interval(Duration::from_nanos(DECISION_PERIOD_NS));
    loop {
        ticks.tick().await;
        state.keys.decide(now_ns());
    }
}

async fn forget(state: Arc<ServerState>) {
    let mut ticks = interval(FORGET_PERIOD);
    loop {
        ticks.tick().await;
        state.keys.forget(now_ns());
    }
}

async fn log_refusals(state: Arc<ServerState>) {
    // The first tick of an interval is at once.
    let mut ticks = interval_at(Instant::now() + refusals::LOG_PERIOD, refusals::LOG_PERIOD);
    loop {
        ticks.tick().await;
        state.refusals.log_counts();
    }
}

async fn reload(state: Arc<ServerState>, tls: Vec<Arc<Tls>>) {
    let mut ticks = interval(RELOAD_PERIOD);
    loop {
        ticks.tick().await;
        let (state, tls) = (Arc::clone(&state), tls.clone());
        let read = move || {
            state.access.reload();
            state.settings.reload(&state.keys);
            tls.iter().for_each(|tls| tls.reload());
        };
        // A file system may hang.
        let _ = tokio::task::spawn_blocking(read).await;
    }
}

/// The allocator keeps what was freed for what may come. After many connections or large bodies
/// that would be much, for ever.
async fn trim_memory() {
    let mut ticks = interval(TRIM_PERIOD);
    loop {
        ticks.tick().await;
        let _ = tokio::task::spawn_blocking(memory::trim).await;
    }
}
