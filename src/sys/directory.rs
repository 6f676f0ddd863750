//! Names in an open directory: made, renamed, removed, listed, made durable.

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, RenameFlags, openat, renameat, renameat2};
use nix::sys::stat::{FchmodatFlags, Mode, fchmod, fchmodat, fstat, fstatat, mkdirat};
use nix::sys::statvfs::fstatvfs;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, fsync, unlinkat};
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Opens a directory for listing and syncing; one that `O_PATH` gives can do neither.
pub fn open(path: &Path) -> io::Result<OwnedFd> {
    let how = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    Ok(openat(AT_FDCWD, path, how, Mode::empty())?)
}

/// Opens a directory in another one, for listing; a link of that name is none.
pub fn open_in(dir: BorrowedFd<'_>, name: &Path) -> io::Result<OwnedFd> {
    let how = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(openat(dir, name, how, Mode::empty())?)
}

/// True where a name, which is no link, is that of an open file or directory.
pub fn is_named(dir: BorrowedFd<'_>, name: &Path, opened: BorrowedFd<'_>) -> io::Result<bool> {
    let own = fstat(opened)?;
    match fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(there) => Ok((there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)),
        Err(Errno::ENOENT) => Ok(false),
        Err(other) => Err(other.into()),
    }
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
    for_owner(File::from(openat(dir, name, how, mode)?))
}

/// A mask that takes the owner's own bits would leave a file that he cannot open again.
fn for_owner(file: File) -> io::Result<File> {
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    if !Mode::from_bits_truncate(fstat(&file)?.st_mode).contains(mode) {
        // A file system that has no modes does not mind.
        let _ = fchmod(&file, mode);
    }
    Ok(file)
}

/// Creates a file (mode 0600) in a directory that has no name there, and so goes away with its last
/// descriptor.
pub fn nameless(dir: &Path) -> io::Result<File> {
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    let how = OFlag::O_RDWR | OFlag::O_TMPFILE | OFlag::O_CLOEXEC;
    match openat(AT_FDCWD, dir, how, mode) {
        // File systems of the network lack this.
        Err(Errno::EOPNOTSUPP | Errno::EISDIR | Errno::ENOENT | Errno::EINVAL) => {}
        other => return for_owner(File::from(other?)),
    }
    let dir = open(dir)?;
    let pid = std::process::id();
    for number in 0..100 {
        let name = format!(".ploopfs-{pid}-{number}");
        match create_new(dir.as_fd(), Path::new(&name)) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            made => {
                let file = made?;
                remove(dir.as_fd(), Path::new(&name))?;
                return Ok(file);
            }
        }
    }
    Err(io::Error::from_raw_os_error(libc::EEXIST))
}

/// Renames within the directory, replacing what has the new name.
pub fn rename(dir: BorrowedFd<'_>, from: &Path, to: &Path) -> io::Result<()> {
    Ok(renameat(dir, from, dir, to)?)
}

/// Renames within the directory; a name that is there already is EEXIST, and stays.
pub fn rename_new(dir: BorrowedFd<'_>, from: &Path, to: &Path) -> io::Result<()> {
    match renameat2(dir, from, dir, to, RenameFlags::RENAME_NOREPLACE) {
        // Some file systems lack it; who takes the name between look and rename loses it.
        Err(Errno::EINVAL | Errno::ENOSYS) => {
            match fstatat(dir, to, AtFlags::AT_SYMLINK_NOFOLLOW) {
                Err(Errno::ENOENT) => rename(dir, from, to),
                Err(other) => Err(other.into()),
                Ok(_) => Err(Errno::EEXIST.into()),
            }
        }
        other => Ok(other?),
    }
}

/// Makes a directory (mode 0700) that must not exist yet, and opens it.
pub fn create_directory(dir: BorrowedFd<'_>, name: &Path) -> io::Result<OwnedFd> {
    mkdirat(dir, name, Mode::S_IRWXU)?;
    let how = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let opened = match openat(dir, name, how, Mode::empty()) {
        // A mask that takes the owner's own bits. Only he may change the mode, and no link is
        // followed: a handle is taken first, and the mode is that of what it leads to.
        Err(Errno::EACCES) => {
            let path = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            openat(dir, name, path, Mode::empty()).and_then(|handle| {
                let itself = format!("/proc/self/fd/{}", handle.as_raw_fd());
                fchmodat(
                    AT_FDCWD,
                    itself.as_str(),
                    Mode::S_IRWXU,
                    FchmodatFlags::FollowSymlink,
                )?;
                openat(dir, name, how, Mode::empty())
            })
        }
        other => other,
    };
    let made = opened.and_then(|opened| {
        // For root nothing is refused, but the directory's next user may be another.
        if !Mode::from_bits_truncate(fstat(&opened)?.st_mode).contains(Mode::S_IRWXU) {
            let _ = fchmod(&opened, Mode::S_IRWXU);
        }
        Ok(opened)
    });
    made.map_err(|e| {
        let _ = unlinkat(dir, name, UnlinkatFlags::RemoveDir);
        e.into()
    })
}

/// Removes an empty directory.
pub fn remove_directory(dir: BorrowedFd<'_>, name: &Path) -> io::Result<()> {
    Ok(unlinkat(dir, name, UnlinkatFlags::RemoveDir)?)
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

/// Bytes that the file system has for files of this process.
pub fn available(dir: BorrowedFd<'_>) -> io::Result<u64> {
    let found = fstatvfs(dir)?;
    Ok(found
        .blocks_available()
        .saturating_mul(found.fragment_size()))
}

/// Makes the names durable. File systems that cannot sync a directory keep its names in step by
/// themselves, and say EINVAL.
pub fn sync(dir: BorrowedFd<'_>) -> io::Result<()> {
    match fsync(dir) {
        Err(Errno::EINVAL) => Ok(()),
        other => Ok(other?),
    }
}
