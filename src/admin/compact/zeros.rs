//! Clusters that hold nothing but zeros.
//!
//! The host is asked once for what it has blocks for, from the first cluster to the end of the
//! file: asked for each cluster, some walk to the end of the blocks each time.

use crate::admin::check;
use crate::admin::progress::Progress;
use crate::admin::relocate::{Sound, first_data_of, next_blocks};
use crate::delta::bits::BitSet;
use crate::delta::classify::Used;
use crate::delta::image::{Image, Kind};
use crate::delta::walk;
use crate::error::Result;
use crate::format::layout::{BAT_PAGE_LEN, Layout, PageIndex};
use crate::storage::Storage;
use crate::units::DiskCluster;
use std::ops::Range;

/// Ranges that are kept, 16 bytes each; of what is behind them the host is asked again.
const RANGES_MAX: usize = 1 << 20;

/// What the host has blocks for, in a file that nobody changes.
struct Blocks<'a> {
    storage: &'a dyn Storage,
    ranges: Vec<Range<u64>>,
    /// All ranges before this are kept.
    end: u64,
}

impl<'a> Blocks<'a> {
    fn from(storage: &'a dyn Storage, start: u64, progress: &Progress) -> Result<Self> {
        let (mut ranges, mut end) = (Vec::new(), start);
        while ranges.len() < RANGES_MAX {
            progress.check()?;
            let Some(found) = next_blocks(storage, end)? else {
                end = u64::MAX;
                break;
            };
            end = found.end.max(end + 1);
            ranges.push(found);
        }
        Ok(Self {
            storage,
            ranges,
            end,
        })
    }

    /// The next range at or after a place.
    fn next(&self, at: u64) -> Result<Option<Range<u64>>> {
        let number = self.ranges.partition_point(|range| range.end <= at);
        match self.ranges.get(number) {
            Some(range) => Ok(Some(range.start.max(at)..range.end)),
            None if self.end == u64::MAX => Ok(None),
            None => next_blocks(self.storage, at.max(self.end)),
        }
    }
}

/// What was found.
#[derive(Debug)]
pub(super) struct Found {
    /// Disk clusters whose entries can become 0.
    pub(super) freed: BitSet,
    /// Bytes of the file that can be punched.
    pub(super) punched: Vec<Range<u64>>,
}

impl Found {
    /// Nothing.
    pub(super) fn new(sound: &Sound) -> Result<Self> {
        let entries = sound.header.layout().entry_count();
        Ok(Self {
            freed: BitSet::new(entries.into())?,
            punched: Vec::new(),
        })
    }
}

/// Finds them, and leaves in `sound` what will be named when they are freed.
pub(super) fn find(
    storage: &dyn Storage,
    sound: &mut Sound,
    lower: &[Image],
    progress: &Progress,
) -> Result<Found> {
    let mut found = Found::new(sound)?;
    let layout = *sound.header.layout();
    let (size, disk_len) = (layout.cluster().bytes(), sound.header.size_bytes());
    let (grid, mut below) = (sound.space.grid, Below::new(lower, size));
    let mut named = Used::new(sound.space.limit)?;
    progress.step("reading", sound.mapped().saturating_mul(size));
    let blocks = Blocks::from(storage, grid.start(sound.first()), progress)?;
    walk::words(storage, layout.table_end(), |at, bytes| {
        progress.check()?;
        check::entries(at, bytes, &layout, |cluster, word| {
            let Some(cluster) = cluster.filter(|_| word != 0) else {
                return Ok(());
            };
            progress.add(size);
            let start = layout.entry_start(word).get();
            // What the disk's end cuts off shows nothing.
            let shown = disk_len
                .saturating_sub(cluster.saturating_mul(size))
                .min(size);
            let first = first_data_of(storage, start..start + shown, |at| blocks.next(at))?;
            let is_zero = first.is_none();
            if is_zero && !below.has(DiskCluster::new(cluster))? {
                found.freed.insert(cluster);
                return Ok(());
            }
            if is_zero
                && blocks
                    .next(start)?
                    .is_some_and(|next| next.start < start + shown)
            {
                found.punched.push(start..start + shown);
            }
            if let Some(number) = grid.number(start) {
                named.insert(number)?;
            }
            Ok(())
        })
    })?;
    sound.space.named = named;
    sound.checked.facts.table.mapped -= found.freed.len();
    Ok(found)
}

/// Sets entries to 0.
pub(super) fn free(storage: &dyn Storage, clusters: &BitSet) -> Result<()> {
    let mut next = clusters.first_from(0);
    while let Some(cluster) = next {
        let at = Layout::entry_offset(DiskCluster::new(cluster));
        storage.write_at(at, &[0; 4])?;
        next = clusters.first_from(cluster + 1);
    }
    Ok(())
}

/// The levels below, asked in disk order.
struct Below<'a> {
    cluster_bytes: u64,
    levels: Vec<Level<'a>>,
}

/// One of them, and the page of its table that was asked for last.
struct Level<'a> {
    image: &'a Image,
    page: Option<PageIndex>,
    bytes: Box<[u8; BAT_PAGE_LEN]>,
}

impl<'a> Below<'a> {
    fn new(lower: &'a [Image], cluster_bytes: u64) -> Self {
        let level = |image| Level {
            image,
            page: None,
            bytes: Box::new([0; BAT_PAGE_LEN]),
        };
        Self {
            cluster_bytes,
            levels: lower.iter().map(level).collect(),
        }
    }

    /// True where a level has something for the cluster, be it zeros.
    fn has(&mut self, cluster: DiskCluster) -> Result<bool> {
        for level in &mut self.levels {
            let image = level.image;
            if cluster.get().saturating_mul(self.cluster_bytes) >= image.disk_len() {
                continue;
            }
            let Kind::Expanding(header) = image.kind() else {
                return Ok(true);
            };
            if cluster.get() >= header.layout().entry_count().into() {
                continue;
            }
            let (wanted, slot) = Layout::page_of(cluster);
            if level.page != Some(wanted) {
                image.read_bat_page(wanted, &mut level.bytes)?;
                level.page = Some(wanted);
            }
            if level.bytes[4 * slot..4 * slot + 4] != [0; 4] {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Request, plan_image};
    use super::*;
    use crate::delta::create::{NewImage, Shape};
    use crate::format::header::Version;
    use crate::storage::mem::MemStorage;
    use crate::storage::{FileId, Keep, SharedStorage};
    use crate::units::{ClusterSize, FileOffset, SectorCount};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Counts how often the host is asked where its blocks are.
    #[derive(Debug)]
    struct Counting(SharedStorage, AtomicU64);

    impl Storage for Counting {
        fn len(&self) -> Result<FileOffset> {
            self.0.len()
        }
        fn read_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<()> {
            self.0.read_at(at, buf)
        }
        fn write_at(&self, at: FileOffset, buf: &[u8]) -> Result<()> {
            self.0.write_at(at, buf)
        }
        fn sync_data(&self) -> Result<()> {
            Ok(())
        }
        fn set_len(&self, len: FileOffset) -> Result<()> {
            self.0.set_len(len)
        }
        fn allocate(&self, range: Range<FileOffset>) -> Result<()> {
            self.0.allocate(range)
        }
        fn zero(&self, range: Range<FileOffset>, keep: Keep) -> Result<()> {
            self.0.zero(range, keep)
        }
        fn copy_from(&self, _: FileOffset, _: &dyn Storage, _: Range<FileOffset>) -> Result<bool> {
            Ok(false)
        }
        fn next_data(&self, from: FileOffset) -> Result<Option<Range<FileOffset>>> {
            self.1.fetch_add(1, Ordering::Relaxed);
            self.0.next_data(from)
        }
        fn allocated_bytes(&self) -> Result<u64> {
            self.0.allocated_bytes()
        }
        fn drop_cache(&self) -> Result<()> {
            Ok(())
        }
        fn file_id(&self) -> Option<FileId> {
            None
        }
    }

    #[test]
    fn the_host_is_asked_for_ranges_not_for_clusters() {
        const CLUSTERS: u64 = 200;
        let cluster = ClusterSize::from_sectors(64).unwrap();
        let shape = Shape {
            version: Version::V2,
            cluster,
            size: SectorCount::new(64 * CLUSTERS),
        };
        let file: SharedStorage = Arc::new(MemStorage::new(Vec::new()));
        let new = NewImage::expanding(Arc::clone(&file), &shape).unwrap();
        let data = vec![7; usize::try_from(cluster.bytes()).unwrap()];
        for number in 0..CLUSTERS {
            let at = new.place(DiskCluster::new(number)).unwrap();
            let bytes = if number % 4 == 0 {
                vec![0; data.len()]
            } else {
                data.clone()
            };
            file.write_at(at, &bytes).unwrap();
        }
        new.finish().unwrap();
        let counting = Counting(file, AtomicU64::new(0));
        let request = Request {
            zeroes: true,
            ..Request::default()
        };
        let planned = plan_image(&counting, &[], &request, &Progress::default()).unwrap();
        assert_eq!(planned.freed, CLUSTERS / 4);
        let asked = counting.1.load(Ordering::Relaxed);
        assert!(asked < 20, "asked {asked} times for {CLUSTERS} clusters");
    }

    /// What is kept of the host's answers says the same as the host.
    #[test]
    fn blocks_are_those_of_the_host() {
        let file = tempfile::tempfile().unwrap();
        let storage = crate::storage::file::FileStorage::new(file).unwrap();
        let at = FileOffset::new;
        storage.set_len(at(1 << 20)).unwrap();
        for place in [0, 5, 6, 90, 200] {
            storage.write_at(at(place * 4096), &[1; 4096]).unwrap();
        }
        let blocks = Blocks::from(&storage, 4096, &Progress::default()).unwrap();
        let few = Blocks {
            storage: &storage,
            ranges: blocks.ranges[..1].to_vec(),
            end: blocks.ranges[0].end,
        };
        for place in (4096..1 << 20).step_by(1000) {
            let host = next_blocks(&storage, place).unwrap();
            assert_eq!(blocks.next(place).unwrap(), host, "{place}");
            assert_eq!(few.next(place).unwrap(), host, "{place}");
        }
    }
}
