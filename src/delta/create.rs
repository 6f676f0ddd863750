//! Writes a new image file, which nobody else can know yet.
//!
//! While it is made the file has no header, so that what an interruption leaves of it passes for no
//! image. Order, and what each reordering would break:
//!
//! 1. the clusters, in any order and from any number of threads, each at a place of its own;
//! 2. the table, then the file's length;
//! 3. the header: written sooner, a file whose table is half there would pass for an image;
//! 4. sync. The caller gives the file its name after that, and not before: the name could become
//!    durable first, and lead to a file without content.
//!
//! The header's cluster is written whole. So is all of the table, zeros included, unless it is very
//! large: ploop 1.15 refuses images on ext4 that have holes anywhere before their end.

use crate::error::{Error, ErrorKind, Result};
use crate::format::chs::Chs;
use crate::format::header::{
    ENTRY_COUNT_MAX, FLAG_EMPTY, HEADER_LEN, RawHeader, TYPE, Version, WRITE_CLUSTER_SECTORS_MAX,
};
use crate::format::layout::{BAT_PAGE_SLOTS, HEADER_SLOTS, Layout};
use crate::storage::SharedStorage;
use crate::units::{ClusterSize, DiskCluster, FileCluster, FileOffset, SectorCount};
use crate::units::{len_u64, len_usize};
use parking_lot::Mutex;
use std::collections::BTreeMap;

/// Fewest sectors of a cluster that every program takes (32 KiB); the most is
/// [`WRITE_CLUSTER_SECTORS_MAX`].
pub const CLUSTER_SECTORS_MIN: u64 = 64;
/// Bytes of the table that are written at once.
const STEP: u64 = 1 << 20;
/// Tables up to here are written whole.
const WHOLE_TABLE_MAX: u64 = 128 << 20;

/// What an image is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The unit of its entries.
    pub version: Version,
    /// Its clusters.
    pub cluster: ClusterSize,
    /// The disk.
    pub size: SectorCount,
}

fn impossible(why: String, fix: &str) -> Error {
    Error::why(ErrorKind::Usage, why).fix(fix)
}

impl Shape {
    /// Where table and data lie, with the first block as early as it can be: other programs refuse
    /// a later one. Fails for what an image cannot be.
    pub fn layout(&self) -> Result<Layout> {
        let cluster = self.cluster.sectors().get();
        if !self.cluster.is_power_of_two()
            || !(CLUSTER_SECTORS_MIN..=WRITE_CLUSTER_SECTORS_MAX).contains(&cluster)
        {
            let why = format!("{} bytes are no size of a cluster", self.cluster.bytes());
            let fix = "use a power of two from 32K to 64M; 1M is what all programs expect";
            return Err(impossible(why, fix));
        }
        self.layout_of_any_cluster()
    }

    /// The same for an image over others, whose clusters may have a size that nobody would choose.
    pub fn layout_of_any_cluster(&self) -> Result<Layout> {
        let cluster = self.cluster.sectors().get();
        let sectors = self.size.get();
        if cluster % 8 != 0 || cluster > WRITE_CLUSTER_SECTORS_MAX {
            let why = format!("clusters of {} bytes are only read", self.cluster.bytes());
            return Err(impossible(why, "convert the disk to one of other clusters"));
        }
        if sectors == 0 {
            return Err(impossible("a disk of no bytes".into(), "name a size"));
        }
        let entries = u32::try_from(sectors.div_ceil(cluster)).ok();
        let entries = entries.filter(|entries| *entries <= ENTRY_COUNT_MAX);
        let Some(entries) = entries else {
            let why = format!("a disk of {sectors} sectors has more clusters than a table can");
            return Err(impossible(why, "use larger clusters, or a smaller disk"));
        };
        let table = Layout::new(self.version, self.cluster, entries, 0).table_end();
        let first = self.cluster.count_for(table.get()).get() * cluster;
        let end = first + u64::from(entries) * cluster;
        // The last cluster must be within reach wherever it lies in the file.
        if self.version == Version::V1 && end - cluster > u64::from(u32::MAX) {
            let why = format!("a disk of {sectors} sectors is too large for a version 1 image");
            return Err(impossible(
                why,
                "version 1 ends below 2 TiB: use version 2, or a smaller disk",
            ));
        }
        match (u32::try_from(first), SectorCount::new(end).bytes()) {
            (Ok(first), Some(bytes)) if i64::try_from(bytes).is_ok() => {
                Ok(Layout::new(self.version, self.cluster, entries, first))
            }
            _ => {
                let why = format!("a disk of {sectors} sectors is larger than a file can be");
                Err(impossible(why, "use a smaller disk"))
            }
        }
    }
}

/// Which clusters have a place.
#[derive(Debug)]
enum Table {
    /// Those that were given one, by page of the table.
    Given {
        pages: BTreeMap<u32, Box<[u32; BAT_PAGE_SLOTS]>>,
        next: u64,
    },
    /// All, in the order of the disk.
    All,
}

/// An image that is being made.
#[derive(Debug)]
pub struct NewImage {
    storage: SharedStorage,
    shape: Shape,
    layout: Layout,
    table: Mutex<Table>,
}

impl NewImage {
    /// Begins an image in an empty file; writes nothing yet.
    pub fn expanding(storage: SharedStorage, shape: &Shape) -> Result<Self> {
        Self::laid_out(storage, shape, shape.layout()?)
    }

    /// The same over other images, whatever the size of their clusters is.
    pub fn over_others(storage: SharedStorage, shape: &Shape) -> Result<Self> {
        Self::laid_out(storage, shape, shape.layout_of_any_cluster()?)
    }

    fn laid_out(storage: SharedStorage, shape: &Shape, layout: Layout) -> Result<Self> {
        let next = layout.first_cluster().get();
        let pages = BTreeMap::new();
        Ok(Self {
            storage,
            shape: *shape,
            layout,
            table: Mutex::new(Table::Given { pages, next }),
        })
    }

    /// The same with a place and the host's blocks for every cluster.
    pub fn preallocated(storage: SharedStorage, shape: &Shape) -> Result<Self> {
        let mut this = Self::expanding(storage, shape)?;
        this.table = Mutex::new(Table::All);
        this.storage.allocate(FileOffset::ZERO..this.end())?;
        Ok(this)
    }

    /// The file.
    #[must_use]
    pub fn storage(&self) -> &SharedStorage {
        &self.storage
    }

    /// Where table and data lie.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Where the file ends, as far as places have been given.
    #[must_use]
    pub fn end(&self) -> FileOffset {
        let end = match &*self.table.lock() {
            Table::Given { next, .. } => *next,
            Table::All => self.layout.first_cluster().get() + u64::from(self.layout.entry_count()),
        };
        self.layout.cluster().file_start(FileCluster::new(end))
    }

    /// The place in the file for a cluster of the disk: a new one, unless it has one already. Where
    /// it is new the bytes there are zeros.
    pub fn place(&self, cluster: DiskCluster) -> Result<FileOffset> {
        if cluster.get() >= u64::from(self.layout.entry_count()) {
            return Err(Error::new(ErrorKind::OutOfRange).at_cluster(cluster));
        }
        let size = self.layout.cluster();
        let (page, slot) = Layout::page_of(cluster);
        let place = match &mut *self.table.lock() {
            Table::All => self.layout.first_cluster().get() + cluster.get(),
            Table::Given { pages, next } => {
                let empty = || Box::new([0; BAT_PAGE_SLOTS]);
                let entry = &mut pages.entry(page.0).or_insert_with(empty)[slot];
                if *entry == 0 {
                    *entry = self.entry(*next)?;
                    *next += 1;
                }
                return Ok(self.layout.entry_start(*entry));
            }
        };
        Ok(size.file_start(FileCluster::new(place)))
    }

    fn entry(&self, place: u64) -> Result<u32> {
        let entry = self.layout.entry_for(FileCluster::new(place));
        // No place is farther off than those that the shape was checked for.
        entry.ok_or_else(|| Error::errno(libc::EFBIG))
    }

    /// Completes the image and makes it durable (steps 2 to 4).
    pub fn finish(self) -> Result<()> {
        self.write_table()?;
        if self.storage.len()? != self.end() {
            self.storage.set_len(self.end())?;
        }
        let header = self.header().encode();
        self.storage.write_at(FileOffset::ZERO, &header)?;
        self.storage.sync_data()
    }

    fn header(&self) -> RawHeader {
        let chs = Chs::of(self.shape.size);
        let sectors = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
        let is_empty = match &*self.table.lock() {
            Table::Given { pages, .. } => pages.is_empty(),
            Table::All => false,
        };
        RawHeader {
            magic: self.shape.version.magic(),
            disk_type: TYPE,
            heads: chs.heads,
            cylinders: chs.header_cylinders(),
            cluster_sectors: sectors(self.shape.cluster.sectors().get()),
            entry_count: self.layout.entry_count(),
            size_in_sectors: self.shape.size.get(),
            in_use: 0,
            first_block: sectors(self.layout.first_block().get()),
            flags: if is_empty { FLAG_EMPTY } else { 0 },
            extension: 0,
        }
    }

    /// Everything before the first block but the header, in steps.
    fn write_table(&self) -> Result<()> {
        let end = self.layout.data_start().get();
        let cluster = self.layout.cluster().bytes();
        let whole = if end <= WHOLE_TABLE_MAX { end } else { cluster };
        let step = len_usize(STEP.min(cluster)).unwrap_or(0);
        let mut bytes = vec![0; step];
        let mut at = 0;
        while at < end {
            let is_empty = self.fill(at, &mut bytes)?;
            if at < whole || !is_empty {
                let from = if at == 0 { HEADER_LEN } else { 0 };
                let start = FileOffset::new(at + len_u64(from));
                self.storage.write_at(start, &bytes[from..])?;
            }
            at += len_u64(step);
        }
        Ok(())
    }

    /// The bytes of the table from `at` on, with zeros for the header. True where all are zero.
    fn fill(&self, at: u64, bytes: &mut [u8]) -> Result<bool> {
        let first = at / 4;
        let mut is_empty = true;
        let table = self.table.lock();
        let slots = BAT_PAGE_SLOTS * 4;
        for (number, page) in bytes.chunks_mut(slots).enumerate() {
            page.fill(0);
            let slot = first + len_u64(number * BAT_PAGE_SLOTS);
            match &*table {
                Table::Given { pages, .. } => {
                    let index = u32::try_from(slot / len_u64(BAT_PAGE_SLOTS)).unwrap_or(u32::MAX);
                    if let Some(entries) = pages.get(&index) {
                        is_empty = false;
                        for (to, entry) in page.chunks_mut(4).zip(entries.iter()) {
                            to.copy_from_slice(&entry.to_le_bytes());
                        }
                    }
                }
                Table::All => {
                    is_empty = false;
                    let place = self.layout.first_cluster().get();
                    for (to, slot) in page.chunks_mut(4).zip(slot..) {
                        let cluster = slot.checked_sub(len_u64(HEADER_SLOTS));
                        let last = u64::from(self.layout.entry_count());
                        if let Some(cluster) = cluster.filter(|cluster| *cluster < last) {
                            to.copy_from_slice(&self.entry(place + cluster)?.to_le_bytes());
                        }
                    }
                }
            }
        }
        Ok(is_empty)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delta::image::Image;
    use crate::delta::survey::survey;
    use crate::format::layout::BAT_PAGE_LEN;
    use crate::storage::Storage;
    use crate::storage::mem::MemStorage;
    use std::path::Path;
    use std::sync::Arc;

    fn shape(version: Version, cluster: u32, sectors: u64) -> Shape {
        Shape {
            version,
            cluster: ClusterSize::from_sectors(cluster).unwrap(),
            size: SectorCount::new(sectors),
        }
    }

    #[test]
    fn impossible_images_are_refused_before_anything_is_written() {
        for (version, cluster, sectors, good) in [
            (Version::V2, 64, 1, true),
            (Version::V2, 64, 0, false),
            (Version::V2, 32, 640, false),
            (Version::V2, 96, 960, false),
            (Version::V2, 131_072, 1 << 30, true),
            (Version::V2, 262_144, 1 << 30, false),
            (Version::V2, 64, 64 * ((1 << 29) - 1), true),
            (Version::V2, 64, 64 * (1 << 29), false),
            (Version::V2, 2048, u64::MAX, false),
            (Version::V1, 2048, 2048 * 2_097_000, true),
            // The table takes nine clusters.
            (Version::V1, 2048, 2048 * (2_097_152 - 9), true),
            (Version::V1, 2048, 2048 * (2_097_152 - 8), false),
        ] {
            let shape = shape(version, cluster, sectors);
            let layout = shape.layout();
            assert_eq!(layout.is_ok(), good, "{shape:?}");
            if let Err(e) = layout {
                assert_eq!(e.kind(), ErrorKind::Usage);
                assert!(e.fix_text().is_some());
            }
        }
    }

    fn image(storage: &Arc<MemStorage>) -> Image {
        let image = Image::expanding(Path::new("x"), Arc::<MemStorage>::clone(storage));
        image.unwrap()
    }

    #[test]
    fn what_is_made_is_a_sound_image() {
        for version in [Version::V1, Version::V2] {
            for (cluster, sectors) in [(64, 640), (64, 1_100_000), (2048, 20_481), (64, 1)] {
                let shape = shape(version, cluster, sectors);
                for all in [false, true] {
                    let storage = Arc::new(MemStorage::default());
                    let new = if all {
                        NewImage::preallocated(storage.clone(), &shape)
                    } else {
                        NewImage::expanding(storage.clone(), &shape)
                    };
                    new.unwrap().finish().unwrap();
                    let image = image(&storage);
                    let header = image.header().unwrap();
                    assert_eq!(header.write_refusal(), None);
                    assert_eq!(header.size().get(), sectors);
                    assert_eq!(header.raw().flags, u32::from(!all));
                    let found = survey(&image, header).unwrap();
                    let clusters = sectors.div_ceil(cluster.into());
                    assert_eq!(found.mapped, if all { clusters } else { 0 });
                    let blocks = header.layout().first_cluster().get() + found.mapped;
                    let len = storage.len().unwrap().get();
                    assert_eq!(len, blocks * header.layout().cluster().bytes());
                }
            }
        }
    }

    #[test]
    fn places_are_given_once_and_in_order() {
        let storage = Arc::new(MemStorage::default());
        let new = NewImage::expanding(storage.clone(), &shape(Version::V1, 64, 640_000)).unwrap();
        let first = new.layout().data_start().get();
        for (cluster, place) in [(9999, 0), (0, 1), (1007, 2), (1008, 3), (0, 1)] {
            let found = new.place(DiskCluster::new(cluster)).unwrap();
            assert_eq!(found.get(), first + place * 32_768);
        }
        assert!(new.place(DiskCluster::new(10_000)).is_err());
        new.storage()
            .write_at(FileOffset::new(first), &[5; 32_768])
            .unwrap();
        new.finish().unwrap();
        let image = image(&storage);
        assert_eq!(storage.len().unwrap().get(), first + 4 * 32_768);
        assert_eq!(image.header().unwrap().raw().flags, 0);
        let mut page = [0; BAT_PAGE_LEN];
        let (index, slot) = Layout::page_of(DiskCluster::new(9999));
        image.read_bat_page(index, &mut page).unwrap();
        let entry = u32::from_le_bytes(*page[4 * slot..].first_chunk().unwrap());
        assert_eq!(u64::from(entry) * 512, first);
    }

    #[test]
    fn an_unfinished_image_has_no_header() {
        let storage = Arc::new(MemStorage::default());
        let new = NewImage::preallocated(storage.clone(), &shape(Version::V2, 64, 640)).unwrap();
        new.place(DiskCluster::new(3)).unwrap();
        new.write_table().unwrap();
        assert_eq!(Version::of(&storage.to_vec()), None);
    }
}
