//! The kernel's door: FUSE requests become calls of the disk.
//!
//! Imports: `disk`, `chain` (the names of snapshots), `units`, `error`, `atomics`, `sync`,
//! `planted`, `sys`.
//! Never: decides what the bytes are, waits for another request on a session thread, or allocates
//! for a READ or a WRITE.
//!
//! [`PloopFs`] is the file system; one place decides what a request means, and doors carry requests
//! to it and answers back, from several threads at once. Its verbs are in `fuse/requests.rs`, and
//! what they have in common is here. The doors are `fuse/library.rs`, which fuser keeps, and two of
//! our own, `fuse/device.rs` on /dev/fuse and `fuse/rings.rs` on io_uring. READ and WRITE
//! of `disk.img` carry the file handle 0 and go straight to the live disk with the memory that the
//! door has for them; every other open file has an entry in a table. The disk answers through the
//! reply object, at once or later from a thread of its own, so a verb that returns has not always
//! answered. What is neither data nor quick runs on one thread aside.
//!
//! What the mount promises to those who use it:
//!
//! * The size never changes. Truncating and growing are EPERM, a write across the end is EFBIG and
//!   writes nothing. FALLOCATE punches and zeroes within the disk; other modes are EOPNOTSUPP.
//! * Opening for writing what cannot be written is EROFS, so that `losetup` falls back to a
//!   read-only device. Everything but `disk.img` is read-only; a partition is written through a
//!   loop device over the whole disk.
//! * `disk.img` goes through the page cache like any file, which is dropped at each open. A loop
//!   device with direct I/O goes around it: pages that a buffered reader fetched while such a write
//!   was under way may stay old until the next open. [`Settings::direct_io`] takes the cache away,
//!   for mounts that serve a loop device only.
//! * Partitions of a writable disk bypass the cache, since they show bytes that change through
//!   another name; they are read anew when the last writer of `disk.img` has closed it. Frozen
//!   snapshots and read-only disks keep their cache for ever.
//! * FSYNC answers when all that was answered before it is durable. The last close of a writer
//!   starts a flush that nobody waits for.

mod answer;
mod aside;
pub mod attach;
mod buffer;
pub mod daemon;
pub mod dead;
mod device;
mod dispatch;
pub mod errno;
pub mod holders;
mod library;
mod locks;
pub mod logging;
pub mod mount;
mod nodes;
pub mod partitions;
pub mod registry;
mod requests;
mod rings;
mod rules;
pub mod session;
pub mod signals;
mod through;
pub mod trim;
mod views;
pub mod volumes;
mod wire;

pub use nodes::Shape;
pub use views::Opener;

use crate::chain::bundle::SnapshotInfo;
use crate::disk::{Disk, InlineMax};
use crate::units::DiskOffset;
use aside::Aside;
use fuser::{Errno, FopenFlags, InitFlags};
use nodes::Node;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use views::{View, Views};

/// The handle of every open `disk.img`; the others count from 1.
const LIVE: u64 = 0;

/// How long the kernel may believe names and attributes. Size and place never change; the number
/// of allocated blocks and the time of the last change do.
const BELIEVE: Duration = Duration::from_secs(1);

/// The largest request: more than the kernel's limit of 256 pages brings nothing.
const WRITE_MAX: u32 = 1 << 20;

/// Requests of a loop device that the kernel lets out at a time.
const BACKGROUND_MAX: u16 = 64;

/// What is asked of the kernel, each where it can: parallel direct I/O, without which loop devices
/// are slow; leaving to us the bits that a write clears, of which there are none here; directories
/// that are looked into by many at a time; files mapped into memory beside direct I/O.
const WANTED: [InitFlags; 4] = [
    InitFlags::FUSE_ASYNC_DIO,
    InitFlags::FUSE_HANDLE_KILLPRIV_V2,
    InitFlags::FUSE_PARALLEL_DIROPS,
    InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
];

/// More threads than there are beside those of a door: the disk's pool and flusher, signals...
const OTHER_THREADS: usize = 24;

const SOURCE_XATTR: &str = "user.ploopfs.source";

/// What the mount looks like and whose it is.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Owner of everything.
    pub uid: u32,
    /// Group of everything.
    pub gid: u32,
    /// Permission bits that files lack: 0o077 makes them 0600 and 0400.
    pub file_mask: u16,
    /// Permission bits that directories lack: 0o077 makes them 0700.
    pub dir_mask: u16,
    /// Modification time of the image file when it was opened.
    pub mtime: SystemTime,
    /// The image as the user named it, shown as the extended attribute `user.ploopfs.source`.
    pub source: String,
    /// Name of the disk's file in the root directory: `disk.img`, but for a loop device's mount,
    /// which nobody sees and whose name `losetup` shows.
    pub disk_name: String,
    /// GUID of the snapshot that the live disk stands on; `snapshots/latest` leads there.
    pub latest: Option<String>,
    /// Show partitions as files.
    pub partitions: bool,
    /// The text of `info.json`.
    pub info_json: String,
    /// Keep `disk.img` out of the page cache; for mounts that only serve a loop device.
    pub direct_io: bool,
    /// A flat file with the bytes of the disk, which is read-only: the kernel reads `disk.img` from
    /// it without asking us.
    pub flat: Option<Arc<File>>,
}

/// The file system.
#[derive(Debug)]
pub struct PloopFs {
    views: Arc<Views>,
    aside: Option<Aside>,
    /// Without it the kernel asks for an extended attribute before every write, unless told once
    /// that there are none.
    has_xattrs: bool,
}

impl PloopFs {
    /// The mount of a disk. No thread is started before INIT, so this may be called before the
    /// process forks; nothing of the disk is read before somebody looks.
    #[must_use]
    pub fn new(
        disk: Arc<Disk>,
        shape: Shape,
        settings: Settings,
        snapshots: &[SnapshotInfo],
        opener: Opener,
    ) -> Self {
        let guids = snapshots
            .iter()
            .map(|snapshot| snapshot.guid.clone())
            .collect();
        let views = Arc::new(Views::new(disk, shape, settings, guids, opener));
        Self {
            views,
            aside: None,
            has_xattrs: false,
        }
    }

    /// Says that so many threads serve, each of which has requests of its own: all of them may be
    /// busy with a large one.
    pub(crate) fn expect_threads(&self, threads: usize) {
        self.views.live.disk.set_large_inline(InlineMax {
            reads: threads,
            writes: threads,
        });
    }

    /// Says that requests will come with memory of their own.
    pub(crate) fn release_buffers(&self) {
        self.views.live.disk.release_buffers();
    }

    /// Says that they come without it after all.
    pub(crate) fn restore_buffers(&self) {
        if let Err(e) = self.views.live.disk.restore_buffers() {
            log::warn!("large requests are served alone, without memory to hand them over: {e}");
        }
    }

    /// Gets ready for requests on so many threads; called at INIT with what the kernel granted.
    pub(crate) fn start(&mut self, granted: InitFlags, threads: usize) -> io::Result<()> {
        if !granted.contains(InitFlags::FUSE_ASYNC_DIO) {
            log::warn!("this kernel sends direct I/O one request at a time; loop devices are slow");
        }
        // No set-user-ID bits or file capabilities exist here to be cleared by a write.
        self.has_xattrs = granted.contains(InitFlags::FUSE_HANDLE_KILLPRIV_V2);
        if let Err(e) = locks::prepare(threads.saturating_add(OTHER_THREADS)) {
            log::warn!("locks may need memory later: {e}");
        }
        self.aside = Some(Aside::start()?);
        Ok(())
    }

    /// Ends what runs aside and closes the snapshots; called after the last request.
    pub(crate) fn end(&mut self) {
        self.aside = None;
        if let Some(views) = Arc::get_mut(&mut self.views) {
            views.close_snapshots();
        }
    }

    fn node(&self, ino: u64) -> Result<Node, Errno> {
        self.views.tree.node(ino).ok_or(Errno::ENOENT)
    }

    /// Runs a job on the thread for slow requests.
    fn run_aside(&self, job: impl FnOnce(&Views) + Send + 'static) {
        let views = Arc::clone(&self.views);
        if let Some(aside) = &self.aside {
            aside.run(move || job(&views));
        }
    }

    /// Runs a job about a node here where that is quick, else aside.
    fn about(&self, node: Node, job: impl FnOnce(&Views) + Send + 'static) {
        if self.views.is_ready(node) {
            job(&self.views);
        } else {
            self.run_aside(job);
        }
    }

    /// What the kernel is to read instead of asking for the bytes of a node.
    pub(crate) fn flat(&self, ino: u64) -> Option<&Arc<File>> {
        let flat = self.views.settings.flat.as_ref()?;
        (self.node(ino) == Ok(Node::Disk)).then_some(flat)
    }

    /// True where some node is read so.
    pub(crate) fn has_flat(&self) -> bool {
        self.views.settings.flat.is_some()
    }

    /// Why rings would be no gain, whatever the kernel offers.
    pub(crate) fn has_no_use_for_rings(&self) -> Option<&'static str> {
        if self.has_flat() {
            Some("only it has the kernel read a flat clone by itself")
        } else if self.views.live.disk.is_direct() {
            Some("past the page cache, more threads are worth more than rings")
        } else {
            None
        }
    }

    /// How an open file of this node uses the page cache.
    fn open_flags(&self, node: Node) -> FopenFlags {
        let frozen = FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH;
        let direct = FopenFlags::FOPEN_DIRECT_IO;
        match node {
            // There is no page of it in the cache; the kernel takes no other word beside this one.
            Node::Disk if self.has_flat() => FopenFlags::FOPEN_NOFLUSH,
            Node::Disk if !self.views.writable => frozen,
            Node::Disk if self.views.settings.direct_io => {
                direct | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
            }
            Node::Disk => FopenFlags::empty(),
            Node::Part(_) if self.views.writable => direct | FopenFlags::FOPEN_NOFLUSH,
            Node::Stats => direct | FopenFlags::FOPEN_NOFLUSH,
            _ => frozen,
        }
    }

    fn xattr(&self, ino: u64, name: &OsStr) -> Result<&[u8], Errno> {
        if !self.has_xattrs {
            return Err(Errno::ENOSYS);
        }
        let known = matches!(self.node(ino)?, Node::Root | Node::Disk) && name == SOURCE_XATTR;
        if known {
            Ok(self.views.settings.source.as_bytes())
        } else {
            Err(Errno::NO_XATTR)
        }
    }
}

/// How long the kernel may believe the attributes of a node: not at all where they may be another
/// partition's by then.
fn believe(node: Node) -> Duration {
    if matches!(node, Node::Part(_) | Node::Stats) {
        Duration::ZERO
    } else {
        BELIEVE
    }
}

/// Looks for data or a hole; both may read BAT pages.
fn look_for(view: &View, at: u64, sought: rules::Seek) -> Result<u64, Errno> {
    let inside = |found: DiskOffset| found.get().saturating_sub(view.start);
    let found = match sought {
        rules::Seek::Data => view
            .disk
            .seek_data(view.at(at))
            .map(|found| found.map(inside)),
        rules::Seek::Hole => view
            .disk
            .seek_hole(view.at(at))
            .map(|f| Some(inside(f).min(view.len))),
    };
    match found {
        Ok(Some(found)) if found < view.len || sought == rules::Seek::Hole => Ok(found),
        Ok(_) => Err(Errno::ENXIO),
        Err(e) => Err(errno::answer("lseek", &e)),
    }
}
