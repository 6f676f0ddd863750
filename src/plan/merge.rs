//! Decides which clusters move when levels are merged into the one below them.
//!
//! For each cluster the topmost of the upper levels that has it gives its content, just as a read
//! would find it. It goes where the lowest level has the cluster already, or to a new place there.
//! What no upper level has stays as it is.
#![warn(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

use crate::format::layout::Layout;
use crate::units::{ClusterSize, DiskCluster, FileOffset};

/// What a level has of a run of clusters.
#[derive(Clone, Copy, Debug)]
pub enum Piece<'a> {
    /// A plain file: everything, at its own place.
    Plain,
    /// The entries of these clusters.
    Table {
        /// How to read them.
        layout: &'a Layout,
        /// One for each cluster; those that are missing at the end are 0.
        entries: &'a [u32],
    },
}

/// An upper level.
#[derive(Clone, Copy, Debug)]
pub struct Upper<'a> {
    /// What it has.
    pub piece: Piece<'a>,
    /// Bytes of its own disk: what it has behind them means nothing.
    pub disk_len: u64,
}

/// Where the content of a cluster goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The lowest level has the cluster here.
    Taken(FileOffset),
    /// It needs a cluster of its own there.
    Fresh,
}

/// A cluster that moves down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// The cluster.
    pub cluster: DiskCluster,
    /// Which of the upper levels has it, the lowest of them 0.
    pub level: usize,
    /// Where it is there.
    pub from: FileOffset,
    /// Bytes that mean something; the rest of the cluster reads as zeros.
    pub len: u64,
    /// Where it goes.
    pub place: Place,
}

impl Piece<'_> {
    fn find(&self, index: usize, disk_start: u64) -> Option<FileOffset> {
        match self {
            Self::Plain => Some(FileOffset::new(disk_start)),
            Self::Table { layout, entries } => {
                let entry = entries.get(index).copied().filter(|entry| *entry != 0)?;
                Some(layout.entry_start(entry))
            }
        }
    }
}

/// The moves for `count` clusters from `first` on, in disk order. `uppers` begins with the lowest;
/// `disk_len` are the bytes of the merged disk.
pub fn plan_merge<'a>(
    cluster: ClusterSize,
    first: DiskCluster,
    count: usize,
    disk_len: u64,
    uppers: &'a [Upper<'a>],
    lower: Piece<'a>,
) -> impl Iterator<Item = Move> + 'a {
    let numbers = first.get()..;
    (0..count).zip(numbers).filter_map(move |(index, number)| {
        let number = DiskCluster::new(number);
        let start = cluster.disk_start(number).get();
        let found = uppers.iter().enumerate().rev().find_map(|(level, upper)| {
            let end = upper.disk_len.min(disk_len);
            let len = end.saturating_sub(start).min(cluster.bytes());
            let from = upper.piece.find(index, start).filter(|_| len > 0)?;
            Some((level, from, len))
        });
        let (level, from, len) = found?;
        Some(Move {
            cluster: number,
            level,
            from,
            len,
            place: match lower.find(index, start) {
                Some(at) => Place::Taken(at),
                None => Place::Fresh,
            },
        })
    })
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use crate::format::header::Version;

    fn layout(version: Version) -> Layout {
        Layout::new(version, ClusterSize::from_sectors(8).unwrap(), 8, 8)
    }

    #[test]
    fn the_topmost_wins_and_the_end_is_clipped() {
        let (one, two) = (layout(Version::V1), layout(Version::V2));
        let upper = |layout, entries, disk_len| Upper {
            piece: Piece::Table { layout, entries },
            disk_len,
        };
        let uppers = [
            upper(&one, &[8, 16, 0, 24, 32, 40][..], 4 * 4096 + 100),
            upper(&two, &[0, 5, 0, 0, 0][..], 6 * 4096),
        ];
        let lower = Piece::Table {
            layout: &two,
            entries: &[7, 0, 9, 8, 6],
        };
        let cluster = one.cluster();
        let moves = plan_merge(cluster, DiskCluster::ZERO, 6, 6 * 4096, &uppers, lower);
        let found: Vec<_> = moves
            .map(|m| (m.cluster.get(), m.level, m.from.get(), m.len, m.place))
            .collect();
        let taken = |n: u64| Place::Taken(FileOffset::new(n * 4096));
        assert_eq!(
            found,
            [
                (0, 0, 4096, 4096, taken(7)),
                (1, 1, 5 * 4096, 4096, Place::Fresh),
                (3, 0, 3 * 4096, 4096, taken(8)),
                (4, 0, 4 * 4096, 100, taken(6)),
            ]
        );
    }

    #[test]
    fn plain_files_have_everything_in_its_place() {
        let two = layout(Version::V2);
        let first = DiskCluster::new(2);
        let plain = Upper {
            piece: Piece::Plain,
            disk_len: 3 * 4096 + 1,
        };
        let lower = Piece::Table {
            layout: &two,
            entries: &[],
        };
        let uppers = [plain];
        let moves = plan_merge(two.cluster(), first, 6, 1 << 20, &uppers, lower);
        let found: Vec<_> = moves.map(|m| (m.from.get(), m.len, m.place)).collect();
        let fresh = Place::Fresh;
        assert_eq!(found, [(8192, 4096, fresh), (12288, 1, fresh)]);
        let table = Upper {
            piece: Piece::Table {
                layout: &two,
                entries: &[0, 3],
            },
            disk_len: 1 << 20,
        };
        let uppers = [table];
        let mut moves = plan_merge(two.cluster(), first, 2, 1 << 20, &uppers, Piece::Plain);
        let only = moves.next().map(|m| m.place);
        assert_eq!(only, Some(Place::Taken(FileOffset::new(12288))));
        assert_eq!(moves.next(), None);
    }
}
