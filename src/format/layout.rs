//! Where the table ends, where data begins, and which page of the table holds which entry.
#![warn(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

use crate::format::header::{HEADER_LEN, Version};
use crate::units::{
    ClusterSize, DiskCluster, FileCluster, FileOffset, SECTOR, SectorCount, len_u64,
};
use std::ops::Range;

/// Bytes of a page of the table, header included in page 0: the unit in which it is cached and
/// written.
pub const BAT_PAGE_LEN: usize = 4096;
/// Slots of 32 bits in a page.
pub const BAT_PAGE_SLOTS: usize = 1024;
/// Slots of page 0 that the header occupies.
pub const HEADER_SLOTS: usize = 16;

/// The number of a page of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageIndex(pub u32);

impl PageIndex {
    /// The page as an index into a slice of pages.
    #[must_use]
    pub fn index(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

/// The arithmetic of one image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    version: Version,
    cluster: ClusterSize,
    entry_count: u32,
    first_block: SectorCount,
}

impl Layout {
    /// The layout that a header describes. `first_block` is `m_FirstBlockOffset`; where it is 0
    /// (old version 1 images) data starts right after the table, rounded up to a sector, or to a
    /// cluster in version 2.
    #[must_use]
    pub fn new(version: Version, cluster: ClusterSize, entry_count: u32, first_block: u32) -> Self {
        let mut layout = Self {
            version,
            cluster,
            entry_count,
            first_block: SectorCount::new(first_block.into()),
        };
        if first_block == 0 {
            let end = layout.table_end().get();
            let sectors = match version {
                Version::V1 => end.div_ceil(SECTOR),
                Version::V2 => {
                    let clusters = cluster.count_for(end).get();
                    clusters.saturating_mul(cluster.sectors().get())
                }
            };
            layout.first_block = SectorCount::new(sectors);
        }
        layout
    }

    /// The image's version.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// The cluster size.
    #[must_use]
    pub fn cluster(&self) -> ClusterSize {
        self.cluster
    }

    /// Number of BAT entries.
    #[must_use]
    pub fn entry_count(&self) -> u32 {
        self.entry_count
    }

    /// First sector of the data area.
    #[must_use]
    pub fn first_block(&self) -> SectorCount {
        self.first_block
    }

    /// First byte of the data area.
    #[must_use]
    pub fn data_start(&self) -> FileOffset {
        FileOffset::new(self.first_block.get().saturating_mul(SECTOR))
    }

    /// First data cluster, counted from byte 0 of the file, rounded up.
    #[must_use]
    pub fn first_cluster(&self) -> FileCluster {
        FileCluster::new(self.cluster.count_for(self.data_start().get()).get())
    }

    /// End of the last entry, in bytes.
    #[must_use]
    pub fn table_end(&self) -> FileOffset {
        let entries = u64::from(self.entry_count).saturating_mul(4);
        FileOffset::new(len_u64(HEADER_LEN).saturating_add(entries))
    }

    /// Number of pages that hold entries.
    #[must_use]
    pub fn page_count(&self) -> u32 {
        let slots = u64::from(self.entry_count).saturating_add(len_u64(HEADER_SLOTS));
        u32::try_from(slots.div_ceil(len_u64(BAT_PAGE_SLOTS))).unwrap_or(u32::MAX)
    }

    /// The page and the slot of an entry. Meaningful for entries below `u32::MAX - 16`, which the
    /// bound on the entry count guarantees.
    #[must_use]
    #[inline]
    pub fn page_of(cluster: DiskCluster) -> (PageIndex, usize) {
        let slot = cluster.get().saturating_add(16);
        let page = u32::try_from(slot >> 10).unwrap_or(u32::MAX);
        (PageIndex(page), usize::try_from(slot & 1023).unwrap_or(0))
    }

    /// The disk cluster whose entry is in this slot, or `None` for the header's slots.
    #[must_use]
    pub fn cluster_of(page: PageIndex, slot: usize) -> Option<DiskCluster> {
        let position = u64::from(page.0).saturating_mul(len_u64(BAT_PAGE_SLOTS));
        let position = position.saturating_add(len_u64(slot));
        position
            .checked_sub(len_u64(HEADER_SLOTS))
            .map(DiskCluster::new)
    }

    /// The slots of a page that hold entries of this table: not the header's, none after the last.
    #[must_use]
    pub fn slots_of(&self, page: PageIndex) -> Range<usize> {
        let start = if page.0 == 0 { HEADER_SLOTS } else { 0 };
        let slots = u64::from(self.entry_count).saturating_add(len_u64(HEADER_SLOTS));
        let before = u64::from(page.0).saturating_mul(len_u64(BAT_PAGE_SLOTS));
        let left = slots.saturating_sub(before).min(len_u64(BAT_PAGE_SLOTS));
        let end = usize::try_from(left).unwrap_or(0);
        start..end.max(start)
    }

    /// Bytes of the file that hold the entries of a page: from byte 64 in page 0, and never past
    /// the last entry, so that a write of them touches neither header nor data.
    #[must_use]
    pub fn page_bytes(&self, page: PageIndex) -> Range<FileOffset> {
        let slots = self.slots_of(page);
        let base = u64::from(page.0).saturating_mul(len_u64(BAT_PAGE_LEN));
        let at =
            |slot: usize| FileOffset::new(base.saturating_add(len_u64(slot).saturating_mul(4)));
        at(slots.start)..at(slots.end)
    }

    /// Byte position of an entry in the file.
    #[must_use]
    pub fn entry_offset(cluster: DiskCluster) -> FileOffset {
        FileOffset::new(
            cluster
                .get()
                .saturating_mul(4)
                .saturating_add(len_u64(HEADER_LEN)),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(entries: u32) -> Layout {
        let cluster = ClusterSize::from_sectors(64).unwrap();
        Layout::new(Version::V2, cluster, entries, 0)
    }

    #[test]
    fn pages_and_clusters_agree_both_ways() {
        for cluster in [0, 1, 1007, 1008, 1009, 2031, 2032, (1 << 29) - 2] {
            let (page, slot) = Layout::page_of(DiskCluster::new(cluster));
            assert_eq!(u64::from(page.0) * 1024 + len_u64(slot), cluster + 16);
            assert_eq!(
                Layout::cluster_of(page, slot),
                Some(DiskCluster::new(cluster))
            );
            let offset = Layout::entry_offset(DiskCluster::new(cluster)).get();
            assert_eq!(offset, u64::from(page.0) * 4096 + len_u64(slot) * 4);
        }
        assert_eq!(Layout::cluster_of(PageIndex(0), 15), None);
    }

    #[test]
    fn page_ranges_never_touch_header_or_data() {
        for entries in [1, 1007, 1008, 1009, 5000] {
            let layout = layout(entries);
            let mut next = 64;
            for page in 0..layout.page_count() {
                let bytes = layout.page_bytes(PageIndex(page));
                assert_eq!(bytes.start.get(), next);
                assert!(bytes.end > bytes.start);
                next = bytes.end.get();
            }
            assert_eq!(next, 64 + 4 * u64::from(entries));
            assert_eq!(next, layout.table_end().get());
        }
    }

    /// Known images: entries that fit one cluster, and where data then starts.
    #[test]
    fn the_minimal_first_block_is_that_of_other_writers() {
        for (sectors, entries, first) in [
            (64, 320, 64),
            (2048, 10, 2048),
            (2048, 3_145_728, 26_624),
            (131_072, 2, 131_072),
        ] {
            let cluster = ClusterSize::from_sectors(sectors).unwrap();
            let layout = Layout::new(Version::V2, cluster, entries, 0);
            assert_eq!(layout.first_block().get(), first);
        }
    }
}
