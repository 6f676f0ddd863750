//! The disk of a plan, open, and the file system that shows it.
//!
//! Imports: `error`, `chain`, `disk`, `fuse`, `admin`.
//! Never: runs before the fork: it opens images, takes locks and starts threads.

use super::progress::Shown;
use super::serve::Plan;
use crate::admin;
use crate::admin::info::Tables;
use crate::chain::bundle::{self, OpenedImages, Selection};
use crate::disk::linear::FIX;
use crate::disk::{self, Disk, DiskOptions, InlineMax};
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::partitions::{self, Partition};
use crate::fuse::{self, PloopFs};
use crate::storage::file::FileStorage;
use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

/// Name of the disk in a mount that is a directory.
pub(super) const DISK_NAME: &str = "disk.img";

/// How the root of the file system looks.
#[derive(Clone, Debug)]
pub(super) enum View {
    /// A directory with `disk.img` and what goes with it.
    Directory,
    /// The disk itself.
    File,
    /// A directory with nothing but the disk under this name.
    Named(String),
}

/// A disk that is open, with what else there is to show.
pub(super) struct Opened {
    pub(super) disk: Arc<Disk>,
    pub(super) images: Arc<OpenedImages>,
    pub(super) partitions: Vec<Partition>,
    /// The disk as one flat file, where that is wanted.
    pub(super) flat: Option<Arc<File>>,
}

/// Opens and locks the image.
pub(super) fn open_disk(plan: &Plan) -> Result<Opened> {
    let images = Arc::new(bundle::open(&plan.image, &plan.settings.selection)?);
    // One thread is kept free of large reads for small requests, and half of them of large writes.
    let threads = plan.settings.threads;
    let options = DiskOptions {
        large_inline: InlineMax {
            reads: threads.saturating_sub(1),
            writes: threads / 2,
        },
        ..plan.settings.disk.clone()
    };
    let (disk, notes) = disk::open(Arc::clone(&images), &options)?;
    notes.iter().for_each(|note| log::warn!("{note}"));
    let partitions = if plan.settings.partitions {
        partitions::list(&disk).unwrap_or_else(|e| {
            log::warn!("no partitions are shown: {e}");
            Vec::new()
        })
    } else {
        Vec::new()
    };
    let flat = match plan.settings.linearize {
        true => Some(Arc::new(linearize(&disk, &images)?)),
        false => None,
    };
    Ok(Opened {
        disk,
        images,
        partitions,
        flat,
    })
}

/// A flat clone of the disk as it is now, beside its top image and without a name.
fn linearize(disk: &Disk, images: &OpenedImages) -> Result<File> {
    let top = images.parts.first().and_then(|part| part.files.last());
    let top = &top.ok_or_else(|| Error::errno(libc::ENOENT))?.path;
    let place = fs::canonicalize(top).map_err(|e| Error::from(e).in_file(top))?;
    let directory = place.parent().unwrap_or(Path::new("/"));
    let flat = FileStorage::unnamed_in(directory).map_err(no_room_for_a_clone)?;
    let shown = Shown::start(false);
    let progress = shown.progress();
    progress.step("sharing", disk.size_bytes());
    let mut before = 0;
    disk.linearize(&flat, &mut |done| {
        progress.add(done.saturating_sub(std::mem::replace(&mut before, done)));
        progress.check()
    })?;
    Ok(flat.into_file())
}

/// The error of a directory that takes no file.
fn no_room_for_a_clone(error: Error) -> Error {
    let why = match error.kind() {
        ErrorKind::Io(libc::EROFS) => "the clone has to lie there, and it is read-only",
        ErrorKind::Io(libc::EOPNOTSUPP | libc::EISDIR | libc::ENOENT) => {
            "the clone has to lie there, and its file system has no files without a name"
        }
        _ => "the clone has to lie there",
    };
    let place = error.place().path.clone();
    let told = Error::why(ErrorKind::Unsupported, why)
        .because(error)
        .fix(FIX);
    match place {
        Some(path) => told.in_file(&path),
        None => told,
    }
}

/// The file system over the open disk.
pub(super) fn build_filesystem(opened: &Opened, view: &View, plan: &Plan) -> Result<PloopFs> {
    let (shape, disk_name) = match view {
        View::Directory => (fuse::Shape::Directory, DISK_NAME.to_owned()),
        View::File => (fuse::Shape::File, DISK_NAME.to_owned()),
        View::Named(name) => (fuse::Shape::Directory, name.clone()),
    };
    let ownership = &plan.settings.ownership;
    let snapshots = opened.images.snapshots.clone();
    let settings = fuse::Settings {
        uid: ownership.uid,
        gid: ownership.gid,
        file_mask: ownership.file_mask,
        dir_mask: ownership.dir_mask,
        mtime: modified(&plan.image),
        source: plan.image.display().to_string(),
        disk_name,
        latest: opened.images.latest(),
        partitions: plan.settings.partitions,
        info_json: info_json(plan)?,
        direct_io: matches!(view, View::Named(_)),
        flat: opened.flat.clone(),
    };
    let (disk, images) = (Arc::downgrade(&opened.disk), Arc::clone(&opened.images));
    let opener = move |guid: &str| {
        let disk = disk.upgrade().ok_or_else(|| Error::errno(libc::ENODEV))?;
        disk::open_view(&disk, images.open_snapshot(guid)?)
    };
    let disk = Arc::clone(&opened.disk);
    Ok(PloopFs::new(
        disk,
        shape,
        settings,
        &snapshots,
        Box::new(opener),
    ))
}

fn modified(image: &Path) -> SystemTime {
    fs::metadata(image)
        .and_then(|meta| meta.modified())
        .unwrap_or_else(|_| SystemTime::now())
}

/// What `info --json` says of the image, with what only the daemon knows. The tables are left out:
/// a mount reads no more than headers before it is ready, however large the disk is.
fn info_json(plan: &Plan) -> Result<String> {
    let selection = Selection {
        no_lock: true,
        write: false,
        ..plan.settings.selection.clone()
    };
    let info = admin::info::info(&plan.image, &selection, Tables::Leave)?;
    let mut document = serde_json::to_value(info).map_err(std::io::Error::from)?;
    document["mount"] = serde_json::json!({
        "layout": 1,
        "pid": std::process::id(),
        "version": env!("CARGO_PKG_VERSION"),
        "read_only": plan.settings.disk.read_only,
        "options": {
            "inline_order": plan.settings.disk.inline_order,
            "bat_cache": plan.settings.disk.bat_cache,
            "grow_step": plan.settings.disk.grow_step,
            "reflink": plan.settings.disk.reflink,
            "direct": plan.settings.disk.direct,
            "threads": plan.settings.threads,
            "linearize": plan.settings.linearize,
        },
    });
    Ok(format!("{document:#}\n"))
}
