//! Names in an open directory: made, renamed, removed, listed, made durable.

use nix::dir::Dir;
use nix::fcntl::{AT_FDCWD, OFlag, openat, renameat};
use nix::sys::stat::{Mode, fchmod, fstat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, fsync, unlinkat};
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Opens a directory for listing and syncing; one that `O_PATH` gives can do neither.
pub fn open(path: &Path) -> io::Result<OwnedFd> {
    let how = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    Ok(openat(AT_FDCWD, path, how, Mode::empty())?)
}

/// Opens the directory behind a handle once more, for listing and syncing.
pub fn reopen(dir: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let how = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    Ok(openat(dir, ".", how, Mode::empty())?)
}

/// Gives a file the owner, the group and the mode of another one.
pub fn take_after(new: BorrowedFd<'_>, old: BorrowedFd<'_>) -> io::Result<()> {
    let (wanted, found) = (fstat(old)?, fstat(new)?);
    if (wanted.st_uid, wanted.st_gid) != (found.st_uid, found.st_gid) {
        let (user, group) = (wanted.st_uid, wanted.st_gid);
        fchown(new, Some(Uid::from_raw(user)), Some(Gid::from_raw(group)))?;
    }
    let mode = Mode::from_bits_truncate(wanted.st_mode & 0o777);
    Ok(fchmod(new, mode)?)
}

/// Creates a file (mode 0600) that must not exist yet; a link of that name counts as existing.
pub fn create_new(dir: BorrowedFd<'_>, name: &Path) -> io::Result<File> {
    let how = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    Ok(File::from(openat(dir, name, how, mode)?))
}

/// Renames within the directory, replacing what has the new name.
pub fn rename(dir: BorrowedFd<'_>, from: &Path, to: &Path) -> io::Result<()> {
    Ok(renameat(dir, from, dir, to)?)
}

/// Removes a name that is no directory's.
pub fn remove(dir: BorrowedFd<'_>, name: &Path) -> io::Result<()> {
    Ok(unlinkat(dir, name, UnlinkatFlags::NoRemoveDir)?)
}

/// All names but `.` and `..`, in the host's order.
pub fn entries(dir: BorrowedFd<'_>) -> io::Result<Vec<OsString>> {
    // A descriptor of its own: the position in a listing belongs to the open directory.
    let how = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut names = Vec::new();
    for entry in Dir::openat(dir, ".", how, Mode::empty())?.iter() {
        let name = std::ffi::OsStr::from_bytes(entry?.file_name().to_bytes()).to_owned();
        if name != "." && name != ".." {
            names.push(name);
        }
    }
    Ok(names)
}

/// Makes the names durable. File systems that cannot sync a directory keep its names in step by
/// themselves, and say EINVAL.
pub fn sync(dir: BorrowedFd<'_>) -> io::Result<()> {
    match fsync(dir) {
        Err(nix::errno::Errno::EINVAL) => Ok(()),
        other => Ok(other?),
    }
}
