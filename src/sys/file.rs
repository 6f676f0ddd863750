//! Space, holes and caches of one open file.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Calls again while a signal interrupts: a half-done `fallocate` or `fsync` is no failure.
pub fn retry_interrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

fn off(value: u64) -> io::Result<libc::off64_t> {
    libc::off64_t::try_from(value).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}

fn fallocate(fd: BorrowedFd<'_>, mode: libc::c_int, start: u64, end: u64) -> io::Result<()> {
    let (at, len) = (off(start)?, off(end.saturating_sub(start))?);
    retry_interrupted(|| {
        // SAFETY: `fd` is borrowed and so open for the whole call; the rest are plain numbers.
        #[allow(unsafe_code)]
        let result = unsafe { libc::fallocate64(fd.as_raw_fd(), mode, at, len) };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    })
}

/// Reserves blocks for `start..end` and lengthens the file to `end` where it is shorter.
pub fn allocate(fd: BorrowedFd<'_>, start: u64, end: u64) -> io::Result<()> {
    fallocate(fd, 0, start, end)
}

/// Gives the blocks of `start..end` back; the range then reads as zeros.
pub fn punch_hole(fd: BorrowedFd<'_>, start: u64, end: u64) -> io::Result<()> {
    fallocate(
        fd,
        libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
        start,
        end,
    )
}

/// Makes `start..end` read as zeros and keeps its blocks.
pub fn zero_range(fd: BorrowedFd<'_>, start: u64, end: u64) -> io::Result<()> {
    fallocate(
        fd,
        libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
        start,
        end,
    )
}

/// `FICLONERANGE` of linux/fs.h.
const CLONE_RANGE: libc::c_ulong = 0x4020_940d;

/// `struct file_clone_range` of linux/fs.h.
#[repr(C)]
struct CloneRange {
    source: i64,
    from: u64,
    len: u64,
    to: u64,
}

/// Lets a target share the blocks of `start..end` of another file, from its own `at` on, where the
/// host can. `Ok(false)` where it cannot; then nothing was done.
pub fn clone_range(
    source: BorrowedFd<'_>,
    start: u64,
    end: u64,
    target: BorrowedFd<'_>,
    at: u64,
) -> io::Result<bool> {
    match try_clone_range(source, start, end, target, at) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(false),
        Err(e) => match e.raw_os_error() {
            Some(
                libc::EXDEV
                | libc::EOPNOTSUPP
                | libc::ENOTTY
                | libc::ENOSYS
                | libc::EINVAL
                | libc::EPERM
                | libc::EBADF
                | libc::ETXTBSY,
            ) => Ok(false),
            _ => Err(e),
        },
    }
}

/// The same for those who want to know why the host cannot.
pub fn try_clone_range(
    source: BorrowedFd<'_>,
    start: u64,
    end: u64,
    target: BorrowedFd<'_>,
    at: u64,
) -> io::Result<()> {
    let range = CloneRange {
        source: source.as_raw_fd().into(),
        from: start,
        len: end.saturating_sub(start),
        to: at,
    };
    // SAFETY: both descriptors are borrowed and open for the whole call, and the kernel only reads
    // the structure, which is live and laid out as it expects.
    #[allow(unsafe_code)]
    let result = unsafe { libc::ioctl(target.as_raw_fd(), CLONE_RANGE, &raw const range) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Copies `start..end` of one file to another's `at`, all of it.
///
/// `Ok(false)` when the host cannot copy between these two files; part of the range may have been
/// copied by then, so the caller copies all of it.
pub fn copy_range(
    source: BorrowedFd<'_>,
    start: u64,
    end: u64,
    target: BorrowedFd<'_>,
    at: u64,
) -> io::Result<bool> {
    let (mut from, mut to) = (off(start)?, off(at)?);
    let end = off(end)?;
    while from < end {
        let len = usize::try_from(end.saturating_sub(from)).unwrap_or(usize::MAX);
        // SAFETY: both descriptors are borrowed and open for the whole call, and the two offsets
        // are live, exclusively borrowed integers that the kernel only reads and updates.
        #[allow(unsafe_code)]
        let copied = unsafe {
            libc::copy_file_range(
                source.as_raw_fd(),
                &mut from,
                target.as_raw_fd(),
                &mut to,
                len,
                0,
            )
        };
        match copied {
            // The source ended early: the caller's own copy says where and why.
            0 => return Ok(false),
            n if n > 0 => {}
            _ => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => {}
                e => match e.raw_os_error() {
                    Some(
                        libc::EXDEV
                        | libc::EOPNOTSUPP
                        | libc::ENOSYS
                        | libc::EINVAL
                        | libc::ETXTBSY
                        | libc::EPERM
                        | libc::EBADF,
                    ) => return Ok(false),
                    _ => return Err(e),
                },
            },
        }
    }
    Ok(true)
}

fn seek(fd: BorrowedFd<'_>, at: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    let at = off(at)?;
    // SAFETY: `fd` is borrowed and so open for the whole call; the rest are plain numbers.
    #[allow(unsafe_code)]
    let found = unsafe { libc::lseek64(fd.as_raw_fd(), at, whence) };
    if let Ok(found) = u64::try_from(found) {
        return Ok(Some(found));
    }
    match io::Error::last_os_error() {
        e if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        e => Err(e),
    }
}

/// Reads the beginning of `buf`, as much as is in memory, and tells how much that was. Where the
/// host cannot tell what is in memory the error is EOPNOTSUPP.
pub fn read_cached(fd: BorrowedFd<'_>, at: u64, buf: &mut [u8]) -> io::Result<usize> {
    let at = off(at)?;
    let piece = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    let read = retry_interrupted(|| {
        // SAFETY: `fd` is borrowed and so open for the whole call; `piece` is live, and is all of
        // `buf`, which nobody else has while this function borrows it.
        #[allow(unsafe_code)]
        let read =
            unsafe { libc::preadv2(fd.as_raw_fd(), &raw const piece, 1, at, libc::RWF_NOWAIT) };
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    });
    match read {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(0),
        other => other,
    }
}

/// Fills `buf`; false where the file ends before, or does not take direct I/O of this place and
/// length.
pub fn read_all(fd: BorrowedFd<'_>, at: u64, buf: &mut [u8]) -> io::Result<bool> {
    let (mut at, mut rest) = (off(at)?, buf);
    while !rest.is_empty() {
        match nix::sys::uio::pread(fd, rest, at) {
            Ok(0) | Err(nix::errno::Errno::EINVAL) => return Ok(false),
            Ok(came) => {
                at = at.saturating_add(i64::try_from(came).unwrap_or(i64::MAX));
                rest = &mut rest[came..];
            }
            Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(true)
}

/// The next range at or after `from` that has data, as the file system tells it; `None` when there
/// is none up to the end of the file.
pub fn next_data(fd: BorrowedFd<'_>, from: u64) -> io::Result<Option<Range<u64>>> {
    let Some(start) = seek(fd, from, libc::SEEK_DATA)? else {
        return Ok(None);
    };
    // Every file has a virtual hole at its end, so this one is always found.
    let end = seek(fd, start, libc::SEEK_HOLE)?.unwrap_or(start);
    Ok(Some(start..end))
}

/// What direct I/O on a file takes: multiples of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectLimits {
    /// For addresses in memory.
    pub memory: usize,
    /// For places in the file, and for lengths.
    pub block: u64,
}

/// Where the host does not say: what all devices take that there are.
const DIRECT_ANYWHERE: u32 = 4096;

/// Has the open file read and written past the page cache, by everyone who has this description of
/// it. EINVAL where the file system cannot do that.
pub fn go_direct(file: &std::fs::File) -> io::Result<DirectLimits> {
    // SAFETY: all bytes of the structure are plain numbers, for which 0 is a value.
    #[allow(unsafe_code)]
    let mut about: libc::statx = unsafe { std::mem::zeroed() };
    let (flags, mask) = (libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN);
    // SAFETY: `file` is open, the name is a string of no letters, and the kernel fills in a
    // structure that is live and laid out as it expects.
    #[allow(unsafe_code)]
    let told =
        unsafe { libc::statx(file.as_raw_fd(), c"".as_ptr(), flags, mask, &raw mut about) } == 0;
    let (memory, block) = if told && about.stx_mask & libc::STATX_DIOALIGN != 0 {
        (about.stx_dio_mem_align, about.stx_dio_offset_align)
    } else {
        (DIRECT_ANYWHERE, DIRECT_ANYWHERE)
    };
    let is_usable = |limit: u32| limit.is_power_of_two() && limit <= 64 << 10;
    if !is_usable(memory) || memory > DIRECT_ANYWHERE || !is_usable(block) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: `file` is open, and these two commands take and give plain numbers.
    #[allow(unsafe_code)]
    let is_set = unsafe {
        let flags = libc::fcntl(file.as_raw_fd(), libc::F_GETFL);
        flags >= 0 && libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_DIRECT) == 0
    };
    if !is_set {
        return Err(io::Error::last_os_error());
    }
    Ok(DirectLimits {
        memory: usize::try_from(memory).unwrap_or(usize::MAX),
        block: block.into(),
    })
}

/// Starts writing all dirty pages of the file and waits for them. Makes nothing durable.
pub fn write_back(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    retry_interrupted(|| {
        // SAFETY: `fd` is borrowed and so open for the whole call; the rest are plain numbers.
        #[allow(unsafe_code)]
        let result = unsafe { libc::sync_file_range(fd.as_raw_fd(), 0, 0, flags) };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    })
}

/// Asks the kernel to drop its clean cached pages of the file.
pub fn drop_cache(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: `fd` is borrowed and so open for the whole call; the rest are plain numbers.
    #[allow(unsafe_code)]
    let errno = unsafe { libc::posix_fadvise(fd.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    if errno == 0 {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(errno))
    }
}
