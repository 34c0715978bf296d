//! "Did you mean": the known word that a misspelt one is closest to.

/// Longer words are not compared: the time grows with the product of both lengths.
const MAX_BYTES: usize = 64;

/// Returns the known word that is closest to `word`, if at most a third of its letters differ.
pub fn closest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    if word.len() > MAX_BYTES {
        return None;
    }
    let by_distance = known.into_iter().map(|known| (distance(word.as_bytes(), known.as_bytes()), known));
    let (distance, closest) = by_distance.min_by_key(|(distance, _)| *distance)?;
    (distance <= (closest.len() / 3).max(1)).then_some(closest)
}

/// Returns the Levenshtein distance: how many letters have to be inserted, deleted or replaced.
fn distance(from: &[u8], to: &[u8]) -> usize {
    // One row of the matrix: of what was read of `from`, the distance to each beginning of `to` but
    // the empty one.
    let mut row: Vec<usize> = (1..=to.len()).collect();
    for (index, letter) in from.iter().enumerate() {
        let (mut diagonal, mut left) = (index, index + 1);
        for (cell, other) in row.iter_mut().zip(to) {
            let replaced = diagonal + usize::from(letter != other);
            diagonal = *cell;
            left = replaced.min(diagonal + 1).min(left + 1);
            *cell = left;
        }
    }
    row.last().copied().unwrap_or(from.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_word_finds_the_one_that_was_meant() {
        let known = ["target", "metric", "reporting_period", "role"];
        for (word, meant) in [
            ("tarjet", Some("target")),
            ("reporting_perod", Some("reporting_period")),
            ("metrics", Some("metric")),
            ("rloe", None),
            ("rol", Some("role")),
            ("", None),
            ("something_else", None),
            (&"target".repeat(100), None),
        ] {
            assert_eq!(closest(word, known), meant, "{word}");
        }
        assert_eq!(closest("word", []), None);
    }

    #[test]
    fn the_distance_counts_letters() {
        for (from, to, letters) in
            [("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("same", "same", 0)]
        {
            assert_eq!(distance(from.as_bytes(), to.as_bytes()), letters, "{from} {to}");
        }
    }
}
