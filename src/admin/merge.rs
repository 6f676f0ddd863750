//! Merges images into the one below them: the upper ones' content goes down, whatever is larger.
//!
//! Until the descriptor says otherwise the upper images stay in the chain and cover every cluster
//! that changes below, so the disk reads the same at every instant, a merge that was interrupted is
//! merely repeated, and running it again over what is half done gives the same.
//!
//! The order, for one part of the disk, each step durable before the next begins:
//!
//! 1. Sync the lower file: what a killed program wrote may be in the host's cache only, and an
//!    entry that is lost later would make a taken cluster look free. What was not closed is read
//!    from the medium then, because after a failed sync the cache may show what will never be
//!    there, and a repeated merge would build on it. A plain file has no mark, so it is not
//!    believed at all; everything that changes in it is still in the upper images, and is copied
//!    once more.
//! 2. The in-use mark of the lower image. Without it another program could take what is half merged
//!    for a closed image.
//! 3. Where the upper disk is larger: room for its entries, cleared, and then the header that says
//!    so. Entries that the header already counts could be garbage otherwise. Where clusters must
//!    make way for the table, that is done before step 2, by [`crate::admin::resize`], which leaves
//!    a whole image of the larger size. So it is where the upper disk is smaller, which keeps its
//!    size: either nothing lies behind its end, or it was said that this may go
//!    (`merge/behind.rs`). The shorter header takes it all in one write; after that a merge that is
//!    repeated finds nothing there, and needs no such word again.
//! 4. The content of a run of clusters, to where the lower image has them or to free clusters.
//! 5. The entries of that run, for clusters that got a new place. An entry that became durable
//!    before its data would name what was there before. Then 4 for the next run.
//! 6. The mark goes. Earlier, and a power cut could leave a closed image whose entries are lost.
//!
//! Then the descriptor can name the lower file in place of the upper ones, which go last
//! ([`crate::admin::bundle`]). Where no descriptor holds the images together ([`loose`]) the upper
//! ones stay.

mod behind;
mod copy;
mod examine;
pub mod loose;

pub use behind::Discard;
pub use examine::{Examined, examine_new, refuse_bitmaps};

use crate::admin::merge::copy::{Run, copy_run, join};
use crate::admin::progress::Progress;
use crate::admin::resize;
use crate::delta::image::Image;
use crate::delta::in_use::InUseMark;
use crate::delta::survey::{Fault, Survey, survey};
use crate::error::{Error, ErrorKind, Result};
use crate::format::bat::EntryError;
use crate::format::chs::Chs;
use crate::format::header::{FLAG_CONVERTING, Header, RawHeader, Version};
use crate::format::layout::Layout;
use crate::plan::merge::{Move, Piece, Place, Upper, plan_merge};
use crate::planted::{Bug, planted};
use crate::storage::{Keep, Storage};
use crate::units::{
    ClusterSize, DiskCluster, FileCluster, FileOffset, SECTOR, SectorCount, len_u64,
};
use rayon::iter::{IntoParallelRefIterator, ParallelIterator};

/// Entries that are looked at at a time: those of 64 KiB of table.
pub const WINDOW: usize = 16 * 1024;
/// Bytes of a run that are worth more than one thread.
const PARALLEL_FROM: u64 = 8 << 20;

/// Images that become one: what they are, and how.
#[derive(Debug)]
pub struct Merge<'a> {
    /// Takes the content.
    pub lower: &'a Image,
    /// Give it, the lowest first.
    pub uppers: &'a [Image],
    /// How large the clusters are.
    pub cluster: ClusterSize,
    /// Entries that are looked at at a time.
    pub window: usize,
    /// What is behind the end of the uppermost disk may hold data.
    pub force_discard: bool,
}

/// What a merge will do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    /// Clusters that move.
    pub clusters: u64,
    /// Those of them that need a new place.
    pub fresh: u64,
    /// Bytes that are copied.
    pub bytes: u64,
}

/// Entries of a level, as many as there are.
fn entries(image: &Image, first: u64, count: usize) -> Result<Vec<u32>> {
    let Some(layout) = image.layout() else {
        return Ok(Vec::new());
    };
    let left = u64::from(layout.entry_count()).saturating_sub(first);
    let count = usize::try_from(left).unwrap_or(usize::MAX).min(count);
    let mut bytes = vec![0; count * 4];
    let at = Layout::entry_offset(DiskCluster::new(first));
    image
        .storage()
        .read_at(at, &mut bytes)
        .map_err(|e| e.in_file(image.path()))?;
    Ok(bytes
        .chunks_exact(4)
        .map(crate::delta::walk::word)
        .collect())
}

fn bad_size(why: String, image: &Image) -> Error {
    Error::why(ErrorKind::Unsupported, why).in_file(image.path())
}

impl Merge<'_> {
    /// Bytes of the disk as the uppermost image has it.
    #[must_use]
    pub fn disk_len(&self) -> u64 {
        self.uppers.last().map_or(0, Image::disk_len)
    }

    /// The lower disk is larger than the one that the uppermost image shows.
    #[must_use]
    pub fn lower_is_larger(&self) -> bool {
        self.lower.header().is_some() && self.lower.disk_len() > self.disk_len()
    }

    fn grown_layout(&self, header: &Header) -> Result<Layout> {
        let grown = self.grown(header)?;
        let (entries, first) = (grown.entry_count, grown.first_block);
        Ok(Layout::new(header.version(), self.cluster, entries, first))
    }

    /// How the lower image gets the size of the upper disk, where it is larger, or where the table
    /// takes the place of clusters.
    fn resize_first(&self, grown: &Layout) -> Option<resize::Request> {
        let size = SectorCount::new(self.disk_len() / SECTOR);
        // Or one that a merge that was interrupted has cut, and left a table that is too long.
        let is_half_cut = self.lower.header().is_some_and(|header| {
            let cut = header.resized(size).filter(|_| header.is_in_use());
            let is_shorter = |cut: RawHeader| cut.first_block < header.raw().first_block;
            header.size() == size && cut.is_some_and(is_shorter)
        });
        if self.lower_is_larger() || is_half_cut {
            // What lies behind the end of the upper disk would come up with the next growth.
            return Some(resize::Request {
                shrink: true,
                force_discard: self.force_discard,
                drop_bitmaps: true,
                exact: true,
                ..resize::Request::new(size)
            });
        }
        // A disk that is resized has whole clusters.
        let is_whole = self.disk_len() % self.cluster.bytes() == 0;
        let is_longer = grown.table_end() > grown.data_start();
        (is_longer && is_whole).then(|| resize::Request {
            drop_bitmaps: true,
            ..resize::Request::new(size)
        })
    }

    /// What comes before step 2, where the image is to be resized, which has an order of its own.
    fn resize(&self, header: &Header, progress: &Progress) -> Result<Option<Image>> {
        let Some(request) = self.resize_first(&self.grown_layout(header)?) else {
            return Ok(None);
        };
        let storage = self.lower.storage();
        resize::resize_image(&**storage, &[], &request, progress, &mut |_| Ok(()))?;
        progress.step("merging", 0);
        Image::expanding(self.lower.path(), storage.clone()).map(Some)
    }

    fn sound(&self, found: &Survey) -> Result<()> {
        // A cluster that the end of the file cuts is filled up with zeros when the file grows.
        let cut = |fault: &Fault| matches!(fault, Fault::Entry(EntryError::CutByEnd(_)));
        match found.refusal(self.lower) {
            Some(_) if found.faults.iter().all(|(_, fault)| cut(fault)) => Ok(()),
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// The lower image's header with room for the upper disk.
    fn grown(&self, header: &Header) -> Result<RawHeader> {
        let mut raw = *header.raw();
        if header.size_bytes() >= self.disk_len() {
            return Ok(raw);
        }
        let sectors = self.disk_len() / SECTOR;
        let entries = self.cluster.count_for(self.disk_len()).get();
        let entries = u32::try_from(entries).ok();
        let fits = header.version() == Version::V2 || u32::try_from(sectors).is_ok();
        let Some(entries) = entries.filter(|_| fits) else {
            let why = "the upper disk is larger than the version of the lower image allows";
            return Err(bad_size(why.to_owned(), self.lower)
                .fix("merge into a new file: `ploopfs merge --into-new FILE`"));
        };
        raw.entry_count = raw.entry_count.max(entries);
        raw.size_in_sectors = SectorCount::new(sectors).get();
        let chs = Chs::of(SectorCount::new(sectors));
        (raw.heads, raw.cylinders) = (chs.heads, chs.header_cylinders());
        Ok(raw)
    }

    /// Plans the whole merge, a run of clusters at a time.
    fn each_window(&self, each: &mut dyn FnMut(&[Move]) -> Result<()>) -> Result<()> {
        let lower = Lower::There(self.lower);
        windows(self.uppers, lower, self.cluster, self.window, each)
    }

    /// Moves the content. What is interrupted is to be repeated.
    pub fn carry_out(&self, progress: &Progress) -> Result<()> {
        self.carry(progress, WhenStopped::Close)
    }

    /// The same for a lower image that nothing but its mark tells to be half merged: it keeps it
    /// where the user stops the merge.
    pub fn carry_out_marked(&self, progress: &Progress) -> Result<()> {
        self.carry(progress, WhenStopped::Keep)
    }

    fn carry(&self, progress: &Progress, stopped: WhenStopped) -> Result<()> {
        let is_open = |image: &Image| image.header().is_some_and(Header::is_in_use);
        let lower = self.lower.settled()?;
        if !is_open(self.lower) && !self.uppers.iter().any(is_open) {
            return Merge {
                lower: &lower,
                ..*self
            }
            .fill(progress, stopped);
        }
        let uppers = self.uppers.iter().map(Image::settled);
        let uppers = uppers.collect::<Result<Vec<_>>>()?;
        let merge = Merge {
            lower: &lower,
            uppers: &uppers,
            ..*self
        };
        // What was examined may have been in the cache only.
        merge.examine()?;
        merge.fill(progress, stopped)
    }

    /// Steps 2 to 6.
    fn fill(&self, progress: &Progress, stopped: WhenStopped) -> Result<()> {
        let here = |e: Error| e.in_file(self.lower.path());
        // Whoever has looked at that may have seen what was in the host's cache only.
        self.discards()?;
        match self.lower.header() {
            Some(header) => match self.resize(header, progress).map_err(here)? {
                Some(lower) => Merge {
                    lower: &lower,
                    ..*self
                }
                .fill_table(lower.header().unwrap_or(header), progress, stopped),
                None => self.fill_table(header, progress, stopped),
            },
            None => self.fill_plain(progress),
        }
    }

    /// A plain file has every cluster in its place, and no table.
    fn fill_plain(&self, progress: &Progress) -> Result<()> {
        let storage = &**self.lower.storage();
        if storage.len()?.get() < self.disk_len() {
            storage.set_len(FileOffset::new(self.disk_len()))?;
        }
        let end = storage.len()?.get();
        self.each_window(&mut |moves| {
            let runs = moves.iter().filter_map(|item| match item.place {
                Place::Taken(to) => Some(self.run(item, to.get(), end)),
                Place::Fresh => None,
            });
            self.copy(&join(runs), progress)
        })?;
        self.cut(storage)?;
        storage
            .sync_data()
            .map_err(|e| e.in_file(self.lower.path()))
    }

    /// A plain file that is longer than the upper disk ends with the last cluster of that.
    fn cut(&self, storage: &dyn Storage) -> Result<()> {
        let (len, end) = (storage.len()?.get(), self.disk_len());
        if len <= end {
            return Ok(());
        }
        let whole = self.cluster.count_for(end).get() * self.cluster.bytes();
        storage.set_len(FileOffset::new(len.min(whole)))?;
        storage.zero(FileOffset::new(end)..storage.len()?, Keep::Nothing)
    }

    /// The copy of a cluster, whose rest becomes zeros up to `end` of the file.
    fn run(&self, item: &Move, to: u64, end: u64) -> Run {
        let rest = (to + self.cluster.bytes())
            .min(end)
            .saturating_sub(to + item.len);
        Run {
            level: item.level,
            from: item.from.get(),
            to,
            len: item.len,
            zeros: rest,
        }
    }

    fn copy(&self, runs: &[Run], progress: &Progress) -> Result<()> {
        progress.check()?;
        let one = |run: &Run| {
            progress.check()?;
            let image = &self.uppers[run.level];
            copy_run(&**image.storage(), &**self.lower.storage(), run)
                .map_err(|e| e.in_file(self.lower.path()))?;
            progress.add(run.len);
            Ok(())
        };
        let bytes: u64 = runs.iter().map(|run| run.len).sum();
        if bytes < PARALLEL_FROM {
            return runs.iter().try_for_each(one);
        }
        runs.par_iter().try_for_each(one)
    }

    fn fill_table(
        &self,
        header: &Header,
        progress: &Progress,
        when_stopped: WhenStopped,
    ) -> Result<()> {
        let storage = &**self.lower.storage();
        let here = |e: Error| e.in_file(self.lower.path());
        let mut mark = InUseMark::new(*header.raw());
        mark.set(storage).map_err(here)?;
        let grown = self.grown(header)?;
        if grown != *header.raw() {
            self.make_room(header, &grown).map_err(here)?;
            mark = InUseMark::new(grown);
            mark.set(storage).map_err(here)?;
        }
        let image = Image::expanding(self.lower.path(), self.lower.storage().clone())?;
        let header = image
            .header()
            .ok_or_else(|| Error::new(ErrorKind::Corrupt))?;
        let found = survey(&image, header)?;
        self.sound(&found)?;
        if found.stray_slots > 0 {
            // Entries that a cut which was interrupted has left.
            let layout = header.layout();
            storage
                .zero(layout.table_end()..layout.data_start(), Keep::Blocks)
                .map_err(here)?;
        }
        let whole = self.cluster.count_for(storage.len()?.get()).get() * self.cluster.bytes();
        if found.tail_len > 0 {
            storage.set_len(FileOffset::new(whole)).map_err(here)?;
        }
        let mut free = Free {
            layout: *header.layout(),
            next: header.layout().first_cluster().get(),
            found,
        };
        let on_whole = Merge {
            lower: &image,
            ..*self
        };
        let moved = on_whole.each_window(&mut |moves| on_whole.window(moves, &mut free, progress));
        // Stopped by the user: every entry so far was written behind its data, so the image is
        // whole, if larger than it need be. Frozen in a bundle, nothing would ever close it.
        let is_closing = when_stopped == WhenStopped::Close;
        let stopped = match moved {
            Err(error) if error.kind() == ErrorKind::Interrupted && is_closing => Some(error),
            Err(error) => return Err(error),
            Ok(()) => None,
        };
        storage.sync_data().map_err(here)?;
        let image = Image::expanding(self.lower.path(), self.lower.storage().clone())?;
        let header = image
            .header()
            .ok_or_else(|| Error::new(ErrorKind::Corrupt))?;
        let found = survey(&image, header)?;
        if let Some(error) = found.refusal(&image) {
            return Err(error);
        }
        mark.clear(storage, found.mapped == 0).map_err(here)?;
        stopped.map_or(Ok(()), Err)
    }

    /// Step 3: what the longer table and the longer disk uncover must be zeros.
    fn make_room(&self, header: &Header, grown: &RawHeader) -> Result<()> {
        let storage = &**self.lower.storage();
        let old = header.layout();
        let end = Layout::new(
            header.version(),
            self.cluster,
            grown.entry_count,
            grown.first_block,
        )
        .table_end();
        // Entries behind the end of the disk meant nothing so far.
        let clusters = self.cluster.count_for(header.size_bytes()).get();
        let start = Layout::entry_offset(DiskCluster::new(clusters));
        storage.zero(start..end.max(old.table_end()), Keep::Blocks)?;
        let within = header.size_bytes() % self.cluster.bytes();
        let last = header.size_bytes() / self.cluster.bytes();
        let entry = entries(self.lower, last, 1)?.first().copied().unwrap_or(0);
        if within > 0 && entry != 0 {
            let start = old.entry_start(entry).saturating_add(within);
            let end = start.saturating_add(self.cluster.bytes() - within);
            storage.zero(start..end.min(storage.len()?), Keep::Blocks)?;
        }
        // The flag would mean a half-converted table beside the mark.
        debug_assert!(grown.flags == u32::MAX || header.raw().flags & FLAG_CONVERTING == 0);
        storage.sync_data()
    }

    /// Steps 4 and 5.
    fn window(&self, moves: &[Move], free: &mut Free, progress: &Progress) -> Result<()> {
        let storage = &**self.lower.storage();
        let here = |e: Error| e.in_file(self.lower.path());
        let mut runs = Vec::with_capacity(moves.len());
        let mut named = Vec::new();
        let mut end = storage.len().map_err(here)?.get();
        for item in moves {
            let to = match item.place {
                Place::Taken(at) => at.get(),
                Place::Fresh => {
                    let (place, entry) = free.take().map_err(here)?;
                    named.push((item.cluster, entry));
                    end = end.max(place + self.cluster.bytes());
                    place
                }
            };
            runs.push(self.run(item, to, u64::MAX));
        }
        if end > storage.len().map_err(here)?.get() {
            storage.set_len(FileOffset::new(end)).map_err(here)?;
        }
        if planted(Bug::MergeNamesFirst) {
            write_entries(storage, &named).map_err(here)?;
        }
        self.copy(&join(runs.into_iter()), progress)?;
        if named.is_empty() {
            return Ok(());
        }
        if !planted(Bug::MergeDataNotSynced) {
            storage.sync_data().map_err(here)?;
        }
        write_entries(storage, &named).map_err(here)
    }
}

/// What becomes of the in-use mark where the user stops a merge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WhenStopped {
    Close,
    Keep,
}

/// What takes the content.
#[derive(Clone, Copy, Debug)]
enum Lower<'a> {
    There(&'a Image),
    /// It is new, and has nothing yet.
    New(&'a Layout),
}

/// Plans a merge, a run of clusters at a time.
fn windows(
    uppers: &[Image],
    lower: Lower<'_>,
    cluster: ClusterSize,
    window: usize,
    each: &mut dyn FnMut(&[Move]) -> Result<()>,
) -> Result<()> {
    let disk_len = uppers.last().map_or(0, Image::disk_len);
    let clusters = cluster.count_for(disk_len).get();
    let mut first = 0;
    while first < clusters {
        let left = usize::try_from(clusters - first).unwrap_or(usize::MAX);
        let count = left.min(window);
        let mut tables = Vec::with_capacity(uppers.len());
        for image in uppers {
            tables.push(entries(image, first, count)?);
        }
        let own = match lower {
            Lower::There(image) => entries(image, first, count)?,
            Lower::New(_) => Vec::new(),
        };
        let pieces: Vec<Upper<'_>> = uppers
            .iter()
            .zip(&tables)
            .map(|(image, entries)| Upper {
                piece: piece(image, entries),
                disk_len: image.disk_len(),
            })
            .collect();
        let lower = match lower {
            Lower::There(image) => piece(image, &own),
            Lower::New(layout) => Piece::Table {
                layout,
                entries: &own,
            },
        };
        let start = DiskCluster::new(first);
        let moves = plan_merge(cluster, start, count, disk_len, &pieces, lower);
        each(&moves.collect::<Vec<_>>())?;
        first += len_u64(count);
    }
    Ok(())
}

fn piece<'a>(image: &'a Image, entries: &'a [u32]) -> Piece<'a> {
    match image.layout() {
        Some(layout) => Piece::Table { layout, entries },
        None => Piece::Plain,
    }
}

/// Hands out the lowest free clusters, in order.
struct Free {
    layout: Layout,
    next: u64,
    found: Survey,
}

impl Free {
    fn take(&mut self) -> Result<(u64, u32)> {
        while self.found.used.contains(self.next) {
            self.next += 1;
        }
        let number = FileCluster::new(self.next);
        self.next += 1;
        let entry = self.layout.entry_for(number).ok_or_else(|| {
            Error::why(
                ErrorKind::Unsupported,
                "the image has no room for more clusters",
            )
        })?;
        Ok((self.layout.cluster().file_start(number).get(), entry))
    }
}

/// Writes entries, neighbours together.
fn write_entries(storage: &dyn Storage, named: &[(DiskCluster, u32)]) -> Result<()> {
    let follows = |a: &(DiskCluster, u32), b: &(DiskCluster, u32)| a.0.get() + 1 == b.0.get();
    for run in named.chunk_by(follows) {
        let bytes: Vec<u8> = run
            .iter()
            .flat_map(|(_, entry)| entry.to_le_bytes())
            .collect();
        storage.write_at(Layout::entry_offset(run[0].0), &bytes)?;
    }
    Ok(())
}
