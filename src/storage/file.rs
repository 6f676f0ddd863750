//! A real file of the host, read and written through the page cache unless it is told to go direct.

use super::direct::Direct;
use super::pace::{self, Pace};
use super::{FileId, Keep, Storage, Way, aligned};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::{file as sys, open};
use crate::units::{FileOffset, len_u64};
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// Pages of the host's cache are multiples of this.
const PAGE: u64 = 4096;
/// Zeros that stand in for a host call that the file system lacks.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// A real file of the host.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    id: FileId,
    /// Set once the host has said that it cannot do the call, so that it is not asked each time.
    no_punch: AtomicBool,
    no_zero_range: AtomicBool,
    no_allocate: AtomicBool,
    no_copy: AtomicBool,
    no_cached: AtomicBool,
    pace: Pace,
    /// Set once for good: nothing goes through the page cache any more.
    direct: OnceLock<Direct>,
}

impl FileStorage {
    /// Takes over an open file, which must be a plain one.
    pub fn new(file: File) -> Result<Self> {
        let meta = file.metadata()?;
        if !meta.file_type().is_file() {
            return Err(Error::why(ErrorKind::OutsideBundle, "not a plain file"));
        }
        Ok(Self {
            id: FileId {
                device: meta.dev(),
                inode: meta.ino(),
            },
            file,
            no_punch: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
            no_allocate: AtomicBool::new(false),
            no_copy: AtomicBool::new(false),
            no_cached: AtomicBool::new(false),
            pace: Pace::default(),
            direct: OnceLock::new(),
        })
    }

    /// A new file without a name in a directory; it goes with its last user.
    pub fn unnamed_in(dir: &Path) -> Result<Self> {
        let file = open::unnamed(dir).map_err(|e| Error::from(e).in_file(dir))?;
        Self::new(file)
    }

    /// Shares blocks as [`Storage::share_from`] does, and says why where the host cannot.
    pub fn share_or_say(
        &self,
        at: FileOffset,
        source: BorrowedFd<'_>,
        from: Range<FileOffset>,
    ) -> Result<()> {
        let (start, end) = (from.start.get(), from.end.get());
        let share = || sys::try_clone_range(source, start, end, self.file.as_fd(), at.get());
        Ok(sys::retry_interrupted(share)?)
    }

    /// Bytes of the blocks that files on its file system are made of.
    pub fn block_bytes(&self) -> Result<u64> {
        let found = nix::sys::statfs::fstatfs(&self.file).map_err(std::io::Error::from)?;
        Ok(u64::try_from(found.block_size()).unwrap_or(0).max(512))
    }

    /// Lets go of all but the open file.
    #[must_use]
    pub fn into_file(self) -> File {
        self.file
    }

    /// The open file, for locks.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    fn write_zeros(&self, range: &Range<FileOffset>) -> Result<()> {
        let mut at = range.start.get();
        let end = range.end.get();
        while at < end {
            let left = end.saturating_sub(at);
            let step = left.min(len_u64(ZEROS.len()));
            let bytes = &ZEROS[..usize::try_from(step).unwrap_or(ZEROS.len())];
            self.write_at(FileOffset::new(at), bytes)?;
            at = at.saturating_add(step);
        }
        Ok(())
    }

    /// Copies past the cache where nothing shares a block; `false` where something does. Blocks are
    /// shared if the host can do that.
    fn copy_directly(
        &self,
        direct: &Direct,
        at: FileOffset,
        source: &dyn Storage,
        from: Range<FileOffset>,
    ) -> Result<bool> {
        let len = from.end.get().saturating_sub(from.start.get());
        let Some(mut left) = usize::try_from(len).ok() else {
            return Ok(false);
        };
        if !self.no_copy.load(Ordering::Relaxed) {
            if self.share_from(at, source, from.clone())? {
                return Ok(true);
            }
            self.no_copy.store(true, Ordering::Relaxed);
        }
        if !direct.fits(at.get(), left) || !direct.fits(from.start.get(), left) {
            return Ok(false);
        }
        let Some(source) = source.as_host_fd() else {
            return Ok(false);
        };
        // Neither side needs a second piece of memory while this one is held: the source takes
        // these blocks, or refuses.
        let mut piece = aligned::take(left)?;
        let mut done = 0;
        while left > 0 {
            let step = left.min(piece.len());
            let here = from.start.saturating_add(done).get();
            if !sys::read_all(source, here, &mut piece[..step])? {
                return Ok(false);
            }
            self.write_at(at.saturating_add(done), &piece[..step])?;
            done = done.saturating_add(len_u64(step));
            left -= step;
        }
        Ok(true)
    }

    /// Runs a host call that some file systems lack. `false` when this one does.
    fn attempt(lacking: &AtomicBool, call: impl FnOnce() -> std::io::Result<()>) -> Result<bool> {
        if lacking.load(Ordering::Relaxed) {
            return Ok(false);
        }
        match call() {
            Ok(()) => Ok(true),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => {
                lacking.store(true, Ordering::Relaxed);
                Ok(false)
            }
            Err(e) => Err(e.into()),
        }
    }
}

impl Storage for FileStorage {
    fn len(&self) -> Result<FileOffset> {
        Ok(FileOffset::new(self.file.metadata()?.len()))
    }

    fn read_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<()> {
        if let Some(direct) = self.direct.get() {
            return direct
                .read(&self.file, at.get(), buf)
                .map_err(|e| e.at_offset(at));
        }
        let len = len_u64(buf.len());
        let _turn = pace::read_turn(len);
        let read = self.file.read_exact_at(buf, at.get());
        self.pace.read(&self.file, len);
        read.map_err(|e| Error::from(e).at_offset(at))
    }

    fn read_now(&self, at: FileOffset, buf: &mut [u8]) -> Result<usize> {
        if pace::is_tight() || self.direct.get().is_some() {
            // Whose turn it is cannot be told without waiting; the medium is always waited for.
            return Ok(0);
        }
        let mut came = 0;
        let knows = Self::attempt(&self.no_cached, || {
            came = sys::read_cached(self.file.as_fd(), at.get(), buf)?;
            Ok(())
        });
        match knows {
            Ok(true) => Ok(came),
            Ok(false) => self.read_at(at, buf).map(|()| buf.len()),
            // Who may wait meets it again, and says so.
            Err(_) => Ok(0),
        }
    }

    fn write_at(&self, at: FileOffset, buf: &[u8]) -> Result<()> {
        if let Some(direct) = self.direct.get() {
            return direct
                .write(&self.file, at.get(), buf)
                .map_err(|e| e.at_offset(at));
        }
        let _turn = self.pace.turn();
        let written = self.file.write_all_at(buf, at.get());
        self.pace.wrote(&self.file, len_u64(buf.len()));
        written.map_err(|e| Error::from(e).at_offset(at))
    }

    fn sync_data(&self) -> Result<()> {
        Ok(sys::retry_interrupted(|| self.file.sync_data())?)
    }

    fn set_len(&self, len: FileOffset) -> Result<()> {
        Ok(sys::retry_interrupted(|| self.file.set_len(len.get()))?)
    }

    fn allocate(&self, range: Range<FileOffset>) -> Result<()> {
        let allocated = Self::attempt(&self.no_allocate, || {
            sys::allocate(self.file.as_fd(), range.start.get(), range.end.get())
        })?;
        if allocated || self.len()? >= range.end {
            return Ok(());
        }
        // No way to reserve blocks here: a hole of the right length reads as zeros all the same,
        // and a later lack of space arrives at the write, where the ENOSPC policy meets it.
        self.set_len(range.end)
    }

    fn zero(&self, range: Range<FileOffset>, keep: Keep) -> Result<()> {
        if range.start >= range.end {
            return Ok(());
        }
        let (start, end) = (range.start.get(), range.end.get());
        if self.direct.get().is_some() {
            // The host would zero parts of pages in its cache.
            let (first, last) = (start.next_multiple_of(PAGE), end / PAGE * PAGE);
            let whole = FileOffset::new(first)..FileOffset::new(last);
            if first >= last {
                return self.write_zeros(&range);
            }
            if first > start || last < end {
                self.write_zeros(&(range.start..whole.start))?;
                self.write_zeros(&(whole.end..range.end))?;
                return self.zero(whole, keep);
            }
        }
        let fd = self.file.as_fd();
        let done = match keep {
            Keep::Nothing => Self::attempt(&self.no_punch, || sys::punch_hole(fd, start, end))?,
            Keep::Blocks => Self::attempt(&self.no_zero_range, || sys::zero_range(fd, start, end))?,
        };
        if done {
            Ok(())
        } else {
            self.write_zeros(&range)
        }
    }

    fn copy_from(
        &self,
        at: FileOffset,
        source: &dyn Storage,
        from: Range<FileOffset>,
    ) -> Result<bool> {
        let Some(source_fd) = source.as_host_fd() else {
            return Ok(false);
        };
        if self.no_copy.load(Ordering::Relaxed) {
            return Ok(false);
        }
        if let Some(direct) = self.direct.get() {
            return self.copy_directly(direct, at, source, from);
        }
        let (start, end) = (from.start.get(), from.end.get());
        let _turn = self.pace.turn();
        let copied = sys::copy_range(source_fd, start, end, self.file.as_fd(), at.get());
        self.pace.wrote(&self.file, end.saturating_sub(start));
        match copied {
            Ok(true) => Ok(true),
            Ok(false) => {
                self.no_copy.store(true, Ordering::Relaxed);
                Ok(false)
            }
            Err(e) => Err(Error::from(e).at_offset(at)),
        }
    }

    fn share_from(
        &self,
        at: FileOffset,
        source: &dyn Storage,
        from: Range<FileOffset>,
    ) -> Result<bool> {
        let Some(source_fd) = source.as_host_fd() else {
            return Ok(false);
        };
        let (start, end) = (from.start.get(), from.end.get());
        sys::clone_range(source_fd, start, end, self.file.as_fd(), at.get())
            .map_err(|e| Error::from(e).at_offset(at))
    }

    fn next_data(&self, from: FileOffset) -> Result<Option<Range<FileOffset>>> {
        let found = sys::next_data(self.file.as_fd(), from.get())?;
        Ok(found.map(|range| FileOffset::new(range.start)..FileOffset::new(range.end)))
    }

    fn allocated_bytes(&self) -> Result<u64> {
        Ok(self.file.metadata()?.blocks().saturating_mul(512))
    }

    fn go_direct(&self) -> Result<u64> {
        let direct = match self.direct.get() {
            Some(direct) => direct,
            None => {
                let limits = sys::go_direct(&self.file)?;
                let direct = Direct::new(limits.memory, limits.block)?;
                self.direct.get_or_init(|| direct)
            }
        };
        // Some file systems take the wish and refuse every read.
        if self.len()? > FileOffset::ZERO {
            self.read_at(FileOffset::ZERO, &mut [0])?;
        }
        Ok(direct.block())
    }

    fn lend(&self, at: FileOffset, memory: &[u8], way: Way) -> bool {
        let direct = self.direct.get();
        direct.is_some_and(|direct| direct.lend(at.get(), memory, way))
    }

    fn give_back(&self, at: FileOffset, len: usize, way: Way) {
        if let Some(direct) = self.direct.get() {
            direct.give_back(at.get(), len, way);
        }
    }

    fn drop_cache(&self) -> Result<()> {
        Ok(sys::drop_cache(self.file.as_fd())?)
    }

    fn file_id(&self) -> Option<FileId> {
        Some(self.id)
    }

    fn as_host_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_memory_comes_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let content: Vec<u8> = (0..1 << 20).map(|at: u32| (at / 512) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let storage = FileStorage::new(File::open(&path).unwrap()).unwrap();
        let mut buf = vec![0; content.len()];
        let came = storage.read_now(FileOffset::ZERO, &mut buf).unwrap();
        if came == 0 && pace::is_tight() {
            // Other tests of this program have moved so much that it has been noticed how small
            // the group's memory is; nothing comes at once then, and all to who waits.
            storage.read_at(FileOffset::ZERO, &mut buf).unwrap();
            assert!(buf == content);
            return;
        }
        assert!(came == content.len() && buf == content);
        storage.sync_data().unwrap();
        storage.drop_cache().unwrap();
        buf.fill(0);
        let came = storage.read_now(FileOffset::ZERO, &mut buf).unwrap();
        assert!(buf[..came] == content[..came]);
        if storage.no_cached.load(Ordering::Relaxed) {
            assert_eq!(
                came,
                content.len(),
                "where the host cannot tell, all is read"
            );
        }
        let past = FileOffset::new(2 << 20);
        assert!(
            storage.no_cached.load(Ordering::Relaxed)
                || storage.read_now(past, &mut buf).unwrap() == 0
        );
    }
}
