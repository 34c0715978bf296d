//! Waiting for a condition, with a deadline.

use std::fmt::Debug;
use std::future::Future;
use std::time::{Duration, Instant};

/// Polls `probe` until it returns a value. Until then it returns `Err` with what it sees.
///
/// # Panics
/// At the deadline, with what the probe saw last.
pub async fn until<T, E: Debug, F: Future<Output = Result<T, E>>>(
    what: &str,
    limit: Duration,
    mut probe: impl FnMut() -> F,
) -> T {
    let deadline = Instant::now() + limit;
    loop {
        match probe().await {
            Ok(value) => return value,
            Err(seen) if Instant::now() >= deadline => {
                panic!("waited {limit:?} in vain until {what}; last seen: {seen:?}")
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// Like [`until`], for a probe that returns a value to compare with `wanted`.
///
/// # Panics
/// At the deadline, with the last value.
pub async fn until_equal<T: PartialEq + Debug, F: Future<Output = T>>(
    what: &str,
    limit: Duration,
    wanted: T,
    mut probe: impl FnMut() -> F,
) {
    let wanted = &wanted;
    until(&format!("{what} is {wanted:?}"), limit, || {
        let seen = probe();
        async move {
            let seen = seen.await;
            if seen == *wanted { Ok(()) } else { Err(seen) }
        }
    })
    .await;
}
