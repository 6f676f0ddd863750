//! Resizes a whole disk: the top of its last part, and its descriptor.

use super::plain::{Place, plan_plain};
use super::{Planned, Request, plan_image, resize_image, resize_plain, room, rounded};
use crate::admin::bundle::{Bundle, Files};
use crate::admin::progress::Progress;
use crate::chain::Chain;
use crate::chain::bundle::{self, OpenedImages, OpenedPart, Selection};
use crate::chain::open::chain;
use crate::delta::image::{Image, Kind};
use crate::error::{Error, ErrorKind, Result};
use crate::format::descriptor;
use crate::format::descriptor::edit::Edit;
use crate::storage::{Directory, SharedStorage, Storage};
use crate::units::{SECTOR, SectorCount};
use serde::Serialize;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// Version of the JSON document; grows when a field changes its meaning or goes away.
pub const SCHEMA_VERSION: u32 = 1;

/// The size that is wanted, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// This size.
    To(u64),
    /// So many bytes more.
    Plus(u64),
    /// So many bytes less.
    Minus(u64),
}

/// What is wanted, and what it may cost.
#[derive(Clone, Debug)]
pub struct Options {
    /// The size.
    pub change: Change,
    /// The disk may become smaller.
    pub shrink: bool,
    /// What is cut off may hold data.
    pub force_discard: bool,
    /// Dirty bitmaps may be lost.
    pub drop_bitmaps: bool,
    /// A file without a magic number is a plain image.
    pub raw: bool,
    /// Directories outside the bundle that a descriptor may name files in.
    pub allow_outside: Vec<PathBuf>,
}

/// What will be done to a disk, or was.
#[derive(Clone, Debug, Serialize)]
pub struct DiskResize {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// As the user named it.
    pub image: String,
    /// The file that is changed.
    pub path: String,
    /// Size of the disk before.
    pub before_bytes: u64,
    /// Size of the disk afterwards.
    pub after_bytes: u64,
    /// Clusters that make room for the longer table, or for a smaller file.
    pub moved_clusters: u64,
    /// The same in bytes.
    pub moved_bytes: u64,
    /// The first byte of data that is cut off, where any is.
    pub discards_from_byte: Option<u64>,
    /// Dirty bitmaps are dropped: the next backup must be a full one.
    pub drops_bitmaps: bool,
    /// The image was not closed; its table is sound all the same.
    pub was_in_use: bool,
    /// There is nothing to do.
    pub is_done: bool,
}

/// A disk that is open and locked for a change of its size, or for a look at what one would do.
#[derive(Debug)]
pub struct Session {
    /// As the user named it.
    image: PathBuf,
    images: OpenedImages,
    /// The last part.
    chain: Chain,
    options: Options,
    begun: AtomicBool,
}

/// The sizes of a disk, in sectors.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    /// Where the last part begins.
    start: u64,
    /// What the descriptor says, where there is one.
    declared: Option<u64>,
    /// What the top says.
    own: u64,
    /// The top was not closed.
    is_marked: bool,
}

/// Opens a disk. Without `write` it is only read, and nothing can be carried out.
pub fn open(image: &Path, options: &Options, write: bool) -> Result<Session> {
    let selection = Selection {
        write,
        raw: options.raw,
        allow_outside: options.allow_outside.clone(),
        ..Selection::default()
    };
    let images = bundle::open(image, &selection)?;
    let part = last(&images)?;
    if images.descriptor().is_none() {
        let top = part.files.last().map(|file| file.path.as_path());
        if let Some(role) = top.and_then(bundle::role_in_bundle) {
            let why = format!("the image is {role} of the bundle around it, whose descriptor has");
            let error = Error::why(ErrorKind::Usage, format!("{why} the size too"));
            return Err(error.in_file(image).fix("name the bundle"));
        }
    }
    // Of sizes that differ more is known here than there.
    let chain = chain(part, false, &mut Vec::new())?;
    Ok(Session {
        image: image.to_owned(),
        chain,
        images,
        options: options.clone(),
        begun: AtomicBool::new(false),
    })
}

fn last(images: &OpenedImages) -> Result<&OpenedPart> {
    let none = || Error::why(ErrorKind::Descriptor, "the disk has no part");
    images.parts.last().ok_or_else(none)
}

impl Session {
    fn top(&self) -> &Image {
        self.chain.top()
    }

    fn lower(&self) -> &[Image] {
        let levels = self.chain.levels();
        &levels[..levels.len().saturating_sub(1)]
    }

    fn sizes(&self) -> Result<Sizes> {
        let start = last(&self.images)?.start.get();
        let declared = self.images.disk_size.map(SectorCount::get);
        let (own, is_marked) = match self.top().kind() {
            Kind::Expanding(header) => (start + header.size().get(), header.is_in_use()),
            Kind::Plain => {
                let len = self.top().len().get().div_ceil(SECTOR);
                (declared.unwrap_or(len), false)
            }
        };
        Ok(Sizes {
            start,
            declared,
            own,
            is_marked,
        })
    }

    /// The unit that sizes are rounded up to.
    fn unit(&self) -> Result<SectorCount> {
        let blocksize = last(&self.images)?.blocksize.map(u64::from);
        Ok(match self.top().layout() {
            Some(layout) => layout.cluster().sectors(),
            None => SectorCount::new(blocksize.unwrap_or(1)),
        })
    }

    /// What is asked of the last part.
    fn request(&self, sizes: Sizes) -> Result<Request> {
        let total = self.wanted(sizes)?;
        let Some(part) = total.checked_sub(sizes.start).filter(|part| *part > 0) else {
            let why = format!(
                "the last part of the disk begins at byte {}, and parts are not removed",
                sizes.start.saturating_mul(SECTOR)
            );
            return Err(Error::why(ErrorKind::Usage, why));
        };
        let own = SectorCount::new(sizes.own - sizes.start);
        let size = rounded(SectorCount::new(part), self.unit()?, own);
        let total = sizes.start + size.get();
        let declared = sizes.declared.unwrap_or(sizes.own);
        if declared != sizes.own && !sizes.is_marked && total != sizes.own {
            let (said, found) = (declared * SECTOR, sizes.own * SECTOR);
            let why = format!("the descriptor says {said} bytes, the image's header {found}");
            let fix = format!("if the header is right: ploopfs resize IMAGE {found}");
            return Err(Error::why(ErrorKind::Descriptor, why)
                .in_file(self.top().path())
                .fix(fix));
        }
        if total < declared && !self.options.shrink {
            return Err(room::smaller(
                declared.saturating_mul(SECTOR),
                total.saturating_mul(SECTOR),
            ));
        }
        Ok(Request {
            shrink: self.options.shrink,
            force_discard: self.options.force_discard,
            drop_bitmaps: self.options.drop_bitmaps,
            ..Request::new(size)
        })
    }

    /// The size of the disk that is wanted, in sectors, not yet rounded to clusters.
    fn wanted(&self, sizes: Sizes) -> Result<u64> {
        let now = sizes.own.saturating_mul(SECTOR);
        let is_clear = !sizes.is_marked && sizes.declared.unwrap_or(sizes.own) == sizes.own;
        let bytes = match self.options.change {
            Change::To(bytes) => Some(bytes),
            _ if !is_clear => {
                let why = "the image was not closed, perhaps because a resize was interrupted, and \
                           then it may have its new size already";
                let fix = "say what size it is to have in the end";
                return Err(Error::why(ErrorKind::Usage, why).fix(fix));
            }
            Change::Plus(bytes) => now.checked_add(bytes),
            Change::Minus(bytes) => now.checked_sub(bytes),
        };
        let bytes = bytes.filter(|bytes| *bytes > 0 && i64::try_from(*bytes).is_ok());
        let impossible = || Error::why(ErrorKind::Usage, "no disk can have that size");
        Ok(bytes.ok_or_else(impossible)?.div_ceil(SECTOR))
    }

    fn told(&self, sizes: Sizes, planned: Planned) -> DiskResize {
        let after = sizes.start + planned.after.get();
        let before = sizes.declared.unwrap_or(sizes.own);
        let discards = planned.discards.map(|byte| byte + sizes.start * SECTOR);
        DiskResize {
            schema_version: SCHEMA_VERSION,
            image: self.image.display().to_string(),
            path: self.top().path().display().to_string(),
            before_bytes: before.saturating_mul(SECTOR),
            after_bytes: after.saturating_mul(SECTOR),
            moved_clusters: planned.moves,
            moved_bytes: planned.moves.saturating_mul(planned.cluster_bytes),
            discards_from_byte: discards,
            drops_bitmaps: planned.drops_bitmaps && !planned.is_nothing(),
            was_in_use: planned.was_marked,
            is_done: planned.is_nothing() && before == after,
        }
    }

    /// Refuses to cut off what snapshots show, whether the top stands on them or not: nobody gives
    /// that up with the end of the disk, not even who gives up the data there.
    fn spare_snapshots(&self, sizes: Sizes, request: &Request) -> Result<()> {
        let (new, old) = (request.size.get(), sizes.own - sizes.start);
        let Some(descriptor) = self.images.descriptor().filter(|_| new < old) else {
            return Ok(());
        };
        let cut = new.saturating_mul(SECTOR)..old.saturating_mul(SECTOR);
        let mut seen = HashSet::new();
        for shot in &descriptor.snapshots {
            if shot.temporary || shot.guid == descriptor.top {
                continue;
            }
            let name = shot.guid.to_string();
            let images = self.images.open_snapshot(&name)?;
            let part = last(&images)?;
            let levels = chain(part, false, &mut Vec::new())?;
            for (file, image) in part.files.iter().zip(levels.levels()) {
                if !seen.insert(file.guid.clone()) {
                    continue;
                }
                let found = room::data_in(&**image.storage(), image.header(), cut.clone())
                    .map_err(|e| e.in_file(image.path()))?;
                if let Some(byte) = found {
                    let byte = byte.saturating_add(sizes.start.saturating_mul(SECTOR));
                    return Err(room::needed_by(&name, byte).in_file(image.path()));
                }
            }
        }
        Ok(())
    }

    /// What resizing would do. Nothing is changed.
    pub fn plan(&self) -> Result<DiskResize> {
        let sizes = self.sizes()?;
        let request = self.request(sizes)?;
        if request.shrink {
            self.spare_snapshots(sizes, &request)?;
        }
        let storage = &**self.top().storage();
        let planned = match self.top().kind() {
            Kind::Expanding(_) => plan_image(storage, self.lower(), &request),
            Kind::Plain => plan_plain(storage, self.place(sizes)?, &request),
        };
        let planned = planned.map_err(|e| e.in_file(self.top().path()))?;
        Ok(self.told(sizes, planned))
    }

    fn place(&self, sizes: Sizes) -> Result<Place> {
        Ok(Place {
            size: SectorCount::new(sizes.own - sizes.start),
            unit: self.unit()?,
        })
    }

    /// Resizes the disk.
    pub fn resize(&self, progress: &Progress) -> Result<DiskResize> {
        let sizes = self.sizes()?;
        let request = self.request(sizes)?;
        let storage = &**self.top().storage();
        let plan = self.plan()?;
        // A plain file may be longer than its disk, because its shrinking was interrupted.
        let has_tail = self.top().layout().is_none()
            && request.shrink
            && self.top().len().get() > request.size.get().saturating_mul(SECTOR);
        if plan.is_done && !has_tail {
            self.make_last(storage)?;
            return Ok(plan);
        }
        self.try_to_describe(sizes, request.size)?;
        let mut describe = |part: SectorCount| self.describe(sizes, part);
        let planned = match self.top().kind() {
            Kind::Expanding(_) => {
                resize_image(storage, self.lower(), &request, progress, &mut describe)
            }
            Kind::Plain => resize_plain(storage, self.place(sizes)?, &request, &mut describe),
        };
        let planned = planned.map_err(|e| e.in_file(self.top().path()))?;
        Ok(self.told(sizes, planned))
    }

    /// What another process has done is durable when this one says that it is done.
    fn make_last(&self, storage: &dyn Storage) -> Result<()> {
        storage
            .sync_data()
            .map_err(|e| e.in_file(self.top().path()))?;
        match self.images.home()? {
            Some((directory, _)) => directory.sync(),
            None => Ok(()),
        }
    }

    /// True once anything may have been changed.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Relaxed)
    }

    /// Makes the descriptor say what size the disk has.
    fn describe(&self, sizes: Sizes, part: SectorCount) -> Result<()> {
        let total = SectorCount::new(sizes.start + part.get());
        match self.images.home()? {
            Some((directory, name)) => describe(&directory, name, total),
            None => Ok(()),
        }
    }

    /// Refuses where the descriptor cannot be changed, before anything is; from then on it may be.
    /// What an interrupted change has left beside it goes now: if that fails, no image has a new
    /// size yet.
    fn try_to_describe(&self, sizes: Sizes, part: SectorCount) -> Result<()> {
        let total = SectorCount::new(sizes.start + part.get());
        match self.images.home()? {
            Some((directory, name)) => {
                let bundle = Bundle::open(&directory, name, &NoFiles)?;
                bundle.try_edits(&[Edit::DiskSize(total)])?;
                self.images.claim()?;
                self.begun.store(true, Ordering::Relaxed);
                bundle.settle()
            }
            None => {
                self.begun.store(true, Ordering::Relaxed);
                Ok(())
            }
        }
    }
}

/// Makes a descriptor say what size the disk has, durably, and clears away what an interrupted
/// change has left beside it.
pub fn describe(directory: &dyn Directory, name: &str, size: SectorCount) -> Result<()> {
    let mut bundle = Bundle::open(directory, name, &NoFiles)?;
    bundle.settle()?;
    if bundle.descriptor().disk_size != size {
        bundle.replace(&[Edit::DiskSize(size)])?;
    }
    Ok(())
}

/// A change of the descriptor alone: no image is opened for it.
#[derive(Debug)]
struct NoFiles;

impl Files for NoFiles {
    fn image(&self, _: &descriptor::Image) -> Result<SharedStorage> {
        Err(Error::new(ErrorKind::Unsupported))
    }

    fn own_name(&self, _: &descriptor::Image) -> Option<String> {
        None
    }
}
