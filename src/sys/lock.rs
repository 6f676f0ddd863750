//! Byte-range locks that belong to an open file, and whole-file locks.

use nix::fcntl::{FcntlArg, fcntl};
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

/// A lock that stands in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// First byte that it covers.
    pub start: u64,
    /// Who holds it, where the kernel knows: locks that belong to open files have no owner.
    pub pid: Option<u32>,
}

fn request(kind: libc::c_int, range: &Range<u64>) -> io::Result<libc::flock> {
    let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
    let off = |value: u64| libc::off_t::try_from(value).map_err(|_| invalid());
    Ok(libc::flock {
        l_type: libc::c_short::try_from(kind).map_err(|_| invalid())?,
        l_whence: libc::c_short::try_from(libc::SEEK_SET).map_err(|_| invalid())?,
        l_start: off(range.start)?,
        l_len: off(range.end.saturating_sub(range.start))?,
        l_pid: 0,
    })
}

fn set(fd: BorrowedFd<'_>, kind: libc::c_int, range: &Range<u64>) -> io::Result<bool> {
    let request = request(kind, range)?;
    match fcntl(fd, FcntlArg::F_OFD_SETLK(&request)) {
        Ok(_) => Ok(true),
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Takes a shared lock on these bytes. `false` where another has an exclusive one.
pub fn share(fd: BorrowedFd<'_>, range: &Range<u64>) -> io::Result<bool> {
    set(fd, libc::F_RDLCK, range)
}

/// Gives up what this open file holds of these bytes.
pub fn release(fd: BorrowedFd<'_>, range: &Range<u64>) -> io::Result<()> {
    set(fd, libc::F_UNLCK, range).map(|_| ())
}

/// The first lock of anyone else on any of these bytes, shared ones included.
pub fn conflict(fd: BorrowedFd<'_>, range: &Range<u64>) -> io::Result<Option<Conflict>> {
    let mut request = request(libc::F_WRLCK, range)?;
    fcntl(fd, FcntlArg::F_OFD_GETLK(&mut request))?;
    if libc::c_int::from(request.l_type) == libc::F_UNLCK {
        return Ok(None);
    }
    Ok(Some(Conflict {
        start: u64::try_from(request.l_start).unwrap_or(0),
        pid: u32::try_from(request.l_pid).ok().filter(|pid| *pid != 0),
    }))
}

/// Locks the whole file without waiting, as `flock(2)` does. `false` where it is locked otherwise.
pub fn whole(fd: BorrowedFd<'_>, exclusive: bool) -> io::Result<bool> {
    let how = if exclusive {
        libc::LOCK_EX
    } else {
        libc::LOCK_SH
    };
    super::file::retry_interrupted(|| {
        // SAFETY: `fd` is borrowed and so open for the whole call; the rest is a plain number.
        #[allow(unsafe_code)]
        let result = unsafe { libc::flock(fd.as_raw_fd(), how | libc::LOCK_NB) };
        if result == 0 {
            return Ok(true);
        }
        match io::Error::last_os_error() {
            e if e.raw_os_error() == Some(libc::EWOULDBLOCK) => Ok(false),
            e => Err(e),
        }
    })
}
