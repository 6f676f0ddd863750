//! Gives a disk another size: every state that a kill or a power cut can leave opens, and the
//! command repeated completes it.
//!
//! The order of growing, each step durable before the next begins:
//!
//! 1. Sync the file, look at it, and decide. Nothing has been changed, and what refuses does so
//!    here.
//! 2. The in-use mark. Were it set later, an image in the middle of this could pass for a closed
//!    one, and its descriptor for a right one.
//! 3. The file is lengthened, and clusters that the longer table needs the place of are moved
//!    (`relocate`). The old header still holds, and nothing is missing.
//! 4. All slots after the entries of the old table become 0: they are the new entries, in places
//!    that data has left. Before step 3 was durable, data would go with them. What the disk's last
//!    cluster holds behind the old end becomes 0 too, because the new size shows it.
//! 5. The header, in one write: number of entries, size of the disk, first block, and the mark as
//!    it is. Before step 4 the new table would hold what the old clusters did. From here on the
//!    image has its new size.
//! 6. What nothing names is given back, by the new header: before it, places of the old table were
//!    not free.
//! 7. The descriptor, where there is one. Before step 5 it would promise what the image does not
//!    have. Until then reading shows the smaller of the two sizes, and nobody else writes.
//! 8. The in-use mark goes. Earlier, and an image and a descriptor that contradict each other could
//!    look as if somebody had made them so.
//!
//! Shrinking loses what is cut off in one write, and nothing of it before. After steps 1 and 2:
//!
//! 3. The header, in one write: number of entries and size of the disk, but the old first block, so
//!    that the entries that are cut off are slots of the table that mean nothing. From here on the
//!    image has its new size. Were any of them cleared before, an interrupted command would leave a
//!    disk of the old size without its end.
//! 4. Those slots become 0. Before the header they were the disk's.
//! 5. Clusters higher than any that the smaller table needs are moved down, as far as there is
//!    room. Before step 4 a check would not tell what was cut off from what is free.
//! 6. The header with the new first block. Before step 4 old entries would be data.
//! 7. And on with step 6 of growing.

pub mod disk;
mod plain;
mod room;

pub use plain::{Place, resize_plain};
pub use room::data_in;

use crate::admin::progress::Progress;
use crate::admin::relocate::{self, BATCH_BYTES, Sound, Wanted};
use crate::delta::image::Image;
use crate::delta::in_use::InUseMark;
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::{RawHeader, Version};
use crate::format::layout::Layout;
use crate::planted::{Bug, planted};
use crate::storage::{Keep, Storage};
use crate::units::{DiskCluster, FileOffset, SECTOR, SectorCount, len_u64, len_usize};

/// Longer tables are not written whole, but have holes where they have no entries.
const TABLE_WRITTEN_MAX: u64 = 128 << 20;
/// Bytes that are written at a time.
const STRIDE: u64 = 1 << 20;

/// What is wanted of an image.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// The new size of its disk; rounded up to whole clusters.
    pub size: SectorCount,
    /// The disk may become smaller.
    pub shrink: bool,
    /// What is cut off may hold data.
    pub force_discard: bool,
    /// Dirty bitmaps may be lost.
    pub drop_bitmaps: bool,
    /// Bytes that are moved between two syncs.
    pub batch_bytes: u64,
    /// The size is not rounded up.
    pub exact: bool,
}

impl Request {
    /// A disk of this size and nothing else.
    #[must_use]
    pub fn new(size: SectorCount) -> Self {
        Self {
            size,
            shrink: false,
            force_discard: false,
            drop_bitmaps: false,
            batch_bytes: BATCH_BYTES,
            exact: false,
        }
    }
}

/// What will be done to an image, or was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planned {
    /// Size by its header.
    pub before: SectorCount,
    /// Size that it gets.
    pub after: SectorCount,
    /// Clusters that are moved.
    pub moves: u64,
    /// Bytes of a cluster.
    pub cluster_bytes: u64,
    /// The first byte of the disk that is cut off and holds data, where one does.
    pub discards: Option<u64>,
    /// Dirty bitmaps are dropped.
    pub drops_bitmaps: bool,
    /// The in-use mark is set already: the image was not closed.
    pub was_marked: bool,
}

impl Planned {
    /// True where the image has that size and was closed.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        self.before == self.after && !self.was_marked
    }
}

/// What is known of an image and of what is wanted of it.
struct Plan {
    sound: Sound,
    resized: RawHeader,
    wanted: Wanted,
    /// End of the file that the moves and the longer table need, in bytes.
    end: u64,
    /// The disk may have its new size, and what comes after that is still to come.
    is_half_cut: bool,
    told: Planned,
}

/// The size that a disk gets: whole clusters, as other programs have it. A size that the disk has
/// already is taken as it is.
#[must_use]
pub fn rounded(size: SectorCount, unit: SectorCount, now: SectorCount) -> SectorCount {
    match size.get().checked_next_multiple_of(unit.get().max(1)) {
        Some(whole) if size != now => SectorCount::new(whole),
        _ => size,
    }
}

/// What resizing an image would do. `lower` are the levels below it. Changes nothing.
pub fn plan_image(storage: &dyn Storage, lower: &[Image], request: &Request) -> Result<Planned> {
    Ok(plan(storage, lower, request, false)?.told)
}

fn plan(storage: &dyn Storage, lower: &[Image], request: &Request, change: bool) -> Result<Plan> {
    let sound = relocate::look_at_cut(storage, change, request.drop_bitmaps)?;
    let header = &sound.header;
    let (layout, before) = (header.layout(), header.size());
    let cluster = layout.cluster();
    let after = match request.exact {
        true => request.size,
        false => rounded(request.size, cluster.sectors(), before),
    };
    // An image that was not closed may have its new size and no more of what follows.
    let half_cut = Some(header)
        .filter(|_| after == before && sound.is_marked())
        .and_then(|header| header.resized(after))
        .filter(|resized| resized.first_block <= header.raw().first_block);
    let resized = match after {
        _ if after == before => Some(half_cut.unwrap_or(*header.raw())),
        SectorCount::ZERO => None,
        _ => header.resized(after),
    };
    let resized = resized.ok_or_else(|| impossible(after, header.version()))?;
    let discards = room::decide(storage, header, lower, after, request)?;
    let (first, new_first) = (sound.first(), table_clusters(&resized));
    let wanted = if after > before {
        Wanted {
            sources: first..new_first.max(first),
            targets: new_first..u64::MAX,
        }
    } else {
        let limit = new_first.saturating_add(resized.entry_count.into());
        let limit = limit.max(first);
        let is_cut = after < before || half_cut.is_some();
        Wanted {
            sources: if is_cut { limit..u64::MAX } else { 0..0 },
            targets: first..limit,
        }
    };
    let kept = u64::from(layout.entry_count().min(resized.entry_count));
    let (moves, last) = wanted.outlook_when_cut(storage, &sound, kept)?;
    let end = last.max(new_first).saturating_mul(cluster.bytes());
    let told = Planned {
        before,
        after,
        moves,
        cluster_bytes: cluster.bytes(),
        discards,
        drops_bitmaps: !sound.checked.bitmaps.is_empty(),
        was_marked: sound.is_marked(),
    };
    Ok(Plan {
        sound,
        resized,
        wanted,
        end,
        is_half_cut: half_cut.is_some(),
        told,
    })
}

fn impossible(size: SectorCount, version: Version) -> Error {
    let sectors = size.get();
    let why = format!(
        "an image of version {} with clusters of this size cannot hold a disk of {sectors} sectors",
        version.number()
    );
    Error::why(ErrorKind::Unsupported, why)
}

/// Clusters of the table that a header describes, itself included.
fn table_clusters(raw: &RawHeader) -> u64 {
    u64::from(raw.first_block / raw.cluster_sectors.max(1))
}

/// Resizes an image, or says why it cannot. The caller has it locked. `describe` makes the
/// descriptor right, durably, where there is one and where it is not; it is called when the image
/// has its new size.
pub fn resize_image(
    storage: &dyn Storage,
    lower: &[Image],
    request: &Request,
    progress: &Progress,
    describe: &mut dyn FnMut(SectorCount) -> Result<()>,
) -> Result<Planned> {
    let plan = plan(storage, lower, request, true)?;
    let after = plan.told.after;
    if plan.told.is_nothing() {
        describe(after)?;
        return Ok(plan.told);
    }
    let mut mark = InUseMark::new(*plan.sound.header.raw());
    mark.set(storage)?;
    if planted(Bug::DescriptorEarly) {
        describe(after)?;
    }
    let mut stopped = Ok(());
    if after != plan.told.before || plan.is_half_cut {
        let changed = plan.change(storage, request, progress, &mut mark);
        match changed {
            // Stopped by the user before the image has its new size: what was moved is moved, and
            // the disk is as before.
            Err(error) if error.kind() == ErrorKind::Interrupted => {
                let left = relocate::give_back(storage, false)?;
                mark.clear(storage, left.mapped() == 0)?;
                return Err(error);
            }
            // Or after that: the rest is soon done, and the file is larger than it need be.
            changed => stopped = changed?,
        }
    }
    let left = relocate::give_back(storage, false)?;
    let is_empty = left.mapped() == 0;
    if planted(Bug::UnmarkedEarly) {
        mark.clear(storage, is_empty)?;
    }
    describe(after)?;
    mark.clear(storage, is_empty)?;
    stopped.map(|()| plan.told)
}

impl Plan {
    /// All that comes between the mark and what is given back. Within: whether the user has stopped
    /// it when the image had its new size.
    fn change(
        &self,
        storage: &dyn Storage,
        request: &Request,
        progress: &Progress,
        mark: &mut InUseMark,
    ) -> Result<Result<()>> {
        progress.step("moving", self.told.moves * self.told.cluster_bytes);
        if self.told.after > self.told.before {
            if planted(Bug::ResizedEarly) {
                mark.resize(storage, &self.resized)?;
            }
            self.grow(storage, request, progress, mark).map(Ok)
        } else {
            self.shrink(storage, request, progress, mark)
        }
    }

    fn grow(
        &self,
        storage: &dyn Storage,
        request: &Request,
        progress: &Progress,
        mark: &mut InUseMark,
    ) -> Result<()> {
        if storage.len()?.get() < self.end {
            storage.set_len(FileOffset::new(self.end))?;
        }
        let batch = request.batch_bytes;
        self.wanted
            .carry_out(storage, &self.sound, batch, progress)?;
        self.clear_slots(storage)?;
        self.clear_tail(storage)?;
        storage.sync_data()?;
        progress.check()?;
        mark.resize(storage, &self.resized)
    }

    fn shrink(
        &self,
        storage: &dyn Storage,
        request: &Request,
        progress: &Progress,
        mark: &mut InUseMark,
    ) -> Result<Result<()>> {
        progress.check()?;
        if planted(Bug::CutEarly) {
            self.clear_slots(storage)?;
            storage.sync_data()?;
        }
        let cut = RawHeader {
            first_block: self.sound.header.raw().first_block,
            ..self.resized
        };
        mark.resize(storage, &cut)?;
        self.clear_slots(storage)?;
        self.clear_tail(storage)?;
        storage.sync_data()?;
        let mut moved = Ok(());
        if self.wanted.sources.start < self.sound.space.named_end / self.told.cluster_bytes {
            // What was cut off has made room.
            let now = relocate::look(storage, false, true)?;
            let batch = request.batch_bytes;
            match self.wanted.carry_out(storage, &now, batch, progress) {
                Err(error) if error.kind() == ErrorKind::Interrupted => moved = Err(error),
                done => drop(done?),
            }
        }
        mark.resize(storage, &self.resized)?;
        Ok(moved)
    }

    /// Everything between the entries that both tables have and the later first block.
    /// What stays a table is written, because ploop 1.15 minds holes in it on ext4.
    fn clear_slots(&self, storage: &dyn Storage) -> Result<()> {
        let layout = self.sound.header.layout();
        let entries = u64::from(layout.entry_count().min(self.resized.entry_count));
        let start = Layout::entry_offset(DiskCluster::new(entries)).get();
        let first = u64::from(self.resized.first_block).saturating_mul(SECTOR);
        let written = if first > TABLE_WRITTEN_MAX {
            start
        } else {
            first.max(start)
        };
        let zeros = vec![0; len_usize(STRIDE.min(written - start)).unwrap_or(0)];
        let mut at = start;
        while at < written {
            let len = len_usize((written - at).min(STRIDE)).unwrap_or(0);
            storage.write_at(FileOffset::new(at), &zeros[..len])?;
            at += len_u64(len);
        }
        let end = layout.data_start().max(FileOffset::new(first));
        match FileOffset::new(at) {
            at if at < end => storage.zero(at..end, Keep::Nothing),
            _ => Ok(()),
        }
    }

    /// The end of a last cluster that the smaller size cuts.
    fn clear_tail(&self, storage: &dyn Storage) -> Result<()> {
        let size = self.told.cluster_bytes;
        let end = self.told.before.min(self.told.after);
        let end = end.get().saturating_mul(SECTOR);
        let (cluster, within) = (end / size, end % size);
        if within == 0 {
            return Ok(());
        }
        let mut entry = [0; 4];
        storage.read_at(Layout::entry_offset(DiskCluster::new(cluster)), &mut entry)?;
        let entry = u32::from_le_bytes(entry);
        if entry == 0 {
            return Ok(());
        }
        let start = self.sound.header.layout().entry_start(entry);
        let range = start.saturating_add(within)..start.saturating_add(size);
        storage.zero(range, Keep::Nothing)
    }
}
