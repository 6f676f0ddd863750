//! Compacts a whole disk: the top of each part.

use super::{Planned, Request, compact_image_after, plan_image};
use crate::admin::check;
use crate::admin::progress::Progress;
use crate::chain::Chain;
use crate::chain::bundle::{self, OpenedImages, Selection};
use crate::chain::open::chain;
use crate::delta::image::Image;
use crate::delta::walk;
use crate::error::Result;
use crate::storage::Storage;
use crate::units::SECTOR;
use serde::Serialize;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// Version of the JSON document; grows when a field changes its meaning or goes away.
pub const SCHEMA_VERSION: u32 = 1;

/// More ranges than this are not told of one by one: asking for each would take longer than asking
/// for what is between them as well.
const RANGES_MAX: usize = 1 << 20;

/// What will be done to a disk, or was.
#[derive(Clone, Debug, Serialize)]
pub struct DiskCompact {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// As the user named it.
    pub image: String,
    /// The tops of its parts.
    pub files: Vec<FileCompact>,
}

/// What will be done to one image, or was.
#[derive(Clone, Debug, Serialize)]
pub struct FileCompact {
    /// Where it is.
    pub path: String,
    /// A plain file has no clusters that could be moved, and is left as it is.
    pub plain: bool,
    /// Length of the file before.
    pub before_bytes: u64,
    /// Length of the file afterwards.
    pub after_bytes: u64,
    /// Bytes of the host that it has before.
    pub before_allocated: u64,
    /// Bytes of the host that it has afterwards; as before where nothing was changed yet.
    pub after_allocated: u64,
    /// Clusters of zeros that are freed.
    pub freed_clusters: u64,
    /// Clusters of zeros that keep their entries, because a level below has them too.
    pub punched_clusters: u64,
    /// Clusters that are moved.
    pub moved_clusters: u64,
    /// Dirty bitmaps are dropped: the next backup must be a full one.
    pub drops_bitmaps: bool,
    /// There is nothing to do.
    pub is_done: bool,
}

impl DiskCompact {
    /// Tells of more than this run: the disk was like this before something else made it smaller.
    pub fn began_as(&mut self, before: &Self) {
        for (file, old) in self.files.iter_mut().zip(&before.files) {
            file.before_bytes = old.before_bytes;
            file.before_allocated = old.before_allocated;
            file.is_done &= old.before_bytes == file.after_bytes
                && old.before_allocated == file.after_allocated;
        }
    }
}

/// A disk that is open and locked, or open for a look at what would be done.
#[derive(Debug)]
pub struct Session {
    image: PathBuf,
    /// Keeps the files locked.
    images: OpenedImages,
    parts: Vec<Chain>,
    begun: AtomicBool,
}

/// Opens a disk. Without `write` it is only read, and nothing can be carried out.
pub fn open(image: &Path, allow_outside: &[PathBuf], write: bool) -> Result<Session> {
    let selection = Selection {
        write,
        allow_outside: allow_outside.to_vec(),
        ..Selection::default()
    };
    let images = bundle::open(image, &selection)?;
    let parts = images.parts.iter();
    let parts = parts.map(|part| chain(part, true, &mut Vec::new()));
    Ok(Session {
        image: image.to_owned(),
        parts: parts.collect::<Result<_>>()?,
        images,
        begun: AtomicBool::new(false),
    })
}

type Act<'a> = &'a dyn Fn(&dyn Storage, &[Image], &Request, &Progress) -> Result<Planned>;

impl Session {
    fn each(&self, request: &Request, progress: &Progress, act: Act<'_>) -> Result<DiskCompact> {
        let files = self
            .parts
            .iter()
            .map(|part| file(part, request, progress, act));
        Ok(DiskCompact {
            schema_version: SCHEMA_VERSION,
            image: self.image.display().to_string(),
            files: files.collect::<Result<_>>()?,
        })
    }

    /// What compacting would do. Nothing is changed.
    pub fn plan(&self, request: &Request, progress: &Progress) -> Result<DiskCompact> {
        self.each(request, progress, &plan_image)
    }

    /// Refuses before anything is changed, where a part is to be refused. Reads no data.
    pub fn try_to(&self, request: &Request, progress: &Progress) -> Result<DiskCompact> {
        let quick = Request {
            zeroes: false,
            fill_holes: false,
            ..*request
        };
        self.each(&quick, progress, &plan_image)
    }

    /// Ranges of the disk that its tops map, in order: what is free there takes room in them.
    pub fn held(&self) -> Result<Vec<Range<u64>>> {
        let mut all = Vec::new();
        for (part, chain) in self.images.parts.iter().zip(&self.parts) {
            let (top, start) = (chain.top(), part.start.get().saturating_mul(SECTOR));
            mapped(top, start, &mut all).map_err(|e| e.in_file(top.path()))?;
        }
        Ok(all)
    }

    /// Compacts the tops of all parts.
    pub fn compact(&self, request: &Request, progress: &Progress) -> Result<DiskCompact> {
        self.each(request, progress, &|storage, lower, request, progress| {
            compact_image_after(storage, lower, request, progress, &mut || self.begin())
        })
    }

    fn begin(&self) -> Result<()> {
        self.images.claim()?;
        self.begun.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// True once anything may have been changed.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Relaxed)
    }
}

/// Appends what an image maps of the disk that begins at `start`.
fn mapped(top: &Image, start: u64, all: &mut Vec<Range<u64>>) -> Result<()> {
    let end = start.saturating_add(top.disk_len());
    let mut add = |from: u64, to: u64| {
        let is_full = all.len() >= RANGES_MAX;
        match all.last_mut() {
            Some(last) if last.end == from || is_full => last.end = to.min(end),
            _ => all.push(from..to.min(end)),
        }
    };
    let Some(layout) = top.layout() else {
        add(start, end);
        return Ok(());
    };
    let size = layout.cluster().bytes();
    walk::words(&**top.storage(), layout.table_end(), |at, bytes| {
        check::entries(at, bytes, layout, |cluster, word| {
            if let Some(cluster) = cluster.filter(|_| word != 0) {
                let from = start.saturating_add(cluster.saturating_mul(size));
                add(from, from.saturating_add(size));
            }
            Ok(())
        })
    })
}

fn file(part: &Chain, request: &Request, progress: &Progress, act: Act<'_>) -> Result<FileCompact> {
    let (top, levels) = (part.top(), part.levels());
    let run = || -> Result<FileCompact> {
        let storage = &**top.storage();
        let before_allocated = storage.allocated_bytes()?;
        let lower = &levels[..levels.len().saturating_sub(1)];
        let told = match part.is_plain() {
            true => None,
            false => Some(act(storage, lower, request, progress)?),
        };
        let len = top.len().get();
        Ok(FileCompact {
            path: top.path().display().to_string(),
            plain: part.is_plain(),
            before_bytes: told.map_or(len, |told| told.before),
            after_bytes: told.map_or(len, |told| told.after),
            before_allocated,
            after_allocated: storage.allocated_bytes()?,
            freed_clusters: told.map_or(0, |told| told.freed),
            punched_clusters: told.map_or(0, |told| told.punched),
            moved_clusters: told.map_or(0, |told| told.moves),
            drops_bitmaps: told.is_some_and(|told| told.drops_bitmaps && !told.is_nothing()),
            is_done: told.is_none_or(|told| told.is_nothing()),
        })
    };
    run().map_err(|e| e.in_file(top.path()))
}
