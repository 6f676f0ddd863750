//! BAT entries: 32 bits that name a place in the file, in sectors (version 1) or clusters
//! (version 2). 0 means that this image does not map the cluster.
#![warn(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

use crate::format::header::Version;
use crate::format::layout::Layout;
use crate::units::{FileCluster, FileOffset, SECTOR};
use std::ops::Range;
use thiserror::Error;

/// What is wrong with an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum EntryError {
    /// It points into the header or the table.
    #[error("the entry {0} points into the table")]
    InTable(u32),
    /// Its cluster starts at or past the end of the file.
    #[error("the entry {0} points past the end of the file")]
    PastEnd(u32),
    /// Its cluster starts inside the file and ends outside.
    #[error("the entry {0} points to a cluster that the end of the file cuts")]
    CutByEnd(u32),
    /// Version 1: it is not on a cluster border, so it may overlap another cluster. Readable.
    #[error("the entry {0} is not on a cluster border")]
    Misaligned(u32),
}

impl Layout {
    /// First byte of the cluster that a non-zero entry names. Makes no promise that it is in the
    /// file: see [`Layout::check_entry`].
    #[must_use]
    #[inline]
    pub fn entry_start(&self, entry: u32) -> FileOffset {
        let unit = match self.version() {
            Version::V1 => SECTOR,
            Version::V2 => self.cluster().bytes(),
        };
        // At most 2^32 times 2^31.
        FileOffset::new(u64::from(entry).saturating_mul(unit))
    }

    /// Checks a non-zero entry against the table and the file's length in bytes, for reading.
    pub fn check_entry(&self, entry: u32, file_len: FileOffset) -> Result<(), EntryError> {
        let start = self.entry_start(entry);
        if start < self.data_start() || start < self.table_end() {
            return Err(EntryError::InTable(entry));
        }
        if start >= file_len {
            return Err(EntryError::PastEnd(entry));
        }
        if start.saturating_add(self.cluster().bytes()) > file_len {
            return Err(EntryError::CutByEnd(entry));
        }
        Ok(())
    }

    /// The entries that [`Layout::check_entry`] finds nothing wrong with: whoever goes over a whole
    /// table compares with two numbers instead.
    #[must_use]
    pub fn good_entries(&self, file_len: FileOffset) -> Range<u64> {
        let unit = match self.version() {
            Version::V1 => SECTOR,
            Version::V2 => self.cluster().bytes(),
        };
        let first = self.data_start().max(self.table_end()).get();
        let start = first.div_ceil(unit).max(1);
        let last = file_len.get().checked_sub(self.cluster().bytes());
        let end = last.map_or(0, |last| last.div_euclid(unit).saturating_add(1));
        start..end
    }

    /// The file cluster that a checked entry names, for writing: it must be on a cluster border.
    pub fn entry_cluster(&self, entry: u32) -> Result<FileCluster, EntryError> {
        let start = self.entry_start(entry);
        let cluster = self.cluster().whole_below(start);
        if self.cluster().file_start(cluster) != start {
            return Err(EntryError::Misaligned(entry));
        }
        Ok(cluster)
    }

    /// The entry that names a file cluster, or `None` when 32 bits cannot hold it: 2 TiB into a
    /// version 1 file.
    #[must_use]
    pub fn entry_for(&self, cluster: FileCluster) -> Option<u32> {
        let value = match self.version() {
            Version::V1 => cluster.get().checked_mul(self.cluster().sectors().get())?,
            Version::V2 => cluster.get(),
        };
        u32::try_from(value).ok().filter(|entry| *entry != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::ClusterSize;

    fn layout(version: Version) -> Layout {
        Layout::new(version, ClusterSize::from_sectors(64).unwrap(), 320, 64)
    }

    #[test]
    fn entries_count_sectors_or_clusters() {
        assert_eq!(layout(Version::V1).entry_start(192).get(), 192 * 512);
        assert_eq!(layout(Version::V2).entry_start(3).get(), 192 * 512);
        for version in [Version::V1, Version::V2] {
            let layout = layout(version);
            for cluster in [1, 2, 77] {
                let entry = layout.entry_for(FileCluster::new(cluster)).unwrap();
                assert_eq!(layout.entry_cluster(entry), Ok(FileCluster::new(cluster)));
            }
        }
    }

    #[test]
    fn entries_outside_the_data_area_are_told_apart() {
        let layout = layout(Version::V2);
        let len = FileOffset::new(3 * 32768 + 100);
        assert_eq!(layout.check_entry(1, len), Ok(()));
        assert_eq!(layout.check_entry(2, len), Ok(()));
        assert_eq!(layout.check_entry(3, len), Err(EntryError::CutByEnd(3)));
        assert_eq!(layout.check_entry(4, len), Err(EntryError::PastEnd(4)));
        assert_eq!(
            layout.check_entry(u32::MAX, len),
            Err(EntryError::PastEnd(u32::MAX))
        );
        let far = Layout::new(Version::V2, layout.cluster(), 20_000, 192);
        assert_eq!(far.check_entry(2, len), Err(EntryError::InTable(2)));
    }

    #[test]
    fn the_good_entries_are_those_that_pass_the_check() {
        for version in [Version::V1, Version::V2] {
            for entries in [320, 20_000] {
                let cluster = ClusterSize::from_sectors(64).unwrap();
                let layout = Layout::new(version, cluster, entries, 0);
                for len in [0, 100, 32768, 3 * 32768, 3 * 32768 + 100, 9 * 32768 - 1] {
                    let len = FileOffset::new(len);
                    let good = layout.good_entries(len);
                    for entry in 1..1000_u32 {
                        assert_eq!(
                            good.contains(&u64::from(entry)),
                            layout.check_entry(entry, len).is_ok(),
                            "{version:?} {entries} {len} {entry}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn version_1_entries_stop_at_two_tebibytes_and_must_be_aligned() {
        let layout = layout(Version::V1);
        let last = FileCluster::new(u64::from(u32::MAX) / 64);
        assert_eq!(layout.entry_for(last), Some(4_294_967_232));
        assert_eq!(layout.entry_for(FileCluster::new(last.get() + 1)), None);
        assert_eq!(layout.entry_cluster(65), Err(EntryError::Misaligned(65)));
    }
}
