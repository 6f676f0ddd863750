//! Ranges of disk clusters: however many there are, only the first of them are kept.
#![warn(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

use std::ops::Range;

/// Ranges that are kept; of further ones only the number of clusters is.
pub const SPANS_MAX: usize = 1024;

/// Disk clusters in ascending order, joined to ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spans {
    list: Vec<Range<u64>>,
    clusters: u64,
    /// Clusters that are counted and in no range.
    untold: u64,
}

impl Spans {
    /// Adds a cluster above all that are there.
    pub fn add(&mut self, cluster: u64) {
        self.clusters = self.clusters.saturating_add(1);
        let end = cluster.saturating_add(1);
        let has_room = self.list.len() < SPANS_MAX;
        match self.list.last_mut() {
            Some(last) if last.end == cluster => last.end = end,
            _ if has_room => self.list.push(cluster..end),
            _ => self.untold = self.untold.saturating_add(1),
        }
    }

    /// Number of clusters.
    #[must_use]
    pub fn clusters(&self) -> u64 {
        self.clusters
    }

    /// The first ranges.
    #[must_use]
    pub fn list(&self) -> &[Range<u64>] {
        &self.list
    }

    /// Clusters that are in none of the ranges kept.
    #[must_use]
    pub fn untold(&self) -> u64 {
        self.untold
    }

    /// True without clusters.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.clusters == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_joined_and_memory_is_bounded() {
        let mut spans = Spans::default();
        for cluster in [3, 4, 5, 9] {
            spans.add(cluster);
        }
        assert_eq!(spans.list(), [3..6, 9..10]);
        for cluster in 0..10_000 {
            spans.add(100 + 2 * cluster);
        }
        assert_eq!((spans.list().len(), spans.clusters()), (SPANS_MAX, 10_004));
        assert_eq!(spans.untold(), 10_002 - 1024);
    }
}
