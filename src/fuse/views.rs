//! The bytes and attributes behind the nodes.
//!
//! Imports: `disk`, `error`, `units`, `fuse::{nodes, partitions, rules, errno}`.
//! Never: opens a snapshot or reads a partition table on a session thread, or under a lock.
//!
//! What may take long is behind [`Views::is_ready`]: while that says no, the caller moves its
//! request to the thread of `fuse/aside.rs` and asks there (only when the last writer closes in
//! between are the few KiB of a partition table read at once). A snapshot's disk is opened at the
//! first look at its `disk.img`; only a few are kept, since a bundle may name thousands, but the
//! size of each is remembered. The partition list is kept until the last writer of `disk.img` has
//! closed it. An open file keeps the bytes that it was opened on, whatever is let go meanwhile.

use super::nodes::{Node, Shape, Sort, Tree};
use super::partitions::{self, Partition};
use super::rules::Present;
use super::{Settings, errno};
use crate::disk::Disk;
use crate::disk::buffers::ensure_heap;
use crate::error::Result;
use crate::units::{DiskOffset, len_u64};
use fuser::{Errno, FileAttr, FileType, INodeNo};
use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// More than opening a snapshot, or reading a partition table, takes from the heap.
const OPENING_MAX: usize = 1 << 20;
/// Snapshots whose disks stay open although no file of theirs is.
const KEPT_MAX: usize = 16;

/// Opens the disk of the snapshot with this GUID, read-only.
pub type Opener = Box<dyn Fn(&str) -> Result<Arc<Disk>> + Send + Sync>;

/// A range of a disk, shown as a file.
#[derive(Clone)]
pub(crate) struct View {
    pub(crate) disk: Arc<Disk>,
    /// First byte on the disk.
    pub(crate) start: u64,
    pub(crate) len: u64,
}

impl View {
    fn whole(disk: Arc<Disk>) -> Self {
        let len = disk.size_bytes();
        Self {
            disk,
            start: 0,
            len,
        }
    }

    /// The disk position of a byte of the file, which must be inside it.
    pub(crate) fn at(&self, offset: u64) -> DiskOffset {
        DiskOffset::new(self.start.saturating_add(offset))
    }

    /// Bytes that the host keeps for it: its share of what the whole disk takes.
    fn allocated(&self) -> u64 {
        let size = self.disk.size_bytes();
        let allocated = self.disk.allocated_bytes().unwrap_or(size).min(size);
        if self.len == size || size == 0 {
            return allocated;
        }
        let share = u128::from(allocated) * u128::from(self.len) / u128::from(size);
        u64::try_from(share).unwrap_or(allocated)
    }
}

/// What a file handle other than that of `disk.img` stands for.
#[derive(Clone)]
pub(crate) enum Opened {
    View(View),
    Text(Arc<[u8]>),
}

/// A snapshot of the bundle.
struct Frozen {
    guid: String,
    disk: Mutex<Option<Arc<Disk>>>,
    /// Its size and what the host keeps for it, which never change.
    sizes: OnceLock<(u64, u64)>,
    /// Whether a failure to open it is in the log already.
    told: AtomicBool,
}

impl Frozen {
    fn new(guid: String) -> Self {
        Self {
            guid,
            disk: Mutex::new(None),
            sizes: OnceLock::new(),
            told: AtomicBool::new(false),
        }
    }

    fn kept(&self) -> Option<Arc<Disk>> {
        self.disk.lock().clone()
    }

    /// Opens its disk; a failure is tried again at the next call.
    fn open(&self, opener: &Opener) -> Result<Arc<Disk>, Errno> {
        match ensure_heap(OPENING_MAX).and_then(|()| opener(&self.guid)) {
            Ok(disk) => Ok(disk),
            Err(e) => {
                if !self.told.swap(true, Ordering::Relaxed) {
                    log::error!("snapshot {} cannot be shown: {e}", self.guid);
                }
                Err(Errno::EIO)
            }
        }
    }
}

#[derive(Default)]
struct Handles {
    last: u64,
    open: HashMap<u64, Opened>,
}

#[derive(Default)]
struct Parts {
    /// Counts the times that the list was dropped, so that one read before that is not kept.
    epoch: u64,
    list: Option<Arc<[Partition]>>,
}

/// Everything that the mount shows.
pub(crate) struct Views {
    pub(crate) tree: Tree,
    /// The newest state of the disk.
    pub(crate) live: View,
    pub(crate) settings: Settings,
    /// Whether the disk took writes when it was mounted; a failure may end that later.
    pub(crate) writable: bool,
    info: Arc<[u8]>,
    frozen: Vec<Frozen>,
    /// Indices of those whose disks are kept, oldest first.
    kept: Mutex<VecDeque<usize>>,
    opener: Opener,
    parts: Mutex<Parts>,
    handles: Mutex<Handles>,
    /// Open files that may write to the disk.
    writers: AtomicUsize,
    /// Time of the last change, in nanoseconds since 1970.
    changed_ns: AtomicU64,
}

impl fmt::Debug for Views {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Views")
            .field("tree", &self.tree)
            .finish_non_exhaustive()
    }
}

fn since_epoch_ns(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

impl Views {
    pub(crate) fn new(
        disk: Arc<Disk>,
        shape: Shape,
        settings: Settings,
        guids: Vec<String>,
        opener: Opener,
    ) -> Self {
        Self {
            tree: Tree::new(
                shape,
                settings.disk_name.clone(),
                guids.clone(),
                settings.latest.clone(),
            ),
            writable: !disk.is_read_only(),
            live: View::whole(disk),
            info: Arc::from(settings.info_json.as_bytes()),
            changed_ns: AtomicU64::new(since_epoch_ns(settings.mtime)),
            settings,
            frozen: guids.into_iter().map(Frozen::new).collect(),
            kept: Mutex::new(VecDeque::with_capacity(KEPT_MAX + 1)),
            opener,
            parts: Mutex::default(),
            handles: Mutex::default(),
            writers: AtomicUsize::new(0),
        }
    }

    /// True when nothing has to be opened or read for this node.
    pub(crate) fn is_ready(&self, node: Node) -> bool {
        match node {
            // The root itself is always there, but listing it names the partitions.
            Node::Root | Node::Part(_) => {
                !self.settings.partitions || self.parts.lock().list.is_some()
            }
            Node::SnapshotDisk(i) => self
                .frozen
                .get(i)
                .is_none_or(|frozen| frozen.disk.lock().is_some()),
            _ => true,
        }
    }

    /// The partitions of the live disk; may read them. Fails only for lack of memory.
    pub(crate) fn partitions(&self) -> Result<Arc<[Partition]>, Errno> {
        let epoch = {
            let parts = self.parts.lock();
            if let Some(list) = &parts.list {
                return Ok(Arc::clone(list));
            }
            parts.epoch
        };
        if !self.settings.partitions {
            return Ok(Arc::default());
        }
        ensure_heap(OPENING_MAX).map_err(|_| Errno::ENOMEM)?;
        let list: Arc<[Partition]> = match partitions::list(&self.live.disk) {
            Ok(list) => list.into(),
            Err(e) => {
                log::warn!("no partitions are shown: {e}");
                Arc::default()
            }
        };
        let mut parts = self.parts.lock();
        if parts.epoch == epoch {
            parts.list = Some(Arc::clone(&list));
        }
        Ok(list)
    }

    /// The range of a disk behind a node; may open or read it first.
    pub(crate) fn view(&self, node: Node) -> Result<View, Errno> {
        match node {
            Node::Disk => Ok(self.live.clone()),
            Node::SnapshotDisk(i) => {
                let frozen = self.frozen.get(i).ok_or(Errno::ENOENT)?;
                match frozen.kept() {
                    Some(disk) => Ok(View::whole(disk)),
                    None => frozen.open(&self.opener).map(|disk| self.keep(i, disk)),
                }
            }
            Node::Part(number) => {
                let parts = self.partitions()?;
                let part = parts
                    .iter()
                    .find(|p| p.number == number)
                    .ok_or(Errno::ENOENT)?;
                Ok(View {
                    disk: Arc::clone(&self.live.disk),
                    start: part.start,
                    len: part.len,
                })
            }
            _ => Err(Errno::EISDIR),
        }
    }

    /// Keeps the disk of a snapshot, and lets that of another one go.
    fn keep(&self, i: usize, disk: Arc<Disk>) -> View {
        let view = View::whole(Arc::clone(&disk));
        let Some(frozen) = self.frozen.get(i) else {
            return view;
        };
        let _ = frozen.sizes.set((view.len, view.allocated()));
        // Whatever goes, goes without a lock: it may be the last that holds the files.
        let replaced = frozen.disk.lock().replace(disk);
        let mut kept = self.kept.lock();
        if replaced.is_none() {
            kept.push_back(i);
        }
        let oldest = (kept.len() > KEPT_MAX).then(|| kept.pop_front()).flatten();
        drop(kept);
        let gone = oldest.and_then(|oldest| self.frozen.get(oldest)?.disk.lock().take());
        drop((replaced, gone));
        view
    }

    /// Whether the bytes of a node can be written.
    pub(crate) fn is_writable(&self, node: Node) -> bool {
        node == Node::Disk && !self.live.disk.is_read_only()
    }

    fn perm(&self, node: Node) -> u16 {
        let Settings {
            file_mask,
            dir_mask,
            ..
        } = self.settings;
        match node.sort() {
            Sort::Directory => 0o777 & !dir_mask,
            Sort::Link => 0o777,
            Sort::File if self.writable && node == Node::Disk => 0o666 & !file_mask,
            Sort::File => 0o444 & !file_mask,
        }
    }

    /// Size and allocated bytes; may open or read the disk behind the node first.
    fn sizes(&self, node: Node) -> Result<(u64, u64), Errno> {
        Ok(match node {
            Node::Disk => (self.live.len, self.live.allocated()),
            Node::Part(_) => {
                let view = self.view(node)?;
                (view.len, view.allocated())
            }
            Node::SnapshotDisk(i) => {
                let known = self.frozen.get(i).and_then(|frozen| frozen.sizes.get());
                match known {
                    Some(sizes) => *sizes,
                    None => {
                        let view = self.view(node)?;
                        (view.len, view.allocated())
                    }
                }
            }
            Node::Info => (len_u64(self.info.len()), len_u64(self.info.len())),
            Node::Latest => (self.tree.newest().map_or(0, |name| len_u64(name.len())), 0),
            // Its length is known only when it is read.
            Node::Stats => (0, 0),
            Node::Root | Node::Snapshots | Node::Snapshot(_) => (0, 0),
        })
    }

    /// The attributes of a node; may open or read the disk behind it first.
    pub(crate) fn attr(&self, node: Node) -> Result<FileAttr, Errno> {
        let (size, allocated) = self.sizes(node)?;
        let mtime = match node {
            Node::SnapshotDisk(_) | Node::Info | Node::Latest => self.settings.mtime,
            Node::Stats => SystemTime::now(),
            _ => UNIX_EPOCH + Duration::from_nanos(self.changed_ns.load(Ordering::Relaxed)),
        };
        Ok(FileAttr {
            ino: INodeNo(self.tree.ino(node)),
            size,
            blocks: allocated.div_ceil(512),
            atime: mtime,
            mtime,
            ctime: mtime,
            crtime: mtime,
            kind: match node.sort() {
                Sort::Directory => FileType::Directory,
                Sort::File => FileType::RegularFile,
                Sort::Link => FileType::Symlink,
            },
            perm: self.perm(node),
            nlink: self.tree.nlink(node),
            uid: self.settings.uid,
            gid: self.settings.gid,
            rdev: 0,
            // The kernel derives its own block size from this one, and knows none over a page.
            blksize: 4096,
            flags: 0,
        })
    }

    /// What `setattr` compares with.
    pub(crate) fn present(&self, node: Node) -> Result<Present, Errno> {
        let attr = self.attr(node)?;
        let FileAttr {
            size,
            perm,
            uid,
            gid,
            ..
        } = attr;
        Ok(Present {
            size,
            perm,
            uid,
            gid,
            writable: self.is_writable(node),
        })
    }

    /// The disk has been written to, or somebody sets the time of that.
    pub(crate) fn changed(&self, at: SystemTime) {
        self.changed_ns.store(since_epoch_ns(at), Ordering::Relaxed);
    }

    /// Counts one more open file that may write.
    pub(crate) fn writer_came(&self) {
        self.writers.fetch_add(1, Ordering::AcqRel);
    }

    /// Counts one less; true when it was the last, and then the partitions are read anew at the
    /// next look.
    pub(crate) fn writer_left(&self) -> bool {
        let last = self.writers.fetch_sub(1, Ordering::AcqRel) == 1;
        if last {
            let mut parts = self.parts.lock();
            parts.epoch = parts.epoch.wrapping_add(1);
            parts.list = None;
        }
        last
    }

    /// Opens anything but the live disk: what the handle will read from then on.
    pub(crate) fn open(&self, node: Node) -> Result<u64, Errno> {
        let opened = match node {
            Node::Info => Opened::Text(Arc::clone(&self.info)),
            Node::Stats => Opened::Text(self.stats()?),
            _ => Opened::View(self.view(node)?),
        };
        let mut handles = self.handles.lock();
        handles.open.try_reserve(1).map_err(|_| Errno::ENOMEM)?;
        handles.last = handles.last.saturating_add(1);
        let fh = handles.last;
        handles.open.insert(fh, opened);
        Ok(fh)
    }

    pub(crate) fn opened(&self, fh: u64) -> Option<Opened> {
        self.handles.lock().open.get(&fh).cloned()
    }

    pub(crate) fn close(&self, fh: u64) {
        // The last reference to a disk may go here: not under the lock.
        let gone = self.handles.lock().open.remove(&fh);
        drop(gone);
    }

    fn stats(&self) -> Result<Arc<[u8]>, Errno> {
        match serde_json::to_vec_pretty(&self.live.disk.stats()) {
            Ok(mut text) => {
                text.push(b'\n');
                Ok(text.into())
            }
            Err(e) => {
                let error = crate::error::Error::from(std::io::Error::from(e));
                Err(errno::answer("stats.json", &error))
            }
        }
    }

    /// Closes the snapshots that were opened.
    pub(crate) fn close_snapshots(&mut self) {
        self.handles.get_mut().open.clear();
        for frozen in &mut self.frozen {
            if let Some(Err(e)) = frozen.disk.get_mut().take().map(Disk::close) {
                log::warn!("closing snapshot {}: {e}", frozen.guid);
            }
        }
    }
}
