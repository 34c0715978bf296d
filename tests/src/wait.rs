//! Waiting for a condition, with a deadline.

use std::fmt::Debug;
use std::future::Future;
use std::time::{Duration, Instant};

/// Polls until `probe` gives a value. It answers `Err` with what it saw instead.
///
/// # Panics
/// At the deadline, with the last thing seen.
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

/// [`until`] for a condition that says what it compares.
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
