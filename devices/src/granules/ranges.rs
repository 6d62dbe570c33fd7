//! A set of granules that takes as much room as it has gaps.

use std::{collections::BTreeMap, ops::Range};

/// A set of numbers, kept as ranges that neither overlap nor touch.
#[derive(Debug, Default)]
pub(super) struct RangeSet {
    /// Start and end.
    ranges: BTreeMap<u64, u64>,
}

impl RangeSet {
    /// How many numbers are in it.
    pub(super) fn len(&self) -> u64 {
        self.ranges.iter().map(|(start, end)| end - start).sum()
    }

    pub(super) fn contains(&self, number: u64) -> bool {
        self.run(number).0
    }

    /// Whether `number` is in it, and the first number behind that of which this is not so. That is
    /// `u64::MAX` if there is none.
    pub(super) fn run(&self, number: u64) -> (bool, u64) {
        match self.ranges.range(..=number).next_back() {
            Some((_, end)) if number < *end => (true, *end),
            _ => {
                let next = self.ranges.range(number..).next();
                (false, next.map_or(u64::MAX, |(start, _)| *start))
            }
        }
    }

    /// The ranges in ascending order.
    pub(super) fn ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.ranges.iter().map(|(start, end)| *start..*end)
    }

    /// Puts `range` in.
    pub(super) fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let Range { mut start, mut end } = range;
        while let Some((at, behind)) = self.ranges.range(..=end).next_back()
            && *behind >= start
        {
            let at = *at;
            (start, end) = (start.min(at), end.max(*behind));
            self.ranges.remove(&at);
        }
        self.ranges.insert(start, end);
    }

    /// Takes `range` out.
    pub(super) fn remove(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        while let Some((at, behind)) = self.ranges.range(..range.end).next_back()
            && *behind > range.start
        {
            let (at, behind) = (*at, *behind);
            self.ranges.remove(&at);
            if at < range.start {
                self.ranges.insert(at, range.start);
            }
            if behind > range.end {
                self.ranges.insert(range.end, behind);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_a_set_in_as_few_ranges_as_can_be(
            steps in prop::collection::vec((any::<bool>(), 0..60u64, 0..20u64), 0..40),
        ) {
            let (mut ranges, mut set) = (RangeSet::default(), BTreeSet::new());
            for (insert, start, len) in steps {
                match insert {
                    true => {
                        ranges.insert(start..start + len);
                        set.extend(start..start + len);
                    }
                    false => {
                        ranges.remove(start..start + len);
                        set.retain(|n| !(start..start + len).contains(n));
                    }
                }
                let numbers: Vec<u64> = ranges.ranges().flatten().collect();
                prop_assert_eq!(&numbers, &set.iter().copied().collect::<Vec<_>>());
                let all: Vec<_> = ranges.ranges().collect();
                prop_assert!(all.windows(2).all(|pair| pair[0].end < pair[1].start));
                prop_assert_eq!(ranges.len(), set.len() as u64);
                for n in 0..90 {
                    let (is, end) = ranges.run(n);
                    prop_assert_eq!(is, set.contains(&n));
                    let expected = (n..200).find(|m| set.contains(m) != is).unwrap_or(u64::MAX);
                    prop_assert_eq!(end, expected);
                }
            }
        }
    }
}
