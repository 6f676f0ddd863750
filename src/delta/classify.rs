//! What each entry of a table is, told in one pass.
//!
//! Clusters are numbered on a [`Grid`]: from byte 0 of the file, as everywhere, but for old images
//! of version 1 whose clusters are aligned to the first block. The first entry that names a cluster
//! has it; whoever names it later shares it.

use super::bits::BitSet;
use crate::error::{Error, ErrorKind, Result};
use crate::format::bat::EntryError;
use crate::format::header::Version;
use crate::format::layout::Layout;
use crate::units::{FileCluster, FileOffset, SECTOR};
use std::collections::HashSet;
use std::ops::Range;

/// The most clusters beyond the limit, as another program's shrinking of a disk leaves some. They
/// are kept one by one, so their number must not be the image's to choose.
const BEYOND_MAX: usize = 1 << 20;

/// Where clusters may lie in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    version: Version,
    base: u64,
    bytes: u64,
}

impl Grid {
    /// The grid of an image.
    #[must_use]
    pub fn new(layout: &Layout) -> Self {
        let bytes = layout.cluster().bytes();
        let base = match layout.version() {
            Version::V1 => layout.data_start().get() % bytes,
            // Entries count clusters from byte 0 whatever the header says.
            Version::V2 => 0,
        };
        Self {
            version: layout.version(),
            base,
            bytes,
        }
    }

    /// First byte of a cluster.
    #[must_use]
    pub fn start(&self, number: u64) -> u64 {
        number.saturating_mul(self.bytes).saturating_add(self.base)
    }

    /// The cluster that begins at this byte, if one does.
    #[must_use]
    pub fn number(&self, start: u64) -> Option<u64> {
        let from_base = start.checked_sub(self.base)?;
        (from_base % self.bytes == 0).then_some(from_base / self.bytes)
    }

    /// The clusters that a range of bytes touches.
    #[must_use]
    pub fn touched(&self, bytes: Range<u64>) -> Range<u64> {
        let first = bytes.start.saturating_sub(self.base) / self.bytes;
        let end = bytes.end.saturating_sub(self.base).div_ceil(self.bytes);
        first..end
    }

    /// The first cluster that begins at or after this byte.
    #[must_use]
    pub fn first_from(&self, at: u64) -> u64 {
        at.saturating_sub(self.base).div_ceil(self.bytes)
    }

    /// The entry that names a cluster, or `None` where 32 bits cannot.
    #[must_use]
    pub fn entry(&self, number: u64) -> Option<u32> {
        let value = match self.version {
            Version::V1 => self.start(number) / SECTOR,
            Version::V2 => number,
        };
        u32::try_from(value).ok().filter(|entry| *entry != 0)
    }
}

/// A set of cluster numbers: bits below a limit that a sound image keeps to, the rest one by one.
#[derive(Clone, Debug)]
pub struct Used {
    bits: BitSet,
    beyond: HashSet<u64>,
    limit: u64,
}

impl Used {
    /// An empty set.
    pub fn new(limit: u64) -> Result<Self> {
        Ok(Self {
            bits: BitSet::new(limit)?,
            beyond: HashSet::new(),
            limit,
        })
    }

    /// Adds a number; `false` when it was there. An error when too many are beyond the limit.
    #[inline]
    pub fn insert(&mut self, number: u64) -> Result<bool> {
        if number < self.limit {
            return Ok(self.bits.insert(number));
        }
        if self.beyond.len() >= BEYOND_MAX && !self.beyond.contains(&number) {
            let why = format!(
                "more than {BEYOND_MAX} entries name clusters behind all that the table needs"
            );
            return Err(Error::why(ErrorKind::Unsupported, why)
                .fix("mount it read-only (`ploopfs mount -r`)"));
        }
        self.beyond
            .try_reserve(1)
            .map_err(|_| Error::errno(libc::ENOMEM))?;
        Ok(self.beyond.insert(number))
    }

    /// Adds a run of numbers if none is there and all are below the limit.
    pub fn insert_new(&mut self, run: Range<u64>) -> bool {
        self.bits.insert_new(run)
    }

    /// True for a member.
    #[must_use]
    pub fn contains(&self, number: u64) -> bool {
        if number < self.limit {
            self.bits.contains(number)
        } else {
            self.beyond.contains(&number)
        }
    }

    /// Calls `each` for every member, the lowest first.
    pub fn for_each(&self, mut each: impl FnMut(u64) -> Result<()>) -> Result<()> {
        let mut next = self.bits.first_from(0);
        while let Some(number) = next {
            each(number)?;
            next = self.bits.first_from(number + 1);
        }
        let mut beyond: Vec<u64> = self.beyond.iter().copied().collect();
        beyond.sort_unstable();
        beyond.into_iter().try_for_each(each)
    }

    /// The members below the limit.
    #[must_use]
    pub fn into_bits(self) -> BitSet {
        self.bits
    }
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// 0.
    Hole,
    /// It names a cluster of its own, wholly inside the file.
    Good(u64),
    /// It names a cluster of its own that the end of the file cuts.
    Cut(u64),
    /// It names a cluster that an earlier entry has.
    Shared(u64),
    /// It names bytes inside the file that begin on no cluster border.
    Misaligned,
    /// It names nothing.
    Bad(EntryError),
}

/// Tells entries apart, in disk order.
#[derive(Debug)]
pub struct Classifier<'a> {
    layout: &'a Layout,
    grid: Grid,
    file_len: FileOffset,
    limit: u64,
    /// Entries that are the numbers of clusters wholly inside the file.
    plain: Range<u64>,
    used: Used,
}

impl<'a> Classifier<'a> {
    /// Starts a pass over the table of a file of this length.
    pub fn new(layout: &'a Layout, file_len: FileOffset) -> Result<Self> {
        let limit = limit_of(layout);
        Ok(Self {
            layout,
            grid: Grid::new(layout),
            file_len,
            limit,
            plain: match layout.version() {
                Version::V1 => 0..0,
                Version::V2 => layout.good_entries(file_len),
            },
            used: Used::new(limit)?,
        })
    }

    /// The grid of the image.
    #[must_use]
    pub fn grid(&self) -> Grid {
        self.grid
    }

    /// One past the highest cluster that is ever handed out.
    #[must_use]
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// What the next entry is.
    #[inline]
    pub fn class(&mut self, entry: u32) -> Result<Class> {
        if entry == 0 {
            return Ok(Class::Hole);
        }
        // Nearly all entries of nearly all images: a table has millions, and this divides nothing.
        let value = u64::from(entry);
        if self.plain.contains(&value) {
            let is_new = self.used.insert(value)?;
            return Ok(if is_new {
                Class::Good(value)
            } else {
                Class::Shared(value)
            });
        }
        let checked = self.layout.check_entry(entry, self.file_len);
        let number = self.grid.number(self.layout.entry_start(entry).get());
        Ok(match (checked, number) {
            (Ok(()) | Err(EntryError::CutByEnd(_)), Some(number))
                if !self.used.insert(number)? =>
            {
                Class::Shared(number)
            }
            (Ok(()), Some(number)) => Class::Good(number),
            (Err(EntryError::CutByEnd(_)), Some(number)) => Class::Cut(number),
            (Ok(()), None) => Class::Misaligned,
            (Err(error), _) => Class::Bad(error),
        })
    }

    /// Takes a run of entries that count up by one, as a disk that was written in order has them.
    /// `false`, with nothing done, when they must be looked at one by one.
    pub fn take_run(&mut self, run: Range<u64>) -> bool {
        run.start >= self.plain.start && run.end <= self.plain.end && self.used.insert_new(run)
    }

    /// The clusters that entries name, once all have been seen.
    #[must_use]
    pub fn finish(self) -> Used {
        self.used
    }
}

/// One past the highest file cluster that may ever be handed out: the table and one cluster for
/// each entry, as far as an entry can name it.
fn limit_of(layout: &Layout) -> u64 {
    let first = layout.first_cluster().get();
    let wanted = first.saturating_add(layout.entry_count().into());
    if layout
        .entry_for(FileCluster::new(wanted.saturating_sub(1)))
        .is_some()
    {
        return wanted;
    }
    let unit = match layout.version() {
        Version::V1 => layout.cluster().sectors().get(),
        Version::V2 => 1,
    };
    u64::from(u32::MAX) / unit + 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::ClusterSize;

    /// Whatever an image's size, the last cluster that may be handed out has an entry of its own,
    /// and an entry is never that of another cluster.
    #[test]
    fn no_cluster_is_handed_out_that_an_entry_cannot_name() {
        let cases = [
            // 2 TiB in clusters of 1 MiB: the table pushes the last of them over the edge.
            (Version::V1, 2048, 1 << 21, 1 << 21),
            (Version::V1, 2048, (1 << 21) - 9, 1 << 21),
            (Version::V1, 2048, (1 << 21) - 10, (1 << 21) - 1),
            (Version::V1, 8, u32::MAX, 1 << 29),
            (Version::V1, 63, u32::MAX, 68_174_085),
            (Version::V2, 2048, u32::MAX, 1 << 32),
            (Version::V2, 8, u32::MAX - (1 << 22) + 4092, 1 << 32),
            (Version::V2, 8, u32::MAX - (1 << 22) + 4093, 1 << 32),
            (Version::V2, 8, 1000, 1001),
        ];
        for (version, sectors, entries, limit) in cases {
            let cluster = ClusterSize::from_sectors(sectors).unwrap();
            let table = cluster.count_for(64 + 4 * u64::from(entries)).get();
            let first_block = u32::try_from(table * u64::from(sectors)).unwrap();
            let layout = Layout::new(version, cluster, entries, first_block);
            let found = limit_of(&layout);
            let story = format!("{version:?}, {sectors} sectors, {entries} entries");
            assert_eq!(found, limit, "{story}");
            let last = FileCluster::new(found - 1);
            let entry = layout.entry_for(last).expect("the last one has an entry");
            assert_eq!(
                layout.entry_start(entry),
                cluster.file_start(last),
                "{story}"
            );
            let next = layout.entry_for(FileCluster::new(found));
            let is_enough = found == table + u64::from(entries);
            assert!(is_enough || next.is_none(), "{story}: {next:?}");
            for far in [1 << 32, u64::MAX / 4096, u64::MAX] {
                assert_eq!(layout.entry_for(FileCluster::new(far)), None, "{story}");
            }
        }
    }
}
