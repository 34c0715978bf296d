//! The tasks of a server with a shared state.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use crate::replication::replica::Replica;
use crate::replication::{appender, follower, leader};

/// Starts the tasks that keep the state shared.
pub fn start(replica: &Arc<Replica>, tasks: &mut JoinSet<()>) {
    tasks.spawn(follower::run(Arc::clone(replica)));
    tasks.spawn(appender::run(Arc::clone(replica)));
    tasks.spawn(leader::run(Arc::clone(replica)));
    tasks.spawn(watch_silence(Arc::clone(replica)));
}

async fn watch_silence(replica: Arc<Replica>) {
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    loop {
        ticks.tick().await;
        replica.note_silence();
    }
}
