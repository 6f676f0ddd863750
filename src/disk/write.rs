//! Writing: in place where the top maps the cluster, else reserve, fill, write, publish.
//!
//! The order for a cluster that needs a place in the top's file, and what each reordering breaks:
//!
//! 1. reserve: the entries are marked pending, so nobody else gives these clusters a place;
//! 2. fill: copy the lower level's content, or zeros, into the new place. After 3 it would
//!    overwrite the payload of this write; after 4, that of another one;
//! 3. payload;
//! 4. note that there is unsynced data. Before 3, a flush that runs in between would clear the note
//!    without syncing the payload;
//! 5. publish: the map names the new place. Before 2 and 3, a read would see bytes of whoever had
//!    the place before;
//! 6. reply. Before 5, a later read could still see the old content.
//!
//! The entry reaches the file only in a later flush, behind a sync of the data (see `flush`).
//! A reservation that is dropped before 5 gives its clusters back, and the map never changed.

use super::part::{Next, Part, Progress};
use super::stats::{Counters, bump};
use super::table::{Table, Wait};
use crate::chain::page::{MapPage, Word};
use crate::delta::alloc::{Allocator, Reserved};
use crate::error::{Error, Result};
use crate::format::layout::{BAT_PAGE_SLOTS, Layout};
use crate::plan::{Fill, Segment, Segments, Stop, Target, plan_write};
use crate::planted::{Bug, planted};
use crate::storage::Keep;
use crate::units::{DiskCluster, DiskOffset, FileCluster, FileOffset, Level, len_u64, len_usize};
use smallvec::SmallVec;
use std::sync::Arc;

/// Segments of a plan on the pool, where memory allows.
const POOL_SEGMENTS: usize = 64;
/// Steps of the copy by hand, where the host cannot copy between two files.
const COPY_STEP: usize = 32 << 10;

/// True when all bytes are 0.
fn is_zero(bytes: &[u8]) -> bool {
    static ZEROS: [u8; 4096] = [0; 4096];
    bytes
        .chunks(ZEROS.len())
        .all(|chunk| *chunk == ZEROS[..chunk.len()])
}

fn range_is_zero(data: &[u8], start: u64, len: u64) -> bool {
    match (len_usize(start), len_usize(len)) {
        (Some(start), Some(len)) => data.get(start..start + len).is_some_and(is_zero),
        _ => false,
    }
}

fn is_fresh(segment: &Segment<Target>) -> bool {
    matches!(segment.what, Target::Fresh { .. })
}

/// A lack of space is waited for; everything else is the request's answer.
pub fn wait_for_space(result: Result<u64>) -> Result<Progress> {
    match result {
        Ok(done) => Ok(Progress::Done(done)),
        Err(error) if error.is_no_space() => Ok(Progress::Wait(Wait::Space)),
        Err(error) => Err(error),
    }
}

/// A cluster taken for a disk cluster.
#[derive(Clone, Copy, Debug)]
pub struct Taken {
    cluster: DiskCluster,
    place: Reserved,
    entry: u32,
}

/// The clusters of one step; room for as many as the step's plan has segments.
pub type TakenList = SmallVec<[Taken; 8]>;

/// Clusters taken for one step of a request, until they are published. Dropped, they go back.
#[derive(Debug)]
pub struct Reservation<'a> {
    part: &'a Part,
    page: Arc<MapPage>,
    list: TakenList,
}

impl<'a> Reservation<'a> {
    /// Holds clusters that have been taken; made under the `table` lock that took them. The page
    /// is kept in memory once for all of them.
    pub fn new(part: &'a Part, page: &Arc<MapPage>, list: TakenList) -> Self {
        page.pin();
        Self {
            part,
            page: Arc::clone(page),
            list,
        }
    }

    /// The file clusters.
    pub fn places(&self) -> impl Iterator<Item = FileCluster> + '_ {
        self.list.iter().map(|taken| taken.place.cluster)
    }

    /// Makes the clusters visible at their new places.
    pub fn publish(mut self, counters: &Counters) {
        bump(&counters.clusters_allocated, len_u64(self.list.len()));
        self.settle(true);
    }

    /// A planted bug: readers find the new places before their content is there.
    fn publish_early(&self) {
        let _table = self.part.table.lock();
        for taken in &self.list {
            let (_, slot) = Layout::page_of(taken.cluster);
            let word = Word::mapped(self.part.chain.geometry().top, taken.entry);
            self.page.set_word(slot, word.pending());
        }
    }

    fn settle(&mut self, keep: bool) {
        let top = self.part.chain.geometry().top;
        let list = std::mem::take(&mut self.list);
        let mut table = self.part.table.lock();
        for taken in &list {
            let (_, slot) = Layout::page_of(taken.cluster);
            let old = self.page.word(slot);
            let alloc = table.alloc.as_mut();
            if keep {
                let word = Word::mapped(top, taken.entry);
                let covers = old.level().is_some();
                // Without a barrier a power cut may leave the entry and not the bytes. Zeros where
                // there was a hole are what the disk showed before; anything else is not.
                if !taken.place.zero_stable || covers && !planted(Bug::OneBarrierForCopies) {
                    self.page.ask_barrier();
                }
                self.page
                    .set_word(slot, if covers { word.covering_lower() } else { word });
                alloc.into_iter().for_each(Allocator::published);
            } else {
                self.page.set_word(slot, old.settled());
                alloc
                    .into_iter()
                    .for_each(|alloc| alloc.abort(taken.place.cluster));
            }
        }
        if keep {
            table.changed(&self.page);
        }
        self.page.unpin();
        let woken = table.parked.take(|wait| {
            matches!(wait, Wait::Pending(cluster) if list.iter().any(|own| own.cluster == cluster))
        });
        drop(table);
        self.part.wake(woken);
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if !self.list.is_empty() {
            self.settle(false);
        }
    }
}

/// Clusters that a plan needs.
#[derive(Clone, Copy, Debug)]
pub struct Need {
    /// How many must be free.
    pub count: u64,
    /// With blocks of their own, or without.
    pub blocks: Keep,
    /// What the allocator had given out ever when the plan was made.
    pub reserved_ever: u64,
}

/// Why a step could not be made under the lock.
#[derive(Clone, Copy, Debug)]
pub enum Refused {
    /// The plan stopped.
    Stop(Stop),
    /// The file needs more free clusters.
    Grow(Need),
    /// Something must happen first.
    Wait(Wait),
    /// All clusters turned out to be mapped by now.
    NotNeeded,
}

/// The file must grow first.
fn grow_by(table: &Table, count: u64, blocks: Keep) -> Refused {
    Refused::Grow(Need {
        count,
        blocks,
        reserved_ever: table.alloc.as_ref().map_or(0, Allocator::reserved_ever),
    })
}

impl Part {
    /// Writes `data` at `at` if the top maps all of it, or if it changes nothing: without locks,
    /// without allocating. `false` when it does not; part of the data may have been written, which
    /// the full write then does again.
    pub fn write_in_place(&self, at: DiskOffset, data: &[u8]) -> Result<bool> {
        let _pin = (!planted(Bug::WritesDoNotPin)).then(|| self.epochs.pin());
        let view = self.view();
        let mut segments = Segments::inline();
        let mut done = 0;
        while done < data.len() {
            segments.clear();
            let rest = &data[done..];
            let at = DiskOffset::new(at.get() + len_u64(done));
            let zero = |start, len| range_is_zero(rest, start, len);
            let len = len_u64(rest.len());
            let geometry = self.chain.geometry();
            let covered = match plan_write(&view, geometry, at, len, zero, &mut segments) {
                Ok(covered) => covered,
                Err(Stop::Bad(cluster)) => return Err(self.bad_entry(cluster)),
                Err(_) => return Ok(false),
            };
            if segments.as_slice().iter().any(is_fresh) {
                return Ok(false);
            }
            self.write_segments(&segments, rest, &[])?;
            done += len_usize(covered).unwrap_or(0);
        }
        Ok(true)
    }

    /// Where all of a write goes, if that is one place that the top has for it already; the caller
    /// has pinned the epoch.
    pub fn one_run_in_place(&self, at: DiskOffset, data: &[u8]) -> Option<(Level, FileOffset)> {
        let mut segments = Segments::inline();
        let (geometry, len) = (self.chain.geometry(), len_u64(data.len()));
        let zero = |start, len| range_is_zero(data, start, len);
        let covered = plan_write(&self.view(), geometry, at, len, zero, &mut segments);
        match segments.as_slice() {
            [only] if covered == Ok(len) => match only.what {
                Target::InPlace { at } => Some((geometry.top, at)),
                Target::Nothing | Target::Fresh { .. } => None,
            },
            _ => None,
        }
    }

    /// Writes the first bytes of `data` at `at`, giving clusters a place where they have none.
    /// `data` lies within the part. Called on threads that may wait for the host.
    pub fn write_step(&self, at: DiskOffset, data: &[u8], counters: &Counters) -> Result<Progress> {
        let data = self.clip_to_page(at, data);
        let mut list = TakenList::new();
        let room = if list.try_reserve_exact(POOL_SEGMENTS).is_ok() {
            POOL_SEGMENTS
        } else {
            list.inline_size()
        };
        let mut segments = Segments::with_room(room);
        // The page that was loaded last, kept in memory until the step is done.
        let mut held = None;
        loop {
            let _pin = (!planted(Bug::WritesDoNotPin)).then(|| self.epochs.pin());
            segments.clear();
            let zero = |start, len| range_is_zero(data, start, len);
            let (geometry, len) = (self.chain.geometry(), len_u64(data.len()));
            let covered = match plan_write(&self.view(), geometry, at, len, zero, &mut segments) {
                Ok(covered) => covered,
                Err(stop) => match self.after_stop(stop, counters)? {
                    Next::Wait(wait) => return Ok(Progress::Wait(wait)),
                    Next::Again(page) => {
                        held = page;
                        continue;
                    }
                },
            };
            if segments.as_slice().iter().all(|segment| !is_fresh(segment)) {
                let written = self.write_segments(&segments, data, &[]);
                return wait_for_space(written.map(|()| covered));
            }
            let (covered, reservation) = match self.reserve(at, data, &mut segments, &mut list) {
                Ok(reserved) => reserved,
                Err(refused) => match self.after_refusal(refused, counters)? {
                    Next::Wait(wait) => return Ok(Progress::Wait(wait)),
                    Next::Again(page) => {
                        held = page.or(held);
                        continue;
                    }
                },
            };
            let payload = || self.write_segments(&segments, data, &reservation.list);
            let fill = || self.fill(&segments, &reservation.list, counters);
            let written = if planted(Bug::FillLate) {
                payload().and_then(|()| fill())
            } else if planted(Bug::PublishEarly) {
                reservation.publish_early();
                fill().and_then(|()| payload())
            } else {
                fill().and_then(|()| payload())
            };
            assert!(!planted(Bug::Panic), "a planted panic");
            if written.is_ok() {
                reservation.publish(counters);
            } else {
                drop(reservation);
            }
            return wait_for_space(written.map(|()| covered));
        }
    }

    /// Does what a refused reservation asks for.
    pub fn after_refusal(&self, refused: Refused, counters: &Counters) -> Result<Next> {
        match refused {
            Refused::NotNeeded => Ok(Next::Again(None)),
            Refused::Wait(wait) => Ok(Next::Wait(wait)),
            Refused::Grow(need) => self.grow(need),
            Refused::Stop(stop) => self.after_stop(stop, counters),
        }
    }

    /// A step stays within one page of the map, so that it needs only that page in memory.
    fn clip_to_page<'d>(&self, at: DiskOffset, data: &'d [u8]) -> &'d [u8] {
        let cluster = self.chain.geometry().cluster;
        let (first, _) = cluster.split(at);
        let (_, slot) = Layout::page_of(first);
        let left = len_u64(BAT_PAGE_SLOTS - slot);
        let page_end = cluster
            .disk_start(DiskCluster::new(first.get() + left))
            .get();
        let len = len_usize(page_end - at.get())
            .unwrap_or(usize::MAX)
            .min(data.len());
        &data[..len]
    }

    /// Plans again under the lock, where nothing can change in between, and takes the clusters that
    /// the plan needs: all of them or none. `list` has room for one cluster a segment.
    fn reserve(
        &self,
        at: DiskOffset,
        data: &[u8],
        segments: &mut Segments<Target>,
        list: &mut TakenList,
    ) -> std::result::Result<(u64, Reservation<'_>), Refused> {
        let (first, _) = self.chain.geometry().cluster.split(at);
        let (index, _) = Layout::page_of(first);
        let mut table = self.table.lock();
        let Some(page) = self.map.get(index).as_ref().map(Arc::clone) else {
            return Err(Refused::Stop(Stop::Missing(index)));
        };
        segments.clear();
        let zero = |start, len| range_is_zero(data, start, len);
        let (geometry, len) = (self.chain.geometry(), len_u64(data.len()));
        let covered =
            plan_write(&self.view(), geometry, at, len, zero, segments).map_err(Refused::Stop)?;
        let fresh = segments
            .as_slice()
            .iter()
            .filter(|segment| is_fresh(segment))
            .count();
        if fresh == 0 {
            return Err(Refused::NotNeeded);
        }
        if table.is_over_budget(&page) {
            return Err(Refused::Wait(Wait::Flush));
        }
        let clusters = segments
            .as_slice()
            .iter()
            .filter_map(|segment| match segment.what {
                Target::Fresh { cluster, .. } => Some(cluster),
                _ => None,
            });
        if table
            .alloc
            .as_ref()
            .is_none_or(|alloc| alloc.free() < len_u64(fresh))
        {
            return Err(grow_by(&table, len_u64(fresh), Keep::Blocks));
        }
        for cluster in clusters {
            self.take_one(&mut table, &page, cluster, Keep::Blocks, list)?;
        }
        let reservation = Reservation::new(self, &page, std::mem::take(list));
        drop(table);
        Ok((covered, reservation))
    }

    /// Takes a place for one cluster and marks its entry pending.
    pub fn take_one(
        &self,
        table: &mut Table,
        page: &MapPage,
        cluster: DiskCluster,
        blocks: Keep,
        list: &mut TakenList,
    ) -> std::result::Result<(), Refused> {
        let place = table.alloc.as_mut().and_then(Allocator::reserve);
        let (Some(place), Some(layout)) = (place, self.chain.top().layout()) else {
            return Err(grow_by(table, 1, blocks));
        };
        let entry = layout
            .entry_for(place.cluster)
            .expect("the allocator's limit is the last cluster that an entry can name");
        let (_, slot) = Layout::page_of(cluster);
        page.set_word(slot, page.word(slot).pending());
        list.push(Taken {
            cluster,
            place,
            entry,
        });
        Ok(())
    }

    /// Step 2: gives the bytes around the payload their content.
    fn fill(
        &self,
        segments: &Segments<Target>,
        reserved: &[Taken],
        counters: &Counters,
    ) -> Result<()> {
        let geometry = self.chain.geometry();
        let size = geometry.cluster.bytes();
        let mut reserved = reserved.iter();
        for segment in segments.as_slice() {
            let Target::Fresh {
                cluster,
                within,
                fill,
            } = segment.what
            else {
                continue;
            };
            let Some(Taken { place, .. }) = reserved.next() else {
                continue;
            };
            let start = geometry.cluster.file_start(place.cluster);
            let zero = |from: u64, to: u64| {
                if place.zero_known || from >= to {
                    return Ok(());
                }
                let range = start.saturating_add(from)..start.saturating_add(to);
                self.top_storage().zero(range, Keep::Blocks)
            };
            match fill {
                // Past the disk's end a file cluster is zeros: the disk may grow one day.
                Fill::Whole => zero(geometry.cluster_len(cluster), size)?,
                Fill::Zeros => {
                    zero(0, within)?;
                    zero(within + segment.len, size)?;
                }
                Fill::Copy {
                    level,
                    start: from,
                    len,
                } => {
                    if !planted(Bug::NoFill) {
                        self.copy_up(level, from, len, start)?;
                    }
                    zero(len, size)?;
                    bump(&counters.clusters_copied, 1);
                }
            }
        }
        Ok(())
    }

    /// Copies the start of a lower level's cluster into a fresh one: by the host where it can share
    /// or copy blocks itself and may, else by hand.
    fn copy_up(&self, level: Level, from: FileOffset, len: u64, to: FileOffset) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let image = self.chain.level(level);
        let top = self.top_storage();
        let source = image.storage();
        if self.reflink && top.copy_from(to, source.as_ref(), from..from.saturating_add(len))? {
            return Ok(());
        }
        let mut buffer = [0; COPY_STEP];
        let mut done = 0;
        while done < len {
            let step = len_usize(len - done).unwrap_or(COPY_STEP).min(COPY_STEP);
            source
                .read_at(from.saturating_add(done), &mut buffer[..step])
                .map_err(|e| e.at_level(level).in_file(image.path()))?;
            top.write_at(to.saturating_add(done), &buffer[..step])?;
            done += len_u64(step);
        }
        Ok(())
    }

    /// Step 3: writes the payload; neighbours in the file go in one call.
    fn write_segments(
        &self,
        segments: &Segments<Target>,
        data: &[u8],
        reserved: &[Taken],
    ) -> Result<()> {
        let cluster_size = self.chain.geometry().cluster;
        let mut reserved = reserved.iter();
        let mut run: Option<(FileOffset, u64, u64)> = None;
        for segment in segments.as_slice() {
            let at = match segment.what {
                Target::Nothing => None,
                Target::InPlace { at } => Some(at),
                Target::Fresh { within, .. } => match reserved.next() {
                    Some(Taken { place, .. }) => Some(
                        cluster_size
                            .file_start(place.cluster)
                            .saturating_add(within),
                    ),
                    None => return Err(Error::errno(libc::EIO)),
                },
            };
            run = match (run, at) {
                (Some((start, from, len)), Some(at))
                    if start.checked_add(len) == Some(at) && from + len == segment.start =>
                {
                    Some((start, from, len + segment.len))
                }
                (old, at) => {
                    self.write_run(old, data)?;
                    at.map(|at| (at, segment.start, segment.len))
                }
            };
        }
        self.write_run(run, data)
    }

    fn write_run(&self, run: Option<(FileOffset, u64, u64)>, data: &[u8]) -> Result<()> {
        let Some((at, from, len)) = run else {
            return Ok(());
        };
        let bounds = len_usize(from).zip(len_usize(from.saturating_add(len)));
        let piece = bounds
            .and_then(|(from, to)| data.get(from..to))
            .ok_or_else(|| Error::errno(libc::EIO))?;
        if planted(Bug::DirtyNotedEarly) {
            self.note_data();
        }
        let written = self.top_storage().write_at(at, piece);
        // On failure too: part of it may be down.
        if !planted(Bug::DirtyNotedEarly) {
            self.note_data();
        }
        written.map_err(|e| e.in_file(self.chain.top().path()))
    }
}
