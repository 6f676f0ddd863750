//! Durability: the flush round, the release of freed clusters, and the close.
//!
//! One round makes everything durable that was answered before the round began. Its order, and what
//! each reordering breaks:
//!
//! 1. seal the quarantine batch and end its epoch. After 3, a cluster freed in between would count
//!    as durably dropped although its page was copied before the drop;
//! 2. clear the note of unsynced data. After 4, the note of bytes written meanwhile would be lost;
//! 3. copy the dirty pages (entries of lower levels as 0, never past the table's end);
//! 4. sync the data. After 5, an entry could be durable before the bytes it names: after a power
//!    cut the disk would show what another cluster left there. Left out where every changed entry
//!    of these pages was a hole at all levels before and names a cluster of durable zeros that
//!    nobody had before ([`crate::delta::alloc`]): what a power cut leaves then, entry or bytes or
//!    both, reads as the zeros of the hole or as what was written;
//! 5. write the copies, not the live pages: an entry published after 4 names bytes that 4 did not
//!    cover;
//! 6. sync again: what the caller is told is durable must be;
//! 7. only now count pages as clean, those that have not changed since 3; the others go into the
//!    next round;
//! 8. answer the callers;
//! 9. when nobody of the ended epoch is left, punch the batch and make it free. Before 6, a reused
//!    cluster could appear under its old entry after a power cut; before the drain, a slow reader
//!    would see the new owner's bytes; punching after the hand-over would erase them.
//!
//! More dirty pages than the copy area holds take steps 3 to 5 again for each areaful; entries do
//! not depend on each other, because a cluster never changes hands within a round.
//!
//! `tests/sim.rs` cuts the power at every operation of this on simulated files, and
//! `tests/planted.rs` proves that it notices when one of these steps is left out or moved.
//!
//! The first failure latches the disk: nothing after it is ever reported as durable again.

use super::Disk;
use super::part::Part;
use super::stats::bump;
use super::table::{Table, Wait};
use crate::chain::page::MapPage;
use crate::delta::alloc::Allocator;
use crate::delta::in_use::InUseMark;
use crate::error::{Error, Result};
use crate::format::layout::{BAT_PAGE_LEN, PageIndex};
use crate::planted::{Bug, planted};
use crate::storage::Keep;
use crate::sync::{self, MutexGuard};
use crate::units::{FileCluster, FileOffset};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// Pages that are copied between one data sync and the next.
const AREA_PAGES: usize = 256;
/// Clusters that are punched in one call.
const PUNCH_RUN: u64 = 1024;

/// What belongs to whoever holds the `flush` lock.
#[derive(Debug)]
pub struct FlushState {
    parts: Vec<PartFlush>,
    /// Where pages are copied to.
    area: Vec<u8>,
}

#[derive(Debug)]
struct PartFlush {
    /// Owner of the header's bytes; `None` for a plain file.
    mark: Option<InUseMark>,
    /// The pages of the running round, with the generation that was copied.
    pages: Vec<(Arc<MapPage>, u64)>,
    /// The epoch whose batch is sealed, and whether the round that drops it is through.
    sealed: Option<(u64, bool)>,
}

impl FlushState {
    /// State for parts whose marks are these. All memory that rounds need is set aside here.
    pub fn new(marks: Vec<Option<InUseMark>>, parts: &[Part]) -> Result<Self> {
        let out_of_memory = |_| Error::errno(libc::ENOMEM);
        let mut area = Vec::new();
        area.try_reserve_exact(AREA_PAGES * BAT_PAGE_LEN)
            .map_err(out_of_memory)?;
        area.resize(AREA_PAGES * BAT_PAGE_LEN, 0);
        let mut states = Vec::with_capacity(parts.len());
        for (mark, part) in marks.into_iter().zip(parts) {
            let mut pages = Vec::new();
            let room = part.table.lock().dirty.capacity();
            pages.try_reserve_exact(room).map_err(out_of_memory)?;
            states.push(PartFlush {
                mark,
                pages,
                sealed: None,
            });
        }
        Ok(Self {
            parts: states,
            area,
        })
    }
}

impl Disk {
    /// Makes a part's in-use mark durable, before its file changes for the first time.
    pub fn ensure_marked(&self, index: usize) -> Result<()> {
        let parts = self.parts();
        let part = &parts[index];
        if part.marked.is_open() {
            return Ok(());
        }
        let mut state = self.flush.lock();
        let Some(state) = state.as_mut() else {
            return Err(Error::errno(libc::EROFS));
        };
        self.expect_open()?;
        self.health.check()?;
        if part.marked.is_open() {
            return Ok(());
        }
        if let Some(mark) = state.parts[index].mark.as_mut() {
            mark.set(part.top_storage().as_ref()).map_err(|e| {
                // Nothing else has been written yet, so the mark can be tried again as a whole.
                if !e.is_no_space() {
                    self.health
                        .latch(&format!("the in-use mark could not be set: {e}"));
                }
                e.in_file(part.chain.top().path())
            })?;
        }
        part.reserve_table();
        part.marked.open();
        Ok(())
    }

    /// One flush round over all parts. Returns when it is durable, or latches the disk.
    pub fn flush_now(&self) -> Result<()> {
        let result = self.run_round();
        self.after_round();
        result
    }

    /// Steps 1 to 7.
    pub(super) fn run_round(&self) -> Result<()> {
        self.round(&mut self.flush.lock())
    }

    /// Step 9, and those go on who waited for a flush.
    pub(super) fn after_round(&self) {
        self.release_drained(&mut self.flush.lock());
        self.wake_waiters();
    }

    /// A disk that is read-only has nothing to flush.
    pub(super) fn round(&self, guard: &mut MutexGuard<'_, Option<FlushState>>) -> Result<()> {
        let Some(state) = guard.as_mut() else {
            return Ok(());
        };
        self.health.check()?;
        bump(&self.counters.flush_rounds, 1);
        let FlushState { parts, area } = state;
        for (part, flush) in self.parts().iter().zip(parts) {
            self.round_of_part(part, flush, area).map_err(|error| {
                let error = error.in_file(part.chain.top().path());
                if planted(Bug::FailedSyncRetried) {
                    keep_pages(part, flush);
                    return error;
                }
                self.health.latch(&format!("a flush failed: {error}"));
                error
            })?;
        }
        Ok(())
    }

    fn round_of_part(&self, part: &Part, flush: &mut PartFlush, area: &mut [u8]) -> Result<()> {
        debug_assert!(flush.pages.is_empty());
        let file_end = {
            let mut table = part.table.lock();
            let table = &mut *table;
            flush
                .pages
                .extend(table.dirty.drain(..).map(|page| (page, 0)));
            table.in_flush = flush.pages.len();
            if !planted(Bug::SealLate) {
                seal(part, table, flush);
            }
            table.alloc.as_ref().map(Allocator::file_end)
        };
        let was_dirty = part.data_dirty.take();
        if flush.pages.is_empty() {
            if was_dirty {
                sync_part(part, file_end)?;
            }
        } else {
            // In table order, so that neighbours go to the file in one write.
            flush.pages.sort_unstable_by_key(|(page, _)| page.index());
            for pages in flush.pages.chunks_mut(AREA_PAGES) {
                let needs_barrier = copy_pages(part, pages, area);
                if needs_barrier && !skips_data_sync(was_dirty) {
                    sync_part(part, file_end)?;
                }
                if planted(Bug::LivePages) {
                    copy_pages(part, pages, area);
                }
                self.write_pages(part, pages, area)?;
            }
            let synced = sync_part(part, file_end);
            if !planted(Bug::SyncErrorSwallowed) {
                synced?;
            }
        }
        if planted(Bug::SealLate) {
            seal(part, &mut part.table.lock(), flush);
        }
        settle_pages(part, flush);
        if let Some((_, through)) = flush.sealed.as_mut() {
            *through = true;
        }
        Ok(())
    }

    /// Step 5. A lack of space is waited for by the policy before it counts as a failure.
    fn write_pages(&self, part: &Part, pages: &[(Arc<MapPage>, u64)], area: &[u8]) -> Result<()> {
        for (range, bytes) in page_runs(part, pages) {
            let bytes = &area[bytes];
            let since = sync::now();
            loop {
                match part.top_storage().write_at(range.start, bytes) {
                    Ok(()) => break,
                    Err(error) if error.is_no_space() && !self.enospc.is_over(since) => {
                        self.note_no_space(&error);
                        sync::sleep(Duration::from_millis(500));
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    /// Step 9, as far as readers allow it now.
    pub(super) fn release_drained(&self, guard: &mut MutexGuard<'_, Option<FlushState>>) {
        let Some(state) = guard.as_mut() else { return };
        if self.health.is_latched() {
            return;
        }
        for (part, flush) in self.parts().iter().zip(&mut state.parts) {
            let Some((epoch, true)) = flush.sealed else {
                continue;
            };
            if !part.epochs.has_drained(epoch) && !planted(Bug::ReleaseBeforeDrain) {
                continue;
            }
            flush.sealed = None;
            release_sealed(part);
        }
    }

    /// Lets those go on who waited for a flush. Whoever still finds no room waits again.
    pub(super) fn wake_waiters(&self) {
        for part in self.parts().iter() {
            let woken = part.table.lock().parked.take(|wait| wait == Wait::Flush);
            part.wake(woken);
        }
    }

    /// Closes the disk for good; nobody may use it any more.
    ///
    /// 1. flush, so that the table in the file is complete;
    /// 2. wait for the last readers, punch what is free inside the file, cut what is free at its
    ///    end. Before 1, an entry in the file could still name a cluster that is cut away;
    /// 3. sync: the cut must not become durable after 4;
    /// 4. clear the marks, each with a sync of its own. Of a split disk none before 3 is through
    ///    for all parts.
    ///
    /// On any failure the marks stay, and so does what is durable.
    pub(super) fn close_files(&self) -> Result<()> {
        if planted(Bug::TrimBeforeFlush) {
            self.trim_early()?;
        }
        if !planted(Bug::CloseDoesNotFlush) {
            self.flush_now()?;
        }
        let mut guard = self.flush.lock();
        let deadline = sync::now() + Duration::from_secs(10);
        while self.has_sealed(&guard) && sync::now() < deadline {
            self.release_drained(&mut guard);
            sync::sleep(Duration::from_millis(1));
        }
        if !planted(Bug::CloseDoesNotFlush) {
            self.round(&mut guard)?;
        }
        self.release_drained(&mut guard);
        let Some(state) = guard.as_mut() else {
            return Ok(());
        };
        let latch = |part: &Part, error: Error| {
            let error = error.in_file(part.chain.top().path());
            self.health.latch(&format!("the close failed: {error}"));
            error
        };
        for part in self.parts().iter() {
            if part.marked.is_open() && !part.chain.is_plain() {
                trim(part).map_err(|e| latch(part, e))?;
            }
        }
        for (part, flush) in self.parts().iter().zip(&mut state.parts) {
            let Some(mark) = flush.mark.as_mut() else {
                continue;
            };
            let mapped = part
                .table
                .lock()
                .alloc
                .as_ref()
                .map_or(0, |alloc| alloc.mapped());
            mark.clear(part.top_storage().as_ref(), mapped == 0)
                .map_err(|e| latch(part, e))?;
            part.marked.close();
        }
        Ok(())
    }

    /// A planted bug: the files are cut by what is free in memory, whatever their tables say.
    fn trim_early(&self) -> Result<()> {
        let _flush = self.flush.lock();
        for part in self.parts().iter().filter(|part| part.marked.is_open()) {
            if let Some(alloc) = part.table.lock().alloc.as_mut() {
                alloc.seal();
                while let Some(run) = alloc.sealed_run(PUNCH_RUN) {
                    alloc.release(run, false);
                }
            }
            trim(part)?;
        }
        Ok(())
    }

    fn has_sealed(&self, guard: &MutexGuard<'_, Option<FlushState>>) -> bool {
        guard
            .as_ref()
            .is_some_and(|state| state.parts.iter().any(|part| part.sealed.is_some()))
    }
}

/// Step 1: what is freed from now on belongs to the next batch.
fn seal(part: &Part, table: &mut Table, flush: &mut PartFlush) {
    if let Some(alloc) = table.alloc.as_mut() {
        if alloc.quarantined() > 0 && alloc.seal() {
            flush.sealed = Some((part.epochs.end(), false));
        }
    }
}

/// Syncs the file. `file_end` is how long the allocator knew it to be before: that, and the zeros
/// of what it grew by, are durable now.
fn sync_part(part: &Part, file_end: Option<u64>) -> Result<()> {
    part.top_storage().sync_data()?;
    let mut table = part.table.lock();
    if let (Some(alloc), Some(file_end)) = (table.alloc.as_mut(), file_end) {
        alloc.synced(file_end);
    }
    Ok(())
}

/// True when a planted bug leaves out step 4.
fn skips_data_sync(was_dirty: bool) -> bool {
    planted(Bug::NoDataSync)
        || !was_dirty && (planted(Bug::PunchBelieved) || planted(Bug::GrowthBelieved))
}

/// A planted bug: the pages of a failed round are tried again.
fn keep_pages(part: &Part, flush: &mut PartFlush) {
    let mut table = part.table.lock();
    table
        .dirty
        .extend(flush.pages.drain(..).map(|(page, _)| page));
    table.in_flush = 0;
}

/// Step 3: copies pages into the area, one after the other, each under the lock for itself. `true`
/// when an entry among them needs step 4; asked under the same lock, since entries are published
/// while the round runs.
fn copy_pages(part: &Part, pages: &mut [(Arc<MapPage>, u64)], area: &mut [u8]) -> bool {
    let Some(layout) = part.chain.top().layout() else {
        return true;
    };
    let mut needs_barrier = false;
    for ((page, generation), bytes) in pages.iter_mut().zip(area.chunks_exact_mut(BAT_PAGE_LEN)) {
        let slots = layout.slots_of(page.index());
        let target = &mut bytes[4 * slots.start..4 * slots.end];
        let _table = part.table.lock();
        *generation = page.generation();
        page.encode(part.chain.geometry().top, slots, target);
        needs_barrier |= page.needs_barrier();
    }
    needs_barrier
}

/// The copies as runs of neighbouring pages: where they go in the file, where they are in the area.
fn page_runs(
    part: &Part,
    pages: &[(Arc<MapPage>, u64)],
) -> impl Iterator<Item = (Range<FileOffset>, Range<usize>)> {
    let layout = part.chain.top().layout().copied();
    let mut next = 0;
    std::iter::from_fn(move || {
        let layout = layout?;
        let first = next;
        let index = pages.get(first)?.0.index();
        next += 1;
        while pages.get(next).is_some_and(|(page, _)| {
            page.index() == PageIndex(index.0 + u32::try_from(next - first).unwrap_or(0))
        }) {
            next += 1;
        }
        let last = pages[next - 1].0.index();
        let start = first * BAT_PAGE_LEN + 4 * layout.slots_of(index).start;
        let end = (next - 1) * BAT_PAGE_LEN + 4 * layout.slots_of(last).end;
        Some((
            layout.page_bytes(index).start..layout.page_bytes(last).end,
            start..end,
        ))
    })
}

/// Step 7.
fn settle_pages(part: &Part, flush: &mut PartFlush) {
    for pages in flush.pages.chunks(AREA_PAGES) {
        let mut table = part.table.lock();
        for (page, generation) in pages {
            if page.generation() == *generation || planted(Bug::PagesAlwaysClean) {
                page.cleaned();
            } else {
                table.dirty.push(Arc::clone(page));
            }
        }
        table.in_flush = table.in_flush.saturating_sub(pages.len());
    }
    flush.pages.clear();
}

/// Punches a sealed batch that nobody can see any more, and makes it free.
fn release_sealed(part: &Part) {
    let cluster = part.chain.geometry().cluster;
    let run = |part: &Part| part.table.lock().alloc.as_ref()?.sealed_run(PUNCH_RUN);
    while let Some(clusters) = run(part) {
        let place = |number| cluster.file_start(FileCluster::new(number));
        let range = place(clusters.start)..place(clusters.end);
        if planted(Bug::PunchAfterHandOver) {
            if let Some(alloc) = part.table.lock().alloc.as_mut() {
                alloc.release(clusters.clone(), false);
            }
        }
        let punched = part.top_storage().zero(range, Keep::Nothing);
        if !planted(Bug::ZeroNotNoted) && !planted(Bug::PunchBelieved) {
            part.note_data();
        }
        if let Err(error) = &punched {
            log::warn!("freed clusters could not be punched: {error}");
        }
        if let Some(alloc) = part.table.lock().alloc.as_mut() {
            alloc.release(clusters, punched.is_ok());
        }
    }
}

/// Gives the host back what is free: holes inside the file, and its tail.
fn trim(part: &Part) -> Result<()> {
    let _length = part.grow.lock();
    let cluster = part.chain.geometry().cluster;
    let place = |number| cluster.file_start(FileCluster::new(number));
    let storage = part.top_storage();
    let used_end = match part.table.lock().alloc.as_ref() {
        Some(alloc) if alloc.waiting() == 0 => alloc.used_end(),
        // Somebody still reads a freed cluster; the next close trims.
        _ => return Ok(()),
    };
    let mut from = 0;
    loop {
        let run = part
            .table
            .lock()
            .alloc
            .as_ref()
            .and_then(|a| a.free_run(from, PUNCH_RUN));
        let Some(run) = run.filter(|run| run.start < used_end) else {
            break;
        };
        from = run.end;
        let end = place(run.end.min(used_end));
        let has_blocks = storage
            .next_data(place(run.start))?
            .is_some_and(|data| data.start < end);
        if has_blocks {
            storage.zero(place(run.start)..end, Keep::Nothing)?;
        }
    }
    if storage.len()? != place(used_end) && used_end > 0 {
        storage.set_len(place(used_end))?;
        if let Some(alloc) = part.table.lock().alloc.as_mut() {
            alloc.truncated(used_end);
        }
    }
    if planted(Bug::TrimNotSynced) {
        return Ok(());
    }
    storage.sync_data()
}
