#![forbid(unsafe_code)]
//! Counts of what others can bring about at will, faults above all, and which of them are worth a line in the log.

use std::collections::BTreeMap;

/// Counts by kind. Kinds are literals of this program, so that their number is bounded.
#[derive(Debug, Default)]
pub struct Tally {
    counts: BTreeMap<&'static str, u64>,
}

impl Tally {
    /// Counts one; returns the count if it is to be logged: the first, the second, the fourth, the eighth, … so
    /// that the log stays short whatever the other side does, without a clock.
    pub fn count(&mut self, what: &'static str) -> Option<u64> {
        let count = self.counts.entry(what).or_insert(0);
        *count = count.saturating_add(1);
        count.is_power_of_two().then_some(*count)
    }

    pub fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.counts.iter().map(|(&what, &count)| (what, count))
    }
}

#[cfg(test)]
mod tests {
    use super::Tally;

    #[test]
    fn a_flood_makes_few_lines() {
        let mut tally = Tally::default();
        let lines = (0..1_000_000).filter(|_| tally.count("flood").is_some()).count();
        assert_eq!(lines, 20);
        assert_eq!(tally.count("another"), Some(1));
        assert_eq!(
            tally.counts().collect::<Vec<_>>(),
            [("another", 1), ("flood", 1_000_000)]
        );
    }
}
