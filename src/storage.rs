//! The only door to the bytes of host files.
//!
//! Imports: `units`, `error`, `sys`.
//! Never: knows what the bytes mean.
//!
//! A [`Storage`] is one open file: positional reads and writes that are complete or fail, a data
//! sync, and the calls that give space back to the host. [`file::FileStorage`] is the real one,
//! [`mem::MemStorage`] one in memory for tests. Everything above holds an `Arc<dyn Storage>`: a
//! virtual call is nothing beside a system call.
//!
//! A [`Directory`] is the names around it: what makes, renames and removes whole files.
//! [`directory::HostDirectory`] is the real one.

pub mod aligned;
pub mod beside;
mod direct;
pub mod directory;
pub mod file;
pub mod host;
pub mod lock;
pub mod mem;
mod pace;

use crate::error::{Error, Result};
use crate::units::FileOffset;
use std::fmt::Debug;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// What happens to the host's blocks under a range that is zeroed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// The blocks stay reserved for the file (an unwritten extent where the host has such).
    Blocks,
    /// The blocks go back to the host (a punched hole).
    Nothing,
}

/// Which way bytes go between a file and memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the file.
    Read,
    /// To the file.
    Write,
}

/// What identifies a file on this host whatever name it was opened by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId {
    /// Device number of the file system.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
}

/// One open host file.
///
/// All methods take `&self` and may run concurrently; overlapping calls keep no order.
pub trait Storage: Send + Sync + Debug {
    /// Length of the file in bytes, now.
    fn len(&self) -> Result<FileOffset>;

    /// True when the file has no bytes.
    fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == FileOffset::ZERO)
    }

    /// Fills `buf` from `at`. A file that ends earlier is [`crate::error::ErrorKind::Truncated`]:
    /// a short read is never passed on.
    fn read_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<()>;

    /// Fills the beginning of `buf` from `at`, as far as the host can without waiting for the
    /// medium, and tells how far. Where the host cannot tell what would wait, all is read.
    fn read_now(&self, at: FileOffset, buf: &mut [u8]) -> Result<usize> {
        self.read_at(at, buf).map(|()| buf.len())
    }

    /// Writes all of `buf` at `at`, or fails; what of it was written on failure is unknown.
    fn write_at(&self, at: FileOffset, buf: &[u8]) -> Result<()>;

    /// Makes all that was written, zeroed, allocated or cut before this call durable, with the
    /// file's length.
    fn sync_data(&self) -> Result<()>;

    /// Cuts the file, or lengthens it with a hole.
    fn set_len(&self, len: FileOffset) -> Result<()>;

    /// Reserves blocks for the range and lengthens the file to its end where it is shorter. New
    /// bytes read as zeros. On failure the file may have become longer by any amount.
    fn allocate(&self, range: Range<FileOffset>) -> Result<()>;

    /// Makes the range read as zeros without changing the file's length. Falls back to writing
    /// zeros where the host can do no better.
    fn zero(&self, range: Range<FileOffset>, keep: Keep) -> Result<()>;

    /// Copies a range from another file, sharing blocks where the host can. `false` means that the
    /// host cannot do it between these two and nothing useful was done: copy by hand.
    fn copy_from(
        &self,
        at: FileOffset,
        source: &dyn Storage,
        from: Range<FileOffset>,
    ) -> Result<bool>;

    /// Shares the blocks of a range of another file, without copying any. `false` where the host
    /// cannot; then nothing was done.
    fn share_from(
        &self,
        _at: FileOffset,
        _source: &dyn Storage,
        _from: Range<FileOffset>,
    ) -> Result<bool> {
        Ok(false)
    }

    /// The next range at or after `from` that the host has blocks for, or `None` up to the end.
    fn next_data(&self, from: FileOffset) -> Result<Option<Range<FileOffset>>>;

    /// Bytes of host space that the file occupies.
    fn allocated_bytes(&self) -> Result<u64>;

    /// Asks the host to drop what it caches of the file, so that the next reads come from the
    /// medium. Best effort: dirty pages stay.
    fn drop_cache(&self) -> Result<()>;

    /// From now on all is read and written past the host's cache; tells what places and lengths on
    /// the medium are multiples of. Bytes that are less than that can be written only where the
    /// file has the whole of it.
    fn go_direct(&self) -> Result<u64> {
        Err(Error::errno(libc::EOPNOTSUPP))
    }

    /// Lets somebody else move these bytes between the file and this memory, by the descriptor of
    /// [`Storage::as_host_fd`], as [`Storage::read_at`] or [`Storage::write_at`] would. It does not
    /// wait: `false` where that cannot be now, and then only those two can. Each loan is given back
    /// with [`Storage::give_back`], of the same numbers, when the bytes have moved or never will.
    fn lend(&self, _at: FileOffset, _memory: &[u8], _way: Way) -> bool {
        false
    }

    /// What was lent is not used any more.
    fn give_back(&self, _at: FileOffset, _len: usize, _way: Way) {}

    /// Which file this is, where it is one of the host's.
    fn file_id(&self) -> Option<FileId>;

    /// The host descriptor, where there is one, so that two of them can copy between each other.
    fn as_host_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        None
    }
}

/// A storage shared by all who read through it.
pub type SharedStorage = Arc<dyn Storage>;

/// What [`Directory::hold`] keeps others from.
#[derive(Debug, Default)]
pub struct Hold {
    _locked: Option<File>,
}

/// One directory of the host: the names in it. A name is a single component.
pub trait Directory: Send + Sync + Debug {
    /// Opens a regular file; never follows a symbolic link.
    fn open(&self, name: &str, write: bool) -> Result<SharedStorage>;

    /// Creates a file that must not exist yet, for reading and writing.
    fn create_new(&self, name: &str) -> Result<SharedStorage>;

    /// Renames, replacing what has the new name in one step.
    fn rename(&self, from: &str, to: &str) -> Result<()>;

    /// Renames a file or a directory; a name that is there already is EEXIST, and stays.
    fn rename_new(&self, from: &str, to: &str) -> Result<()> {
        if self.entries()?.iter().any(|name| name == to) {
            return Err(Error::errno(libc::EEXIST));
        }
        self.rename(from, to)
    }

    /// Removes a name that is no directory's.
    fn remove(&self, name: &str) -> Result<()>;

    /// Makes a directory that must not exist yet. Only some kinds of directory can.
    fn create_directory(&self, _name: &str) -> Result<Arc<dyn Directory>> {
        Err(Error::errno(libc::EOPNOTSUPP))
    }

    /// Opens a directory in this one; never follows a symbolic link. A plain file is ENOTDIR.
    fn open_directory(&self, _name: &str) -> Result<Arc<dyn Directory>> {
        Err(Error::errno(libc::EOPNOTSUPP))
    }

    /// Keeps others who ask here too from what has this name, a file or a directory, for as long as
    /// the value lives; asks for it until `deadline`. `None` where somebody else has it, or nothing
    /// of the name is left; an error where the host cannot tell.
    fn hold(&self, _name: &str, _deadline: Instant) -> Result<Option<Hold>> {
        Ok(Some(Hold::default()))
    }

    /// Removes an empty directory.
    fn remove_directory(&self, _name: &str) -> Result<()> {
        Err(Error::errno(libc::EOPNOTSUPP))
    }

    /// All names but `.` and `..`, sorted.
    fn entries(&self) -> Result<Vec<String>>;

    /// Bytes that files in it can still grow by, where that is known.
    fn available(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    /// Makes the names durable: creations, renames and removals before this call.
    fn sync(&self) -> Result<()>;
}
