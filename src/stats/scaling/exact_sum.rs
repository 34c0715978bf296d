//! Sums that do not depend on the order of their terms. A key's senders are kept in a map, whose
//! order is another one in each process; several stats servers that share one state must still say
//! the same number, to the last digit.

/// The unit of the sum: 2^-40, about a picorequest. Terms are below 2^40 (a million million) or
/// taken as that, so 2^46 of them fit.
const UNITS: f64 = (1_u64 << 40) as f64;
const MAX_TERM: f64 = (1_u64 << 40) as f64;

/// A sum in whole units: integers add up to the same in any order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExactSum(i128);

impl ExactSum {
    /// Adds a term. What is no number counts as nothing.
    pub fn add(&mut self, term: f64) {
        let units = (term.clamp(-MAX_TERM, MAX_TERM) * UNITS).round();
        self.0 = self.0.saturating_add(units as i128);
    }

    /// Returns the sum.
    pub fn value(self) -> f64 {
        self.0 as f64 / UNITS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(terms: impl IntoIterator<Item = f64>) -> f64 {
        let mut sum = ExactSum::default();
        terms.into_iter().for_each(|term| sum.add(term));
        sum.value()
    }

    #[test]
    fn the_order_does_not_matter() {
        let terms: Vec<f64> = (1..10_000).map(|n| 1.0 / f64::from(n) - 0.3).collect();
        let forwards = sum(terms.iter().copied());
        let backwards = sum(terms.iter().rev().copied());
        assert_eq!(forwards.to_bits(), backwards.to_bits());
        let plain: f64 = terms.iter().sum();
        assert_ne!(
            plain.to_bits(),
            terms.iter().rev().sum::<f64>().to_bits(),
            "plain sums differ, or this shows nothing"
        );
        assert!((forwards - plain).abs() < 1e-7);
    }

    #[test]
    fn whole_numbers_and_what_is_no_number() {
        assert_eq!(sum([3.0, 1e9, -1.0]), 1_000_000_002.0);
        assert_eq!(sum([f64::NAN, 2.5]), 2.5);
        assert_eq!(sum([f64::INFINITY, f64::NEG_INFINITY]), 0.0);
        assert_eq!(sum([]), 0.0);
    }
}
