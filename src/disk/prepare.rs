//! Makes sure of an image before it is written to, and mends what is harmless.
//!
//! The order:
//!
//! 1. sync the file: those of all parts, before any of them is believed. What a killed process
//!    wrote may be in the host's cache only; believing it and losing it later would give one
//!    cluster to two owners. If the in-use mark is set, or there is none because the file is plain,
//!    drop the cache too: after a failed sync it may hold what the medium does not;
//! 2. read header and table (again), through the locked descriptor;
//! 3. refuse what writing would make worse: invalid or shared entries, a dirty bitmap;
//! 4. mend what is harmless, if the mark is set or a bitmap is dropped: first make the mark durable
//!    (with extension offset 0), then cut or fill up the tail and clear slots after the last entry.

use super::DiskOptions;
use crate::chain::Chain;
use crate::chain::bundle::OpenedPart;
use crate::delta::alloc::Allocator;
use crate::delta::extension::{self, Disbelief};
use crate::delta::image::Image;
use crate::delta::in_use::InUseMark;
use crate::delta::survey::{Fault, Survey, survey};
use crate::error::{Error, ErrorKind, REPAIR_HINT, Result};
use crate::format::bat::EntryError;
use crate::format::header::Header;
use crate::planted::{Bug, planted};
use crate::storage::{Keep, Storage};
use crate::units::FileOffset;

/// What writing to an expanding top needs.
#[derive(Debug)]
pub struct Writer {
    /// Owner of the header's bytes.
    pub mark: InUseMark,
    /// Its free clusters.
    pub alloc: Allocator,
    /// The in-use mark is set already.
    pub is_marked: bool,
}

/// Step 1 for one part. All parts of a disk are settled before any of them is looked at: what is
/// found in one must not be what a power cut takes back, when another one has been changed for it.
pub fn settle(opened: &OpenedPart) -> Result<()> {
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
    let chain = crate::chain::open::chain(opened, true, &mut Vec::new())?;
    // A plain file has no mark that could tell.
    let is_doubtful = chain.top().header().is_none_or(Header::is_in_use);
    if is_doubtful && !planted(Bug::CacheBelieved) {
        if let Err(error) = storage.drop_cache() {
            // Best effort: not every host can, and then what is cached is all there is.
            log::warn!("{}: the host's cache stays: {error}", top.path.display());
        }
    }
    Ok(())
}

/// Opens one part for writing that is settled (steps 2 to 4). The strings in `notes` are what the
/// user should be told.
pub fn open_for_writing(
    opened: &OpenedPart,
    options: &DiskOptions,
    notes: &mut Vec<String>,
) -> Result<(Chain, Option<Writer>)> {
    let chain = crate::chain::open::chain(opened, true, notes)?;
    let Some(header) = chain.top().header().copied() else {
        lengthen_plain(&chain, notes)?;
        return Ok((
            crate::chain::open::chain(opened, true, &mut Vec::new())?,
            None,
        ));
    };
    let writer = prepare(chain.top(), &header, options, notes)
        .map_err(|e| e.at_level(chain.geometry().top).in_file(chain.top().path()))?;
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
#[derive(Debug)]
pub struct Examined {
    /// What a walk over the table found.
    pub found: Survey,
    /// It carries bitmaps that the options allow to drop.
    pub bitmaps: bool,
}

/// Step 3: refuses, or tells what must be mended. Changes nothing.
pub fn examine(
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
            // The last cluster of a disk may be more than the disk has.
            let clip = |at: u64| disk_start.saturating_add(at).min(header.size_bytes());
            let missing = clip(found.tail_len)..clip(layout.cluster().bytes());
            let what = match missing.end.checked_sub(missing.start + 1) {
                None => "nothing of the disk is missing".to_owned(),
                Some(_) => format!(
                    "bytes {} to {} of the disk are missing and read as zeros",
                    missing.start,
                    missing.end - 1
                ),
            };
            notes.push(format!(
                "{path}: the last cluster was cut short after {} bytes: {what}",
                found.tail_len
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
    let cluster = header.layout().cluster();
    let is_data = |at| found.used.contains(cluster.whole_below(at).get());
    let extension = match extension::read(image.storage().as_ref(), header, is_data)? {
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
pub fn tell_of_extension(image: &Image, notes: &mut Vec<String>) {
    let Some(header) = image.header() else {
        return;
    };
    // Nobody has looked which clusters hold data of the disk.
    let why = match extension::read(image.storage().as_ref(), header, |_| false) {
        Ok(Ok(_) | Err(Disbelief::Size(_))) => return,
        Ok(Err(why)) => why.to_string(),
        Err(error) => error.to_string(),
    };
    let path = image.path().display();
    notes.push(format!(
        "{path}: its format extension is not valid and ignored: {why}"
    ));
}
