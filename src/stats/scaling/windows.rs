//! Window averages as Knative's autoscaler computes them (knative/serving,
//! `pkg/autoscaler/aggregation`): buckets of one second, indexed by unix second.

use serde::{Deserialize, Serialize};

use crate::scaling::exact_sum::ExactSum;

/// The sizes of the stable and the panic window in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowSizes {
    /// Knative's stable window; its default is 60 s.
    pub stable_seconds: usize,
    /// Knative's panic window; its default is 10 % of the stable one.
    pub panic_seconds: usize,
}

impl Default for WindowSizes {
    fn default() -> Self {
        Self { stable_seconds: 60, panic_seconds: 6 }
    }
}

/// What counts in each second after `after` up to `until`, both unix seconds, although it is not
/// recorded yet.
#[derive(Clone, Copy, Debug)]
pub struct Held<const N: usize> {
    /// The last second that is recorded.
    pub after: u64,
    /// The last second that it counts in.
    pub until: u64,
    /// What it adds to each.
    pub values: [f64; N],
}

/// A window of one-second buckets, each of `N` quantities that are recorded together.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(bound(serialize = "[f64; N]: Serialize", deserialize = "[f64; N]: Deserialize<'de>"))]
pub struct Window<const N: usize> {
    buckets: Vec<[f64; N]>,
    first_second: Option<u64>,
    last_second: u64,
}

impl<const N: usize> Window<N> {
    /// A window of `seconds` seconds, at least one.
    pub fn new(seconds: usize) -> Self {
        Self { buckets: vec![[0.0; N]; seconds.max(1)], first_second: None, last_second: 0 }
    }

    /// Returns its size in seconds.
    pub fn seconds(&self) -> usize {
        self.buckets.len()
    }

    /// Adds `values` to the bucket of a unix second. What lies before the window is dropped.
    pub fn record(&mut self, second: u64, values: [f64; N]) {
        let size = self.buckets.len() as u64;
        match self.first_second {
            None => {
                self.first_second = Some(second);
                self.last_second = second;
            }
            Some(_) if second > self.last_second => {
                if second - self.last_second >= size {
                    // A whole window went by without a record: what came before no longer matters.
                    self.buckets.fill([0.0; N]);
                    self.first_second = Some(second);
                } else {
                    for between in self.last_second + 1..=second {
                        if let Some(bucket) = self.bucket_mut(between) {
                            *bucket = [0.0; N];
                        }
                    }
                }
                self.last_second = second;
            }
            Some(_) if second + size <= self.last_second => return,
            Some(first) => self.first_second = Some(first.min(second)),
        }
        if let Some(bucket) = self.bucket_mut(second) {
            bucket.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
        }
    }

    /// Returns the average bucket as of a unix second, rounded to six digits. It is taken over the
    /// part of the window that has been written: from the first record (or the window's beginning)
    /// to the last one; seconds between without a record count as zero. 0 after a whole window
    /// without records.
    pub fn average(&self, second: u64) -> [f64; N] {
        self.average_with(second, std::iter::empty())
    }

    /// Returns the average, where what is held counts as if it were recorded.
    pub fn average_with(&self, second: u64, held: impl Iterator<Item = Held<N>> + Clone) -> [f64; N] {
        let size = self.buckets.len() as u64;
        let (Some(first), Some(silent)) = (self.first_second, self.silence(second, held.clone())) else {
            return [0.0; N];
        };
        let still_in_window = size - silent;
        let end = second.max(self.last_second) - silent;
        let oldest = (end + 1).saturating_sub(still_in_window);
        let seconds = still_in_window.min(end - first + 1) as f64;
        let mut sums = [0.0; N];
        for bucket in (oldest..=self.last_second).filter_map(|second| self.bucket(second)) {
            sums.iter_mut().zip(bucket).for_each(|(sum, value)| *sum += value);
        }
        // The senders come in any order.
        let mut held_sums = [ExactSum::default(); N];
        for Held { after, until, values } in held {
            let seconds = (until.min(end) + 1).saturating_sub(oldest.max(after + 1)) as f64;
            held_sums.iter_mut().zip(values).for_each(|(sum, value)| sum.add(value * seconds));
        }
        sums.iter_mut().zip(held_sums).for_each(|(sum, held)| *sum += held.value());
        sums.map(|sum| round6(sum / seconds))
    }

    /// Returns for how many seconds nothing was recorded or held as of a unix second; `None` if that
    /// is a whole window.
    fn silence(&self, second: u64, held: impl Iterator<Item = Held<N>>) -> Option<u64> {
        self.first_second?;
        let second = second.max(self.last_second);
        let until = held.map(|held| held.until.min(second)).max().unwrap_or(0);
        let silent = second - until.max(self.last_second);
        (silent < self.buckets.len() as u64).then_some(silent)
    }

    /// Forgets what was recorded.
    pub fn clear(&mut self) {
        self.first_second = None;
        self.buckets.fill([0.0; N]);
    }

    /// Returns the same window with another size: what was recorded stays, as far as both reach.
    #[must_use]
    pub fn resized(&self, seconds: usize) -> Self {
        let mut resized = Self::new(seconds);
        if let Some(first) = self.first_second {
            let reach = seconds.clamp(1, self.buckets.len()) as u64;
            for second in first.max((self.last_second + 1).saturating_sub(reach))..=self.last_second {
                resized.record(second, self.bucket(second).unwrap_or([0.0; N]));
            }
        }
        resized
    }

    fn bucket(&self, second: u64) -> Option<[f64; N]> {
        self.buckets.get((second % self.buckets.len() as u64) as usize).copied()
    }

    fn bucket_mut(&mut self, second: u64) -> Option<&mut [f64; N]> {
        let index = (second % self.buckets.len() as u64) as usize;
        self.buckets.get_mut(index)
    }
}

fn round6(value: f64) -> f64 {
    (value * 1e6).round() / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_young_window_averages_over_its_age() {
        let mut window = Window::new(60);
        window.record(100, [4.0]);
        window.record(101, [2.0]);
        assert_eq!(window.average(101), [3.0]);
    }

    #[test]
    fn seconds_without_a_record_count_as_zero() {
        let mut window = Window::new(4);
        window.record(100, [8.0]);
        window.record(103, [8.0]);
        assert_eq!(window.average(103), [4.0]);
        assert_eq!(window.average(104), [2.666667]);
        assert_eq!(window.average(106), [8.0]);
        assert_eq!(window.average(107), [0.0]);
    }

    #[test]
    fn a_record_from_before_the_window_is_dropped() {
        let mut window = Window::new(4);
        window.record(104, [1.0]);
        window.record(100, [9.0]);
        assert_eq!(window.average(104), [1.0]);
        window.record(101, [3.0]);
        assert_eq!(window.average(104), [1.0], "four seconds now, four in all");
    }

    #[test]
    fn what_is_held_counts_as_if_it_were_recorded() {
        let mut window = Window::new(6);
        for second in 101..=110 {
            window.record(second, [7.0]);
        }
        let held = |until| std::iter::once(Held { after: 110, until, values: [7.0] });
        for second in 110..=120 {
            assert_eq!(window.average_with(second, held(120)), [7.0], "{second}");
        }
        assert_eq!(window.silence(125, held(120)), Some(5));
        assert_eq!((window.average_with(125, held(120)), window.silence(126, held(120))), ([7.0], None));
        assert_eq!(window.average_with(126, held(120)), [0.0]);
        // Beside a sender that reports each second.
        (111..=113).for_each(|second| window.record(second, [2.0]));
        assert_eq!(window.average_with(113, held(120)), [8.0]);
        assert_eq!(window.average(113), [4.5]);
        window.clear();
        assert_eq!((window.average(113), window.silence(113, held(120))), ([0.0], None));
    }

    #[test]
    fn an_empty_window_is_zero_at_any_time() {
        assert_eq!(Window::<1>::new(0).average(0), [0.0]);
        assert_eq!(Window::<1>::new(6).average(u64::MAX), [0.0]);
    }

    #[test]
    fn another_size_keeps_what_both_reach() {
        let mut window = Window::new(6);
        (100..106).for_each(|second| window.record(second, [second as f64]));
        assert_eq!(window.resized(2).average(105), [104.5]);
        let longer = window.resized(60);
        assert_eq!((longer.seconds(), longer.average(105)), (60, [102.5]));
        assert_eq!(Window::<1>::new(6).resized(2).average(105), [0.0]);
    }
}
