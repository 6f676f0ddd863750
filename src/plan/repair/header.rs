//! What a header should say, as far as the rest of the image tells it.
//!
//! Only what can be corrected without loss is: the type, which has one value; the number of
//! entries, which follows from the size where the table has room for them; the place of the first
//! data cluster, which follows from the table's length and from what the entries name. The magic,
//! the cluster size and the size of the disk are never guessed at.
#![warn(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

use super::is_converting;
use crate::format::header::{ENTRY_COUNT_MAX, Header, HeaderError, RawHeader, TYPE, Version};
use crate::format::layout::Layout;
use crate::units::{ClusterSize, FileOffset, SECTOR};

/// A field that a repair sets right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderFix {
    /// `m_Type`.
    Type {
        /// As found.
        from: u32,
    },
    /// `m_Size`.
    EntryCount {
        /// As found.
        from: u32,
        /// As it should be.
        to: u32,
    },
    /// `m_FirstBlockOffset`.
    FirstBlock {
        /// As found, sectors.
        from: u32,
        /// As it should be, sectors.
        to: u32,
    },
}

/// A header as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Normal {
    /// The header with all corrections.
    pub header: Header,
    /// What is corrected.
    pub fixes: Vec<HeaderFix>,
}

/// What the entries of a table say about where data begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Evidence {
    /// Entries whose clusters begin behind the table and inside the file.
    pub plausible: u64,
    /// Those of them on a cluster border, counted from byte 0.
    pub aligned: u64,
    /// Those of them that begin before the first block.
    pub before_first: u64,
    /// Lowest begin of those that are aligned, bytes.
    pub lowest: Option<u64>,
    /// Lowest begin of those that do not begin before the first block, bytes.
    pub lowest_readable: Option<u64>,
}

impl Evidence {
    /// Adds an entry that is not 0; `layout` has the table's right length.
    pub fn add(&mut self, layout: &Layout, entry: u32, file_len: FileOffset) {
        let start = layout.entry_start(entry);
        if start < layout.table_end() || start >= file_len {
            return;
        }
        self.plausible = self.plausible.saturating_add(1);
        if start < layout.data_start() {
            self.before_first = self.before_first.saturating_add(1);
        } else {
            let lowest = self.lowest_readable.unwrap_or(u64::MAX);
            self.lowest_readable = Some(lowest.min(start.get()));
        }
        if layout.entry_cluster(entry).is_ok() {
            self.aligned = self.aligned.saturating_add(1);
            let lowest = self.lowest.unwrap_or(u64::MAX);
            self.lowest = Some(lowest.min(start.get()));
        }
    }
}

/// The number of entries that a header should have, and the layout that follows; an error where
/// what cannot be corrected is wrong. The first step, before any entry is looked at.
pub fn count_entries(raw: &RawHeader, file_len: FileOffset) -> Result<Layout, HeaderError> {
    let version = Version::of(&raw.magic).ok_or(HeaderError::Magic)?;
    let cluster = ClusterSize::from_sectors(raw.cluster_sectors)
        .ok_or(HeaderError::ClusterSize(raw.cluster_sectors))?;
    if is_converting(raw) {
        return Err(HeaderError::Converting);
    }
    let sectors = match version {
        Version::V1 => raw.size_in_sectors & u64::from(u32::MAX),
        Version::V2 => raw.size_in_sectors,
    };
    let bytes = sectors.checked_mul(SECTOR);
    let bytes = bytes.filter(|bytes| i64::try_from(*bytes).is_ok());
    let bytes = bytes.ok_or(HeaderError::DiskSize(sectors))?;
    let of = |count| Layout::new(version, cluster, count, raw.first_block);
    let fits = |layout: &Layout| {
        let end = layout.table_end();
        // Where the first block is told at all, the table ends before it.
        end <= file_len && (raw.first_block == 0 || end <= layout.data_start())
    };
    let found = of(raw.entry_count);
    let needed = u32::try_from(cluster.count_for(bytes).get())
        .ok()
        .filter(|needed| *needed <= ENTRY_COUNT_MAX);
    let Some(needed) = needed else {
        return Ok(found);
    };
    let enough = raw.entry_count >= needed && raw.entry_count <= ENTRY_COUNT_MAX;
    let right = of(needed);
    if (enough && fits(&found)) || !fits(&right) {
        return Ok(found);
    }
    Ok(right)
}

/// The header as it should be. `layout` is what [`count_entries`] gave, `evidence` what the entries
/// of that layout say.
pub fn normalise(
    raw: &RawHeader,
    layout: &Layout,
    evidence: &Evidence,
    file_len: FileOffset,
) -> Result<Normal, HeaderError> {
    let mut raw = *raw;
    let mut fixes = Vec::new();
    if raw.disk_type != TYPE {
        let from = raw.disk_type;
        fixes.push(HeaderFix::Type { from });
        raw.disk_type = TYPE;
    }
    if raw.entry_count != layout.entry_count() {
        let (from, to) = (raw.entry_count, layout.entry_count());
        fixes.push(HeaderFix::EntryCount { from, to });
        raw.entry_count = to;
    }
    if let Some(to) = first_block(&raw, layout, evidence, file_len) {
        let from = raw.first_block;
        fixes.push(HeaderFix::FirstBlock { from, to });
        raw.first_block = to;
    }
    let header = Header::validate(&raw, file_len)?;
    Ok(Normal { header, fixes })
}

/// What `m_FirstBlockOffset` should be, where it should be something else.
fn first_block(
    raw: &RawHeader,
    layout: &Layout,
    evidence: &Evidence,
    file_len: FileOffset,
) -> Option<u32> {
    let cluster = layout.cluster();
    let minimum = cluster.count_for(layout.table_end().get()).get();
    let minimum = minimum.checked_mul(cluster.bytes())?;
    let found = layout.data_start().get();
    let on_border = found.rem_euclid(cluster.bytes()) == 0 && raw.first_block != 0;
    let good = on_border && found >= minimum && found <= file_len.get().max(minimum);
    // Of the field and the entries one is wrong, and mending the field loses nothing.
    let half = evidence.plausible.saturating_sub(evidence.before_first);
    let contradicted = evidence.before_first > 0 && evidence.before_first >= half;
    if good && !contradicted {
        return None;
    }
    // In version 1 clusters may be aligned to the first block rather than to the file's start:
    // such an image is old, not broken.
    let sectors = layout.table_end().get().next_multiple_of(SECTOR);
    let relative = layout.version() == Version::V1
        && !on_border
        && found <= file_len.get().max(sectors)
        && found >= layout.table_end().get()
        && found <= file_len.get()
        && evidence.aligned.saturating_mul(2) <= evidence.plausible;
    if relative {
        return None;
    }
    let wanted = if found > file_len.get() {
        minimum
    } else {
        let up = cluster
            .count_for(found)
            .get()
            .checked_mul(cluster.bytes())?;
        up.min(evidence.lowest.unwrap_or(up)).max(minimum)
    };
    // What can be read now would end up inside the table, and be cleared with it.
    if evidence.lowest_readable.is_some_and(|at| at < wanted) {
        return None;
    }
    let to = u32::try_from(wanted.div_euclid(SECTOR)).ok()?;
    (to != raw.first_block).then_some(to)
}
