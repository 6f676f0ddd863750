//! From open, locked files to a disk that can be served.
//!
//! A read-only open reads the headers and nothing else; it costs the same for 16 TiB as for 16 MiB.
//! A read-write open makes sure of the image first, in this order:
//!
//! 1. sync the file. What a killed process wrote may be in the host's cache only; believing it and
//!    losing it later would give one cluster to two owners. If the in-use mark is set, or there is
//!    none because the file is plain, drop the cache too: after a failed sync it may hold what the
//!    medium does not;
//! 2. read header and table (again), through the locked descriptor;
//! 3. refuse what writing would make worse: invalid or shared entries, a dirty bitmap;
//! 4. mend what is harmless, if the mark is set or a bitmap is dropped: first make the mark durable
//!    (with extension offset 0), then cut or fill up the tail and clear slots after the last entry.
//!
//! A clean image is not changed by being opened: its mark is set before the first write.

use super::buffers::Buffers;
use super::flush::FlushState;
use super::flusher::Flusher;
use super::health::Health;
use super::part::Part;
use super::pool::{self, Spawn};
use super::stats::Counters;
use super::{Disk, DiskOptions};
use crate::chain::Chain;
use crate::chain::bundle::{OpenedImages, OpenedPart};
use crate::delta::alloc::Allocator;
use crate::delta::image::Image;
use crate::delta::in_use::InUseMark;
use crate::delta::survey::{Fault, Survey, survey};
use crate::error::{Error, ErrorKind, REPAIR_HINT, Result};
use crate::format::bat::EntryError;
use crate::format::extension::{self, Extension};
use crate::format::header::Header;
use crate::plan::RequestOrder;
use crate::planted::{Bug, planted};
use crate::storage::{Keep, Storage};
use crate::sync::{Condvar, Mutex};
use crate::units::{FileOffset, len_usize};
use arc_swap::ArcSwap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::time::Duration;

/// Bytes of map pages for a frozen view: people look into one, they do not work on it.
const VIEW_CACHE: u64 = 4 << 20;
/// The most table pages of all parts of a split disk: 16 TiB in clusters of 1 MiB.
const SPLIT_PAGES_MAX: u64 = 1 << 14;
/// Extensions in larger clusters than any writer makes are not read for a warning.
const EXTENSION_MAX: u64 = 64 << 20;

/// Threads and memory that several disks can share: a disk and its frozen views do.
#[derive(Clone, Debug)]
pub struct Resources {
    pub(super) pool: Arc<dyn Spawn>,
    pub(super) buffers: Arc<Buffers>,
}

impl Resources {
    /// These buffers with another pool.
    #[must_use]
    pub fn with_pool(&self, pool: Arc<dyn Spawn>) -> Self {
        Self {
            pool,
            buffers: Arc::clone(&self.buffers),
        }
    }

    /// A pool, and no buffers at all: every request is served where it arrives.
    #[must_use]
    pub fn without_buffers(pool: Arc<dyn Spawn>) -> Self {
        Self {
            pool,
            buffers: Buffers::none(),
        }
    }

    /// Starts this many threads and sets all buffers aside.
    pub fn new(pool_threads: usize) -> Result<Self> {
        Ok(Self {
            pool: pool::start(pool_threads)?,
            buffers: Buffers::new()?,
        })
    }
}

/// Opens the flat disk over the files of a bundle or image, with resources of its own. The strings
/// are what the user should be told.
pub fn open(images: Arc<OpenedImages>, options: &DiskOptions) -> Result<(Arc<Disk>, Vec<String>)> {
    open_with(images, options, Resources::new(options.pool_threads)?)
}

/// Opens a frozen state of a disk, which shares its resources.
pub fn open_view(disk: &Disk, images: OpenedImages) -> Result<Arc<Disk>> {
    let options = DiskOptions {
        read_only: true,
        inline_order: disk.inline_order.0,
        bat_cache: VIEW_CACHE,
        ..DiskOptions::default()
    };
    let resources = disk.resources.clone();
    open_with(Arc::new(images), &options, resources).map(|(disk, _)| disk)
}

/// Opens a disk with resources that the caller has.
pub fn open_with(
    images: Arc<OpenedImages>,
    options: &DiskOptions,
    resources: Resources,
) -> Result<(Arc<Disk>, Vec<String>)> {
    let caches = look_at_parts(&images, options)?;
    if !options.read_only {
        check_split(&images.parts, options)?;
    }
    let mut notes = images.warnings.clone();
    let mut parts = Vec::with_capacity(images.parts.len());
    let mut marks = Vec::with_capacity(images.parts.len());
    for (opened, bat_cache) in images.parts.iter().zip(caches) {
        let (chain, writer) = if options.read_only {
            let chain = crate::chain::open::chain(opened, false, &mut notes)?;
            tell_of_extension(chain.top(), &mut notes);
            (chain, None)
        } else {
            open_for_writing(opened, options, &mut notes)?
        };
        let (mark, alloc, is_marked) = match writer {
            Some(writer) => (Some(writer.mark), Some(writer.alloc), writer.is_marked),
            None => (None, None, false),
        };
        let start = opened
            .start
            .bytes()
            .ok_or_else(|| Error::errno(libc::EFBIG))?;
        let part = Part::new(
            start,
            chain,
            alloc,
            bat_cache,
            options.grow_step,
            Arc::clone(&resources.pool),
        )?;
        if is_marked {
            part.reserve_table();
            part.marked.open();
        }
        parts.push(part);
        marks.push(mark);
    }
    let size = total_size(&parts)?;
    let is_writable = !options.read_only;
    let flush = is_writable.then(|| FlushState::new(marks, &parts));
    let disk = Arc::new(Disk {
        parts: ArcSwap::from_pointee(parts),
        size,
        read_only: options.read_only,
        inline_order: RequestOrder(options.inline_order),
        enospc: options.enospc,
        resources,
        health: Health::default(),
        counters: Counters::default(),
        flush: Mutex::new(flush.transpose()?),
        flusher: Flusher::new(),
        in_flight: Mutex::new(0),
        idle: Condvar::new(),
        space_waiters: AtomicUsize::new(0),
        space_is_short: AtomicBool::new(false),
        closing: AtomicBool::new(false),
        _images: images,
    });
    if is_writable {
        let interval = (options.flush_interval_ms > 0)
            .then(|| Duration::from_millis(options.flush_interval_ms));
        disk.flusher.start(&disk, interval)?;
    }
    Ok((disk, notes))
}

/// Looks at the headers of all parts of a split disk before anything is done to any, and gives each
/// part its share of the memory for table pages. However many parts a descriptor names, they get
/// no more memory together than one image could.
fn look_at_parts(images: &OpenedImages, options: &DiskOptions) -> Result<Vec<u64>> {
    let [_, _, ..] = images.parts.as_slice() else {
        return Ok(vec![options.bat_cache; images.parts.len()]);
    };
    let mut pages = Vec::with_capacity(images.parts.len());
    for opened in &images.parts {
        let chain = crate::chain::open::chain(opened, !options.read_only, &mut Vec::new())?;
        pages.push(
            chain
                .top()
                .layout()
                .map_or(1, |l| u64::from(l.page_count())),
        );
    }
    let all: u64 = pages.iter().sum();
    if all > SPLIT_PAGES_MAX {
        let why = format!(
            "the tables of its {} parts are too large together",
            pages.len()
        );
        return Err(Error::why(ErrorKind::Unsupported, why)
            .in_file(&images.named)
            .fix("nobody makes such a disk; nothing was changed"));
    }
    let share = |pages: u64| u128::from(options.bat_cache) * u128::from(pages) / u128::from(all);
    Ok(pages
        .into_iter()
        .map(|pages| u64::try_from(share(pages)).unwrap_or(u64::MAX))
        .collect())
}

/// Checks that the parts follow each other without gap or overlap, and adds them up.
fn total_size(parts: &[Part]) -> Result<u64> {
    let mut end = 0_u64;
    for part in parts {
        if part.start != end {
            let why = format!(
                "a part starts at byte {}, the one before ends at {end}",
                part.start
            );
            return Err(Error::why(ErrorKind::Descriptor, why)
                .in_file(part.chain.top().path())
                .fix("the descriptor's Start and End do not fit the images' sizes"));
        }
        end = end
            .checked_add(part.disk_len())
            .ok_or_else(|| Error::errno(libc::EFBIG))?;
    }
    if i64::try_from(end).is_err() {
        return Err(Error::why(
            ErrorKind::Unsupported,
            "the disk is larger than a file can be",
        ));
    }
    Ok(end)
}

/// What writing to an expanding top needs.
struct Writer {
    mark: InUseMark,
    alloc: Allocator,
    is_marked: bool,
}

/// Makes sure that no part of a split disk is refused after another one has been changed. What is
/// found here is not believed later: the file is synced first, and then looked at again.
fn check_split(parts: &[OpenedPart], options: &DiskOptions) -> Result<()> {
    if parts.len() == 1 {
        return Ok(());
    }
    for opened in parts {
        let chain = crate::chain::open::chain(opened, true, &mut Vec::new())?;
        let top = chain.top();
        if let Some(header) = top.header() {
            examine(top, header, options, &mut Vec::new())
                .map_err(|e| e.at_level(chain.geometry().top).in_file(top.path()))?;
        }
    }
    Ok(())
}

fn open_for_writing(
    opened: &OpenedPart,
    options: &DiskOptions,
    notes: &mut Vec<String>,
) -> Result<(Chain, Option<Writer>)> {
    let Some(top) = opened.files.last() else {
        return Err(Error::why(
            ErrorKind::Descriptor,
            "a part of the disk has no image",
        ));
    };
    let storage: &dyn Storage = top.storage.as_ref();
    if !planted(Bug::NoSyncAtOpen) {
        storage.sync_data().map_err(|e| e.in_file(&top.path))?;
    }
    let mut chain = crate::chain::open::chain(opened, true, &mut Vec::new())?;
    // A plain file has no mark that could tell.
    let is_doubtful = chain.top().header().is_none_or(Header::is_in_use);
    if is_doubtful && !planted(Bug::CacheBelieved) {
        if let Err(error) = storage.drop_cache() {
            // Best effort: not every host can, and then what is cached is all there is.
            log::warn!("{}: the host's cache stays: {error}", top.path.display());
        }
    }
    chain = crate::chain::open::chain(opened, true, notes)?;
    let Some(header) = chain.top().header().copied() else {
        lengthen_plain(&chain, notes)?;
        return Ok((
            crate::chain::open::chain(opened, true, &mut Vec::new())?,
            None,
        ));
    };
    let writer = prepare(chain.top(), &header, options, notes)
        .map_err(|e| e.at_level(chain.geometry().top).in_file(&top.path))?;
    Ok((chain, Some(writer)))
}

/// A plain file that ends before its disk is made as long, with a hole: writes must find a place.
fn lengthen_plain(chain: &Chain, notes: &mut Vec<String>) -> Result<()> {
    let (image, disk_len) = (chain.top(), chain.geometry().disk_len);
    if image.len().get() < disk_len {
        image
            .storage()
            .set_len(FileOffset::new(disk_len))
            .map_err(|e| e.in_file(image.path()))?;
        let path = image.path().display();
        notes.push(format!(
            "{path}: lengthened with a hole to the disk's {disk_len} bytes"
        ));
    }
    Ok(())
}

/// What the table of a top is like that may be written to.
struct Examined {
    found: Survey,
    /// It carries bitmaps that the options allow to drop.
    bitmaps: bool,
}

/// Step 3: refuses, or tells what must be mended. Changes nothing.
fn examine(
    image: &Image,
    header: &Header,
    options: &DiskOptions,
    notes: &mut Vec<String>,
) -> Result<Examined> {
    let found = survey(image, header)?;
    let was_in_use = header.is_in_use();
    // Only one cluster can lie across the end: a second such entry would share it.
    let is_tail = |fault: &Fault| matches!(fault, Fault::Entry(EntryError::CutByEnd(_)));
    let only_tail = found.tail_used
        && found.fault_count == 1
        && found.faults.iter().all(|(_, fault)| is_tail(fault));
    let mendable = found.fault_count == 0 || (was_in_use && only_tail);
    if !mendable {
        return Err(refuse(image, &found, was_in_use));
    }
    let bitmaps = find_bitmaps(image, header, &found, options, notes)?;
    Ok(Examined { found, bitmaps })
}

/// Steps 2 to 4 for the table of the top.
fn prepare(
    image: &Image,
    header: &Header,
    options: &DiskOptions,
    notes: &mut Vec<String>,
) -> Result<Writer> {
    let storage = image.storage().as_ref();
    let path = image.path().display();
    let Examined { mut found, bitmaps } = examine(image, header, options, notes)?;
    let mut mark = InUseMark::new(*header.raw());
    let was_in_use = header.is_in_use();
    if was_in_use || bitmaps {
        mark.set(storage)?;
    }
    if was_in_use {
        notes.push(format!(
            "{path}: was not closed cleanly; examined: {} clusters mapped, no invalid and no \
             shared entries",
            found.mapped
        ));
        mend(image, header, &found, notes)?;
        found = survey(image, header)?;
        if found.fault_count > 0 {
            return Err(refuse(image, &found, true));
        }
    }
    if bitmaps {
        notes.push(format!(
            "{path}: dirty bitmaps dropped: the next backup must be a full one"
        ));
    }
    let layout = header.layout();
    let file_end = layout.cluster().whole_below(storage.len()?).get();
    let first = layout.first_cluster().get();
    let alloc = Allocator::new(first, found.limit, file_end, &found.used, found.mapped)?;
    Ok(Writer {
        is_marked: mark.is_set(),
        mark,
        alloc,
    })
}

fn refuse(image: &Image, found: &Survey, was_in_use: bool) -> Error {
    let error = found
        .refusal(image)
        .unwrap_or_else(|| Error::new(ErrorKind::Corrupt).in_file(image.path()));
    if !was_in_use {
        return error;
    }
    Error::why(
        ErrorKind::InUse,
        "and it needs more than the repairs that are always safe",
    )
    .because(error)
    .in_file(image.path())
    .fix(REPAIR_HINT)
}

/// The repairs that lose nothing. The mark is durable when this runs.
fn mend(image: &Image, header: &Header, found: &Survey, notes: &mut Vec<String>) -> Result<()> {
    let storage = image.storage();
    let path = image.path().display();
    let layout = header.layout();
    if found.stray_slots > 0 {
        storage.zero(layout.table_end()..layout.data_start(), Keep::Blocks)?;
        notes.push(format!(
            "{path}: {} slots after the last entry cleared",
            found.stray_slots
        ));
    }
    if found.tail_len > 0 {
        let whole = layout.cluster().whole_below(storage.len()?);
        let start = layout.cluster().file_start(whole);
        if found.tail_used {
            storage.set_len(start.saturating_add(layout.cluster().bytes()))?;
            let cluster = found.faults.first().map_or(0, |fault| fault.0.get());
            let disk_start = cluster.saturating_mul(layout.cluster().bytes());
            notes.push(format!(
                "{path}: the last cluster was cut short after {} bytes: bytes {} to {} of the disk \
                 are missing and read as zeros",
                found.tail_len,
                disk_start.saturating_add(found.tail_len),
                disk_start.saturating_add(layout.cluster().bytes()),
            ));
        } else {
            storage.set_len(start)?;
            notes.push(format!(
                "{path}: {} unused bytes at the end cut off",
                found.tail_len
            ));
        }
    }
    storage.sync_data()
}

/// True when the image carries something that writing would make a lie, and the options allow to
/// drop it; an error when they do not. An extension that does not hold together is only told of:
/// it is worth nothing, and its offset goes with the first header that is written.
fn find_bitmaps(
    image: &Image,
    header: &Header,
    found: &Survey,
    options: &DiskOptions,
    notes: &mut Vec<String>,
) -> Result<bool> {
    let extension = match read_extension(image, header, Some(found))? {
        Ok(None) => return Ok(false),
        Ok(Some(extension)) => extension,
        Err(why) => {
            let path = image.path().display();
            notes.push(format!(
                "{path}: its format extension is not valid and ignored: {why}"
            ));
            return Ok(false);
        }
    };
    if extension.forbids_writing() {
        return Err(Error::why(
            ErrorKind::Unsupported,
            "a section of the format extension that is not known here forbids writing",
        )
        .fix("mount it read-only (`ploopfs mount -r`)"));
    }
    if extension.bitmaps.is_empty() && !extension.wants_keeping() {
        return Ok(false);
    }
    if options.drop_bitmaps {
        return Ok(true);
    }
    Err(Error::why(
        ErrorKind::BitmapPresent,
        "writing would make it lie about what has changed since the last backup",
    )
    .fix(
        "mount read-only (-r), or give --drop-bitmaps to drop it; the next backup must then be a \
         full one",
    ))
}

/// Says that an extension is not valid to those who only read; it harms them in no way.
fn tell_of_extension(image: &Image, notes: &mut Vec<String>) {
    let Some(header) = image.header() else {
        return;
    };
    if header.extension().is_none() || header.layout().cluster().bytes() > EXTENSION_MAX {
        return;
    }
    let why = match read_extension(image, header, None) {
        Ok(Ok(_)) => return,
        Ok(Err(why)) => why,
        Err(error) => error.to_string(),
    };
    let path = image.path().display();
    notes.push(format!(
        "{path}: its format extension is not valid and ignored: {why}"
    ));
}

/// Reads the extension that the header names; the inner error says why it is not believed. Without
/// a survey nobody knows which clusters hold data of the disk.
fn read_extension(
    image: &Image,
    header: &Header,
    found: Option<&Survey>,
) -> Result<std::result::Result<Option<Extension>, String>> {
    let file_len = image.storage().len()?;
    let at = match extension::locate(header, file_len) {
        Ok(Some(at)) => at,
        Ok(None) => return Ok(Ok(None)),
        Err(error) => return Ok(Err(error.to_string())),
    };
    let cluster = header.layout().cluster();
    let len = len_usize(cluster.bytes()).ok_or_else(|| Error::errno(libc::ENOMEM))?;
    let mut bytes = Vec::new();
    bytes
        .try_reserve_exact(len)
        .map_err(|_| Error::errno(libc::ENOMEM))?;
    bytes.resize(len, 0);
    image.storage().read_at(at, &mut bytes)?;
    let extension = match extension::parse(&bytes, header, file_len) {
        Ok(extension) => extension,
        Err(error) => return Ok(Err(error.to_string())),
    };
    let shared = extension.clusters.iter().find(|sector| {
        let start = FileOffset::new(sector.bytes().unwrap_or(u64::MAX));
        found.is_some_and(|found| found.used.contains(cluster.whole_below(start).get()))
    });
    Ok(match shared {
        Some(sector) => Err(format!(
            "the cluster at sector {sector} holds data of the disk"
        )),
        None => Ok(Some(extension)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::bundle::{OpenedFile, Plain};
    use crate::format::header::{IN_USE, MAGIC_V2, RawHeader};
    use crate::storage::mem::MemStorage;
    use crate::units::SectorCount;
    use std::path::PathBuf;

    /// Ten clusters of 4 KiB, marked in use; three of them are in the file, the last cut short.
    fn image(entries: &[(usize, u32)]) -> Arc<MemStorage> {
        let raw = RawHeader {
            magic: MAGIC_V2,
            disk_type: 2,
            heads: 0,
            cylinders: 0,
            cluster_sectors: 8,
            entry_count: 10,
            size_in_sectors: 80,
            in_use: IN_USE,
            first_block: 8,
            flags: 0,
            extension: 0,
        };
        let mut bytes = vec![7; 3 * 4096 + 1000];
        bytes[..4096].fill(0);
        bytes[..64].copy_from_slice(&raw.encode());
        for (index, entry) in entries {
            bytes[64 + 4 * index..68 + 4 * index].copy_from_slice(&entry.to_le_bytes());
        }
        Arc::new(MemStorage::new(bytes))
    }

    /// A disk of one part for each image.
    fn open_images(storages: &[&Arc<MemStorage>]) -> Result<Arc<Disk>> {
        let part = |(number, storage): (u64, &&Arc<MemStorage>)| OpenedPart {
            start: SectorCount::new(80 * number),
            end: None,
            blocksize: None,
            files: vec![OpenedFile {
                path: PathBuf::from("x.hds"),
                storage: Arc::clone(storage) as crate::storage::SharedStorage,
                plain: Plain::No,
                guid: None,
            }],
        };
        let parts = (0..).zip(storages).map(part).collect();
        let images = OpenedImages::from_parts(PathBuf::from("x.hds"), parts);
        open(Arc::new(images), &DiskOptions::default()).map(|(disk, _)| disk)
    }

    #[test]
    fn a_cluster_that_the_end_cuts_is_filled_up_with_zeros() {
        let storage = image(&[(0, 1), (4, 3)]);
        let disk = open_images(&[&storage]).unwrap();
        let mut found = [1; 4096];
        disk.read_at(crate::units::DiskOffset::new(4 * 4096), &mut found)
            .unwrap();
        assert!(found[..1000].iter().all(|byte| *byte == 7));
        assert!(found[1000..].iter().all(|byte| *byte == 0));
        disk.close().unwrap();
        assert_eq!(storage.to_vec().len(), 4 * 4096);
    }

    #[test]
    fn two_that_share_it_are_refused_and_left_alone() {
        let storage = image(&[(0, 1), (4, 3), (5, 3)]);
        let before = storage.to_vec();
        let error = open_images(&[&storage]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse);
        assert!(storage.to_vec() == before, "a refused open changes nothing");
    }

    #[test]
    fn a_part_is_mended_only_if_all_parts_can_be_opened() {
        let (mendable, broken) = (image(&[(0, 1), (4, 3)]), image(&[(0, 1), (5, 1)]));
        let before = mendable.to_vec();
        let error = open_images(&[&mendable, &broken]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse);
        assert!(
            mendable.to_vec() == before,
            "a refused open changes nothing"
        );
        open_images(&[&mendable, &image(&[])]).unwrap();
        assert!(mendable.to_vec() != before);
    }
}
