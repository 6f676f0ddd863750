//! Where the disk has data and where it has holes, answered from the map.
//!
//! A cluster that a level maps counts as data, even one that only masks lower content with zeros.
//! Of a plain file the host's own holes are told, as far as it knows them.

use super::Disk;
use super::part::Part;
use crate::error::{Error, ErrorKind, Result};
use crate::format::layout::{BAT_PAGE_LEN, Layout, PageIndex};
use crate::plan::{Lookup, State};
use crate::units::{DiskCluster, DiskOffset, FileOffset, Level, len_u64};

/// Pages of a hole in the table that are passed over at a time.
const HOLE_PAGES: u32 = 4096;

/// What is at a position, and up to where the same holds at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) is_data: bool,
    pub(super) end: u64,
}

impl Disk {
    /// The first data at or after `at`; `None` when only zeros follow.
    pub fn seek_data(&self, at: DiskOffset) -> Result<Option<DiskOffset>> {
        self.seek(at, true)
    }

    /// The first hole at or after `at`; the end of the disk counts as one.
    pub fn seek_hole(&self, at: DiskOffset) -> Result<DiskOffset> {
        Ok(self
            .seek(at, false)?
            .unwrap_or(DiskOffset::new(self.size_bytes())))
    }

    fn seek(&self, at: DiskOffset, data: bool) -> Result<Option<DiskOffset>> {
        if at.get() >= self.size_bytes() {
            return Err(Error::new(ErrorKind::OutOfRange));
        }
        let parts = self.parts();
        let (first, within) = Self::locate(&parts, at);
        let mut from = within.get();
        for part in &parts[first..] {
            while from < part.disk_len() {
                let extent = self.extent(part, from, true)?;
                if extent.is_data == data {
                    return Ok(Some(DiskOffset::new(part.start + from)));
                }
                from = extent.end;
            }
            from = 0;
        }
        Ok(None)
    }

    /// What is at a position of a part. With `by_host` what the host says of a plain file counts,
    /// else all of it is data.
    pub(super) fn extent(&self, part: &Part, from: u64, by_host: bool) -> Result<Extent> {
        let geometry = part.chain.geometry();
        let (cluster, _) = geometry.cluster.split(DiskOffset::new(from));
        let (page, _) = Layout::page_of(cluster);
        // A plain file says all by itself, and nothing maps what is past the end of the table. A
        // walk by clusters would be as long as the disk is said to be, which may be for ever.
        let end = if page.index() >= part.map.page_count() {
            part.disk_len()
        } else {
            let next = DiskCluster::new(cluster.get() + 1);
            geometry.cluster.disk_start(next).get()
        };
        match part.view().look_up(cluster).state {
            State::Hole => Ok(Extent {
                is_data: false,
                end,
            }),
            State::At { level, start }
                if by_host && start.get() == from - from % geometry.cluster.bytes() =>
            {
                plain_extent(part, level, from, end)
            }
            State::At { .. } | State::Bad => Ok(Extent { is_data: true, end }),
            State::Missing(page) => {
                if let Some(end) = hole_without_loading(part, page)? {
                    return Ok(Extent {
                        is_data: false,
                        end,
                    });
                }
                // Held, so that it is still there when it is looked at.
                let _page = part.load(page, &self.counters)?;
                self.extent(part, from, by_host)
            }
        }
    }
}

/// The host's word on a plain file, from `from` on, for a range that ends at `end`.
fn plain_extent(part: &Part, level: Level, from: u64, end: u64) -> Result<Extent> {
    let image = part.chain.level(level);
    if image.layout().is_some() {
        return Ok(Extent { is_data: true, end });
    }
    Ok(match image.storage().next_data(FileOffset::new(from))? {
        Some(data) if data.start.get() <= from => Extent {
            is_data: true,
            end: data.end.get().max(from + 1),
        },
        Some(data) => Extent {
            is_data: false,
            end: data.start.get().min(end),
        },
        None => Extent {
            is_data: false,
            end,
        },
    })
}

/// The end of the disk range of a page that no level's file has any blocks for, so that it holds
/// no entry: a fresh table of millions of pages is passed over without reading it.
///
/// Which pages are in memory is looked at before the files are. The other way round, a page with
/// changes could be written and leave memory in between, and its data would be passed over.
fn hole_without_loading(part: &Part, page: PageIndex) -> Result<Option<u64>> {
    let start = u64::from(page.0) * len_u64(BAT_PAGE_LEN);
    let count = u32::try_from(part.map.page_count()).unwrap_or(u32::MAX);
    let last = count.min(page.0.saturating_add(HOLE_PAGES));
    let absent = (page.0.saturating_add(1)..last)
        .take_while(|next| part.map.get(PageIndex(*next)).is_none())
        .last()
        .unwrap_or(page.0);
    let mut hole_end = u64::MAX;
    for image in part.chain.levels() {
        let Some(layout) = image.layout() else {
            return Ok(None);
        };
        if page.0 >= layout.page_count() {
            continue;
        }
        match image.storage().next_data(FileOffset::new(start))? {
            Some(data) if data.start.get() < start + len_u64(BAT_PAGE_LEN) => return Ok(None),
            Some(data) => hole_end = hole_end.min(data.start.get()),
            None => hole_end = hole_end.min(layout.table_end().get()),
        }
    }
    let pages = u32::try_from(hole_end / len_u64(BAT_PAGE_LEN)).unwrap_or(u32::MAX);
    let end = absent
        .saturating_add(1)
        .min(pages)
        .max(page.0.saturating_add(1));
    let next = Layout::cluster_of(PageIndex(end), 0);
    let cluster = part.chain.geometry().cluster;
    Ok(next.map(|next| cluster.disk_start(next).get()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::bundle::{OpenedFile, OpenedImages, OpenedPart, Plain};
    use crate::disk::{DiskOptions, open};
    use crate::format::header::{MAGIC_V2, RawHeader};
    use crate::storage::mem::MemStorage;
    use crate::units::SectorCount;
    use std::path::PathBuf;
    use std::sync::Arc;

    /// Sectors of a disk that is as long as a disk can be, nearly.
    const ENDLESS: u64 = 1 << 53;
    /// Sectors that three clusters do not cover, but by more than half.
    const TOO_LONG: u64 = 40;

    fn disk(bytes: Vec<u8>, plain: Plain, sectors: u64) -> Arc<Disk> {
        let file = OpenedFile {
            path: PathBuf::from("x.hds"),
            storage: Arc::new(MemStorage::new(bytes)),
            plain,
            guid: None,
        };
        let part = OpenedPart {
            start: SectorCount::ZERO,
            end: Some(SectorCount::new(sectors)),
            blocksize: None,
            files: vec![file],
        };
        let images = Arc::new(OpenedImages::from_parts(PathBuf::from("x"), vec![part]));
        let options = DiskOptions {
            read_only: true,
            ..DiskOptions::default()
        };
        open(images, &options).unwrap().0
    }

    fn assert_data_is_first_cluster_only(disk: &Disk) {
        let at = DiskOffset::new;
        assert_eq!(disk.seek_data(at(7)).unwrap(), Some(at(7)));
        assert_eq!(disk.seek_hole(at(7)).unwrap(), at(4096));
        assert_eq!(disk.seek_data(at(4096)).unwrap(), None);
        let late = disk.size_bytes() - 512;
        assert_eq!(disk.seek_data(at(late)).unwrap(), None);
        assert_eq!(disk.seek_hole(at(late)).unwrap(), at(late));
    }

    #[test]
    fn what_is_past_the_table_is_a_hole() {
        let raw = RawHeader {
            magic: MAGIC_V2,
            disk_type: 2,
            heads: 0,
            cylinders: 0,
            cluster_sectors: 8,
            entry_count: 3,
            size_in_sectors: TOO_LONG,
            in_use: 0,
            first_block: 8,
            flags: 0,
            extension: 0,
        };
        let mut bytes = vec![0; 2 * 4096];
        bytes[..64].copy_from_slice(&raw.encode());
        bytes[64] = 1;
        assert_data_is_first_cluster_only(&disk(bytes, Plain::No, TOO_LONG));
    }

    #[test]
    fn what_is_past_a_plain_file_is_one_hole_however_long() {
        assert_data_is_first_cluster_only(&disk(vec![1; 4096], Plain::Yes, ENDLESS));
    }
}
