//! What is done at intervals, whatever is asked.

use std::sync::Arc;
use std::time::Duration;

use inflight_stats::scaling::decider::DECISION_PERIOD_NS;
use tokio::task::JoinSet;
use tokio::time::interval;

use crate::app::state::App;
use crate::net::tls::Tls;
use crate::os::clock::now_ns;
use crate::os::memory;

/// The time between two looks at files that may change.
const RELOAD_PERIOD: Duration = Duration::from_secs(2);
const FORGET_PERIOD: Duration = Duration::from_secs(60);
const TRIM_PERIOD: Duration = Duration::from_secs(15);

/// Starts all background tasks. They end when the set is dropped.
pub fn start(app: &Arc<App>, tls: Option<Arc<Tls>>) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    tasks.spawn(decide(Arc::clone(app)));
    tasks.spawn(forget(Arc::clone(app)));
    tasks.spawn(reload(Arc::clone(app), tls));
    tasks.spawn(trim_memory());
    if let Some(forwarder) = &app.forwarder {
        tasks.spawn(Arc::clone(forwarder).run(app.drain.clone()));
    }
    tasks
}

async fn decide(app: Arc<App>) {
    let mut ticks = interval(Duration::from_nanos(DECISION_PERIOD_NS));
    loop {
        ticks.tick().await;
        app.keys.decide(now_ns());
    }
}

async fn forget(app: Arc<App>) {
    let mut ticks = interval(FORGET_PERIOD);
    loop {
        ticks.tick().await;
        app.keys.forget(now_ns());
    }
}

async fn reload(app: Arc<App>, tls: Option<Arc<Tls>>) {
    let mut ticks = interval(RELOAD_PERIOD);
    loop {
        ticks.tick().await;
        let (app, tls) = (Arc::clone(&app), tls.clone());
        let read = move || {
            app.access.reload();
            if let Some(tls) = tls {
                tls.reload();
            }
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
