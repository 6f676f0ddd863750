//! Makes the file of an image as small as what it holds: every state that a kill or a power cut can
//! leave shows the same disk, and the command repeated completes it.
//!
//! The order, each step durable before the next begins:
//!
//! 1. Sync the file, look at it, and decide. Nothing has been changed.
//! 2. The in-use mark. Were it set later, an image in the middle of this could pass for a closed
//!    one.
//! 3. Clusters of zeros: where no level below has the cluster its entry becomes 0; else the cluster
//!    is punched and stays, so that it goes on hiding what is below. Either shows the zeros that
//!    were there, so these need no order among each other; but until they are durable, the freed
//!    places are still named, and nothing may be moved there.
//! 4. Clusters are moved: into disk order where that is wanted (`order`), else only those behind
//!    the end that the file will have, into the places that are free before it
//!    (`relocate`).
//! 5. What nothing names is given back. Before step 4 was durable, the old places were still named.
//! 6. Holes are written full where that is wanted.
//! 7. The in-use mark goes.

pub mod disk;
mod order;
mod zeros;

use crate::admin::progress::Progress;
use crate::admin::relocate::{self, BATCH_BYTES, Sound, Wanted};
use crate::delta::bits::BitSet;
use crate::delta::image::Image;
use crate::delta::in_use::InUseMark;
use crate::error::{ErrorKind, Result};
use crate::planted::{Bug, planted};
use crate::storage::{Keep, Storage};
use crate::units::{FileOffset, len_u64, len_usize};
use std::ops::Range;

/// Bytes that are written at a time.
const STRIDE: u64 = 1 << 20;

/// What is wanted of an image.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Free clusters that hold nothing but zeros.
    pub zeroes: bool,
    /// Bring the clusters into the order of the disk.
    pub defrag: bool,
    /// Write zeros to what the host keeps as holes.
    pub fill_holes: bool,
    /// Dirty bitmaps may be lost.
    pub drop_bitmaps: bool,
    /// Bytes that are moved between two syncs.
    pub batch_bytes: u64,
}

impl Default for Request {
    fn default() -> Self {
        Self {
            zeroes: false,
            defrag: false,
            fill_holes: false,
            drop_bitmaps: false,
            batch_bytes: BATCH_BYTES,
        }
    }
}

/// What will be done to an image, or was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planned {
    /// Bytes of a cluster.
    pub cluster_bytes: u64,
    /// Length of the file.
    pub before: u64,
    /// Length that it gets.
    pub after: u64,
    /// Clusters of zeros that are freed.
    pub freed: u64,
    /// Clusters of zeros that are punched and stay, because a level below has the cluster too.
    pub punched: u64,
    /// Clusters that are moved; where they are brought in order, those that are not in their place.
    pub moves: u64,
    /// There are holes to be filled.
    pub has_holes: bool,
    /// Clusters inside the file that nothing names and that hold bytes.
    pub leaked: u64,
    /// Dirty bitmaps are dropped.
    pub drops_bitmaps: bool,
    /// The in-use mark is set already: the image was not closed.
    pub was_marked: bool,
}

impl Planned {
    /// True where there is nothing to do.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        let changes = self.freed + self.punched + self.moves + self.leaked;
        changes == 0 && self.before <= self.after && !self.has_holes && !self.was_marked
    }
}

/// What is known of an image and of what is wanted of it.
struct Plan {
    /// As it will be after step 3.
    sound: Sound,
    /// Disk clusters whose entries become 0.
    freed: BitSet,
    wanted: Wanted,
    /// Places of the file that are punched and stay.
    punched: Vec<Range<u64>>,
    told: Planned,
}

/// What compacting an image would do. `lower` are the levels below it. Changes nothing.
pub fn plan_image(
    storage: &dyn Storage,
    lower: &[Image],
    request: &Request,
    progress: &Progress,
) -> Result<Planned> {
    Ok(plan(storage, lower, request, progress, false)?.told)
}

fn plan(
    storage: &dyn Storage,
    lower: &[Image],
    request: &Request,
    progress: &Progress,
    change: bool,
) -> Result<Plan> {
    let mut sound = relocate::look(storage, change, request.drop_bitmaps)?;
    let was_marked = sound.is_marked();
    let facts = &sound.checked.facts;
    let (before, leaked) = (facts.file_len, facts.table.leaked);
    let drops_bitmaps = !sound.checked.bitmaps.is_empty();
    let mut found = match request.zeroes {
        true => zeros::find(storage, &mut sound, lower, progress)?,
        false => zeros::Found::new(&sound)?,
    };
    if request.fill_holes {
        // Each would get its blocks back at once.
        found.punched.clear();
    }
    let cluster_bytes = sound.header.layout().cluster().bytes();
    let first = sound.first();
    let end = first + sound.mapped();
    let wanted = Wanted {
        sources: end..u64::MAX,
        targets: first..end,
    };
    let moves = match request.defrag {
        true => order::misplaced(storage, &sound, &found.freed)?,
        false => wanted.outlook(&sound)?.0,
    };
    let after = end.saturating_mul(cluster_bytes);
    let told = Planned {
        cluster_bytes,
        before,
        after,
        freed: found.freed.len(),
        punched: len_u64(found.punched.len()),
        moves,
        has_holes: request.fill_holes && has_holes(storage, &sound)?,
        leaked,
        drops_bitmaps,
        was_marked,
    };
    Ok(Plan {
        sound,
        freed: found.freed,
        wanted,
        punched: found.punched,
        told,
    })
}

/// Compacts an image, or says why it cannot. The caller has it locked.
pub fn compact_image(
    storage: &dyn Storage,
    lower: &[Image],
    request: &Request,
    progress: &Progress,
) -> Result<Planned> {
    compact_image_after(storage, lower, request, progress, &mut || Ok(()))
}

/// The same, where `begin` is called before the first change, which it can still refuse.
pub(super) fn compact_image_after(
    storage: &dyn Storage,
    lower: &[Image],
    request: &Request,
    progress: &Progress,
    begin: &mut dyn FnMut() -> Result<()>,
) -> Result<Planned> {
    let plan = plan(storage, lower, request, progress, true)?;
    if plan.told.is_nothing() {
        return Ok(plan.told);
    }
    begin()?;
    let mut mark = InUseMark::new(*plan.sound.header.raw());
    mark.set(storage)?;
    let changed = plan.change(storage, request, progress);
    let stopped = match changed {
        // The user has stopped it between two moves: what is done is done, and no failure.
        Err(error) if error.kind() == ErrorKind::Interrupted => Some(error),
        Err(error) => return Err(error),
        Ok(()) => None,
    };
    let left = relocate::give_back(storage, true)?;
    if request.fill_holes && stopped.is_none() {
        fill_holes(storage, left.space.named_end, progress)?;
        storage.sync_data()?;
    }
    mark.clear(storage, left.mapped() == 0)?;
    match stopped {
        Some(error) => Err(error),
        None => Ok(plan.told),
    }
}

impl Plan {
    /// Steps 3 and 4.
    fn change(&self, storage: &dyn Storage, request: &Request, progress: &Progress) -> Result<()> {
        zeros::free(storage, &self.freed)?;
        for range in &self.punched {
            let range = FileOffset::new(range.start)..FileOffset::new(range.end);
            storage.zero(range, Keep::Nothing)?;
        }
        if !planted(Bug::FreedNotSynced) {
            storage.sync_data()?;
        }
        let Planned {
            moves,
            cluster_bytes,
            ..
        } = self.told;
        progress.step("moving", moves.saturating_mul(cluster_bytes));
        if request.defrag {
            return order::carry_out(storage, &self.sound, request.batch_bytes, progress);
        }
        self.wanted
            .carry_out(storage, &self.sound, request.batch_bytes, progress)?;
        Ok(())
    }
}

/// The next range before `end` that the host keeps as a hole.
fn next_hole(storage: &dyn Storage, from: u64, end: u64) -> Result<Option<Range<u64>>> {
    let mut at = from;
    while at < end {
        match storage.next_data(FileOffset::new(at))? {
            Some(data) if data.start.get() <= at => at = data.end.get().max(at + 1),
            Some(data) => return Ok(Some(at..data.start.get().min(end))),
            None => return Ok(Some(at..end)),
        }
    }
    Ok(None)
}

/// True where the table, or a cluster that an entry names, is not fully written.
fn has_holes(storage: &dyn Storage, sound: &Sound) -> Result<bool> {
    let space = &sound.space;
    let table_end = sound.header.layout().data_start().get();
    let mut from = 0;
    while let Some(hole) = next_hole(storage, from, space.named_end)? {
        let mut touched = space.grid.touched(hole.clone());
        if hole.start < table_end || touched.any(|number| space.named.contains(number)) {
            return Ok(true);
        }
        from = hole.end;
    }
    Ok(false)
}

/// Writes zeros to all holes before `end`. Nothing shows a difference, so it needs no order.
fn fill_holes(storage: &dyn Storage, end: u64, progress: &Progress) -> Result<()> {
    progress.step("filling holes", 0);
    let zeros = vec![0; len_usize(STRIDE).unwrap_or(0)];
    let mut from = 0;
    while let Some(hole) = next_hole(storage, from, end)? {
        let mut at = hole.start;
        while at < hole.end {
            let piece = &zeros[..len_usize((hole.end - at).min(STRIDE)).unwrap_or(0)];
            storage.write_at(FileOffset::new(at), piece)?;
            progress.add(len_u64(piece.len()));
            at += len_u64(piece.len());
        }
        from = hole.end;
    }
    Ok(())
}
