//! What a report adds to what its receiver already knows of the sender.

use std::fmt;

use crate::counting::snapshot::{Period, Snapshot};

/// A counter decreased although the incarnation is the one already known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CounterDecreased;

impl fmt::Display for CounterDecreased {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a counter decreased within the same incarnation")
    }
}

impl std::error::Error for CounterDecreased {}

/// Returns what a report adds for a sender whose last snapshot is `known`: `until` minus the larger
/// of `since` and `known`, field by field.
///
/// So a report that is repeated, late, or overlaps an earlier one adds only what was not added yet,
/// and no order of arrival can make it more. What `since` is ahead of `known` was acknowledged by
/// another receiver and is not ours to add. The elapsed time runs from the later of the two
/// instants to that of `until`.
///
/// # Errors
/// [`CounterDecreased`].
pub fn addition(
    known: Option<&Snapshot>,
    since: &Snapshot,
    until: &Snapshot,
) -> Result<Period, CounterDecreased> {
    if known.is_some_and(|known| until.as_of_ns > known.as_of_ns && !until.holds_totals_of(known)) {
        return Err(CounterDecreased);
    }
    let base = known.map_or(*since, |known| known.ceiling(since));
    Ok(until.more_than(&base))
}
