//! Clusters that hold nothing but zeros.

use crate::admin::check;
use crate::admin::progress::Progress;
use crate::admin::relocate::{Sound, first_data};
use crate::delta::bits::BitSet;
use crate::delta::classify::Used;
use crate::delta::image::{Image, Kind};
use crate::delta::walk;
use crate::error::Result;
use crate::format::layout::{BAT_PAGE_LEN, Layout, PageIndex};
use crate::storage::Storage;
use crate::units::{DiskCluster, FileOffset};
use std::ops::Range;

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
            let is_zero = first_data(storage, start..start + shown)?.is_none();
            if is_zero && !below.has(DiskCluster::new(cluster))? {
                found.freed.insert(cluster);
                return Ok(());
            }
            if is_zero && has_blocks(storage, start..start + shown)? {
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

/// True where the host has blocks for the range.
fn has_blocks(storage: &dyn Storage, range: Range<u64>) -> Result<bool> {
    let data = storage.next_data(FileOffset::new(range.start))?;
    Ok(data.is_some_and(|data| data.start.get() < range.end))
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
