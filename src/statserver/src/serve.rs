//! The listener, and its orderly end: `/readyz` says 503 first, the listener closes after a delay,
//! open requests are finished.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing::info;

use crate::flags::Flags;
use crate::http::{App, now_ns, router};
use crate::keys::Keys;
use crate::metrics::Metrics;

/// How long open requests may take once the listener is closed.
const LAST_REQUESTS: Duration = Duration::from_secs(10);
const FORGET_EVERY: Duration = Duration::from_secs(60);

/// Serves until `terminated` resolves and everything is drained.
///
/// # Errors
/// If the address cannot be listened on.
pub async fn run(flags: &Flags, terminated: impl Future<Output = ()> + Send + 'static) -> io::Result<()> {
    let listener = TcpListener::bind(flags.listen).await?;
    info!(address = %listener.local_addr()?, "listening");
    let app = Arc::new(App {
        keys: Keys::new(flags.windows()),
        metrics: Metrics::default(),
        draining: AtomicBool::new(false),
    });
    let forgetting = tokio::spawn(forget(Arc::clone(&app)));
    let (closed, closing) = tokio::sync::oneshot::channel::<()>();
    let drain = {
        let (app, delay) = (Arc::clone(&app), flags.drain_delay);
        async move {
            terminated.await;
            info!("draining");
            app.draining.store(true, Ordering::Relaxed);
            tokio::time::sleep(delay).await;
            // The receiver lives as long as the server does.
            let _ = closed.send(());
        }
    };
    let server = axum::serve(listener, router(app)).with_graceful_shutdown(drain).into_future();
    let overdue = async {
        // A sender that was dropped means that the server ended by itself; then there is nothing to wait for.
        if closing.await.is_ok() {
            tokio::time::sleep(LAST_REQUESTS).await;
        } else {
            std::future::pending::<()>().await;
        }
    };
    let result = tokio::select! {
        result = server => result,
        () = overdue => Ok(()),
    };
    forgetting.abort();
    result
}

async fn forget(app: Arc<App>) {
    let mut ticks = tokio::time::interval(FORGET_EVERY);
    loop {
        ticks.tick().await;
        app.keys.forget(now_ns());
    }
}

/// Resolves on SIGTERM or SIGINT.
pub async fn terminated() {
    let wait = |kind| async move {
        match signal(kind) {
            Ok(mut signals) => {
                signals.recv().await;
            }
            // Without a handler the signal ends the process by itself.
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        () = wait(SignalKind::terminate()) => {}
        () = wait(SignalKind::interrupt()) => {}
    }
}
