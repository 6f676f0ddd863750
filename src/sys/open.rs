//! Opening files without being led astray: by links, devices, and names that change meanwhile.

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, FcntlArg, OFlag, OpenHow, ResolveFlag, fcntl, openat, openat2};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::Mode;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path};
use std::time::Duration;

/// How often an open is tried again that the kernel answers with "try again": a rename elsewhere
/// during the walk, or another program's lease on the file.
const TRIES: u32 = 50;

fn flags(write: bool) -> OFlag {
    let access = if write {
        OFlag::O_RDWR
    } else {
        OFlag::O_RDONLY
    };
    // Not to hang on a FIFO, and not to take over a terminal.
    access | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | OFlag::O_NOCTTY
}

/// What is only read keeps its access time, where the host allows that: to its owner and to root.
fn quietly(file: File, write: bool) -> File {
    if !write {
        let flags = fcntl(&file, FcntlArg::F_GETFL).map(OFlag::from_bits_retain);
        let quiet = |flags| fcntl(&file, FcntlArg::F_SETFL(flags | OFlag::O_NOATIME));
        let _ = flags.and_then(quiet);
    }
    file
}

fn patiently<T>(mut open: impl FnMut() -> nix::Result<T>) -> io::Result<T> {
    let mut tries = 0;
    loop {
        match open() {
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) if tries < TRIES => {
                tries += 1;
                std::thread::sleep(Duration::from_millis(20));
            }
            other => return other.map_err(io::Error::from),
        }
    }
}

/// Opens what the user named, links and all.
pub fn any(path: &Path, write: bool) -> io::Result<File> {
    let opened = patiently(|| openat(AT_FDCWD, path, flags(write), Mode::empty()))?;
    Ok(quietly(File::from(opened), write))
}

/// Makes a file without a name in a directory, which nobody can ever give one. It goes with its
/// last user.
pub fn unnamed(dir: &Path) -> io::Result<File> {
    let how = OFlag::O_TMPFILE | OFlag::O_EXCL | OFlag::O_RDWR | OFlag::O_CLOEXEC;
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    Ok(File::from(patiently(|| openat(AT_FDCWD, dir, how, mode))?))
}

/// Opens a directory, to start walks from.
pub fn directory(path: &Path) -> io::Result<OwnedFd> {
    let how = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    patiently(|| openat(AT_FDCWD, path, how, Mode::empty()))
}

/// Opens a directory directly in another one; a symbolic link of that name is ELOOP or ENOTDIR.
pub fn directory_in(dir: BorrowedFd<'_>, name: &Path) -> io::Result<OwnedFd> {
    let how = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    patiently(|| openat(dir, name, how, Mode::empty()))
}

/// Opens a file below a directory. A name that leaves it is EXDEV, a symbolic link anywhere in the
/// name ELOOP, whatever is renamed meanwhile.
pub fn beneath(dir: BorrowedFd<'_>, name: &Path, write: bool) -> io::Result<File> {
    let how = OpenHow::new().flags(flags(write)).resolve(
        ResolveFlag::RESOLVE_BENEATH
            | ResolveFlag::RESOLVE_NO_MAGICLINKS
            | ResolveFlag::RESOLVE_NO_SYMLINKS,
    );
    #[cfg(test)]
    if tests::openat2_is_lacking() {
        return beneath_by_steps(dir, name, write);
    }
    match patiently(|| openat2(dir, name, how)) {
        // Kernels before 5.6 lack the call, and old container sandboxes forbid it.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) => {
            beneath_by_steps(dir, name, write)
        }
        other => Ok(quietly(File::from(other?), write)),
    }
}

/// The same where the kernel cannot: one component at a time, never through a link.
fn beneath_by_steps(dir: BorrowedFd<'_>, name: &Path, write: bool) -> io::Result<File> {
    let step = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut below: Option<OwnedFd> = None;
    let mut components = name.components().peekable();
    while let Some(component) = components.next() {
        let part = match component {
            Component::Normal(part) => Path::new(part),
            Component::CurDir => continue,
            _ => return Err(io::Error::from_raw_os_error(libc::EXDEV)),
        };
        let at = below.as_ref().map_or(dir, AsFd::as_fd);
        if components.peek().is_none() {
            let how = flags(write) | OFlag::O_NOFOLLOW;
            let opened = patiently(|| openat(at, part, how, Mode::empty()))?;
            return Ok(quietly(File::from(opened), write));
        }
        let next = File::from(patiently(|| openat(at, part, step, Mode::empty()))?);
        let kind = next.metadata()?.file_type();
        if !kind.is_dir() {
            let errno = if kind.is_symlink() {
                libc::ELOOP
            } else {
                libc::ENOTDIR
            };
            return Err(io::Error::from_raw_os_error(errno));
        }
        below = Some(next.into());
    }
    Err(io::Error::from_raw_os_error(libc::EISDIR))
}

/// Opens a lock file directly in a directory. What is no plain file is an error without an errno.
pub fn lock_file(dir: BorrowedFd<'_>, name: &Path, write: bool) -> io::Result<File> {
    let how = flags(write) | OFlag::O_NOFOLLOW;
    let file = File::from(patiently(|| openat(dir, name, how, Mode::empty()))?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a plain file",
        ));
    }
    Ok(file)
}

/// Lets this process open as many files as the host's hard limit allows, and tells how many.
pub fn raise_file_limit() -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(hard)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::cell::Cell;
    use std::os::unix::fs::symlink;

    thread_local! {
        static LACKING: Cell<bool> = const { Cell::new(false) };
    }

    pub(super) fn openat2_is_lacking() -> bool {
        LACKING.get()
    }

    /// Runs a test as the kernel is and then as if it lacked `openat2`.
    pub(crate) fn with_and_without_openat2(test: impl Fn()) {
        test();
        LACKING.set(true);
        test();
        LACKING.set(false);
    }

    fn errno<T>(result: io::Result<T>) -> Option<i32> {
        result.err().and_then(|e| e.raw_os_error())
    }

    #[test]
    fn both_walks_stay_beneath_and_follow_no_link() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("sub")).unwrap();
        std::fs::write(root.join("sub/file"), "x").unwrap();
        std::fs::write(dir.path().join("outside"), "x").unwrap();
        symlink("sub/file", root.join("link")).unwrap();
        symlink("sub", root.join("sublink")).unwrap();
        let fd = directory(&root).unwrap();
        for walk in [beneath, beneath_by_steps] {
            let open = |name: &str| walk(fd.as_fd(), Path::new(name), false);
            assert!(open("sub/file").is_ok());
            assert!(open("./sub/./file").is_ok());
            assert_eq!(errno(open("link")), Some(libc::ELOOP));
            assert_eq!(errno(open("sublink/file")), Some(libc::ELOOP));
            assert_eq!(errno(open("../outside")), Some(libc::EXDEV));
            assert_eq!(errno(open("/etc/passwd")), Some(libc::EXDEV));
            assert_eq!(errno(open("sub/none")), Some(libc::ENOENT));
            assert_eq!(errno(open("sub/file/x")), Some(libc::ENOTDIR));
        }
    }

    #[test]
    fn a_fifo_does_not_hang() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        let fd = directory(dir.path()).unwrap();
        for write in [false, true] {
            // Opened or refused: the caller looks at what it got.
            let _ = beneath(fd.as_fd(), Path::new("fifo"), write);
            let _ = any(&path, write);
        }
    }

    #[test]
    fn lock_files_are_plain_files_and_never_made() {
        let dir = tempfile::tempdir().unwrap();
        let fd = directory(dir.path()).unwrap();
        let open = |name: &str, write| lock_file(fd.as_fd(), Path::new(name), write);
        std::fs::write(dir.path().join("a.lck"), "").unwrap();
        symlink("elsewhere", dir.path().join("b.lck")).unwrap();
        nix::unistd::mkfifo(&dir.path().join("c.lck"), Mode::S_IRWXU).unwrap();
        std::fs::create_dir(dir.path().join("d.lck")).unwrap();
        for write in [false, true] {
            assert!(open("a.lck", write).is_ok());
            assert_eq!(errno(open("b.lck", write)), Some(libc::ELOOP));
            for name in ["c.lck", "d.lck"] {
                assert!(open(name, write).is_err(), "{name}");
            }
            assert_eq!(errno(open("e.lck", write)), Some(libc::ENOENT));
        }
        assert!(!dir.path().join("e.lck").exists());
    }

    #[test]
    fn the_limit_of_open_files_is_the_hard_one() {
        let limit = raise_file_limit().unwrap();
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (limit, limit));
    }
}
