//! Moves clusters of an image to other places, and gives back what nothing names.
//!
//! What [`crate::admin::resize`] and [`crate::admin::compact`] share: a look that lets only sound
//! images through, and the one way in which a cluster is moved. The order, for each batch:
//!
//! 1. copy every cluster of the batch to a place that nothing names;
//! 2. sync. An entry that became durable before its data would show what was there before;
//! 3. let the entries name the copies;
//! 4. sync. Until then a power cut may bring any of the old entries back, so no old place is
//!    changed, and none is ever the target of another move.
//!
//! Clusters are moved in disk order, each to the lowest place that is free: what a power cut leaves
//! undone takes the very places, when it is repeated, that it would have had.

use crate::admin::check::{self, Checked, Gathered, Space};
use crate::admin::create::content::is_zero;
use crate::admin::progress::Progress;
use crate::delta::image::header_error;
use crate::delta::walk;
use crate::error::{Error, ErrorKind, REPAIR_HINT, Result};
use crate::format::header::Header;
use crate::format::layout::Layout;
use crate::plan::repair::{ExtensionFacts, Finding, Severity, Trouble};
use crate::planted::{Bug, planted};
use crate::storage::{Keep, Storage};
use crate::units::{DiskCluster, FileOffset, len_u64, len_usize};
use rayon::iter::{IntoParallelRefIterator, ParallelIterator};
use std::ops::Range;

/// Bytes that are copied at a time where the host cannot copy.
const STRIDE: u64 = 1 << 20;

/// Bytes of clusters that are moved between two syncs.
pub(super) const BATCH_BYTES: u64 = 256 << 20;

/// A sound image, and what is in it.
#[derive(Debug)]
pub(super) struct Sound {
    pub(super) checked: Checked,
    pub(super) header: Header,
    pub(super) space: Space,
}

impl Sound {
    /// Clusters that entries name.
    pub(super) fn mapped(&self) -> u64 {
        self.checked.facts.table.mapped
    }

    /// True where the in-use mark is set.
    pub(super) fn is_marked(&self) -> bool {
        self.header.is_in_use()
    }

    /// First cluster of the file that the table needs no more.
    pub(super) fn first(&self) -> u64 {
        self.space.first
    }
}

/// Looks at an image that is to be changed, and refuses it where it is not sound. An image that was
/// not closed is, if nothing else is wrong with it: the look goes through every entry.
///
/// To change it, the file is synced first: what a killed program wrote may be in the host's cache
/// only, and nothing must build on what a power cut takes back.
pub(super) fn look(storage: &dyn Storage, change: bool, drop_bitmaps: bool) -> Result<Sound> {
    sound(gathered(storage, change)?, drop_bitmaps)
}

/// The same, of an image whose shrinking may have been interrupted: words behind its entries that
/// it has not yet cleared are what it was told to cut off, and the caller clears them.
pub(super) fn look_at_cut(
    storage: &dyn Storage,
    change: bool,
    drop_bitmaps: bool,
) -> Result<Sound> {
    let mut found = gathered(storage, change)?;
    let report = &mut found.checked.report;
    if report.has(Trouble::InUse.word()) {
        let is_cut = |finding: &Finding| finding.trouble == Trouble::StraySlots;
        report.findings.retain(|finding| !is_cut(finding));
    }
    sound(found, drop_bitmaps)
}

fn gathered(storage: &dyn Storage, change: bool) -> Result<Gathered> {
    if change {
        storage.sync_data()?;
    }
    let mut found = check::gather(storage)?;
    if change && found.checked.report.has(Trouble::InUse.word()) {
        // After a failed sync the host's cache may hold what the medium does not.
        if let Err(error) = storage.drop_cache() {
            log::debug!("the host's cache stays: {error}");
        }
        found = check::gather(storage)?;
    }
    Ok(found)
}

fn unsupported(why: impl Into<String>) -> Error {
    Error::why(ErrorKind::Unsupported, why)
}

fn sound(found: Gathered, drop_bitmaps: bool) -> Result<Sound> {
    let Gathered { checked, space } = found;
    let normal = checked.facts.normal.as_ref();
    let header = normal.map_err(|e| header_error(*e))?.header;
    for finding in &checked.report.findings {
        let is_harmless = match finding.trouble {
            Trouble::InUse | Trouble::StaleExtension => true,
            Trouble::ReadOnly(why) => return Err(header_error(why)),
            _ => finding.severity < Severity::Corrupt,
        };
        if !is_harmless {
            let word = finding.trouble.word();
            let why = format!("a check finds {word} ({} times)", finding.count);
            return Err(Error::why(ErrorKind::Corrupt, why).fix(REPAIR_HINT));
        }
    }
    let cluster = header.layout().cluster();
    let needed = cluster.count_for(header.size_bytes()).get();
    let entries = u64::from(header.layout().entry_count());
    if entries >= needed.saturating_mul(2) && entries > needed {
        let why = format!("{entries} entries for a disk of {needed} clusters");
        return Err(unsupported(why).fix("copy the disk to a new image"));
    }
    extension(&checked, drop_bitmaps)?;
    let space = space.ok_or_else(|| unsupported("its table cannot be read"))?;
    Ok(Sound {
        checked,
        header,
        space,
    })
}

/// The mark takes the extension away, so what it holds must be worth nothing, or be given up.
fn extension(checked: &Checked, drop_bitmaps: bool) -> Result<()> {
    let (unknown, forbids) = match checked.facts.extension {
        ExtensionFacts::None | ExtensionFacts::Stale | ExtensionFacts::Bad => return Ok(()),
        ExtensionFacts::Foreign => (true, false),
        ExtensionFacts::Valid {
            unknown,
            forbids_writing,
        } => (unknown, forbids_writing),
    };
    if forbids {
        let why = "a section of the format extension that is not known here forbids writing";
        return Err(unsupported(why));
    }
    if drop_bitmaps || (checked.bitmaps.is_empty() && !unknown) {
        return Ok(());
    }
    let why = "its format extension, with the bitmap of what has changed since the last backup, \
               would be lost";
    let fix = "give --drop-bitmaps to drop it; the next backup must then be a full one";
    Err(Error::why(ErrorKind::BitmapPresent, why).fix(fix))
}

/// One cluster on its way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Move {
    /// Where its entry is.
    pub(super) entry_at: FileOffset,
    /// First byte of its old place.
    pub(super) from: u64,
    /// First byte of its new place.
    pub(super) to: u64,
    /// What names the new place.
    pub(super) entry: u32,
}

/// How many clusters are moved between two syncs.
pub(super) fn batch_len(batch_bytes: u64, cluster_bytes: u64) -> usize {
    len_usize((batch_bytes / cluster_bytes).clamp(1, 1 << 16)).unwrap_or(1)
}

/// The lowest places that nothing names, in order.
#[derive(Debug)]
pub(super) struct Places<'a> {
    space: &'a Space,
    within: Range<u64>,
}

impl<'a> Places<'a> {
    /// Those within a range of clusters.
    pub(super) fn new(space: &'a Space, within: Range<u64>) -> Self {
        Self { space, within }
    }
}

impl Iterator for Places<'_> {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        let space = self.space;
        self.within.find(|number| !space.named.contains(*number))
    }
}

/// Which clusters are moved, and where to.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    /// Clusters of the file whose content is to go elsewhere.
    pub(super) sources: Range<u64>,
    /// Where it may go. Once there is no place left, the rest stays.
    pub(super) targets: Range<u64>,
}

impl Wanted {
    /// How many clusters will be moved, and the end of the places that they take.
    pub(super) fn outlook(&self, sound: &Sound) -> Result<(u64, u64)> {
        self.outlook_without(sound, 0, 0)
    }

    /// The same where only the first `kept` entries of the table stay: what the others name is not
    /// moved, and leaves its place.
    pub(super) fn outlook_when_cut(
        &self,
        storage: &dyn Storage,
        sound: &Sound,
        kept: u64,
    ) -> Result<(u64, u64)> {
        let (layout, grid) = (sound.header.layout(), sound.space.grid);
        let (mut sources, mut targets) = (0, 0);
        if kept < layout.entry_count().into() {
            walk::words(storage, layout.table_end(), |at, bytes| {
                check::entries(at, bytes, layout, |cluster, word| {
                    let is_cut = word != 0 && cluster.is_some_and(|cluster| cluster >= kept);
                    let number = grid.number(layout.entry_start(word).get());
                    if let Some(number) = number.filter(|_| is_cut) {
                        sources += u64::from(self.sources.contains(&number));
                        targets += u64::from(self.targets.contains(&number));
                    }
                    Ok(())
                })
            })?;
        }
        self.outlook_without(sound, sources, targets)
    }

    /// Without so many of the sources, and with so many targets more.
    fn outlook_without(&self, sound: &Sound, gone: u64, freed: u64) -> Result<(u64, u64)> {
        let space = &sound.space;
        let mut count = 0_u64;
        space.named.for_each(|number| {
            count += u64::from(self.sources.contains(&number));
            Ok(())
        })?;
        count = count.saturating_sub(gone);
        let places = Places::new(space, self.targets.clone());
        let (mut taken, mut end) = (0, 0);
        for number in places.take(len_usize(count).unwrap_or(usize::MAX)) {
            taken += 1;
            end = number + 1;
        }
        Ok(((taken + freed).min(count), end))
    }

    /// Moves them. The file must be as long as the places need it. Returns how many were moved.
    pub(super) fn carry_out(
        &self,
        storage: &dyn Storage,
        sound: &Sound,
        batch_bytes: u64,
        progress: &Progress,
    ) -> Result<u64> {
        let layout = sound.header.layout();
        let size = layout.cluster().bytes();
        let most = batch_len(batch_bytes, size);
        let mut places = Places::new(&sound.space, self.targets.clone());
        let (mut batch, mut moved, mut is_full) = (Vec::new(), 0, false);
        let grid = sound.space.grid;
        walk::words(storage, layout.table_end(), |at, bytes| {
            check::entries(at, bytes, layout, |cluster, word| {
                let start = layout.entry_start(word).get();
                let source = grid.number(start).filter(|_| word != 0);
                let (Some(cluster), Some(source)) = (cluster, source) else {
                    return Ok(());
                };
                if is_full || !self.sources.contains(&source) {
                    return Ok(());
                }
                let place = places.next();
                let Some((to, entry)) = place.and_then(|to| Some((to, grid.entry(to)?))) else {
                    is_full = true;
                    return Ok(());
                };
                batch.push(Move {
                    entry_at: Layout::entry_offset(DiskCluster::new(cluster)),
                    from: start,
                    to: grid.start(to),
                    entry,
                });
                if batch.len() >= most {
                    moved += move_batch(storage, &mut batch, size, progress)?;
                }
                Ok(())
            })
        })?;
        moved += move_batch(storage, &mut batch, size, progress)?;
        Ok(moved)
    }
}

/// Steps 1 to 4.
pub(super) fn move_batch(
    storage: &dyn Storage,
    batch: &mut Vec<Move>,
    size: u64,
    progress: &Progress,
) -> Result<u64> {
    progress.check()?;
    let moved = len_u64(batch.len());
    if moved == 0 {
        return Ok(0);
    }
    batch.par_iter().try_for_each(|one| {
        copy_cluster(storage, one.from, one.to, size)?;
        progress.add(size);
        Ok::<_, Error>(())
    })?;
    if !planted(Bug::MovedNotSynced) {
        storage.sync_data()?;
    }
    for one in batch.drain(..) {
        storage.write_at(one.entry_at, &one.entry.to_le_bytes())?;
    }
    if !planted(Bug::OldPlaceEarly) {
        storage.sync_data()?;
    }
    Ok(moved)
}

/// Copies one cluster to a place that nothing names, and leaves holes where it has none.
fn copy_cluster(storage: &dyn Storage, from: u64, to: u64, size: u64) -> Result<()> {
    let at = FileOffset::new;
    storage.zero(at(to)..at(to + size), Keep::Nothing)?;
    let (mut next, end) = (from, from + size);
    while let Some(data) = storage.next_data(at(next))? {
        let (start, stop) = (data.start.get().max(next), data.end.get().min(end));
        if start >= stop {
            break;
        }
        copy_range(storage, start..stop, to + (start - from))?;
        next = stop;
    }
    Ok(())
}

fn copy_range(storage: &dyn Storage, from: Range<u64>, to: u64) -> Result<()> {
    let at = FileOffset::new;
    if storage.copy_from(at(to), storage, at(from.start)..at(from.end))? {
        return Ok(());
    }
    let len = from.end - from.start;
    let mut buffer = vec![0; len_usize(len.min(STRIDE)).unwrap_or(0)];
    let mut done = 0;
    while done < len {
        let piece = &mut buffer[..len_usize((len - done).min(STRIDE)).unwrap_or(0)];
        storage.read_at(at(from.start + done), piece)?;
        storage.write_at(at(to + done), piece)?;
        done += len_u64(piece.len());
    }
    Ok(())
}

/// The first byte of a range of a file that is not 0; none where all are.
pub(super) fn first_data(storage: &dyn Storage, range: Range<u64>) -> Result<Option<u64>> {
    first_data_of(storage, range, |at| next_blocks(storage, at))
}

/// The next range at or after a place that the host has blocks for.
pub(super) fn next_blocks(storage: &dyn Storage, at: u64) -> Result<Option<Range<u64>>> {
    let found = storage.next_data(FileOffset::new(at))?;
    Ok(found.map(|data| data.start.get()..data.end.get()))
}

/// The same where somebody knows what the host has blocks for.
pub(super) fn first_data_of(
    storage: &dyn Storage,
    range: Range<u64>,
    mut next: impl FnMut(u64) -> Result<Option<Range<u64>>>,
) -> Result<Option<u64>> {
    let mut at = range.start;
    let mut buffer = Vec::new();
    // Most data is told by its first bytes.
    let mut most = 4096;
    while at < range.end {
        let Some(data) = next(at)? else {
            break;
        };
        at = at.max(data.start);
        let len = range.end.min(data.end).saturating_sub(at).min(most);
        most = (most * 4).min(STRIDE);
        if len == 0 {
            break;
        }
        buffer.resize(len_usize(len).unwrap_or(0), 0);
        storage.read_at(FileOffset::new(at), &mut buffer)?;
        if !is_zero(&buffer) {
            let place = buffer.iter().position(|byte| *byte != 0);
            return Ok(place.map(|place| at + len_u64(place)));
        }
        at += len;
    }
    Ok(None)
}

/// Gives back to the host what nothing names: holes inside the file, and its end. Looks at the
/// image again for it, so that nothing is given back of which the file itself does not say that it
/// is free. `all` also punches what reads as zeros. Returns what is then in the image.
pub(super) fn give_back(storage: &dyn Storage, all: bool) -> Result<Sound> {
    let found = sound(check::gather(storage)?, true)?;
    let Sound { space, checked, .. } = &found;
    let end = space.named_end;
    let at = |number: u64| space.grid.start(number).min(end);
    if all {
        free_runs(&found, |run| {
            let range = FileOffset::new(at(run.start))..FileOffset::new(at(run.end));
            storage.zero(range, Keep::Nothing)
        })?;
    } else if checked.facts.table.leaked > 0 {
        check::leaks(storage, space, &[&space.named], end, |number| {
            let range = FileOffset::new(at(number))..FileOffset::new(at(number + 1));
            storage.zero(range, Keep::Nothing)
        })?;
    }
    if storage.len()?.get() > end {
        storage.set_len(FileOffset::new(end))?;
    }
    storage.sync_data()?;
    Ok(found)
}

/// Calls `each` for every run of clusters before the last that is named which nothing names.
fn free_runs(found: &Sound, mut each: impl FnMut(Range<u64>) -> Result<()>) -> Result<()> {
    let mut next = found.space.first;
    found.space.named.for_each(|number| {
        if number > next {
            each(next..number)?;
        }
        next = next.max(number + 1);
        Ok(())
    })
}
